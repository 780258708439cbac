"""The CPU kernels that encode, measure, normalize, gate and blend against PyTorch, for every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ssmquant.ops.deployed import Norm, cpu
from tests.ops.deployed_cpu import (
    FEW,
    PATHS,
    bit_widths,
    index,
    layouts,
    make_grid,
    make_weight,
    needs_kernels,
    off_ties,
    seeds,
    sizes,
)

pytestmark = needs_kernels


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
