"""The arithmetic of an affine quantizer, and the encoded form of a tensor.

Forward, encode and decode go through the same two functions, :func:`affine_index` and :func:`affine_decode`, in the
same order of operations; that is what makes ``encode(x).decode()`` equal the evaluation forward bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

__all__ = [
    "Affine",
    "QTensor",
    "affine_decode",
    "affine_index",
    "compute_dtype",
    "group_dims",
    "group_sum",
    "in_dtype",
    "once_differentiable",
]


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor as integer codes and the affine map that decodes them.

    ``decode() = clip(scale * (codes + code_min) - shift, lo, hi)``. ``scale``, ``shift``, ``lo`` and ``hi``
    have one element a group, in the compute dtype (float32, or float64 for float64 data), broadcastable to
    ``codes``.
    """

    codes: Tensor
    """uint8 in offset binary: ``0 .. 2**bits - 1``, of the original tensor's shape."""
    bits: int
    code_min: int
    """The integer that code 0 stands for: ``-2**(bits-1)``, or 0 for unsigned quantizers."""
    scale: Tensor
    shift: Tensor
    lo: Tensor | None
    """Lower end clamp (DLS), or None."""
    hi: Tensor | None
    dtype: torch.dtype
    """What :meth:`decode` returns."""

    def decode(self) -> Tensor:
        """Return the values, shape of ``codes``, dtype ``dtype``."""
        index = self.codes.to(self.scale.dtype)
        return affine_decode(index, Affine(self.scale, self.shift, self.lo, self.hi), self.code_min).to(
            self.dtype
        )

    @property
    def levels(self) -> Tensor:
        """All values that a group can take, ``(groups, 2**bits)`` of dtype ``dtype``, computed on demand."""
        index = torch.arange(2**self.bits, dtype=self.scale.dtype, device=self.scale.device)
        column = (None if t is None else t.reshape(-1, 1) for t in (self.scale, self.shift, self.lo, self.hi))
        return affine_decode(index, Affine(*column), self.code_min).to(self.dtype)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Affine:
    """The map of one call between values and codes: tensors of one element a group, broadcastable to the data."""

    scale: Tensor
    shift: Tensor
    lo: Tensor | None = None
    hi: Tensor | None = None


def affine_index(x: Tensor, scale: Tensor, shift: Tensor, qmin: int, qmax: int) -> Tensor:
    """Nearest code index ``0 .. qmax - qmin`` as floats (ties to even, NaN stays NaN)."""
    return ((x + shift) / scale).clamp(qmin, qmax).round() - qmin


def affine_decode(index: Tensor, affine: Affine, code_min: int) -> Tensor:
    """``clip(scale * (index + code_min) - shift, lo, hi)``; adding ``code_min`` turns -0.0 into 0.0."""
    y = (index + code_min) * affine.scale - affine.shift
    return y if affine.lo is None else y.clamp(affine.lo, affine.hi)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without the call where there is nothing to do.

    At the end of an ``autograd.Function``'s forward such a call loses the gradient of the input under
    ``torch.compile`` of PyTorch 2.11, without an error.
    """
    return x if x.dtype == dtype else x.to(dtype)


def group_dims(ndim: int, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Dimensions that a per-group reduction runs over: all but ``axis``, or those."""
    axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
    kept = {a % ndim for a in axes} if ndim else set()
    return tuple(d for d in range(ndim) if d not in kept)


def group_sum(t: Tensor, axis: int | tuple[int, ...] | None) -> Tensor:
    """Sum of every group: shape ``()`` if ``axis`` is None or (), else all dimensions but ``axis`` reduced to 1."""
    if axis is None or axis == ():
        return t.sum()
    dims = group_dims(t.dim(), axis)
    return t.sum(dims, keepdim=True) if dims else t  # an empty tuple would mean all dimensions


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator of torch, at no cost in a backward pass that is not itself differentiated (grad mode is off)."""
    guarded = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
