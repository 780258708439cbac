"""Statistics that the quantizers start from: per group, on request reduced over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ssmquant.errors import CalibrationError, InputError

__all__ = ["GroupStats", "collect", "group_rows", "sample_rows"]

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class GroupStats:
    """Per-group statistics, each of shape ``(groups,)``; ``count`` is the number of elements of one group."""

    abs_mean: Tensor
    min: Tensor
    max: Tensor
    count: int

    def require_finite(self, what: str) -> None:
        """Raise :class:`CalibrationError` unless every statistic is finite (synchronises with the host)."""
        if not bool(torch.isfinite(torch.stack((self.abs_mean, self.min, self.max))).all()):
            raise CalibrationError(
                f"{what}: the initialisation data hold inf or NaN; look for the first layer that produces them "
                "(an overflow in half precision is the usual cause) and calibrate in float32"
            )


def group_rows(x: Tensor, axis: int | None, groups: int = 1) -> Tensor:
    """View or copy ``x`` as ``(groups, elements)``, one row for every index along ``axis`` (None: one row).

    Raises:
        InputError: ``x`` lacks that axis, or it does not have ``groups`` entries (``groups`` 0: any number).
    """
    if axis is None:
        return x.reshape(1, -1)
    if not -x.dim() <= axis < x.dim():
        raise InputError(f"axis {axis} is out of range for a tensor of shape {tuple(x.shape)}")
    if groups and x.shape[axis] != groups:
        raise InputError(
            f"axis {axis} of shape {tuple(x.shape)} has {x.shape[axis]} entries, not num_groups={groups}"
        )
    moved = x.movedim(axis, 0)
    return moved.reshape(moved.shape[0], x.numel() // max(moved.shape[0], 1))


@torch.no_grad()
def collect(x: Tensor, axis: int | None, groups: int, *, reduce: bool) -> GroupStats:
    """Measure ``x``; with ``reduce`` over all ranks, which must then all call this, an empty ``x`` included.

    Sums run in float64, so that the order of summation and the number of ranks hardly matter.
    """
    rows = group_rows(x.detach(), axis, groups)
    count = rows.shape[1]
    if count:
        total = rows.abs().sum(1, dtype=torch.float64)
        low, high = (t.double() for t in rows.aminmax(dim=1))
    else:
        total = torch.zeros(groups, dtype=torch.float64, device=x.device)
        low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
    if reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = torch.cat((total, total.new_tensor([count])))
        ends = torch.cat((low, -high))
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        dist.all_reduce(ends, op=dist.ReduceOp.MIN)
        total, count = sums[:-1], int(sums[-1])
        low, high = ends[:groups], -ends[groups:]
    return GroupStats(total / max(count, 1), low, high, count)


_ENDS = 64


@torch.no_grad()
def sample_rows(rows: Sequence[Tensor], limit: int) -> tuple[Tensor, Tensor]:
    """Pick at most about ``limit`` elements of all ``rows`` together, always with each row's extremes.

    A few outliers can dominate a squared error but would hardly ever be among the picked elements; therefore the k
    smallest and k largest are kept apart, each weighted as the one element that it is. The picks follow a golden-ratio
    sequence: deterministic, and unlike a constant stride it cannot fall in step with a channel count.

    Args:
        rows: non-empty 1-D tensors.
        limit: bound on the number of elements; every row gets at least 32.

    Returns:
        points ``(rows, picks + 2 k)`` and their weights, each in the rows' compute dtype; a row's weights sum to its
        number of elements, so weighted sums of squares estimate the sum over the whole row.
    """
    picks = max(32, limit // len(rows))
    picks = min(picks, max(r.numel() for r in rows))
    ends = max(1, min(_ENDS, picks // 16))
    steps = torch.arange(picks, dtype=torch.float64, device=rows[0].device)
    spread = (steps * _GOLDEN) % 1.0
    points, weights = [], []
    for row in rows:
        n = row.numel()
        index = (steps % n if n <= picks else spread * n).long()
        chosen = row[index]
        chosen = chosen.float() if chosen.dtype in (torch.float16, torch.bfloat16) else chosen
        few = n <= picks  # then the picks are the whole row, and its extremes count nothing
        k = 1 if few else ends
        low, high = row.topk(k, largest=False).values, row.topk(k).values
        tail = torch.cat((low, high)).to(chosen.dtype)
        points.append(torch.cat((chosen, tail, tail[:1].expand(2 * (ends - k)))))
        weight = torch.full_like(points[-1], 0.0 if few else 1.0)
        inside = torch.ones_like(chosen)
        if not few:  # what stands among the extremes is not counted again
            inside = ((chosen > tail[:k].max()) & (chosen < tail[k:].min())).to(chosen.dtype)
            inside = torch.where(inside.any(), inside, torch.ones_like(inside))
        weight[:picks] = inside * ((n if few else n - 2 * k) / inside.sum())
        weights.append(weight)
    return torch.stack(points), torch.stack(weights)
