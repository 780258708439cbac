"""The published methods without training as presets of one engine, and the learning of ranges, on real models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import CalibrationError, ConfigError, InputError, NotCalibratedError, QConfig, Rule
from ssmquant.errors import FormatError
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.transforms.choose import even_factors, rotation
from ssmquant.modules.activation import ActivationQuantizer, gains
from ssmquant.quantizers import PTS, Quantizer
from tests.graph.test_gains import Uneven
from tests.graph.test_transforms import vmamba
from tests.model_files import meta_of, with_meta
from tests.small import Scanner, computes_the_same, tiny_mambair
from tests.test_mambaquant import sqnr, uneven_vim

PRESETS: dict[str, Callable[..., QConfig]] = {
    "smoothquant": QConfig.smoothquant,
    "quarot": QConfig.quarot,
    "ptq4vm": QConfig.ptq4vm,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vim": (uneven_vim, (4, 3, 16, 16)),
    "vmamba": (lambda: vmamba("v05_noz"), (2, 3, 16, 16)),
    "mambair": (tiny_mambair, (2, 3, 9, 12)),
}


@functools.cache
def calibrated_once(family: str, config: QConfig) -> tuple[Any, nn.Module, Tensor]:
    build, shape = (Scanner, (2, 3, 8, 8)) if family == "scanner" else MODELS[family]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    prepared = ssmquant.prepare(model, config, example_inputs=x)
    return ssmquant.calibrate(prepared, [x[:1], x[1:]]).eval(), model, x


def calibrated(family: str, config: QConfig) -> tuple[Any, nn.Module, Tensor]:
    """A calibrated model, the float one, and what it is calibrated on: copies for each test."""
    return copy.deepcopy(calibrated_once(family, config))


def activations(model: nn.Module) -> dict[str, Any]:
    found = runtime_of(model).activations.values()
    return {m.name: m for m in found if isinstance(m, ActivationQuantizer)}


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(
        torch.allclose(v, before[k], rtol=0, atol=0, equal_nan=True) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_from_prepare_to_load(preset: str, family: str, tmp_path: Path) -> None:
    config = PRESETS[preset](8, 8)
    prepared, model, x = calibrated(family, config)
    with torch.no_grad():
        assert sqnr(prepared, model, x) > (10 if family == "vim" else 30)  # whose channels are very uneven
        deployed = ssmquant.convert(prepared)
        computes_the_same(deployed, prepared, x)
        torch.testing.assert_close(deployed(x[:1]), deployed(x)[:1], rtol=1e-4, atol=1e-5)
        path = tmp_path / "m.safetensors"
        ssmquant.save(deployed, path)
        loaded = ssmquant.load(path, model)
        assert torch.equal(loaded(x), deployed(x))
        assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))
        if family == "vim":  # each preset once
            fresh = ssmquant.prepare(model, QConfig.from_json(config.to_json()), example_inputs=x)
            fresh.load_state_dict(prepared.state_dict())
            assert torch.equal(fresh.eval()(x), prepared(x))


@pytest.mark.parametrize("family", ["vmamba", "mambair"])
def test_ranges_by_position_at_another_resolution(family: str) -> None:
    prepared, model, x = calibrated(family, QConfig.ptq4vm(8, 8))
    deployed = ssmquant.convert(prepared)
    other = torch.nn.functional.interpolate(x, scale_factor=(2.0, 1.0), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(deployed(other), prepared(other), rtol=1e-4, atol=1e-4)
        assert sqnr(prepared, model, other) > 15


def test_positions_are_what_is_neither_samples_nor_channels() -> None:
    for family, statistics, axes in (
        ("vim", "tensor", {(1,), (2,)}),
        ("vmamba", "sample", {(2,), (2, 3), (1, 2)}),
        ("mambair", "sample", {(1, 2), (2, 3), (1, 3)}),
    ):
        prepared, _, _ = calibrated(family, QConfig.ptq4vm(8, 8, statistics=statistics))
        found = {n: m.quantizer for n, m in activations(prepared).items()}
        assert all(isinstance(q, PTS) for q in found.values())
        assert {q.position_axes for q in found.values()} == axes
    product = next(q for n, q in found.items() if "x_proj" in n)
    assert product._grid == (4, 64)  # four directions of 108


class Folded(nn.Module):
    """Rows of all samples in one axis, as some projections of Mamba have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(y.reshape(-1, 6)).reshape(x.shape)
        return self.c(y)


