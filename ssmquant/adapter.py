"""What the library may be told about a model family: a few declarative facts. Adapters import only this module."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ssmquant.errors import ConfigError

__all__ = ["Adapter", "FunctionRole", "ScanRole", "find_adapter", "get_adapter", "register_adapter"]


@dataclass(frozen=True)
class ScanRole:
    """Which argument of a foreign selective scan is what.

    Args:
        name: Class name of an ``autograd.Function`` (dots in front narrow it down: ``"package.module.Class"`` and any
            tail of that), or ``namespace::op`` of a custom operator.
        arguments: Names of its positional arguments, in order, out of ``u, delta, A, B, C, D, z, delta_bias,
            delta_softplus, return_last_state, oflex, window``; others are passed over.
        always_state: It always returns ``(out, last_state)``, whatever ``return_last_state`` says.
        kind: ``"s6"``, Mamba's scan, or ``"ssd"``, Mamba-2's, whose operands ``x, dt, A, B, C, D, z, dt_bias, ...``
            come as ``torch.ops.ssmquant.ssd_scan`` takes them.
    """

    name: str
    arguments: tuple[str, ...]
    always_state: bool = False
    kind: str = "s6"


@dataclass(frozen=True)
class FunctionRole:
    """What a foreign ``autograd.Function`` computes, for functions that the tracer cannot look into.

    A fused kernel hides the weights and the scan in it. ``unfold`` says the same in plain torch calls, which are then
    traced, and quantized, as if the user had written them. ``shape`` only says what comes out; the Function stays as
    it is, one node. Give one of them.

    Args:
        name: Class name, as in ``ScanRole``.
        unfold: Takes the arguments of the Function's ``forward`` by keyword, without the context; returns its result.
        shape: As ``unfold``, but need only return tensors of the right sizes and dtypes.
    """

    name: str
    unfold: Callable[..., Any] | None = None
    shape: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if (self.unfold is None) == (self.shape is None):
            raise ConfigError(f"FunctionRole({self.name!r}): give either unfold= or shape=")


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
        functions: Further Functions that run native code.
        notes: What a user should know; shown by ``summary``.
    """

    name: str
    classes: tuple[str, ...] = ()
    example: Callable[[Any], tuple[Any, ...]] | None = None
    leaf: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    scans: tuple[ScanRole, ...] = ()
    functions: tuple[FunctionRole, ...] = ()
    notes: tuple[str, ...] = field(default=())


_BUILT_IN = {
    "mambair": "ssmquant.adapters.mambair",
    "vim": "ssmquant.adapters.vim",
    "vmamba": "ssmquant.adapters.vmamba",
}
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
