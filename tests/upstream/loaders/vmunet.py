"""JCruan519/VM-UNet."""

from __future__ import annotations

from torch import nn

from tests.upstream.loaders import checkout, enter, load, package, smaller


def build(size: str) -> nn.Module:
    root = checkout("VM-UNet")
    enter(root)
    package("models", root / "models")
    package("models.vmunet", root / "models" / "vmunet")
    module = load("models.vmunet.vmunet")
    if size == "default":
        return module.VMUNet(depths=[2, 2, 2, 2], depths_decoder=[2, 2, 2, 1])
    small = {"dims": [16, 32, 64, 128], "dims_decoder": [128, 64, 32, 16]}
    with smaller(module, "VSSM", **small):
        return module.VMUNet(depths=[1, 1, 1, 1], depths_decoder=[1, 1, 1, 1])
