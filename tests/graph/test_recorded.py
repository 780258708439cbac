"""Tools that record operators see what a model computes: kernels that Python launches are none, and step aside."""

from __future__ import annotations

import functools
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


CONFIGS = {
    "recommended": QConfig.recommended(4, 4),
    "qmambair": QConfig.qmambair(2),
    "odd": QConfig.recommended(3, 5, scan_bits=6),
    "vim": QConfig.recommended(4, 4),
}


@functools.cache
def prepared(name: str) -> Any:
    torch.manual_seed(0)
    model, config = zoo.vim_nano(num_classes=5) if name == "vim" else tiny_mambair(), CONFIGS[name]
    made = ssmquant.prepare(model, config, example_inputs=(sized(model, X),))
    return ssmquant.calibrate(made, [sized(model, X)], progress=False).eval()


def sized(model: Any, x: Tensor) -> Tensor:
    """As large as the model wants it."""
    return x.repeat(1, 1, 5, 6)[..., :32, :32] if "Vision" in type(model).__name__ else x


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile
@pytest.mark.parametrize(
    ("name", "tool"),
    [
        *(("recommended", tool) for tool in TOOLS),
        *((name, tool) for name in ("qmambair", "vim") for tool in ("jit.trace", "make_fx, early")),
        *(("odd", tool) for tool in ("export", "compile")),  # codes that do not fill bytes
    ],
)
@torch.no_grad()
def test_what_is_recorded(name: str, tool: str) -> None:
    model = prepared(name)
    deployed = ssmquant.convert(model)
    x, other = sized(model, X), sized(model, OTHER)
    want = deployed(x), deployed(other)  # by kernels, and there is a graph
    recorded = TOOLS[tool](deployed, x)
    for given, expected in zip((x, other), want, strict=True):
        torch.testing.assert_close(recorded(given), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(deployed(x), want[0])
    if tool == "jit.trace":
        with pytest.raises(TraceError, match="convert the model first"):
            TOOLS[tool](model, x)
    else:
        torch.testing.assert_close(TOOLS[tool](model, x)(other), model(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["recommended", "vim"])
@torch.no_grad()
def test_a_first_call_is_recorded_as_any_other(name: str, tmp_path: Path) -> None:
    deployed, x = ssmquant.convert(prepared(name)), sized(prepared(name), X)
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
def test_transforms_of_functions_reach_no_kernels() -> None:
    deployed, x = ssmquant.convert(prepared("recommended")), X
    deployed(x)
    for transformed in (torch.func.functionalize(deployed), torch.vmap(lambda t: deployed(t[None])[0])):
        # An error of PyTorch's, and no crash.
        with pytest.raises(RuntimeError, match=r"setup_context|Batching rule|functionaliz"):
            transformed(x)
