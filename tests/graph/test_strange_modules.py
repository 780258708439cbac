"""What torch.fx cannot follow, or Python not copy, is said so."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.errors import ConfigError, TraceError

CONFIG = QConfig.recommended(4, 4, keep_first_last=False)


class Middle(nn.Module):
    """A layer, something, another layer."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), middle, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)))
        return y


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.vmap(self.layer)(x)
        return y


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 6, 8)


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made: nn.Module = torch.jit.script(module)
    return made


def test_scripted_modules(x: Tensor, tmp_path: Path) -> None:
    model = Middle(scripted(Swish()))
    deployed = ssmquant.convert(
        ssmquant.calibrate(ssmquant.prepare(model, CONFIG, example_inputs=(x,)), [x], progress=False)
    )
    error = (deployed(x) - model(x)).norm() / model(x).norm()
    assert error < 0.3
    ssmquant.save(deployed, tmp_path / "model.safetensors")
    assert torch.equal(ssmquant.load(tmp_path / "model.safetensors", model)(x), deployed(x))
    with pytest.raises(TraceError, match=r"'middle' is a torch\.jit\.ScriptModule with parameters"):
        ssmquant.prepare(Middle(scripted(nn.Sequential(nn.Linear(8, 8)))), CONFIG, example_inputs=(x,))


@pytest.mark.parametrize("made", [scripted, lambda m: torch.compile(m, backend="eager")])
def test_compiled_models(x: Tensor, made: Any) -> None:
    with pytest.raises(ConfigError, match="prepare the one that it was made from"):
        ssmquant.prepare(made(nn.Sequential(nn.Linear(8, 8))), CONFIG, example_inputs=(x,))


def test_inputs_of_one_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    batches = [torch.randn(8) for _ in range(16)]
    prepared = ssmquant.prepare(model, CONFIG, example_inputs=batches[:1])
    ssmquant.calibrate(prepared, batches, progress=False)
    deployed = ssmquant.convert(prepared)
    for x in batches:
        torch.testing.assert_close(deployed(x), prepared.eval()(x))


def test_transforms_of_functions(x: Tensor) -> None:
    with pytest.raises(TraceError, match=r"vmap.* which graphs cannot hold"):
        ssmquant.prepare(Middle(Mapped()), CONFIG, example_inputs=(x,))


def test_models_that_cannot_be_copied(x: Tensor, tmp_path: Path) -> None:
    def normalized() -> Middle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return Middle(nn.utils.weight_norm(nn.Linear(8, 8)))

    model = normalized()
    with pytest.raises(ConfigError, match=r"Middle cannot be copied .*call it once under torch.no_grad\(\)"):
        ssmquant.prepare(model, CONFIG, example_inputs=(x,))
    with torch.no_grad():
        model(x)
    prepared = ssmquant.calibrate(ssmquant.prepare(model, CONFIG, example_inputs=(x,)), [x], progress=False)
    prepared.train()(x).sum().backward()
    deployed = ssmquant.convert(prepared)
    ssmquant.save(deployed, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="Middle cannot be copied"):
        ssmquant.load(tmp_path / "model.safetensors", normalized())
    assert torch.equal(ssmquant.load(tmp_path / "model.safetensors", model)(x), deployed(x))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"Middle cannot be copied .*TypeError"):
        ssmquant.prepare(model, CONFIG, example_inputs=(x,))
