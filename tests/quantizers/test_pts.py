"""Ranges by position: against plain loops in float64, against autograd, on other sizes, and in bad company."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.errors import CalibrationError, ConfigError, InputError, NotCalibratedError
from ssmquant.quantizers import PTS, MinMax
from ssmquant.quantizers.pts import interpolated, shared_grid
from tests.strategies import bits, learnt

shapes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9))  # samples, channels, positions


def data(shape: tuple[int, ...], seed: int, spread: int = 2) -> Tensor:
    """Float64, of very different ranges along ``spread``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    n = shape[spread]
    factor = torch.logspace(-2, 2, n, dtype=torch.float64) if n > 1 else torch.ones(1, dtype=torch.float64)
    offset = torch.randn(n, generator=g, dtype=torch.float64)
    view = [1] * len(shape)
    view[spread] = n
    return (x + offset.reshape(view)) * factor.reshape(view)


def by_hand(x: Tensor, low: Tensor, high: Tensor, n_bits: int) -> Tensor:
    levels = 2**n_bits - 1
    step = (high - low) / levels
    return low + step * ((x - low) / step).round().clamp(0, levels)


def fitted(x: Tensor | list[Tensor], n_bits: int = 4, *, search: bool = False, **options: Any) -> PTS:
    q = PTS(n_bits, **options).double()
    q.fit(x if isinstance(x, list) else [x], search=search)
    return q.eval()


@given(bits, shapes, st.integers(0, 1000))
def test_each_position_has_the_range_of_its_own_elements(
    n_bits: int, shape: tuple[int, ...], seed: int
) -> None:
    if shape[0] * shape[1] == 1:
        shape = (2, *shape[1:])  # of one element a range is a point
    x = data(shape, seed)
    for q in (fitted(x, n_bits, position_axes=(2,)), PTS(n_bits, position_axes=(2,)).double()):
        if not q.ready:
            q.train()(x)
        for p in range(shape[2]):
            part = x[:, :, p]
            torch.testing.assert_close(
                q.eval()(x)[:, :, p], by_hand(part, part.min(), part.max(), n_bits), rtol=1e-9, atol=1e-12
            )


@given(bits, shapes, st.integers(0, 1000))
def test_the_search_is_the_published_sweep(n_bits: int, shape: tuple[int, ...], seed: int) -> None:
    x = data((2, *shape[1:]), seed) ** 3  # at most 64 elements a position: nothing is left out
    q = fitted(x, n_bits, search=True, position_axes=(2,))
    for p in range(shape[2]):
        part = x[:, :, p]
        middle, half = (part.max() + part.min()) / 2, (part.max() - part.min()) / 2
        errors = [
            float((by_hand(part, middle - half * r, middle + half * r, n_bits) - part).abs().pow(2.4).sum())
            for r in (torch.arange(1, 101, dtype=torch.float64) / 100)
        ]
        mine = float((q(x)[:, :, p] - part).detach().abs().pow(2.4).sum())
        assert mine == pytest.approx(min(errors), rel=1e-6, abs=1e-12)


@given(bits, shapes, st.integers(0, 1000))
def test_one_position_is_one_range_for_the_tensor(n_bits: int, shape: tuple[int, ...], seed: int) -> None:
    x = data(shape, seed)
    plain = MinMax(n_bits).double()
    plain.fit([x])
    wanted = plain.eval()(x)
    assert torch.equal(fitted(x, n_bits)(x), wanted)
    torch.testing.assert_close(fitted(x, n_bits, position_axes=(2,), positions=1)(x), wanted)
    assert torch.equal(fitted(x[..., None], n_bits, position_axes=(3,))(x[..., None])[..., 0], wanted)
    assert fitted(x, n_bits).static_affine() is not None
    assert fitted(x, n_bits, position_axes=(2,)).static_affine() is None


@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 300))
def test_grids_hold_what_they_may(sizes: list[int], most: int) -> None:
    grid = shared_grid(sizes, most)
    assert math.prod(grid) <= most
    assert all(1 <= g <= s for g, s in zip(grid, sizes, strict=True))
    assert (grid == tuple(sizes)) == (math.prod(sizes) <= most)
    cut = [(g, s) for g, s in zip(grid, sizes, strict=True) if g < s]
    assert len({g for g, _ in cut}) <= 1
    if cut:  # one cell more along each of those axes would not fit
        assert math.prod(min(s, cut[0][0] + 1) for s in sizes) > most


