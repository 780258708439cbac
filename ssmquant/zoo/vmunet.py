"""VM-UNet: a U-shaped segmentation network of four-direction selective scans (Ruan and Xiang 2024, arXiv 2402.02491).

Written from the architecture, with the parameter names of JCruan519/VM-UNet, so that its checkpoints load strictly. Its
scan is that of VMamba's first version, as in MambaIR. Upstream starts from a classifier's weights, which its
``load_from`` copies into encoder and decoder; that is not served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.errors import ConfigError, InputError
from ssmquant.zoo.mambair_blocks import SS2D, DropPath
from ssmquant.zoo.vmamba_blocks import PatchMerging2D

__all__ = ["VMUNet", "vmunet_base", "vmunet_nano"]


class PatchEmbed2D(nn.Module):
    """(B, in_chans, H, W) -> tokens (B, H / patch_size, W / patch_size, dim)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchExpand2D(nn.Module):
    """(B, H, W, dim) -> (B, scale * H, scale * W, dim // scale): a linear layer's channels become pixels."""

    def __init__(self, dim: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * dim, bias=False)
        self.norm = nn.LayerNorm(dim // scale)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        s = self.scale
        x = self.expand(x).view(B, H, W, s, s, -1).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(B, H * s, W * s, -1))


class VSSBlock(nn.Module):
    """A scan behind a norm, within a skip connection: (B, H, W, dim) -> the same."""

    def __init__(self, dim: int, d_state: int, drop_path: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = SS2D(dim, d_state=d_state)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.self_attention(self.ln_1(x)))


