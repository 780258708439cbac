"""Factors of channels (``QConfig.smooth``): the same function in float, folded into norms, saved, and measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, Rule
from ssmquant.errors import ConfigError, FormatError, TraceError
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules.activation import MOST_GAIN, ActivationQuantizer, gains
from ssmquant.ops import use_backend
from tests.model_files import loaded as files_loaded
from tests.model_files import meta_of, with_meta
from tests.small import images, prepared_and_calibrated, tiny_mambair

WIDTH = 6


class Uneven(nn.Module):
    """A norm that one projection reads, one that two read, one that a sum reads too, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        uneven = 4.0 ** torch.arange(-2, WIDTH - 2)
        self.first = nn.Conv2d(3, WIDTH, 1)
        self.alone, self.both, self.added = (nn.LayerNorm(WIDTH) for _ in range(3))
        for norm in (self.alone, self.both, self.added):
            norm.weight.data, norm.bias.data = uneven.clone(), torch.randn(WIDTH)
        self.one, self.two, self.three, self.four = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for linear in (self.one, self.two, self.three, self.four):
            linear.weight.data /= uneven  # as training does: small weights for large values
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.last = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 2, 3, 1)
        x = x + self.one(self.alone(x))
        y = self.both(x)
        x = x + self.two(y) * self.three(y)
        y = self.added(x)
        y = (y + self.four(y)).permute(0, 3, 1, 2)
        return self.last(self.conv(y))


CONFIG = QConfig.lsq(4, 4, granularity="channel", smooth=1.0)


def smoothed(config: QConfig = CONFIG, model: nn.Module | None = None) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = images(2, 3, 7, 5)
    return prepared_and_calibrated(Uneven().eval() if model is None else model, config, x), x


def of(model: nn.Module) -> dict[str, Tensor]:
    """Factors by the name of what they belong to."""
    found = runtime_of(model).activations.values()
    return {m.name: m.gain for m in found if isinstance(m, ActivationQuantizer) and m.gain is not None}


def plain(model: Any, x: Tensor) -> Tensor:
    with use_backend("chunked", op="fuse"), torch.no_grad():
        y: Tensor = model(x)
    return y


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=20), st.floats(0, 1))
def test_factors_are_powers_of_two(largest: list[float], strength: float) -> None:
    got = gains(torch.tensor(largest), strength)
    steps = got.log2()
    assert torch.equal(steps, steps.round())
    assert steps.abs().max() <= MOST_GAIN
    assert (got[torch.tensor(largest) == 0] == 1).all()
    assert strength or (got == 1).all()


def test_even_channels_have_none_and_uneven_ones_become_even() -> None:
    assert (gains(torch.full((5,), 3.7), 1.0) == 1).all()
    largest = 10.0 ** torch.arange(-2, 3)
    even = largest * gains(largest, 1.0)
    assert even.max() <= 2 * even.min()


def test_the_function_in_float_is_the_same() -> None:
    p, x = smoothed()
    model = Uneven()
    model.load_state_dict({k: v for k, v in p.state_dict().items() if not k.startswith("_ssmquant")})
    for store in (runtime_of(p).weights, runtime_of(p).activations):
        for m in store.values():
            quantizer: Any = getattr(m, "quantizer", m)
            quantizer.forward = lambda x, **_: x
    assert max(float(g.max()) for g in of(p).values()) >= 8
    torch.testing.assert_close(plain(p, x), model(x))


def test_less_is_lost() -> None:
    for bits in (2, 4):
        losses = []
        for strength in (0.0, 1.0):
            p, x = smoothed(QConfig.lsq(bits, bits, granularity="channel", smooth=strength))
            model = Uneven()
            model.load_state_dict({k: v for k, v in p.state_dict().items() if not k.startswith("_ssmquant")})
            losses.append(float((plain(p, x) - model(x)).detach().square().mean()))
        assert losses[1] < 0.95 * losses[0]


def test_what_has_factors() -> None:
    p, _ = smoothed()
    assert set(of(p)) == {f"{n}:input" for n in ("one", "two", "four", "conv")}  # two: of three, too
    assert not of(smoothed(QConfig.lsq(4, 4))[0])
    p, _ = smoothed(QConfig.lsq(4, 4, smooth=1.0, rules=(Rule("three", w_bits=None),)))
    assert "two:input" not in of(p)  # its factors would be three's, whose weight is not quantized
    assert not of(smoothed(QConfig(w_bits=4, a_bits=4, activation="dls", smooth=1.0))[0])
    model, x = tiny_mambair().eval(), images(1, 3, 8, 8)
    p = prepared_and_calibrated(model, QConfig.recommended(4, 4, smooth=1.0), x)
    names = [n for n in of(p) if "in_proj" in n or "cab" in n or n.startswith("layers.0.conv")]
    assert sorted(names) == sorted(of(p))
    assert len(names) >= 3


