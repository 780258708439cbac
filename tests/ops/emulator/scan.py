"""Operands of the selective scan, the CUDA back end's results on them, and what these should be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmquant.ops.selective_scan import chunked, cuda, selective_scan_reference

HALF = (torch.float16, torch.bfloat16)
GUARD = 64  # elements on either side of what the back end allocates


@contextmanager
def guarded() -> Iterator[None]:
    """What is allocated meanwhile is NaN where nothing writes to it, and nothing writes beside it."""
    made: list[tuple[Tensor, int]] = []

    def empty(shape: Any, **options: Any) -> Tensor:
        count = math.prod(shape)
        whole = torch.full((count + 2 * GUARD,), math.nan, **options)
        made.append((whole, count))
        return whole[GUARD : GUARD + count].view(tuple(shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for whole, count in made:
        assert whole[:GUARD].isnan().all()
        assert whole[GUARD + count :].isnan().all()


def operands(
    batch: int,
    channels: int,
    states: int,
    length: int,
    groups: int = 1,
    *,
    constant: str = "",
    without: str = "",
    softplus: bool = True,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4,
    device: str = "cpu",
) -> list[Any]:
    """u, delta, A, B, C, D, bias; ``dtypes`` are those of u, delta, B and C."""

    def matrix(name: str) -> Tensor:
        return torch.randn((channels, states) if name in constant else (batch, groups, states, length))

    delta = 0.5 * torch.randn(batch, channels, length) - 2
    u_type, delta_type, b_type, c_type = dtypes
    args = [
        torch.randn(batch, channels, length).to(u_type),
        (delta if softplus else delta.exp()).to(delta_type),
        -3 * torch.rand(channels, states) - 0.05,
        matrix("B").to(b_type),
        matrix("C").to(c_type),
        None if "D" in without.split() else torch.randn(channels),
        None if "bias" in without.split() else torch.rand(channels),
    ]
    return [None if t is None else t.to(device) for t in args]


def weights(args: list[Any]) -> tuple[Tensor, Tensor]:
    """Gradients of the two results."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(args[0].shape, generator=generator).to(args[0])
    return g, torch.randn((args[0].shape[0], *args[2].shape), generator=generator).to(args[0].device)


def run(args: list[Any], softplus: bool = True, *, last: bool = True) -> list[Tensor]:
    """Output, last state, and the gradients of all operands that there are; ``last``: of the last state too."""
    return run_with(*weights(args), args, softplus, last=last)


def run_with(
    g: Tensor, g_last: Tensor, args: list[Any], softplus: bool = True, *, last: bool = True
) -> list[Tensor]:
    """``run`` with given gradients of the results."""
    y, state, saved = cuda.forward(*args, softplus, torch.float32, True)
    grads = cuda.backward(g, g_last if last else None, saved, *args, softplus, torch.float32)
    for grad, like in zip(grads, args, strict=True):
        assert grad.is_contiguous()
        assert (grad.shape, grad.dtype) == ((0,), args[0].dtype) if like is None else (like.shape, like.dtype)
    return [y, state, *(grad for grad, like in zip(grads, args, strict=True) if like is not None)]


def definition(args: list[Any], softplus: bool = True, *, last: bool = True) -> list[Tensor]:
    exact: list[Any] = [None if t is None else t.detach().double().requires_grad_() for t in args]
    y, state = selective_scan_reference(*exact[:6], None, exact[6], softplus, True)
    g, g_last = weights(args)
    loss = (y * g).sum() + (state * g_last).sum() * last
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, [t for t in exact if t is not None])]


def by_chunked(args: list[Any], softplus: bool = True) -> list[Tensor]:
    """The same, faster, where sizes are large."""
    exact = [None if t is None else t.double() for t in args]
    g, g_last = (t.double() for t in weights(args))
    y, state, saved = chunked.forward(*exact, softplus, torch.float64, True)
    grads = chunked.backward(g, g_last, saved, *exact, softplus, torch.float64)
    return [y, state, *(grad for grad, like in zip(grads, args, strict=True) if like is not None)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    """In half precision results are rounded once: none is off by more than half a unit in the last place."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        error = (g.double() - w).norm() / w.norm().clamp(min=1e-9)
        limit = tolerance + torch.finfo(g.dtype).eps / 2 * (g.dtype in HALF)
        assert error < limit, f"result {i}: relative error {error:.1e}"


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w), f"result {i} differs"


def check(args: list[Any], softplus: bool = True, *, last: bool = True) -> None:
    with guarded():
        got = run(args, softplus, last=last)
    assert_close(got, definition(args, softplus, last=last))


def moved(x: Tensor, how: str) -> Tensor:
    """The same values elsewhere, NaN around them."""
    if how == "last first":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "channels last":
        return x.movedim(min(1, x.dim() - 1), -1).contiguous().movedim(-1, min(1, x.dim() - 1))
    before, stride, pitch = {"strided": (0, 2, 2), "offset": (1, 1, 4), "odd rows": (0, 1, 1)}[how]
    wide = torch.full((*x.shape[:-1], stride * x.shape[-1] + pitch), math.nan, dtype=x.dtype, device=x.device)
    view = wide[..., before : before + stride * x.shape[-1] : stride]
    return view.copy_(x)


def map_operands(
    batch: int, pixels: int, channels: int, states: int, directions: int, dtype: torch.dtype
) -> list[Any]:
    """x, delta, A, B, C, D, bias, path; B and C are parts of one projection, as in a model."""
    all_channels = directions * channels
    both = torch.randn(batch, pixels, directions, 2 * states).to(dtype)
    return [
        torch.randn(batch, pixels, 2 * channels).to(dtype)[..., :channels],
        (0.5 * torch.randn(batch, pixels, directions, channels) - 2).to(dtype),
        -3 * torch.rand(all_channels, states) - 0.05,
        both[..., :states],
        both[..., states:],
        torch.randn(all_channels),
        torch.rand(all_channels),
        torch.stack([torch.randperm(pixels) for _ in range(directions)]).int(),
    ]


def run_map(args: list[Any]) -> list[Tensor]:
    """Outputs of all directions, and the gradients of all operands but the path."""
    y, saved = cuda.map_forward(*args, True, True)
    return [y, *cuda.map_backward(map_weights(args[0]), saved, *args, True)]


def map_weights(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)


def map_definition(args: list[Any]) -> list[Tensor]:
    exact = [t.double().requires_grad_() for t in args[:7]]
    x, delta, a, b, c, skip, bias = exact
    (batch, pixels, channels), path = x.shape, args[7].long()

    def sequences(t: Tensor) -> Tensor:  # (B, P, K, n) -> (B, K, n, L)
        return torch.stack([t[:, path[k], k] for k in range(len(path))], 1).transpose(2, 3)

    u = sequences(x[:, :, None].expand(-1, -1, len(path), -1))
    y = selective_scan_reference(
        u.flatten(1, 2), sequences(delta).flatten(1, 2), a, sequences(b), sequences(c), skip, None, bias, True
    )
    assert isinstance(y, Tensor)
    along = y.view(batch, len(path), channels, pixels).transpose(2, 3)
    out = torch.stack([along[:, k, path[k].argsort()] for k in range(len(path))], 1)
    grads = torch.autograd.grad((out.sum(1) * map_weights(args[0])).sum(), exact)
    return [out.detach(), *grads]
