"""The CPU kernels of fake quantization against the quantizers' own arithmetic, by every instruction set there is."""

from __future__ import annotations

import ctypes
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops.quantize import cpu
from ssmquant.ops.quantize.forms import Bank, DLSRule, Groups
from ssmquant.quantizers.affine import Affine, affine_decode, affine_index
from ssmquant.quantizers.dls import _DLSFunction, dls_range, dls_statistics
from ssmquant.quantizers.lsq import _LSQFunction, floored
from ssmquant.quantizers.rfa import _RFAFunction, grid_thresholds, ordered_grid
from tests.ops.quantize_checks import check_dls_bank

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 7, 16, 49, 197, 511, 513, 3136, 16384, 16385, 40001)
EPS = 1e-8


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels should have written to and have not shows as NaN."""
    for name in ("empty", "empty_like"):
        fresh = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, fresh=fresh, **k: fresh(*a, **k).fill_(math.nan))


def paths() -> range:
    """By index, the instruction sets of this machine."""
    assert cpu.unavailable(torch.device("cpu")) is None
    return range(len(cpu.paths()))


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the sign of zeros and what is in a NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_close(got: Tensor, want: Tensor, tolerance: float, least: float = 1e-30) -> None:
    """Relative to the norm, or to ``least``, with NaN where NaN is wanted and infinities where they are."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    assert same(got[~got.isfinite()], want[~got.isfinite()])
    got, want = (t.nan_to_num(0, 0, 0) for t in (got, want))
    error = (got - want).norm() / want.norm().clamp(min=least)
    assert error <= tolerance, f"relative error {error:.1e}"


def like(x: Tensor) -> Tensor:
    """A gradient with the strides of ``x``."""
    return torch.empty_like(x).copy_(torch.randn(x.shape))


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    qmin = -(2 ** (bits - 1)) if signed else 0
    return qmin, qmin + 2**bits - 1


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


# ---- LSQ -----------------------------------------------------------------------------------------------------------


def lsq(x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int) -> Tensor:
    return affine_decode(affine_index(x.float(), alpha, beta, qmin, qmax), Affine(alpha, beta), qmin).to(
        x.dtype
    )


def lsq_terms(g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int) -> list[Tensor]:
    """What the gradients of alpha and beta are sums of, and dx, each element as _LSQFunction has it in float32."""
    grad, u = g.float(), (x.float() + beta) / alpha
    inside = (u >= qmin) & (u <= qmax)
    dx = grad * inside
    return [grad * (u.clamp(qmin, qmax).round() - torch.where(inside, u, 0.0)), dx - grad, dx.to(x.dtype)]


