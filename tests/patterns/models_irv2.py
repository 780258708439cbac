"""Shifted windows with a mask written by slices, and tokens sorted by meaning before a scan (MambaIRv2)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.models_ss2d import selective_scan_fn
from tests.patterns.twin import Twin, under

__all__ = ["TWINS"]


def index_reverse(index: Tensor) -> Tensor:
    """The inverse of each sample's order."""
    inverse = torch.zeros_like(index)
    order = torch.arange(0, index.shape[-1], device=index.device)
    for i in range(index.shape[0]):
        inverse[i, index[i, :]] = order
    return inverse


def semantic_neighbor(x: Tensor, index: Tensor) -> Tensor:
    assert index.shape == x.shape[: index.dim()]
    for _ in range(x.dim() - index.dim()):
        index = index.unsqueeze(-1)
    return torch.gather(x, dim=1, index=index.expand(x.shape))


def window_partition(x: Tensor, size: int) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, c)


def window_reverse(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    b = int(windows.shape[0] / (h * w / size / size))
    x = windows.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class WindowAttention(nn.Module):
    def __init__(self, dim: int, size: int, heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.scale = (size, size), heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(0.1 * torch.randn((2 * size - 1) ** 2, heads))
        self.proj, self.softmax = nn.Linear(dim, dim), nn.Softmax(dim=-1)

    def forward(self, qkv: Tensor, rpi: Tensor, mask: Tensor | None = None) -> Tensor:
        b_, n, c3 = qkv.shape
        c = c3 // 3
        qkv = qkv.reshape(b_, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[rpi.view(-1)].view(n, n, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nw = mask.shape[0]
            attn = attn.view(b_ // nw, nw, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        x = (self.softmax(attn) @ v).transpose(1, 2).reshape(b_, n, c)
        return self.proj(x)


class SelectiveScan(nn.Module):
    """One direction; what a token is told about its kind is added to C."""

    def __init__(self, width: int, states: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.states, self.rank = states, rank
        self.x_proj_weight = nn.Parameter(torch.randn(1, rank + 2 * states, width) / math.sqrt(width))
        self.dt_projs_weight = nn.Parameter(torch.randn(1, width, rank) / math.sqrt(rank))
        self.dt_projs_bias = nn.Parameter(torch.rand(1, width) * 2 - 3)
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(width, 1))
        self.Ds, self.selective_scan = nn.Parameter(torch.ones(width)), selective_scan_fn

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        b, l, _ = x.shape  # noqa: E741
        x = x.permute(0, 2, 1).contiguous()
        xs = x.view(b, 1, -1, l)
        mixed = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(mixed, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        Cs = Cs.float().view(b, 1, -1, l) + prompt
        out = self.selective_scan(
            xs.float().view(b, -1, l), dts.contiguous().float().view(b, -1, l), -torch.exp(self.A_logs.float()),
            Bs.float().view(b, 1, -1, l), Cs, self.Ds.float(), z=None,
            delta_bias=self.dt_projs_bias.float().view(-1), delta_softplus=True,
        ).view(b, 1, -1, l)  # fmt: skip
        assert out.dtype == torch.float
        return out[:, 0].permute(0, 2, 1).contiguous()


class ASSM(nn.Module):
    """Routes every token to one of a few kinds, sorts by kind, scans, and sorts back."""

    def __init__(self, dim: int, tokens: int = 3, inner_rank: int = 4, states: int = 3) -> None:
        super().__init__()
        self.num_tokens, self.d_state = tokens, states
        self.selectiveScan = SelectiveScan(dim, states)
        self.out_norm, self.out_proj = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, dim, 1, 1, 0))
        self.CPE = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim))
        self.embeddingA, self.embeddingB = nn.Embedding(inner_rank, states), nn.Embedding(tokens, inner_rank)
        self.route = nn.Sequential(nn.Linear(dim, 6), nn.GELU(), nn.Linear(6, tokens), nn.LogSoftmax(dim=-1))

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        B, n, C = x.shape
        H, W = x_size
        full_embedding = self.embeddingB.weight @ self.embeddingA.weight
        policy = F.gumbel_softmax(8 * self.route(x), hard=True, dim=-1)
        prompt = torch.matmul(policy, full_embedding).view(B, n, self.d_state)
        kind = torch.argmax(policy.detach(), dim=-1, keepdim=False).view(B, n)
        _, index = torch.sort(kind, dim=-1, stable=False)
        back = index_reverse(index)
        x = self.in_proj(x.permute(0, 2, 1).reshape(B, C, H, W).contiguous())
        x = (x * torch.sigmoid(self.CPE(x))).view(B, C, -1).contiguous().permute(0, 2, 1)
        told = semantic_neighbor(prompt, index).permute(0, 2, 1).contiguous().unsqueeze(1)
        y = self.selectiveScan(semantic_neighbor(x, index), told)
        return semantic_neighbor(self.out_proj(self.out_norm(y)), back)


class Layer(nn.Module):
    def __init__(self, dim: int, size: int, shift: int) -> None:
        super().__init__()
        self.window_size, self.shift_size = size, shift
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wqkv, self.win_mhsa, self.assm = (
            nn.Linear(dim, 3 * dim),
            WindowAttention(dim, size, 2),
            ASSM(dim),
        )
        self.scale = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x: Tensor, x_size: tuple[int, int], params: dict[str, Any]) -> Tensor:
        h, w = x_size
        b, _, c = x.shape
        qkv = self.wqkv(self.norm1(x)).reshape(b, h, w, 3 * c)
        mask = None
        if self.shift_size > 0:
            qkv = torch.roll(qkv, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
            mask = params["attn_mask"]
        windows = window_partition(qkv, self.window_size).view(-1, self.window_size**2, 3 * c)
        y = self.win_mhsa(windows, rpi=params["rpi_sa"], mask=mask).view(
            -1, self.window_size, self.window_size, c
        )
        y = window_reverse(y, self.window_size, h, w)
        if self.shift_size > 0:
            y = torch.roll(y, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        x = y.view(b, -1, c) + x
        return self.assm(self.norm3(x), x_size) + x * self.scale


class MambaIRv2(nn.Module):
    """Pads to whole windows with mirrored pixels; the mask is made by slices, at each call."""

    def __init__(self, dim: int = 8, size: int = 4) -> None:
        super().__init__()
        self.window_size, self.mean = size, torch.full((1, 3, 1, 1), 0.4)
        self.conv_first, self.norm = nn.Conv2d(3, dim, 3, 1, 1), nn.LayerNorm(dim)
        self.layer = Layer(dim, size, size // 2)
        self.conv_last = nn.Conv2d(dim, 3, 3, 1, 1)
        grid = torch.stack(torch.meshgrid([torch.arange(size)] * 2, indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + size - 1
        self.register_buffer("relative_position_index_SA", apart[..., 0] * (2 * size - 1) + apart[..., 1])

    def calculate_mask(self, x_size: tuple[int, int]) -> Tensor:
        h, w = x_size
        size, shift = self.window_size, self.window_size // 2
        img_mask = torch.zeros((1, h, w, 1))
        slices = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
        cnt = 0
        for rows in slices:
            for columns in slices:
                img_mask[:, rows, columns, :] = cnt
                cnt += 1
        flat = window_partition(img_mask, size).view(-1, size * size)
        mask = flat.unsqueeze(1) - flat.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        h_ori, w_ori = x.size()[-2], x.size()[-1]
        mod = self.window_size
        h, w = ((h_ori + mod - 1) // mod) * mod, ((w_ori + mod - 1) // mod) * mod
        h_pad, w_pad = h - h_ori, w - w_ori
        x = torch.cat([x, torch.flip(x, [2])], 2)[:, :, :h, :]
        x = torch.cat([x, torch.flip(x, [3])], 3)[:, :, :, :w]
        self.mean = self.mean.type_as(x)
        x = x - self.mean
        params = {"attn_mask": self.calculate_mask([h, w]), "rpi_sa": self.relative_position_index_SA}
        first = self.conv_first(x)
        y = self.layer(self.norm(first.flatten(2).transpose(1, 2)), (h, w), params)
        y = y.transpose(1, 2).view(first.shape[0], -1, h, w) + first
        out = self.conv_last(y) + x + self.mean
        return out[..., : h - h_pad, : w - w_pad]


TWINS = (
    Twin(
        "windows, mask, routing", MambaIRv2, ((3, 8, 8), (3, 7, 10)),
        (
            "conv_first", *under("layer", "wqkv win_mhsa.proj"),
            *under("layer.assm", "route.0 route.2 embeddingB in_proj.0 CPE.0"),
            *under("layer.assm.selectiveScan", "x_proj_weight dt_projs_weight scan"),
            "layer.assm.out_proj", "conv_last",
        ), 1, keep=("*.route.*",),
    ),
)  # fmt: skip
