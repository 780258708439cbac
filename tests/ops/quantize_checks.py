"""What holds for every back end of fused fake quantization, against the quantizers' own arithmetic in float64."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops.quantize import Bank, DLSRule, Groups
from ssmquant.quantizers.affine import Affine, affine_decode, affine_index
from ssmquant.quantizers.dls import _DLSFunction
from ssmquant.quantizers.lsq import _LSQFunction, floored
from ssmquant.quantizers.rfa import _RFAFunction, grid_thresholds, ordered_grid


def same(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def close(got: Tensor, want: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Relative to the norm of ``want``, or to ``scale`` if that is more."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / max(float(want.double().norm()), scale, 1e-30)
    assert error < tolerance, f"relative error {error:.1e}"


def one(value: float, device: Any) -> Tensor:
    return torch.tensor([value], device=device)


def check_lsq(module: ModuleType, x: Tensor, alpha: float, beta: float, qmin: int, qmax: int) -> None:
    eps, copies = 1e-3, 3
    scale = 1 / math.sqrt(copies * x.numel() * qmax)
    a, b = one(alpha, x.device), one(beta, x.device)
    used = floored(a, eps).reshape(())
    want = affine_decode(affine_index(x.float(), used, b[0], qmin, qmax), Affine(used, b[0]), qmin)
    y = module.lsq_forward(x, a, b, qmin, qmax, eps)
    same(y, want.to(x.dtype))
    assert y.stride() == x.stride()

    g = torch.randn_like(x)
    u = (x.double() + b.double()) / used.double()
    unclear = (u - u.floor() - 0.5).abs() < 1e-3  # on a tie, or where something is clipped
    for edge in (qmin, qmax):
        unclear |= (u - edge).abs() < 1e-3
    g[unclear] = 0.0
    leaves = [t.double().requires_grad_() for t in (x, used, b.reshape(()))]
    out = _LSQFunction.apply(*leaves, qmin, qmax, None, copies)
    gx, ga, gb = torch.autograd.grad(out, leaves, g.double())
    dx, da, db = module.lsq_backward(g, x, a, b, qmin, qmax, eps, copies)
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    size = float(g.double().norm())  # of what the sums are made of
    close(dx, gx, tolerance, size * 1e-3)
    assert da.shape == db.shape == a.shape
    close(da.reshape(()), ga, 1e-5, scale * size * max(-qmin, qmax))
    close(db.reshape(()), gb, 1e-5, size)
    again = module.lsq_backward(g, x, a, b, qmin, qmax, eps, copies)
    for p, q in zip((dx, da, db), again, strict=True):
        same(p, q)


def sizes_along(x: Tensor, axis: int | None) -> Groups:
    return Groups() if axis is None else Groups(x.shape[axis], x.stride(axis))


def check_dls(module: ModuleType, x: Tensor, w: Tensor, v: Tensor, axis: int | None, rule: DLSRule) -> None:
    groups = sizes_along(x, axis)
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    y, ranges = module.dls_forward(x, w, v, groups, rule)
    same(module.dls_range(x, w, v, groups, rule), ranges)
    assert ranges.shape == (6, groups.count)
    assert y.stride() == x.stride()
    _mean, _std, low, high, alpha, beta = (r.reshape(shape) if axis is not None else r[0] for r in ranges)
    affine = Affine(alpha, beta, low, high)
    same(
        y,
        affine_decode(affine_index(x.float(), alpha, beta, rule.qmin, rule.qmax), affine, rule.qmin).to(
            x.dtype
        ),
    )

    leaves = [t.double().requires_grad_() for t in (x, w, v)]
    exact = _DLSFunction.apply(*leaves, axis, *rule)
    if not bool(torch.isfinite(exact).all()):
        return
    rows = (
        x.double().reshape(1, -1) if axis is None else x.double().movedim(axis, 0).reshape(groups.count, -1)
    )
    close(
        ranges[0],
        rows.mean(1),
        1e-6,
        float(rows.std() if rows.numel() > 1 else 0) + 1e-3 * float(rows.abs().max()),
    )
    same(ranges[2], rows.amin(1).float())
    same(ranges[3], rows.amax(1).float())
    many = rows.repeat(1, rule.copies)
    if many.shape[1] > 1:
        close(ranges[1], many.std(1), 1e-5)
    # Elements on a tie, or where something is clipped, may go either way: they take no part.
    g = torch.randn_like(x)
    scale = alpha.double()
    u, levels = (x.double() + beta.double()) / scale, (exact - y.double()).abs() / scale
    unclear = levels > 1e-3
    for edge in (rule.qmin, rule.qmax):
        unclear |= (u - edge).abs() < 1e-3
        unclear |= ((edge * scale - beta.double() - torch.where(u < 0, low, high)) / scale).abs() < 1e-3
    g[unclear] = 0.0
    far = float(x.double().mean().abs()) > 100
    if far:  # float32 itself is not close to float64 there
        leaves = [t.float().clone().requires_grad_() for t in (x, w, v)]
        exact = _DLSFunction.apply(*leaves, axis, *rule)
    grads = torch.autograd.grad(exact, leaves, g.to(exact))
    dx, dw, dv = module.dls_backward(g, x, w, v, ranges, groups, rule, True)
    half = x.dtype != torch.float32
    size = float(g.double().norm())
    close(dx, grads[0], 1e-2 if half or far else 2e-5, size * 1e-3)
    for got, want in ((dw, grads[1]), (dv, grads[2])):
        close(got, want, 1e-3 if far else 5e-5, size * float(x.double().abs().max()))
    again = module.dls_backward(g, x, w, v, ranges, groups, rule, True)
    for p, q in zip((dx, dw, dv), again, strict=True):
        same(p, q)
    for p, q in zip((dw, dv), module.dls_backward(g, x, w, v, ranges, groups, rule, False)[1:], strict=True):
        same(p, q)


def check_dls_bank(module: ModuleType, counts: tuple[int, ...], rule: DLSRule, device: Any) -> None:
    """Against calls for one tensor each, of the same module."""
    top = 2 ** (rule.bits - 1) - 1
    x = torch.cat([k % 3 - 1 + torch.randn(n, device=device) for k, n in enumerate(counts)])
    w = torch.rand(len(counts), 4, device=device) / top
    w[:, 1] += 1.5 / top
    v = torch.tensor([-1.0, 0.1, 0.05, -0.05], device=device) + 0.05 * torch.randn(
        len(counts), 4, device=device
    )
    y, ranges = module.dls_bank_forward(x, w, v, counts, rule)
    g = torch.randn_like(x)
    dx, dw, dv = module.dls_bank_backward(g, x, w, v, ranges, counts, rule)
    assert (y.shape, ranges.shape, dx.shape) == (x.shape, (6, len(counts)), x.shape)
    assert dw.shape == dv.shape == w.shape
    for i, (one, mine, grad, d) in enumerate(zip(*(t.split(counts) for t in (x, y, g, dx)), strict=True)):
        size = float(one.norm()) / math.sqrt(len(one)) + 1e-6
        want = module.dls_range(one, w[i], v[i], Groups(), rule)
        assert ((ranges[:, i : i + 1] - want).abs() <= 1e-6 * (want.abs() + size)).all()
        own = ranges[:, i : i + 1].contiguous()
        low, high, alpha, beta = (own[k, 0] for k in (2, 3, 4, 5))
        affine, ends = Affine(alpha, beta, low, high), (rule.qmin, rule.qmax)
        same(mine, affine_decode(affine_index(one, alpha, beta, *ends), affine, rule.qmin))
        wanted = module.dls_backward(
            grad.contiguous(), one.contiguous(), w[i], v[i], own, Groups(), rule, True
        )
        least = float(grad.norm()) * max(size, float(one.abs().max()))
        for got, must in zip((d, dw[i], dv[i]), wanted, strict=True):
            close(got, must, 1e-5, least)
    again = module.dls_bank_backward(g, x, w, v, ranges, counts, rule)
    for p, q in zip(
        (y, ranges, dx, dw, dv), (*module.dls_bank_forward(x, w, v, counts, rule), *again), strict=True
    ):
        same(p, q)


def check_bank(
    module: ModuleType, shapes: list[tuple[int, ...]], bits: int, rfa: bool, by_channel: bool, device: Any
) -> None:
    levels = 2**bits if rfa else 0
    weights = [torch.randn(s, device=device) for s in shapes]
    groups = tuple(s[0] if by_channel else 1 for s in shapes)
    bank = Bank(
        tuple(w.numel() for w in weights), groups, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, levels, True
    )
    alpha = 0.2 + torch.rand(sum(groups), device=device)
    beta = 0.1 * torch.randn(sum(groups), device=device)
    alpha[-1] = -1e-9
    steps = torch.rand(len(shapes), max(levels, 1), device=device)
    grid = ordered_grid(bank.qmin - 0.3 + steps.cumsum(1)) if rfa else alpha
    thresholds = grid_thresholds(grid) if rfa else alpha
    eps = 1e-2
    x = torch.cat([w.reshape(-1) for w in weights])
    y = module.bank_forward(x, alpha, beta, thresholds, bank, eps)
    used = floored(alpha, eps)
    g = torch.randn_like(x)
    dx, da, db, dgrid = module.bank_backward(g, x, alpha, beta, grid, thresholds, bank, eps)
    at = group = 0
    for i, (weight, count) in enumerate(zip(weights, groups, strict=True)):
        shape = [count, *[1] * (weight.dim() - 1)] if by_channel else []
        a, b = (t[group : group + count].reshape(shape) for t in (used, beta))
        static = (bank.qmin, bank.qmax, 0 if by_channel else None, True)
        leaves = [t.double().requires_grad_() for t in ((weight, a, b, grid[i]) if rfa else (weight, a, b))]
        part = slice(at, at + weight.numel())
        mine, grad = y[part].view(weight.shape), g[part].view(weight.shape)
        if rfa:
            plain = _RFAFunction.apply(weight, a, b, grid[i], thresholds[i], *static)
            exact = _RFAFunction.apply(*leaves, thresholds[i].double(), *static)
        else:
            plain = _LSQFunction.apply(weight, a, b, *static[:2], *static[2:])
            exact = _LSQFunction.apply(*leaves, *static)
        same(mine, plain)
        wanted = torch.autograd.grad(exact, leaves, grad.double())
        size = float(grad.double().norm()) * max(1.0, float(used.abs().max()))
        close(dx[part].view(weight.shape), wanted[0], 1e-5, size * 1e-3)
        close(
            da[group : group + count].reshape(a.shape), wanted[1], 1e-5, size * 2**bits / math.sqrt(bank.qmax)
        )
        close(db[group : group + count].reshape(b.shape), wanted[2], 1e-5, size)
        if rfa:
            close(dgrid[i], wanted[3], 2e-5, size)
        at, group = part.stop, group + count
    assert dgrid.numel() == (grid.numel() if rfa else 0)
    for p, q in zip(
        (dx, da, db, dgrid), module.bank_backward(g, x, alpha, beta, grid, thresholds, bank, eps), strict=True
    ):
        same(p, q)
