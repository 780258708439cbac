"""The CPU kernels of deployed models against PyTorch on decoded values in float64, for every instruction set."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops import selective_scan
from ssmquant.ops.deployed import Codes, Grid, Norm, RowGrid, ScanOperands, Weights, cpu
from ssmquant.ops.deployed.forms import signed_codes
from ssmquant.quantizers.token import token_range

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))
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


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(st.integers(1, 3), sizes, st.integers(1, 3), sizes, bit_widths, st.booleans(), seeds)
def test_encode(
    path: int, batch: int, rows: int, groups: int, columns: int, bits: int, per: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    grid = make_grid(bits, batch if per else 1)
    x = off_ties(torch.randn(batch, rows, groups, columns), grid)
    want = index(x, grid)
    for given_x in layouts(x):
        for border, by_group in (((0, 0), False), ((0, 0), True), ((2, 1), False)):
            codes = cpu.encode(given_x, grid, border, by_group=by_group, path=path)
            down, right = border
            inside = codes.data[:, down : down + rows, right : right + groups]
            assert torch.equal(inside[..., :columns].float(), want)
            assert codes.data.sum(dtype=torch.int64) == inside[..., :columns].sum(
                dtype=torch.int64
            )  # zeros around
            assert torch.equal(codes.sums, codes.data.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("path", PATHS)
def test_encode_notes_nan(path: int) -> None:
    x = torch.randn(1, 5, 1, 20)
    x[0, 2, 0, 19], x[0, 3, 0, 0], x[0, 4, 0, 0] = math.nan, math.inf, -math.inf
    grid = make_grid(4, 1)
    for given_x in layouts(x):
        codes = cpu.encode(given_x, grid, path=path)
        assert codes.sums[0, 2, 0] == torch.iinfo(torch.int32).min
        assert (codes.sums[0, [0, 1, 3, 4], 0] >= 0).all()
        assert codes.data[0, 3:, 0, 0].tolist() == [15, 0]
        weights, _ = make_weight((7, 20), 4, path)
        y = cpu.linear(codes, grid, weights, path=path)
        assert y[0, 2].isnan().all()
        assert y[0, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 2), sizes, seeds)
def test_moments(path: int, batch: int, rows: int, groups: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(batch, rows, groups, columns) * 3 + 100
    flat = x.double().flatten(1)
    std = flat.std(1) if flat.shape[1] > 1 else torch.zeros(batch)
    want = torch.stack((flat.mean(1), std, flat.amin(1), flat.amax(1)), 1)
    for given_x in layouts(x):
        got = cpu.moments(given_x, path=path)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    x[0, 0, 0, 0] = math.nan
    assert cpu.moments(x, path=path)[0, :2].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_moments_of_equal_values(path: int) -> None:
    values = torch.linspace(-3, 3, 301)
    x = values.view(-1, 1, 1, 1).expand(-1, 70, 1, 5).contiguous()
    got = cpu.moments(x, path=path)
    assert got.isfinite().all()
    assert float(got[:, 1].max()) < 1e-3


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(st.integers(1, 2), st.integers(1, 20), sizes, st.booleans(), st.booleans(), seeds)
def test_norm_and_gate(
    path: int, batch: int, rows: int, columns: int, affine: bool, rms: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, z = torch.randn(2, batch, rows, 1, columns) * 2 + 1
    weight, bias = torch.randn(2, columns) if affine else (None, None)
    norm = Norm(weight, bias, 1e-5, rms)
    scale, offset = (None if t is None else t.double() for t in (weight, bias))
    if rms:
        wide = F.rms_norm(x.double(), (columns,), scale, eps=1e-5) + (0 if offset is None else offset)
    else:
        wide = F.layer_norm(x.double(), (columns,), scale, offset, eps=1e-5)
    for n, value in ((norm, wide), (None, x.double())):
        y, moments = cpu.gate(x, z, n, with_moments=True, path=path)
        want = (value * F.silu(z.double())).squeeze(2)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        assert moments is not None
        torch.testing.assert_close(moments, cpu.moments(y.unsqueeze(2), path=path), rtol=1e-4, atol=1e-5)
    grid = make_grid(4, 1)
    codes = cpu.encode(x, grid, norm=norm, path=path)
    u = (wide + grid.shift.double()) / grid.scale.double()
    clear = (u - u.floor() - 0.5).abs() > 1e-3
    assert torch.equal(codes.data[..., :columns][clear].double(), index(wide, grid)[clear])


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 80),
    sizes,
    st.integers(1, 100),
    bit_widths,
    bit_widths,
    st.booleans(),
    seeds,
)
def test_linear(
    path: int, batch: int, rows: int, inputs: int, outputs: int, a: int, w: int, clamped: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    grid = make_grid(a, batch, clamped)
    codes = cpu.encode(torch.randn(batch, rows, 1, inputs), grid, path=path)
    weights, values = make_weight((outputs, inputs), w, path, values=clamped)
    bias = torch.randn(outputs)
    y = cpu.linear(codes, grid, weights, cpu.by_lanes(bias, path), path)
    x = decoded(codes, grid, inputs).squeeze(2)
    # Of what the result is put together from: products of codes, and what belongs to shifts.
    magnitude = 1.5 * inputs * float(values.abs().max()) + float(bias.abs().max())
    assert float((y.double() - (x @ values.T + bias)).abs().max()) < 1e-6 * magnitude
    for act in ("silu", "gelu"):
        close_to_activated(cpu.linear(codes, grid, weights, cpu.by_lanes(bias, path), path, act=act), y, act)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
@pytest.mark.parametrize("of_x", [2, 4, 8])
def test_the_largest_products_have_room(path: int, bits: int, of_x: int) -> None:
    """Weights of at most 7 bits may be summed in 16 bits, for as long as the largest of all codes allow."""
    inputs, half = 600, 2 ** (bits - 1)
    codes = torch.full((9, inputs), -half, dtype=torch.int8)
    codes[1], codes[2, ::2] = half - 1, half - 1
    codes[3:] = torch.randint(-half, half, (6, inputs), generator=torch.Generator().manual_seed(0))
    weights = cpu.pack(codes, torch.ones(9), torch.zeros(9), path=path)
    grid = Grid(torch.ones(1), torch.zeros(1), 0, 2**of_x - 1)
    x = torch.full((1, 3, 1, inputs), 1000.0)
    x[0, 1, 0] = torch.randint(0, 2**of_x, (inputs,), generator=torch.Generator().manual_seed(1))
    y = cpu.linear(cpu.encode(x, grid, path=path), grid, weights, path=path)
    want = x[:, :, 0].clamp(max=2**of_x - 1).double() @ codes.double().T
    assert torch.equal(y.double(), want)  # below 2 ** 24, so exact


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 80),
    st.integers(1, 100),
    bit_widths,
    st.sampled_from(["rows", "strided", "columns", "norm", "gate", "norm and gate"]),
    acts,
    seeds,
)
def test_a_projection_is_its_parts(
    path: int,
    batch: int,
    rows: int,
    inputs: int,
    outputs: int,
    bits: int,
    form: str,
    act: str | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    grid = make_grid(bits, 1)
    x, z = torch.randn(batch, rows, inputs + 3)[..., 2:-1], None
    if form == "rows":
        x = x.contiguous()
    elif form == "columns":
        x = torch.randn(batch, inputs, rows).transpose(1, 2)
    if rows > 3:
        x[0, 2, 0] = math.nan
    norm = Norm(torch.rand(inputs), torch.randn(inputs), 1e-5) if "norm" in form else None
    weights, _ = make_weight((outputs, inputs), bits, path)
    bias = cpu.by_lanes(torch.randn(outputs), path)
    if "gate" in form:
        z = torch.randn(batch, rows, 2 * inputs)[..., inputs:]
        gated, _ = cpu.gate(x.unsqueeze(2), z.unsqueeze(2), norm, path=path)
        codes = cpu.encode(gated.unsqueeze(2), grid, path=path)
    else:
        codes = cpu.encode(x.unsqueeze(2), grid, norm=norm, path=path)
    want = cpu.linear(codes, grid, weights, bias, path, act=act)
    more, gain = torch.randn(batch, rows, outputs + 1)[..., 1:], torch.randn(outputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            got = cpu.project(x, grid, weights, bias, norm=norm, z=z, act=act, path=path)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            for g in (None, gain):
                got = cpu.project(
                    x, grid, weights, bias, norm=norm, z=z, act=act, residual=(more, g), path=path
                )
                total = want.double() + more * (1 if g is None else g.double())
                torch.testing.assert_close(got.double(), total, rtol=1e-5, atol=1e-5, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 80),
    st.integers(1, 100),
    bit_widths,
    st.sampled_from(["rows", "columns", "norm", "gate", "norm and gate"]),
    seeds,
)
def test_a_projection_of_rows_with_ranges_of_their_own(
    path: int, batch: int, rows: int, inputs: int, outputs: int, bits: int, form: str, seed: int
) -> None:
    torch.manual_seed(seed)
    most = 0 if "norm" in form else 3  # a norm of few large values rounds
    x = torch.randn(batch, rows, inputs) * torch.logspace(-3, most, rows)[:, None]
    if form == "columns":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    norm = Norm(torch.rand(inputs) + 0.5, torch.randn(inputs), 1e-5) if "norm" in form else None
    z = torch.randn(batch, rows, inputs) if "gate" in form else None
    broken = rows // 2
    x[:, broken, inputs // 2] = (math.nan, math.inf, -math.inf)[seed % 3]
    weights, values = make_weight((outputs, inputs), bits, path)
    bias, clip = torch.randn(outputs), torch.rand(2) * 0.7 + 0.4
    grid = RowGrid(clip, 2**bits, 1e-12)
    got = cpu.project(x, grid, weights, cpu.by_lanes(bias, path), norm=norm, z=z, path=path)
    read = x.double()
    if norm is not None:
        assert norm.weight is not None
        assert norm.bias is not None
        read = F.layer_norm(read, (inputs,), norm.weight.double(), norm.bias.double(), norm.eps)
    if z is not None:
        read = read * F.silu(z.double())
    alpha, beta, _ = token_range(*read.aminmax(dim=-1, keepdim=True), clip.double(), 2**bits, 1e-12)
    u = (read + beta) / alpha
    want = (alpha * u.clamp(0, 2**bits - 1).round() - beta) @ values.T + bias
    clear = ((u - u.floor() - 0.5).abs() > 1e-3).all(-1)
    clear[:, broken] = False
    largest = read.abs().amax(-1, keepdim=True) + 2 * alpha
    magnitude = inputs * float(values.abs().max()) * largest + bias.abs().max()
    assert ((got.double() - want).abs() <= (5e-6 if norm is None else 5e-5) * magnitude)[clear].all()
    assert got[:, broken].isnan().all()
    for act in ("silu", "gelu"):
        acted = cpu.project(x, grid, weights, cpu.by_lanes(bias, path), norm=norm, z=z, act=act, path=path)
        close_to_activated(acted, got, act)


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(st.integers(1, 2), st.integers(1, 20), sizes, seeds)
def test_encode_with_factors(path: int, batch: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    grid, gain = make_grid(4, 1), torch.randint(-4, 5, (columns,)).float().exp2()
    x = off_ties(torch.randn(batch, rows, 3, columns), grid)
    codes = cpu.encode(
        (x / gain)[:, :, 1:], grid, (1, 1), norm=Norm(gain, None, 0.0, factors=True), path=path
    )
    assert torch.equal(codes.data[:, 1:-1, 1:-1, :columns].float(), index(x, grid)[:, :, 1:])
    assert torch.equal(codes.sums, codes.data.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(st.integers(1, 3), st.integers(1, 140), st.integers(1, 70), st.booleans(), seeds)
def test_blend(path: int, batch: int, rows: int, columns: int, scaled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, v = torch.randn(batch, rows, columns + 2)[..., 2:], torch.randn(batch, rows, columns)
    gain, scale = torch.randn(columns) if scaled else None, torch.randn(batch, columns)
    v[0, 0, 0] = math.nan
    got = cpu.blend(x, gain, v, scale, path)
    want = x.double() * (1 if gain is None else gain.double()) + v.double() * scale.double()[:, None]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
def test_gelu(path: int) -> None:
    x = torch.cat((torch.linspace(-12, 12, 5001), torch.tensor([math.inf, -60.0, 1e30, -1e30, math.nan])))
    x = x.view(1, 1, -1, 1)
    grid = Grid(
        torch.tensor([24 / 255]), torch.tensor([0.0]), -128, 127
    )  # only the bias reaches the activation
    zero = torch.zeros(1, 1)
    values = x.flatten()
    for value in values[::97].tolist() + values[-5:].tolist():
        bias = cpu.by_lanes(torch.tensor([value]), path)
        y = cpu.depthwise(x[:, :, :1], grid, cpu.by_lanes(zero, path), bias, (1, 1), (1, 1), "gelu", path)
        want = (
            F.gelu(torch.tensor(max(value, -60.0)).double())
            if value == value
            else torch.tensor(value).double()
        )
        torch.testing.assert_close(y.flatten()[0].double(), want, rtol=1e-6, atol=2e-7 * max(1.0, min(abs(value), 12)),
                                   equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 14),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([(3, 3), (1, 1), (5, 3), (1, 7), (2, 2), (4, 3)]),
    *(st.tuples(st.integers(low, high), st.integers(low, high)) for low, high in ((1, 2), (1, 4), (0, 3))),
    seeds,
)
def test_dense_convolutions(
    path: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    seed: int,
) -> None:
    sizes = height + 2 * padding[0], width + 2 * padding[1]
    assume(min(cpu.conv_size(sizes, kernel, dilation, stride)) > 0)
    torch.manual_seed(seed)
    grid, outputs, taps = make_grid(4, batch), 13, math.prod(kernel)
    weights, values = make_weight((taps, outputs, channels), 4, path, taps=True)
    bias = torch.randn(outputs)
    images = torch.randn(batch, channels, height, width)
    for image in (images, images.contiguous(memory_format=torch.channels_last)):
        pixels = image.permute(0, 2, 3, 1)
        codes = cpu.encode(pixels, grid, padding, path=path)
        y = cpu.conv(codes, grid, weights, cpu.by_lanes(bias, path), kernel, dilation, stride, padding, path)
        x = decoded(cpu.encode(pixels, grid, path=path), grid, channels).permute(0, 3, 1, 2)
        dense = values.view(*kernel, outputs, channels).permute(2, 3, 0, 1)
        close(y.permute(0, 3, 1, 2), F.conv2d(x, dense, bias.double(), stride, padding, dilation))


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 14),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([(3, 3, 1), (1, 1, 1), (3, 3, 2), (5, 3, 1), (1, 7, 2)]),
    acts,
    seeds,
)
def test_depthwise_convolutions(
    path: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    form: tuple[int, int, int],
    act: str | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    down, right, dilation = form
    kernel, spread = (down, right), (dilation, dilation)
    border = ((down - 1) * dilation // 2, (right - 1) * dilation // 2)
    clamped = make_grid(4, batch, clamped=True)
    own, depth = torch.randn(channels), torch.randn(down * right, channels)
    images = torch.randn(batch, channels, height, width)
    for image in (images, images.contiguous(memory_format=torch.channels_last)):
        pixels = image.permute(0, 2, 3, 1)
        y = cpu.depthwise(
            pixels, clamped, cpu.by_lanes(depth, path), cpu.by_lanes(own, path), kernel, spread, act, path
        )
        x = decoded(cpu.encode(pixels, clamped, path=path), clamped, channels).permute(0, 3, 1, 2)
        single = depth.T.reshape(channels, 1, down, right).double()
        want = F.conv2d(x, single, own.double(), 1, border, dilation, channels)
        close(y.permute(0, 3, 1, 2), activated(want, act))


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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ladder", "shared", "own"])
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 5, 16, 33, 72]),
    st.sampled_from([1, 2, 3, 8, 10, 16, 17, 37]),
    st.sampled_from([1, 4, 5, 12, 37]),
    st.sampled_from([None, 2, 4, 8]),
    seeds,
)
def test_scan(
    path: int, kind: str, batch: int, height: int, width: int, channels: int, states: int, rank: int, bits: int | None,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    core = Core(batch, height, width, channels, states, rank, path)
    delta = core.delta()
    flat = delta.flatten(1)
    std = flat.std(1) if flat.shape[1] > 1 else torch.zeros(batch).double()
    moments = torch.stack((flat.mean(1), std, flat.amin(1), flat.amax(1)), 1)
    got = cpu.delta_moments(*core.rank, core.weights, path)
    torch.testing.assert_close(got.double(), moments, rtol=1e-5, atol=1e-5)
    grid, tolerance = None, 1e-5
    if bits is not None:
        grid = make_grid(bits, batch, clamped=True)
        level = (delta + per_sample(grid.shift)) / per_sample(grid.scale)
        # Step sizes so near a tie may go either way: one level of one step.
        if bool((((level - level.floor()) - 0.5).abs() < 2e-6 * 2**bits).any()):
            tolerance = 0.02
    a = decays(kind, core.directions, channels, states)
    y = core.run(grid, a)
    close(y, core.want(grid, a), tolerance)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(core.run(grid, a), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 150),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 5, 16, 33, 72]),
    st.sampled_from([1, 3, 10, 16]),
    st.sampled_from([1, 5, 12]),
    bit_widths,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_a_core_is_its_parts(
    path: int, batch: int, pixels: int, directions: int, channels: int, states: int, ranks: int, bits: int, same: bool,
    by_column: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    shape = (batch, channels, pixels) if by_column else (batch, pixels, channels)
    x = torch.randn(shape).transpose(1, 2) if by_column else torch.randn(shape)
    if pixels > 3:
        x[0, 2, 0] = math.nan
    of_x, of_u, of_rank, of_b, of_c, of_delta = (make_grid(bits, 1) for _ in range(6))
    rows = ranks + 2 * states + 1
    places = (1, 1 + ranks, 1 + ranks + states)
    projection, _ = make_weight((directions * rows, channels), bits, path)
    steps, _ = make_weight((directions, channels, ranks), bits, path, steps=True)
    a = decays("ladder", directions, channels, states)
    skip, bias = torch.randn(directions * channels), torch.randn(directions * channels)
    order = torch.stack([torch.randperm(pixels) for _ in range(directions)]).int()

    image = x.unsqueeze(2)
    u = cpu.encode(image, of_u, path=path)
    codes, grid = (u, of_u) if same else (cpu.encode(image, of_x, path=path), of_x)
    made = cpu.linear(codes, grid, projection, path=path).view(batch, pixels, directions, rows)
    rank, b, c = (
        cpu.encode(made[..., at : at + n], g, by_group=True, path=path)
        for at, n, g in zip(places, (ranks, states, states), (of_rank, of_b, of_c), strict=True)
    )
    want = cpu.scan(
        (u, of_u), (rank, of_rank), steps, of_delta, a, (b, of_b), (c, of_c), skip, bias, True, order, path
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            operands = ScanOperands(
                of_u, of_rank, steps, of_delta, a, of_b, of_c, skip, bias, True, order, ranks
            )
            size = batch, pixels, channels
            core = cpu.Core(size, None if same else of_x, projection, places, operands, path)
            for given in (x, x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                torch.testing.assert_close(core(given), want, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
def test_a_large_scan_is_the_same_on_any_number_of_threads(path: int) -> None:
    torch.manual_seed(0)
    core = Core(2, 40, 37, 72, 10, 4, path)
    grid, a = make_grid(4, 2, clamped=True), decays("ladder", 4, 72, 10)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(core.run(grid, a))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_nan_of_the_low_rank_reaches_all_later_steps(path: int, bits: int) -> None:
    torch.manual_seed(0)
    core = Core(1, 4, 5, 20, 3, 4, path)
    x = torch.randn(1, 20, 4, 4)
    x[0, 7] = math.nan
    core.rank = core.coded(x, make_grid(4, 1), by_group=True)
    y = core.run(make_grid(bits, 1, clamped=True), decays("ladder", 4, 20, 3))
    assert y.isnan().all()  # forwards and backwards, every pixel is behind it


@given(st.integers(1, 4), st.integers(2, 50), st.integers(1, 4), st.integers(2, 8), seeds)
def test_ranges(samples: int, count: int, copies: int, bits: int, seed: int) -> None:
    from ssmquant.quantizers.dls import dls_range, dls_statistics

    torch.manual_seed(seed)
    x = torch.randn(samples, count)
    w, v = torch.randn(2, 4)
    moments = torch.stack((x.mean(1), x.std(1), x.amin(1), x.amax(1)), 1)
    scale, shift, low, high = cpu.ranges(moments, count, copies, w, v, 2**bits, 1e-6)
    stats = dls_statistics(x, 0, copies=copies).flatten(1)
    alpha, beta = dls_range(stats, w, v, bits, 1e-6)
    torch.testing.assert_close(scale, alpha, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shift, beta, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.stack((low, high)), moments[:, 2:].T)
    broken = cpu.ranges(torch.full((1, 4), math.nan), count, copies, w, v, 2**bits, 1e-6)
    assert all(t.isnan().all() for t in broken)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_after_a_fork() -> None:
    """GNU's OpenMP does not survive one: a child that went on with its threads would wait for ever."""
    torch.manual_seed(0)
    core = Core(1, 60, 60, 72, 10, 4, 0)
    a = decays("ladder", 4, 72, 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = core.run(None, a)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            os._exit(0 if core.run(None, a).numpy().tobytes() == want.numpy().tobytes() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
