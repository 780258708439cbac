"""Norms over the last axis, and activations, as kernels of deployed models take them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.modules.deployed_convs import convolved
from ssmquant.modules.deployed_values import bias_of, dense, engine_of, in_a_call
from ssmquant.ops.deployed import Norm
from ssmquant.quantizers.bank import hooks_of

__all__ = [
    "NORMS",
    "NORM_FUNCTIONS",
    "Act",
    "LastNorm",
    "fused_norm",
    "is_plain",
    "normalize",
    "operand_of",
    "own_name",
]

Act = nn.Module | str | None
"""``"silu"`` or ``"gelu"``, or a module that was one of these when the graph was made."""
LastNorm = tuple[Any, ...] | None
"""None, ``(module,)``, or ``(rms, weight, bias, eps)``: a norm over the last axis. ``(gain,)``: factors alone, a tensor
or one number for all."""
NORMS = nn.LayerNorm, nn.RMSNorm
NORM_FUNCTIONS = F.layer_norm, F.rms_norm, torch.rms_norm


def _norm_of(norm: LastNorm, dtype: torch.dtype) -> tuple[bool, Any, Any, Any] | None:
    """(rms, weight, bias, eps) of a norm that kernels take; None if it has to be called."""
    assert norm is not None
    if len(norm) == 1:
        module = norm[0]
        if hooks_of(module):
            return None
        rms = type(module) is nn.RMSNorm
        weight, bias, eps = module.weight, None if rms else module.bias, module.eps
    else:
        rms, weight, bias, eps = norm
    fits = all(t is None or t.dtype == dtype for t in (weight, bias))
    return (rms, weight, bias, eps) if fits else None


def _as_kernels_take(found: tuple[bool, Any, Any, Any], dtype: torch.dtype) -> Norm:
    rms, weight, bias, eps = found
    weight, bias = (None if t is None else t.detach().contiguous() for t in (weight, bias))
    return Norm(weight, bias, torch.finfo(dtype).eps if eps is None else eps, rms)


def _plainly(norm: tuple[Any, ...], x: Tensor) -> Tensor:
    """By PyTorch."""
    if len(norm) == 1:
        y: Tensor = norm[0](x)
        return y
    rms, weight, bias, eps = norm
    shape = x.shape[-1:]
    return F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)


def normalize(
    x: Tensor, norm: tuple[Any, ...], convolution: nn.Conv2d | None = None, act: Act = None, axis: int = -1
) -> Tensor:
    """A norm over the last axis (a ``LastNorm``) of x with any strides: contiguous.

    Args:
        convolution: then x is its input, (B, C, H, W), and the norm is over the channels of its output: (B, H, W, C).
        act: of the result.
        axis: where a module of that has the channels, if it has to be called.

    What is watched by hooks, or not what kernels take, is called as ever.
    """
    bias = None
    if convolution is not None:
        c, image = convolution, convolved(x, convolution)
        if image is None and not hooks_of(c):  # PyTorch adds a bias in a pass of its own
            bias = c.bias
            image = F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups)
        x = (c(x) if image is None else image).permute(0, 2, 3, 1)
    own = own_name(act)
    y = _by_kernel(x, norm, bias, own)
    if y is None:
        y, own = _plainly(norm, x if bias is None else x + bias.to(x.dtype)), None
    if act is None or own is not None:
        return y
    if isinstance(act, str):
        return F.silu(y) if act == "silu" else F.gelu(y)
    made: Tensor = act(y.movedim(-1, axis)).movedim(axis, -1)
    return made


def _by_kernel(x: Tensor, norm: tuple[Any, ...], bias: Tensor | None, act: str | None) -> Tensor | None:
    """``normalize`` of x and a bias by a kernel; None where it does not serve."""
    engine = engine_of(x.device)
    found = _norm_of(norm, torch.float32) if hasattr(engine, "normalize") and x.dim() else None
    if found is None:
        return None
    fits = all(t is None or t.shape == x.shape[-1:] for t in found[1:3])
    if len(norm) == 1:
        fits = fits and tuple(norm[0].normalized_shape) == x.shape[-1:]
    fits = fits and (bias is None or bias.dtype == torch.float32)
    rows = x[(None,) * (3 - x.dim())] if x.dim() < 3 else x.flatten(1, -2)
    if not fits or not engine.normalizes(rows):
        return None
    made: Tensor = engine.normalize(rows, _as_kernels_take(found, x.dtype), bias_of(bias), act)
    return made.view(x.shape)


def fused_norm(
    norm: LastNorm, x: Tensor, more: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Norm | None, tuple[Tensor, ...]]:
    """The norm for a kernel, and ``x`` with columns next to each other; or no norm any more, and its result.

    ``more``: what is added to x before; empty if that has been done.
    """
    if norm is None:
        return x, None, more
    operand = operand_of(norm, x.shape[-1], x.dtype, x.device)
    if operand is None:
        return _plainly(norm, sum(more, x)), None, ()
    return dense(x), operand, tuple(map(dense, more))


def operand_of(norm: LastNorm, size: int, dtype: torch.dtype, device: torch.device) -> Norm | None:
    """A norm of so many columns for a kernel; None for none, or if it has to be called."""
    if norm is None:
        return None
    gain = norm[0]
    if isinstance(gain, float):
        number = gain
        gain = in_a_call(("factor", number, size, device), lambda: torch.full((size,), number, device=device))
    if isinstance(gain, Tensor):
        return Norm(gain.to(dtype).contiguous(), None, 0.0, factors=True)
    found = _norm_of(norm, dtype)
    return None if found is None else _as_kernels_take(found, dtype)


def is_plain(norm: LastNorm, act: Act) -> bool:
    """Whether kernels take a norm of float32 and an activation, or what there is of them."""
    if isinstance(act, nn.Module) and own_name(act) is None:
        return False
    return norm is None or isinstance(norm[0], (float, Tensor)) or _norm_of(norm, torch.float32) is not None


def own_name(act: Act) -> str | None:
    """The kernels' name of an activation; None where there is none, or its module has to be called."""
    if act is None or isinstance(act, str):
        return act
    if hooks_of(act) or getattr(act, "approximate", "none") != "none":
        return None
    return "gelu" if type(act) is nn.GELU else "silu" if type(act) is nn.SiLU else None
