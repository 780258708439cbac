"""Observers of static ranges: what holds for all of them, and each against a plain reference in float64."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ssmquant
from ssmquant import QConfig
from ssmquant.errors import CalibrationError, ConfigError
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers import MinMax
from ssmquant.quantizers.minmax import OBSERVERS
from ssmquant.quantizers.ranges import BINS, ascending, divergence, kl_range, mse_range, observe, tally
from tests.small import Scanner, images
from tests.strategies import BITS, samples, tensors

observers = st.sampled_from(OBSERVERS)


def fitted(observer: str, n_bits: int, *batches: Tensor, **options: Any) -> MinMax:
    q = MinMax(n_bits, observer=observer, **options)
    if batches[0].dtype == torch.float64:
        q.double()
    q.fit(batches)
    return q.eval()


def ends(q: MinMax) -> tuple[float, float]:
    return float(q.low[0]), float(q.high[0])


def heavy(seed: int = 0, n: int = 6000) -> Tensor:
    """Cubed Gaussians: a long tail on both sides, another one on the right."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(x > 0, 2.0, 1.0) * x**3


# ---- what holds for all ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    x=tensors(st.lists(st.integers(1, 30), min_size=1, max_size=2).map(tuple)),
    observer=observers,
    n=st.sampled_from(BITS),
)
def test_ranges_are_within_the_extremes(x: Tensor, observer: str, n: int) -> None:
    for is_weight in (False, True):
        q = fitted(observer, n, x, is_weight=is_weight)
        low, high = ends(q)
        assert float(x.min()) <= low <= high <= float(x.max())
        assert q.ready
        assert q(x).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(x=samples(), observer=observers, shift=st.integers(-20, 20), n=st.sampled_from((2, 4, 8)))
def test_ranges_follow_the_scale(x: Tensor, observer: str, shift: int, n: int) -> None:
    c = 2.0**shift
    x = x.repeat(1, 1, 10)
    for is_weight in (False, True):
        a, b = (fitted(observer, n, v, is_weight=is_weight) for v in (x, c * x))
        assert ends(b) == pytest.approx([c * e for e in ends(a)], rel=1e-9)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [3.0, -0.5])
