"""RLQ of QuantSR (Qin et al., NeurIPS 2023): LSQ with a backward that knows the rounding, and thresholds that move.

    u = clip((x + tau_c) / alpha, Qn, Qp),    y = alpha * round(u)

tau, one for each input channel c of an activation, is added before and not subtracted after: it moves the thresholds of
the channel against the levels. Weights have none. There is no shift.

Gradients: the derivative of round is that of phi(u) = floor(u) + (1 + tanh(f - 1/2) / tanh(1/2)) / 2, f = u - floor(u):

    phi'(u) = sech(f - 1/2)**2 / (2 * tanh(1/2))               0.851 at a level, 1.082 at a threshold

so dx is phi'(u) in range and 0 outside, d tau_c = sum of dx over the channel, and d alpha = round(u) - phi'(u) * u in
range, Qn or Qp outside, times LSQ's 1 / sqrt(N * Qp).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.errors import ConfigError, InputError
from ssmquant.ops import quantize
from ssmquant.quantizers.affine import (
    Affine,
    affine_decode,
    affine_index,
    compute_dtype,
    group_sum,
    in_dtype,
    once_differentiable,
)
from ssmquant.quantizers.lsq import LearnedScale

__all__ = ["RLQ", "soft_slope"]


def soft_slope(u: Tensor) -> Tensor:
    """phi'(u)."""
    t = torch.tanh(u - u.floor() - 0.5)
    return (1 - t * t) * (0.5 / math.tanh(0.5))


class _RLQFunction(torch.autograd.Function):
    """As ``_LSQFunction``, without a gradient of the shift, which is zero."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, axis: int | None, copies: int
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        ctx.static = qmin, qmax, axis, copies
        index = affine_index(x.to(alpha.dtype), alpha, beta, qmin, qmax)
        return in_dtype(affine_decode(index, Affine(alpha, beta), qmin), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, beta = ctx.saved_tensors
        qmin, qmax, axis, copies = ctx.static
        grad = grad.to(alpha.dtype)
        u = (x.to(alpha.dtype) + beta) / alpha
        inside = (u >= qmin) & (u <= qmax)
        code = u.clamp(qmin, qmax).round()
        u = torch.where(inside, u, 0.0)
        slope = torch.where(inside, soft_slope(u), 0.0)
        dalpha = None
        if ctx.needs_input_grad[1]:
            dalpha = group_sum(grad * (code - slope * u), axis)
            if copies:
                dalpha = dalpha / math.sqrt(copies * (x.numel() // alpha.numel()) * qmax)
        return in_dtype(grad * slope, x.dtype), dalpha, None, None, None, None, None


class _FusedRLQ(torch.autograd.Function):
    """``_RLQFunction`` of a whole tensor by fused kernels; alpha is the parameter itself, not yet floored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        beta: Tensor,
        kernels: ModuleType,
        qmin: int,
        qmax: int,
        eps: float,
        copies: int,
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        ctx.kernels = kernels
        ctx.static = qmin, qmax, eps, copies
        y: Tensor = kernels.lsq_forward(x, alpha, beta, qmin, qmax, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dalpha = ctx.kernels.soft_backward(grad, *ctx.saved_tensors, *ctx.static)
        return dx, dalpha, None, None, None, None, None, None


class RLQ(LearnedScale):
    """Learned step and channel thresholds; see the module's docstring and :class:`Quantizer` for the arguments.

    Parameters ``alpha`` ``(num_groups,)`` and, with a ``channel_axis``, ``tau`` ``(channels,)``, which starts from 0.
    The sign flag is decided as LSQ's.

    Args:
        channel_axis: the axis of an activation that tau runs along; None for no tau.
        channels: its size.
    """

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        channel_axis: int | None = None,
        channels: int = 1,
    ) -> None:
        super().__init__(
            bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight, shift="none"
        )
        if channels < 1 or (channels > 1 and channel_axis is None):
            raise ConfigError(
                f"channels must be positive, and 1 without a channel_axis; got {channels=}, {channel_axis=}"
            )
        if is_weight and channel_axis is not None:
            raise ConfigError("channel_axis is for activations: the thresholds of a weight do not move")
        self.signed_by_data = official or not is_weight
        self.channel_axis = channel_axis
        self.tau: nn.Parameter | None = None
        if self.bits is not None and channel_axis is not None:
            self.tau = nn.Parameter(torch.zeros(channels))

    @property
    def elementwise(self) -> bool:
        return self.tau is None

    @torch.no_grad()
    def _set_scalars(self, alpha: Tensor, beta: Tensor) -> None:
        super()._set_scalars(alpha, beta)
        if self.tau is not None:
            self.tau.zero_()

    def _moved(self, x: Tensor) -> Tensor:
        """``x + tau``, in the compute dtype; ``x`` itself without a tau."""
        tau, axis = self.tau, self.channel_axis
        if tau is None or axis is None:
            return x
        if not -x.dim() <= axis < x.dim() or x.shape[axis] != tau.numel():
            raise InputError(
                f"channel_axis {axis} of a tensor of shape {tuple(x.shape)} has not {tau.numel()} channels"
            )
        shape = [1] * x.dim()
        shape[axis] = tau.numel()
        cd = compute_dtype(x, tau)
        return x.to(cd) + tau.to(cd).reshape(shape)

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        return super()._index(self._moved(x), affine)

    def _quantize(self, x: Tensor, copies: int = 1) -> Tensor:
        out: Tensor
        moved, axis = self._moved(x), self._state_axis
        ends = self.qmin, self.qmax
        counted = copies if self.scale_gradient else 0
        if axis is None:
            alpha, beta = self.scalars()
            kernels = quantize.offering("soft_backward", moved, alpha, beta)
            if kernels is not None:
                eps = 0.0 if self.official else self.eps
                out = _FusedRLQ.apply(quantize.dense(moved), alpha, beta, kernels, *ends, eps, counted)
                return out.to(x.dtype)
        out = _RLQFunction.apply(moved, *self._scale_shift(moved), *ends, axis, counted)
        return out.to(x.dtype)

    def _quantize_copies(self, x: Tensor, copies: int) -> Tensor:
        return self._quantize(x, copies)
