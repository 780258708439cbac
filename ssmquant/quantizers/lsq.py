"""LSQ with an offset (arXiv 2503.21970's plain activation quantizer): a learnable step size and a learnable shift.

    u = clip((x + beta) / alpha, Qn, Qp),    y = alpha * round(u) - beta

Gradients (straight-through): dx is 1 in range and 0 outside, so beta learns from clipped elements only, and
d alpha = round(u) - (x + beta) / alpha in range, Qn or Qp outside, times 1 / sqrt(N * Qp).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmquant.errors import ConfigError
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
from ssmquant.quantizers.affine_fit import Shift, least_squares, shift_of
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.observers import GroupStats, group_rows, sample_rows

__all__ = ["LSQ", "LearnedScale", "floored"]

_PRUNED = 1e-3
"""What a group that is all zero takes of the others' step size where no level is 0."""


def floored(alpha: Tensor, eps: float) -> Tensor:
    """``alpha`` with its magnitude raised to at least ``eps``, its sign kept (0 counts as positive)."""
    sign = torch.where(alpha < 0, -1.0, 1.0).to(alpha.dtype)
    return sign * alpha.abs().clamp(min=eps)


class _LSQFunction(torch.autograd.Function):
    """Saves references to its inputs only; recomputing the codes is cheaper than keeping them.

    ``copies``: N counts each element so often; 0: no gradient scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        beta: Tensor,
        qmin: int,
        qmax: int,
        axis: int | tuple[int, ...] | None,
        copies: int,
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
        dx = grad * inside
        dalpha = dbeta = None
        if ctx.needs_input_grad[1]:
            dalpha = group_sum(grad * (u.clamp(qmin, qmax).round() - torch.where(inside, u, 0.0)), axis)
            if copies:
                dalpha = dalpha / math.sqrt(copies * (x.numel() // alpha.numel()) * qmax)
        if ctx.needs_input_grad[2]:
            dbeta = group_sum(dx - grad, axis)
        return dx.to(x.dtype), dalpha, dbeta, None, None, None, None


class _FusedLSQ(torch.autograd.Function):
    """``_LSQFunction`` of a whole tensor by fused kernels; alpha is the parameter itself, not yet floored."""

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
        dx, dalpha, dbeta = ctx.kernels.lsq_backward(grad, *ctx.saved_tensors, *ctx.static)
        return dx, dalpha, dbeta, None, None, None, None, None


class LearnedScale(Quantizer):
    """What LSQ and RFA share: a step size and a shift a group, their initialisation and their calibration.

    Parameters ``alpha`` and, with ``shift="learned"``, ``beta``, shape ``(num_groups,)``; buffers ``initialized``,
    ``signed``.

    Args:
        shift: ``"learned"``; ``"half"``: minus half a step, so that the levels lie symmetrically about 0 (at 2 bits
            -1.5, -0.5, 0.5, 1.5 steps) and nothing but the step is stored; ``"none"``: no shift, as in the original
            LSQ (arXiv 1902.08153).
    """

    flags: ClassVar[tuple[str, ...]] = ("initialized", "signed")
    signed_by_data = True
    """Whether the first data decide the sign flag (unsigned if hardly any is negative)."""

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
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        if shift not in ("learned", "half", "none"):
            raise ConfigError(f"shift must be 'learned', 'half' or 'none', got {shift!r}")
        self.shift = shift
        if self.bits is not None:
            self.alpha = nn.Parameter(torch.ones(num_groups))
            if shift == "learned":
                self.beta = nn.Parameter(torch.zeros(num_groups))

    def scalars(self) -> tuple[Tensor, Tensor]:
        """The step, not yet floored, and the shift, as they enter the arithmetic."""
        if self.shift == "learned":
            return self.alpha, self.beta
        # A packed tensor makes its shift of the floored step, too.
        follows = self.shift == "half" and not self.official
        step = _StraightFloor.apply(self.alpha, self.eps) if follows else self.alpha
        return self.alpha, shift_of(step, self.shift)

    def stored(self, shape: Sequence[int]) -> tuple[int, int]:
        codes, scalars = super().stored(shape)
        return codes, scalars if self.shift == "learned" else scalars // 2

    @torch.no_grad()
    def _set_scalars(self, alpha: Tensor, beta: Tensor) -> None:
        self.alpha.copy_(alpha)
        if self.shift == "learned":
            self.beta.copy_(beta)

    def _reset_state(self) -> None:
        self._set_scalars(torch.ones_like(self.alpha), torch.zeros_like(self.alpha))

    def _init_state(self, stats: GroupStats) -> None:
        """Set alpha = 2 * mean|x| / sqrt(Qp), as published, but no larger than max|x| / Qp; beta = 0.

        The published start suits 2 to 4 bits. At 8 it is several times the step that reaches the largest value, so that
        most codes lie idle.
        """
        if self.signed_by_data:
            # Published: an absolute threshold, which makes data of scale 1e-6 unsigned.
            threshold = 1e-5 * (1.0 if self.official else stats.abs_mean.mean())
            self._set_flag("signed", bool(stats.min.min() < -threshold))
        alpha = 2 * stats.abs_mean / math.sqrt(self.qmax)
        if not self.official:
            alpha = torch.minimum(alpha, torch.maximum(stats.min.abs(), stats.max.abs()) / self.qmax)
            # A group that is all zero takes the other groups' average rather than a dead step.
            used = stats.abs_mean > 0
            alpha = torch.where(used, alpha, alpha[used].mean() * (_PRUNED if self.shift == "half" else 1.0))
        self._set_scalars(alpha, torch.zeros_like(alpha))

    def _scale_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha (floored, straight gradient) and beta in the compute dtype, broadcastable to ``x``."""
        scalars = self.scalars()
        cd = compute_dtype(x, *scalars)
        alpha, beta = (self._group_view(t, x).to(cd) for t in scalars)
        return (alpha if self.official else _StraightFloor.apply(alpha, self.eps)), beta

    def _affine(self, x: Tensor) -> Affine:
        return Affine(*self._scale_shift(x))

    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        """Take the alpha and beta of least squared error.

        Rounds as LSQ also for RFA, whose grid is fresh at this point, so that the two agree off ties.
        """
        rows: list[Tensor] = []
        per_group = [group_rows(b, self._state_axis, self.num_groups) for b in batches]
        for g in range(self.num_groups):
            parts = [p[g] for p in per_group]
            rows.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        points, weights = sample_rows(rows, 2**13 + 256 * self.num_groups)
        low, high = (t.to(points.dtype)[:, None] for t in (stats.min, stats.max))
        alpha, beta = (t.detach().to(points.dtype)[:, None] for t in self.scalars())
        alpha, beta = least_squares(
            points, weights, (low, high), (alpha, beta), self.qmin, self.qmax, self.shift, self.eps
        )
        used = stats.abs_mean > 0  # a group that is all zero keeps its start
        self._set_scalars(
            torch.where(used, alpha[:, 0], self.alpha), torch.where(used, beta[:, 0], self.scalars()[1])
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", shift={self.shift}" if self.shift != "learned" else "")


