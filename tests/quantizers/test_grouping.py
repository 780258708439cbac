"""Scales by output channel of a stack, shifts that follow from the step, one value a state, starts as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmquant.errors import ConfigError, InputError
from ssmquant.modules import PackedTensor
from ssmquant.quantizers import LSQ, QUANTIZERS, RFA, get_quantizer
from ssmquant.quantizers.bank import quantize_weights
from ssmquant.quantizers.shared import Ladder, Shared
from tests.strategies import BITS, sqnr

STEPPED: list[type[LSQ] | type[RFA]] = [LSQ, RFA]


@pytest.mark.parametrize("name", ["lsq", "rfa", "minmax", "rlq", "dorefa", "n2uq"])
def test_every_row_of_a_stack_is_a_group(name: str) -> None:
    w = torch.randn(3, 5, 40) * torch.logspace(-2, 2, 15).reshape(3, 5, 1)
    stack = QUANTIZERS[name](4, axis=0, num_groups=15, is_weight=True)
    stack.leading = 2
    rows = QUANTIZERS[name](4, axis=0, num_groups=15, is_weight=True)
    stack.fit([w])
    rows.fit([w.reshape(15, 40)])
    torch.testing.assert_close(stack(w), rows(w.reshape(15, 40)).reshape(w.shape), rtol=0, atol=0)
    encoded = stack.encode(w)
    assert encoded.codes.shape == w.shape
    assert encoded.scale.shape == (3, 5, 1)
    assert torch.equal(encoded.decode(), stack(w))
    packed = PackedTensor.from_qtensor(encoded)
    assert torch.equal(packed(), stack(w))
    with pytest.raises(InputError, match=r"num_groups|axes"):
        stack(torch.randn(7))


@pytest.mark.parametrize("cls", STEPPED)
def test_gradients_and_banks_of_a_stack(cls: type[Any]) -> None:
    w = torch.randn(3, 5, 40, requires_grad=True)
    stack, rows = (cls(3, axis=0, num_groups=15, is_weight=True, shift="half") for _ in range(2))
    stack.leading = 2
    stack.fit([w])
    rows.fit([w.reshape(15, 40)])
    upstream = torch.randn(3, 5, 40)
    (stack(w) * upstream).sum().backward()
    own, w.grad = w.grad, None
    (rows(w.reshape(15, 40)) * upstream.reshape(15, 40)).sum().backward()
    torch.testing.assert_close(own, w.grad)
    torch.testing.assert_close(stack.alpha.grad, rows.alpha.grad)
    banked = quantize_weights([stack, rows], [w, w.reshape(15, 40)])
    for value in banked:
        torch.testing.assert_close(value.reshape(w.shape), stack(w), rtol=0, atol=0)
    stack.alpha.grad = rows.alpha.grad = None
    (banked[0] * upstream).sum().backward()
    (stack(w) * upstream).sum().backward()
    assert stack.alpha.grad is not None


@pytest.mark.parametrize("cls", STEPPED)
@given(st.sampled_from(BITS), st.integers(0, 1000))
def test_half_a_step_is_symmetric(cls: type[Any], bits: int, seed: int) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    q = cls(bits, is_weight=True, shift="half").eval()
    q.fit([x])
    assert [n for n, _ in q.named_parameters() if n != "grid"] == ["alpha"]
    levels = q.encode(x).levels[0]
    torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=1e-6 * float(levels.max()))
    start = cls(bits, is_weight=True, shift="half").eval()
    start.initialize(x)
    assert sqnr(x, q(x)) >= sqnr(x, start(x)) - 1e-6


def test_no_shift_keeps_zero() -> None:
    x = torch.cat((torch.randn(100) + 1, torch.zeros(10)))
    q = LSQ(3, shift="none").train()
    q(x).square().sum().backward()
    assert [n for n, _ in q.named_parameters()] == ["alpha"]
    assert not q(x)[-10:].any()
    with pytest.raises(ConfigError, match="shift must be"):
        LSQ(3, shift="free")  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", ["half", "none"])
def test_a_shift_that_follows_is_not_stored(shift: Any) -> None:
    w = torch.randn(6, 30)
    q = LSQ(2, axis=0, num_groups=6, is_weight=True, shift=shift)
    q.fit([w])
    packed = PackedTensor.from_qtensor(q.encode(w), shift)
    assert packed.shift is None
    assert torch.equal(packed(), q(w))
    assert set(packed.state_dict()) == {"codes", "scale"}


@pytest.mark.parametrize("cls", STEPPED)
def test_a_start_as_published(cls: type[Any]) -> None:
    x = torch.randn(1000)
    searched, published, first = cls(2), cls(2), cls(2)
    searched.fit([x])
    published.fit([x[:500], x[500:]], search=False)
    first.initialize(x)
    torch.testing.assert_close(published.alpha, first.alpha)
    assert not published.beta.any()
    assert sqnr(x, searched(x)) > sqnr(x, published(x)) + 1


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 100))
def test_one_value_a_state(channels: int, states: int, seed: int) -> None:
    a = -torch.rand(channels, states, generator=torch.Generator().manual_seed(seed)) - 0.1
    a.requires_grad_()
    q = Shared(2)
    y = q(a)
    assert y.shape == a.shape
    assert (y < 0).all()
    torch.testing.assert_close(y, a.mean(0, keepdim=True).expand_as(a))
    encoded = q.eval().encode(a.detach())
    assert torch.equal(encoded.decode(), y.detach())
    assert torch.equal(PackedTensor.from_qtensor(encoded)(), y.detach())
    upstream = torch.randn(channels, states)
    (y * upstream).sum().backward()
    torch.testing.assert_close(a.grad, upstream.mean(0, keepdim=True).expand_as(a))


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 100))
def test_a_ladder_of_values(channels: int, states: int, seed: int) -> None:
    a = -(torch.rand(channels, states, generator=torch.Generator().manual_seed(seed)) + 0.1).double()
    a.requires_grad_()
    q = Ladder(2)
    y = q(a)
    assert (y < 0).all()
    assert (y == y[:1]).all()
    encoded = q.eval().encode(a.detach())
    assert torch.equal(encoded.decode(), y.detach())
    mean, values = a.detach().mean(0), y.detach()[0]
    if states < 3:
        torch.testing.assert_close(values, mean)
        return
    x = torch.stack((torch.ones(states), torch.arange(states)), 1).double()
    torch.testing.assert_close(values.diff(), values.diff().mean().expand(states - 1))
    line = (x @ torch.linalg.lstsq(x, mean[:, None]).solution)[:, 0]
    assert values.max() <= max(line.max(), mean.max() / 2) + 1e-9
    if line.max() < mean.max() / 2:
        torch.testing.assert_close(values, line)
        upstream = torch.randn(channels, states, dtype=torch.float64)
        (y * upstream).sum().backward()
        through = x @ torch.linalg.pinv(x) @ upstream.sum(0) / channels
        torch.testing.assert_close(a.grad, through.expand_as(a))
        again = q(values.expand_as(a))  # it keeps what is one
        torch.testing.assert_close(again[0], values)


@pytest.mark.parametrize("name", ["shared", "ladder"])
def test_shared_wants_states(name: str) -> None:
    assert issubclass(get_quantizer(name), Shared)
    q = get_quantizer(name)(4)
    assert q.ready
    with pytest.raises(InputError, match="channels, states"):
        q(torch.randn(5))
    a = torch.tensor([[-1.0, float("nan")], [-2.0, -3.0]])
    assert q(a)[:, 1].isnan().all()
    with pytest.raises(InputError, match="NaN"):
        q.encode(a)


@pytest.mark.parametrize("cls", STEPPED)
@pytest.mark.parametrize("search", [False, True])
def test_pruned_channels_stay_small_where_no_level_is_zero(cls: type[Any], search: bool) -> None:
    w = torch.randn(5, 60)
    w[1:3] = 0
    q = cls(2, axis=0, num_groups=5, is_weight=True, shift="half").eval()
    q.fit([w], search=search)
    assert 0 < q(w)[1:3].abs().max() < 1e-3 * q(w)[[0, 3, 4]].abs().mean()
    for shift in ("learned", "none"):  # which have one
        q = cls(2, axis=0, num_groups=5, is_weight=True, shift=shift).eval()
        q.fit([w], search=search)
        assert not q(w)[1:3].any()
        torch.testing.assert_close(q.alpha[1] > 0.1 * q.alpha[0], torch.tensor(True))


@pytest.mark.parametrize("cls", STEPPED)
@pytest.mark.parametrize("alpha", [0.0, 1e-14, -1e-14, -1e-12])
@pytest.mark.parametrize("groups", [1, 6])
def test_half_a_step_of_a_step_at_its_floor(cls: type[Any], alpha: float, groups: int) -> None:
    w = torch.randn(6, 30)
    q = cls(2, axis=0, num_groups=groups, is_weight=True, shift="half")
    q.fit([w])
    with torch.no_grad():
        q.alpha[groups // 2 :] = alpha
    y = q.eval()(w)
    assert torch.equal(PackedTensor.from_qtensor(q.encode(w), "half")(), y)
    assert torch.equal(q.encode(w).decode(), y)
    for value in quantize_weights([q, q], [w, w]):
        assert torch.equal(value, y)


@pytest.mark.parametrize("official", [False, True])
def test_clamped_levels_of_a_stack(official: bool) -> None:
    w = torch.randn(4, 6, 16) * torch.logspace(-2, 2, 24).reshape(4, 6, 1)
    stack = QUANTIZERS["dls"](2, axis=0, num_groups=24, is_weight=True, official=official).eval()
    stack.leading = 2
    stack.initialize(w)
    encoded = stack.encode(w)
    assert encoded.lo is not None
    assert encoded.lo.shape == encoded.scale.shape == (() if official else (4, 6, 1))
    assert torch.equal(encoded.decode(), stack(w))
    assert torch.equal(PackedTensor.from_qtensor(encoded)(), stack(w))


@pytest.mark.parametrize("name", ["shared", "ladder"])
def test_values_of_states_are_stored_without_codes(name: str) -> None:
    a = -torch.rand(12, 5) - 0.1
    encoded = get_quantizer(name)(2).encode(a)
    assert encoded.codes.shape == a.shape
    packed = PackedTensor.from_qtensor(encoded)
    assert (packed.shape, packed.codes.numel()) == ((12, 5), 1)
    assert packed.qtensor().codes.shape == a.shape
    assert torch.equal(packed(), get_quantizer(name)(2)(a))
