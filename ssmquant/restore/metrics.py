"""PSNR and SSIM as the restoration literature computes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import ConfigError, InputError
from ssmquant.restore.pictures import eight_bit


def luma(x: Tensor) -> Tensor:
    """BT.601 luma 16..235 (float64, channel kept) of ``(..., 3, H, W)`` 8-bit values 0..255."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=x.device) / 255
    return 16 + (x.double() * weights[:, None, None]).sum(-3, keepdim=True)


def _pair(x: Tensor, y: Tensor, border: int, channel: str) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.dim() not in (3, 4) or x.shape[-3] != 3:
        raise InputError(
            f"metrics compare two (B, 3, H, W) tensors of one shape, got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if channel not in ("y", "rgb"):
        raise ConfigError(f"channel must be 'y' or 'rgb', not {channel!r}")
    if border < 0 or min(x.shape[-2:]) <= 2 * border:
        raise InputError(f"a border of {border} leaves nothing of {tuple(x.shape[-2:])}")
    x, y = (eight_bit(t.reshape(-1, *t.shape[-3:])) for t in (x, y))
    if channel == "y":
        x, y = luma(x), luma(y)
    inside = slice(border, -border or None)
    return x[..., inside, inside], y[..., inside, inside]


def psnr(x: Tensor, y: Tensor, border: int = 0, channel: str = "y") -> float:
    """Peak signal-to-noise ratio in dB of two ``(B, 3, H, W)`` tensors in 0..1, inf if equal after 8-bit rounding."""
    a, b = _pair(x, y, border, channel)
    error = (a - b).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(x: Tensor, y: Tensor, border: int = 0, channel: str = "y") -> float:
    """Structural similarity (1 = equal) of two ``(B, 3, H, W)`` tensors in 0..1; both sides at least 11 + 2 border."""
    a, b = _pair(x, y, border, channel)
    if min(a.shape[-2:]) < 11:
        raise InputError(f"SSIM needs at least 11 pixels a side inside the border, got {tuple(a.shape[-2:])}")
    t = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-t.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(v: Tensor) -> Tensor:
        v = v.reshape(-1, 1, *v.shape[-2:])
        return F.conv2d(F.conv2d(v, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return score.mean().item()
