"""Finders for ``sys.meta_path``: the last one serves what nobody has, the first one mends what cannot work here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch import Tensor

from ssmquant._standins.surface import CPU_ROUTES, EXTENSIONS, MODULES, SPARE, TWINS

__all__ = ["Mender", "Server", "found", "is_ours"]


def is_ours(module: Any) -> bool:
    """Whether a module, or a spec, is a stand-in."""
    loader = getattr(module, "loader", None) or getattr(module, "__loader__", None)
    return isinstance(loader, Server)


def found(name: str) -> ModuleSpec | None:
    """The spec of an installed module, stand-ins apart. Imports its parents, as ``importlib.util.find_spec``."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no parent; a module without a spec
        return None
    return None if spec is None or is_ours(spec) else spec


class Server(MetaPathFinder, Loader):
    """Serves stand-ins. At the end of ``sys.meta_path``, it is asked only for what no other finder has."""

    def __init__(self) -> None:
        self.made: dict[str, types.ModuleType] = {}

    def spec(self, name: str) -> ModuleSpec:
        """The spec of the stand-in of that name."""
        package = any(other.startswith(f"{name}.") for other in MODULES)
        return ModuleSpec(name, self, origin="stand-in of ssmquant", is_package=package)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called by ``import``."""
        return self.spec(fullname) if fullname in MODULES else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Fills a new module."""
        name = module.__name__
        twin = TWINS.get(name)
        real = None if twin is None or found(twin) is None else importlib.import_module(twin)
        contents = MODULES[name] if real is None else {k: v for k, v in vars(real).items() if k[:2] != "__"}
        vars(module).update(contents)
        module.__doc__ = "A stand-in of ssmquant: the package is not installed."
        vars(module)["__getattr__"] = functools.partial(_missing, name)
        self.made[name] = module

    def forget(self) -> None:
        """Takes the modules out of ``sys.modules`` and out of the installed packages that they were added to."""
        for name, module in self.made.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            package, _, last = name.rpartition(".")
            parent = sys.modules.get(package)
            if parent is not None and vars(parent).get(last) is module:
                delattr(parent, last)
        self.made.clear()


def _missing(module: str, name: str) -> Any:
    if f"{module}.{name}" in MODULES:
        return importlib.import_module(f"{module}.{name}")
    raise AttributeError(f"module {module!r} is a stand-in of ssmquant, which has no {name!r}")


class Mender(MetaPathFinder):
    """At the head of ``sys.meta_path``. What is installed stays what is imported, with three exceptions:

    - an extension module that is there and does not load (made for another torch or CUDA) is served as if missing;
    - functions over Triton kernels get a path for tensors on a CPU, see :data:`CPU_ROUTES`;
    - modules for language models that do not import are filled with names that raise when used, see :data:`SPARE`.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.broken: dict[str, str] = {}

    def probe(self) -> None:
        """Finds the extension modules that do not load, and looks at what has been imported already."""
        for name in EXTENSIONS:
            if name not in sys.modules and found(name) is not None:
                try:
                    importlib.import_module(name)
                except Exception as e:  # whatever it says: it is of no use
                    self.broken[name] = str(e).partition("\n")[0]
        for name, module in list(sys.modules.items()):
            if _tail(name) in CPU_ROUTES and isinstance(module, types.ModuleType) and not is_ours(module):
                _add_routes(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called by ``import``."""
        if fullname in self.broken:
            return self.server.spec(fullname)
        if _tail(fullname) not in CPU_ROUTES and not _is_spare(fullname):
            return None
        for finder in sys.meta_path:
            if finder is self or finder is self.server or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return _mended(spec)
        return None


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _is_spare(name: str) -> bool:
    return _tail(name) in SPARE and name.split(".")[-3:-2] == ["mamba_ssm"]


def _mended(spec: ModuleSpec) -> ModuleSpec:
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None:
        return spec

    def exec_module(module: types.ModuleType) -> None:
        try:
            execute(module)
        except ImportError:
            if not _is_spare(spec.name):
                raise
            vars(module).update(SPARE[_tail(spec.name)])
        if _tail(spec.name) in CPU_ROUTES:
            _add_routes(module)

    spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
    return spec


def _add_routes(module: types.ModuleType) -> None:
    """Wraps the functions; they stay wrapped, because modules import them by name."""
    for name, ours in CPU_ROUTES[_tail(module.__name__)].items():
        function = vars(module).get(name)
        if inspect.isfunction(function) and not hasattr(function, "ssmquant_route"):
            setattr(module, name, _route(function, ours))


def _route(real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, or on a CPU ``ours``, by the names of the arguments of ``real``."""
    signature = inspect.signature(real)

    @functools.wraps(real)
    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        first = next((a for a in arguments.values() if isinstance(a, Tensor)), None)
        if first is None or first.device.type != "cpu":
            return real(*args, **kwargs)
        return ours(**arguments)

    function.ssmquant_route = True  # type: ignore[attr-defined]
    return function
