"""The selective scan in plain torch, for the CPU and for any device without a kernel of ours.

Lanes are (batch, state, channel) with channels innermost, so that every operation runs over long contiguous rows. Time is cut
into blocks small enough for the cache; a block is cut into ``chunks`` pieces that advance side by side where the lanes
alone would leave too little work for one torch call. Pieces first run from zero to learn what they add to the state,
their true start states follow, then they run once more. Nothing is ever divided by a decay, so decays that underflow to
zero are harmless. Only states at piece starts survive the forward pass; the backward pass recomputes the rest block by block.

Layouts, with T steps a piece, K pieces a block, S blocks: the time axis l = (s * K + k) * T + t is padded to S * K * T by
steps of dt = 0, which leave the state as it is. Block buffers are (T, K, B, N, D); piece states are (S * K, B, N, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PIECE", "backward", "forward"]

PIECE = 32  # the longest piece; fixed, so that the number of saved states is a function of L alone, also for a symbolic L
_LANES = (
    49_152  # work of one recurrence step: enough for torch to use two threads, little enough for the cache
)


@dataclass(frozen=True)
class Plan:
    """How time and batch are cut: ``steps`` T, ``chunks`` K, ``blocks`` S, and ``batch`` samples at a time."""

    steps: int
    chunks: int
    blocks: int
    batch: int

    @property
    def padded(self) -> int:
        return self.steps * self.chunks * self.blocks


def plan(batch: int, channels: int, states: int, length: int) -> Plan:
    """Cut (B, D, N, L) so that a step is neither tiny nor a block much larger than the cache."""
    pieces = -(-length // PIECE)
    row = channels * states
    samples = max(1, min(batch, _LANES // row))
    blocks = -(-pieces // max(1, _LANES // (row * samples)))
    return Plan(-(-length // pieces), -(-pieces // blocks), blocks, samples)


def _rows(x: Tensor, padded: int, dtype: torch.dtype) -> Tensor:
    """(B, D, L) -> (B, padded L, D), zeros behind. Sample by sample: torch has a fast copy for a transposed matrix only."""
    batch, channels, length = x.shape
    out = torch.empty(batch, padded, channels, dtype=dtype, device=x.device)
    out[:, length:].zero_()
    x = x.to(dtype)
    for i in range(batch):
        out[i, :length].copy_(x[i].t())
    return out


def _columns(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, padded L, D) -> contiguous (B, D, L) of ``dtype``."""
    out = torch.empty(x.shape[0], x.shape[2], length, dtype=x.dtype, device=x.device)
    for i in range(x.shape[0]):
        out[i].copy_(x[i, :length].t())
    return out.to(dtype)


class _Operand:
    """B or C, ready to be broadcast against (T, K, B, N, G, D / G): per step and group, or constant."""

    def __init__(self, x: Tensor, p: Plan, channels: int, groups: int, dtype: torch.dtype) -> None:
        self.constant = x.dim() == 2
        self.groups = groups
        if self.constant:
            self.value = x.to(dtype).t().reshape(x.shape[1], groups, channels // groups)  # (N, G, D/G)
        else:
            x = x if x.dim() == 4 else x[:, None]  # (B, G, N, L)
            out = torch.empty(x.shape[0], p.padded, x.shape[2], groups, dtype=dtype, device=x.device)
            out[:, x.shape[3] :].zero_()
            out[:, : x.shape[3]].copy_(x.permute(0, 3, 2, 1))
            self.value = out

    def gradient(self, total: Tensor, like: Tensor) -> Tensor:
        """Sums in the layout of this file -> a contiguous gradient shaped like the operand."""
        if self.constant:
            return total.t().contiguous().to(like.dtype)
        full = total[:, : like.shape[-1]].permute(0, 3, 2, 1)  # (B, G, N, L)
        return full.reshape(like.shape).to(like.dtype).contiguous()

    def block(self, p: Plan, samples: slice, s: int) -> Tensor:
        return self.value if self.constant else _block(self.value[samples], p, s)[..., None]


def _block(x: Tensor, p: Plan, s: int) -> Tensor:
    """(B, S * K * T, ...) -> the view (T, K, B, ...) of block s."""
    size = p.steps * p.chunks
    part = x[:, s * size : (s + 1) * size].unflatten(1, (p.chunks, p.steps))
    return part.permute(2, 1, 0, *range(3, part.dim()))


@dataclass
class _Scan:
    """The operands of one call in the layout of this file."""

    p: Plan
    groups: int
    u: Tensor  # (B, padded, D)
    dt: Tensor  # (B, padded, D), after bias and softplus
    a: Tensor  # (N, D)
    a2: Tensor  # a / ln 2: torch's exp2 takes half the time of its exp
    b: _Operand
    c: _Operand


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
) -> _Scan:
    batch, channels, length = u.shape
    p = plan(batch, channels, A.shape[1], length)
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
    dt = _rows(delta, p.padded, dtype)
    if bias is not None:
        dt[:, :length] += bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
        dt[:, length:].zero_()
    a = A.to(dtype).t().contiguous()
    return _Scan(
        p,
        groups,
        _rows(u, p.padded, dtype),
        dt,
        a,
        a / math.log(2.0),
        _Operand(B, p, channels, groups, dtype),
        _Operand(C, p, channels, groups, dtype),
    )


