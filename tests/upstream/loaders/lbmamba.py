"""cvlab-stonybrook/LBMamba: LBVim."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, package, smaller


def build(size: str) -> nn.Module:
    root = checkout("LBMamba") / "classification"
    enter(root)
    package("mamba_ssm", root / "mamba_ssm")  # meant to be copied over an installed one
    module = load("models_mamba_bi")
    changes: dict[str, Any] = {}
    if size == "small":
        changes = {"embed_dim": 32, "depth": 3, "img_size": 64, "num_classes": 10}
    with smaller(module, "BiVisionMamba", **changes):
        return module.lbvim_tiny_patch16_224()
