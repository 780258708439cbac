"""A Triton that can be imported and not launched, for modules that define kernels which a CPU never runs.

It must not be seen by torch, which would take it for the real one: so it never enters ``sys.modules``, and no finder
knows it. While it is in force, ``import`` statements of other code get it from a wrapped ``builtins.__import__``.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from ssmquant.errors import SsmquantError

__all__ = ["fake_triton", "is_missing"]

_PROBES = {
    "accelerate", "bitsandbytes", "diffusers", "functorch", "ssmquant", "torch", "torchao", "torchaudio", "torchgen",
    "torchvision", "transformers", "triton", "xformers",
}  # fmt: skip
"""Packages that ask whether Triton is there, and then use it. They are told the truth."""


def _unavailable(what: str) -> NoReturn:
    raise SsmquantError(
        f"{what} needs Triton, which is not installed: the stand-in only lets modules that define kernels be imported. "
        "Install Triton and use a GPU, or choose the code path of the model that runs without it"
    )


class _Name:
    """Any name of Triton that has no meaning without it: it decorates, subscripts and compares, and fails if used."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = "triton"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(f"{self.__name__}.{name}")

    def __getitem__(self, item: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _unavailable(self.__name__)

    def __repr__(self) -> str:
        return f"<{self.__name__}: Triton is not installed>"


class Kernel:
    """What ``@triton.jit`` makes: knows its function, and cannot be launched."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn: Callable[..., Any] = getattr(fn, "fn", fn)
        functools.update_wrapper(self, self.fn)

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _unavailable(f"the kernel {getattr(self.fn, '__name__', self.fn)}")

    run = warmup = __call__


class Config:
    """``triton.Config``, which modules sort and sift before they hand it to ``autotune``."""

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
        num_ctas: int = 1,
        maxnreg: int | None = None,
        pre_hook: Any = None,
        **options: Any,
    ) -> None:
        self.kwargs = dict(kwargs)
        self.num_warps, self.num_stages, self.num_ctas = num_warps, num_stages, num_ctas
        self.maxnreg, self.pre_hook, self.options = maxnreg, pre_hook, options


class Benchmark:
    """``triton.testing.Benchmark``: only kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class constexpr:
    """``tl.constexpr``: an annotation, or a wrapped constant."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


def _jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Kernel if fn is None else Kernel(fn)


def _decorator(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda fn: fn


def _autotune(configs: Sequence[Config] = (), *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    def keep(fn: Any) -> Any:
        fn.configs = list(configs)
        return fn

    return keep


def _set_allocator(allocator: Any) -> None:
    pass


def _cdiv(x: int, y: int) -> int:
    return -(-x // y)


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class _Module(types.ModuleType):
    """``triton`` or a module in it. Unknown names are ``_Name``; which submodules exist, nobody checks."""

    def __init__(self, name: str, contents: Mapping[str, Any] | None = None) -> None:
        super().__init__(name, "An ssmquant stand-in: Triton is not installed.")
        self.__path__: list[str] = []
        vars(self).update(contents or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(f"{self.__name__}.{name}")

    def submodule(self, path: str) -> types.ModuleType:
        """The module of that dotted path below this one, made at first use."""
        module = self
        for part in filter(None, path.split(".")):
            if not isinstance(vars(module).get(part), _Module):
                setattr(module, part, _Module(f"{module.__name__}.{part}"))
            module = vars(module)[part]
        return module


@functools.cache
def _triton() -> _Module:
    jit = {
        "jit": _jit,
        "JITFunction": Kernel,
        "Config": Config,
        "autotune": _autotune,
        "heuristics": _decorator,
    }
    sizes = {"cdiv": _cdiv, "next_power_of_2": _next_power_of_2}
    root = _Module("triton", {"__version__": "3.0.0", "set_allocator": _set_allocator, **jit, **sizes})
    vars(root.submodule("language")).update(constexpr=constexpr, **sizes)
    vars(root.submodule("runtime.autotuner")).update(jit)
    vars(root.submodule("runtime.jit")).update(jit)
    vars(root.submodule("testing")).update(perf_report=_decorator, Benchmark=Benchmark)
    return root


def is_missing() -> bool:
    """Whether there is no Triton on this machine."""
    try:
        return importlib.util.find_spec("triton") is None
    except (ImportError, ValueError):
        return sys.modules.get("triton") is None


@contextlib.contextmanager
def fake_triton() -> Iterator[None]:
    """Let ``import triton`` succeed, except in packages that would use it."""
    original = builtins.__import__
    active = True

    @functools.wraps(original)
    def import_(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        if level or not active or (name != "triton" and not name.startswith("triton.")):
            return original(name, globals, locals, fromlist, level)
        importer = str((globals or {}).get("__name__", "torch"))
        if importer.partition(".")[0] in _PROBES:
            return original(name, globals, locals, fromlist, level)
        root = _triton()
        module = root.submodule(name.partition(".")[2])
        return module if fromlist else root

    builtins.__import__ = import_
    try:
        yield
    finally:
        active = False  # should somebody have wrapped this function in turn
        if builtins.__import__ is import_:
            builtins.__import__ = original