class _StraightFloor(torch.autograd.Function):
    """:func:`floored` with gradient 1, so that a step size that fell below the floor can come back."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, eps: float) -> Tensor:
        return floored(alpha, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class LSQ(LearnedScale):
    """Learned step size and shift; see the module's docstring and :class:`Quantizer` for the arguments.

    Activations are unsigned if the data they were initialised from have no value below ``-1e-5 * mean|x|``
    (``official``: -1e-5); weights are always signed, unless ``official``.
    A negative learnt alpha is a valid quantizer (with the code range reversed).
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
        self.signed_by_data = official or not is_weight

    def static_affine(self) -> Affine | None:
        return self._own_affine()

    def _quantize(self, x: Tensor, copies: int = 1) -> Tensor:
        out: Tensor
        axis = self._state_axis
        qmin = self.qmin
        qmax = qmin + 2 ** self._width() - 1
        counted = copies if self.scale_gradient else 0
        if axis is None:
            alpha, beta = self.scalars()
            kernels = quantize.serving(x, alpha, beta)
            if kernels is not None:
                eps = 0.0 if self.official else self.eps
                out = _FusedLSQ.apply(quantize.dense(x), alpha, beta, kernels, qmin, qmax, eps, counted)
                return out
        out = _LSQFunction.apply(x, *self._scale_shift(x), qmin, qmax, axis, counted)
        return out

    def _quantize_copies(self, x: Tensor, copies: int) -> Tensor:
        return self._quantize(x, copies)
