"""mamba-ssm's normalisations: with a residual added first (``layer_norm``), and with a gate (``layernorm_gated``)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import InputError
from ssmquant.ops import mixers

__all__ = [
    "GatedLayerNorm", "GatedLayerNormFn", "GatedRMSNorm", "LayerNormFn", "RMSNorm", "gated_layer_norm_fn",
    "gated_rms_norm_fn", "layer_norm_fn", "layer_norm_fn_1", "layer_norm_linear_fn", "rms_norm_fn", "rms_norm_fn_1",
]  # fmt: skip


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
) -> Any:
    """Norm of ``dropout(x * rowscale) + dropout(x1) + residual``, one or two; with ``prenorm`` also that sum."""
    if return_dropout_mask:
        raise InputError("layer_norm_fn: return_dropout_mask is not supported by the ssmquant stand-in")
    if rowscale is not None:
        x = x * rowscale[..., None]
    if dropout_p > 0.0:
        x = F.dropout(x, dropout_p)
        x1 = x1 if x1 is None else F.dropout(x1, dropout_p)
    if x1 is not None:
        x = x + x1
    norm = functools.partial(mixers.layer_norm, eps=eps, is_rms_norm=is_rms_norm)
    both = prenorm or weight1 is not None
    result: Any = norm(x, weight, bias, residual, prenorm=both, residual_in_fp32=residual_in_fp32)
    if weight1 is None:
        return result
    out, total = result
    second: Any = norm(total, weight1, bias1)
    return (out, second.to(out.dtype), total) if prenorm else (out, second.to(out.dtype))


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """``layer_norm_fn`` without subtracting the mean."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def layer_norm_fn_1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """``layer_norm_fn`` as it was up to mamba-ssm 1.2, in the module ``layernorm``."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )


def rms_norm_fn_1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """``rms_norm_fn`` of the same module."""
    return layer_norm_fn_1(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """``layer_norm_fn``, then a linear layer."""
    normed = layer_norm_fn_1(x, norm_weight, norm_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)
    y, *total = normed if prenorm else (normed,)
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, *total) if prenorm else out


def gated_layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))``, over groups of ``group_size`` channels."""
    return mixers.gated_norm(
        x, weight, bias, z=z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip


def gated_rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """The same without subtracting the mean."""
    return gated_layer_norm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNormFn:
    """The ``autograd.Function`` of the module ``layer_norm``; only ``apply`` is there."""

    apply = staticmethod(layer_norm_fn)


class GatedLayerNormFn:
    """That of the module ``layernorm_gated``."""

    apply = staticmethod(gated_layer_norm_fn)


class RMSNorm(nn.Module):
    """Root mean square norm that can add a residual first."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """As ``rms_norm_fn``."""
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, dropout_p=dropout, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


class _GatedNorm(nn.Module):
    centred: bool

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if self.centred else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones, and zeros."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The norm of x, gated by z if given."""
        return gated_layer_norm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, not self.centred
        )


class GatedLayerNorm(_GatedNorm):
    """``layernorm_gated.LayerNorm``."""

    centred = True


class GatedRMSNorm(_GatedNorm):
    """``layernorm_gated.RMSNorm``."""

    centred = False
