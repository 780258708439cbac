"""Calibration of DLS: a small search over its eight scalars for the least squared error.

The published start (three sigma around the mean) saturates at 18 dB on heavy tails at 6 to 8 bits, where the range
from min to max is far better; at 2 bits it is the other way round, and skewed data (SiLU) want the window's foot at
the minimum. All of these are linear in the statistics, so the search tries each kind of window with several widths,
then polishes the best. All candidates commute with shifts of the data (v1 + v3 + v4 = -1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssmquant.quantizers.affine import Affine, affine_decode, affine_index
from ssmquant.quantizers.observers import sample_rows

__all__ = ["search_coefficients"]

Coefficients = tuple[tuple[float, ...], tuple[float, ...]]


def _windows(qmin: int, bits: int) -> Iterator[Coefficients]:
    """Pairs (w, v): step = k * std or k * range, anchored at the mean, the middle, the minimum or the maximum."""
    n = 2**bits
    qmax = qmin + n - 1
    centre = (qmin + qmax) / 2  # the middle of the code range, where the middle of the window has to go
    # beta = -anchor + offset * step; half a step of margin at an anchored end costs nothing in a full window.
    for width in (2.0, 2.6, 3.2, 4.0, 5.0, 6.5, 8.0, 10.0, 13.0, 18.0):
        k = width / n
        w = (0.0, k, 0.0, 0.0)
        yield w, (-1.0, centre * k, 0.0, 0.0)
        yield w, (-1.0, 0.0, 0.0, 0.0)
        yield w, (0.0, centre * k, -0.5, -0.5)
        for offset in (qmin - 0.5, qmin):
            yield w, (0.0, offset * k, -1.0, 0.0)
        yield w, (0.0, (qmax + 0.5) * k, 0.0, -1.0)
    # The ceiling makes a full window exactly range / 2**b, whatever is asked for: 1 / (n - 1) keeps it alive.
    for width in (n / (n - 1), 1.0, 0.85, 0.7, 0.55, 0.4, 0.28, 0.18):
        k = width / n
        w = (0.0, 0.0, -k, k)
        k = min(k, 1 / n)
        for foot in (0.5, 0.0, 1.0):  # how the window's slack is shared between the two ends
            share = (1 - width if width < 1 else 0.0) * foot
            offset = (qmin - 0.5) * k - share  # beta = -min + offset * range
            yield w, (0.0, 0.0, -1.0 - offset, offset)
            if width >= 1:
                break


def search_coefficients(
    rows: list[Tensor],
    stats: Tensor,
    range_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: tuple[Tensor, Tensor],
    qmin: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Return ``(w, v)``, each ``(4,)``, never worse on the sampled elements than ``start``.

    Args:
        rows: one 1-D tensor a sample.
        stats: ``dls_statistics`` of each, ``(4, rows)``.
        range_of: maps ``w`` and ``v`` of several candidates, ``(4, candidates)``, to alpha and beta, each
            ``(candidates, rows)``.
        start: candidate number one.
    """
    points, weights = sample_rows(rows, 2**13)
    points, weights = points.to(stats.dtype), weights.to(stats.dtype).reshape(-1)
    low, high = stats[2, :, None], stats[3, :, None]
    qmax = qmin + 2**bits - 1

    def errors_of(w: Tensor, v: Tensor) -> Tensor:
        """Squared error of every candidate; NaN (a constant under the published order) loses against anything."""
        errors = []
        for alpha, beta in zip(*range_of(w.T, v.T), strict=True):
            affine = Affine(alpha[:, None], beta[:, None], low, high)
            index = affine_index(points, affine.scale, affine.shift, qmin, qmax)
            error = affine_decode(index, affine, qmin).sub_(points)
            errors.append(torch.dot(error.square_().reshape(-1), weights))
        return torch.stack(errors).nan_to_num(torch.inf, torch.inf)

    table = torch.tensor(list(_windows(qmin, bits)), dtype=stats.dtype, device=stats.device)
    every_w, every_v = torch.cat((torch.stack(start)[None], table)).unbind(1)
    errors = errors_of(every_w, every_v)
    pick = errors.argmin()
    w, v, least = every_w[pick], every_v[pick], errors[pick]

    shift = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=stats.dtype, device=stats.device)
    factor = 1.15
    for _ in range(3):
        step = (factor - 1) * shift / 2 ** (bits - 1)
        every_w = torch.stack((w * factor, w / factor, w, w))
        every_v = torch.stack((v, v, v - step, v + step))
        errors = errors_of(every_w, every_v)
        pick = errors.argmin()
        if bool(errors[pick] < least):
            w, v, least = every_w[pick], every_v[pick], errors[pick]
        else:
            factor = 1 + (factor - 1) / 2
    return w, v
