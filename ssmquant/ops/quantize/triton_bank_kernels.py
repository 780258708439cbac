"""Triton kernels of fake quantization for many tensors in one launch. Imported by ``triton_banks`` alone.

Compiled as those of ``triton_kernels``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl

from ssmquant.ops.quantize.triton_kernels import (
    _clip,
    _floored,
    _range,
    _range_of,
    _round,
    _store_coefficients,
    _store_range,
    _terms,
    _through_range,
    _through_statistics,
    _value,
)

__all__ = [
    "bank_backward",
    "bank_forward",
    "bank_grid_sums",
    "bank_group_sums",
    "dls_bank_backward",
    "dls_bank_forward",
]

_TAIL = tl.constexpr(0.1)  # slope of RFA's surrogate beyond its grid


# ---- LSQ and RFA ---------------------------------------------------------------------------------------------------
# A program has one block: some elements of one group of one weight, see ``triton_banks._tables``.


@triton.jit
def _block(starts, lengths, group_of, weight_of, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    return tl.load(starts + i) + k, k < tl.load(lengths + i), tl.load(group_of + i), tl.load(weight_of + i)


@triton.jit
def _count_below(u, sorted_bounds, COUNT: tl.constexpr):
    """How many bounds are below each element, as floats."""
    below = u * 0.0  # keeps a NaN a NaN
    for i in range(COUNT):
        below += tl.where(u > tl.load(sorted_bounds + i), 1.0, 0.0)
    return below


@triton.jit
def bank_forward(
    x, alpha, beta, thresholds, y, starts, lengths, group_of, weight_of, qmin, qmax, eps,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values of one block."""
    at, here, group, weight = _block(starts, lengths, group_of, weight_of, BLOCK)
    a, b = _floored(tl.load(alpha + group), eps), tl.load(beta + group)
    u = _clip(tl.div_rn(tl.load(x + at, mask=here, other=0.0) + b, a), qmin, qmax)
    if LEVELS == 0:
        code = _round(u)
    else:
        code = _count_below(u, thresholds + weight * (LEVELS - 1), LEVELS - 1) - LEVELS // 2
    tl.store(y + at, code * a - b, mask=here)


