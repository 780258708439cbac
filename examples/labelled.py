"""Labelled pictures in an .npz file, in a training and a test part on one device, with a stream of random numbers."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmquant.errors import FormatError

__all__ = ["Labelled", "read_arrays"]

UNREADABLE = (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)
"""What numpy raises for files that are no .npz, broken, or without an array (an .npy: TypeError)."""


def read_arrays(path: str | os.PathLike[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``x`` and ``y`` of an .npz file.

    Raises:
        FormatError: it is none, or has no such arrays.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return file["x"], file["y"]
    except UNREADABLE as error:
        raise FormatError(f"{path} is no .npz file of x and y: {error}") from error


class Labelled:
    """What ``classify.Pictures`` and ``segment.Slices`` have in common: all but ``sample`` of ``training.Data``.

    Attributes:
        x, y: for training, on ``device``.
        test_x, test_y: for testing.
        classes: the largest class number and 1.
    """

    def __init__(
        self, x: Tensor, y: Tensor, test: Tensor, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        """``test``: bool (N,), which of x and y (N, ...) are for testing."""
        self.device = torch.device(device)
        self.x, self.y = x[~test].to(device), y[~test].to(device)
        self.test_x, self.test_y = x[test].to(device), y[test].to(device)
        self.classes = int(y.max()) + 1
        self.seed(seed)

    def seed(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def state(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
