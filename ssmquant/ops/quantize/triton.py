"""Fake quantization on a GPU by Triton: LSQ in one pass, DLS in two (statistics, values), all weights in one launch.

The backward passes are two launches each: what every program makes of its part, then sums in a fixed order. Import this
module only where Triton is installed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops.quantize import triton_kernels as kernels
from ssmquant.ops.quantize.forms import Bank, DLSRule, Groups

__all__ = [
    "NAME",
    "bank_backward",
    "bank_forward",
    "dls_backward",
    "dls_forward",
    "dls_range",
    "lsq_backward",
    "lsq_forward",
    "unavailable",
]

NAME = "triton"

_BLOCK = 2048
_TILE = 8192  # elements of DLS's programs, 32 a thread
_SMALL = 1024  # the least tile
_PROGRAMS = 1024  # of LSQ's backward pass, at most
_FLOAT32 = {"enable_fp_fusion": False}


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


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# ---- LSQ -----------------------------------------------------------------------------------------------------------


def lsq_forward(x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float) -> Tensor:
    """The quantized values."""
    y = torch.empty_like(x)
    n = x.numel()
    kernels.lsq_forward[(-(-n // _BLOCK),)](
        x, alpha, beta, y, n, float(qmin), float(qmax), eps, BLOCK=_BLOCK, num_warps=8, **_FLOAT32
    )
    return y


def lsq_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, alpha and beta."""
    dx = torch.empty_like(x)
    n = x.numel()
    programs = min(-(-n // _BLOCK), _PROGRAMS)
    parts = torch.empty(2 * programs, dtype=torch.float32, device=x.device)
    kernels.lsq_backward[(programs,)](
        g, x, alpha, beta, dx, parts, n, float(qmin), float(qmax), eps, BLOCK=_BLOCK, num_warps=8, **_FLOAT32
    )
    out = torch.empty(2, dtype=torch.float32, device=x.device)
    kernels.lsq_finish[(2,)](parts, out, programs, scale, BLOCK=_power(programs), num_warps=4)
    return dx, out[0], out[1]


# ---- DLS -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """How a tensor's groups are cut."""

    size: int  # elements of a group
    inner: int
    groups: int
    contiguous: bool
    tile: int
    tiles: int  # of a group

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles, self.groups

    @property
    def one(self) -> bool:
        return self.tiles == 1

    @property
    def constants(self) -> dict[str, Any]:
        warps = max(1, min(8, self.tile // 256))
        return {"CONTIGUOUS": self.contiguous, "TILE": self.tile, "num_warps": warps, **_FLOAT32}


@functools.lru_cache(maxsize=4096)
def _tiles(count: int, groups: Groups) -> _Tiles:
    size = count // groups.count
    tile = max(_SMALL, min(_TILE, _power(size)))
    return _Tiles(
        size,
        groups.inner,
        groups.count,
        groups.inner * groups.count == count or groups.count == 1,
        tile,
        -(-size // tile),
    )


def _quantized(
    x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule, values: bool
) -> tuple[Tensor, Tensor]:
    t = _tiles(x.numel(), groups)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    ranges = new((6, t.groups))
    parts = ranges if t.one else new((4, t.groups, t.tiles))
    if not t.one:
        kernels.dls_statistics[t.grid](x, parts, t.size, t.inner, **t.constants)
    y = torch.empty_like(x) if values else ranges
    kernels.dls_quantize[t.grid if values else (1, t.groups)](
        x, w, v, parts, y, ranges, t.size, t.inner, t.tiles,
        float(rule.qmin), float(rule.qmax), rule.eps, float(2**rule.bits),
        ONE=t.one, FLOOR_FIRST=rule.floor_first, VALUES=values, TILES=_power(t.tiles), **t.constants,
    )  # fmt: skip
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
    t = _tiles(x.numel(), groups)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    qmin, qmax = float(rule.qmin), float(rule.qmax)
    parts = ranges if t.one else new((6, t.groups, t.tiles))
    if not t.one:
        kernels.dls_sums[t.grid](g, x, ranges, parts, t.size, t.inner, qmin, qmax, **t.constants)
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    shares = new((8, t.groups))
    scale = 1 / math.sqrt(t.size * rule.qmax) if rule.scaled else 1.0
    kernels.dls_apply[t.grid if need_x else (1, t.groups)](
        g, x, w, v, ranges, parts, dx, shares, t.size, t.inner, t.tiles, qmin, qmax, rule.eps, float(2**rule.bits),
        scale, ONE=t.one, DEAD_PASS=rule.dead_pass, NEED_X=need_x, TILES=_power(t.tiles), **t.constants,
    )  # fmt: skip
    total = shares.view(8) if t.groups == 1 else shares.sum(1)
    return dx, total[:4], total[4:]


# ---- the weights of a model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tables:
    """Which elements, group and weight each block has, on the device."""

    starts: Tensor
    lengths: Tensor
    group_of: Tensor
    weight_of: Tensor
    first_of_group: Tensor  # block, and one more entry for the end
    first_of_weight: Tensor
    scales: Tensor
    longest: int  # blocks of one group
    block: int

    @property
    def blocks(self) -> int:
        return len(self.starts)


@functools.lru_cache(maxsize=64)
def _tables(bank: Bank, device: torch.device) -> _Tables:
    """Made once: from then on nothing is copied from the host."""
    block = max(64, min(1024, _power(max(bank.sizes))))
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
    return _Tables(a, b, c, d, e, f, rates, longest, block)


def _bank_constants(bank: Bank, tables: _Tables) -> dict[str, Any]:
    return {
        "LEVELS": bank.levels,
        "BLOCK": tables.block,
        "num_warps": max(1, tables.block // 256),
        **_FLOAT32,
    }


def bank_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, bank: Bank, eps: float
) -> Tensor:
    """All weights quantized."""
    t = _tables(bank, x.device)
    y = torch.empty_like(x)
    kernels.bank_forward[(t.blocks,)](
        x, alpha, beta, thresholds, y, t.starts, t.lengths, t.group_of, t.weight_of,
        float(bank.qmin), float(bank.qmax), eps, **_bank_constants(bank, t),
    )  # fmt: skip
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
    kernels.bank_backward[(t.blocks,)](
        g, x, alpha, beta, grid, thresholds, dx, parts, grid_parts, t.starts, t.lengths, t.group_of, t.weight_of,
        float(bank.qmin), float(bank.qmax), eps, **_bank_constants(bank, t),
    )  # fmt: skip
    groups = len(t.scales)
    sums = new((2, groups))
    kernels.bank_group_sums[(-(-groups // 128), 2)](
        parts, t.first_of_group, t.scales, sums, groups, t.blocks, t.longest, BLOCK=128, num_warps=4
    )
    if not bank.levels:
        return dx, sums[0], sums[1], new(0)
    totals = new((len(bank.counts), columns))
    kernels.bank_grid_sums[(len(bank.counts),)](
        grid_parts, t.first_of_weight, totals, COLUMNS=columns, WIDTH=_power(columns), num_warps=4
    )
    return dx, sums[0], sums[1], _grid_gradient(totals.view(-1, 2, bank.levels + 1), grid)


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