@pytest.mark.parametrize("n", [1, 5000])
def test_constant_data(observer: str, value: float, n: int) -> None:
    x = torch.full((n,), value)
    for is_weight in (False, True):
        q = fitted(observer, 8, x, is_weight=is_weight)
        torch.testing.assert_close(q(x), x)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_zeros_say_nothing(observer: str) -> None:
    q = fitted(observer, 4, torch.zeros(5000))
    assert not q.ready
    q.fit([torch.zeros(10), torch.tensor([-1.0, 1.0])])
    low, high = ends(q)
    assert (low, high) == pytest.approx((-0.1, 0.1) if observer == "ema" else (-1, 1), rel=0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_bad_data(observer: str) -> None:
    q = MinMax(4, observer=observer)
    for batches in (
        [],
        [torch.empty(0)],
        [torch.tensor([1.0, math.nan])],
        [torch.ones(3), torch.tensor([math.inf])],
    ):
        with pytest.raises(CalibrationError):
            q.fit(batches)
    assert not q.ready


@pytest.mark.parametrize(("observer", "cuts"), [("minmax", False), ("ema", False), ("percentile", False), ("mse", True),
                                                ("kl", True)])  # fmt: skip
def test_one_outlier(observer: str, cuts: bool) -> None:
    x = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    x[17] = 60.0
    low, high = ends(fitted(observer, 4, x))
    assert (high < 20) == cuts
    assert -5 < low < -1.5


@settings(max_examples=10, deadline=None)
@given(
    observer=observers,
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_kinds_of_tensors(observer: str, seed: int, dtype: torch.dtype) -> None:
    x = heavy(seed, 4000).reshape(40, 100).to(dtype)
    expected = ends(fitted(observer, 4, x.float()))
    assert ends(fitted(observer, 4, x)) == expected
    assert ends(fitted(observer, 4, x.t().contiguous().t())) == expected


@pytest.mark.parametrize("observer", OBSERVERS)
def test_groups_are_apart(observer: str) -> None:
    w = torch.stack([heavy(g, 3000) * 10.0**g for g in range(3)])
    together = fitted(observer, 4, w.T.clone(), axis=1, num_groups=3, is_weight=True)
    for g, row in enumerate(w):
        alone = fitted(observer, 4, row, is_weight=True)
        assert (together.low[g], together.high[g]) == (alone.low[0], alone.high[0])


@pytest.mark.parametrize(
    "options",
    [{"observer": "median"}, {"observer": 3}, {"observer": "mse", "percentile": 0.99}, {"momentum": 0.1},
     {"observer": "ema", "momentum": 0}, {"observer": "ema", "momentum": 1.5}, {"percentile": 0.5},
     {"observer": "percentile", "percentile": True}],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MinMax(4, **options)


def test_a_percentile_names_its_observer() -> None:
    assert MinMax(4, percentile=0.9).observer == "percentile"
    assert MinMax(4, observer="percentile").percentile == 0.99999
    assert MinMax(4).observer == "minmax"


# ---- each by itself --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(x=samples(), share=st.floats(0.51, 1.0), other=st.floats(0.51, 1.0))
def test_percentiles(x: Tensor, share: float, other: float) -> None:
    low, high = ends(fitted("percentile", 8, x[:1], x[1:], percentile=share))
    expected = np.quantile(x.numpy(), [1 - share, share])
    assert (low, high) == pytest.approx(list(expected), rel=1e-9, abs=1e-12)
    wider = ends(fitted("percentile", 8, x, percentile=max(share, other)))
    assert wider[0] <= low + 1e-12
    assert wider[1] >= high - 1e-12


def test_moving_averages() -> None:
    batches = [torch.randn(50, dtype=torch.float64) for _ in range(5)]
    q = fitted("ema", 8, *batches, momentum=0.3)
    low, high = float(batches[0].min()), float(batches[0].max())
    for b in batches[1:]:
        low, high = 0.7 * low + 0.3 * float(b.min()), 0.7 * high + 0.3 * float(b.max())
    assert ends(q) == pytest.approx((low, high), rel=1e-12)
    assert ends(fitted("ema", 8, *batches, momentum=1.0)) == (
        float(batches[-1].min()),
        float(batches[-1].max()),
    )
    w = heavy()
    assert ends(fitted("ema", 8, w, is_weight=True)) == ends(fitted("minmax", 8, w, is_weight=True))


@settings(max_examples=40, deadline=None)
@given(x=samples(), n=st.sampled_from(BITS), is_weight=st.booleans())
def test_squared_errors_are_never_worse(x: Tensor, n: int, is_weight: bool) -> None:
    plain, best = (fitted(o, n, x, is_weight=is_weight) for o in ("minmax", "mse"))
    assert (best(x) - x).square().sum() <= (plain(x) - x).square().sum() * (1 + 1e-9)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("is_weight", [False, True])
def test_squared_errors_are_least(n: int, is_weight: bool) -> None:
    """Against a plain search of all pairs of ends."""
    x = heavy(3, 800)
    q = fitted("mse", n, x, is_weight=is_weight)
    least = math.inf
    for a in np.linspace(0, 1, 40)[1:] ** 2:
        for b in [a] if is_weight else np.linspace(0, 1, 40)[1:] ** 2:
            top = float(x.abs().max()) if is_weight else 0.0
            low, high = (-top * a, top * a) if is_weight else (float(x.min()) * a, float(x.max()) * b)
            scale = high / q.qmax if is_weight else (high - low) / (2**n - 1)
            shift = 0.0 if is_weight else -low
            y = ((x + shift) / scale).round().clamp(q.qmin, q.qmax) * scale - shift
            least = min(least, float((y - x).square().sum()))
    assert float((q(x) - x).square().sum()) <= 1.02 * least


def test_squared_errors_of_weighted_points() -> None:
    x = heavy(1, 500)
    twice = torch.stack((x, torch.full_like(x, 2.0)))[:, None]
    a = mse_range(*ascending([twice]), 0, 15, symmetric=False)
    b = mse_range(
        *ascending([torch.stack((x.repeat(2), torch.ones(1000, dtype=x.dtype)))[:, None]]),
        0,
        15,
        symmetric=False,
    )
    torch.testing.assert_close(torch.stack(a), torch.stack(b))


# ---- entropy calibration ---------------------------------------------------------------------------------------------


def plain_divergence(histogram: list[float], start: int, stop: int, levels: int) -> float:
    """Migacz 2017, in loops."""
    window = histogram[start:stop]
    n = len(window)
    p = list(window)
    p[0] += sum(histogram[:start])
    p[-1] += sum(histogram[stop:])
    q = [0.0] * n
    for level in range(levels):
        bins = [i for i in range(n) if i * levels // n == level]
        filled = [i for i in bins if window[i] > 0]
        for i in filled:
            q[i] = sum(window[j] for j in bins) / len(filled)
    if not any(q):
        return math.inf
    out = []
    for counts in (p, q):
        empty = sum(c == 0 for c in counts)
        taken = 1e-4 * empty / (n - empty)
        smooth = [1e-4 if c == 0 else c - taken for c in counts]
        out.append([c / sum(smooth) for c in smooth])
    return sum(a * math.log(a / b) for a, b in zip(*out, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 40]), min_size=12, max_size=40), levels=st.sampled_from([2, 4, 8]),
    data=st.data(),
)  # fmt: skip
def test_divergence_of_a_window(counts: list[int], levels: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(counts) - levels))
    stop = data.draw(st.integers(start + levels, len(counts)))
    found = divergence(
        torch.tensor(counts, dtype=torch.float64),
        torch.tensor([start, 0]),
        torch.tensor([stop, len(counts)]),
        levels,
    )
    expected = [plain_divergence(counts, *w, levels) for w in ((start, stop), (0, len(counts)))]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [4, 8])
