"""The Python samples of the pages in ``docs`` run as they stand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ssmquant
from ssmquant import HealthWarning, QConfig, zoo

DOCS = Path(__file__).parents[1] / "docs"


def samples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def run(page: str, code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    space = dict(names or {})
    exec(compile(code, page, "exec"), space)
    return space


@pytest.fixture
def names() -> dict[str, Any]:
    """What samples that are no programs of their own speak of."""
    torch.manual_seed(0)
    model = zoo.build("MambaIR", embed_dim=16, depths=(1,), upscale=2, upsampler="pixelshuffledirect").eval()
    images = [torch.rand(1, 3, 8, 8) for _ in range(2)]
    prepared = ssmquant.prepare(model, QConfig.recommended(4, 4))
    ssmquant.calibrate(prepared, images, progress=False)
    return {
        "ssmquant": ssmquant, "QConfig": QConfig, "model": model, "float_model": model, "image": images[0],
        "images": images, "batches": images, "prepared": prepared.eval(),
    }  # fmt: skip


def test_training() -> None:
    recipe, watched = samples("training.md")
    trained = run("training.md", recipe)
    assert trained["loss"].isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        assert len(run("training.md", watched)["monitor"].history) >= 2


def test_post_training(names: dict[str, Any]) -> None:
    quantized, learned = samples("ptq.md")
    deployed = run("ptq.md", quantized, names)["deployed"]
    assert deployed(names["image"]).shape == (1, 3, 16, 16)
    run("ptq.md", learned.replace("steps=100", "steps=2"), names)


def test_mixed(names: dict[str, Any]) -> None:
    (code,) = samples("mixed.md")
    after = run("mixed.md", code, names)
    assert after["mixed"].rules
    assert after["prepared"](names["image"]).isfinite().all()


def test_report(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = samples("report.md")
    monkeypatch.chdir(tmp_path)
    run("report.md", code, names)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.gpu
def test_deploy(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = samples("deploy.md")
    monkeypatch.chdir(tmp_path)
    ssmquant.save(ssmquant.convert(names["prepared"]), "model.safetensors")
    deployed = run("deploy.md", code, names)["deployed"]
    assert deployed(names["image"].cuda()).isfinite().all()
