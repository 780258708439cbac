"""Weight quantizers with hooks are called one by one, so that hooks see the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmquant.ops import quantize
from ssmquant.quantizers.bank import quantize_weights
from tests.strategies import make

pytestmark = pytest.mark.skipif(
    quantize.serving(torch.zeros(1)) is None, reason="needs a C++ compiler: there are no kernels here"
)


def test_hooks_and_forwards_of_their_own() -> None:
    quantizers: list[Any] = [make("lsq", 4, torch.randn(9), is_weight=True).train() for _ in range(3)]
    weights = [torch.randn(9, requires_grad=True) for _ in quantizers]
    quantizers[0].forward = torch.zeros_like
    backward: list[int] = []
    quantizers[1].register_full_backward_hook(lambda *_: backward.append(1))
    first, second, _ = quantize_weights(quantizers, weights)
    assert not first.any()
    second.sum().backward()
    assert backward == [1]
