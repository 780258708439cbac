"""The tables of the documentation, end to end at their smallest size."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import accuracy
from accuracy import Table
from compare import claimed

SMALL = ("--batch", "2", "--patch", "8", "--steps", "1")
NOISE = ("--task", "denoise", "--sigma", "15")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        small = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        small.resize((24, 20), Image.Resampling.BICUBIC).save(tmp_path / name / "0.png")
    grid, how = ("2:minmax:0",), (*NOISE, *SMALL, "--calibration", "1")
    tables = {
        "second": Table(
            "after the first", grid, how, train=(*NOISE, *SMALL), after="first", ours="ours-rate-1"
        ),
        "first": Table("noise", grid, how, train=(*NOISE, *SMALL, "--model", "tiny", "--depths", "1")),
    }
    monkeypatch.setattr(accuracy, "TABLES", tables)
    return tmp_path


def run(place: Path, *args: str, **more: Any) -> int:
    words = [*args, "--out", str(place / "out"), "--device", "cpu", "--eval", str(place / "test")]
    for key, value in more.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return accuracy.main(words)


def test_tables_are_made_once_and_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(place / "train")
    assert run(place, data=data, time_limit=0) == 1
    assert not list(place.glob("out/*/float/model.safetensors"))
    assert "2 of 2 tables are not complete" in capsys.readouterr().err
    # The second one trains the float model of the first, which it starts from.
    assert run(place, "second", data=data, floats=True) == 0
    assert (place / "out" / "first" / "float" / "model.safetensors").exists()
    assert not list(place.glob("out/*/compare.json"))
    init = json.loads((place / "out" / "second" / "float" / "metrics.json").read_text())["options"]["init"]
    assert init == str(place / "out" / "first" / "float" / "model.safetensors")
    stamps = {p: p.stat().st_mtime_ns for p in place.glob("out/*/float/*")}
    assert run(place, data=data, at_once=2) == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in place.glob("out/*/float/*")}
    rows = json.loads((place / "out" / "first" / "compare.json").read_text())["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [("float", None), ("minmax", 2)]
    text = (place / "out" / "accuracy.md").read_text()
    assert "| noise | 2 | " in text
    assert "| after the first | 2 | " in text
    assert f"({rows[1]['loss']:.3f})" in text
    (place / "out" / "accuracy.md").unlink()
    assert run(place, report=True) == 0
    assert (place / "out" / "accuracy.md").read_text() == text


def test_a_table_that_fails_says_where(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, data=str(place / "nothing")) == 2
    err = capsys.readouterr().err
    assert "first: train_restore.py failed" in err
    assert "not complete" not in err
    log = (place / "out" / "first" / "log.txt").read_text()
    assert log.count("error: no such file or folder") == 1  # tried once, though both tables want it


@pytest.mark.parametrize(
    ("statuses", "end"), [((0, 0), 0), ((0, 1), 1), ((3, 0), 3), ((3, 1), 1), ((1, 2), 2), ((0, -9), 2)]
)
def test_the_status_is_that_of_the_comparisons(
    place: Path, monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, int], end: int
) -> None:
    given = dict(zip(("second", "first"), statuses, strict=True))
    monkeypatch.setattr(accuracy.Run, "train", lambda self, name, place: 0)
    monkeypatch.setattr(accuracy.Run, "call", lambda self, command, name, place: given[name])
    for name in given:
        (place / "out" / name / "float").mkdir(parents=True)
        (place / "out" / name / "float" / "model.safetensors").touch()
    assert run(place, data="x") == end


@pytest.mark.parametrize("at_once", [1, 2])
def test_tables_go_where_a_gpu_is_free(place: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    tables = {name: Table(name, (), (), init=place / "train" / "0.png") for name in ("long", "one", "two")}
    places, rest, done = [{"GPU": "0"}, {"GPU": "1"}], threading.Event(), []

    def call(run: Any, command: Any, name: str, place: Any) -> int:
        if name == "long" and at_once > 1:
            assert rest.wait(20)
        done.append((name, place.get("GPU")))
        if len(done) == 2:
            rest.set()
        return 0

    monkeypatch.setattr(accuracy, "TABLES", tables)
    monkeypatch.setattr(accuracy, "environments", lambda device: places)
    monkeypatch.setattr(accuracy.Run, "call", call)
    assert run(place, data="x", at_once=at_once) == 0
    where = dict(done)
    if at_once > 1:
        assert where["one"] == where["two"] != where["long"]
    else:  # one table at a time sees all of them, as compare.py wants it
        assert where == dict.fromkeys(tables)


def test_a_float_model_is_trained_by_one_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise AssertionError("it is trained twice")

    monkeypatch.setattr(accuracy.Run, "call", refuse)
    with claimed(place / "out" / "first" / "float") as mine:
        assert mine
        assert run(place, "first", data=str(place / "train")) == 1


def test_the_overview_is_of_all_tables_that_are_there(place: Path) -> None:
    """Also where one was asked for; scores that are not finite are left out."""
    row = {"method": "float", "bits": None, "label": "float", "score": 30.0, "loss": 0.0}
    ours = {"method": "ours", "bits": 2, "label": "ours", "score": None, "loss": None}
    against = {"method": "lsq", "mean": 0.25, "standard_error": None, "seeds": 1}
    other = {**ours, "method": "ours-rate-1", "label": "another rate", "score": 29.5, "loss": 0.5}
    for name, own in (("first", ours), ("second", other)):
        (place / "out" / name).mkdir(parents=True)
        found = {"settings": {"task": {"kind": "denoise"}}, "rows": [row, {**own, "against": against}]}
        (place / "out" / name / "compare.json").write_text(json.dumps(found))
    assert run(place, "first", report=True) == 1
    text = (place / "out" / "accuracy.md").read_text()
    assert "| noise | 2 | 30.000 |  | lsq +0.250, 1 seed |" in text
    assert "| after the first | 2 | 30.000 | 29.500 (0.500) |" in text


def test_a_bad_command_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, more, message in (
        (("third",), {}, "no table 'third'"),
        (("first",), {}, "--data is needed for first"),
        (("first",), {"jobs": 0, "data": "x"}, "--jobs"),
    ):
        assert run(place, *words, **more) == 2
        assert message in capsys.readouterr().err
    assert accuracy.main(["--list"]) == 0
    assert "after the first" in capsys.readouterr().out
