"""Depthwise convolutions of deployed models on a GPU: calls of ``csrc/deployed_cuda/depthwise.cu``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed.forms import ACTIVATIONS, Grid

__all__ = ["depthwise"]

_THREADS = 256
_MOST_SHARED = 40 * 1024  # bytes of a block, so that several fit


class _Params(ctypes.Structure):
    """``Params`` of the source."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in "x scale shift weights bias next_scale next_shift y".split()),
        *((n, ctypes.c_longlong) for n in "x_batch x_down x_right x_channel".split()),
        *((n, ctypes.c_int) for n in "height width channels across qmin qmax next_min next_max".split()),
    )


@functools.cache
def _tile(line: bool, channels: int, kernel: tuple[int, int], dilation: tuple[int, int]) -> dict[str, int]:
    """Channels and pixels of a block; ``line``: of images of one line."""
    lanes = min(range(16, 33), key=lambda n: (-(-channels // n) * n, -n)) if channels >= 16 else channels
    rows = max(1, _THREADS // lanes)
    down, right = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
    high, wide = (1, 32) if line else (8, 16)
    rows = min(rows, high)
    while wide > 1 and (high + down) * (wide + right) * lanes * 4 > _MOST_SHARED:
        wide //= 2
    return {"LANES": lanes, "ROWS": rows, "HIGH": high, "WIDE": wide}


def _at_once(x: Tensor, lanes: int) -> int:
    """How many codes of neighbouring channels can be read together."""
    places = (x.data_ptr(), *x.stride()[:3], x.shape[3], lanes)
    return 1 if x.stride(3) != 1 else next(n for n in (4, 2, 1) if all(p % n == 0 for p in places))


@functools.cache
def _source(*definitions: tuple[str, int]) -> str:
    text = nvrtc.cuda_text("cuda_math", "deployed_cuda/depthwise")
    return "".join(f"#define {k} {v}\n" for k, v in definitions) + text


def depthwise(
    x: Tensor,
    grid: Grid,
    weights: Tensor,
    bias: Tensor,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    act: str | None = None,
    codes: Grid | None = None,
) -> Tensor:
    """See ``cpu.depthwise``.

    Args:
        x: float32, or codes by ``grid``: int8 from 0 and -1 for NaN.
        codes: what is returned as such codes, by a grid of at most 128 levels; None: float32.

    Raises:
        InputError: an image has 2**31 elements or more, or there are too many.
    """
    batch, height, width, channels = x.shape
    tile = _tile(height == 1, channels, kernel, dilation)
    lanes, rows, high, wide = tile.values()
    down, right = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
    blocks = -(-height // high) * -(-width // wide), batch * -(-channels // lanes)
    if height * width * channels >= 2**31 or blocks[1] >= 2**16:
        raise InputError(
            f"deployed: {tuple(x.shape)} is more than the kernels for GPUs count: use tiles, or fewer at once"
        )
    coded = x.dtype == torch.int8
    y = torch.empty(x.shape, dtype=torch.float32 if codes is None else torch.int8, device=x.device)
    constants = {
        "KH": kernel[0],
        "KW": kernel[1],
        "DOWN": dilation[0],
        "RIGHT": dilation[1],
        "ACT": ACTIVATIONS[act],
        "CODED": int(coded),
        "CODES": int(codes is not None),
        "VEC": _at_once(x, lanes) if coded else 1,
    }
    source = _source(*tile.items(), *constants.items())
    following = grid if codes is None else codes
    tensors = (x, grid.scale, grid.shift, weights, bias, following.scale, following.shift, y)
    across = -(-width // wide)
    params = _Params(
        *(t.data_ptr() for t in tensors), *x.stride(), height, width, channels, across, grid.qmin, grid.qmax,
        following.qmin, following.qmax,
    )  # fmt: skip
    shared = 4 * (high + down) * (wide + right) * lanes
    with torch.cuda.device_of(y):
        nvrtc.load(source, x.device).launch("depthwise", blocks, lanes * rows, shared, params, x.device)
    return y
