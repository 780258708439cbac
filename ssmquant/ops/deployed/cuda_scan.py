"""The scan of deployed models on a GPU: what ``csrc/deployed_cuda/scan.cu`` is compiled for, and its calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import cuda_scan_tiles
from ssmquant.ops.deployed.cuda_scan_operands import (
    COPIED,
    MOST_LEVELS,
    MOST_SHARED,
    Params,
    arrangement,
    levels_of,
    paths_of,
    rates_of,
    tensors_of,
    up,
)
from ssmquant.ops.deployed.cuda_scan_tiles import TileCase, Tiles
from ssmquant.ops.deployed.forms import ScanOperands

__all__ = ["Case", "Scan", "Shape", "Steps", "arrangement", "choose", "paths_of"]

_MOST_LANES = 256
_FEW_STEPS = 48, 24  # of many states, of few
_FEW_WARPS = 2.5  # of a multiprocessor
_SHORT = 256  # steps
_FEW_GROUPS = 8  # of a segment
_HELD = 4, 8, 16
_FEW_STATES = 4  # that need few registers
_SMALL = 256  # threads of a multiprocessor: then a lane has one channel, for twice as many
_SMALL_BLOCK = 160  # threads
_FULL = 0.9  # of the blocks that multiprocessors have room for
_THREADS = 256  # of two blocks of a multiprocessor, 128 registers each
_MOST = 2**31 - 2**16  # elements of a sample, and pixels: a block may count beyond the last
_MOST_BLOCKS = 2**16 - 1  # of a grid's second axis
_STEPS_THREADS = 256  # of a block of ``scan_steps``, as in the source
_STEPS_SHARED = 12 * 1024  # bytes of codes that are copied at once, if that is a pixel's for each thread
_TAKEN = 8  # channels of a thread that makes step sizes
_MOST_TAKEN = 16  # ranks


@dataclass(frozen=True)
class Shape:
    """How the kernels work: channels of a lane, lanes of a chunk in a block, chunks of a block, steps of a chunk."""

    columns: int
    lanes: int
    chunks: int
    steps: int
    stage: int = 16
    """Steps that are in shared memory at once, twice."""
    group: int = 4
    """Steps whose results are asked for together; divides ``stage``."""
    resident: int = 2
    """Blocks of a multiprocessor, what registers are limited for."""
    segments: int = 32
    """Of all groups of chunks, in ``scan_carry``: a power of two, at most 64."""
    both: bool = False
    """A block makes results of both directions of a path at once, by twice the threads: if all paths have two, and
    results of their own or there is one, and ``stage`` is ``steps``."""
    held: int = 0
    """So many groups of a segment are kept in registers, if none has more; 0: all are read twice."""

    @property
    def level(self) -> int:
        """Values of a level of the step sizes' table, as in the source."""
        return up(self.columns * self.lanes * 2, 32)


