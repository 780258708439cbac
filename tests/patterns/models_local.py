"""Parameters that share storage, windows with padding, attributes set in forward (LocalVim, LocalVMamba)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.models_ss2d import oflex, scan_parameters, windowed
from tests.patterns.models_vim import mamba_parameters
from tests.patterns.native import MambaInnerFnNoOutProj
from tests.patterns.twin import Twin, under

__all__ = ["TWINS", "LocalVim", "local_reverse", "local_scan"]


def local_scan(x: Tensor, w: int, H: int, W: int, flip: bool = False) -> Tensor:
    """(B, C, H, W) -> (B, C, L'): window after window, the image padded to whole ones."""
    B, C = x.shape[:2]
    x = x.view(B, C, H, W)
    right, down = (w - W % w) % w, (w - H % w) % w
    if right > 0 or down > 0:
        x = F.pad(x, (0, right, 0, down))
    Hp, Wp = H + down, W + right
    x = x.view(B, C, Hp // w, w, Wp // w, w).permute(0, 1, 2, 4, 3, 5).reshape(B, C, -1)
    return x.flip([-1]) if flip else x


def local_reverse(x: Tensor, w: int, H: int, W: int, flip: bool = False) -> Tensor:
    """The inverse, (B, C, L') -> (B, C, H * W)."""
    B, C = x.shape[:2]
    x = x.flip([-1]) if flip else x
    Hp, Wp = H + (w - H % w) % w, W + (w - W % w) % w
    x = x.view(B, C, Hp // w, Wp // w, w, w).permute(0, 1, 2, 4, 3, 5).reshape(B, C, Hp, Wp)
    return x[:, :, :H, :W].reshape(B, C, -1)


class BiAttn(nn.Module):
    """Channel attention of one direction's result; the same modules serve all directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.global_reduce, self.channel_select = nn.Linear(width, 4), nn.Linear(4, width)
        self.act_fn, self.gate_fn = nn.GELU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C)
        pooled = self.norm(x).mean(1, keepdim=True)
        gate = self.gate_fn(self.channel_select(self.act_fn(self.global_reduce(pooled))))
        return x * gate


class MultiScan(nn.Module):
    """Directions by name. Where an image does not fill its windows, sequences of several lengths are padded to one."""

    def __init__(self, width: int, choices: tuple[str, ...]) -> None:
        super().__init__()
        self.choices, self.token_size = choices, None
        self.attn = BiAttn(width)

    def multi_scan(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K, C, L')
        H, W = self.token_size
        ways = [self.scan(x, name, H, W) for name in self.choices]
        longest = max(w.shape[-1] for w in ways)
        return torch.stack([F.pad(w, (0, longest - w.shape[-1])) for w in ways], dim=1)

    @staticmethod
    def scan(x: Tensor, name: str, H: int, W: int) -> Tensor:
        if name.startswith("w"):
            return local_scan(x, int(name[1]), H, W, name.endswith("flip"))
        way = x.flatten(2) if name.startswith("h") else x.transpose(2, 3).flatten(2)
        return way.flip([-1]) if name.endswith("flip") else way

    def merge(self, ys: Tensor) -> Tensor:  # (B, K, C, L') -> (B, L, C)
        H, W = self.token_size
        out = []
        for i, name in enumerate(self.choices):
            y = ys[:, i]
            if name.startswith("w"):
                w = int(name[1])
                length = (H + (w - H % w) % w) * (W + (w - W % w) % w)
                y = local_reverse(y[..., :length], w, H, W, name.endswith("flip"))
            else:
                y = y[..., : H * W]
                y = y.flip([-1]) if name.endswith("flip") else y
            out.append(self.attn(y.transpose(1, 2)))
        return sum(out)


class SS2D(nn.Module):
    def __init__(self, width: int, scan: Callable[..., Any]) -> None:
        super().__init__()
        self.states, self.rank, self.scan = 2, 2, scan
        self.in_proj, self.conv2d = (
            nn.Linear(width, width, bias=False),
            nn.Conv2d(width, width, 3, 1, 1, groups=width),
        )
        scan_parameters(self, width, self.states, self.rank, directions=2)
        self.multi_scan = MultiScan(width, ("h_flip", "w3"))
        self.out_norm, self.out_proj = nn.LayerNorm(width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        B, H, W, _ = x.shape
        x = F.silu(self.conv2d(self.in_proj(x).permute(0, 3, 1, 2).contiguous()))
        xs = self.multi_scan.multi_scan(x)
        L = xs.shape[-1]
        mixed = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(mixed, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        As, bias = -torch.exp(self.A_logs.float()), self.dt_projs_bias.float().view(-1)
        ys = self.scan(
            xs.reshape(B, -1, L),
            dts.reshape(B, -1, L),
            As,
            Bs.contiguous(),
            Cs.contiguous(),
            self.Ds.float(),
            bias,
        )
        y = self.multi_scan.merge(ys.view(B, 2, -1, L))
        return self.out_proj(self.out_norm(y)).view(B, H, W, -1)


class LocalVMamba(nn.Module):
    def __init__(self, scan: Callable[..., Any] = oflex) -> None:
        super().__init__()
        self.patch_embed, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.layers = nn.ModuleList([SS2D(8, scan)])
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            layer.multi_scan.token_size = (x.shape[1], x.shape[2])
            x = x + layer(self.norm(x))
        return self.head(x)


class LocalVim(nn.Module):
    """Directions with parameters of their own; at construction those that start equal share one storage."""

    directions = ("h", "w2_flip")

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, 2)
        self.in_proj = nn.Linear(8, 16, bias=False)
        A_log = torch.log(torch.arange(1.0, 3)).repeat(8, 1)
        D = torch.ones(2, 8)
        for i in range(2):
            mamba_parameters(self, 8, 8, 2, 1, f"_{i}")
            delattr(self, f"A_{i}_log")
            setattr(self, f"A_log_{i}", nn.Parameter(A_log))
            setattr(self, f"D_{i}", nn.Parameter(D[i]))
        self.out_proj, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        B, _, H, W = x.shape
        xz = self.in_proj(x.flatten(2).transpose(1, 2)).transpose(1, 2).contiguous()
        outs = []
        for i, name in enumerate(self.directions):
            conv, x_proj, dt_proj = (getattr(self, f"{n}_{i}") for n in ("conv1d", "x_proj", "dt_proj"))
            way = MultiScan.scan(xz.view(B, -1, H, W), name, H, W)
            y = MambaInnerFnNoOutProj.apply(
                way, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, -torch.exp(getattr(self, f"A_log_{i}")),
                None, None, getattr(self, f"D_{i}"), dt_proj.bias, None, None, True,
            )  # fmt: skip
            turned = name.endswith("flip")
            if name.startswith("w"):
                outs.append(local_reverse(y, 2, H, W, turned))
            else:
                outs.append(y.flip([-1]) if turned else y)
        y = F.linear(sum(outs).transpose(1, 2), self.out_proj.weight, self.out_proj.bias)
        return self.head(x.flatten(2).transpose(1, 2) + y)


_LOCAL = (
    "patch_embed",
    *under("layers.0", "in_proj conv2d x_proj_weight dt_projs_weight scan"),
    *under("layers.0.multi_scan.attn", "global_reduce channel_select global_reduce#2 channel_select#2"),
    "layers.0.out_proj",
    "head",
)
_SIZES = ((3, 12, 12), (3, 10, 16))

TWINS = (
    Twin("windows and attention", LocalVMamba, _SIZES, _LOCAL, 1),
    Twin(
        "windows and attention, window", functools.partial(LocalVMamba, windowed), _SIZES, _LOCAL, 1,
        note="s6_lb, window 8",
    ),
    Twin(
        "parameters of one storage", LocalVim, ((3, 8, 8), (3, 4, 12)),
        (
            "patch_embed", "in_proj", "conv1d_0", "x_proj_0", "dt_proj_0", "scan", "conv1d_1", "x_proj_1", "dt_proj_1",
            "scan#2", "out_proj", "head",
        ), 2, tolerance=2e-6,
    ),
)  # fmt: skip
