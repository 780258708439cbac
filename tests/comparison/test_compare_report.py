"""Tables and figures of the comparison: sets in common, paired differences, rivals, crops."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import common
import numpy as np
import pytest
import report
import torch
from cells import Cell, Settings, detail
from evalsets import EvalSet
from PIL import Image
from problems import Restoration

from ssmquant.errors import ConfigError
from ssmquant.restore import Task
from tests.comparison.runs import pretend, read, run


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
