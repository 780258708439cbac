"""``q(x, copies)`` is what the quantizer does to a tensor that holds every element so often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.quantizers import QUANTIZERS, Quantizer
from tests.strategies import bits, learnt, make, samples


def gradients(q: Quantizer, y: Tensor, g: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *q.parameters()], g))


def both(q: Quantizer, x: Tensor, copies: int) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients: of copies that are told, and of those that are there."""
    x = x.detach().requires_grad_()
    many = torch.cat([x] * copies, 1).detach().requires_grad_()
    g = torch.randn_like(many)
    y, want = q(x, copies=copies), q(many)
    got = gradients(q, y, torch.stack(g.chunk(copies, 1)).sum(0), x)
    dx, *rest = gradients(q, want, g, many)
    width = x.shape[1]
    return [y, *got], [want[:, :width], torch.stack(dx.chunk(copies, 1)).sum(0), *rest]


@given(
    st.sampled_from(["lsq", "dls"]),
    bits,
    st.booleans(),
    st.sampled_from([None, 0]),
    st.integers(2, 5),
    samples(),
)
def test_in_float64(name: str, n_bits: int, official: bool, axis: int | None, copies: int, x: Tensor) -> None:
    options = {"num_groups": x.shape[0]} if name == "lsq" and axis is not None else {}
    q = learnt(make(name, n_bits, x, official=official, axis=axis, **options), 1, 0.1).train()
    for a, b in zip(*both(q, x, copies), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(x.abs().max()))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("name", ["lsq", "dls"])
def test_fused(name: str, official: bool) -> None:
    torch.manual_seed(0)
    for shape in ((3, 7, 11), (1, 1, 2), (2, 300, 70)):
        x = torch.randn(shape)
        q = learnt(make(name, 4, x, official=official, axis=0 if name == "dls" else None), 1, 0.1).train()
        for a, b in zip(*both(q, x, 4), strict=True):
            assert a.shape == b.shape
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_one_copy_is_the_tensor_itself(name: str) -> None:
    x = torch.randn(3, 50)
    q = learnt(make(name, 4, x), 1, 0.1).train()
    assert torch.equal(q(x, copies=1), q(x))
    if name in ("minmax", "rfa", "lsq"):  # their values do not depend on how many there are
        assert torch.equal(q(x, copies=3), q(x))
    bypass = QUANTIZERS[name](None)
    assert bypass(x, copies=3) is x


def test_a_single_element_that_there_are_several_of() -> None:
    for official in (False, True):
        x = torch.tensor([0.7, 0.7], dtype=torch.float64)
        q = make("dls", 4, x, official=official)
        for one in (x, x.float()):
            torch.testing.assert_close(q(one[:1], copies=2), q(one)[:1], rtol=0, atol=0, equal_nan=True)
