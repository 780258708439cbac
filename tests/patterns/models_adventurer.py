"""Mamba-2: heads, a fused mixer that gets weights, a norm with a gate, a mean token (Adventurer)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant import ops
from tests.patterns.native import MambaChunkScanCombinedFn, MambaSplitConv1dScanCombinedFn
from tests.patterns.twin import Twin, under

__all__ = ["TWINS"]

HEADDIM, STATES, HEADS = 4, 3, 4


class RMSNormGated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = x * F.silu(z)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Mamba2(nn.Module):
    """``how``: "fused", the two calls that it is made of ("chunk"), or our own operator with a window ("window")."""

    def __init__(self, d_model: int, how: str) -> None:
        super().__init__()
        self.how, self.d_ssm = how, HEADS * HEADDIM
        mixed = self.d_ssm + 2 * STATES
        self.in_proj = nn.Linear(d_model, self.d_ssm + mixed + HEADS, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, 4, groups=mixed, padding=3)
        self.dt_bias = nn.Parameter(torch.rand(HEADS) - 2)
        self.A_log = nn.Parameter(torch.log(1 + torch.rand(HEADS)))
        self.D = nn.Parameter(torch.ones(HEADS))
        self.norm = RMSNormGated(self.d_ssm)
        self.out_proj = nn.Linear(self.d_ssm, d_model, bias=False)

    def forward(self, u: Tensor, inference_params: Any = None) -> Tensor:
        zxbcdt, A = self.in_proj(u), -torch.exp(self.A_log)
        assert inference_params is None
        if self.how == "fused":
            return MambaSplitConv1dScanCombinedFn.apply(
                zxbcdt, self.conv1d.weight, self.conv1d.bias, self.dt_bias, A, self.D, 16, None, None,
                (0.0, float("inf")), False, "swish", self.norm.weight, self.norm.eps, self.out_proj.weight,
                self.out_proj.bias, HEADDIM, 1, False,
            )  # fmt: skip
        batch, length, _ = u.shape
        z, xBC, dt = torch.split(zxbcdt, [self.d_ssm, self.conv1d.in_channels, HEADS], dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2)).transpose(1, 2)[:, :length])
        x, B, C = torch.split(xBC, [self.d_ssm, STATES, STATES], dim=-1)
        x, B, C = x.reshape(batch, length, HEADS, HEADDIM), B[:, :, None], C[:, :, None]
        if self.how == "chunk":
            y = MambaChunkScanCombinedFn.apply(
                x, dt, A, B, C, 16, self.D, None, self.dt_bias, None, None, True, (0.0, float("inf")), False
            )
        else:
            y = ops.ssd_scan(x, dt, A, B, C, self.D, dt_bias=self.dt_bias, dt_softplus=True, window=8)
        return self.out_proj(self.norm(y.reshape(batch, length, -1), z))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(width, hidden),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(width), Mamba2(width, how)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), SwiGLU(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.norm_mlp(x))


class Adventurer(nn.Module):
    """Some layers, not every second one, read the patches backwards."""

    def __init__(self, how: str, depth: int = 1) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, 8))
        self.layers = nn.ModuleList(Block(8, how) for _ in range(depth))
        self.norm_f, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        B = x.shape[0]
        x = torch.cat([x, self.cls_token.expand(B, -1, -1)], dim=1)
        for n, layer in enumerate(self.layers):
            mean = x[:, :-1].mean(1, keepdim=True)
            x = torch.cat([mean, x], dim=1)  # two tokens more than patches
            if (n + 1) // 2 == 1:
                x = torch.cat([x[:, :1], x[:, 1:-1].flip(1), x[:, -1:]], dim=1)
            x = layer(x)[:, 1:]
        return self.head(self.norm_f(x[:, -1]))


def _sites(mixer: str, depth: int = 1) -> tuple[str, ...]:
    names = f"{mixer} mlp.w1 mlp.w2 mlp.w3"
    return ("patch_embed", *(n for i in range(depth) for n in under(f"layers.{i}", names)), "head")


_MIXER = "mixer.in_proj mixer.conv1d mixer.scan mixer.out_proj"
_SIZES = ((3, 16, 16), (3, 12, 20))

TWINS = (
    Twin(
        "mamba-2, fused", functools.partial(Adventurer, "fused", 2), _SIZES, _sites(_MIXER, 2), 2, tolerance=3e-6,
        note="ssd",
    ),
    Twin(
        "mamba-2, chunk scan", functools.partial(Adventurer, "chunk"), _SIZES, _sites(_MIXER), 1, tolerance=3e-6,
        note="ssd",
    ),
    Twin(
        "mamba-2, window", functools.partial(Adventurer, "window"), _SIZES, _sites(_MIXER), 1, elsewhere=True,
        note="ssd_lb, window 8",
    ),
)  # fmt: skip
