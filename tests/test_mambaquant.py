"""``QConfig.mambaquant``: prepare, calibrate and convert with transforms; they are kept, listed, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import CalibrationError, ConfigError, FormatError, QConfig, zoo
from ssmquant.config import TRANSFORMS
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers import MinMax
from tests.model_files import meta_of, with_meta
from tests.small import computes_the_same, tiny_mambair


def uneven_vim() -> nn.Module:
    """A small Vim with channels of very different size, as trained ones have."""
    model = zoo.build(
        "VisionMamba", img_size=16, patch_size=4, stride=4, depth=2, embed_dim=16, d_state=4, num_classes=6,
        drop_path_rate=0.0, final_pool_type="mean",
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("conv1d.weight", "conv1d_b.weight", "norm.weight")):
                p.mul_(torch.exp(torch.randn(p.shape[0]).abs() * 1.5).reshape(-1, *[1] * (p.dim() - 1)))
    return model.eval()


@torch.no_grad()
def sqnr(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    expected = original(x)
    return float(10 * (expected.square().mean() / (model(x) - expected).square().mean()).log10())


def calibrated(model: nn.Module, x: Tensor, **changes: Any) -> Any:
    prepared = ssmquant.prepare(model, QConfig.mambaquant(8, 8, **changes), example_inputs=x)
    return ssmquant.calibrate(prepared, [x]).eval()


def vim_and_images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return uneven_vim(), torch.randn(8, 3, 16, 16)


def test_the_float_model_stays_and_the_prepared_one_is_better() -> None:
    model, x = vim_and_images()
    before = copy.deepcopy(model.state_dict())
    plain, ours = calibrated(model, x, transforms=()), calibrated(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sqnr(ours, model, x) > sqnr(plain, model, x) + 1


def test_transforms_alone_keep_the_function() -> None:
    model, x = vim_and_images()
    prepared = ssmquant.prepare(model, QConfig(transforms=TRANSFORMS), example_inputs=x)
    ssmquant.calibrate(prepared, [x])
    assert runtime_of(prepared).transforms.applied
    torch.testing.assert_close(prepared.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_hadamard_rotations_differ_from_klt() -> None:
    model, x = vim_and_images()
    one, two = calibrated(model, x), calibrated(model, x, rotation="hadamard")
    assert not torch.equal(one.head.weight, two.head.weight)
    assert "KLT" in str(ssmquant.summary(one))
    assert "KLT" not in str(ssmquant.summary(two))


@pytest.mark.parametrize("build", [uneven_vim, tiny_mambair])
def test_the_deployed_model_keeps_them(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    x = torch.rand(4, 3, 16, 16)
    prepared = calibrated(model, x)
    deployed = ssmquant.convert(prepared)
    computes_the_same(deployed, prepared, x)
    listed = ssmquant.summary(deployed)
    assert listed.transforms == ssmquant.summary(prepared).transforms != ()
    assert "out_rotation" in str(listed)
    ssmquant.save(deployed, tmp_path / "m.safetensors")
    again = ssmquant.load(tmp_path / "m.safetensors", model)
    torch.testing.assert_close(again(x), deployed(x), rtol=0, atol=0)
    assert ssmquant.summary(again).transforms == listed.transforms
    assert ssmquant.summary(again).not_transformed == listed.not_transformed


def test_other_resolutions_after_conversion() -> None:
    torch.manual_seed(0)
    model = tiny_mambair().eval()
    prepared = calibrated(model, torch.rand(2, 3, 12, 12))
    deployed = ssmquant.convert(prepared)
    x = torch.rand(1, 3, 9, 14)
    computes_the_same(deployed, prepared, x)
    assert sqnr(deployed, model, x) > 20


def test_what_does_not_apply_is_listed() -> None:
    torch.manual_seed(0)
    prepared = calibrated(tiny_mambair().eval(), torch.rand(2, 3, 8, 8))
    text = str(ssmquant.summary(prepared))
    assert "residual_rotation" in text
    assert "skip_scale' scales its channels one by one; likewise at 2 more norms" in text


def test_copies_pickles_and_checkpoints() -> None:
    model, x = vim_and_images()
    prepared = calibrated(model, x)
    expected = prepared(x)
    assert torch.equal(copy.deepcopy(prepared)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(prepared)).eval()(x), expected)
    fresh = ssmquant.prepare(model, QConfig.mambaquant(8, 8), example_inputs=x)
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh.eval()(x), expected)
    # A float checkpoint fits the model's code as it is.
    prepared.load_state_dict(model.state_dict())
    assert not runtime_of(prepared).transforms.places
    ssmquant.calibrate(prepared, [x])
    torch.testing.assert_close(prepared.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_a_second_calibration_leaves_the_transforms() -> None:
    model, x = vim_and_images()
    prepared = calibrated(model, x)
    weights = {k: v.clone() for k, v in prepared.named_parameters() if not k.startswith("_ssmquant")}
    ssmquant.calibrate(prepared, [x[:4]])
    assert all(torch.equal(v, dict(prepared.named_parameters())[k]) for k, v in weights.items())


def test_it_trains_afterwards() -> None:
    model, x = vim_and_images()
    prepared = calibrated(model, x).train()
    prepared(x).square().mean().backward()
    assert prepared.layers[0].mixer.in_proj.weight.grad.abs().sum() > 0


def test_nan_is_refused_and_changes_nothing() -> None:
    model, x = vim_and_images()
    prepared = ssmquant.prepare(model, QConfig.mambaquant(), example_inputs=x)
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(CalibrationError, match="NaN or inf"):
        ssmquant.calibrate(prepared, [x * float("nan")])
    for name, value in prepared.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(CalibrationError, match="no batch"):
        ssmquant.calibrate(prepared, [])


def test_an_iterator_of_batches_of_other_sizes() -> None:
    torch.manual_seed(0)
    prepared = ssmquant.prepare(
        tiny_mambair().eval(), QConfig.mambaquant(), example_inputs=torch.rand(1, 3, 8, 8)
    )
    ssmquant.calibrate(prepared, (torch.rand(1, 3, 8, s) for s in (8, 11)), max_batches=2)
    assert runtime_of(prepared).transforms.applied


def test_malformed_files(tmp_path: Path) -> None:
    model, x = vim_and_images()
    path = tmp_path / "m.safetensors"
    ssmquant.save(ssmquant.convert(calibrated(model, x)), path)
    content = path.read_bytes()
    meta = meta_of(content)
    for places in ([["scan_input:a#0", [2**30]]], [["a.b", [1]]], meta["transforms"]["places"][1:], 3):
        broken = copy.deepcopy(meta)
        broken["transforms"]["places"] = places
        path.write_bytes(with_meta(content, broken))
        with pytest.raises(FormatError):
            ssmquant.load(path, model)


@pytest.mark.parametrize("changes", [{"transforms": "dt_mean"}, {"transforms": ("dt",)}, {"rotation": "dct"}])
def test_bad_configurations(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        QConfig.mambaquant(**changes)


def test_the_preset_leaves_the_kernels_that_a_deployed_model_runs_in() -> None:
    model, x = vim_and_images()

    def used(**changes: Any) -> list[str]:
        deployed = ssmquant.convert(calibrated(model, x, **changes))
        return sorted(runtime_of(deployed).records[0].kernels(deployed).values())

    assert used() == used(transforms=())
    assert "scan_input" not in QConfig.mambaquant().transforms  # which knows no kernel of codes yet


def test_the_preset_survives_json() -> None:
    config = QConfig.mambaquant(4, 8)
    assert QConfig.from_json(config.to_json()) == config
    assert (config.w_bits, config.a_bits, config.weight) == (4, 8, "lsq")
    assert QConfig.mambaquant().weight == "minmax"


def test_percentiles() -> None:
    x = torch.cat([torch.linspace(0, 1, 1001), torch.tensor([100.0])])
    cut, whole = MinMax(8, percentile=0.999), MinMax(8)
    for q in (cut, whole):
        q.fit([x[:500], x[500:]])
    assert float(whole.high) == 100
    assert 0.99 < float(cut.high) <= 1.01
    assert float(cut.low) == pytest.approx(0.001, abs=1e-4)
    for bad in (0.5, 1.5, True):
        with pytest.raises(ConfigError, match="percentile"):
            MinMax(8, percentile=bad)
