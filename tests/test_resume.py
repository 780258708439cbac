"""Calibrations that are interrupted and go on: the same result bit for bit, and files that do not fit are refused."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ssmquant
from ssmquant import CalibrationError, ConfigError, FormatError, QConfig, resume, zoo
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from tests.small import Scanner, images, tiny_mambair

CONFIGS = {
    "recommended": lambda: QConfig.recommended(4, 4),
    "published": lambda: QConfig.qmambair(4),
    "token": lambda: QConfig.minmax(
        8, 8, scan_output="token", smooth=0.5, activation_options={"observer": "mse"}
    ),
    "by position": lambda: QConfig.ptq4vm(8, 8, rounding="gptq"),
    "average": lambda: QConfig.minmax(8, 8, activation_options={"observer": "ema", "momentum": 0.3}),
}


class Stop(Exception):
    """An interruption."""


def mambair() -> nn.Module:
    torch.manual_seed(0)
    return tiny_mambair().eval()


def vim() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("vim_nano", num_classes=3).eval()


def scanner() -> nn.Module:
    torch.manual_seed(0)
    return Scanner().eval()


def prepared(model: nn.Module, config: QConfig, size: int) -> Any:
    return ssmquant.prepare(model, config, example_inputs=(images(1, 3, size, size),))


def interrupted(at: int, kind: type[BaseException] = Stop) -> Any:
    """Calls the model, ``at`` times."""
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Any:
        nonlocal calls
        if calls == at:
            model(batch)  # the state that is written is that before
            raise kind
        calls += 1
        return model(batch)

    return forward


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, theirs[name]) or bool(value.isnan().all()), name
    assert [r.code for r in runtime_of(a).records] == [r.code for r in runtime_of(b).records]
    assert torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_interrupted_at_every_batch(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    fresh = prepared(scanner(), config, 8)
    batches = [images(1 + k % 2, 3, 8, 8 + 4 * (k == 1), seed=k) for k in range(3)]  # of two sizes
    expected = ssmquant.calibrate(copy.deepcopy(fresh), batches)
    file = tmp_path / "calibration.safetensors"
    for at in range(4):
        ready = copy.deepcopy(fresh)
        if at < 3:
            with pytest.raises(Stop):
                ssmquant.calibrate(ready, batches, forward=interrupted(at), checkpoint=file)
            assert file.exists() == (at > 0)
            ready = ready if at == 1 else copy.deepcopy(fresh)  # in the same process, or another
        calls: list[int] = []
        ssmquant.calibrate(ready, batches, checkpoint=file, forward=lambda m, x, c=calls: (c.append(0), m(x)))
        rounds = len(batches) * (config.rounding == "gptq")  # a pass of which nothing is kept
        assert (
            len(calls) <= 3 - at % 3 + 1 + rounds
        )  # the batch of another size may have to make its graph again
        assert not file.exists()
        assert_same(ready, expected, batches[0])


@pytest.mark.parametrize(("build", "widths"), [(vim, (32, 32, 32)), (mambair, (8, 16, 8))])
def test_interrupted_in_either_pass(
    build: Callable[[], nn.Module], widths: tuple[int, ...], tmp_path: Path
) -> None:
    """Transforms are chosen from a pass of their own, whose graphs have to be known again."""
    model, config = build(), QConfig.mambaquant(8, 8)
    batches = [images(1 + k, 3, widths[0], w, seed=k) for k, w in enumerate(widths)]
    fresh = prepared(model, config, widths[0])
    expected = ssmquant.calibrate(copy.deepcopy(fresh), batches)
    assert ssmquant.summary(expected).transforms
    file = tmp_path / "calibration.safetensors"
    ready = copy.deepcopy(fresh)
    stops = 0
    for _ in range(8):
        # Two calls at a time: one of them may be of a batch whose graph is made again.
        try:
            ssmquant.calibrate(ready, batches, forward=interrupted(2, KeyboardInterrupt), checkpoint=file)
        except KeyboardInterrupt:
            stops += 1
            assert file.exists()
        else:
            break
        ready = copy.deepcopy(fresh) if stops == 1 else ready
    assert stops >= 2
    if file.exists():
        ssmquant.calibrate(ready, batches, checkpoint=file)
    assert_same(ready, expected, batches[0])
    assert not file.exists()


def test_it_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves what was written last."""
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    file = tmp_path / "calibration.safetensors"
    there = []

    def forward(model: nn.Module, x: Tensor) -> None:
        there.append(file.exists() and file.read_bytes())
        clock[0] += 40
        model(x)

    batches = [images(1, 3, 8, 8, seed=k) for k in range(5)]
    ready = prepared(Scanner().eval(), QConfig.lsq(8, 8), 8)
    ssmquant.calibrate(ready, batches, forward=forward, checkpoint=file)
    assert [bool(t) for t in there] == [False, False, True, True, True]  # after 80 and 160 seconds
    assert there[2] == there[3] != there[4]
    assert not list(tmp_path.iterdir())