@given(
    st.integers(1, 2000),
    st.sampled_from(DTYPES),
    st.integers(2, 8),
    st.booleans(),
    st.floats(-2, 2, width=32),
    st.floats(-1, 1, width=32),
    st.integers(0, 2**32),
)
def test_lsq_is_the_quantizer_bit_for_bit(
    size: int, dtype: torch.dtype, bits: int, signed: bool, step: float, shift: float, seed: int
) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    alpha, beta = scalar(step), scalar(shift)
    qmin, qmax = code_range(bits, signed)
    g = like(x)
    for path in paths():
        assert same(
            cpu.lsq_forward(x, alpha, beta, qmin, qmax, EPS, path),
            lsq(x, floored(alpha, EPS), beta, qmin, qmax),
        )
        dx, da, db = cpu.lsq_backward(g, x, alpha, beta, qmin, qmax, EPS, 3, path)
        *terms, want = lsq_terms(g, x, floored(alpha, EPS), beta, qmin, qmax)
        assert same(dx, want)
        for got, term, scale in zip((da, db), terms, (1 / math.sqrt(3 * size * qmax), 1.0), strict=True):
            assert got.shape == alpha.shape
            bound = 1e-6 * scale * term.double().abs().sum() + 1e-30
            assert abs(got.double() - scale * term.double().sum()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_lsq_gradients(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype)
    g = like(x)
    for alpha, beta, (qmin, qmax) in (
        (0.3123, 0.1077, (-8, 7)),
        (-0.4567, -0.2099, (-4, 3)),
        (0.2123, 0.3077, (0, 15)),
    ):
        exact = [t.double().requires_grad_() for t in (x, scalar(alpha), scalar(beta))]
        out = _LSQFunction.apply(*exact, qmin, qmax, None, True)
        want = torch.autograd.grad(out, exact, g.double())
        for path in paths():
            scale = 1 / math.sqrt(size * qmax)
            got = cpu.lsq_backward(g, x, scalar(alpha), scalar(beta), qmin, qmax, EPS, 1, path)
            # A sum of few terms may be a small difference of large numbers.
            least = scale * float(g.double().norm()) / 4
            for have, must in zip(got, want, strict=True):
                half = have.dtype != torch.float32
                assert_close(have, must, 1e-2 if half else 1e-5, least)


@pytest.mark.parametrize("path_independent", ["lsq", "dls", "bank"])
def test_results_depend_on_neither_threads_nor_the_instruction_set(path_independent: str) -> None:
    x, w, v = torch.randn(3, 350, 1001), torch.randn(4), torch.randn(4) / 4
    g = like(x)
    bank = Bank((200_000, 10_000, 210), (1, 200, 3), -8, 7, 16, True)
    alpha, beta, grid = (
        torch.rand(204) + 0.1,
        torch.randn(204),
        torch.arange(-8.0, 8.0) + torch.rand(3, 16) / 2,
    )

    def run(path: int) -> list[Tensor]:
        if path_independent == "lsq":
            args = scalar(0.3), scalar(0.1), -8, 7, EPS
            return [cpu.lsq_forward(x, *args, path), *cpu.lsq_backward(g, x, *args, 1, path)]
        if path_independent == "bank":
            flat, flat_g = x.flatten()[:210_210], g.flatten()[:210_210]
            args = alpha, beta, grid_thresholds(grid), bank, EPS
            back = cpu.bank_backward(flat_g, flat, alpha, beta, grid, *args[2:], path)
            return [cpu.bank_forward(flat, *args, path), *back]
        results = []
        for groups in (Groups(), Groups(3, 350 * 1001), Groups(350, 1001), Groups(1001, 1)):
            y, ranges = cpu.dls_forward(x, w, v, groups, RULE, path)
            assert same(cpu.dls_range(x, w, v, groups, RULE, path), ranges)
            results += [y, ranges, *cpu.dls_backward(g, x, w, v, ranges, groups, RULE, True, path)]
        return results

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(0)
        for threads in (1, 2, 3, 1000):
            torch.set_num_threads(threads)
            for path in paths():
                for have, must in zip(run(path), want, strict=True):
                    assert same(have, must)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "g", "alpha", "beta"])
@pytest.mark.parametrize("size", [5, 48, 1000])
def test_lsq_of_what_is_not_finite(size: int, where: str, value: float) -> None:
    tensors = {"x": torch.randn(size), "g": torch.randn(size), "alpha": scalar(0.3), "beta": scalar(0.1)}
    tensors[where].view(-1)[-1] = value
    x, g, alpha, beta = (tensors[k] for k in ("x", "g", "alpha", "beta"))
    for path in paths():
        assert same(
            cpu.lsq_forward(x, alpha, beta, -8, 7, EPS, path), lsq(x, floored(alpha, EPS), beta, -8, 7)
        )
        *terms, want = lsq_terms(g, x, floored(alpha, EPS), beta, -8, 7)
        dx, da, db = cpu.lsq_backward(g, x, alpha, beta, -8, 7, EPS, 0, path)
        assert same(dx, want)
        assert_close(da, terms[0].double().sum(), 1e-5)
        assert_close(db, terms[1].double().sum(), 1e-5)


