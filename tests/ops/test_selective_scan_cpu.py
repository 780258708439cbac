"""The CPU back end of the float selective scan against its definition, by every instruction set of this machine."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops.selective_scan import cpu, selective_scan_reference

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels should have written to and have not shows as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def paths() -> range:
    """By index, the instruction sets of this machine."""
    assert cpu.unavailable(torch.device("cpu"), torch.float32, 16) is None
    return range(len(cpu.paths()))


def operands(
    batch: int,
    channels: int,
    states: int,
    length: int,
    groups: int | None = 1,
    *,
    constant: str = "",
    without: str = "",
    softplus: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """u, delta, A, B, C, D, bias; ``constant`` names the constant ones of B and C, ``without`` the absent ones."""

    def matrix(name: str) -> Tensor:
        if name in constant:
            return torch.randn(channels, states)
        return torch.randn((batch, states, length) if groups is None else (batch, groups, states, length))

    delta = torch.randn(batch, channels, length)
    args: list[Tensor | None] = [
        torch.randn(batch, channels, length),
        delta if softplus else delta.abs(),
        -3 * torch.rand(channels, states) - 0.05,
        matrix("B"),
        matrix("C"),
        None if "D" in without.split() else torch.randn(channels),
        None if "bias" in without.split() else torch.rand(channels),
    ]
    return [None if t is None else t.to(dtype) for t in args]


def state_dtype(args: list[Tensor | None]) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in args)
    return torch.float64 if double else torch.float32


def weights(args: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Gradients of the two results."""
    u, a = args[0], args[2]
    assert u is not None
    assert a is not None
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u.dtype)
    g_last = torch.randn(u.shape[0], *a.shape, generator=generator, dtype=torch.float64)
    return g, g_last.to(state_dtype(args))


def run(args: list[Tensor | None], softplus: bool = True, path: int = 0) -> list[Tensor]:
    """Output, last state, and the gradients of all operands that there are."""
    used: list[Any] = args
    dtype = state_dtype(args)
    g, g_last = weights(args)
    y, last, saved = cpu.forward(*used, softplus, dtype, True, path)
    grads = cpu.backward(g, g_last, saved, *used, softplus, dtype, path)
    for grad, like in zip(grads, args, strict=True):
        assert grad.is_contiguous()
        if like is not None:
            assert (grad.shape, grad.dtype) == (like.shape, like.dtype)
    return [y, last, *(grad for grad, like in zip(grads, args, strict=True) if like is not None)]


