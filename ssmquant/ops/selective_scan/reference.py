"""The selective scan as its definition reads: one step of the recurrence at a time. The truth that tests compare to.

    dt[l] = softplus(delta[l] + delta_bias)                       (softplus only on request)
    h[l]  = exp(dt[l] * A) * h[l - 1] + dt[l] * B[l] * u[l]       h[-1] = 0
    y[l]  = <C[l], h[l]> + D * u[l],   out = y * silu(z)

With a window of w steps (LBMamba: Zhang et al., TMLR 2025), from the last step back, where w divides l + 1 or l is last

    r[l]  = 0                               E[l] = dt[l] * B[l] * u[l]
    r[l]  = exp(dt[l] * A) * E[l + 1]       E[l] = r[l] + dt[l] * B[l] * u[l]                   (elsewhere)
    y[l]  = <C[l], h[l] + r[l]> + D * u[l]

Gu & Dao 2023 (arXiv 2312.00752), equations 2 and 4; the semantics are those of mamba-ssm's ``selective_scan_ref``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops.checks import state_dtype

__all__ = ["selective_scan_reference"]


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """B or C in any of its three forms -> (B or 1, D, N, L or 1)."""
    if x.dim() == 2:  # (D, N), the same at every step
        return x[None, :, :, None]
    if x.dim() == 3:  # (B, N, L), the same for every channel
        x = x[:, None]
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    window: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Slow, differentiable by autograd, any floating dtype. Arguments and results as of ``ops.selective_scan``."""
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = u.shape
    x, dt, a = u.to(dtype), delta.to(dtype), A.to(dtype)  # (B, D, L), (B, D, L), (D, N)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    b = _per_channel(B.to(dtype), channels).expand(batch, -1, -1, length)
    c = _per_channel(C.to(dtype), channels).expand(batch, -1, -1, length)
    decay = torch.exp(dt[..., None] * a[:, None])  # (B, D, L, N)
    drive = (dt * x)[..., None] * b.transpose(2, 3)
    state = x.new_zeros(batch, channels, A.shape[1])  # (B, D, N)
    states = []
    for i in range(length):
        state = decay[:, :, i] * state + drive[:, :, i]
        states.append(state)
    if window:
        ahead = torch.zeros_like(state)
        for i in reversed(range(length)):
            if (i + 1) % window == 0:
                ahead = torch.zeros_like(state)
            ahead = decay[:, :, i] * ahead
            states[i] = states[i] + ahead
            ahead = ahead + drive[:, :, i]
    steps = [(h * c[..., i]).sum(-1) for i, h in enumerate(states)]
    y = torch.stack(steps, dim=-1) if steps else torch.zeros_like(x)  # (B, D, L)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(u.dtype)
    return (out, state) if return_last_state else out
