"""Transforms in checkpoints and files: what comes back computes the same, or is refused and changes nothing."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import FormatError, QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.transforms.edits import MARKER
from ssmquant.io import load_checkpoint
from tests.gated import TOKENS, Gated, float_error, seeded
from tests.model_files import meta_of, with_meta

FREE = ("dt_rotation", "state", "residual_rotation")
PREFIX = "_ssmquant.transforms."


def fresh(**options: Any) -> Any:
    config = QConfig.mambaquant(8, 8, **{"transforms": (*FREE, "scan_input", "out_rotation"), **options})
    return ssmquant.prepare(seeded(Gated), config, example_inputs=TOKENS).eval()


@functools.cache
def _calibrated(transforms: tuple[str, ...]) -> Any:
    return ssmquant.calibrate(fresh(transforms=transforms), [TOKENS]).eval()


def calibrated(transforms: tuple[str, ...] = (*FREE, "scan_input", "out_rotation")) -> Any:
    return copy.deepcopy(_calibrated(transforms))


def unchanged(model: nn.Module, before: Tensor) -> bool:
    return torch.equal(model(TOKENS), before)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_without_transforms_nothing_is_added() -> None:
    assert not [k for k in fresh(transforms=()).state_dict() if k.startswith(PREFIX)]


def test_free_transforms_are_part_of_a_checkpoint() -> None:
    trained, other = calibrated(FREE), fresh(transforms=FREE)
    assert not runtime_of(trained).transforms.places
    other.load_state_dict(trained.state_dict())
    transforms = runtime_of(other).transforms
    assert transforms.settled
    assert transforms.applied == runtime_of(trained).transforms.applied != []
    assert transforms.skipped == runtime_of(trained).transforms.skipped
    weight = other.in_proj.weight.clone()
    ssmquant.calibrate(other, [TOKENS])
    assert torch.equal(other.in_proj.weight, weight)


def test_buffers_are_copies_in_the_precision_of_the_model() -> None:
    trained, other = calibrated(), fresh()
    state = trained.state_dict()
    other.load_state_dict(state)
    own = {t.data_ptr() for t in runtime_of(trained).transforms.buffers() if t.numel()}
    assert own.isdisjoint(t.data_ptr() for t in runtime_of(other).transforms.buffers() if t.numel())
    assert torch.equal(other.eval()(TOKENS), trained(TOKENS))
    double = ssmquant.prepare(
        seeded(Gated).double(), QConfig.mambaquant(8, 8), example_inputs=TOKENS.double()
    )
    double.load_state_dict(state)
    assert {t.dtype for t in runtime_of(double).transforms.places.values()} == {torch.float64}


def test_a_plain_checkpoint_takes_them_away() -> None:
    model, original = calibrated(), seeded(Gated)
    model.load_state_dict(fresh().state_dict())
    transforms = runtime_of(model).transforms
    assert (transforms.settled, transforms.places, transforms.applied) == (False, {}, [])
    ssmquant.calibrate(model, [TOKENS])
    assert torch.equal(model.eval()(TOKENS), calibrated()(TOKENS))
    assert float_error(model, original, TOKENS) < 1e-5


@pytest.mark.filterwarnings("ignore:the state holds")
@pytest.mark.parametrize("stage", ["prepared", "deployed"])
@pytest.mark.parametrize("transforms", [FREE, (*FREE, "scan_input", "out_rotation")])
def test_parts_leave_them(stage: str, transforms: tuple[str, ...]) -> None:
    model = calibrated(transforms)
    if stage == "deployed":
        model = ssmquant.convert(model)
    before, applied = model(TOKENS), runtime_of(model).transforms.applied
    state = model.state_dict()
    for part in ("head.", "norm.", "_ssmquant.activations"):
        result = model.load_state_dict({k: v for k, v in state.items() if k.startswith(part)}, strict=False)
        assert PREFIX + MARKER in result.missing_keys or not part.startswith("_")
        assert unchanged(model, before)
    assert runtime_of(model).transforms.applied == applied != []


def test_a_part_of_changed_weights_warns() -> None:
    model = calibrated()
    with pytest.warns(UserWarning, match="weights that transforms changed"):
        model.load_state_dict({"head.weight": model.head.weight.detach().clone()}, strict=False)


def test_all_keys_of_transforms_missing_is_an_error() -> None:
    model = calibrated()
    before = model(TOKENS)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(PREFIX)}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*transforms"):
        model.load_state_dict(state)
    assert unchanged(model, before)
    assert runtime_of(model).transforms.settled


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(bogus=torch.zeros(1)),
        lambda s: s.pop("head.bias"),
        lambda s: s.update({"head.bias": torch.zeros(3)}),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "float", "other"])
def test_a_failed_load_leaves_the_model(kind: str, change: Change) -> None:
    model = calibrated()
    before = model(TOKENS)
    source = {"plain": fresh, "float": lambda: seeded(Gated), "other": lambda: calibrated(FREE)}[kind]()
    state = dict(source.state_dict())
    change(state)
    with pytest.raises(RuntimeError):
        model.load_state_dict(state)
    assert runtime_of(model).transforms.settled
    assert unchanged(model, before)
    with pytest.raises(FormatError):
        load_checkpoint(model, state)
    assert unchanged(model, before)
    ssmquant.calibrate(model, [TOKENS])
    assert float_error(model.eval(), seeded(Gated), TOKENS) < 1e-5


def place_of(state: dict[str, Any], kind: str) -> str:
    return next(k for k in state if k.startswith(PREFIX + kind))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update({PREFIX + "zzz": torch.zeros(3)}),
        lambda s: s.update({PREFIX + "put": torch.zeros(3)}),
        lambda s: s.update({place_of(s, "scan_input"): torch.ones(7)}),
        lambda s: s.update({place_of(s, "scan_input"): 3}),
        lambda s: s.update({place_of(s, "scan_input") + "1": torch.ones(7)}),
        lambda s: s.pop(place_of(s, "scan_input")),
        lambda s: s.pop(place_of(s, "out_rotation")),
        lambda s: s.update({PREFIX + MARKER: torch.zeros(3, dtype=torch.uint8)}),
        lambda s: s.update({PREFIX + MARKER: s[PREFIX + MARKER].roll(1)}),
        lambda s: s.update({PREFIX + MARKER: "x"}),
    ],
)
@pytest.mark.parametrize("target", [fresh, calibrated])
def test_tampered_checkpoints(target: Callable[[], Any], change: Change) -> None:
    model = target()
    state = dict(calibrated().state_dict())
    change(state)
    if not runtime_of(model).transforms.settled:
        with pytest.raises(RuntimeError):
            model.load_state_dict(state)
        assert not runtime_of(model).transforms.settled
        ssmquant.calibrate(model, [TOKENS])
        assert float_error(model.eval(), seeded(Gated), TOKENS) < 1e-5
        return
    before = model(TOKENS)
    with pytest.raises(RuntimeError):
        model.load_state_dict(state)
    assert unchanged(model, before)


def test_other_factors_of_the_same_transforms() -> None:
    """The graph is the same, so that deployed models load each other's tensors, with what ``summary`` says of them."""
    one, other = calibrated(), fresh(rotation="hadamard")
    ssmquant.calibrate(other, [TOKENS])
    assert runtime_of(one).transforms.applied != runtime_of(other).transforms.applied
    one, other = ssmquant.convert(one), ssmquant.convert(other)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(TOKENS), one(TOKENS))
    assert runtime_of(other).transforms.applied == runtime_of(one).transforms.applied


