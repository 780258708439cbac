"""Initialised quantizers trace into one graph, forward and backward, with free sizes, and compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssmquant.quantizers import QUANTIZERS, Quantizer
from tests.strategies import learnt, make

# Dynamo itself instantiates autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def step(f: Callable[[Tensor], Tensor], q: Quantizer, x: Tensor) -> list[Tensor]:
    q.zero_grad()
    x = x.clone().requires_grad_()
    y = f(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in q.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("official", "backend", "dynamic"),
    [
        (False, "aot_eager", False),
        (True, "eager", True),
        pytest.param(False, "aot_eager", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_fullgraph(name: str, official: bool, backend: str, dynamic: bool) -> None:
    x = torch.randn(3, 6, 10)
    q = learnt(make(name, 4, x, official=official, axis=0), 1, 0.05).train()
    f = torch.compile(q, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in ((3, 6, 10), (5, 4, 12))[: 1 + dynamic]:
        x = torch.randn(size)
        got, wanted = step(f, q, x), step(q, q, x)
        assert len(got) == 2 + len(list(q.parameters()))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    q.eval()
    assert torch.equal(f(x), q(x))


@pytest.mark.parametrize("name", ["lsq", "rfa"])
def test_fullgraph_by_channel(name: str) -> None:
    w = torch.randn(4, 3, 5)
    q = make(name, 4, w, axis=0, num_groups=4, is_weight=True).train()
    f = torch.compile(q, backend="aot_eager", fullgraph=True)
    for a, b in zip(step(f, q, w), step(q, q, w), strict=True):
        torch.testing.assert_close(a, b)
