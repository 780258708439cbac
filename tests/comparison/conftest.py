"""What the tests of examples/compare.py get: a place with a float model and pictures, and its modules on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssmquant import zoo
from ssmquant.io import save_float
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import cells

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


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cell is trained")

    monkeypatch.setattr(cells, "fit", refuse)
