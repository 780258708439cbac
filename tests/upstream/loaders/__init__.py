"""Getting foreign code to import on a CPU: paths, packages that are not installed, compiled kernels.

Everything here changes the process for good; ``tests.upstream.run`` gives every family one of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

VARIABLE = "SSMQUANT_UPSTREAM"


def checkout(name: str) -> Path:
    """Where a repository lies."""
    return Path(os.environ[VARIABLE]).resolve() / name


def enter(*folders: Path, kernels: bool = True) -> None:
    """Makes folders importable (the first wins), torchvision harmless, and kernels available."""
    sys.path[:0] = [str(f) for f in folders]
    _quiet_torchvision()
    if kernels:
        import ssmquant

        ssmquant.install_standins()


def _quiet_torchvision() -> None:
    """timm imports torchvision, whose compiled operators are often built for another torch than the one at hand."""
    real = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return real(op, *args, **kwargs)

    torch.library.register_fake = register_fake


def stub(name: str, **attributes: Any) -> types.ModuleType:
    """A module that is not installed, with the few names that are imported from it; parents too."""
    parent, _, child = name.rpartition(".")
    if parent and parent not in sys.modules:
        stub(parent)
    module = types.ModuleType(name)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    vars(module).update(attributes)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def package(name: str, folder: Path) -> None:
    """A package whose ``__init__`` would import more than is needed: its modules are found, the rest is not run."""
    stub(name).__path__ = [str(folder)]


@contextlib.contextmanager
def smaller(module: types.ModuleType, name: str, **changes: Any) -> Iterator[None]:
    """While a shipped constructor function runs, its class gets other arguments."""
    real: Callable[..., Any] = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: real(*args, **{**kwargs, **changes}))
    try:
        yield
    finally:
        setattr(module, name, real)


def load(name: str) -> types.ModuleType:
    return importlib.import_module(name)
