"""Stand-ins for compiled kernels: on real tensors they compute, on fake ones they fail, as native code does.

Their names and signatures are those of the field, for that is what the library knows them by. What they compute is
written here a second time, step by step and with other operators than ``ssmquant.ops.mixers`` uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.ops.ssd_scan import ssd_scan_reference

__all__ = [
    "BiMambaInnerFn", "Compiled", "MambaChunkScanCombinedFn", "MambaInnerFn", "MambaInnerFnNoOutProj",
    "MambaSplitConv1dScanCombinedFn", "New", "Old", "SelectiveScanFn", "SelectiveScanOflex", "inner", "scan",
]  # fmt: skip

INF = float("inf")


class Compiled(torch.autograd.Function):
    """Base class: forward looks at the bytes of its operands, backward differentiates what forward computed."""

    @staticmethod
    def launch(ctx: Any, kernel: Callable[..., Any], *operands: Any) -> Any:
        """Runs ``kernel`` and keeps what its derivative needs."""
        for x in operands:
            if isinstance(x, Tensor):
                x.detach().numpy()  # no fake tensor has bytes
        ctx.kernel = kernel
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in operands]
        ctx.save_for_backward(*(x for x in operands if isinstance(x, Tensor)))
        with torch.no_grad():
            return kernel(*operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        operands = [next(saved).detach().requires_grad_() if x is None else x[0] for x in ctx.others]
        with torch.enable_grad():
            out = ctx.kernel(*operands)
        outs = out if isinstance(out, tuple) else (out,)
        leaves = [x for x in operands if isinstance(x, Tensor)]
        found = iter(torch.autograd.grad(outs, leaves, grads, allow_unused=True))
        return tuple(next(found) if isinstance(x, Tensor) else None for x in operands)


# ---- scans ---------------------------------------------------------------------------------------------------------

scan = selective_scan_reference


def oflex_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, bias: Any, softplus: bool, oflex: bool
) -> Tensor:
    """Half precision in, float32 out where ``oflex``."""
    y = scan(u.float(), delta.float(), A, B.float(), C.float(), D, None, bias, softplus)
    assert isinstance(y, Tensor)
    return y if oflex else y.to(u.dtype)


class SelectiveScanFn(Compiled):
    """mamba-ssm's."""

    @staticmethod
    def forward(
        ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
        delta_softplus: bool = False, return_last_state: bool = False,
    ) -> Any:  # fmt: skip
        return Compiled.launch(
            ctx, scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )


class SelectiveScanOflex(Compiled):
    """VMamba's."""

    @staticmethod
    def forward(
        ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, delta_bias: Any = None,
        delta_softplus: bool = False, nrows: int = 1, backnrows: int = 1, oflex: bool = True,
    ) -> Any:  # fmt: skip
        return Compiled.launch(ctx, oflex_scan, u, delta, A, B, C, D, delta_bias, delta_softplus, oflex)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = Compiled.backward(ctx, *grads)
        return (*found[:8], None, None, None)


# ---- fused mixers --------------------------------------------------------------------------------------------------


