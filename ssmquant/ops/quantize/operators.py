"""The functions of ``forms`` as operators of ``torch.ops.ssmquant``, which ``torch.compile`` takes into a graph.

They have no gradients: those are the quantizers' ``autograd.Function``s, which call them. An operator's results may not
share memory, those of the back ends may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops.quantize.choice import backend
from ssmquant.ops.quantize.forms import Bank, DLSRule, Groups

__all__ = [
    "bank_backward",
    "bank_forward",
    "dls_backward",
    "dls_bank_backward",
    "dls_bank_forward",
    "dls_forward",
    "dls_range",
    "lsq_backward",
    "lsq_forward",
]

_LIBRARY = torch.library.Library("ssmquant", "FRAGMENT")
_SCALARS = "Tensor alpha, Tensor beta, int qmin, int qmax, float eps"
_GROUPS = "SymInt count, SymInt inner"
_RULE = "int bits, int qmin, float eps, bool floor_first, bool dead_pass, bool scaled, int copies"
_BANK = "int[] counts, int[] groups, int qmin, int qmax, int levels, bool scaled, float eps"


def _call(name: str, x: Tensor, *args: Any) -> Any:
    found = backend(x.device)
    if found is None:
        raise RuntimeError(f"{name}: no kernels for {x.device}")
    return getattr(found, name)(*args)


def _lsq_forward(x: Tensor, *args: Any) -> Tensor:
    out: Tensor = _call("lsq_forward", x, x, *args)
    return out


def _lsq_backward(g: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dx, *sums = _call("lsq_backward", x, g, x, *args)
    return dx, *(t.clone() for t in sums)


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
    dx, dw, dv = _call("dls_backward", x, g, x, w, v, ranges, groups, DLSRule(*rest), need_x)
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


def _dls_bank_forward(
    x: Tensor, w: Tensor, v: Tensor, counts: list[int], *rule: Any
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _call("dls_bank_forward", x, x, w, v, tuple(counts), DLSRule(*rule))
    return out


def _dls_bank_backward(
    g: Tensor, x: Tensor, w: Tensor, v: Tensor, ranges: Tensor, counts: list[int], *rule: Any
) -> tuple[Tensor, ...]:
    dx, dw, dv = _call("dls_bank_backward", x, g, x, w, v, ranges, tuple(counts), DLSRule(*rule))
    return dx, dw.clone(), dv.clone()


def _fake_dls_forward(x: Tensor, w: Tensor, v: Tensor, count: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), w.new_empty(6, count)


def _fake_dls_backward(g: Tensor, x: Tensor, w: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x) if args[-1] else x.new_empty(0), torch.empty_like(w), torch.empty_like(v)


def _fake_bank_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, grid: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    levels = args[-3]
    last = torch.empty_like(grid) if levels else x.new_empty(0)
    return (*(torch.empty_like(t) for t in (x, alpha, beta)), last)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in tensors)


def _operator(signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssmquant::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ssmquant, name)


_LSQ_FORWARD = _operator(
    f"_lsq_forward(Tensor x, {_SCALARS}) -> Tensor", _lsq_forward, lambda x, *_: torch.empty_like(x)
)
_LSQ_BACKWARD = _operator(
    f"_lsq_backward(Tensor g, Tensor x, {_SCALARS}, int copies) -> (Tensor, Tensor, Tensor)",
    _lsq_backward,
    lambda g, x, alpha, beta, *_: _alike(x, alpha, beta),
)
_DLS_FORWARD = _operator(
    f"_dls_forward(Tensor x, Tensor w, Tensor v, {_GROUPS}, {_RULE}) -> (Tensor, Tensor)",
    _dls_forward,
    _fake_dls_forward,
)
_DLS_BACKWARD = _operator(
    f"_dls_backward(Tensor g, Tensor x, Tensor w, Tensor v, Tensor ranges, {_GROUPS}, {_RULE}, bool need_x)"
    " -> (Tensor, Tensor, Tensor)",
    _dls_backward,
    _fake_dls_backward,
)
_BANK_FORWARD = _operator(
    f"_bank_forward(Tensor x, Tensor alpha, Tensor beta, Tensor thresholds, {_BANK}) -> Tensor",
    _bank_forward,
    lambda x, *_: torch.empty_like(x),
)
_BANK_BACKWARD = _operator(
    f"_bank_backward(Tensor g, Tensor x, Tensor alpha, Tensor beta, Tensor grid, Tensor thresholds, {_BANK})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bank_backward,
    _fake_bank_backward,
)
_DLS_BANK_FORWARD = _operator(
    f"_dls_bank_forward(Tensor x, Tensor w, Tensor v, int[] counts, {_RULE}) -> (Tensor, Tensor)",
    _dls_bank_forward,
    lambda x, w, v, counts, *_: (torch.empty_like(x), w.new_empty(6, len(counts))),
)
_DLS_BANK_BACKWARD = _operator(
    f"_dls_bank_backward(Tensor g, Tensor x, Tensor w, Tensor v, Tensor ranges, int[] counts, {_RULE})"
    " -> (Tensor, Tensor, Tensor)",
    _dls_bank_backward,
    lambda g, x, w, v, *_: _alike(x, w, v),
)


# ---- by them, the functions of ``forms`` ---------------------------------------------------------------------------


def lsq_forward(x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float) -> Tensor:
    """The quantized values."""
    out: Tensor = _LSQ_FORWARD(x, alpha, beta, qmin, qmax, eps)
    return out


def lsq_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, alpha and beta."""
    out: tuple[Tensor, Tensor, Tensor] = _LSQ_BACKWARD(g, x, alpha, beta, qmin, qmax, eps, copies)
    return out


def dls_range(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule) -> Tensor:
    """The ranges of all groups."""
    return dls_forward(x, w, v, groups, rule)[1]


def dls_forward(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule) -> tuple[Tensor, Tensor]:
    """The quantized values and the ranges of all groups."""
    out: tuple[Tensor, Tensor] = _DLS_FORWARD(x, w, v, groups.count, groups.inner, *rule)
    return out


def dls_backward(
    g: Tensor, x: Tensor, w: Tensor, v: Tensor, ranges: Tensor, groups: Groups, rule: DLSRule, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and v."""
    where = groups.count, groups.inner
    out: tuple[Tensor, Tensor, Tensor] = _DLS_BACKWARD(g, x, w, v, ranges, *where, *rule, need_x)
    return out


def bank_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, bank: Bank, eps: float
) -> Tensor:
    """All weights quantized."""
    out: Tensor = _BANK_FORWARD(x, alpha, beta, thresholds, *bank.flat, eps)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the weights, alphas, betas and grids."""
    out: tuple[Tensor, Tensor, Tensor, Tensor]
    out = _BANK_BACKWARD(g, x, alpha, beta, grid, thresholds, *bank.flat, eps)
    return out


def dls_bank_forward(
    x: Tensor, w: Tensor, v: Tensor, counts: tuple[int, ...], rule: DLSRule
) -> tuple[Tensor, Tensor]:
    """The quantized values and the ranges of all tensors."""
    out: tuple[Tensor, Tensor] = _DLS_BANK_FORWARD(x, w, v, counts, *rule)
    return out


def dls_bank_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    v: Tensor,
    ranges: Tensor,
    counts: tuple[int, ...],
    rule: DLSRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and v."""
    out: tuple[Tensor, Tensor, Tensor] = _DLS_BANK_BACKWARD(g, x, w, v, ranges, counts, *rule)
    return out
