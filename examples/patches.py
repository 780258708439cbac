"""Training patches for image restoration, cut on the device from pictures that are decoded once.

All pictures lie as one flat uint8 tensor on the device, and so do their degraded counterparts, which Pillow
makes once from the whole picture (so that they are exactly what an evaluation sees). A batch is a few index
computations and one gather: no DataLoader, no copy of pixels from the host, no synchronisation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from training import to_device

from ssmquant.errors import ConfigError, FormatError, InputError
from ssmquant.restore import Task, find_images, open_image


def read_images(source: str | os.PathLike[str]) -> list[tuple[str, Image.Image]]:
    """Named pictures of a folder, of one file, or of an .npz pack (``blob``, ``offset``: concatenated files)."""
    path = Path(source)
    if path.suffix.lower() != ".npz":
        return [(p.name, open_image(p)) for p in find_images(path)]
    try:
        with np.load(path, allow_pickle=False) as pack:
            blob, offset = pack["blob"], pack["offset"].astype(np.int64)
    except (KeyError, ValueError, EOFError) as error:
        raise FormatError(f"{path} is no image pack (.npz with 'blob' and 'offset'): {error}") from error
    ordered = offset.ndim == 1 and offset.size >= 2 and offset[0] >= 0 and bool((np.diff(offset) > 0).all())
    if blob.dtype != np.uint8 or blob.ndim != 1 or not ordered or offset[-1] > blob.size:
        raise FormatError(f"{path} is no image pack: 'offset' does not cut the bytes of 'blob' into files")
    return [
        (f"{path.stem}[{i}]", open_image(blob[a:b].tobytes())) for i, (a, b) in enumerate(pairwise(offset))
    ]


class _Plane:
    """Pictures of different sizes, one after another in one flat (pixels, 3) uint8 tensor."""

    def __init__(self, images: Sequence[Image.Image], device: torch.device) -> None:
        flat = [np.asarray(image.convert("RGB")).reshape(-1, 3) for image in images]
        starts = np.cumsum([0, *(len(pixels) for pixels in flat)])[:-1]
        self.pixels = torch.from_numpy(np.concatenate(flat)).to(device)
        self.start = torch.from_numpy(starts).to(device)
        self.width = torch.tensor([image.width for image in images], device=device)

    def cut(self, index: Tensor, top: Tensor, left: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Patches (B, 3, P, P) uint8: pixel (top + rows, left + cols) of picture ``index``; rows, cols (B, P, P)."""
        at = self.start[index, None, None] + (top[:, None, None] + rows) * self.width[index, None, None]
        return self.pixels[at + left[:, None, None] + cols].permute(0, 3, 1, 2)


class PatchData:
    """Random pairs of patches of named clean pictures under ``task``.

    ``sample(batch, patch)`` gives ``(x, y)``: x float32 ``(batch, 3, patch, patch)`` degraded, y ``(batch,
    3, patch * scale, patch * scale)`` clean, both in 0..1, the same one of the 8 flips and turns applied to
    both. Positions come from a CPU generator of its own, so they are the same on every device; noise from
    one on the device. Pictures too small for a patch are left out (``skipped``).
    """

    def __init__(
        self,
        images: Sequence[tuple[str, Image.Image]],
        task: Task,
        device: str | torch.device = "cpu",
        seed: int = 0,
        patch: int = 48,
    ) -> None:
        self.task, self.device, self.patch = task, torch.device(device), patch
        side = patch * task.scale
        clean = [(name, task.target(image)) for name, image in images]
        kept = [image for _, image in clean if min(image.size) >= side]
        self.skipped = [name for name, image in clean if min(image.size) < side]
        if not kept:
            raise InputError(f"none of {len(clean)} pictures has sides of {side} pixels; use smaller patches")
        self.high = _Plane(kept, self.device)
        self.low = self.high
        if task.kind != "denoise":
            self.low = _Plane([task.degrade_image(image) for image in kept], self.device)
        self._sizes = torch.tensor([[i.height // task.scale, i.width // task.scale] for i in kept])
        self.seed(seed)

    @classmethod
    def load(cls, source: str | os.PathLike[str], task: Task, **options: Any) -> PatchData:
        """From a folder of pictures, one picture, or an .npz pack."""
        return cls(read_images(source), task, **options)

    def __len__(self) -> int:
        return len(self._sizes)

    def seed(self, seed: int) -> None:
        """Start the sequence of patches anew."""
        self._positions = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator(self.device).manual_seed(seed + 1)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load_state` needs to go on with exactly the next patches."""
        return {"positions": self._positions.get_state(), "noise": self._noise.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._positions.set_state(state["positions"])
        if (
            state["noise"].shape == self._noise.get_state().shape
        ):  # a CPU state does not fit a GPU's generator
            self._noise.set_state(state["noise"])

    def sample(self, batch: int, patch: int | None = None) -> tuple[Tensor, Tensor]:
        """The next pair of batches; see the class. ``patch``: at most the side that the class was given."""
        patch = patch or self.patch
        if patch > self.patch:
            raise ConfigError(f"pictures were chosen for patches of {self.patch}, {patch} may not fit")
        drawn = torch.rand(batch, 4, generator=self._positions, dtype=torch.float64)
        index = (drawn[:, 0] * len(self)).long()
        corner = (drawn[:, 1:3] * (self._sizes[index] - patch + 1)).long()
        packed = torch.stack([index, corner[:, 0], corner[:, 1], (drawn[:, 3] * 8).long()])
        index, top, left, turn = to_device(packed, self.device)
        s = self.task.scale
        y = self.high.cut(index, top * s, left * s, *self._grid(turn, patch * s)).float().div_(255)
        if self.task.kind == "denoise":
            noise = torch.randn(y.shape, generator=self._noise, device=self.device)
            return y + noise * (self.task.sigma / 255), y
        return self.low.cut(index, top, left, *self._grid(turn, patch)).float().div_(255), y

    def batches(self, count: int, batch: int, patch: int | None = None) -> Iterator[Tensor]:
        """``count`` batches of model inputs, for calibration."""
        for _ in range(count):
            yield self.sample(batch, patch)[0]

    def _grid(self, turn: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Row and column offsets (B, side, side) under the 8 symmetries: bit 0 transposes, 1 and 2 flip."""
        line = torch.arange(side, device=turn.device)
        t, flip_rows, flip_cols = ((turn[:, None, None] >> bit & 1).bool() for bit in range(3))
        rows, cols = line[None, :, None], line[None, None, :]
        rows, cols = torch.where(t, cols, rows), torch.where(t, rows, cols)
        return torch.where(flip_rows, side - 1 - rows, rows), torch.where(flip_cols, side - 1 - cols, cols)