@dataclass(frozen=True)
class Case:
    """What a cubin is compiled for."""

    shape: Shape
    states: int
    rank: int
    quantized: bool
    levels: int
    """Of step sizes that are looked up; 0 for none."""
    ladder: int
    """1: rates are evenly spaced; 2: multiples of the first; 0: neither."""
    softplus: bool
    full: bool = True
    """Whether blocks of ``scan_out`` fill all multiprocessors. Few of them, let in early, would be spread unevenly."""
    carried: bool = True
    """Whether ``scan_carry`` is between ``scan_ends`` and ``scan_out``."""

    def source(self) -> str:
        """The text to compile: definitions and the kernels."""
        s = self.shape
        values = {
            "STATES": self.states,
            "RANK": self.rank,
            "CT": s.columns,
            "LANES": s.lanes,
            "CHUNKS": s.chunks,
            "STAGE": s.stage,
            "GROUP": s.group,
            "RESIDENT": s.resident,
            "SEGMENTS": s.segments,
            "BOTH": int(s.both),
            "HELD": s.held,
            "QUANT": int(self.quantized),
            "TABLE": self.levels,
            "LADDER": self.ladder,
            "SOFTPLUS": int(self.softplus),
            "TAKEN": self.taken,
            "STEPS_RESIDENT": self.steps_resident,
            "FULL": int(self.full),
            "CARRIED": int(self.carried),
        }
        return nvrtc.specialised(
            "deployed_cuda/steps deployed_cuda/scan_params deployed_cuda/scan", *values.items()
        )

    @property
    def taken(self) -> int:
        """Channels of a thread of ``scan_steps``: as many as there are registers for."""
        return _TAKEN if self.quantized and self.rank <= _MOST_TAKEN else 4

    @property
    def steps_at_once(self) -> int:
        """Pixels that a thread of ``scan_steps`` reads together, as in the source."""
        return 4 if self.rank <= _MOST_TAKEN else 2

    @property
    def steps_resident(self) -> int:
        """Blocks of a multiprocessor in ``scan_steps``, what registers are limited for."""
        return 2 if self.rank > 24 else 4 if self.rank <= 4 else 3

    @property
    def threads(self) -> int:
        """Of a block, where it makes results of both directions at once of half a block."""
        return up(self.shape.lanes * self.shape.chunks, 32)

    @property
    def columns(self) -> int:
        """States of channels of a block of ``scan_carry``."""
        return max(16, 256 // self.shape.segments)

    def shared(self, out: bool) -> int:
        """Bytes of shared memory of a block."""
        return _shared(self.shape, self.states, self.quantized, self.levels, out)


def _shared(shape: Shape, states: int, quantized: bool, levels: int, out: bool) -> int:
    """Bytes of shared memory of a block, as the source lays it out."""
    channels = shape.lanes * shape.columns
    values = up(2 * states if out else states, 4)
    record = up(channels, 16) + up(channels * (1 if quantized else 4), 16) + up(4 * -(-states // 2), 16)
    walking = shape.chunks * shape.stage * (4 * values + 2 * (record + 16)) + 4 * levels * shape.level
    if out and shape.both:
        return 2 * (up(walking, 16) + 4 * shape.chunks * shape.stage * channels)
    return up(max(walking, 0 if out else 4 * shape.chunks * (states + 1) * channels), 16)


@functools.cache
def _source(case: Case | TileCase) -> str:
    return case.source()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def choose(
    batch: int,
    pixels: int,
    channels: int,
    states: int,
    walks: int,
    processors: int,
    quantized: bool = True,
    levels: int = MOST_LEVELS,
) -> Shape:
    """Any shape is right, this one should be fast: whole warps, and enough blocks for each multiprocessor.

    Measured on an H200: more blocks hide more of what they wait for, but chunks of few steps cost more than that; of
    short paths of many samples chunks cost more than they gain; small images want more and smaller blocks. Of few
    states memory is what takes the time: on the way back the results of a chunk have to be in the cache still.

    Args:
        walks: Paths that are walked at once.
        quantized, levels: Whether step sizes are, and of how many levels they are looked up.
    """

    def fits(lanes: int, chunks: int) -> bool:
        shape = Shape(columns, lanes, chunks, stage, stage, both=both)
        return all(_shared(shape, states, quantized, levels, out) <= MOST_SHARED for out in (False, True))

    columns, both = 1 if channels % 2 else 2, False
    every = channels // columns
    few = states <= _FEW_STATES
    resident, stage = 4 if few else 2, 16
    whole = pixels <= _SHORT and batch * walks * every >= 32 * _FEW_WARPS * processors
    blocks = -(-every // (_MOST_LANES // 2 if whole else _MOST_LANES))
    unit = COPIED // columns
    lanes = every if blocks == 1 else up(-(-every // blocks), unit)
    while lanes > unit and not fits(lanes, 1):
        blocks += 1
        lanes = up(-(-every // blocks), unit)
    if whole:
        group = 16 if few else 8
        return Shape(columns, lanes, 1, up(pixels, stage), stage, group, resident=resident, segments=1)

    def fill(count: int) -> tuple[float, int]:
        used = lanes * count
        return used / (-(-used // 32) * 32), used

    most = next(n for n in range(max(1, _THREADS // lanes), 0, -1) if n == 1 or fits(lanes, n))
    chunks = max(range(1, most + 1), key=fill)
    work = batch * blocks * pixels * walks
    wanted = 6 * resident if few else resident  # blocks of a multiprocessor
    while wanted > 1 and work // (wanted * processors * chunks) < _FEW_STEPS[few]:
        wanted //= 2
    steps = work // (wanted * processors * chunks)
    steps = max(1, min(-(-steps // stage), -(-pixels // stage))) * stage
    parts = -(-pixels // steps)
    chunks = max(1, min(chunks, -(-batch * blocks * walks * parts // processors), parts))
    threads = batch * blocks * walks * parts * lanes
    if columns == 2 and not few and threads < _SMALL * processors and 2 * lanes <= _SMALL_BLOCK:
        columns, lanes, resident, both = 1, 2 * lanes, 4, steps == stage
        both = both and fits(lanes, 1)
        chunks = next(n for n in range(min(chunks, _SMALL_BLOCK // lanes), 0, -1) if n == 1 or fits(lanes, n))
    segments = 1
    groups = -(-parts // chunks)
    while segments < min(64, groups / _FEW_GROUPS):
        segments *= 2
    held = next((n for n in _HELD if n * segments >= groups), 0)
    group = 8 if few else 4
    return Shape(columns, lanes, chunks, steps, stage, group, resident, segments, both=both, held=held)


@dataclass(frozen=True, eq=False)
class Steps:
    """Weights of step sizes as kernels want them, and what is made of them: codes (pixels, directions, row)."""

    weights: Tensor
    affine: Tensor
    rank: int
    states: int
    directions: int
    row: int
    qmin: int
    qmax: int

    @property
    def words(self) -> int:
        """Of a direction's low rank, of a pixel."""
        return -(-self.rank // 4)


class Scan:
    """Selective scans over an image in K orders, added up at their pixels, of codes that ``cuda.Core.encode`` makes.

    ``size``: samples, pixels and channels. Codes are as ``arrangement`` says.

    ``apart``: results of each path of its own, in front of all axes: more is done at once.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        operands: ScanOperands,
        apart: bool = False,
        shape: Shape | Tiles | None = None,
    ) -> None:
        batch, pixels, channels = size
        o, states, device = operands, operands.a.shape[1], operands.a.device
        directions = len(o.order)
        row = directions * len(arrangement(o.ranks, states, (0, 0, 0))) // 4
        refused = f"deployed: {batch} samples of {pixels} pixels are more than the kernels for GPUs count: use tiles"
        if pixels * max(channels + 16, row) >= _MOST or batch * pixels >= _MOST:
            raise InputError(refused)
        self.size, self.device, self.apart = size, device, apart
        self.paths, ways = paths_of(o.order)
        self.at_once = len(self.paths) if apart else 1
        processors = _processors(device)
        ladder, rates = rates_of(o.a, directions)
        kind = o.ranks, o.of_delta is not None, levels_of(o)
        sizes = batch, pixels, channels, states, self.at_once, processors
        if shape is None and cuda_scan_tiles.takes(self.paths, self.at_once):
            shape = cuda_scan_tiles.choose(*sizes, *kind, up(row, 4))
        if shape is None:
            shape = choose(*sizes, *kind[1:])
        width = shape.lanes * shape.columns
        self.blocks = -(-channels // width)
        if self.blocks > 1 and width % COPIED:
            raise InputError(f"a block of {width} channels: {COPIED} are copied at once")
        if batch * directions * (1 if isinstance(shape, Tiles) else self.blocks) > _MOST_BLOCKS:
            raise InputError(refused)
        self.chunks = -(-pixels // shape.steps)
        made, room = self.at_once * batch * self.blocks, shape.resident * processors
        self.case: Case | TileCase
        if isinstance(shape, Tiles):
            assert cuda_scan_tiles.takes(self.paths, self.at_once)
            both = 1 + (self.paths[0][1] >= 0)
            self.case = TileCase(
                shape, *kind, o.softplus, rates.shape[1], both, up(row, 4), made >= _FULL * room
            )
        else:
            both = shape.both and shape.steps == shape.stage and all(back >= 0 for _, back in self.paths)
            shape = replace(shape, both=both and self.at_once == len(self.paths))
            self.groups = -(-self.chunks // shape.chunks)
            full = not shape.both and self.groups * made >= _FULL * room  # of small images it takes longer
            self.case = Case(shape, states, *kind, ladder, o.softplus, full, self.groups > 1)
            if 8 * self.case.steps_at_once * up(row, 4) > MOST_SHARED:  # of one pixel for each thread, twice
                raise InputError(
                    f"deployed: scans in {directions} directions are more than the kernels for GPUs take"
                )
            assert not shape.held or shape.held * shape.segments >= self.groups
        self._kept = {
            "order": o.order.contiguous(),
            "ways": torch.tensor(ways, dtype=torch.int32, device=device),
            "paths": torch.tensor(self.paths, dtype=torch.int32, device=device),
            **tensors_of(o, channels, rates, shape.lanes, shape.columns, shape.level),
        }
        self._params = Params(
            **{n: t.data_ptr() for n, t in self._kept.items()},
            batch=batch, pixels=pixels, channels=channels, blocks=self.blocks, chunks=self.chunks, chunk=shape.steps,
            directions=directions,
            qmin=0 if o.of_delta is None else o.of_delta.qmin, qmax=0 if o.of_delta is None else o.of_delta.qmax,
        )  # fmt: skip

    def steps(self) -> Steps | None:
        """What another kernel makes codes of step sizes of; None where ``scan_steps`` has to."""
        case, kept = self.case, self._kept
        if isinstance(case, TileCase) or not case.quantized or case.taken != _TAKEN:
            return None
        row = up(self.size[2], COPIED)
        grid = self._params.qmin, self._params.qmax
        return Steps(kept["words"], kept["affine"], case.rank, case.states, len(kept["order"]), row, *grid)

    def __call__(self, u: Tensor, codes: Tensor, bad: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(B, L, D), float32, of (B * L, columns), (B * L, width) and (B * L,), all uint8; ``apart``: (P, B, L, D).

        ``sizes``: codes of step sizes, (B * L, K, row) of ``steps``, if they have been made. ``u`` is copied where its
        rows do not begin at multiples of 16 bytes.
        """
        row = u.stride(0)
        if row % COPIED or row < self.size[2] or u.data_ptr() % COPIED:
            u = F.pad(u, (0, -u.shape[1] % COPIED))
        size = (len(self.paths), *self.size) if self.apart else self.size
        y = torch.empty(size, dtype=torch.float32, device=self.device)
        params = Params.from_buffer_copy(self._params)
        params.u, params.codes, params.bad, params.y = (t.data_ptr() for t in (u, codes, bad, y))
        params.u_row, params.row = u.stride(0), codes.shape[1] // 4
        if y.numel():
            with torch.cuda.device_of(y):
                self._run(params, sizes)
        return y

    def _run(self, params: Params, sizes: Tensor | None) -> None:
        batch, pixels, channels = self.size
        case, directions, device = self.case, len(self._kept["order"]), self.device
        launch = functools.partial(nvrtc.load(_source(case), device).launch, early=True)
        params.part = batch * pixels * channels if self.apart else 0
        if isinstance(case, TileCase):
            assert params.row == case.row
            grid = self.blocks, self.at_once * batch
            launch("scan_tiles", grid, case.threads, case.shared(pixels), params, device)
            return
        groups = self.groups
        params.size_row = up(channels * (1 if case.quantized else 4), COPIED)
        if sizes is None:
            sizes = self._make_sizes(case, launch, params)
        params.sizes = sizes.data_ptr()
        params.groups = groups
        if self.chunks > 1:
            # Of chunks, what comes before them in their group, and of groups: states and times.
            counts = self.chunks if case.shape.chunks > 1 else 0, groups
            sizes_of = [directions * batch * n * channels * each for n in counts for each in (case.states, 1)]
            ends = torch.empty(sum(sizes_of), device=device)
            parts = ends.split(sizes_of)
            params.befores, params.times, params.ends, params.totals = (t.data_ptr() for t in parts)
            grid = groups, directions * batch * self.blocks
            launch("scan_ends", grid, case.threads, case.shared(False), params, device)
        if groups > 1:
            threads = case.columns * case.shape.segments
            grid = -(-case.states * channels // case.columns), directions * batch
            launch("scan_carry", grid, threads, 8 * threads, params, device)
        for first in range(0, len(self.paths), self.at_once):
            params.path, params.add = first, int(first > 0)
            grid = groups, self.at_once * batch * self.blocks
            launch("scan_out", grid, case.threads * (1 + case.shape.both), case.shared(True), params, device)

    def _make_sizes(self, case: Case, launch: Callable[..., None], params: Params) -> Tensor:
        """By ``scan_steps``: each block has some of the columns of all directions, and a stretch of pixels."""
        count = self.size[0] * self.size[1]
        directions = len(self._kept["order"])
        sizes = torch.empty(count * directions * params.size_row, dtype=torch.uint8, device=self.device)
        params.sizes = sizes.data_ptr()
        columns = directions * params.size_row // (case.taken * (1 if case.quantized else 4))
        across = -(-columns // _STEPS_THREADS)
        lanes = -(-columns // across)
        rows = max(1, min(_STEPS_THREADS // lanes, _STEPS_SHARED // (4 * params.row * case.steps_at_once)))
        unit = rows * case.steps_at_once
        most = max(1, case.steps_resident * _processors(self.device) // across)
        stretch = up(-(-count // most), unit)
        tile = unit * max(1, min(_STEPS_SHARED // (4 * params.row * unit), stretch // unit, 4))
        params.lanes, params.rows, params.tile, params.stretch = lanes, rows, tile, stretch
        threads, shared = up(lanes * rows, 32), 8 * tile * params.row
        launch("scan_steps", (-(-count // stretch), across), threads, shared, params, self.device)
        return sizes
