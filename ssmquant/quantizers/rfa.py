"""RFA (arXiv 2503.21970): rounding with learnable thresholds and uniform levels, for weights.

    u = clip((w + beta) / alpha, Qn, Qp)
    code = p_k,  k = number of thresholds t_i < u,  t_i = (a_{i-1} + a_i) / 2,  p_i = -2**(b-1) + i
    y = alpha * code - beta

Only the thresholds move, so that the codes are uniform and a deployed weight forgets the grid. The backward follows
the piecewise-linear surrogate S through the points (a_i, p_i), with slope 0.1 beyond its ends.

The grid. Published: free parameters, which can cross. Then levels vanish, and equal neighbours make every gradient
NaN. The default uses the stored entries as they are where they are in order, and raises an entry that is less than
1e-3 above its predecessor to that distance (gradients pass straight through the projection). So a grid in order gives
exactly the published function and gradients, and old checkpoints keep their parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.quantizers.affine import Affine, affine_decode, compute_dtype, group_sum, in_dtype
from ssmquant.quantizers.affine_fit import Shift
from ssmquant.quantizers.lsq import LearnedScale
from ssmquant.quantizers.observers import GroupStats

__all__ = ["RFA", "grid_thresholds", "ordered_grid"]

MIN_GAP = 1e-3
TAIL = 0.1


def ordered_grid(grid: Tensor, gap: float = MIN_GAP) -> Tensor:
    """Raise entries of ``grid`` ``(.., n)`` to ``gap`` above their predecessors; entries in order stay exact."""
    ramp = torch.arange(grid.shape[-1], dtype=grid.dtype, device=grid.device) * gap
    lowered = grid - ramp
    running = lowered.cummax(-1).values
    return torch.where(running == lowered, grid, running + ramp)


def suffix_min(t: Tensor) -> Tensor:
    """``min(t[.., i:])`` for every i: what a chain of ``where(u > t_i, ...)`` effectively compares with."""
    return t.flip(-1).cummin(-1).values.flip(-1)


def grid_thresholds(grid: Tensor) -> Tensor:
    """The thresholds of grids ``(.., n)``, non-decreasing, ``(.., n - 1)``."""
    return suffix_min((grid[..., :-1] + grid[..., 1:]) / 2)


def _count_below(u: Tensor, sorted_bounds: Tensor) -> Tensor:
    """How many bounds are strictly below each element, int32."""
    return torch.bucketize(u.contiguous(), sorted_bounds, out_int32=True)


def _bin_sums(values: Tensor, bins: Tensor, count: int) -> Tensor:
    """Sum ``values`` by bin, ``(count,)``; bins of their own for each first index, as atomics would collide."""
    rows = values.shape[0] if values.dim() > 1 else 1
    values, bins = values.reshape(rows, -1), bins.reshape(rows, -1)
    return values.new_zeros(rows, count).scatter_add(1, bins, values).sum(0)


class _RFAFunction(torch.autograd.Function):
    """Saves references to its inputs; all else is recomputed. ``grid`` is in order unless ``official``.

    ``copies``: as in ``_LSQFunction``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        beta: Tensor,
        grid: Tensor,
        thresholds: Tensor,
        qmin: int,
        qmax: int,
        axis: int | None,
        copies: int,
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta, grid, thresholds)
        ctx.static = qmin, qmax, axis, copies
        index = _index(x.to(alpha.dtype), alpha, beta, thresholds, qmin, qmax)
        return in_dtype(affine_decode(index, Affine(alpha, beta), -(grid.numel() // 2)), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, beta, grid, thresholds = ctx.saved_tensors
        qmin, qmax, axis, copies = ctx.static
        n = grid.numel()
        grad = grad.to(alpha.dtype)
        v = (x.to(alpha.dtype) + beta) / alpha
        inside = (v >= qmin) & (v <= qmax)
        u = v.clamp(qmin, qmax)
        # Segment s of 0..n: 0 lies below a_0, s between a_{s-1} and a_s, n above a_{n-1}. Equal neighbours (official
        # only) are never selected, but the published chain of `where` turns 0 * (1 / 0) into NaN: 0 / gap does too.
        gap = grid.diff()
        nan = 0.0 / gap
        tail = grid.new_full((1,), TAIL)
        slopes = torch.cat((tail, 1.0 / gap, tail)) + nan.sum()
        starts = torch.cat((grid[:1], grid))
        segment = _count_below(u, suffix_min(grid)).long()
        slope = slopes[segment]
        dx = grad * torch.where(inside, slope, 0.0)
        dalpha = dbeta = dgrid = None
        if ctx.needs_input_grad[1]:
            code = _count_below(u, thresholds) - n // 2
            dalpha = group_sum(grad * (code - torch.where(inside, slope * u, 0.0)), axis)
            if copies:
                dalpha = dalpha / math.sqrt(copies * (x.numel() // alpha.numel()) * qmax)
        if ctx.needs_input_grad[2]:
            dbeta = group_sum(dx - grad, axis)
        if ctx.needs_input_grad[3]:
            # S = p + (u - a_left) / gap: the fraction f of the gap goes to the right entry, 1 - f to the left one.
            step = grad * alpha
            whole = _bin_sums(step, segment, n + 1)
            right = _bin_sums(step * (u - starts[segment]), segment, n + 1)[1:-1] / gap
            left = whole[1:-1] - right
            zero = torch.zeros_like(tail)
            dgrid = -torch.cat((left / gap + nan, TAIL * whole[-1:])) - torch.cat((zero, right / gap + nan))
            dgrid = dgrid - torch.cat((TAIL * whole[:1], grid.new_zeros(n - 1)))
        return dx.to(x.dtype), dalpha, dbeta, dgrid, None, None, None, None, None


def _index(x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, qmin: int, qmax: int) -> Tensor:
    u = ((x + beta) / alpha).clamp(qmin, qmax)
    return _count_below(u, thresholds) + u * 0.0  # the sum keeps a NaN a NaN


class _StraightOrder(torch.autograd.Function):
    """:func:`ordered_grid` with gradient 1."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor) -> Tensor:
        return ordered_grid(grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class RFA(LearnedScale):
    """Rounding-function-adaptive quantizer; see the module's docstring and :class:`Quantizer` for the arguments.

    Parameters ``alpha`` and ``beta`` ``(num_groups,)``, ``grid`` ``(2**bits,)``, shared by all groups. At
    initialisation the grid is ``Qn + i``: LSQ with ties rounded down. Signed always; ``official`` takes the sign
    flag from the first data, and then (as published) clips to ``0 .. 2**b-1`` but decodes from ``-2**(b-1)``.
    """

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        shift: Shift = "learned",
    ) -> None:
        super().__init__(
            bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight, shift=shift
        )
        self.signed_by_data = official
        if self.bits is not None:
            self.grid = nn.Parameter(self._first_grid())

    def _first_grid(self) -> Tensor:
        return torch.arange(self.qmin, self.qmax + 1, dtype=torch.float32)

    @torch.no_grad()
    def _reset_state(self) -> None:
        super()._reset_state()
        self.grid.copy_(self._first_grid())

    def _init_state(self, stats: GroupStats) -> None:
        super()._init_state(stats)
        self.grid.copy_(self._first_grid())

    @property
    def code_min(self) -> int:
        return -(2 ** (self._width() - 1))

    def _grid_thresholds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        grid = self.grid.to(dtype)
        if not self.official:
            grid = _StraightOrder.apply(grid)
        return grid, grid_thresholds(grid.detach())

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """The thresholds used, in code units, non-decreasing, ``(2**bits - 1,)``; none for a bypass."""
        if self.bits is None:
            return torch.empty(0)
        return self._grid_thresholds(compute_dtype(self.alpha))[1]

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        return _index(x, affine.scale, affine.shift, self._grid_thresholds(x.dtype)[1], self.qmin, self.qmax)

    def _quantize(self, x: Tensor, copies: int = 1) -> Tensor:
        alpha, beta = self._scale_shift(x)
        grid, thresholds = self._grid_thresholds(alpha.dtype)
        static = self.qmin, self.qmax, self._state_axis, copies if self.scale_gradient else 0
        out: Tensor = _RFAFunction.apply(x, alpha, beta, grid, thresholds, *static)
        return out

    def _quantize_copies(self, x: Tensor, copies: int) -> Tensor:
        return self._quantize(x, copies)
