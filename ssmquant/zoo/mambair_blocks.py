"""The parts of MambaIR: the two-dimensional scan, the convolution block, residual groups (arXiv 2402.15648)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.ops import selective_scan
from ssmquant.zoo.initial import s4d_real_, step_sizes_

__all__ = [
    "CAB",
    "SS2D",
    "DropPath",
    "PatchEmbed",
    "PatchUnEmbed",
    "ResidualGroup",
    "VSSBlock",
    "body_conv",
    "upsample",
]

_DIRECTIONS = 4


class DropPath(nn.Module):
    """Drops a residual branch for whole samples while training, scaling the kept ones to the same mean."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0.0 else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class ChannelAttention(nn.Module):
    """Scales every channel by a gate computed from all channels' means."""

    def __init__(self, num_feat: int, squeeze_factor: int = 16) -> None:
        super().__init__()
        squeezed = max(1, num_feat // squeeze_factor)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_feat, squeezed, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return x * self.attention(x)


class CAB(nn.Module):
    """The convolutional half of a block: two 3x3, or (light model) pointwise, depthwise and dilated depthwise ones."""

    def __init__(
        self, num_feat: int, is_light_sr: bool = False, compress_ratio: int = 3, squeeze_factor: int = 30
    ):
        super().__init__()
        inner = num_feat // (2 if is_light_sr else compress_ratio)
        layers: list[nn.Module]
        if is_light_sr:
            layers = [
                nn.Conv2d(num_feat, inner, 1),
                nn.Conv2d(inner, inner, 3, padding=1, groups=inner),
                nn.GELU(),
                nn.Conv2d(inner, num_feat, 1),
                nn.Conv2d(num_feat, num_feat, 3, padding=2, groups=num_feat, dilation=2),
            ]
        else:
            layers = [
                nn.Conv2d(num_feat, inner, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(inner, num_feat, 3, padding=1),
            ]
        self.cab = nn.Sequential(*layers, ChannelAttention(num_feat, squeeze_factor))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return self.cab(x)


class SS2D(nn.Module):
    """Selective scans of an image along rows and columns, forwards and backwards, with weights of their own, summed."""

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 3, expand: float = 2.0, dropout: float = 0.0
    ):
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16)

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, d_conv, padding=(d_conv - 1) // 2, groups=self.d_inner
        )
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(torch.empty(_DIRECTIONS, self.dt_rank + 2 * d_state, self.d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(_DIRECTIONS, self.d_inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(_DIRECTIONS, self.d_inner))
        self.A_logs = nn.Parameter(torch.empty(_DIRECTIONS * self.d_inner, d_state))
        self.Ds = nn.Parameter(torch.ones(_DIRECTIONS * self.d_inner))
        self.selective_scan = selective_scan
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else None
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step_sizes_(self.dt_projs_bias)
        s4d_real_(self.A_logs)
        for parameter in (self.A_logs, self.Ds):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward_core(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> the four directions' results, each (B, C, H * W) in row order and float32."""
        B, _, H, W = x.shape
        K, L = _DIRECTIONS, H * W
        rows = x.view(B, -1, L)
        columns = torch.transpose(x, dim0=2, dim1=3).contiguous().view(B, -1, L)
        both = torch.stack([rows, columns], dim=1).view(B, 2, -1, L)
        xs = torch.cat([both, torch.flip(both, dims=[-1])], dim=1)  # (B, K, C, L)

        x_dbl = torch.einsum("b k d l, k c d -> b k c l", xs.view(B, K, -1, L), self.x_proj_weight)
        dts, Bs, Cs = torch.split(x_dbl, [self.dt_rank, self.d_state, self.d_state], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts.view(B, K, -1, L), self.dt_projs_weight)
        out = self.selective_scan(
            xs.float().view(B, -1, L),
            dts.contiguous().float().view(B, -1, L),
            -torch.exp(self.A_logs.float()).view(-1, self.d_state),
            Bs.float().view(B, K, -1, L),
            Cs.float().view(B, K, -1, L),
            self.Ds.float().view(-1),
            z=None,
            delta_bias=self.dt_projs_bias.float().view(-1),
            delta_softplus=True,
            return_last_state=False,
        )
        assert isinstance(out, Tensor)
        out = out.view(B, K, -1, L)
        backwards = torch.flip(out[:, 2:4], dims=[-1]).view(B, 2, -1, L)
        down = torch.transpose(out[:, 1].view(B, -1, W, H), dim0=2, dim1=3).contiguous().view(B, -1, L)
        up = torch.transpose(backwards[:, 1].view(B, -1, W, H), dim0=2, dim1=3).contiguous().view(B, -1, L)
        return out[:, 0], backwards[:, 0], down, up

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, d_model)
        B, H, W, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = x.permute(0, 3, 1, 2).contiguous()
        x = self.act(self.conv2d(x))
        y1, y2, y3, y4 = self.forward_core(x)
        y = y1 + y2 + y3 + y4
        y = torch.transpose(y, dim0=1, dim1=2).contiguous().view(B, H, W, -1)
        y = self.out_norm(y.to(self.out_norm.weight.dtype))  # a cast only in a half or double precision model
        y = y * F.silu(z)
        out = self.out_proj(y)
        if self.dropout is not None:
            out = self.dropout(out)
        return out


class VSSBlock(nn.Module):
    """A scan and a convolution, each with a scaled skip connection."""

    def __init__(
        self, hidden_dim: int, drop_path: float, d_state: int, expand: float, is_light_sr: bool
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim)
        self.self_attention = SS2D(hidden_dim, d_state=d_state, expand=expand)
        self.drop_path = DropPath(drop_path)
        self.skip_scale = nn.Parameter(torch.ones(hidden_dim))
        self.conv_blk = CAB(hidden_dim, is_light_sr)
        self.ln_2 = nn.LayerNorm(hidden_dim)
        self.skip_scale2 = nn.Parameter(torch.ones(hidden_dim))

    def forward(self, input: Tensor, x_size: tuple[int, int]) -> Tensor:  # (B, L, C)
        B, _, C = input.shape
        input = input.view(B, *x_size, C).contiguous()
        x = input * self.skip_scale + self.drop_path(self.self_attention(self.ln_1(input)))
        convolved = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2).contiguous())
        x = x * self.skip_scale2 + convolved.permute(0, 2, 3, 1).contiguous()
        return x.view(B, -1, C).contiguous()


