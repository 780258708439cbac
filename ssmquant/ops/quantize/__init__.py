"""Fused fake quantization: a pass or two over memory where plain PyTorch takes dozens. Used where it serves.

``serving`` finds the back end ("triton" on a GPU, "cpu"), a module with the functions of ``forms``, without gradients;
``use_backend("chunked", op="quantize")`` turns them off. While a graph is recorded it is ``operators``, the same as
operators of ``torch.ops.ssmquant``; otherwise kernels are called at once, as an operator in Python costs as much as a
small kernel. A quantizer asks once, and its backward pass goes to what its forward pass went to.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ssmquant.ops.checks import recorded
from ssmquant.ops.quantize import operators
from ssmquant.ops.quantize.choice import backend, explain
from ssmquant.ops.quantize.forms import MOST_LEVELS, Bank, DLSRule, Groups, ThresholdRule

__all__ = [
    "MOST",
    "MOST_LEVELS",
    "Bank",
    "DLSRule",
    "Groups",
    "ThresholdRule",
    "dense",
    "explain",
    "groups_of",
    "offering",
    "serving",
]

_HALVES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 2**31 - 2**14
"""Elements that kernels can count, in 32 bits."""
_PLAIN = (Tensor, nn.Parameter)  # any other class traces or replaces tensors
_WHOLE = Groups()


def _there(kind: str, index: int | None) -> bool:
    return backend(torch.device(kind) if index is None else torch.device(kind, index)) is not None


# torch.compiler.assume_constant_result, which would import all of torch._dynamo, and Triton with it.
_there._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serving(x: Tensor, *scalars: Tensor) -> ModuleType | None:
    """The kernels that compute with ``x`` and float32 ``scalars``; None if there are none."""
    device = x.device
    if x.dtype not in _HALVES or not 0 < x.numel() <= MOST:
        return None
    for scalar in scalars:
        if scalar.dtype != torch.float32 or scalar.device != device:
            return None
    if recorded() or type(x) not in _PLAIN:
        there = device.type in ("cpu", "cuda") and _there(device.type, device.index)
        return operators if there else None
    return backend(device)


def offering(name: str, x: Tensor, *scalars: Tensor) -> ModuleType | None:
    """``serving``, but None also where those kernels have no function of that name, which not every back end has."""
    kernels = serving(x, *scalars)
    return kernels if hasattr(kernels, name) else None


def dense(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if it does not lie densely in memory (``forms``)."""
    if x.is_contiguous() or recorded():
        return x.contiguous()
    strides = sorted(((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1))
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def groups_of(x: Tensor, axis: int | None) -> Groups:
    """Groups along ``axis`` of a dense tensor, or one of all."""
    if axis is None or x.shape[axis] == 1:
        return _WHOLE
    return Groups(x.shape[axis], x.stride(axis))
