"""Learnable quantizers. A new one is one file here and one line in :data:`QUANTIZERS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ssmquant.errors import ConfigError
from ssmquant.quantizers.base import QTensor, Quantizer
from ssmquant.quantizers.dls import DLS
from ssmquant.quantizers.dorefa import DoReFa
from ssmquant.quantizers.lsq import LSQ
from ssmquant.quantizers.minmax import MinMax
from ssmquant.quantizers.n2uq import N2UQ
from ssmquant.quantizers.pact import PACT
from ssmquant.quantizers.pts import PTS, PositionSample
from ssmquant.quantizers.rfa import RFA
from ssmquant.quantizers.rlq import RLQ
from ssmquant.quantizers.shared import Ladder, Shared
from ssmquant.quantizers.token import Token

__all__ = [
    "DLS",
    "LSQ",
    "N2UQ",
    "OPERANDS",
    "PACT",
    "PTS",
    "QUANTIZERS",
    "RFA",
    "RLQ",
    "DoReFa",
    "Ladder",
    "MinMax",
    "PositionSample",
    "QTensor",
    "Quantizer",
    "Shared",
    "Token",
    "get_quantizer",
]

QUANTIZERS: Mapping[str, type[Quantizer]] = MappingProxyType(
    {
        "lsq": LSQ,
        "dls": DLS,
        "rfa": RFA,
        "minmax": MinMax,
        "pact": PACT,
        "dorefa": DoReFa,
        "n2uq": N2UQ,
        "rlq": RLQ,
        "token": Token,
        "pts": PTS,
    }
)
"""Quantizers of single elements, by the names that :class:`ssmquant.QConfig` uses."""
OPERANDS: Mapping[str, type[Quantizer]] = MappingProxyType({"ladder": Ladder, "shared": Shared})
"""Those that look at a whole operand of a scan."""


def get_quantizer(name: str) -> type[Quantizer]:
    """Return the class of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    try:
        return {**QUANTIZERS, **OPERANDS}[name]
    except KeyError:
        known = ", ".join(sorted((*QUANTIZERS, *OPERANDS)))
        raise ConfigError(f"unknown quantizer {name!r}; choose from {known}") from None
