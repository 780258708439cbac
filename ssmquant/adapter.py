"""What the library may be told about a model family: a few declarative facts. Adapters import only this module."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ssmquant.errors import ConfigError

__all__ = ["Adapter", "ScanRole", "find_adapter", "get_adapter", "register_adapter"]


@dataclass(frozen=True)
class ScanRole:
    """Which argument of a foreign selective scan is what.

    Args:
        name: Class name of an ``autograd.Function``, or ``namespace::op`` of a custom operator.
        arguments: Names of its positional arguments, in order, out of ``u, delta, A, B, C, D, z, delta_bias,
            delta_softplus, return_last_state``.
        always_state: It always returns ``(out, last_state)``, whatever ``return_last_state`` says.
    """

    name: str
    arguments: tuple[str, ...]
    always_state: bool = False


@dataclass(frozen=True)
class Adapter:
    """Facts about one model family. Everything has a default: a model that traces by itself needs no adapter.

    Args:
        name: Short name, as in ``prepare(..., adapter="mambair")``.
        classes: Class names of root modules that it serves.
        example: Makes example inputs (a tuple) for a model, so that ``prepare`` needs none.
        leaf: Class names of modules that are kept as one opaque node.
        keep_float: Patterns of sites (see ``Rule``) that stay in float by default, with the published placement.
        scans: Further selective scans.
        notes: What a user should know; shown by ``summary``.
    """

    name: str
    classes: tuple[str, ...] = ()
    example: Callable[[Any], tuple[Any, ...]] | None = None
    leaf: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    scans: tuple[ScanRole, ...] = ()
    notes: tuple[str, ...] = field(default=())


_BUILT_IN = {"mambair": "ssmquant.adapters.mambair"}
_REGISTERED: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    """Make an adapter known for this process; one of the same name is replaced."""
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"register_adapter: expected an ssmquant.Adapter, got {type(adapter).__name__}")
    _REGISTERED[adapter.name] = adapter
    return adapter


def _modules() -> dict[str, str]:
    found = dict(_BUILT_IN)
    for ep in importlib.metadata.entry_points(group="ssmquant.adapters"):
        found.setdefault(ep.name, ep.value)
    return found


def get_adapter(name: str) -> Adapter:
    """The adapter of that name: registered ones, then the built-in ones, then installed entry points.

    Raises:
        ConfigError: there is none; the known names are listed.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    modules = _modules()
    if name not in modules:
        raise ConfigError(
            f"adapter {name!r}: known adapters are {', '.join(sorted({*modules, *_REGISTERED}))}"
        )
    module, _, attr = modules[name].partition(":")
    return getattr(importlib.import_module(module), attr or "ADAPTER")


def find_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that names the model's class or one of its bases, if any."""
    names = {c.__name__ for c in type(model).__mro__}
    for key in [*_REGISTERED, *(k for k in _modules() if k not in _REGISTERED)]:
        adapter = get_adapter(key)
        if names & set(adapter.classes):
            return adapter
    return None
