"""Tools that record operators see what a model computes: kernels that Python launches are none, and step aside."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ssmquant
from ssmquant import QConfig
from ssmquant.errors import TraceError
from tests.small import images, tiny_mambair

X = images(2, 3, 7, 6)


def jit(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and of numbers that become constants
        return torch.jit.trace(model, (X,), check_trace=False)


def counted(model: Any) -> Any:
    def run(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            y: Tensor = model(x)
        assert counter.get_total_flops() > 0
        return y

    return run


TOOLS = {
    "jit.trace": jit,
    "make_fx": lambda model: make_fx(model)(X),
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "flops": counted,
}


@pytest.fixture(scope="module", params=["recommended", "qmambair", "odd"])
def prepared(request: pytest.FixtureRequest) -> Any:
    config = {
        "recommended": QConfig.recommended(4, 4),
        "qmambair": QConfig.qmambair(2),
        "odd": QConfig.recommended(3, 5, scan_bits=6),
    }[request.param]
    torch.manual_seed(0)
    return ssmquant.calibrate(ssmquant.prepare(tiny_mambair(), config), [X], progress=False).eval()


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # of torch.compile's own
@pytest.mark.parametrize("tool", TOOLS)
@torch.no_grad()
def test_what_is_recorded(prepared: Any, tool: str) -> None:
    deployed = ssmquant.convert(prepared)
    want = deployed(X)  # by kernels, and there is a graph
    torch.testing.assert_close(TOOLS[tool](deployed)(X), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(deployed(X), want)
    if tool == "jit.trace":
        with pytest.raises(TraceError, match="convert the model first"):
            TOOLS[tool](prepared)
    else:
        torch.testing.assert_close(TOOLS[tool](prepared)(X), prepared(X), rtol=1e-4, atol=1e-4)
