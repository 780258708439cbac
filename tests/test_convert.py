"""convert: a deployed model computes what the prepared one does, and holds no float copy."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmquant
from ssmquant import ConfigError, QConfig, SsmquantError
from ssmquant.graph.runtime import runtime_of
from tests.small import (
    Chain,
    Scanner,
    X,
    assert_same_state,
    fresh,
    images,
    packed,
    points,
    prepared_and_calibrated,
    scanner,
    state_of,
    tiny_mambair,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

CONFIGS = {
    "w2a2": QConfig.qmambair(2),
    "w3a3": QConfig.qmambair(3),
    "w4a4": QConfig.qmambair(4),
    "w8a8": QConfig.qmambair(8),
    "w5a6, scan 7": QConfig(w_bits=5, a_bits=6, scan_bits=7),
    "lsq": QConfig.lsq(2, 4),
    "minmax": QConfig.minmax(4, 8),
    "channel": QConfig.qmambair(2, granularity="channel"),
    "lsq, channel": QConfig.lsq(3, 3, granularity="channel"),
    "direction": QConfig.qmambair(2, granularity="direction"),
    "channel, half a step": QConfig.qmambair(3, granularity="channel", weight_options={"shift": "half"}),
    "recommended": QConfig.recommended(2, 2),
    "recommended, 4": QConfig.recommended(4, 4),
    "recommended, DLS": QConfig.recommended(2, 2, scan="dls"),
    "published start": QConfig.qmambair(2, initialization="published"),
    "no shift": QConfig.lsq(2, 2, weight_options={"shift": "none"}, activation_options={"shift": "none"}),
    "quantsr": QConfig(w_bits=2, a_bits=2, weight="rlq", activation="rlq", scan="rlq"),
    "n2uq": QConfig(w_bits=2, a_bits=2, weight="n2uq", activation="n2uq", scan="n2uq", granularity="channel"),
    "pact": QConfig(w_bits=4, a_bits=4, weight="dorefa", activation="pact", scan="pact"),
    "per tensor": QConfig.qmambair(2, statistics="tensor"),
    "official": QConfig.qmambair(2, official=True),
    "weights only": QConfig(w_bits=2),
    "activations only": QConfig(a_bits=4),
    "scan only": QConfig(scan_bits=4),
    "everything": QConfig(w_bits=2, a_bits=4, keep_first_last=False, keep_gates=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = tiny_mambair()
    prepared = prepared_and_calibrated(model, CONFIGS[name], images(2, 3, 8, 10))
    with torch.no_grad():  # as after training
        for n, p in prepared.named_parameters():
            if n.startswith("_ssmquant."):
                p.add_(0.02 * torch.randn_like(p) * p.abs().mean())
    before = state_of(prepared)
    deployed = ssmquant.convert(prepared)
    with torch.no_grad():
        for size in ((1, 3, 8, 10), (3, 3, 9, 6)):
            x = images(*size)
            assert torch.equal(deployed(x), prepared(x)), size
    assert not torch.allclose(deployed(x), model.eval()(x), atol=1e-5)
    assert_same_state(state_of(prepared), before)
    prepared.train()
    prepared(x).sum().backward()


WEIGHTS = {
    **{f"{w}, {s}": {"weight": w, "weight_options": {"shift": s}}
       for w in ("lsq", "rfa") for s in ("learned", "half", "none")},
    **{w: {"weight": w} for w in ("dls", "dorefa", "minmax", "n2uq", "pact", "rlq")},
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_zeros(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Scanner(16)
    nn.init.zeros_(model.out_proj.weight)
    nn.init.zeros_(model.D)
    with torch.no_grad():
        model.x_proj[:3] = 0
    for granularity in ("tensor", "channel"):
        config = QConfig(w_bits=2, a_bits=8, granularity=granularity, **WEIGHTS[name])
        prepared = ssmquant.prepare(model, config, example_inputs=(X,)).eval()
        ssmquant.calibrate(prepared, [X])
        deployed = ssmquant.convert(prepared)
        ssmquant.save(deployed, tmp_path / "m")
        again = ssmquant.load(tmp_path / "m", Scanner(16))
        for m in (deployed, again):
            assert not packed(m)["out_proj:weight"]().any()
            assert not packed(m)["scan/D"]().any()
            assert torch.equal(m(X), prepared(X))
            rest = packed(m)["x_proj:weight"]()
            if granularity == "channel":
                assert rest[:3].abs().max() < 1e-3 * rest[3:].abs().mean()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
def test_padded_borders(mode: str, padding: Any) -> None:
    middle = nn.Conv2d(4, 4, (5, 3), padding=padding, padding_mode=mode, groups=2)
    model = Chain(middle)
    bypass = ssmquant.prepare(model, QConfig(), example_inputs=(X,))
    assert torch.equal(bypass(X), model(X))
    prepared = prepared_and_calibrated(model, QConfig(w_bits=3, a_bits=3), X)
    # The reference: the module itself on the quantized input and weight.
    q = runtime_of(prepared)
    x = q.activations["middle:input"](prepared.first(X))
    weight = q.weights["middle:weight"](middle.weight)
    other = copy.deepcopy(middle)
    other.weight = nn.Parameter(weight)
    assert torch.equal(prepared(X), prepared.last(F.silu(other(x))))
    deployed = ssmquant.convert(prepared)
    for size in ((1, 3, 6, 5), (3, 3, 9, 7)):
        assert torch.equal(deployed(images(*size)), prepared(images(*size)))


def test_frozen_ranges_do_not_depend_on_the_batch() -> None:
    prepared = scanner(4)
    frozen, dynamic = ssmquant.convert(prepared, dls="frozen"), ssmquant.convert(prepared)
    assert not torch.equal(frozen(X), dynamic(X))
    assert (frozen(X) - dynamic(X)).abs().mean() < 0.1 * (dynamic(X) - X).abs().mean()
    close = functools.partial(
        torch.testing.assert_close, rtol=1e-5, atol=1e-5
    )  # BLAS rounds by the size of its task
    close(frozen(X)[1:], frozen(X[1:]))
    # Ranges do not follow the data: with a second sample a hundred times larger, the first stays.
    close(frozen(torch.cat((X[:1], 100 * X[1:])))[:1], frozen(X[:1]))
    trained = fresh().train()
    trained(X)
    with pytest.raises(ConfigError, match=r"calibrate"):
        ssmquant.convert(trained, dls="frozen")


@pytest.mark.parametrize("statistics", ["sample", "tensor"])
def test_batch_independence(statistics: str) -> None:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(Scanner(), QConfig(w_bits=2, a_bits=2, statistics=statistics), X)
    x = torch.cat((X[:1], 5 * X[1:]))
    for model in (prepared, ssmquant.convert(prepared)):
        alone = torch.cat([model(s[None]) for s in x])
        error = (model(x) - alone).abs().max()
        assert error < 1e-5 if statistics == "sample" else error > 1e-2


def test_per_tensor_statistics_of_one_sample_are_per_sample() -> None:
    torch.manual_seed(0)
    model = Scanner()
    both = [
        prepared_and_calibrated(model, QConfig(w_bits=2, a_bits=2, statistics=s), X[:1])
        for s in ("sample", "tensor")
    ]
    torch.testing.assert_close(both[0](X[:1]), both[1](X[:1]))


def test_deployed_models_cannot_be_trained_or_converted() -> None:
    deployed = ssmquant.convert(scanner())
    assert deployed.eval() is deployed
    with pytest.raises(SsmquantError, match="cannot be trained"):
        deployed.train()
    assert not any(p.requires_grad for p in deployed.parameters())
    with pytest.raises(ConfigError, match="expected a prepared model"):
        ssmquant.convert(deployed)
    with pytest.raises(ConfigError, match=r"ssmquant\.prepare"):
        ssmquant.convert(Scanner())


def test_a_refused_train_leaves_the_mode() -> None:
    deployed = ssmquant.convert(scanner())
    with pytest.raises(SsmquantError):
        deployed.train()
    assert not any(m.training for m in deployed.modules())


def test_convert_checks_its_arguments() -> None:
    with pytest.raises(ConfigError, match="'dynamic' or 'frozen'"):
        ssmquant.convert(scanner(), dls="static")
    with pytest.raises(ConfigError, match="float_dtype"):
        ssmquant.convert(scanner(), float_dtype=torch.int8)


def test_deployed_models_hold_no_float_copy() -> None:
    torch.manual_seed(0)
    model = Scanner(width=32)
    prepared = prepared_and_calibrated(model, QConfig(w_bits=2, a_bits=2), X)
    deployed = ssmquant.convert(prepared)
    for gone in (deployed.in_proj.weight, deployed.x_proj, deployed.A_log, deployed.D, deployed.dt_bias):
        assert gone is None
    tensors = [*deployed.parameters(), *deployed.buffers()]
    kept = {n for n, _ in deployed.named_parameters() if not n.startswith("_ssmquant.")}
    assert kept == {"stem.weight", "stem.bias", "out_proj.bias", "head.weight", "head.bias"}
    # Whatever the object graph still holds: pickle sees all of it.
    assert sum(t.numel() * t.element_size() for t in tensors) < 11_000
    codes = packed(deployed)
    assert set(codes) == {
        k for k, p in ((p.key, p) for p in points(prepared).values()) if p.what != "activation"
    }
    shapes = {k: m.shape for k, m in codes.items()}
    assert shapes["in_proj:weight"] == (32, 32)
    assert codes["in_proj:weight"].codes.numel() == 32 * 32 // 4
    fakes = runtime_of(prepared).weights["in_proj:weight"](prepared.in_proj.weight)
    assert torch.equal(codes["in_proj:weight"](), fakes)
