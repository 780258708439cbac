"""What tests of the CUDA kernels of deployed models share: kernels run by a CPU, operands of scans, codes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops.deployed import Codes, Grid, ScanOperands, cpu, cuda
from ssmquant.ops.deployed.cuda_scan import Scan, Shape, arrangement
from ssmquant.ops.deployed.cuda_scan_tiles import Tiles
from tests.ops import emulator
from tests.ops.deployed_cpu import make_grid


def emulated(source: str, late: bool = False) -> emulator.Emulated:
    kinds = {
        "scan_ends(": "deployed_scan",
        "scan_tiles(": "deployed_scan_tiles",
        "fronted(": "deployed_fronted",
        "depthwise(": "deployed_depthwise",
        "thin(": "deployed_thin",
    }
    return emulator.load(source, late, next(kind for name, kind in kinds.items() if name in source))


def poison(setattr_: Any) -> None:
    fresh = torch.empty

    def empty(*shape: Any, **options: Any) -> Tensor:
        made = fresh(*shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else 101)

    setattr_(torch, "empty", empty)


def levels(grid: Grid) -> int:
    return grid.qmax - grid.qmin + 1


def as_codes(x: Tensor, grid: Grid) -> Tensor:
    """As they go from one kernel to the next."""
    u = (
        ((x.double() + grid.shift.double().cpu()) / grid.scale.double().cpu())
        .clamp(grid.qmin, grid.qmax)
        .round()
    )
    return torch.where(u.isnan(), -1, u - grid.qmin).to(torch.int8)


def same_codes(got: Tensor, want: Tensor) -> None:
    """But for values that are next to a tie."""
    assert got.dtype == torch.int8
    off = (got.cpu().int() - want.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) <= 0.01
    assert torch.equal(got.cpu() < 0, want < 0)


def there_is(grid: Grid, device: str) -> Grid:
    return Grid(grid.scale.to(device), grid.shift.to(device), grid.qmin, grid.qmax)


def codes_of(t: Tensor) -> Codes:
    """As ``cpu`` wants them."""
    wide = F.pad(t, (0, -t.shape[-1] % 16))
    memory = torch.zeros(wide.numel() + 64, dtype=torch.uint8)
    memory[: wide.numel()] = wide.flatten()
    return Codes(memory[: wide.numel()].view(wide.shape), t.sum(-1, dtype=torch.int32))


class Operands:
    """Of a scan: ``order`` has rows and the same turned round, as images have them, or one row."""

    def __init__(
        self, batch: int, pixels: int, channels: int, states: int, rank: int, *, bits: int = 4, paths: int = 2,
        turned: bool = True, ladder: int = 2, quantized: bool = True, softplus: bool = True, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.device = device
        k = self.directions = paths * (1 + turned)
        self.size, self.states, self.rank = (batch, pixels, channels), states, rank
        self.of_x, self.of_u, self.of_rank, self.of_b, self.of_c, of_delta = (
            make_grid(bits, 1) for _ in range(6)
        )
        half = 2 ** (bits - 1)
        self.of_delta = Grid(of_delta.scale * 2, of_delta.shift + 2, -half, half - 1) if quantized else None
        self.u = torch.randint(0, 2**bits, (batch, pixels, 1, channels), dtype=torch.uint8)
        rows = self.rows = rank + 2 * states
        self.codes = torch.randint(0, 2**bits, (batch, pixels, k, rows), dtype=torch.uint8)
        every = torch.arange(1, states + 1).float()
        rates = {2: 0.7 * every, 1: 0.2 + 0.5 * every, 0: torch.rand(k * channels, states) + 0.1}[ladder]
        self.a = -rates.expand(k * channels, states).contiguous()
        self.skip, self.bias = torch.randn(k * channels), torch.randn(k * channels) * 0.3 - 2
        order = torch.stack([torch.arange(pixels), *(torch.randperm(pixels) for _ in range(paths - 1))])
        self.order = torch.cat((order, order.flip(1)) if turned else (order,)).int().contiguous()
        self.softplus = softplus
        self.steps = self.weight((k, channels, rank), bits, 0.1)
        self.projection = self.weight((k * rows, channels), bits, 0.3)

    @staticmethod
    def weight(shape: tuple[int, ...], bits: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
        half = 2 ** (bits - 1)
        signed = torch.randint(-half, half, shape, dtype=torch.int8)
        scale = size * (torch.rand(shape[:-1]) + 0.1) / half
        return signed, scale, scale * torch.rand(shape[:-1])

    def to(self, t: Tensor) -> Tensor:
        return t.to(self.device)

    def grid(self, g: Grid | None) -> Any:
        return None if g is None else Grid(self.to(g.scale), self.to(g.shift), g.qmin, g.qmax)

    def nearest_tie(self) -> float:
        """How near to a tie of two levels a step size comes, in levels: it is by rounding which one that is."""
        if self.of_delta is None:
            return 0.5
        signed, scale, shift = (t.double() for t in self.steps)
        low = self.codes[..., : self.rank].double() + self.of_rank.qmin
        low = low * self.of_rank.scale.double() - self.of_rank.shift.double()
        weight = scale[..., None] * signed - shift[..., None]
        steps = torch.einsum("blkr,kcr->blkc", low, weight)
        u = (steps + self.of_delta.shift.double()) / self.of_delta.scale.double()
        off = (u - u.floor() - 0.5).abs()
        inside = (u > self.of_delta.qmin) & (u < self.of_delta.qmax)
        return float(torch.where(inside, off, 0.5).min())

    def scan_on_cpu(self) -> Tensor:
        low, b, c = self.codes.split([self.rank, self.states, self.states], -1)
        return cpu.scan(
            (codes_of(self.u), self.of_u), (codes_of(low), self.of_rank), cpu.pack(*self.steps, steps=True),
            self.of_delta, self.a, (codes_of(b), self.of_b), (codes_of(c), self.of_c), self.skip, self.bias,
            self.softplus, self.order,
        )  # fmt: skip

    def scan(
        self,
        shape: Shape | Tiles | None = None,
        bad: Tensor | None = None,
        apart: bool = False,
        wide: bool = True,
    ) -> Tensor:
        """``wide``: zeros behind the codes of a pixel."""
        batch, pixels, channels = self.size
        g, to = self.grid, self.to
        steps = cuda.pack(*map(to, self.steps))
        made = Scan(self.size, self.operands(g, to, steps), apart, shape)
        at = torch.tensor(arrangement(self.rank, self.states, (0, self.rank, self.rank + self.states)))
        arranged = (self.codes[..., at.clamp(min=0)] * (at >= 0)).to(torch.uint8).flatten(0, 1).flatten(1)
        u = self.u.view(batch * pixels, channels)
        of_u, of_pixels = (to(F.pad(t, (0, -t.shape[1] % 16)).contiguous()) for t in (u, arranged))
        bad = torch.zeros(batch * pixels, dtype=torch.uint8) if bad is None else bad
        y = made(of_u if wide else to(u), of_pixels, to(bad)).cpu()
        return y.sum(0) if apart else y

    def core(self, engine: Any, one: bool = False, **options: bool) -> Any:
        """``one``: quantizer of the image for the projection and the scans."""
        g, to = (self.grid, self.to) if engine is cuda else (lambda x: x, lambda t: t)
        projection, steps = (
            engine.pack(*map(to, self.projection)),
            engine.pack(*map(to, self.steps), steps=True),
        )
        places = 0, self.rank, self.rank + self.states
        of_x = None if one else g(self.of_x)
        return engine.Core(self.size, of_x, projection, places, self.operands(g, to, steps), **options)

    def operands(self, g: Any, to: Any, steps: Any) -> ScanOperands:
        return ScanOperands(
            g(self.of_u), g(self.of_rank), steps, g(self.of_delta), to(self.a), g(self.of_b), g(self.of_c),
            *(None if t is None else to(t) for t in (self.skip, self.bias)), self.softplus, to(self.order), self.rank,
        )  # fmt: skip
