"""The scan of deployed models for ``scan.py``: operands, what has to come out, and modes.

Operands are as in a calibrated model: an image of normal values, none next to a tie of its two quantizers, grids that
span about three deviations of what they encode, and weights, all of the same number of bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops import selective_scan, use_backend
from ssmquant.ops.deployed import Grid, ScanOperands, cpu
from ssmquant.ops.selective_scan import scan_paths
from ssmquant.ops.selective_scan.backends import choose

RANKS = {(72, 10): 4, (120, 16): 4, (360, 16): 12, (384, 16): 12}
"""Of the step sizes, by channels of a direction and states; VMamba has a 16th of the channels."""
IMAGES = {230400: (360, 640)}
"""Height and width by pixels, where they are not as close to each other as they can be."""
TOLERANCE = {"quantized": 1e-3, "quantized_core": 1e-2, "float_core": 1e-5}
"""Of relative errors: step sizes can be at a tie, in a core also the low rank, B and C."""
MOST_MEMORY = 20e9


class Mode(NamedTuple):
    """What is timed. ``result``: what ``run`` gives, as (batch, pixels, channels); ``moved``: bytes."""

    name: str
    backend: str
    run: Callable[[], Tensor]
    result: Callable[[Tensor], Tensor]
    moved: int


def encoded(t: Tensor, grid: Grid) -> Tensor:
    """Codes from 0, float64."""
    u = (t + grid.shift.double()) / grid.scale.double()
    return u.clamp(grid.qmin, grid.qmax).round() - grid.qmin


def decoded(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.double() + grid.qmin) * grid.scale.double() - grid.shift.double()


def quantizer(t: Tensor, bits: int, reach: float = 3.0) -> Grid:
    """A grid for what is like ``t``."""
    half, middle, spread = 2 ** (bits - 1), t.mean(), reach * t.std()
    scale = (2 * spread / (2**bits - 1)).float().reshape(1)
    return Grid(scale, (-half * scale - middle + spread).float(), -half, half - 1)


class Weight:
    """A random one, (.., outputs, inputs): what an engine packs, and its values in float64."""

    def __init__(self, shape: tuple[int, ...], bits: int, size: float, generator: torch.Generator) -> None:
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)
        scale = size * (torch.rand(shape[:-1], generator=generator) + 0.5) / half
        self.packed = codes, scale, -0.5 * scale
        self.values = (codes.double() + 0.5) * scale[..., None].double()

    def pack(self, engine: Any, device: torch.device, **options: bool) -> Any:
        return engine.pack(*(t.to(device) for t in self.packed), **options)


class Case:
    """Operands of one case, on the CPU: an image of (batch, pixels, channels) and its scans in K orders.

    Args:
        sizes: batch, channels of all directions, states, pixels, directions.
    """

    def __init__(self, sizes: tuple[int, int, int, int, int], bits: int) -> None:
        batch, channels, states, pixels, k = sizes
        d = channels // k
        self.size, self.states, self.directions = (batch, pixels, d), states, k
        self.rank = r = RANKS.get((d, states), -(-d // 16))
        near = (h for h in range(math.isqrt(pixels), 0, -1) if pixels % h == 0)
        height = IMAGES[pixels][0] if pixels in IMAGES else next(near)
        self.image = height, pixels // height
        self.order = scan_paths(*self.image)[:k].contiguous()  # one direction: along rows
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.size, generator=generator)
        self.of_x, self.of_u = quantizer(x, bits), quantizer(x, bits, 3.5)
        for grid in (self.of_x, self.of_u, self.of_x):
            at = (x + grid.shift) / grid.scale
            x = torch.where((at - at.floor() - 0.5).abs() < 1e-3, x + 0.01 * grid.scale, x)
        self.x = x
        self.projection = Weight((k * (r + 2 * states), d), bits, 1.7 * d**-0.5, generator)
        self.steps = Weight((k, d, r), bits, r**-0.5, generator)
        self.a = -torch.arange(1.0, states + 1).repeat(channels, 1)
        self.skip = torch.full((channels,), 0.1)  # little, so that the gate sees the scan
        log_dt = torch.rand(channels, generator=generator) * 4.6 - 6.9  # ln 0.001 .. ln 0.1
        self.bias = log_dt.exp() + (-(-log_dt.exp()).expm1()).log()

        self.u = encoded(x.double(), self.of_u)
        made = self.projected(decoded(encoded(x.double(), self.of_x), self.of_x))
        grids = [quantizer(t, bits) for t in made]
        self.of_rank, self.of_b, self.of_c = grids
        self.codes = [encoded(t, grid) for t, grid in zip(made, grids, strict=True)]
        low = decoded(self.codes[0][0], self.of_rank)
        self.of_delta = quantizer(torch.einsum("lkr,kdr->lkd", low, self.steps.values), bits)

    def projected(self, image: Tensor) -> tuple[Tensor, ...]:
        """The low rank, B and C, each (batch, pixels, K, ..)."""
        made = (image @ self.projection.values.T).view(*self.size[:2], self.directions, -1)
        return made.split([self.rank, self.states, self.states], -1)

    def wanted(self, rounded: bool) -> Tensor:
        """(batch, pixels, channels) in float64, of decoded values, or of the image and without any quantizer."""
        image, parts = self.x.double(), self.projected(self.x.double())
        if rounded:
            grids = self.of_rank, self.of_b, self.of_c
            image = decoded(self.u, self.of_u)
            parts = tuple(decoded(t, grid) for t, grid in zip(self.codes, grids, strict=True))
        y, channels = torch.zeros_like(image), self.size[2]
        for k, path in enumerate(self.order.long()):
            low, b, c = (t[:, path, k] for t in parts)
            delta = low @ self.steps.values[k].T
            if rounded:
                delta = decoded(encoded(delta, self.of_delta), self.of_delta)
            u, delta, b, c = (t.transpose(1, 2).contiguous() for t in (image[:, path], delta, b, c))
            a, skip, bias = (
                t[k * channels : (k + 1) * channels].double() for t in (self.a, self.skip, self.bias)
            )
            with use_backend("chunked"):
                y[:, path] += selective_scan(u, delta, a, b, c, skip, None, bias, True).transpose(1, 2)
        return y


def _there(grid: Grid, device: torch.device) -> Grid:
    return Grid(grid.scale.to(device), grid.shift.to(device), grid.qmin, grid.qmax)


def quantized_modes(case: Case, engine: Any, device: torch.device) -> Iterator[Mode]:
    """What an engine of deployed models does of a case, as ``ssmquant.modules.deployed.scan_core`` calls it."""
    x, order, a, skip, bias = (t.to(device) for t in (case.x, case.order, case.a, case.skip, case.bias))
    grids = case.of_x, case.of_u, case.of_rank, case.of_delta, case.of_b, case.of_c
    of_x, of_u, of_rank, of_delta, of_b, of_c = (_there(grid, device) for grid in grids)
    places = 0, case.rank, case.rank + case.states
    steps = case.steps.pack(engine, device, steps=True)
    parts = len(engine.paths(order)) if engine.NAME == "cuda" else 1
    of_scan = ScanOperands(of_u, of_rank, steps, of_delta, a, of_b, of_c, skip, bias, True, order, case.rank)
    projection = case.projection.pack(engine, device)
    core = engine.Core(case.size, of_x, projection, places, of_scan, **({"apart": True} if parts > 1 else {}))
    if engine.NAME == "cuda":
        operands = (
            *_arranged(case, engine, device),
            torch.zeros(x[..., 0].numel(), dtype=torch.uint8, device=device),
        )

        def scan() -> Tensor:
            return core.scan(*operands)
    else:
        decoded_u = decoded(case.u, case.of_u).float().unsqueeze(2)
        u = cpu.encode(decoded_u, of_u), of_u
        rank, b, c = (
            (cpu.encode(decoded(t, grid).float(), grid, by_group=True), grid)
            for t, grid in zip(case.codes, (of_rank, of_b, of_c), strict=True)
        )

        def scan() -> Tensor:
            return cpu.scan(u, rank, steps, of_delta, a, b, c, skip, bias, True, order)

    def result(y: Tensor) -> Tensor:
        return y.sum(0) if parts > 1 else y

    written = 4 * parts * x.numel()
    codes = case.u.numel() + sum(t.numel() for t in case.codes)
    yield Mode("quantized", engine.NAME, scan, result, codes + written)
    yield Mode("quantized_core", engine.NAME, lambda: core(x), result, 4 * x.numel() + written)


def _arranged(case: Case, engine: Any, device: torch.device) -> Iterator[Tensor]:
    """Codes of the image and of its projection as ``engine.Core.encode`` makes them, (batch * pixels, ..)."""
    places = 0, case.rank, case.rank + case.states
    at = torch.tensor(engine.cuda_scan.arrangement(case.rank, case.states, places))
    codes = torch.cat(case.codes, -1)[..., at.clamp(min=0)] * (at >= 0)
    for t in (case.u, codes.flatten(2)):
        yield F.pad(t.flatten(0, 1), (0, -t.shape[2] % 16)).to(torch.uint8).contiguous().to(device)


def float_mode(case: Case, device: torch.device) -> Iterator[Mode]:
    """The float core of MambaIR in plain PyTorch around our float scan, from an image with channels in front."""
    batch, pixels, d = case.size
    k, (height, width) = case.directions, case.image
    if 4 * 6 * k * case.x.numel() > MOST_MEMORY:
        return
    x = case.x.transpose(1, 2).reshape(batch, d, height, width).to(device)
    a, skip, bias = (t.to(device) for t in (case.a, case.skip, case.bias))
    projection, steps = (
        t.float().to(device) for t in (case.projection.values.view(k, -1, d), case.steps.values)
    )

    def upright(y: Tensor) -> Tensor:
        return y.view(batch, d, width, height).transpose(2, 3).flatten(2)

    @torch.no_grad()
    def run() -> Tensor:
        xs = x.view(batch, 1, d, pixels)
        if k > 1:
            xs = torch.stack((x.flatten(2), x.transpose(2, 3).flatten(2)), 1)
            xs = torch.cat((xs, xs.flip(3)), 1)
        made = torch.einsum("bkdl,kcd->bkcl", xs, projection)
        low, b, c = made.split([case.rank, case.states, case.states], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", low, steps)
        y = selective_scan(xs.flatten(1, 2), delta.flatten(1, 2), a, b, c, skip, None, bias, True)
        if k == 1:
            return y
        y = y.view(batch, k, d, pixels)
        back = y[:, 2:].flip(3)
        return y[:, 0] + back[:, 0] + upright(y[:, 1]) + upright(back[:, 1])

    backend = choose(device, torch.float32, case.states).NAME
    yield Mode("float_core", backend, run, lambda y: y.transpose(1, 2), 8 * x.numel())


def rows_of(
    case: Case,
    engine: Any,
    device: torch.device,
    timed: Callable[[Callable[[], object]], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Gate and times of one case, mode by mode. A mode that fails has no times."""
    for modes, rounded in ((quantized_modes(case, engine, device), True), (float_mode(case, device), False)):
        want = None
        for mode in modes:
            want = case.wanted(rounded) if want is None else want
            got = mode.result(mode.run()).double().cpu()
            error = float((got - want).norm() / want.norm())
            error = error if error == error else float("inf")
            against = "decoded values, chunked, float64" if rounded else "chunked, float64"
            gate = {"against": against, "relative_error": error, "passed": error < TOLERANCE[mode.name]}
            if rounded:
                gate["same_bits"] = torch.equal(mode.result(mode.run()).double().cpu(), got)
                gate["passed"] = gate["passed"] and gate["same_bits"]
            row = {"backend": mode.backend, "gate": gate, "mode": mode.name}
            yield {**row, "pass": "fwd", **timed(mode.run), "bytes": mode.moved} if gate["passed"] else row
