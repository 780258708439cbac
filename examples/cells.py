"""One cell of the comparison: a method at a bit width with a seed, trained, converted, saved, loaded back and scored.

A cell has a folder of its own. It is finished when ``result.json`` is there; until then ``checkpoint.pt`` says how far
it got, and another run goes on from it if all settings are those of ``key.json``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import methods
import numpy as np
import torch
from patches import PatchData
from PIL import Image
from torch import Tensor, nn
from training import Recipe, Result, fit

import ssmquant
from ssmquant import QConfig
from ssmquant.io import load_float, save_float
from ssmquant.quantizers import DLS
from ssmquant.restore import Task, to_image

__all__ = ["Cell", "Settings", "detail", "read_result", "run_cell"]

Images = Sequence[tuple[str, Image.Image]]
CROP = 96
"""Side of the crops of the figure, in pixels of the restored picture."""
_CHECKPOINTS = ("checkpoint.pt", "weights.pt")
SHOWN = 2  # pictures a set in the figure


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison have in common."""

    task: Task
    init: Path
    steps: int = 1000
    batch: int = 16
    patch: int = 48
    lr: float = 1e-3
    warmup: int = 50
    calibration: int = 4
    bf16: bool = False
    side: int = 64
    """Input side that BitOPs are counted at."""

    def describe(self) -> dict[str, Any]:
        weights = hashlib.sha256(self.init.read_bytes()).hexdigest()
        return {**asdict(self), "init": self.init.name, "init_sha256": weights}


@dataclass(frozen=True)
class Cell:
    """``bits`` is None for the float model."""

    method: str
    bits: int | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{f'w{self.bits}a{self.bits}' if self.bits else 'float'}-s{self.seed}"

    def config(self) -> QConfig:
        make = methods.find(self.method).config
        return QConfig() if make is None or self.bits is None else make(self.bits)


def _key(cell: Cell, settings: Settings) -> dict[str, Any]:
    """All that decides a cell's outcome."""
    method = methods.find(cell.method)
    training = {k: getattr(method, k) for k in ("distill", "quantizer_lr", "ema", "weights_first")}
    return {
        **settings.describe(),
        "cell": asdict(cell),
        "config": cell.config().to_dict(),
        "training": training,
    }