def test_ranges_of_a_trained_model(tmp_path: Path) -> None:
    batches = [images(1, 3, 8, 8, seed=k) for k in range(3)]
    ready = ssmquant.calibrate(prepared(Scanner().eval(), QConfig.qmambair(4), 8), batches[:1])
    other = copy.deepcopy(ready)
    ssmquant.calibrate(ready, batches, fit=False)
    file = tmp_path / "c.safetensors"
    with pytest.raises(Stop):
        ssmquant.calibrate(other, batches, fit=False, forward=interrupted(2), checkpoint=file)
    with pytest.raises(FormatError, match="fit"):
        ssmquant.calibrate(other, batches, checkpoint=file)
    ssmquant.calibrate(other, batches, fit=False, checkpoint=file)
    assert_same(ready, other, batches[0])


def test_batches_without_a_length(tmp_path: Path) -> None:
    def stream() -> Iterator[dict[str, Tensor]]:
        for k in range(3):
            yield {"x": images(1, 3, 8, 8, seed=k)}

    model, config, file = Scanner().eval(), QConfig.lsq(8, 8), tmp_path / "c.safetensors"
    expected = ssmquant.calibrate(prepared(model, config, 8), stream())
    ready = prepared(model, config, 8)
    with pytest.raises(Stop):
        ssmquant.calibrate(ready, _stopping(stream()), checkpoint=file)
    ssmquant.calibrate(ready, stream(), checkpoint=file)
    assert_same(ready, expected, images(1, 3, 8, 8))


def _stopping(batches: Iterator[Any]) -> Iterator[Any]:
    """A loader that fails."""
    yield next(batches)
    yield next(batches)
    raise Stop


