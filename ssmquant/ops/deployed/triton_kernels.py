"""Triton kernels of deployed models on a GPU. Imported by ``cuda``, which says what they are for.

Codes are held as int8, from 0 or, of more than 128 levels, from -128 (``OFF``): products with weights are then exact
integers of the tensor cores, from which scales, shifts and zero points are taken out afterwards. Codes are those
of plain PyTorch but for ties, since there are no divisions. Places within a sample have 32 bits.

Between kernels codes of up to 128 levels go as int8 from 0, and -1 for NaN (``CODED``: what is read is such; ``CODES``:
so many of the first outputs are written so, apart from the others, by the quantizer of who reads them).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

__all__ = [
    "blend", "conv", "core_codes", "encode_rows", "excite", "multiply", "normalize", "pool", "project", "sum_rows",
]  # fmt: skip

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding it leaves no fraction, rounding to even
_NAN_ROW = tl.constexpr(-(2**31))  # in place of the sum of a row's codes


@triton.jit
def _kernel_before(EARLY: tl.constexpr):
    """Waits for all that the kernel before has done: see ``Kernel``."""
    if EARLY:
        gdc_wait()


@triton.jit
def _index(x, inverse, moved, least, most):
    """``round(clip((x + shift) / scale, least, most))``, given 1 / scale and shift / scale. NaN stays NaN."""
    u = x * inverse + moved
    u = tl.maximum(u, least, propagate_nan=tl.PropagateNan.ALL)
    u = tl.minimum(u, most, propagate_nan=tl.PropagateNan.ALL)
    return (u + _MAGIC) - _MAGIC


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == 1:
        x = _silu(x)
    if ACT == 2:
        x = _gelu(x)
    return x


@triton.jit
def project(
    x, z, norm_weight, norm_bias, scale, shift, weights, of_scale, of_shift, of_total, bias, residual, gain, y,
    codes, next_scale, next_shift, next_factors,
    rows, x_part, x_batch, x_row, x_column, z_batch, z_row, r_batch, r_row, eps, qmin, qmax, next_min, next_max,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, OFF: tl.constexpr, CODED: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr, FACTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A block of a sample's rows by a block of outputs: norm, gate, codes, product, bias, activation, residual.

    NORM: 1 layer norm, 2 RMS norm, 3 factors alone. PARTS: tensors whose sum x is.
    """
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    here = m < rows
    sample = tl.program_id(2).to(tl.int64)
    x_at = x + sample * x_batch + m * x_row
    z_at = z + sample * z_batch + m * z_row
    a, b = tl.load(scale), tl.load(shift)
    inverse = tl.div_rn(1.0, a)
    moved = b * inverse
    lower, upper = qmin + 0.0, qmax + 0.0  # an integer that is 1 is a constant
    mean = tl.zeros([BM], tl.float32)
    factor = tl.zeros([BM], tl.float32) + 1.0
    r_at = residual + sample * r_batch + m * r_row
    y += sample * rows * (OUTPUTS - CODES)
    codes += sample * rows * CODES
    if BK >= INPUTS:  # codes are made once, for all outputs
        k = tl.arange(0, BK)
        code, sums, odd = _row_codes(
            x_at, z_at, norm_weight, norm_bias, inverse, moved, lower, upper, here, k, x_column, x_part, eps, qmin,
            INPUTS, OFF, CODED, PARTS, NORM, HAS_W, HAS_B, GATE,
        )  # fmt: skip
        for n0 in range(0, OUTPUTS, BN):
            n = n0 + tl.arange(0, BN)
            acc = tl.dot(code, _weights_at(weights, n, k, INPUTS, OUTPUTS), out_dtype=tl.int32)
            _finish(
                acc, sums, odd, a, b, qmin, of_scale, of_shift, of_total, bias, gain, r_at, y, codes, next_scale,
                next_shift, next_factors, next_min, next_max, m, n, here, OUTPUTS, OFF, HAS_BIAS, RESIDUAL, HAS_GAIN,
                ACT, CODES, FACTORS,
            )  # fmt: skip
    else:
        if NORM == 1:
            for k0 in range(0, INPUTS, BK):
                k = k0 + tl.arange(0, BK)
                mask = here[:, None] & (k < INPUTS)[None, :]
                mean += tl.sum(_read(x_at, k, x_column, x_part, mask, PARTS), 1)
            mean = mean / INPUTS
        if NORM % 3 != 0:
            squares = tl.zeros([BM], tl.float32)
            for k0 in range(0, INPUTS, BK):
                k = k0 + tl.arange(0, BK)
                mask = here[:, None] & (k < INPUTS)[None, :]
                v = _read(x_at, k, x_column, x_part, mask, PARTS) - mean[:, None]
                squares += tl.sum(tl.where((k < INPUTS)[None, :], v * v, 0.0), 1)
            factor = 1.0 / tl.sqrt_rn(squares / INPUTS + eps)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        sums = tl.zeros([BM], tl.int32)
        acc = tl.zeros([BM, BN], tl.int32)
        odd = tl.zeros([BM], tl.int32)
        for k0 in range(0, INPUTS, BK):
            k = k0 + tl.arange(0, BK)
            mask = here[:, None] & (k < INPUTS)[None, :]
            v = _read(x_at, k, x_column, x_part, mask, PARTS)
            if NORM % 3 != 0:
                v = (v - mean[:, None]) * factor[:, None]
            code, more, nans = _encoded(
                v, z_at, k, mask, norm_weight, norm_bias, inverse, moved, lower, upper, qmin, INPUTS, OFF, CODED, HAS_W,
                HAS_B, GATE,
            )  # fmt: skip
            sums += more
            odd += nans
            acc = tl.dot(code, _weights_at(weights, n, k, INPUTS, OUTPUTS), acc, out_dtype=tl.int32)
        _finish(
            acc, sums, odd, a, b, qmin, of_scale, of_shift, of_total, bias, gain, r_at, y, codes, next_scale,
            next_shift, next_factors, next_min, next_max, m, n, here, OUTPUTS, OFF, HAS_BIAS, RESIDUAL, HAS_GAIN, ACT,
            CODES, FACTORS,
        )  # fmt: skip


