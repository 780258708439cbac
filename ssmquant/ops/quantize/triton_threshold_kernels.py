"""Triton kernels of the quantizers that serve for comparison: thresholds, PACT, RLQ. Imported by ``triton_thresholds``.

Compiled as those of ``triton_kernels``. Programs of a backward pass take blocks in turn and add up what sums are made
of by lane, so that each reduces once, however many blocks there are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl

from ssmquant.ops.quantize.triton_kernels import _clip, _floored, _round

__all__ = [
    "pact_backward",
    "pact_forward",
    "soft_backward",
    "threshold_backward",
    "threshold_finish",
    "threshold_forward",
]

_SOFT = tl.constexpr(0.5 / 0.46211715726000975)  # 1 / (2 tanh(1/2))


# ---- PACT ----------------------------------------------------------------------------------------------------------


@triton.jit
def _raised(t, eps):
    return tl.where(t < eps, eps, t)


@triton.jit
def pact_forward(x, alpha, y, n, low, high, ratio, eps, BLOCK: tl.constexpr):
    """One block of values; ``ratio``: 1 / high."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    step = _raised(tl.load(alpha), eps) * ratio
    u = tl.div_rn(tl.load(x + at, mask=here, other=0.0).to(tl.float32), step)
    tl.store(y + at, (_round(_clip(u, low, high)) * step).to(y.dtype.element_ty), mask=here)


@triton.jit
def pact_backward(g, x, alpha, dx, parts, n, eps, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """dx, and each program's share of the gradient of alpha, (programs,)."""
    a = _raised(tl.load(alpha), eps)
    total = tl.zeros((BLOCK,), tl.float32)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0), tl.cdiv(n, BLOCK), programs):
        at = start * BLOCK + tl.arange(0, BLOCK)
        here = at < n
        grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        total += tl.where(value >= a, grad, 0.0)
        if SIGNED:
            total -= tl.where(value <= -a, grad, 0.0)
            inside = (value > -a) & (value < a)
        else:
            inside = (value >= 0) & (value < a)
        tl.store(dx + at, tl.where(inside, grad, grad * 0.0).to(dx.dtype.element_ty), mask=here)
    tl.store(parts + tl.program_id(0), tl.sum(total))


# ---- RLQ -----------------------------------------------------------------------------------------------------------


@triton.jit
def soft_backward(g, x, alpha, beta, dx, parts, n, qmin, qmax, eps, BLOCK: tl.constexpr):
    """As ``triton_kernels.lsq_backward`` with the slope of RLQ, without the gradient of beta: ``parts`` (programs,)."""
    a, b = _floored(tl.load(alpha), eps), tl.load(beta)
    total = tl.zeros((BLOCK,), tl.float32)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0), tl.cdiv(n, BLOCK), programs):
        at = start * BLOCK + tl.arange(0, BLOCK)
        here = at < n
        grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        u = tl.div_rn(tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b, a)
        inside = (u >= qmin) & (u <= qmax)
        code = _round(_clip(u, qmin, qmax))
        u = tl.where(inside, u, 0.0)
        # sech(z) ** 2 = 4 e / (1 + e) ** 2,  e = exp(-2 |z|)
        e = tl.exp(-2.0 * tl.abs(u - tl.floor(u) - 0.5))
        slope = tl.where(inside, (4.0 * _SOFT) * e / ((1.0 + e) * (1.0 + e)), 0.0)
        total += grad * (code - slope * u)
        tl.store(dx + at, (grad * slope).to(dx.dtype.element_ty), mask=here)
    tl.store(parts + tl.program_id(0), tl.sum(total))


# ---- thresholds ----------------------------------------------------------------------------------------------------


@triton.jit
def _scale(t, eps, KEEP_SIGN: tl.constexpr):
    if KEEP_SIGN:
        t = _floored(t, eps)
    else:
        t = _raised(t, eps)
    return t


