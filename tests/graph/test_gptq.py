"""The arithmetic of GPTQ against a plain one: codes, errors, matrices that are not definite."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.graph.rounding.gptq import DAMPING, Levels, quadratic_error, round_rows

DOUBLE = torch.float64


def nearest(w: Tensor, scale: Tensor, shift: Tensor, low: int, count: int) -> Tensor:
    """The nearest level by looking at all of them."""
    levels = scale[..., None] * (torch.arange(count, dtype=DOUBLE) + low) - shift[..., None]
    return (levels - w[..., None]).abs().argmin(-1).double()


def one_by_one(w: Tensor, h: Tensor, scale: Tensor, shift: Tensor, low: int, count: int) -> Tensor:
    """Optimal Brain Quantization in a fixed order, of one group: (o, k), (k, k) -> indices (o, k)."""
    mean = h.diagonal().mean()
    dead = h.diagonal() == 0
    damped = h + torch.diag(torch.where(dead, mean if mean > 0 else 1.0, DAMPING * mean))
    inverse = torch.linalg.inv(damped)
    w, index = w.clone(), torch.zeros_like(w)
    for j in h.diagonal().sort(descending=True, stable=True).indices.tolist():
        index[:, j] = nearest(w[:, j], scale[:, j], shift[:, j], low, count)
        error = w[:, j] - (scale[:, j] * (index[:, j] + low) - shift[:, j])
        w -= torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return index


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Levels, Tensor]:
    """Weights, moments (dead inputs, fewer samples than inputs, none at all), levels, nearest indices."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    g, o = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    k = draw(st.sampled_from([1, 2, 5, 9, 40, 150]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    x = normal(g, k, draw(st.sampled_from([0, 1, 3, 200])))
    x = (
        normal(g, k, k).div(k**0.5).add(torch.eye(k, dtype=DOUBLE))
        @ x
        * draw(st.sampled_from([1e-3, 1, 1e4]))
    )
    if draw(st.booleans()):
        x[:, torch.randint(k, (1,), generator=generator)] = 0
    bits = draw(st.integers(2, 5))
    w = normal(g, o, k)
    size = draw(st.sampled_from([(1, 1, 1), (g, 1, 1), (g, o, 1)]))
    scale = (normal(*size).abs() + 0.5) * 2 / 2**bits
    levels = Levels(scale, normal(*size) * scale, -(2 ** (bits - 1)), 2**bits)
    wide = levels.expand(w.shape)
    return w, x @ x.mT, levels, nearest(w, wide.scale, wide.shift, levels.code_min, levels.count)


@settings(deadline=None, max_examples=40)
@given(problems())
def test_as_optimal_brain_quantization_column_by_column(problem: Any) -> None:
    w, h, levels, start = problem
    index = round_rows(w, h, levels, start)
    wide = levels.expand(w.shape)
    for g in range(len(w)):
        own = one_by_one(w[g], h[g], wide.scale[g], wide.shift[g], levels.code_min, levels.count)
        ours = quadratic_error(levels.value(index) - w, h)[g]
        theirs = [
            quadratic_error(levels.value(i.expand(w.shape)) - w, h)[g] for i in (own[None], start[g][None])
        ]
        torch.testing.assert_close(ours, torch.minimum(*theirs), rtol=1e-6, atol=1e-9 * float(h.abs().max()))


@settings(deadline=None, max_examples=60)
@given(problems())
def test_no_row_gets_worse_and_codes_are_codes(problem: Any) -> None:
    w, h, levels, start = problem
    index = round_rows(w, h, levels, start)
    assert torch.equal(index, index.round())
    assert 0 <= int(index.min()) <= int(index.max()) < levels.count
    errors = [quadratic_error(levels.value(i) - w, h) for i in (index, start)]
    assert bool((errors[0] <= errors[1]).all())
    dead = (h.diagonal(dim1=-2, dim2=-1) == 0)[:, None].expand(w.shape)
    assert torch.equal(index[dead], start[dead])


def test_correlated_inputs_gain_much() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1000, generator=generator, dtype=DOUBLE) * 0.3
    x += torch.randn(1, 1000, generator=generator, dtype=DOUBLE)
    w = torch.randn(1, 16, 64, generator=generator, dtype=DOUBLE)
    levels = Levels(torch.tensor(0.7, dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE), -4, 8)
    start, h = levels.nearest(w), (x @ x.T)[None]
    errors = [quadratic_error(levels.value(i) - w, h).sum() for i in (round_rows(w, h, levels, start), start)]
    assert float(errors[0] / errors[1]) < 0.5


def test_an_indefinite_matrix_is_damped_until_it_is_none() -> None:
    h = torch.tensor([[[1.0, 1.5], [1.5, 1.0]]], dtype=DOUBLE)
    w = torch.tensor([[[0.3, -0.6]]], dtype=DOUBLE)
    levels = Levels(torch.ones(()), torch.zeros(()), -2, 4)
    index = round_rows(w, h, levels, levels.nearest(w))
    assert bool(index.isfinite().all())
