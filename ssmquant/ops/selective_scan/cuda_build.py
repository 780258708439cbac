"""Compiles the CUDA kernels of the selective scan ahead, for wheels: common models on common GPUs.

What a wheel lacks is compiled at its first use, so this list only saves seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssmquant.ops import nvrtc
from ssmquant.ops.selective_scan.cuda import probes
from ssmquant.ops.selective_scan.cuda_shapes import Limits, Work, case_of, choose, choose_ends

__all__ = ["DEVICES", "build", "sources"]

# By architecture: A100, L40, H100.
DEVICES = {
    80: Limits(108, 166_912, 167_936),
    89: Limits(142, 101_376, 102_400),
    90: Limits(132, 232_448, 233_472),
}
# Samples, groups, channels a group, states, length.
_WORKS = (
    (1, 4, 72, 10, 4096),  # MambaIR-light
    (16, 4, 72, 10, 2304),
    (4, 4, 360, 16, 4096),  # MambaIR
    (1, 4, 192, 1, 3136),  # VMamba-T
    (64, 4, 192, 1, 3136),
    (64, 4, 384, 1, 784),
    (64, 4, 768, 1, 196),
    (1, 1, 384, 16, 197),  # Vim-T
    (64, 1, 384, 16, 197),
)
_TYPES = ("float", "F16", "BF16")


def sources() -> Iterator[tuple[str, int]]:
    """Texts to compile, and for which architecture."""
    for arch, limits in DEVICES.items():
        for states in {work[3] for work in _WORKS}:
            yield from ((case.source(), arch) for case in probes(states, limits))
        for batch, groups, inner, states, length in _WORKS:
            for kind in _TYPES:
                for backward in (False, True):
                    work = Work(
                        backward, batch, groups, inner, states, length, True, False, False, (kind,) * 4, False
                    )
                    shape, chunks = choose(work, limits)
                    vector = 4 if length % 4 == 0 else 1
                    yield case_of(work, shape, vector).source(), arch
                    if chunks > 1:
                        yield case_of(work, choose_ends(work, limits), vector, ends=True).source(), arch


def build(folder: Path) -> None:
    """Compile into ``folder``; needs a CUDA compiler but no GPU.

    Raises:
        CompileError: there is no compiler, or it refuses.
        OSError: ``folder`` cannot be written to.
    """
    jobs = list(dict.fromkeys(sources()))

    def run(job: tuple[str, int]) -> Path:
        return nvrtc.store(*job, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, path in enumerate(pool.map(run, jobs)):
            print(f"ssmquant: {path.name} ({i + 1} of {len(jobs)})", file=sys.stderr)
