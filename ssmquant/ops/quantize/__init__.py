"""Fused fake quantization: a pass or two over memory where plain PyTorch takes dozens. Used where it serves.

``serves`` says whether a back end ("triton" on a GPU, "cpu") is there; ``use_backend("chunked", op="quantize")`` turns
them off. The functions are those of ``forms``, without gradients. Under ``torch.compile`` they are operators of
``torch.ops.ssmquant``; otherwise kernels are called at once, as an operator in Python costs as much as a small kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.ops.quantize.forms import Bank, DLSRule, Groups
from ssmquant.ops.selection import selected

__all__ = [
    "Bank",
    "DLSRule",
    "Groups",
    "bank_backward",
    "bank_forward",
    "dls_backward",
    "dls_forward",
    "dls_range",
    "explain",
    "lsq_backward",
    "lsq_forward",
    "serves",
]

_HALVES = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 2**31 - 2**14  # kernels count elements in 32 bits


def explain(device: torch.device) -> tuple[ModuleType | None, str]:
    """The back end for a device, and why it is that one."""
    if selected("quantize") == "chunked":
        return None, "plain PyTorch, as chosen"
    if device.type == "cpu":
        from ssmquant.ops.quantize import cpu as module
    elif not _has_triton():
        return None, "plain PyTorch: Triton is not installed"
    else:
        from ssmquant.ops.quantize import triton as module  # type: ignore[no-redef]
    reason = module.unavailable(device)
    return (module, module.NAME) if reason is None else (None, f"plain PyTorch: {reason}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _backend(device: torch.device) -> ModuleType | None:
    return explain(device)[0]


def _there(kind: str, index: int | None) -> bool:
    return _backend(torch.device(kind) if index is None else torch.device(kind, index)) is not None


# torch.compiler.assume_constant_result, which would import all of torch._dynamo, and Triton with it.
_there._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(x: Tensor, *scalars: Tensor) -> bool:
    """Whether the kernels can compute with ``x`` and float32 ``scalars``."""
    if x.dtype not in _HALVES or any(s.dtype != torch.float32 or s.device != x.device for s in scalars):
        return False
    return (
        0 < x.numel() < _MOST and x.device.type in ("cpu", "cuda") and _there(x.device.type, x.device.index)
    )


def dense(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if it does not lie densely in memory (``forms``)."""
    if x.is_contiguous() or torch.compiler.is_compiling():
        return x.contiguous()
    strides = sorted(((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1))
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def groups_of(x: Tensor, axis: int | None) -> Groups:
    """Groups along ``axis`` of a dense tensor, or one of all."""
    if axis is None or x.shape[axis] == 1:
        return Groups()
    return Groups(x.shape[axis], x.stride(axis))


def _like(g: Tensor, x: Tensor) -> Tensor:
    """``g`` with the dtype and strides of ``x``."""
    if g.dtype == x.dtype and g.stride() == x.stride():
        return g
    return torch.empty_like(x).copy_(g)


# ---- operators -----------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("ssmquant", "FRAGMENT")
_SCALARS = "Tensor alpha, Tensor beta, int qmin, int qmax, float eps"
_GROUPS = "SymInt count, SymInt inner"
_RULE = "int bits, int qmin, float eps, bool floor_first, bool dead_pass, bool scaled"
_BANK = "int[] counts, int[] groups, int qmin, int qmax, int levels, bool scaled, float eps"


def _call(name: str, x: Tensor, *args: Any) -> Any:
    backend = _backend(x.device)
    if backend is None:
        raise RuntimeError(f"{name}: no kernels for {x.device}")
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        return getattr(backend, name)(*args)


def _lsq_forward(x: Tensor, *args: Any) -> Tensor:
    out: Tensor = _call("lsq_forward", x, x, *args)
    return out


def _lsq_backward_call(g: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *scalars, scaled = args
    scale = 1 / math.sqrt(x.numel() * args[3]) if scaled else 1.0
    out: tuple[Tensor, Tensor, Tensor] = _call("lsq_backward", x, _like(g, x), x, *scalars, scale)
    return out


def _lsq_backward(g: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dx, alpha, beta = _lsq_backward_call(g, x, *args)
    return dx, alpha.clone(), beta.clone()  # an operator's results may not share memory


def _dls_forward(
    x: Tensor, w: Tensor, v: Tensor, count: int, inner: int, *rule: Any
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _call("dls_forward", x, x, w, v, Groups(count, inner), DLSRule(*rule))
    return out


def _dls_backward(
    g: Tensor, x: Tensor, w: Tensor, v: Tensor, ranges: Tensor, count: int, inner: int, *rule: Any
) -> tuple[Tensor, ...]:
    *rest, need_x = rule
    groups = Groups(count, inner)
    dx, dw, dv = _call("dls_backward", x, _like(g, x), x, w, v, ranges, groups, DLSRule(*rest), need_x)
    return dx, dw.clone(), dv.clone()


def _bank(args: tuple[Any, ...]) -> tuple[Bank, float]:
    counts, groups, qmin, qmax, levels, scaled, eps = args
    return Bank(tuple(counts), tuple(groups), qmin, qmax, levels, scaled), eps


def _bank_forward(x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, *args: Any) -> Tensor:
    out: Tensor = _call("bank_forward", x, x, alpha, beta, thresholds, *_bank(args))
    return out


def _bank_backward(g: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    alpha, beta, grid, thresholds, *rest = args
    dx, *sums = _call("bank_backward", x, g, x, alpha, beta, grid, thresholds, *_bank(tuple(rest)))
    return dx, *(t.clone() for t in sums)


def _fake_dls_forward(x: Tensor, w: Tensor, v: Tensor, count: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), w.new_empty(6, count)


def _fake_dls_backward(g: Tensor, x: Tensor, w: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x) if args[-1] else x.new_empty(0), torch.empty_like(w), torch.empty_like(v)


def _fake_lsq_backward(g: Tensor, x: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), alpha.new_empty(()), alpha.new_empty(())


def _fake_bank_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, grid: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    levels = args[-3]
    last = torch.empty_like(grid) if levels else x.new_empty(0)
    return (*(torch.empty_like(t) for t in (x, alpha, beta)), last)


def _operator(signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssmquant::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ssmquant, name)


_OPS = {
    "lsq_forward": _operator(
        f"_lsq_forward(Tensor x, {_SCALARS}) -> Tensor", _lsq_forward, lambda x, *_: torch.empty_like(x)
    ),
    "lsq_backward": _operator(
        f"_lsq_backward(Tensor g, Tensor x, {_SCALARS}, bool scaled) -> (Tensor, Tensor, Tensor)",
        _lsq_backward,
        _fake_lsq_backward,
    ),
    "dls_forward": _operator(
        f"_dls_forward(Tensor x, Tensor w, Tensor v, {_GROUPS}, {_RULE}) -> (Tensor, Tensor)",
        _dls_forward,
        _fake_dls_forward,
    ),
    "dls_backward": _operator(
        f"_dls_backward(Tensor g, Tensor x, Tensor w, Tensor v, Tensor ranges, {_GROUPS}, {_RULE}, bool need_x)"
        " -> (Tensor, Tensor, Tensor)",
        _dls_backward,
        _fake_dls_backward,
    ),
    "bank_forward": _operator(
        f"_bank_forward(Tensor x, Tensor alpha, Tensor beta, Tensor thresholds, {_BANK}) -> Tensor",
        _bank_forward,
        lambda x, *_: torch.empty_like(x),
    ),
    "bank_backward": _operator(
        f"_bank_backward(Tensor g, Tensor x, Tensor alpha, Tensor beta, Tensor grid, Tensor thresholds, {_BANK})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _bank_backward,
        _fake_bank_backward,
    ),
}  # fmt: skip


def _at_once(x: Tensor) -> bool:
    """Whether to call kernels directly: not while something traces or replaces tensors."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, nn.Parameter)


def lsq_forward(x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float) -> Tensor:
    """See ``forms``; alpha is raised to eps in magnitude."""
    run = _lsq_forward if _at_once(x) else _OPS["lsq_forward"]
    out: Tensor = run(x, alpha, beta, qmin, qmax, eps)
    return out


def lsq_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float, scaled: bool
) -> tuple[Tensor, ...]:
    """See ``forms``; ``scaled`` as of ``DLSRule``."""
    run = _lsq_backward_call if _at_once(x) else _OPS["lsq_backward"]
    out: tuple[Tensor, ...] = run(g, x, alpha, beta, qmin, qmax, eps, scaled)
    return out


def dls_range(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule) -> Tensor:
    """See ``forms``."""
    if _at_once(x):
        out: Tensor = _call("dls_range", x, x, w, v, groups, rule)
    else:
        out = _OPS["dls_forward"](x, w, v, *groups.flat, *rule.flat)[1]
    return out


def dls_forward(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule) -> tuple[Tensor, Tensor]:
    """See ``forms``."""
    if _at_once(x):
        out: tuple[Tensor, Tensor] = _call("dls_forward", x, x, w, v, groups, rule)
    else:
        out = _OPS["dls_forward"](x, w, v, *groups.flat, *rule.flat)
    return out


def dls_backward(
    g: Tensor, x: Tensor, w: Tensor, v: Tensor, ranges: Tensor, groups: Groups, rule: DLSRule, need_x: bool
) -> tuple[Tensor, ...]:
    """See ``forms``."""
    if _at_once(x):
        out: tuple[Tensor, ...] = _call("dls_backward", x, _like(g, x), x, w, v, ranges, groups, rule, need_x)
    else:
        out = _OPS["dls_backward"](g, x, w, v, ranges, *groups.flat, *rule.flat, need_x)
    return out


def bank_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, bank: Bank, eps: float
) -> Tensor:
    """See ``forms``."""
    if _at_once(x):
        out: Tensor = _call("bank_forward", x, x, alpha, beta, thresholds, bank, eps)
    else:
        out = _OPS["bank_forward"](x, alpha, beta, thresholds, *bank.flat, eps)
    return out


def bank_backward(
    g: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    grid: Tensor,
    thresholds: Tensor,
    bank: Bank,
    eps: float,
) -> tuple[Tensor, ...]:
    """See ``forms``."""
    if _at_once(x):
        out: tuple[Tensor, ...] = _call("bank_backward", x, g, x, alpha, beta, grid, thresholds, bank, eps)
    else:
        out = _OPS["bank_backward"](g, x, alpha, beta, grid, thresholds, *bank.flat, eps)
    return out
