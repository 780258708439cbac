"""PACT, DoReFa, N2UQ and RLQ against their papers' equations, written out once more, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.errors import ConfigError, InputError
from ssmquant.modules import PackedTensor
from ssmquant.quantizers import N2UQ, PACT, RLQ, DoReFa, MinMax, Quantizer, get_quantizer
from tests.strategies import bits, learnt, make, samples, sqnr

H = 1e-6


def pull(q: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Output, upstream gradient, dx and the parameters' gradients, LSQ's gradient scale off."""
    q.scale_gradient = False
    x = x.detach().clone().requires_grad_()
    y = q(x)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    names = dict(q.named_parameters())
    dx, *grads = torch.autograd.grad(y, [x, *names.values()], upstream)
    return y.detach(), upstream, dx, dict(zip(names, grads, strict=True))


def slope(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Central difference of an elementwise ``f``, or of one in a single number."""
    return (f(at + H) - f(at - H)) / (2 * H)


def off(x: Tensor, kinks: Tensor, scale: float = 1.0) -> Tensor:
    """The elements of flat ``x`` that are not next to kinks."""
    return x[(x[:, None] - kinks.reshape(-1)).abs().amin(1) > 1e-4 * scale]


def close(got: Tensor, want: Any, rtol: float = 1e-6) -> None:
    want = torch.as_tensor(want, dtype=got.dtype).reshape(got.shape)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * (1 + float(want.abs().max())))


def f64(n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, dtype=torch.float64)


# ---- PACT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_pact_by_the_equations(n_bits: int, signed: bool) -> None:
    x = f64(500) if signed else f64(500).abs()
    q = make("pact", n_bits, x)
    assert isinstance(q, PACT)
    assert q.is_signed == signed
    assert float(q.alpha.detach()) == pytest.approx(float(x.abs().max()))
    with torch.no_grad():
        q.alpha.fill_(1.1)
    steps = 2**n_bits - 1 if not signed else 2 ** (n_bits - 1) - 1
    x = torch.cat((x, torch.tensor([0.0, 1.1, -1.1, 5.0, -5.0]).double()))
    low = -1.1 if signed else 0.0
    y, upstream, dx, grads = pull(q, x)
    close(y, (x.clamp(low, 1.1) * (steps / 1.1)).round() * (1.1 / steps), 1e-9)
    assert y.unique().numel() <= 2**n_bits - signed
    assert {0.0, 1.1} <= {round(v, 9) for v in y.tolist()}  # 0 and the clip are levels
    # Published: at the clip itself the gradient is that of the clip.
    assert torch.equal(dx, upstream * ((x < 1.1) & (x > low if signed else x >= 0)))
    wanted = upstream[x >= 1.1].sum() - (upstream[x <= -1.1].sum() if signed else 0.0)
    close(grads["alpha"], wanted, 1e-12)
    # ... elsewhere it is the derivative of what is rounded, which is homogeneous.
    inner = off(x, torch.tensor([low, 1.1]))
    _, upstream, dx, grads = pull(q, inner)

    def surrogate(t: Tensor, a: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(t, -a if signed else 0 * a), a)

    a = torch.tensor(1.1, dtype=torch.float64)
    close(dx, upstream * slope(lambda t: surrogate(t, a), inner))
    close(grads["alpha"], (upstream * slope(lambda t: surrogate(inner, t), a)).sum())
    close((inner * dx).sum() + a * grads["alpha"], (upstream * surrogate(inner, a)).sum(), 1e-9)


def test_pact_calibrates_by_the_largest_magnitude() -> None:
    q = PACT(4)
    q.fit([torch.rand(50) - 0.2, torch.tensor([-3.0, 1.0])])
    assert q.is_signed
    assert q.alpha.tolist() == [3.0]
    q.fit([torch.tensor([0.5, 2.0, 0.0])])
    assert not q.is_signed
    assert q.alpha.tolist() == [2.0]
    w = torch.randn(3, 40)
    w[1] = 0
    q = PACT(4, axis=0, num_groups=3, is_weight=True)
    q.initialize(w)
    close(q.alpha.detach()[1], w[::2].abs().amax(1).mean())


@pytest.mark.parametrize("start", [0.0, -2.0, 1e-14])
def test_pact_clip_below_the_floor_comes_back(start: float) -> None:
    q = make("pact", 4, torch.randn(50))
    with torch.no_grad():
        q.get_parameter("alpha").fill_(start)
    x = torch.randn(50)
    y = q(x)
    assert y.isfinite().all()
    (y - x).square().sum().backward()
    grad = q.get_parameter("alpha").grad
    assert grad is not None
    assert grad < 0  # descent makes the clip larger


# ---- DoReFa --------------------------------------------------------------------------------------------------------


@given(bits, samples(), st.booleans(), st.booleans())
def test_dorefa_by_the_equations(n_bits: int, w: Tensor, official: bool, by_channel: bool) -> None:
    groups: dict[str, Any] = {"axis": 0, "num_groups": w.shape[0]} if by_channel else {}
    q = DoReFa(n_bits, is_weight=True, official=official, **groups)
    over = (1, 2) if by_channel else (0, 1, 2)
    steps = 2**n_bits - 1
    t = w.tanh()
    top, reach = t.abs().amax(over, keepdim=True), w.abs().amax(over, keepdim=True)
    if official:
        reach = torch.ones_like(reach)
    at = steps * (t / (2 * top) + 0.5)
    y, upstream, dx, grads = pull(q, w)
    far = (at - at.floor() - 0.5).abs() > 1e-9
    want = reach * (2 * at.round() / steps - 1)
    torch.testing.assert_close(y[far], want[far], rtol=1e-9, atol=1e-9 * float(reach.max()))
    assert not grads
    # The surrogate, with the extremes held.
    close(dx, upstream * slope(lambda v: reach * v.tanh() / top, w), 1e-5)
    e = q.encode(w)
    assert torch.equal(e.decode(), y)
    assert e.codes.amin() == 0 or e.codes.amax() == steps  # the largest magnitude is at an end
    torch.testing.assert_close(e.levels, -e.levels.flip(1), rtol=1e-9, atol=1e-9)


def test_dorefa_has_no_state_for_weights() -> None:
    q = DoReFa(4, is_weight=True).eval()
    assert list(q.state_dict()) == ["initialized"]
    assert q.ready
    w = 0.1 * torch.randn(20, 30)
    q.initialize(w)
    assert sqnr(w, q(w)) > 14
    assert sqnr(w / 8, q(w / 8)) > 14  # the range is that of the moment
    large = q(1e3 * w)
    assert (large.abs() == large.abs().max()).float().mean() > 0.9  # tanh saturates
    w[3] = 0
    by_row = DoReFa(4, is_weight=True, axis=0, num_groups=20)
    v = w.clone().requires_grad_()
    y = by_row(v)
    assert y[3].eq(0).all()
    y.sum().backward()
    assert v.grad is not None
    assert v.grad[3].eq(1).all()
    assert by_row.encode(w).decode()[3].eq(0).all()


def test_dorefa_of_activations_is_minmax() -> None:
    x = torch.randn(7, 40)
    a, b = make("dorefa", 4, x), make("minmax", 4, x)
    assert isinstance(a, MinMax)
    assert torch.equal(a(2 * x), b(2 * x))
    assert a.state_dict().keys() == b.state_dict().keys()


# ---- N2UQ ----------------------------------------------------------------------------------------------------------


@given(bits, samples(), st.booleans())
def test_fresh_n2uq_is_lsq_with_ties_down(n_bits: int, x: Tensor, positive: bool) -> None:
    x = x.abs() if positive else x
    a, b = make("n2uq", n_bits, x), make("lsq", n_bits, x)
    assert a.is_signed == b.is_signed
    assert torch.equal(a.encode(x).codes, b.encode(x).codes)
    assert torch.equal(a(x), b(x))
    a.fit([x])
    b.fit([x])
    for key in ("alpha", "beta"):
        assert torch.equal(a.get_parameter(key), b.get_parameter(key))
    assert torch.equal(a.get_parameter("gamma"), a.get_parameter("alpha"))
    torch.testing.assert_close(a(x), b(x))


def line(u: Tensor, widths: Tensor, first: int) -> Tensor:
    """S of the module's docstring, segment by segment."""
    left = torch.tensor(float(first), dtype=u.dtype)
    total = torch.full_like(u, float(first))
    for w in widths:
        total = total + ((u - left) / w).clamp(0, 1)
        left = left + w
    return total


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("n_bits", [2, 3, 5])
def test_n2uq_gradient_is_that_of_the_surrogate(n_bits: int, positive: bool) -> None:
    x = f64(400, 2.0)
    x = x.abs() if positive else x
    q = make("n2uq", n_bits, x)
    assert isinstance(q, N2UQ)
    learnt(q, 3, 0.2)
    with torch.no_grad():
        q.beta.fill_(-0.07)
        q.widths[1].mul_(-1)  # as good as its magnitude
    qmin, widths = q.qmin, q.widths.detach()
    alpha, beta, gamma = (float(t.detach()) for t in (q.alpha, q.beta, q.gamma))
    points = qmin + torch.cat((torch.zeros(1).double(), widths.abs().cumsum(0)))
    t = (points[1:] + points[:-1]) / 2
    close(q.thresholds(), t, 1e-12)
    u = off((x + beta) / alpha, torch.cat((points, t)))
    x = u * alpha - beta
    y, upstream, dx, grads = pull(q, x)
    code = (qmin + (u[:, None] > t).sum(1)).double()
    close(y, gamma * code - beta, 1e-9)

    def soft(v: Tensor, a: Any, b: Any, c: Any, w: Tensor) -> Tensor:
        return c * line((v + b) / a, w.abs(), qmin) - b

    close(dx, upstream * slope(lambda v: soft(v, alpha, beta, gamma, widths), x), 1e-5)
    for name, f in (
        ("alpha", lambda s: soft(x, s, beta, gamma, widths)),
        ("beta", lambda s: soft(x, alpha, s, gamma, widths)),
    ):
        here = torch.tensor({"alpha": alpha, "beta": beta}[name], dtype=torch.float64)
        close(grads[name], (upstream * slope(f, here)).sum(), 1e-5)
    close(grads["gamma"], (upstream * code).sum(), 1e-9)  # what is multiplied is the code, not S
    for i in range(len(widths)):
        step = torch.zeros_like(widths)
        step[i] = H
        moved = soft(x, alpha, beta, gamma, widths + step) - soft(x, alpha, beta, gamma, widths - step)
        close(grads["widths"][i], (upstream * moved).sum() / (2 * H), 1e-5)
    assert ((dx == 0) == ((u < points[0]) | (u > points[-1]))).all()


@given(bits, samples(), st.integers(0, 9))
def test_n2uq_identities(n_bits: int, x: Tensor, seed: int) -> None:
    q = learnt(make("n2uq", n_bits, x), seed, 0.2)
    y, upstream, dx, grads = pull(q, x)
    alpha, beta, gamma, widths = (q.get_parameter(k).detach() for k in ("alpha", "beta", "gamma", "widths"))
    size = float((upstream * y).abs().sum()) + float(((x + beta) * dx).abs().sum())
    tolerance = {"rtol": 1e-9, "atol": 1e-9 * size}
    # x + beta and alpha together change nothing; nor do the distance from the grid's start and the widths.
    torch.testing.assert_close(((x + beta) * dx).sum(), -(alpha * grads["alpha"])[0], **tolerance)
    torch.testing.assert_close((gamma * grads["gamma"])[0], (upstream * (y + beta)).sum(), **tolerance)
    torch.testing.assert_close(grads["beta"][0], (dx - upstream).sum(), **tolerance)
    if bool((widths.abs() > 1e-3).all()):
        u = (x + beta) / alpha
        torch.testing.assert_close(
            (widths * grads["widths"]).sum(), -((u - q.qmin) * alpha * dx).sum(), **tolerance
        )


@pytest.mark.parametrize("bad", [0.0, 1e-5, -1e-9])
def test_n2uq_intervals_do_not_vanish(bad: float) -> None:
    x = torch.linspace(-4, 4, 48_001)
    q = make("n2uq", 3, x)
    assert isinstance(q, N2UQ)
    with torch.no_grad():
        q.widths[2:4] = bad
    assert (q.thresholds().diff() >= 0.9e-3).all()
    y = q(x)
    (y - x).square().sum().backward()
    for p in q.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
    assert q.widths.grad is not None
    assert q.widths.grad[2:4].ne(0).all()
    assert q.encode(2 * x).codes.unique().numel() == 8


def test_n2uq_serves_skewed_activations() -> None:
    x = torch.nn.functional.silu(torch.randn(20_000))
    q, lsq = get_quantizer("n2uq")(4), get_quantizer("lsq")(4)
    for one in (q, lsq):
        one.fit([x])
    assert abs(sqnr(x, q(x)) - sqnr(x, lsq(x))) < 0.1
    q.initialize(x)
    before = sqnr(x, q(x))
    optimizer = torch.optim.Adam(q.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (q(x) - x).square().mean().backward()
        optimizer.step()
    assert sqnr(x, q(x)) > before + 3


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_n2uq_weights_by_the_equations(n_bits: int) -> None:
    w = f64(3000).reshape(5, 600) * torch.logspace(-2, 2, 5).double()[:, None]
    q = N2UQ(n_bits, is_weight=True, axis=0, num_groups=5)
    assert not list(q.parameters())
    steps = 2**n_bits - 1
    s = steps / 2 ** (n_bits - 1) * w.abs().mean(1, keepdim=True)
    at = steps * ((w / s).clamp(-1, 1) + 1) / 2
    y, upstream, dx, _ = pull(q, w)
    far = (at - at.floor() - 0.5).abs() > 1e-9
    torch.testing.assert_close(y[far], (s * (2 * at.round() / steps - 1))[far], rtol=1e-9, atol=1e-12)
    assert torch.equal(dx, upstream * (w.abs() <= s))
    packed = PackedTensor.from_qtensor(q.encode(w.float()), q.shift)
    assert packed.shift is None  # it follows from the scale
    assert torch.equal(packed(), q(w.float()))


def test_n2uq_weights_use_all_levels_equally() -> None:
    w = torch.rand(40_000) - 0.5
    q = N2UQ(3, is_weight=True)
    counts = q.encode(w).codes.reshape(-1).long().bincount(minlength=8)
    assert counts.min() > 4600  # of 5000
    w = torch.randn(3, 40)
    w[1] = 0
    q = N2UQ(3, is_weight=True, axis=0, num_groups=3)
    v = w.clone().requires_grad_()
    y = q(v)
    assert y[1].eq(0).all()
    y.sum().backward()
    assert v.grad is not None
    assert v.grad[1].eq(1).all()
    assert torch.equal(q.encode(w).decode(), y.detach())


# ---- RLQ -----------------------------------------------------------------------------------------------------------


def phi(u: Tensor) -> Tensor:
    f = u - u.floor()
    return u.floor() + 0.5 + torch.tanh(f - 0.5) / (2 * math.tanh(0.5))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("n_bits", [2, 4])
def test_rlq_gradient_is_that_of_phi(n_bits: int, positive: bool) -> None:
    x = f64(400, 2.0)
    x = x.abs() if positive else x
    q = make("rlq", n_bits, x)
    assert isinstance(q, RLQ)
    with torch.no_grad():
        q.alpha.mul_(0.8)
    alpha, ends = q.alpha.detach(), (q.qmin, q.qmax)
    u = off(x / alpha, torch.arange(q.qmin - 20, q.qmax + 20).double())
    x = u * alpha
    y, upstream, dx, grads = pull(q, x)
    close(y, alpha * u.clamp(*ends).round(), 1e-9)
    close(dx, upstream * slope(lambda v: alpha * phi((v / alpha).clamp(*ends)), x), 1e-5)
    # d alpha: of alpha * round(u) with phi' in place of the derivative of round
    through = slope(lambda a: phi((x / a).clamp(*ends)), alpha) * alpha
    close(grads["alpha"], (upstream * (u.clamp(*ends).round() + through)).sum(), 1e-5)
    close((x * dx).sum() + alpha * grads["alpha"], (upstream * y).sum(), 1e-9)
    at = torch.tensor([0.0, 0.5, 1.0, -2.5]).double()
    with torch.no_grad():
        q.alpha.fill_(1.0)
    _, upstream, dx, _ = pull(q, at[: 2 if positive else 4])
    close(dx / upstream, [0.8509, 1.0820, 0.8509, 1.0820 if n_bits > 2 else 0.0][: len(dx)], 1e-4)


@pytest.mark.parametrize("axis", [1, -2])
def test_rlq_thresholds_of_channels(axis: int) -> None:
    x = f64(2 * 5 * 30).reshape(2, 5, 30)
    q = make("rlq", 3, x, channel_axis=axis, channels=5)
    plain = make("lsq", 3, x, shift="none")
    assert isinstance(q, RLQ)
    assert q.tau is not None
    assert q.tau.tolist() == [0.0] * 5
    assert torch.equal(q(x), plain(x))
    tau = 0.3 * torch.arange(5.0).double()
    with torch.no_grad():
        q.tau.copy_(tau)
    moved = x + tau[:, None]
    assert torch.equal(q(x), plain(moved))  # added before, not subtracted after
    assert torch.equal(q.encode(x).codes, plain.encode(moved).codes)
    assert torch.equal(q.encode(x).decode(), q(x))
    y, upstream, dx, grads = pull(q, x)
    close(grads["tau"], dx.sum((0, 2)), 1e-12)
    close((moved * dx).sum() + (q.alpha.detach() * grads["alpha"]).sum(), (upstream * y).sum(), 1e-9)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        out = q.float()(half)
        assert out.dtype == dtype
        assert torch.equal(out, q(half.float()).to(dtype))
        assert torch.equal(q.encode(half).decode(), out)
    with pytest.raises(InputError, match="channel_axis"):
        q(torch.randn(2, 6, 30))
    with pytest.raises(InputError, match="channel_axis"):
        q(torch.tensor(1.0))
    q.fit([x])
    assert q.tau.eq(0).all()
    q.reset()
    assert not q.ready


def test_rlq_arguments() -> None:
    for bad in ({"channels": 3}, {"channel_axis": 1, "channels": 0}):
        with pytest.raises(ConfigError, match="channels"):
            RLQ(4, **bad)
    with pytest.raises(ConfigError, match="activations"):
        RLQ(4, is_weight=True, channel_axis=0, channels=3)
    assert list(dict(RLQ(4).named_parameters())) == ["alpha"]
    assert not RLQ(None, channel_axis=1, channels=3).state_dict()


@pytest.mark.parametrize("copies", [1, 4])
def test_rlq_has_the_gradient_scale_of_lsq(copies: int) -> None:
    x = torch.randn(5, 40)
    q = make("rlq", 4, x)
    grads = []
    for on in (True, False):
        q.scale_gradient = on
        q.zero_grad()
        q(x, copies).square().sum().backward()
        grad = q.get_parameter("alpha").grad
        assert grad is not None
        grads.append(grad.clone())
    torch.testing.assert_close(grads[0], grads[1] / math.sqrt(copies * 200 * 7))


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pact", "dorefa", "n2uq", "rlq"])
@pytest.mark.parametrize("is_weight", [False, True])
def test_stacks_of_weights(name: str, is_weight: bool) -> None:
    """Leading axes that count as one (directions, channels, inputs)."""
    w = torch.randn(2, 3, 40)
    whole, flat = (get_quantizer(name)(4, axis=0, num_groups=6, is_weight=is_weight).eval() for _ in range(2))
    whole.leading = 2
    whole.initialize(w)
    flat.initialize(w.reshape(6, 40))
    assert torch.equal(whole(w).reshape(6, 40), flat(w.reshape(6, 40)))
    assert torch.equal(whole.encode(w).decode(), whole(w))


def test_dorefa_of_a_vector_by_element() -> None:
    w = torch.tensor([0.5, -2.0, 0.0, 0.1])
    q = DoReFa(3, is_weight=True, axis=0, num_groups=4)
    torch.testing.assert_close(q(w), w)
    assert torch.equal(q.encode(w).decode(), q(w))
    assert q.encode(w).scale.shape == (4,)


def test_only_calibrated_ranges_are_known_beforehand() -> None:
    assert DoReFa(4, is_weight=True).static_affine() is None
    for name in ("dorefa", "minmax"):
        q = make(name, 4, torch.randn(50))
        known = q.static_affine()
        assert known is not None
        assert torch.equal(known.scale, q.encode(torch.randn(3)).scale)
