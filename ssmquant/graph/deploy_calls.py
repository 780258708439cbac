"""What the nodes of a deployed graph call: ``modules.deployed``, for what its kernels take.

Raises ``Unfit`` where they do not take it, for the graph that is not fused to run instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.graph.orders import Unfit
from ssmquant.modules import PackedTensor, deployed
from ssmquant.ops.deployed import cpu
from ssmquant.quantizers.bank import hooks_of

__all__ = [
    "FLOAT_CONV",
    "blend_call",
    "conv2d_call",
    "excite_call",
    "float_conv2d_call",
    "gated_linear_call",
    "image_of",
    "linear_call",
]

FLOAT_CONV = "TF32 products where allowed"
"""What a float convolution is by a kernel."""


def linear_call(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    norm: deployed.LastNorm,
    act: deployed.Act,
    axis: int,
    residual: deployed.Residual = None,
    coded: bool = False,
    **between: Any,
) -> Any:
    """``deployed.linear`` in a graph; ``coded``: x is codes; ``between``: what else later passes add."""
    more = between.get("more", ())
    _check(x, *(residual or ())[:1], *more, coded=coded)
    _check_inputs(x, weight)
    _check_shapes((*x.shape[:-1], weight.shape[0]), residual, x, *more)
    if between.get("blended") is not None:
        between["blended"] = _blended(x, *between["blended"])
    return deployed.linear(x, of_x, weight, bias, norm, act, axis, residual, **between)


def gated_linear_call(
    x: Tensor,
    z: Tensor,
    norm: deployed.LastNorm,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    residual: deployed.Residual = None,
    **between: Any,
) -> Any:
    """``deployed.gated_linear`` in a graph."""
    more = between.get("more", ())
    _check(x, z, *(residual or ())[:1], *more)
    _check_inputs(x, weight)
    _check_shapes((*x.shape[:-1], weight.shape[0]), residual, x, z, *more)
    return deployed.gated_linear(x, z, norm, of_x, weight, bias, residual, **between)


def conv2d_call(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    window: deployed.Window,
    act: deployed.Act,
    last: bool,
    gain: Tensor | None = None,
    residual: deployed.Residual = None,
    coded: bool = False,
    **between: Any,
) -> Any:
    """``deployed.conv2d`` in a graph; ``last``: channels may come last in memory."""
    _check(x, *(residual or ())[:1], coded=coded)
    stride, padding, dilation = window
    sizes = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    size = cpu.conv_size(sizes, weight.shape[2:] or (1, 1), dilation, stride)
    if min(size) < 1:
        raise Unfit
    _check_shapes((len(x), weight.shape[0], *size), residual)
    y = deployed.conv2d(x, of_x, weight, bias, window, act, gain, residual, **between)
    return y if last else y.contiguous()


def float_conv2d_call(
    x: Tensor, layer: deployed.FloatConv, last: bool, residual: Tensor | None = None
) -> Tensor:
    """``deployed.float_conv2d`` in a graph; ``last``: channels may come last in memory."""
    y = deployed.float_conv2d(x, layer, residual, last)
    return y if last else y.contiguous()


def image_of(rows: Tensor, height: int, width: int) -> Tensor:
    """(B, C, height, width) of its pixels as rows, (B, height * width, C)."""
    if rows.shape[1] != height * width:
        raise Unfit
    return rows.transpose(1, 2).unflatten(2, (height, width))


def blend_call(x: Tensor, gain: Tensor | None, v: Tensor, scale: Tensor) -> Tensor:
    """``deployed.blend`` in a graph: v and scale, (B, C, 1, 1), of an image with channels last."""
    _check_blend(x, v, scale)
    return deployed.blend(x, gain, v, scale)


def _blended(x: Tensor, gain: Tensor | None, v: Tensor, scale: Any) -> deployed.Blended:
    """For ``deployed.linear``; instead of the scale there may be what ``excite_call`` makes it of, v first."""
    if isinstance(scale, tuple):
        image, *modules, parts = scale
        _check_attention(image, modules)
        if parts is not None and not any(map(hooks_of, modules)):
            _check(x, v, parts)
            if x.shape != v.shape:
                raise Unfit
            return gain, v, (modules[1], modules[3], parts)
        scale = excite_call(image, *modules, parts=parts)
    _check_blend(x, v, scale)
    return gain, v, scale


def _check_blend(x: Tensor, v: Tensor, scale: Tensor) -> None:
    _check(x, v, scale)
    if scale.shape != (*v.shape[:1], v.shape[-1], 1, 1) or x.shape != v.shape:
        raise Unfit


def excite_call(x: Tensor, *modules: Any, parts: Tensor | None = None) -> Tensor:
    """Channel attention: mean, convolution, ReLU, convolution, sigmoid; ``parts``: sums that came with x."""
    if any(map(hooks_of, modules)):
        for module in modules:
            x = module(x)
        return x
    _check_attention(x, modules)
    return deployed.excite(x, modules[1], modules[3], parts)


def _check_attention(x: Tensor, modules: Any) -> None:
    if x.dim() != 4 or any(modules[i].weight.dtype != torch.float32 for i in (1, 3)):
        raise Unfit
    _check(x)


def _check(first: Tensor, *tensors: Any, coded: bool = False) -> None:
    """The kernels are for float32, the first one's codes if another kernel has written them, and for something."""
    if first.dtype != (torch.int8 if coded else torch.float32):
        raise Unfit
    if any(t.dtype != torch.float32 for t in tensors) or not all(t.numel() for t in (first, *tensors)):
        raise Unfit


def _check_inputs(x: Tensor, weight: PackedTensor) -> None:
    """A last axis may depend on the data's sizes."""
    if x.shape[-1] != weight.shape[1]:
        raise Unfit


def _check_shapes(shape: tuple[int, ...], residual: deployed.Residual, *alike: Tensor) -> None:
    """At the sizes of the trace an axis of 1 may hide that a sum is one of tensors of other shapes."""
    if residual is not None and residual[0].shape != shape:
        raise Unfit
    if any(t.shape != alike[0].shape for t in alike):
        raise Unfit
