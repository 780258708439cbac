"""U-shaped networks: patches merged and expanded by views, skip connections (VM-UNet, MSVM-UNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.models_ss2d import SS2D, LayerNorm2d, Linear2d, SS2DConv
from tests.patterns.twin import Twin, under

__all__ = ["TWINS"]


# ---- VM-UNet: channels last ----------------------------------------------------------------------------------------


class PatchEmbed2D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging2D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * width, 2 * width, bias=False), nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        fix = [-1, -1]
        if (W % 2 != 0) or (H % 2 != 0):
            fix = [H // 2, W // 2]
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        if fix[0] > 0:
            parts = [p[:, : fix[0], : fix[1], :] for p in parts]
        x = torch.cat(parts, -1).view(B, H // 2, W // 2, 4 * C)
        return self.reduction(self.norm(x))


class PatchExpand2D(nn.Module):
    """Linear, then channels into pixels."""

    def __init__(self, width: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(width, scale * width, bias=False)
        self.norm = nn.LayerNorm(width // scale)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        p = self.scale
        x = self.expand(x).view(B, H, W, p, p, C // p)
        return self.norm(x.permute(0, 1, 3, 2, 4, 5).reshape(B, H * p, W * p, -1))


class VSSBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(width), SS2D(width, d_state=2, expand=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attention(self.ln_1(x))


class Encoder(nn.Module):
    def __init__(self, width: int, down: bool) -> None:
        super().__init__()
        self.downsample = PatchMerging2D(width) if down else None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class Decoder(nn.Module):
    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([VSSBlock(width)] * (not up))
        self.upsample = PatchExpand2D(2 * width) if up else None

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample is not None:
            x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class VSSM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed2D(8)
        self.layers = nn.ModuleList([Encoder(8, down=True), Encoder(16, down=False)])
        self.layers_up = nn.ModuleList([Decoder(16, up=False), Decoder(8, up=True)])
        self.final_up = PatchExpand2D(8)
        self.final_conv = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.patch_embed(x), []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        for i, layer in enumerate(self.layers_up):
            x = layer(x) if i == 0 else layer(x + skips[-i])
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


class VMUNet(nn.Module):
    """One channel becomes three; a sigmoid where there is one class."""

    def __init__(self, num_classes: int = 1) -> None:
        super().__init__()
        self.num_classes, self.vmunet = num_classes, VSSM()

    def forward(self, x: Tensor) -> Tensor:
        if x.size()[1] == 1:
            x = x.repeat(1, 3, 1, 1)
        logits = self.vmunet(x)
        return torch.sigmoid(logits) if self.num_classes == 1 else logits


# ---- MSVM-UNet: channels first -------------------------------------------------------------------------------------


class MultiScaleConv(nn.Module):
    def __init__(self, width: int, sizes: tuple[int, ...] = (1, 3, 5)) -> None:
        super().__init__()
        self.dw_convs = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(conv(x) for conv in self.dw_convs)


class MultiScaleMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.multiscale_conv = Linear2d(width, 2 * width), MultiScaleConv(2 * width)
        self.act, self.fc2 = nn.GELU(), Linear2d(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.multiscale_conv(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.op = LayerNorm2d(width), SS2DConv(width, ratio=1.0)
        self.norm2, self.mlp = LayerNorm2d(width), MultiScaleMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.op(self.norm(x))
        return x + self.mlp(self.norm2(x))


class LKPE(nn.Module):
    """1x1 convolution, batch norm, depthwise convolution, channels into pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        B, C, H, W = x.shape
        x = x.view(B, 2, 2, C // 4, H, W).permute(0, 4, 1, 5, 2, 3).reshape(B, 2 * H, 2 * W, C // 4)
        return self.norm(x).permute(0, 3, 1, 2)


class MSVMUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.down = nn.Sequential(nn.Conv2d(8, 16, 2, 2), nn.BatchNorm2d(16))
        self.block, self.up = Block(16), LKPE(16)
        self.concat_layer = Linear2d(16, 8)
        self.out_layer = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.repeat(1, 3, 1, 1)
        skip = self.layer0(x)
        y = self.up(self.block(self.down(skip)))
        return F.interpolate(self.out_layer(self.concat_layer(torch.cat([y, skip], dim=1))), scale_factor=2.0)


_SS2D = "in_proj conv2d x_proj_weight dt_projs_weight scan out_proj"

TWINS = (
    Twin(
        "u-net, views and skips", VMUNet, ((1, 8, 8), (3, 6, 10)),
        (
            "vmunet.patch_embed.proj",
            "vmunet.layers.0.downsample.reduction",
            *under("vmunet.layers_up.0.blocks.0.self_attention", _SS2D),
            "vmunet.layers_up.1.upsample.expand",
            *under("vmunet", "final_up.expand final_conv"),
        ), 1,
    ),
    Twin(
        "u-net, batch norm and several scales", MSVMUNet, ((1, 8, 8), (3, 6, 10)),
        (
            *under("layer0", "0"), *under("down", "0"), *under("block.op", _SS2D), "block.mlp.fc1",
            *under("block.mlp.multiscale_conv.dw_convs", "0 1 2"), "block.mlp.fc2", *under("up.expand", "0 3"),
            "concat_layer", "out_layer",
        ), 1,
    ),
)  # fmt: skip