@given(st.integers(17, 40), st.integers(17, 40), st.integers(0, 100))
def test_larger_images_share_cells_that_hold_their_extremes(h: int, w: int, seed: int) -> None:
    x = data((2, 3, h, w), seed)
    q = fitted(x, 8, position_axes=(2, 3))
    assert q._grid == (16, 16)
    step, foot = (t.detach().reshape(16, 16) for t in (q.alpha, q.beta))
    rows, cols = torch.arange(h) * 16 // h, torch.arange(w) * 16 // w
    low, high = -foot[rows][:, cols], (255 * step - foot)[rows][:, cols]
    assert (x >= low - 1e-9 * high.abs()).all()
    assert (x <= high + 1e-9 * high.abs()).all()


def test_an_axis_of_few_positions_keeps_them() -> None:
    q = fitted(data((1, 4, 5, 300), 0), position_axes=(1, 3))  # directions, a sequence
    assert q._grid == (4, 64)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_interpolation_by_hand(g: int, k: int, h: int, w: int) -> None:
    def along(n: int, m: int) -> Tensor:  # (m, n): rows of weights
        at = ((torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5).clamp(0, n - 1)
        below = at.long()
        part = at - below
        out = torch.zeros(m, n, dtype=torch.float64)
        out[torch.arange(m), below] += 1 - part
        out[torch.arange(m), (below + 1).clamp(max=n - 1)] += part
        return out

    table = torch.randn(g, k, dtype=torch.float64)
    torch.testing.assert_close(interpolated(table, (h, w)), along(g, h) @ table @ along(k, w).T)
    torch.testing.assert_close(interpolated(table[:, 0], (h,)), along(g, h) @ table[:, 0])


def test_other_sizes_have_ranges_in_between() -> None:
    x = data((2, 6, 8, 8), 0)
    q = fitted(x, 8, position_axes=(2, 3))
    larger = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
    y = q(larger)
    assert (y - larger).abs().max() <= 0.05 * larger.abs().max()
    assert q(x[..., :3, :5]).shape == (2, 6, 3, 5)
    assert torch.equal(q(x), fitted(x, 8, position_axes=(2, 3))(x))  # what other sizes asked changed nothing


@given(shapes, st.integers(0, 100))
def test_samples_do_not_see_each_other(shape: tuple[int, ...], seed: int) -> None:
    x = data(shape, seed)
    q = fitted(x, position_axes=(2,))
    assert torch.equal(torch.cat([q(one[None]) for one in x]), q(x))
    apart = fitted([one[None] for one in x], position_axes=(2,))
    assert torch.equal(apart.alpha, q.alpha)
    assert torch.equal(apart.beta, q.beta)


def test_batches_of_other_sizes_calibrate_together() -> None:
    a, b = data((2, 3, 12, 5), 0), data((1, 3, 6, 9), 1)
    q = fitted([a, b], 8, position_axes=(2, 3))
    assert q._grid == (6, 5)
    for x in (a, b):
        assert q(x).isfinite().all()


@given(st.permutations([0, 1, 2, 3]), st.booleans())
def test_the_order_of_axes_does_not_matter(order: list[int], negative: bool) -> None:
    x = data((2, 3, 4, 5), 0)  # positions are its last two axes
    axes = [order.index(2), order.index(3)]
    axes = [a - 4 for a in axes] if negative else axes
    q = fitted(x.permute(order), position_axes=axes)
    wanted = fitted(x, position_axes=(2, 3))
    torch.testing.assert_close(q(x.permute(order)), wanted(x).permute(order))
    y = q.encode(x.permute(order))
    assert torch.equal(y.decode(), q(x.permute(order)))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_factors_of_channels_after_the_fact(count: int) -> None:
    x, gain = data((count, 7, 5), 0), 2.0 ** torch.randint(-3, 4, (5,))
    q = PTS(4, position_axes=(1,)).double()
    sample = q.sample(x, 2)
    q.fit([sample.scaled(gain)], search=False)
    wanted = fitted(x * gain, position_axes=(1,))
    assert torch.equal(q.alpha, wanted.alpha)
    assert torch.equal(q.beta, wanted.beta)


def test_calibration_keeps_little_of_a_batch() -> None:
    x = torch.randn(8, 128, 128, 64)
    s = PTS(4, position_axes=(1, 2)).sample(x)
    assert s.picks.shape == (64, 16, 16)
    assert s.share * s.picks.numel() == x.numel()
    assert s.low.amin() == x.amin()
    assert s.high.amax() == x.amax()
    assert PTS(4, position_axes=(1, 2)).sample(x, 3).low.shape == (64, 16, 16)


@pytest.mark.parametrize("channel_axis", [None, 1])
def test_a_sample_stays_what_it_was_when_the_value_is_written_to(channel_axis: int | None) -> None:
    x = torch.randn(1, 3, 4, 5)
    s = PTS(4, position_axes=(2, 3)).sample(x, channel_axis)
    before = s.low.clone(), s.high.clone(), s.picks.clone()
    x.mul_(100)
    for now, was in zip((s.low, s.high, s.picks), before, strict=True):
        assert torch.equal(now, was)


def test_a_sample_of_much_data_clips_as_all_of_it() -> None:
    """Extremes are no more than the elements that they are, in the search."""
    torch.manual_seed(0)
    x = torch.randn(150, 2, 64) ** 3
    q = PTS(3, position_axes=(1,))
    q.fit([x])
    low, high = x.amin((0, 2)), x.amax((0, 2))
    middle, half = (high + low) / 2, (high - low) / 2
    errors = [
        (by_hand(x, (middle - half * r)[:, None], (middle + half * r)[:, None], 3) - x)
        .abs()
        .pow(2.4)
        .sum((0, 2))
        for r in torch.arange(1, 101) / 100
    ]
    mine = (q.eval()(x) - x).abs().pow(2.4).sum((0, 2))
    assert (mine < 1.15 * torch.stack(errors).amin(0)).all()
    assert (mine < 0.8 * errors[-1]).all()


@given(bits, shapes, st.integers(0, 100))
def test_gradients_by_autograd(n_bits: int, shape: tuple[int, ...], seed: int) -> None:
    x = data((*shape[:2], shape[2] + 1), seed)
    q = learnt(fitted(x, n_bits, position_axes=(2,)), seed + 1)
    q.scale_gradient = bool(seed % 2)
    cells, top = x.shape[2], 2**n_bits - 1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn_like(x)
    y = q.train()(a)
    (y * upstream).sum().backward()
    alpha, beta = (t.detach()[:cells].clone().requires_grad_() for t in (q.alpha, q.beta))
    u = ((b + beta) / alpha).clamp(0, top)
    want = (u + (u.round() - u).detach()) * alpha - beta
    torch.testing.assert_close(y, want)
    (want * upstream).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert q.alpha.grad is not None
    assert q.beta.grad is not None
    assert alpha.grad is not None
    factor = 1 / math.sqrt(x.numel() / cells * top) if seed % 2 else 1.0
    torch.testing.assert_close(q.alpha.grad[:cells], alpha.grad * factor)
    torch.testing.assert_close(q.beta.grad[:cells], beta.grad, atol=1e-9, rtol=1e-7)
    assert not q.alpha.grad[cells:].any()


def test_gradients_reach_the_table_through_interpolation() -> None:
    x = data((1, 3, 6), 0)
    q = fitted(x, position_axes=(2,)).train()
    q(torch.cat((x, x), 2)).square().sum().backward()
    assert q.alpha.grad is not None
    assert (q.alpha.grad[:6] != 0).any()
    assert q.alpha.grad.isfinite().all()


def test_a_cell_of_one_value_keeps_it_and_takes_others_too() -> None:
    x = data((3, 4, 5), 0)
    x[:, :, 2] = 7.0
    q = fitted(x, 4, position_axes=(2,))
    torch.testing.assert_close(q(x)[:, :, 2], x[:, :, 2])
    step = q.alpha[2]
    for off in (-3.0, 3.0):
        y = q(x + off * step.detach())[:, :, 2]
        torch.testing.assert_close(y, x[:, :, 2] + off * step.detach())


def test_states_travel() -> None:
    x = data((2, 3, 6, 7), 0)
    q = learnt(fitted(x, position_axes=(2, 3)))
    other = PTS(4, position_axes=(2, 3)).double().eval()
    other.load_state_dict(q.state_dict())
    for copied in (other, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(copied(x), q(x))
    assert other._grid == (6, 7)
    assert other.constants() == q.constants() != PTS(4, position_axes=(2, 3)).constants()
    with torch.no_grad():  # as a broadcast does
        fresh = PTS(4, position_axes=(2, 3)).double().eval()
        for mine, theirs in zip(fresh.state_dict().values(), q.state_dict().values(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(fresh(x), q(x))
    q.reset()
    assert q._grid == (1, 1)
    with pytest.raises(NotCalibratedError):
        q(x)


@pytest.mark.parametrize("grid", [[0.0, 3.0], [17.0, 16.0], [-1.0, 2.0], [float("nan"), 1.0], [1e30, 1.0]])
def test_grids_that_cannot_be(grid: list[float]) -> None:
    state = fitted(data((2, 3, 6, 7), 0), position_axes=(2, 3)).state_dict()
    state["grid"] = torch.tensor(grid)
    with pytest.raises(RuntimeError, match="256 positions cannot be a grid"):
        PTS(4, position_axes=(2, 3)).load_state_dict(state)


@pytest.mark.parametrize("positions", [0, -1, 2.0, True, 2**20])
def test_bad_numbers_of_positions(positions: Any) -> None:
    with pytest.raises(ConfigError, match="positions"):
        PTS(4, position_axes=(1,), positions=positions)


def test_bad_arguments_and_data() -> None:
    for axes in ((1, 1), (0, 1, 2, 3)):
        with pytest.raises(ConfigError, match="position_axes"):
            PTS(4, position_axes=axes)
    with pytest.raises(ConfigError, match="no groups"):
        PTS(4, position_axes=(1,), axis=0, num_groups=3)
    x = torch.randn(2, 3, 4)
    q = PTS(4, position_axes=(1, 3))
    with pytest.raises(InputError, match="positions in axes"):
        q.train()(x)
    with pytest.raises(InputError, match="positions in axes"):
        PTS(4, position_axes=(1, -2)).train()(x)
    for bad in (torch.nan, torch.inf):
        x[0, 1, 2] = bad
        q = PTS(4, position_axes=(1,))
        for call in (q.train(), q.initialize, lambda t, q=q: q.fit([t])):
            with pytest.raises(CalibrationError, match="inf or NaN"):
                call(x)
        assert not q.ready
    with pytest.raises(CalibrationError, match="not empty"):
        PTS(4, position_axes=(1,)).fit([torch.zeros(0, 3, 4)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 6).to(dtype)
    q = PTS(4, position_axes=(1,))
    q.fit([x])
    y = q.eval()(x)
    assert y.dtype == dtype
    assert torch.equal(y.float(), q(x.float()).to(dtype).float())
    strided = torch.stack((x, x), -1)[..., 0]
    assert torch.equal(q(strided), y)
    assert q(x[:0]).shape == (0, 8, 6)


def test_zeros_say_nothing() -> None:
    zeros = torch.zeros(2, 3, 4)
    q = PTS(4, position_axes=(1,)).train()
    assert torch.equal(q(zeros), zeros)
    q.fit([zeros])
    assert not q.ready


def test_three_axes() -> None:
    x = data((2, 3, 3, 4, 5), 0)
    q = fitted(x, 8, position_axes=(2, 3, 4))
    assert q._grid == (3, 4, 5)
    part = x[:, :, 1, 2, 3]
    torch.testing.assert_close(q(x)[:, :, 1, 2, 3], by_hand(part, part.min(), part.max(), 8))
    assert q(x[:, :, :2, :, :3]).shape == (2, 3, 2, 4, 3)
