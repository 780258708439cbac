"""The comparison of methods, end to end at its smallest size: cells are run, gone on with, scored once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import compare
import pytest
from cells import Cell, Settings, load_result, read_result, run_cell, score_cell
from evalsets import eval_sets, fingerprint
from patches import PatchData
from problems import Restoration

from ssmquant import QConfig
from ssmquant.errors import ConfigError, FormatError
from ssmquant.restore import Task
from tests.comparison.runs import read, run


def test_the_whole_way(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("2:ours:0,1", "2:lsq,official,ours-weights-first:0")
    assert run(place, tmp_path, *grid, time_limit=0) == 1  # no time: nothing is begun
    assert "7 of 7 cells are not finished" in capsys.readouterr().err
    assert run(place, tmp_path, *grid) == 0
    cells = sorted(p.parent.name for p in tmp_path.glob("cells/*/result.json"))
    assert len(cells) == 7
    assert "ours-w2a2-s1" in cells
    assert not list(tmp_path.glob("cells/*/checkpoint.pt"))
    found = json.loads((tmp_path / "compare.json").read_text())
    rows = {(r["method"], r["bits"]): r for r in found["rows"]}
    assert found["unfinished"] == 0
    assert rows["float", None]["loss"] == 0
    ours = rows["ours", 2]
    assert ours["seeds"] == 2
    assert rows["official", 2]["frozen_score"] is not None
    assert ours["frozen_score"] is rows["lsq", 2]["frozen_score"] is None  # they have no dynamic range
    assert ours["verify_max_rel"] == 0
    assert ours["against"]["method"] in ("lsq", "official")
    assert rows["ours-weights-first", 2]["against"]["method"] == "ours"
    result = json.loads((tmp_path / "cells" / "ours-w2a2-s0" / "result.json").read_text())
    assert [(s["name"], len(s["images"]), "frozen" in s) for s in result["sets"]] == [
        ("A", 2, False),
        ("B", 1, False),
    ]
    official = json.loads((tmp_path / "cells" / "official-w2a2-s0" / "result.json").read_text())
    assert [len(s["frozen"]) for s in official["sets"]] == [2, 1]
    assert QConfig.from_dict(result["key"]["config"]) == QConfig.recommended(2, 2)
    assert "| 2 | ours |" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").exists()
    # What is finished is not run again, and not counted under other settings.
    stamp = (tmp_path / "cells" / "ours-w2a2-s0" / "result.json").stat().st_mtime_ns
    assert run(place, tmp_path, *grid) == 0
    assert (tmp_path / "cells" / "ours-w2a2-s0" / "result.json").stat().st_mtime_ns == stamp
    assert run(place, tmp_path, *grid, lr=1e-4, report=True) == 1


def test_an_interrupted_cell_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    assert run(place, tmp_path / "whole", "2:ours") == 0
    steps = 0
    call = training.Step.__call__

    def stop(self: Any, x: Any, y: Any) -> None:
        nonlocal steps
        steps += 1
        call(self, x, y)
        if steps == 3:  # one of the float model's two is before it
            raise KeyboardInterrupt

    # Interrupted where no checkpoint was written, the cell starts anew; at the time limit it goes on.
    monkeypatch.setattr(training.Step, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "parts", "2:ours")
    monkeypatch.undo()
    assert run(place, tmp_path / "parts", "2:ours") == 0
    a, b = (json.loads((tmp_path / part / "compare.json").read_text())["rows"] for part in ("whole", "parts"))
    assert [r["score"] for r in a] == [r["score"] for r in b]


def test_a_cell_stops_at_the_deadline(place: Path, tmp_path: Path) -> None:
    task = Task("sr", 2)
    settings = Settings(
        Restoration(task),
        place / "float.safetensors",
        steps=2,
        batch=2,
        patch=8,
        calibration=1,
        side=8,
        data="train",
    )
    data = PatchData.load(place / "train", task, patch=8)
    sets = eval_sets([place / "B"])
    cell = Cell("ours-weights-first", 2, 0)
    assert not run_cell(cell, settings, data, tmp_path, deadline=0.0)
    assert read_result(cell, settings, tmp_path, sets) is None
    assert run_cell(cell, settings, data, tmp_path)
    assert read_result(cell, settings, tmp_path, sets) is None
    score_cell(cell, settings, sets, tmp_path, "cpu")
    assert read_result(cell, settings, tmp_path, sets) is not None
    # A checkpoint of other settings is not gone on from.
    broken = tmp_path / cell.name / "checkpoint.pt"
    for other in (replace(settings, lr=1e-4), replace(settings, data="other pictures")):
        broken.write_bytes(b"of another run")
        assert run_cell(cell, other, data, tmp_path)
        assert load_result(cell, other, tmp_path) is not None
        assert load_result(cell, settings, tmp_path) is None
    broken.write_bytes(b"of this run")
    with pytest.raises(FormatError, match="cannot resume"):
        run_cell(cell, other, data, tmp_path)


def test_a_cell_of_a_version_that_had_fewer_options_counts(
    place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert run(place, tmp_path, "2:lsq", sets="A") == 0
    path = tmp_path / "cells" / "lsq-w2a2-s0" / "result.json"
    result = json.loads(path.read_text())
    del result["key"]["training"]["rate"], result["key"]["config"]["smooth"]
    path.write_text(json.dumps(result))
    request.getfixturevalue("no_training")
    assert run(place, tmp_path, "2:lsq", sets="A") == 0
    result["key"]["training"]["distill"] = 0.123
    path.write_text(json.dumps(result))
    assert run(place, tmp_path, "2:lsq", sets="A", report=True) == 1


def test_a_method_has_a_learning_rate_of_its_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[str, list[float]] = {}
    powers: dict[str, float] = {}
    real = cells.fit

    def watch(model: Any, data: Any, recipe: Any, groups: Any = None, title: str = "", **more: Any) -> Any:
        rates[title] = [recipe.lr, *(g["lr"] for g in groups or [])]
        powers[title] = recipe.anneal
        return real(model, data, recipe, groups, title, **more)

    monkeypatch.setattr(cells, "fit", watch)
    assert run(place, tmp_path, "2:ours-rate-2,ours-slow-scalars,ours-anneal-2", sets="A", lr=1e-3) == 0
    assert set(rates["ours-rate-2-w2a2-s0"]) == {2e-3}
    assert set(rates["ours-slow-scalars-w2a2-s0"]) == {4e-3, 4e-4}
    assert rates["float-float-s0"][0] == 1e-3
    assert powers == {
        "float-float-s0": 1,
        "ours-rate-2-w2a2-s0": 1,
        "ours-slow-scalars-w2a2-s0": 1,
        "ours-anneal-2-w2a2-s0": 2,
    }


def test_further_sets_are_scored_from_the_saved_models(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert run(place, tmp_path, "2:official", sets="A") == 0
    request.getfixturevalue("no_training")
    first = read(tmp_path)[1]["official"]
    assert run(place, tmp_path, "2:official", sets="A B") == 0
    official = read(tmp_path)[1]["official"]
    assert list(official["sets"]) == ["A", "B"]
    assert official["sets"]["A"] == first["sets"]["A"]
    assert official["frozen_score"] is not None
    # Other pictures in a folder of the same name are another set.
    shutil.copytree(place / "x" / "HR", tmp_path / "other" / "B")
    assert run(place, tmp_path, "2:official", sets=f"A {tmp_path / 'other' / 'B'}") == 0
    assert read(tmp_path)[1]["official"]["sets"]["B"] != official["sets"]["B"]
    # Without the models, what was scored counts, and further sets are missing.
    for model in tmp_path.glob("cells/*/*.safetensors"):
        model.unlink()
    assert run(place, tmp_path, "2:official", sets="B") == 0
    assert read(tmp_path)[1]["official"]["sets"] == {"B": official["sets"]["B"]}
    capsys.readouterr()
    assert run(place, tmp_path, "2:official", sets="B y/HR") == 1
    err = capsys.readouterr().err
    assert "official-w2a2-s0: not scored on HR" in err
    assert "2 of 2 cells are not finished" in err
    # Nor is the model of another run scored.
    (tmp_path / "cells" / "official-w2a2-s0" / "model.safetensors").write_bytes(b"of another run")
    (tmp_path / "cells" / "official-w2a2-s0" / "frozen.safetensors").write_bytes(b"of another run")
    assert run(place, tmp_path, "2:official", sets="B y/HR") == 1


def test_scores_of_saved_models_are_those_of_a_whole_run(place: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path / "whole", "2:official", sets="A B") == 0
    assert run(place, tmp_path / "parts", "2:official", sets="B") == 0
    assert run(place, tmp_path / "parts", "2:official", sets="A B") == 0
    whole, parts = (read(tmp_path / part)[1] for part in ("whole", "parts"))
    for method in ("float", "official"):
        assert whole[method]["sets"] == parts[method]["sets"]
        assert whole[method]["frozen_score"] == parts[method]["frozen_score"]


def test_other_training_pictures_are_another_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def key() -> Any:
        return json.loads((tmp_path / "cells" / "float-float-s0" / "result.json").read_text())["key"]["data"]

    assert run(place, tmp_path, "2:lsq") == 0
    assert key() == fingerprint(place / "train")
    shutil.copytree(place / "train", tmp_path / "elsewhere")
    assert run(place, tmp_path, "2:lsq", data=str(tmp_path / "elsewhere"), report=True) == 0
    assert run(place, tmp_path, "2:lsq", data=None, report=True) == 0  # of whatever pictures
    assert read(tmp_path)[0]["settings"]["data"] == key()
    assert run(place, tmp_path, "2:minmax", data="train2") == 0
    assert key() == fingerprint(place / "train2") != fingerprint(place / "train")
    assert run(place, tmp_path, "2:lsq,minmax", data="train2", report=True) == 1
    assert run(place, tmp_path, "2:lsq,minmax", data=None, report=True) == 2
    assert "trained on different pictures: give --data" in capsys.readouterr().err


def test_times_and_losses_are_those_of_all_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # Interrupted while a set is scored, and before anything but the checkpoint was written.
    for stop in ((Restoration, "score"), (cells, "save_float")):
        out = tmp_path / stop[1]
        with monkeypatch.context() as patch:
            patch.setattr(*stop, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(place, out, "2:lsq")
        assert run(place, out, "2:lsq") == 0
        for path in out.glob("cells/*/result.json"):
            result = json.loads(path.read_text())
            assert [step for step, _ in result["losses"]] == [2]
            assert result["train_seconds"] == 2 * clock.step


class Clock:
    """``time.monotonic`` of the training loop: a step takes ``step`` seconds, all else none."""

    step = 8.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import training

        self.now = 0.0
        call = training.Step.__call__

        def count(step: Any, x: Any, y: Any) -> None:
            self.now += self.step
            call(step, x, y)

        monkeypatch.setattr(training.Step, "__call__", count)
        monkeypatch.setattr(training.time, "monotonic", lambda: self.now)


def test_two_processes_share_the_cells(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(place, tmp_path, "2:lsq,ours", jobs=2, threads=1) == 0
    assert len(list(tmp_path.glob("cells/*/result.json"))) == 3
    out, err = capfd.readouterr()
    assert "not finished" not in err
    assert out.count("Methods") == 1
    assert err.count(" dB, ") == 3  # none was run twice


def test_searched_widths(place: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path, "2.5:searched", "2,3:lsq", sets="B") == 0
    _, rows = read(tmp_path)
    row = rows["searched"]
    assert row["bits"] == 2.5
    result = json.loads((tmp_path / "cells" / "searched-w2.5a2.5-s0" / "result.json").read_text())
    assert result["key"]["training"]["searched"]
    assert len(QConfig.from_dict(result["searched"]).rules) > len(
        QConfig.from_dict(result["key"]["config"]).rules
    )
    assert not (tmp_path / "cells" / "searched-w2.5a2.5-s0" / "searched.json").exists()
    lsq = {r["bits"]: r for r in read(tmp_path)[0]["rows"] if r["method"] == "lsq"}
    assert lsq[2]["bitops"] <= row["bitops"] <= lsq[3]["bitops"]
    for wrong in ("2.5:ours", "1.5:searched"):
        with pytest.raises(ConfigError):
            compare.grid([wrong])
