"""What ``triton`` does with many tensors at once, by one launch and one for each kind of sums that has to be joined."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmquant.ops.quantize import triton_bank_kernels as kernels
from ssmquant.ops.quantize.forms import Bank, DLSRule
from ssmquant.ops.triton_launch import Kernel, power

__all__ = ["bank_backward", "bank_forward", "dls_bank_backward", "dls_bank_forward"]

_TILE = 2048  # elements that a program of a DLS bank takes at once, at most

_bank_forward = Kernel(kernels.bank_forward)
_bank_backward = Kernel(kernels.bank_backward)
_bank_group_sums = Kernel(kernels.bank_group_sums)
_bank_grid_sums = Kernel(kernels.bank_grid_sums)
_dls_bank_forward = Kernel(kernels.dls_bank_forward)
_dls_bank_backward = Kernel(kernels.dls_bank_backward)


# ---- LSQ and RFA ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tables:
    """Which elements, group and weight each block has, on the device."""

    of_block: tuple[Tensor, ...]  # starts, lengths, groups, weights
    first_of_group: Tensor  # block, and one more entry for the end
    first_of_weight: Tensor
    scales: Tensor
    longest: int  # blocks of one group
    block: int

    @property
    def blocks(self) -> int:
        return len(self.of_block[0])

    @property
    def warps(self) -> int:
        return max(1, self.block // 256)


@functools.cache  # for good: CUDA graphs have their addresses
def _tables(bank: Bank, device: torch.device) -> _Tables:
    """Made once: from then on nothing is copied from the host."""
    block = max(64, min(1024, power(max(bank.sizes))))
    starts: list[int] = []
    lengths: list[int] = []
    group_of: list[int] = []
    weight_of: list[int] = []
    scales: list[float] = []
    first_of_group, first_of_weight = [0], [0]
    at = longest = 0
    for weight, (groups, size, scale) in enumerate(zip(bank.groups, bank.sizes, bank.scales, strict=True)):
        for _ in range(groups):
            for offset in range(0, size, block):
                starts.append(at + offset)
                lengths.append(min(block, size - offset))
                group_of.append(len(scales))
                weight_of.append(weight)
            at += size
            longest = max(longest, len(starts) - first_of_group[-1])
            first_of_group.append(len(starts))
            scales.append(scale)
        first_of_weight.append(len(starts))
    lists = (starts, lengths, group_of, weight_of, first_of_group, first_of_weight)
    rates = torch.tensor(scales, dtype=torch.float32, device=device)
    a, b, c, d, e, f = (torch.tensor(x, dtype=torch.int32, device=device) for x in lists)
    return _Tables((a, b, c, d), e, f, rates, longest, block)


def bank_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, bank: Bank, eps: float
) -> Tensor:
    """All weights quantized."""
    t = _tables(bank, x.device)
    y = torch.empty_like(x)
    tensors = x, alpha, beta, thresholds, y, *t.of_block
    numbers = float(bank.qmin), float(bank.qmax), eps
    _bank_forward((t.blocks, 1, 1), tensors, numbers, (bank.levels, t.block), t.warps)
    return y


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
    t = _tables(bank, x.device)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    dx, parts = torch.empty_like(x), new((2, t.blocks))
    columns = 2 * (bank.levels + 1)
    grid_parts = new((t.blocks, columns)) if bank.levels else parts
    tensors = g, x, alpha, beta, grid, thresholds, dx, parts, grid_parts, *t.of_block
    numbers = float(bank.qmin), float(bank.qmax), eps
    _bank_backward((t.blocks, 1, 1), tensors, numbers, (bank.levels, t.block), t.warps)
    groups = len(t.scales)
    sums = new((2, groups))
    tensors = parts, t.first_of_group, t.scales, sums
    _bank_group_sums((-(-groups // 128), 2, 1), tensors, (groups, t.blocks, t.longest), (128,), 4)
    dalpha, dbeta = sums.unbind(0)
    if not bank.levels:
        return dx, dalpha, dbeta, new(0)
    weights = len(bank.counts)
    totals = new((weights, columns))
    tensors = grid_parts, t.first_of_weight, totals
    _bank_grid_sums((weights, 1, 1), tensors, (), (columns, power(columns)), 4)
    return dx, dalpha, dbeta, _grid_gradient(totals.view(-1, 2, bank.levels + 1), grid)


def _grid_gradient(totals: Tensor, grid: Tensor) -> Tensor:
    """Gradients of grids in order, (W, levels), from sums over segments, (W, 2, levels + 1).

    A step g * alpha at the fraction f of a gap goes to the gap's right entry by f, to the left one by 1 - f.
    """
    whole, reach = totals.unbind(1)
    gap = grid.diff(dim=1)
    right = reach[:, 1:-1] / gap
    left = whole[:, 1:-1] - right
    tails = 0.1 * whole
    out = torch.cat((-left / gap, -tails[:, -1:]), 1)
    out[:, 1:] -= right / gap
    out[:, :1] -= tails[:, :1]
    return out


# ---- DLS -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Of a DLS bank, on the device: by tensor, where it starts, its size, freedom and scale."""

    starts: Tensor
    sizes: Tensor
    freedoms: Tensor
    scales: Tensor
    tile: int
    numbers: tuple[float, ...]

    @property
    def warps(self) -> int:
        return max(1, self.tile // 256)


@functools.cache  # for good: CUDA graphs have their addresses
def _rows(counts: tuple[int, ...], rule: DLSRule, device: torch.device) -> _Rows:
    """Made once: from then on nothing is copied from the host."""
    starts = [0, *itertools.accumulate(counts[:-1])]
    a, b = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, counts))
    reals = [rule.freedom(n) for n in counts], [rule.scale(n) for n in counts]
    c, d = (torch.tensor(x, dtype=torch.float32, device=device) for x in reals)
    numbers = float(rule.qmin), float(rule.qmax), rule.eps, float(2**rule.bits)
    return _Rows(a, b, c, d, max(256, min(_TILE, power(max(counts)))), numbers)


def dls_bank_forward(
    x: Tensor, w: Tensor, v: Tensor, counts: tuple[int, ...], rule: DLSRule
) -> tuple[Tensor, Tensor]:
    """The quantized values and the ranges of all tensors."""
    r = _rows(counts, rule, x.device)
    y = torch.empty_like(x)
    ranges = torch.empty((6, len(counts)), dtype=torch.float32, device=x.device)
    tensors = x, w, v, y, ranges, r.starts, r.sizes, r.freedoms
    _dls_bank_forward((len(counts), 1, 1), tensors, r.numbers, (rule.floor_first, r.tile), r.warps)
    return y, ranges


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
    r = _rows(counts, rule, x.device)
    dx = torch.empty_like(x)
    dwv = torch.empty((2, len(counts), 4), dtype=torch.float32, device=x.device)
    tensors = g, x, w, v, ranges, dx, dwv, r.starts, r.sizes, r.freedoms, r.scales
    _dls_bank_backward((len(counts), 1, 1), tensors, r.numbers, (rule.dead_pass, r.tile), r.warps)
    dw, dv = dwv.unbind(0)
    return dx, dw, dv
