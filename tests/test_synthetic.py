"""Synthetic images: their statistics, BatchNorm layers that see what they remember, calibration without batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, InputError, QConfig, synthetic_batches, zoo
from ssmquant.synthetic import dead_leaves
from tests.small import Chain, Scanner, images, tiny_mambair

X = images(2, 3, 20, 24)


def prepared(model: nn.Module, x: Tensor = X, **changes: Any) -> Any:
    config = QConfig.minmax(8, 8, keep_first_last=False, **changes)
    return ssmquant.prepare(model.eval(), config, example_inputs=(x,))


def normed(width: int = 6) -> nn.Module:
    """A BatchNorm layer that remembers photographs of another brightness."""
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
    model = Chain(middle, width)
    norm = middle[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 1.0
    model.train()(0.3 * torch.rand(8, 3, 32, 32) + 0.1)
    return model.eval()


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_statistics_of_natural_images() -> None:
    x = dead_leaves((16, 3, 64, 64), torch.Generator().manual_seed(0))
    assert x.shape == (16, 3, 64, 64)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    grey = x.mean(1)
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    radius = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.fftfreq(64)) * 64
    rings = [
        (float(r), float(power[(radius >= r) & (radius < 1.5 * r)].mean())) for r in (2, 3, 5, 8, 12, 18)
    ]
    (a, high), (b, low) = rings[0], rings[-1]
    slope = math.log(high / low) / math.log(b / a)
    assert 1.5 < slope < 3  # power 1 / f**2, amplitude 1 / f; white noise has 0
    channels = torch.corrcoef(x.movedim(1, 0).flatten(1))
    assert channels.min() > 0.7
    steps = (grey[..., 1:] - grey[..., :-1]).flatten()
    kurtosis = float(((steps - steps.mean()) / steps.std()).pow(4).mean())
    assert kurtosis > 5  # smooth regions and edges: a Gaussian has 3


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 7, 3), (1, 2, 1, 9)])
def test_odd_sizes(shape: tuple[int, int, int, int]) -> None:
    x = dead_leaves(shape, torch.Generator().manual_seed(0))
    assert x.shape == shape
    assert x.isfinite().all()


def test_batches() -> None:
    model = prepared(Scanner())
    state = torch.get_rng_state()
    batches = synthetic_batches(model, 3, value_range=(-1, 1), mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 0.5))
    assert torch.equal(state, torch.get_rng_state())
    assert [b.shape for b in batches] == [X.shape] * 3
    low, high = (torch.tensor([(v - 0) / 1, (v - 0.5) / 2, (v - 1) / 0.5]) for v in (-1.0, 1.0))
    for b in batches:
        assert b.is_contiguous()
        assert (b.amin((0, 2, 3)) >= low).all()
        assert (b.amax((0, 2, 3)) <= high).all()
    again = synthetic_batches(model, 3, value_range=(-1, 1), mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    other = synthetic_batches(model, 1, 5, seed=1)[0]
    assert other.shape == (5, 3, 20, 24)
    assert not torch.equal(other[:2], synthetic_batches(model, 1)[0])
    assert not torch.equal(batches[0], batches[1])


def test_dtypes_and_float_models() -> None:
    assert synthetic_batches(prepared(Scanner().double(), X.double()), 1)[0].dtype == torch.float64
    model = tiny_mambair()
    assert synthetic_batches(model, 1)[0].shape == (1, 3, 32, 32)  # the adapter's example
    assert synthetic_batches(zoo.build("vim_nano", num_classes=3), 2, 2)[1].shape[0] == 2


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


def seen_by_norm(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    got: list[Tensor] = []
    handle = model.middle[1].register_forward_pre_hook(lambda _, args: got.append(args[0]))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return got[0].mean((0, 2, 3)), got[0].var((0, 2, 3))


def test_layers_see_what_they_remember() -> None:
    model: Any = normed()
    norm = model.middle[1]
    ready = prepared(model)
    ready.train()
    before = {k: v.clone() for k, v in ready.state_dict().items()}
    noise = synthetic_batches(ready, 1, 4, source="noise")[0]
    with torch.inference_mode():
        x = synthetic_batches(ready, 1, 4, steps=150, progress=True)[0]
    assert ready.training
    assert all(p.grad is None for p in ready.parameters())
    for k, v in ready.state_dict().items():
        assert torch.equal(v, before[k]) or bool(v.isnan().all())
    assert 0 <= float(x.min()) <= float(x.max()) <= 1

    def distance(batch: Tensor) -> float:
        mean, var = seen_by_norm(model, batch)
        off = (mean - norm.running_mean) / norm.running_var.sqrt()
        return float(off.square().mean() + (var.sqrt() / norm.running_var.sqrt() - 1).square().mean())

    assert distance(x) < 0.05 * distance(noise)
    assert torch.equal(x, synthetic_batches(ready, 1, 4, steps=150)[0])
    ready_too = ssmquant.calibrate(ready, [x])  # what was made is an ordinary tensor
    assert ready_too(x.clone()).requires_grad


def test_sources() -> None:
    plain, model = prepared(Scanner()), prepared(normed())
    with pytest.raises(ConfigError, match="BatchNorm"):
        synthetic_batches(plain, source="batchnorm")
    auto, noise = (synthetic_batches(plain, 1, source=s)[0] for s in ("auto", "noise"))  # type: ignore[arg-type]
    assert torch.equal(auto, noise)
    auto, norm = (synthetic_batches(model, 1, source=s, steps=3)[0] for s in ("auto", "batchnorm"))  # type: ignore[arg-type]
    assert torch.equal(auto, norm)
    forgetful: Any = normed()
    forgetful.middle[1] = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(ConfigError, match="BatchNorm"):
        synthetic_batches(prepared(forgetful), source="batchnorm")


# ---- bad input -------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(x + y)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Tokens(), (torch.zeros(1, 5, dtype=torch.long),)),
        (Two(), (X, X)),
        (nn.Linear(4, 4), (torch.zeros(2, 4),)),
    ],
)
def test_models_of_no_images(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    config = QConfig.minmax(
        8, 8, keep_first_last=False, keep_float=("table",) if isinstance(model, Tokens) else ()
    )
    ready = ssmquant.prepare(model.eval(), config, example_inputs=example)
    with pytest.raises(InputError, match="one float tensor"):
        synthetic_batches(ready)
    with pytest.warns(UserWarning, match="real"), pytest.raises(InputError):
        ssmquant.calibrate(ready)


@pytest.mark.parametrize(
    "options",
    [{"count": 0}, {"count": True}, {"batch_size": 0}, {"source": "photos"}, {"value_range": (1, 0)}, {"std": (1, 1)},
     {"std": (1, 0, 1)}, {"mean": (math.nan, 0, 0)}, {"value_range": (0, math.inf)}, {"steps": 0}],
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        synthetic_batches(prepared(Scanner()), **options)


def test_unknown_models() -> None:
    with pytest.raises(ConfigError, match="prepare it first"):
        synthetic_batches(Scanner())
    with pytest.raises(ConfigError, match="expected a model"):
        synthetic_batches(None)  # type: ignore[arg-type]


# ---- calibrate -------------------------------------------------------------------------------------------------------


def test_calibration_without_batches() -> None:
    torch.manual_seed(0)
    model = Scanner().eval()
    ready, by_hand = prepared(model), prepared(model)
    with pytest.warns(UserWarning, match="real") as caught:
        ssmquant.calibrate(ready, max_batches=4)
    assert caught[0].filename == __file__
    ssmquant.calibrate(by_hand, synthetic_batches(by_hand, 4))
    for a, b in zip(ready.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    y, exact = ready.eval()(X), model(X)
    assert (y - exact).norm() < 0.1 * exact.norm()