def test_samples_without_an_axis_share_one_range() -> None:
    x = torch.randn(3, 5, 6)
    config = QConfig.ptq4vm(8, 8, keep_first_last=False)
    prepared = ssmquant.calibrate(ssmquant.prepare(Folded(), config, example_inputs=x), [x]).eval()
    found = {n: m.quantizer.position_axes for n, m in activations(prepared).items()}
    assert found == {"a:input": (1,), "b:input": (), "c:input": (1,)}
    assert prepared(x[:1]).shape == (1, 5, 6)
    torch.testing.assert_close(prepared(x)[:1], prepared(x[:1]))


def test_options_reach_the_tables_and_scans_have_none() -> None:
    positions = {"positions": 9}
    config = QConfig.ptq4vm(8, 8, activation_options=positions, scan_options=positions)
    prepared, _, _ = calibrated("scanner", config)
    assert {m.quantizer.alpha.numel() for m in activations(prepared).values()} == {9}
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="scan_output"):
        ssmquant.prepare(Scanner(), QConfig.ptq4vm(8, 8, scan_bits=8), example_inputs=x)
    with pytest.raises(ConfigError, match="'pts'"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=4, a_bits=4, weight="pts"), example_inputs=x)
    both = QConfig.ptq4vm(8, 8, scan_bits=8, scan="minmax", scan_output="pts")
    prepared, model, x = calibrated("vim", both)
    assert sqnr(prepared, model, x) > 12
    no_convs = QConfig.ptq4vm(8, 8, rules=(Rule("conv", keep_float=True),))
    prepared, _, _ = calibrated("vim", no_convs)
    assert not any("conv" in n for n in activations(prepared))


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    prepared, model, _ = calibrated("vim", QConfig.ptq4vm(8, 8))
    path = tmp_path / "m.safetensors"
    deployed = ssmquant.convert(prepared)
    for m in activations(deployed).values():
        m.quantizer.grid.fill_(1e6)
    ssmquant.save(deployed, path)
    with pytest.raises(FormatError, match="cannot be a grid"):
        ssmquant.load(path, model)
    content = path.read_bytes()
    meta = meta_of(content)
    meta["points"][0]["values"] = ["alpha"]
    path.write_bytes(with_meta(content, meta))
    with pytest.raises(FormatError):
        ssmquant.load(path, model)


# ---- factors of channels -------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_factors_are_those_of_the_paper_up_to_a_power_of_two(
    pairs: list[tuple[float, float]], a: float
) -> None:
    largest, weights = torch.tensor(pairs, dtype=torch.float64).T
    s = largest**a / weights ** (1 - a)
    s = s / s.log2().mean().exp2()  # what all channels share, ranges take
    got = 1 / gains(largest, a, weights)
    wanted = s.log2().clamp(-8, 8)
    assert (got.log2() - wanted).abs().max() <= 0.5 + 1e-6
    assert torch.equal(got.log2(), got.log2().round())
    assert torch.equal(even_factors(largest, weights, a), got)


def test_weights_of_all_readers_count() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = (
                nn.LayerNorm(4),
                nn.Linear(4, 3, bias=False),
                nn.Linear(4, 3, bias=False),
            )
            with torch.no_grad():
                self.a.weight.fill_(1.0)
                self.b.weight.fill_(1.0)
                self.a.weight[1, 0], self.b.weight[2, 3] = 16.0, -16.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.a(y) + self.b(y)

    model = Two().eval()
    x = torch.tensor(
        [[[-1.0, 1.0, -1.0, 1.0]], [[1.0, -1.0, 1.0, -1.0]]]
    )  # even inputs: weights alone decide
    config = QConfig.smoothquant(8, 8, keep_first_last=False)
    prepared = ssmquant.calibrate(ssmquant.prepare(model, config, example_inputs=x), [x]).eval()
    (gain,) = (m.gain for m in activations(prepared).values())
    assert gain.tolist() == [2.0, 0.5, 0.5, 2.0]  # s = 1 / 4, 1, 1, 1 / 4, over their mean
    by_inputs = QConfig.smoothquant(8, 8, keep_first_last=False, smooth_weights=False)
    prepared = ssmquant.calibrate(ssmquant.prepare(model, by_inputs, example_inputs=x), [x])
    assert all((m.gain == 1).all() for m in activations(prepared).values())


def test_smoothing_helps_uneven_channels() -> None:
    x, found = torch.rand(2, 3, 7, 5), []
    for config in (QConfig.minmax(8, 4), QConfig.smoothquant(8, 4)):
        torch.manual_seed(0)
        model = Uneven().eval()
        prepared = ssmquant.calibrate(ssmquant.prepare(model, config, example_inputs=x), [x]).eval()
        found.append(sqnr(prepared, model, x))
    assert found[1] > found[0] + 1
    # in_proj of Vim, whose gate goes to the scan, has its factors behind its norm
    prepared, _, _ = calibrated("vim", QConfig.smoothquant())
    assert {n for n, m in activations(prepared).items() if m.gain is not None} == {
        f"layers.{i}.mixer.in_proj:input" for i in (0, 1)
    }
    assert all(m.gain is None for m in activations(ssmquant.convert(prepared)).values())
    prepared, _, _ = calibrated("vim", QConfig.smoothquant(smooth_weights=False))
    assert all(m.gain is None for m in activations(prepared).values())


