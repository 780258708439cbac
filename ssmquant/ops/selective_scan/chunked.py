"""The selective scan in plain torch, for the CPU and for any device without a kernel of ours.

Lanes are (batch, state, channel) with channels innermost, so that every operation runs over long contiguous rows. Time
is cut into blocks small enough for the cache, and a block into pieces that advance side by side where the lanes alone
would leave too little work for one torch call. Pieces first run from zero to learn what they add to the state, their
true start states follow, then they run once more. Nothing is ever divided by a decay, so decays that underflow to zero
are harmless. Only states at piece starts, (P, B, N, D), survive the forward pass; the backward pass recomputes the rest
block by block. ``plan`` describes the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmquant.ops.selective_scan.plan import (
    PIECE,
    Operand,
    Plan,
    Scan,
    block_of,
    columns,
    fill,
    prepare,
    rows,
    split,
    through,
)

__all__ = ["NAME", "backward", "forward", "saved_shape", "unavailable"]

NAME = "chunked"


def unavailable(device: torch.device, dtype: torch.dtype, states: int) -> None:
    """Serves everything."""


def saved_shape(batch: int, channels: int, states: int, length: int) -> tuple[int, ...]:
    """The states at piece starts."""
    return -(-length // PIECE), batch, states, channels


def _enter(scan: Scan, samples: slice, s: int, decay: Tensor, drive: Tensor, entry: Tensor) -> None:
    """Given the state before a block in entry[0], write the states before its other pieces."""
    p = scan.p
    local = drive[0, :-1].clone()
    for a, d in zip(decay[1:, :-1].unbind(), drive[1:, :-1].unbind(), strict=True):
        torch.addcmul(d, a, local, out=local)
    left = through(scan, samples, s)
    for k in range(1, p.chunks):
        torch.addcmul(local[k - 1], left[k - 1], entry[k - 1], out=entry[k])


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, D, L) in u's dtype, the last state (B, D, N) and the states at piece starts, both in ``dtype``.

    Piece states are (ceil(L / PIECE), B, N, D), or none of them unless ``save``.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    scan = prepare(u, delta, A, B, C, bias, softplus, dtype)
    p = scan.p
    y = torch.empty_like(scan.u)
    starts = y.new_empty(p.blocks * p.chunks, batch, states, channels)
    last = y.new_empty(batch, states, channels)
    for first in range(0, batch, p.batch):
        samples = slice(first, min(first + p.batch, batch))
        state = y.new_zeros(samples.stop - first, states, channels)
        decay = y.new_empty(p.steps, p.chunks, *state.shape)
        drive = torch.empty_like(decay)
        for s in range(p.blocks):
            fill(scan, samples, s, decay, drive)
            entry = starts[s * p.chunks : (s + 1) * p.chunks, samples]  # (K, B, N, D)
            entry[0] = state
            if p.chunks > 1:
                _enter(scan, samples, s, decay, drive, entry)
            h = entry
            for a, d in zip(decay.unbind(), drive.unbind(), strict=True):
                h = torch.addcmul(d, a, h, out=d)
            state = h[-1].clone()
            split(drive, scan.groups).mul_(scan.c.block(p, samples, s))
            block_of(y[samples], p, s).copy_(drive.sum(3))
        last[samples] = state
    if D is not None:
        y.addcmul_(scan.u, D.to(dtype))
    pieces = -(-length // PIECE)
    return (
        columns(y, length, u.dtype),
        last.transpose(1, 2).contiguous(),
        starts[:pieces] if save else starts[:0].clone(),
    )


@dataclass
class _Sums:
    """Where the backward pass gathers its results."""

    u: Tensor  # (B, padded, D): the sum over n of B * dL/dh, to become dL/du
    dt: Tensor  # (B, padded, D)
    a: Tensor  # (N, D)
    b: Tensor  # (B, padded, N, G), or (N, D) where B is constant
    c: Tensor


def _contract(x: Tensor, y: Tensor, into: Tensor, operand: Operand, p: Plan, samples: slice, s: int) -> None:
    """The gradient of B or C of one block: sum x * y over what the operand does not depend on. Overwrites x."""
    x.mul_(y[..., None, :])  # (T, K, B, N, D)
    if operand.constant:
        into += x.sum((0, 1, 2))
    else:
        block_of(into[samples], p, s).copy_(split(x, operand.groups).sum(-1))


def _backward_block(
    scan: Scan,
    g: Tensor,
    sums: _Sums,
    samples: slice,
    s: int,
    entry: Tensor,
    carry: Tensor,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """One block, its gradients put into ``sums``; from dL/d(state after it), (B, N, D), to that before it."""
    p, groups = scan.p, scan.groups
    decay, drive, grad, h = buffers  # all (T, K, B, N, D), h with one step more in front
    fill(scan, samples, s, decay, drive)
    h[0] = entry
    for a, d, before, after in zip(
        decay.unbind(), drive.unbind(), h[:-1].unbind(), h[1:].unbind(), strict=True
    ):
        torch.addcmul(d, a, before, out=after)

    gy = block_of(g[samples], p, s)  # (T, K, B, D)
    torch.mul(split(gy[..., None, :], groups), scan.c.block(p, samples, s), out=split(grad, groups))
    if p.chunks > 1:
        local = grad[-1, 1:].clone()
        for a, w in zip(decay[1:, 1:].flip(0).unbind(), grad[:-1, 1:].flip(0).unbind(), strict=True):
            torch.addcmul(w, a, local, out=local)
        local *= decay[0, 1:]
        left = through(scan, samples, s)
        later = torch.empty_like(grad[0])
        later[-1] = carry
        for k in range(p.chunks - 2, -1, -1):
            torch.addcmul(local[k], left[k + 1], later[k + 1], out=later[k])
        grad[-1] += later
    else:
        grad[-1, 0] += carry
    for t in range(p.steps - 2, -1, -1):
        torch.addcmul(grad[t], decay[t + 1], grad[t + 1], out=grad[t])
    carry = decay[0, 0] * grad[0, 0]

    dt = block_of(scan.dt[samples], p, s)
    u = block_of(scan.u[samples], p, s)
    decay.mul_(grad).mul_(h[:-1])  # dL/d(dt * A)
    _contract(h[1:], gy, sums.c, scan.c, p, samples, s)
    torch.mul(split(grad, groups), scan.b.block(p, samples, s), out=split(drive, groups))
    block_of(sums.u[samples], p, s).copy_(drive.sum(3))
    _contract(grad, dt * u, sums.b, scan.b, p, samples, s)
    torch.mul(decay, scan.a, out=drive)
    block_of(sums.dt[samples], p, s).copy_(drive.sum(3))
    decay.mul_(dt[..., None, :])
    sums.a += decay.sum((0, 1, 2))
    return carry


def backward(
    gy: Tensor,
    g_last: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, bias in their dtypes; empty ones where D or bias is None."""
    batch, _, length = u.shape
    scan = prepare(u, delta, A, B, C, bias, softplus, dtype)
    p = scan.p
    g = rows(gy, p.padded, dtype)
    fresh = torch.empty_like
    sums = _Sums(
        fresh(g),
        fresh(g),
        torch.zeros_like(scan.a),
        torch.zeros(B.shape[::-1], dtype=dtype, device=u.device) if scan.b.constant else fresh(scan.b.value),
        torch.zeros(C.shape[::-1], dtype=dtype, device=u.device) if scan.c.constant else fresh(scan.c.value),
    )
    for first in range(0, batch, p.batch):
        samples = slice(first, min(first + p.batch, batch))
        carry = g_last[samples].to(dtype).transpose(1, 2)
        shape = (p.chunks, *carry.shape)
        buffers = tuple(g.new_empty(p.steps + extra, *shape) for extra in (0, 0, 0, 1))
        for s in range(p.blocks - 1, -1, -1):
            entry = starts[s * p.chunks : (s + 1) * p.chunks, samples]
            if len(entry) < p.chunks:  # pieces of padding alone have no saved state; any finite one does
                entry = torch.cat([entry, entry.new_zeros(p.chunks - len(entry), *carry.shape)])
            carry = _backward_block(scan, g, sums, samples, s, entry, carry, buffers)
    g_dt = sums.dt.addcmul_(sums.u, scan.u)
    g_u = sums.u.mul_(scan.dt)
    if D is not None:
        g_u.addcmul_(g, D.to(dtype))
    if softplus:
        g_dt.mul_(scan.dt.neg_().expm1_().neg_())  # the slope at x is sigmoid(x) = 1 - exp(-softplus(x))
    g_D = g.mul_(scan.u).sum((0, 1)).to(D.dtype) if D is not None else g.new_empty(0)
    del g
    scan.u = scan.dt = g_u[:0]  # the results below take their place in memory
    g_bias = g_dt[:, :length].sum((0, 1)).to(bias.dtype) if bias is not None else g_u.new_empty(0)
    return (
        columns(g_u, length, u.dtype),
        columns(g_dt, length, delta.dtype),
        sums.a.t().contiguous().to(A.dtype),
        scan.b.gradient(sums.b, B),
        scan.c.gradient(sums.c, C),
        g_D,
        g_bias,
    )
