"""Modules made inside of forward (Res-VMamba)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.patterns.models_ss2d import SS2D
from tests.patterns.twin import Twin, under

__all__ = ["TWINS", "ResVMamba"]


class ResVMamba(nn.Module):
    """The shortcut's convolution and pooling are made at each call, so that two calls of the original differ."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU())
        self.op = SS2D(8, d_state=2, expand=1)
        self.downsample = nn.Conv2d(8, 12, 3, 2, 1)
        self.pool = nn.MaxPool2d(2)  # registered, and never used
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        shortcut = x
        y = self.downsample(x + self.op(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        pool = nn.MaxPool2d(kernel_size=2, stride=2)
        widen = nn.Conv2d(8, 12, kernel_size=1).to(x.device)
        y = y + widen(pool(shortcut))
        mix = nn.Conv2d(12, 12, kernel_size=1, bias=False).to(x.device)
        return self.head(torch.relu(mix(y)).mean((2, 3)))


TWINS = (
    Twin(
        "modules made in forward", ResVMamba, ((3, 16, 16), (3, 16, 24)),
        (
            *under("patch_embed", "0"), *under("op", "in_proj conv2d x_proj_weight dt_projs_weight scan out_proj"),
            "downsample", *under("_adopted", "0 1"), "head",
        ), 1, adopted=2, elsewhere=True,
    ),
)  # fmt: skip