class BasicLayer(nn.Module):
    """The blocks of one group."""

    def __init__(self, blocks: Sequence[VSSBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        for block in self.blocks:
            x = block(x, x_size)
        return x


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> tokens (B, H * W, C)."""

    def __init__(self, embed_dim: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x)


class PatchUnEmbed(nn.Module):
    """Tokens (B, H * W, C) -> (B, C, H, W)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        return x.transpose(1, 2).view(x.shape[0], self.embed_dim, x_size[0], x_size[1])


def body_conv(dim: int, resi_connection: str) -> nn.Module:
    """The convolution that ends a group or the body: one, or three around a bottleneck."""
    if resi_connection == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1),
        nn.LeakyReLU(negative_slope=0.2, inplace=True),
        nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(negative_slope=0.2, inplace=True),
        nn.Conv2d(dim // 4, dim, 3, padding=1),
    )


class ResidualGroup(nn.Module):
    """Blocks, then a convolution, within a skip connection."""

    def __init__(self, dim: int, blocks: Sequence[VSSBlock], resi_connection: str) -> None:
        super().__init__()
        self.residual_group = BasicLayer(blocks)
        self.conv = body_conv(dim, resi_connection)
        self.patch_embed = PatchEmbed(dim)
        self.patch_unembed = PatchUnEmbed(dim)

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        image = self.patch_unembed(self.residual_group(x, x_size), x_size)
        return self.patch_embed(self.conv(image)) + x


def upsample(scale: int, num_feat: int) -> nn.Sequential:
    """Convolutions and pixel shuffles that enlarge by ``scale``, a power of two or 3."""
    factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [nn.Conv2d(num_feat, factor * factor * num_feat, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)
