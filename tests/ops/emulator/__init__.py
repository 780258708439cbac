"""CUDA kernels compiled for the CPU by the host's C++ compiler: slow, but the same text."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

COMPILER = (shutil.which("g++") or shutil.which("clang++")) if sys.platform == "linux" else None
# Aliasing: shared memory holds numbers of several types. Fortified longjmp refuses to go to another stack. What a GPU
# would refuse, a vector at an address that is no multiple of its size, ends the process with a word about it. Compiling
# takes longer than running: no optimisation.
FLAGS = (
    "-std=c++17",
    "-O0",
    "-fsanitize=alignment",
    "-fno-sanitize-recover=alignment",
    "-w",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=0",
)
HERE = Path(__file__).parent

_ERRORS = {
    1: "no such kernel, or its shared memory is not of the size that the source wants",
    2: "too many threads or too much shared memory",
    3: "a copy from or to an address that is no multiple of its size",
    4: "threads wait for others that have ended or wait elsewhere",
}


class Emulated:
    """Stands in for ``nvrtc.Kernels``. ``late`` reverses the order of threads and delays copies: see ``cuda.h``."""

    def __init__(self, library: ctypes.CDLL, late: bool) -> None:
        self._library = library
        self._late = late

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        params: Any,
        device: torch.device,
        early: bool = False,
    ) -> None:
        """As of ``nvrtc.Kernels``, but the kernel has run when this returns."""
        status = self._library.launch(
            name.encode(), *grid, threads, ctypes.c_long(shared), ctypes.byref(params), self._late
        )
        assert status == 0, f"{name}: {_ERRORS[status]}"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # removed when the process ends


@functools.cache
def _library(source: str, harness: str) -> ctypes.CDLL:
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    (folder / "kernel.cu").write_text(source, encoding="utf-8")
    library = folder / "kernel.so"
    command = [
        COMPILER,
        *FLAGS,
        "-shared",
        "-fPIC",
        f"-I{folder}",
        f"-I{HERE}",
        str(HERE / f"{harness}.cpp"),
    ]
    subprocess.run([*command, "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


def load(source: str, late: bool = False, harness: str = "selective_scan") -> Emulated:
    """``source`` is a whole CUDA text: definitions, then kernels. Compiled once. ``harness``: what launches them."""
    return Emulated(_library(source, harness), late)