def test_entropy_calibration_of_one_sided_data(n: int, symmetric: bool) -> None:
    """What is published: a histogram from 0, and the threshold of the least divergence of all."""
    x = heavy(5, 9000).abs()
    x[:5000] = 0.0  # as behind a ReLU
    top = float(x.max())
    levels = 2 ** (n - 1) if symmetric else 2**n
    histogram = np.histogram(x.numpy(), BINS, (0, top))[0].tolist()
    stops = [s for s in range(BINS, levels - 1, -16)]
    errors = [plain_divergence(histogram, 0, s, levels) for s in stops[::8]]  # every 128 bins, for time
    points = ascending([torch.stack((x, torch.ones_like(x)))[:, None]])
    low, high = kl_range(*points, n, symmetric=symmetric)
    assert float(low[0]) == 0.0
    stop = round(float(high[0]) / top * BINS)
    assert stop in stops
    assert plain_divergence(histogram, 0, stop, levels) <= min(errors) * (1 + 1e-9)
    assert stop < BINS


def test_entropy_calibration_is_deterministic_and_two_sided() -> None:
    x = heavy(2, 20_000)
    first, second = (ends(fitted("kl", 4, x)) for _ in range(2))
    assert first == second
    assert float(x.min()) < first[0] < 0 < first[1] < float(x.max())
    few = x[: BINS - 1]
    assert ends(fitted("kl", 4, few)) == (float(few.min()), float(few.max()))


