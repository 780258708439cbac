"""calibrate: batches of all kinds, failures that leave the model as it was, calibrating again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmquant
from ssmquant import CalibrationError, ConfigError, InputError, NotCalibratedError, QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from tests.small import (
    Scanner,
    X,
    assert_same_state,
    fresh,
    images,
    prepared_and_calibrated,
    scanner,
    state_of,
    tiny_mambair,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")


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
