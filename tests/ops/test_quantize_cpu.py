"""The CPU kernels of fake quantization against the quantizers' own arithmetic, by every instruction set there is."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops.quantize import cpu
from ssmquant.ops.quantize.forms import Bank, DLSRule, Groups, gradient_scale
from ssmquant.quantizers.affine import Affine, affine_decode, affine_index
from ssmquant.quantizers.dls import _DLSFunction, dls_range, dls_statistics
from ssmquant.quantizers.lsq import _LSQFunction, floored
from ssmquant.quantizers.rfa import _RFAFunction, grid_thresholds, ordered_grid
from tests.ops import quantize_checks as checks
from tests.ops.quantize_checks import close, same, sizes_along

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Next to the lengths of rows, pieces and chunks; the last one is too large for a near cache.
SIZES = (1, 2, 7, 16, 49, 197, 511, 513, 3136, 16384, 16385, 40001, 70001)
NOT_FINITE = (math.nan, math.inf, -math.inf)
EPS = 1e-8
RULE = DLSRule(4, -8, EPS, False, False, True)
KINDS, BITS, SEEDS = st.sampled_from(DTYPES), st.integers(2, 8), st.integers(0, 2**32)
STEPS = st.floats(-2, 2, width=32)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels should have written to and have not shows as NaN."""
    for name in ("empty", "empty_like"):
        fresh = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, fresh=fresh, **k: fresh(*a, **k).fill_(math.nan))


def modules() -> Iterator[Any]:
    """The back end by each instruction set of this machine."""
    assert cpu.unavailable(torch.device("cpu")) is None
    names = [name for name in cpu.__all__ if name.endswith(("forward", "backward", "range"))]
    for path in range(len(cpu.paths())):
        yield SimpleNamespace(**{name: functools.partial(getattr(cpu, name), path=path) for name in names})


def like(x: Tensor) -> Tensor:
    """A gradient with the strides of ``x``."""
    return torch.empty_like(x).copy_(torch.randn(x.shape))