# ---- what calibration keeps ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 3000),
    limit=st.integers(1, 4000),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_points_stand_for_all(rows: int, n: int, limit: int, ties: bool, seed: int) -> None:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    x = x.relu() if ties else x
    points, weights = observe(x, limit)
    assert points.numel() <= max(limit, 4 * rows)
    assert torch.equal(points.amax(1), x.amax(1))
    assert torch.equal(points.amin(1), x.amin(1))
    torch.testing.assert_close(weights.sum(1), torch.full((rows,), float(n)))
    if points.shape[1] > 500:
        at_zero = (weights * (points == 0)).sum(1) / n
        assert (at_zero - (x == 0).float().mean(1)).abs().max() < 0.1


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), n=st.integers(1, 3000), limit=st.integers(1, 900), seed=st.integers(0, 99))
def test_tallies_count_all(rows: int, n: int, limit: int, seed: int) -> None:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    x[0] = 0.7  # all in one place
    points, weights = tally(x, limit)
    assert torch.equal(weights.sum(1), torch.full((rows,), float(n)))
    assert torch.equal(points.amax(1), x.amax(1))
    assert torch.equal(points.amin(1), x.amin(1))
    if n > 500 and limit > 500:
        assert ((weights * points).sum(1) / n - x.mean(1)).abs().max() < 0.05


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("channels", [None, 6])
def test_extremes_of_batches_count_exactly(observer: str, channels: int | None) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 6, 70, 90) * torch.logspace(-1, 1, 6)[:, None, None] for _ in range(3)]
    batches[1][0, 2, 31, 17] = 300.0  # one in 226800, which no sample has
    wrapper = ActivationQuantizer(
        "x", MinMax(8, observer=observer), None if channels is None else (1, channels)
    )
    wrapper.start()
    for b in batches:
        wrapper(b)
    wrapper.finish(smooth=0.5)
    seen = [wrapper.scaled(b) for b in batches]
    q = wrapper.quantizer
    assert isinstance(q, MinMax)
    low, high = min(float(s.min()) for s in seen), max(float(s.max()) for s in seen)
    if observer == "minmax":
        assert ends(q) == (low, high)
        return
    assert low <= ends(q)[0] < ends(q)[1] <= high
    whole = fitted(observer, 8, *seen)
    assert ends(q) == pytest.approx(ends(whole), rel={"kl": 0.2, "mse": 0.1}.get(observer, 1e-3))


def test_far_percentiles_are_exact() -> None:
    x = torch.randn(3, 400_000)
    wrapper = ActivationQuantizer("x", MinMax(8, percentile=0.9999))
    wrapper.start()
    for row in x:
        wrapper(row)
    wrapper.finish()
    assert isinstance(wrapper.quantizer, MinMax)
    assert ends(wrapper.quantizer) == pytest.approx(list(np.quantile(x.numpy(), [0.0001, 0.9999])), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e300])  # the last one has no place in float32
def test_nan_and_inf_name_their_site(value: float) -> None:
    wrapper = ActivationQuantizer("block.3.in", MinMax(8, observer="minmax"))
    wrapper.start()
    with pytest.raises(CalibrationError, match=r"block\.3\.in"):
        wrapper(torch.tensor([1.0, value], dtype=torch.float64))


# ---- in models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_models_with_observers(observer: str) -> None:
    torch.manual_seed(0)
    options = {"observer": observer}
    config = QConfig.minmax(
        8, 6, activation_options=options, scan_options=options, weight_options=options, smooth=0.5
    )
    assert QConfig.from_json(config.to_json()) == config
    x = images(2, 3, 40, 40)
    model = Scanner().eval()
    prepared = ssmquant.prepare(model, config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x, 0.5 * x]).eval()
    quantizers = [m for m in runtime_of(prepared).modules() if isinstance(m, MinMax)]
    assert quantizers
    assert {q.observer for q in quantizers} == {observer}
    y, exact = prepared(x), model(x)
    assert (y - exact).norm() < 0.1 * (exact - x).norm() + 0.05 * exact.norm()
    for again in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(again(x), y)
        assert all(m.observer == observer for m in runtime_of(again).modules() if isinstance(m, MinMax))
    other = ssmquant.prepare(model, config, example_inputs=(x,)).eval()
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(other(x), y)
    assert ssmquant.verify(prepared, ssmquant.convert(prepared), x).worst_rel < 1e-4


def test_the_observer_is_no_search() -> None:
    """``initialization="published"`` takes nothing away from an observer that was asked for."""
    torch.manual_seed(0)
    options = {"observer": "mse"}
    changes = {"activation_options": options, "scan_options": options, "weight_options": options}
    x, model = images(2, 3, 12, 12), Scanner().eval()
    states = []
    for initialization in ("mse", "published"):
        config = QConfig.minmax(3, 3, initialization=initialization, **changes)
        states.append(
            ssmquant.calibrate(ssmquant.prepare(model, config, example_inputs=(x,)), [x]).state_dict()
        )
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert torch.equal(a, b) or bool(a.isnan().any())