@triton.jit
def encode_rows(
    x, z, norm_weight, norm_bias, scale, shift, codes, sums,
    rows, x_part, x_batch, x_row, x_column, z_batch, z_row, eps, qmin, qmax,
    INPUTS: tl.constexpr, WIDE: tl.constexpr, OFF: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, GATE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What ``project`` multiplies, once for all blocks of outputs.

    Codes, (samples, rows, WIDE) with zeros behind them, and their sums, or the least integer for a row that has a NaN.
    """
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    here = m < rows
    sample = tl.program_id(2).to(tl.int64)
    a, b = tl.load(scale), tl.load(shift)
    inverse = tl.div_rn(1.0, a)
    k = tl.arange(0, BK)
    code, total, odd = _row_codes(
        x + sample * x_batch + m * x_row, z + sample * z_batch + m * z_row, norm_weight, norm_bias, inverse,
        b * inverse, qmin + 0.0, qmax + 0.0, here, k, x_column, x_part, eps, qmin, INPUTS, OFF, False, PARTS, NORM,
        HAS_W, HAS_B, GATE,
    )  # fmt: skip
    to = codes + sample * rows * WIDE + m[:, None] * WIDE + k[None, :]
    tl.store(to, code, mask=here[:, None] & (k < WIDE)[None, :])
    tl.store(sums + sample * rows + m, tl.where(odd > 0, _NAN_ROW, total), mask=here)


@triton.jit
def sum_rows(
    codes, sums, rows, x_batch, x_row, x_column,
    INPUTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sums of ``encode_rows``, of codes that are there already, from 0 and -1 for NaN."""
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    here = m < rows
    sample = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BK)
    at = codes + sample * x_batch + m[:, None] * x_row + k[None, :] * x_column
    _, total, odd = _held(tl.load(at, mask=here[:, None] & (k < INPUTS)[None, :], other=0))
    tl.store(sums + sample * rows + m, tl.where(odd > 0, _NAN_ROW, total), mask=here)