class VSSLayer(nn.Module):
    """Blocks, then (not in the deepest stage) a merge: (B, H, W, dim) -> (B, H / 2, W / 2, 2 * dim)."""

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class VSSLayerUp(nn.Module):
    """Not in the deepest stage an expansion (B, H, W, 2 * dim) -> (B, 2 * H, 2 * W, dim), then blocks."""

    def __init__(self, blocks: Sequence[VSSBlock], upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample is not None:
            x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class UNet(nn.Module):
    """Encoder and decoder, with skips that are added: (B, in_chans, H, W) -> logits (B, num_classes, H, W)."""

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        depths: Sequence[int],
        depths_decoder: Sequence[int],
        dims: Sequence[int],
        d_state: int,
        patch_size: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed2D(patch_size, in_chans, dims[0])
        last = len(dims) - 1

        def rising(total: int) -> list[float]:
            return [drop_path_rate * i / max(1, total - 1) for i in range(total)]

        def stage(dim: int, depth: int, rates: Iterator[float]) -> list[VSSBlock]:
            return [VSSBlock(dim, d_state, next(rates)) for _ in range(depth)]

        rates = iter(rising(sum(depths)))
        self.layers = nn.ModuleList(
            VSSLayer(
                stage(dim, depths[i], rates),
                PatchMerging2D(dim, 2 * dim, nn.LayerNorm, channel_first=False) if i < last else None,
            )
            for i, dim in enumerate(dims)
        )
        rates = reversed(rising(sum(depths_decoder)))
        self.layers_up = nn.ModuleList(
            VSSLayerUp(
                stage(dim, depths_decoder[i], rates),
                PatchExpand2D(2 * dim, 2) if i > 0 else None,
            )
            for i, dim in enumerate(reversed(dims))
        )
        self.final_up = PatchExpand2D(dims[0], patch_size)
        self.final_conv = nn.Conv2d(dims[0] // patch_size, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        skips = []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        for i, layer in enumerate(self.layers_up):
            x = layer(x) if i == 0 else layer(x + skips[-i])
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


class VMUNet(nn.Module):
    """Segments images: (B, input_channels or 1, H, W) -> (B, num_classes, H, W), logits, or probabilities for 1 class.

    Height and width are multiples of ``patch_size * 2 ** (stages - 1)``: 32 for the published model. A grey image is
    repeated to ``input_channels``. Constructor arguments are upstream's, as far as they have an effect.

    Args:
        input_channels: channels of the image.
        num_classes: outputs; 1 ends with a sigmoid.
        depths: blocks in each stage of the encoder.
        depths_decoder: blocks in each stage of the decoder, the deepest first.
        drop_path_rate: stochastic depth, rising linearly from 0 in the encoder, falling to 0 in the decoder.
        dims: width of the first stage, from which it doubles; a list of all widths, if they double, will do too.
        d_state: N, states a channel.
        patch_size: pixels a side of a token, and the factor of the last expansion; upstream has 4.

    Raises:
        ConfigError: an argument is out of range.
        InputError: (forward) an image of another size or number of channels.
    """

    def __init__(
        self,
        input_channels: int = 3,
        num_classes: int = 1,
        depths: Sequence[int] = (2, 2, 9, 2),
        depths_decoder: Sequence[int] = (2, 9, 2, 2),
        drop_path_rate: float = 0.2,
        dims: int | Sequence[int] = 96,
        d_state: int = 16,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        arguments["depths"] = depths = [int(d) for d in depths]
        arguments["depths_decoder"] = depths_decoder = [int(d) for d in depths_decoder]
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        arguments["dims"] = dims
        _validate(arguments)
        self.zoo_config: dict[str, Any] = {"name": "VMUNet", "args": arguments}
        self.input_channels = input_channels
        self.num_classes = num_classes
        self.multiple = patch_size * 2 ** (len(depths) - 1)
        self.vmunet = UNet(
            input_channels, num_classes, depths, depths_decoder, dims, d_state, patch_size, drop_path_rate
        )

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        if channels not in (1, self.input_channels):
            raise InputError(f"VMUNet takes images of {self.input_channels} channels or 1, got {channels}")
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"VMUNet takes images whose sides are multiples of {self.multiple}, got {height} x {width}: pad them"
            )
        if channels != self.input_channels:
            x = x.repeat(1, self.input_channels, 1, 1)
        logits = self.vmunet(x)
        return torch.sigmoid(logits) if self.num_classes == 1 else logits


def _validate(args: Mapping[str, Any]) -> None:
    def need(fine: bool, name: str, wanted: str) -> None:
        if not fine:
            raise ConfigError(f"VMUNet: {name}={args[name]!r}, expected {wanted}")

    for name in ("input_channels", "num_classes", "d_state", "patch_size"):
        need(type(args[name]) is int and args[name] >= 1, name, "a positive integer")
    need(0.0 <= args["drop_path_rate"] < 1.0, "drop_path_rate", "a number in [0, 1)")
    depths, decoder, dims = args["depths"], args["depths_decoder"], args["dims"]
    need(len(depths) > 0 and all(d >= 1 for d in depths), "depths", "positive integers")
    need(
        len(decoder) == len(depths) and all(d >= 1 for d in decoder), "depths_decoder", "as many as in depths"
    )
    fine = len(dims) == len(depths) and all(type(d) is int and d >= 1 for d in dims)
    fine = fine and all(b == 2 * a for a, b in pairwise(dims))
    need(fine, "dims", "a positive integer, or one for each stage, each twice the one before")
    need(dims[0] % args["patch_size"] == 0, "dims", "a multiple of patch_size")


def vmunet_base(num_classes: int = 1, input_channels: int = 3, drop_path_rate: float = 0.2) -> VMUNet:
    """The model of upstream's configuration files, 27.4 M parameters; nine classes for Synapse, one for skin."""
    return VMUNet(
        input_channels,
        num_classes,
        depths=(2, 2, 2, 2),
        depths_decoder=(2, 2, 2, 1),
        drop_path_rate=drop_path_rate,
    )


def vmunet_nano(num_classes: int = 2, input_channels: int = 1) -> VMUNet:
    """A small model that trains on a CPU: widths 16 and 32, a block a stage, 4 states; sides are multiples of 8."""
    return VMUNet(input_channels, num_classes, (1, 1), (1, 1), drop_path_rate=0.0, dims=16, d_state=4)
