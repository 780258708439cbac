"""Triton kernels of fake quantization. Imported by ``triton`` and ``triton_banks``, which say what they are for.

Compiled without contraction to fused multiply-adds, and dividing as IEEE says: codes and values are then those of plain
PyTorch to the last bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "dls_apply",
    "dls_quantize",
    "dls_statistics",
    "dls_sums",
    "lsq_backward",
    "lsq_finish",
    "lsq_forward",
]

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding it leaves no fraction, rounding to even


@triton.jit
def _clip(u, low, high):
    """As ``torch.clamp``: NaN stays NaN."""
    return tl.where(u < low, low, tl.where(u > high, high, u))


@triton.jit
def _round(u):
    return (u + _MAGIC) - _MAGIC


@triton.jit
def _floored(alpha, eps):
    """``quantizers.lsq.floored``."""
    size = tl.where(tl.abs(alpha) < eps, eps, tl.abs(alpha))
    return tl.where(alpha < 0, -size, size)


# ---- LSQ -----------------------------------------------------------------------------------------------------------


@triton.jit
def lsq_forward(x, alpha, beta, y, n, qmin, qmax, eps, BLOCK: tl.constexpr):
    """One block of values."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    a, b = _floored(tl.load(alpha), eps), tl.load(beta)
    u = tl.div_rn(tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b, a)
    value = _round(_clip(u, qmin, qmax)) * a - b
    tl.store(y + at, value.to(y.dtype.element_ty), mask=here)


@triton.jit
def lsq_backward(g, x, alpha, beta, dx, parts, n, qmin, qmax, eps, BLOCK: tl.constexpr):
    """dx, and each program's share of the gradients of alpha and beta, (2, programs)."""
    a, b = _floored(tl.load(alpha), eps), tl.load(beta)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0), tl.cdiv(n, BLOCK), programs):
        at = start * BLOCK + tl.arange(0, BLOCK)
        here = at < n
        grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        u = tl.div_rn(tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b, a)
        inside = (u >= qmin) & (u <= qmax)
        through = tl.where(inside, grad, grad * 0.0)
        sum_a += grad * (_round(_clip(u, qmin, qmax)) - tl.where(inside, u, 0.0))
        sum_b += through - grad
        tl.store(dx + at, through.to(dx.dtype.element_ty), mask=here)
    tl.store(parts + tl.program_id(0), tl.sum(sum_a))
    tl.store(parts + programs + tl.program_id(0), tl.sum(sum_b))


@triton.jit
def lsq_finish(parts, out, programs, scale, BLOCK: tl.constexpr):
    """Sums of the shares: program 0 for alpha, 1 for beta."""
    at = tl.arange(0, BLOCK)
    which = tl.program_id(0)
    total = tl.sum(tl.load(parts + which * programs + at, mask=at < programs, other=0.0))
    tl.store(out + which, total * tl.where(which == 0, scale, 1.0))


# ---- DLS -----------------------------------------------------------------------------------------------------------
# A program has one tile of one group: grid (tiles of a group, groups).


