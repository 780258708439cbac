"""The comparison of methods, end to end at its smallest size."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssmquant import QConfig, zoo
from ssmquant.errors import ConfigError, FormatError, SsmquantError
from ssmquant.io import save_float
from ssmquant.restore import Task

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import cells
import common
import compare
import methods
import report
from cells import Cell, Settings, detail, load_result, read_result, run_cell, score_cell
from evalsets import EvalSet, eval_sets, fingerprint
from patches import PatchData
from problems import Classification, Restoration

NANO = {"embed_dim": 32, "depths": [1], "d_state": 4, "mlp_ratio": 1.2, "upsampler": "pixelshuffledirect"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model and pictures to train and to score on."""
    root = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    model = zoo.build({"name": "MambaIR", "args": {"upscale": 2, "img_size": 16, **NANO}})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    save_float(model, root / "float.safetensors")
    rng = np.random.default_rng(0)
    for name, count in (("train", 2), ("train2", 2), ("A", 2), ("B", 1), ("x/HR", 1), ("y/HR", 1)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
            small.resize((36, 32), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


def run(
    place: Path, out: Path, *grid: str, sets: str | None = "A B", data: str | None = "train", **more: Any
) -> int:
    """The command, in this process; ``sets`` and ``data`` name folders in ``place``."""
    args = [
        *grid, "--init", str(place / "float.safetensors"), "--device", "cpu", "--out", str(out),
        "--batch", "2", "--patch", "8", "--steps", "2", "--calibration", "1",
    ]  # fmt: skip
    if sets is not None:
        args += ["--eval", *(str(place / name) for name in sets.split())]
    if data is not None:
        args += ["--data", str(place / data)]
    for key, value in more.items():
        args += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return compare.main(args)


def read(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is in ``compare.json``, and its rows by method."""
    found = json.loads((out / "compare.json").read_text())
    return found, {r["method"]: r for r in found["rows"]}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cell is trained")

    monkeypatch.setattr(cells, "fit", refuse)


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


def test_tables_of_the_sets_in_common(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(Restoration(Task("sr", 2)), place / "float.safetensors", data="pictures")
    one, other = Cell("float", None, 0), Cell("lsq", 2, 0)

    def write(*names: str) -> tuple[int, int]:
        sets = [EvalSet(name, place, name) for name in names]
        return report.write([one, other], settings, tmp_path, sets or None)

    pretend(tmp_path, settings, one, A=[30, 31], B=[32])
    pretend(tmp_path, settings, other, A=[29, 30])
    assert write() == (0, 0)
    assert "left out, for not all cells were scored on them: B" in capsys.readouterr().err
    assert [list(r["sets"]) for r in read(tmp_path)[0]["rows"]] == [["A"]] * 2
    assert "left out" in (tmp_path / "compare.md").read_text()
    assert write("A") == (0, 0)
    assert report.write([one, other, Cell("ours", 2, 0)], settings, tmp_path, None) == (1, 0)
    pretend(tmp_path, settings, Cell("ours", 2, 0))  # trained, but not scored yet
    assert report.write([one, other, Cell("ours", 2, 0)], settings, tmp_path, None) == (1, 0)
    assert report.write([Cell("ours", 2, 0)], settings, tmp_path, None) == (1, 0)
    assert write("B") == write("B", "A") == (1, 0)  # lsq is missing
    assert list(read(tmp_path)[1]) == ["float"]
    pretend(tmp_path, settings, other, C=[29])
    with pytest.raises(ConfigError, match="no set that all cells were scored on"):
        write()
    # Sets of one name that are not the same pictures are told apart.
    for cell in (one, other):
        pretend(tmp_path, settings, cell, HR=[30], _HR=[20])
    assert write() == (0, 0)
    assert [r["psnr"] for r in read(tmp_path)[1]["lsq"]["sets"].values()] == [30, 20]


def test_sets_have_distinct_names(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*folders: Path | str) -> list[str]:
        return [s.name for s in eval_sets(folders)]

    assert names(place / "x" / "HR", place / "y" / "HR", place / "A") == ["x/HR", "y/HR", "A"]
    assert names(place / "A" / "0.png", place / "x" / "HR") == ["0.png", "HR"]
    monkeypatch.chdir(place / "x" / "HR")
    assert names(".", "../../y/HR/") == ["x/HR", "y/HR"]
    for twice in ("../HR", shutil.copytree(place / "x" / "HR", tmp_path / "copy")):
        with pytest.raises(ConfigError, match="same pictures"):
            eval_sets([".", twice])
    assert run(place, tmp_path, "2:lsq", sets="x/HR y/HR") == 0
    sets = read(tmp_path)[1]["lsq"]["sets"]
    assert list(sets) == ["x/HR", "y/HR"]
    assert sets["x/HR"] != sets["y/HR"]


def test_a_cell_that_fails_does_not_stop_the_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, tried = cells.fit, []

    def diverge(*args: Any, title: str, **more: Any) -> Any:
        tried.append(title)
        if title.startswith("lsq"):
            raise SsmquantError("the training loss is not finite")
        return fit(*args, title=title, **more)

    monkeypatch.setattr(cells, "fit", diverge)
    assert run(place, tmp_path, "2:lsq,minmax") == 3
    assert tried == ["float-float-s0", "lsq-w2a2-s0", "minmax-w2a2-s0"]
    assert "lsq-w2a2-s0 failed: the training loss is not finite" in capsys.readouterr().err
    found, rows = read(tmp_path)
    assert list(rows) == ["float", "minmax"]
    assert found["failed"] == {"lsq-w2a2-s0": "the training loss is not finite"}
    assert "the training loss is not finite" in (tmp_path / "compare.md").read_text()
    # It is tried again when that is asked for, or with other settings.
    tried.clear()
    assert run(place, tmp_path, "2:lsq,minmax") == 3
    assert run(place, tmp_path, "2:lsq,minmax", report=True) == 3
    assert tried == []
    assert run(place, tmp_path, "2:lsq,minmax", retry=True) == 3
    assert tried == ["lsq-w2a2-s0"]
    assert run(place, tmp_path, "2:lsq", lr=1e-4) == 3
    assert tried == ["lsq-w2a2-s0", "float-float-s0", "lsq-w2a2-s0"]
    monkeypatch.setattr(cells, "fit", fit)
    (tmp_path / "cells" / "lsq-w2a2-s0" / "checkpoint.pt").write_bytes(b"of the run that failed")
    assert run(place, tmp_path, "2:lsq", lr=1e-4, retry=True) == 0
    assert not list(tmp_path.glob("cells/*/failed.json"))


def test_a_cell_without_memory_waits_for_the_other_processes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, full = cells.fit, True

    def hungry(*args: Any, title: str, **more: Any) -> Any:
        if full and title.startswith("lsq"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit(*args, title=title, **more)

    class Helper:
        def wait(self) -> None:
            nonlocal full
            full = False

    monkeypatch.setattr(cells, "fit", hungry)
    assert run(place, tmp_path, "2:lsq,minmax") == 1
    said = capsys.readouterr().err
    assert "lsq-w2a2-s0: out of GPU memory; with fewer --jobs" in said
    assert "1 of 3 cells are not finished" in said
    assert list(read(tmp_path)[1]) == ["float", "minmax"]
    monkeypatch.setattr(compare, "_start", lambda *_: [Helper()])
    assert run(place, tmp_path, "2:lsq,minmax", jobs=2) == 0
    assert set(read(tmp_path)[1]) == {"float", "lsq", "minmax"}


def test_scores_that_fail_cost_no_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    score = Restoration.score

    def refuse(problem: Any, model: Any, one: EvalSet, *args: Any) -> Any:
        if one.name == "HR":
            raise SsmquantError("the output is not finite")
        return score(problem, model, one, *args)

    monkeypatch.setattr(Restoration, "score", refuse)
    assert run(place, tmp_path, "2:lsq", sets="A x/HR B") == 3
    request.getfixturevalue("no_training")
    assert run(place, tmp_path, "2:lsq", sets="A x/HR", report=True) == 3
    assert run(place, tmp_path, "2:lsq", sets=None, report=True) == 0
    assert run(place, tmp_path, "2:lsq", sets="A B") == 0
    monkeypatch.setattr(Restoration, "score", score)
    assert run(place, tmp_path, "2:lsq", sets="A x/HR", retry=True) == 0


def test_a_set_that_cannot_be_scored_is_an_error_before_any_training(
    place: Path, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "tiny" / "0.png")
    Image.new("RGB", (40, 8)).save(tmp_path / "tiny" / "1.png")
    assert run(place, tmp_path, "2:lsq", sets=f"A {tmp_path / 'tiny'}") == 2
    assert "SSIM needs at least 11 pixels" in capsys.readouterr().err
    (tmp_path / "tiny" / "1.png").write_bytes(b"no picture")
    assert run(place, tmp_path, "2:lsq", sets=f"A {tmp_path / 'tiny'}") == 2
    assert "1.png' as a picture" in capsys.readouterr().err


def test_main_waits_for_its_helpers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = []

    class Helper:
        def wait(self) -> None:
            waited.append(self)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compare, "_start", lambda *_: [Helper(), Helper()])
    monkeypatch.setattr(compare, "work", fail)
    assert run(place, tmp_path, "2:lsq", jobs=3) == 2
    assert len(waited) == 2
    # A helper has only the time that is left of the first process's.
    args = compare.arguments(["--time-limit", "100", "--worker", str(time.time() - 60)])
    end = compare.deadline_of(args)
    assert end is not None
    assert end - time.monotonic() == pytest.approx(40, abs=1)


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


def test_the_figure_is_of_cells_of_this_comparison(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "compare.png"
    assert run(place, tmp_path, "2:lsq:1") == 0
    assert figure.exists()
    # What another run left in the folder is not shown.
    crops = list(tmp_path.glob("cells/lsq-w2a2-s1/crops/*_restored.png"))
    assert len(crops) == 3
    for path in crops:
        Image.new("RGB", (32, 32)).save(path)
    assert run(place, tmp_path, "2:lsq:1") == 0
    assert not figure.exists()
    # The seed that most columns have is shown, with those that have it.
    shown = []
    find = report.shown_crops
    monkeypatch.setattr(report, "shown_crops", lambda cell, *a: shown.append(cell) or find(cell, *a))
    assert run(place, tmp_path, "2:lsq:1", "2:minmax:2", "2:dorefa:2") == 0
    assert figure.exists()
    assert shown == [Cell("float", None, 2), Cell("minmax", 2, 2), Cell("dorefa", 2, 2)]


def test_processes_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(device: str) -> list[str | None]:
        return [one.get("CUDA_VISIBLE_DEVICES") for one in compare.environments(device)]

    assert seen("cuda") == ["0", "1", "2"]
    assert seen("cuda:1") == seen("cpu") == [None]  # that one is asked for
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,5")
    assert seen("cuda") == ["4", "7", "5"]
    count = 1
    assert seen("cuda") == ["4,7,5"]


def test_scores_are_of_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        common, "evaluate", lambda *_, **__: seen.append(torch.backends.cudnn.allow_tf32) or []
    )
    with pytest.raises(statistics.StatisticsError):
        common.score(None, [], Task("sr", 2), "none")
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_two_processes_share_the_cells(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(place, tmp_path, "2:lsq,ours", jobs=2, threads=1) == 0
    assert len(list(tmp_path.glob("cells/*/result.json"))) == 3
    out, err = capfd.readouterr()
    assert "not finished" not in err
    assert out.count("Methods") == 1
    assert err.count(" dB, ") == 3  # none was run twice


def test_grids() -> None:
    cells = compare.grid(["2,4:lsq,ours:0,1", "2:ours"])
    assert len(cells) == 2 + 8
    assert Cell("float", None, 1) in cells
    assert [c.seed for c in cells] == [0] * 5 + [1] * 5
    assert {c.method for c in compare.grid(["2:ours*"])} >= {"ours", "ours-tensor", "float"}
    for bad in ("2", "two:lsq", "2:lsqq", "1:lsq", "2:lsq:x", "9:ours", "inf:ours", "nan:searched"):
        with pytest.raises(ConfigError):
            compare.grid([bad])


def test_a_bad_command_says_so(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, tmp_path, "2:lsqq") == 2
    assert "no method 'lsqq'" in capsys.readouterr().err
    assert compare.main(["2:lsq", "--init", str(place / "float.safetensors")]) == 2
    assert "--data" in capsys.readouterr().err
    assert compare.main(["--list"]) == 0
    assert "Q-MambaIR" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*methods.METHODS, *methods.ABLATIONS])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_method_has_a_configuration(name: str, bits: int) -> None:
    method = methods.find(name)
    if method.config is not None:
        config = method.config(bits)
        assert config.w_bits == config.a_bits == bits
        assert QConfig.from_json(config.to_json()) == config


def scored(*psnr: float) -> dict[str, Any]:
    rows = [{"name": str(i), "psnr": p, "ssim": 1.0} for i, p in enumerate(psnr)]
    return {"images": {"A": rows[:2], "B": rows[2:]}}


def test_paired_differences() -> None:
    ours = {0: scored(30, 20, 40), 1: scored(32, 20, 40), 2: scored(90, 90, 90)}
    theirs = {0: scored(29, 21, 36), 1: scored(30, 21, 37), 3: scored(0, 0, 0)}
    mean, error, seeds = report.paired(ours, theirs, "psnr")
    apart = [1.5, -1.0, 3.5]  # pictures, over the two seeds that both have
    assert mean == pytest.approx(statistics.fmean(apart))
    assert error == pytest.approx(statistics.stdev(apart) / math.sqrt(3))
    assert seeds == 2
    assert report.paired({0: ours[0]}, ours, "psnr") == (0, 0, 1)  # an ablation that changes nothing
    assert report.mean_score(ours[0]["images"], "psnr") == pytest.approx((25 + 40) / 2)
    nothing = report.paired({0: ours[0]}, {1: ours[1]}, "psnr")
    assert math.isnan(nothing[0])
    assert nothing[2] == 0


def pretend(out: Path, settings: Settings, cell: Cell, **psnr: list[float]) -> None:
    """A cell's result with these scores; a set's fingerprint is its name here, which may begin with _."""
    sets = [
        {
            "name": name.strip("_"),
            "sha256": name,
            "images": [{"name": str(i), "psnr": p, "ssim": 1.0} for i, p in enumerate(rows)],
            "crops": {},
        }
        for name, rows in psnr.items()
    ]
    result = {"key": cells._key(cell, settings), "label": cell.method, "device": "cpu", "sets": sets}
    numbers = {"train_seconds": 1.0, "file_bytes": 1, "bitops": 1, "files": {}}
    path = out / "cells" / cell.name / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **numbers}))


def test_differences_without_an_error() -> None:
    """Of one picture there is none: NaN, or null in ``compare.json``."""
    against = {"method": "lsq", "mean": 0.25, "standard_error": math.nan, "seeds": 1}
    metric = Restoration(Task()).metric
    assert report.difference(against, metric) == "lsq +0.250, 1 seed"
    assert report.difference(common.plain(against), metric) == "lsq +0.250, 1 seed"


def test_rows_are_compared_by_the_seeds_in_common(place: Path, tmp_path: Path) -> None:
    settings = Settings(Restoration(Task("sr", 2)), place / "float.safetensors", data="pictures")
    scores = {
        Cell("float", None, 0): 40, Cell("float", None, 1): 50, Cell("lsq", 2, 0): 30, Cell("lsq", 2, 1): 31,
        Cell("minmax", 2, 1): 20, Cell("ours", 2, 0): 35, Cell("ours", 2, 1): 36, Cell("ours", 2, 2): 90,
        Cell("ours-ema", 2, 0): 35,
    }  # fmt: skip
    for cell, psnr in scores.items():
        pretend(tmp_path, settings, cell, A=[psnr - 1, psnr + 1], B=[psnr])
    assert report.write(list(scores), settings, tmp_path, None) == (0, 0)
    _, rows = read(tmp_path)
    assert rows["ours-ema"]["against"] == {"method": "ours", "mean": 0, "standard_error": 0, "seeds": 1}
    assert rows["ours"]["against"] == {"method": "lsq", "mean": 5, "standard_error": 0, "seeds": 2}
    assert rows["minmax"]["against"] == {"method": "lsq", "mean": -11, "standard_error": 0, "seeds": 1}
    losses = {m: (rows[m]["loss"], rows[m]["loss_seeds"]) for m in ("lsq", "minmax", "ours", "ours-ema")}
    assert losses == {"lsq": (14.5, 2), "minmax": (30, 1), "ours": (9.5, 2), "ours-ema": (5, 1)}
    text = (tmp_path / "compare.md").read_text()
    assert "ours +0.000 ± 0.000, 1 seed |" in text
    assert "lsq +5.000 ± 0.000, 2 seeds |" in text
    assert "| 9.500 (2) |" in text  # of two seeds of three
    assert "standard error is over pictures only" in text


def test_the_best_rival_is_chosen_by_the_seeds_in_common() -> None:
    groups = {
        ("ours", 2): {0: scored(30, 30, 30)},
        ("lsq", 2): {0: scored(20, 20, 20), 1: scored(90, 90, 90)},
        ("minmax", 2): {0: scored(25, 25, 25)},
        ("pact", 2): {1: scored(99, 99, 99)},
        ("ours-ema", 2): {0: scored(1, 1, 1)},
        ("ours-tensor", 2): {1: scored(1, 1, 1)},
    }
    assert report._against(("ours", 2), groups, "psnr") == ("minmax", 2)
    assert report._against(("pact", 2), groups, "psnr") == ("lsq", 2)
    assert report._against(("ours-ema", 2), groups, "psnr") == ("ours", 2)
    assert report._against(("ours-tensor", 2), groups, "psnr") is None


def test_the_most_detailed_part() -> None:
    flat = np.full((200, 300), 128, dtype=np.uint8)
    flat[96:160, 200:264] = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    left, top, right, bottom = detail(Image.fromarray(flat), 64)
    assert abs(left - 200) <= 4
    assert abs(top - 96) <= 4
    assert (right - left, bottom - top) == (64, 64)
    assert detail(Image.fromarray(flat[:50, :70]), 96) == (0, 0, 50, 50)


LABELLED = {
    "classify": {
        "name": "VSSM",
        "args": {"patch_size": 2, "depths": [1, 1], "dims": [8, 16], "ssm_d_state": 1},
    },
    "segment": {
        "name": "VMUNet",
        "args": {"input_channels": 1, "dims": 8, "depths": [1, 1], "depths_decoder": [1, 1], "d_state": 2},
    },
}


@pytest.mark.parametrize("kind", sorted(LABELLED))
def test_labelled_pictures(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, 16, 16), dtype=np.uint8)
    y = np.arange(50) % 3 if kind == "classify" else rng.integers(0, 3, x.shape, dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    torch.manual_seed(0)
    save_float(zoo.build(LABELLED[kind], num_classes=3), tmp_path / "float.safetensors")
    grid = "4:mambaquant,lsq" if kind == "classify" else "4:lsq"
    args = [
        grid, "--task", kind, "--init", str(tmp_path / "float.safetensors"), "--device", "cpu",
        "--batch", "4", "--patch", "16", "--steps", "1", "--calibration", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    data = ["--data", str(tmp_path / "data.npz")]
    assert compare.main(args + data) == 0
    found, rows = read(tmp_path / "out")
    assert found["settings"]["task"] == {"kind": kind}
    assert list(rows["lsq"]["sets"]) == ["test"]
    assert 0 <= rows["lsq"]["score"] <= (100 if kind == "classify" else 1)
    assert rows["lsq"]["bitops_reduction"] > 0.5
    assert kind == "segment" or rows["mambaquant"]["train_seconds"] == 0
    result = json.loads((tmp_path / "out" / "cells" / "lsq-w4a4-s0" / "result.json").read_text())
    metric = {"classify": "accuracy", "segment": "dice"}[kind]
    scores = [row[metric] for row in result["sets"][0]["images"]]
    assert statistics.fmean(scores) == pytest.approx(rows["lsq"]["score"])
    assert (tmp_path / "out" / "sizes.png").exists()
    assert (tmp_path / "out" / "compare.png").exists() == (kind == "segment")
    # Only the pictures for testing are scored: those of another file are another set.
    assert compare.main([*args, "--report"]) == 0
    np.savez(tmp_path / "other.npz", x=x[::-1], y=y[::-1])
    assert compare.main([*args, *data, "--eval", str(tmp_path / "other.npz"), "--report"]) == 1
    capsys.readouterr()
    # More classes, or another task, are an error before any training; fewer in a file to score on are none.
    np.savez(
        tmp_path / "more.npz", x=x, y=y + np.arange(50, dtype=y.dtype).reshape(-1, *[1] * (y.ndim - 1)) % 3
    )
    more = [*args, "--out", str(tmp_path / "more"), "--data", str(tmp_path / "more.npz")]
    assert compare.main(more) == 2
    assert "the float model does not fit the task: results (1, 3" in capsys.readouterr().err
    assert not list(tmp_path.glob("more/cells/*/result.json"))
    assert compare.main([*more[:2], "sr", *more[3:-1], str(Path(compare.ROOT) / "photos")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    np.savez(tmp_path / "fewer.npz", x=x, y=np.minimum(y, 1))
    assert compare.main([*args, *data, "--eval", str(tmp_path / "fewer.npz")]) == 0
    assert compare.main([*args, *data, "--eval", str(tmp_path)]) == 2
    assert "labelled pictures are an .npz file" in capsys.readouterr().err


def test_labelled_sets_have_distinct_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "data.npz", x=np.full(3, ord(name)))
    a, b = (tmp_path / name / "data.npz" for name in "ab")
    problem = Classification()
    assert [one.name for one in problem.sets([a, b], None)] == ["a/data", "b/data"]
    assert [one.name for one in problem.sets([b], a)] == ["data"]
    assert [one.name for one in problem.sets([], a)] == ["test"]
    (tmp_path / "same.npz").write_bytes(a.read_bytes())
    for twice in ([a, a], [a, tmp_path / "same.npz"]):
        with pytest.raises(ConfigError):
            problem.sets(twice, None)
    with pytest.raises(ConfigError, match="--data or --eval"):
        problem.sets([], None)


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
