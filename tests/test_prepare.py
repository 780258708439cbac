"""prepare: what it leaves as it was, examples, refusals, other methods than forward, rules that reach quantizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, InputError, MethodError, QConfig, Rule
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers import LSQ, RFA
from tests.small import (
    Chain,
    Scanner,
    X,
    assert_same_state,
    images,
    packed,
    pickled,
    points,
    prepared_and_calibrated,
    scanner,
    state_of,
    tiny_mambair,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")


def test_prepare_leaves_the_original_as_it_was() -> None:
    model = Scanner()
    model.stem.eval()
    model.A_log.requires_grad_(False)
    before = state_of(model)
    keys = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    modes = {n: m.training for n, m in model.named_modules()}
    rng = torch.get_rng_state()
    prepared = ssmquant.prepare(model, QConfig(w_bits=2, a_bits=2), example_inputs=(X,))
    assert torch.equal(torch.get_rng_state(), rng)
    prepared.train()
    (prepared(X).square().mean()).backward()
    assert type(model) is Scanner
    assert_same_state(state_of(model), before)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    assert not prepared.A_log.requires_grad


def test_prepare_keeps_class_names_and_modes() -> None:
    model = Scanner()
    model.stem.eval()
    prepared = ssmquant.prepare(model, QConfig(w_bits=2, a_bits=2), example_inputs=(X,))
    assert isinstance(prepared, Scanner)
    assert type(prepared).__name__ == "Scanner"
    assert prepared.training
    assert not prepared.stem.training
    own = [n for n, _ in prepared.named_parameters() if not n.startswith("_ssmquant.")]
    assert own == [n for n, _ in model.named_parameters()]
    assert "linear" in prepared.code
    assert prepared.graph is not None


def test_prepare_without_an_example_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"Scanner.*example_inputs=\(x,\)"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=2, a_bits=2))


def test_prepare_takes_the_adapters_example() -> None:
    prepared = ssmquant.prepare(tiny_mambair(), QConfig(w_bits=2, a_bits=2))
    assert prepared(images(1, 3, 8, 8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {"y": X}), ((X, X), {}), ((X,), {"x": X})], ids=["keyword", "too many", "twice"]
)
def test_prepare_refuses_an_example_that_does_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the example does not fit Scanner"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=2), example_inputs=args, example_kwargs=kwargs)


def test_prepare_refuses_examples_without_data() -> None:
    with pytest.raises(ConfigError, match="no tensor"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=2), example_inputs=(3,))
    with pytest.raises(InputError, match="empty"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=2), example_inputs=(X[:0],))


def test_prepare_refuses_wrong_types() -> None:
    config = QConfig(w_bits=2, a_bits=2)
    with pytest.raises(ConfigError, match=r"nn\.Module"):
        ssmquant.prepare(Scanner, config, example_inputs=(X,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="QConfig"):
        ssmquant.prepare(Scanner(), {"w_bits": 2}, example_inputs=(X,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no method 'encode'"):
        ssmquant.prepare(Scanner(), config, example_inputs=(X,), method="encode")
    with pytest.raises(ConfigError, match="known adapters are"):
        ssmquant.prepare(Scanner(), config, example_inputs=(X,), adapter="nonesuch")
    with pytest.raises(ConfigError, match="dlss"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=2, a_bits=2, scan="dlss"), example_inputs=(X,))


def test_a_model_is_prepared_once() -> None:
    with pytest.raises(ConfigError, match="prepared already"):
        ssmquant.prepare(scanner(), QConfig(w_bits=2), example_inputs=(X,))
    with pytest.raises(ConfigError, match="prepared already"):
        ssmquant.prepare(ssmquant.convert(scanner()), QConfig(w_bits=2), example_inputs=(X,))


def test_bits_none_changes_nothing() -> None:
    torch.manual_seed(3)
    for model, x in ((Scanner(), X), (tiny_mambair(), images(1, 3, 7, 9))):
        prepared = ssmquant.prepare(model, QConfig(), example_inputs=(x,))
        for mode in (True, False):
            model.train(mode)
            prepared.train(mode)
            assert torch.equal(prepared(x), model(x))
        deployed = ssmquant.convert(prepared)
        assert torch.equal(deployed(x), model(x))


def test_quantization_changes_something() -> None:
    torch.manual_seed(3)
    model = Scanner().eval()
    prepared = prepared_and_calibrated(model, QConfig(w_bits=2, a_bits=2), X)
    assert not torch.allclose(prepared(X), model(X), rtol=1e-3, atol=1e-3)
    fine = prepared_and_calibrated(model, QConfig(w_bits=8, a_bits=8, scan="lsq"), X)
    signal = (model(X) - X).square().mean()
    assert (fine(X) - model(X)).square().mean() < 1e-3 * signal


# ---- other methods -------------------------------------------------------------------------------------------------


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))

    def sizes(self) -> int:
        return len(self.inner)


def test_quantized_modules_refuse_to_be_called_directly() -> None:
    x = torch.randn(3, 4)
    prepared = prepared_and_calibrated(TwoWays(), QConfig(w_bits=4, a_bits=4), x)
    for model in (prepared, ssmquant.convert(prepared)):
        for call in (model.inner[0], model.inner, model.encode):
            with pytest.raises(MethodError, match=r"inner.*method="):
                call(x)
        assert model.sizes() == 3
        assert model.first(x).shape == (3, 4)  # float: free to use
        assert model(x).shape == (3, 2)


def test_another_method_can_be_prepared() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    model = TwoWays()
    prepared = ssmquant.prepare(model, QConfig(w_bits=4, a_bits=4), example_inputs=(x,), method="encode")
    assert set(points(prepared)) == {
        "inner.0:weight",
        "inner.0:input",
    }  # first and last of what is traced: float
    ssmquant.calibrate(prepared, [x])
    prepared.eval()
    assert not torch.equal(prepared.encode(x), model.encode(x))
    assert torch.equal(
        prepared(x), prepared.head(prepared.encode(x))
    )  # forward goes through the prepared method
    deployed = ssmquant.convert(prepared)
    assert torch.equal(deployed.encode(x), prepared.encode(x))
    assert torch.equal(deployed(x), prepared(x))
    assert ssmquant.verify(prepared, deployed, (x,)).worst_abs == 0
    assert torch.equal(copy.deepcopy(deployed).encode(x), deployed.encode(x))
    assert torch.equal(pickled(deployed).encode(x), deployed.encode(x))


def test_forward_features() -> None:
    torch.manual_seed(0)
    x = images(1, 8, 6, 6)
    config = QConfig.qmambair(2)
    prepared = ssmquant.prepare(tiny_mambair(), config, example_inputs=(x,), method="forward_features")
    ssmquant.calibrate(prepared, [x])
    prepared.eval()
    deployed = ssmquant.convert(prepared)
    assert torch.equal(deployed.forward_features(x), prepared.forward_features(x))
    picture = images(2, 3, 5, 7)
    assert torch.equal(deployed(picture), prepared(picture))


# ---- schemes -------------------------------------------------------------------------------------------------------


def test_rules_reach_the_quantizers() -> None:
    torch.manual_seed(0)
    config = QConfig(
        w_bits=4, a_bits=4,
        rules=(
            Rule("in_proj", w_bits=8, weight="lsq"),
            Rule("scan.A", a_bits=None),
            Rule("scan", a_bits=6, activation="minmax"),
            Rule("out_proj", keep_float=True),
        ),
    )  # fmt: skip
    prepared = ssmquant.prepare(Scanner(), config, example_inputs=(X,))
    found = {k: (p.scheme.bits, p.scheme.method, p.what) for k, p in points(prepared).items()}
    assert found["in_proj:weight"] == (8, "lsq", "weight")
    assert found["in_proj:input"] == (4, "lsq", "activation")
    assert "scan.A" not in found
    assert found["scan.u"] == (6, "minmax", "activation")
    assert found["scan.D"] == (6, "minmax", "static")
    assert not [k for k in found if k.startswith("out_proj")]
    assert isinstance(runtime_of(prepared).weights["in_proj:weight"], LSQ)
    assert isinstance(runtime_of(prepared).weights["x_proj:weight"], RFA)
    ssmquant.calibrate(prepared, [X]).eval()
    deployed = ssmquant.convert(prepared)
    assert torch.equal(deployed(X), prepared(X))
    assert deployed.A_log is not None
    assert deployed.out_proj.weight is not None


def test_channel_scales() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(6, 4, 3, padding=1)))
    with torch.no_grad():
        model.middle[0].weight[3] *= 100
        model.middle[1].weight[:, 2] *= 100
    prepared = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=8, granularity="channel"), X)
    deployed = ssmquant.convert(prepared)
    assert packed(deployed)["middle/0:weight"].scale.shape == (6, 1, 1, 1)
    assert packed(deployed)["middle/1:weight"].scale.shape == (1, 4, 1, 1)
    assert torch.equal(deployed(X), prepared(X))
    for i, dims in enumerate(((1, 2, 3), (0, 2, 3))):
        weight = model.middle[i].weight
        error = (packed(deployed)[f"middle/{i}:weight"]() - weight).square().sum(dims) / weight.square().sum(
            dims
        )
        assert (error < 0.05).all(), error
