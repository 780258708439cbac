"""What is restored: degradations, and a model's score on clean pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssmquant.errors import ConfigError
from ssmquant.restore.metrics import psnr, ssim
from ssmquant.restore.pictures import downscale, open_image, pillow, to_image, to_tensor
from ssmquant.restore.tiling import Tile, restore_tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Task:
    """What to restore: ``sr`` (``scale``), ``denoise`` (Gaussian ``sigma`` of 255) or ``jpeg`` (``quality``)."""

    kind: str = "sr"
    scale: int = 2
    sigma: float = 25.0
    quality: int = 40

    def __post_init__(self) -> None:
        if self.kind not in ("sr", "denoise", "jpeg"):
            raise ConfigError(f"task must be 'sr', 'denoise' or 'jpeg', not {self.kind!r}")
        if self.kind != "sr":
            object.__setattr__(self, "scale", 1)
        if self.scale < 1 or not 1 <= self.quality <= 100 or not self.sigma >= 0:
            raise ConfigError(f"scale >= 1, 1 <= quality <= 100 and sigma >= 0 are needed, got {self}")

    @property
    def channel(self) -> str:
        """The channel that the task's metrics look at: 'rgb' for denoising, else 'y'."""
        return "rgb" if self.kind == "denoise" else "y"

    def target(self, image: Image.Image) -> Image.Image:
        """The clean picture in RGB, cropped to a multiple of the scale."""
        s = self.scale
        return image.convert("RGB").crop((0, 0, image.width // s * s, image.height // s * s))

    def degrade_image(self, image: Image.Image) -> Image.Image:
        """The degraded 8-bit RGB picture, without the noise, which :meth:`degrade` adds in floating point."""
        image = self.target(image)
        if self.kind == "sr":
            return downscale(image, self.scale)
        if self.kind == "jpeg":
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=self.quality)
            return open_image(buffer.getvalue())
        return image

    def degrade(self, image: Image.Image, seed: int = 0) -> Tensor:
        """The model's input, ``(1, 3, H / scale, W / scale)``; noise is seeded, neither clipped nor rounded."""
        x = to_tensor(self.degrade_image(image))
        if self.kind == "denoise":
            x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * (self.sigma / 255)
        return x

    def score(self, restored: Tensor, target: Tensor) -> dict[str, float]:
        """``{"psnr", "ssim"}`` under the task's protocol."""
        border = self.scale if self.kind == "sr" else 0
        return {
            "psnr": psnr(restored, target, border, self.channel),
            "ssim": ssim(restored, target, border, self.channel),
        }


def evaluate(
    model: nn.Module | None,
    images: Sequence[tuple[str, Image.Image]],
    task: Task,
    tile: Tile = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    each: Callable[[str, Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """Degrade, restore and score named clean pictures: one ``{"name", "psnr", "ssim"}`` each, in order.

    ``model=None`` scores the plain baseline: bicubic enlargement (8-bit, by Pillow), or the degraded
    picture itself. ``progress`` may wrap the sequence that is looped over (a progress bar).
    """
    rows = []
    for index, (name, image) in enumerate(progress(images)):
        target = to_tensor(task.target(image))
        degraded = task.degrade(image, seed=index)
        if model is not None:
            restored = restore_tensor(model, degraded, task.scale, tile)
        elif task.scale > 1:
            size = (target.shape[-1], target.shape[-2])
            restored = to_tensor(to_image(degraded).resize(size, pillow().Resampling.BICUBIC))
        else:
            restored = degraded
        rows.append({"name": name, **task.score(restored, target)})
        if each is not None:
            each(name, restored)
    return rows