def read_result(cell: Cell, settings: Settings, out: Path) -> dict[str, Any] | None:
    """What a finished cell found; None for one that is not finished, or was run with other settings."""
    try:
        result = json.loads((out / cell.name / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = json.loads(json.dumps(_key(cell, settings)))
    return result if isinstance(result, dict) and result.get("key") == wanted else None


def detail(image: Image.Image, side: int = CROP) -> tuple[int, int, int, int]:
    """The box of the most detailed square of a picture: the largest mean gradient."""
    y = np.asarray(image.convert("L"), dtype=np.float64)
    side = min(side, *y.shape)
    energy = np.abs(np.diff(y, axis=0, prepend=y[:1])) + np.abs(np.diff(y, axis=1, prepend=y[:, :1]))
    total = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(int(sums[::4, ::4].argmax()), sums[::4, ::4].shape)
    return int(left) * 4, int(top) * 4, int(left) * 4 + side, int(top) * 4 + side


def _score(
    model: nn.Module, sets: Mapping[str, Images], task: Task, title: str, crops: Path | None
) -> dict[str, Any]:
    """PSNR and SSIM of every picture; the most detailed part of the first pictures as files in ``crops``."""
    scores: dict[str, Any] = {}
    for name, images in sets.items():
        known = dict(images)
        shown = list(known)[:SHOWN]

        def keep(
            image: str, restored: Tensor, name: str = name, known: Any = known, shown: Any = shown
        ) -> None:
            if crops is not None and image in shown:
                crops.mkdir(parents=True, exist_ok=True)
                box = detail(task.target(known[image]))
                to_image(restored).crop(box).save(crops / f"{name}_{Path(image).stem}.png")

        _, rows = common.score(model, images, task, f"{title}, {name}", each=keep)
        scores[name] = rows
    return scores


def _teacher(model: nn.Module, example: Tensor) -> nn.Module:
    teacher: nn.Module = copy.deepcopy(model)
    if example.is_cuda:  # a graph of our kernels is faster
        teacher = ssmquant.prepare(model, QConfig(), example_inputs=(example,))
    return teacher.eval().requires_grad_(False)


def _batches(data: PatchData, settings: Settings, seed: int) -> Iterable[Tensor]:
    data.seed(1000 + seed)
    return list(data.batches(settings.calibration, settings.batch))


def run_cell(
    cell: Cell,
    settings: Settings,
    data: PatchData,
    sets: Mapping[str, Images],
    out: Path,
    deadline: float | None = None,
) -> bool:
    """Run a cell, or go on with one; False if it stopped at ``deadline`` (a time of ``time.monotonic``).

    All methods see the same patches in the same order: ``data`` starts anew from the cell's seed.
    """
    method, folder, device = methods.find(cell.method), out / cell.name, data.device
    torch.manual_seed(cell.seed)
    began = time.monotonic()
    _forget_others(folder, _key(cell, settings))
    model: nn.Module = load_float(settings.init).to(device)
    example = torch.zeros(1, 3, settings.patch, settings.patch, device=device)
    teacher = _teacher(model, example) if method.distill else None
    first = round(settings.steps * method.weights_first)
    recipe = Recipe(
        steps=settings.steps - first, batch=settings.batch, lr=settings.lr, warmup=settings.warmup, ema=method.ema,
        bf16=settings.bf16, distill=method.distill, cuda_graph=device.type == "cuda", log_every=100,
        checkpoint=folder / "checkpoint.pt", checkpoint_every=500,
    )  # fmt: skip
    config = cell.config()
    trained, seconds = _train_weights(model, config, cell, settings, data, recipe, first, teacher, deadline)
    if not trained:
        return False
    prepared: nn.Module = ssmquant.prepare(model, config, example_inputs=(example,))
    if cell.bits is not None and config.searches:
        ssmquant.calibrate(prepared, _batches(data, settings, cell.seed), progress=False)
    groups = ssmquant.param_groups(prepared, settings.lr, 0.0, settings.lr * method.quantizer_lr)
    data.seed(cell.seed)
    done = fit(
        prepared, data, _until(recipe, deadline), groups=list(groups), title=cell.name, resume=True, teacher=teacher
    )  # fmt: skip
    if not done.finished:
        return False
    ready = time.monotonic()
    path = folder / "model.safetensors"
    facts: dict[str, Any] = {}
    if cell.bits is None:
        model.load_state_dict(prepared.state_dict())
        save_float(model, path)
        loaded: nn.Module = load_float(path).to(device)
        facts["bitops"] = common.float_bitops(model.cpu(), settings.side)
    else:
        ssmquant.calibrate(prepared, _batches(data, settings, cell.seed), fit=False, progress=False)
        loaded, facts["verify_max_rel"] = common.deploy(prepared, data.sample(2)[0], path)
        facts["bitops"] = ssmquant.summary(prepared).bitops
        if any(isinstance(m, DLS) for m in loaded.modules()):
            frozen = folder / "frozen.safetensors"
            ssmquant.save(ssmquant.convert(prepared, dls="frozen"), frozen)
            deployed = ssmquant.load(frozen).to(device)
            facts["frozen"] = _score(deployed, sets, settings.task, f"{cell.name} frozen", None)
    facts["images"] = _score(loaded, sets, settings.task, cell.name, folder / "crops")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    common.write_json(
        {
            "key": _key(cell, settings), "label": method.label, "file_bytes": path.stat().st_size,
            "train_seconds": seconds + _seconds(done), "seconds": time.monotonic() - began,
            "score_seconds": time.monotonic() - ready, "losses": done.losses, "device": device_name,
            "torch": torch.__version__, "ssmquant": ssmquant.__version__, **facts,
        },
        folder / "result.json",
    )  # fmt: skip
    for name in _CHECKPOINTS:
        (folder / name).unlink(missing_ok=True)
    return True


def _forget_others(folder: Path, key: dict[str, Any]) -> None:
    """Remove the checkpoints of a run with other settings."""
    try:
        same = json.loads((folder / "key.json").read_text(encoding="utf-8")) == json.loads(json.dumps(key))
    except (OSError, ValueError):
        same = False
    if not same:
        for name in _CHECKPOINTS:
            (folder / name).unlink(missing_ok=True)
        common.write_json(key, folder / "key.json")


def _until(recipe: Recipe, deadline: float | None) -> Recipe:
    return recipe if deadline is None else replace(recipe, time_limit=max(0.0, deadline - time.monotonic()))


def _train_weights(
    model: nn.Module,
    config: QConfig,
    cell: Cell,
    settings: Settings,
    data: PatchData,
    recipe: Recipe,
    steps: int,
    teacher: nn.Module | None,
    deadline: float | None,
) -> tuple[bool, float]:
    """``steps`` with float activations, into ``model``'s own weights: whether all were done, and seconds."""
    if not steps:
        return True, 0.0
    weights = replace(config, a_bits=None, scan_bits=None)
    example = torch.zeros(1, 3, settings.patch, settings.patch, device=data.device)
    prepared: nn.Module = ssmquant.prepare(model, weights, example_inputs=(example,))
    data.seed(500 + cell.seed)
    assert recipe.checkpoint is not None
    own = replace(recipe, steps=steps, checkpoint=recipe.checkpoint.with_name("weights.pt"))
    done = fit(
        prepared, data, _until(own, deadline), title=f"{cell.name}, weights", resume=True, teacher=teacher
    )
    names = model.state_dict()
    model.load_state_dict({k: v for k, v in prepared.state_dict().items() if k in names})
    return done.finished, _seconds(done)


def _seconds(done: Result) -> float:
    """Of all steps, at the speed of those of this run: an interrupted cell has earlier ones."""
    return done.seconds * done.step / max(1, done.step - done.begun)
