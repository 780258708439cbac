"""One choice a unit, the least summed loss under two budgets: the multiple-choice knapsack of a mixed precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["allocate", "prices"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_KEPT = 2**11
_STEPS = 1000


def prices(loss: Floats, cost: Floats, steps: int = _STEPS) -> tuple[Floats, float]:
    """Multipliers of the budgets that make the Lagrangian bound large, and that bound, by subgradients.

    Args:
        loss: (units, widths).
        cost: shares of the budgets that each choice takes, (budgets, units, widths).

    Returns:
        Multipliers (budgets,), 0 or more, and a loss that no choice within the budgets falls below.
    """
    span = max(float((loss.max(1) - loss.min(1)).sum()), np.finfo(np.float64).tiny)
    now = best = np.zeros(len(cost))
    bound = float(loss.min(1).sum())
    units = np.arange(len(loss))
    for step in range(1, steps + 1):
        priced = loss + np.tensordot(now, cost, 1)
        choice = priced.argmin(1)
        value = float(priced[units, choice].sum() - now.sum())
        if value > bound or step == 1:
            best, bound = now, max(value, bound)
        over = cost[:, units, choice].sum(1) - 1
        # Prices span many orders of magnitude, so steps are relative to them, with something to start from.
        now = np.maximum(0, now + (now + span / step) * over / np.sqrt(step))
    return best, bound


def allocate(
    loss: Floats, size: Integers, work: Integers, budget: tuple[int, int], *, kept: int = _KEPT
) -> Integers | None:
    """The choice of the least summed loss whose summed sizes and works are within the budget.

    Units are decided one by one, large ones first, and of the partial choices those ``kept`` go on whose Lagrangian
    bound (:func:`prices`) is least: all of them, so that the result is the optimum, where there are no more. A uniform
    choice that fits is never better than the result.

    Args:
        loss, size, work: (units, widths), widths ascending; sizes and works must not fall with the width.
        budget: Largest sums of sizes and of works.

    Returns:
        Index of the width of every unit, (units,); None where not even the smallest widths fit.
    """
    units, widths = loss.shape
    costs = np.stack([size, work])
    room = np.array(budget) - costs[:, :, 0].sum(1)
    if (room < 0).any():
        return None
    # Over the smallest widths, so that what is left to decide can cost nothing.
    spare = costs - costs[:, :, :1]
    share = spare / np.maximum(room, 1)[:, None, None]
    price, _ = prices(loss, share)
    priced = loss + np.tensordot(price, share, 1)
    rest = priced.min(1)  # what a unit adds to the bound at least
    total, bound, used = np.zeros(1), np.zeros(1), np.zeros((2, 1), dtype=np.int64)
    steps: list[tuple[Any, Any]] = []
    order = np.argsort(-share[:, :, -1].max(0), kind="stable")
    for unit in order:
        used = (used[:, :, None] + spare[:, unit, None, :]).reshape(2, -1)
        total = (total[:, None] + loss[unit]).ravel()
        bound = (bound[:, None] + (priced[unit] - rest[unit])).ravel()
        go_on = np.flatnonzero((used <= room[:, None]).all(0))
        if len(go_on) > kept:
            go_on = np.sort(go_on[np.argsort(bound[go_on], kind="stable")[:kept]])
        steps.append((go_on // widths, go_on % widths))
        total, bound, used = total[go_on], bound[go_on], used[:, go_on]
    at = np.lexsort((used[1], used[0], total))[0]
    least = float(total[at])
    best = np.zeros(units, dtype=np.int64)
    for unit, (parent, width) in zip(order[::-1], reversed(steps), strict=True):
        best[unit], at = width[at], parent[at]
    for width in range(widths):
        if (spare[:, :, width].sum(1) <= room).all() and float(loss[:, width].sum()) < least:
            least, best = float(loss[:, width].sum()), np.full(units, width, dtype=np.int64)
    return best
