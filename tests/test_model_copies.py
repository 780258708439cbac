"""Copies, pickles and state dicts of prepared and deployed models, and float checkpoints in them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import ssmquant
from ssmquant import MethodError, QConfig
from tests.small import (
    Scanner,
    X,
    assert_same_state,
    codes_of,
    images,
    packed,
    pickled,
    prepared_and_calibrated,
    scanner,
    state_of,
    tiny_mambair,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")


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
