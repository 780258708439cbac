"""PTS: a static range for every position of a token, learnt (PTQ4VM, arXiv 2412.20386).

    u = clip((x + beta[p]) / alpha[p], 0, 2**bits - 1),    y = alpha[p] * round(u) - beta[p]

with p the position of an element along the axes that are neither samples nor channels: the index in a sequence, row and
column of an image. Codes and gradients are LSQ's, every position a group.

The published quantizer has as many positions as the calibration has tokens, and no other resolution runs. Here ranges
are a table of at most ``positions`` cells. Calibration data of that many positions or fewer fill a cell each, exactly
as published; of larger ones neighbours share a cell. A call whose sizes are not the table's interpolates it linearly
along each axis (steps and shifts, at the centres of pixels). A sequence is one axis: where it is an image row by row,
or has a cls token in it, positions of another resolution are other places of the picture, which this quantizer cannot
know. Its ranges are then a guess; calibrate at the resolution that will be used.

Departures from the published code: the zero point is not rounded (no kernel here needs a code for 0) and is learnt;
ranges need not hold 0; the search tries the whole range, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import CalibrationError, ConfigError, InputError
from ssmquant.quantizers.affine import Affine, affine_decode, affine_index, compute_dtype
from ssmquant.quantizers.base import Quantizer
from ssmquant.quantizers.lsq import _LSQFunction, _StraightFloor
from ssmquant.quantizers.observers import GroupStats, group_rows

__all__ = ["PTS", "PositionSample", "interpolated", "shared_grid"]

_MOST_POSITIONS = 2**14
_COLUMNS = 64
"""Elements of a cell, but for its extremes, that calibration keeps of one batch."""
_PICKS = 128
"""Of all batches."""
_RATIOS = 100
_POWER = 2.4
"""Of an error, in the search: as published."""
_MODES = ("linear", "bilinear", "trilinear")


def shared_grid(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """Cells along each axis for positions of these sizes: one each, if there are at most ``most``, else fewer.

    The largest axes are cut to the same length first.
    """
    if math.prod(sizes) <= most:
        return tuple(sizes)
    low, high = 1, max(sizes)  # the longest length that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        fits = math.prod(min(s, middle) for s in sizes) <= most
        low, high = (middle, high) if fits else (low, middle)
    return tuple(min(s, low) for s in sizes)


def interpolated(table: Tensor, sizes: Sequence[int]) -> Tensor:
    """A table of values at the centres of cells, one to three axes, for positions of other sizes; ends go on flat."""
    if tuple(sizes) == tuple(table.shape):
        return table
    mode = _MODES[table.dim() - 1]
    return F.interpolate(table[None, None], tuple(sizes), mode=mode, align_corners=False)[0, 0]


def _largest(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``(columns, *sizes)`` to ``(columns, *grid)``: the maxima of cells, which overlap where sizes do not divide."""
    if tuple(x.shape[1:]) == grid:
        return x
    pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(grid) - 1]
    out: Tensor = pool(x[None], grid)[0]
    return out


