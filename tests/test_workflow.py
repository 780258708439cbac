"""prepare, calibrate, train, convert: what a user relies on, on small models."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ssmquant
from ssmquant import (
    CalibrationError,
    ConfigError,
    InputError,
    MethodError,
    NotCalibratedError,
    QConfig,
    Rule,
    SsmquantError,
)
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer, PackedTensor
from ssmquant.quantizers import LSQ, RFA
from tests.small import Chain, Scanner, images, points, prepared_and_calibrated, scanner, tiny_mambair

X = images(2, 3, 6, 5)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_state(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """The packed codes of every weight and static operand of a conversion."""
    weights = runtime_of(ssmquant.convert(model)).weights
    return {k: m.codes.clone() for k, m in weights.items() if isinstance(m, PackedTensor)}


def packed(model: nn.Module) -> dict[str, PackedTensor]:
    return {k: m for k, m in runtime_of(model).weights.items() if isinstance(m, PackedTensor)}


pytestmark = pytest.mark.usefixtures("plain_graphs")


@pytest.fixture(scope="module")
def mambair() -> Any:
    """A calibrated W4A4 MambaIR; tests copy it."""
    torch.manual_seed(0)
    model = tiny_mambair()
    return prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), images(2, 3, 8, 10))


# ---- prepare -------------------------------------------------------------------------------------------------------


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
    assert "F.linear" in prepared.code or "linear" in prepared.code
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


def test_bits_none_changes_nothing(mambair: Any) -> None:
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


# ---- calibrate -----------------------------------------------------------------------------------------------------


def fresh(config: QConfig | None = None) -> Any:
    torch.manual_seed(0)
    return ssmquant.prepare(Scanner(), config or QConfig(w_bits=2, a_bits=2), example_inputs=(X,))


def test_evaluation_needs_ranges_and_says_where() -> None:
    prepared = fresh().eval()
    with pytest.raises(NotCalibratedError, match=r"in_proj.*calibrate"):
        prepared(X)
    with pytest.raises(NotCalibratedError, match="in_proj"):
        ssmquant.convert(prepared)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "forward"])
def test_calibrate_takes_batches_of_all_kinds(kind: str) -> None:
    reference = ssmquant.calibrate(fresh(), [X, 2 * X])
    make = {
        "tensor": lambda x: x, "tuple": lambda x: (x, "label"), "list": lambda x: [x, 3], "dict": lambda x: {"x": x},
        "forward": lambda x: {"picture": x.numpy()},
    }[kind]  # fmt: skip
    forward = None
    if kind == "forward":
        forward = lambda model, batch: model(torch.from_numpy(batch["picture"]))  # noqa: E731
    prepared = fresh()
    assert ssmquant.calibrate(prepared, [make(X), make(2 * X)], forward=forward) is prepared
    assert_same_state(state_of(prepared), state_of(reference))
    prepared.eval()
    assert prepared(X).isfinite().all()


def test_calibrate_stops_after_max_batches() -> None:
    drawn = []

    def forever() -> Iterator[Tensor]:
        while True:
            drawn.append(1)
            yield X

    a = ssmquant.calibrate(fresh(), forever(), max_batches=2)
    assert len(drawn) == 2
    assert_same_state(state_of(a), state_of(ssmquant.calibrate(fresh(), [X, X])))
    with pytest.raises(ConfigError, match="max_batches=0"):
        ssmquant.calibrate(fresh(), [X], max_batches=0)


@pytest.mark.parametrize("mode", [True, False])
def test_calibrate_keeps_modes_and_shows_progress(mode: bool, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = fresh().train(mode)
    prepared.head.train(not mode)
    ssmquant.calibrate(prepared, [X])
    assert capsys.readouterr().err == ""
    ssmquant.calibrate(prepared, iter([X]), progress=True)
    assert "calibrating" in capsys.readouterr().err
    assert prepared.training is mode
    assert prepared.head.training is not mode


def nan_batch() -> list[Any]:
    bad = X.clone()
    bad[1, 2, 3, 4] = float("nan")
    return [X, bad]


def used_up() -> Iterator[Tensor]:
    it = iter([X])
    next(it)
    return it


def interrupted() -> Iterator[Tensor]:
    yield X
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        (list, CalibrationError, "no batch"),
        (used_up, CalibrationError, "no batch"),
        (nan_batch, CalibrationError, "NaN or inf at '.*in_proj"),
        (lambda: [X, X * float("inf")], CalibrationError, "NaN or inf at '.*in_proj"),
        (lambda: [X, "picture.png"], InputError, r"str.*forward=lambda"),
        (lambda: [X, ()], InputError, "tuple"),
        (lambda: [X[:0]], CalibrationError, "empty"),
        (interrupted, KeyboardInterrupt, None),
    ],
    ids=["no batch", "used up", "nan", "inf", "string", "empty tuple", "empty tensor", "interrupted"],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_calibration_that_fails_leaves_the_model_as_it_was(
    batches: Any, error: Any, text: str, again: bool
) -> None:
    prepared = fresh().train()
    prepared.head.eval()
    if again:
        ssmquant.calibrate(prepared, [X])
    before = state_of(prepared)
    with pytest.raises(error, match=text):
        ssmquant.calibrate(prepared, batches())
    assert_same_state(state_of(prepared), before)
    assert prepared.training
    assert not prepared.head.training
    for q in runtime_of(prepared).activations.values():
        assert isinstance(q, ActivationQuantizer)
        assert q.samples is None
    if again:
        assert prepared.eval()(X).isfinite().all()
    else:
        with pytest.raises(NotCalibratedError):
            prepared.eval()(X)


def test_calibrate_wants_a_prepared_model() -> None:
    with pytest.raises(ConfigError, match=r"ssmquant\.prepare"):
        ssmquant.calibrate(Scanner(), [X])
    with pytest.raises(ConfigError, match="deployed"):
        ssmquant.calibrate(ssmquant.convert(scanner()), [X])


def test_calibration_helps() -> None:
    torch.manual_seed(0)
    model = Scanner().eval()
    wide = images(4, 3, 6, 5) ** 4 * 5
    one = ssmquant.prepare(model, QConfig(w_bits=8, a_bits=3), example_inputs=(X,)).train()
    one(wide)
    two = ssmquant.calibrate(
        ssmquant.prepare(model, QConfig(w_bits=8, a_bits=3), example_inputs=(X,)), [wide]
    )
    error = [(m.eval()(wide) - model(wide)).square().mean().item() for m in (one, two)]
    assert error[1] < error[0]


@pytest.mark.parametrize(
    "config", [QConfig.qmambair(3), QConfig.minmax(4, 4), QConfig.lsq(2, 2)], ids=lambda c: c.scan
)
def test_calibrating_again_starts_afresh(config: QConfig) -> None:
    once = ssmquant.calibrate(fresh(config), [X])
    twice = fresh(config)
    for batches in ([50 * X**3], [X], [X]):
        ssmquant.calibrate(twice, batches)
    assert_same_state(state_of(twice), state_of(once))


def test_the_first_training_batch_initialises_instead() -> None:
    prepared = fresh().train()
    before = state_of(prepared)
    prepared(X)
    after = state_of(prepared)
    changed = {k for k in before if not torch.equal(after[k].nan_to_num(7), before[k].nan_to_num(7))}
    assert changed
    assert all(k.startswith("_ssmquant.activations.") for k in changed)
    prepared(3 * X)  # ... and only the first
    assert_same_state(state_of(prepared), after)
    assert prepared.eval()(X).isfinite().all()
    assert_same_state(state_of(prepared), after)


# ---- training ------------------------------------------------------------------------------------------------------


def test_param_groups_hold_every_trainable_parameter_once(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair)
    prepared.conv_first.weight.requires_grad_(False)
    frozen = next(p for n, p in prepared.named_parameters() if n.endswith("quantizer.alpha"))
    frozen.requires_grad_(False)
    groups = ssmquant.param_groups(prepared, 1e-3, 0.1, quantizer_lr=1e-4)
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in prepared.parameters() if p.requires_grad}
    names = {id(p): n for n, p in prepared.named_parameters()}
    for g in groups:
        ours = {names[id(p)].startswith("_ssmquant.") for p in g["params"]}
        assert len(ours) == 1
        assert (g["weight_decay"], g["lr"]) == ((0.0, 1e-4) if True in ours else (0.1, 1e-3))
    assert len(groups) == 2
    assert ssmquant.param_groups(prepared, 1e-3)[1]["lr"] == 1e-3
    torch.optim.AdamW(groups).step()
    assert len(ssmquant.param_groups(ssmquant.prepare(Scanner(), QConfig(), example_inputs=(X,)), 1e-3)) == 1
    with pytest.raises(ConfigError):
        ssmquant.param_groups(Scanner(), 1e-3)


def test_gradients_reach_everything(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # at their start, the gradient of beta and of w is zero where nothing is clipped
        for n, p in prepared.named_parameters():
            if n.startswith("_ssmquant."):
                p.add_(0.1 * torch.rand(p.shape, generator=generator) * p.abs().mean())
    x = images(2, 3, 8, 10).requires_grad_()
    out = prepared(x)
    (out * torch.rand(out.shape, generator=generator)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    # Documented to be zero: DLS's w where the ceiling decides the scale, LSQ's beta where nothing is clipped.
    dead = []
    for name, p in prepared.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if not p.grad.any():
            dead.append(name)
    assert not [n for n in dead if not n.endswith((".w", ".beta"))], dead
    kinds = {
        n.rpartition(".")[2] for n, p in prepared.named_parameters() if "_ssmquant" in n and p.grad.any()
    }
    assert {"alpha", "beta", "grid", "w", "v"} <= kinds, kinds
    block = prepared.layers[0].residual_group.blocks[0].self_attention
    for own in (block.A_logs, block.Ds, block.dt_projs_bias, block.x_proj_weight, block.dt_projs_weight):
        assert own.grad.any()


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    x = images(4, 3, 8, 8)
    goal = F.interpolate(x, scale_factor=2, mode="nearest").flip(1)
    prepared = ssmquant.prepare(tiny_mambair(), QConfig.qmambair(4), example_inputs=(x,)).train()
    optimizer = torch.optim.AdamW(ssmquant.param_groups(prepared, 5e-3, 1e-4))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (prepared(x) - goal).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    prepared.eval()
    after = (prepared(x) - goal).abs().mean().item()
    assert after < 0.75 * losses[0]
    assert torch.equal(ssmquant.convert(prepared)(x), prepared(x))


def test_autocast_trains(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair).train()
    x = images(1, 3, 8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prepared(x)
        loss = out.float().square().mean()
    loss.backward()
    assert out.isfinite().all()
    for name, p in prepared.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    with torch.no_grad():
        full = copy.deepcopy(mambair)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = mambair(x)
            deployed = ssmquant.convert(mambair)(x)
    assert (half.float() - full).abs().max() < 0.1
    torch.testing.assert_close(deployed.float(), half.float(), rtol=0, atol=0)


def test_ranges_are_measured_without_touching_what_was_learnt() -> None:
    model = tiny_mambair()
    prepared = prepared_and_calibrated(model, QConfig.recommended(2, 2, scan="dls"), images(2, 3, 8, 10))
    wrapper = next(q for n, q in runtime_of(prepared).activations.items() if n.endswith("scan/u"))
    with torch.no_grad():
        for n, p in prepared.named_parameters():
            if not n.startswith("_ssmquant."):
                p.mul_(1.5)
    before, x = state_of(prepared), images(3, 3, 8, 10)
    wanted = prepared(x)
    ssmquant.calibrate(prepared, [x], fit=False, progress=False)
    after = state_of(prepared)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.endswith(".seen") for k in changed)
    assert torch.equal(prepared(x), wanted)
    # By sample, then averaged: a batch of three is as three batches of one.
    together = wrapper.seen.clone()
    ssmquant.calibrate(prepared, [x[:1], x[1:2], x[2:]], fit=False, progress=False)
    torch.testing.assert_close(wrapper.seen, together, rtol=1e-4, atol=1e-5)


# ---- convert -------------------------------------------------------------------------------------------------------

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


def test_half_precision_remainder() -> None:
    deployed = ssmquant.convert(scanner(), float_dtype=torch.float16)
    for p in (deployed.stem.weight, deployed.head.bias):
        assert p.dtype == torch.float32
        assert torch.equal(p.half().float(), p)
    assert not torch.equal(scanner().stem.weight.half().float(), scanner().stem.weight)
    assert deployed(X).dtype == torch.float32
    assert (deployed(X) - scanner()(X)).abs().mean() < 0.1


# ---- copies, checkpoints, precision --------------------------------------------------------------------------------


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("stage", ["prepared", "deployed"])
def test_copies(stage: str, copier: Any, mambair: Any) -> None:
    for model, x in ((scanner(), X), (mambair, images(1, 3, 8, 10))):
        model = model if stage == "prepared" else ssmquant.convert(model)
        new = copier(model)
        assert type(new).__name__ == type(model).__name__
        assert isinstance(new, type(model).__mro__[1])
        assert torch.equal(new(x), model(x))
        bigger = images(3, 3, 7, 11)
        assert torch.equal(new(bigger), model(bigger))
        with pytest.raises(MethodError):
            (new.in_proj if hasattr(new, "in_proj") else new.layers[0])(*(x,) * 2)
        if stage == "prepared":  # independent of the first, and a whole model again
            before = state_of(model)
            new.train()
            loss = new(x).square().mean()
            loss.backward()
            torch.optim.SGD(ssmquant.param_groups(new, 0.1)).step()
            assert_same_state(state_of(model), before)
            new.eval()
            assert torch.equal(ssmquant.convert(new)(x), new(x))


@pytest.mark.parametrize("copier", [pickled, saved], ids=["pickle", "torch.save"])
def test_an_unpickled_model_is_whole_before_its_first_call(copier: Any, tmp_path: Any) -> None:
    converted = ssmquant.convert(copier(scanner()))
    assert packed(converted)
    assert torch.equal(converted(X), scanner()(X))
    deployed = copier(ssmquant.convert(scanner()))
    ssmquant.save(deployed, tmp_path / "m")
    assert torch.equal(ssmquant.load(tmp_path / "m", Scanner())(X), scanner()(X))
    for model in (scanner(), ssmquant.convert(scanner())):
        assert str(ssmquant.summary(copier(model))) == str(ssmquant.summary(model))
    assert ssmquant.verify(copier(scanner()), copier(ssmquant.convert(scanner())), X).worst_abs == 0


def test_an_unpickled_model_takes_a_float_checkpoint() -> None:
    torch.manual_seed(5)
    other = Scanner()
    new = pickled(scanner())
    new.load_state_dict(other.state_dict())
    reference = copy.deepcopy(scanner())
    reference.load_state_dict(other.state_dict())
    assert torch.equal(new(X), reference(X))


@pytest.mark.parametrize("stage", ["prepared", "deployed"])
def test_state_dict_round_trip(stage: str, mambair: Any) -> None:
    trained = copy.deepcopy(mambair).train()
    (trained(images(2, 3, 8, 10)) ** 2).mean().backward()
    torch.optim.SGD(ssmquant.param_groups(trained, 0.05)).step()
    trained.eval()
    torch.manual_seed(9)
    other, small = tiny_mambair(), images(1, 3, 6, 6)
    blank = ssmquant.prepare(other, QConfig(w_bits=4, a_bits=4), example_inputs=(small,)).eval()
    x = images(1, 3, 9, 7)
    if stage == "prepared":
        blank.load_state_dict(trained.state_dict())
        assert torch.equal(blank(x), trained(x))
        assert codes_of(blank).keys() == codes_of(trained).keys()
        for k, c in codes_of(blank).items():
            assert torch.equal(c, codes_of(trained)[k]), k
        return
    source = ssmquant.convert(trained)
    target = ssmquant.convert(ssmquant.calibrate(blank, [images(2, 3, 6, 6)]))
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_float_checkpoints_load_strictly_before_and_after(mambair: Any) -> None:
    torch.manual_seed(4)
    other = tiny_mambair()
    x = images(1, 3, 8, 10)
    before = prepared_and_calibrated(other, QConfig(w_bits=4, a_bits=4), images(2, 3, 8, 10))
    after = copy.deepcopy(mambair)
    result = after.load_state_dict(other.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for k, c in codes_of(after).items():
        assert torch.equal(c, codes_of(before)[k]), k
    ssmquant.calibrate(after, [images(2, 3, 8, 10)])
    assert torch.equal(after(x), before(x))
    # Strictly.
    state = other.state_dict()
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="extra"):
        after.load_state_dict(state)
    del state["extra"], state["norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        after.load_state_dict(state)
    own = {k: v for k, v in after.state_dict().items() if not k.startswith("_ssmquant.")}
    tiny_mambair().load_state_dict(own)


def test_a_deployed_model_refuses_a_float_checkpoint() -> None:
    deployed = ssmquant.convert(scanner())
    with pytest.raises(RuntimeError, match="_ssmquant"):
        deployed.load_state_dict(Scanner().state_dict())


def test_moving_average(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair).train()
    ema = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(ssmquant.param_groups(prepared, 0.01))
    x = images(2, 3, 8, 10)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
        ema.update_parameters(prepared)
    assert ema.eval()(x).isfinite().all()
    assert not torch.equal(ema(x), prepared.eval()(x))
    assert torch.equal(ssmquant.convert(ema.module)(x), ema(x))


def test_moving_average_from_an_uncalibrated_start() -> None:
    prepared = fresh().train()
    ema = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    prepared(X)
    ema.update_parameters(prepared)
    assert torch.equal(ema.eval()(X), prepared.eval()(X))


def test_double_precision() -> None:
    torch.manual_seed(0)
    model = Scanner().double()
    x = X.double()
    bypass = ssmquant.prepare(model, QConfig(), example_inputs=(x,))
    assert torch.equal(bypass(x), model(x))
    prepared = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), x)
    assert prepared(x).dtype == torch.float64
    assert torch.equal(ssmquant.convert(prepared)(x), prepared(x))
    single = copy.deepcopy(scanner(4)).double()
    assert single(x).dtype == torch.float64
    assert (single(x) - scanner(4)(X)).abs().mean() < 0.02
    assert torch.equal(ssmquant.convert(single)(x), single(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_casts_of_prepared_and_deployed(dtype: torch.dtype, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(4, 4, 2)))
    prepared = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4, activation="dls"), X)
    dls = "frozen" if frozen else "dynamic"
    reference = prepared(X) if not frozen else ssmquant.convert(prepared, dls=dls)(X)
    x = X.to(dtype)
    cast_then_convert = ssmquant.convert(copy.deepcopy(prepared).to(dtype), dls=dls)
    convert_then_cast = ssmquant.convert(prepared, dls=dls).to(dtype)
    for deployed in (cast_then_convert, convert_then_cast):
        out = deployed(x)
        assert out.dtype == dtype
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 0.01}[dtype]
        assert (out.float() - reference).abs().mean() < tolerance * reference.abs().mean()
    # The scales stay in full precision: codes decode to what they did before, rounded once.
    exact = packed(ssmquant.convert(prepared))
    for key, m in packed(convert_then_cast).items():
        assert torch.equal(m(), exact[key]().to(dtype)), key


def test_non_contiguous_inputs(mambair: Any) -> None:
    x = images(2, 3, 8, 10)
    strange = x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    sliced = images(2, 3, 8, 20)[..., ::2]
    for model in (mambair, ssmquant.convert(mambair)):
        assert not strange.is_contiguous()
        torch.testing.assert_close(model(strange), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(sliced), model(sliced.contiguous()), rtol=1e-4, atol=1e-4)


def test_a_call_without_samples() -> None:
    for model in (scanner(), ssmquant.convert(scanner())):
        assert model(X[:0]).shape == (0, 3, 6, 5)


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
