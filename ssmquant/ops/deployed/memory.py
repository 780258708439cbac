"""Memory of big tensors, kept from one call of a deployed model to the next.

An allocator returns memory of many megabytes to the system at once, and every page of it is a page fault when it is
written again: for a picture of 320x180 pixels that was a quarter of the time of a call of MambaIR-light. While a
:class:`Pool` is in use, :func:`new` takes big tensors from it; when the last view of one is gone, its memory is free
for the next. After a call a pool keeps what that call has used, and lets go of what it has not.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
from bisect import insort
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pool", "new"]

_SMALLEST = 2**20
"""Bytes; what is smaller comes from PyTorch, whose allocator keeps it."""
_GRAIN, _HUGE = 2**16, 2**21
_FIT = 2
"""A block may be so many times as large as what is wanted."""


class _Block:
    """Memory that a pool lends; ``used``: the pool's count of calls when it last did."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.address, self._owner = _allocate(size)

    def __len__(self) -> int:
        return self.size

    def __lt__(self, other: _Block) -> bool:
        return len(self) < len(other)


def _allocate(size: int) -> tuple[int, Any]:
    """Address of new memory, and what keeps it.

    From Linux in pages of 2 MiB where there are some: scans that walk down the columns of an image touch another small
    page at every step.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < 2 * _HUGE:
        memory = torch.empty(size, dtype=torch.uint8)
        return memory.data_ptr(), memory
    area = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        area.madvise(advice)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return -(-start // _HUGE) * _HUGE, area


def _come_back(lease: Any) -> None:
    lease.returned.append(lease.block)


@functools.lru_cache(256)
def _lease(size: int) -> type[ctypes.Array[ctypes.c_uint8]]:
    """What a tensor holds on to: a buffer that tells when it goes."""
    return type("Lease", (ctypes.c_uint8 * size,), {"__del__": _come_back})


class Pool:
    """Blocks of memory that are free, and those that calls have borrowed; for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[_Block] = []  # smallest first
        # Tensors end anywhere, in the middle of ``take`` too: they only append here.
        self._returned: deque[_Block] = deque()
        self._calls = 0

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        """A copy, or an unpickled one, starts empty."""
        return Pool, ()

    @property
    def held(self) -> int:
        """Bytes that are free in it."""
        with self._lock:
            self._collect()
            return sum(map(len, self._free))

    def take(self, size: int) -> Tensor:
        """``size`` bytes, uint8, with whatever they hold."""
        with self._lock:
            self._collect()
            at = next((i for i, block in enumerate(self._free) if len(block) >= size), None)
            if at is not None and len(self._free[at]) <= _FIT * size:
                block = self._free.pop(at)
            else:
                block = _Block(-(-size // _GRAIN) * _GRAIN)
            block.used = self._calls
        lease: Any = _lease(len(block)).from_address(block.address)
        lease.block, lease.returned = block, self._returned
        return torch.frombuffer(lease, dtype=torch.uint8, count=size)

    def _collect(self) -> None:
        while self._returned:
            insort(self._free, self._returned.popleft())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """:func:`new` takes from this pool in this thread."""
        before, _current.pool = getattr(_current, "pool", None), self
        try:
            yield
        finally:
            _current.pool = before
            with self._lock:
                self._collect()
                self._free = [block for block in self._free if block.used == self._calls]
                self._calls += 1


_current = threading.local()


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty`` on the CPU, from the pool that is in use."""
    size = math.prod(shape) * dtype.itemsize
    pool: Pool | None = getattr(_current, "pool", None)
    if pool is None or size < _SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return pool.take(size).view(dtype).view(shape)
