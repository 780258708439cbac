"""Compiling, finding and launching CUDA kernels without a GPU: the driver, and mostly the compiler, are stand-ins."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssmquant.ops import cache, nvrtc
from ssmquant.ops.nvrtc import CompileError
from ssmquant.ops.selective_scan import cuda, cuda_build
from ssmquant.ops.selective_scan.cuda_shapes import Limits, Work, case_of, choose, choose_ends
from tests.ops import emulator

SOURCE = 'extern "C" __global__ void answer(int *x) { *x = 42; }\n'
DEVICE = torch.device("cuda", 0)
NVRTC = """
#include <string.h>
static const char *text;
static const char *MESSAGE = "kernel.cu(1): error: that is no CUDA";
extern "C" {
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 2, 0; }
const char *nvrtcGetErrorString(int status) { return status == 6 ? "NVRTC_ERROR_COMPILATION" : "other"; }
int nvrtcCreateProgram(void **p, const char *source, const char *, int, void *, void *) {
    text = strdup(source);
    return *p = (void *)text, 0;
}
int nvrtcCompileProgram(void *p, int count, const char **options) {
    return p != text || strcmp(options[count - 1], "--gpu-architecture=sm_90") || strstr(text, "wrong") ? 6 : 0;
}
int nvrtcGetProgramLogSize(void *p, size_t *size) { return *size = strlen(MESSAGE) + 1, p != text; }
int nvrtcGetProgramLog(void *p, char *to) { return strcpy(to, MESSAGE), p != text; }
int nvrtcGetCUBINSize(void *p, size_t *size) { return *size = 7, p != text; }
int nvrtcGetCUBIN(void *p, char *to) { return memcpy(to, "\\x7f" "ELF\\0\\1\\2", 7), p != text; }
int nvrtcDestroyProgram(void **p) { return *p = nullptr, 0; }
}
"""


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, nothing ready-made, nothing said yet."""
    monkeypatch.setattr(nvrtc, "_PREBUILT", tmp_path / "lib")
    monkeypatch.setattr(nvrtc, "_announced", False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SSMQUANT_NO_COMPILE", raising=False)


def compilers(monkeypatch: pytest.MonkeyPatch, library: Any, nvcc: str | None) -> None:
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: library)
    monkeypatch.setattr(nvrtc, "_nvcc", lambda: nvcc)


def test_files_are_named_after_source_and_architecture() -> None:
    names = {nvrtc.name_of(source, arch) for source in (SOURCE, SOURCE + "\n") for arch in (80, 90)}
    assert len(names) == 4
    assert nvrtc.name_of(SOURCE, 90) in names
    assert nvrtc.name_of(SOURCE, 90).endswith(".sm_90.cubin")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers(monkeypatch, None, None)
    assert nvrtc.describe() is None
    with pytest.raises(CompileError, match=r"neither NVRTC, which CUDA builds of torch bring, nor nvcc"):
        nvrtc.compile_source(SOURCE, 90)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Has NVRTC's functions, and compiles whatever does not say "wrong" for sm_90."""
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    folder = tmp_path_factory.mktemp("nvrtc")
    (folder / "fake.cpp").write_text(NVRTC)
    command = [emulator.COMPILER, "-shared", "-fPIC", "-o", str(folder / "fake.so"), str(folder / "fake.cpp")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "fake.so"))


