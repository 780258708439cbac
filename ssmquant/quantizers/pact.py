"""PACT (arXiv 1805.06085): the clip of an activation is learnt, the steps are uniform up to it.

    y = s * round(clip(x, 0, a) / s),  s = a / (2**b - 1)                 data without negatives (the paper's, of ReLU)
    y = s * round(clip(x, -a, a) / s),  s = a / (2**(b-1) - 1)            other data

Gradients, as published: dx is 1 strictly inside and 0 outside; da is 1 where x >= a, and -1 where x <= -a, and 0
inside. That is neither LSQ's gradient (no term of the rounding error) nor scaled by the size of the tensor.

Codes of signed data are ``-(2**(b-1) - 1) .. 2**(b-1) - 1``, so that 0 is a level, which data around 0 need as soon as
one outlier has set the clip, and both ends of the clip are levels, so that da is exactly that of y. It costs one code
of 2**b: at 2 bits the levels are -a, 0, a.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.dorefa import value_of
from ssmquant.quantizers.observers import GroupStats

__all__ = ["PACT", "raised"]


def raised(t: Tensor, least: float) -> Tensor:
    """``max(t, least)`` with gradient 1, so that what fell below can come back."""
    return value_of(t, t.detach().clamp(min=least))


def _affine_of(clip: Tensor, high: int) -> Affine:
    # Multiplied, as division by a number is something else on a GPU.
    return Affine(clip * (1 / high), torch.zeros_like(clip))


class _PACTFunction(torch.autograd.Function):
    """Saves references to its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, low: int, high: int, axis: int | None) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.static = low, axis
        affine = _affine_of(clip, high)
        index = affine_index(x.to(clip.dtype), affine.scale, affine.shift, low, high)
        return in_dtype(affine_decode(index, affine, low), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        low, axis = ctx.static
        grad, x = grad.to(clip.dtype), x.to(clip.dtype)
        above = x >= clip
        inside = (x > -clip if low else x >= 0) & (x < clip)
        dclip = torch.where(above, grad, 0.0)
        if low:
            dclip = dclip - torch.where(x <= -clip, grad, 0.0)
        return in_dtype(grad * inside, ctx.saved_tensors[0].dtype), group_sum(dclip, axis), None, None, None


class _FusedPACT(torch.autograd.Function):
    """``_PACTFunction`` of a whole tensor by fused kernels; the clip is the parameter itself, not yet raised."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, kernels: ModuleType, low: int, high: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.static = kernels, low, eps
        y: Tensor = kernels.pact_forward(x, alpha, low, high, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels, low, eps = ctx.static
        dx, dalpha = kernels.pact_backward(grad, *ctx.saved_tensors, low, eps)
        return dx, dalpha, None, None, None, None


class PACT(Quantizer):
    """Learned clip; see the module's docstring and :class:`Quantizer` for the arguments.

    Parameter ``alpha``, shape ``(num_groups,)``: the clip a, which starts from the largest magnitude of the data
    (:meth:`fit` pools them over its batches and searches no other) and is raised to ``eps`` where it gets below, with
    gradient 1. The paper pulls it down by weight decay, about as strong as that of the weights: give it to the
    optimizer with these parameters; nothing here adds it to the loss.

    The sign flag is decided as LSQ's: unsigned if the first data have no value below ``-1e-5 * mean|x|`` (``official``:
    -1e-5); weights are always signed, unless ``official``.
    """

    flags: ClassVar[tuple[str, ...]] = ("initialized", "signed")

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
    ) -> None:
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        self.signed_by_data = official or not is_weight
        if self.bits is not None:
            self.alpha = nn.Parameter(torch.ones(num_groups))

    @property
    def lowest(self) -> int:
        """The smallest code in use."""
        return -self.qmax if self.is_signed else 0

    @torch.no_grad()
    def _reset_state(self) -> None:
        self.alpha.fill_(1.0)

    def _init_state(self, stats: GroupStats) -> None:
        if self.signed_by_data:
            threshold = 1e-5 * (1.0 if self.official else stats.abs_mean.mean())
            self._set_flag("signed", bool(stats.min.min() < -threshold))
        peak = torch.maximum(stats.max.abs(), stats.min.abs())
        used = peak > 0  # a group that is all zero takes the other groups' average, as in LSQ
        self.alpha.copy_(torch.where(used, peak, peak[used].mean()))

    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        """Nothing left to do: the pooled extremes are the start that the paper has."""

    def _clip(self, x: Tensor) -> Tensor:
        return raised(self._group_view(self.alpha, x).to(compute_dtype(x, self.alpha)), self.eps)

    def _affine(self, x: Tensor) -> Affine:
        return _affine_of(self._clip(x), self.qmax)

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        low = self.lowest
        return affine_index(x, affine.scale, affine.shift, low, self.qmax) + (low - self.qmin)

    def _quantize(self, x: Tensor) -> Tensor:
        out: Tensor
        low, high, axis = self.lowest, self.qmax, self._state_axis
        if axis is None:
            kernels = quantize.offering("pact_forward", x, self.alpha)
            if kernels is not None:
                out = _FusedPACT.apply(quantize.dense(x), self.alpha, kernels, low, high, self.eps)
                return out
        out = _PACTFunction.apply(x, self._clip(x), low, high, axis)
        return out