def test_alpha_is_raised_to_eps() -> None:
    x = torch.randn(100)
    for alpha in (0.0, 1e-4, -1e-4, -0.0):
        raised, plain = scalar(-1e-2 if alpha < 0 else 1e-2), scalar(alpha)
        zero = scalar(0.0)
        for path in paths():
            got = cpu.lsq_forward(x, plain, zero, -8, 7, 1e-2, path)
            assert same(got, lsq(x, raised, zero, -8, 7))
            dx, da, _ = cpu.lsq_backward(x, x, plain, zero, -8, 7, 1e-2, 0, path)
            want = cpu.lsq_backward(x, x, raised, zero, -8, 7, 0.0, 0, path)
            assert same(dx, want[0])
            assert same(da, want[1])
            # As published: no floor.
            assert same(cpu.lsq_forward(x, plain, zero, -8, 7, 0.0, path), lsq(x, plain, zero, -8, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converts_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    for alpha in (2.0**-20, 0.0123, 1.0, 777.0):
        for path in paths():
            got = cpu.lsq_forward(x, scalar(alpha), scalar(0.37), -128, 127, EPS, path)
            assert same(got, lsq(x, scalar(alpha), scalar(0.37), -128, 127))


# ---- DLS -----------------------------------------------------------------------------------------------------------

RULE = DLSRule(4, -8, EPS, False, False, True)


def layout(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A dense tensor whose dimension ``order[0]`` is the outermost one in memory, and so on."""
    inverse = [order.index(d) for d in range(len(order))]
    return torch.randn([shape[d] for d in order]).to(dtype).permute(inverse)


def groups_of(x: Tensor, axis: int | None) -> Groups:
    return Groups() if axis is None else Groups(x.shape[axis], x.stride(axis))


def coefficients(rule: DLSRule) -> tuple[Tensor, Tensor]:
    """Of a range that clips a little on all sides: by codes, and by minimum and maximum."""
    top = rule.qmax if rule.qmin < 0 else rule.qmax / 2
    w = torch.tensor([0.1, 2.0, -0.03, 0.05]) / top
    return w, torch.tensor([-0.8 if rule.qmin < 0 else -1.0, 0.1 if rule.qmin < 0 else 2.0, 0.02, -0.03])


def by_group(ranges: Tensor, x: Tensor, axis: int | None) -> list[Tensor]:
    """Every row of ranges, broadcastable to ``x``."""
    if axis is None:
        return [r.reshape(()) for r in ranges]
    return [r.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())]) for r in ranges]


def dls(x: Tensor, ranges: Tensor, axis: int | None, rule: DLSRule) -> Tensor:
    _, _, low, high, alpha, beta = by_group(ranges, x, axis)
    index = affine_index(x.float(), alpha, beta, rule.qmin, rule.qmax)
    return affine_decode(index, Affine(alpha, beta, low, high), rule.qmin).to(x.dtype)


def exact_ranges(x: Tensor, w: Tensor, v: Tensor, axis: int | None, rule: DLSRule) -> Tensor:
    stats = dls_statistics(x.double(), axis, copies=rule.copies)
    return torch.stack([*stats, *range_of(stats, w.double(), v.double(), rule)]).reshape(6, -1)


def range_of(stats: Tensor, w: Tensor, v: Tensor, rule: DLSRule) -> tuple[Tensor, Tensor]:
    return dls_range(stats, w, v, rule.bits, rule.eps, floor_first=rule.floor_first)


def dls_gradients(
    g: Tensor, x: Tensor, w: Tensor, v: Tensor, axis: int | None, rule: DLSRule, stats: Tensor | None = None
) -> list[Tensor]:
    """The quantizer's own backward, in the dtype of w."""
    if stats is None:
        stats = dls_statistics(x.to(w.dtype), axis, copies=rule.copies)
    context: Any = SimpleNamespace(
        saved_tensors=(x, w, v, stats),
        static=(axis, *rule),
        needs_input_grad=(True, True, True),
    )
    return [t for t in _DLSFunction.backward(context, g) if t is not None]


def assert_dls(x: Tensor, axis: int | None, rule: DLSRule, tolerance: float = 1e-5) -> None:
    w, v = coefficients(rule)
    groups, g = groups_of(x, axis), like(x)
    exact = exact_ranges(x, w, v, axis, rule)
    # Of what is computed at once, in float64; a code that this changes would show in a sum.
    want = dls_gradients(g.double(), x.double(), w.double(), v.double(), axis, rule)
    size = exact[:4].abs().amax(0)
    factor = rule.scale(x.numel() // groups.count)
    for path in paths():
        y, ranges = cpu.dls_forward(x, w, v, groups, rule, path)
        assert y.stride() == x.stride()
        assert same(y, dls(x, ranges, axis, rule))
        assert same(cpu.dls_range(x, w, v, groups, rule, path), ranges)
        assert ((ranges.double() - exact).abs() <= 1e-6 * size).all()
        got = cpu.dls_backward(g, x, w, v, ranges, groups, rule, True, path)
        assert got[0].stride() == x.stride()
        # Sums may be small differences of large numbers.
        least = factor * float(g.double().norm() * size.max()) / 4
        assert_close(got[0], want[0], tolerance if x.dtype == torch.float32 else 1e-2)
        for have, must in zip(got[1:], want[1:], strict=True):
            assert_close(have, must, tolerance, least)
        nothing, dw, dv = cpu.dls_backward(g, x, w, v, ranges, groups, rule, False, path)
        assert nothing.shape == (0,)
        assert same(dw, got[1])
        assert same(dv, got[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dls_of_a_whole_tensor(size: int, dtype: torch.dtype) -> None:
    assert_dls(torch.randn(size).to(dtype), None, RULE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((3, 7, 50), (0, 1, 2)),
        ((3, 7, 50), (0, 2, 1)),
        ((3, 7, 50), (2, 0, 1)),
        ((2, 20, 5, 9), (0, 2, 3, 1)),
        ((5, 3, 2, 41), (3, 1, 0, 2)),
        ((2, 17_000), (0, 1)),
        ((300, 3), (0, 1)),
    ],
)
def test_dls_of_groups(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> None:
    x = layout(shape, order, dtype)
    for axis in range(len(shape)):
        if axis == 0 or x.numel() < 5000:
            assert_dls(x, axis, RULE)


def test_dls_of_a_feature_map() -> None:
    x, axis = layout((2, 180, 3136), (0, 2, 1)), 0
    w, v = coefficients(RULE)
    g, groups = like(x), groups_of(x, axis)
    y, ranges = cpu.dls_forward(x, w, v, groups, RULE)
    assert same(y, dls(x, ranges, axis, RULE))
    for row, exact in zip(ranges[:4], dls_statistics(x.double(), axis), strict=True):
        assert torch.allclose(row.double(), exact.flatten(), rtol=1e-6, atol=1e-7)
    got = cpu.dls_backward(g, x, w, v, ranges, groups, RULE, True)
    stats = torch.stack(by_group(ranges, x, axis)[:4])
    for have, must in zip(got, dls_gradients(g, x, w, v, axis, RULE, stats), strict=True):
        assert_close(have, must, 1e-4)  # sums in float32


@pytest.mark.parametrize("floor_first", [False, True])
@pytest.mark.parametrize("dead_pass", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("bits", "qmin"), [(2, -2), (4, -8), (4, 0), (8, -128), (8, 0)])
def test_rules_of_dls(bits: int, qmin: int, floor_first: bool, dead_pass: bool, scaled: bool) -> None:
    x = torch.randn(4, 300) * torch.tensor([1.0, 0.01, 1.0, 30.0])[:, None]
    x[2] = x[2].clamp(-0.9, 0.9)  # ties at both ends; the ceiling decides
    x[3] = x[3].abs()
    for eps, copies in ((1e-8, 1), (0.02, 1), (1e-8, 4)):
        rule = DLSRule(bits, qmin, eps, floor_first, dead_pass, scaled, copies)
        assert_dls(x, 0, rule, 1e-4 if bits == 8 else 1e-5)


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.integers(2, 8),
    st.sampled_from([-1e3, 0.0, 3.0]),
    st.integers(0, 2**32),
)
def test_dls_is_the_quantizer_bit_for_bit_in_its_range(
    count: int, size: int, dtype: torch.dtype, bits: int, mean: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rule = DLSRule(bits, -(2 ** (bits - 1)), EPS, seed % 2 > 0, False, False)
    w, v = torch.randn(4, generator=generator) / 2 ** (bits - 1), torch.randn(4, generator=generator)
    for x in (
        torch.randn(count, size, generator=generator),
        torch.randn(size, count, generator=generator).t(),
    ):
        x = (x + mean).to(dtype)
        for axis in (0, 1, None):
            if axis is not None and x.shape[axis] == 1:
                continue
            exact = exact_ranges(x, w, v, axis, rule)
            for path in paths():
                y, ranges = cpu.dls_forward(x, w, v, groups_of(x, axis), rule, path)
                assert same(y, dls(x, ranges, axis, rule))
                assert ((ranges - exact).abs() <= 1e-6 * exact[:4].abs().amax(0)).all()
                assert torch.allclose(ranges[1].double(), exact[1], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(("mean", "std"), [(1000.0, 1.0), (-1e6, 1.0), (0.0, 1e-18), (0.0, 1e30), (3.0, 0.0)])
@pytest.mark.parametrize("size", [2, 100, 20_000])
def test_statistics_are_accurate(size: int, mean: float, std: float) -> None:
    x = torch.randn(3, size) * std + mean
    x[1, 0] += 300 * std  # where a one-pass variance would start from
    w, v = coefficients(RULE)
    exact = dls_statistics(x.double(), 0).reshape(4, 3)
    for path in paths():
        ranges = cpu.dls_range(x, w, v, Groups(3, size), RULE, path).double()
        assert torch.allclose(ranges[1], exact[1], rtol=2e-6, atol=0)
        assert same(ranges[2:4], exact[2:])
        assert ((ranges[0] - exact[0]).abs() <= 2e-7 * exact[:2].abs().amax(0)).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3.3, 1e-20, 1e30])
@pytest.mark.parametrize("size", [1, 5, 100, 20_000])
def test_constant_groups(size: int, value: float) -> None:
    x = torch.full((2, size), value)
    w, v = coefficients(RULE)
    g, groups = like(x), Groups(2, size)
    for path in paths():
        y, ranges = cpu.dls_forward(x, w, v, groups, RULE, path)
        assert same(y, x)
        assert (ranges[0] == value).all()
        assert (ranges[1] == 0).all()
        stats = ranges[:4, :, None]
        want = dls_gradients(g.double(), x.double(), w.double(), v.double(), 0, RULE, stats.double())
        for have, must in zip(
            cpu.dls_backward(g, x, w, v, ranges, groups, RULE, True, path), want, strict=True
        ):
            assert torch.allclose(have.double(), must, rtol=1e-4, atol=1e-6 * max(1, abs(value)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, -1])
@pytest.mark.parametrize("size", [5, 48, 20_000])
def test_a_group_with_something_not_finite_is_nan(size: int, at: int, value: float) -> None:
    x = torch.randn(3, size)
    x[1, at] = value
    w, v = coefficients(RULE)
    g = like(x)
    exact = dls_statistics(x, 0).reshape(4, 3)
    for path in paths():
        y, ranges = cpu.dls_forward(x, w, v, Groups(3, size), RULE, path)
        assert y[1].isnan().all()
        assert y[::2].isfinite().all()
        assert same(ranges[:4, 1], exact[:, 1])
        assert ranges[4:, 1].isnan().all()
        dx, dw, dv = cpu.dls_backward(g, x, w, v, ranges, Groups(3, size), RULE, True, path)
        assert dw.isnan().all()
        assert dv.isnan().all()
        assert dx[1].isnan().all()
        assert dx[::2].isfinite().all()


def test_both_infinities_in_a_group() -> None:
    x = torch.randn(100)
    x[3], x[50] = math.inf, -math.inf
    w, v = coefficients(RULE)
    for path in paths():
        y, ranges = cpu.dls_forward(x, w, v, Groups(), RULE, path)
        assert y.isnan().all()
        assert same(ranges[:4, 0], dls_statistics(x, None))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_of_dls_that_are_not_finite_show(value: float) -> None:
    x = torch.randn(2, 500)
    w, v = coefficients(RULE)
    for at in (x[1].argmin(), x[1].argmax(), x[1].abs().argmin()):
        g = like(x)
        g[1, at] = value
        want = dls_gradients(g, x, w, v, 0, RULE)
        for path in paths():
            _, ranges = cpu.dls_forward(x, w, v, Groups(2, 500), RULE, path)
            got = cpu.dls_backward(g, x, w, v, ranges, Groups(2, 500), RULE, True, path)
            for have, must in zip(got, want, strict=True):
                assert torch.equal(have.isfinite().all(-1), must.isfinite().all(-1))


# ---- banks ---------------------------------------------------------------------------------------------------------


def a_bank(bits: int, rfa: bool, scaled: bool) -> tuple[Bank, list[Tensor]]:
    """A bank, its weights, alphas, betas, grids and thresholds."""
    counts, groups = (7, 3000, 40_000, 16, 1, 48 * 9, 17_000), (1, 3, 2, 16, 1, 48, 1)
    qmin, qmax = code_range(bits, True)
    levels = 2**bits if rfa else 0
    bank = Bank(counts, groups, qmin, qmax, levels, scaled)
    x = torch.randn(sum(counts))
    alpha = (torch.rand(sum(groups)) + 0.5) * 3 / 2**bits
    beta = torch.randn(sum(groups)) * 0.1
    alpha[2] *= -1
    grid = torch.arange(qmin, qmax + 1.0) + torch.rand(len(counts), qmax - qmin + 1)
    if rfa:
        grid[1] = ordered_grid(grid[1].flip(0) * 0.2)  # a bunch of entries next to each other
        grid[2] = torch.arange(qmin, qmax + 1.0)
        grid[4] = ordered_grid(grid[4] * 3)  # some beyond the codes
    return bank, [x, alpha, beta, grid, grid_thresholds(grid)]


def bank_parts(bank: Bank, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """x as (groups, size), alpha, beta as (groups, 1), grid and thresholds, of every weight."""
    x, alpha, beta, grid, thresholds = (t.to(dtype) for t in tensors)
    weights = x.split(bank.counts)
    alphas, betas = alpha.split(bank.groups), beta.split(bank.groups)
    return [
        [w.view(n, -1), a[:, None], b[:, None], grid[i], thresholds[i]]
        for i, (w, a, b, n) in enumerate(zip(weights, alphas, betas, bank.groups, strict=True))
    ]


def quantized(bank: Bank, part: list[Tensor]) -> Tensor:
    x, alpha, beta, grid, thresholds = part
    static = bank.qmin, bank.qmax, 0, bank.scaled
    if bank.levels:
        out: Tensor = _RFAFunction.apply(x, alpha, beta, grid, thresholds, *static)
    else:
        out = _LSQFunction.apply(x, alpha, beta, *static)
    return out


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rfa", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_banks(bits: int, rfa: bool, scaled: bool) -> None:
    bank, tensors = a_bank(bits, rfa, scaled)
    x, alpha, beta, grid, thresholds = tensors
    g = torch.randn(len(x))
    want = torch.cat([quantized(bank, part).flatten() for part in bank_parts(bank, tensors)])
    wanted: list[list[Tensor]] = []
    for part, grad in zip(bank_parts(bank, tensors, torch.float64), g.split(bank.counts), strict=True):
        leaves = [t.requires_grad_() for t in part[: 4 if rfa else 3]]
        out = quantized(bank, part)
        grads = torch.autograd.grad(out, leaves, grad.double().view(part[0].shape))
        wanted.append([t.flatten() for t in grads])
    for path in paths():
        assert same(cpu.bank_forward(x, alpha, beta, thresholds, bank, EPS, path), want)
        dx, da, db, dgrid = cpu.bank_backward(g, x, alpha, beta, grid, thresholds, bank, EPS, path)
        got = [dx.split(bank.counts), da.split(bank.groups), db.split(bank.groups)]
        if rfa:
            got.append(dgrid.unbind(0))
        else:
            assert dgrid.shape == (0,)
        for i, must in enumerate(wanted):
            bunched = rfa and i == 1  # float32 hardly tells places between its entries
            tolerance = 1e-2 if bunched else 2e-5 if bits < 8 else 1e-4
            for have, exact in zip(got, must, strict=True):
                assert_close(have[i], exact, tolerance)


@given(
    st.integers(2, 8),
    st.integers(1, 3000),
    st.sampled_from([0.01, 0.1, 1.0, 4.0]),
    st.floats(-3, 3),
    st.integers(0, 2**32),
)
def test_codes_of_rfa_by_any_grid(bits: int, size: int, spread: float, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = code_range(bits, True)
    entries = torch.randn(2**bits, generator=generator) * spread * 2 ** (bits - 2) + shift
    grid = ordered_grid(entries.sort().values if seed % 2 else entries)
    thresholds = grid_thresholds(grid)
    # Values that are equal to thresholds and entries, next to others; alpha and beta keep them so.
    values = torch.randn(size, generator=generator) * 2 ** (bits - 2)
    picked = torch.cat((thresholds, grid))[torch.randint(2 ** (bits + 1) - 1, (size,), generator=generator)]
    x = torch.where(torch.rand(size, generator=generator) < 0.3, picked, values)
    bank = Bank((size,), (1,), qmin, qmax, 2**bits, False)
    one, zero, g = torch.ones(1), torch.zeros(1), torch.randn(size, generator=generator)
    want = quantized(bank, [x[None], one[:, None], zero[:, None], grid, thresholds])[0]
    context: Any = SimpleNamespace(
        saved_tensors=(x[None], one[:, None], zero[:, None], grid, thresholds),
        static=(qmin, qmax, 0, False),
        needs_input_grad=(True,) * 4,
    )
    must = _RFAFunction.backward(context, g[None])
    for path in paths():
        assert same(cpu.bank_forward(x, one, zero, thresholds[None], bank, 0.0, path), want)
        dx, *_ = cpu.bank_backward(g, x, one, zero, grid[None], thresholds[None], bank, 0.0, path)
        assert must[0] is not None
        assert same(dx, must[0][0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nan_and_infinity_in_a_weight(bits: int) -> None:
    bank, (x, alpha, beta, grid, thresholds) = a_bank(bits, True, False)
    x[3], x[100], x[200] = math.nan, math.inf, -math.inf
    tensors = [x, alpha, beta, grid, thresholds]
    g = torch.randn(len(x))
    want = torch.cat([quantized(bank, part).flatten() for part in bank_parts(bank, tensors)])
    assert want.isnan().sum() == 1
    for path in paths():
        assert same(cpu.bank_forward(x, alpha, beta, thresholds, bank, EPS, path), want)
        dx, da, db, dgrid = cpu.bank_backward(g, x, alpha, beta, grid, thresholds, bank, EPS, path)
        for t in (dx, da, db, dgrid):
            assert t.isfinite().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dls_banks_are_calls_for_one_tensor_each(bits: int) -> None:
    rule = DLSRule(bits, -(2 ** (bits - 1)), EPS, False, bits == 2, True)
    counts = (1, 7, 300, 40_000, 16, 17_000)
    check_dls_bank(cpu, counts, rule, "cpu")
    x, g, w, v = torch.randn(sum(counts)), torch.randn(sum(counts)), torch.randn(6, 4), torch.randn(6, 4)
    for path in paths():
        y, ranges = cpu.dls_bank_forward(x, w, v, counts, rule, path)
        grads = cpu.dls_bank_backward(g, x, w, v, ranges, counts, rule, path)
        for i, (one, grad, mine, d) in enumerate(
            zip(*(t.split(counts) for t in (x, g, y, grads[0])), strict=True)
        ):
            want, its = cpu.dls_forward(one, w[i], v[i], Groups(), rule, path)
            assert same(mine, want)
            assert same(ranges[:, i : i + 1], its)
            wanted = cpu.dls_backward(grad, one, w[i], v[i], its, Groups(), rule, True, path)
            for have, must in zip((d, grads[1][i], grads[2][i]), wanted, strict=True):
                assert same(have, must)


# ---- the interface -------------------------------------------------------------------------------------------------


def test_interface() -> None:
    assert cpu.NAME == "cpu"
    assert cpu.unavailable(torch.device("cpu")) is None
    assert "cuda" in str(cpu.unavailable(torch.device("cuda")))
    assert cpu.paths()[-1] == "portable"
    assert all(size % 8 == 0 for size in (ctypes.sizeof(cpu._Call),))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_strides_are_kept(order: tuple[int, ...]) -> None:
    x = layout((2, 5, 9), order)
    g, args = like(x), (scalar(0.3), scalar(0.0), -8, 7, EPS)
    y = cpu.lsq_forward(x, *args)
    assert y.stride() == x.stride()
    assert same(y, lsq(x, *args[:4]))
    dx, _, _ = cpu.lsq_backward(g, x, *args, 0)
    assert dx.stride() == x.stride()
    assert same(dx, lsq_terms(g, x, *args[:4])[2])
