"""How Mamba's own parameters start, as in arXiv 2312.00752. On the meta device, which holds no values, nothing happens:
in-place functions of meta tensors would import half of PyTorch's compiler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["s4d_real_", "step_sizes_"]


@torch.no_grad()
def step_sizes_(bias: Tensor, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> None:
    """Biases whose softplus, the step size, is log-uniform in [low, high]."""
    if not bias.is_meta:
        span = math.log(high) - math.log(low)
        dt = torch.rand_like(bias).mul_(span).add_(math.log(low)).exp_().clamp_(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def s4d_real_(a_log: Tensor) -> None:
    """(.., states): the logarithms of 1, 2, .., states (S4D-real)."""
    if not a_log.is_meta:
        states = torch.arange(1, a_log.shape[-1] + 1, device=a_log.device)
        a_log.copy_(states.log().expand_as(a_log))
