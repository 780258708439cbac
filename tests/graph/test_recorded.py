"""Tools that record operators see what a model computes: kernels that Python launches are none, and step aside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.errors import TraceError
from tests.small import images, tiny_mambair

X, OTHER = images(2, 3, 7, 6), images(2, 3, 7, 6).flip(0, 2)


def jit(model: Any, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and of numbers that become constants
        return torch.jit.trace(model, (x,), check_trace=False)


def counted(model: Any, _: Tensor) -> Any:
    def run(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            y: Tensor = model(x)
        assert counter.get_total_flops() > 0
        return y

    return run


TOOLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "jit.trace": jit,
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, early": lambda model, x: make_fx(model, pre_dispatch=True)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, _: torch.compile(model, backend="aot_eager", fullgraph=True),
    "flops": counted,
}


@pytest.fixture(scope="module", params=["recommended", "qmambair", "odd", "vim"])
def prepared(request: pytest.FixtureRequest) -> Any:
    config = {
        "qmambair": QConfig.qmambair(2),
        "odd": QConfig.recommended(3, 5, scan_bits=6),
    }.get(request.param, QConfig.recommended(4, 4))
    torch.manual_seed(0)
    model = zoo.vim_nano(num_classes=5) if request.param == "vim" else tiny_mambair()
    made = ssmquant.prepare(model, config, example_inputs=(sized(model, X),))
    return ssmquant.calibrate(made, [sized(model, X)], progress=False).eval()


def sized(model: Any, x: Tensor) -> Tensor:
    """As large as the model wants it."""
    return x.repeat(1, 1, 5, 6)[..., :32, :32] if "Vision" in type(model).__name__ else x


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # of torch.compile's own
@pytest.mark.parametrize("tool", TOOLS)
@torch.no_grad()
def test_what_is_recorded(prepared: Any, tool: str) -> None:
    deployed = ssmquant.convert(prepared)
    x, other = sized(prepared, X), sized(prepared, OTHER)
    want = deployed(x), deployed(other)  # by kernels, and there is a graph
    recorded = TOOLS[tool](deployed, x)
    for given, expected in zip((x, other), want, strict=True):
        torch.testing.assert_close(recorded(given), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(deployed(x), want[0])
    if tool == "jit.trace":
        with pytest.raises(TraceError, match="convert the model first"):
            TOOLS[tool](prepared, x)
    else:
        torch.testing.assert_close(TOOLS[tool](prepared, x)(other), prepared(other), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_first_call_is_recorded_as_any_other(prepared: Any, tmp_path: Path) -> None:
    deployed, x = ssmquant.convert(prepared), sized(prepared, X)
    ssmquant.save(deployed, tmp_path / "model.safetensors")

    def fresh() -> Any:
        return ssmquant.load(tmp_path / "model.safetensors")

    def flops(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    assert flops(fresh()) == flops(deployed)
    torch.testing.assert_close(make_fx(fresh())(x)(x), deployed(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(TraceError, match="call the model once"):
        jit(fresh(), x)


@torch.no_grad()
def test_transforms_of_functions_reach_no_kernels(prepared: Any) -> None:
    deployed, x = ssmquant.convert(prepared), sized(prepared, X)
    deployed(x)
    for transformed in (torch.func.functionalize(deployed), torch.vmap(lambda t: deployed(t[None])[0])):
        with pytest.raises(
            RuntimeError, match=r"setup_context|Batching rule|functionaliz"
        ):  # and not by a crash
            transformed(x)