@triton.jit
def multiply(
    codes, sums, scale, shift, weights, of_scale, of_shift, of_total, bias, residual, gain, y, made, next_scale,
    next_shift, next_factors,
    rows, r_batch, r_row, qmin, next_min, next_max,
    INPUTS: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr, OFF: tl.constexpr, HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr, FACTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The rest of ``project``, of codes and their sums: a row with a NaN may have any codes."""
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here = m < rows
    sample = tl.program_id(2).to(tl.int64)
    at = codes + sample * rows * WIDE + m[:, None] * WIDE
    acc = tl.zeros([BM, BN], tl.int32)
    for k0 in range(0, INPUTS, BK):
        k = k0 + tl.arange(0, BK)
        code = tl.load(at + k[None, :], mask=here[:, None] & (k < WIDE)[None, :], other=0)
        acc = tl.dot(code, _weights_at(weights, n, k, INPUTS, OUTPUTS), acc, out_dtype=tl.int32)
    total = tl.load(sums + sample * rows + m, mask=here, other=0)
    odd = (total == _NAN_ROW).to(tl.int32)
    _finish(
        acc, tl.where(odd > 0, 0, total), odd, tl.load(scale), tl.load(shift), qmin, of_scale, of_shift, of_total, bias,
        gain, residual + sample * r_batch + m * r_row, y + sample * rows * (OUTPUTS - CODES),
        made + sample * rows * CODES, next_scale, next_shift, next_factors, next_min, next_max, m, n, here, OUTPUTS,
        OFF, HAS_BIAS, RESIDUAL, HAS_GAIN, ACT, CODES, FACTORS,
    )  # fmt: skip


@triton.jit
def _row_codes(
    x_at, z_at, norm_weight, norm_bias, inverse, moved, lower, upper, here, k, x_column, x_part, eps, qmin,
    INPUTS: tl.constexpr, OFF: tl.constexpr, CODED: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """``_encoded`` of rows whose inputs are all in one block, with the norm's statistics."""
    inside = (k < INPUTS)[None, :]
    mask = here[:, None] & inside
    v = _read(x_at, k, x_column, x_part, mask, PARTS)
    if NORM == 1:
        v = v - (tl.sum(v, 1) / INPUTS)[:, None]
    if NORM % 3 != 0:
        off = tl.where(inside, v, 0.0)
        v = v * (1.0 / tl.sqrt_rn(tl.sum(off * off, 1) / INPUTS + eps))[:, None]
    return _encoded(
        v, z_at, k, mask, norm_weight, norm_bias, inverse, moved, lower, upper, qmin, INPUTS, OFF, CODED, HAS_W, HAS_B,
        GATE,
    )  # fmt: skip


@triton.jit
def _read(x_at, k, x_column, x_part, mask, PARTS: tl.constexpr):
    """(rows, inputs) of what is the sum of PARTS tensors; codes as they are."""
    at = x_at[:, None] + k[None, :] * x_column
    v = tl.load(at, mask=mask, other=0)
    for part in tl.static_range(1, PARTS):
        v += tl.load(at + part * x_part, mask=mask, other=0)
    return v


@triton.jit
def _held(v):
    """What is read as codes from 0: int8 without what stands for NaN, sums of rows, and how many are NaN."""
    code = tl.maximum(v, 0).to(tl.int8)
    return code, tl.sum(code.to(tl.int32), 1), tl.sum((v < 0).to(tl.int32), 1)


@triton.jit
def _encoded(
    v, z_at, k, mask, norm_weight, norm_bias, inverse, moved, lower, upper, qmin,
    INPUTS: tl.constexpr, OFF: tl.constexpr, CODED: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """Codes of normalised values, (rows, inputs) int8, zeros where there are none; their sums, and how many are NaN."""
    if CODED:
        code, sums, odd = _held(v)
    else:
        if HAS_W:
            v = v * tl.load(norm_weight + k, mask=k < INPUTS, other=0.0)[None, :]
        if HAS_B:
            v = v + tl.load(norm_bias + k, mask=k < INPUTS, other=0.0)[None, :]
        if GATE:
            v = v * _silu(tl.load(z_at[:, None] + k[None, :], mask=mask, other=0.0))
        u = _index(v, inverse, moved, lower, upper)
        odd = tl.sum((u != u).to(tl.int32), 1)
        wide = tl.where((k < INPUTS)[None, :], u.to(tl.int32) - (qmin + OFF), 0)
        sums = tl.sum(wide, 1)
        code = wide.to(tl.int8)
    return code, sums, odd


@triton.jit
def _finish(
    acc, sums, odd, a, b, qmin, of_scale, of_shift, of_total, bias, gain, r_at, y, codes, next_scale, next_shift,
    next_factors, next_min, next_max, m, n, here,
    OUTPUTS: tl.constexpr, OFF: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr,
    ACT: tl.constexpr, CODES: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Values of products of codes, and what comes after them."""
    out = n < OUTPUTS
    value = _value(acc, sums, a, b, qmin, of_scale, of_shift, of_total, n, OUTPUTS, OFF)
    if HAS_BIAS:
        value = value + tl.load(bias + n, mask=out, other=0.0)[None, :]
    value = _act(value, ACT)
    mask = here[:, None] & out[None, :]
    if RESIDUAL:
        held = tl.load(r_at[:, None] + n[None, :], mask=mask, other=0.0)
        if HAS_GAIN:
            held = held * tl.load(gain + n, mask=out, other=0.0)[None, :]
        value = value + held
    value = tl.where((odd > 0)[:, None], float("nan"), value)
    if CODES > 0:
        first = value
        if FACTORS:
            first = first * tl.load(next_factors + n, mask=n < CODES, other=0.0)[None, :]
        code = _codes_of(first, next_scale, next_shift, next_min, next_max)
        tl.store(codes + m[:, None] * CODES + n[None, :], code, mask=mask & (n < CODES)[None, :])
    if CODES < OUTPUTS:
        to = y + m[:, None] * (OUTPUTS - CODES) + (n - CODES)[None, :]
        tl.store(to, value, mask=mask & (n >= CODES)[None, :])


@triton.jit
def _codes_of(v, scale, shift, qmin, qmax):
    """int8 from 0, and -1 for NaN."""
    inverse = tl.div_rn(1.0, tl.load(scale))
    u = _index(v, inverse, tl.load(shift) * inverse, qmin + 0.0, qmax + 0.0)
    return tl.where(u != u, -1, u.to(tl.int32) - qmin).to(tl.int8)


@triton.jit
def core_codes(
    x, of_x, of_u, weights, of_scale, of_shift, of_total, out_inverse, out_moved, out_least, out_most, u, codes, bad,
    rows, x_batch, x_row, x_column, u_row, code_row, qmin, qmax, u_least, u_most,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, OFF: tl.constexpr, SAME: tl.constexpr, CODED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The codes of an image, of its projection to low rank, B and C of all directions, and where a NaN was.

    of_x, of_u: scale and shift, SAME if they are one. Results are uint8 from 0; out_*: the quantizer of each output.
    Of an image that is CODED there is no ``u``: it is what its scans want.
    """
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    here = m < rows
    sample = tl.program_id(2).to(tl.int64)
    x_at = x + sample * x_batch + m * x_row
    u, codes, bad = u + sample * rows * u_row, codes + sample * rows * code_row, bad + sample * rows
    a, b = tl.load(of_x), tl.load(of_x + 1)
    inverse = tl.div_rn(1.0, a)
    moved = b * inverse
    u_inverse = tl.div_rn(1.0, tl.load(of_u))
    u_moved = tl.load(of_u + 1) * u_inverse
    first = tl.program_id(1) == 0
    if BK >= INPUTS:  # codes are made once, for all outputs
        code, sums, odd = _image_codes(
            x_at, u, m, here, 0, first, inverse, moved, u_inverse, u_moved, x_column, u_row, qmin, qmax, u_least,
            u_most, INPUTS, OFF, SAME, CODED, BK,
        )  # fmt: skip
        for n0 in range(0, OUTPUTS, BN):
            n = n0 + tl.arange(0, BN)
            acc = tl.dot(code, _weights_at(weights, n, tl.arange(0, BK), INPUTS, OUTPUTS), out_dtype=tl.int32)
            _finish_codes(
                acc, sums, a, b, qmin, of_scale, of_shift, of_total, out_inverse, out_moved, out_least, out_most, codes,
                m, n, here, code_row, OUTPUTS, OFF,
            )  # fmt: skip
    else:
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        sums = tl.zeros([BM], tl.int32)
        acc = tl.zeros([BM, BN], tl.int32)
        odd = tl.zeros([BM], tl.int32)
        for k0 in range(0, INPUTS, BK):
            code, more, nans = _image_codes(
                x_at, u, m, here, k0, first, inverse, moved, u_inverse, u_moved, x_column, u_row, qmin, qmax, u_least,
                u_most, INPUTS, OFF, SAME, CODED, BK,
            )  # fmt: skip
            sums += more
            odd += nans
            w = _weights_at(weights, n, k0 + tl.arange(0, BK), INPUTS, OUTPUTS)
            acc = tl.dot(code, w, acc, out_dtype=tl.int32)
        _finish_codes(
            acc, sums, a, b, qmin, of_scale, of_shift, of_total, out_inverse, out_moved, out_least, out_most, codes,
            m, n, here, code_row, OUTPUTS, OFF,
        )  # fmt: skip
    tl.store(bad + m, (odd > 0).to(tl.uint8), mask=here & first)


@triton.jit
def _weights_at(weights, n, k, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """(inputs, outputs) of a matrix (OUTPUTS, INPUTS)."""
    inner = (n < OUTPUTS)[None, :] & (k < INPUTS)[:, None]
    return tl.load(weights + n[None, :] * INPUTS + k[:, None], mask=inner, other=0)


@triton.jit
def _image_codes(
    x_at, u, m, here, k0, first, inverse, moved, u_inverse, u_moved, x_column, u_row, qmin, qmax, u_least, u_most,
    INPUTS: tl.constexpr, OFF: tl.constexpr, SAME: tl.constexpr, CODED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Codes of a block of the image: stored for the scan; as int8; sums of these, and how many are NaN."""
    k = k0 + tl.arange(0, BK)
    inside = (k < INPUTS)[None, :]
    mask = here[:, None] & inside
    v = tl.load(x_at[:, None] + k[None, :] * x_column, mask=mask, other=0)
    if CODED:
        made, sums, odd = _held(v)
    else:
        code = _index(v, inverse, moved, qmin + 0.0, qmax + 0.0)
        own = code if SAME else _index(v, u_inverse, u_moved, u_least + 0.0, u_most + 0.0)
        odd = tl.sum((code != code).to(tl.int32), 1)
        kept = (own.to(tl.int32) - u_least).to(tl.uint8)
        tl.store(u + m[:, None] * u_row + k[None, :], kept, mask=mask & first)
        wide = tl.where(inside, code.to(tl.int32) - (qmin + OFF), 0)
        sums = tl.sum(wide, 1)
        made = wide.to(tl.int8)
    return made, sums, odd


@triton.jit
def _finish_codes(
    acc, sums, a, b, qmin, of_scale, of_shift, of_total, out_inverse, out_moved, out_least, out_most, codes, m, n, here,
    code_row, OUTPUTS: tl.constexpr, OFF: tl.constexpr,
):  # fmt: skip
    """Codes of products of codes."""
    out = n < OUTPUTS
    value = _value(acc, sums, a, b, qmin, of_scale, of_shift, of_total, n, OUTPUTS, OFF)
    least = tl.load(out_least + n, mask=out, other=0.0)[None, :]
    most = tl.load(out_most + n, mask=out, other=0.0)[None, :]
    inverse = tl.load(out_inverse + n, mask=out, other=0.0)[None, :]
    made = _index(value, inverse, tl.load(out_moved + n, mask=out, other=0.0)[None, :], least, most) - least
    tl.store(
        codes + m[:, None] * code_row + n[None, :],
        made.to(tl.int32).to(tl.uint8),
        mask=here[:, None] & out[None, :],
    )


@triton.jit
def _value(acc, sums, a, b, qmin, of_scale, of_shift, of_total, n, OUTPUTS: tl.constexpr, OFF: tl.constexpr):
    """Values of products of codes. What the weights' own offset needs is in their total: see ``cuda.pack``."""
    out = n < OUTPUTS
    ws = tl.load(of_scale + n, mask=out, other=0.0)[None, :]
    wt = tl.load(of_shift + n, mask=out, other=0.0)[None, :]
    total = tl.load(of_total + n, mask=out, other=0.0)[None, :]
    origin = (qmin + OFF) * a - b  # the value of what is held as 0
    return a * (ws * acc.to(tl.float32) - wt * sums.to(tl.float32)[:, None]) + origin * total


@triton.jit
def conv(
    x, of_pixels, scale, shift, weights, of_scale, of_shift, of_total, bias, residual, y,
    pixels, height, width, x_height, x_width, x_batch, x_down, x_right, x_column, r_batch, r_row, qmin, above, before,
    step_down, step_right,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, OFF: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DOWN: tl.constexpr, RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A dense convolution of codes: a block of a sample's output pixels by a block of outputs.

    ``x``, ``of_pixels``: codes and the sums of pixels, as ``multiply`` takes them.
    ``weights``: (taps, OUTPUTS, INPUTS) int8; ``of_total``: (taps, OUTPUTS). The border is no code but zero: its taps
    add nothing at all.
    """
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here, out = m < pixels, n < OUTPUTS
    left, top = m % width * step_right - before, m // width * step_down - above
    sample = tl.program_id(2).to(tl.int64)
    x_at = x + sample * x_batch
    sums = tl.zeros([BM], tl.int32)
    odd = tl.zeros([BM], tl.int32)
    acc = tl.zeros([BM, BN], tl.int32)
    BLOCKS: tl.constexpr = (INPUTS + BK - 1) // BK
    for step in range(KH * KW * BLOCKS):  # one loop, so that what it reads is on its way early
        tap, k = step // BLOCKS, step % BLOCKS * BK + tl.arange(0, BK)
        i, j = top + tap // KW * DOWN, left + tap % KW * RIGHT
        inside = here & (i >= 0) & (i < x_height) & (j >= 0) & (j < x_width)
        at = x_at + i * x_down + j * x_right
        code = tl.load(
            at[:, None] + k[None, :] * x_column, mask=inside[:, None] & (k < INPUTS)[None, :], other=0
        )
        acc = tl.dot(
            code,
            _weights_at(weights + tap * (OUTPUTS * INPUTS), n, k, INPUTS, OUTPUTS),
            acc,
            out_dtype=tl.int32,
        )
    for tap in range(KH * KW):
        i, j = top + tap // KW * DOWN, left + tap % KW * RIGHT
        inside = here & (i >= 0) & (i < x_height) & (j >= 0) & (j < x_width)
        more = tl.load(of_pixels + sample * x_height * x_width + i * x_width + j, mask=inside, other=0)
        odd += (more == _NAN_ROW).to(tl.int32)
        sums += tl.where(more == _NAN_ROW, 0, more)
    a, b = tl.load(scale), tl.load(shift)
    origin = (qmin + OFF) * a - b
    ws = tl.load(of_scale + n, mask=out, other=0.0)
    wt = tl.load(of_shift + n, mask=out, other=0.0)
    value = a * (ws[None, :] * acc.to(tl.float32) - wt[None, :] * sums.to(tl.float32)[:, None])
    for tap in range(KH * KW):
        i, j = top + tap // KW * DOWN, left + tap % KW * RIGHT
        inside = (i >= 0) & (i < x_height) & (j >= 0) & (j < x_width)
        total = tl.load(of_total + tap * OUTPUTS + n, mask=out, other=0.0)
        value += tl.where(inside[:, None], origin * total[None, :], 0.0)
    if HAS_BIAS:
        value = value + tl.load(bias + n, mask=out, other=0.0)[None, :]
    value = tl.where((odd > 0)[:, None], float("nan"), value)
    mask = here[:, None] & out[None, :]
    if RESIDUAL:
        value += tl.load(residual + sample * r_batch + m[:, None] * r_row + n[None, :], mask=mask, other=0.0)
    y += sample * pixels * OUTPUTS
    tl.store(y + m[:, None] * OUTPUTS + n[None, :], value, mask=mask)


@triton.jit
def pool(
    x, parts, rows, x_batch, x_row, x_column,
    CHANNELS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums over a block of rows of a sample: (samples, blocks, CHANNELS)."""
    _kernel_before(EARLY)
    block, sample = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BC)
    m = block * BM + tl.arange(0, BM)
    mask = (m < rows)[:, None] & (c < CHANNELS)[None, :]
    at = x + sample.to(tl.int64) * x_batch + m[:, None] * x_row + c[None, :] * x_column
    v = tl.load(at, mask=mask, other=0.0)
    to = parts + (sample * tl.num_programs(0) + block) * CHANNELS + c
    tl.store(to, tl.sum(v, 0), mask=c < CHANNELS)


@triton.jit
def excite(
    parts, first, first_bias, second, second_bias, y, blocks, rows,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``sigmoid(second @ relu(first @ mean + ..) + ..)`` of a sample's sums by block; matrices (outputs, inputs)."""
    _kernel_before(EARLY)
    sample = tl.program_id(0)
    c, h = tl.arange(0, BC), tl.arange(0, BH)
    real = c < CHANNELS
    total = tl.zeros([BC], tl.float32)
    for b0 in range(0, blocks, BB):
        b = b0 + tl.arange(0, BB)
        at = parts + (sample * blocks + b)[:, None] * CHANNELS + c[None, :]
        total += tl.sum(tl.load(at, mask=(b < blocks)[:, None] & real[None, :], other=0.0), 0)
    mean = total / rows
    both = (h < HIDDEN)[:, None] & real[None, :]
    hidden = tl.sum(
        tl.load(first + h[:, None] * CHANNELS + c[None, :], mask=both, other=0.0) * mean[None, :], 1
    )
    hidden = hidden + tl.load(first_bias + h, mask=h < HIDDEN, other=0.0)
    hidden = tl.where(hidden < 0, 0.0, hidden)  # NaN stays one
    v = tl.sum(tl.load(second + c[None, :] * HIDDEN + h[:, None], mask=both, other=0.0) * hidden[:, None], 0)
    v = v + tl.load(second_bias + c, mask=real, other=0.0)
    tl.store(y + sample * CHANNELS + c, 1.0 / (1.0 + tl.exp(-v)), mask=real)


@triton.jit
def blend(
    x, gain, v, scale, y, rows, x_batch, x_row, v_batch, v_row,
    COLUMNS: tl.constexpr, HAS_GAIN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``x * gain + v * scale``."""
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (m < rows)[:, None] & (c < COLUMNS)[None, :]
    sample = tl.program_id(2).to(tl.int64)
    value = tl.load(x + sample * x_batch + m[:, None] * x_row + c[None, :], mask=mask, other=0.0)
    if HAS_GAIN:
        value = value * tl.load(gain + c, mask=c < COLUMNS, other=0.0)[None, :]
    other = tl.load(v + sample * v_batch + m[:, None] * v_row + c[None, :], mask=mask, other=0.0)
    factor = tl.load(scale + sample * COLUMNS + c, mask=c < COLUMNS, other=0.0)[None, :]
    y += sample * rows * COLUMNS
    tl.store(y + m[:, None] * COLUMNS + c[None, :], value + other * factor, mask=mask)


@triton.jit
def normalize(
    x, before, weight, bias, y, rows, x_batch, x_row, x_column, eps,
    COLUMNS: tl.constexpr, DENSE: tl.constexpr, RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr,
    BEFORE: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A layer or RMS norm of a block of a sample's rows, to which ``before`` is added first.

    A stride that is 1 is a constant, which reads follow; so is that of DENSE rows, which shows how they are aligned.
    """
    _kernel_before(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (c < COLUMNS)[None, :]
    mask = (m < rows)[:, None] & inside
    sample = tl.program_id(2).to(tl.int64)
    step = COLUMNS if DENSE else x_row
    v = tl.load(x + sample * x_batch + m[:, None] * step + c[None, :] * x_column, mask=mask, other=0.0)
    if BEFORE:
        v += tl.load(before + c, mask=c < COLUMNS, other=0.0)[None, :]
    if not RMS:
        v = tl.where(inside, v - (tl.sum(v, 1) / COLUMNS)[:, None], 0.0)
    v = v * (1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / COLUMNS + eps))[:, None]
    if HAS_W:
        v = v * tl.load(weight + c, mask=c < COLUMNS, other=0.0)[None, :]
    if HAS_B:
        v = v + tl.load(bias + c, mask=c < COLUMNS, other=0.0)[None, :]
    y += sample * rows * COLUMNS
    tl.store(y + m[:, None] * COLUMNS + c[None, :], _act(v, ACT), mask=mask)