def test_a_configuration_without_them_takes_and_saves_them(tmp_path: Path) -> None:
    trained, other = calibrated(FREE), fresh(transforms=())
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(TOKENS), trained(TOKENS))
    deployed = ssmquant.convert(other)
    ssmquant.save(deployed, tmp_path / "m.safetensors")
    again = ssmquant.load(tmp_path / "m.safetensors", seeded(Gated))
    assert torch.equal(again(TOKENS), deployed(TOKENS))
    assert runtime_of(again).transforms.applied == runtime_of(trained).transforms.applied


def test_transforms_of_another_model_are_refused() -> None:
    class Other(Gated):
        def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
            return out + h.sum(-1, keepdim=True)

    model = ssmquant.prepare(
        seeded(Other), QConfig.mambaquant(8, 8, transforms=FREE), example_inputs=TOKENS
    ).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="residual_rotation"):
        model.load_state_dict(calibrated(FREE).state_dict())
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
    assert not runtime_of(model).transforms.settled


def test_in_a_module_around_it_nothing_is_taken_over_unseen() -> None:
    around = nn.Sequential(fresh(transforms=("state",)))
    state = nn.Sequential(calibrated(FREE)).state_dict()
    with pytest.raises(RuntimeError, match="other transforms"):
        around.load_state_dict(state, strict=False)


