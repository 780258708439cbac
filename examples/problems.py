"""What ``compare.py`` compares methods on: data, loss, test sets, scores and pictures of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import common
import torch
from classify import Pictures
from classify import logits as class_logits
from evalsets import EvalSet, distinct, eval_sets, set_names
from patches import PatchData
from PIL import Image
from segment import Slices, dice
from segment import logits as pixel_logits
from torch import Tensor, nn
from training import Data

from ssmquant.errors import ConfigError
from ssmquant.io import load_float
from ssmquant.restore import Task, evaluate, model_scale, psnr, to_image, to_tensor

__all__ = ["Classification", "Metric", "Problem", "Restoration", "Segmentation", "metrics_of", "problem_of"]

Rows = list[dict[str, Any]]
Each = Callable[[str, Image.Image, Image.Image], None]
"""Called with a picture's name, as it should be and as the model has it."""


@dataclass(frozen=True)
class Metric:
    """A score of a picture, more is better: its key in the rows, its name and unit, decimals of a mean."""

    key: str
    label: str
    unit: str
    digits: int

    def show(self, value: float, more: int = 0) -> str:
        return f"{value:.{self.digits + more}f}"


class Problem:
    """A task. The first of ``metrics`` is the one that methods are judged by."""

    metrics: tuple[Metric, ...]
    loss: str
    """Of ``training.Recipe``."""

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    def describe(self) -> dict[str, Any]:
        """What makes it another task, for the key of a cell."""
        raise NotImplementedError

    def load(self, source: str | Path, device: str | torch.device, patch: int) -> Data:
        """The training data."""
        raise NotImplementedError

    def calibration(self, data: Any, batches: int, batch: int) -> list[Tensor]:
        """Inputs to calibrate with, of the training part."""
        raise NotImplementedError

    def counted(self, x: Tensor, side: int) -> Tensor:
        """The input that BitOPs are counted for; ``x`` is a training sample."""
        return x

    def sets(self, sources: Sequence[str | Path], data: str | Path | None) -> list[EvalSet]:
        """Test sets of ``sources``, or the default ones."""
        raise NotImplementedError

    def check(self, one: EvalSet) -> None:
        """Raise what scoring on a set would raise."""
        raise NotImplementedError

    @torch.no_grad()
    def check_model(self, model: nn.Module, data: Any) -> None:
        """Try a float model on a training sample.

        Raises:
            ConfigError: it does not take that, or its result does not fit the target.
        """
        x, y = data.sample(1)
        try:
            shape = tuple(model(x).shape)
        except RuntimeError as error:
            raise ConfigError(
                f"the float model does not take the data: {str(error).splitlines()[0]}"
            ) from error
        classes = getattr(data, "classes", None)
        if classes is None:
            fits = shape == y.shape
        else:  # class numbers, of pictures or of pixels
            fits = shape[:1] + shape[2:] == y.shape and shape[1] >= classes
        if not fits:
            of = "" if classes is None else f" of {classes} classes"
            raise ConfigError(
                f"the float model does not fit the task: results {shape}, targets {tuple(y.shape)}{of}"
            )

    def score(self, model: nn.Module, one: EvalSet, title: str, each: Each | None = None) -> Rows:
        """A row of ``metrics`` for every picture (or group of pictures) of a set, in order, with its ``name``."""
        raise NotImplementedError

    def caption(self, shown: Image.Image, wanted: Image.Image) -> str:
        """How well a part of a picture came out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Restoration(Problem):
    """Super-resolution, denoising or JPEG artifacts: training on patches, PSNR and SSIM of whole pictures."""

    task: Task
    metrics = (Metric("psnr", "PSNR", "dB", 2), Metric("ssim", "SSIM", "", 4))
    loss = "l1"

    def describe(self) -> dict[str, Any]:
        return asdict(self.task)

    def load(self, source: str | Path, device: str | torch.device, patch: int) -> PatchData:
        return PatchData.load(source, self.task, device=device, patch=patch)

    def calibration(self, data: PatchData, batches: int, batch: int) -> list[Tensor]:
        return list(data.batches(batches, batch))

    def counted(self, x: Tensor, side: int) -> Tensor:
        return x.new_zeros(1, 3, side, side)

    def sets(self, sources: Sequence[str | Path], data: str | Path | None) -> list[EvalSet]:
        return eval_sets(sources or [Path(__file__).parent / "photos"])

    def check(self, one: EvalSet) -> None:
        evaluate(None, [min(one.images, key=lambda named: min(named[1].size))], self.task)

    def score(self, model: nn.Module, one: EvalSet, title: str, each: Each | None = None) -> Rows:
        clean = dict(one.images)

        def show(name: str, restored: Tensor) -> None:
            if each is not None:
                each(name, self.task.target(clean[name]), to_image(restored))

        return common.score(model, one.images, self.task, title, each=show)[1]

    def caption(self, shown: Image.Image, wanted: Image.Image) -> str:
        return f"{psnr(to_tensor(shown), to_tensor(wanted)):.2f} dB"


class LabelledProblem(Problem):
    """A task of an .npz file of labelled pictures, which is scored on the file's test part."""

    def sets(self, sources: Sequence[str | Path], data: str | Path | None) -> list[EvalSet]:
        if not sources and data is None:
            raise ConfigError("--data or --eval: a labelled .npz file is needed")
        paths = [Path(path) for path in sources or [data] if path is not None]
        for path in paths:
            if path.suffix.lower() != ".npz":
                raise ConfigError(f"{path}: labelled pictures are an .npz file of x and y")
        names = set_names([path.with_suffix("") for path in paths]) if sources else ["test"]
        return distinct(
            EvalSet(name, path, common.sha256(path)) for name, path in zip(names, paths, strict=True)
        )

    def check(self, one: EvalSet) -> None:
        self._test(one.folder)

    @staticmethod
    def _test(path: Path) -> Any:
        """Test pictures and their labels."""
        raise NotImplementedError


