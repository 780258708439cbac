"""Histograms of what quantizers get, with the levels that they have: the numbers of the pictures in a report.

Where a tensor has one scale, the axis is that of its values. Where it has several (weights by channel, ranges by sample
or token) values of different groups cannot share an axis of levels; they are shown in units of their own group's codes,
``(x + shift) / scale``, where the levels are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmquant.quantizers import QTensor

__all__ = ["BINS", "Histogram", "histogram_of_codes", "histogram_of_values", "in_code_units"]

BINS = 64
_CODE_BINS = 128


@dataclass(frozen=True)
class Histogram:
    """Counts of equal bins from ``low`` to ``high``; what lies beyond is in the outermost ones."""

    counts: tuple[int, ...]
    low: float
    high: float
    levels: tuple[float, ...]
    """All of them, ascending, in units of the axis."""
    extremes: tuple[float, float]
    """The smallest and the largest value."""
    shown: str
    """What the axis is, as a sentence."""
    thresholds: tuple[float, ...] = ()
    """Where rounding goes over to the next level, if that is learnt."""


def in_code_units(q: QTensor, x: Tensor) -> Tensor:
    """``(x + shift) / scale``: levels are the integers from ``q.code_min``. ``x`` broadcasts with the map."""
    return (x.to(q.scale.dtype) + q.shift) / q.scale


def histogram_of_values(
    values: Tensor, levels: Sequence[float], shown: str, thresholds: Sequence[float] = ()
) -> Histogram | None:
    """The histogram of a sample; None where it is empty, or where it or a level is not finite.

    The axis reaches from the lowest to the highest level and, as far as there are values, half of that again on either
    side: an outlier far away must not squeeze everything else into one bin.
    """
    values = values.detach().reshape(-1).double().cpu()
    levels = sorted(levels)
    if not values.numel() or not levels or not all(map(math.isfinite, levels)):
        return None
    first, last = (t.item() for t in values.aminmax())
    if not (math.isfinite(first) and math.isfinite(last)):
        return None
    bottom, top = levels[0], levels[-1]
    margin = (top - bottom) / 2 or last - first
    low, high = min(bottom, max(first, bottom - margin)), max(top, min(last, top + margin))
    if not high - low > 1e-6 * max(abs(low), abs(high)):  # constant, or nearly so
        middle = (low + high) / 2
        low, high = middle - (abs(middle) or 1.0), middle + (abs(middle) or 1.0)
    index = ((values - low) * (BINS / (high - low))).floor().clamp(0, BINS - 1).long()
    counts = torch.bincount(index, minlength=BINS).tolist()
    inside = tuple(t for t in sorted(thresholds) if low <= t <= high)
    return Histogram(tuple(counts), low, high, tuple(levels), (first, last), shown, inside)


def histogram_of_codes(q: QTensor, first: int = 0) -> Histogram | None:
    """The histogram of the codes of a packed tensor, one bin a code, of 8 bits two; ``first``: lowest code in use.

    With one scale the axis is that of the decoded values, else that of codes as they enter the arithmetic.
    """
    n = 2**q.bits
    counts = torch.bincount(q.codes.reshape(-1).long(), minlength=n)
    fold = max(1, n // _CODE_BINS)
    counts = counts.reshape(-1, fold).sum(1)
    if not q.codes.numel():
        return None
    places = torch.arange(n, dtype=torch.float64) + q.code_min
    shown = "Codes of the packed tensor, in units of each group's step."
    scale, shift = 1.0, 0.0
    if q.scale.numel() == 1 and q.lo is None and float(q.scale) > 0:
        scale, shift = float(q.scale), float(q.shift.reshape(-1)[0])
        shown = "Decoded values of the packed codes."
    levels = (places * scale - shift).tolist()
    low, high = levels[0] - scale / 2, levels[-1] + scale / 2
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    used = q.codes.reshape(-1).aminmax()
    extremes = levels[int(used[0])], levels[int(used[1])]
    return Histogram(tuple(counts.tolist()), low, high, tuple(levels[first:]), extremes, shown)
