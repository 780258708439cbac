"""MzeroMiko/VMamba: classification/models, whose modules are also importable alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, smaller


def build(function: str, size: str, **changes: Any) -> nn.Module:
    """``function``: one of the constructors at the end of vmamba.py."""
    enter(checkout("VMamba") / "classification" / "models")
    module = load("vmamba")
    if size == "small":
        changes = {"depths": [1, 1, 2, 1], "dims": 16, "num_classes": 10, **changes}
    with smaller(module, "VSSM", **changes):
        return getattr(module, function)()
