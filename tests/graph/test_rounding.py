"""Rounding by GPTQ: all quantizers and dtypes, whole models before and after, failures that change nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import CalibrationError, QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers import Quantizer
from tests.graph.rounded import gptq, prepared_form
from tests.graph.test_transforms import vim, vmamba
from tests.model_files import meta_of, with_meta
from tests.small import Scanner, images, prepared_and_calibrated, rows, tiny_mambair

# ---- quantizers and dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_bits", [2, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"weight": "rfa"},
        {"weight": "rfa", "weight_options": {"shift": "half"}},
        {"weight": "lsq", "granularity": "tensor"},
        {"weight": "minmax"},
        {"weight": "rlq"},
        {"weight": "rfa", "smooth": 1.0},
        {"weight": "lsq", "smooth": 0.5, "initialization": "published"},
    ],
    ids=str,
)
def test_every_static_quantizer(options: dict[str, Any], w_bits: int) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 7, 5)
    model = prepared_and_calibrated(Scanner(width=6).eval(), gptq(w_bits, **options), x)
    assert all(note.startswith("gptq") for note in runtime_of(model).rounded.values())
    assert len(runtime_of(model).rounded) == 5
    before = copy.deepcopy(model.state_dict())
    ssmquant.calibrate(model, [x * 0.3])
    for (
        k,
        v,
    ) in model.state_dict().items():  # gains and weights' scales are those that weights were rounded for
        assert torch.equal(v, before[k]) or "activations" in k, k
        assert not k.endswith(".gain") or torch.equal(v, before[k]), k
    torch.testing.assert_close(ssmquant.convert(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12).to(dtype)
    model = ssmquant.prepare(nn.Linear(12, 9).to(dtype), gptq(), example_inputs=x)
    ssmquant.calibrate(model, [x])
    assert runtime_of(model).rounded["weight:weight"].startswith("gptq")
    assert model.weight.dtype == dtype
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    assert torch.equal(quantizer.encode(model.weight).decode(), model.weight)


def test_trained_thresholds_that_do_not_give_the_codes_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    model = ssmquant.prepare(nn.Linear(12, 9), gptq(weight="rfa"), example_inputs=x)
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    with torch.no_grad():
        quantizer.grid.add_(1.2)
    before = model.weight.clone()
    ssmquant.calibrate(model, [x])
    assert "trained thresholds" in runtime_of(model).rounded["weight:weight"]
    assert torch.equal(model.weight, before)


def test_in_inference_mode() -> None:
    model, x = prepared_form("conv2d")
    with torch.inference_mode():
        ssmquant.calibrate(model, [x])
    model.train()(x).sum().backward()
    assert next(iter(runtime_of(model).rounded.values())).startswith("gptq")


def test_training_goes_on_from_the_rounded_weights() -> None:
    model, x = prepared_form("linear")
    ssmquant.calibrate(model, [x]).train()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert bool(model.weight.isfinite().all())


def test_trained_weights_are_rounded_again() -> None:
    model, x = prepared_form("linear")
    ssmquant.calibrate(model, [x])
    with torch.no_grad():
        model.weight.add_(0.05 * torch.randn_like(model.weight))
    ssmquant.calibrate(model, [x])
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    assert isinstance(quantizer, Quantizer)
    assert torch.equal(quantizer.encode(model.weight).decode(), model.weight)


# ---- whole models ----------------------------------------------------------------------------------------------------


def zoo_mambair() -> nn.Module:
    return tiny_mambair(embed_dim=16)


@pytest.mark.parametrize(
    "build", [zoo_mambair, vim, lambda: vmamba("v05_noz")], ids=["mambair", "vim", "vmamba"]
)
def test_outputs_of_real_models_get_better(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    data = [images(2, 3, 16, 16, seed=s) for s in range(8)]
    errors = []
    for rounding in ("nearest", "gptq"):
        config = QConfig.mambaquant(3, 8, rounding=rounding, transforms=())
        prepared = ssmquant.prepare(model, config, example_inputs=data[0])
        ssmquant.calibrate(prepared, data[:5]).eval()
        with torch.no_grad():
            errors.append(sum(float((prepared(x) - model(x)).square().mean()) for x in data[5:]))
    assert errors[1] < 0.95 * errors[0]


def test_after_transforms_and_everywhere_it_has_to_be_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 16, 16)
    model = ssmquant.prepare(vim(), QConfig.mambaquant(4, 8, rounding="gptq"), example_inputs=x)
    ssmquant.calibrate(model, [x]).eval()
    runtime = runtime_of(model)
    assert runtime.transforms.applied
    assert sum(note.startswith("gptq") for note in runtime.rounded.values()) >= 8
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert runtime_of(other).rounded == runtime.rounded
        assert torch.equal(other(x), model(x))
    deployed = ssmquant.convert(model)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-4)
    path = tmp_path / "model.safetensors"
    ssmquant.save(deployed, path)
    loaded = ssmquant.load(path)
    assert torch.equal(loaded(x), deployed(x))
    notes = {name: row.note for name, row in rows(model).items()}
    assert notes == {name: row.note for name, row in rows(loaded).items()}
    assert any("of nearest's squared error" in note for note in notes.values())
    content = path.read_bytes()
    path.write_bytes(with_meta(content, {**meta_of(content), "rounded": {"a": 1}}))
    with pytest.raises(ssmquant.FormatError, match="rounded"):
        ssmquant.load(path)
    model.load_state_dict(vim().state_dict())
    assert runtime.rounded == {}


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_a_failure_puts_everything_back(error: type[BaseException], smooth: float) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = ssmquant.prepare(Scanner().eval(), gptq(smooth=smooth), example_inputs=x)
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def forward(m: nn.Module, batch: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the pass that measures inputs
            raise error
        m(batch)

    with pytest.raises(error):
        ssmquant.calibrate(model, [x, x], forward=forward)
    assert calls == 4
    assert runtime_of(model).rounded == {}
    assert runtime_of(model).instead is None
    assert all(torch.equal(v, before[k]) or k.endswith(".seen") for k, v in model.state_dict().items())
    assert all(v.isnan().all() for k, v in model.state_dict().items() if k.endswith(".seen"))


def test_undone_after_half_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmquant.graph.rounding import weights

    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = ssmquant.prepare(Scanner().eval(), gptq(), example_inputs=x)
    before = copy.deepcopy(model.state_dict())
    original, count = weights.round_rows, 0

    def failing(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(weights, "round_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        ssmquant.calibrate(model, [x])
    assert all(torch.equal(v, before[k]) or k.endswith(".seen") for k, v in model.state_dict().items())


def test_nan_in_a_batch_names_the_place_and_changes_nothing() -> None:
    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = ssmquant.prepare(
        Scanner().eval(), gptq(a_bits=None), example_inputs=x
    )  # no quantizer looks at it
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="'stem'"):
        ssmquant.calibrate(model, [x, x * float("nan")])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
