"""The library of C++ kernels for the CPU: found ready-made, found in the cache, or compiled once on this machine.

It is a plain shared library with C functions that take addresses, called through ``ctypes``: it includes no header of
Python or torch, so one file serves every version of both. Files that are meant for one instruction set are compiled
with its flags and chosen from at run time; the rest is compiled for any machine of the architecture.

Nothing here runs when a module is imported, and neither torch nor the rest of the library is needed, so that a build
script can use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ssmquant.ops import cache

__all__ = ["Kernels", "build", "library"]

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = _PACKAGE / "csrc"
_READY_MADE = _PACKAGE / "lib"

_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
_LINK = ("-shared", "-pthread", "-ldl")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_PATHS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "vnni": (*_AVX512, "-mavx512vnni"),
}
# Kernels: source files <name>_cpu.cpp, and <name>_cpu_path.cpp once for each of some instruction sets; flags of their
# own.
_KERNELS = {
    "selective_scan": (("portable", "avx2", "avx512"), ()),
    "quantize": (
        ("portable", "avx2", "avx512"),
        ("-ffp-contract=off",),
    ),  # codes have to equal those of plain PyTorch
    "deployed": (("portable", "avx2", "avx512", "vnni"), ()),
}
_LONGEST = 600  # seconds for one run of the compiler

# Keeps threads that need the library at once from compiling it twice.
_lock = threading.Lock()


class _Failed(Exception):
    """Why there is no library."""


def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none, as a short sentence. Compiles at its first use if it must.

    ``SSMQUANT_NO_COMPILE=1`` in the environment forbids that. Before compiling, one line goes to stderr.
    """
    with _lock:
        return _found()


@functools.cache
def _found() -> ctypes.CDLL | str:
    try:
        return _find()
    except _Failed as error:
        return str(error)


class Kernels:
    """The library's functions for one operator, typed at their first use.

    ``ssmquant_<kind>_forward`` and ``_backward`` take a ``call``; ``ssmquant_<kind>_workspace`` takes one, and whether
    it is for the backward pass, and says how large a workspace it needs. ``ssmquant_<prefix>_paths`` and ``_path``
    list instruction sets.
    """

    def __init__(self, operator: str, prefix: str, call: type[ctypes.Structure], *kinds: str) -> None:
        self._operator, self._prefix, self._call, self._kinds = operator, prefix, call, kinds

    @functools.cached_property
    def found(self) -> ctypes.CDLL | str:
        """The library, or why there is none. May compile at first use."""
        found = library()
        if isinstance(found, str):
            return found
        call = ctypes.POINTER(self._call)
        for kind in self._kinds:
            size = getattr(found, f"ssmquant_{kind}_workspace")
            size.argtypes, size.restype = [call, ctypes.c_int64], ctypes.c_int64
            for way in ("forward", "backward"):
                function = getattr(found, f"ssmquant_{kind}_{way}")
                function.argtypes, function.restype = [call], None
        return found

    def loaded(self) -> ctypes.CDLL:
        """The library.

        Raises:
            RuntimeError: there is none; the message says why.
        """
        if isinstance(self.found, str):
            raise RuntimeError(f"{self._operator}: {self.found}")
        return self.found

    def paths(self) -> tuple[str, ...]:
        """The instruction sets that this machine can run, "avx512", "avx2", "portable"; the first one is used."""
        found = self.loaded()
        count, name = (getattr(found, f"ssmquant_{self._prefix}_{what}") for what in ("paths", "path"))
        count.argtypes, count.restype = [], ctypes.c_int64
        name.argtypes, name.restype = [ctypes.c_int64], ctypes.c_char_p
        return tuple(name(i).decode() for i in range(count()))


def build(folder: str | os.PathLike[str], flags: Sequence[str] = ()) -> Path:
    """Compile the library into ``folder``, where a wheel that carries it as ``ssmquant/lib`` will find it.

    Args:
        folder: made if it is not there.
        flags: more options for compiling and linking, after ours. What they make has a name of its own, under which
            no process looks for it: who wants it loads it. ``tests/ops/test_sanitizers.py`` does.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message has its output.
        OSError: the folder cannot be made or written to.
    """
    try:
        content = _compile(_compiler(), flags)
    except _Failed as error:
        raise RuntimeError(f"cannot build ssmquant's CPU kernels: {error}") from None
    path = Path(folder) / _ready_made_name(flags)
    cache.publish(path, content)
    return path


