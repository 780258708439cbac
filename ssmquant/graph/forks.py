"""Calls of a deployed graph that do not depend on each other, which a GPU runs at once when they are captured."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Fork"]


@functools.cache
def _stream(device: torch.device, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Fork:
    """Of calls right behind each other: each one but the first begins with that, on a stream of its own.

    Nothing may come between them: memory that it lets go could be taken by one that has already begun. In calls that
    are not captured, which Python takes longer to launch than a GPU to run, nothing changes.
    """

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self._begun: torch.cuda.Event | None = None

    @contextmanager
    def lane(self, number: int, device: torch.device) -> Iterator[None]:
        """Around the call of a number, from 0, in their order."""
        if self.calls == 1 or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            yield
            return
        here = torch.cuda.current_stream(device)
        if number == 0:
            self._begun = here.record_event()
        begun = self._begun
        if number == self.calls - 1:
            self._begun = None
        if number == 0 or begun is None:
            yield
            return
        stream = _stream(device, number)
        stream.wait_event(begun)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            here.wait_stream(stream)
