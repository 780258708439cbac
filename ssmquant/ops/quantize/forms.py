"""What the fused kernels of fake quantization are asked for. Each back end (``triton``, ``cpu``) has these functions::

    unavailable(device) -> str | None           why it cannot serve there
    lsq_forward(x, alpha, beta, qmin, qmax, eps) -> y
    lsq_backward(g, x, alpha, beta, qmin, qmax, eps, copies) -> dx, d alpha, d beta
    dls_range(x, w, v, groups, rule) -> ranges
    dls_forward(x, w, v, groups, rule) -> y, ranges
    dls_backward(g, x, w, v, ranges, groups, rule, need_x) -> dx (empty unless need_x), d w, d v
    bank_forward(x, alpha, beta, thresholds, bank, eps) -> y
    bank_backward(g, x, alpha, beta, grid, thresholds, bank, eps) -> dx, d alpha, d beta, d grid (empty for LSQ)
    dls_bank_forward(x, w, v, counts, rule) -> y, ranges
    dls_bank_backward(g, x, w, v, ranges, counts, rule) -> dx, d w, d v

``operators`` has them as well, but for the first, for ``torch.compile``. "triton" alone has those of quantizers that
serve for comparison (``quantize.offering`` asks)::

    pact_forward(x, alpha, low, high, eps) -> y
    pact_backward(g, x, alpha, low, eps) -> dx, d alpha
    soft_backward(g, x, alpha, beta, qmin, qmax, eps, copies) -> dx, d alpha      RLQ's, after lsq_forward
    threshold_forward(x, alpha, beta, gamma, thresholds, rule) -> y
    threshold_backward(g, x, alpha, beta, gamma, grid, thresholds, rule) -> dx, d alpha, d beta, d gamma, d grid

Activations ``x`` are float32, float16 or bfloat16 and lie densely in memory, in any order of dimensions; ``y`` and
``dx`` have the strides of ``x``, ``g`` its shape. Scalars (alpha, beta of one element; w, v ``(4,)``; their gradients
likewise) and arithmetic are float32, in the order of operations of ``quantizers/affine.py``, without contraction to
fused multiply-adds: codes and values equal those of the quantizers' own arithmetic bit for bit, given the same alpha
and beta. No function synchronises with the host, all of them give the same bits from run to run. ``eps``: what the
magnitude of alpha is raised to, its sign kept (``quantizers.lsq.floored``), with gradient 1.

``copies``: ``x`` stands for a tensor that holds each of its elements so often; the gradient of alpha is divided by
``sqrt(copies * n * qmax)``, n the elements of a group, unless ``copies`` is 0.

``ranges``, (6, G), are mean, standard deviation (0 for one element), min, max, alpha and beta of every group.

PACT: alpha is the clip, raised to ``eps`` with gradient 1; codes ``low .. high`` in steps of ``alpha * (1 / high)``,
``low`` is 0 or negative. Of thresholds there is at least one in ``thresholds`` ``(levels - 1,)``; they and ``grid``
``(levels,)`` increase, threshold i lies between the points i and i + 1 of the grid; see ``ThresholdRule``.

A bank is several tensors in one call, each quantized as it would be alone. Those of ``dls_bank`` have ``counts``
elements, one group each (G), and lie end to end in float32 ``x``; w and v are (G, 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MOST_LEVELS", "Bank", "DLSRule", "Groups", "ThresholdRule", "gradient_scale", "like"]

MOST_LEVELS = 16
"""Of the threshold quantizer: more take longer than plain PyTorch's search."""


def gradient_scale(n: int, qmax: int, copies: int) -> float:
    """What the gradient of the alpha of a group of ``n`` elements is multiplied by."""
    return 1 / math.sqrt(copies * n * qmax) if copies else 1.0


def like(g: Tensor, x: Tensor) -> Tensor:
    """``g`` with the dtype and strides of ``x``."""
    if g.dtype == x.dtype and g.stride() == x.stride():
        return g
    return torch.empty_like(x).copy_(g)


@dataclass(frozen=True)
class Groups:
    """Which group an element belongs to: ``offset // inner % count``, where ``offset`` is its place in memory."""

    count: int = 1
    inner: int = 1


class DLSRule(NamedTuple):
    """The constants of a DLS quantizer, see ``quantizers/dls.py``."""

    bits: int
    qmin: int
    eps: float
    floor_first: bool
    """Published: alpha = min(max(alpha0, eps), ceiling); else max(min(alpha0, ceiling), eps)."""
    dead_pass: bool
    """The gradient of alpha reaches alpha0 also where the ceiling or eps decides."""
    scaled: bool
    """The gradient of alpha is divided by sqrt(copies * n * qmax), n the elements of a group."""
    copies: int = 1

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    def freedom(self, n: int) -> float:
        """What a group's sum of squares is divided by for its variance: one less than there are, by copy."""
        return max(n * self.copies - 1, 1) / self.copies

    def scale(self, n: int) -> float:
        """What the gradient of the alpha of a group of ``n`` elements is multiplied by."""
        return gradient_scale(n, self.qmax, self.copies if self.scaled else 0)


class ThresholdRule(NamedTuple):
    """The constants of a quantizer by thresholds, of one tensor with one group::

        u = clip((x + beta) / alpha, low, high)
        y = gamma * (code_min + number of thresholds < u) - beta

    with gradients of the line through the points ``(grid[i], code_min + i)``, of slope ``tail`` beyond them, and 0
    where ``low`` or ``high`` clips. Gradients of alpha, beta, gamma are plain sums. RFA: gamma is alpha, whose gradient
    is the sum of both.
    """

    levels: int
    code_min: int
    eps: float
    """What alpha and gamma are raised to, with gradient 1."""
    keep_sign: bool = False
    """Their magnitudes are raised, as ``quantizers.lsq.floored`` does."""
    tail: float = 0.0
    low: float = -3e38
    high: float = 3e38


@dataclass(frozen=True)
class Bank:
    """Weights that are quantized by one call. They lie end to end in flat tensors, as do each one's groups.

    ``x``, ``y``, ``g``: float32 (N,); alpha and beta: (G,), those of the first weight's groups first.
    """

    counts: tuple[int, ...]
    """Elements of each weight."""
    groups: tuple[int, ...]
    """Groups of each weight; they divide its count."""
    qmin: int
    qmax: int
    levels: int
    """0 for LSQ (rounds to even). ``2**bits`` for RFA: grids in order (W, levels), thresholds (W, levels - 1)."""
    scaled: bool
    """As of ``DLSRule``, for every group."""

    @property
    def flat(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int, bool]:
        return self.counts, self.groups, self.qmin, self.qmax, self.levels, self.scaled

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of one group of each weight."""
        return tuple(c // g for c, g in zip(self.counts, self.groups, strict=True))

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """What the gradient of each weight's alphas is multiplied by."""
        return tuple(gradient_scale(s, self.qmax, int(self.scaled)) for s in self.sizes)
