"""What the CUDA kernels of the selective scan are compiled for, and the choice of their shape.

The choice minimises a model of time fitted to measurements on an H100: multiprocessors work in waves of blocks; within
one, each of four schedulers has its share of warps, and fewer than three leave it waiting; longer tiles cost more steps
of the scan over lanes; cutting time into chunks costs another pass over most of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ssmquant.ops.nvrtc import cuda_text

__all__ = ["SAVE", "TYPES", "Case", "Limits", "Shape", "Work", "case_of", "choose", "choose_ends", "unit"]

SAVE = 64  # steps between saved states, as in the source
TYPES = {"float": 4, "F16": 2, "BF16": 2}  # names in the source, and bytes
_WARPS = 12  # of a multiprocessor, given the registers of both kernels
_END_WARPS, _END_TILE = 6, 512  # of the pass before chunks
_BYTES_PER_CYCLE = 1700  # of memory
_LAUNCH = 10_000  # cycles of two more kernels
_MEMORY = 4096  # steps after which most channels have forgotten


@dataclass(frozen=True)
class Limits:
    """Of a device; bytes of shared memory of a block, and of a multiprocessor."""

    processors: int
    block_shared: int
    processor_shared: int


@dataclass(frozen=True)
class Work:
    """What is to be computed; ``inner`` channels in each of ``groups`` groups of ``batch`` samples."""

    backward: bool
    batch: int
    groups: int
    inner: int
    states: int
    length: int
    softplus: bool
    constant_b: bool
    constant_c: bool
    types: tuple[str, ...]  # of u, delta, B, C
    map: bool


@dataclass(frozen=True)
class Shape:
    """How a kernel works: steps of a segment, channels of a lane, lanes side by side in channels, warps of a block."""

    steps: int
    columns: int
    lanes: int
    warps: int
    blocks: int  # of a multiprocessor, what registers are limited for
    staged: int  # states of B and C in shared memory at a time
    unroll: int = 1  # states whose instructions the compiler may mix

    @property
    def segments(self) -> int:
        """Of a tile, one a lane."""
        return 32 // self.lanes

    @property
    def tile(self) -> int:
        """Steps of a tile."""
        return self.segments * self.steps

    @property
    def rows(self) -> int:
        """Channels of a warp."""
        return self.lanes * self.columns

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.rows * self.warps


@dataclass(frozen=True)
class Case:
    """What a cubin is compiled for."""

    shape: Shape
    backward: bool
    ends: bool  # the passes that chunks need before
    states: int
    softplus: bool
    constant_b: bool
    constant_c: bool
    types: tuple[str, ...]
    vector: int = 1  # elements of an access to memory
    map: bool = False

    def source(self) -> str:
        """The text to compile: definitions and the kernels."""
        s = self.shape
        values = {
            "STATES": self.states,
            "T": s.steps,
            "CT": s.columns,
            "LC": s.lanes,
            "WARPS": s.warps,
            "MIN_BLOCKS": s.blocks,
            "GROUP": s.staged,
            "UNROLL": s.unroll,
            "SOFTPLUS": int(self.softplus),
            "CONST_B": int(self.constant_b),
            "CONST_C": int(self.constant_c),
            "PASS": self.backward + 2 * self.ends,
            "MAP": int(self.map),
            "V": self.vector,
            **dict(zip(("TU", "TD", "TB", "TC"), self.types, strict=True)),
        }
        return "".join(f"#define {k} {v}\n" for k, v in values.items()) + _text()

    @functools.cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block, as the source lays it out."""
        s, (u, delta, b, c) = self.shape, (TYPES[x] for x in self.types)
        line = s.segments * (s.steps + (0 if s.steps // 4 % 2 else 4))
        tile_d, tile_u = (-(-s.rows * (s.tile + 4) * size // 16) * 16 for size in (delta, u))
        stage_b = 0 if self.constant_b else -(-s.staged * line * b // 16) * 16
        stage_c = 0 if self.constant_c else -(-s.staged * line * c // 16) * 16
        table = 4 * (-(-self.states * s.rows // 4) * 4)
        of_lanes = 128 * self.states * s.columns if self.states * s.columns <= 32 else 0
        if self.ends:
            stage = stage_c if self.backward else stage_b
            return 2 * stage + s.warps * (2 * (tile_d + tile_u) + 2 * table + of_lanes + 8)
        stage = 2 * (stage_b + stage_c)
        if not self.backward:
            return stage + s.warps * (2 * (tile_d + tile_u) + 2 * table)
        sums, tables = 8 * s.staged * s.tile, 3 + self.constant_b + self.constant_c
        return stage + s.warps * (2 * (tile_d + 2 * tile_u + sums) + (of_lanes or table) + tables * table)


_FILES = ("base", "move", "scan", "chunks", "forward", "backward")


@functools.cache
def _text() -> str:
    return cuda_text("cuda_math", *(f"selective_scan_cuda/{name}" for name in _FILES))


def case_of(work: Work, shape: Shape, vector: int, ends: bool = False) -> Case:
    """What to compile for ``work``, or for what chunks of it need before."""
    return Case(
        shape,
        work.backward,
        ends,
        work.states,
        work.softplus,
        work.constant_b,
        work.constant_c,
        work.types,
        vector,
        work.map,
    )


def unit(shape: Shape, length: int) -> int:
    """Chunks are whole multiples of this many steps."""
    return math.lcm(shape.tile, SAVE) if length > shape.tile else shape.tile


def _cost(work: Work, shape: Shape, chunks: int, resident: int, processors: int) -> float:
    """Modelled cycles of the main pass and, with chunks, of the pass before it."""
    blocks = -(-work.inner // shape.channels)
    grid = work.batch * work.groups * blocks * chunks
    waves = -(-grid // (processors * resident))
    at_once = min(resident, -(-grid // processors)) * shape.warps
    tiles = -(-work.length // chunks // shape.tile)
    # Instructions of a warp for a tile: recurrence, scans over lanes, what it shares with the block's other warps.
    steps, states = shape.steps * shape.columns, work.states
    one: float = steps * ((22 if work.backward else 8) * states + (60 if work.backward else 35))
    levels = math.log2(shape.segments)
    one += shape.columns * states * (2 if work.backward else 1) * (6 * levels + 8)
    if not work.backward:  # shuffles, and reads of B and C, which lanes side by side share
        width = max(TYPES[x] for x in work.types[2:]) / (1 if shape.lanes == 1 else 2)
        one += states * 3 * (steps / 2 * width + 2 * shape.columns * levels)
    staged = 2 * states * shape.tile / 32
    one += 2 * staged / shape.warps + 200 * -(-states // shape.staged) + 300
    if work.backward:
        one += 6 * shape.steps * (1 - 1 / shape.lanes) * states + staged * (1.2 + 10 / shape.warps)
    cycles = waves * max(2.5, -(-at_once // 4)) * tiles * one
    if chunks > 1:  # the pass before stops where channels have forgotten what was
        chunk = work.length / chunks
        walked = _END_TILE * math.ceil(min(_MEMORY, chunk) / _END_TILE) / chunk * (1 - 1 / chunks)
        cycles *= 1.1 + 0.4 * walked if work.backward else 1.15 + 0.55 * walked
        cycles += _LAUNCH
    size = max(TYPES[x] for x in work.types[:2])
    moved = (5 if work.backward else 3) * size * work.batch * work.groups * work.inner * work.length
    moving = moved / _BYTES_PER_CYCLE * (1.1 + 40 / (shape.tile * size))  # short rows are read slowly
    if work.backward and blocks > 1:  # parts of the gradients of B and C, written and read again
        cycles += blocks * 16 * work.batch * work.groups * states * work.length / _BYTES_PER_CYCLE
    return max(cycles, moving)


@functools.lru_cache(maxsize=4096)
def choose(work: Work, limits: Limits) -> tuple[Shape, int]:
    """The shape of the kernels for ``work`` and the number of chunks. Any shape is right, this one should be fast."""
    steps, columns = (8, 2) if work.backward else (16, 1)
    smallest = min(SAVE, work.length)  # tiles of the backward pass begin where states were saved
    best: tuple[float, Shape, int] | None = None
    few, long = (1, 2, 3), 2 * work.length
    # Fewer warps, and tiles longer than they need to be, only where others do not fit.
    for allowed, longest in (((4, 6, 8, 9, 12), long), (few, long), (few, math.inf)):
        for lanes in (1, 2, 4, 8, 16, 32):
            tile = 32 // lanes * steps
            if (work.backward and tile < smallest) or (lanes < 32 and tile >= longest):
                continue
            needed = -(-work.inner // (lanes * columns))
            for warps in sorted({min(w, needed) for w in allowed}):
                found = _fit(work, limits, Shape(steps, columns, lanes, warps, max(1, _WARPS // warps), 1))
                if found is None:
                    continue
                shape, resident = found
                most = work.length // (4 * unit(shape, work.length))
                blocks = work.batch * work.groups * -(-work.inner // shape.channels)
                full = limits.processors * resident
                fill = (waves * full // blocks for waves in (1, 2, 3, 4))
                for chunks in {1, *(max(1, min(c, most)) for c in fill)}:
                    cost = _cost(work, shape, chunks, resident, limits.processors)
                    if best is None or cost < best[0]:
                        best = cost, shape, chunks
        if best is not None:
            return best[1], best[2]
    raise AssertionError("one warp fits every device")  # pragma: no cover


def choose_ends(work: Work, limits: Limits) -> Shape:
    """The shape of the pass before chunks. A block walks as far as its slowest channel needs, so few share one."""
    warps = min(work.inner, _END_WARPS)
    for most in (10, 8, 5, 4, 3, 2, 1):
        shape = Shape(16, 1, 1, warps, 1, _evenly(work.states, most), 2)
        needed = case_of(work, shape, 1, ends=True).shared
        if 2 * (needed + 1024) <= limits.processor_shared:
            return shape
    return shape


def _evenly(states: int, most: int) -> int:
    """States to be staged at once, at most ``most``, so that no barrier comes early."""
    return -(-states // -(-states // most))


def _fit(work: Work, limits: Limits, shape: Shape) -> tuple[Shape, int] | None:
    """The shape with as many staged states as fit, and the blocks that a multiprocessor holds; None if none fits."""
    for most in (8, 5, 4, 3, 2, 1) if work.backward else (10, 8, 5, 4, 3, 2, 1):
        staged = _evenly(work.states, most)
        tried = Shape(
            shape.steps,
            shape.columns,
            shape.lanes,
            shape.warps,
            shape.blocks,
            staged,
            1 if work.backward else 2,
        )
        needed = case_of(work, tried, 1).shared
        resident = min(shape.blocks, limits.processor_shared // (needed + 1024))
        if needed <= limits.block_shared and (resident == shape.blocks or (staged == 1 and resident > 0)):
            return tried, resident
    return None
