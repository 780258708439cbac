"""One cell of the comparison: a method at a bit width with a seed, trained, converted, saved, loaded back and scored.

A cell has a folder of its own. It is trained when ``result.json`` is there; until then ``checkpoint.pt`` says
how far it got, and another run goes on from it if all settings are those of ``key.json``. Scores are added to
``result.json`` set by set, from the saved models: what training depends on does not hold what is scored on.
``failed.json`` says why a cell cannot be finished.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import common
import methods
import numpy as np
import torch
from evalsets import EvalSet
from PIL import Image
from problems import Problem
from torch import Tensor, nn
from training import Data, Recipe, fit

import ssmquant
from ssmquant import QConfig
from ssmquant.errors import ConfigError
from ssmquant.io import load_float, save_float
from ssmquant.quantizers import DLS

__all__ = [
    "Cell",
    "Settings",
    "detail",
    "failure",
    "forget_failure",
    "has_models",
    "load_result",
    "mark_failed",
    "read_result",
    "run_cell",
    "score_cell",
    "scores_on",
    "shown_crops",
]

CROP = 96
"""Side of the crops of the figure, in pixels of the restored picture."""
_CHECKPOINTS = ("checkpoint.pt", "weights.pt")
_MODEL, _FROZEN, _SEARCHED = "model.safetensors", "frozen.safetensors", "searched.json"
SEARCHED_ON = 4  # training samples that sensitivities are measured on
SHOWN = 2  # pictures a set in the figure


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison have in common."""

    problem: Problem
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
    data: str | None = None
    """Fingerprint of the training pictures; None: results of any count, nothing can be trained."""

    def describe(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "problem"}
        weights = hashlib.sha256(self.init.read_bytes()).hexdigest()
        return {"task": self.problem.describe(), **own, "init": self.init.name, "init_sha256": weights}


@dataclass(frozen=True)
class Cell:
    """``bits`` is None for the float model; of a searched model it may be a fraction."""

    method: str
    bits: float | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{f'w{self.bits:g}a{self.bits:g}' if self.bits else 'float'}-s{self.seed}"

    def config(self) -> QConfig:
        """The configuration; that which a search begins with for a searched model.

        Raises:
            ConfigError: the method does not have that width.
        """
        method = methods.find(self.method)
        if method.config is None or self.bits is None:
            return QConfig()
        if self.bits != int(self.bits) and not method.searched:
            raise ConfigError(f"{self.method} has whole bit widths, not {self.bits:g}")
        if self.bits < 2:
            raise ConfigError(f"{self.method}: 2 bits are the fewest, not {self.bits:g}")
        return method.config(math.ceil(self.bits))


_TRAINING = ("distill", "quantizer_lr", "ema", "weights_first", "rate", "anneal", "trained", "searched")


def _key(cell: Cell, settings: Settings) -> dict[str, Any]:
    """All that decides what a cell is trained to, as JSON has it."""
    method = methods.find(cell.method)
    training = {k: getattr(method, k) for k in _TRAINING}
    key = {
        **settings.describe(),
        "cell": asdict(cell),
        "config": cell.config().to_dict(),
        "training": training,
    }
    known: dict[str, Any] = json.loads(json.dumps(key))
    return known


def _keyed(path: Path, cell: Cell, settings: Settings) -> dict[str, Any] | None:
    """The file's content if it is of these settings."""
    found, wanted = common.read_json(path), _key(cell, settings)
    key = found.get("key")
    if not isinstance(key, dict):
        return None
    if settings.data is None:
        wanted["data"] = key.get("data")
    complete = {"config": _complete(key.get("config")), "training": _complete_training(key.get("training"))}
    return found if {**key, **complete} == wanted else None


def _complete(config: Any) -> Any:
    """A configuration with the entries that it lacks, as one of a version that had fewer."""
    try:
        return json.loads(QConfig.from_dict(config).to_json())
    except ConfigError:
        return config


def _complete_training(training: Any) -> Any:
    """A method's way of training, likewise."""
    defaults = {f.name: f.default for f in fields(methods.Method) if f.name in _TRAINING}
    return {**defaults, **training} if isinstance(training, dict) else training


def load_result(cell: Cell, settings: Settings, out: Path) -> dict[str, Any] | None:
    """What is known of a trained cell; None for one that is not trained with these settings."""
    return _keyed(out / cell.name / "result.json", cell, settings)


