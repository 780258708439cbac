"""MambaIR: image restoration with a four-direction selective scan (Guo et al. 2024, arXiv 2402.15648).

Written from the architecture, with the parameter names of csguoh/MambaIR, so that its checkpoints load strictly. It
keeps that code's habits too (the scan as an instance attribute, raw projection parameters in einsum, ``mean`` as a
plain tensor that forward rebinds, float32 scan operands): what quantizes this model quantizes the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.errors import ConfigError
from ssmquant.zoo.mambair_blocks import PatchEmbed, PatchUnEmbed, ResidualGroup, VSSBlock, body_conv, upsample

__all__ = [
    "MambaIR",
    "mambair_classic",
    "mambair_denoise",
    "mambair_light",
    "mambair_tiny",
]

_RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K


class MambaIR(nn.Module):
    """Restores images (super-resolution, denoising, JPEG artefacts): (B, C, H, W) -> (B, C, upscale * H, upscale * W).

    Constructor arguments are upstream's, as far as they have an effect.

    Args:
        img_size, patch_size: kept for upstream's configuration files; sizes are free and a token is a pixel.
        in_chans: 3 (RGB, centred on DIV2K's mean) or any other number (not centred).
        embed_dim: width of the body.
        depths: blocks in each residual group.
        drop_rate: dropout of the tokens.
        d_state: N, states a channel.
        mlp_ratio: width of the scan relative to ``embed_dim`` (Mamba's ``expand``).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        patch_norm: a LayerNorm before the first block.
        upscale: factor; a power of two or 3.
        img_range: images lie in [0, img_range].
        upsampler: "pixelshuffle", "pixelshuffledirect", or "" to restore at the same size by a residual.
        resi_connection: "1conv" or "3conv" at the end of each group and of the body.
        is_light_sr: the light convolution block; upstream ties it to "pixelshuffledirect", which None stands for.

    Raises:
        ConfigError: an argument is out of range.
    """

    mean: Tensor

    def __init__(
        self,
        img_size: int | Sequence[int] = 64,
        patch_size: int = 1,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (6, 6, 6, 6),
        drop_rate: float = 0.0,
        d_state: int = 16,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        upscale: int = 2,
        img_range: float = 1.0,
        upsampler: str = "",
        resi_connection: str = "1conv",
        is_light_sr: bool | None = None,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _validate(arguments)
        depths = [int(d) for d in depths]
        size = img_size if isinstance(img_size, int) else [int(s) for s in img_size]
        self.zoo_config: dict[str, Any] = {
            "name": "MambaIR",
            "args": {**arguments, "depths": depths, "img_size": size},
        }
        light = upsampler == "pixelshuffledirect" if is_light_sr is None else is_light_sr
        self.img_range = img_range
        self.mean = torch.tensor(_RGB_MEAN).view(1, 3, 1, 1) if in_chans == 3 else torch.zeros(1, 1, 1, 1)
        self.upscale = upscale
        self.upsampler = upsampler
        self.mlp_ratio = mlp_ratio
        self.embed_dim = embed_dim

        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim, norm=patch_norm)
        self.patch_unembed = PatchUnEmbed(embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        self.layers = nn.ModuleList(
            ResidualGroup(
                embed_dim,
                [VSSBlock(embed_dim, next(rates), d_state, mlp_ratio, light) for _ in range(depth)],
                resi_connection,
            )
            for depth in depths
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = body_conv(embed_dim, resi_connection)
        if upsampler == "pixelshuffle":
            num_feat = 64
            self.conv_before_upsample = nn.Sequential(
                nn.Conv2d(embed_dim, num_feat, 3, padding=1), nn.LeakyReLU(inplace=True)
            )
            self.upsample = upsample(upscale, num_feat)
            self.conv_last = nn.Conv2d(num_feat, in_chans, 3, padding=1)
        elif upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                nn.Conv2d(embed_dim, upscale**2 * in_chans, 3, padding=1), nn.PixelShuffle(upscale)
            )
        else:
            self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        x_size = (x.shape[2], x.shape[3])
        x = self.pos_drop(self.patch_embed(x))
        for layer in self.layers:
            x = layer(x, x_size)
        return self.patch_unembed(self.norm(x), x_size)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        x = (x - self.mean) * self.img_range
        shallow = self.conv_first(x)
        deep = self.conv_after_body(self.forward_features(shallow)) + shallow
        if self.upsampler == "pixelshuffle":
            x = self.conv_last(self.upsample(self.conv_before_upsample(deep)))
        elif self.upsampler == "pixelshuffledirect":
            x = self.upsample(deep)
        else:
            x = x + self.conv_last(deep)
        return x / self.img_range + self.mean


def _validate(args: Mapping[str, Any]) -> None:
    def need(fine: bool, name: str, wanted: str) -> None:
        if not fine:
            raise ConfigError(f"MambaIR: {name}={args[name]!r}, expected {wanted}")

    for name in ("in_chans", "embed_dim", "d_state", "upscale", "patch_size"):
        need(type(args[name]) is int and args[name] >= 1, name, "a positive integer")
    for name in ("drop_rate", "drop_path_rate"):
        need(0.0 <= args[name] < 1.0, name, "a number in [0, 1)")
    depths = args["depths"]
    need(len(depths) > 0 and all(type(d) is int and d >= 1 for d in depths), "depths", "positive integers")
    need(args["patch_size"] == 1, "patch_size", "1 (a token is a pixel)")
    need(
        int(args["mlp_ratio"] * args["embed_dim"]) >= 1,
        "mlp_ratio",
        "a ratio that leaves at least one channel",
    )
    need(args["img_range"] > 0, "img_range", "a positive number")
    need(args["resi_connection"] in ("1conv", "3conv"), "resi_connection", "'1conv' or '3conv'")
    uppers = ("pixelshuffle", "pixelshuffledirect", "")
    need(args["upsampler"] in uppers, "upsampler", "'pixelshuffle', 'pixelshuffledirect' or ''")
    scale = args["upscale"]
    if args["upsampler"] == "pixelshuffle":
        need(scale == 3 or scale & (scale - 1) == 0, "upscale", "a power of two or 3 with 'pixelshuffle'")


def mambair_light(upscale: int = 2) -> MambaIR:
    """The published lightweight super-resolution model, 0.9 M parameters."""
    return MambaIR(
        embed_dim=60,
        depths=(6,) * 4,
        d_state=10,
        mlp_ratio=1.2,
        upscale=upscale,
        upsampler="pixelshuffledirect",
    )


def mambair_classic(upscale: int = 2) -> MambaIR:
    """The published classic super-resolution model, 20.4 M parameters."""
    return MambaIR(embed_dim=180, depths=(6,) * 6, d_state=16, upscale=upscale, upsampler="pixelshuffle")


def mambair_denoise(in_chans: int = 3) -> MambaIR:
    """The published denoising model (``in_chans=3``) and JPEG artefact remover (``in_chans=1``)."""
    return MambaIR(img_size=128, in_chans=in_chans, embed_dim=180, depths=(6,) * 6, mlp_ratio=1.2, upscale=1)


def mambair_tiny(upscale: int = 2) -> MambaIR:
    """A small model of the light kind that trains on a CPU: width 40, three groups of two blocks, 4 states."""
    return MambaIR(
        embed_dim=40,
        depths=(2,) * 3,
        d_state=4,
        mlp_ratio=1.2,
        upscale=upscale,
        upsampler="pixelshuffledirect",
    )
