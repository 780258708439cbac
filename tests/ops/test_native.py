"""Finding, compiling and keeping the library of CPU kernels, tried on tiny sources in place of the real ones."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssmquant.ops import cache, native

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)

MAIN = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {}; }}\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Files that compile in no time; an empty cache, nothing ready-made, nothing loaded yet."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in native._KERNELS:
        (folder / f"{name}_cpu.cpp").write_text("static int nothing;\n")
        (folder / f"{name}_cpu_path.cpp").write_text("static int SSMQUANT_PATH;\n")
    (folder / "selective_scan_cpu.cpp").write_text(MAIN.format(42))
    monkeypatch.setattr(native, "_SOURCES", folder)
    monkeypatch.setattr(native, "_READY_MADE", tmp_path / "lib")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    for name in ("CXX", "SSMQUANT_NO_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    next_process()
    yield folder
    next_process()


def next_process() -> None:
    native._found.cache_clear()


def answer() -> int:
    found = native.library()
    assert isinstance(found, ctypes.CDLL), found
    return int(found.answer())


def reason() -> str:
    found = native.library()
    assert isinstance(found, str)
    return found


def kept() -> list[Path]:
    return sorted(cache.folder().glob("*.so"))


@pytest.mark.usefixtures("sources")
def test_compiles_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer() == answer() == 42
    said = capsys.readouterr().err
    assert said.startswith("ssmquant: compiling ")
    assert str(cache.folder()) in said
    assert said.count("\n") == 1
    next_process()
    monkeypatch.setenv("SSMQUANT_NO_COMPILE", "1")  # forbids nothing that is there
    assert answer() == 42
    assert capsys.readouterr().err == ""


def test_changed_sources_are_compiled_anew(sources: Path) -> None:
    assert answer() == 42
    (sources / "selective_scan_cpu.cpp").write_text(MAIN.format(43))
    next_process()
    assert answer() == 43


@pytest.mark.usefixtures("sources")
def test_a_file_cut_short_is_compiled_anew() -> None:
    assert answer() == 42
    (path,) = kept()
    content = path.read_bytes()
    path.unlink()  # it is in use
    path.write_bytes(content[:5000])
    next_process()
    assert answer() == 42
    assert path.read_bytes() == content


@pytest.mark.usefixtures("sources")
def test_a_cache_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    assert answer() == 42
    assert "cannot write there" in capsys.readouterr().err


@pytest.mark.usefixtures("sources")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in reason()
    next_process()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "no-such-compiler" in reason()
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        native.build(tmp_path / "lib")


@pytest.mark.usefixtures("sources")
def test_what_a_lost_compiler_made_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer() == 42
    next_process()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert answer() == 42


@pytest.mark.usefixtures("sources")
def test_compiling_can_be_forbidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSMQUANT_NO_COMPILE", "1")
    assert "SSMQUANT_NO_COMPILE" in reason()
    assert capsys.readouterr().err == ""


def test_sources_that_do_not_compile(sources: Path, tmp_path: Path) -> None:
    (sources / "selective_scan_cpu_path.cpp").write_text("#error out of paint\n")
    assert "out of paint" in reason()
    assert not kept()
    with pytest.raises(RuntimeError, match="out of paint"):
        native.build(tmp_path / "lib")


@pytest.mark.usefixtures("sources")
def test_a_compiler_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -DNDEBUG")
    assert answer() == 42


def test_a_ready_made_library_comes_first(
    sources: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = native.build(tmp_path / "lib")
    assert path.parent == tmp_path / "lib"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert answer() == 42
    assert not kept()
    assert capsys.readouterr().err == ""
    # One that other sources have made is passed by.
    (sources / "selective_scan_cpu.cpp").write_text(MAIN.format(43))
    next_process()
    assert answer() == 43
    # So is one that does not load.
    path = native.build(tmp_path / "lib")
    path.write_bytes(b"no library")
    next_process()
    assert answer() == 43


@pytest.mark.usefixtures("sources")
def test_threads_compile_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(answer())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [42] * 4
    assert capsys.readouterr().err.count("compiling") == 1


def test_processes_at_once_and_none_at_import(sources: Path) -> None:
    code = f"""
import ssmquant.ops
from pathlib import Path
from ssmquant.ops import native
assert native._found.cache_info().currsize == 0
native._SOURCES = Path({str(sources)!r})
raise SystemExit(native.library().answer() - 42)
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert kept()


KERNELS = """
#include <cstdint>
struct Call { int64_t in, out; };
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t ssmquant_some_paths() { return 2; }
EXPORT const char* ssmquant_some_path(int64_t i) { return i ? "portable" : "best"; }
EXPORT int64_t ssmquant_twice_workspace(const Call* call, int64_t backward) { return call->in << (40 + backward); }
EXPORT void ssmquant_twice_forward(Call* call) { call->out = 2 * call->in; }
EXPORT void ssmquant_twice_backward(Call* call) { call->out = -2 * call->in; }
"""


class Call(ctypes.Structure):
    _fields_ = [("given", ctypes.c_int64), ("result", ctypes.c_int64)]


def test_functions_are_typed_and_instruction_sets_listed(sources: Path) -> None:
    (sources / "selective_scan_cpu.cpp").write_text(KERNELS)
    kernels = native.Kernels("an operator", "some", Call, "twice")
    assert kernels.paths() == ("best", "portable")
    call = Call(3)
    assert kernels.loaded().ssmquant_twice_workspace(call, True) == 3 << 41
    for name, want in (("forward", 6), ("backward", -6)):
        assert getattr(kernels.loaded(), f"ssmquant_twice_{name}")(call) is None
        assert call.result == want
    with pytest.raises(ctypes.ArgumentError):
        kernels.loaded().ssmquant_twice_forward(3)


@pytest.mark.usefixtures("sources")
def test_kernels_say_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMQUANT_NO_COMPILE", "1")
    kernels = native.Kernels("an operator", "some", Call, "twice")
    assert kernels.found == reason()
    with pytest.raises(RuntimeError, match="an operator: SSMQUANT_NO_COMPILE"):
        kernels.paths()
