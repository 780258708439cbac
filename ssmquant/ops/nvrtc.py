"""CUDA C++ compiled by NVRTC, which comes with every CUDA build of torch, or else by nvcc; launched by the driver.

Nothing here links against torch or Python: sources become cubins, which are kept in files (``cache``) and serve every
version of both. A cubin is looked for in the package (``lib``, put there when a wheel was built with
``SSMQUANT_BUILD=cuda``), then in the user's cache, then compiled. All through ctypes, no compiler of C++ is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch

from ssmquant.errors import SsmquantError
from ssmquant.ops import cache

__all__ = [
    "CompileError",
    "Kernels",
    "compile_source",
    "cuda_text",
    "describe",
    "load",
    "name_of",
    "sealed",
    "specialised",
    "store",
]

_PREBUILT = Path(__file__).parents[1] / "lib"
_OPTIONS = ("-std=c++17", "--fmad=true")
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_EARLY_ARCH = 90  # from which on kernels can begin while others end
_lock = threading.Lock()
_announced = False


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((n, ctypes.c_uint) for n in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


class CompileError(SsmquantError):
    """A kernel could not be compiled, loaded or launched."""


def cuda_text(*names: str) -> str:
    """Files of ``csrc``, without their ".cu", one behind the other."""
    folder = files("ssmquant").joinpath("csrc")
    return "\n".join(folder.joinpath(f"{name}.cu").read_text(encoding="utf-8") for name in names)


@functools.cache
def specialised(names: str, *definitions: tuple[str, int]) -> str:
    """Files of ``csrc``, as of ``cuda_text``, behind what CUDA kernels share and definitions of their constants."""
    return "".join(f"#define {k} {v}\n" for k, v in definitions) + cuda_text("cuda_math", *names.split())


def name_of(source: str, arch: int) -> str:
    """The file of what ``source`` compiles to for ``arch`` (90 is sm_90)."""
    return f"{cache.key(source, str(arch), *_OPTIONS)}.sm_{arch}.cubin"


def _nvrtc_places() -> Iterator[str]:
    major = (torch.version.cuda or "").split(".", maxsplit=1)[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"] if major else ["libnvrtc.so"]
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        for name in names:
            yield from map(str, sorted(Path(root).glob(f"*/lib/{name}")))
    yield from map(str, sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc-*.so*")))
    yield from names
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    yield from (f"{home}/lib64/{name}" for name in names)


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    for place in _nvrtc_places():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(place)
    return None


@functools.cache
def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def describe() -> str | None:
    """What would compile, "NVRTC 13.0" or "nvcc"; None if nothing could."""
    library = _nvrtc()
    if library is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"
    return "nvcc" if _nvcc() else None


def _by_nvrtc(library: ctypes.CDLL, source: str, arch: int) -> bytes:
    def check(status: int, what: str) -> None:
        if status:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"NVRTC: {what}: {library.nvrtcGetErrorString(status).decode()}{log()}")

    def log() -> str:
        size = ctypes.c_size_t()
        if not program.value or library.nvrtcGetProgramLogSize(program, ctypes.byref(size)) or size.value < 2:
            return ""
        text = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, text)
        return "\n" + text.value.decode(errors="replace")[:2000]

    program = ctypes.c_void_p()
    check(
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"ssmquant.cu", 0, None, None),
        "cannot start",
    )
    try:
        options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture=sm_{arch}")]
        array = (ctypes.c_char_p * len(options))(*options)
        check(library.nvrtcCompileProgram(program, len(options), array), f"cannot compile for sm_{arch}")
        size = ctypes.c_size_t()
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "no cubin")
        cubin = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, cubin), "no cubin")
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _by_nvcc(nvcc: str, source: str, arch: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        text.write_text(source, encoding="utf-8")
        command = [nvcc, *_OPTIONS, "-O3", "-cubin", f"-arch=sm_{arch}", "-o", str(cubin), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"nvcc cannot compile for sm_{arch}: {(done.stderr or done.stdout)[:2000]}")
        return cubin.read_bytes()


def compile_source(source: str, arch: int) -> bytes:
    """The cubin of ``source`` for sm_``arch``.

    Raises:
        CompileError: no compiler, or it does not know the architecture or refuses the source.
    """
    library, nvcc = _nvrtc(), _nvcc()
    if library is not None:
        try:
            return _by_nvrtc(library, source, arch)
        except CompileError:
            if nvcc is None:
                raise
    if nvcc is None:
        raise CompileError(
            "no CUDA compiler: neither NVRTC, which CUDA builds of torch bring, nor nvcc was found"
        )
    return _by_nvcc(nvcc, source, arch)


def sealed(cubin: bytes) -> bytes:
    """The content of a file: a digest, then the cubin. The driver is told no length, so a cut one must not reach it."""
    return hashlib.sha256(cubin).digest() + cubin


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    cubin = content[hashlib.sha256().digest_size :]
    return cubin if sealed(cubin) == content else None


def store(source: str, arch: int, folder: Path) -> Path:
    """Compile into ``folder`` under the name that ``load`` looks for.

    Raises:
        CompileError: see ``compile_source``.
        OSError: the file cannot be written.
    """
    path = folder / name_of(source, arch)
    if _read(path) is None:
        cache.publish(path, sealed(compile_source(source, arch)))
    return path


def _announce(where: Path) -> None:
    global _announced  # noqa: PLW0603
    if not _announced:
        print(f"ssmquant: compiling CUDA kernels with {describe()}, once each, into {where}", file=sys.stderr)
        _announced = True


def _cubin(source: str, arch: int) -> tuple[bytes, Path | None]:
    """The cubin and the file that it was read from."""
    name = name_of(source, arch)
    for path in (_PREBUILT / name, cache.folder() / name):
        cubin = _read(path)
        if cubin is not None:
            return cubin, path
    if cache.compiling_is_forbidden():
        raise CompileError(
            "SSMQUANT_NO_COMPILE forbids compiling, and there is no compiled kernel for this case"
        )
    _announce(cache.folder())
    cubin = compile_source(source, arch)
    with contextlib.suppress(OSError):  # an unwritable cache costs the next process a compilation
        cache.publish(cache.folder() / name, sealed(cubin))
    return cubin, None


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(driver: ctypes.CDLL, status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise CompileError(f"{what}: {text.value.decode() if text.value else f'CUDA error {status}'}")


class Kernels:
    """The kernels of one cubin on one device."""

    def __init__(self, cubin: bytes, arch: int = 0) -> None:
        """Load into the current context, of a device sm_``arch``.

        Raises:
            CompileError: it is no cubin for this device.
        """
        self._driver = _driver()
        self._module = ctypes.c_void_p()
        _check(
            self._driver,
            self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin),
            "cannot load a kernel",
        )
        self._functions: dict[str, tuple[ctypes.c_void_p, int]] = {}  # and the most shared memory of a launch
        self._early = (_Attribute * 1)(_Attribute(id=_PROGRAMMATIC, value=1)) if arch >= _EARLY_ARCH else None
        self._context = ctypes.c_void_p()
        self._driver.cuCtxGetCurrent(ctypes.byref(self._context))

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        if shared > self._functions.get(name, (None, -1))[1]:
            with _lock:
                function = ctypes.c_void_p()
                status = self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
                _check(self._driver, status, f"no kernel {name}")
                # All launches have one limit: a lower one would have the driver refuse those of before.
                most = max(shared, self._functions.get(name, (None, -1))[1])
                status = self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, most)
                _check(self._driver, status, f"{name} wants {most} bytes of shared memory")
                self._functions[name] = function, most
        return self._functions[name][0]

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        params: ctypes.Structure,
        device: torch.device,
        early: bool = False,
    ) -> None:
        """Queue ``name`` on the current stream of ``device``; ``params`` is its one argument, ``shared`` in bytes.

        A grid of no blocks, which the driver refuses, is nothing to do.

        ``early``: in a CUDA graph its blocks may be made while the kernel before it ends, for which it waits itself
        (``kernel_before`` in ``cuda_math.cu``), if the device can do that. What it reads before has to be there when
        the graph is captured.

        Raises:
            CompileError: the device refuses the launch.
        """
        if 0 in grid:
            return
        array = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        function = self._function(name, shared)

        def once() -> int:
            if early and self._early is not None and torch.cuda.is_current_stream_capturing():
                config = _Config(*grid, 1, threads, 1, 1, shared, stream, self._early, 1)
                return int(self._driver.cuLaunchKernelEx(ctypes.byref(config), function, array, None))
            arguments = (function, *grid, 1, threads, 1, 1, shared, stream, array, None)
            return int(self._driver.cuLaunchKernel(*arguments))

        status = once()
        if status == _INVALID_CONTEXT:  # of a thread that has not used CUDA yet
            self._driver.cuCtxSetCurrent(self._context)
            status = once()
        _check(self._driver, status, f"cannot launch {name}")


@functools.cache
def _load(source: str, index: int) -> Kernels:
    major, minor = torch.cuda.get_device_capability(index)
    arch = 10 * major + minor
    with torch.cuda.device(index):
        torch.cuda.mem_get_info(index)  # makes the context of this device exist, under fake tensors too
        cubin, path = _cubin(source, arch)
        try:
            return Kernels(cubin, arch)
        except CompileError:
            if path is None or cache.compiling_is_forbidden():
                raise
        # What the driver refuses, whatever it is: once more from the source.
        cubin = compile_source(source, arch)
        with contextlib.suppress(OSError):
            cache.publish(cache.folder() / name_of(source, arch), sealed(cubin))
        return Kernels(cubin, arch)


def load(source: str, device: torch.device) -> Kernels:
    """The kernels of ``source`` on ``device``; compiled at their first use on this machine.

    Raises:
        CompileError: see ``compile_source``; or the device cannot load them.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        return _load(source, index)