@triton.jit
def bank_backward(
    g, x, alpha, beta, grid, thresholds, dx, parts, grid_parts, starts, lengths, group_of, weight_of, qmin, qmax, eps,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and each block's share of those of alpha and beta, (2, blocks), and of what the grid's is of.

    For each segment sums of g * alpha, and of that times the distance to its left end: (blocks, 2, LEVELS + 1).
    """
    at, here, group, weight = _block(starts, lengths, group_of, weight_of, BLOCK)
    a, b = _floored(tl.load(alpha + group), eps), tl.load(beta + group)
    grad = tl.load(g + at, mask=here, other=0.0)
    v = tl.div_rn(tl.load(x + at, mask=here, other=0.0) + b, a)
    inside = (v >= qmin) & (v <= qmax)
    u = _clip(v, qmin, qmax)
    i, blocks = tl.program_id(0), tl.num_programs(0)
    if LEVELS == 0:
        code = _round(u)
        slope = tl.where(inside, 1.0, 0.0)
        soft = tl.where(inside, u, 0.0)
    else:
        line = grid + weight * LEVELS
        segment = _count_below(u, line, LEVELS).to(tl.int32)
        code = _count_below(u, thresholds + weight * (LEVELS - 1), LEVELS - 1) - LEVELS // 2
        middle = (segment > 0) & (segment < LEVELS)
        left = tl.load(line + tl.maximum(segment - 1, 0))
        right = tl.load(line + tl.minimum(segment, LEVELS - 1))
        slope = tl.where(middle, tl.div_rn(1.0, tl.where(middle, right - left, 1.0)), _TAIL)
        slope = tl.where(inside, slope, 0.0)
        soft = slope * u
        step = tl.where(here, grad * a, 0.0)
        reach = step * (u - left)
        to = grid_parts + i * (2 * (LEVELS + 1))
        for s in range(LEVELS + 1):
            tl.store(to + s, tl.sum(tl.where(segment == s, step, 0.0)))
            tl.store(to + LEVELS + 1 + s, tl.sum(tl.where(segment == s, reach, 0.0)))
    through = grad * slope
    tl.store(parts + i, tl.sum(tl.where(here, grad * (code - soft), 0.0)))
    tl.store(parts + blocks + i, tl.sum(tl.where(here, through - grad, 0.0)))
    tl.store(dx + at, through, mask=here)


@triton.jit
def bank_group_sums(parts, first_block, scales, out, groups, blocks, longest, BLOCK: tl.constexpr):
    """Gradients of alpha and beta, (2, groups), from those of blocks; ``longest``: most blocks of a group."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = group < groups
    start = tl.load(first_block + group, mask=here, other=0)
    end = tl.load(first_block + group + 1, mask=here, other=0)
    which = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(longest):
        total += tl.load(parts + which * blocks + start + k, mask=start + k < end, other=0.0)
    scale = tl.load(scales + group, mask=here, other=0.0)
    tl.store(out + which * groups + group, total * tl.where(which == 0, scale, 1.0), mask=here)


@triton.jit
def bank_grid_sums(parts, first_block, out, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of rows of ``parts`` over the blocks of each weight, (W, COLUMNS)."""
    weight = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    here = column < COLUMNS
    total = tl.zeros((WIDTH,), tl.float32)
    for block in range(tl.load(first_block + weight), tl.load(first_block + weight + 1)):
        total += tl.load(parts + block * COLUMNS + column, mask=here, other=0.0)
    tl.store(out + weight * COLUMNS + column, total, mask=here)


# ---- DLS -----------------------------------------------------------------------------------------------------------
# A program has one tensor, of one group, and goes over its tiles.


@triton.jit
def dls_bank_forward(
    x, w, v, y, ranges, starts, sizes, freedoms, qmin, qmax, eps, codes,
    FLOOR_FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``ranges`` (6, tensors), and the values."""
    i, count = tl.program_id(0), tl.num_programs(0)
    start, size = tl.load(starts + i), tl.load(sizes + i)
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    lows, highs = total + float("inf"), total + float("-inf")
    for first in range(0, size, TILE):
        here = first + lane < size
        value = tl.load(x + start + first + lane, mask=here, other=0.0)
        total += value
        lows = tl.minimum(lows, tl.where(here, value, float("inf")))
        highs = tl.maximum(highs, tl.where(here, value, float("-inf")))
    mean, low, high = tl.sum(total) / size, tl.min(lows), tl.max(highs)
    squares = tl.zeros((TILE,), tl.float32)
    for first in range(0, size, TILE):
        here = first + lane < size
        value = tl.load(x + start + first + lane, mask=here, other=0.0)
        apart = tl.where(here, value - mean, 0.0)
        squares += apart * apart
    std = tl.sqrt_rn(tl.sum(squares) / tl.load(freedoms + i))
    alpha, beta = _range(w + 4 * i, v + 4 * i, mean, std, low, high, eps, codes, FLOOR_FIRST)
    _store_range(ranges + i, count, mean, std, low, high, alpha, beta)
    for first in range(0, size, TILE):
        here = first + lane < size
        value = tl.load(x + start + first + lane, mask=here, other=0.0)
        tl.store(y + start + first + lane, _value(value, alpha, beta, low, high, qmin, qmax), mask=here)


@triton.jit
def dls_bank_backward(
    g, x, w, v, ranges, dx, dwv, starts, sizes, freedoms, scales, qmin, qmax, eps, codes,
    DEAD_PASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of x, and of w and v, (2, tensors, 4)."""
    i, count = tl.program_id(0), tl.num_programs(0)
    start, size, freedom = tl.load(starts + i), tl.load(sizes + i), tl.load(freedoms + i)
    mean, std, low, high, alpha, beta = _range_of(ranges, i, count)
    lane = tl.arange(0, TILE)
    zero = tl.zeros((TILE,), tl.float32)
    d_alpha, d_beta, d_low, d_high, ties_low, ties_high = zero, zero, zero, zero, zero, zero
    for first in range(0, size, TILE):
        here = first + lane < size
        grad = tl.load(g + start + first + lane, mask=here, other=0.0)
        value = tl.load(x + start + first + lane, mask=here, other=0.0)
        _dx, a, b, c, d, e, f = _terms(grad, value, here, alpha, beta, low, high, qmin, qmax)
        d_alpha += a
        d_beta += b
        d_low += c
        d_high += d
        ties_low += e
        ties_high += f
    at_low, at_high = tl.sum(ties_low), tl.sum(ties_high)
    of_alpha, of_beta, s_mean, s_std, s_low, s_high = _through_range(
        w + 4 * i, v + 4 * i, mean, std, low, high, beta, tl.sum(d_alpha) * tl.load(scales + i), tl.sum(d_beta),
        tl.sum(d_low), tl.sum(d_high), eps, codes, DEAD_PASS,
    )  # fmt: skip
    _store_coefficients(dwv + 4 * i, dwv + 4 * (count + i), 1, mean, std, low, high, beta, of_alpha, of_beta)
    for first in range(0, size, TILE):
        here = first + lane < size
        grad = tl.load(g + start + first + lane, mask=here, other=0.0)
        value = tl.load(x + start + first + lane, mask=here, other=0.0)
        through, _a, _b, _c, _d, _e, _f = _terms(grad, value, here, alpha, beta, low, high, qmin, qmax)
        out = _through_statistics(
            value, through, mean, std, low, high, s_mean, s_std, s_low, s_high, at_low, at_high, size, freedom
        )
        tl.store(dx + start + first + lane, out, mask=here)
