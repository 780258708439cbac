"""The comparison of methods, end to end at its smallest size."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssmquant import QConfig, zoo
from ssmquant.errors import ConfigError, FormatError
from ssmquant.io import save_float
from ssmquant.restore import Task, open_image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import compare
import methods
import report
from cells import Cell, Settings, detail, read_result, run_cell
from patches import PatchData

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
    for name, count in (("train", 2), ("A", 2), ("B", 1)):
        (root / name).mkdir()
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
            small.resize((36, 32), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


def run(place: Path, out: Path, *grid: str, **more: Any) -> int:
    args = [
        *grid, "--init", str(place / "float.safetensors"), "--data", str(place / "train"), "--device", "cpu",
        "--eval", str(place / "A"), str(place / "B"), "--out", str(out), "--batch", "2", "--patch", "8",
        "--steps", "2", "--calibration", "1",
    ]  # fmt: skip
    for key, value in more.items():
        args += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return compare.main(args)


def test_the_whole_way(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("2:lsq,official,ours,ours-weights-first:0,1",)
    assert run(place, tmp_path, *grid, time_limit=0) == 1  # no time: nothing is begun
    assert "10 of 10 cells are not finished" in capsys.readouterr().err
    assert run(place, tmp_path, *grid) == 0
    cells = sorted(p.parent.name for p in tmp_path.glob("cells/*/result.json"))
    assert len(cells) == 10
    assert "ours-w2a2-s1" in cells
    assert not list(tmp_path.glob("cells/*/checkpoint.pt"))
    found = json.loads((tmp_path / "compare.json").read_text())
    rows = {(r["method"], r["bits"]): r for r in found["rows"]}
    assert found["unfinished"] == 0
    assert rows["float", None]["loss"] == 0
    ours = rows["ours", 2]
    assert ours["seeds"] == 2
    assert ours["frozen_psnr"] is not None
    assert rows["lsq", 2]["frozen_psnr"] is None  # it has no dynamic range
    assert ours["verify_max_rel"] == 0
    assert ours["against"]["method"] in ("lsq", "official")
    assert rows["ours-weights-first", 2]["against"]["method"] == "ours"
    result = json.loads((tmp_path / "cells" / "ours-w2a2-s0" / "result.json").read_text())
    assert [len(r) for r in result["images"].values()] == [2, 1]
    assert QConfig.from_dict(result["key"]["config"]) == QConfig.recommended(2, 2)
    assert (tmp_path / "cells" / "ours-w2a2-s0" / "crops" / "A_0.png").exists()
    assert "| 2 | ours |" in (tmp_path / "compare.md").read_text()
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
    assert [r["psnr"] for r in a] == [r["psnr"] for r in b]


def test_a_cell_stops_at_the_deadline(place: Path, tmp_path: Path) -> None:
    task = Task("sr", 2)
    settings = Settings(task, place / "float.safetensors", steps=2, batch=2, patch=8, calibration=1, side=8)
    data = PatchData.load(place / "train", task, patch=8)
    sets = {"A": [("0.png", open_image(place / "A" / "0.png"))]}
    cell = Cell("ours-weights-first", 2, 0)
    assert not run_cell(cell, settings, data, sets, tmp_path, deadline=0.0)
    assert read_result(cell, settings, tmp_path) is None
    assert run_cell(cell, settings, data, sets, tmp_path)
    assert read_result(cell, settings, tmp_path) is not None
    # A checkpoint of other settings is not gone on from.
    broken = tmp_path / cell.name / "checkpoint.pt"
    broken.write_bytes(b"of another run")
    other = replace(settings, lr=1e-4)
    assert run_cell(cell, other, data, sets, tmp_path)
    assert read_result(cell, other, tmp_path) is not None
    broken.write_bytes(b"of this run")
    with pytest.raises(FormatError, match="cannot resume"):
        run_cell(cell, other, data, sets, tmp_path)
    assert read_result(cell, replace(settings, steps=3), tmp_path) is None


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
    for bad in ("2", "two:lsq", "2:lsqq", "1:lsq", "2:lsq:x", "9:ours"):
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


def test_paired_differences() -> None:
    def result(*psnr: float) -> dict[str, Any]:
        rows = [{"name": str(i), "psnr": p, "ssim": 1.0} for i, p in enumerate(psnr)]
        return {"images": {"A": rows[:2], "B": rows[2:]}}

    ours, theirs = [result(30, 20, 40), result(32, 20, 40)], [result(29, 21, 36)]
    mean, error = report.paired(ours, theirs)
    apart = [2.0, -1.0, 4.0]
    assert mean == pytest.approx(statistics.fmean(apart))
    assert error == pytest.approx(statistics.stdev(apart) / math.sqrt(3))
    assert report.mean_psnr(ours[0]["images"]) == pytest.approx((25 + 40) / 2)
    assert math.isnan(report.paired(ours, [{"images": {}}])[0])


def test_the_most_detailed_part() -> None:
    flat = np.full((200, 300), 128, dtype=np.uint8)
    flat[96:160, 200:264] = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    left, top, right, bottom = detail(Image.fromarray(flat), 64)
    assert abs(left - 200) <= 4
    assert abs(top - 96) <= 4
    assert (right - left, bottom - top) == (64, 64)
    assert detail(Image.fromarray(flat[:50, :70]), 96) == (0, 0, 50, 50)
