"""Shared by tests of the CPU kernels of deployed models: grids, packed weights, scans, decoded values in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops import selective_scan
from ssmquant.ops.deployed import Codes, Grid, Weights, cpu
from ssmquant.ops.deployed.forms import signed_codes

_reason = cpu.unavailable(torch.device("cpu"))
needs_kernels = pytest.mark.skipif(_reason is not None, reason=str(_reason))
FEW = settings(max_examples=12)  # for each instruction set
PATHS = range(len(cpu.paths())) if _reason is None else []


def per_sample(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def index(x: Tensor, grid: Grid) -> Tensor:
    u = (x + per_sample(grid.shift)) / per_sample(grid.scale)
    return u.clamp(grid.qmin, grid.qmax).round() - grid.qmin


def decoded(codes: Codes, grid: Grid, columns: int) -> Tensor:
    level = codes.data[..., :columns].double() + grid.qmin
    y = level * per_sample(grid.scale).double() - per_sample(grid.shift).double()
    return y if grid.low is None else y.clamp(per_sample(grid.low), per_sample(grid.high))


def make_grid(bits: int, samples: int, clamped: bool = False) -> Grid:
    half = 2 ** (bits - 1)
    ends = (torch.full((samples,), -1.1), torch.full((samples,), 0.9)) if clamped else (None, None)
    return Grid((1 + torch.rand(samples)) / half, torch.randn(samples) * 0.1, -half, half - 1, *ends)


def off_ties(x: Tensor, grid: Grid) -> Tensor:
    """``x`` moved away from where rounding may go either way."""
    u = (x + per_sample(grid.shift)) / per_sample(grid.scale)
    near = ((u - u.floor()) - 0.5).abs() < 1e-3
    return torch.where(near, x + 0.01 * per_sample(grid.scale), x)


def make_weight(
    shape: tuple[int, ...], bits: int, path: int, *, taps: bool = False, **options: Any
) -> tuple[Weights, Tensor]:
    """A packed weight (.., outputs, inputs), and its values in float64. ``taps``: the first axis has one scale."""
    half = 2 ** (bits - 1)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    of = (1, *shape[1:-1]) if taps else shape[:-1]
    scale, shift = torch.rand(of) * 0.1 + 0.01, torch.randn(of) * 0.02
    scale, shift = scale.expand(shape[:-1]), shift.expand(shape[:-1])
    values = (codes.double() - half) * scale[..., None].double() - shift[..., None].double()
    signed, moved = signed_codes(codes, bits, -half, shift, scale)
    return cpu.pack(signed, scale, moved, path=path, **options), values


def close(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-9))
    assert error < tolerance, f"relative error {error:.1e}"


def layouts(x: Tensor) -> list[Tensor]:
    """(batch, rows, groups, columns) with columns, rows or nothing next to each other in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2]
    return [x.contiguous(), x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), wide.copy_(x)]


def activated(y: Tensor, act: str | None) -> Tensor:
    """What kernels apply, in float64."""
    return F.gelu(y.double()) if act == "gelu" else F.silu(y.double()) if act == "silu" else y.double()


def close_to_activated(got: Tensor, y: Tensor, act: str) -> None:
    torch.testing.assert_close(got.double(), activated(y, act), rtol=2e-6, atol=5e-7, equal_nan=True)


sizes = st.integers(1, 40)
acts = st.sampled_from([None, "silu", "gelu"])
seeds = st.integers(0, 1000)
bit_widths = st.sampled_from([2, 3, 4, 5, 7, 8])


class Core:
    """Operands of a scan over an image, and its result by ``selective_scan`` on values, in float64."""

    def __init__(
        self, batch: int, height: int, width: int, channels: int, states: int, rank: int, path: int
    ) -> None:
        self.path, self.directions = path, 4
        pixels, k = height * width, self.directions
        self.u = self.coded(torch.randn(batch, pixels, 1, channels), make_grid(4, batch, True))
        self.rank = self.coded(torch.randn(batch, pixels, k, rank), make_grid(4, 1), by_group=True)
        self.b = self.coded(torch.randn(batch, pixels, k, states), make_grid(3, batch, True), by_group=True)
        self.c = self.coded(torch.randn(batch, pixels, k, states), make_grid(8, 1), by_group=True)
        self.weights, self.values = make_weight((k, channels, rank), 4, path, steps=True)
        self.skip, self.bias = torch.randn(k * channels), torch.randn(k * channels) - 2
        row = torch.arange(pixels)
        column = row.view(height, width).T.flatten()
        self.order = torch.stack((row, row.flip(0), column, column.flip(0))).int()
        self.sizes = rank, states, channels

    def coded(self, x: Tensor, grid: Grid, **options: Any) -> tuple[Codes, Grid]:
        return cpu.encode(x, grid, path=self.path, **options), grid

    def delta(self) -> Tensor:
        return torch.einsum("blkr,kdr->blkd", decoded(*self.rank, self.sizes[0]), self.values)

    def run(self, of_delta: Grid | None, a: Tensor) -> Tensor:
        return cpu.scan(
            self.u,
            self.rank,
            self.weights,
            of_delta,
            a,
            self.b,
            self.c,
            self.skip,
            self.bias,
            True,
            self.order,
            self.path,
        )

    def want(self, of_delta: Grid | None, a: Tensor) -> Tensor:
        _, states, channels = self.sizes
        u, delta = decoded(*self.u, channels).squeeze(2), self.delta()
        if of_delta is not None:
            level = index(delta.float(), of_delta) + of_delta.qmin
            delta = level.double() * per_sample(of_delta.scale) - per_sample(of_delta.shift)
            delta = (
                delta
                if of_delta.low is None
                else delta.clamp(per_sample(of_delta.low), per_sample(of_delta.high))
            )
        b, c = decoded(*self.b, states), decoded(*self.c, states)
        total = torch.zeros_like(u)
        for k, order in enumerate(self.order.long()):
            rows = slice(k * channels, (k + 1) * channels)
            y = selective_scan(
                *(t.transpose(1, 2) for t in (u[:, order], delta[:, order, k])),
                a[rows].double(),
                *(t[:, order, k].transpose(1, 2) for t in (b, c)),
                self.skip[rows].double(),
                None,
                self.bias[rows].double(),
                True,
            )
            assert isinstance(y, Tensor)
            total[:, order] += y.transpose(1, 2)
        return total


def decays(kind: str, directions: int, channels: int, states: int) -> Tensor:
    if kind == "own":
        return -(torch.rand(directions * channels, states) * states + 0.1)
    a = -(torch.arange(states) + 1.0) * 0.97
    if kind == "shared":
        a = a - 0.3 * torch.rand(states)
    return a.expand(directions * channels, states).contiguous()
