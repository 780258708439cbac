"""Static ranges from data that calibration has seen: what is kept of a batch, and the observers of ``MinMax``.

Data are rows of points, one row a group, each point with a weight: the number of elements that it stands for. Observers
take rows in ascending order, in float64, and return the ends of the ranges, ``(groups,)`` each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmquant.quantizers.affine import compute_dtype

__all__ = [
    "ascending",
    "extremes",
    "kl_range",
    "moving_extremes",
    "mse_range",
    "observe",
    "percentile_range",
    "tally",
]

_TAIL = 128
"""Outermost elements of a row that are kept at either end, at most."""
_GOLDEN = 0.6180339887498949

_COARSE = [0.75**k for k in range(37)]
"""Parts of the distance from the middle to an extreme: the last one is about 3e-5, for outliers of that size."""
_FINE = [0.75**k for k in (-0.5, -0.3, -0.15, -0.05, 0.0, 0.05, 0.15, 0.3, 0.5)]
_GAIN = 1 - 1e-6
"""A range has to lower the squared error by more than rounding does to be taken."""
_AT_ONCE = 2**19
"""Levels of all candidates and groups that are looked at together."""

BINS = 2048
"""Of a histogram, as published for ``"kl"``."""
_STRIDE = 16
_SMOOTHING = 1e-4


@torch.no_grad()
def observe(rows: Tensor, limit: int) -> Tensor:
    """About ``limit`` weighted points of ``rows``, or all where there are no more: both tails whole, a sample between.

    Args:
        rows: ``(rows, n)`` float, not empty, finite.
        limit: number of points of all rows together; a row gets at least 4.

    Returns:
        ``(2, rows, points)``, float64 where ``rows`` are, else float32: points, and how many elements each stands for.
        The outermost elements of a row stand for themselves, which keeps extremes and far percentiles exact; the
        weights of a row sum to n.
    """
    count, n = rows.shape
    rows = rows.to(compute_dtype(rows))
    share = limit // count
    tail = max(1, min(_TAIL, share // 4))
    picks = max(2, share - 2 * tail)
    if n <= picks + 2 * tail:
        return torch.stack((rows, torch.ones_like(rows)))
    # Golden-ratio steps cannot fall in step with a channel count, as a stride can.
    steps = torch.arange(picks, dtype=torch.float64, device=rows.device) * _GOLDEN % 1.0
    index = (steps * n).long()
    low, high = rows.topk(tail, dim=1, largest=False), rows.topk(tail, dim=1)
    outer = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    outer.scatter_(1, low.indices, True).scatter_(1, high.indices, True)
    inside = ~outer[:, index]
    inside |= ~inside.any(1, keepdim=True)  # of very few picks all may be in the tails
    inside = inside.to(rows.dtype)
    between = inside * ((n - 2 * tail) / inside.sum(1, keepdim=True))
    ends = torch.cat((low.values, high.values), 1)
    points = torch.cat((rows[:, index], ends), 1)
    return torch.stack((points, torch.cat((between, torch.ones_like(ends)), 1)))


@torch.no_grad()
def tally(rows: Tensor, limit: int) -> Tensor:
    """As :func:`observe`, by histograms of evenly spaced bins: all elements count, their places are rounded.

    The first and the last point of a row are its extremes.
    """
    bins = max(2, limit // len(rows))
    rows = rows.to(compute_dtype(rows))
    if rows.shape[1] <= bins:
        return torch.stack((rows, torch.ones_like(rows)))
    low, high = (t[:, None] for t in rows.aminmax(dim=1))
    step = ((high - low) / bins).clamp(min=torch.finfo(rows.dtype).tiny)
    index = ((rows - low) / step).long().clamp(0, bins - 1)
    weights = torch.zeros(len(rows), bins, dtype=rows.dtype, device=rows.device)
    weights.scatter_add_(1, index, torch.ones_like(rows))
    points = low + step * (torch.arange(bins, device=rows.device) + 0.5)
    return torch.stack((torch.cat((low, points[:, 1:-1], high), 1), weights))


def extremes(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Smallest and largest points of all batches, ``(groups,)`` each."""
    low = torch.stack([b[0].amin(1) for b in batches]).amin(0)
    return low, torch.stack([b[0].amax(1) for b in batches]).amax(0)


