"""Fake quantization on a GPU by Triton: LSQ in one pass, DLS in two (statistics, values), all weights in one launch.

The backward passes are two launches each: what every program makes of its part, then sums in a fixed order. Import this
module only where Triton is installed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmquant.ops.quantize import triton_kernels as kernels
from ssmquant.ops.quantize.forms import DLSRule, Groups, gradient_scale, like
from ssmquant.ops.quantize.triton_banks import (
    bank_backward,
    bank_forward,
    dls_bank_backward,
    dls_bank_forward,
)
from ssmquant.ops.quantize.triton_thresholds import (
    pact_backward,
    pact_forward,
    soft_backward,
    threshold_backward,
    threshold_forward,
)
from ssmquant.ops.triton_launch import Kernel, power

__all__ = [
    "NAME",
    "bank_backward",
    "bank_forward",
    "dls_backward",
    "dls_bank_backward",
    "dls_bank_forward",
    "dls_forward",
    "dls_range",
    "lsq_backward",
    "lsq_forward",
    "pact_backward",
    "pact_forward",
    "soft_backward",
    "threshold_backward",
    "threshold_forward",
    "unavailable",
]

NAME = "triton"

_BLOCK = 2048
_TILE = 8192  # elements of DLS's programs, 32 a thread
_SMALL = 1024  # the least tile
_PROGRAMS = 1024  # of LSQ's backward pass, at most

_lsq_forward = Kernel(kernels.lsq_forward)
_lsq_backward = Kernel(kernels.lsq_backward)
_lsq_finish = Kernel(kernels.lsq_finish)
_dls_statistics = Kernel(kernels.dls_statistics)
_dls_quantize = Kernel(kernels.dls_quantize)
_dls_sums = Kernel(kernels.dls_sums)
_dls_apply = Kernel(kernels.dls_apply)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why it cannot serve there; None if it can."""
    if device.type != "cuda":
        return "it runs on GPUs only"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than compute capability 7.0"
    return None


# ---- LSQ -----------------------------------------------------------------------------------------------------------


def lsq_forward(x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float) -> Tensor:
    """The quantized values."""
    y = torch.empty_like(x)
    n = x.numel()
    numbers = n, float(qmin), float(qmax), eps
    _lsq_forward((-(-n // _BLOCK), 1, 1), (x, alpha, beta, y), numbers, (_BLOCK,), 8)
    return y


def lsq_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, alpha and beta."""
    dx = torch.empty_like(x)
    n = x.numel()
    programs = min(-(-n // _BLOCK), _PROGRAMS)
    parts = torch.empty(2 * programs, dtype=torch.float32, device=x.device)
    numbers = n, float(qmin), float(qmax), eps
    _lsq_backward((programs, 1, 1), (like(g, x), x, alpha, beta, dx, parts), numbers, (_BLOCK,), 8)
    out = torch.empty((2, *alpha.shape), dtype=torch.float32, device=x.device)
    scale = gradient_scale(n, qmax, copies)
    _lsq_finish((2, 1, 1), (parts, out), (programs, scale), (power(programs),), 4)
    dalpha, dbeta = out.unbind(0)
    return dx, dalpha, dbeta


# ---- DLS -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a tensor's groups are cut into tiles, and what kernels are given besides tensors."""

    groups: int
    tiles: int  # of a group
    warps: int
    grid: tuple[int, int, int]
    heads: tuple[int, int, int]  # one program a group
    size: tuple[int, int]
    ends: tuple[float, float]
    quantize: tuple[int | float, ...]
    apply: tuple[int | float, ...]
    tile: tuple[int, int]
    quantize_constants: tuple[tuple[int, ...], ...]  # by VALUES
    apply_constants: tuple[tuple[int, ...], ...]  # by NEED_X


@functools.lru_cache(maxsize=4096)
def _plan(count: int, groups: int, inner: int, rule: DLSRule) -> _Plan:
    size = count // groups
    tile = max(_SMALL, min(_TILE, power(size)))
    tiles = -(-size // tile)
    contiguous = groups == 1 or inner * groups == count
    ends = float(rule.qmin), float(rule.qmax)
    quantize = size, inner, tiles, rule.freedom(size), *ends, rule.eps, float(2**rule.bits)
    return _Plan(
        groups,
        tiles,
        max(1, min(8, tile // 256)),
        (tiles, groups, 1),
        (1, groups, 1),
        (size, inner),
        ends,
        quantize,
        (*quantize, rule.scale(size)),
        (contiguous, tile),
        tuple((contiguous, tiles == 1, rule.floor_first, v, tile, power(tiles)) for v in (False, True)),
        tuple((contiguous, tiles == 1, rule.dead_pass, v, tile, power(tiles)) for v in (False, True)),
    )


def _quantized(
    x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule, values: bool
) -> tuple[Tensor, Tensor]:
    p = _plan(x.numel(), groups.count, groups.inner, rule)
    ranges = torch.empty((6, p.groups), dtype=torch.float32, device=x.device)
    parts = ranges
    if p.tiles > 1:
        parts = torch.empty((4, p.groups, p.tiles), dtype=torch.float32, device=x.device)
        _dls_statistics(p.grid, (x, parts), p.size, p.tile, p.warps)
    y = torch.empty_like(x) if values else ranges
    grid = p.grid if values else p.heads
    _dls_quantize(grid, (x, w, v, parts, y, ranges), p.quantize, p.quantize_constants[values], p.warps)
    return y, ranges


def dls_range(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule) -> Tensor:
    """The ranges of all groups."""
    return _quantized(x, w, v, groups, rule, False)[1]


def dls_forward(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule) -> tuple[Tensor, Tensor]:
    """The quantized values and the ranges of all groups."""
    return _quantized(x, w, v, groups, rule, True)


def dls_backward(
    g: Tensor, x: Tensor, w: Tensor, v: Tensor, ranges: Tensor, groups: Groups, rule: DLSRule, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and v."""
    g = like(g, x)
    p = _plan(x.numel(), groups.count, groups.inner, rule)
    parts = ranges
    if p.tiles > 1:
        parts = torch.empty((6, p.groups, p.tiles), dtype=torch.float32, device=x.device)
        _dls_sums(p.grid, (g, x, ranges, parts), (*p.size, *p.ends), p.tile, p.warps)
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    shares = torch.empty((8, p.groups), dtype=torch.float32, device=x.device)
    grid = p.grid if need_x else p.heads
    tensors = g, x, w, v, ranges, parts, dx, shares
    _dls_apply(grid, tensors, p.apply, p.apply_constants[need_x], p.warps)
    dw, dv = (shares if p.groups == 1 else shares.sum(1)).view(2, 4).unbind(0)
    return dx, dw, dv
