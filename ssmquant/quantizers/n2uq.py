"""N2UQ (arXiv 2111.14826), nonuniform to uniform: the intervals of the input are learnt, the output levels are uniform.

Activations, with n = 2**b levels, Qn = 0 for data without negatives and -2**(b-1) for others:

    u = (x + beta) / alpha
    d_0 = Qn,  d_i = d_{i-1} + w_i,   w_i = max(|width_i|, 1e-3),   i = 1 .. n - 1
    code = Qn + number of thresholds T_i < u,   T_i = (d_{i-1} + d_i) / 2
    y = gamma * code - beta

Gradients, the paper's generalised straight-through estimator: those of gamma * S(u) - beta with S the line through the
points (d_i, Qn + i), which is constant beyond them. The paper derives it from stochastic thresholds.

Departures. The paper quantizes what a ReLU leaves; ours are SiLU's or a normalization's outputs, with negatives and
skewed, hence the learnable shift beta (one, in front and behind, so that 0 does not move while alpha = gamma), Qn and
their calibration, which are LSQ's. The paper multiplies by an input scale, which is 1 / alpha here, so that alpha and
gamma start equal. The scale of gradients is the paper's: none. Widths, alpha and gamma are floored with gradient 1.

Weights are uniform, "entropy preserving" (section 3.4), with nothing learnt:

    s = (2**b - 1) / 2**(b-1) * mean|w|
    y = s * (2 * round((2**b - 1) * (clip(w / s, -1, 1) + 1) / 2) / (2**b - 1) - 1)

which uses all levels equally where w is uniform; s is that of the weight of the moment, of each group, and a constant
to the gradient, dx = 1 where |w| <= s, else 0. The range does not grow with b (about 2 mean|w|): a rule for 2 to 4
bits, which at 8 clips a tenth of a Gaussian.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.ops import quantize
from ssmquant.ops.quantize import MOST_LEVELS, ThresholdRule
from ssmquant.quantizers.affine import (
    Affine,
    affine_decode,
    affine_index,
    compute_dtype,
    group_dims,
    group_sum,
    in_dtype,
    once_differentiable,
)
from ssmquant.quantizers.dorefa import value_of
from ssmquant.quantizers.lsq import LearnedScale
from ssmquant.quantizers.pact import raised
from ssmquant.quantizers.rfa import _bin_sums, _count_below

__all__ = ["N2UQ"]

LEAST_WIDTH = 1e-3


def _index(x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor) -> Tensor:
    u = (x + beta) / alpha
    return torch.where(u.isnan(), u, _count_below(u, thresholds).to(u.dtype))


class _N2UQFunction(torch.autograd.Function):
    """Saves references to its inputs; all else is recomputed. ``grid``: d; ``axis``: of the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        beta: Tensor,
        gamma: Tensor,
        grid: Tensor,
        thresholds: Tensor,
        qmin: int,
        axis: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta, gamma, grid, thresholds)
        ctx.static = qmin, axis
        index = _index(x.to(alpha.dtype), alpha, beta, thresholds)
        return in_dtype(affine_decode(index, Affine(gamma, beta), qmin), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, beta, gamma, grid, thresholds = ctx.saved_tensors
        qmin, axis = ctx.static
        n = grid.numel()
        grad = grad.to(alpha.dtype)
        u = (x.to(alpha.dtype) + beta) / alpha
        # Segment s of 0..n: 0 lies below d_0, s between d_{s-1} and d_s, n above d_{n-1}.
        segment = _count_below(u, grid).long()
        gap = grid.diff()
        beyond = grid.new_zeros(1)
        slope = torch.cat((beyond, 1.0 / gap, beyond))[segment]
        inside = (segment > 0) & (segment < n)
        u = torch.where(inside, u, 0.0)
        step = grad * gamma
        dx = step * slope / alpha
        dalpha = dbeta = dgamma = dgrid = None
        if ctx.needs_input_grad[1]:
            dalpha = -group_sum(dx * u, axis)
        if ctx.needs_input_grad[2]:
            dbeta = group_sum(dx - grad, axis)
        if ctx.needs_input_grad[3]:
            code = _count_below((x.to(alpha.dtype) + beta) / alpha, thresholds) + qmin
            dgamma = group_sum(grad * code, axis)
        if ctx.needs_input_grad[4]:
            # S = p + (u - left) / gap: the fraction f of the gap goes to the right point, 1 - f to the left one.
            starts = torch.cat((grid[:1], grid))
            whole = _bin_sums(step, segment, n + 1)[1:-1]
            right = _bin_sums(step * (u - starts[segment]), segment, n + 1)[1:-1] / gap
            dgrid = -torch.cat(((whole - right) / gap, beyond)) - torch.cat((beyond, right / gap))
        return in_dtype(dx, x.dtype), dalpha, dbeta, dgamma, dgrid, None, None, None


class _FusedN2UQ(torch.autograd.Function):
    """``_N2UQFunction`` of a whole tensor by fused kernels; alpha and gamma are parameters, not yet raised."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        beta: Tensor,
        gamma: Tensor,
        grid: Tensor,
        thresholds: Tensor,
        kernels: ModuleType,
        rule: ThresholdRule,
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta, gamma, grid, thresholds)
        ctx.static = kernels, rule
        y: Tensor = kernels.threshold_forward(x, alpha, beta, gamma, thresholds, rule)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels, rule = ctx.static
        return *kernels.threshold_backward(grad, *ctx.saved_tensors, rule), None, None, None


class N2UQ(LearnedScale):
    """Learned intervals, uniform levels; see the module's docstring and :class:`Quantizer` for the arguments.

    Activations: parameters ``alpha``, ``beta`` and ``gamma`` ``(num_groups,)``, ``widths`` ``(2**bits - 1,)``, shared
    by all groups. At initialisation the widths are 1 and gamma is alpha: LSQ with ties rounded down.

    Weights: neither parameters nor calibration.
    """

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
        if is_weight:
            self.shift = "half"
        if self.bits is not None:
            if is_weight:
                del self.alpha, self.beta
            else:
                self.gamma = nn.Parameter(torch.ones(num_groups))
                self.widths = nn.Parameter(torch.ones(2**self.bits - 1))

    @property
    def needs_data(self) -> bool:
        return not self.is_weight

    @torch.no_grad()
    def _set_scalars(self, alpha: Tensor, beta: Tensor) -> None:
        super()._set_scalars(alpha, beta)
        self.gamma.copy_(alpha)
        self.widths.fill_(1.0)

    def _reset_state(self) -> None:
        if not self.is_weight:
            super()._reset_state()

    def _fit(self, batches: list[Tensor], stats: Any) -> None:
        if not self.is_weight:
            super()._fit(batches, stats)

    # ---- activations -------------------------------------------------------------------------------------------------
    def _positive(self, scale: Tensor, x: Tensor) -> Tensor:
        cd = compute_dtype(x, *self.parameters(recurse=False))
        return raised(self._group_view(scale, x).to(cd), self.eps)

    def _grid(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The points d, with their gradients, and the thresholds between them."""
        widths = self.widths.to(dtype)
        widths = raised(torch.where(widths < 0, -widths, widths), LEAST_WIDTH)  # abs has no gradient at 0
        grid = torch.cat((widths.new_zeros(1), widths.cumsum(0))) + self.qmin
        apart = grid.detach()
        return grid, (apart[:-1] + apart[1:]) / 2

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """The thresholds in use, in units of alpha, increasing, ``(2**bits - 1,)``; none for bypasses and weights."""
        if self.bits is None or self.is_weight:
            return torch.empty(0)
        return self._grid(compute_dtype(self.widths))[1]

    def _scale_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._positive(self.alpha, x)
        return alpha, self._group_view(self.beta, x).to(alpha.dtype)

    # ---- weights -----------------------------------------------------------------------------------------------------
    def _step(self, x: Tensor) -> Tensor:
        """Distance of levels ``2 * s / (2**b - 1)``, in the compute dtype; 0 for a group that is all zero."""
        self._group_view(x.new_empty(self.num_groups), x)  # raises where they do not fit
        x, axis = x.detach().to(compute_dtype(x)).abs(), self._state_axis
        dims = group_dims(x.dim(), axis)
        mean = x.mean() if axis is None else x.mean(dims, keepdim=True) if dims else x
        return mean * 2.0 ** (2 - self._width())

    # ---- both --------------------------------------------------------------------------------------------------------
    def _affine(self, x: Tensor) -> Affine:
        if self.is_weight:
            step = self._step(x)
            return Affine(step, -0.5 * step)
        return Affine(self._positive(self.gamma, x), self._scale_shift(x)[1])

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        if self.is_weight:
            return affine_index(x, affine.scale.clamp(min=self.eps), affine.shift, self.qmin, self.qmax)
        return _index(x, *self._scale_shift(x), self._grid(x.dtype)[1])

    def _quantize(self, x: Tensor) -> Tensor:
        if self.is_weight:
            affine = self._affine(x)
            wide = x.to(affine.scale.dtype)
            hard = affine_decode(self._index(wide.detach(), affine), affine, self.code_min)
            end = affine.scale * ((2 ** self._width() - 1) / 2)
            return value_of(wide.clamp(-end, end), hard).to(x.dtype)
        out: Tensor
        scalars = self.alpha, self.beta, self.gamma
        levels = 2 ** self._width()
        if self._state_axis is None and levels <= MOST_LEVELS:
            kernels = quantize.offering("threshold_forward", x, *scalars, self.widths)
            if kernels is not None:
                rule = ThresholdRule(levels, self.qmin, eps=self.eps)
                points = self._grid(torch.float32)
                out = _FusedN2UQ.apply(quantize.dense(x), *scalars, *points, kernels, rule)
                return out
        alpha, beta = self._scale_shift(x)
        gamma, points = self._positive(self.gamma, x), self._grid(alpha.dtype)
        out = _N2UQFunction.apply(x, alpha, beta, gamma, *points, self.qmin, self._state_axis)
        return out
