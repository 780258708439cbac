"""The fused norms of mamba-ssm in plain torch: after a residual sum (``layer_norm``), with a gate (``gated_norm``).

Both compute in float32 (float64 for float64) and round once, at the end, as the Triton kernels do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError

__all__ = ["gated_norm", "layer_norm", "wide"]


def wide(x: Tensor) -> Tensor:
    """Half precision to float32; anything else as it is, without a call that a recorder would see."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Norm over the last axis of a wide x."""
    weight, bias = (None if t is None else wide(t) for t in (weight, bias))
    if not rms:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    y = F.rms_norm(x, (x.shape[-1],), weight=weight, eps=eps)
    return y if bias is None else y + bias


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer or RMS norm of ``x + residual``: mamba-ssm's ``layer_norm_fn`` and ``rms_norm_fn``.

    Arguments are those of mamba-ssm 2 and of Vim's copy, in their order. mamba-ssm 1 has fewer, and in another order.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,).
        residual: as x, of any dtype; added before the norm.
        x1: not supported, as ``weight1``, ``bias1``, ``rowscale``, ``return_dropout_mask`` and a ``dropout_p`` but 0.
        weight1: not supported.
        bias1: not supported.
        eps: added to the variance or mean square.
        dropout_p: 0.
        rowscale: not supported.
        prenorm: return ``(out, x + residual)``.
        residual_in_fp32: without a residual, that sum is float32; with one, it has the residual's dtype.
        is_rms_norm: RMS norm.
        return_dropout_mask: not supported.

    Returns:
        ``out`` in x's dtype. The norm sees the sum before it is rounded.

    Raises:
        InputError: an argument is not supported.
    """
    options = {"x1": x1, "weight1": weight1, "bias1": bias1, "rowscale": rowscale}
    unsupported = [name for name, value in options.items() if value is not None]
    unsupported += ["dropout_p"] * (dropout_p != 0.0) + ["return_dropout_mask"] * return_dropout_mask
    if unsupported:
        raise InputError(f"layer_norm: {', '.join(unsupported)} is not supported; leave it at its default")
    if residual is not None and residual.shape != x.shape:
        raise InputError(
            f"layer_norm: residual has shape {tuple(residual.shape)}, expected x's {tuple(x.shape)}"
        )
    total = wide(x)
    if residual is not None:
        total = total + wide(residual)
    y = _norm(total, weight, bias, eps, is_rms_norm)
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    if not prenorm:
        return y
    if residual is None:
        return y, total if residual_in_fp32 else x
    return y, total if total.dtype == residual.dtype else total.to(residual.dtype)


def gated_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """A norm with a gate: ``layernorm_fn`` and ``rmsnorm_fn`` of mamba-ssm's layernorm_gated.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,).
        z: as x; the gate is silu(z).
        eps: added to the variance or mean square.
        group_size: norms run over each so many channels; None: over all.
        norm_before_gate: norm(x) * silu(z), else norm(x * silu(z)).
        is_rms_norm: RMS norm, else layer norm.

    Returns:
        (..., C) in x's dtype.

    Raises:
        InputError: z has another shape than x, or group_size does not divide C.
    """
    if z is not None and z.shape != x.shape:
        raise InputError(f"gated_norm: z has shape {tuple(z.shape)}, expected x's {tuple(x.shape)}")
    y = wide(x)
    if z is not None and not norm_before_gate:
        y = y * F.silu(wide(z))
    if group_size is None:
        y = _norm(y, weight, bias, eps, is_rms_norm)
    else:
        if group_size < 1 or x.shape[-1] % group_size != 0:
            raise InputError(f"gated_norm: group_size {group_size} does not divide {x.shape[-1]} channels")
        y = _norm(y.unflatten(-1, (-1, group_size)), None, None, eps, is_rms_norm).flatten(-2)
        if weight is not None:
            y = y * wide(weight)
        if bias is not None:
            y = y + wide(bias)
    if z is not None and norm_before_gate:
        y = y * F.silu(wide(z))
    return y if y.dtype == x.dtype else y.to(x.dtype)