def test_norms_take_what_they_can() -> None:
    p, x = smoothed()
    d = ssmquant.convert(p)
    assert set(of(d)) == {"four:input", "conv:input"}
    assert torch.equal(plain(d, x), plain(p, x))  # not a bit
    torch.testing.assert_close(d(x), plain(d, x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(d.alone.weight, p.alone.weight)
    assert torch.equal(d.added.weight, p.added.weight)


class Twice(Uneven):
    """A norm that is called twice, the second time for a convolution, and two that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.both.weight = self.added.weight
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.alone(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x + self.last(self.point(y)))


@pytest.mark.parametrize("fused", [False, True])
def test_norms_that_are_not_their_own(fused: bool) -> None:
    p, x = smoothed(model=Twice().eval())
    assert of(p)["point:input"].max() > 1
    d = ssmquant.convert(p)
    if fused:
        torch.testing.assert_close(d(x), plain(p, x), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(plain(d, x), plain(p, x))
    for name in ("alone", "both", "added"):
        assert torch.equal(d.get_submodule(name).weight, p.get_submodule(name).weight)


class Moody(Uneven):
    """While it trains, something reads a projection's input that has no factors."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.last(
                (self.alone(self.first(x).permute(0, 2, 3, 1)) @ self.one.weight).permute(0, 3, 1, 2)
            )
        return super().forward(x)


def test_readers_that_come_and_go() -> None:
    x = images(2, 3, 7, 5)
    with pytest.raises(TraceError, match=r"one:weight.*smooth=0"):
        ssmquant.prepare(Moody(), CONFIG, example_inputs=(x,))
    ssmquant.prepare(Moody(), QConfig.lsq(4, 4), example_inputs=(x,))


def test_measuring_changes_no_factors() -> None:
    p, x = smoothed()
    before = copy.deepcopy(p.state_dict())
    ssmquant.calibrate(p, [3 * x], fit=False)
    for k, v in p.state_dict().items():
        assert torch.equal(v, before[k]) or k.endswith(".seen"), k


def test_gradients_reach_the_weights() -> None:
    p, x = smoothed()
    p.train()(x).square().sum().backward()
    for name in ("one", "two", "three", "four", "conv"):
        grad = p.get_submodule(name).weight.grad
        assert grad is not None
        assert grad.any()
    for g in of(p).values():
        assert not g.requires_grad


def test_a_checkpoint_has_them() -> None:
    p, x = smoothed()
    other = ssmquant.prepare(Uneven().eval(), CONFIG, example_inputs=(x,))
    other.load_state_dict(p.state_dict())
    assert torch.equal(plain(other.eval(), x), plain(p, x))


def test_files(tmp_path: Path) -> None:
    p, x = smoothed()
    d, path = ssmquant.convert(p), tmp_path / "model.safetensors"
    ssmquant.save(d, path)
    loaded = ssmquant.load(path, Uneven())
    assert torch.equal(plain(loaded, x), plain(d, x))
    assert {k: v.tolist() for k, v in of(loaded).items()} == {k: v.tolist() for k, v in of(d).items()}
    content = path.read_bytes()
    broken: list[tuple[str, Callable[[list[int]], Any]]] = [
        ("not one factor for each", lambda g: g[:-1]),
        ("not one factor for each", lambda g: [*g, 0]),
        ("not one factor for each", lambda g: True),
        ("out of range", lambda g: [-128] * len(g)),
        ("out of range", lambda g: [1.0] * len(g)),
        ("out of range", lambda g: [True] * len(g)),
    ]
    for what, change in broken:
        meta = meta_of(content)
        entry = next(e for e in meta["points"] if "gain" in e)
        entry["gain"] = change(entry["gain"])
        with pytest.raises(FormatError, match=what):
            files_loaded(with_meta(content, meta), Uneven())
    meta = meta_of(content)
    meta["config"]["smooth"] = 0.0
    with pytest.raises(FormatError, match="which the configuration has none of"):
        files_loaded(with_meta(content, meta), Uneven())


def test_bytes_are_those_of_the_file() -> None:
    p, _ = smoothed()
    d = ssmquant.convert(p)
    assert ssmquant.summary(p).bytes == ssmquant.summary(d).bytes
    assert {r.name: r.bytes for r in ssmquant.summary(p).rows} == {
        r.name: r.bytes for r in ssmquant.summary(d).rows
    }


def test_health_sees_what_the_quantizer_gets() -> None:
    p, x = smoothed()
    rows = {r.name: r for r in ssmquant.health(p, x).rows}
    wrapper: Any = runtime_of(p).activations["four:input"]
    seen: list[Tensor] = []
    with wrapper.quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())):
        p(x)
    error = wrapper.quantizer(seen[0]).detach() - seen[0]
    want = 10 * torch.log10(seen[0].square().sum() / error.square().sum())
    assert rows["four:input"].sqnr_db == pytest.approx(float(want), abs=0.01)


def test_half_precision() -> None:
    p, x = smoothed()
    d = ssmquant.convert(p)
    y, half = plain(d, x), plain(copy.deepcopy(d).half(), x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), y, rtol=0.2, atol=0.2 * float(y.abs().max()))


@pytest.mark.parametrize("strength", [-0.1, 1.5, "1", True, None, float("nan")])
def test_strengths(strength: Any) -> None:
    with pytest.raises(ConfigError, match="smooth"):
        QConfig(w_bits=4, a_bits=4, smooth=strength)
