"""mamba-ssm's fused functions and its single steps: ``mamba_inner_fn`` and cousins, SSD, ``selective_state_update``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import mixers

__all__ = [
    "BiMambaInnerFn", "MambaChunkScanCombinedFn", "MambaInnerFn", "MambaInnerFnNoOutProj",
    "MambaSplitConv1dScanCombinedFn", "bimamba_inner_fn", "mamba_chunk_scan_combined", "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj", "mamba_split_conv1d_scan_combined", "selective_state_update", "ssd_selective_scan",
]  # fmt: skip

_INF = float("inf")


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Convolution, projections, gated scan and output projection: (B, 2 D, L) -> (B, L, M)."""
    return mixers.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, out_proj_weight=out_proj_weight, out_proj_bias=out_proj_bias, project=True,
        b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight,
        b_c_dt_rms_eps=b_c_dt_rms_eps,
    )  # fmt: skip


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Vim's variant: the scan also runs backwards, with ``A_b``, and both are added."""
    return mixers.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, out_proj_weight=out_proj_weight, out_proj_bias=out_proj_bias, project=True,
        A_b=A_b,
    )  # fmt: skip


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Vim's variant without output projection: (B, 2 D, L) -> (B, D, L)."""
    return mixers.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, project=False,
    )  # fmt: skip


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, _INF),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: Any = None,
) -> Any:
    """The scan of Mamba-2: x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N)."""
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        raise InputError(
            "mamba_chunk_scan_combined: several sequences in one row are not supported by the stand-in"
        )
    return mixers.mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states
    )


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, _INF),
) -> Any:
    """mamba-ssm's second way to the same values."""
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, 256, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
    )


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, _INF),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: Any = None,
) -> Any:
    """The whole mixer of Mamba-2 after its input projection: (B, L, 2 D + 2 G N + H) -> (B, L, D or M)."""
    if seq_idx is not None:
        raise InputError("mamba_split_conv1d_scan_combined: seq_idx is not supported by the stand-in")
    return mixers.mamba2_split_conv1d_scan(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size=chunk_size, initial_states=initial_states,
        dt_limit=dt_limit, return_final_states=return_final_states, activation=activation,
        rmsnorm_weight=rmsnorm_weight, rmsnorm_eps=rmsnorm_eps, outproj_weight=outproj_weight,
        outproj_bias=outproj_bias, headdim=headdim, ngroups=ngroups, norm_before_gate=norm_before_gate,
    )  # fmt: skip


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the recurrence; ``state`` (B, D, N) or (B, H, D, N) is updated in place. The rest without time."""
    if state_batch_indices is not None:
        raise InputError("selective_state_update: state_batch_indices is not supported by the stand-in")
    wide = torch.promote_types(state.dtype, torch.float32)
    step, dtype = dt.to(wide), x.dtype
    if dt_bias is not None:
        step = step + dt_bias
    if dt_softplus:
        step = F.softplus(step)
    if state.dim() == 4 and B.dim() == 3:  # (B, G, N): each group serves H / G heads
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], dim=1) for t in (B, C))
    B, C = (t.unsqueeze(-2).to(wide) for t in (B, C))  # (B, 1, N) or (B, H, 1, N)
    if state.dim() == 4 and B.dim() == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    new = state * torch.exp(step[..., None] * A) + (step * x)[..., None] * B
    state.copy_(new)
    out = (new * C).sum(-1)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(dtype)


class MambaInnerFn:
    """The ``autograd.Function`` behind the function of that name; only ``apply`` is there."""

    apply = staticmethod(mamba_inner_fn)


class BiMambaInnerFn:
    """As ``MambaInnerFn``."""

    apply = staticmethod(bimamba_inner_fn)


class MambaInnerFnNoOutProj:
    """As ``MambaInnerFn``."""

    apply = staticmethod(mamba_inner_fn_no_out_proj)


class MambaChunkScanCombinedFn:
    """As ``MambaInnerFn``."""

    apply = staticmethod(mamba_chunk_scan_combined)


class MambaSplitConv1dScanCombinedFn:
    """As ``MambaInnerFn``."""

    apply = staticmethod(mamba_split_conv1d_scan_combined)