def layout(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A dense tensor whose dimension ``order[0]`` is the outermost one in memory, and so on."""
    inverse = [order.index(d) for d in range(len(order))]
    return torch.randn([shape[d] for d in order]).to(dtype).permute(inverse)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    qmin = -(2 ** (bits - 1)) if signed else 0
    return qmin, qmin + 2**bits - 1


def check_lsq_exactly(
    x: Tensor, alpha: Any, beta: Any, ends: tuple[int, int], eps: float = EPS, g: Tensor | None = None
) -> None:
    """y and dx bit for bit, ties and what is not finite included; d alpha and d beta as sums of their float32 terms."""
    a, b = (torch.as_tensor(s, dtype=torch.float32) for s in (alpha, beta))
    g, copies = like(x) if g is None else g, 3 if eps else 0
    # With a group an element, gradients are the terms.
    used = floored(a, eps) if eps else a
    leaves = [t.reshape(-1).repeat(x.numel() // t.numel()).requires_grad_() for t in (x, used, b)]
    want = _LSQFunction.apply(*leaves, *ends, 0, 0)
    gx, *terms = torch.autograd.grad(want, leaves, g.reshape(-1))
    scales = gradient_scale(x.numel(), ends[1], copies), 1.0
    for module in modules():
        y = module.lsq_forward(x, a, b, *ends, eps)
        dx, *sums = module.lsq_backward(g, x, a, b, *ends, eps, copies)
        assert y.stride() == dx.stride() == x.stride()
        same(y, want.detach().view(x.shape))
        same(dx, gx.view(x.shape))
        for got, term, scale in zip(sums, terms, scales, strict=True):
            assert got.shape == a.shape
            least = 1e-6 * scale * float(term[term.isfinite()].double().abs().sum()) + 1e-30
            must = scale * term.double().sum()
            torch.testing.assert_close(got.double(), must, rtol=0, atol=least, equal_nan=True)


@given(st.integers(1, 2000), KINDS, BITS, st.booleans(), STEPS, STEPS, SEEDS)
def test_lsq_is_the_quantizer_bit_for_bit(
    size: int, dtype: torch.dtype, bits: int, signed: bool, step: float, shift: float, seed: int
) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for strided in (x[0], x.t()):
        check_lsq_exactly(strided, step, shift, code_range(bits, signed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_lsq(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype)
    for module in modules():
        for case in ((0.3123, 0.1077, -8, 7), (-0.4567, -0.2099, -4, 3), (0.2123, 0.3077, 0, 15)):
            checks.check_lsq(module, x, *case)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", range(4), ids=("x", "g", "alpha", "beta"))
@pytest.mark.parametrize("size", [5, 48, 1000])
def test_lsq_of_what_is_not_finite(size: int, where: int, value: float) -> None:
    x, g, alpha, beta = tensors = [torch.randn(size), torch.randn(size), torch.tensor(0.3), torch.tensor(0.1)]
    tensors[where].view(-1)[-1] = value
    check_lsq_exactly(x, alpha, beta, (-8, 7), g=g)


@pytest.mark.parametrize("eps", [1e-2, 0.0])  # 0: as published, no floor
@pytest.mark.parametrize("alpha", [0.0, 1e-4, -1e-4, -0.0])
def test_alpha_is_raised_to_eps(alpha: float, eps: float) -> None:
    check_lsq_exactly(torch.randn(100), alpha, 0.0, (-8, 7), eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converts_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for alpha in (2.0**-20, 0.0123, 1.0, 777.0):
        check_lsq_exactly(bits.view(dtype), alpha, 0.37, (-128, 127))


def coefficients(rule: DLSRule) -> tuple[Tensor, Tensor]:
    """Of a range that clips a little on all sides: by codes, and by minimum and maximum."""
    top = rule.qmax if rule.qmin < 0 else rule.qmax / 2
    w = torch.tensor([0.1, 2.0, -0.03, 0.05]) / top
    return w, torch.tensor([-0.8 if rule.qmin < 0 else -1.0, 0.1 if rule.qmin < 0 else 2.0, 0.02, -0.03])


def exact_ranges(x: Tensor, w: Tensor, v: Tensor, axis: int | None, rule: DLSRule) -> Tensor:
    stats = dls_statistics(x.double(), axis, copies=rule.copies)
    ends = dls_range(stats, w.double(), v.double(), rule.bits, rule.eps, floor_first=rule.floor_first)
    return torch.stack([*stats, *ends]).reshape(6, -1)


def exact_gradients(g: Tensor, *args: Any) -> tuple[Tensor, ...]:
    leaves = [t.double().requires_grad_() for t in args[:3]]
    return torch.autograd.grad(_DLSFunction.apply(*leaves, args[3], *args[4]), leaves, g.double())


def check_dls_closely(x: Tensor, axis: int | None, rule: DLSRule, tolerance: float = 1e-5) -> None:
    """``check_dls``, and ranges and sums as close as float64 makes them."""
    w, v = coefficients(rule)
    groups, g = sizes_along(x, axis), like(x)
    exact = exact_ranges(x, w, v, axis, rule)
    # A code that computing at once in float64 changes would show in a sum.
    want = exact_gradients(g, x, w, v, axis, rule)
    size = exact[:4].abs().amax(0)
    # Sums may be small differences of large numbers.
    least = rule.scale(x.numel() // groups.count) * float(g.double().norm() * size.max()) / 4
    for module in modules():
        checks.check_dls(module, x, w, v, axis, rule)
        ranges = module.dls_range(x, w, v, groups, rule)
        assert ((ranges.double() - exact).abs() <= 1e-6 * size).all()
        dx, *sums = module.dls_backward(g, x, w, v, ranges, groups, rule, True)
        assert dx.stride() == x.stride()
        close(dx, want[0], tolerance if x.dtype == torch.float32 else 1e-2)
        for have, must in zip(sums, want[1:], strict=True):
            close(have, must, tolerance, least)
        assert module.dls_backward(g, x, w, v, ranges, groups, rule, False)[0].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*zip(SIZES), (3, 7, 50), (2, 20, 5, 9), (2, 17_000), (2, 70_001), (300, 3)], ids=str
)
def test_dls(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for order in itertools.permutations(range(len(shape))):
        x = layout(shape, order, dtype)
        for axis in (None, *range(len(shape))):
            if axis is None or shape[axis] <= 300:
                check_dls_closely(x, axis, RULE)


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
        check_dls_closely(x, 0, rule, 1e-4 if bits == 8 else 1e-5)


@given(st.integers(1, 40), st.integers(1, 300), KINDS, BITS, st.sampled_from((-1e3, 0, 3)), SEEDS)
def test_dls_is_the_quantizer_bit_for_bit_in_its_range(
    count: int, size: int, dtype: torch.dtype, bits: int, mean: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rule = DLSRule(bits, -(2 ** (bits - 1)), EPS, seed % 2 > 0, False, False)
    w, v = torch.randn(4, generator=generator) / 2 ** (bits - 1), torch.randn(4, generator=generator)
    some = (torch.randn(count, size, generator=generator) + mean).to(dtype)
    for x in (some, some.t().contiguous().t()):
        for axis in (0, 1, None):
            if axis is not None and x.shape[axis] == 1:
                continue
            exact = exact_ranges(x, w, v, axis, rule)
            for module in modules():
                y, ranges = module.dls_forward(x, w, v, sizes_along(x, axis), rule)
                low, high, *by = (r.reshape((-1, 1) if axis == 0 else (-1,)) for r in ranges[2:])
                index = affine_index(x.float(), *by, rule.qmin, rule.qmax)
                same(y, affine_decode(index, Affine(*by, low, high), rule.qmin).to(dtype))
                assert ((ranges - exact).abs() <= 1e-6 * exact[:4].abs().amax(0)).all()
                assert torch.allclose(ranges[1].double(), exact[1], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(("mean", "std"), [(1000.0, 1.0), (-1e6, 1.0), (0.0, 1e-18), (0.0, 1e30), (3.0, 0.0)])
@pytest.mark.parametrize("size", [2, 100, 20_000])
def test_statistics_are_accurate(size: int, mean: float, std: float) -> None:
    x = torch.randn(3, size) * std + mean
    x[1, 0] += 300 * std  # where a one-pass variance would start from
    w, v = coefficients(RULE)
    exact = dls_statistics(x.double(), 0).reshape(4, 3)
    for module in modules():
        ranges = module.dls_range(x, w, v, Groups(3, size), RULE).double()
        assert torch.allclose(ranges[1], exact[1], rtol=2e-6, atol=0)
        same(ranges[2:4], exact[2:])
        assert ((ranges[0] - exact[0]).abs() <= 2e-7 * exact[:2].abs().amax(0)).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3.3, 1e-20, 1e30])
@pytest.mark.parametrize("size", [1, 5, 100, 20_000])
def test_constant_groups(size: int, value: float) -> None:
    x = torch.full((2, size), value)
    (w, v), g = coefficients(RULE), like(x)
    want = exact_gradients(g, x, w, v, 0, RULE)
    for module in modules():
        y, ranges = module.dls_forward(x, w, v, Groups(2, size), RULE)
        same(y, x)
        assert (ranges[0] == value).all()
        assert (ranges[1] == 0).all()
        got = module.dls_backward(g, x, w, v, ranges, Groups(2, size), RULE, True)
        for have, must in zip(got, want, strict=True):
            assert torch.allclose(have.double(), must, rtol=1e-4, atol=1e-6 * max(1, abs(value)))


@pytest.mark.parametrize("values", [*zip(NOT_FINITE), (math.inf, -math.inf)])
@pytest.mark.parametrize("at", [0, 1, -1])
@pytest.mark.parametrize("size", [5, 48, 20_000])
def test_a_group_with_something_not_finite_is_nan(size: int, at: int, values: tuple[float, ...]) -> None:
    x = torch.randn(3, size)
    for i, value in enumerate(values):
        x[1, at - i] = value
    w, v = coefficients(RULE)
    g, groups = like(x), Groups(3, size)
    for module in modules():
        y, ranges = module.dls_forward(x, w, v, groups, RULE)
        same(ranges[:4, 1], dls_statistics(x, 0).reshape(4, 3)[:, 1])
        assert ranges[4:, 1].isnan().all()
        dx, dw, dv = module.dls_backward(g, x, w, v, ranges, groups, RULE, True)
        assert torch.cat((dw, dv)).isnan().all()
        for t in (y, dx):
            assert t[1].isnan().all()
            assert t[::2].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_of_dls_that_are_not_finite_show(value: float) -> None:
    x = torch.randn(2, 500)
    w, v = coefficients(RULE)
    for at in (x[1].argmin(), x[1].argmax(), x[1].abs().argmin()):
        g = like(x)
        g[1, at] = value
        want = exact_gradients(g, x, w, v, 0, RULE)
        for module in modules():
            ranges = module.dls_range(x, w, v, Groups(2, 500), RULE)
            got = module.dls_backward(g, x, w, v, ranges, Groups(2, 500), RULE, True)
            for have, must in zip(got, want, strict=True):
                assert torch.equal(have.isfinite().all(-1), must.isfinite().all(-1))


def a_bank(bits: int, rfa: bool, scaled: bool) -> tuple[Bank, list[Tensor]]:
    """A bank, its weights, alphas, betas, grids and thresholds."""
    counts, groups = (7, 3000, 40_000, 16, 1, 48 * 9, 17_000), (1, 3, 2, 16, 1, 48, 1)
    qmin, qmax = code_range(bits, True)
    bank = Bank(counts, groups, qmin, qmax, 2**bits if rfa else 0, scaled)
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


def quantized(bank: Bank, tensors: list[Tensor]) -> Tensor:
    """By each weight's quantizer."""
    x, alpha, beta, grid, thresholds = tensors
    parts = x.split(bank.counts), alpha.split(bank.groups), beta.split(bank.groups), grid, thresholds
    static = bank.qmin, bank.qmax, 0, bank.scaled
    results = []
    for w, a, b, *grids in zip(*parts, strict=True):
        rows = w.view(len(a), -1), a[:, None], b[:, None]
        results.append(
            _RFAFunction.apply(*rows, *grids, *static) if bank.levels else _LSQFunction.apply(*rows, *static)
        )
    return torch.cat([y.flatten() for y in results])


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("rfa", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_banks(bits: int, rfa: bool, by_channel: bool) -> None:
    for module in modules():
        checks.check_bank(module, [(7,), (12, 60), (60, 3, 3), (1, 1)], bits, rfa, by_channel, "cpu")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rfa", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_banks_of_long_weights_and_odd_grids(bits: int, rfa: bool, scaled: bool) -> None:
    bank, tensors = a_bank(bits, rfa, scaled)
    x, alpha, beta, grid, thresholds = tensors
    g = torch.randn(len(x))
    want = quantized(bank, tensors)
    leaves = [t.double().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(quantized(bank, leaves), leaves[: 4 if rfa else 3], g.double())
    sizes = bank.counts, bank.groups, bank.groups, 1
    for module in modules():
        same(module.bank_forward(x, alpha, beta, thresholds, bank, EPS), want)
        got = module.bank_backward(g, x, alpha, beta, grid, thresholds, bank, EPS)
        for have, must, size in zip(got, gradients, sizes, strict=False):  # without a grid's for LSQ
            for i, (a, b) in enumerate(zip(have.split(size), must.split(size), strict=True)):
                bunched = rfa and i == 1  # float32 hardly tells places between its entries
                close(a, b, 1e-2 if bunched else 2e-5 if bits < 8 else 1e-4)


@given(BITS, st.integers(1, 3000), st.sampled_from((0.01, 0.1, 1.0, 4.0)), st.floats(-3, 3), SEEDS)
def test_codes_of_rfa_by_any_grid(bits: int, size: int, spread: float, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(2**bits, generator=generator) * spread * 2 ** (bits - 2) + shift
    grid = ordered_grid(entries.sort().values if seed % 2 else entries)[None]
    thresholds = grid_thresholds(grid)
    # Values that are equal to thresholds and entries, next to others; alpha and beta keep them so.
    values = torch.randn(size, generator=generator) * 2 ** (bits - 2)
    bounds = torch.cat((thresholds, grid), 1)[0]
    picked = bounds[torch.randint(len(bounds), (size,), generator=generator)]
    x = torch.where(torch.rand(size, generator=generator) < 0.3, picked, values).requires_grad_()
    bank = Bank((size,), (1,), *code_range(bits, True), 2**bits, False)
    one, zero, g = torch.ones(1), torch.zeros(1), torch.randn(size, generator=generator)
    want = quantized(bank, [x, one, zero, grid, thresholds])
    (must,) = torch.autograd.grad(want, x, g)
    x, want = x.detach(), want.detach()
    for module in modules():
        same(module.bank_forward(x, one, zero, thresholds, bank, 0.0), want)
        same(module.bank_backward(g, x, one, zero, grid, thresholds, bank, 0.0)[0], must)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nan_and_infinity_in_a_weight(bits: int) -> None:
    bank, (x, alpha, beta, grid, thresholds) = a_bank(bits, True, False)
    x[3], x[100], x[200] = NOT_FINITE
    g = torch.randn(len(x))
    want = quantized(bank, [x, alpha, beta, grid, thresholds])
    assert want.isnan().sum() == 1
    for module in modules():
        same(module.bank_forward(x, alpha, beta, thresholds, bank, EPS), want)
        for t in module.bank_backward(g, x, alpha, beta, grid, thresholds, bank, EPS):
            assert t.isfinite().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dls_banks_are_calls_for_one_tensor_each(bits: int) -> None:
    rule = DLSRule(bits, -(2 ** (bits - 1)), EPS, False, bits == 2, True)
    counts = (1, 7, 300, 40_000, 16, 17_000)
    x, g, w, v = torch.randn(sum(counts)), torch.randn(sum(counts)), torch.randn(6, 4), torch.randn(6, 4)
    for module in modules():
        checks.check_dls_bank(module, counts, rule, "cpu")
        y, ranges = module.dls_bank_forward(x, w, v, counts, rule)
        dx, dw, dv = module.dls_bank_backward(g, x, w, v, ranges, counts, rule)
        parts = zip(*(t.split(counts) for t in (x, g, y, dx)), w, v, ranges.split(1, 1), dw, dv, strict=True)
        for one, grad, y1, dx1, w1, v1, ranges1, dw1, dv1 in parts:  # bit for bit
            want, its = module.dls_forward(one, w1, v1, Groups(), rule)
            wanted = module.dls_backward(grad, one, w1, v1, its, Groups(), rule, True)
            for have, must in zip((y1, ranges1, dx1, dw1, dv1), (want, its, *wanted), strict=True):
                same(have, must)


@pytest.mark.parametrize("kind", ["lsq", "dls", "bank"])
def test_results_depend_on_neither_threads_nor_the_instruction_set(kind: str) -> None:
    x, w, v = torch.randn(3, 350, 1001), torch.randn(4), torch.randn(4) / 4
    g = like(x)
    bank, tensors = a_bank(4, True, True)
    bank = replace(bank, counts=4 * bank.counts, groups=4 * bank.groups)  # enough for several threads
    weights, alpha, beta, grid, thresholds = (torch.cat([t] * 4) for t in tensors)

    def run(module: Any) -> list[Tensor]:
        if kind == "lsq":
            args = torch.tensor(0.3), torch.tensor(0.1), -8, 7, EPS
            return [module.lsq_forward(x, *args), *module.lsq_backward(g, x, *args, 1)]
        if kind == "bank":
            y = module.bank_forward(weights, alpha, beta, thresholds, bank, EPS)
            return [y, *module.bank_backward(y.cos(), weights, alpha, beta, grid, thresholds, bank, EPS)]
        results = []
        for groups in (Groups(), Groups(3, 350 * 1001), Groups(350, 1001), Groups(1001, 1)):
            y, ranges = module.dls_forward(x, w, v, groups, RULE)
            same(module.dls_range(x, w, v, groups, RULE), ranges)
            results += [y, ranges, *module.dls_backward(g, x, w, v, ranges, groups, RULE, True)]
        return results

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(cpu)
        for threads in (1, 2, 3, 1000):
            torch.set_num_threads(threads)
            for module in modules():
                for have, must in zip(run(module), want, strict=True):
                    same(have, must)
    finally:
        torch.set_num_threads(before)


def test_interface() -> None:
    assert cpu.NAME == "cpu"
    assert "cuda" in str(cpu.unavailable(torch.device("cuda")))
    assert cpu.paths()[-1] == "portable"
    assert ctypes.sizeof(cpu._Call) % 8 == 0
