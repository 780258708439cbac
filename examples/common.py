"""What the restoration examples share: quantization schemes by name, the way from a float model to a checked file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from patches import PatchData
from PIL import Image
from tables import print_table  # noqa: F401
from torch import Tensor, nn
from training import Recipe, Result, fit, reporter

import ssmquant
from ssmquant.errors import ConfigError
from ssmquant.restore import Task, evaluate, find_images, open_image

SCHEMES = ("recommended", "dls_rfa", "lsq", "minmax")


def qconfig(scheme: str, w_bits: int, a_bits: int) -> Any:
    """The configuration of a scheme: ours, the published one, LSQ everywhere, or min-max everywhere."""
    if scheme == "recommended":
        return ssmquant.QConfig.recommended(w_bits, a_bits)
    if scheme == "dls_rfa":
        if w_bits == a_bits:
            return ssmquant.QConfig.qmambair(w_bits)
        return ssmquant.QConfig(w_bits=w_bits, a_bits=a_bits)
    if scheme == "lsq":
        return ssmquant.QConfig.lsq(w_bits, a_bits)
    if scheme == "minmax":
        return ssmquant.QConfig.minmax(w_bits, a_bits)
    raise ConfigError(f"scheme must be one of {', '.join(SCHEMES)}, not {scheme!r}")


def read_folder(folder: str | os.PathLike[str]) -> list[tuple[str, Image.Image]]:
    """Named RGB pictures of a folder."""
    return [(path.name, open_image(path).convert("RGB")) for path in find_images(folder)]


def score(
    model: nn.Module | None,
    images: Sequence[tuple[str, Image.Image]],
    task: Task,
    title: str,
    each: Callable[[str, Tensor], None] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Mean PSNR and SSIM over the pictures, and the rows of all; on a GPU without TF32, whatever trained."""
    with full_precision(), reporter(title, len(images)) as report:

        def progress(items: Iterable[Any]) -> Iterable[Any]:
            for index, item in enumerate(items):
                yield item
                report(index + 1, item[0])

        rows = evaluate(model, images, task, progress=progress, each=each)
    return {key: statistics.fmean(row[key] for row in rows) for key in ("psnr", "ssim")}, rows


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products and convolutions in float32 proper."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def quantize(
    model: nn.Module,
    config: Any,
    data: PatchData,
    recipe: Recipe,
    *,
    calibration: int,
    side: int | None = None,
) -> nn.Module:
    """A prepared copy of ``model``, calibrated on ``calibration`` batches of ``data``; ``model`` stays as it is.

    ``side``: the input side that the summary's BitOPs are counted at (default: a training patch's).
    """
    device = next(model.parameters()).device
    side = side or data.patch
    example = torch.zeros(1, 3, side, side, device=device)  # only its shape matters
    prepared: nn.Module = ssmquant.prepare(model, config, example_inputs=(example,))
    ssmquant.calibrate(prepared, list(data.batches(calibration, recipe.batch)))
    return prepared


def fine_tune(
    prepared: nn.Module,
    data: PatchData,
    recipe: Recipe,
    *,
    lr_quantizer: float,
    title: str,
    resume: bool = False,
) -> Result:
    """Train a prepared model; quantizer scalars have a learning rate of their own and no weight decay."""
    groups = ssmquant.param_groups(prepared, recipe.lr, recipe.weight_decay, lr_quantizer)
    return fit(prepared, data, recipe, groups=list(groups), title=title, resume=resume)


def deploy(prepared: nn.Module, x: Tensor, path: Path) -> tuple[nn.Module, float]:
    """Convert, compare with the prepared model on ``x``, save; the model *loaded from the file*, the worst error."""
    deployed = ssmquant.convert(prepared)
    worst = float(ssmquant.verify(prepared, deployed, (x,)).worst_rel)
    path.parent.mkdir(parents=True, exist_ok=True)
    ssmquant.save(deployed, path)
    loaded: nn.Module = ssmquant.load(path)
    return loaded.to(x.device), worst


def bitops(model: nn.Module) -> int:
    """BitOPs of the whole model as its summary counts them, at the sizes of its example input."""
    return ssmquant.summary(model).bitops


def bitops_at(model: nn.Module, config: Any, x: Tensor) -> int:
    """BitOPs of a float model for ``x`` under a configuration; of ``QConfig()``, 32 x 32 bits a product."""
    return bitops(ssmquant.prepare(model, config, example_inputs=(x,)))


def device_of(model: nn.Module) -> torch.device:
    return next(iter(model.state_dict().values())).device


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def plain(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path) -> dict[str, Any]:
    """What a file has; empty where there is none, or no JSON object in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(value: Any, path: Path) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.start
