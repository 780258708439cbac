"""What the fused functions of the field compute, in plain torch calls around our scans, differentiated by autograd.

Two users: stand-ins for packages that are missing, and the tracer, which runs these functions under a recorder to see
the projections, convolutions and scans inside a fused call. For the latter, the batch stays the first dimension (so
that statistics per sample can be followed), parameters reach ``F.linear``, ``@`` or ``F.conv1d`` as they are given, and
dtypes are changed only where they have to be.

Sources: mamba-ssm (Gu & Dao 2023, arXiv 2312.00752; Dao & Gu 2024, arXiv 2405.21060), Vim (Zhu et al. 2024, arXiv
2401.09417), LBMamba (Zhang et al., TMLR 2025), causal-conv1d. Where a fused function and the reference that comes with
it differ, the fused one is followed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import upstream
from ssmquant.ops.norms import gated_norm, layer_norm, wide
from ssmquant.ops.selective_scan import selective_scan
from ssmquant.ops.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d",
    "gated_norm",
    "layer_norm",
    "mamba2_chunk_scan",
    "mamba2_split_conv1d_scan",
    "mamba_inner",
]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """A depthwise convolution that looks back only: what causal-conv1d's ``causal_conv1d_fn`` computes.

    Args:
        x: (B, D, L), of at least one step.
        weight: (D, W) or (D, 1, W); the last of W taps meets the present.
        bias: (D,).
        activation: None, or "silu" alias "swish".

    Returns:
        (B, D, L) in x's dtype, computed in weight's.

    With ``use_backend("mamba_ssm")`` the package causal-conv1d computes it, except in what is compiled or traced.

    Raises:
        InputError: another activation, or a weight that does not fit x.
    """
    if activation not in (None, "silu", "swish"):
        raise InputError(f"causal_conv1d: activation is {activation!r}, expected None, 'silu' or 'swish'")
    if weight.dim() == 2:
        weight = weight.unsqueeze(1)
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise InputError(
            f"causal_conv1d: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (B, D, L) and "
            "(D, W) or (D, 1, W)"
        )
    served = upstream.causal_conv1d(x, weight, bias, activation)
    if served is not None:
        return served
    length = x.shape[-1]
    y = x if x.dtype == weight.dtype else x.to(weight.dtype)
    y = F.conv1d(y, weight, bias, padding=weight.shape[-1] - 1, groups=weight.shape[0])[..., :length]
    if activation is not None:
        y = F.silu(y)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def mamba_inner(
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
    *,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    project: bool | None = None,
    A_b: Tensor | None = None,
    window: int = 0,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The inside of a Mamba block: mamba-ssm's ``mamba_inner_fn``, and Vim's ``_no_out_proj`` and ``bimamba`` kinds.

    Args:
        xz: (B, 2 D, L), what in_proj makes: the scan's path and the gate.
        conv1d_weight: (D, W) or (D, 1, W).
        conv1d_bias: (D,).
        x_proj_weight: (R + 2 N, D), rows for delta, B, C; without those of B or C where it is given.
        delta_proj_weight: (D, R).
        A: (D, N), negative: the decay itself, not its logarithm.
        B: where it does not depend on x: (D, N), or any form that ``ops.selective_scan`` takes.
        C: as B.
        D: (D,).
        delta_bias: (D,).
        B_proj_bias: (N,), added to a B made of x.
        C_proj_bias: (N,).
        delta_softplus: apply softplus to the step sizes.
        out_proj_weight: (E, D).
        out_proj_bias: (E,).
        project: whether to apply out_proj; None: where its weight is given.
        A_b: (D, N); adds a second scan, of all the same operands from last step to first, with this A.
        window: looks ahead within windows (LBMamba), as ``ops.selective_scan``'s.
        b_rms_weight: (N,); RMS norm of B over states.
        c_rms_weight: (N,); of C.
        dt_rms_weight: (D,); of delta over channels, after its projection.
        b_c_dt_rms_eps: their epsilon.

    Returns:
        (B, D, L), or (B, L, E) with out_proj.

    Raises:
        InputError: an operand does not fit, or out_proj is wanted and missing.
    """
    if project is None:
        project = out_proj_weight is not None
    rank, states = delta_proj_weight.shape[1], A.shape[-1]
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d(x, conv1d_weight, conv1d_bias, "silu")
    x_dbl = F.linear(x.transpose(1, 2), x_proj_weight)  # (B, L, R + 2 N)
    delta = delta_proj_weight @ x_dbl[..., :rank].transpose(1, 2)  # (B, D, L)
    if B is None:
        B = x_dbl[..., rank : rank + states]
        if B_proj_bias is not None:
            B = B + (B_proj_bias if B_proj_bias.dtype == B.dtype else B_proj_bias.to(B.dtype))
        B = B.transpose(1, 2)
    if C is None:
        C = x_dbl[..., -states:]
        if C_proj_bias is not None:
            C = C + (C_proj_bias if C_proj_bias.dtype == C.dtype else C_proj_bias.to(C.dtype))
        C = C.transpose(1, 2)
    if b_rms_weight is not None:
        B = _norm_of_rows(B, b_rms_weight, b_c_dt_rms_eps)
    if c_rms_weight is not None:
        C = _norm_of_rows(C, c_rms_weight, b_c_dt_rms_eps)
    if dt_rms_weight is not None:
        delta = _norm_of_rows(delta, dt_rms_weight, b_c_dt_rms_eps)

    y = selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, window=window)
    assert isinstance(y, Tensor)
    if A_b is not None:
        # A constant B or C is flipped as well, its states thus reversed: so does Vim, whose weights are meant to fit.
        x_b, delta_b, B_b, C_b, z_b = (t.flip([-1]) for t in (x, delta, B, C, z))
        y_b = selective_scan(x_b, delta_b, A_b, B_b, C_b, D, z_b, delta_bias, delta_softplus, window=window)
        assert isinstance(y_b, Tensor)
        y = y + y_b.flip([-1])
    if not project:
        return y
    if out_proj_weight is None:
        raise InputError("mamba_inner: project=True needs out_proj_weight")
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _norm_of_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis but one, of (B, C, L)."""
    y = layer_norm(x.transpose(-1, -2), weight, eps=eps, is_rms_norm=True)
    assert isinstance(y, Tensor)
    return y.transpose(-1, -2)


def mamba2_chunk_scan(
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
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba-ssm's ``mamba_chunk_scan_combined``: ``ops.ssd_scan`` under other names, which are its own."""
    return ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, return_final_states,
        dt_min=dt_limit[0], dt_max=dt_limit[1], chunk_size=chunk_size,
    )  # fmt: skip


