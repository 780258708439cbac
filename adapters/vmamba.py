"""VMamba (Liu et al. 2024) and models that call their backbone VSSM too (VM-UNet, LocalVMamba, MSVM-UNet ...)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ssmquant.adapter import Adapter

__all__ = ["ADAPTER"]


def _example(model: Any) -> tuple[torch.Tensor, ...]:
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    height = width = 224
    embed = getattr(model, "pos_embed", None)
    if isinstance(embed, torch.Tensor) and embed.dim() == 4:  # (1, C, rows, columns) of tokens
        convs = [m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)]
        height, width = (math.prod(int(c.stride[i]) for c in convs) * embed.shape[2 + i] for i in (0, 1))
    weight = conv.weight
    return (torch.zeros(1, conv.in_channels, height, width, dtype=weight.dtype, device=weight.device),)


ADAPTER = Adapter(
    name="vmamba",
    classes=("VSSM",),
    example=_example,
    # As published for vision models: the patch embedding and the head stay in float.
    keep_float=("re:patch_embed(\\..*)?", "re:(classifier\\.)?head", "final_conv"),
)
