"""Float convolutions of deployed models on a GPU, such as first and last ones, by tensor cores: TF32.

Factors are rounded to the nearest TF32 number (10 bits behind the point), products are exact and summed in float32:
what PyTorch does too where ``torch.backends.cudnn`` allows TF32, which is for callers to look at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops.deployed.cpu import conv_size
from ssmquant.ops.deployed.forms import MOST_ELEMENTS, UNITS, extent

__all__ = ["Tile", "convolve_floats", "convolves_floats", "is_small_window", "taps_of"]

_MOST_TAPS = 7  # a side
_MOST_CHANNELS = 512
_FEW_INPUTS = 16

_Pair = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """Output pixels, outputs and inputs of a block, powers of two from 16 on; its warps; steps that it reads ahead.

    ``flat``: blocks of inputs go across taps, so that those of few channels are full.
    """

    pixels: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    flat: bool


def _tile(pixels: int, inputs: int, outputs: int, taps: int) -> Tile:
    """For ``pixels`` of all samples: small images take small tiles, so that all multiprocessors have one."""
    from ssmquant.ops.triton_launch import power

    flat = inputs <= _FEW_INPUTS
    each = min(max(power(taps * inputs if flat else inputs), 16), 32)
    at_once = next((n for n in (64 if flat else 128, 64) if pixels >= 2 * n * UNITS), 32)
    across = min(max(power(outputs), 16), 128)
    return Tile(at_once, across, each, 8 if at_once == 128 else 4, 3, flat)


@functools.cache
def _kernel() -> Any:
    from ssmquant.ops.deployed import triton_conv
    from ssmquant.ops.triton_launch import Kernel

    return Kernel(triton_conv.convolve_floats, exact=False, early=True)


def taps_of(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs, height, width), float32, as the kernel takes it: (outputs, taps * inputs), rounded.

    With zeros up to a multiple of 4 behind each row, which make reads of 16 bytes.
    """
    taps = weight.detach().permute(0, 2, 3, 1).flatten(1)
    taps = F.pad(taps, (0, -taps.shape[1] % 4)).contiguous()
    near = ((taps.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(taps.isnan(), math.nan, near)  # of other bits it might be infinite when it is cut


def is_small_window(shape: Sequence[int]) -> bool:
    """Whether the kernel is for a weight of this shape, (outputs, inputs, height, width)."""
    return max(shape[2:]) <= _MOST_TAPS and max(shape[:2]) <= _MOST_CHANNELS


def convolves_floats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    residual: Tensor | None = None,
) -> bool:
    """Whether ``convolve_floats`` takes these; ``weight``: (outputs, inputs, height, width), of one group."""
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if any(t.dtype != torch.float32 or t.device != x.device or not t.numel() for t in given):
        return False
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        return False
    if not is_small_window(weight.shape):
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    size = _size(x, weight.shape[2:], stride, padding, dilation)
    shape = len(x), len(weight), *size
    if min(size) < 1 or len(x) >= 2**16 or (residual is not None and residual.shape != shape):
        return False
    counts = (
        extent(x),
        x[0].numel(),
        size[0] * size[1] * len(weight),
        0 if residual is None else extent(residual),
    )
    return max(counts) < MOST_ELEMENTS


def _size(x: Tensor, kernel: Any, stride: _Pair, padding: _Pair, dilation: _Pair) -> _Pair:
    """Lines and columns of the result."""
    height, width = conv_size(
        [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)], kernel, dilation, stride
    )
    return height, width


def convolve_floats(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    residual: Tensor | None = None,
    last: bool = True,
) -> Tensor:
    """A convolution of what ``convolves_floats`` takes, zeros around x.

    Args:
        x: (B, inputs, H, W), float32, any strides; fastest with channels last.
        taps: what ``taps_of`` makes of the weight, whose height and width are ``kernel``.
        bias: (outputs,), contiguous.
        residual: of the result's shape, any strides; is added to it.

    Returns:
        (B, outputs, height, width), contiguous, with channels ``last`` in memory or not.
    """
    batch, inputs, x_height, x_width = x.shape
    height, width = _size(x, kernel, stride, padding, dilation)
    outputs, pixels = len(taps), height * width
    tile = _tile(batch * pixels, inputs, outputs, kernel[0] * kernel[1])
    if not tile.flat and x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(
        (batch, outputs, height, width), dtype=torch.float32, device=x.device, memory_format=layout
    )
    held = 0 if residual is None else 2 if _is_dense(residual, last) else 1
    r_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    first = x, taps, bias, residual
    tensors = *(x if t is None else t for t in first), y
    numbers = pixels, width, x_height, x_width, *x.stride(), *r_strides, *padding, *stride
    constants = (
        inputs, outputs, *kernel, *dilation, _is_dense(x, True), tile.flat, bias is not None, held, last,
        tile.pixels, tile.outputs, tile.inputs, tile.stages,
    )  # fmt: skip
    grid = -(-pixels // tile.pixels), -(-outputs // tile.outputs), batch
    _kernel()(grid, tensors, numbers, tuple(map(int, constants)), tile.warps)
    return y


def _is_dense(image: Tensor, last: bool) -> bool:
    """Whether it is contiguous, with channels ``last`` or not."""
    return (image.permute(0, 2, 3, 1) if last else image).is_contiguous()
