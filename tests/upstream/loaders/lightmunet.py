"""MrBlankness/LightM-UNet: one file of its nnU-Net fork, over the mamba_ssm of state-spaces/mamba."""

from __future__ import annotations

from torch import nn

from tests.upstream.loaders import checkout, enter, load, package


def build(dims: int, size: str) -> nn.Module:
    mamba = checkout("mamba")
    enter(checkout("LightM-UNet") / "lightm-unet" / "nnunetv2" / "nets", mamba)
    package("mamba_ssm", mamba / "mamba_ssm")  # its own __init__ imports kernels of Mamba-3
    vars(load("mamba_ssm"))["Mamba"] = load("mamba_ssm.modules.mamba_simple").Mamba
    LightMUNet = load("LightMUNet").LightMUNet
    if size == "default":
        return LightMUNet(spatial_dims=dims, init_filters=32, in_channels=1, out_channels=2)
    return LightMUNet(spatial_dims=dims, init_filters=8, blocks_down=(1, 1, 2), blocks_up=(1, 1))
