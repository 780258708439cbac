"""The comparison of methods on labelled pictures: classes and masks."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
from problems import Classification

from ssmquant import zoo
from ssmquant.errors import ConfigError
from ssmquant.io import save_float
from tests.comparison.runs import read

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
