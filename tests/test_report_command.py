"""``ssmquant report``: what it writes, and how it fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import ssmquant
from ssmquant import QConfig, cli
from tests.conftest import ROOT
from tests.report_page import Page
from tests.small import images, prepared_and_calibrated, tiny_mambair


def run(*args: Any) -> int:
    return cli.main([str(a) for a in args])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ROOT / "examples" / "weights" / "mambair_tiny_x2_float.safetensors"
    out, photo = tmp_path / "r.html", ROOT / "examples" / "photos" / "coffee.png"
    command = ("report", tiny, "-o", out, "--images", photo)
    assert run(*command, "--crop", "12", "--preset", "recommended", "--w-bits", "3", "--title", "<b>") == 0
    assert f"{out.stat().st_size:,} bytes, 1 of 1 pictures" in capsys.readouterr().out
    page = Page(out)
    assert page.text["title"] == ["<b>"]
    assert "against the reference model" in page.source
    assert "W3A4" in page.source
    assert "--force" in failure(capsys, *command)
    assert "is an input" in failure(capsys, "report", out, "-o", out, "--force")
    assert "--crop 0" in failure(capsys, *command, "--force", "--crop", "0")
    assert "w_bits=0" in failure(capsys, *command, "--force", "--crop", "12", "--w-bits", "0")
    assert "no such file" in failure(capsys, "report", tmp_path / "none", "-o", tmp_path / "x.html")
    assert "no such folder" in failure(capsys, "report", tiny, "-o", tmp_path / "no" / "x.html")
    assert "no such file or folder" in failure(capsys, *command[:4], "--force", "--images", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def failure(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ssmquant: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4 * 64, 3)

    def forward(self, x):
        return self.last(self.mix(self.first(x)).flatten(1))

def make():
    return Net()
"""


def test_the_command_for_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    photos = ROOT / "examples" / "photos"
    command = ("report", "report_nets:make", "--input", "1,3,8,8", "-o")
    assert run(*command, "a.html") == 0
    assert "weights only" in capsys.readouterr().out
    assert run(*command, "b.html", "--images", photos, "--crop", "8", "--preset", "minmax") == 0
    assert "13 of 13 pictures" in capsys.readouterr().out
    assert "13 batches" in Path("b.html").read_text(encoding="utf-8")
    said = failure(capsys, *command, "c.html", "--images", photos / "coffee.png", "--crop", "9")
    assert "does not take pictures of 1x3x9x9 (see --crop)" in said
    assert not Path("c.html").exists()


def test_the_command_for_a_quantized_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ssmquant.convert(
        prepared_and_calibrated(tiny_mambair().eval(), QConfig(w_bits=4, a_bits=4), images(1, 3, 8, 8))
    )
    ssmquant.save(saved, tmp_path / "q.safetensors")
    command = ("report", tmp_path / "q.safetensors", "-o", tmp_path / "q.html")
    assert "is quantized" in failure(capsys, *command, "--w-bits", "2")
    assert run(*command) == 0
    assert "deployed" in " ".join(Page(tmp_path / "q.html").text["dd"])


@pytest.mark.parametrize("preset", cli._presets())
def test_every_preset(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "preset_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    photo = ROOT / "examples" / "photos" / "coffee.png"
    command = ("report", "preset_nets.py:make", "--input", "1,3,8,8", "--images", photo, "--crop", "8")
    assert run(*command, "-o", "a.html", "--preset", preset) == 0
    assert "mix" in Page(tmp_path / "a.html").source