def inner(
    xz: Tensor, conv_w: Tensor, conv_b: Any, x_w: Tensor, dt_w: Tensor, out_w: Any, out_b: Any, A: Tensor, A_b: Any,
    B: Any, C: Any, D: Any, dt_bias: Any, B_bias: Any, C_bias: Any, softplus: bool, window: int = 0,
) -> Tensor:  # fmt: skip
    """Causal convolution, x_proj, dt_proj, gated scan (and one from the end with ``A_b``), out_proj."""
    x, z = xz.chunk(2, 1)
    taps = conv_w.reshape(x.shape[1], -1)
    width, length = taps.shape[1], x.shape[-1]
    padded = F.pad(x, (width - 1, 0))
    x = sum(taps[:, i, None] * padded[..., i : i + length] for i in range(width))
    x = x if conv_b is None else x + conv_b[:, None]
    x = x * torch.sigmoid(x)
    rank, states = dt_w.shape[1], A.shape[1]
    mixed = torch.einsum("bdl,ed->bel", x, x_w)
    delta = torch.einsum("brl,dr->bdl", mixed[:, :rank], dt_w)
    B = mixed[:, rank : rank + states] + (0 if B_bias is None else B_bias[:, None]) if B is None else B
    C = mixed[:, -states:] + (0 if C_bias is None else C_bias[:, None]) if C is None else C
    y = scan(x, delta, A, B, C, D, z, dt_bias, softplus, window=window)
    assert isinstance(y, Tensor)
    if A_b is not None:
        turned = [t.flip(-1) for t in (x, delta, B, C, z)]
        back = scan(*turned[:2], A_b, *turned[2:4], D, turned[4], dt_bias, softplus, window=window)
        assert isinstance(back, Tensor)
        y = y + back.flip(-1)
    if out_w is None:
        return y
    y = torch.einsum("bdl,ed->ble", y, out_w)
    return y if out_b is None else y + out_b


