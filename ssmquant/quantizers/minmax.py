"""Min-max quantization: static affine ranges from observed data, the common baseline. Nothing is learnt.

Weights (``is_weight``) are symmetric and signed, ``scale = max|w| / (2**(b-1) - 1)``, shift 0; activations are
asymmetric, ``scale = (max - min) / (2**b - 1)``, ``shift = -min``, so that every value in range is at most half a
step off. The shift is a float: our kernels need no exactly representable zero (padding is not a code).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmquant.errors import ConfigError
from ssmquant.quantizers.affine import Affine, compute_dtype
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.lsq import _LSQFunction
from ssmquant.quantizers.observers import GroupStats, group_rows
from ssmquant.quantizers.ranges import (
    ascending,
    extremes,
    kl_range,
    moving_extremes,
    mse_range,
    observe,
    percentile_range,
    tally,
)

__all__ = ["OBSERVERS", "MinMax"]

OBSERVERS = ("minmax", "ema", "percentile", "mse", "kl")
_PERCENTILE, _MOMENTUM = 0.99999, 0.1
_KEPT, _WHOLE = 2**13, 2**18
"""Points kept of a batch of calibration, and of a tensor that :meth:`MinMax.fit` is given."""


class MinMax(Quantizer):
    """Static affine quantizer; see :class:`Quantizer` for the arguments (``official`` changes nothing here).

    Args:
        observer: How :meth:`fit` (and ``calibrate``) makes a range of the batches; always within their extremes.

            - ``"minmax"``: the smallest and the largest element of all.
            - ``"ema"``: exponential moving average of the batches' extremes, in their order (torch.ao's
              MovingAverageMinMaxObserver). Of a weight, one batch, that is ``"minmax"``.
            - ``"percentile"``: leaves out the outermost elements.
            - ``"mse"``: least squared error, by a search for both ends.
            - ``"kl"``: least Kullback-Leibler divergence, TensorRT's entropy calibration (Migacz, GTC 2017), with both
              ends free for activations. Groups of fewer than 2048 elements keep their extremes.
        percentile: Share of the elements below the upper end of the range, and above the lower one, of the observer
            ``"percentile"`` (0.99999 by default), which it selects where no observer is named; 1 takes the extremes,
            and so does data of which nothing would be left between the two ends.
        momentum: Weight of the newest batch for ``"ema"``, 0.1 by default, as in ``nn.BatchNorm2d`` (torch.ao's
            ``averaging_constant``, whose 0.01 is for hundreds of batches).

    Raises:
        ConfigError: an unknown observer, an argument of another one, ``percentile`` not above 0.5 or above 1,
            ``momentum`` not above 0 or above 1.

    Of a batch of calibration the extremes count exactly, percentiles as exactly as the 128 outermost elements at either
    end tell (fewer, for each channel, with ``QConfig(smooth=...)``); in between a weighted sample stands for the rest,
    for ``"kl"`` a histogram of all elements.
    :meth:`initialize`, the first batch of a training without calibration, takes the extremes.

    Buffers ``low`` and ``high``, shape ``(num_groups,)``: the ranges that :meth:`initialize` or :meth:`fit` found last.
    Gradient: straight through inside the range, zero outside.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        observer: str | None = None,
        percentile: float | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        if observer is None:
            observer = "minmax" if percentile is None else "percentile"
        if observer not in OBSERVERS:
            raise ConfigError(f"observer={observer!r}: expected one of {', '.join(map(repr, OBSERVERS))}")
        if percentile is not None and observer != "percentile":
            raise ConfigError(
                f"percentile={percentile!r} is of the observer 'percentile', not of {observer!r}"
            )
        if momentum is not None and observer != "ema":
            raise ConfigError(f"momentum={momentum!r} is of the observer 'ema', not of {observer!r}")
        self.observer: str = observer
        self.percentile = _share("percentile", _PERCENTILE if percentile is None else percentile, 0.5)
        self.momentum = _share("momentum", _MOMENTUM if momentum is None else momentum, 0.0)
        if self.bits is not None:
            self.register_buffer("low", torch.full((num_groups,), -1.0))
            self.register_buffer("high", torch.full((num_groups,), 1.0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "observer" not in self.__dict__:  # of a version that had percentiles only, or not even those
            share = self.__dict__.setdefault("percentile", 1.0)
            self.observer, self.momentum = "percentile" if share < 1 else "minmax", _MOMENTUM

    @property
    def is_signed(self) -> bool:
        return self.is_weight

    def _reset_state(self) -> None:
        self.low.fill_(-1.0)
        self.high.fill_(1.0)

    def _init_state(self, stats: GroupStats) -> None:
        self.low.copy_(stats.min)
        self.high.copy_(stats.max)

    def fit(self, batches: Sequence[Tensor], *, search: bool = True) -> None:
        """Calibrate by the observer, from a fresh initialisation. ``search`` changes nothing: no observer is optional.

        Raises:
            CalibrationError: no batch, only empty ones, or inf or NaN in them.
        """
        super().fit(batches)

    @torch.no_grad()
    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        self._narrow([observe(group_rows(b, self._state_axis, self.num_groups), _WHOLE) for b in batches])

    def keep(self, x: Tensor, axis: int | None) -> Tensor:
        """What :meth:`fit_kept` needs of a batch of one group: weighted points ``(2, rows, points)``.

        Args:
            x: float tensor, not empty, finite.
            axis: whose indices are rows by themselves, which may get factors later; None: one row.
        """
        rows = group_rows(x.reshape(1) if x.dim() == 0 else x, axis, 0)
        if self.observer in ("minmax", "ema"):
            ends = torch.stack(rows.aminmax(dim=1), 1)
            return torch.stack((ends, torch.ones_like(ends)))
        # A divergence looks at the noise of a sample, too, and would cut too much.
        return tally(rows, _KEPT) if self.observer == "kl" else observe(rows, _KEPT)

    @torch.no_grad()
    def fit_kept(self, batches: list[Tensor], factors: Tensor | None) -> None:
        """As :meth:`fit`, of what :meth:`keep` kept of batches, whose rows are multiplied by ``factors`` (rows,).

        Of nothing but zeros nothing changes.
        """
        if self.bits is None:
            return
        if factors is not None:
            batches = [torch.stack((b[0] * factors[:, None].to(b.dtype), b[1])) for b in batches]
        batches = [b.reshape(2, 1, -1) for b in batches]
        low, high = extremes(batches)
        if not bool(torch.maximum(low.abs(), high.abs()).any()):
            return
        self.low.copy_(low)
        self.high.copy_(high)
        self._set_flag("initialized", True)
        self._narrow(batches)

    def _narrow(self, batches: list[Tensor]) -> None:
        """From the extremes of the batches, which the ranges are already, to those of the observer."""
        if self.observer == "minmax":
            return
        if self.observer == "ema":
            low, high = moving_extremes(batches, self.momentum)
        else:
            points, weights = ascending(batches)
            if self.observer == "percentile":
                low, high = percentile_range(points, weights, self.percentile)
            elif self.observer == "mse":
                low, high = mse_range(points, weights, self.qmin, self.qmax, symmetric=self.is_weight)
            else:
                low, high = kl_range(points, weights, self._width(), symmetric=self.is_weight)
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

    def extra_repr(self) -> str:
        return super().extra_repr() + f", observer={self.observer}" * (self.observer != "minmax")


def _share(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value <= 1:
        raise ConfigError(f"{name}={value!r}: expected a share above {least:g}, at most 1")
    return float(value)
