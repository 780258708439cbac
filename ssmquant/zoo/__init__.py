"""Models of our own, compatible with upstream's checkpoints, built from a plain dict that files can hold."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from ssmquant.errors import ConfigError
from ssmquant.zoo.mambair import (
    MambaIR,
    mambair_classic,
    mambair_denoise,
    mambair_light,
    mambair_tiny,
)
from ssmquant.zoo.vim import VisionMamba, vim_base, vim_nano, vim_small, vim_tiny
from ssmquant.zoo.vmamba import VSSM, vmamba_base, vmamba_nano, vmamba_small, vmamba_tiny, vmamba_tiny_v0
from ssmquant.zoo.vmunet import VMUNet, vmunet_base, vmunet_nano

__all__ = [
    "REGISTRY",
    "VSSM",
    "MambaIR",
    "VMUNet",
    "VisionMamba",
    "build",
    "describe",
    "mambair_classic",
    "mambair_denoise",
    "mambair_light",
    "mambair_tiny",
    "vim_base",
    "vim_nano",
    "vim_small",
    "vim_tiny",
    "vmamba_base",
    "vmamba_nano",
    "vmamba_small",
    "vmamba_tiny",
    "vmamba_tiny_v0",
    "vmunet_base",
    "vmunet_nano",
]

REGISTRY: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "MambaIR": MambaIR,
        "mambair_classic": mambair_classic,
        "mambair_denoise": mambair_denoise,
        "mambair_light": mambair_light,
        "mambair_tiny": mambair_tiny,
        "VSSM": VSSM,
        "vmamba_base": vmamba_base,
        "vmamba_nano": vmamba_nano,
        "vmamba_small": vmamba_small,
        "vmamba_tiny": vmamba_tiny,
        "vmamba_tiny_v0": vmamba_tiny_v0,
        "VisionMamba": VisionMamba,
        "vim_base": vim_base,
        "vim_nano": vim_nano,
        "vim_small": vim_small,
        "vim_tiny": vim_tiny,
        "VMUNet": VMUNet,
        "vmunet_base": vmunet_base,
        "vmunet_nano": vmunet_nano,
    }
)


def build(what: str | Mapping[str, Any], **args: Any) -> nn.Module:
    """A model by name, ``build("mambair_light", upscale=2)``, or from what ``describe`` gave.

    Args:
        what: a name in ``REGISTRY``, or ``{"name": ..., "args": {...}}``.
        **args: arguments of the builder; they override those of the dict.

    Raises:
        ConfigError: an unknown name, key or argument, or an argument out of range.
    """
    config: Mapping[str, Any] = {"name": what} if isinstance(what, str) else what
    if not isinstance(config, Mapping) or not {"name"} <= set(config) <= {"name", "args"}:
        raise ConfigError(f'expected a name or {{"name": ..., "args": {{...}}}}, got {what!r}')
    name, given = config["name"], config.get("args", {})
    if not isinstance(name, str) or name not in REGISTRY:
        raise ConfigError(f"no zoo model {name!r}; there are {', '.join(sorted(REGISTRY))}")
    if not isinstance(given, Mapping):
        raise ConfigError(f"zoo model {name}: args must be a dict, got {given!r}")
    merged = {**given, **args}
    builder = REGISTRY[name]
    known = list(inspect.signature(builder).parameters)
    unknown = sorted(str(k) for k in merged if k not in known)
    if unknown:
        raise ConfigError(f"zoo model {name} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        return builder(**merged)
    except TypeError as error:
        raise ConfigError(f"zoo model {name}: an argument has the wrong type ({error})") from error


def describe(model: nn.Module) -> dict[str, Any]:
    """The JSON-able dict from which ``build`` makes the same model, without its weights.

    Raises:
        ConfigError: the model is not of the zoo.
    """
    config = getattr(model, "zoo_config", None)
    if not isinstance(config, dict):
        raise ConfigError(
            f"{type(model).__name__} is not a zoo model; a file of it loads with the model passed in"
        )
    return copy.deepcopy(config)
