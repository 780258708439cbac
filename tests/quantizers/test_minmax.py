from __future__ import annotations

import pytest
import torch

from ssmquant.quantizers.observers import sample_rows
from tests.strategies import BITS, make


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_weights_are_symmetric(n_bits: int, flip: float) -> None:
    w = flip * torch.tensor([[-4.0, 1.0, 0.3, 2.0], [0.5, 0.1, -0.2, 0.25]])
    q = make("minmax", n_bits, w, axis=0, num_groups=2, is_weight=True)
    e = q.encode(w)
    top = 2 ** (n_bits - 1) - 1
    torch.testing.assert_close(e.scale[:, 0], torch.tensor([4.0, 0.5]) / top)
    assert e.shift.eq(0).all()
    assert e.code_min == -top - 1
    assert ((q(w) - w).abs() <= e.scale / 2 + 1e-6).all()
    assert torch.equal(q(-w), -q(w))


@pytest.mark.parametrize("n_bits", BITS)
def test_activations_are_asymmetric(n_bits: int) -> None:
    x = torch.tensor([3.0, 4.0, 3.7, 4.9, 5.0])
    q = make("minmax", n_bits, x)
    e = q.encode(x)
    assert e.code_min == 0
    assert float(e.scale) == pytest.approx(2 / (2**n_bits - 1))
    assert q(x).min() == 3
    assert float(q(x).max()) == pytest.approx(5)
    assert (q(x) - x).abs().max() <= e.scale / 2 + 1e-6
    assert float(q(torch.tensor(100.0))) == pytest.approx(5)


@pytest.mark.parametrize("outlier", [1.0, 1e4])
def test_sampled_errors_estimate_the_whole(outlier: float) -> None:
    rows = [torch.randn(200_000), torch.randn(300), torch.rand(7)]
    rows[0][123_457] = outlier
    points, weights = sample_rows(rows, 2**13)
    assert points.shape == weights.shape
    assert points.numel() <= 2**13 + 3 * 2 * 64
    for row, p, w in zip(rows, points, weights, strict=True):
        assert float(w.sum()) == pytest.approx(row.numel(), rel=1e-5)
        assert float((w * p * p).sum()) == pytest.approx(float((row * row).sum()), rel=0.1)
        assert p.min() == row.min()
        assert p.max() == row.max()


def test_samples_are_not_in_step_with_channels() -> None:
    """A channel-last map: every one of 64 channels is picked about as often as the others."""
    points, _ = sample_rows([torch.arange(64.0).repeat(2**14)], 2**13)
    counts = points[0, :-2].long().bincount(minlength=64)
    assert counts.min() > 0.7 * counts.float().mean()
