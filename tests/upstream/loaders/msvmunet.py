"""gndlwch2w/msvm-unet: cross scans are Triton kernels here; the repository's own torch versions stand in."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, smaller


def build(size: str) -> nn.Module:
    enter(checkout("msvm-unet"))
    module: Any = load("model.vmamba.vmamba")
    for name in ("CrossScan", "CrossMerge"):
        setattr(module, f"{name}Triton", getattr(module, name))
        setattr(module, f"{name}TritonF", getattr(module, name))
    root: Any = load("model")
    if size == "default":
        return root.MSVMUNet(in_channels=3, num_classes=9)
    with smaller(load("model.vmamba"), "VSSM", depths=[1, 1, 1, 1], dims=16):
        return root.MSVMUNet(in_channels=3, num_classes=9)
