"""Min-max of each token: a dynamic range for every row of channels, with two learnt clipping factors.

With ``low`` and ``high`` the extremes of a row, ``n = 2**bits - 1`` and the factors ``a`` and ``b`` (``clip``):

    middle = (low + high) / 2,   half = (high - low) / 2
    beta   = a * half - middle                           the lowest level is -beta
    alpha  = max((a + b) * half / n, eps)
    y      = alpha * round(clip((x + beta) / alpha, 0, n)) - beta

Where a projection reads it, the step and the shift of a row leave the integer product as factors of its result, so that
codes stay exact. A row's range is its own: neither the batch nor the tile of a picture that it is in matters.

Per-token dynamic quantization is what language models use (ZeroQuant, arXiv 2206.01861); learnt clipping factors of
min-max ranges are OmniQuant's (arXiv 2308.13137), there for weights. The factors' gradients are LSQ's, through alpha
and beta; extremes count as constants. Inside is what lies within half a step of a level: without clipping the extremes
are the outermost levels up to the last bit, which must not decide over their gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.errors import InputError
from ssmquant.quantizers.affine import (
    Affine,
    affine_decode,
    affine_index,
    compute_dtype,
    in_dtype,
    once_differentiable,
)
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.observers import GroupStats

__all__ = ["Token", "token_range"]

_START = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28)
"""Factors that calibration tries for both ends."""


def token_range(
    low: Tensor, high: Tensor, clip: Tensor, levels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(alpha, beta, half)`` of rows from their extremes; ``levels``: n + 1."""
    half = (high - low) * 0.5
    middle = (low + high) * 0.5
    alpha = (half * ((clip[0] + clip[1]) / (levels - 1))).clamp(min=eps)
    return alpha, half * clip[0] - middle, half


def _range_of(x: Tensor, axis: int, clip: Tensor, levels: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return token_range(*x.aminmax(dim=axis, keepdim=True), clip, levels, eps)


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]) if x.dim() else x.reshape(1, 1)


class _TokenFunction(torch.autograd.Function):
    """Saves references to its inputs only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip: Tensor, axis: int, levels: int, eps: float, scaled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.static = axis, levels, eps, scaled
        xc = x.to(clip.dtype)
        alpha, beta, _ = _range_of(xc, axis, clip, levels, eps)
        index = affine_index(xc, alpha, beta, 0, levels - 1)
        return in_dtype(affine_decode(index, Affine(alpha, beta), 0), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        axis, levels, eps, scaled = ctx.static
        n = levels - 1
        xc, grad = x.to(clip.dtype), grad.to(clip.dtype)
        alpha, beta, half = _range_of(xc, axis, clip, levels, eps)
        u = (xc + beta) / alpha
        inside = (u >= -0.5) & (u <= n + 0.5)
        dx = grad * inside
        dclip = None
        if ctx.needs_input_grad[1]:
            error = u.clamp(0, n).round() - torch.where(inside, u, 0.0)
            dalpha = (grad * error).sum(axis, keepdim=True)
            dbeta = (dx - grad).sum(axis, keepdim=True)
            step, foot = (dalpha * half).sum() / n, (dbeta * half).sum()
            dclip = torch.stack((step + foot, step))
            if scaled:
                dclip = dclip / math.sqrt(max(x.numel(), 1) * n)
        return dx.to(x.dtype), dclip, None, None, None, None


class Token(Quantizer):
    """Dynamic range of each row of channels; see the module's docstring and :class:`Quantizer` for the arguments.

    Parameter ``clip``, shape ``(2,)``: the share of a row's range below and above its middle that is kept. Usable
    without data: calibration looks for factors of smaller error than 1.

    Args:
        channel_axis: the axis of a row's elements.
        num_groups: accepted for a uniform constructor; there is no state per group.

    A NaN or inf makes its whole row NaN: its range is then unknown.
    """

    clip: nn.Parameter
    dynamic = True

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        channel_axis: int = -1,
    ) -> None:
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        self.channel_axis = channel_axis
        if self.bits is not None:
            self.clip = nn.Parameter(torch.ones(2))

    @property
    def needs_data(self) -> bool:
        return False

    @property
    def _state_axis(self) -> int | None:
        return None

    @property
    def elementwise(self) -> bool:
        return False

    @property
    def is_signed(self) -> bool:
        return False

    @property
    def kept_axis(self) -> int | None:
        return self.channel_axis

    def constants(self) -> tuple[Any, ...]:
        return *super().constants(), self.channel_axis

    @torch.no_grad()
    def _reset_state(self) -> None:
        self.clip.fill_(1.0)

    def _axis_of(self, x: Tensor) -> int:
        if not -max(x.dim(), 1) <= self.channel_axis < max(x.dim(), 1):
            raise InputError(
                f"the quantizer 'token' has its channels in axis {self.channel_axis}, which a tensor of shape "
                f"{tuple(x.shape)} does not have"
            )
        return self.channel_axis

    def _affine(self, x: Tensor) -> Affine:
        cd = compute_dtype(x, self.clip)
        levels = 2 ** self._width()
        alpha, beta, _ = _range_of(x.to(cd), self._axis_of(x), self.clip.to(cd), levels, self.eps)
        return Affine(alpha, beta)

    def _quantize(self, x: Tensor) -> Tensor:
        clip = self.clip.to(compute_dtype(x, self.clip))
        scaled = self.scale_gradient
        out: Tensor = _TokenFunction.apply(x, clip, self._axis_of(x), 2 ** self._width(), self.eps, scaled)
        return out

    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        """Take the factors of least squared error: the same for both ends first, then each by itself."""
        rows = torch.cat([_rows(b, self._axis_of(b)) for b in batches])
        rows = rows[:: -(-len(rows) // 2**10)]
        rows = rows.to(compute_dtype(rows, self.clip))
        low, high = rows.aminmax(dim=1, keepdim=True)
        levels = 2 ** self._width()

        def error(a: float, b: float) -> float:
            alpha, beta, _ = token_range(low, high, rows.new_tensor((a, b)), levels, self.eps)
            affine = Affine(alpha, beta)
            index = affine_index(rows, alpha, beta, 0, levels - 1)
            return float(affine_decode(index, affine, 0).sub_(rows).square_().sum())

        both = min(_START, key=lambda f: error(f, f))
        a = min(_START, key=lambda f: error(f, both))
        b = min(_START, key=lambda f: error(a, f))
        self.clip.copy_(self.clip.new_tensor((a, b)))

    def extra_repr(self) -> str:
        return super().extra_repr() + f", channel_axis={self.channel_axis}" * (self.bits is not None)
