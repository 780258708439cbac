"""Float convolutions of a deployed graph: by a kernel of the engine where it has one, else by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.modules.deployed_values import bias_of, engine_of, made_of
from ssmquant.ops.deployed.cuda_conv import is_small_window
from ssmquant.quantizers.bank import hooks_of

__all__ = ["FloatConv", "convolved", "float_conv2d", "is_plain_conv"]

Pair = tuple[int, int]
Given = tuple[Tensor, Tensor | None, Pair, Pair, Pair]
FloatConv = nn.Conv2d | Given
"""A module, or weight, bias, stride, padding and dilation of ``F.conv2d`` with one group."""


def float_conv2d(x: Tensor, layer: FloatConv, residual: Tensor | None = None, last: bool = True) -> Tensor:
    """A convolution of x, (B, C, H, W) with any strides, and the sum of its result with ``residual``.

    By PyTorch what is watched by hooks, or no case for the kernel: it would be of less precision than
    ``torch.backends.cudnn`` allows, say. ``last``: whether channels come last in memory, if it is by the kernel.
    """
    y = convolved(x, layer, residual, last)
    if y is not None:
        return y
    y = layer(x) if isinstance(layer, nn.Conv2d) else F.conv2d(x, *layer)
    return y if residual is None else y + residual


def convolved(
    x: Tensor, layer: FloatConv, residual: Tensor | None = None, last: bool = True
) -> Tensor | None:
    """``float_conv2d`` by the kernel; None where it does not serve."""
    given = _given(layer)
    engine = engine_of(x.device)
    if given is None or not hasattr(engine, "convolve_floats") or not _allows_tf32():
        return None
    weight, bias, *window = given
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if not engine.convolves_floats(x, weight, bias, *window, residual):
        return None
    taps = made_of(weight, "taps", engine.taps_of)
    made: Tensor = engine.convolve_floats(x, taps, bias_of(bias), weight.shape[2:], *window, residual, last)
    return made


def _given(layer: FloatConv) -> Given | None:
    """None for a module that has to be called."""
    if not isinstance(layer, nn.Conv2d):
        return layer
    if hooks_of(layer) or not is_plain_conv(layer):
        return None
    assert not isinstance(layer.padding, str)
    pairs = ((t[0], t[1]) for t in (layer.stride, layer.padding, layer.dilation))
    stride, padding, dilation = pairs
    return layer.weight, layer.bias, stride, padding, dilation


def is_plain_conv(layer: nn.Conv2d) -> bool:
    """Whether a module computes what the kernel is for: one group, padding of zeros by numbers, a small window."""
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and is_small_window(layer.weight.shape)


def _allows_tf32() -> bool:
    """Whether PyTorch's own float32 convolutions may use TF32 on a GPU.

    ``allow_tf32`` is an older name of the same, whose value cannot be asked for once the newer one has been set.
    """
    cudnn = torch.backends.cudnn
    allowed: str = cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return bool(cudnn.enabled) and allowed == "tf32"
