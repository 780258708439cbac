"""What tests of sites share: a model is prepared and converted, and both are compared with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.graph.runtime import runtime_of
from tests.small import prepared_and_calibrated

EVERYTHING = QConfig(w_bits=3, a_bits=4, keep_first_last=False, keep_gates=False)


def quantized(model: nn.Module, what: str, value: Tensor) -> Tensor:
    """``value`` as the quantizer of the point ``what`` gives it."""
    runtime = runtime_of(model)
    key = what.replace(".", "/")
    return (runtime.weights if key in runtime.weights else runtime.activations)[key](value)


def check(model: nn.Module, *shapes: tuple[int, ...], config: QConfig = EVERYTHING) -> Any:
    """Prepares; a prepared model must differ from the float one, and its conversion must not differ from it."""
    x = torch.randn(shapes[0])
    bypass = ssmquant.prepare(model, QConfig(), example_inputs=(x,))
    prepared = prepared_and_calibrated(model, config, x)
    deployed = ssmquant.convert(prepared)
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(bypass(x), model(x))
            assert not torch.allclose(prepared(x), model(x), atol=1e-4)
            torch.testing.assert_close(deployed(x), prepared(x), rtol=1e-6, atol=1e-6)
    assert ssmquant.verify(prepared, deployed, (x,)).worst_rel < 1e-6
    return prepared
