"""What the tracer does with a user's ``autograd.Function``: looks into it, unfolds it, or keeps it as one node.

Most Functions are Python code whose shapes show when it runs on fake tensors. Fused kernels are not: the table below
says what those of the field compute, in plain torch calls that the tracer then records, weights and scans included.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.adapter import FunctionRole
from ssmquant.errors import TraceError
from ssmquant.ops import mixers, selective_scan
from ssmquant.ops.selective_scan import lb_window

__all__ = [
    "FUNCTION_ROLES",
    "WITHOUT_EFFECT",
    "FunctionError",
    "FunctionModule",
    "arguments_of",
    "call_role",
    "is_named",
    "role_of",
]


class FunctionError(TraceError):
    """A user's Function did not run on fake tensors: native code, or it does not take these sizes."""


class FunctionModule(nn.Module):
    """A user's ``autograd.Function`` as a module, so that graphs can call it and ``torch.compile`` can see it."""

    def __init__(self, cls: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.cls = cls

    def forward(self, *args: Any) -> Any:
        return self.cls.apply(*args)

    def shape_run(self, *args: Any) -> Any:
        """Runs the Function's own forward on fakes, without autograd."""
        if _splits_context(self.cls):
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


def _splits_context(cls: type[torch.autograd.Function]) -> bool:
    """Whether the Function has its context in ``setup_context``, and none in ``forward``."""
    return cls.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context


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


# ---- what they take ------------------------------------------------------------------------------------------------


def arguments_of(cls: type[torch.autograd.Function]) -> dict[str, Any]:
    """The parameters of the Function's ``forward`` without the context, and their defaults (``inspect._empty``)."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())
    except (TypeError, ValueError):  # forward is native code itself
        return {}
    if not _splits_context(cls):
        parameters = parameters[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return {}
    return {p.name: p.default for p in parameters}


def is_named(cls: type, name: str) -> bool:
    """Whether ``name`` is the class's name, or a tail of its dotted path."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    return path == name or path.endswith(f".{name}")


def role_of(cls: type[torch.autograd.Function], extra: tuple[FunctionRole, ...] = ()) -> FunctionRole | None:
    """The first role whose name fits, the user's before the built-in ones."""
    return next((r for r in (*extra, *FUNCTION_ROLES) if is_named(cls, r.name)), None)


def call_role(
    function: Callable[..., Any], cls: type[torch.autograd.Function], args: Any, platform: str
) -> Any:
    """Calls a role's function with the Function's arguments by name.

    Raises:
        TraceError: an argument without counterpart is set to something else than its default.
    """
    declared = arguments_of(cls)
    given = dict(zip(declared, args, strict=False))
    taken = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())  # a user's own
    named: dict[str, Any] = {"platform": platform} if "platform" in taken else {}
    for name, default in declared.items():
        if name not in given and default is inspect.Parameter.empty:
            raise TraceError(f"{cls.__qualname__}.apply was called without its argument '{name}'")
        value = given.get(name, default)
        if open_ended or name in taken:
            named[name] = value
        elif name not in WITHOUT_EFFECT and not _same(value, default):
            raise TraceError(
                f"{cls.__module__}.{cls.__qualname__}: the argument '{name}' has no counterpart in what ssmquant knows "
                "of this function. Say what it computes with Adapter(functions=(FunctionRole(...),))"
            )
    return function(**named)


WITHOUT_EFFECT = {
    "checkpoint_lvl",
    "deterministic_delta",
    "nrows",
    "backnrows",
    "backend",
    "x_dtype",
    "state_dtype",
}
"""Arguments that change speed, memory or the precision of intermediates, not the function."""


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


# ---- the table -----------------------------------------------------------------------------------------------------


def _inner(project: bool, windowed: bool = False) -> Callable[..., Any]:
    def unfold(xz: Tensor, platform: str = "cuda", **operands: Any) -> Any:
        window = lb_window(xz.shape[-1], platform) if windowed else 0
        return mixers.mamba_inner(xz, **operands, project=project, window=window)

    sig = inspect.signature(mixers.mamba_inner)
    platform = inspect.Parameter("platform", inspect.Parameter.KEYWORD_ONLY, default="cuda")
    vars(unfold)["__signature__"] = sig.replace(parameters=[*sig.parameters.values(), platform])
    return unfold


def _lb_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    platform: str = "cuda",
) -> Any:
    window = lb_window(u.shape[-1], platform)
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, window=window
    )


_LB = "selective_scan_interface_lbm"
FUNCTION_ROLES: tuple[FunctionRole, ...] = (
    FunctionRole(f"{_LB}.SelectiveScanFn", _lb_scan),
    FunctionRole(f"{_LB}.MambaInnerFn", _inner(project=True, windowed=True)),
    FunctionRole(f"{_LB}.MambaInnerFnNoOutProj", _inner(project=False, windowed=True)),
    FunctionRole(f"{_LB}.BiMambaInnerFn", _inner(project=True, windowed=True)),
    FunctionRole("MambaInnerFn", _inner(project=True)),
    FunctionRole("MambaInnerFnNoOutProj", _inner(project=False)),
    FunctionRole("BiMambaInnerFn", _inner(project=True)),
    FunctionRole("MambaSplitConv1dScanCombinedFn", mixers.mamba2_split_conv1d_scan),
    FunctionRole("MambaChunkScanCombinedFn", mixers.mamba2_chunk_scan),
    FunctionRole("CausalConv1dFn", mixers.causal_conv1d),
    # Two Functions share the name: one adds a residual first, one has a gate.
    FunctionRole("layernorm_gated.LayerNormFn", mixers.gated_norm),
    FunctionRole("LayerNormFn", mixers.layer_norm),
)
"""Built in, the more particular first. Libraries of kernels only, no models."""
