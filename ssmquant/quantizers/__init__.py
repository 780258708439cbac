"""Learnable quantizers. A new one is one file here and one line in :data:`QUANTIZERS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ssmquant.errors import ConfigError
from ssmquant.quantizers.base import QTensor, Quantizer
from ssmquant.quantizers.dls import DLS
from ssmquant.quantizers.lsq import LSQ
from ssmquant.quantizers.minmax import MinMax
from ssmquant.quantizers.rfa import RFA

__all__ = ["DLS", "LSQ", "QUANTIZERS", "RFA", "MinMax", "QTensor", "Quantizer", "get_quantizer"]

QUANTIZERS: Mapping[str, type[Quantizer]] = MappingProxyType(
    {"lsq": LSQ, "dls": DLS, "rfa": RFA, "minmax": MinMax}
)
"""Quantizer classes by the names that :class:`ssmquant.QConfig` uses."""


def get_quantizer(name: str) -> type[Quantizer]:
    """Return the class of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    try:
        return QUANTIZERS[name]
    except KeyError:
        raise ConfigError(
            f"unknown quantizer {name!r}; choose from {', '.join(sorted(QUANTIZERS))}"
        ) from None
