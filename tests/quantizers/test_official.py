"""``official=True`` against the equations of notes/quantizers.md 2, written in plain autograd with detach."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssmquant.quantizers import DLS, LSQ, RFA, Quantizer
from tests.strategies import BITS

SIGNS = pytest.mark.parametrize("signed", [False, True])
ALL_BITS = pytest.mark.parametrize("n_bits", BITS)


def scaled(value: Tensor, g: float) -> Tensor:
    """``value``, gradient times g."""
    return value.detach() + g * (value - value.detach())


def straight(exact: Tensor, surrogate: Tensor) -> Tensor:
    """``exact`` with the gradient of ``surrogate``."""
    return exact.detach() + (surrogate - surrogate.detach())


def code_range(n_bits: int, signed: bool) -> tuple[int, int]:
    half = 2 ** (n_bits - 1)
    return (-half, half - 1) if signed else (0, 2 * half - 1)


def lsq(x: Tensor, alpha: Tensor, beta: Tensor, n_bits: int, signed: bool) -> Tensor:
    qn, qp = code_range(n_bits, signed)
    a = scaled(alpha, 1 / math.sqrt(x.numel() * qp))
    u = torch.clamp((x + beta) / a, qn, qp)
    return a * straight(u.round(), u) - beta


def rfa(w: Tensor, alpha: Tensor, beta: Tensor, grid: Tensor, n_bits: int, signed: bool) -> Tensor:
    qn, qp = code_range(n_bits, signed)
    a = scaled(alpha, 1 / math.sqrt(w.numel() * qp))
    u = torch.clamp((w + beta) / a, qn, qp)
    n = 2**n_bits
    p = [-(n // 2) + i for i in range(n)]
    code = torch.full_like(u, p[0])
    surrogate = p[0] + 0.1 * (u - grid[0])
    for i in range(n):
        if i:
            code = torch.where(u > (grid[i - 1] + grid[i]) / 2, float(p[i]), code)
        if i < n - 1:
            piece = p[i] + (u - grid[i]) / (grid[i + 1] - grid[i])
        else:
            piece = p[i] + 0.1 * (u - grid[i])
        surrogate = torch.where(u > grid[i], piece, surrogate)
    return a * straight(code, surrogate) - beta


def dls_alpha(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    beta = v[0] * x.mean() + v[1] * x.std() + v[2] * x.min() + v[3] * x.max()
    t = x + beta
    return (w[0] * t.mean().abs() + w[1] * t.std() + w[2] * t.min() + w[3] * t.max()).abs(), beta


def dls(x: Tensor, w: Tensor, v: Tensor, n_bits: int, signed: bool) -> Tensor:
    qn, qp = code_range(n_bits, signed)
    ceiling = ((x.max() - x.min()) / 2**n_bits).detach()
    alpha, beta = dls_alpha(x, w, v)
    t = x + beta
    alpha = scaled(alpha, 1 / math.sqrt(x.numel() * qp))
    alpha = torch.minimum(torch.maximum(alpha, torch.full_like(alpha, 1e-6)), ceiling)
    u = torch.clamp(t / alpha, qn, qp)
    return torch.clamp(alpha * straight(u.round(), u) - beta, x.min(), x.max())


def compare(
    q: Quantizer, x: Tensor, expected: Tensor, reference_inputs: list[Tensor], mine: list[Tensor]
) -> None:
    upstream = torch.randn(x.shape, dtype=x.dtype)
    y = q(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * upstream).sum(), reference_inputs)
    got = torch.autograd.grad((y * upstream).sum(), mine)
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert w.abs().max() > 0, f"gradient {i} says nothing"
        torch.testing.assert_close(g.reshape(w.shape), w, rtol=1e-9, atol=1e-9)


def draw(signed: bool, shape: tuple[int, ...] = (7, 61)) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return x if signed else x.abs() + 0.01


def leaf(t: Tensor) -> Tensor:
    return (
        t.detach().clone().reshape(()).requires_grad_()
        if t.numel() == 1
        else t.detach().clone().requires_grad_()
    )


@SIGNS
@ALL_BITS
def test_lsq(n_bits: int, signed: bool) -> None:
    x = draw(signed).requires_grad_()
    q = LSQ(n_bits, official=True).double().train()
    q(x)
    qn, qp = code_range(n_bits, signed)
    assert (q.qmin, q.qmax) == (qn, qp)
    assert q.alpha.item() == pytest.approx(float(2 * x.detach().abs().mean() / math.sqrt(qp)), rel=1e-12)
    with torch.no_grad():
        q.alpha.fill_(0.8 * float(x.detach().max()) / qp)  # some elements are clipped
        q.beta.add_(0.13)
    alpha, beta = leaf(q.alpha), leaf(q.beta)
    expected = lsq(x, alpha, beta, n_bits, signed)
    compare(q, x, expected, [x, alpha, beta], [x, q.alpha, q.beta])


@pytest.mark.parametrize("disturb", [0.0, 0.2, 1.5])
@SIGNS
@pytest.mark.parametrize("n_bits", [2, 3, 4, 6])
def test_rfa(n_bits: int, signed: bool, disturb: float) -> None:
    w = draw(signed).requires_grad_()
    q = RFA(n_bits, official=True, is_weight=True).double().train()
    q(w)
    qn, qp = code_range(n_bits, signed)
    assert q.grid.tolist() == list(range(qn, qp + 1))
    assert q.alpha.item() == pytest.approx(float(2 * w.detach().abs().mean() / math.sqrt(qp)), rel=1e-12)
    with torch.no_grad():
        q.alpha.fill_(0.8 * float(w.detach().max()) / qp)
        q.beta.add_(0.05)
        q.grid.add_(disturb * torch.randn_like(q.grid))
    if disturb > 1:
        assert (q.grid.diff() < 0).any()
    alpha, beta, grid = leaf(q.alpha), leaf(q.beta), leaf(q.grid)
    expected = rfa(w, alpha, beta, grid, n_bits, signed)
    compare(q, w, expected, [w, alpha, beta, grid], [w, q.alpha, q.beta, q.grid])


def test_rfa_equal_neighbours_give_nan_gradients() -> None:
    w = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).requires_grad_()
    q = RFA(2, official=True).double().train()
    q(w)
    with torch.no_grad():
        q.alpha.fill_(1.0)
        q.grid.copy_(torch.tensor([-2.0, -1.0, -1.0, 1.0]))
    alpha, beta, grid = leaf(q.alpha), leaf(q.beta), leaf(q.grid)
    expected = rfa(w, alpha, beta, grid, 2, True)
    torch.testing.assert_close(q(w), expected)
    wanted = torch.autograd.grad(expected.sum(), [w, alpha, grid])
    got = torch.autograd.grad(q(w).sum(), [w, q.alpha, q.grid])
    for g, e in zip(got, wanted, strict=True):
        assert e.isnan().any()
        torch.testing.assert_close(g.reshape(e.shape), e, equal_nan=True)


@pytest.mark.parametrize(("spread", "sign"), [(0.0, 1), (0.2, 1), (0.2, -1)])
@SIGNS
@ALL_BITS
def test_dls(n_bits: int, signed: bool, spread: float, sign: int) -> None:
    x = draw(signed)
    x = (x**3 if n_bits < 4 else x).requires_grad_()  # heavy tails keep the ceiling away at few bits
    q = DLS(n_bits, official=True, axis=0).double().train()
    q(x)
    assert q.is_signed == signed
    with torch.no_grad():
        q.w.add_(spread * torch.rand(4) * q.w[1])
        # Off v1 = -1, where the published |mean(x + beta)| has the gradient of rounding noise.
        q.v.add_(spread * torch.randn(4))[0] += 0.01
        ceiling = (x.max() - x.min()) / 2**n_bits
        q.w.mul_(sign * 0.6 * ceiling / dls_alpha(x, q.w, q.v)[0])
    w, v = leaf(q.w), leaf(q.v)
    expected = dls(x, w, v, n_bits, signed)
    compare(q, x, expected, [x, w, v], [x, q.w, q.v])


def test_dls_at_the_ceiling() -> None:
    x = torch.rand(50, dtype=torch.float64).sub(0.5).requires_grad_()
    q = DLS(2, official=True).double().train()
    q(x)
    w, v = leaf(q.w), leaf(q.v)
    upstream = torch.randn(50, dtype=torch.float64)
    wanted = torch.autograd.grad((dls(x, w, v, 2, True) * upstream).sum(), [x, w, v])
    got = torch.autograd.grad((q(x) * upstream).sum(), [x, q.w, q.v])
    assert wanted[1].eq(0).all()
    for g, e in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constant", [1.0, -3.0])
def test_dls_is_nan_on_constants(constant: float) -> None:
    x = torch.full((5,), constant)
    q = DLS(4, official=True).train()
    assert q(x).isnan().all()
    assert DLS(4, official=True).train()(torch.tensor([0.5])).isnan().all()


def test_sign_flags_are_decided_for_ever() -> None:
    for cls in (LSQ, RFA, DLS):
        q = cls(4, official=True).train()
        q(torch.rand(20))
        assert not q.is_signed
        q(-torch.rand(20))
        assert not q.is_signed
    assert DLS(4).train().is_signed
    rfa_default = RFA(4).train()
    rfa_default(torch.rand(20))
    assert rfa_default.is_signed


def test_first_batch_without_sign_breaks_rfa_as_published() -> None:
    w = torch.rand(500)
    official, default = RFA(4, official=True).train(), RFA(4).train()
    assert (official(w) - w).norm() / w.norm() > 1  # shifted by 8 steps
    assert (default(w) - w).norm() / w.norm() < 0.3


def test_dls_official_ignores_the_sample_axis() -> None:
    x = torch.randn(3, 40)
    official, default = DLS(4, official=True, axis=0).train(), DLS(4)
    torch.testing.assert_close(official(x), default(x))
