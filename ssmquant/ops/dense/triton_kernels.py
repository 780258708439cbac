"""Triton kernels of layer norm. Imported by ``triton`` alone, which says what they are for.

Channels are a constant: rows of 60 begin at multiples of 16 bytes, which the compiler sees of no number given later.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["norm_backward", "norm_forward"]


@triton.jit
def _place(tile, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile and which there are; offsets of its elements and which there are."""
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    return row, there, row[:, None] * C + column[None, :], there[:, None] & (column < C)[None, :]


@triton.jit
def _parameter(p, C: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    return tl.load(p + column, mask=column < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_forward(
    x, weight, bias, y, mean, rstd, rows, eps,
    C: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of rows."""
    row, there, at, here = _place(tl.program_id(0), rows, C, ROWS, COLUMNS)
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    m = tl.sum(value, 1) / C
    apart = tl.where(here, value - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(apart * apart, 1) / C + eps)
    out = apart * r[:, None]
    if AFFINE:
        out = out * _parameter(weight, C, COLUMNS) + _parameter(bias, C, COLUMNS)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=here)
    tl.store(mean + row, m, mask=there)
    tl.store(rstd + row, r, mask=there)


@triton.jit
def norm_backward(
    g, x, weight, mean, rstd, dx, parts, rows,
    C: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx, and if AFFINE each program's share of the gradients of weight and bias, (2, programs, C)."""
    programs = tl.num_programs(0)
    sum_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    if AFFINE:
        scale = _parameter(weight, C, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), programs):
        row, there, at, here = _place(tile, rows, C, ROWS, COLUMNS)
        m = tl.load(mean + row, mask=there, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=there, other=0.0)[:, None]
        grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        normal = (tl.load(x + at, mask=here, other=0.0).to(tl.float32) - m) * r
        if AFFINE:
            sum_weight += grad * normal
            sum_bias += grad
            grad = grad * scale
        first = tl.sum(grad, 1)[:, None] / C
        second = tl.sum(grad * normal, 1)[:, None] / C
        tl.store(dx + at, ((grad - first - normal * second) * r).to(dx.dtype.element_ty), mask=here)
    if AFFINE:
        column = tl.arange(0, COLUMNS)
        to = parts + tl.program_id(0) * C + column
        tl.store(to, tl.sum(sum_weight, 0), mask=column < C)
        tl.store(to + programs * C, tl.sum(sum_bias, 0), mask=column < C)