def scores_on(result: Mapping[str, Any], sets: Mapping[str, str]) -> dict[str, Any] | None:
    """``result`` with the scores of these fingerprints, by name; None if one of them is missing."""
    known = {one["sha256"]: one for one in result["sets"]}
    if not known.keys() >= set(sets.values()):
        return None
    chosen = {name: known[sha] for name, sha in sets.items()}
    found = {k: {n: one[k] for n, one in chosen.items() if k in one} for k in ("images", "frozen", "crops")}
    return {**result, **{k: v for k, v in found.items() if v or k != "frozen"}}


def read_result(cell: Cell, settings: Settings, out: Path, sets: Sequence[EvalSet]) -> dict[str, Any] | None:
    """What a cell found that is trained with these settings and scored on all ``sets``; None for others."""
    result = load_result(cell, settings, out)
    return None if result is None else scores_on(result, {one.name: one.sha256 for one in sets})


def has_models(cell: Cell, result: Mapping[str, Any], out: Path) -> bool:
    """Whether the models that ``result`` speaks of are in the cell's folder."""
    paths = {out / cell.name / name: sha for name, sha in result["files"].items()}
    return all(path.is_file() and common.sha256(path) == sha for path, sha in paths.items())


def shown_crops(cell: Cell, result: Mapping[str, Any], out: Path) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Files of original and restored crop by set and picture; only those that ``result`` speaks of."""
    found = {}
    for name, pictures in result["crops"].items():
        for picture, hashes in pictures.items():
            paths = {out / cell.name / "crops" / file: sha for file, sha in hashes.items()}
            if all(path.is_file() and common.sha256(path) == sha for path, sha in paths.items()):
                original, restored = paths
                found[name, picture] = original, restored
    return found


def mark_failed(cell: Cell, settings: Settings, out: Path, sets: Sequence[EvalSet], error: Exception) -> None:
    """Note why training failed or, of a trained cell, scoring on the first set that is missing."""
    result = load_result(cell, settings, out)
    known = [] if result is None else [one["sha256"] for one in result["sets"]]
    missing = next((one.sha256 for one in sets if one.sha256 not in known), None)
    common.write_json(
        {"key": _key(cell, settings), "set": None if result is None else missing, "error": str(error)},
        out / cell.name / "failed.json",
    )


def failure(cell: Cell, settings: Settings, out: Path, sets: Mapping[str, str] | None) -> str | None:
    """Why training with these settings, or scoring on one of ``sets`` (None: on any), failed; None if not."""
    found = _keyed(out / cell.name / "failed.json", cell, settings)
    if found is None or (sets is not None and found["set"] not in (None, *sets.values())):
        return None
    return str(found["error"])


def forget_failure(cell: Cell, out: Path) -> None:
    """Let a cell be tried again; a training that failed starts anew."""
    path = out / cell.name / "failed.json"
    if path.exists() and common.read_json(path).get("set") is None:
        _remove_checkpoints(out / cell.name)
    path.unlink(missing_ok=True)


def detail(image: Image.Image, side: int = CROP) -> tuple[int, int, int, int]:
    """The box of the most detailed square of a picture: the largest mean gradient."""
    y = np.asarray(image.convert("L"), dtype=np.float64)
    side = min(side, *y.shape)
    energy = np.abs(np.diff(y, axis=0, prepend=y[:1])) + np.abs(np.diff(y, axis=1, prepend=y[:, :1]))
    total = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(int(sums[::4, ::4].argmax()), sums[::4, ::4].shape)
    return int(left) * 4, int(top) * 4, int(left) * 4 + side, int(top) * 4 + side


def _keep_crops(original: Image.Image, restored: Image.Image, start: Path) -> dict[str, str]:
    """Write the most detailed part of both, paths beginning with ``start``: hashes by file name."""
    box = detail(original)
    hashes = {}
    start.parent.mkdir(parents=True, exist_ok=True)
    for kind, image in (("original", original), ("restored", restored)):
        path = start.with_name(f"{start.name}_{kind}.png")
        image.crop(box).save(path)
        hashes[path.name] = common.sha256(path)
    return hashes


def score_cell(
    cell: Cell, settings: Settings, sets: Sequence[EvalSet], out: Path, device: str | torch.device
) -> None:
    """Score a trained cell's saved models on those of ``sets`` that are missing in its ``result.json``.

    The most detailed part of a set's first pictures is kept in ``crops``. The result has the files' hashes,
    as it has the models': a later run with other settings writes files of the same names.
    """
    folder = out / cell.name
    result = load_result(cell, settings, out)
    assert result is not None
    known = [one["sha256"] for one in result["sets"]]
    missing = [one for one in sets if one.sha256 not in known]
    if not missing:
        return
    load = load_float if cell.bits is None else ssmquant.load
    model: nn.Module = load(folder / _MODEL).to(device)
    frozen: nn.Module | None = load(folder / _FROZEN).to(device) if _FROZEN in result["files"] else None
    for one in missing:
        began = time.monotonic()
        crops: dict[str, dict[str, str]] = {}

        def keep(
            name: str, original: Image.Image, restored: Image.Image, one: EvalSet = one, crops: Any = crops
        ) -> None:
            if len(crops) < SHOWN:
                start = folder / "crops" / f"{one.sha256[:12]}_{len(crops)}"
                crops[name] = _keep_crops(original, restored, start)

        rows = {"images": settings.problem.score(model, one, cell.name, keep)}
        if frozen is not None:
            rows["frozen"] = settings.problem.score(frozen, one, f"{cell.name} frozen")
        seconds = time.monotonic() - began
        result["sets"].append(
            {"name": one.name, "sha256": one.sha256, **rows, "crops": crops, "seconds": seconds}
        )
        common.write_json(result, folder / "result.json")
    (folder / "failed.json").unlink(missing_ok=True)


def _teacher(model: nn.Module, example: Tensor) -> nn.Module:
    teacher: nn.Module = copy.deepcopy(model)
    if example.is_cuda:  # a graph of our kernels is faster
        teacher = ssmquant.prepare(model, QConfig(), example_inputs=(example,))
    return teacher.eval().requires_grad_(False)


def _batches(data: Data, settings: Settings, seed: int) -> list[Tensor]:
    data.seed(1000 + seed)
    return settings.problem.calibration(data, settings.calibration, settings.batch)


def run_cell(
    cell: Cell,
    settings: Settings,
    data: Data,
    out: Path,
    deadline: float | None = None,
) -> bool:
    """Train a cell, or go on with one, convert it and save the models and a ``result.json`` without scores.

    False if it stopped at ``deadline`` (a time of ``time.monotonic``). All methods see the same patches in
    the same order: ``data`` starts anew from the cell's seed.
    """
    method, folder, device = methods.find(cell.method), out / cell.name, data.device
    torch.manual_seed(cell.seed)
    _forget_others(folder, _key(cell, settings))
    model: nn.Module = load_float(settings.init).to(device)
    example = torch.zeros_like(data.sample(1)[0])
    teacher = _teacher(model, example) if method.distill else None
    first = round(settings.steps * method.weights_first)
    rate = settings.lr * method.rate
    recipe = Recipe(
        steps=settings.steps - first, batch=settings.batch, lr=rate, warmup=settings.warmup, anneal=method.anneal,
        loss=settings.problem.loss, ema=method.ema, bf16=settings.bf16, distill=method.distill,
        cuda_graph=device.type == "cuda",
        log_every=100, checkpoint=folder / "checkpoint.pt", checkpoint_every=500,
    )  # fmt: skip
    config = cell.config()
    if method.searched and cell.bits is not None:
        config = _searched(model, config, cell, settings, data, folder)
    trained, seconds = _train_weights(model, config, cell, settings, data, recipe, first, teacher, deadline)
    if not trained:
        return False
    prepared: nn.Module = ssmquant.prepare(model, config, example_inputs=(example,))
    if cell.bits is not None and (config.searches or not method.trained):
        ssmquant.calibrate(prepared, _batches(data, settings, cell.seed), progress=False)
    losses: list[tuple[int, float]] = []
    if method.trained:
        groups = ssmquant.param_groups(prepared, rate, 0.0, rate * method.quantizer_lr)
        data.seed(cell.seed)
        done = fit(
            prepared, data, _until(recipe, deadline), groups=list(groups), title=cell.name, resume=True,
            teacher=teacher,
        )  # fmt: skip
        if not done.finished:
            return False
        seconds, losses = seconds + done.earlier + done.seconds, done.losses
    path = folder / _MODEL
    facts: dict[str, Any] = {}
    files = [_MODEL]
    if cell.bits is None:
        model.load_state_dict(prepared.state_dict())
        save_float(model, path)
    else:
        if method.trained:
            ssmquant.calibrate(prepared, _batches(data, settings, cell.seed), fit=False, progress=False)
        loaded, facts["verify_max_rel"] = common.deploy(prepared, data.sample(2)[0], path)
        if any(isinstance(m, DLS) for m in loaded.modules()):
            ssmquant.save(ssmquant.convert(prepared, dls="frozen"), folder / _FROZEN)
            files.append(_FROZEN)
    if method.searched and cell.bits is not None:
        facts["searched"] = config.to_dict()
    facts["bitops"] = _bitops(model, config, settings, example)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    common.write_json(
        {
            "key": _key(cell, settings), "label": method.label, "file_bytes": path.stat().st_size,
            "files": {name: common.sha256(folder / name) for name in files},
            "train_seconds": seconds, "losses": losses, "params": common.parameters(model),
            "device": device_name, "torch": torch.__version__, "ssmquant": ssmquant.__version__,
            **facts, "sets": [],
        },
        folder / "result.json",
    )  # fmt: skip
    _remove_checkpoints(folder)
    return True


_counted: dict[tuple[str, str, torch.Size], int] = {}


def _bitops(model: nn.Module, config: QConfig, settings: Settings, example: Tensor) -> int:
    """BitOPs of the float model under a configuration; seeds have them in common."""
    x = settings.problem.counted(example, settings.side)
    key = common.sha256(settings.init), config.to_json(), x.shape
    if key not in _counted:
        _counted[key] = common.bitops_at(model, config, x)
    return _counted[key]


def _remove_checkpoints(folder: Path) -> None:
    for name in (*_CHECKPOINTS, _SEARCHED):
        (folder / name).unlink(missing_ok=True)


def _forget_others(folder: Path, key: dict[str, Any]) -> None:
    """Remove the checkpoints and the failure of a run with other settings."""
    if common.read_json(folder / "key.json") != key:
        _remove_checkpoints(folder)
        (folder / "failed.json").unlink(missing_ok=True)
        common.write_json(key, folder / "key.json")


def _searched(
    model: nn.Module, config: QConfig, cell: Cell, settings: Settings, data: Data, folder: Path
) -> QConfig:
    """``config`` with widths of every site within the cell's effective bits; ``searched.json`` keeps it."""
    path = folder / _SEARCHED
    known = common.read_json(path)
    if known:
        return QConfig.from_dict(known)
    batches = _batches(data, settings, cell.seed)
    few = batches[0][:SEARCHED_ON]
    prepared = ssmquant.prepare(model, config, example_inputs=(few,))
    ssmquant.calibrate(prepared, batches, progress=False)
    assert cell.bits is not None
    found = ssmquant.search(prepared, [few], effective_bits=cell.bits)
    common.write_json(found.to_dict(), path)
    return found


def _until(recipe: Recipe, deadline: float | None) -> Recipe:
    return recipe if deadline is None else replace(recipe, time_limit=max(0.0, deadline - time.monotonic()))


def _train_weights(
    model: nn.Module,
    config: QConfig,
    cell: Cell,
    settings: Settings,
    data: Data,
    recipe: Recipe,
    steps: int,
    teacher: nn.Module | None,
    deadline: float | None,
) -> tuple[bool, float]:
    """``steps`` with float activations, into ``model``'s own weights: whether all were done, and seconds."""
    if not steps:
        return True, 0.0
    weights = replace(config, a_bits=None, scan_bits=None)
    prepared: nn.Module = ssmquant.prepare(
        model, weights, example_inputs=(torch.zeros_like(data.sample(1)[0]),)
    )
    data.seed(500 + cell.seed)
    assert recipe.checkpoint is not None
    own = replace(recipe, steps=steps, checkpoint=recipe.checkpoint.with_name("weights.pt"))
    done = fit(
        prepared, data, _until(own, deadline), title=f"{cell.name}, weights", resume=True, teacher=teacher
    )
    names = model.state_dict()
    model.load_state_dict({k: v for k, v in prepared.state_dict().items() if k in names})
    return done.finished, done.earlier + done.seconds
