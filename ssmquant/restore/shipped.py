"""Models that come with the library: MambaIR-light for super-resolution x2 (``examples/weights/README.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ssmquant.errors import ConfigError

__all__ = ["SHIPPED", "shipped_model"]

SHIPPED: Mapping[str, str] = MappingProxyType(
    {"w4a4": "mambair_light_x2_w4a4.safetensors", "w2a2": "mambair_light_x2_w2a2.safetensors"}
)
"""Files by name."""
_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "weights", _PACKAGE.parent / "examples" / "weights")  # of a wheel, of a checkout


def shipped_model(name: str = "w4a4") -> Path:
    """The file of a model that enlarges pictures twice, for :func:`ssmquant.load`.

    Args:
        name: ``"w4a4"``, 4 bits, or ``"w2a2"``, 2 bits: smaller, and a little less sharp.

    Raises:
        ConfigError: there is none of that name, or this installation is without them.
    """
    if name not in SHIPPED:
        raise ConfigError(f"no model {name!r} comes with ssmquant; there are {', '.join(SHIPPED)}")
    for folder in _FOLDERS:
        if (folder / SHIPPED[name]).is_file():
            return folder / SHIPPED[name]
    raise ConfigError(f"{SHIPPED[name]} is missing in this installation; give the file of a model")
