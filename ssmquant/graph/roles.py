"""Which node of a graph is a selective scan, and which of its arguments is what.

Custom operators are found by name. An ``autograd.Function`` is a scan if its ``forward`` takes a scan's operands under
their usual names (``u, delta, A, B, C ...``), whatever its class is called. Adding one is an entry in an ``Adapter``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.adapter import ScanRole
from ssmquant.graph.functions import WITHOUT_EFFECT, FunctionModule, arguments_of, is_named

__all__ = ["SCAN_ROLES", "scan_operands", "scan_role", "scan_shape"]

_MAMBA = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
_SSD = (
    "u",
    "delta",
    "A",
    "B",
    "C",
    "D",
    "z",
    "delta_bias",
    "delta_softplus",
    "initial_states",
    "dt_min",
    "dt_max",
)

SCAN_ROLES: tuple[ScanRole, ...] = (
    ScanRole("ssmquant::selective_scan", (*_MAMBA, "window"), always_state=True),
    ScanRole("ssmquant::ssd_scan", (*_SSD, "window", "chunk_size"), always_state=True, kind="ssd"),
)
"""Built in: our own operators."""

_NEEDED = {"u", "delta", "A", "B", "C"}
_KNOWN = {*_MAMBA, "return_last_state", "oflex"}


def _by_signature(cls: type[torch.autograd.Function]) -> ScanRole | None:
    names = tuple(arguments_of(cls))
    if _NEEDED <= set(names) <= _KNOWN | WITHOUT_EFFECT:
        return ScanRole(cls.__name__, names)
    return None


def scan_role(cls: type[torch.autograd.Function], extra: tuple[ScanRole, ...] = ()) -> ScanRole | None:
    """The role of a Function that is a selective scan, else None."""
    return next((r for r in extra if is_named(cls, r.name)), None) or _by_signature(cls)


def scan_shape(role: ScanRole, cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    """Tensors of the sizes and dtypes that such a scan returns."""
    defaults = {k: v for k, v in arguments_of(cls).items() if v is not inspect.Parameter.empty}
    o = {**defaults, **dict(zip(role.arguments, args, strict=False))}
    u: Tensor = o["u"]
    out = torch.empty_like(o["delta"], dtype=torch.float32 if o.get("oflex") else u.dtype)
    if role.always_state or o.get("return_last_state"):
        A: Tensor = o["A"]
        return out, A.new_empty((u.shape[0], A.shape[0], A.shape[1]), dtype=torch.float32)
    return out


def scan_operands(
    root: nn.Module, node: fx.Node, extra: tuple[ScanRole, ...] = ()
) -> tuple[ScanRole, dict[str, Any]] | None:
    """The role and the operands by name if ``node`` is a selective scan, else None."""
    role: ScanRole | None = None
    operands: dict[str, Any] = {}
    if node.op == "call_module":
        mod = root.get_submodule(str(node.target))
        if isinstance(mod, FunctionModule):
            role = scan_role(mod.cls, extra)
            declared = arguments_of(mod.cls).items()
            operands = {k: v for k, v in declared if v is not inspect.Parameter.empty}
    elif node.op == "call_function":
        target: Any = node.target
        overload = isinstance(target, torch._ops.OpOverload)
        name = target._schema.name if overload else str(getattr(target, "_qualified_op_name", ""))
        role = next((r for r in (*extra, *SCAN_ROLES) if r.name == name), None)
    if role is None:
        return None
    operands.update(zip(role.arguments, node.args, strict=False))
    keywords = {"x": "u", "dt": "delta", "dt_bias": "delta_bias", "dt_softplus": "delta_softplus"}
    operands.update({keywords.get(k, k) if role.kind == "ssd" else k: v for k, v in node.kwargs.items()})
    return role, {k: v for k, v in operands.items() if v is not None}
