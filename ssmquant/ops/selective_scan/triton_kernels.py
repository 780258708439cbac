"""Triton kernels of the selective scan. Imported by ``triton`` alone, which says what they are for.

Tensors are channels-last, so that a step of a program reads and writes contiguous rows: u, dt, y (B, L, D), B and C
(B, L, G, N) or constant (D, N), states and decays (.., N, D). A program owns one piece of T steps of ``BLOCK_D``
channels of one group, its states a (BLOCK_D, BLOCK_N) tile in registers. ``a`` holds A / ln 2, since the hardware's
exponential is 2 ** x.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton compiles the functions with their annotations, and would take any but its own for an access to a global.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_ends", "backward_main", "carry_states", "forward_ends", "forward_main"]


@triton.jit
def _where(piece, DG: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sample, group, channels, states of this program, and the masks of the latter two."""
    blocks: tl.constexpr = (DG + BLOCK_D - 1) // BLOCK_D
    sample = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2) // blocks
    inner = (tl.program_id(2) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    return sample, group, group * DG + inner, n, inner < DG, n < N


@triton.jit
def _delta(raw, bias, SOFTPLUS: tl.constexpr):
    """Step size. log(1 + e) loses all of a small e; the quotient corrects what rounding 1 + e has lost."""
    x = raw.to(tl.float32) + bias
    if SOFTPLUS:
        e = tl.exp(tl.minimum(x, 20.0))
        w = 1.0 + e
        x = tl.where(x > 20.0, x, tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0))))
    return x


