"""Ranges of each token: against plain formulas in float64, row by row, and against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant import QConfig, prepare
from ssmquant.errors import ConfigError, InputError
from ssmquant.quantizers import Token
from tests.small import tiny_mambair
from tests.strategies import bits

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 17))


def by_hand(x: Tensor, clip: Tensor, n_bits: int) -> Tensor:
    """One row in float64; differentiable, straight through the rounding, extremes as constants."""
    low, high = x.detach().min(), x.detach().max()
    half, middle, n = (high - low) / 2, (high + low) / 2, 2**n_bits - 1
    lowest, highest = middle - clip[0] * half, middle + clip[1] * half
    step = (highest - lowest) / n
    if float(half) == 0:
        return x * 0 + middle
    u = ((x - lowest) / step).clamp(-0.5, n + 0.5)
    return lowest + step * (u + (u.clamp(0, n).round() - u).detach())


@given(bits, shapes, st.integers(0, 100), st.booleans())
def test_rows_by_hand(n_bits: int, shape: tuple[int, ...], seed: int, clipped: bool) -> None:
    torch.manual_seed(seed)
    x = (
        torch.randn(shape, dtype=torch.float64)
        * torch.logspace(-4, 4, shape[1], dtype=torch.float64)[:, None]
    )
    q = Token(n_bits, channel_axis=2)
    with torch.no_grad():
        q.clip.copy_(torch.tensor([0.7, 0.4]) if clipped else torch.ones(2))
    q.scale_gradient = False
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    clip = q.clip.detach().double().requires_grad_()
    upstream = torch.randn_like(x)
    y = q.train()(a)
    want = torch.stack([by_hand(r, clip, n_bits) for r in b.flatten(0, 1)]).reshape(shape)
    torch.testing.assert_close(y, want)
    (y * upstream).sum().backward()
    (want * upstream).sum().backward()
    if shape[2] > 1:  # a row of one element has no step
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(
            q.clip.grad, None if clip.grad is None else clip.grad.float(), rtol=1e-4, atol=1e-4
        )


@given(bits, shapes, st.integers(0, 2))
def test_a_row_stands_alone(n_bits: int, shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape)
    q = Token(n_bits, channel_axis=axis).eval()
    y = q(x)
    for i, row in enumerate(x.movedim(axis, -1).reshape(-1, shape[axis])):
        assert torch.equal(Token(n_bits).eval()(row), y.movedim(axis, -1).reshape(-1, shape[axis])[i])


@given(bits)
def test_both_ends_are_levels(n_bits: int) -> None:
    x = torch.randn(5, 40) * 10
    y = Token(n_bits).eval()(x)
    for ours, theirs in zip(y.aminmax(dim=1), x.aminmax(dim=1), strict=True):
        torch.testing.assert_close(ours, theirs)
    step = (x.amax(1) - x.amin(1)) / (2**n_bits - 1)
    assert ((y - x).abs() <= step[:, None] / 2 * (1 + 1e-5)).all()


@given(bits, st.integers(0, 20))
def test_calibration_is_never_worse_than_no_clipping(n_bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(300, 24) ** 3
    q = Token(n_bits).eval()
    before = (q(x) - x).square().sum()
    q.fit([x[:100], x[100:]])
    assert (q(x) - x).square().sum() <= before * (1 + 1e-6)
    assert q.clip.max() <= 1


def test_calibration_clips_heavy_tails() -> None:
    x = torch.randn(500, 200) ** 3
    q = Token(2)
    q.fit([x])
    assert q.clip.max() < 0.6


def test_what_has_no_tokens_is_refused() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"scan_output"):
        prepare(tiny_mambair(), QConfig(w_bits=4, a_bits=4, scan="token"), example_inputs=(x,))
    with pytest.raises(ConfigError, match=r"token"):
        prepare(tiny_mambair(), QConfig(w_bits=4, a_bits=4, weight="token"), example_inputs=(x,))
    with pytest.raises(InputError, match="axis 2"):
        Token(4, channel_axis=2)(torch.randn(3, 4))
