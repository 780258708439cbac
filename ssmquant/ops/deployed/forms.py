"""Operands of the kernels of deployed models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmquant.errors import InputError

__all__ = [
    "ACTIVATIONS",
    "MOST_ELEMENTS",
    "UNITS",
    "Attention",
    "Codes",
    "Depthwise",
    "Grid",
    "Layer",
    "Norm",
    "RowGrid",
    "ScanOperands",
    "Weights",
    "extent",
    "kind_of",
    "signed_codes",
]


ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2}
"""Numbers that kernels have for what is applied to a result."""
MOST_ELEMENTS = 2**31 - 2**16
"""Of a sample, on a GPU: kernels there count them by 31 bits."""
UNITS = 132
"""Multiprocessors of an H100 or H200, for which work is cut into blocks. No result depends on their number."""


@dataclass(frozen=True, eq=False)
class Grid:
    """How values become codes, ``round(clip((x + shift) / scale, qmin, qmax)) - qmin``, and codes become values.

    ``clip((code + qmin) * scale - shift, low, high)``. Tensors are float32, of one element, or one a sample.
    """

    scale: Tensor
    shift: Tensor
    qmin: int
    qmax: int
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowGrid:
    """A range of each row from its extremes, see ``quantizers/token.py``. ``clip``: (2,), float32."""

    clip: Tensor
    levels: int
    eps: float


@dataclass(frozen=True, eq=False)
class Codes:
    """Encoded rows of a batch, (batch, rows, groups, padded) uint8, ``padded`` a multiple of 16.

    ``sums``: of the codes of each row, (batch, rows, groups) int32; INT32_MIN for a row that had a NaN. The tensor is
    the start of a buffer with room behind it, which kernels may read.
    """

    data: Tensor
    sums: Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """A layer norm over the last axis, or an RMS norm; ``weight`` and ``bias`` contiguous float32 or None.

    Or, with ``factors``, nothing but a product with ``weight``.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool = False
    factors: bool = False


@dataclass(frozen=True, eq=False)
class Depthwise:
    """A depthwise convolution of an image and what is written of it: see ``cuda_depthwise.depthwise``.

    ``x``: (B, H, W, C).
    """

    x: Tensor
    grid: Grid
    weights: Tensor
    bias: Tensor
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    act: str | None
    codes: Grid | None
    factors: Tensor | None
    also: Grid | None


def kind_of(norm: Norm | None) -> int:
    """The number that kernels have for it."""
    return 0 if norm is None else 3 if norm.factors else 2 if norm.rms else 1


@dataclass(frozen=True, eq=False)
class Weights:
    """A weight (..., outputs, inputs) as a kernel's path wants it, and what makes values of its codes.

    ``value = scale * code - shift``, one of each an output; ``total``: the sum of an output's values. All of them
    (..., tiles, lanes), zeros behind the outputs. ``narrow``: 0, or the largest magnitude of codes that are int8 where
    the path's own form is int16. ``tiles``: the codes once more, as tensor cores or vectors take them, and
    ``affine`` the others, for kernels that do.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor
    total: Tensor
    outputs: int
    narrow: int = 0
    tiles: Tensor | None = None
    affine: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """Channel attention of images: ``sigmoid(second @ relu(first @ mean + first_bias) + second_bias)``.

    ``tiles``: (batch, some, channels), sums of some pixels each that add up to those of all; first and second: (hidden,
    channels) and (channels, hidden). All contiguous.
    """

    tiles: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer on codes of a static ``grid``: what ``cuda.project`` takes by these names."""

    grid: Grid
    weights: Weights
    bias: Tensor | None
    norm: Norm | None
    act: str | None
    codes: tuple[Grid, int, Tensor | None] | None


@dataclass(frozen=True, eq=False)
class ScanOperands:
    """What selective scans in K orders have besides codes of D channels: N states, step sizes of low rank R.

    Args:
        of_u, of_rank, of_delta, of_b, of_c: grids; of_delta None: step sizes are not quantized.
        steps: weights of the step sizes, (K, D, R); ``ranks``: R.
        a: (K * D, N); skip, bias: (K * D,) or None. All float32.
        softplus: of step sizes, behind the bias.
        order: (K, L) int32, the pixel of each step.
    """

    of_u: Grid
    of_rank: Grid
    steps: Weights
    of_delta: Grid | None
    a: Tensor
    of_b: Grid
    of_c: Grid
    skip: Tensor | None
    bias: Tensor | None
    softplus: bool
    order: Tensor
    ranks: int


def extent(t: Tensor) -> int:
    """How far from a sample's first element its last one is."""
    return sum((n - 1) * stride for n, stride in zip(t.shape[1:], t.stride()[1:], strict=True))


def signed_codes(
    codes: Tensor, bits: int, code_min: int, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``codes`` (uint8, from 0) as int8 around 0, and the shift that belongs to them.

    Raises:
        InputError: more than 8 bits.
    """
    if bits > 8:
        raise InputError(f"kernels take codes of up to 8 bits, not {bits}")
    half = 2 ** (bits - 1)
    return (codes.to(torch.int16) - half).to(torch.int8), shift - scale * (half + code_min)
