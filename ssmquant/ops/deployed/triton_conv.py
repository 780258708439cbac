"""The Triton kernel of float convolutions on a GPU. Imported by ``cuda_conv``, which says what it is for."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

__all__ = ["convolve_floats"]


@triton.jit
def _tf32(v):
    """To the nearest number of 10 bits behind the point, ties away from zero, as ``cvt.rna.tf32`` does.

    Tensor cores leave out what is further behind: of a NaN an infinity may remain, and sums of what is cut off go
    astray to one side.
    """
    bits = v.to(tl.int32, bitcast=True)
    near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(v == v, near, float("nan"))


@triton.jit
def convolve_floats(
    x, weights, bias, residual, y,
    pixels, width, x_height, x_width, x_batch, x_channel, x_down, x_right, r_batch, r_channel, r_down, r_right,
    above, before, step_down, step_right,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DOWN: tl.constexpr,
    RIGHT: tl.constexpr, DENSE: tl.constexpr, FLAT: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A block of a sample's output pixels by a block of outputs.

    ``y``: (samples, pixels, OUTPUTS) if channels are LAST, else (samples, OUTPUTS, pixels).

    ``weights``: (OUTPUTS, taps * INPUTS), rounded, with zeros up to a multiple of 4 behind each row. DENSE: x is
    contiguous with channels last, which shows how reads are aligned. FLAT: blocks of inputs go across taps.
    RESIDUAL: 2 for one that lies in memory as the result does.
    """
    if EARLY:
        gdc_wait()
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here, out = m < pixels, n < OUTPUTS
    down, right = m // width, m % width
    top, left = down * step_down - above, right * step_right - before
    sample = tl.program_id(2).to(tl.int64)
    across = INPUTS if DENSE else x_right
    along = x_width * INPUTS if DENSE else x_down
    next_channel = 1 if DENSE else x_channel
    x_at = x + sample * (x_height * along if DENSE else x_batch)
    TAPS: tl.constexpr = KH * KW
    ROW: tl.constexpr = (TAPS * INPUTS + 3) // 4 * 4
    BLOCKS: tl.constexpr = (INPUTS + BK - 1) // BK
    STEPS: tl.constexpr = (TAPS * INPUTS + BK - 1) // BK if FLAT else TAPS * BLOCKS
    acc = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        if FLAT:
            k = step * BK + tl.arange(0, BK)
            real = k < TAPS * INPUTS
            tap, channel = k // INPUTS, k % INPUTS
            i = top[:, None] + (tap // KW * DOWN)[None, :]
            j = left[:, None] + (tap % KW * RIGHT)[None, :]
            inside = here[:, None] & (i >= 0) & (i < x_height) & (j >= 0) & (j < x_width)
            at = i * along + j * across + (channel * next_channel)[None, :]
            mask = inside & real[None, :]
            real = k < ROW
        else:
            tap = step // BLOCKS
            channel = step % BLOCKS * BK + tl.arange(0, BK)
            real = channel < INPUTS
            i, j = top + tap // KW * DOWN, left + tap % KW * RIGHT
            inside = here & (i >= 0) & (i < x_height) & (j >= 0) & (j < x_width)
            at = (i * along + j * across)[:, None] + (channel * next_channel)[None, :]
            mask = inside[:, None] & real[None, :]
            k = tap * INPUTS + channel
        v = _tf32(tl.load(x_at + at, mask=mask, other=0.0))
        w_at = weights + n[None, :] * ROW + k[:, None]
        w = tl.load(w_at, mask=out[None, :] & real[:, None], other=0.0)
        acc = tl.dot(v, w, acc, input_precision="tf32")
    mask = here[:, None] & out[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=out, other=0.0)[None, :]
    places = m[:, None] * OUTPUTS + n[None, :] if LAST else n[None, :] * pixels + m[:, None]
    if RESIDUAL == 1:
        r_at = residual + sample * r_batch + (down * r_down + right * r_right)[:, None]
        acc += tl.load(r_at + n[None, :] * r_channel, mask=mask, other=0.0)
    if RESIDUAL == 2:
        acc += tl.load(residual + sample * pixels * OUTPUTS + places, mask=mask, other=0.0)
    tl.store(y + sample * pixels * OUTPUTS + places, acc, mask=mask)