@pytest.mark.parametrize("error", [KeyboardInterrupt, CalibrationError])
def test_interrupted_behind_the_passes(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ranges are known by then: they are forgotten again, and the batches need not run once more."""
    config, batches = QConfig.recommended(4, 4), [images(1, 3, 8, 8, seed=k) for k in range(2)]
    ready = prepared(scanner(), config, 8)
    expected = ssmquant.calibrate(copy.deepcopy(ready), batches)
    before = copy.deepcopy(ready.state_dict())
    file = tmp_path / "c.safetensors"
    finish, calls = ActivationQuantizer.finish, []

    def failing(self: ActivationQuantizer, **options: Any) -> None:
        finish(self, **options)
        calls.append(self)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(ActivationQuantizer, "finish", failing)
    with pytest.raises(error):
        ssmquant.calibrate(ready, batches, checkpoint=file)
    monkeypatch.undo()
    for name, value in ready.state_dict().items():
        assert torch.equal(value, before[name]) or bool(value.isnan().all()), name
    assert not any(q.quantizer.ready for q in calls)
    ssmquant.calibrate(ready, batches, checkpoint=file, forward=_never)
    assert_same(ready, expected, batches[0])


def _never(model: nn.Module, x: Tensor) -> None:
    raise AssertionError("all batches are done")


class Versioned(Scanner):
    """A module whose state has more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_states_of_more_than_tensors(tmp_path: Path) -> None:
    batches, file = [images(1, 3, 8, 8, seed=k) for k in range(2)], tmp_path / "c.safetensors"
    ready = prepared(Versioned().eval(), QConfig.minmax(8, 8), 8)
    with pytest.raises(Stop):
        ssmquant.calibrate(ready, batches, forward=interrupted(1), checkpoint=file)
    ssmquant.calibrate(ready, batches, checkpoint=file)
    assert not file.exists()


# ---- files that do not fit -------------------------------------------------------------------------------------------


def begun(file: Path, **changes: Any) -> tuple[nn.Module, list[Tensor]]:
    """A model of which two batches are in the file."""
    torch.manual_seed(0)
    model = Scanner().eval()
    batches = [images(1, 3, 8, 8, seed=k) for k in range(3)]
    with pytest.raises(Stop):
        ssmquant.calibrate(
            prepared(model, QConfig.minmax(8, 8, smooth=0.5, **changes), 8),
            batches,
            forward=interrupted(2),
            checkpoint=file,
        )
    return model, batches


def test_other_models_and_batches(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    model, batches = begun(file)
    content = file.read_bytes()
    config = QConfig.minmax(8, 8, smooth=0.5)

    def refused(
        error: type[Exception], match: str, ready: nn.Module, given: list[Tensor], **options: Any
    ) -> None:
        before = {k: v.clone() for k, v in ready.state_dict().items()}
        with pytest.raises(error, match=match):
            ssmquant.calibrate(ready, given, checkpoint=file, **options)
        assert file.read_bytes() == content
        for k, v in ready.state_dict().items():
            assert torch.equal(v, before[k]) or bool(v.isnan().all())

    refused(FormatError, "configuration", prepared(model, QConfig.minmax(8, 8), 8), batches)
    refused(FormatError, "number of batches", prepared(model, config, 8), batches[:2])
    refused(FormatError, "number of batches", prepared(model, config, 8), batches, max_batches=2)
    refused(CalibrationError, "batch 0 is not", prepared(model, config, 8), batches[::-1])
    refused(CalibrationError, "batch 1 is not", prepared(model, config, 8), [batches[0], *batches[:2]])
    other = Scanner().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.D[0] += 1e-6
    refused(FormatError, "weights", prepared(other, config, 8), batches)
    ready = prepared(model, config, 8)
    stream = tmp_path / "stream.safetensors"
    with pytest.raises(Stop):
        ssmquant.calibrate(ready, _stopping(iter(batches)), checkpoint=stream)
    with pytest.raises(CalibrationError, match="seen 2 batches, and there are 1"):
        ssmquant.calibrate(ready, iter(batches[:1]), checkpoint=stream)


def test_no_place_for_a_file(tmp_path: Path) -> None:
    ready = prepared(Scanner().eval(), QConfig.lsq(8, 8), 8)
    x = [images(1, 3, 8, 8)]
    for path in (tmp_path, tmp_path / "nowhere" / "c.safetensors"):
        with pytest.raises(ConfigError, match="no place"):
            ssmquant.calibrate(ready, x, checkpoint=path)
    with pytest.raises(ConfigError, match="seconds"):
        ssmquant.calibrate(ready, x, checkpoint=tmp_path / "c", checkpoint_every=float("nan"))
    own = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, own)
    with pytest.raises(FormatError, match="no file of calibrate"):
        ssmquant.calibrate(ready, x, checkpoint=own)
    assert own.exists()  # somebody's weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, list[Tensor]]:
    file = tmp_path_factory.mktemp("resume") / "c.safetensors"
    model, batches = begun(file)
    return file, prepared(model, QConfig.minmax(8, 8, smooth=0.5), 8), batches


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(
    whole: tuple[Path, nn.Module, list[Tensor]], tmp_path: Path, data: st.DataObject
) -> None:
    source, ready, batches = whole
    content = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file = tmp_path / "c.safetensors"
    file.write_bytes(content)
    with pytest.raises(FormatError):
        ssmquant.calibrate(ready, batches, checkpoint=file)


def _entries(x: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    out = [at]
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        out += _entries(v, (*at, k))
    return out


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_files(
    whole: tuple[Path, nn.Module, list[Tensor]], tmp_path: Path, data: st.DataObject
) -> None:
    """Metadata with any entry replaced, under a checksum that fits: refused, or as if nothing had been done."""
    source, ready, batches = whole
    tensors = load_file(source)
    meta = json.loads(zlib.decompress(tensors["meta"].numpy().tobytes()))
    at = data.draw(st.sampled_from(_entries(meta)))
    value = data.draw(
        st.sampled_from([None, True, -1, 10**9, 0.5, "x", [], {}, [1, 2], [[[[3]]]], [[2**40]]])
    )
    if not at:
        meta = value
    else:
        owner = meta
        for k in at[:-1]:
            owner = owner[k]
        if owner[at[-1]] == value:
            return
        owner[at[-1]] = value
    blob = zlib.compress(json.dumps(meta).encode())
    tensors["meta"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    file = tmp_path / "c.safetensors"
    header = {"format": "ssmquant-calibration", "format_version": "1", "sha256": resume._checksum(tensors)}
    save_file(tensors, file, metadata=header)
    try:
        ssmquant.calibrate(copy.deepcopy(ready), batches, checkpoint=file)
    except (FormatError, CalibrationError):
        return
    # ``passes`` without an entry, further graphs to make, and the like.
    assert at[:1] == ("passes",)