@triton.jit
def _place(size, inner, groups, CONTIGUOUS: tl.constexpr, TILE: tl.constexpr):
    """Offsets of the program's tile, and what of it there is. Group g has (e // inner, g, e % inner) for e < size."""
    e = tl.program_id(0) * TILE + tl.arange(0, TILE)
    group = tl.program_id(1)
    if CONTIGUOUS:
        return group * size + e, e < size
    return (e // inner * groups + group) * inner + e % inner, e < size


@triton.jit
def _moments(x, here, size, TILE: tl.constexpr):
    """Mean, sum of squared deviations, min and max of the program's tile."""
    count = tl.minimum(TILE, size - tl.program_id(0) * TILE).to(tl.float32)
    mean = tl.sum(tl.where(here, x, 0.0)) / count
    apart = tl.where(here, x - mean, 0.0)
    low = tl.min(tl.where(here, x, float("inf")))
    high = tl.max(tl.where(here, x, float("-inf")))
    return mean, tl.sum(apart * apart), low, high


@triton.jit
def dls_statistics(x, parts, size, inner, CONTIGUOUS: tl.constexpr, TILE: tl.constexpr):
    """Moments of tiles, (4, groups, tiles)."""
    groups, tiles = tl.num_programs(1), tl.num_programs(0)
    at, here = _place(size, inner, groups, CONTIGUOUS, TILE)
    mean, squares, low, high = _moments(
        tl.load(x + at, mask=here, other=0.0).to(tl.float32), here, size, TILE
    )
    to = parts + tl.program_id(1) * tiles + tl.program_id(0)
    tl.store(to, mean)
    tl.store(to + groups * tiles, squares)
    tl.store(to + 2 * groups * tiles, low)
    tl.store(to + 3 * groups * tiles, high)


@triton.jit
def _merged(parts, size, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """Mean, sum of squared deviations, min and max of the program's group (Chan et al. 1983)."""
    groups = tl.num_programs(1)
    k = tl.arange(0, TILES)
    here = k < tiles
    count = tl.where(here, tl.minimum(TILE, size - k * TILE), 0).to(tl.float32)
    at = parts + tl.program_id(1) * tiles + k
    means = tl.load(at, mask=here, other=0.0)
    mean = tl.sum(means * count) / size
    apart = tl.where(here, means - mean, 0.0)
    squares = tl.sum(tl.load(at + groups * tiles, mask=here, other=0.0) + count * apart * apart)
    low = tl.min(tl.load(at + 2 * groups * tiles, mask=here, other=float("inf")))
    high = tl.max(tl.load(at + 3 * groups * tiles, mask=here, other=float("-inf")))
    return mean, squares, low, high


@triton.jit
def _dot(w, mean, std, low, high):
    return ((tl.load(w) * mean + tl.load(w + 1) * std) + tl.load(w + 2) * low) + tl.load(w + 3) * high


@triton.jit
def _signed_alpha(w, mean, std, low, high, beta):
    return _dot(w, tl.abs(mean + beta), std, low + beta, high + beta)


@triton.jit
def _range(w, v, mean, std, low, high, eps, codes, FLOOR_FIRST: tl.constexpr):
    """The scale and the shift; ``codes`` is 2 ** bits. A NaN in either goes through."""
    beta = _dot(v, mean, std, low, high)
    alpha = tl.abs(_signed_alpha(w, mean, std, low, high, beta))
    ceiling = (high - low) / codes
    if FLOOR_FIRST:
        alpha = tl.where(alpha < eps, eps, alpha)
    alpha = tl.where(ceiling < alpha, ceiling, alpha)
    alpha = tl.where(ceiling == ceiling, alpha, ceiling)
    if not FLOOR_FIRST:
        alpha = tl.where(alpha < eps, eps, alpha)
    return alpha, beta


@triton.jit
def _store_range(to, groups, mean, std, low, high, alpha, beta):
    tl.store(to, mean)
    tl.store(to + groups, std)
    tl.store(to + 2 * groups, low)
    tl.store(to + 3 * groups, high)
    tl.store(to + 4 * groups, alpha)
    tl.store(to + 5 * groups, beta)


@triton.jit
def _value(x, alpha, beta, low, high, qmin, qmax):
    u = tl.div_rn(x + beta, alpha)
    return _clip(_round(_clip(u, qmin, qmax)) * alpha - beta, low, high)


@triton.jit
def dls_quantize(
    x, w, v, parts, y, ranges, size, inner, tiles, freedom, qmin, qmax, eps, codes,
    CONTIGUOUS: tl.constexpr, ONE: tl.constexpr, FLOOR_FIRST: tl.constexpr, VALUES: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``ranges`` (6, groups), and the values if VALUES. ONE: a tile is a group, whose moments are found here.

    ``freedom``: what a sum of squares is divided by for the variance.
    """
    groups = tl.num_programs(1)
    at, here = _place(size, inner, groups, CONTIGUOUS, TILE)
    if ONE or VALUES:
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if ONE:
        mean, squares, low, high = _moments(value, here, size, TILE)
    else:
        mean, squares, low, high = _merged(parts, size, tiles, TILE, TILES)
    std = tl.sqrt_rn(squares / freedom)
    alpha, beta = _range(w, v, mean, std, low, high, eps, codes, FLOOR_FIRST)
    if tl.program_id(0) == 0:
        _store_range(ranges + tl.program_id(1), groups, mean, std, low, high, alpha, beta)
    if VALUES:
        value = _value(value, alpha, beta, low, high, qmin, qmax)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=here)


@triton.jit
def _terms(grad, x, here, alpha, beta, low, high, qmin, qmax):
    """By element: dx by the straight-through rule, and what sums for alpha, beta, min, max, and ties are made of."""
    u = tl.div_rn(x + beta, alpha)
    inside = (u >= qmin) & (u <= qmax)
    rounded = _round(_clip(u, qmin, qmax))
    y = rounded * alpha - beta
    below, above = y < low, y > high
    gy = tl.where(below | above, 0.0, grad)
    dx = gy * tl.where(inside, 1.0, 0.0)
    of_alpha = tl.where(here, gy * (rounded - tl.where(inside, u, 0.0)), 0.0)
    of_beta = tl.where(here, dx - gy, 0.0)
    of_low, of_high = tl.where(here & below, grad, 0.0), tl.where(here & above, grad, 0.0)
    at_low, at_high = tl.where(here & (x == low), 1.0, 0.0), tl.where(here & (x == high), 1.0, 0.0)
    return dx, of_alpha, of_beta, of_low, of_high, at_low, at_high


@triton.jit
def _shares(grad, x, here, alpha, beta, low, high, qmin, qmax):
    """Of the program's tile: dx by the straight-through rule, and the sums of ``_terms``."""
    dx, a, b, c, d, e, f = _terms(grad, x, here, alpha, beta, low, high, qmin, qmax)
    return dx, tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d), tl.sum(e), tl.sum(f)


@triton.jit
def _range_of(ranges, group, groups):
    at = ranges + group
    mean, std = tl.load(at), tl.load(at + groups)
    low, high = tl.load(at + 2 * groups), tl.load(at + 3 * groups)
    return mean, std, low, high, tl.load(at + 4 * groups), tl.load(at + 5 * groups)


@triton.jit
def dls_sums(
    g, x, ranges, parts, size, inner, qmin, qmax, CONTIGUOUS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The six sums of ``_shares`` for each tile, (6, groups, tiles)."""
    groups, tiles = tl.num_programs(1), tl.num_programs(0)
    at, here = _place(size, inner, groups, CONTIGUOUS, TILE)
    _mean, _std, low, high, alpha, beta = _range_of(ranges, tl.program_id(1), groups)
    grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    _dx, a, b, c, d, e, f = _shares(grad, value, here, alpha, beta, low, high, qmin, qmax)
    to = parts + tl.program_id(1) * tiles + tl.program_id(0)
    tl.store(to, a)
    tl.store(to + groups * tiles, b)
    tl.store(to + 2 * groups * tiles, c)
    tl.store(to + 3 * groups * tiles, d)
    tl.store(to + 4 * groups * tiles, e)
    tl.store(to + 5 * groups * tiles, f)


@triton.jit
def _total(parts, index, groups, tiles, TILES: tl.constexpr):
    k = tl.arange(0, TILES)
    at = parts + (index * groups + tl.program_id(1)) * tiles + k
    return tl.sum(tl.load(at, mask=k < tiles, other=0.0))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _through_range(
    w, v, mean, std, low, high, beta, d_alpha, d_beta, d_low, d_high, eps, codes, DEAD_PASS: tl.constexpr
):
    """Gradients of alpha0 (before its magnitude is taken), beta and the statistics of x.

    From those of alpha, beta as it shifts values, min and max as they clip them.
    """
    signed = _signed_alpha(w, mean, std, low, high, beta)
    if not DEAD_PASS:
        live = (tl.abs(signed) <= (high - low) / codes) & (tl.abs(signed) >= eps)
        d_alpha = tl.where(live, d_alpha, d_alpha * 0.0)
    # alpha -> alpha0 -> w and the statistics of x + beta -> beta -> v and the statistics of x.
    d_alpha = d_alpha * _sign(signed)
    s_mean = tl.load(w) * d_alpha * _sign(mean + beta)
    s_std, s_low, s_high = tl.load(w + 1) * d_alpha, tl.load(w + 2) * d_alpha, tl.load(w + 3) * d_alpha
    d_beta = d_beta + s_mean + s_low + s_high
    s_mean += tl.load(v) * d_beta
    s_std += tl.load(v + 1) * d_beta
    s_low += tl.load(v + 2) * d_beta + d_low
    s_high += tl.load(v + 3) * d_beta + d_high
    return d_alpha, d_beta, s_mean, s_std, s_low, s_high


@triton.jit
def _store_coefficients(dw, dv, stride, mean, std, low, high, beta, d_alpha, d_beta):
    """Gradients of w and v, from those that ``_through_range`` returns."""
    tl.store(dw, tl.abs(mean + beta) * d_alpha)
    tl.store(dw + stride, std * d_alpha)
    tl.store(dw + 2 * stride, (low + beta) * d_alpha)
    tl.store(dw + 3 * stride, (high + beta) * d_alpha)
    tl.store(dv, mean * d_beta)
    tl.store(dv + stride, std * d_beta)
    tl.store(dv + 2 * stride, low * d_beta)
    tl.store(dv + 3 * stride, high * d_beta)


@triton.jit
def _through_statistics(
    x, through, mean, std, low, high, s_mean, s_std, s_low, s_high, ties_low, ties_high, size, freedom
):
    """The gradient of x, from ``through``, that by the straight-through rule, and those of its statistics."""
    slope = tl.where(std > 0, s_std / (std * freedom), 0.0)
    out = through + s_mean / size + (x - mean) * slope
    out += tl.where(x == low, s_low / ties_low, 0.0)
    out += tl.where(x == high, s_high / ties_high, 0.0)
    return out


@triton.jit
def dls_apply(
    g, x, w, v, ranges, parts, dx, dwv, size, inner, tiles, freedom, qmin, qmax, eps, codes, scale,
    CONTIGUOUS: tl.constexpr, ONE: tl.constexpr, DEAD_PASS: tl.constexpr, NEED_X: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gradient of x (if NEED_X) and each group's share of the gradients of w and v, (8, groups)."""
    groups = tl.num_programs(1)
    at, here = _place(size, inner, groups, CONTIGUOUS, TILE)
    mean, std, low, high, alpha, beta = _range_of(ranges, tl.program_id(1), groups)
    if ONE or NEED_X:
        grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        through, d_alpha, d_beta, d_low, d_high, ties_low, ties_high = _shares(
            grad, value, here, alpha, beta, low, high, qmin, qmax
        )
    if not ONE:
        d_alpha = _total(parts, 0, groups, tiles, TILES)
        d_beta = _total(parts, 1, groups, tiles, TILES)
        d_low = _total(parts, 2, groups, tiles, TILES)
        d_high = _total(parts, 3, groups, tiles, TILES)
        ties_low = _total(parts, 4, groups, tiles, TILES)
        ties_high = _total(parts, 5, groups, tiles, TILES)
    d_alpha, d_beta, s_mean, s_std, s_low, s_high = _through_range(
        w, v, mean, std, low, high, beta, d_alpha * scale, d_beta, d_low, d_high, eps, codes, DEAD_PASS
    )
    if tl.program_id(0) == 0:
        dw = dwv + tl.program_id(1)
        _store_coefficients(dw, dw + 4 * groups, groups, mean, std, low, high, beta, d_alpha, d_beta)
    if NEED_X:
        out = _through_statistics(
            value, through, mean, std, low, high, s_mean, s_std, s_low, s_high, ties_low, ties_high, size, freedom
        )  # fmt: skip
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=here)
