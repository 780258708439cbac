"""isyangshu/MambaMIL: its mixers are a copy of mamba_ssm, imported as ``mamba.mamba_ssm`` beside the installed one."""

from __future__ import annotations

from torch import nn

from tests.upstream.loaders import checkout, enter, load, package


def build(kind: str, size: str) -> nn.Module:
    root = checkout("MambaMIL")
    enter(root)
    package("models", root / "models")
    MambaMIL = load("models.MambaMIL").MambaMIL
    if size == "default":
        return MambaMIL(1024, 2, 0.25, "gelu", layer=2, rate=10, type=kind)
    return MambaMIL(32, 8, 0.25, "gelu", layer=1, rate=5, type=kind)
