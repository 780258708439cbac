"""How ``chunked`` cuts a scan into pieces, and the operands in its layout.

With T steps a piece, K pieces a block, S blocks: the time axis l = (s * K + k) * T + t is padded to S * K * T by steps
of dt = 0, which leave the state as it is. Rows are (B, S * K * T, D), buffers of a block (T, K, B, N, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PIECE",
    "Operand",
    "Plan",
    "Scan",
    "block_of",
    "columns",
    "fill",
    "prepare",
    "rows",
    "split",
    "through",
]

# Length of a piece. Fixed, so that the number of saved states is a function of L alone, also of a symbolic one.
PIECE = 32
# Work of one recurrence step: enough for torch to use two threads, little enough for the cache.
_LANES = 49_152


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


def rows(x: Tensor, padded: int, dtype: torch.dtype) -> Tensor:
    """(B, D, L) -> (B, padded L, D), zeros behind, sample by sample: torch copies a transposed matrix fast, no more."""
    batch, channels, length = x.shape
    out = torch.empty(batch, padded, channels, dtype=dtype, device=x.device)
    out[:, length:].zero_()
    x = x.to(dtype)
    for i in range(batch):
        out[i, :length].copy_(x[i].t())
    return out


def columns(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, padded L, D) -> contiguous (B, D, L) of ``dtype``."""
    out = torch.empty(x.shape[0], x.shape[2], length, dtype=x.dtype, device=x.device)
    for i in range(x.shape[0]):
        out[i].copy_(x[i, :length].t())
    return out.to(dtype)


class Operand:
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
        return self.value if self.constant else block_of(self.value[samples], p, s)[..., None]


def block_of(x: Tensor, p: Plan, s: int) -> Tensor:
    """(B, S * K * T, ...) -> the view (T, K, B, ...) of block s."""
    size = p.steps * p.chunks
    part = x[:, s * size : (s + 1) * size].unflatten(1, (p.chunks, p.steps))
    return part.permute(2, 1, 0, *range(3, part.dim()))


@dataclass
class Scan:
    """The operands of one call in the layout of this file."""

    p: Plan
    groups: int
    u: Tensor  # (B, padded, D)
    dt: Tensor  # (B, padded, D), after bias and softplus
    a: Tensor  # (N, D)
    a2: Tensor  # a / ln 2: torch's exp2 takes half the time of its exp
    b: Operand
    c: Operand


def prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
) -> Scan:
    """Bring the operands of a call, (B, D, L) and so on, into the layout of this file."""
    batch, channels, length = u.shape
    p = plan(batch, channels, A.shape[1], length)
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
    dt = rows(delta, p.padded, dtype)
    if bias is not None:
        dt[:, :length] += bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
        dt[:, length:].zero_()
    a = A.to(dtype).t().contiguous()
    return Scan(
        p,
        groups,
        rows(u, p.padded, dtype),
        dt,
        a,
        a / math.log(2.0),
        Operand(B, p, channels, groups, dtype),
        Operand(C, p, channels, groups, dtype),
    )


def split(x: Tensor, groups: int) -> Tensor:
    """(..., D) -> (..., G, D / G)."""
    return x.unflatten(-1, (groups, x.shape[-1] // groups))


def fill(scan: Scan, samples: slice, s: int, decay: Tensor, drive: Tensor) -> None:
    """Write exp(dt * A) and dt * u * B of one block."""
    dt = block_of(scan.dt[samples], scan.p, s)  # (T, K, B, D)
    u = block_of(scan.u[samples], scan.p, s)
    torch.mul(dt[..., None, :], scan.a2, out=decay)
    decay.exp2_()
    driven = split((dt * u)[..., None, :], scan.groups)
    torch.mul(driven, scan.b.block(scan.p, samples, s), out=split(drive, scan.groups))


def through(scan: Scan, samples: slice, s: int) -> Tensor:
    """What is left of a state after each whole piece of a block, exp(A * sum of dt): (K, B, N, D)."""
    total = block_of(scan.dt[samples], scan.p, s).sum(0)  # (K, B, D)
    return (total[..., None, :] * scan.a2).exp2_()