# ---- rotations -----------------------------------------------------------------------------------------------------


def test_principal_axes_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    k = rotation(12, covariance, hadamard=False)
    torch.testing.assert_close(k @ k.T, torch.eye(12, dtype=torch.float64))
    turned = k @ covariance @ k.T
    torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-8, rtol=0)
    assert turned.diagonal().max() > 100 * turned.diagonal().min()
    even = rotation(12, covariance) @ covariance @ rotation(12, covariance).T
    torch.testing.assert_close(even.diagonal(), even.diagonal().mean().expand(12))
    identity = torch.eye(12, dtype=torch.float64)
    assert torch.equal(rotation(12, hadamard=False), identity)
    assert torch.equal(rotation(12, covariance * torch.nan, hadamard=False), identity)


def test_kinds_of_rotations_keep_the_function_and_are_listed() -> None:
    x = torch.randn(4, 3, 16, 16)
    model = uneven_vim()
    names = ("dt_rotation", "out_rotation", "residual_rotation")
    for kind, has, lacks in (
        ("klt", "KLT and Hadamard", "no such word"),
        ("hadamard", "Hadamard", "KLT"),
        ("klt_only", "KLT of", "KLT and Hadamard"),
    ):
        prepared = ssmquant.prepare(model, QConfig(transforms=names, rotation=kind), example_inputs=x)
        ssmquant.calibrate(prepared, [x])
        torch.testing.assert_close(prepared.eval()(x), model(x), rtol=1e-4, atol=1e-5)
        text = str(ssmquant.summary(prepared))
        assert has in text
        assert lacks not in text
        assert "at run time" in text
    prepared, _, _ = calibrated("vim", QConfig.quarot(8, 8))
    kinds = {kind for kind, *_ in runtime_of(prepared).transforms.applied}
    assert {"out_rotation", "residual_rotation"} <= kinds
    assert not any(m.gain is not None for m in activations(prepared).values())


def test_presets_survive_json_and_older_files_stay() -> None:
    for preset in PRESETS.values():
        config = preset(4, 8, keep_gates=False)
        assert QConfig.from_json(config.to_json()) == config
    assert "smooth_weights" not in QConfig.recommended(4, 4).to_dict()
    assert QConfig.smoothquant(alpha=0.7).smooth == 0.7
    assert QConfig.ptq4vm(positions := 4).w_bits == positions
    for bad in ({"smooth_weights": 1}, {"rotation": "klt-only"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            QConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="smooth"):
        QConfig.smoothquant(alpha=1.5)


# ---- learning of ranges --------------------------------------------------------------------------------------------


def distance(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - reference(x)).square().mean())


@pytest.mark.parametrize(
    ("family", "loss"), [("vim", "cosine"), ("vim", "mse"), ("vmamba", "cosine"), ("mambair", "mse")]
)
def test_learning_comes_closer_and_leaves_the_weights(family: str, loss: str) -> None:
    prepared, model, x = calibrated(family, QConfig.ptq4vm(4, 4))
    prepared.train()
    float_before = kept(model)
    frozen = next(p for n, p in prepared.named_parameters() if not n.startswith("_ssmquant"))
    frozen.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in prepared.named_parameters()}
    before = kept(prepared)
    prepared.eval()
    far = distance(prepared, model, x)
    prepared.train()
    out = ssmquant.learn_ranges(prepared, [x[:1], x[1:]], model, steps=12, loss=loss, lr=0.02, progress=False)
    assert out is prepared
    assert prepared.training
    assert not model.training
    assert {n: p.requires_grad for n, p in prepared.named_parameters()} == flags
    assert all(p.grad is None for p in prepared.parameters())
    changed = {k for k, v in prepared.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("_ssmquant.") and k.endswith(("alpha", "beta")) for k in changed)
    assert same(model, float_before)
    prepared.eval()
    assert distance(prepared, model, x) < 0.9 * far
    deployed = ssmquant.convert(prepared)
    computes_the_same(deployed, prepared, x)


def test_learning_is_for_all_quantizers_that_learn() -> None:
    for config in (QConfig.recommended(4, 4), QConfig.qmambair(4), QConfig.lsq(3, 3)):
        prepared, model, x = calibrated("scanner", config)
        far = distance(prepared, model, x)
        ssmquant.learn_ranges(prepared, [x], model, steps=10, loss="mse", progress=False)
        assert distance(prepared, model, x) < far


