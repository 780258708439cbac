"""What every quantizer of the registry keeps, whatever its rule: a new one is tested here without further ado."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.quantizers import QUANTIZERS
from tests.strategies import (
    COUNTER_CASES,
    NAMES,
    bits,
    learnt,
    make,
    nearest_names,
    quantizer_names,
    samples,
    tensors,
)


@given(quantizer_names, bits, tensors(), st.booleans(), st.integers(0, 5))
def test_encoding_is_the_forward(name: str, n_bits: int, x: Tensor, is_weight: bool, seed: int) -> None:
    q = make(name, n_bits, x, is_weight=is_weight)
    if seed:
        learnt(q, seed)
    y = q(x)
    e = q.encode(x)
    assert y.shape == x.shape == e.codes.shape
    assert y.dtype == x.dtype
    assert e.codes.dtype == torch.uint8
    assert int(e.codes.max()) < 2**n_bits
    assert torch.equal(e.decode(), y)
    # Levels: at most 2**bits values, and every output is the level of its code.
    levels = e.levels
    assert levels.shape == (e.scale.numel(), 2**n_bits)
    of_each = levels.reshape(*e.scale.shape, 2**n_bits).expand(*x.shape, 2**n_bits)
    assert torch.equal(of_each.gather(-1, e.codes.long().unsqueeze(-1)).squeeze(-1), y)


@given(quantizer_names, bits, samples(), st.integers(0, 5), st.booleans())
def test_monotone(name: str, n_bits: int, x: Tensor, seed: int, is_weight: bool) -> None:
    q = make(name, n_bits, x, is_weight=is_weight)
    if seed:
        learnt(q, seed)
    x = x.reshape(-1).sort().values
    codes = q.encode(x).codes.int()
    steps = codes.diff()
    # A negative learnt step size reverses the codes, never the values.
    assert (steps >= 0).all() or ((steps <= 0).all() and bool((q.encode(x).scale < 0).all()))
    assert (q(x).diff() >= 0).all()


@given(nearest_names, bits, tensors(), st.booleans())
def test_error_bound_at_init(name: str, n_bits: int, x: Tensor, is_weight: bool) -> None:
    q = make(name, n_bits, x, is_weight=is_weight)
    e = q.encode(x)
    ends = torch.stack((e.scale * e.code_min - e.shift, e.scale * (e.code_min + 2**n_bits - 1) - e.shift))
    inside = (x >= ends.amin(0)) & (x <= ends.amax(0))
    ulp = 4e-7 * (x.abs() + e.shift.abs() + 2**n_bits * e.scale.abs())
    assert ((q(x) - x).abs() <= e.scale.abs() / 2 + ulp)[inside].all()


@given(nearest_names, bits, samples(dtype=torch.float32), st.integers(-20, 20), st.booleans())
def test_scale_equivariant_when_fresh(name: str, n_bits: int, x: Tensor, power: int, is_weight: bool) -> None:
    x[0, 0, 0] = -x.abs().max()  # the sign flag has an absolute threshold
    factor = 2.0**power
    small, large = (make(name, n_bits, t, is_weight=is_weight) for t in (x, factor * x))
    assert torch.equal(small.encode(x).codes, large.encode(factor * x).codes)
    assert torch.equal(factor * small(x), large(factor * x))


@given(quantizer_names, bits, samples(), st.integers(0, 1000))
def test_permutation(name: str, n_bits: int, x: Tensor, seed: int) -> None:
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = x.reshape(-1)[order]
    here, there = make(name, n_bits, x), make(name, n_bits, shuffled)
    assume(here.elementwise)
    a, b = here.encode(x).codes.reshape(-1)[order].int(), there.encode(shuffled).codes.int()
    assert (a - b).abs().max() <= 1  # the order of summation may turn a tie
    assert (a != b).double().mean() < 0.05
    torch.testing.assert_close(here.encode(x).scale, there.encode(shuffled).scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("is_weight", [False, True])
@pytest.mark.parametrize("case", COUNTER_CASES)
@pytest.mark.parametrize("n_bits", [2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_counter_cases_are_finite(name: str, n_bits: int, case: str, is_weight: bool) -> None:
    x = COUNTER_CASES[case]()
    q = QUANTIZERS[name](n_bits, is_weight=is_weight).train()
    x.requires_grad_()
    y = q(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for key, p in q.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), key
    x = x.detach()
    if q.ready and x.numel():
        q.eval()
        assert torch.equal(q.encode(x).decode(), q(x))
        peak = x.abs().max()
        slack = 1e-5 * peak
        if name in ("dls", "minmax"):
            assert (q(x) - x).abs().max() <= x.max() - x.min() + peak * is_weight + slack
        assert (q(x) * x >= -slack * peak).all() or n_bits == 2  # no sign is turned
    else:
        assert case in ("empty", "constant 0")
        assert torch.equal(y, x)


@pytest.mark.parametrize("constant", [1.0, -3.0, 1e-8, 1e8])
@pytest.mark.parametrize("name", ["dls", "minmax"])
def test_constants_are_exact(name: str, constant: float) -> None:
    x = torch.full((4, 9), constant)
    assert torch.equal(make(name, 2, x)(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_data_are_quantized_like_others(name: str) -> None:
    x = torch.randn(500)
    rough = (make(name, 4, x)(x) - x).norm() / x.norm()
    tiny = 1e-8 * x
    fine = (make(name, 4, tiny, is_weight=True)(tiny) - tiny).norm() / tiny.norm()
    assert fine < 0.5
    assert rough < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 50).to(dtype).requires_grad_()
    q = QUANTIZERS[name](4).train()
    y = q(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in q.parameters())
    e, wide = q.encode(x.detach()), q.encode(x.detach().float())
    assert e.dtype == e.decode().dtype == dtype
    assert torch.equal(e.codes, wide.codes)
    assert torch.equal(e.scale, wide.scale)
    assert torch.equal(y.detach(), wide.decode().to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_computed_in_float64(name: str) -> None:
    x = torch.randn(4, 50, dtype=torch.float64)
    q = make(name, 8, x.float())
    assert q.encode(x).scale.dtype == torch.float64
    assert q(x).dtype == torch.float64
    assert (q(x).sub(q(x.float()).double()).abs() < 1e-5 + q.encode(x).scale).all()
    assert not torch.equal(q(x), q(x).float().double())


@pytest.mark.parametrize("name", NAMES)
def test_layout_does_not_matter(name: str) -> None:
    x = torch.randn(6, 8)
    q = make(name, 4, x)
    wanted = q(x)
    torch.testing.assert_close(q(x.t().contiguous().t()), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q(torch.stack((x, x), 2)[..., 0]), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_never_swallowed(name: str) -> None:
    x = torch.randn(50)
    q = make(name, 4, x)
    x[3] = torch.nan
    y = q(x)
    assert y[3].isnan()
    if not q.dynamic:
        assert not y[4:].isnan().any()
    with pytest.raises(InputError, match="NaN"):
        q.encode(x)
    assert int(q.encode(x, check=False).codes[3]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_inf_saturates_or_is_nan(name: str) -> None:
    x = torch.randn(50)
    q = make(name, 4, x)
    top = q.encode(x).levels.max()
    x[3] = torch.inf
    if q.dynamic:  # its range would be infinite: unknown, and said so
        assert q(x).isnan().all()
        with pytest.raises(InputError, match="inf"):
            q.encode(x)
    else:
        assert q(x)[3] == top


@pytest.mark.parametrize("name", [n for n in NAMES if not QUANTIZERS[n].dynamic])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_groups_are_independent(name: str, axis: int) -> None:
    x = torch.randn(3, 5, 7) * torch.logspace(-2, 2, 105).reshape(3, 5, 7)
    groups = x.shape[axis]
    q = make(name, 4, x, axis=axis, num_groups=groups, is_weight=True)
    e = q.encode(x)
    assert e.scale.numel() == groups
    assert e.levels.shape == (groups, 16)
    for g in range(groups):
        part = x.select(axis, g)
        alone = make(name, 4, part, is_weight=True)
        torch.testing.assert_close(q(x).select(axis, g), alone(part))
    with pytest.raises(InputError, match="num_groups"):
        q(torch.randn(4, 6, 8))
    with pytest.raises(InputError, match=r"axis|num_groups"):
        q(torch.tensor(1.0))


@pytest.mark.parametrize("is_weight", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if not QUANTIZERS[n].dynamic])
def test_group_gradients_are_those_of_each_group(name: str, is_weight: bool) -> None:
    x = torch.randn(3, 40).requires_grad_()
    q = make(name, 3, x.detach(), axis=0, num_groups=3, is_weight=is_weight).train()
    upstream = torch.randn(3, 40)
    (q(x) * upstream).sum().backward()
    assert x.grad is not None
    for g in range(3):
        row = x[g].detach().requires_grad_()
        alone = make(name, 3, row.detach(), is_weight=is_weight).train()
        (alone(row) * upstream[g]).sum().backward()
        assert row.grad is not None
        torch.testing.assert_close(x.grad[g], row.grad)
        for key, p in alone.named_parameters():
            whole, part = q.get_parameter(key).grad, p.grad
            assert whole is not None
            assert part is not None
            if whole.shape == (3,):  # the others are shared by all groups
                torch.testing.assert_close(whole[g], part[0])
