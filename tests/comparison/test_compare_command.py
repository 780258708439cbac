"""The command of the comparison: grids, sets, processes, and cells that fail."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import cells
import compare
import methods
import pytest
import torch
from cells import Cell
from evalsets import EvalSet, eval_sets
from PIL import Image
from problems import Restoration

from ssmquant import QConfig
from ssmquant.errors import ConfigError, SsmquantError
from tests.comparison.runs import read, run


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
    if method.config is None:
        assert name == "float"
        return
    config = method.config(bits)
    assert config.w_bits == config.a_bits == bits
    assert QConfig.from_json(config.to_json()) == config
