"""The demonstration, end to end, at its smallest size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo.py"
KEYS = [
    "name",
    "w_bits",
    "a_bits",
    "psnr",
    "ssim",
    "file_bytes",
    "params",
    "verify_max_rel",
    "bitops",
    "seconds",
]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights, or where they are missing an untrained model: the numbers do not matter here."""
    shipped = ROOT / "examples" / "weights" / "mambair_tiny_x2_float.safetensors"
    if shipped.exists():
        return shipped
    io = pytest.importorskip("ssmquant.io")
    from ssmquant import zoo

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    io.save_float(zoo.build("mambair_tiny", upscale=2), path, half=True)
    return path


@pytest.mark.slow
def test_quick_demo_writes_what_it_promises(tmp_path: Path, weights: Path) -> None:
    done = run("--quick", "--out", str(tmp_path), "--weights", str(weights))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"rows", "images", "seconds"}
    rows = {row["name"]: row for row in metrics["rows"]}
    schemes = [f"{s} W{b}A{b}" for b in (4, 2) for s in ("recommended", "dls_rfa", "lsq")]
    assert list(rows) == ["bicubic", "float", *schemes]
    for name, row in rows.items():
        assert list(row) == KEYS
        assert 0 < row["psnr"] < 60
        assert -1 <= row["ssim"] <= 1
        if "W" in name:
            bits = int(name[-1])
            assert row["w_bits"] == row["a_bits"] == bits
            scheme = name.split()[0]
            file = tmp_path / f"{scheme}_w{bits}a{bits}.safetensors"
            assert row["file_bytes"] == file.stat().st_size < 140_154 * 4
            assert row["params"] == 140_154
            assert row["verify_max_rel"] < 1e-3
            assert row["bitops"] > 0
    assert rows["bicubic"]["file_bytes"] is None
    assert rows["dls_rfa W2A2"]["file_bytes"] < rows["dls_rfa W4A4"]["file_bytes"]
    assert len(metrics["images"]) == 5
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.width > image.height > 200
    assert "2 fine-tuning steps" in done.stdout


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ssmquant.io")
    done = run("--quick", "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "none.safetensors"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_photographs_are_split_and_credited() -> None:
    sys.path.insert(0, str(DEMO.parent))
    pytest.importorskip("ssmquant.io")
    import demo

    files = {path.name for path in (DEMO.parent / "photos").glob("*.png")}
    assert set(demo.EVALUATED) | set(demo.TRAINING) == files
    assert not set(demo.EVALUATED) & set(demo.TRAINING)
    credits = (DEMO.parent / "photos" / "ATTRIBUTION.md").read_text()
    listed = {
        entry["file"]: entry for entry in json.loads((DEMO.parent / "photos" / "LICENSES.json").read_text())
    }
    assert set(listed) == files
    for name, entry in listed.items():
        line = next(line for line in credits.splitlines() if f"`{name}`" in line)
        assert entry["author"] in line
        assert entry["licence"].split()[0] in line