def moving_extremes(batches: list[Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    """Exponential moving average of the batches' extremes, which starts from the first batch."""
    low, high = (t.double() for t in extremes(batches[:1]))
    for batch in batches[1:]:
        small, large = extremes([batch])
        low, high = low + momentum * (small - low), high + momentum * (large - high)
    return low, high


def ascending(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Points ``(groups, n)`` of all batches in ascending order, and their weights, float64."""
    points, weights = torch.cat(batches, 2).double()
    points, order = points.sort(stable=True, dim=1)
    return points, weights.gather(1, order)


# ---- percentiles ---------------------------------------------------------------------------------------------------


def percentile_range(points: Tensor, weights: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Ends with so large a share of the elements below the upper one, and above the lower one; linear in between."""
    low = _quantile(points, weights, 1 - share)
    # From its own end, where weights are 1: a sum over the whole row would round.
    return low, -_quantile(-points.flip(1), weights.flip(1), 1 - share)


def _quantile(points: Tensor, weights: Tensor, share: float) -> Tensor:
    upto = weights.cumsum(1)
    place = (share * (upto[:, -1:] - 1)).clamp(min=0)
    foot = place.floor()
    index = torch.searchsorted(upto, torch.cat((foot, foot + 1), 1), right=True)
    below, above = points.gather(1, index.clamp(max=points.shape[1] - 1)).unbind(1)
    return below + (above - below) * (place - foot)[:, 0]


# ---- least squared error -------------------------------------------------------------------------------------------


class _SquaredError:
    """Sums of squared errors over rows, for any uniform levels: the time depends on the number of levels only."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        # Small numbers cancel less.
        self.middle = (points[:, :1] + points[:, -1:]) / 2
        self.points = points - self.middle
        x = self.points
        moments = torch.stack((weights, weights * x, weights * x * x)).cumsum(2)
        self.upto = torch.nn.functional.pad(moments, (1, 0))

    def __call__(self, scale: Tensor, shift: Tensor, qmin: int, qmax: int) -> Tensor:
        """Of values rounded to ``scale * code - shift``, code from qmin to qmax; all ``(groups, candidates)``."""
        code = torch.arange(qmin, qmax + 1, dtype=torch.float64, device=scale.device)
        level = code * scale[..., None] - shift[..., None] - self.middle[..., None]
        groups, candidates, levels = level.shape
        border = ((level[..., 1:] + level[..., :-1]) / 2).reshape(groups, -1)
        border = torch.searchsorted(self.points, border).unflatten(1, (candidates, levels - 1))
        border = torch.nn.functional.pad(border, (1, 0))
        border = torch.cat((border, torch.full_like(border[..., :1], self.points.shape[1])), 2)
        upto = self.upto.gather(2, border.flatten(1).expand(3, -1, -1))
        count, first, second = upto.unflatten(2, (candidates, levels + 1)).diff(dim=3)
        return (second - 2 * level * first + level * level * count).sum(2).clamp(min=0)


def mse_range(
    points: Tensor, weights: Tensor, qmin: int, qmax: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Ends of least squared error, by a search over how much of either side of the median is kept.

    A grid of both parts, then a finer one around the best; the extremes stay where nothing is better.

    Args:
        points, weights: see the module; ``(groups, n)``.
        qmin, qmax: smallest and largest code.
        symmetric: ``scale = max(-low, high) / qmax`` and no shift, for weights; else the ends are the outermost levels.
    """
    error = _SquaredError(points, weights)
    low, high = points[:, :1], points[:, -1:]
    middle = torch.zeros_like(low) if symmetric else _quantile(points, weights, 0.5)[:, None]
    down, up = middle - low, high - middle
    if symmetric:
        down = up = torch.maximum(-low, high)
    best = points.new_ones(2, len(points), 1)
    least: Tensor | None = None
    step = max(1, _AT_ONCE // (len(points) * (qmax - qmin + 1)))
    for factors in ([1.0], _COARSE, _FINE, _FINE):
        factor = points.new_tensor(factors)
        grid = factor.expand(2, -1) if symmetric else torch.cartesian_prod(factor, factor).T
        around = best if factors is _FINE else torch.ones_like(best)
        for part in grid.split(step, 1):
            kept = (around * part[:, None]).clamp(max=1)  # (2, groups, candidates)
            a, b = middle - down * kept[0], middle + up * kept[1]
            scale = b / qmax if symmetric else (b - a) / (qmax - qmin)
            shift = torch.zeros_like(scale) if symmetric else scale * qmin - a
            found, at = error(scale, shift, qmin, qmax).min(1, keepdim=True)
            better = torch.ones_like(at, dtype=torch.bool) if least is None else found < least * _GAIN
            least = found if least is None else torch.where(better, found, least)
            best = torch.where(better, kept.gather(2, at.expand(2, -1, -1)), best)
    a, b = middle - down * best[0], middle + up * best[1]
    return torch.maximum(a, low)[:, 0], torch.minimum(b, high)[:, 0]


# ---- least divergence ----------------------------------------------------------------------------------------------


def divergence(histogram: Tensor, start: Tensor, stop: Tensor, levels: int) -> Tensor:
    """What a histogram loses when bins ``start <= bin < stop`` are kept and quantized to ``levels``, ``(windows,)``.

    The Kullback-Leibler divergence of P, the bins of the window with all that lies outside added to its first and last
    one, from Q, the bare window in which the filled bins of a level share its elements evenly; empty bins of both get a
    little of the others (Migacz, "8-bit inference with TensorRT", GTC 2017). Infinite where the window is empty.

    Args:
        histogram: ``(bins,)`` float64 numbers of elements.
        start, stop: ``(windows,)`` int64, ``stop - start >= levels``.
    """
    bins = torch.arange(len(histogram), device=histogram.device)
    inside = (bins >= start[:, None]) & (bins < stop[:, None])
    kept = torch.where(inside, histogram, 0.0)
    upto = torch.nn.functional.pad(histogram.cumsum(0), (1, 0))
    p = kept.scatter_add(1, start[:, None], upto[start][:, None])
    p.scatter_add_(1, stop[:, None] - 1, (upto[-1] - upto[stop])[:, None])
    level = ((bins - start[:, None]) * levels // (stop - start)[:, None]).clamp(0, levels - 1)
    filled = (kept > 0).double()
    sums = kept.new_zeros(len(start), levels)
    mean = sums.scatter_add(1, level, kept) / sums.scatter_add(1, level, filled).clamp(min=1)
    q = mean.gather(1, level) * filled
    p, q = _smooth(p, inside), _smooth(q, inside)
    out = torch.where(inside, p * (p / q).log(), 0.0).sum(1)
    return torch.where(filled.any(1), out, torch.inf)


def _smooth(counts: Tensor, inside: Tensor) -> Tensor:
    """Shares of the bins, none of them zero: empty ones take 1e-4 of an element from those that are not."""
    empty, full = inside & (counts <= 0), inside & (counts > 0)
    taken = _SMOOTHING * empty.sum(1, keepdim=True) / full.sum(1, keepdim=True).clamp(min=1)
    counts = torch.where(empty, _SMOOTHING, torch.where(full, counts - taken, 1.0))
    return counts / torch.where(inside, counts, 0.0).sum(1, keepdim=True)


def kl_range(points: Tensor, weights: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ends of least divergence over a histogram of 2048 bins (entropy calibration, see :func:`divergence`).

    ``symmetric``: the histogram is that of magnitudes, from 0, in 2**(bits-1) levels, as published. Otherwise it runs
    from the smallest to the largest element, in 2**bits levels, and both ends move: towards the median together first,
    then each by itself; where the median is in the first bin, as behind a ReLU, that is the published search. Ends go
    in steps of 16 bins. A row of fewer elements than bins says nothing about them and keeps its extremes.
    """
    low, high = points[:, 0].clone(), points[:, -1].clone()
    for g in range(len(points)):
        a, b = (float(t[g]) for t in (low, high))
        if float(weights[g].sum()) < BINS or a == b:
            continue
        if symmetric:
            top = max(-a, b)
            _, stop = _narrow(
                _histogram(points[g].abs(), weights[g], 0.0, top), 2 ** (bits - 1), one_end=True
            )
            end = top * stop / BINS
            low[g], high[g] = max(a, -end), min(b, end)
        else:
            start, stop = _narrow(_histogram(points[g], weights[g], a, b), 2**bits, one_end=False)
            low[g] = a + (b - a) * start / BINS if start else a
            high[g] = a + (b - a) * stop / BINS if stop < BINS else b
    return low, high


def _histogram(points: Tensor, weights: Tensor, low: float, high: float) -> Tensor:
    """Elements in each bin of a row; those that one point stands for lie between it and its neighbours.

    As lumps they would leave bins empty that are not, and ranges would come out too narrow.
    """
    points, order = points.sort(stable=True)
    weights = weights[order]
    index = ((points - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    out = torch.zeros(BINS, dtype=torch.float64, device=points.device)
    out.index_add_(0, index, torch.where(weights > 1, 0.0, weights))
    several = torch.where(weights > 1, weights, 0.0)
    border = torch.cat((points[:1], (points[1:] + points[:-1]) / 2, points[-1:]))
    upto = torch.nn.functional.pad(several.cumsum(0), (1, 0))
    edge = low + (high - low) * torch.arange(1, BINS, dtype=torch.float64, device=points.device) / BINS
    left = (torch.searchsorted(border, edge, right=True) - 1).clamp(0, len(points) - 1)
    part = (edge - border[left]) / (border[left + 1] - border[left]).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    below = upto[left] + several[left] * part.clamp(0, 1)
    return out + torch.cat((upto[:1], below, upto[-1:])).diff().clamp(min=0)


def _narrow(histogram: Tensor, levels: int, *, one_end: bool) -> tuple[int, int]:
    """First and last bin (exclusive) of the window of least divergence; of equals the widest that is tried first."""
    start, stop = 0, BINS
    least = float("inf")

    def search(starts: Tensor, stops: Tensor) -> None:
        nonlocal start, stop, least
        fits = stops - starts >= levels
        starts, stops = starts[fits], stops[fits]
        if not len(starts):
            return
        found = divergence(histogram, starts, stops, levels)
        if float(found.min()) < least:
            least = float(found.min())
            k = int((found == found.min()).nonzero()[0, 0])
            start, stop = int(starts[k]), int(stops[k])

    def full(steps: Tensor, value: int) -> Tensor:
        return torch.full_like(steps, value)

    cut = torch.arange(0, BINS, _STRIDE, device=histogram.device)
    if one_end:
        search(full(cut, 0), BINS - cut)
        return start, stop
    middle = int(torch.searchsorted(histogram.cumsum(0), histogram.sum() / 2))
    search(*(t // _STRIDE * _STRIDE for t in (cut * middle // BINS, BINS - cut * (BINS - middle) // BINS)))
    search(full(cut, start), BINS - cut)
    search(cut, full(cut, stop))
    search(full(cut, start), BINS - cut)
    return start, stop
