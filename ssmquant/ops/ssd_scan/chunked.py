"""The scan of Mamba-2 as matrix products over chunks of time, in plain torch on any device.

Within a chunk the outputs are one masked matrix product, as in attention; from chunk to chunk a state is carried. Every
decay is the exponential of a sum of dt * A over just the steps that it spans: differences of running sums, which lose
the digits of small sums behind large ones, are not taken, and nothing is divided. Masked entries are minus infinity
before the exponential, so that they are zero and have zero gradients whatever stands there.

A symbolic length is not branched on: torch.compile makes one graph for all lengths of several chunks, and at most one
more for each of two cases that torch itself tells apart, whole chunks and a single one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["scan"]

# Chunks that one matrix product carries the state over; more go through several levels of such products.
_FAN = 64


def _spans(log: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): at [t, s] the sum over s < k <= t, which is none on the diagonal and above."""
    size = log.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log.device).tril(-1)
    return log[..., :, None].expand(*log.shape, size).masked_fill(~later, 0.0).cumsum(-2)


def _lower(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def _carry(values: Tensor, log: Tensor) -> Tensor:
    """The recurrence h[i] = exp(log[i]) * h[i - 1] + values[i] for values (..., I, S) and log (..., I): all h."""
    count = log.shape[-1]
    if not isinstance(count, int) or count <= _FAN:
        spans = _spans(log).masked_fill(~_lower(count, log.device), -math.inf)
        return spans.exp() @ values
    blocks = -(-count // _FAN)
    extra = blocks * _FAN - count
    values = F.pad(values, (0, 0, 0, extra)).unflatten(-2, (blocks, _FAN))
    log = F.pad(log, (0, extra)).unflatten(-1, (blocks, _FAN))
    local = _carry(values, log)
    ends = _carry(local[..., -1, :], log.sum(-1))
    entry = F.pad(ends[..., :-1, :], (0, 0, 1, 0))
    through = log.cumsum(-1).exp()[..., None]
    return (local + through * entry[..., None, :]).flatten(-3, -2)[..., :count, :]


def _weights(log: Tensor, window: int) -> Tensor:
    """What each step passes on to each other one of its chunk, (..., to, from); beyond the present within windows."""
    size = log.shape[-1]
    lower = _lower(size, log.device)
    spans = _spans(log)
    if not window:
        return spans.masked_fill(~lower, -math.inf).exp()
    # Looking ahead from t to s > t spans the decays of t .. s - 1: as looking back from s - 1 does to t - 1.
    ahead = _spans(F.pad(log, (1, -1))).transpose(-1, -2)
    number = torch.arange(size, device=log.device) // window
    same = number[:, None] == number
    spans = torch.where(lower, spans, ahead)
    return spans.masked_fill(~(lower | same), -math.inf).exp()


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, window: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, P) without D and z, and last state (B, H, P, N); operands of one dtype, dt ready for use.

    x is (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N), initial (B, H, P, N).
    """
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    share = heads // groups
    if isinstance(length, int):  # chunks of equal size, none longer than the sequence
        length = max(length, 1)
        chunk = -(-length // -(-length // chunk))
        window = min(window, length)
    if window:
        chunk = -(-chunk // window) * window  # windows are aligned, hence none is cut in two
    count = -(-x.shape[1] // chunk)
    extra = count * chunk - x.shape[1]  # steps of dt = 0 at the end leave the state as it is

    def cut(t: Tensor, inner: int) -> Tensor:  # (B, L, H or G, S) -> (B, c, G, R or 1, T, S)
        t = F.pad(t, (0, 0, 0, 0, 0, extra)).unflatten(1, (count, chunk)).unflatten(3, (groups, inner))
        return t.permute(0, 1, 3, 4, 2, 5)

    log = cut((dt * A)[..., None], share)[..., 0]  # (B, c, G, R, T)
    fed = cut(x * dt[..., None], share)  # (B, c, G, R, T, P)
    b, c = cut(B, 1), cut(C, 1)  # (B, c, G, 1, T, N)
    y = (_weights(log, window) * (c @ b.transpose(-1, -2))) @ fed  # (B, c, G, R, T, P)

    left = F.pad(log[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)  # from each step to the chunk's end
    added = (fed * left.exp()[..., None]).transpose(-1, -2) @ b  # (B, c, G, R, P, N)
    if initial is None:
        initial = x.new_zeros(batch, heads, width, states)
    values = torch.cat([initial.unflatten(1, (groups, share))[:, None], added], dim=1).flatten(-2)
    total = F.pad(log.sum(-1).movedim(1, -1), (1, 0))  # (B, G, R, 1 + c)
    h = _carry(values.movedim(1, -2), total).unflatten(-1, (width, states))  # (B, G, R, 1 + c, P, N)
    entry = h[..., :-1, :, :].movedim(3, 1)
    y = y + log.cumsum(-1).exp()[..., None] * (c @ entry.transpose(-1, -2))
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, : x.shape[1]]
    return y, h[..., -1, :, :].flatten(1, 2)