# ---- files -----------------------------------------------------------------------------------------------------------


@functools.cache
def _file(transforms: tuple[str, ...]) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        ssmquant.save(ssmquant.convert(calibrated(transforms)), path)
        return path.read_bytes()


def loaded(tmp_path: Path, change: Callable[[dict[str, Any]], Any], transforms: tuple[str, ...]) -> Any:
    content = _file(transforms)
    meta = meta_of(content)
    change(meta)
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_meta(content, meta))
    return ssmquant.load(path, seeded(Gated))


ALL = (*FREE, "scan_input", "out_rotation")


@pytest.mark.parametrize("transforms", [ALL, FREE, ()])
def test_files_keep_them(tmp_path: Path, transforms: tuple[str, ...]) -> None:
    model = loaded(tmp_path, lambda meta: None, transforms)
    assert torch.equal(model(TOKENS), ssmquant.convert(calibrated(transforms))(TOKENS))
    assert runtime_of(model).transforms.applied == runtime_of(calibrated(transforms)).transforms.applied
    assert ("transforms" in meta_of(_file(transforms))) == bool(transforms)


def places(change: Callable[[list[Any], list[Any]], Any]) -> Change:
    """A change of the places: those with an empty tensor, and the others."""

    def apply(meta: dict[str, Any]) -> None:
        own = meta["transforms"]["places"]
        empty = [p for p in own if p[1] == [0]]
        meta["transforms"]["places"] = change(empty, [p for p in own if p not in empty])

    return apply


def entry(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda meta: meta["transforms"].update({name: change(meta["transforms"][name])})


@pytest.mark.parametrize(
    "change",
    [
        places(lambda h, s: s),
        places(lambda h, s: [[n + "x", size] for n, size in h] + s),
        places(lambda h, s: h + [[n, [math.prod(size)]] for n, size in s]),
        places(lambda h, s: h + [[n, size[::-1]] for n, size in s]),
        places(lambda h, s: [[n, [0, 3]] for n, _ in h] + s),
        places(lambda h, s: [*h, *s, h[0]]),
        places(lambda h, s: [*h, *s, ["out_rotation:more#0", [0]]]),
        places(lambda h, s: [*h, *s, [None, [0]]]),
        places(lambda h, s: [*h, *s, [["q"], [0]]]),
        places(lambda h, s: [*h, *s, ["put", [0]]]),
        places(lambda h, s: [*h, *s, [MARKER, [0]]]),
        places(lambda h, s: [*h, *s, ["a:b#0", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1]]]),
        places(lambda h, s: 3),
        entry("applied", lambda a: a[1:]),
        entry("applied", lambda a: [*a, a[0]]),
        entry("applied", lambda a: [[*e[:3], "0" * 16, e[4]] for e in a]),
        entry("applied", lambda a: [e[:3] for e in a]),
        entry("applied", lambda a: 3),
        entry("skipped", lambda s: [[1]]),
        entry("settled", lambda s: False),
        entry("settled", lambda s: 1),
        lambda meta: meta.pop("transforms"),
        lambda meta: meta.update(transforms=3),
        lambda meta: meta.update(transforms={"places": []}),
    ],
)
def test_tampered_files(tmp_path: Path, change: Change) -> None:
    with pytest.raises(FormatError):
        loaded(tmp_path, change, ALL)


@pytest.mark.parametrize("size", [2**20, 2**30])
def test_a_file_takes_no_more_memory_than_it_has(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    ones = torch.ones
    monkeypatch.setattr(
        torch,
        "ones",
        lambda *s, **k: made.append(math.prod(s[0]) if isinstance(s[0], tuple) else s[0]) or ones(*s, **k),
    )
    with pytest.raises(FormatError):
        loaded(tmp_path, places(lambda h, s: [*h, *s, *([f"state:b#{i}", [size]] for i in range(500))]), ALL)
    assert max(made, default=0) < 2**20
