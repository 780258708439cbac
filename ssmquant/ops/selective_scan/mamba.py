"""The selective scan by ``selective_scan_cuda``, the compiled extension of mamba-ssm, where it is installed and chosen.

It wants u, delta and what varies of B and C in one dtype, the last axis contiguous, and the rest in float32. Its
backward pass knows no gradient of the last state; that comes from a second pass over some more steps, and only where
something depends on it. Sums over samples and channels are atomic there: gradients differ in the last digits from run
to run.

Gu & Dao 2023, arXiv 2312.00752.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import upstream

__all__ = ["LAST_IS_OPTIONAL", "NAME", "backward", "forward", "saved_shape", "unavailable"]

NAME = "mamba_ssm"
LAST_IS_OPTIONAL = True

_CHUNK = 2048  # steps between the states that it saves
_STATES = 256
_IO = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def unavailable(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why it cannot serve such a scan; None if it can."""
    if device.type != "cuda":
        return "it runs on CUDA devices only"
    if dtype != torch.float32:
        return "its state is float32"
    if states > _STATES:
        return f"it holds up to {_STATES} states, not {states}"
    found = upstream.find("selective_scan_cuda")
    return found if isinstance(found, str) else None


def saved_shape(batch: int, channels: int, states: int, length: int) -> tuple[int, ...]:
    """Decays and states at ends of chunks, in turn."""
    return -(-length // _CHUNK), batch, channels, 2 * states


def _extension() -> Any:
    found = upstream.find("selective_scan_cuda")
    if isinstance(found, str):
        raise InputError(f"selective_scan: {found}")
    return found


def _matrix(x: Tensor, io: torch.dtype) -> Tensor:
    """B or C as (B, G, N, L) in ``io``, or constant (D, N) in float32."""
    if x.dim() == 2:
        return x.float().contiguous()
    return (x if x.dim() == 4 else x[:, None]).to(io).contiguous()


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
) -> list[Any]:
    if max(t.numel() for t in (u, B, C)) >= 2**31:  # older versions of it count in 32 bits
        raise InputError(
            f"selective_scan: u {tuple(u.shape)}, B or C has more elements than the back end mamba_ssm can count; "
            "choose another one, or pass fewer samples at once"
        )
    kinds = {t.dtype for t in (u, delta, B, C) if t.dim() > 2}
    (io,) = kinds if len(kinds) == 1 and kinds <= set(_IO) else (torch.float32,)
    skip, shift = (None if t is None else t.float().contiguous() for t in (D, bias))
    tensors = (u.to(io).contiguous(), delta.to(io).contiguous(), A.float().contiguous())
    return [*tensors, _matrix(B, io), _matrix(C, io), skip, shift]


def _parts(B: Tensor, C: Tensor, channels: int) -> list[slice]:
    """Channels to be computed in one call: all, but one group at a time where only one of B and C is constant.

    It takes the number of groups from B, and one if that is constant; groups of B with a constant C are fine.
    """
    groups = C.shape[1] if B.dim() == 2 and C.dim() == 4 else 1
    size = channels // groups
    return [slice(i * size, (i + 1) * size) for i in range(groups)]


def _part(operands: list[Any], part: slice, index: int, count: int) -> list[Any]:
    """The operands of ``_prepare`` for some of the channels."""
    if count == 1:
        return operands
    u, delta, A, B, C, D, bias = operands
    some = (None if t is None else t[part] for t in (D, bias))
    return [u[:, part], delta[:, part], A[part], B[part], C[:, index : index + 1], *some]


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
    """As ``chunked.forward``; ``dtype`` has to be float32, and ``saved`` is (chunks, B, D, 2 N)."""
    operands = _prepare(u, delta, A, B, C, D, bias)
    parts = _parts(B, C, u.shape[1])
    found = []
    for i, part in enumerate(parts):
        *tensors, shift = _part(operands, part, i, len(parts))
        found.append(_extension().fwd(*tensors, None, shift, softplus))
    y, states = (torch.cat(ts, 1) if len(ts) > 1 else ts[0] for ts in zip(*found, strict=True))
    last = states[:, :, -1, 1::2].contiguous()
    if B.dim() == 2:  # it takes a constant B as a factor of what is read out: its states are without
        last = last * operands[3]
    saved = states.permute(2, 0, 1, 3) if save else states[:, :, :0].permute(2, 0, 1, 3)
    return y.to(u.dtype).contiguous(), last, saved.contiguous()


def _through_last(
    g_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and bias of <g_last, last state>, in float32.

    N more steps with dt = 0 leave the state as it is; there C reads out one entry of the state a step, whose gradient
    is that of y.
    """
    batch, _, length = u.shape
    states = A.shape[1]
    raw = delta.float() if bias is None else delta.float() + bias.float()[:, None]
    dt = F.softplus(raw) if softplus else raw
    x, dt, g = (F.pad(t, (0, states)) for t in (u.float(), dt, torch.zeros_like(raw)))
    g[..., length:] = g_last
    b = B.float().contiguous() if B.dim() == 2 else F.pad(_matrix(B, torch.float32), (0, states))
    c = x.new_zeros(batch, 1 if b.dim() == 2 else b.shape[1], states, length + states)
    c[..., length:] = torch.eye(states, device=u.device)
    operands = (x, dt, A.float().contiguous(), b, c, None, None, None)
    saved = _extension().fwd(*operands, False)[1]
    gu, gdt, ga, gb, *_ = _extension().bwd(*operands, g, saved, None, None, False, False)
    gdt = gdt[..., :length]
    if softplus:
        gdt = gdt * torch.sigmoid(raw)
    gb = gb if B.dim() == 2 else gb[..., :length].reshape(B.shape)
    return gu[..., :length], gdt, ga, gb, gdt.sum((0, 2))


def backward(
    g: Tensor,
    g_last: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """As ``chunked.backward``; ``dtype`` has to be float32, and ``g_last`` may be None."""
    operands = _prepare(u, delta, A, B, C, D, bias)
    gy = g.to(operands[0].dtype).contiguous()
    states = saved.permute(1, 2, 0, 3)
    parts = _parts(B, C, u.shape[1])
    found = []
    for i, part in enumerate(parts):
        *tensors, shift = _part(operands, part, i, len(parts))
        kept = states[:, part].contiguous()
        grads = _extension().bwd(*tensors, None, shift, gy[:, part], kept, None, None, softplus, False)
        found.append(grads[:7])
    # u, delta, A, B, C, D and bias have their channels (C its groups) on these axes
    axes = (1, 1, 0, 0, 1, 0, 0)
    joined = [
        None if ts[0] is None else torch.cat(ts, axis) if len(ts) > 1 else ts[0]
        for axis, ts in zip(axes, zip(*found, strict=True), strict=True)
    ]
    if g_last is not None:
        extra = _through_last(g_last, u, delta, A, B, bias, softplus)
        for index, t in zip((0, 1, 2, 3, 6), extra, strict=True):
            have = joined[index]
            if have is not None:
                joined[index] = have.reshape(t.shape) + t
    likes = (u, delta, A, B, C, D, bias)
    return tuple(
        u.new_empty(0) if like is None or t is None else t.reshape(like.shape).to(like.dtype).contiguous()
        for like, t in zip(likes, joined, strict=True)
    )
