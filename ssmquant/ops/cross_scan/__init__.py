"""Cross-scan and cross-merge along any orders of pixels, each in one pass (VMamba, arXiv 2401.10166, has four orders).

Written with flips, transposes and ``cat``, the four sequences of an image cost some ten passes, and so does their sum.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Paths", "cross_merge", "cross_scan", "reorder"]


@dataclass(frozen=True, eq=False)
class Paths:
    """K orders of L pixels, (K, L) int32: ``order[k, l]`` is step l's pixel, ``step[k, p]`` pixel p's step."""

    order: Tensor
    step: Tensor

    @classmethod
    def of(cls, order: Tensor) -> Paths:
        """From the orders alone, (K, L), each row a permutation."""
        return cls(order.int().contiguous(), order.argsort(1).int().contiguous())


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _kernels(x: Tensor) -> Any:
    if x.is_cuda and _HAS_TRITON and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel():
        from ssmquant.ops.cross_scan import triton

        return triton
    return None


def _gather(x: Tensor, order: Tensor) -> Tensor:
    kernels = _kernels(x)
    if kernels is not None:
        out: Tensor = kernels.gather(x.contiguous(), order)
        return out
    x = x[:, None].expand(-1, len(order), -1, -1) if x.dim() == 3 else x
    return torch.stack([x[:, k].index_select(-1, order[k]) for k in range(len(order))], 1)


def _merge(y: Tensor, order: Tensor) -> Tensor:
    kernels = _kernels(y)
    if kernels is not None:
        out: Tensor = kernels.merge(y.contiguous(), order)
        return out
    y = torch.stack([y[:, k].index_select(-1, order[k]) for k in range(len(order))], 1)
    return y.sum(1, dtype=y.dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, paths: Paths) -> Tensor:
        ctx.paths = paths
        return _gather(x, paths.order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return cross_merge(g, ctx.paths), None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, paths: Paths) -> Tensor:
        ctx.paths = paths
        return _merge(y, paths.step)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return cross_scan(g, ctx.paths), None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, paths: Paths) -> Tensor:
        ctx.paths = paths
        return _gather(x, paths.order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return reorder(g, Paths(ctx.paths.step, ctx.paths.order)), None


def cross_scan(x: Tensor, paths: Paths) -> Tensor:
    """(B, C, L) -> (B, K, C, L): the pixels of each path in its order."""
    out: Tensor = _Scan.apply(x, paths)
    return out


def cross_merge(y: Tensor, paths: Paths) -> Tensor:
    """(B, K, C, L) -> (B, C, L): sequences back at their pixels, added in float32 (float64 for float64)."""
    out: Tensor = _Merge.apply(y, paths)
    return out


def reorder(x: Tensor, paths: Paths) -> Tensor:
    """(B, K, C, L) -> the same shape: what each path has at its pixels, in its order."""
    out: Tensor = _Reorder.apply(x, paths)
    return out
