"""Four scans that share operands, in orders that are Python tuples (PlainMamba)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant import ops
from tests.patterns.models_ss2d import selective_scan_fn
from tests.patterns.twin import Twin, under

__all__ = ["TWINS"]

Order = tuple[tuple[int, ...], ...]


def snake(rows: int, columns: int, by_column: bool) -> list[tuple[int, int]]:
    """Pixels along rows (or columns), every second one walked back."""
    outer, inside = (columns, rows) if by_column else (rows, columns)
    walk = [(i, j if i % 2 == 0 else inside - 1 - j) for i in range(outer) for j in range(inside)]
    return [(j, i) for i, j in walk] if by_column else walk


def orders(rows: int, columns: int) -> tuple[Order, Order, Order]:
    """Four orders, their inverses, and the step (0 to 4) by which each token was reached."""
    steps = {(0, 1): 1, (0, -1): 2, (1, 0): 3, (-1, 0): 4}
    walks = [snake(rows, columns, False), snake(rows, columns, True)]
    walks += [walk[::-1] for walk in walks]
    found, inverse, directions = [], [], []
    for walk in walks:
        order = [i * columns + j for i, j in walk]
        found.append(tuple(order))
        inverse.append(tuple(sorted(range(len(order)), key=order.__getitem__)))
        moves = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(walk)]
        directions.append((0, *(steps[m] for m in moves)))
    return tuple(found), tuple(inverse), tuple(directions)


def plain(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return selective_scan_fn(u, dt, A, B, C, D, None, bias, True, False)


def windowed(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Any:
    return ops.selective_scan(u, dt, A, B, C, D, delta_bias=bias, delta_softplus=True, window=8)


class PlainMambaLayer(nn.Module):
    """The bias of dt_proj counts twice: in the projection, and again in the scan."""

    def __init__(self, width: int, scan: Callable[..., Any], ways: int) -> None:
        super().__init__()
        self.ways, self.d_inner, self.d_state, self.dt_rank, self.scan = ways, width, 3, 2, scan
        self.in_proj = nn.Linear(width, 2 * width)
        self.conv2d = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(width, self.dt_rank + 2 * self.d_state)
        self.dt_proj = nn.Linear(self.dt_rank, width)
        nn.init.uniform_(self.dt_proj.bias, -2, -1)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, self.d_state + 1)).repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.direction_Bs = nn.Parameter(0.2 * torch.randn(5, self.d_state))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        B = x.shape[0]
        H, W = hw_shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.transpose(1, 2).reshape(B, -1, H, W))).flatten(2).transpose(1, 2)
        dt, Bs, Cs = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = self.dt_proj(dt).permute(0, 2, 1).contiguous()
        Bs, Cs = Bs.permute(0, 2, 1).contiguous(), Cs.permute(0, 2, 1).contiguous()
        A = -torch.exp(self.A_log.float())
        forth, back, directions = (o[: self.ways] for o in orders(H, W))
        extra = [self.direction_Bs[d, :].unsqueeze(0).expand(B, -1, -1).permute(0, 2, 1) for d in directions]
        ys = [
            self.scan(
                x[:, o, :].permute(0, 2, 1).contiguous(), dt, A, (Bs + more).contiguous(), Cs, self.D.float(),
                self.dt_proj.bias.float(),
            ).permute(0, 2, 1)[:, inverse, :]
            for o, inverse, more in zip(forth, back, extra, strict=True)
        ]  # fmt: skip
        return self.out_proj(sum(ys) * self.act(z))


class PlainMamba(nn.Module):
    """Returns tokens and a tuple of feature maps."""

    def __init__(self, scan: Callable[..., Any] = plain, ways: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"norm": nn.LayerNorm(8), "mamba": PlainMambaLayer(8, scan, ways)})]
        )
        self.ln1 = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.patch_embed(x)
        B, C, H, W = x.shape
        tokens, maps = x.flatten(2).transpose(1, 2), []
        for layer in self.layers:
            tokens = tokens + layer["mamba"](layer["norm"](tokens), (H, W))
            maps.append(self.ln1(tokens).permute(0, 2, 1).reshape(B, C, H, W))
        return tokens, tuple(maps)


def _sites(scans: str) -> tuple[str, ...]:
    return ("patch_embed", *under("layers.0.mamba", f"in_proj conv2d x_proj dt_proj {scans} out_proj"))


_SIZES = ((3, 12, 12), (3, 8, 20))

TWINS = (
    Twin("orders as tuples", PlainMamba, _SIZES, _sites("scan scan#2 scan#3 scan#4"), 4),
    Twin(
        "orders as tuples, window", functools.partial(PlainMamba, windowed, 2), _SIZES, _sites("scan scan#2"), 2,
        note="s6_lb, window 8",
    ),
)  # fmt: skip
