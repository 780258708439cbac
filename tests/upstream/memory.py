"""Peak memory of this process during a piece of work."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from typing import Any

__all__ = ["Peak"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _field(name: str) -> float:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


class Peak:
    """``mib``: how far the resident size rose above where it stood; ``seconds``: wall time.

    Linux forgets an earlier peak when asked to. Elsewhere only a rise above that earlier peak is seen.
    """

    mib = 0.0
    seconds = 0.0

    def __enter__(self) -> Peak:
        self.linux = _STATUS.exists()
        if self.linux:
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")
        self.start = _field("VmRSS") if self.linux else _highest()
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.seconds = time.perf_counter() - self.begun
        self.mib = max(0.0, (_field("VmHWM") if self.linux else _highest()) - self.start)


def _highest() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
