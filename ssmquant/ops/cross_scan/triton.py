"""Reordering along paths on a GPU. Import this module only where Triton is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmquant.ops.cross_scan import triton_kernels as kernels
from ssmquant.ops.triton_launch import Kernel

__all__ = ["gather", "merge"]

_TILE, _ROWS = 512, 4
_gather, _merge = Kernel(kernels.gather), Kernel(kernels.merge)


def _grid(channels: int, length: int, images: int) -> tuple[int, int, int]:
    return -(-length // _TILE), -(-channels // _ROWS), images


def gather(x: Tensor, order: Tensor) -> Tensor:
    """(B, C, L) or (B, K, C, L) contiguous, order (K, L) int32 -> (B, K, C, L): see the kernel."""
    batch, (paths, length), channels = x.shape[0], order.shape, x.shape[-2]
    y = torch.empty((batch, paths, channels, length), dtype=x.dtype, device=x.device)
    grid = _grid(channels, length, batch * paths)
    _gather(grid, (x, order, y), (channels, length, paths), (x.dim() == 3, _ROWS, _TILE), 4)
    return y


def merge(y: Tensor, order: Tensor) -> Tensor:
    """(B, K, C, L) contiguous, order (K, L) int32 -> (B, C, L): see the kernel."""
    batch, paths, channels, length = y.shape
    x = torch.empty((batch, channels, length), dtype=y.dtype, device=y.device)
    grid = _grid(channels, length, batch)
    _merge(grid, (y, order, x), (channels, length), (paths, _ROWS, _TILE), 4)
    return x
