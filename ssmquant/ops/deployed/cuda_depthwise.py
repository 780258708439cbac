"""Depthwise convolutions of deployed models on a GPU: calls of ``csrc/deployed_cuda/depthwise.cu``."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed.forms import ACTIVATIONS, UNITS, Depthwise, Grid

__all__ = ["Launch", "Params", "blocks_of", "convolve", "depthwise", "launch_of", "whole_rows"]

_MOST_THREADS = 256
_MOST_THREADS_OF_ALL, _FEW_THREADS_OF_ALL = 512, 64  # of a block that has all channels
_MOST_SHARED = 48 * 1024  # bytes of a block, so that several fit
_MANY_BLOCKS = 3 * UNITS
_SHAPES = (16, 16), (8, 16), (8, 8), (4, 8), (4, 4), (256, 1), (128, 1), (64, 1), (32, 1), (1, 64)
_SHAPES_OF_ALL = (16, 8), (8, 8), (4, 8), (4, 4)


class _Divisor(ctypes.Structure):
    _fields_ = (("factor", ctypes.c_uint), ("shift", ctypes.c_int), ("count", ctypes.c_int))


class Params(ctypes.Structure):
    """``Params`` of the source."""

    _fields_ = (
        *(
            (n, ctypes.c_void_p)
            for n in "x scale shift weights bias next_scale next_shift next_factors also_scale also_shift".split()
        ),
        *((n, ctypes.c_void_p) for n in "y z sums".split()),
        ("x_batch", ctypes.c_longlong),
        *((n, ctypes.c_int) for n in "x_down x_right x_channel y_row z_row height width channels".split()),
        *((n, ctypes.c_int) for n in "qmin qmax next_min next_max also_min also_max".split()),
        *((n, _Divisor) for n in ("across", "blocks")),
    )


def _divisor(count: int) -> _Divisor:
    shift = 31 + (count - 1).bit_length()
    return _Divisor(-(-(2**shift) // count), shift, count)


def _readers(threads: int, items: int, tall: int, at_once: int) -> tuple[int, int, dict[str, int]]:
    """How ``threads`` best read ``tall`` lines of ``items``, ``at_once`` before they look at any.

    Returns:
        The rounds and lines of a thread, and what the source calls them.
    """
    best: tuple[int, tuple[int, int, dict[str, int]]] | None = None
    for rounds in range(-(-items // threads), items + 1):
        team = -(-items // rounds)
        lines = -(-tall // (threads // team))
        lines_once = -(-lines // -(-lines // at_once))
        rounds_once = -(-rounds // -(-rounds // (at_once // lines_once)))
        # What is done in steps is done in whole steps.
        whole = -(-rounds // rounds_once) * rounds_once, -(-lines // lines_once) * lines_once
        cost = whole[0] * (2 * whole[1] + 1)  # to find a column takes half as long as an item
        if best is None or cost < best[0]:
            best = cost, (*whole, {"TEAM": team, "ROUNDS": rounds_once, "LINES": lines_once})
        if lines == 1:
            break
    assert best is not None
    return best[1]


@functools.lru_cache(maxsize=1024)
def _tile(
    sizes: tuple[int, ...],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    coded: bool,
    read: int,
    stored: int,
) -> tuple[dict[str, int], int, int]:
    """What a block does, for the fewest instructions where there are most.

    Args:
        sizes: of x.
        read, stored: channels of x and of y that one instruction may take, as far as their places tell.

    Returns:
        Definitions of the source, threads and bytes of shared memory of a block.
    """
    batch, height, width, channels = sizes
    taps = kernel[0] * kernel[1]
    per = _per(taps, stored)
    reach_down, reach_right = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
    best: tuple[tuple[bool, int, float], dict[str, int], int, int] | None = None
    for shape in _SHAPES:
        wide, steps = shape[1], shape[0] // dilation[0]
        high = steps * dilation[0] if steps > 1 else shape[0]
        most = min(steps, shape[0] * wide // (8 * per))
        run = next((n for n in range(most, 1, -1) if steps % n == 0), 1)
        tiles = batch * -(-height // high) * -(-width // wide)
        for lanes in range(min(32, channels) // per * per, 0, -per):
            if lanes < 16 and best is not None and best[0][:2] == (False, _MOST_SHARED):
                break
            threads = lanes // per * wide * (high // run)
            tall, broad = high + reach_down, wide + reach_right
            rounds, lines, vec, readers, shared = _reading(threads, tall, broad, lanes, coded, read)
            work = rounds * (10 + lines * ((5 if coded else 10) + 3 * vec))
            work += 150 + (run + kernel[0] - 1) * kernel[1] + run * (4 + per * (taps + 10))
            blocks = tiles * -(-channels // lanes)
            each = -(-blocks // UNITS)
            # Few warps wait for themselves, few blocks all for memory; few lanes use parts of what it sends.
            cost = work * max(-(-threads // 32) * each, 8) * (1 + 0.5 / each) * (1 + 2 / lanes)
            rank = threads > _MOST_THREADS, max(shared, _MOST_SHARED), cost
            if best is None or rank < best[0]:
                tile = {"PER": per, "LANES": lanes, "TILE_HIGH": high, "TILE_WIDE": wide, "RUN": run}
                best = rank, {**tile, **readers}, threads, shared
    assert best is not None
    return best[1:]


def _per(taps: int, stored: int) -> int:
    """Channels of a thread: it has a weight and a value for each tap and channel in registers."""
    return next(n for n in (4, 2, 1) if n == 1 or (stored % n == 0 and n * taps <= 40))


def _reading(
    threads: int, tall: int, broad: int, lanes: int, coded: bool, read: int
) -> tuple[int, int, int, dict[str, int], int]:
    """Rounds and lines of a thread, channels at once, what the source calls these, and bytes of shared memory."""
    vec = next(n for n in (4, 2, 1) if read % n == 0 and lanes % n == 0)
    items = broad * lanes // vec
    rounds, lines, readers = _readers(threads, items, tall, 6 if vec == 4 and not coded else 12)
    shared = 4 * (threads // readers["TEAM"]) * lines * items * vec
    return rounds, lines, vec, {**readers, "X_VEC": vec}, shared


@functools.lru_cache(maxsize=1024)
def _tile_of_all(
    sizes: tuple[int, ...], kernel: tuple[int, int], coded: bool, read: int, stored: int, row: int
) -> tuple[dict[str, int], int, int] | None:
    """``_tile`` of a block that has all channels, where a projection in the same kernel reads its codes.

    Measured on an H200 with 3x3: long runs of many threads are best, in small images short ones of as many blocks as
    can be. None where a block has no room for its rim, or only for that of a tile that is too small for the image.

    ``row``: bytes of what a pixel has in shared memory besides its values.
    """
    batch, height, width, channels = sizes
    per = _per(kernel[0] * kernel[1], stored)
    for high, wide in _SHAPES_OF_ALL:
        by_line = channels // per * wide * high  # threads of runs of one line
        if high < 8:
            run = next((n for n in (1, 2) if by_line // n <= _MOST_THREADS_OF_ALL), 4)
        else:
            run = next((n for n in (8, 4, 2) if by_line // n >= _FEW_THREADS_OF_ALL), 1)
        threads = by_line // run
        tall, broad = high + kernel[0] - 1, wide + kernel[1] - 1
        *_, readers, shared = _reading(threads, tall, broad, channels, coded, read)
        shared += high * wide * row
        tiles = batch * -(-height // high) * -(-width // wide)
        fits = threads <= _MOST_THREADS_OF_ALL and shared <= 2 * _MOST_SHARED
        if fits and ((high, wide) == _SHAPES_OF_ALL[-1] or tiles >= _MANY_BLOCKS):
            tile = {"PER": per, "LANES": channels, "TILE_HIGH": high, "TILE_WIDE": wide, "RUN": run}
            return {**tile, **readers}, threads, shared
        if high < 8 and not fits and tiles >= _MANY_BLOCKS:
            break
    return None


def blocks_of(d: Depthwise, row: int) -> tuple[int, int] | None:
    """Blocks with all channels of a convolution, see ``launch_of``, and threads of each; None without room for them."""
    found = _of_all(d, row)
    if found is None:
        return None
    tile, threads, _ = found
    batch, height, width, _ = d.x.shape
    return batch * -(-height // tile["TILE_HIGH"]) * -(-width // tile["TILE_WIDE"]), threads


def _of_all(d: Depthwise, row: int) -> tuple[dict[str, int], int, int] | None:
    coded = d.x.dtype == torch.int8
    return _tile_of_all(tuple(d.x.shape), d.kernel, coded, _at_once(d.x), _stored(d), row)


def _stored(d: Depthwise) -> int:
    return min(_at_once(t) for t in (d.weights, d.bias, d.factors) if t is not None)


def _at_once(t: Tensor) -> int:
    """How many channels one instruction can take, by where they are: (.., channels)."""
    if t.stride(-1) != 1:
        return 1
    places = (t.data_ptr() // t.element_size(), *t.stride()[:-1], t.shape[-1])
    return next(n for n in (4, 2, 1) if all(p % n == 0 for p in places))


@dataclass(frozen=True)
class Launch:
    """Of ``depthwise.cu``, alone or in front of a projection."""

    params: Params
    definitions: dict[str, int]
    tiles: int
    """Of a sample."""
    grid: tuple[int, int]
    threads: int
    shared: int
    x: Tensor
    """What is read, which has to be there until the launch."""


def launch_of(
    d: Depthwise, y: Tensor | None, z: Tensor | None, sums: bool = False, row: int = 0, low: int = 0
) -> Launch:
    """How results of a convolution are written, all (B, H, W, ..) with pixels next to each other.

    Args:
        y: for the result or its codes; None where nobody but a projection in the same kernel reads them.
        z: for codes by ``d.also``.
        sums: whether sums of tiles are; then ``params.sums`` has to be set.
        row, low: bytes of a pixel's codes, and words that a projection keeps of it, in shared memory; 0 where there is
            no projection.

    Raises:
        InputError: an image has 2**31 elements or more, or there are too many.
    """
    x, kernel, dilation = d.x, d.kernel, d.dilation
    if x.shape[1] == 1 and kernel[0] == 1:  # threads go along columns
        x, kernel, dilation = x.transpose(1, 2), kernel[::-1], dilation[::-1]
    if max(x.stride()[1:]) >= 2**31:
        x = x.contiguous()  # the kernel has 32 bits for each
    batch, height, width, channels = x.shape
    coded = x.dtype == torch.int8
    if row:
        of_all = _of_all(d, row + 4 * low)
        assert of_all is not None
        tile, threads, shared = of_all
    else:
        tile, threads, shared = _tile(tuple(x.shape), kernel, dilation, coded, _at_once(x), _stored(d))
    across, blocks = -(-width // tile["TILE_WIDE"]), -(-channels // tile["LANES"])
    tiles = -(-height // tile["TILE_HIGH"]) * across
    y_row, z_row = (0 if t is None else t.stride(-2) for t in (y, z))
    if height * width * max(y_row, z_row, channels) >= 2**31 or batch >= 2**16:
        raise InputError(
            f"deployed: {tuple(x.shape)} is more than the kernels for GPUs count: use tiles, or fewer at once"
        )
    constants = {
        "KH": kernel[0],
        "KW": kernel[1],
        "DOWN": dilation[0],
        "RIGHT": dilation[1],
        "Y_ACT": ACTIVATIONS[d.act],
        "X_CODED": int(coded),
        "Y_CODES": int(d.codes is not None),
        "Y_FACTORS": int(d.factors is not None),
        "ALSO": int(z is not None),
        "SUMS": int(sums),
        "ROW": row,
        "LOW": low,
        "WRITTEN": int(y is not None),
    }
    following = d.grid if d.codes is None else d.codes
    other = d.grid if d.also is None else d.also
    tensors = (
        x, d.grid.scale, d.grid.shift, d.weights, d.bias, following.scale, following.shift, d.factors, other.scale,
        other.shift, y, z, None,
    )  # fmt: skip
    params = Params(
        *(None if t is None else t.data_ptr() for t in tensors), *x.stride(), y_row, z_row, height, width,
        channels, d.grid.qmin, d.grid.qmax, following.qmin, following.qmax, other.qmin, other.qmax, _divisor(across),
        _divisor(blocks),
    )  # fmt: skip
    return Launch(params, {**tile, **constants}, tiles, (tiles * blocks, batch), threads, shared, x)


def depthwise(
    x: Tensor,
    grid: Grid,
    weights: Tensor,
    bias: Tensor,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    act: str | None = None,
    codes: Grid | None = None,
    factors: Tensor | None = None,
    also: Grid | None = None,
    sums: bool = False,
) -> Any:
    """See ``cpu.depthwise``.

    Args:
        x: float32, or codes by ``grid``: int8 from 0 and -1 for NaN.
        codes: what is returned as such codes, by a grid of at most 128 levels; None: float32.
        factors: of what becomes codes, (channels,).
        also: another grid, by which codes without factors are returned too, behind those by ``codes``. In memory their
            pixels begin at multiples of 16 bytes, as scans want them.
        sums: of float32 results, behind them: (batch, tiles, channels), what those of each tile of pixels add up to.

    Raises:
        InputError: an image has 2**31 elements or more, or there are too many.
    """
    return convolve(Depthwise(x, grid, weights, bias, kernel, dilation, act, codes, factors, also), sums)


def convolve(d: Depthwise, sums: bool = False) -> Any:
    """``depthwise``."""
    assert not sums or d.codes is None
    x = d.x
    y = torch.empty(x.shape, dtype=torch.float32 if d.codes is None else torch.int8, device=x.device)
    z = None if d.also is None else whole_rows(x)
    launch = launch_of(d, y, z, sums)
    parts = torch.empty(len(x), launch.tiles, x.shape[3], device=x.device) if sums else None
    if parts is not None:
        launch.params.sums = parts.data_ptr()
    source = nvrtc.specialised("deployed_cuda/depthwise", *launch.definitions.items())
    with torch.cuda.device_of(y):
        kernels = nvrtc.load(source, x.device)
        kernels.launch(
            "depthwise", launch.grid, launch.threads, launch.shared, launch.params, x.device, early=True
        )
    if parts is not None:
        return y, parts
    return y if z is None else (y, z[..., : x.shape[3]])


def whole_rows(x: Tensor) -> Tensor:
    """Memory for codes of an image, (B, H, W, channels and more), whose pixels begin at multiples of 16 bytes."""
    return torch.empty(*x.shape[:3], -(-x.shape[3] // 16) * 16, dtype=torch.int8, device=x.device)
