"""Min-max quantization: static affine ranges from observed extremes, the common baseline. Nothing is learnt.
With ``percentile`` they leave out the outermost elements.

Weights (``is_weight``) are symmetric and signed, ``scale = max|w| / (2**(b-1) - 1)``, shift 0; activations are
asymmetric, ``scale = (max - min) / (2**b - 1)``, ``shift = -min``, so that every value in range is at most half a
step off. The shift is a float: our kernels need no exactly representable zero (padding is not a code).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmquant.errors import ConfigError
from ssmquant.quantizers.affine import Affine, compute_dtype
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.lsq import _LSQFunction
from ssmquant.quantizers.observers import GroupStats, group_rows

__all__ = ["MinMax"]


class MinMax(Quantizer):
    """Static affine quantizer; see :class:`Quantizer` for the arguments (``official`` changes nothing here).

    Args:
        percentile: Share of the elements below the upper end of the range, and above the lower one, when :meth:`fit`
            searches; 1 takes the extremes, and so does data of which nothing would be left between the two ends. Of
            what calibration collects, a sample, it can only cut as finely as that has elements.

    Raises:
        ConfigError: ``percentile`` is not above 0.5, or above 1.

    Buffers ``low`` and ``high``, shape ``(num_groups,)``: the extremes of all data that :meth:`initialize` or
    :meth:`fit` saw last. Gradient: straight through inside the range, zero outside.
    """

    low: Tensor
    high: Tensor
    percentile: float = 1.0  # of pickles that are older than it

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        percentile: float = 1.0,
    ) -> None:
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        if (
            isinstance(percentile, bool)
            or not isinstance(percentile, (int, float))
            or not 0.5 < percentile <= 1
        ):
            raise ConfigError(f"percentile={percentile!r}: expected a share above 0.5, at most 1")
        self.percentile = float(percentile)
        if self.bits is not None:
            self.register_buffer("low", torch.full((num_groups,), -1.0))
            self.register_buffer("high", torch.full((num_groups,), 1.0))

    @property
    def is_signed(self) -> bool:
        return self.is_weight

    def _reset_state(self) -> None:
        self.low.fill_(-1.0)
        self.high.fill_(1.0)

    def _init_state(self, stats: GroupStats) -> None:
        self.low.copy_(stats.min)
        self.high.copy_(stats.max)

    @torch.no_grad()
    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        """The pooled extremes of all batches are the ranges; percentiles of all batches lie inside them."""
        if self.percentile == 1:
            return
        rows = (
            torch.cat([group_rows(b.float(), self._state_axis, self.num_groups) for b in batches], 1)
            .sort(1)
            .values
        )
        last = rows.shape[1] - 1
        ends = []
        for share in (1 - self.percentile, self.percentile):
            at = share * last
            below = int(at)
            part = at - below
            ends.append(rows[:, below] * (1 - part) + rows[:, min(below + 1, last)] * part)
        low, high = ends
        # Where nearly all elements are equal (to 0, as a rule) nothing would be left of the others.
        left = low < high
        self.low.copy_(torch.where(left, low, self.low))
        self.high.copy_(torch.where(left, high, self.high))

    def _affine(self, x: Tensor) -> Affine:
        cd = compute_dtype(x, self.low)
        low, high = (self._group_view(t, x).to(cd) for t in (self.low, self.high))
        if self.is_weight:
            scale = torch.maximum(-low, high) / self.qmax
            return Affine(scale.clamp(min=self.eps), torch.zeros_like(scale))
        return Affine(((high - low) / (self.qmax - self.qmin)).clamp(min=self.eps), -low)

    def static_affine(self) -> Affine | None:
        return self._own_affine()

    def _quantize(self, x: Tensor) -> Tensor:
        a = self._affine(x)
        out: Tensor = _LSQFunction.apply(x, a.scale, a.shift, self.qmin, self.qmax, self._state_axis, 0)
        return out