@triton.jit
def threshold_forward(
    x, alpha, beta, gamma, thresholds, y, n, low, high, code_min, eps,
    KEEP_SIGN: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of values."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    a, b, c = _scale(tl.load(alpha), eps, KEEP_SIGN), tl.load(beta), _scale(tl.load(gamma), eps, KEEP_SIGN)
    u = _clip(tl.div_rn(tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b, a), low, high)
    index = u * 0.0  # keeps a NaN a NaN
    for i in tl.static_range(LEVELS - 1):
        index += tl.where(u > tl.load(thresholds + i), 1.0, 0.0)
    tl.store(y + at, ((index + code_min) * c - b).to(y.dtype.element_ty), mask=here)


@triton.jit
def threshold_backward(
    g, x, alpha, beta, gamma, grid, thresholds, dx, parts, n, low, high, code_min, tail, eps,
    KEEP_SIGN: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and each program's share of the sums, (2 LEVELS + 4, programs).

    Segment s of 0 .. LEVELS lies between the points s - 1 and s of the grid. Sums of g * gamma by segment but for the
    last one, of that times the distance from the segment's start, of the last segment's g * gamma; then those that
    become the gradients of alpha, beta and gamma.
    """
    a, b, c = _scale(tl.load(alpha), eps, KEEP_SIGN), tl.load(beta), _scale(tl.load(gamma), eps, KEEP_SIGN)
    programs, i = tl.num_programs(0), tl.program_id(0)
    rows = tl.arange(0, LEVELS)
    points = tl.load(grid + rows)
    whole = tl.zeros((LEVELS, BLOCK), tl.float32)
    reach = tl.zeros((LEVELS, BLOCK), tl.float32)
    zero = tl.zeros((BLOCK,), tl.float32)
    over, sum_a, sum_b, sum_c = zero, zero, zero, zero
    for start in range(i, tl.cdiv(n, BLOCK), programs):
        at = start * BLOCK + tl.arange(0, BLOCK)
        here = at < n
        grad = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        v = tl.div_rn(tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b, a)
        u = _clip(v, low, high)
        segment = tl.sum(tl.where(u[None, :] > points[:, None], 1, 0), 0)
        segment = tl.where(u == u, segment, LEVELS)  # as plain PyTorch's search
        middle = (segment > 0) & (segment < LEVELS)
        before = tl.maximum(segment - 1, 0)
        left = tl.load(grid + before)
        right = tl.load(grid + tl.minimum(segment, LEVELS - 1))
        later = u > tl.load(thresholds + tl.minimum(before, LEVELS - 2))
        code = before + tl.where(later & middle, 1, 0) + code_min
        slope = tl.where(middle, tl.div_rn(1.0, tl.where(middle, right - left, 1.0)), tail)
        slope = tl.where((v >= low) & (v <= high), slope, 0.0)
        step = grad * c
        through = tl.div_rn(step * slope, a)
        apart = tl.where(middle, step * (u - left), 0.0)
        mine = segment[None, :] == rows[:, None]
        whole += tl.where(mine, step[None, :], 0.0)
        reach += tl.where(mine, apart[None, :], 0.0)
        over += tl.where(segment == LEVELS, step, 0.0)
        sum_a -= tl.where(slope != 0, through * u, 0.0)
        sum_b += through - grad
        sum_c += grad * code
        tl.store(dx + at, through.to(dx.dtype.element_ty), mask=here)
    tl.store(parts + rows * programs + i, tl.sum(whole, 1))
    tl.store(parts + (LEVELS + rows) * programs + i, tl.sum(reach, 1))
    to = parts + 2 * LEVELS * programs + i
    tl.store(to, tl.sum(over))
    tl.store(to + programs, tl.sum(sum_a))
    tl.store(to + 2 * programs, tl.sum(sum_b))
    tl.store(to + 3 * programs, tl.sum(sum_c))


@triton.jit
def _column(parts, column, programs, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    return tl.sum(tl.load(parts + column * programs + at, mask=at < programs, other=0.0))


@triton.jit
def threshold_finish(parts, grid, out, programs, tail, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the grid's points, then of alpha, beta and gamma: (LEVELS + 3,), one a program."""
    i = tl.program_id(0)
    if i >= LEVELS:
        total = _column(parts, LEVELS + 1 + i, programs, BLOCK)
    else:
        # The fraction f of a gap goes to its right end, 1 - f to the left one, over the gap; the tails to the ends.
        point = tl.load(grid + i)
        total = 0.0
        if i < LEVELS - 1:
            gap = tl.load(grid + i + 1) - point
            far = _column(parts, LEVELS + i + 1, programs, BLOCK) / gap
            total -= (_column(parts, i + 1, programs, BLOCK) - far) / gap
        else:
            total -= tail * _column(parts, 2 * LEVELS, programs, BLOCK)
        if i > 0:
            gap = point - tl.load(grid + i - 1)
            total -= _column(parts, LEVELS + i, programs, BLOCK) / gap / gap
        else:
            total -= tail * _column(parts, 0, programs, BLOCK)
    tl.store(out + i, total)