def _find() -> ctypes.CDLL:
    if ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little":
        raise _Failed("the CPU kernels are for little-endian machines of 64 bits")
    ready_made = _READY_MADE / _ready_made_name()
    if ready_made.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(ready_made))
    # What another compiler made is passed by, unless there is none now.
    name, missing = f"cpu-{cache.key(*_ingredients())}", None
    try:
        command = _compiler()
        name += f"-{cache.key(_version(command))}"
    except _Failed as error:
        command, missing = [], error
    folder = cache.folder()
    for path in sorted(folder.glob(f"{name}-*.so")):
        if _is_whole(path):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
    if missing is not None:
        raise missing
    if cache.compiling_is_forbidden():
        raise _Failed("SSMQUANT_NO_COMPILE forbids compiling the CPU kernels")
    print(f"ssmquant: compiling the CPU kernels, once, into {folder}", file=sys.stderr, flush=True)
    content = _compile(command)
    path = folder / f"{name}-{_digest(content)}.so"
    try:
        cache.publish(path, content)
    except OSError as error:
        print(f"ssmquant: cannot write there, the next process compiles again ({error})", file=sys.stderr)
        return _load_from_elsewhere(content)
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _Failed(f"the compiled CPU kernels cannot be loaded: {error}") from None


def _load_from_elsewhere(content: bytes) -> ctypes.CDLL:
    """Load what can be kept nowhere. A loaded library needs its file no longer."""
    try:
        with tempfile.TemporaryDirectory(prefix="ssmquant-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "cpu.so"
            path.write_bytes(content)
            return _load(path)
    except OSError as error:
        raise _Failed(f"nowhere to write the compiled CPU kernels to: {error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    """Whether a file has the content that its name says. Loading one that was cut short could end the process."""
    try:
        return path.stem.endswith(_digest(path.read_bytes()))
    except OSError:
        return False


def _units() -> dict[str, tuple[str, ...]]:
    """What is compiled, by name of the object: source file and flags."""
    units: dict[str, tuple[str, ...]] = {}
    for name, (paths, own) in _KERNELS.items():
        units[name] = (f"{name}_cpu.cpp", *own)
        for path in paths:
            if path == "portable" or platform.machine().lower() in ("x86_64", "amd64"):
                flags = (f"-DSSMQUANT_PATH={path}", *_PATHS[path], *own)
                units[f"{name}_{path}"] = (f"{name}_cpu_path.cpp", *flags)
    return units


def _ingredients() -> list[str | bytes]:
    """All that makes the library but the compiler."""
    parts: list[str | bytes] = [sys.platform, platform.machine(), repr((_FLAGS, _LINK, _units()))]
    for source in sorted(_SOURCES.glob("*cpu*")):
        parts += [source.name, source.read_bytes()]
    return parts


def _ready_made_name(flags: Sequence[str] = ()) -> str:
    """Says what it was made of, so that one left behind by another version is passed by."""
    return f"ssmquant_cpu-{cache.key(*_ingredients(), *flags)}.so"


def _compiler() -> list[str]:
    """The command of the system's C++ compiler, with options of the user's where ``CXX`` has some."""
    named = os.environ.get("CXX")
    if named:
        try:
            command = shlex.split(named)
        except ValueError:
            command = []
        if not command or shutil.which(command[0]) is None:
            raise _Failed(f"CXX is {named!r}, which is no command here")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise _Failed("no C++ compiler (c++, g++ or clang++); set CXX, or install one")


def _version(command: list[str]) -> str:
    return shlex.join(command) + _finish(_start([*command, "--version"]))


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise _Failed(f"the C++ compiler {command[0]} cannot be run: {error}") from None


def _finish(process: subprocess.Popen[str]) -> str:
    """What it printed.

    Raises:
        _Failed: with the end of that, if it failed.
    """
    try:
        output, _ = process.communicate(timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise _Failed(f"the C++ compiler took more than {_LONGEST} s") from None
    if process.returncode:
        raise _Failed(f"the C++ compiler failed: {output.strip()[-2000:] or process.returncode}")
    return output


def _compile(command: list[str], more: Sequence[str] = ()) -> bytes:
    """The library, as the content of a file. Its parts are compiled side by side, one a processor."""
    try:
        with tempfile.TemporaryDirectory(prefix="ssmquant-", ignore_cleanup_errors=True) as folder:
            objects = []
            with contextlib.ExitStack() as stack:
                running: list[subprocess.Popen[str]] = []
                for name, (source, *flags) in _units().items():
                    if len(running) >= (os.cpu_count() or 1):  # one takes up to 300 MB
                        _finish(running.pop(0))
                    objects.append(os.path.join(folder, f"{name}.o"))
                    line = [*command, *_FLAGS, *flags, *more, "-c", str(_SOURCES / source), "-o", objects[-1]]
                    running.append(stack.enter_context(_start(line)))
                    stack.callback(running[-1].kill)  # for those still running when another has failed
                for process in running:
                    _finish(process)
            path = Path(folder) / "library.so"
            _finish(_start([*command, *_LINK, *more, *objects, "-o", str(path)]))
            return path.read_bytes()
    except OSError as error:
        raise _Failed(f"nowhere to compile: {error}") from None
