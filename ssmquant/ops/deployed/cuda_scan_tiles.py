"""Scans of one state on a GPU: what ``csrc/deployed_cuda/scan_tiles.cu`` is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from ssmquant.ops import nvrtc
from ssmquant.ops.deployed.cuda_scan_operands import MOST_SHARED, up

__all__ = ["TileCase", "Tiles", "choose", "takes"]

_FILES = " ".join(f"deployed_cuda/{name}" for name in ("steps", "scan_params", "scan_tiles"))
_LANES = 8  # of a warp, that have steps of their own
_LEAST = 96  # steps of a path
_LONG = 14  # steps of a lane, of paths of several tiles
_LONGEST = 25  # for which there are registers
_FEW = 1, 1.5  # blocks of a multiprocessor: of paths of one tile, of several
_WIDTHS = 6, 4  # warps


def _apart(size: int, unit: int) -> int:
    """So many bytes, or a little more, that neighbours are in different banks, as in the source."""
    return size if size // unit % 2 else size + unit


@dataclass(frozen=True)
class Tiles:
    """How a block works: warps, of 8 channels each, and steps of a lane, of which 8 have a tile."""

    warps: int
    run: int
    resident: int = 2
    """Blocks of a multiprocessor, what registers are limited for."""

    @property
    def lanes(self) -> int:
        """That have channels of their own."""
        return 4 * self.warps

    @property
    def columns(self) -> int:
        """Channels of a lane."""
        return 2

    @property
    def level(self) -> int:
        """Values of a level of the step sizes' table, as in the source."""
        return up(4 * self.lanes, 32) + 8

    @property
    def steps(self) -> int:
        """Of a tile."""
        return _LANES * self.run


@dataclass(frozen=True)
class TileCase:
    """What a cubin is compiled for."""

    tiles: Tiles
    rank: int
    quantized: bool
    levels: int
    """Of step sizes that are looked up; 0 for none."""
    softplus: bool
    rates: int
    """Rows of rates of a direction."""
    directions: int
    """Of a path."""
    row: int
    """Words of a pixel's codes."""
    full: bool
    """Whether blocks fill all multiprocessors: see ``cuda_scan.Case``."""

    def source(self) -> str:
        """The text to compile: definitions and the kernel."""
        t = self.tiles
        values = {
            "WARPS": t.warps,
            "RUN": t.run,
            "RESIDENT": t.resident,
            "DIRECTIONS": self.directions,
            "ROW": self.row,
            "TABLE": self.levels,
            "RATES": self.rates,
            "RANK": self.rank,
            "QUANT": int(self.quantized),
            "SOFTPLUS": int(self.softplus),
            "FULL": int(self.full),
        }
        return nvrtc.specialised(_FILES, *values.items())

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.tiles.warps

    def shared(self, pixels: int) -> int:
        """Bytes of shared memory of a block, as the source lays it out."""
        t, d = self.tiles, self.directions
        width = 8 * t.warps
        raw, image = (_apart(t.run * n, 16) for n in (4 * self.row, up(width, 16)))
        size = d * (4 * self.levels * t.level + _LANES * _apart(16 * t.run, 16))
        size += 2 * _LANES * (raw + image + _apart(8 * t.run, 8))
        tiles = -(-pixels // t.steps)
        return size + (4 * tiles * width if d == 2 and tiles > 1 else 0)

    def fits(self, pixels: int) -> bool:
        """Whether a GPU has the shared memory and threads for paths of so many pixels."""
        pieces = up(8 * self.tiles.warps, 16) // 16 + self.row // 4  # that threads copy of a pixel
        return self.shared(pixels) <= MOST_SHARED and 1 << (pieces - 1).bit_length() <= self.threads


def takes(paths: list[tuple[int, int]], at_once: int) -> bool:
    """Whether there is a kernel for paths, pairs of directions, -1 for none, of which so many are walked at once."""
    return at_once == len(paths) and len({back >= 0 for _, back in paths}) == 1


def choose(
    batch: int,
    pixels: int,
    channels: int,
    states: int,
    walks: int,
    processors: int,
    rank: int,
    quantized: bool,
    levels: int,
    row: int,
) -> Tiles | None:
    """Tiles that should be fast; None where scans are not of this kind, or too few are done at once.

    Measured on an H200: a block goes along a whole path, so that there has to be more than one for each multiprocessor;
    fewer have less to do where paths are cut into chunks. One tile for a path, where it fits, spares half of the work.
    """
    if states != 1 or channels % 2 or pixels < _LEAST:
        return None
    one = pixels <= _LANES * _LONGEST
    run = -(-pixels // _LANES) if one else _LONG
    # Of channels that no block has use for there should be few.
    warps = min(_WIDTHS[one:], key=lambda n: up(channels, 8 * n))
    if batch * walks * -(-channels // (8 * warps)) < _FEW[not one] * processors:
        return None
    tiles = Tiles(warps, run, 2 if run > _LONG or warps > 4 else 3)
    return tiles if TileCase(tiles, rank, quantized, levels, True, 2, 2, row, True).fits(pixels) else None
