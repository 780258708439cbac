"""Running a restoration model on tensors and pictures of any size, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import ConfigError, InputError, SsmquantError
from ssmquant.restore.pictures import normal_mode, pillow, to_image, to_tensor

if TYPE_CHECKING:
    from PIL import Image

_MIN_SIDE = 16  # smaller pictures are padded up to this: reflections and strided layers need some room


def model_scale(model: nn.Module) -> int:
    """How many times a zoo model enlarges, as its ``zoo_config`` or ``upscale`` says; 1 if neither does."""
    config = getattr(model, "zoo_config", None)
    arguments = config.get("args", {}) if isinstance(config, dict) else {}
    return int(arguments.get("upscale", getattr(model, "upscale", 1)))


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype that the model computes in; a packed model may hold no floating tensor at all."""
    device = torch.device("cpu")
    for tensors in (model.parameters(), model.buffers()):
        for t in tensors:
            device = t.device
            if t.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                return t.device, t.dtype
    return device, torch.float32


def _run(model: Callable[[Tensor], Tensor], x: Tensor, scale: int) -> Tensor:
    """One call: pads ``x`` (B, C, H, W) at the right and bottom up to the smallest side, crops the answer."""
    height, width = x.shape[-2:]
    while (
        x.shape[-2] < _MIN_SIDE or x.shape[-1] < _MIN_SIDE
    ):  # a reflection adds at most side - 1 pixels at a time
        down, right = (max(0, _MIN_SIDE - n) for n in x.shape[-2:])
        mode = "replicate" if 1 in x.shape[-2:] else "reflect"
        x = F.pad(x, (0, min(right, x.shape[-1] - 1 or right), 0, min(down, x.shape[-2] - 1 or down)), mode)
    y = model(x)
    if tuple(y.shape) != (*x.shape[:2], x.shape[2] * scale, x.shape[3] * scale):
        raise ConfigError(f"scale={scale} does not fit the model: {tuple(x.shape)} became {tuple(y.shape)}")
    return y[..., : height * scale, : width * scale]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(start: int, length: int, size: int, overlap: int) -> Tensor:
    """Blending weights along one side: 0 in the outer quarter of an inner overlap, then linear, 1 inside."""
    margin = overlap // 4
    slope = max(1, overlap - 2 * margin)
    at = torch.arange(length, dtype=torch.float32)
    weight = torch.ones(length)
    if overlap and start > 0:
        weight = torch.minimum(weight, ((at - margin + 0.5) / slope).clamp(0, 1))
    if overlap and start + length < size:
        weight = torch.minimum(weight, ((length - 1 - at - margin + 0.5) / slope).clamp(0, 1))
    return weight


def restore_tensor(
    model: nn.Module, x: Tensor, scale: int = 1, tile: int | None = None, overlap: int = 32
) -> Tensor:
    """Run ``model`` on ``x`` (B, 3, H, W) in 0..1 without gradients: (B, 3, scale H, scale W) float32 on
    the CPU.

    ``tile`` bounds the side of what the model sees at once, in input pixels; tiles share ``overlap``
    pixels, of which the outer quarter at each inner edge is thrown away and the rest blended, so a model
    that looks no further than ``overlap // 4`` pixels gives exactly what it gives on the whole. State-space
    models look further, and quantized ones with dynamic DLS take their ranges from what they see: there
    each tile has ranges of its own, so results depend slightly on the tiling (convert with ``dls="frozen"``
    to avoid that).
    """
    if x.dim() != 4 or 0 in x.shape:
        raise InputError(f"expected a non-empty (B, 3, H, W) tensor, got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise InputError("the input holds values that are not finite")
    if tile is not None and (overlap < 0 or tile < _MIN_SIDE or tile < 2 * overlap):
        raise ConfigError(
            f"a tile is at least {_MIN_SIDE} pixels and twice the overlap; got {tile=}, {overlap=}"
        )
    device, dtype = _placement(model)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            height, width = x.shape[-2:]
            if tile is None or (height <= tile and width <= tile):
                out = _run(model, x.to(device, dtype), scale).float().cpu()
            else:
                out = _tiled(model, x, scale, tile, overlap, device, dtype)
    finally:
        if was_training:
            model.train()
    if not torch.isfinite(out).all():
        raise SsmquantError(
            "the model's output holds values that are not finite; is it trained and calibrated?"
        )
    return out


def _tiled(
    model: nn.Module, x: Tensor, scale: int, tile: int, overlap: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    batch, channels, height, width = x.shape
    total = torch.zeros(batch, channels, height * scale, width * scale)
    weights = torch.zeros(height * scale, width * scale)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = x[..., top : top + tile, left : left + tile]
            rows, cols = part.shape[-2] * scale, part.shape[-1] * scale
            down = _ramp(top * scale, rows, height * scale, overlap * scale)
            weight = down[:, None] * _ramp(left * scale, cols, width * scale, overlap * scale)
            at = (..., slice(top * scale, top * scale + rows), slice(left * scale, left * scale + cols))
            total[at] += weight * _run(model, part.to(device, dtype), scale).float().cpu()
            weights[at] += weight
    return total / weights


def restore_image(
    model: nn.Module, image: Image.Image, scale: int = 1, tile: int | None = None, overlap: int = 32
) -> Image.Image:
    """The restored picture, in the mode that :func:`open_image` gives: grey stays grey, 16-bit grey 16-bit.

    Alpha is enlarged by bicubic interpolation, apart from the model. Any size works, from 1x1 up. For
    ``tile`` and ``overlap`` see :func:`restore_tensor`.
    """
    import numpy as np

    module = pillow()
    image = normal_mode(image)
    y = restore_tensor(model, to_tensor(image), scale, tile, overlap)
    if image.mode in ("L", "LA", "I;16"):
        grey = (y[0] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).clamp(0, 1)
        deep = image.mode == "I;16"
        pixels = (grey * (65535 if deep else 255)).round().numpy().astype(np.uint16 if deep else np.uint8)
        result: Image.Image = module.fromarray(pixels)
    else:
        result = to_image(y)
    if "A" in image.mode:
        result.putalpha(image.getchannel("A").resize(result.size, module.Resampling.BICUBIC))
    return result
