"""Hypothesis strategies and counter-cases that all quantizer and packing tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.quantizers import QUANTIZERS, Quantizer

BITS = (2, 3, 4, 5, 6, 7, 8)

bits = st.sampled_from(BITS)
NAMES = sorted(QUANTIZERS)
quantizer_names = st.sampled_from(NAMES)
# Companding quantizers say ``nearest = False``: a weight does not go to the level next to it, nor do they commute with
# a change of scale.
nearest_names = st.sampled_from([n for n in NAMES if getattr(QUANTIZERS[n], "nearest", True)])
shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn, shape: st.SearchStrategy[tuple[int, ...]] = shapes, limit: float = 1e3
) -> Tensor:
    """Float32 tensors with freely chosen elements (ties, repeats, zeros), never all zero."""
    size = draw(shape)
    numel = int(torch.Size(size).numel())
    element = st.floats(-limit, limit, width=32, allow_subnormal=False)
    values = draw(st.lists(element, min_size=numel, max_size=numel))
    x = torch.tensor(values, dtype=torch.float32).reshape(size)
    if not (x.abs() > 1e-3).any():
        x = x + 1.0
    return x


@st.composite
def samples(draw: st.DrawFn, min_numel: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    """Well-behaved random data: some distribution, scale and offset, both signs, no ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(min_numel // 2, 40)))
    x = torch.randn(shape, generator=generator, dtype=dtype)
    power = draw(st.sampled_from([1, 3]))
    x = x**power * draw(st.floats(0.1, 10.0))
    return x - x.mean() + draw(st.floats(-0.5, 0.5)) * x.std()


def _outlier() -> Tensor:
    x = torch.randn(300)
    x[17] = 1e4
    return x


COUNTER_CASES: dict[str, Callable[[], Tensor]] = {
    "constant 0": lambda: torch.zeros(3, 5),
    "constant 1": lambda: torch.ones(3, 5),
    "constant -3": lambda: torch.full((3, 5), -3.0),
    "one element": lambda: torch.tensor([0.7]),
    "one negative element": lambda: torch.tensor([[-0.7]]),
    "0-d": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 4),
    "two equal extremes": lambda: torch.tensor([-1.0, -1.0, 0.1, 1.0, 1.0]),
    "one outlier": _outlier,
    "all positive": lambda: torch.rand(200) + 0.01,
    "all negative": lambda: -torch.rand(200) - 0.01,
    "mean is 1000 sigma": lambda: 1000.0 + torch.randn(200),
    "tiny": lambda: 1e-8 * torch.randn(200),
    "huge": lambda: 1e15 * torch.randn(200),
    "non-contiguous": lambda: torch.randn(6, 8).t()[:, ::2],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
}


def make(name: str, n_bits: int, x: Tensor, **kwargs: Any) -> Quantizer:
    """A quantizer of the registry, initialised from ``x``, in evaluation mode and ``x``'s precision."""
    q = QUANTIZERS[name](n_bits, **kwargs)
    if x.dtype == torch.float64:
        q.double()
    q.initialize(x)
    return q.eval()


def learnt(q: Quantizer, seed: int = 0, amount: float = 0.3) -> Quantizer:
    """Disturb all parameters relative to their size, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in q.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(amount * noise.to(p.device) * p.abs().mean().clamp(max=1.0))
    return q


def sqnr(x: Tensor, y: Tensor) -> float:
    """Signal to quantization noise, dB."""
    return float(10 * torch.log10(x.detach().square().sum() / (x - y).detach().square().sum()))
