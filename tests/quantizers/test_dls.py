from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.quantizers import DLS
from ssmquant.quantizers.affine import Affine, affine_decode, affine_index
from tests.strategies import bits, learnt, make, samples, sqnr, tensors


@given(bits, tensors(), st.integers(0, 9))
def test_output_stays_in_the_range_of_the_data(n_bits: int, x: Tensor, seed: int) -> None:
    q = learnt(make("dls", n_bits, x), seed, 1.0)
    y = q(x)
    assert y.min() >= x.min()
    assert y.max() <= x.max()


@given(bits, samples(), st.integers(0, 9), st.integers(-12, 12))
def test_scale_equivariance(n_bits: int, x: Tensor, seed: int, power: int) -> None:
    q = learnt(make("dls", n_bits, x), seed)
    assert torch.equal(q(2.0**power * x), 2.0**power * q(x))


@given(bits, samples(), st.integers(0, 9), st.sampled_from([-7.0, 0.3, 50.0]))
def test_shift_equivariance(n_bits: int, x: Tensor, seed: int, offset: float) -> None:
    q = learnt(make("dls", n_bits, x), seed, 0.2)
    assert isinstance(q, DLS)
    with torch.no_grad():
        q.v[0] = -1 - q.v[2] - q.v[3]
    e = q.encode(x)
    u = (x + e.shift) / e.scale
    assume(bool(((u - u.floor() - 0.5).abs() > 1e-6).all()))
    torch.testing.assert_close(q(x + offset), q(x) + offset, rtol=0, atol=1e-9)
    with torch.no_grad():
        q.v[0] += 0.5
    assert (q(x + 50.0) - q(x) - 50.0).abs().max() > 1e-3


@given(bits, samples())
def test_samples_are_independent(n_bits: int, x: Tensor) -> None:
    x[1] *= 5
    x[1] += 1
    q = make("dls", n_bits, x, axis=0)
    together = q(x)
    for i in range(x.shape[0]):
        assert torch.equal(q(x[i : i + 1])[0], together[i])
        torch.testing.assert_close(DLS(n_bits).double()(x[i]), together[i], rtol=1e-12, atol=1e-12)
    assert q.encode(x).scale.shape == (x.shape[0], 1, 1)
    whole = make("dls", n_bits, x)
    assert not torch.equal(whole(x)[0], whole(x[:1])[0])


@pytest.mark.parametrize("axis", [1, -1, -2])
def test_any_sample_axis(axis: int) -> None:
    x = torch.randn(3, 4, 5)
    q, first = DLS(4, axis=axis), DLS(4, axis=0)
    torch.testing.assert_close(q(x), first(x.movedim(axis, 0)).movedim(0, axis))
    alpha, beta, lo, hi = q.affine(x)
    assert alpha.shape == beta.shape == lo.shape == hi.shape
    assert alpha.numel() == x.shape[axis]
    with pytest.raises(InputError, match="axis"):
        q(torch.tensor(1.0))


def test_one_element_a_sample() -> None:
    x = torch.randn(6, requires_grad=True)
    y = DLS(4, axis=0)(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones(6))


def test_dynamic_form_is_not_idempotent() -> None:
    x = torch.randn(2000)
    q = make("dls", 4, x)
    assert (q(q(x)) != q(x)).float().mean() > 0.5


@given(bits, samples())
def test_frozen_form_is_idempotent_in_range(n_bits: int, x: Tensor) -> None:
    q = make("dls", n_bits, x)
    assert isinstance(q, DLS)
    alpha, beta, lo, hi = q.affine(x)

    def frozen(t: Tensor) -> Tensor:
        index = affine_index(t, alpha, beta, q.qmin, q.qmax)
        return affine_decode(index, Affine(alpha, beta, lo, hi), q.qmin)

    once = frozen(x)
    assert torch.equal(once, q(x))
    torch.testing.assert_close(frozen(once), once, rtol=1e-12, atol=1e-12)


def test_commutes_with_scan_directions() -> None:
    x = torch.randn(2, 3, 4, 5)
    q = make("dls", 4, x, axis=0)
    codes = q.encode(x).codes
    assert torch.equal(q.encode(x.flip(-1)).codes, codes.flip(-1))
    torch.testing.assert_close(q.encode(x.transpose(2, 3)).codes, codes.transpose(2, 3))


def quantiles(kind: str) -> Tensor:
    """The distribution at 2e5 evenly spread probabilities: the seed numbers without sampling noise."""
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    gauss = torch.special.ndtri(p)
    by_kind: dict[str, Tensor] = {
        "gauss": gauss,
        "laplace": -(p - 0.5).sign() * (1 - 2 * (p - 0.5).abs()).log(),
        "silu": torch.nn.functional.silu(gauss),
        "uniform": 2 * p - 1,
    }
    return by_kind[kind]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("gauss", (3.5, 10.8, 18.1, 29.4, 33.3)),
        ("laplace", (3.1, 10.6, 15.8, 18.3, 18.3)),
        ("silu", (4.1, 11.9, 16.0, 18.4, 18.5)),
        ("uniform", (9.6, 16.7, 23.3, 35.9, 48.1)),
    ],
)
def test_seed_numbers(kind: str, wanted: tuple[float, ...]) -> None:
    x = quantiles(kind)
    for n_bits, db in zip((2, 3, 4, 6, 8), wanted, strict=True):
        # The seed numbers are of random samples: their own noise is some tenths where rare values are clipped.
        assert sqnr(x, DLS(n_bits).double()(x)) == pytest.approx(db, abs=0.4), n_bits


def test_seed_facts() -> None:
    silu = quantiles("silu")
    assert DLS(2).encode(silu).decode().unique().numel() == 2
    assert DLS(4).encode(silu).decode().unique().numel() == pytest.approx(10, abs=1)
    decay = -torch.arange(1.0, 11.0)
    assert DLS(2)(decay).detach().unique().tolist() == [-10.0, -7.75, -5.5, -3.25]
    assert DLS(4)(decay).max().item() == pytest.approx(-1.5625)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("low", [0.0, -1.0], ids=["positive", "both signs"])
def test_a_frozen_range_is_that_of_the_data_it_has_seen(official: bool, low: float) -> None:
    from ssmquant.modules import ActivationQuantizer, FrozenRange

    torch.manual_seed(0)
    x = torch.rand(1, 500) * 2 + low
    wrapper = ActivationQuantizer("x", DLS(3, official=official, axis=None))
    wrapper.start()
    wrapper(x)
    wrapper.finish(search=not official)
    frozen, want = FrozenRange.from_dls(wrapper), wrapper.quantizer.eval()(x)
    assert frozen.is_signed is wrapper.quantizer.is_signed
    inside = (want > x.min()) & (want < x.max())  # the ends of a frozen range are levels
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(frozen(x)[inside], want[inside])
    again = FrozenRange(3)
    again.load_state_dict(frozen.state_dict())
    assert torch.equal(again(x), frozen(x))
