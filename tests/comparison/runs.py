"""Runs of examples/compare.py in this process, what they wrote, and results that were never computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cells
import compare
from cells import Cell, Settings


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
