"""Launches of ``triton_threshold_kernels``: the quantizers that serve for comparison. Part of ``triton``."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmquant.ops.quantize import triton_threshold_kernels as kernels
from ssmquant.ops.quantize.forms import ThresholdRule, gradient_scale, like
from ssmquant.ops.quantize.triton_kernels import lsq_finish
from ssmquant.ops.triton_launch import Kernel, power

__all__ = ["pact_backward", "pact_forward", "soft_backward", "threshold_backward", "threshold_forward"]

_BLOCK = 2048
_PROGRAMS = 1024  # of a backward pass, at most
# Of the threshold quantizer's: an element a thread, as sums by level take 32 registers then, of 80; as many programs as
# an H100 runs at once.
_NARROW = 128
_NARROW_PROGRAMS = 768

_finish = Kernel(lsq_finish)
_pact_forward = Kernel(kernels.pact_forward)
_pact_backward = Kernel(kernels.pact_backward)
_soft_backward = Kernel(kernels.soft_backward)
_threshold_forward = Kernel(kernels.threshold_forward)
_threshold_backward = Kernel(kernels.threshold_backward)
_threshold_finish = Kernel(kernels.threshold_finish)


def _programs(n: int) -> int:
    return min(-(-n // _BLOCK), _PROGRAMS)


def _total(parts: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """The sum of all shares times ``scale``."""
    out = torch.empty(shape, dtype=torch.float32, device=parts.device)
    programs = parts.numel()
    _finish((1, 1, 1), (parts, out), (programs, scale), (power(programs),), 4)
    return out


def pact_forward(x: Tensor, alpha: Tensor, low: int, high: int, eps: float) -> Tensor:
    """The quantized values."""
    y = torch.empty_like(x)
    n = x.numel()
    numbers = n, float(low), float(high), 1 / high, eps
    _pact_forward((-(-n // _BLOCK), 1, 1), (x, alpha, y), numbers, (_BLOCK,), 8)
    return y


def pact_backward(g: Tensor, x: Tensor, alpha: Tensor, low: int, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and alpha."""
    dx = torch.empty_like(x)
    n = x.numel()
    programs = _programs(n)
    parts = torch.empty(programs, dtype=torch.float32, device=x.device)
    _pact_backward((programs, 1, 1), (like(g, x), x, alpha, dx, parts), (n, eps), (low < 0, _BLOCK), 8)
    return dx, _total(parts, 1.0, alpha.shape)


def soft_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float, copies: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and alpha."""
    dx = torch.empty_like(x)
    n = x.numel()
    programs = _programs(n)
    parts = torch.empty(programs, dtype=torch.float32, device=x.device)
    numbers = n, float(qmin), float(qmax), eps
    _soft_backward((programs, 1, 1), (like(g, x), x, alpha, beta, dx, parts), numbers, (_BLOCK,), 8)
    return dx, _total(parts, gradient_scale(n, qmax, copies), alpha.shape)


def threshold_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, thresholds: Tensor, rule: ThresholdRule
) -> Tensor:
    """The quantized values."""
    y = torch.empty_like(x)
    n = x.numel()
    numbers = n, rule.low, rule.high, float(rule.code_min), rule.eps
    tensors = x, alpha, beta, gamma, thresholds.contiguous(), y
    _threshold_forward((-(-n // _BLOCK), 1, 1), tensors, numbers, (rule.keep_sign, rule.levels, _BLOCK), 8)
    return y


def threshold_backward(
    g: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    grid: Tensor,
    thresholds: Tensor,
    rule: ThresholdRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, alpha, beta, gamma and the grid."""
    dx = torch.empty_like(x)
    n, levels = x.numel(), rule.levels
    programs = min(-(-n // _NARROW), _NARROW_PROGRAMS)
    parts = torch.empty((2 * levels + 4, programs), dtype=torch.float32, device=x.device)
    grid = grid.contiguous()
    tensors = like(g, x), x, alpha, beta, gamma, grid, thresholds.contiguous(), dx, parts
    numbers = n, rule.low, rule.high, float(rule.code_min), rule.tail, rule.eps
    _threshold_backward((programs, 1, 1), tensors, numbers, (rule.keep_sign, levels, _NARROW), 4)
    out = torch.empty(levels + 3, dtype=torch.float32, device=x.device)
    _threshold_finish(
        (levels + 3, 1, 1), (parts, grid, out), (programs, rule.tail), (levels, power(programs)), 4
    )
    dgrid, dalpha, dbeta, dgamma = out.split((levels, 1, 1, 1))
    return dx, dalpha.view(alpha.shape), dbeta.view(beta.shape), dgamma.view(gamma.shape), dgrid