def _central(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``(columns, *sizes)`` to ``(columns, *grid)``: the element in the middle of each cell."""
    for axis, (n, g) in enumerate(zip(x.shape[1:], grid, strict=True), 1):
        if n != g:
            x = x.index_select(axis, ((torch.arange(g, device=x.device) + 0.5) * (n / g)).long())
    return x


@dataclass(frozen=True, eq=False)
class PositionSample:
    """What calibration keeps of one batch: for each column of a cell its extremes, and an element in between.

    ``low``, ``high``, ``picks``: ``(columns, *grid)``; a column is a channel, or a part of all elements of a cell.
    ``share``: how many elements a column of a cell stands for.
    """

    low: Tensor
    high: Tensor
    picks: Tensor
    share: float

    def any(self) -> Tensor:
        """Whether one element is not 0."""
        return self.low.any() | self.high.any()

    def scaled(self, gain: Tensor) -> PositionSample:
        """That of values times positive factors of the channels, which are the columns."""
        factor = gain.to(self.low.dtype).reshape(-1, *[1] * (self.low.dim() - 1))
        return PositionSample(self.low * factor, self.high * factor, self.picks * factor, self.share)

    def on(self, grid: tuple[int, ...]) -> PositionSample:
        """That of fewer cells along some axes."""
        old, new = math.prod(self.low.shape[1:]), math.prod(grid)
        low, high = -_largest(-self.low, grid), _largest(self.high, grid)
        return PositionSample(low, high, _central(self.picks, grid), self.share * old / new)

    def fewer(self, columns: int) -> PositionSample:
        """That of so many columns, at most."""
        n = len(self.low)
        if n <= columns:
            return self
        low = torch.stack([c.amin(0) for c in self.low.tensor_split(columns)])
        high = torch.stack([c.amax(0) for c in self.high.tensor_split(columns)])
        picks = torch.stack([c[i % len(c)] for i, c in enumerate(self.picks.tensor_split(columns))])
        return PositionSample(low, high, picks, self.share * n / columns)


class PTS(Quantizer):
    """Static range of each position; see the module's docstring and :class:`Quantizer` for the arguments.

    Parameters ``alpha`` and ``beta``, shape ``(positions,)``: of the cells in use, first axis slowest, then what is
    idle. Buffer ``grid``, shape ``(len(position_axes),)``: cells along each axis, floats. Without axes of positions
    it is one range for the whole tensor, with ``axis`` and ``num_groups`` > 1 one for each group.

    Args:
        position_axes: the axes that positions are numbered along, at most three.
        positions: the most cells, 1 to 16384: of a sequence so many, of an image their square root along each axis.

    Raises:
        ConfigError: an argument is out of range.
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    grid: Tensor

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
        position_axes: Sequence[int] = (),
        positions: int = 256,
    ) -> None:
        super().__init__(bits, official=official, axis=axis, num_groups=num_groups, is_weight=is_weight)
        if (
            isinstance(positions, bool)
            or not isinstance(positions, int)
            or not 1 <= positions <= _MOST_POSITIONS
        ):
            raise ConfigError(f"positions={positions!r}: expected a whole number from 1 to {_MOST_POSITIONS}")
        axes = tuple(position_axes)
        if len(axes) > 3 or len(set(axes)) < len(axes) or (axes and num_groups > 1):
            raise ConfigError(
                f"position_axes={position_axes!r}: expected at most three axes, each once, and no groups"
            )
        self.position_axes = axes
        self.positions = positions if axes else num_groups
        self._grid = (1,) * len(axes) if axes else (num_groups,)
        if self.bits is not None:
            self.alpha = nn.Parameter(torch.ones(self.positions))
            self.beta = nn.Parameter(torch.zeros(self.positions))
            if axes:
                self.register_buffer("grid", torch.ones(len(axes)))

    @property
    def elementwise(self) -> bool:
        return not self.position_axes

    @property
    def is_signed(self) -> bool:
        return False

    def static_affine(self) -> Affine | None:
        return None if self.position_axes else self._own_affine()

    def constants(self) -> tuple[Any, ...]:
        return *super().constants(), self.position_axes, self._grid

    # ---- the table -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _set_grid(self, grid: tuple[int, ...]) -> None:
        if self.position_axes:
            self._grid = grid
            self.grid.copy_(self.grid.new_tensor(grid))

    def _sync_flags(self) -> None:
        super()._sync_flags()
        if self.bits is not None and self.position_axes and not self.grid.is_meta:
            sizes: list[float] = self.grid.double().tolist()
            valid = all(math.isfinite(s) and 0.5 < s < _MOST_POSITIONS + 0.5 for s in sizes)
            grid = tuple(round(s) for s in sizes) if valid else ()
            if not valid or math.prod(grid) > self.positions:
                raise InputError(f"a table of {self.positions} positions cannot be a grid of {sizes}")
            self._grid = grid

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except InputError as e:
            args[-1].append(f"{prefix}grid: {e}")  # the messages that load_state_dict raises

    def _axes(self, x: Tensor) -> tuple[int, ...]:
        """The axes that cells are along, from 0."""
        if not self.position_axes:
            if self.num_groups == 1:
                return ()
            group_rows(x, self.axis, self.num_groups)  # raises where they do not fit
            return (self.axis % x.dim(),) if self.axis is not None else ()
        n = x.dim()
        if not all(-n <= a < n for a in self.position_axes) or len({a % n for a in self.position_axes}) < len(
            self.position_axes
        ):
            raise InputError(
                f"the quantizer 'pts' has its positions in axes {self.position_axes}, which a tensor of shape "
                f"{tuple(x.shape)} does not have"
            )
        return tuple(a % n for a in self.position_axes)

    def _scale_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (floored, straight gradient) and shifts in the compute dtype, broadcastable to ``x``."""
        cd = compute_dtype(x, self.alpha)
        axes = self._axes(x)
        cells = math.prod(self._grid)
        shape = [x.shape[d] if d in axes else 1 for d in range(x.dim())] if axes else []
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        out = []
        for table in (self.alpha, self.beta):
            values = table[:cells].to(cd)
            if axes:
                values = interpolated(values.reshape(self._grid), [x.shape[a] for a in axes]).permute(order)
            out.append(values.reshape(shape))
        return _StraightFloor.apply(out[0], self.eps), out[1]

    def _affine(self, x: Tensor) -> Affine:
        return Affine(*self._scale_shift(x))

    def _quantize(self, x: Tensor) -> Tensor:
        out: Tensor = _LSQFunction.apply(
            x, *self._scale_shift(x), self.qmin, self.qmax, self._axes(x), int(self.scale_gradient)
        )
        return out

    def _quantize_copies(self, x: Tensor, copies: int) -> Tensor:
        counted = copies if self.scale_gradient else 0
        out: Tensor = _LSQFunction.apply(
            x, *self._scale_shift(x), self.qmin, self.qmax, self._axes(x), counted
        )
        return out

    # ---- initialisation ------------------------------------------------------------------------------------------
    def _columns(self, x: Tensor, channel_axis: int | None) -> tuple[Tensor, int]:
        """``x`` as ``(elements, *sizes)``, and how many channels follow each other in the first axis."""
        axes = self._axes(x)
        channels = [] if channel_axis is None else [channel_axis % x.dim()]
        rest = [d for d in range(x.dim()) if d not in axes and d not in channels]
        count = x.shape[channels[0]] if channels else 1
        sizes = [x.shape[a] for a in axes] if axes else [1]
        moved = x.detach().to(compute_dtype(x)).permute((*rest, *channels, *axes))
        return moved.reshape(x.numel() // max(math.prod(sizes), 1), *sizes), count

    def sample(self, x: Tensor, channel_axis: int | None = None) -> PositionSample:
        """What :meth:`fit` needs of a batch, small however large that is.

        Args:
            x: float tensor, not empty.
            channel_axis: keep channels apart, so that they may get factors later.
        """
        columns, channels = self._columns(x, channel_axis)
        grid = shared_grid(columns.shape[1:], self.positions)
        all_of = PositionSample(columns, columns, columns, 1.0).on(grid)
        if channel_axis is None:
            few = all_of.fewer(_COLUMNS)
            # Views of a value that the model may write to later would change.
            return PositionSample(few.low.clone(), few.high.clone(), few.picks.clone(), few.share)
        low, high, picks = (t.unflatten(0, (-1, channels)) for t in (all_of.low, all_of.high, all_of.picks))
        n = len(low)
        each = torch.arange(channels, device=x.device)
        return PositionSample(low.amin(0), high.amax(0), picks[each % n, each], all_of.share * n)

    @torch.no_grad()
    def initialize(self, x: Tensor, *, reduce: bool = False) -> None:
        if self.bits is None:
            return
        columns, _ = self._columns(self._merged(x), None)
        several = reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        sizes = columns.shape[1:]
        if several and self.position_axes:  # the smallest sizes; an empty tensor has none
            common = torch.tensor([s if columns.numel() else 2**31 for s in sizes], device=x.device)
            dist.all_reduce(common, op=dist.ReduceOp.MIN)
            sizes = torch.Size(common.tolist())
        grid = shared_grid(sizes, self.positions)
        if columns.numel():
            low, high = -_largest(-columns, grid).amax(0), _largest(columns, grid).amax(0)
        elif several:
            low = columns.new_full(grid, torch.inf)
            high = -low
        else:
            return
        if several:
            ends = torch.stack((low, -high))
            dist.all_reduce(ends, op=dist.ReduceOp.MIN)
            low, high = ends[0], -ends[1]
            if bool((low == torch.inf).all()):  # empty everywhere
                return
        self._start(low, high)

    def _start(self, low: Tensor, high: Tensor) -> bool:
        """Takes the extremes of cells, ``(*grid)`` each, as ends; False where all are 0, which says nothing."""
        magnitude = torch.maximum(low.abs(), high.abs())
        GroupStats(magnitude, low, high, 1).require_finite(type(self).__name__)
        if not bool((magnitude > 0).any()):
            return False
        self._set_grid(tuple(low.shape))
        self._set_ends(low.flatten(), high.flatten())
        self._set_flag("initialized", True)
        return True

    def _set_ends(self, low: Tensor, high: Tensor) -> None:
        alpha = (high - low) / (self.qmax - self.qmin)
        beta = -low
        flat = alpha <= 0
        if bool(flat.any()) and not bool(flat.all()):
            # Of a cell of one value the step is not known: the others' average, a code in the middle for the value.
            usual = alpha[~flat].mean()
            alpha = torch.where(flat, usual, alpha)
            beta = torch.where(flat, usual * (self.qmax // 2) - low, beta)
        cells = len(alpha)
        self._reset_state(keep_grid=True)
        self.alpha[:cells] = alpha.clamp(min=self.eps).to(self.alpha.dtype)
        self.beta[:cells] = beta.to(self.beta.dtype)

    @torch.no_grad()
    def _reset_state(self, *, keep_grid: bool = False) -> None:
        self.alpha.fill_(1.0)
        self.beta.zero_()
        if not keep_grid:
            self._set_grid((1,) * len(self.position_axes))

    # ---- calibration ---------------------------------------------------------------------------------------------
    @torch.no_grad()
    def fit(self, batches: Sequence[Tensor | PositionSample], *, search: bool = True) -> None:
        """Calibrate, as :meth:`Quantizer.fit` does, by errors to the power 2.4; batches may be :meth:`sample` s."""
        if self.bits is None:
            return
        samples = [
            b if isinstance(b, PositionSample) else self.sample(self._merged(b))
            for b in batches
            if isinstance(b, PositionSample) or b.numel()
        ]
        if not samples:
            raise CalibrationError(f"{type(self).__name__}.fit needs at least one batch that is not empty")
        grid = shared_grid(
            [min(s) for s in zip(*(s.low.shape[1:] for s in samples), strict=True)], self.positions
        )
        samples = [s.on(grid) for s in samples]
        columns = min(_COLUMNS, *(len(s.low) for s in samples))
        samples = [s.fewer(columns) for s in samples]
        low = torch.stack([s.low for s in samples]).amin(0).flatten(1)
        high = torch.stack([s.high for s in samples]).amax(0).flatten(1)
        if self._start(low.amin(0).reshape(grid), high.amax(0).reshape(grid)) and search:
            picks = torch.cat([s.picks for s in samples]).flatten(1)
            picks = picks[:: -(-len(picks) // _PICKS)]
            count = sum(s.share for s in samples)
            ends = min(1.0, count / 2)
            inner = max(0.0, count - 2) * columns / len(picks)
            weights = torch.tensor(
                [ends] * 2 * columns + [inner] * len(picks), dtype=low.dtype, device=low.device
            )
            self._search(torch.cat((low, high, picks)), weights[:, None])

    def _search(self, points: Tensor, weights: Tensor) -> None:
        """Narrows each cell's range about its middle: points ``(elements, cells)``, weights ``(elements, 1)``."""
        low, high = points.aminmax(dim=0)
        middle, half, levels = (low + high) / 2, (high - low) / 2, self.qmax - self.qmin
        best, error = torch.ones_like(half), torch.full_like(half, torch.inf)
        for k in range(_RATIOS, 0, -1):
            reach = half * (k / _RATIOS)
            alpha, beta = (2 * reach / levels).clamp(min=self.eps), reach - middle
            y = affine_decode(affine_index(points, alpha, beta, 0, levels), Affine(alpha, beta), 0)
            now = (y.sub_(points).abs_().pow_(_POWER) * weights).sum(0)
            better = now < error
            best, error = torch.where(better, k / _RATIOS, best), torch.where(better, now, error)
        self._set_ends(middle - half * best, middle + half * best)

    def extra_repr(self) -> str:
        axes = f", position_axes={self.position_axes}, positions={self.positions}"
        return super().extra_repr() + axes * (self.bits is not None and bool(self.position_axes))
