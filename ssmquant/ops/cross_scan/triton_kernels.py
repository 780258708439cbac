"""Triton kernels that reorder pixels along given paths. Imported by ``triton`` alone, which says what they are for."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gather", "merge"]


@triton.jit
def gather(
    x, order, y, channels, length, paths,
    SHARED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y[b, k, c, l] = x[b, k, c, order[k, l]]; SHARED: x has no k. Grid (tiles of l, tiles of c, b * k)."""
    step = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(2)
    pixel = tl.load(order + image % paths * length + step, mask=step < length, other=0)
    here = (row < channels)[:, None] & (step < length)[None, :]
    source = image // paths if SHARED else image
    from_row = (source.to(tl.int64) * channels + row) * length
    to_row = (image.to(tl.int64) * channels + row) * length
    value = tl.load(x + from_row[:, None] + pixel[None, :], mask=here)
    tl.store(y + to_row[:, None] + step[None, :], value, mask=here)


@triton.jit
def merge(
    y, order, x, channels, length,
    PATHS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x[b, c, p] = sum over k of y[b, k, c, order[k, p]], in float32. Grid (tiles of p, tiles of c, b)."""
    pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(2).to(tl.int64)
    here = (row < channels)[:, None] & (pixel < length)[None, :]
    total = tl.zeros((ROWS, TILE), tl.float32)
    for k in tl.static_range(PATHS):
        step = tl.load(order + k * length + pixel, mask=pixel < length, other=0)
        from_row = ((image * PATHS + k) * channels + row) * length
        total += tl.load(y + from_row[:, None] + step[None, :], mask=here, other=0.0).to(tl.float32)
    to_row = (image * channels + row) * length
    tl.store(x + to_row[:, None] + pixel[None, :], total.to(x.dtype.element_ty), mask=here)