@triton.jit
def _matrix(ptr, row, d, n, dm, nm, G, group, N: tl.constexpr, CONSTANT: tl.constexpr):
    """B or C of one step as a tile that broadcasts to (BLOCK_D, BLOCK_N)."""
    if CONSTANT:
        value = tl.load(ptr + d[:, None] * N + n[None, :], mask=dm[:, None] & nm[None, :], other=0.0)
    else:
        value = tl.load(ptr + (row * G + group) * N + n[None, :], mask=nm[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def forward_ends(
    u, dt, a, bias, b, ends, totals, batch, L, D, G,
    DG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr,
):  # fmt: skip
    """What each piece makes of a zero state, (P, B, N, D), and the sum of its dt, (P, B, D)."""
    piece = tl.program_id(0)
    sample, group, d, n, dm, nm = _where(piece, DG, N, BLOCK_D, BLOCK_N)
    tile = dm[:, None] & nm[None, :]
    decay = tl.load(a + n[None, :] * D + d[:, None], mask=tile, other=0.0)
    shift = tl.load(bias + d, mask=dm, other=0.0)
    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    first = piece * T
    for t in range(tl.minimum(T, L - first)):
        row = sample * L + first + t
        x = tl.load(u + row * D + d, mask=dm, other=0.0).to(tl.float32)
        s = _delta(tl.load(dt + row * D + d, mask=dm, other=0.0), shift, SOFTPLUS)
        bv = _matrix(b, row, d, n, dm, nm, G, group, N, CONSTANT_B)
        h = tl.exp2(s[:, None] * decay) * h + (s * x)[:, None] * bv
        total += s
    at = piece * batch + sample
    tl.store(ends + (at * N + n[None, :]) * D + d[:, None], h, mask=tile)
    tl.store(totals + at * D + d, total, mask=dm)


@triton.jit
def carry_states(
    ends, totals, a, initial, final, batch, P, D,
    N: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what pieces add into the states that enter them, in place; from ``initial`` to ``final``."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # n * D + d
    mask = lane < N * D
    decay = tl.load(a + lane, mask=mask, other=0.0)
    h = tl.load(initial + sample * N * D + lane, mask=mask, other=0.0)
    for i in range(P):
        piece = i
        if REVERSE:
            piece = P - 1 - i
        at = piece * batch + sample
        end = tl.load(ends + at * N * D + lane, mask=mask, other=0.0)
        total = tl.load(totals + at * D + lane % D, mask=mask, other=0.0)
        tl.store(ends + at * N * D + lane, h, mask=mask)
        h = tl.exp2(total * decay) * h + end
    tl.store(final + sample * N * D + lane, h, mask=mask)


@triton.jit
def forward_main(
    u, dt, a, bias, b, c, skip, starts, y, batch, L, D, G,
    DG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
):  # fmt: skip
    """Outputs of each piece from the state that enters it."""
    piece = tl.program_id(0)
    sample, group, d, n, dm, nm = _where(piece, DG, N, BLOCK_D, BLOCK_N)
    tile = dm[:, None] & nm[None, :]
    decay = tl.load(a + n[None, :] * D + d[:, None], mask=tile, other=0.0)
    shift = tl.load(bias + d, mask=dm, other=0.0)
    through = tl.load(skip + d, mask=dm, other=0.0)
    h = tl.load(starts + ((piece * batch + sample) * N + n[None, :]) * D + d[:, None], mask=tile, other=0.0)
    first = piece * T
    for t in range(tl.minimum(T, L - first)):
        row = sample * L + first + t
        x = tl.load(u + row * D + d, mask=dm, other=0.0).to(tl.float32)
        s = _delta(tl.load(dt + row * D + d, mask=dm, other=0.0), shift, SOFTPLUS)
        bv = _matrix(b, row, d, n, dm, nm, G, group, N, CONSTANT_B)
        cv = _matrix(c, row, d, n, dm, nm, G, group, N, CONSTANT_C)
        h = tl.exp2(s[:, None] * decay) * h + (s * x)[:, None] * bv
        out = tl.sum(h * cv, axis=1) + through * x
        tl.store(y + row * D + d, out.to(y.dtype.element_ty), mask=dm)


@triton.jit
def backward_ends(
    g, dt, a, bias, c, ends, totals, batch, L, D, G,
    DG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONSTANT_C: tl.constexpr,
):  # fmt: skip
    """What each piece's own outputs add to the gradient of the state that enters it, and the sum of its dt."""
    piece = tl.program_id(0)
    sample, group, d, n, dm, nm = _where(piece, DG, N, BLOCK_D, BLOCK_N)
    tile = dm[:, None] & nm[None, :]
    decay = tl.load(a + n[None, :] * D + d[:, None], mask=tile, other=0.0)
    shift = tl.load(bias + d, mask=dm, other=0.0)
    k = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    first = piece * T
    steps = tl.minimum(T, L - first)
    for i in range(steps):
        row = sample * L + first + steps - 1 - i
        gy = tl.load(g + row * D + d, mask=dm, other=0.0).to(tl.float32)
        s = _delta(tl.load(dt + row * D + d, mask=dm, other=0.0), shift, SOFTPLUS)
        cv = _matrix(c, row, d, n, dm, nm, G, group, N, CONSTANT_C)
        k = tl.exp2(s[:, None] * decay) * (gy[:, None] * cv + k)
        total += s
    at = piece * batch + sample
    tl.store(ends + (at * N + n[None, :]) * D + d[:, None], k, mask=tile)
    tl.store(totals + at * D + d, total, mask=dm)


@triton.jit
def backward_main(
    g, u, dt, a, bias, b, c, skip, starts, laters, scratch, gu, gdt, ga, gb, gc, piece0, batch, L, D, G,
    DG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
):  # fmt: skip
    """All gradients of each piece: its states once forwards into ``scratch``, then the walk back.

    ga, and gb or gc where constant, get one tile a piece and sample; else gb and gc one row a step and channel block.
    Nothing is added up between programs here, hence nothing depends on their order.
    """
    piece = piece0 + tl.program_id(0)
    sample, group, d, n, dm, nm = _where(piece, DG, N, BLOCK_D, BLOCK_N)
    block = (tl.program_id(2) % ((DG + BLOCK_D - 1) // BLOCK_D)).to(tl.int64)
    tile = dm[:, None] & nm[None, :]
    decay = tl.load(a + n[None, :] * D + d[:, None], mask=tile, other=0.0)
    shift = tl.load(bias + d, mask=dm, other=0.0)
    through = tl.load(skip + d, mask=dm, other=0.0)
    at = piece * batch + sample
    h = tl.load(starts + (at * N + n[None, :]) * D + d[:, None], mask=tile, other=0.0)
    k = tl.load(laters + (at * N + n[None, :]) * D + d[:, None], mask=tile, other=0.0)
    first = piece * T
    steps = tl.minimum(T, L - first)
    own = (tl.program_id(0) * batch + sample) * T
    for t in range(steps):
        row = sample * L + first + t
        x = tl.load(u + row * D + d, mask=dm, other=0.0).to(tl.float32)
        s = _delta(tl.load(dt + row * D + d, mask=dm, other=0.0), shift, SOFTPLUS)
        bv = _matrix(b, row, d, n, dm, nm, G, group, N, CONSTANT_B)
        tl.store(scratch + ((own + t) * N + n[None, :]) * D + d[:, None], h, mask=tile)
        h = tl.exp2(s[:, None] * decay) * h + (s * x)[:, None] * bv
    tl.debug_barrier()  # the loads below may come from other threads than the stores above

    sum_a = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_b = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_c = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for i in range(steps):
        t = steps - 1 - i
        row = sample * L + first + t
        gy = tl.load(g + row * D + d, mask=dm, other=0.0).to(tl.float32)
        x = tl.load(u + row * D + d, mask=dm, other=0.0).to(tl.float32)
        raw = tl.load(dt + row * D + d, mask=dm, other=0.0).to(tl.float32)
        s = _delta(raw, shift, SOFTPLUS)
        bv = _matrix(b, row, d, n, dm, nm, G, group, N, CONSTANT_B)
        cv = _matrix(c, row, d, n, dm, nm, G, group, N, CONSTANT_C)
        before = tl.load(scratch + ((own + t) * N + n[None, :]) * D + d[:, None], mask=tile, other=0.0)
        kept = tl.exp2(s[:, None] * decay)
        after = kept * before + (s * x)[:, None] * bv
        gh = gy[:, None] * cv + k
        k = kept * gh
        q = k * before  # gradient of dt * A
        sum_a += s[:, None] * q
        fed = tl.sum(gh * bv, axis=1)
        gs = x * fed + tl.sum(q * decay, axis=1) * 0.6931471805599453  # decay is A / ln 2
        if SOFTPLUS:
            gs = gs / (1.0 + tl.exp(-(raw + shift)))
        tl.store(gu + row * D + d, s * fed + through * gy, mask=dm)
        tl.store(gdt + row * D + d, gs, mask=dm)
        out = ((block * batch * L + row) * G + group) * N + n
        drive = gh * (s * x)[:, None]
        if CONSTANT_B:
            sum_b += drive
        else:
            tl.store(gb + out, tl.sum(drive, axis=0), mask=nm)
        read = after * gy[:, None]
        if CONSTANT_C:
            sum_c += read
        else:
            tl.store(gc + out, tl.sum(read, axis=0), mask=nm)
    place = (at * N + n[None, :]) * D + d[:, None]
    tl.store(ga + place, sum_a, mask=tile)
    if CONSTANT_B:
        tl.store(gb + place, sum_b, mask=tile)
    if CONSTANT_C:
        tl.store(gc + place, sum_c, mask=tile)