def definition(args: list[Tensor | None], softplus: bool = True) -> list[Tensor]:
    exact: list[Any] = [None if t is None else t.detach().double().requires_grad_() for t in args]
    out, last = selective_scan_reference(*exact[:6], None, exact[6], softplus, True)
    g, g_last = weights(args)
    loss = (out * g).sum() + (last * g_last).sum()
    return [out.detach(), last.detach(), *torch.autograd.grad(loss, [t for t in exact if t is not None])]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        error = (g.double() - w).norm() / w.norm().clamp(min=1e-9)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 200),
    st.sampled_from(["", "B", "C", "B C"]),
    st.sampled_from(["", "D", "bias", "D bias"]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 2),
)
def test_agrees_with_the_definition_in_every_form(
    batch: int,
    groups: int,
    inner: int,
    states: int,
    length: int,
    constant: str,
    without: str,
    softplus: bool,
    dtype: torch.dtype,
    path: int,
) -> None:
    args = operands(
        *(batch, groups * inner, states, length, groups),
        constant=constant,
        without=without,
        softplus=softplus,
        dtype=dtype,
    )
    got = run(args, softplus, path % len(paths()))
    assert_close(got, definition(args, softplus), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "channels", "states", "length", "groups"),
    [(2, 72, 10, 49, 4), (1, 33, 256, 40, 1), (3, 24, 1, 197, 2), (1, 5, 3, 1, None), (70, 8, 4, 6, 1)],
)
def test_agrees_with_the_definition(
    batch: int, channels: int, states: int, length: int, groups: int | None, dtype: torch.dtype
) -> None:
    args = operands(batch, channels, states, length, groups, dtype=dtype)
    want = definition(args)
    for path in paths():
        assert_close(run(args, True, path), want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("constant", ["", "B C"])
@pytest.mark.parametrize(("channels", "length"), [(3, 1100), (13, 2049)])
def test_few_channels_are_cut_in_time(channels: int, length: int, constant: str, dtype: torch.dtype) -> None:
    args = operands(1, channels, 3, length, constant=constant, dtype=dtype)
    want = definition(args)
    for path in paths():
        assert_close(run(args, True, path), want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF)
def test_converts_as_torch_does(dtype: torch.dtype) -> None:
    # y = D * u for every number u of the dtype
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    u = bits.view(dtype).reshape(1, 16, -1).contiguous()
    zeros = torch.zeros(16, 1)
    for scale in (torch.ones(16), torch.rand(16) + 0.5):
        wanted = (u.float() * scale[:, None]).to(dtype)
        # Denormal numbers of float32, which those of bfloat16 are, count as zero; and 0 * inf is NaN.
        ordinary = (u.float().abs() >= 2.0**-125) & u.isfinite()
        for path in paths():
            y, _, _ = cpu.forward(
                *(u, torch.zeros(u.shape), zeros, zeros, zeros, scale, None),
                *(False, torch.float32, False, path),
            )
            assert torch.equal(y[ordinary], wanted[ordinary])
            assert y[~u.isfinite()].isnan().all()


def test_operands_of_different_dtypes() -> None:
    args: list[Any] = operands(2, 12, 5, 70, 3, dtype=torch.float32)
    for double in (False, True):
        args[0], args[3], args[4] = args[0].half(), args[3].bfloat16(), args[4].half()
        args[5] = args[5].bfloat16()
        if double:
            args[2] = args[2].double()
        assert_close(run(args), definition(args), 1e-2)
    assert run(args)[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_in_any_memory_layout(dtype: torch.dtype) -> None:
    args: list[Any] = operands(2, 12, 5, 70, 3, dtype=dtype)
    args[3] = args[3][:1].expand(2, -1, -1, -1)
    want = run(args)

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def last_first(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    for layout in (strided, last_first, channels_last):
        moved = [layout(t) if t.dim() > 1 else strided(t) for t in args]
        assert not moved[0].is_contiguous()
        for got, like in zip(run(moved), want, strict=True):
            assert torch.equal(got, like)


@pytest.mark.parametrize(
    ("batch", "channels", "states", "length", "groups"), [(2, 40, 8, 1500, 2), (1, 8, 16, 16000, 1)]
)
def test_results_do_not_depend_on_threads(
    batch: int, channels: int, states: int, length: int, groups: int
) -> None:
    args = operands(batch, channels, states, length, groups, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(args)
        for threads in (2, 3, 7, 7, 1000):
            torch.set_num_threads(threads)
            for got, like in zip(run(args), want, strict=True):
                assert torch.equal(got, like)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accuracy_of_decays_and_step_sizes(dtype: torch.dtype) -> None:
    x = torch.linspace(0, 87, 4001, dtype=dtype)
    delta = torch.stack([torch.ones_like(x), x], dim=-1)[None]  # (1, D, 2)
    u = torch.tensor([1.0, 0.0], dtype=dtype).expand_as(delta)
    one = torch.ones(len(x), 1, dtype=dtype)
    exact = (-x.double()).exp()
    ulp = torch.finfo(dtype).eps
    for path in paths():
        y, _, _ = cpu.forward(u, delta, -one, one, one, None, None, False, dtype, False, path)
        error = (y[0, :, 1].double() / exact - 1).abs()
        assert (error <= 2 * ulp + x.double() * ulp).all()

    x = torch.linspace(-80, 60, 4001, dtype=dtype)
    for path in paths():
        y, _, _ = cpu.forward(
            torch.ones_like(x)[None, :, None],
            *(x[None, :, None], -one, one, one, None, None, True, dtype, False, path),
        )
        dt = torch.nn.functional.softplus(x.double())
        assert ((y[0, :, 0].double() / dt - 1).abs() <= 4 * ulp).all()


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decays_that_underflow_are_harmless(softplus: bool, dtype: torch.dtype) -> None:
    args: list[Any] = operands(2, 12, 4, 300, 2, softplus=softplus, dtype=dtype)
    for factor in (1e4, 1e30):
        args[2] = args[2] * factor
        want = definition(args, softplus)
        for path in paths():
            got = run(args, softplus, path)
            assert all(t.isfinite().all() for t in got)
            assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "bias"])
def test_what_is_not_finite_shows_where_it_should(name: str, value: float) -> None:
    args: list[Any] = operands(2, 10, 5, 70, 2, dtype=torch.float32)
    index = ["u", "delta", "A", "B", "C", "D", "bias"].index(name)
    args[index].view(-1)[args[index].numel() // 2] = value
    want = definition(args)
    for path in paths():
        got = run(args, True, path)
        for have, must in zip(got[:2], want[:2], strict=True):
            assert torch.equal(have.isnan(), must.isnan())
            assert torch.equal(have.isinf(), must.isinf())
            assert_close([have.nan_to_num(0, 0, 0)], [must.nan_to_num(0, 0, 0)], 1e-5)
        for have, must in zip(got[2:], want[2:], strict=True):
            assert torch.equal(have.isfinite(), must.isfinite())


def test_states_that_grow_overflow_to_infinity() -> None:
    args: list[Any] = operands(1, 3, 2, 200, without="D bias", dtype=torch.float32)
    args[2] = -args[2]
    wanted, _ = selective_scan_reference(*args[:5], delta_softplus=True, return_last_state=True)
    assert not wanted.isfinite().all()
    for path in paths():
        y, _, _ = cpu.forward(*args, True, torch.float32, False, path)
        assert torch.equal(y.isfinite(), wanted.isfinite())


def test_interface() -> None:
    here = torch.device("cpu")
    assert cpu.NAME == "cpu"
    assert cpu.unavailable(here, torch.float32, 16) is None
    assert cpu.unavailable(here, torch.float64, 10_000) is None
    assert "cuda" in str(cpu.unavailable(torch.device("cuda"), torch.float32, 16))
    assert "float16" in str(cpu.unavailable(here, torch.float16, 16))
    assert cpu.paths()[-1] == "portable"
    args: list[Any] = operands(2, 6, 3, 65, dtype=torch.float32)
    _, last, saved = cpu.forward(*args, True, torch.float32, True)
    assert saved.shape == cpu.saved_shape(2, 6, 3, 65)
    _, again, nothing = cpu.forward(*args, True, torch.float32, False)
    assert nothing.shape == (0, *saved.shape[1:])
    assert torch.equal(last, again)
    g = torch.ones(2, 6, 65)
    with_zeros = cpu.backward(g, torch.zeros_like(last), saved, *args, True, torch.float32)
    for got, want in zip(cpu.backward(g, None, saved, *args, True, torch.float32), with_zeros, strict=True):
        assert torch.equal(got, want)
