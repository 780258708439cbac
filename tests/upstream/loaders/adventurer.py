"""wangf3014/Adventurer: Mamba-2."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, smaller


def build(size: str) -> nn.Module:
    enter(checkout("Adventurer"))
    module = load("models_mamba")
    changes: dict[str, Any] = {}
    if size == "small":
        changes = {"embed_dim": 64, "depth": 4, "img_size": 64, "mamba_d_state": 16, "num_classes": 10}
    with smaller(module, "Adventurer", **changes):
        return module.adventurer_tiny_patch16()