GROUP = 10
"""Test pictures that are scored together: one alone is right or wrong."""


@dataclass(frozen=True)
class Classification(LabelledProblem):
    """Classes of small pictures, as in ``classify.py``: per cent that are right, in groups of ten of one class."""

    metrics = (Metric("accuracy", "accuracy", "%", 2),)
    loss = "cross_entropy"

    def describe(self) -> dict[str, Any]:
        return {"kind": "classify"}

    def load(self, source: str | Path, device: str | torch.device, patch: int) -> Pictures:
        return Pictures.load(source, device=device)

    def calibration(self, data: Pictures, batches: int, batch: int) -> list[Tensor]:
        return data.calibration(batches * batch, batch)

    def score(self, model: nn.Module, one: EvalSet, title: str, each: Each | None = None) -> Rows:
        x, y = self._test(one.folder)
        with common.full_precision():
            right = (class_logits(model, x.to(common.device_of(model))).argmax(1).cpu() == y).double() * 100
        rows: Rows = []
        for label in y.unique().tolist():
            groups = right[y == label].split(GROUP)
            rows += [
                {"name": f"class {label}, {i + 1}", "accuracy": float(g.mean())} for i, g in enumerate(groups)
            ]
        return rows

    @staticmethod
    @lru_cache(maxsize=4)
    def _test(path: Path) -> tuple[Tensor, Tensor]:
        data = Pictures.load(path)
        return data.test_x, data.test_y


@dataclass(frozen=True)
class Segmentation(LabelledProblem):
    """Classes of the pixels of slices, as in ``segment.py``: training on crops, Dice of whole slices."""

    metrics = (Metric("dice", "Dice", "", 4),)
    loss = "cross_entropy"

    def describe(self) -> dict[str, Any]:
        return {"kind": "segment"}

    def load(self, source: str | Path, device: str | torch.device, patch: int) -> Slices:
        return Slices.load(source, device=device, side=patch)

    def calibration(self, data: Slices, batches: int, batch: int) -> list[Tensor]:
        return data.calibration(batches * batch)

    def score(self, model: nn.Module, one: EvalSet, title: str, each: Each | None = None) -> Rows:
        x, y, classes = self._test(one.folder)
        with common.full_precision():
            out = pixel_logits(model, x.to(common.device_of(model)))
        found, classes = out.argmax(1).cpu(), max(classes, out.shape[1])  # the file may lack some
        names = [f"slice {i + 1}" for i in range(len(y))]
        for name, truth, map_ in zip(names, y, found, strict=True) if each is not None else ():
            each(name, _grey(truth, classes), _grey(map_, classes))
        return [{"name": n, "dice": v} for n, v in zip(names, dice(found, y, classes).tolist(), strict=True)]

    def caption(self, shown: Image.Image, wanted: Image.Image) -> str:
        same = (to_tensor(shown) == to_tensor(wanted)).all(1).double().mean()
        return f"{100 * float(same):.1f} % right"

    @staticmethod
    @lru_cache(maxsize=4)
    def _test(path: Path) -> tuple[Tensor, Tensor, int]:
        data = Slices.load(path, side=1)
        return data.test_x, data.test_y, data.classes


def _grey(classes: Tensor, count: int) -> Image.Image:
    """Class numbers (H, W) as a picture, evenly spaced from black to white."""
    values = (classes * 255 // max(1, count - 1)).to(torch.uint8)
    return Image.fromarray(values.numpy()).convert("RGB")


_PROBLEMS: Mapping[str, type[Problem]] = MappingProxyType(
    {"classify": Classification, "segment": Segmentation}
)


def metrics_of(kind: str) -> tuple[Metric, ...]:
    """The metrics of the task of that name."""
    return _PROBLEMS.get(kind, Restoration).metrics


def problem_of(kind: str, init: Path, sigma: float, quality: int) -> Problem:
    """The task of that name; super-resolution has the scale of the float model."""
    if kind in _PROBLEMS:
        return _PROBLEMS[kind]()
    return Restoration(Task(kind, model_scale(load_float(init)), sigma, quality))
