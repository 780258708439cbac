"""Loops over batches, of so many at most, with a progress bar where someone looks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

__all__ = ["known_length", "limited"]

T = TypeVar("T")


def limited(
    batches: Iterable[T],
    limit: int | None,
    progress: bool | None,
    label: str = "calibrating",
    total: int | None = None,
) -> Iterable[T]:
    """So many batches at most, with a progress bar.

    Args:
        batches: what to go through.
        limit: the most; None: all.
        progress: None shows the bar where stderr is a terminal; without rich there is none.
        label: stands in front of the bar.
        total: how many there are, where ``batches`` has no length.
    """
    it = itertools.islice(batches, limit)
    if progress or (progress is None and sys.stderr.isatty()):
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            return it
        known = total if total is not None else known_length(batches, limit)
        return track(it, label, total=known, console=Console(stderr=True))
    return it


def known_length(batches: Iterable[T], limit: int | None) -> int | None:
    """The number of batches, where it is known before they come."""
    known = [n for n in (len(batches) if isinstance(batches, Sized) else None, limit) if n is not None]
    return min(known) if known else None
