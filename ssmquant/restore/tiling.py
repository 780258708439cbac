"""Running a restoration model on tensors and pictures of any size, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import ConfigError, InputError, SsmquantError
from ssmquant.graph.runtime import is_prepared
from ssmquant.restore.pictures import normal_mode, pillow, to_image, to_tensor
from ssmquant.restore.ranges import has_dynamic_ranges, with_picture_ranges
from ssmquant.workflow import ensure_traced

if TYPE_CHECKING:
    from PIL import Image

Tile: TypeAlias = int | Literal["auto"] | None
"""Side of a tile in input pixels; None: the whole at once; "auto": see :func:`restore_image`."""
Statistics: TypeAlias = Literal["picture", "tile"]
Progress: TypeAlias = Callable[[int, int], None]

AUTO_TILE = 256
AUTO_WHOLE = 512 * 512
"""Pixels of the largest picture that "auto" does not cut."""
_MIN_SIDE = 16  # smaller pictures are padded up to this: reflections and strided layers need some room
_ROWS = 64  # so many are looked at or rounded at once: temporaries stay small


def model_scale(model: nn.Module) -> int:
    """How many times a zoo model enlarges, as its ``zoo_config`` or ``upscale`` says; 1 if neither does."""
    config = getattr(model, "zoo_config", None)
    arguments = config.get("args", {}) if isinstance(config, dict) else {}
    return int(arguments.get("upscale", getattr(model, "upscale", 1)))


# ---- one call of the model -------------------------------------------------------------------------------------------


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype that the model computes in; a packed model may hold no floating tensor at all."""
    device = torch.device("cpu")
    for tensors in (model.parameters(), model.buffers()):
        for t in tensors:
            device = t.device
            if t.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                return t.device, t.dtype
    return device, torch.float32


def _run(model: Callable[[Tensor], Tensor], x: Tensor, scale: int) -> Tensor:
    """One call: pads ``x`` (B, C, H, W) at the right and bottom up to the smallest side, crops the answer."""
    height, width = x.shape[-2:]
    while (
        x.shape[-2] < _MIN_SIDE or x.shape[-1] < _MIN_SIDE
    ):  # a reflection adds at most side - 1 pixels at a time
        down, right = (max(0, _MIN_SIDE - n) for n in x.shape[-2:])
        mode = "replicate" if 1 in x.shape[-2:] else "reflect"
        x = F.pad(x, (0, min(right, x.shape[-1] - 1 or right), 0, min(down, x.shape[-2] - 1 or down)), mode)
    y = model(x)
    if tuple(y.shape) != (*x.shape[:2], x.shape[2] * scale, x.shape[3] * scale):
        raise ConfigError(f"scale={scale} does not fit the model: {tuple(x.shape)} became {tuple(y.shape)}")
    return y[..., : height * scale, : width * scale]


