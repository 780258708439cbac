"""Vision Mamba (Zhu et al. 2024) and models that are called VisionMamba too (LocalVim ...)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssmquant.adapter import Adapter

__all__ = ["ADAPTER"]


def _example(model: Any) -> tuple[torch.Tensor, ...]:
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    sizes = (getattr(m, "img_size", None) for m in (getattr(model, "patch_embed", None), model))
    size = next((s for s in sizes if s), 224)
    height, width = (size, size) if isinstance(size, int) else size
    weight = conv.weight
    return (torch.zeros(1, conv.in_channels, height, width, dtype=weight.dtype, device=weight.device),)


ADAPTER = Adapter(
    name="vim",
    classes=("VisionMamba",),
    example=_example,
    # As published for vision models: the patch embedding and the head stay in float.
    keep_float=("re:patch_embed(\\..*)?", "head"),
)
