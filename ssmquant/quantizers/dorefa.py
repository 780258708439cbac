"""DoReFa (arXiv 1606.06160) for weights: companded by tanh, then uniform levels that lie symmetrically about 0.

    t = tanh(w),  M = max|t|,  s = max|w|                                         of the weight, or of each group
    q = 2 * round((2**b - 1) * (t / (2 * M) + 1/2)) / (2**b - 1) - 1,    y = s * q

Gradient: straight through the rounding, the real derivative of tanh, M and s taken as constants (as most
implementations do): dx = (s / M) * (1 - t**2).

Departures. The published weights are q itself, of magnitude up to 1 whatever w was: the batch norms behind every layer
make up for it there, but where there are none, or in a fine-tuning, a model would start from noise. Hence the factor s,
which ``official`` leaves out. M and s are of each group, where the published M is of the whole layer.

Nothing is learnt or calibrated: M and s are those of the weight of the moment, as published. tanh saturates: a weight
of magnitudes far above 1 becomes binary, as published.

The paper's rule for activations, which lie in [0, 1], is uniform levels between the ends of a fixed range. Between the
calibrated extremes of any data that is :class:`MinMax`, and so it is here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ssmquant.quantizers.affine import Affine, affine_decode, affine_index, compute_dtype, group_dims
from ssmquant.quantizers.minmax import MinMax

__all__ = ["DoReFa", "value_of"]


class _ValueOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def value_of(soft: Tensor, hard: Tensor) -> Tensor:
    """``hard``, with the gradient of ``soft``."""
    out: Tensor = _ValueOf.apply(soft, hard)
    return out


def group_max(x: Tensor, axis: int | None) -> Tensor:
    """Largest magnitude of every group, broadcastable to ``x``; a NaN is the largest."""
    if axis is None:
        return x.abs().amax()
    dims = group_dims(x.dim(), axis)
    return x.abs().amax(dims, keepdim=True) if dims else x.abs()  # an empty tuple would mean all dimensions


class DoReFa(MinMax):
    """Weights by tanh, activations by min-max; see the module's docstring and :class:`Quantizer` for the arguments.

    Weights have no state and need no data.
    """

    nearest: ClassVar[bool] = False
    """Weights: a value does not go to the level next to it, nor do the levels of 2 w lie at twice those of w."""

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
        if self.bits is not None and is_weight:
            del self.low, self.high

    @property
    def needs_data(self) -> bool:
        return not self.is_weight

    def static_affine(self) -> Affine | None:
        return None if self.is_weight else super().static_affine()

    def _reset_state(self) -> None:
        if not self.is_weight:
            super()._reset_state()

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """M and s (``official``: 1), in the compute dtype; 0 for a group that is all zero."""
        self._group_view(x.new_empty(self.num_groups), x)  # raises where they do not fit
        x, axis = x.detach().to(compute_dtype(x)), self._state_axis
        reach = group_max(x, axis)
        return group_max(x.tanh(), axis), (reach > 0).to(reach.dtype) if self.official else reach

    def _companded(self, t: Tensor, top: Tensor) -> Tensor:
        """Index of the level of ``t``, of which the largest magnitude is ``top``."""
        # A group that is all zero: its code is 0, and half a step is nothing.
        step = top * (2 / (2 ** self._width() - 1))
        return affine_index(t, step.clamp(min=self.eps), -0.5 * step, self.qmin, self.qmax)

    def _levels(self, reach: Tensor) -> Affine:
        scale = reach * (2 / (2 ** self._width() - 1))
        return Affine(scale, -0.5 * scale)

    def _affine(self, x: Tensor) -> Affine:
        if not self.is_weight:
            return super()._affine(x)
        return self._levels(self._ends(x)[1])

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        if not self.is_weight:
            return super()._index(x, affine)
        return self._companded(x.tanh(), self._ends(x)[0])

    def _quantize(self, x: Tensor) -> Tensor:
        if not self.is_weight:
            return super()._quantize(x)
        top, reach = self._ends(x)
        t = x.to(top.dtype).tanh()
        hard = affine_decode(self._companded(t.detach(), top), self._levels(reach), self.code_min)
        soft = t * (reach.clamp(min=self.eps) / top.clamp(min=self.eps))
        return value_of(soft, hard).to(x.dtype)
