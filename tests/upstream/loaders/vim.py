"""hustvl/Vim, with the mamba_ssm of its own that it needs."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, smaller

_NAME = "vim_{}_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_{}_div2"


def build(variant: str, size: str) -> nn.Module:
    root = checkout("Vim")
    enter(root / "vim", root / "mamba-1p1p1")
    module = load("models_mamba")
    changes: dict[str, Any] = {}
    if size == "small":
        changes = {"embed_dim": 32, "depth": 3, "img_size": 64, "num_classes": 10}
    with smaller(module, "VisionMamba", **changes):
        token = "middle_cls_token" if variant == "base" else "midclstok"
        return getattr(module, _NAME.format(variant, token))()
