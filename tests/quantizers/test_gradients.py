"""Identities that hold for any upstream gradient, in float64 with LSQ's gradient scale off (notes 7.16 to 7.19)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.quantizers import DLS, LSQ, RFA, MinMax, Quantizer
from ssmquant.quantizers.rfa import ordered_grid
from tests.strategies import bits, learnt, make, samples


def pull(q: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Output, upstream gradient, dx and the parameters' gradients."""
    q.scale_gradient = False
    q.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = q(x)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    (y * upstream).sum().backward()
    assert x.grad is not None
    grads = {k: p.grad for k, p in q.named_parameters() if p.grad is not None}
    return y.detach(), upstream, x.grad, grads


@given(st.sampled_from(["lsq", "rfa"]), bits, samples(), st.integers(0, 9))
def test_euler_and_beta(name: str, n_bits: int, x: Tensor, seed: int) -> None:
    q = learnt(make(name, n_bits, x), seed, 0.2)
    y, upstream, dx, grads = pull(q, x)
    alpha, beta = q.get_parameter("alpha").detach(), q.get_parameter("beta").detach()
    left = ((x + beta) * dx).sum() + alpha * grads["alpha"]
    torch.testing.assert_close(left[0], (upstream * (y + beta)).sum(), rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(grads["beta"][0], (dx - upstream).sum(), rtol=1e-9, atol=1e-8)


@given(bits, samples(), st.integers(0, 9))
def test_grid_translation(n_bits: int, x: Tensor, seed: int) -> None:
    q = learnt(make("rfa", n_bits, x), seed, 0.1)
    assert isinstance(q, RFA)
    alpha, beta = q.alpha.detach(), q.beta.detach()
    u = ((x + beta) / alpha).reshape(-1)
    u = u[(u > q.qmin) & (u < q.qmax)]  # a clipped element moves the grid's ends but not w
    assume(u.numel() > 0)
    _, _, dx, grads = pull(q, (u * alpha) - beta)
    torch.testing.assert_close(grads["grid"].sum(), -alpha[0] * dx.sum(), rtol=1e-9, atol=1e-8)


@given(bits, samples(), st.integers(0, 9))
def test_euler_dls(n_bits: int, x: Tensor, seed: int) -> None:
    """Scaling x scales all statistics, so x . dx = G . y, with every statistic's gradient in dx."""
    q = learnt(make("dls", n_bits, x, axis=0), seed, 0.2)
    assert isinstance(q, DLS)
    with torch.no_grad():
        q.w.mul_(0.3)
    ceiling = (x.amax((1, 2)) - x.amin((1, 2))) / 2**n_bits
    alpha = q.affine(x)[0].reshape(-1)
    assume(bool(((alpha < ceiling) & (alpha > q.eps)).all()))
    y, upstream, dx, _ = pull(q, x)
    torch.testing.assert_close((x * dx).sum((1, 2)), (upstream * y).sum((1, 2)), rtol=1e-8, atol=1e-8)


@given(bits, samples())
def test_values_of_dx(n_bits: int, x: Tensor) -> None:
    for name in ("lsq", "minmax"):
        _, upstream, dx, _ = pull(make(name, n_bits, x), x)
        assert ((dx == 0) | (dx == upstream)).all()
    q = learnt(make("rfa", n_bits, x), 3, 0.1)
    assert isinstance(q, RFA)
    _, upstream, dx, _ = pull(q, x)
    allowed = torch.cat(
        (torch.tensor([0.0, 0.1], dtype=torch.float64), 1 / ordered_grid(q.grid.detach()).diff())
    )
    assert ((dx / upstream).reshape(-1, 1) - allowed).abs().amin(1).max() < 1e-9 * allowed.max()


def test_rfa_gradient_is_that_of_the_surrogate() -> None:
    """Finite differences of S, away from its kinks."""
    q = make("rfa", 3, torch.randn(200, dtype=torch.float64))
    assert isinstance(q, RFA)
    learnt(q, 1, 0.05)
    grid = q.grid.detach()
    alpha, beta = float(q.alpha.detach()), float(q.beta.detach())

    def surrogate(w: Tensor, a: Tensor, scale: float) -> Tensor:
        u = ((w + beta) / scale).clamp(-4, 3)
        k = torch.bucketize(u, a) - 1
        inner = k.clamp(0, 6)
        s = inner - 4 + (u - a[inner]) / (a[inner + 1] - a[inner])
        s = torch.where(k < 0, -4 + 0.1 * (u - a[0]), torch.where(k > 6, 3 + 0.1 * (u - a[7]), s))
        return scale * s - beta

    w = torch.randn(300, dtype=torch.float64) * 2
    u = (w + beta) / alpha
    kinks = torch.cat((grid, torch.tensor([-4.0, 3.0]).double()))
    w = w[(u[:, None] - kinks).abs().amin(1) > 1e-3]
    _, upstream, dx, grads = pull(q, w)
    h = 1e-6
    numeric = (surrogate(w + h, grid, alpha) - surrogate(w - h, grid, alpha)) / (2 * h)
    torch.testing.assert_close(dx, upstream * numeric, rtol=1e-5, atol=1e-6)
    for i in range(8):
        step = torch.zeros(8, dtype=torch.float64)
        step[i] = h
        numeric = (surrogate(w, grid + step, alpha) - surrogate(w, grid - step, alpha)) / (2 * h)
        torch.testing.assert_close(grads["grid"][i], (upstream * numeric).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dead_scale", ["parity", "pass"])
def test_dls_scalars_at_init(n_bits: int, dead_scale: str) -> None:
    flat = torch.rand(400, dtype=torch.float64)  # range / sigma is 3.5: the ceiling is active
    tail = torch.randn(400, dtype=torch.float64)
    tail[0] = 100.0
    for x, active in ((flat, True), (tail, False)):
        q = DLS(n_bits, dead_scale=dead_scale).double()  # type: ignore[arg-type]
        assert bool(x.max() - x.min() < x.std() * 3 * 2**n_bits / (2 ** (n_bits - 1) - 1)) == active
        _, _, _, grads = pull(q, x)
        assert grads["w"][0] == 0  # |mean| of the centred data is 0
        assert (grads["w"][1] == 0) == (active and dead_scale == "parity")


def test_dls_eps_stops_the_scale_gradient() -> None:
    x = torch.randn(50, dtype=torch.float64) * 1e-14
    _, _, dx, grads = pull(DLS(4).double(), x)
    assert grads["w"].eq(0).all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("cls", [LSQ, RFA])
def test_gradient_scale(cls: type[Quantizer]) -> None:
    x = torch.randn(5, 40)
    grads = []
    for on in (True, False):
        q = cls(4, axis=0, num_groups=5, is_weight=True)
        q.initialize(x)
        q.scale_gradient = on
        q(x).square().sum().backward()
        grads.append({k: p.grad for k, p in q.named_parameters()})
    for key, scaled in grads[0].items():
        factor = 1 / math.sqrt(40 * 7) if key == "alpha" else 1.0
        plain = grads[1][key]
        assert scaled is not None
        assert plain is not None
        torch.testing.assert_close(scaled, plain * factor)


@pytest.mark.parametrize("cls", [LSQ, RFA, DLS, MinMax])
def test_gradient_of_a_detached_input(cls: type[Quantizer]) -> None:
    """Static operands are quantized without a gradient of their own; the scalars still learn."""
    x = torch.randn(30)
    q = cls(4).train()
    y = q(x)
    assert y.requires_grad == bool(list(q.parameters()))
    if y.requires_grad:
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())


def test_lsq_step_below_the_floor_comes_back() -> None:
    q = LSQ(4)
    q.initialize(torch.randn(50))
    with torch.no_grad():
        q.alpha.zero_()
    x = torch.randn(50, requires_grad=True)
    y = q(x)
    assert y.isfinite().all()
    (y - x.detach()).square().sum().backward()
    assert q.alpha.grad is not None
    assert q.alpha.grad.isfinite().all()
    assert q.alpha.grad.lt(0).all()  # descent makes the step larger