def test_nvrtc(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    compilers(monkeypatch, library, None)
    assert nvrtc.describe() == "NVRTC 13.2"
    assert nvrtc.compile_source(SOURCE, 90) == b"\x7fELF\0\1\2"
    for source, arch in ((SOURCE + "wrong", 90), (SOURCE, 10)):
        with pytest.raises(CompileError) as caught:
            nvrtc.compile_source(source, arch)
        first, log = str(caught.value).splitlines()
        assert first == f"NVRTC: cannot compile for sm_{arch}: NVRTC_ERROR_COMPILATION"
        assert log == "kernel.cu(1): error: that is no CUDA"


def test_nvcc_may_know_what_nvrtc_does_not(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    compilers(monkeypatch, library, "nvcc")
    monkeypatch.setattr(nvrtc, "_by_nvcc", lambda nvcc, source, arch: f"{nvcc} {arch}".encode())
    assert nvrtc.compile_source(SOURCE, 90).startswith(b"\x7fELF")
    assert nvrtc.compile_source(SOURCE, 120) == b"nvcc 120"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    compilers(monkeypatch, None, shutil.which("nvcc"))
    assert nvrtc.describe() == "nvcc"
    cubin = nvrtc.compile_source(SOURCE, 90)
    assert cubin.startswith(b"\x7fELF")
    assert b"answer" in cubin
    with pytest.raises(CompileError, match=r'sm_90(.|\n)*error(.|\n)*"wrong"'):
        nvrtc.compile_source(SOURCE.replace("42", "wrong"), 90)
    with pytest.raises(CompileError, match="sm_12345"):
        nvrtc.compile_source(SOURCE, 12345)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(nvrtc.describe() is None, reason="needs NVRTC or nvcc")
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("back", [False, True])
def test_compiles_for_every_architecture(back: bool, arch: int, capfd: pytest.CaptureFixture[str]) -> None:
    limits = {
        80: Limits(108, 166912, 167936),
        89: Limits(128, 101376, 102400),
        90: Limits(132, 232448, 233472),
    }
    for states, types, is_map in (
        (10, ("F16", "F16", "F16", "F16"), False),
        (1, ("float", "BF16", "F16", "float"), True),
    ):
        work = Work(back, 1, 4, 90, states, 4096, True, False, False, types, is_map)
        for ends in (False, True):
            shape = choose_ends(work, limits[arch]) if ends else choose(work, limits[arch])[0]
            cubin = nvrtc.compile_source(case_of(work, shape, 1 if is_map else 4, ends).source(), arch)
            main = (b"scan_backward", b"scan_sum") if back else (b"scan_forward",)
            assert cubin.startswith(b"\x7fELF")
            assert all(name in cubin for name in ((b"scan_ends", b"scan_carry") if ends else main))
    assert capfd.readouterr() == ("", "")


class Compiled(list[tuple[str, int]]):
    """What has been compiled."""

    def __call__(self, source: str, arch: int) -> bytes:
        self.append((source, arch))
        return b"whole " + source.encode()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """A machine with a GPU, whose driver loads what begins with "whole" and is not for another GPU."""

    def load(cubin: bytes, arch: int) -> bytes:
        if not cubin.startswith(b"whole"):
            raise CompileError("cannot load a kernel: device kernel image is invalid")
        return cubin

    made = Compiled()
    monkeypatch.setattr(nvrtc, "compile_source", made)
    monkeypatch.setattr(nvrtc, "Kernels", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1, 1))
    compilers(monkeypatch, None, "nvcc")
    return made


def load_in_a_new_process(source: str = SOURCE) -> Any:
    nvrtc._load.cache_clear()
    try:
        return nvrtc.load(source, DEVICE)
    finally:
        nvrtc._load.cache_clear()


def test_compiles_once_and_says_so(compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = load_in_a_new_process()
    assert compiled == [(SOURCE, 90)]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nvcc" in said
    assert str(cache.folder()) in said
    assert load_in_a_new_process() == kernels
    assert len(compiled) == 1
    load_in_a_new_process(SOURCE + "// another\n")
    assert len(compiled) == 2
    assert capsys.readouterr() == ("", "")
    assert len(list(cache.folder().iterdir())) == 2


def test_is_loaded_once(compiled: Compiled) -> None:
    nvrtc._load.cache_clear()
    try:
        assert nvrtc.load(SOURCE, DEVICE) is nvrtc.load(SOURCE, torch.device("cuda"))
    finally:
        nvrtc._load.cache_clear()
    assert len(compiled) == 1


def test_what_came_with_the_package_is_taken_first(compiled: Compiled, tmp_path: Path) -> None:
    path = nvrtc.store(SOURCE, 90, tmp_path / "lib")
    path.write_bytes(nvrtc.sealed(b"whole, from the wheel"))
    assert nvrtc.store(SOURCE, 90, tmp_path / "lib") == path  # is whole, and left alone
    assert load_in_a_new_process() == b"whole, from the wheel"
    assert len(compiled) == 1


def test_a_file_for_a_wheel_that_was_cut_short_is_made_anew(compiled: Compiled, tmp_path: Path) -> None:
    path = nvrtc.store(SOURCE, 90, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:40])
    assert nvrtc.store(SOURCE, 90, tmp_path).read_bytes() == content
    assert len(compiled) == 2


@pytest.mark.parametrize("length", [0, 10, 32, 36, -1])
def test_a_file_that_was_cut_short_is_compiled_anew(length: int, compiled: Compiled) -> None:
    kernels = load_in_a_new_process()
    (path,) = cache.folder().iterdir()
    content = path.read_bytes()
    assert content == nvrtc.sealed(kernels)
    path.write_bytes(content[:length])
    assert load_in_a_new_process() == kernels
    assert path.read_bytes() == content
    assert len(compiled) == 2


def test_compiling_can_be_forbidden(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    load_in_a_new_process()
    monkeypatch.setenv("SSMQUANT_NO_COMPILE", "1")
    load_in_a_new_process()  # forbids nothing that is there
    with pytest.raises(CompileError, match="SSMQUANT_NO_COMPILE forbids"):
        load_in_a_new_process(SOURCE + "// another\n")
    (path,) = cache.folder().iterdir()
    path.write_bytes(b"")
    with pytest.raises(CompileError):
        load_in_a_new_process()
    assert len(compiled) == 1


def test_a_cache_that_cannot_be_written(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    assert load_in_a_new_process() == load_in_a_new_process()
    assert len(compiled) == 2


def test_kernels_that_do_not_load_are_not_compiled_for_ever(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "compile_source", lambda source, arch: compiled(source, arch)[:3])
    for count in (1, 2):  # the second time the file is tried, then compiled once more
        with pytest.raises(CompileError, match="image is invalid"):
            load_in_a_new_process()
        assert len(compiled) == count


class Driver:
    """Records calls. ``status`` is what a function returns."""

    def __init__(self, **status: int) -> None:
        self.status = status
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.calls.append((name, *args))
            return self.status.get(name, 0)

        return call

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"out of luck" if status == 701 else None
        return 0


class Params(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int),)


def launch(driver: Driver, monkeypatch: pytest.MonkeyPatch, shared: int = 99) -> None:
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    kernels = nvrtc.Kernels(b"cubin")
    for size in (shared, shared, shared + 1):
        kernels.launch("scan", (7, 3), 64, size, Params(1), DEVICE)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    launch(driver, monkeypatch)
    launches = [args for name, *args in driver.calls if name == "cuLaunchKernel"]
    assert [args[1:8] for args in launches] == [[7, 3, 1, 64, 1, 1, s] for s in (99, 99, 100)]
    assert all(args[8].value == 5 for args in launches)
    wanted = [args[1:] for name, *args in driver.calls if name == "cuFuncSetAttribute"]
    assert wanted == [[8, 99], [8, 100]]


def test_a_kernel_with_less_shared_memory_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit stays, for the next one with as much."""

    class Limits(Driver):
        limit = 0

        def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
            self.limit = value
            return 0

        def cuLaunchKernel(self, *args: Any) -> int:
            self.calls.append(("cuLaunchKernel", *args))
            return 1 if args[7] > self.limit else 0

    driver = Limits()
    launch(driver, monkeypatch)
    kernels = nvrtc.Kernels(b"cubin")
    for size in (24576, 12288, 24576, 0):
        kernels.launch("scan", (7, 3), 64, size, Params(1), DEVICE)


@pytest.mark.parametrize("grid", [(0, 3), (7, 0)])
def test_no_blocks(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    nvrtc.Kernels(b"cubin").launch("scan", grid, 64, 99, Params(1), DEVICE)
    assert "cuLaunchKernel" not in [name for name, *_ in driver.calls]


@pytest.mark.parametrize(("arch", "capturing"), [(80, True), (90, False), (90, True)])
def test_kernels_begin_early_in_graphs(arch: int, capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of them what a kernel reads ahead may have just been written."""

    class Looks(Driver):
        def cuLaunchKernelEx(self, config: Any, *args: Any) -> int:
            c = config._obj
            seen.append((c.grid_x, c.grid_y, c.grid_z, c.block_x, c.block_y, c.block_z, c.shared, c.stream))
            seen.extend((c.count, c.attributes[0].id, c.attributes[0].value))
            return 0

    seen: list[Any] = []
    driver = Looks()
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    nvrtc.Kernels(b"cubin", arch).launch("scan", (7, 3), 64, 99, Params(1), DEVICE, early=True)
    plainly = [name for name, *_ in driver.calls if name == "cuLaunchKernel"]
    assert len(plainly) == int(arch < 90 or not capturing)
    assert seen == ([] if plainly else [(7, 3, 1, 64, 1, 1, 99, 5), 1, 6, 1])
    assert ctypes.sizeof(nvrtc._Attribute) == 72  # as in cuda.h


def test_a_thread_that_has_not_used_cuda_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    class NewThread(Driver):
        def cuLaunchKernel(self, *args: Any) -> int:
            ready = "cuCtxSetCurrent" in [name for name, *_ in self.calls]
            self.calls.append(("cuLaunchKernel", *args))
            return 0 if ready else 201

    driver = NewThread()
    launch(driver, monkeypatch)
    assert [name for name, *_ in driver.calls if name in ("cuLaunchKernel", "cuCtxSetCurrent")] == [
        *("cuLaunchKernel", "cuCtxSetCurrent"),
        *("cuLaunchKernel",) * 3,
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuModuleLoadData", "cannot load a kernel"),
        ("cuModuleGetFunction", "no kernel scan"),
        ("cuFuncSetAttribute", "scan wants 99 bytes of shared memory"),
        ("cuLaunchKernel", "cannot launch scan"),
    ],
)
@pytest.mark.parametrize(("status", "why"), [(701, "out of luck"), (999, "CUDA error 999")])
def test_refusals_say_what_was_refused(
    function: str, message: str, status: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompileError, match=f"{message}: {why}"):
        launch(Driver(**{function: status}), monkeypatch)


def unavailable(
    device: torch.device = DEVICE, dtype: torch.dtype = torch.float32, states: int = 16
) -> str | None:
    reason: str | None = cuda.unavailable.__wrapped__(device, dtype, states)
    return reason


@pytest.mark.parametrize("device", cuda_build.DEVICES)
def test_a_wheel_has_what_is_tried_first(device: int) -> None:
    made = {source for source, arch in cuda_build.sources() if arch == device}
    for states in (1, 10, 16):
        assert {case.source() for case in cuda.probes(states, cuda_build.DEVICES[device])} <= made


def test_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable() == "PyTorch sees no CUDA device"
    assert unavailable(torch.device("cpu")) == "cpu is not a CUDA device"
    assert "float64" in str(unavailable(dtype=torch.float64))
    assert "256" in str(unavailable(states=257))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert unavailable() == "the GPU is sm_75, older than sm_80"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert unavailable() == "PyTorch is built for ROCm"


def test_tries_to_compile_before_it_promises(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_limits", lambda device: Limits(132, 232448, 233472))
    nvrtc._load.cache_clear()
    assert unavailable() is None
    assert len(compiled) == 2
    nvrtc._load.cache_clear()
    monkeypatch.setenv("SSMQUANT_NO_COMPILE", "1")
    assert str(unavailable(states=3)).startswith("SSMQUANT_NO_COMPILE forbids compiling")
    monkeypatch.setattr(nvrtc, "Kernels", lambda cubin, arch: ctypes.CDLL("no such driver"))
    assert "no such driver" in str(unavailable())
    nvrtc._load.cache_clear()