def test_it_learns_the_same_again_and_in_other_modes() -> None:
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        prepared, model, x = calibrated("scanner", QConfig.ptq4vm(4, 4))
        with mode():
            ssmquant.learn_ranges(prepared, (b for b in [x]), model, steps=2, progress=True)
        results.append(prepared(x).detach())
    assert all(torch.equal(r, results[0]) for r in results)


def test_methods_batches_and_outputs_of_other_forms() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def encode(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            y = self.b(self.a(x) * scale)
            return {"one": self.c(y), "two": y}

    model, x, scale = Pair().eval(), torch.randn(4, 5, 6), torch.tensor(2.0)
    config = QConfig.lsq(3, 3, keep_first_last=False)
    prepared = ssmquant.prepare(model, config, example_inputs=(x, scale), method="encode")
    ssmquant.calibrate(prepared, [{"x": x, "scale": scale}])
    ssmquant.learn_ranges(prepared, [{"x": x, "scale": scale}], model, steps=2, progress=False)
    ssmquant.learn_ranges(
        prepared, [x], model, steps=2, forward=lambda m, batch: m.encode(batch, scale), progress=False
    )
    with pytest.raises(InputError, match="neither a tensor"):
        ssmquant.learn_ranges(prepared, [3], model, progress=False)


def test_nan_puts_everything_back() -> None:
    prepared, model, x = calibrated("scanner", QConfig.ptq4vm(4, 4))
    before, modes = kept(prepared), [m.training for m in prepared.modules()]
    calls = 0

    def forward(m: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += m is prepared
        y = m(batch)
        return y * torch.nan if calls == 3 else y

    with pytest.raises(CalibrationError, match="NaN or inf"):
        ssmquant.learn_ranges(prepared, [x], model, steps=5, forward=forward, progress=False)
    assert calls == 3  # before, and at the second update
    assert same(prepared, before)
    assert [m.training for m in prepared.modules()] == modes
    assert all(p.requires_grad for p in prepared.parameters())
    with pytest.raises(CalibrationError, match="the float model's own output"):
        ssmquant.learn_ranges(prepared, [x * torch.nan], model, progress=False)
    with pytest.raises(KeyboardInterrupt):
        ssmquant.learn_ranges(prepared, [x], model, forward=interrupted, progress=False)
    assert same(prepared, before)


def interrupted(model: nn.Module, batch: Any) -> Any:
    raise KeyboardInterrupt


def test_bad_arguments_of_learning() -> None:
    prepared, model, x = calibrated("scanner", QConfig.ptq4vm(4, 4))
    for changes, text in (
        ({"steps": 0}, "steps"), ({"steps": True}, "steps"), ({"lr": 0.0}, "lr"), ({"lr": float("nan")}, "lr"),
        ({"loss": "kl"}, "loss"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            ssmquant.learn_ranges(prepared, [x], model, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reference"):
        ssmquant.learn_ranges(prepared, [x], prepared)
    with pytest.raises(ConfigError):
        ssmquant.learn_ranges(model, [x], model)
    with pytest.raises(InputError, match="no batch"):
        ssmquant.learn_ranges(prepared, [], model)
    with pytest.raises(InputError, match="shapes"):
        ssmquant.learn_ranges(prepared, [x], nn.Flatten().eval(), progress=False)
    static, _, _ = calibrated("scanner", QConfig.minmax(8, 8))
    with pytest.raises(ConfigError, match="min-max"):
        ssmquant.learn_ranges(static, [x], model)
    fresh = ssmquant.prepare(model, QConfig.ptq4vm(4, 4), example_inputs=x)
    with pytest.raises(NotCalibratedError):
        ssmquant.learn_ranges(fresh, [x], model, progress=False)


def test_quantizers_that_were_frozen_stay() -> None:
    prepared, model, x = calibrated("scanner", QConfig.ptq4vm(4, 4))
    weights = [q for q in runtime_of(prepared).weights.values() if isinstance(q, Quantizer)]
    for q in weights:
        q.requires_grad_(False)
    before = [kept(q) for q in weights]
    ssmquant.learn_ranges(prepared, [x], model, steps=2, progress=False)
    assert all(same(q, b) for q, b in zip(weights, before, strict=True))


def test_learning_never_ends_further_off_than_it_started() -> None:
    prepared, model, x = calibrated("scanner", QConfig.ptq4vm(4, 4))
    before = kept(prepared)
    ssmquant.learn_ranges(prepared, [x], model, steps=2, lr=50.0, progress=False)
    assert same(prepared, before)
