"""DLS (arXiv 2503.21970): the range follows the statistics of the data, through eight learnt scalars.

    beta   = v . (mean, std, min, max)(x)
    alpha0 = | w . (|mean|, std, min, max)(x + beta) |
    alpha  = max(min(alpha0, (max x - min x) / 2**b), eps)        the ceiling carries no gradient
    y      = clip(alpha * round(clip((x + beta) / alpha, Qn, Qp)) - beta, min x, max x)

Gradients flow through the statistics into ``x`` and the scalars, and through the output clip into min and max.
The output clip keeps y within the range of x for any learnt scalars (A < 0 stays negative: the scan stays stable).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssmquant.errors import ConfigError
from ssmquant.ops import quantize
from ssmquant.ops.quantize import DLSRule, Groups
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
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.dls_fit import search_coefficients
from ssmquant.quantizers.observers import GroupStats, group_rows

__all__ = ["DLS", "dls_range", "dls_statistics"]


def _freedom(count: int, copies: int) -> float:
    """What a sum of squares is divided by for the unbiased variance of a group that holds its elements so often."""
    free = max(count * copies - 1, 1)
    return free if copies == 1 else free / copies


def dls_statistics(x: Tensor, axis: int | None, *, single_is_nan: bool = False, copies: int = 1) -> Tensor:
    """Mean, unbiased standard deviation, min and max of every group, stacked: ``(4, *group shape)``.

    The deviation of a single element is 0 (published: NaN). ``copies``: see :meth:`Quantizer.forward`.
    """
    dims = group_dims(x.dim(), axis)
    if axis is not None and not dims:  # 1-D, every element a group of its own
        mean, low, high, var = x, x, x, torch.zeros_like(x)
        count = 1
    else:
        keep = axis is not None
        mean = x.mean(dims, keepdim=keep)
        low, high = x.amin(dims, keepdim=keep), x.amax(dims, keepdim=keep)
        count = x.numel() // max(mean.numel(), 1)
        centred = x - (mean if keep else mean.reshape(()))
        var = (centred * centred).sum(dims, keepdim=keep) / _freedom(count, copies)
    std = torch.full_like(var, torch.nan) if single_is_nan and count * copies < 2 else var.sqrt()
    return torch.stack((mean, std, low, high))


def _shifted(stats: Tensor, beta: Tensor) -> Tensor:
    """Statistics of ``x + beta`` from those of ``x``, with |mean| in front."""
    moved = stats + beta
    return torch.stack((moved[0].abs(), stats[1].expand_as(moved[0]), moved[2], moved[3]))


def _dot(coefficients: Tensor, stats: Tensor) -> Tensor:
    if coefficients.dim() == 1:
        coefficients = coefficients.reshape(4, *[1] * (stats.dim() - 1))
    return (coefficients * stats).sum(0)


def dls_range(
    stats: Tensor, w: Tensor, v: Tensor, bits: int, eps: float, *, floor_first: bool = False
) -> tuple[Tensor, Tensor]:
    """``(alpha, beta)`` of every group from its statistics; ``floor_first`` is the published order."""
    beta = _dot(v, stats)
    alpha = _dot(w, _shifted(stats, beta)).abs()
    ceiling = (stats[3] - stats[2]) / 2**bits
    if floor_first:
        return torch.minimum(alpha.clamp(min=eps), ceiling), beta
    return torch.minimum(alpha, ceiling).clamp(min=eps), beta


class _DLSFunction(torch.autograd.Function):
    """Saves a reference to ``x`` and the handful of statistics; the backward recomputes the codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        v: Tensor,
        axis: int | None,
        bits: int,
        qmin: int,
        eps: float,
        official: bool,
        dead_pass: bool,
        scaled: bool,
        copies: int,
    ) -> Tensor:
        xc = x.to(w.dtype)
        stats = dls_statistics(xc, axis, single_is_nan=official, copies=copies)
        ctx.save_for_backward(x, w, v, stats)
        ctx.static = axis, bits, qmin, eps, official, dead_pass, scaled, copies
        alpha, beta = dls_range(stats, w, v, bits, eps, floor_first=official)
        index = affine_index(xc, alpha, beta, qmin, qmin + 2**bits - 1)
        return in_dtype(affine_decode(index, Affine(alpha, beta, stats[2], stats[3]), qmin), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, v, stats = ctx.saved_tensors
        axis, bits, qmin, eps, official, dead_pass, scaled, copies = ctx.static
        qmax = qmin + 2**bits - 1
        alpha, beta = dls_range(stats, w, v, bits, eps, floor_first=official)
        mean, std, low, high = stats.unbind(0)
        xc, grad = x.to(w.dtype), grad.to(w.dtype)

        u = (xc + beta) / alpha
        inside = (u >= qmin) & (u <= qmax)
        rounded = u.clamp(qmin, qmax).round()
        y = rounded * alpha - beta
        below, above = y < low, y > high
        gy = torch.where(below | above, 0.0, grad)
        dx = gy * inside
        dalpha = group_sum(gy * (rounded - torch.where(inside, u, 0.0)), axis)
        dbeta = group_sum(dx - gy, axis)
        dlow, dhigh = group_sum(grad * below, axis), group_sum(grad * above, axis)

        # alpha -> alpha0 -> w and the statistics of x + beta -> beta -> v and the statistics of x.
        shifted = _shifted(stats, beta)
        signed_alpha = _dot(w, shifted)
        count = x.numel() // mean.numel()
        if scaled:
            dalpha = dalpha / math.sqrt(copies * count * qmax)
        if not dead_pass:
            magnitude = signed_alpha.abs()
            dalpha = dalpha * ((magnitude <= (high - low) / 2**bits) & (magnitude >= eps))
        dalpha = dalpha * signed_alpha.sign()
        spread = tuple(range(1, stats.dim()))
        dw = (shifted * dalpha).sum(spread) if spread else shifted * dalpha
        wide = (4, *[1] * (stats.dim() - 1))
        dstats = w.reshape(wide) * dalpha
        dstats = torch.cat((dstats[:1] * (mean + beta).sign(), dstats[1:]))
        dbeta = dbeta + dstats[0] + dstats[2] + dstats[3]
        dv = (stats * dbeta).sum(spread) if spread else stats * dbeta
        if not ctx.needs_input_grad[0]:
            return None, dw, dv, None, None, None, None, None, None, None, None
        dmean, dstd, dmin, dmax = (dstats + v.reshape(wide) * dbeta).unbind(0)
        dmin, dmax = dmin + dlow, dmax + dhigh

        is_low, is_high = xc == low, xc == high  # ties share the gradient, as torch's amin and amax do
        slope = torch.where(std > 0, dstd / (std * _freedom(count, copies)), 0.0)
        dx = dx + dmean / count + (xc - mean) * slope
        dx = dx + is_low * (dmin / group_sum(is_low.to(w.dtype), axis))
        dx = dx + is_high * (dmax / group_sum(is_high.to(w.dtype), axis))
        return dx.to(x.dtype), dw, dv, None, None, None, None, None, None, None, None


class _FusedDLS(torch.autograd.Function):
    """``_DLSFunction`` by fused kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, v: Tensor, kernels: ModuleType, groups: Groups, rule: DLSRule
    ) -> Tensor:
        y: Tensor
        y, ranges = kernels.dls_forward(x, w, v, groups, rule)
        ctx.save_for_backward(x, w, v, ranges)
        ctx.kernels = kernels
        ctx.static = groups, rule
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x = ctx.needs_input_grad[0]
        dx, dw, dv = ctx.kernels.dls_backward(grad, *ctx.saved_tensors, *ctx.static, need_x)
        return dx if need_x else None, dw, dv, None, None, None


class DLS(Quantizer):
    """Dynamic range from statistics; parameters ``w`` and ``v``, shape ``(4,)``: see the module's docstring.

    Args:
        axis: the sample axis: every index along it has statistics of its own (no state depends on it). None, or
            ``official``: one set of statistics for the whole tensor, as published.
        num_groups: accepted for a uniform constructor; DLS has no state per group.
        dead_scale: where the ceiling (or eps) decides alpha, its gradient is zero as published (``"parity"``) or
            passes on to alpha0 (``"pass"``).

    Needs no data before an evaluation (with ``official``, the first batch decides the sign flag for ever). NaN or inf
    in a group makes the whole group's output NaN: its range is then unknown.
    """

    flags: ClassVar[tuple[str, ...]] = ("initialized", "signed")
    dynamic = True

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        dead_scale: Literal["parity", "pass"] = "parity",
    ) -> None:
        if dead_scale not in ("parity", "pass"):
            raise ConfigError(f"dead_scale must be 'parity' or 'pass', got {dead_scale!r}")
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        self.dead_scale = dead_scale
        if official:
            self.eps = 1e-6
        if self.bits is not None:
            self.w = nn.Parameter(torch.empty(4))
            self.v = nn.Parameter(torch.empty(4))
            self._reset_state()

    @property
    def needs_data(self) -> bool:
        return self.official

    @property
    def is_signed(self) -> bool:
        return not self.official or self._flags["signed"]

    def stored(self, shape: Sequence[int]) -> tuple[int, int]:
        codes, _ = super().stored(shape)
        groups = 1 if self.stats_axis is None else self.num_groups
        return codes, 4 * groups if self.ready else 2  # scale, shift and both ends

    def constants(self) -> tuple[Any, ...]:
        return *super().constants(), self.dead_scale

    @property
    def stats_axis(self) -> int | None:
        """The axis whose indices have separate statistics, or None."""
        return None if self.official else self.axis

    @property
    def _state_axis(self) -> int | None:
        return None

    @torch.no_grad()
    def _reset_state(self) -> None:
        top = 2 ** (self._width() - 1) - 1  # of the signed range, whatever the sign flag says
        self.w.copy_(torch.tensor([1 / top, 3 / top, 0.0, 0.0]))
        self.v.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0]))

    def initialize(self, x: Tensor, *, reduce: bool = False) -> None:
        """With ``official``, take the sign flag from ``x``; else there is nothing to initialise."""
        if self.needs_data:
            super().initialize(x if x.dim() else x.reshape(1), reduce=reduce)

    def _init_state(self, stats: GroupStats) -> None:
        self._set_flag("signed", bool(stats.min.min() < -1e-5))

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cd = compute_dtype(x, self.w, self.v)
        return self.w.to(cd), self.v.to(cd)

    @torch.no_grad()
    def affine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(alpha, beta, lo, hi)`` for the data ``x``, each with one element a group, broadcastable to ``x``."""
        a = self._affine(x)
        assert a.lo is not None
        assert a.hi is not None
        return a.scale, a.shift, a.lo, a.hi

    def _affine(self, x: Tensor) -> Affine:
        axis = self._axis_of(x)
        w, v = self.w, self.v
        kernels = self._serving(x, w, v, axis, 1)
        if kernels is not None:
            x = quantize.dense(x)
            ranges = kernels.dls_range(x, w, v, quantize.groups_of(x, axis), self._rule(1))
            if axis is not None:
                shape = [1] * x.dim()
                shape[axis] = -1
                return Affine(*(ranges[i].reshape(shape) for i in (4, 5, 2, 3)))
            return Affine(*(ranges[i, 0] for i in (4, 5, 2, 3)))
        coefficients = self._coefficients(x)
        stats = dls_statistics(x.to(coefficients[0].dtype), axis, single_is_nan=self.official)
        alpha, beta = dls_range(stats, *coefficients, self._width(), self.eps, floor_first=self.official)
        return Affine(alpha, beta, stats[2], stats[3])

    def _rule(self, copies: int) -> DLSRule:
        passes = self.dead_scale == "pass"
        return DLSRule(self._width(), self.qmin, self.eps, self.official, passes, self.scale_gradient, copies)

    def _serving(self, x: Tensor, w: Tensor, v: Tensor, axis: int | None, copies: int) -> ModuleType | None:
        """The fused kernels that serve. They have no NaN for the deviation of a single element."""
        if self.official and x.numel() * copies < 2:
            return None
        if axis is not None and x.shape[axis] > 65535:
            return None
        return quantize.serving(x, w, v)

    def _axis_of(self, x: Tensor) -> int | None:
        axis = self.stats_axis
        if axis is not None and not -x.dim() <= axis < x.dim():
            group_rows(x, axis, 0)  # raises the error
        return axis

    def _quantize(self, x: Tensor, copies: int = 1) -> Tensor:
        out: Tensor
        axis = self._axis_of(x)
        w, v = self.w, self.v
        rule = self._rule(copies)
        kernels = self._serving(x, w, v, axis, copies)
        if kernels is not None:
            x = quantize.dense(x)
            out = _FusedDLS.apply(x, w, v, kernels, quantize.groups_of(x, axis), rule)
            return out
        out = _DLSFunction.apply(x, *self._coefficients(x), axis, *rule)
        return out

    def _quantize_copies(self, x: Tensor, copies: int) -> Tensor:
        return self._quantize(x, copies)

    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        rows: list[Tensor] = []
        for batch in batches:
            rows.extend(group_rows(batch, self.stats_axis, 0).unbind(0))
        rows = rows[:: -(-len(rows) // 64)]  # 64 samples say enough
        cd = compute_dtype(*rows, self.w)
        per_row = torch.stack([dls_statistics(r.to(cd), None, single_is_nan=self.official) for r in rows], 1)

        def range_of(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return dls_range(
                per_row[:, None],
                w[:, :, None],
                v[:, :, None],
                self._width(),
                self.eps,
                floor_first=self.official,
            )

        start = self.w.to(cd), self.v.to(cd)
        w, v = search_coefficients(rows, per_row, range_of, start, self.qmin, self._width())
        self.w.copy_(w)
        self.v.copy_(v)

    def extra_repr(self) -> str:
        extra = "" if self.dead_scale == "parity" else ", dead_scale=pass"
        return super().extra_repr() + extra * (self.bits is not None)
