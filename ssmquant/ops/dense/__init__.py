"""Linear maps and layer norms of thin layers over very many rows, in place of PyTorch's where those leave a GPU idle.

A weight gradient (N, K) of ``F.linear`` is one matrix product over all M rows. With N and K of some dozens that is a
tile or a few, hence as many busy processors; here rows are cut into pieces whose products run side by side. PyTorch's
layer norm spends a program on each row, whatever its length, and reads rows again for the gradients of its parameters;
here programs take many rows, and the backward pass reads once.

All functions do what they replace does for any input, autocast and second derivatives included.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ssmquant.ops.checks import recorded, without_autocast

__all__ = ["grouped_linear", "layer_norm", "linear", "serves", "shared_linear"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_TILE = 64  # of a matrix product's result, for a program
_PROGRAMS = 264  # two for each processor of an H100
_LEAST_ROWS, _LEAST_PIECE = 4096, 128

_WIDEST = 8192  # channels of a norm that a program holds
_MOST = 2**31 - 2**14  # kernels count elements in 32 bits


def serves(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor on a GPU, of float32 or less, and nothing traces or transforms its use.

    ``linear`` and ``layer_norm`` then take their own ways if the shapes, too, are of those that gain by it.
    """
    return _plain(x) and x.is_cuda


def _plain(*tensors: Tensor | None) -> bool:
    if recorded():
        return False
    return all(t is None or _ordinary(t) for t in tensors) and forward_ad._current_level < 0


def _ordinary(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.dtype in _DTYPES
        and t.layout == torch.strided
        and not t.is_nested
    )


# ---- linear --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _pieces(rows: int, n: int, k: int) -> int:
    """Into how many pieces to cut the rows of a weight gradient (n, k); 1 if it is well without."""
    tiles = -(-n // _TILE) * -(-k // _TILE)
    if rows < _LEAST_ROWS or not 0 < tiles < _TILE:
        return 1
    most = min(_PROGRAMS // tiles, rows // _LEAST_PIECE)
    return next((s for s in range(most, max(most // 2, 2) - 1, -1) if rows % s == 0), most)


def _pieces_for(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """As ``_pieces``; 1 also for what is left to ``F.linear`` for another reason."""
    if not (serves(x) and torch.is_grad_enabled() and _plain(weight, bias) and weight.requires_grad):
        return 1
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return 1
    if bias is not None and bias.shape != weight.shape[:1]:
        return 1
    mixed = weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)
    if mixed and not torch.is_autocast_enabled(x.device.type):
        return 1
    return _pieces(math.prod(x.shape[:-1]), *weight.shape)


def _products(g: Tensor, x: Tensor, pieces: int) -> Tensor:
    """The product g^T x, (N, K), of g (M, N) and x (M, K): pieces in their dtype, added in float32 or float64."""
    rows = len(g)
    size = rows // pieces
    whole = size * pieces
    g_pieces = g[:whole].view(pieces, size, g.shape[1]).transpose(1, 2)
    total = torch.bmm(g_pieces, x[:whole].view(pieces, size, x.shape[1])).sum(0, dtype=_wide(g))
    return total if whole == rows else total + g[whole:].t() @ x[whole:]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _DTYPES else x.dtype


class _Linear(torch.autograd.Function):
    """x (M, K), of the dtype to compute in; weight (N, K) and bias (N,) of any. Made of differentiable operations.

    x has to have two dimensions already: a view made in here could not be modified in place afterwards.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pieces = pieces
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Autocast would cast, too, but keep for the next call what is made here, cut off from the graph.
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        active = torch.is_autocast_enabled(g.device.type)
        with without_autocast(g.device) if active else contextlib.nullcontext():
            return (
                g @ weight.to(g.dtype) if need_x else None,
                _products(g, x, ctx.pieces).to(weight.dtype) if need_weight else None,
                g.sum(0, dtype=_wide(g)).to(ctx.bias_dtype) if need_bias else None,
                None,
            )


def _split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
    """``F.linear`` with the weight gradient in so many pieces."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if x.dim() == 2:
        out: Tensor = _Linear.apply(x, weight, bias, pieces)
        return out
    *batch, channels = x.shape
    y: Tensor = _Linear.apply(x.reshape(math.prod(batch), channels), weight, bias, pieces)
    return y.view(*batch, len(weight))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., K), weight (N, K), bias (N,) -> (..., N).

    Training on a GPU with many rows and a small weight, the weight gradient is a sum of products of pieces of the rows,
    added in float32 and, under autocast too, rounded to the weight's dtype only then.
    """
    pieces = _pieces_for(x, weight, bias)
    return F.linear(x, weight, bias) if pieces == 1 else _split_linear(x, weight, bias, pieces)


# Weights stand first in these products, so that L stays the last axis and nothing is transposed. They are expanded by
# hand: autocast then casts what is expanded, so that gradients are added over B in float32.


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``einsum("b k r l, k d r -> b k d l")``: x (B, G, R, L), weight (G, D, R) -> (B, G, D, L)."""
    return torch.matmul(weight.expand(len(x), -1, -1, -1), x)


def shared_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``einsum("b d l, k c d -> b k c l")``: x (B, D, L), weight (G, C, D) -> (B, G, C, L), contiguous."""
    groups, outputs, channels = weight.shape
    batch, _, length = x.shape
    # Not matmul, which would lay the weight out for each sample, or transpose x.
    y = torch.bmm(weight.reshape(1, groups * outputs, channels).expand(batch, -1, -1), x)
    return y.view(batch, groups, outputs, length)


# ---- layer norm ----------------------------------------------------------------------------------------------------


def _triton() -> ModuleType:
    from ssmquant.ops.dense import triton

    return triton


class _LayerNorm(torch.autograd.Function):
    """x contiguous; the result has ``dtype``. All of it in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        y, mean, rstd = _triton().norm_forward(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        # A graph of this pass may be wanted, or g stand for many gradients, without a memory of its own.
        if torch.is_grad_enabled() or not (_plain(g) and torch._C._has_storage(g)):
            wide = [None if t is None else t.float() for t in (weight, bias)]
            grads = torch.ops.aten.native_layer_norm_backward(
                g.float(), x.float(), x.shape[-1:], mean, rstd, *wide, ctx.needs_input_grad[:3]
            )
        else:
            grads = _triton().norm_backward(g.contiguous(), x, weight, mean, rstd)
        pairs = zip(grads, (x, weight, bias), strict=True)
        return (*(None if t is None or like is None else t.to(like.dtype) for t, like in pairs), None, None)


def _norm_serves(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> bool:
    if not (_HAS_TRITON and serves(x) and _plain(weight, bias) and 0 < x.numel() < _MOST):
        return False
    if tuple(normalized_shape) != x.shape[-1:] or x.shape[-1] > _WIDEST:
        return False
    if (weight is None) != (bias is None):
        return False
    if any(
        t is not None
        and (t.shape != x.shape[-1:] or t.device != x.device or t.dtype not in (torch.float32, x.dtype))
        for t in (weight, bias)
    ):
        return False
    from ssmquant.ops.quantize.triton import unavailable

    return unavailable(x.device) is None


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``: x (..., *normalized_shape), weight and bias as that shape.

    On a GPU norms over the last axis alone, with both parameters or none, are two Triton kernels and a sum.
    """
    if not _norm_serves(x, normalized_shape, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    out: Tensor = _LayerNorm.apply(x.contiguous(), weight, bias, eps, dtype)
    return out