def mamba2_split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The inside of a Mamba-2 block: mamba-ssm's ``mamba_split_conv1d_scan_combined``.

    With H heads of P channels, I = H P, and G groups of N states:

    Args:
        zxbcdt: (B, L, 2 M + 2 I + 2 G N + H), what in_proj makes: M pairs for a SwiGLU beside the scan (0 as a rule),
            the gate z, then x, B and C, which go through the convolution, and dt.
        conv1d_weight: (I + 2 G N, W) or (I + 2 G N, 1, W).
        conv1d_bias: (I + 2 G N,).
        dt_bias: (H,).
        A: (H,).
        D: (H,), or (H, P).
        chunk_size: see ``ops.ssd_scan``; without influence on the result.
        initial_states: (B, H, P, N).
        seq_idx: not supported.
        dt_limit: least and greatest step size.
        return_final_states: return ``(out, final states)``.
        activation: of the convolution: None, or "silu" alias "swish".
        rmsnorm_weight: (I,); with it the gate goes with an RMS norm over each group of I / G channels, and z not into
            the scan.
        rmsnorm_eps: its epsilon.
        outproj_weight: (E, M + I).
        outproj_bias: (E,).
        headdim: P; needed where D is (H,).
        ngroups: G.
        norm_before_gate: norm(x) * silu(z), else norm(x * silu(z)).

    Returns:
        (B, L, E), or (B, L, M + I) without out_proj; final states (B, H, P, N).

    Raises:
        InputError: seq_idx is given, or shapes do not fit.
    """
    if seq_idx is not None:
        raise InputError("mamba2_split_conv1d_scan: seq_idx is not supported; pass one sequence a sample")
    if D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise InputError("mamba2_split_conv1d_scan: headdim is needed where D has shape (H,)")
    heads = D.shape[0]
    inner = heads * headdim
    states = (conv1d_weight.shape[0] - inner) // ngroups // 2
    mixed = inner + 2 * ngroups * states
    beside = (zxbcdt.shape[-1] - inner - mixed - heads) // 2
    if states < 0 or beside < 0 or zxbcdt.shape[-1] != 2 * beside + inner + mixed + heads:
        raise InputError(
            f"mamba2_split_conv1d_scan: zxbcdt has shape {tuple(zxbcdt.shape)}, which is not z, x, B, C and dt of "
            f"{heads} heads of {headdim}, {ngroups} groups and a convolution of {conv1d_weight.shape[0]} channels"
        )
    if outproj_weight is None and outproj_bias is not None:
        raise InputError("mamba2_split_conv1d_scan: outproj_bias without outproj_weight")
    zx0, z, xBC, dt = torch.split(zxbcdt, [2 * beside, inner, mixed, heads], dim=-1)
    xBC = causal_conv1d(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation).transpose(1, 2)
    x, B, C = torch.split(xBC, [inner, ngroups * states, ngroups * states], dim=-1)
    out, last = ssd_scan(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, states)),
        C.unflatten(-1, (ngroups, states)),
        D,
        z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias,
        True,
        initial_states,
        True,
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        chunk_size=chunk_size,
    )
    y = out.flatten(-2)  # (B, L, I)
    if rmsnorm_weight is not None:
        size = inner // ngroups if ngroups > 1 else None
        y = gated_norm(y, rmsnorm_weight, None, z, rmsnorm_eps, size, norm_before_gate, is_rms_norm=True)
    if beside > 0:
        gate, value = zx0.chunk(2, dim=-1)
        swiglu = F.silu(wide(gate)) * wide(value)
        y = torch.cat([swiglu if swiglu.dtype == y.dtype else swiglu.to(y.dtype), y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y