def _split(x: Tensor, groups: int) -> Tensor:
    """(..., D) -> (..., G, D / G)."""
    return x.unflatten(-1, (groups, x.shape[-1] // groups))


def _fill(scan: _Scan, samples: slice, s: int, decay: Tensor, drive: Tensor) -> None:
    """Write exp(dt * A) and dt * u * B of one block."""
    dt = _block(scan.dt[samples], scan.p, s)  # (T, K, B, D)
    u = _block(scan.u[samples], scan.p, s)
    torch.mul(dt[..., None, :], scan.a2, out=decay)
    decay.exp2_()
    driven = _split((dt * u)[..., None, :], scan.groups)
    torch.mul(driven, scan.b.block(scan.p, samples, s), out=_split(drive, scan.groups))


def _enter(scan: _Scan, samples: slice, s: int, decay: Tensor, drive: Tensor, entry: Tensor) -> None:
    """Given the state before a block in entry[0], write the states before its other pieces."""
    p = scan.p
    local = drive[0, :-1].clone()
    for a, d in zip(decay[1:, :-1].unbind(), drive[1:, :-1].unbind(), strict=True):
        torch.addcmul(d, a, local, out=local)
    through = _through(scan, samples, s)
    for k in range(1, p.chunks):
        torch.addcmul(local[k - 1], through[k - 1], entry[k - 1], out=entry[k])


def _through(scan: _Scan, samples: slice, s: int) -> Tensor:
    """What is left of a state after each whole piece of a block, exp(A * sum of dt): (K, B, N, D)."""
    total = _block(scan.dt[samples], scan.p, s).sum(0)  # (K, B, D)
    return (total[..., None, :] * scan.a2).exp2_()


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
    scan = _prepare(u, delta, A, B, C, bias, softplus, dtype)
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
            _fill(scan, samples, s, decay, drive)
            entry = starts[s * p.chunks : (s + 1) * p.chunks, samples]  # (K, B, N, D)
            entry[0] = state
            if p.chunks > 1:
                _enter(scan, samples, s, decay, drive, entry)
            h = entry
            for a, d in zip(decay.unbind(), drive.unbind(), strict=True):
                h = torch.addcmul(d, a, h, out=d)
            state = h[-1].clone()
            _split(drive, scan.groups).mul_(scan.c.block(p, samples, s))
            _block(y[samples], p, s).copy_(drive.sum(3))
        last[samples] = state
    if D is not None:
        y.addcmul_(scan.u, D.to(dtype))
    pieces = -(-length // PIECE) if save else 0
    return _columns(y, length, u.dtype), last.transpose(1, 2).contiguous(), starts[:pieces]


@dataclass
class _Sums:
    """Where the backward pass gathers its results."""

    u: Tensor  # (B, padded, D): the sum over n of B * dL/dh, to become dL/du
    dt: Tensor  # (B, padded, D)
    a: Tensor  # (N, D)
    b: Tensor  # (B, padded, N, G), or (N, D) where B is constant
    c: Tensor


def _contract(x: Tensor, y: Tensor, into: Tensor, operand: _Operand, p: Plan, samples: slice, s: int) -> None:
    """The gradient of B or C of one block: sum x * y over what the operand does not depend on. Overwrites x."""
    x.mul_(y[..., None, :])  # (T, K, B, N, D)
    if operand.constant:
        into += x.sum((0, 1, 2))
    else:
        _block(into[samples], p, s).copy_(_split(x, operand.groups).sum(-1))


def _backward_block(
    scan: _Scan,
    g: Tensor,
    sums: _Sums,
    samples: slice,
    s: int,
    entry: Tensor,
    carry: Tensor,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """One block, its gradients added to ``sums``; takes dL/d(state after it), (B, N, D), returns it before the block."""
    p, groups = scan.p, scan.groups
    decay, drive, grad, h = buffers  # all (T, K, B, N, D), h with one step more in front
    _fill(scan, samples, s, decay, drive)
    h[0] = entry
    for a, d, before, after in zip(
        decay.unbind(), drive.unbind(), h[:-1].unbind(), h[1:].unbind(), strict=True
    ):
        torch.addcmul(d, a, before, out=after)

    gy = _block(g[samples], p, s)  # (T, K, B, D)
    torch.mul(_split(gy[..., None, :], groups), scan.c.block(p, samples, s), out=_split(grad, groups))
    if p.chunks > 1:
        local = grad[-1, 1:].clone()
        for a, w in zip(decay[1:, 1:].flip(0).unbind(), grad[:-1, 1:].flip(0).unbind(), strict=True):
            torch.addcmul(w, a, local, out=local)
        local *= decay[0, 1:]
        through = _through(scan, samples, s)
        later = torch.empty_like(grad[0])
        later[-1] = carry
        for k in range(p.chunks - 2, -1, -1):
            torch.addcmul(local[k], through[k + 1], later[k + 1], out=later[k])
        grad[-1] += later
    else:
        grad[-1, 0] += carry
    for t in range(p.steps - 2, -1, -1):
        torch.addcmul(grad[t], decay[t + 1], grad[t + 1], out=grad[t])
    carry = decay[0, 0] * grad[0, 0]

    dt = _block(scan.dt[samples], p, s)
    u = _block(scan.u[samples], p, s)
    decay.mul_(grad).mul_(h[:-1])  # dL/d(dt * A)
    _contract(h[1:], gy, sums.c, scan.c, p, samples, s)
    torch.mul(_split(grad, groups), scan.b.block(p, samples, s), out=_split(drive, groups))
    _block(sums.u[samples], p, s).copy_(drive.sum(3))
    _contract(grad, dt * u, sums.b, scan.b, p, samples, s)
    torch.mul(decay, scan.a, out=drive)
    _block(sums.dt[samples], p, s).copy_(drive.sum(3))
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
    scan = _prepare(u, delta, A, B, C, bias, softplus, dtype)
    p = scan.p
    g = _rows(gy, p.padded, dtype)
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
        _columns(g_u, length, u.dtype),
        _columns(g_dt, length, delta.dtype),
        sums.a.t().contiguous().to(A.dtype),
        scan.b.gradient(sums.b, B),
        scan.c.gradient(sums.c, C),
        g_D,
        g_bias,
    )
