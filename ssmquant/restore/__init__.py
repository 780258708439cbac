"""Image restoration around a model: pictures in and out, degradations, metrics, tiling.

Pictures are :class:`PIL.Image.Image`, tensors are ``(B, 3, H, W)`` floating point in 0..1. Pillow (``pip
install ssmquant[cli]``) is needed only once a picture is opened, made or degraded; the metrics need
torch alone.

The protocol is the one of the super-resolution literature: 8-bit rounding first, the Y channel of BT.601
(16..235), a border of ``scale`` pixels left out, PSNR with peak 255, SSIM with an 11x11 Gaussian (sigma
1.5, valid windows only).
"""

from __future__ import annotations

from ssmquant.restore.metrics import luma, psnr, ssim
from ssmquant.restore.pictures import (
    IMAGE_SUFFIXES,
    downscale,
    find_images,
    open_image,
    save_image,
    to_image,
    to_tensor,
)
from ssmquant.restore.shipped import shipped_model
from ssmquant.restore.tasks import Task, evaluate
from ssmquant.restore.tiling import model_scale, restore_image, restore_tensor

__all__ = [
    "IMAGE_SUFFIXES",
    "Task",
    "downscale",
    "evaluate",
    "find_images",
    "luma",
    "model_scale",
    "open_image",
    "psnr",
    "restore_image",
    "restore_tensor",
    "save_image",
    "shipped_model",
    "ssim",
    "to_image",
    "to_tensor",
]
