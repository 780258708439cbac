"""Plain tables: which argument of a foreign callable is what.

The *scan* table maps the selective scans of the field to the operands of ``ssmquant::selective_scan``. Adding a scan is
one entry here, or in an ``Adapter``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.adapter import ScanRole

__all__ = ["SCAN_ROLES", "FunctionModule", "function_rule", "scan_operands"]

_MAMBA = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state")

SCAN_ROLES: tuple[ScanRole, ...] = (
    ScanRole("ssmquant::selective_scan", _MAMBA[:9], always_state=True),
    ScanRole("SelectiveScanFn", _MAMBA),  # mamba_ssm, and the copies of it in VMamba, VM-UNet, Vim ...
)
"""Built in. ``name`` is a custom op's qualified name or the class name of an ``autograd.Function``."""


class FunctionModule(nn.Module):
    """A user's ``autograd.Function`` as a module, so that graphs can call it and ``torch.compile`` can see it."""

    def __init__(self, cls: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.cls = cls

    def forward(self, *args: Any) -> Any:
        return self.cls.apply(*args)

    def shape_run(self, *args: Any) -> Any:
        """Runs the Function's own forward on fakes, without autograd."""
        if self.cls.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context:
            return self.cls.forward(*args)
        return self.cls.forward(_DummyContext(len(args)), *args)

    def __reduce__(self) -> Any:
        return _rebuild_function, (self.cls.__module__, self.cls.__qualname__, self.cls)

    def extra_repr(self) -> str:
        return f"{self.cls.__module__}.{self.cls.__qualname__}"


def _rebuild_function(module: str, qualname: str, cls: Any = None) -> FunctionModule:
    if cls is None:
        cls = importlib.import_module(module)
        for part in qualname.split("."):
            cls = getattr(cls, part)
    return FunctionModule(cls)


class _DummyContext:
    """What a Function's forward gets instead of a context while it is traced."""

    def __init__(self, n: int) -> None:
        self.needs_input_grad = (False,) * n
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *t: Tensor) -> None:
        pass

    def mark_dirty(self, *t: Tensor) -> None:
        pass

    def mark_non_differentiable(self, *t: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass

    save_for_forward = save_for_backward


def _scan_shape(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Any:
    out = torch.empty_like(delta, dtype=u.dtype)
    if len(rest) > 4 and rest[4]:
        return out, A.new_empty((u.shape[0], A.shape[0], A.shape[1]), dtype=torch.float32)
    return out


def function_rule(cls: type) -> Callable[..., Any] | None:
    """How to find the output shapes of a Function that is native code: its forward cannot run on fakes."""
    return _scan_shape if any(r.name == cls.__name__ for r in SCAN_ROLES) else None


def _name_of(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        mod = root.get_submodule(str(node.target))
        return mod.cls.__name__ if isinstance(mod, FunctionModule) else ""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return target._schema.name
        return str(getattr(target, "_qualified_op_name", ""))
    return ""


def scan_operands(
    root: nn.Module, node: fx.Node, extra: tuple[ScanRole, ...] = ()
) -> tuple[ScanRole, dict[str, Any]] | None:
    """The role and the operands by name if ``node`` is a selective scan, else None."""
    name = _name_of(root, node)
    if not name:
        return None
    for role in (*extra, *SCAN_ROLES):
        if role.name == name:
            operands: dict[str, Any] = dict(zip(role.arguments, node.args, strict=False))
            operands.update({k: v for k, v in node.kwargs.items() if k in role.arguments})
            return role, {k: v for k, v in operands.items() if v is not None}
    return None
