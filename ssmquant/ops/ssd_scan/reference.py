"""The scan of Mamba-2 as its definition reads: one step of the recurrence at a time. The truth that tests compare to.

    dt[l] = clamp(softplus(dt[l] + dt_bias), dt_min, dt_max)                        (softplus only on request)
    h[l]  = exp(dt[l] * A) * h[l - 1] + dt[l] * x[l] B[l]^T                         h[-1] = initial_states or 0
    y[l]  = h[l] C[l] + D * x[l],   out = y * silu(z)

with one number ``exp(dt * A)`` for the whole (P, N) state of a head. Dao & Gu 2024 (arXiv 2405.21060), section 3; the
semantics are those of mamba-ssm's ``mamba_chunk_scan_combined``. For ``window`` see the reference of selective_scan.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops.checks import state_dtype

__all__ = ["ssd_scan_reference"]


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_last_state: bool = False,
    *,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    window: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Slow, differentiable by autograd, any floating dtype. Arguments and results as of ``ops.ssd_scan``."""
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, initial_states)
    batch, length, heads, width = x.shape
    u, step = x.to(dtype), dt.to(dtype)  # (B, L, H, P), (B, L, H)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    step = step.clamp(dt_min, dt_max)
    share = heads // B.shape[2]
    b, c = (t.to(dtype).repeat_interleave(share, dim=2) for t in (B, C))  # (B, L, H, N)
    decay = torch.exp(step * A.to(dtype))[..., None, None]  # (B, L, H, 1, 1)
    drive = (step[..., None] * u)[..., None] * b[:, :, :, None]  # (B, L, H, P, N)

    state = u.new_zeros(batch, heads, width, B.shape[3])  # (B, H, P, N)
    if initial_states is not None:
        state = initial_states.to(dtype)
    states = []
    for t in range(length):
        state = decay[:, t] * state + drive[:, t]
        states.append(state)
    last = state
    if window:
        ahead = torch.zeros_like(state)
        for t in reversed(range(length)):
            if (t + 1) % window == 0:
                ahead = torch.zeros_like(state)
            ahead = decay[:, t] * ahead
            states[t] = states[t] + ahead
            ahead = ahead + drive[:, t]
    reads = [(h * c[:, t, :, None]).sum(-1) for t, h in enumerate(states)]
    y = torch.stack(reads, dim=1) if reads else torch.zeros_like(u)  # (B, L, H, P)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(x.dtype)
    return (out, last) if return_last_state else out
