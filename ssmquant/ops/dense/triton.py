"""Layer norm on a GPU by Triton: each pass reads its operands once, many short rows to a program.

Gradients of weight and bias are added up by each program over its rows, then over programs, both in a fixed order:
results are reproducible bit for bit. Import this module only where Triton is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmquant.ops.dense import triton_kernels as kernels
from ssmquant.ops.triton_launch import Kernel, power

__all__ = ["norm_backward", "norm_forward"]

_FORWARD_TILE, _BACKWARD_TILE = 2048, 1024  # elements of a program, at a time; more if a row has more
_PROGRAMS = 528  # of the backward pass, at most: four for each processor of an H100

_norm_forward = Kernel(kernels.norm_forward, exact=False)
_norm_backward = Kernel(kernels.norm_backward, exact=False)


def _tile(channels: int, elements: int) -> tuple[int, int, int]:
    """Rows of a tile, its columns, and how many warps it is for."""
    columns = max(16, power(channels))
    rows = max(1, elements // columns)
    return rows, columns, max(1, min(16, rows * columns // 256))


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm over C of a contiguous x (..., C), of ``dtype``; mean and 1 / deviation, (..., 1) float32."""
    channels = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows, columns, warps = _tile(channels, _FORWARD_TILE)
    affine = weight is not None
    parameters = [x if t is None else t.contiguous() for t in (weight, bias)]
    _norm_forward(
        (-(-mean.numel() // rows), 1, 1), (x, *parameters, y, mean, rstd), (mean.numel(), float(eps)),
        (channels, affine, rows, columns), warps, (parameters[0].dtype, dtype),
    )  # fmt: skip
    return y, mean, rstd


def norm_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of x, in its dtype, and those of weight and bias, float32. All contiguous."""
    channels = x.shape[-1]
    dx = torch.empty_like(x)
    rows, columns, warps = _tile(channels, _BACKWARD_TILE)
    programs = min(-(-mean.numel() // rows), _PROGRAMS)
    affine = weight is not None
    parts = torch.empty((2, programs, channels), dtype=torch.float32, device=x.device) if affine else mean
    parameter = x if weight is None else weight.contiguous()
    _norm_backward(
        (programs, 1, 1), (g, x, parameter, mean, rstd, dx, parts), (mean.numel(),),
        (channels, affine, rows, columns), warps, (x.dtype, parameter.dtype),
    )  # fmt: skip
    if not affine:
        return dx, None, None
    total = parts.sum(1)
    return dx, total[0], total[1]
