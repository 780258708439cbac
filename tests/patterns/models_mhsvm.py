"""Parameters tied under two names, several scan heads, route tables in plain attributes (MHS-VM)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.models_ss2d import scan_parameters, selective_scan_fn
from tests.patterns.twin import Twin

__all__ = ["HEADS", "MHSVM", "TWINS"]

HEADS, SIDE = 3, 6


class MambaEngine(nn.Module):
    """Four scans of one subspace in a call: (B, 4, D, L) to the same."""

    def __init__(self, width: int, states: int = 2, rank: int = 1) -> None:
        super().__init__()
        self.rank, self.states = rank, states
        scan_parameters(self, width, states, rank)

    def forward(self, xs: Tensor) -> Tensor:
        B, K, D, L = xs.shape
        mixed = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(mixed, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        y = selective_scan_fn(
            xs.reshape(B, -1, L), dts.reshape(B, -1, L), -torch.exp(self.A_logs), Bs.contiguous(), Cs.contiguous(),
            self.Ds, None, self.dt_projs_bias.view(-1), True,
        )  # fmt: skip
        return y.view(B, K, D, L)


class ScanPattern(nn.Module):
    """Tokens along two routes, there and back. The tables are neither buffers nor parameters."""

    def __init__(self, engine: MambaEngine, routes: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.seq2seq_engine = engine
        for i, route in enumerate(routes):
            setattr(self, f"scan_tind_{i}", route)
            setattr(self, f"scan_rind_{i}", torch.argsort(route))

    def forward(self, x: Tensor) -> Tensor:
        ways = [torch.index_select(x, 2, getattr(self, f"scan_tind_{i}")) for i in (0, 1)]
        xs = torch.stack([*ways, *(w.flip(-1) for w in ways)], dim=1)
        ys = self.seq2seq_engine(xs)
        ys = torch.stack([ys[:, 0], ys[:, 1], ys[:, 2].flip(-1), ys[:, 3].flip(-1)], dim=1)
        back = [torch.index_select(ys[:, i], 2, getattr(self, f"scan_rind_{i % 2}")) for i in range(4)]
        return torch.stack(back, dim=1)


class GFU(nn.Module):
    """Weighs the four results of a pixel by how much they scatter: a ratio of deviation and mean."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.t = threshold

    def forward(self, ys: Tensor) -> Tensor:
        low = ys - ys.amin(dim=1, keepdim=True)
        ratio = low.std(dim=1) / (low.mean(dim=1) + 1e-3)
        return ys.sum(dim=1) * F.relu(ratio - self.t)


class ScanHead(nn.Module):
    def __init__(self, width: int, routes: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.mambaeng = MambaEngine(width)
        self.scanning = ScanPattern(self.mambaeng, routes)
        self.gfu = GFU()

    def forward(self, x: Tensor) -> Tensor:
        return self.gfu(self.scanning(x))


class MHSM(nn.Module):
    """Splits the width into heads. The projection is a module that is never called, and a second name of its weight."""

    def __init__(self, width: int, routes: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.dim_sub = width // HEADS
        self.x_ssproj = nn.Linear(width, self.dim_sub * HEADS, bias=False)
        self.x_ssproj_W = self.x_ssproj.weight
        for i in range(HEADS):
            self.add_module(f"scanhead_{i}", ScanHead(self.dim_sub, routes[i % len(routes)]))
        self.cat_norm = nn.LayerNorm(self.dim_sub * HEADS)
        self.y_proj = nn.Linear(self.dim_sub * HEADS, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, L)
        subs = torch.einsum("b d l, c d -> b c l", x, self.x_ssproj_W).chunk(HEADS, dim=1)
        ys = [getattr(self, f"scanhead_{i}")(sub) for i, sub in enumerate(subs)]
        return self.y_proj(self.cat_norm(torch.cat(ys, dim=1).transpose(1, 2)))


class Block(nn.Module):
    def __init__(self, width: int, routes: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.ln_1, self.in_proj = nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mhs, self.out_norm = MHSM(width, routes), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        B, H, W, C = x.shape
        y, z = self.in_proj(self.ln_1(x)).chunk(2, dim=-1)
        y = F.silu(self.conv2d(y.permute(0, 3, 1, 2).contiguous()))
        y = self.mhs(y.flatten(2)).view(B, H, W, C)
        return x + self.out_norm(y) * F.silu(z)


class MHSVM(nn.Module):
    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        grid = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
        snake = grid.clone()
        snake[1::2] = snake[1::2].flip(1)
        routes = [(grid.flatten(), grid.t().flatten()), (snake.flatten(), snake.t().flatten())]
        self.patch_embed = nn.Conv2d(3, 9, 2, 2)
        self.blocks = nn.ModuleList(Block(9, routes) for _ in range(blocks))
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch_embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            y = block(y)
        return self.head(y.permute(0, 3, 1, 2).contiguous())


_HEAD = "mambaeng.x_proj_weight mambaeng.dt_projs_weight mambaeng.scan"
_BLOCK = (
    "in_proj", "conv2d", "mhs.x_ssproj_W",
    *(f"mhs.scanhead_{i}.{name}" for i in range(HEADS) for name in _HEAD.split()), "mhs.y_proj",
)  # fmt: skip

TWINS = (
    Twin(
        "tied names and scan heads", MHSVM, ((3, 2 * SIDE, 2 * SIDE),),
        ("patch_embed", *(f"blocks.0.{name}" for name in _BLOCK), "head"),
        HEADS,
    ),
)  # fmt: skip