@torch.no_grad()
def _call(model: nn.Module, x: Tensor, scale: int) -> Tensor:
    """As :func:`_run`, where and in what the model computes: float32 on the CPU, finite."""
    device, dtype = _placement(model)
    y = _run(model, x.to(device, dtype), scale).float().cpu()
    if not torch.isfinite(y).all():
        raise SsmquantError(
            "the model's output holds values that are not finite; is it trained and calibrated?"
        )
    return y


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and quantized models traced at the size of their example.

    One that comes from a file, or from another device, may have no graph yet: to find one at the size of a tile takes
    twice as long, and hundreds of MiB.
    """
    for m in list(model.modules()):
        if is_prepared(m):
            ensure_traced(m)
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for m, flag in modes.items():
            m.training = flag


# ---- tiles -----------------------------------------------------------------------------------------------------------


def check_tile(tile: Tile, overlap: int) -> None:
    """Raises ConfigError for a tile and an overlap with which no picture can be restored."""
    if tile is None:
        return
    if tile != "auto" and (isinstance(tile, bool) or not isinstance(tile, int)):
        raise ConfigError(f"tile is a number of pixels, 'auto', or None for the whole picture; got {tile!r}")
    if overlap < 0 or (tile != "auto" and (tile < _MIN_SIDE or tile < 2 * overlap)):
        raise ConfigError(
            f"a tile is at least {_MIN_SIDE} pixels and twice the overlap; got {tile=}, {overlap=}"
        )


def _side(tile: Tile, overlap: int, height: int, width: int) -> int | None:
    """The side of the tiles of a picture; None if one call sees it all."""
    if tile == "auto":
        tile = None if height * width <= AUTO_WHOLE else max(AUTO_TILE, 2 * overlap)
    return None if tile is None or max(height, width) <= tile else tile


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _parts(size: int, tile: int) -> list[slice]:
    """One side cut into parts of one length, of at most ``tile``; so every pixel counts once, or nearly so.

    Where the length does not divide the side, the last part begins in the one before.
    """
    count = -(-size // tile)
    length = min(size, max(_MIN_SIDE, -(-size // count)))
    return [slice(start, start + length) for start in (min(i * length, size - length) for i in range(count))]


def _ramp(start: int, length: int, size: int, overlap: int) -> Tensor:
    """Blending weights along one side: 0 in the outer quarter of an inner overlap, then linear, 1 inside."""
    margin = overlap // 4
    slope = max(1, overlap - 2 * margin)
    at = torch.arange(length, dtype=torch.float32)
    weight = torch.ones(length)
    if overlap and start > 0:
        weight = torch.minimum(weight, ((at - margin + 0.5) / slope).clamp(0, 1))
    if overlap and start + length < size:
        weight = torch.minimum(weight, ((length - 1 - at - margin + 0.5) / slope).clamp(0, 1))
    return weight


def _blend(size: int, tile: int, overlap: int) -> list[tuple[int, Tensor]]:
    """Where tiles begin along one side, and their weights, which add up to 1 at every pixel."""
    length = min(size, tile)
    ramps = [(start, _ramp(start, length, size, overlap)) for start in _starts(size, tile, overlap)]
    total = torch.zeros(size)
    for start, ramp in ramps:
        total[start : start + length] += ramp
    return [(start, ramp / total[start : start + length]) for start, ramp in ramps]


Source: TypeAlias = Callable[[slice, slice], Tensor]
"""The pixels of some rows and columns: (B, 3, rows, columns)."""


def _source(x: Tensor) -> Source:
    return lambda rows, columns: x[..., rows, columns]


class _Steps:
    """Counts calls of the model for whoever wants to see progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        if progress is not None:
            progress(0, total)

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Plan:
    """How a picture of ``size`` (height, width) is restored: in one call, or in tiles, after a pass for statistics."""

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        scale: int,
        tile: Tile,
        overlap: int,
        statistics: Statistics,
    ) -> None:
        check_tile(tile, overlap)
        if statistics not in ("picture", "tile"):
            raise ConfigError(f"statistics come from the 'picture' or the 'tile', not {statistics!r}")
        if scale < 1:
            raise ConfigError(f"a scale is 1 or more, not {scale}")
        self.model, self.size, self.scale, self.overlap = model, size, scale, overlap
        self.tile = _side(tile, overlap, *size)
        self.parts: list[tuple[slice, slice]] = []
        if self.tile is None:
            self.calls = 1
            return
        if statistics == "picture" and has_dynamic_ranges(model):
            down, right = (_parts(n, self.tile) for n in size)
            self.parts = [(rows, columns) for rows in down for columns in right]
        rows, columns = (len(_starts(n, self.tile, overlap)) for n in size)
        self.calls = len(self.parts) + rows * columns

    def bands(self, source: Source, step: Callable[[], None]) -> Iterator[Tensor]:
        """The restored picture from top to bottom, as (B, C, rows, scale * width) float32 on the CPU.

        Only the rows that one row of tiles covers are held. What is yielded is overwritten when the next is asked for.
        """
        height, width = self.size
        if self.tile is None:
            whole = _call(self.model, source(slice(0, height), slice(0, width)), self.scale)
            step()
            yield whole
            return
        model = self.model
        if self.parts:

            def visit(copy: nn.Module) -> None:
                for part in self.parts:
                    _call(copy, source(*part), self.scale)
                    step()

            model = with_picture_ranges(model, visit)
        yield from self._tiles(model, source, step)

    def _tiles(self, model: nn.Module, source: Source, step: Callable[[], None]) -> Iterator[Tensor]:
        assert self.tile is not None
        scale = self.scale
        height, width = (n * scale for n in self.size)
        down, right = (_blend(n, self.tile * scale, self.overlap * scale) for n in (height, width))
        ends = [*(top for top, _ in down[1:]), height]  # no later tile reaches above the next one's top
        band: Tensor | None = None
        for (top, by_row), end in zip(down, ends, strict=True):
            for left, by_column in right:
                corners = ((top, top + len(by_row)), (left, left + len(by_column)))
                part = _call(model, source(*(slice(a // scale, b // scale) for a, b in corners)), scale)
                if band is None:
                    band = part.new_zeros(*part.shape[:2], len(by_row), width)
                band[..., left : left + len(by_column)].addcmul_(part, by_row[:, None] * by_column)
                step()
            assert band is not None
            yield band[..., : end - top, :]
            kept = band[..., end - top :, :].clone()
            band.zero_()[..., : kept.shape[-2], :] = kept


def restore_tensor(
    model: nn.Module,
    x: Tensor,
    scale: int = 1,
    tile: Tile = None,
    overlap: int = 32,
    *,
    statistics: Statistics = "picture",
    progress: Progress | None = None,
) -> Tensor:
    """Run ``model`` on ``x`` (B, 3, H, W) in 0..1 without gradients: (B, 3, scale H, scale W) float32 on
    the CPU.

    Tiles share ``overlap`` pixels, of which the outer quarter at each inner edge is thrown away and the rest
    blended, so a model that looks no further than ``overlap // 4`` pixels gives exactly what it gives on the
    whole. State-space models look further: there results depend slightly on the tiling.

    So do the ranges of quantized models with dynamic DLS, which come from what a call sees. With
    ``statistics="picture"`` such a model, prepared or deployed, runs over all of the picture once more, before,
    for the statistics of what each of its quantizers sees, and then with ranges that are frozen to these (in a
    copy; ``model`` stays as it is): every sample has its own, all of its tiles the same. They are frozen as
    ``convert(dls="frozen")`` does it, from statistics of this picture. Models without dynamic ranges need no
    such pass, and quantizers that have more than one range a picture (or ``official=True``) keep theirs.

    Args:
        model: float, prepared or deployed.
        x: floating point.
        scale: how many times the model enlarges, see :func:`model_scale`.
        tile: bounds the side of what the model sees at once, in input pixels; None: the whole; "auto" as in
            :func:`restore_image`.
        overlap: input pixels that tiles share; at most half a tile.
        statistics: "picture", or "tile": dynamic ranges are those of each tile, in one pass.
        progress: called with the number of calls of the model that are done, from 0, and of all that there are.

    Raises:
        InputError: ``x`` is empty, has another number of dimensions, or holds NaN or inf.
        ConfigError: tile, overlap, scale or statistics are out of range, or the scale is not the model's.
        SsmquantError: the model's output holds NaN or inf.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise InputError(f"expected a non-empty (B, 3, H, W) tensor, got {tuple(x.shape)}")
    if not all(bool(torch.isfinite(rows).all()) for rows in x.split(_ROWS, dim=-2)):
        raise InputError("the input holds values that are not finite")
    height, width = x.shape[-2:]
    with _evaluating(model):
        plan = _Plan(model, (height, width), scale, tile, overlap, statistics)
        samples = x.split(1) if plan.parts else (x,)  # ranges are one picture's
        step = _Steps(plan.calls * len(samples), progress)
        if plan.tile is None:
            return next(plan.bands(_source(x), step))
        out = torch.empty(*x.shape[:2], height * scale, width * scale)
        for sample, target in zip(samples, out.split(len(samples[0])), strict=True):
            top = 0
            for band in plan.bands(_source(sample), step):
                target[..., top : top + band.shape[-2], :] = band
                top += band.shape[-2]
    return out


def restore_image(
    model: nn.Module,
    image: Image.Image,
    scale: int = 1,
    tile: Tile = "auto",
    overlap: int = 32,
    *,
    statistics: Statistics = "picture",
    progress: Progress | None = None,
) -> Image.Image:
    """The restored picture, in the mode that :func:`open_image` gives: grey stays grey, 16-bit grey 16-bit.

    Alpha is enlarged by bicubic interpolation, apart from the model. Any size works, from 1x1 up. Besides the
    two pictures, which hold bytes, memory is that of one tile and of the rows that a row of tiles covers: it
    does not grow with the picture's height.

    Args:
        model: float, prepared or deployed.
        image: of any mode that has a known white.
        scale: how many times the model enlarges.
        tile: side of a tile in input pixels. "auto": 256, or twice the overlap if that is more, for pictures of
            more than 512x512 pixels, others whole. None: the whole picture at once, whatever its size.
        overlap: see :func:`restore_tensor`, as for ``statistics`` and ``progress``.
        statistics: where dynamic ranges come from.
        progress: called with calls of the model that are done, and all.

    Raises:
        InputError: no pixels, or a mode without a known white.
        ConfigError: an argument is out of range.
        SsmquantError: the model's output holds NaN or inf.
    """
    module = pillow()
    image = normal_mode(image)
    if not image.width or not image.height:
        raise InputError("the picture has no pixels")
    mode = {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)

    def source(rows: slice, columns: slice) -> Tensor:
        return to_tensor(image.crop((columns.start, rows.start, columns.stop, rows.stop)))

    with _evaluating(model):
        plan = _Plan(model, (image.height, image.width), scale, tile, overlap, statistics)
        result: Image.Image = module.new(mode, (image.width * scale, image.height * scale))
        top = 0
        for band in plan.bands(source, _Steps(plan.calls, progress)):
            for rows in band.split(_ROWS, dim=-2):
                result.paste(_pixels(rows, mode), (0, top))
                top += rows.shape[-2]
    if "A" in image.mode:
        result.putalpha(image.getchannel("A").resize(result.size, module.Resampling.BICUBIC))
    return result


def _pixels(y: Tensor, mode: str) -> Image.Image:
    """(1, 3, H, W) in 0..1 as a picture of mode L, RGB or I;16."""
    import numpy as np

    if mode == "RGB":
        return to_image(y)
    grey = (y[0] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).clamp(0, 1)
    deep = mode == "I;16"
    pixels = (grey * (65535 if deep else 255)).round().numpy().astype(np.uint16 if deep else np.uint8)
    image: Image.Image = pillow().fromarray(pixels)
    return image