class MambaInnerFn(Compiled):
    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv1d_weight: Any, conv1d_bias: Any, x_proj_weight: Any, delta_proj_weight: Any,
        out_proj_weight: Any, out_proj_bias: Any, A: Any, B: Any = None, C: Any = None, D: Any = None,
        delta_bias: Any = None, B_proj_bias: Any = None, C_proj_bias: Any = None, delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
    ) -> Any:  # fmt: skip
        def kernel(*o: Any) -> Tensor:
            return inner(*o[:8], None, *o[8:])

        return Compiled.launch(
            ctx, kernel, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
            out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


class MambaInnerFnNoOutProj(Compiled):
    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv1d_weight: Any, conv1d_bias: Any, x_proj_weight: Any, delta_proj_weight: Any, A: Any,
        B: Any = None, C: Any = None, D: Any = None, delta_bias: Any = None, B_proj_bias: Any = None,
        C_proj_bias: Any = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
    ) -> Any:  # fmt: skip
        def kernel(*o: Any) -> Tensor:
            return inner(*o[:5], None, None, o[5], None, *o[6:])

        return Compiled.launch(
            ctx, kernel, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
            B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


class BiMambaInnerFn(Compiled):
    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv1d_weight: Any, conv1d_bias: Any, x_proj_weight: Any, delta_proj_weight: Any,
        out_proj_weight: Any, out_proj_bias: Any, A: Any, A_b: Any, B: Any = None, C: Any = None, D: Any = None,
        delta_bias: Any = None, B_proj_bias: Any = None, C_proj_bias: Any = None, delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
    ) -> Any:  # fmt: skip
        return Compiled.launch(
            ctx, inner, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
            out_proj_bias, A, A_b, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


# ---- norms ---------------------------------------------------------------------------------------------------------


def add_norm(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, eps: float, prenorm: bool, rms: bool
) -> Any:
    """Norm of ``x + residual``; with ``prenorm`` the sum comes, too."""
    total = x if residual is None else x + residual
    centred = total if rms else total - total.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    y = y if bias is None else y + bias
    return (y, total.clone() if residual is None else total) if prenorm else y


class Old:
    """The fused norm of mamba-ssm 1."""

    class LayerNormFn(Compiled):
        @staticmethod
        def forward(
            ctx: Any, x: Any, weight: Any, bias: Any, residual: Any = None, eps: float = 1e-6, prenorm: bool = False,
            residual_in_fp32: bool = False, is_rms_norm: bool = False,
        ) -> Any:  # fmt: skip
            return Compiled.launch(ctx, add_norm, x, weight, bias, residual, eps, prenorm, is_rms_norm)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return (*Compiled.backward(ctx, *grads)[:4], None, None, None, None)


class New:
    """The fused norm of mamba-ssm 2."""

    class LayerNormFn(Compiled):
        @staticmethod
        def forward(
            ctx: Any, x: Any, weight: Any, bias: Any, residual: Any = None, x1: Any = None, weight1: Any = None,
            bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Any = None, prenorm: bool = False,
            residual_in_fp32: bool = False, is_rms_norm: bool = False, return_dropout_mask: bool = False,
        ) -> Any:  # fmt: skip
            return Compiled.launch(ctx, add_norm, x, weight, bias, residual, eps, prenorm, is_rms_norm)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return (*Compiled.backward(ctx, *grads)[:4], *[None] * 10)


# ---- Mamba-2 -------------------------------------------------------------------------------------------------------


def split_conv_scan(
    zxbcdt: Tensor, conv_w: Tensor, conv_b: Any, dt_bias: Tensor, A: Tensor, D: Tensor, activation: Any,
    norm_w: Any, eps: float, out_w: Any, out_b: Any, headdim: int, groups: int, norm_first: bool,
) -> Tensor:  # fmt: skip
    """Convolution over x, B and C, scan, gated RMS norm, out_proj."""
    heads = D.shape[0]
    width = heads * headdim
    states = (conv_w.shape[0] - width) // (2 * groups)
    z, xbc, dt = zxbcdt.split([width, conv_w.shape[0], heads], -1)
    taps, length = conv_w.reshape(conv_w.shape[0], -1), xbc.shape[1]
    padded = F.pad(xbc, (0, 0, taps.shape[1] - 1, 0))
    xbc = sum(taps[:, i] * padded[:, i : i + length] for i in range(taps.shape[1]))
    xbc = xbc if conv_b is None else xbc + conv_b
    xbc = xbc * torch.sigmoid(xbc) if activation in ("silu", "swish") else xbc
    x, B, C = xbc.split([width, groups * states, groups * states], -1)
    batch = x.shape[0]
    y = ssd_scan_reference(
        x.reshape(batch, length, heads, headdim), dt, A, B.reshape(batch, length, groups, states),
        C.reshape(batch, length, groups, states), D, None, dt_bias, True,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    y, gate = y.reshape(batch, length, width), z * torch.sigmoid(z)
    if norm_w is None:
        y = y * gate
    else:
        y = y if norm_first else y * gate
        y = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm_w
        y = y * gate if norm_first else y
    y = y if out_w is None else torch.einsum("bld,ed->ble", y, out_w)
    return y if out_b is None else y + out_b


class MambaSplitConv1dScanCombinedFn(Compiled):
    @staticmethod
    def forward(
        ctx: Any, zxbcdt: Any, conv1d_weight: Any, conv1d_bias: Any, dt_bias: Any, A: Any, D: Any, chunk_size: int,
        initial_states: Any = None, seq_idx: Any = None, dt_limit: Any = (0.0, INF), return_final_states: bool = False,
        activation: Any = "silu", rmsnorm_weight: Any = None, rmsnorm_eps: float = 1e-6, outproj_weight: Any = None,
        outproj_bias: Any = None, headdim: Any = None, ngroups: int = 1, norm_before_gate: bool = True,
    ) -> Any:  # fmt: skip
        return Compiled.launch(
            ctx, split_conv_scan, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, activation, rmsnorm_weight,
            rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        first = Compiled.backward(ctx, *grads)
        late = (first[7], None, first[9], first[10])
        return (*first[:6], *[None] * 6, *late, None, None, None)


class MambaChunkScanCombinedFn(Compiled):
    @staticmethod
    def forward(
        ctx: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, D: Any = None, z: Any = None,
        dt_bias: Any = None, initial_states: Any = None, seq_idx: Any = None, dt_softplus: bool = False,
        dt_limit: Any = (0.0, INF), return_final_states: bool = False,
    ) -> Any:  # fmt: skip
        return Compiled.launch(ctx, ssd_scan_reference, x, dt, A, B, C, D, z, dt_bias, dt_softplus)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        first = Compiled.backward(ctx, *grads)
        return (*first[:5], None, *first[5:8], *[None] * 5)
