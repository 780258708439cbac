from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.quantizers import RFA
from ssmquant.quantizers.rfa import MIN_GAP, ordered_grid
from tests.strategies import bits, learnt, make, samples

grids = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=32).map(torch.tensor)


@given(grids)
def test_ordered_grid(grid: Tensor) -> None:
    out = ordered_grid(grid)
    assert (out.diff() >= MIN_GAP * (1 - 1e-2)).all()
    assert (out >= grid).all()
    if (grid.diff() >= 2 * MIN_GAP).all():
        assert torch.equal(out, grid)
    assert torch.equal(ordered_grid(torch.arange(-8.0, 8.0)), torch.arange(-8.0, 8.0))


@given(bits, samples())
def test_fresh_rfa_is_lsq_with_ties_down(n_bits: int, w: Tensor) -> None:
    rfa, lsq = make("rfa", n_bits, w), make("lsq", n_bits, w, is_weight=True)
    assert torch.equal(rfa.encode(w).codes, lsq.encode(w).codes)
    ties = torch.arange(-(2 ** (n_bits - 1)) + 0.5, 2 ** (n_bits - 1) - 1, 1.0)
    with torch.no_grad():
        rfa.get_parameter("alpha").fill_(1.0)
    assert torch.equal(rfa(ties), ties - 0.5)


@given(bits, samples(), st.integers(0, 9), st.sampled_from([0.05, 0.5, 3.0]), st.booleans())
def test_codes_are_those_of_the_thresholds(
    n_bits: int, w: Tensor, seed: int, amount: float, official: bool
) -> None:
    q = make("rfa", n_bits, w, official=official)
    assert isinstance(q, RFA)
    learnt(q, seed, amount / 2 ** (n_bits - 2))
    t = q.thresholds()
    assert t.shape == (2**n_bits - 1,)
    assert (t.diff() >= 0).all()
    assert official or (t.diff() > 0).all()
    alpha, beta = q.alpha.detach(), q.beta.detach()
    u = ((w + beta) / alpha).clamp(q.qmin, q.qmax)
    assert torch.equal(q.encode(w).codes.int(), (u[..., None] > t).sum(-1).int())
    # Idempotent exactly where every used level maps to itself.
    if (alpha > 0).all():
        p = torch.arange(q.qmin, q.qmax + 1, dtype=t.dtype)
        ends = torch.tensor([-torch.inf]).double(), torch.tensor([torch.inf]).double()
        low, high = torch.cat((ends[0], t.double())), torch.cat((t.double(), ends[1]))
        margin = 1e-9
        fixed = (low < p - margin) & (p + margin <= high)
        loose = (low >= p + margin) | (p - margin > high)
        codes = q.encode(w).codes.int()
        again = q.encode(q(w)).codes.int()
        assert (again == codes)[fixed[codes]].all()
        assert (again != codes)[loose[codes]].all()


@pytest.mark.parametrize("grid", [[-2.0, -1.0, -1.0, 1.0], [-2.0, 0.5, -0.5, 1.0], [1.0, 0.0, -1.0, -2.0]])
def test_bad_grids(grid: list[float]) -> None:
    w = torch.linspace(-3, 3, 121, requires_grad=True)
    q = make("rfa", 2, w.detach())
    assert isinstance(q, RFA)
    with torch.no_grad():
        q.alpha.fill_(1.0)
        q.grid.copy_(torch.tensor(grid))
    assert (q.thresholds().diff() > 0).all()
    y = q(w)
    y.sum().backward()
    for grad in (w.grad, q.alpha.grad, q.beta.grad, q.grid.grad):
        assert grad is not None
        assert grad.isfinite().all()
    official = make("rfa", 2, w.detach(), official=True)
    official.load_state_dict(q.state_dict())
    assert isinstance(official, RFA)
    middle = [(grid[i] + grid[i + 1]) / 2 for i in range(3)]
    assert official.thresholds().tolist() == [min(middle[i:]) for i in range(3)]
    assert official(w).isfinite().all()


def test_ordered_thresholds_reach_every_level() -> None:
    w = torch.linspace(-3, 3, 4001)
    q = make("rfa", 4, w)
    learnt(q, 2, 0.05)
    assert q.encode(w * 10).codes.unique().numel() == 16
    crossed = make("rfa", 4, w, official=True)
    with torch.no_grad():
        crossed.get_parameter("grid").add_(2 * torch.randn(16))
    assert crossed.encode(w * 10).codes.unique().numel() < 16


def test_error_bound_follows_the_thresholds() -> None:
    w = torch.randn(2000, dtype=torch.float64)
    q = make("rfa", 3, w)
    assert isinstance(q, RFA)
    learnt(q, 4, 0.2)
    t, p = q.thresholds(), torch.arange(-4.0, 4.0, dtype=torch.float64)
    low, high = torch.cat((p[:1].clamp(max=-4), t)), torch.cat((t, p[-1:]))
    bound = torch.maximum((low - p).abs(), (high - p).abs()) * q.alpha.detach().abs()
    u = (w + q.beta.detach()) / q.alpha.detach()
    inside = (u >= -4) & (u <= 3)
    codes = q.encode(w).codes.long()
    assert ((q(w) - w).abs() <= bound[codes] + 1e-9)[inside].all()


def test_joint_scaling() -> None:
    w = torch.randn(300)
    q = learnt(make("rfa", 4, w), 5, 0.1)
    wanted = 4 * q(w)
    with torch.no_grad():
        q.get_parameter("alpha").mul_(4)
        q.get_parameter("beta").mul_(4)
    assert torch.equal(q(4 * w), wanted)
