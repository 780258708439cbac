"""The allocation of widths: against all choices of small problems, and against the bound of large ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssmquant.analysis.knapsack import allocate, prices

WIDTHS = np.array([2, 3, 4, 8])


def problem(seed: int, units: int, widths: int, noise: float = 0.3) -> Any:
    """Losses, sizes and works whose magnitudes spread as those of a model's sites do."""
    rng = np.random.default_rng(seed)
    w = WIDTHS[:widths]
    elements = rng.lognormal(4, 1.5, units).astype(np.int64) + 1
    macs = (elements * rng.lognormal(3, 1.2, units)).astype(np.int64) + 1
    loss = rng.lognormal(0, 2, units)[:, None] * 4.0 ** -(w + rng.normal(0, noise, (units, widths)))
    loss[rng.random(units) < 0.1] = 0
    return np.minimum.accumulate(loss, 1), elements[:, None] * w, macs[:, None] * w * w


def budget(size: Any, work: Any, e: float) -> tuple[int, int]:
    """Of a uniform model of ``e`` bits."""
    return int(size[:, 0].sum() / 2 * e), int(work[:, 0].sum() / 4 * e * e)


def picked(values: Any, choice: Any) -> Any:
    return np.take_along_axis(values, choice[:, None], 1).sum()


problems = st.builds(problem, st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 4))


@given(problems, st.floats(2, 8))
def test_the_optimum_of_small_problems(p: Any, e: float) -> None:
    loss, size, work = p
    most = budget(size, work, e)
    choice = allocate(loss, size, work, most)
    assert choice is not None
    assert picked(size, choice) <= most[0]
    assert picked(work, choice) <= most[1]
    best = min(
        picked(loss, c)
        for c in map(np.array, itertools.product(range(loss.shape[1]), repeat=len(loss)))
        if picked(size, c) <= most[0] and picked(work, c) <= most[1]
    )
    assert np.isclose(picked(loss, choice), best, rtol=1e-12, atol=0)


@given(problems, st.floats(2, 8), st.floats(2, 8))
def test_a_larger_budget_is_never_worse(p: Any, a: float, b: float) -> None:
    loss, size, work = p
    low, high = (allocate(loss, size, work, budget(size, work, e)) for e in sorted((a, b)))
    assert picked(loss, high) <= picked(loss, low) * (1 + 1e-12)


@given(st.integers(0, 2**31), st.sampled_from([2.0, 2.3, 3.0, 3.7, 4.0]), st.integers(2, 4))
def test_few_partial_choices_keep_the_promises(seed: int, e: float, widths: int) -> None:
    """Never over a budget, never worse than a uniform choice, near the bound, the same each time."""
    loss, size, work = problem(seed, 60, widths)
    most = budget(size, work, e)
    choice = allocate(loss, size, work, most, kept=64)
    assert choice is not None
    assert picked(size, choice) <= most[0]
    assert picked(work, choice) <= most[1]
    for width, bits in enumerate(WIDTHS[:widths]):
        if bits <= e:
            assert picked(loss, choice) <= loss[:, width].sum()
    assert np.array_equal(choice, allocate(loss, size, work, most, kept=64))


def test_near_the_bound_where_units_are_many() -> None:
    gaps = []
    for seed in range(6):
        loss, size, work = problem(seed, 150, 3)
        most = budget(size, work, 3.0)
        choice = allocate(loss, size, work, most)
        costs = np.stack([size, work])
        room = np.array(most) - costs[:, :, 0].sum(1)
        bound = prices(loss, (costs - costs[:, :, :1]) / room[:, None, None])[1]
        assert picked(loss, choice) >= bound * (1 - 1e-9)
        gaps.append(picked(loss, choice) / bound - 1)
    assert np.median(gaps) < 0.02
    assert max(gaps) < 0.1


def test_nothing_fits() -> None:
    loss, size, work = problem(0, 4, 3)
    least = int(size[:, 0].sum()), int(work[:, 0].sum())
    assert allocate(loss, size, work, (least[0] - 1, 10**12)) is None
    assert allocate(loss, size, work, (10**12, least[1] - 1)) is None
    assert allocate(loss, size, work, least).tolist() == [0] * 4  # type: ignore[union-attr]
    assert allocate(loss, size, work, (10**12, 10**12)).tolist() == loss.argmin(1).tolist()  # type: ignore[union-attr]
