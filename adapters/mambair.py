"""MambaIR (Guo et al., ECCV 2024): super-resolution, denoising, JPEG artifact reduction."""

from __future__ import annotations

from typing import Any

import torch

from ssmquant.adapter import Adapter

__all__ = ["ADAPTER"]


def _example(model: Any) -> tuple[torch.Tensor, ...]:
    weight = model.conv_first.weight
    return (torch.zeros(1, weight.shape[1], 32, 32, dtype=weight.dtype, device=weight.device),)


ADAPTER = Adapter(
    name="mambair",
    classes=("MambaIR",),
    example=_example,
    # The published placement: the shallow feature extractor and the reconstruction stay in float.
    keep_float=(
        "conv_first",
        "re:conv_after_body(\\..*)?",
        "re:conv_before_upsample(\\..*)?",
        "re:upsample(\\..*)?",
        "re:conv_(up1|up2|hr|last)",
    ),
)
