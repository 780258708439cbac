"""The selective scan on a GPU by Triton: float32 state, operands of any dtype up to that.

Time is cut into pieces of PIECE steps which run in parallel: each first from a zero state, a small kernel then carries
states from piece to piece, and all run once more from the right ones; at vision sizes the lanes alone would leave most
of a GPU idle. The backward pass does the same in reverse. Sums over channels and samples are of one order: results are
reproducible bit for bit. Import this module only where Triton is installed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops.selective_scan import triton_kernels as kernels
from ssmquant.ops.selective_scan.plan import PIECE

__all__ = ["NAME", "backward", "forward", "saved_shape", "unavailable"]

NAME = "triton"

_STATES = 64  # more do not fit a program
_TILE = 256  # states of one program, by one warp: sums over channels or states then need no barrier
_SCRATCH = 2**28  # bytes of recomputed states that one launch of the backward pass may hold


@functools.cache
def unavailable(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why it cannot serve such a scan; None if it can."""
    if dtype != torch.float32:
        return "its state is float32"
    if states > _STATES:
        return f"it holds up to {_STATES} states, not {states}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than compute capability 7.0"
    return None


def saved_shape(batch: int, channels: int, states: int, length: int) -> tuple[int, ...]:
    """The states at piece starts."""
    return -(-length // PIECE), batch, states, channels


@dataclass(frozen=True)
class _Call:
    """Operands in the kernels' layout, and the constants of a launch."""

    u: Tensor  # (B, L, D)
    dt: Tensor  # (B, L, D)
    a: Tensor  # (N, D), A / ln 2
    bias: Tensor  # (D,)
    b: Tensor  # (B, L, G, N) or (D, N)
    c: Tensor
    skip: Tensor  # (D,)
    groups: int
    softplus: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, L, D, N and the number of pieces."""
        batch, length, channels = self.u.shape
        return batch, length, channels, self.a.shape[0], -(-length // PIECE)

    @property
    def block(self) -> tuple[int, int]:
        inner, states = self.u.shape[2] // self.groups, _power(self.a.shape[0])
        return min(_power(inner), max(16, _TILE // states)), states

    @property
    def channel_blocks(self) -> int:
        return -(-self.u.shape[2] // self.groups // self.block[0])

    def launch(self, kernel: Any, pieces: int, *args: Any, **flags: bool) -> None:
        batch, length, channels, states, _ = self.sizes
        block_d, block_n = self.block
        grid = (pieces, batch, self.groups * self.channel_blocks)
        constants = {
            "DG": channels // self.groups,
            "N": states,
            "T": PIECE,
            "BLOCK_D": block_d,
            "BLOCK_N": block_n,
            "SOFTPLUS": self.softplus,
        }
        kernel[grid](*args, batch, length, channels, self.groups, **constants, **flags, num_warps=1)

    def carry(self, ends: Tensor, totals: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """Run ``carry_states`` on ``ends`` in place; returns the state that leaves the last piece, (B, N, D)."""
        batch, _, channels, states, pieces = self.sizes
        final = torch.empty_like(initial)
        block = 128
        kernels.carry_states[(batch, -(-states * channels // block))](
            ends, totals, self.a, initial, final, batch, pieces, channels,
            N=states, BLOCK=block, REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return final


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _last(x: Tensor) -> Tensor:
    """B or C with time before states: (B, L, G, N); a constant one as it is."""
    if x.dim() == 2:
        return x.contiguous()
    x = x if x.dim() == 4 else x[:, None]
    return x.permute(0, 3, 1, 2).contiguous()


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> _Call:
    zeros = torch.zeros(u.shape[1], device=u.device)
    return _Call(
        u.transpose(1, 2).contiguous(),
        delta.transpose(1, 2).contiguous(),
        (A.float().t() / math.log(2.0)).contiguous(),
        zeros if bias is None else bias.float().contiguous(),
        _last(B),
        _last(C),
        zeros if D is None else D.float().contiguous(),
        next((x.shape[1] for x in (B, C) if x.dim() == 4), 1),
        softplus,
    )


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
    """As ``chunked.forward``; ``dtype`` has to be float32."""
    call = _prepare(u, delta, A, B, C, D, bias, softplus)
    batch, _, channels, states, pieces = call.sizes
    starts = torch.empty(pieces, batch, states, channels, dtype=dtype, device=u.device)
    totals = starts.new_empty(pieces, batch, channels)
    y = torch.empty_like(call.u)
    fixed = {"CONSTANT_B": B.dim() == 2}
    with torch.cuda.device_of(u):
        call.launch(
            kernels.forward_ends, pieces, call.u, call.dt, call.a, call.bias, call.b, starts, totals, **fixed
        )
        last = call.carry(starts, totals, starts.new_zeros(batch, states, channels), reverse=False)
        operands = (call.u, call.dt, call.a, call.bias, call.b, call.c, call.skip)
        call.launch(kernels.forward_main, pieces, *operands, starts, y, **fixed, CONSTANT_C=C.dim() == 2)
    return (
        y.transpose(1, 2).contiguous(),
        last.transpose(1, 2).contiguous(),
        starts if save else starts[:0].clone(),
    )


def _sum_matrix(part: Tensor, like: Tensor) -> Tensor:
    """Partial gradients of B or C -> its gradient."""
    if like.dim() == 2:
        return part.sum((0, 1)).t().contiguous().to(like.dtype)  # (P, B, N, D) -> (D, N)
    total = part.sum(0).permute(0, 2, 3, 1)  # (blocks, B, L, G, N) -> (B, G, N, L)
    return total.reshape(like.shape).to(like.dtype).contiguous()


def backward(
    g: Tensor,
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
    """As ``chunked.backward``; ``dtype`` has to be float32."""
    call = _prepare(u, delta, A, B, C, D, bias, softplus)
    batch, length, channels, states, pieces = call.sizes
    gy = g.transpose(1, 2).contiguous()
    laters = torch.empty(pieces, batch, states, channels, dtype=dtype, device=u.device)
    totals = laters.new_empty(pieces, batch, channels)
    gu, gdt = laters.new_empty(call.u.shape), laters.new_empty(call.u.shape)
    ga = torch.empty_like(laters)
    steps = (call.channel_blocks, batch, length, call.groups, states)
    gb, gc = (torch.empty_like(laters) if x.dim() == 2 else laters.new_empty(steps) for x in (B, C))
    at_once = max(1, min(pieces, _SCRATCH // (4 * batch * PIECE * states * channels)))
    scratch = laters.new_empty(at_once, batch, PIECE, states, channels)
    fixed = {"CONSTANT_C": C.dim() == 2}
    with torch.cuda.device_of(u):
        call.launch(
            kernels.backward_ends, pieces, gy, call.dt, call.a, call.bias, call.c, laters, totals, **fixed
        )
        call.carry(laters, totals, g_last.to(dtype).transpose(1, 2).contiguous(), reverse=True)
        fixed["CONSTANT_B"] = B.dim() == 2
        operands = (
            gy,
            call.u,
            call.dt,
            call.a,
            call.bias,
            call.b,
            call.c,
            call.skip,
            starts,
            laters,
            scratch,
        )
        for piece in range(0, pieces, at_once):
            count = min(at_once, pieces - piece)
            call.launch(kernels.backward_main, count, *operands, gu, gdt, ga, gb, gc, piece, **fixed)
    empty = u.new_empty(0)
    return (
        gu.transpose(1, 2).to(u.dtype).contiguous(),
        gdt.transpose(1, 2).to(delta.dtype).contiguous(),
        ga.sum((0, 1)).t().contiguous().to(A.dtype),
        _sum_matrix(gb, B),
        _sum_matrix(gc, C),
        empty if D is None else (gy.float() * call.u.float()).sum((0, 1)).to(D.dtype),
        empty if bias is None else gdt.sum((0, 1)).to(bias.dtype),
    )
