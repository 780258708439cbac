"""What the fused kernels of fake quantization are asked for. Each back end (``triton``, ``cpu``) has these functions::

    unavailable(device) -> str | None           why it cannot serve there
    lsq_forward(x, alpha, beta, qmin, qmax, eps) -> y
    lsq_backward(g, x, alpha, beta, qmin, qmax, eps, scale) -> dx, d alpha, d beta
    dls_range(x, w, v, groups, rule) -> ranges
    dls_forward(x, w, v, groups, rule) -> y, ranges
    dls_backward(g, x, w, v, ranges, groups, rule, need_x) -> dx (empty unless need_x), d w, d v
    bank_forward(x, alpha, beta, thresholds, bank, eps) -> y
    bank_backward(g, x, alpha, beta, grid, thresholds, bank, eps) -> dx, d alpha, d beta, d grid (empty for LSQ)

Activations ``x`` are float32, float16 or bfloat16 and lie densely in memory, in any order of dimensions; ``y``, ``g``
and ``dx`` have the strides of ``x``. Scalars (alpha, beta of one element; w, v ``(4,)``) and arithmetic are float32, in
the order of operations of ``quantizers/affine.py``, without contraction to fused multiply-adds: codes and values equal
those of the quantizers' own arithmetic bit for bit, given the same alpha and beta. No function synchronises with the
host, all of them give the same bits from run to run. ``eps``: what the magnitude of alpha is raised to, its sign kept
(``quantizers.lsq.floored``), with gradient 1. ``scale``: what the gradient of alpha is multiplied by.

``ranges``, (6, G), are mean, standard deviation (0 for one element), min, max, alpha and beta of every group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Bank", "DLSRule", "Groups"]


@dataclass(frozen=True)
class Groups:
    """Which group an element belongs to: ``offset // inner % count``, where ``offset`` is its place in memory."""

    count: int = 1
    inner: int = 1

    @property
    def flat(self) -> tuple[int, int]:
        return self.count, self.inner


@dataclass(frozen=True)
class DLSRule:
    """The constants of a DLS quantizer, see ``quantizers/dls.py``."""

    bits: int
    qmin: int
    eps: float
    floor_first: bool
    """Published: alpha = min(max(alpha0, eps), ceiling); else max(min(alpha0, ceiling), eps)."""
    dead_pass: bool
    """The gradient of alpha reaches alpha0 also where the ceiling or eps decides."""
    scaled: bool
    """The gradient of alpha is divided by sqrt(n * qmax), n the elements of a group."""

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    @property
    def flat(self) -> tuple[int, int, float, bool, bool, bool]:
        return self.bits, self.qmin, self.eps, self.floor_first, self.dead_pass, self.scaled


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
        return tuple(1 / math.sqrt(s * self.qmax) if self.scaled else 1.0 for s in self.sizes)
