"""The CPU kernels of projections and convolutions against PyTorch in float64, for every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from ssmquant.ops.deployed import Grid, Norm, RowGrid, cpu
from ssmquant.quantizers.token import token_range
from tests.ops.deployed_cpu import (
    FEW,
    PATHS,
    activated,
    acts,
    bit_widths,
    close,
    close_to_activated,
    decoded,
    make_grid,
    make_weight,
    needs_kernels,
    seeds,
    sizes,
)

pytestmark = needs_kernels

# ---- projections -----------------------------------------------------------------------------------------------------


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


# ---- convolutions ----------------------------------------------------------------------------------------------------


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
