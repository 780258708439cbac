"""All weights of a model quantized by one call, where fused kernels serve; one by one else, to the same bits.

A model has hundreds of weights of a few thousand elements, each of which would cost twenty launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmquant.ops import quantize
from ssmquant.ops.quantize import Bank
from ssmquant.quantizers.lsq import LSQ
from ssmquant.quantizers.rfa import RFA, grid_thresholds, ordered_grid

__all__ = ["quantize_weights"]


class _BankFunction(torch.autograd.Function):
    """``tensors``: the weights, their alphas, their betas and, for RFA, their grids."""

    @staticmethod
    def forward(ctx: Any, bank: Bank, eps: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(bank.counts)
        weights = tensors[:count]
        x = torch.cat([w.reshape(-1) for w in weights])
        alpha, beta = torch.cat(tensors[count : 2 * count]), torch.cat(tensors[2 * count : 3 * count])
        grid = thresholds = alpha
        if bank.levels:
            grid = ordered_grid(torch.stack(tensors[3 * count :]))
            thresholds = grid_thresholds(grid)
        y = quantize.bank_forward(x, alpha, beta, thresholds, bank, eps)
        ctx.save_for_backward(x, alpha, beta, grid, thresholds)
        ctx.static = bank, eps, [w.shape for w in weights]
        return tuple(part.view(w.shape) for part, w in zip(y.split(bank.counts), weights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bank, eps, shapes = ctx.static
        g = torch.cat([grad.reshape(-1) for grad in grads])
        x, alpha, beta, grid, thresholds = ctx.saved_tensors
        dx, alpha, beta, grid = quantize.bank_backward(g, x, alpha, beta, grid, thresholds, bank, eps)
        parts = [part.view(shape) for part, shape in zip(dx.split(bank.counts), shapes, strict=True)]
        parts += [*alpha.split(bank.groups), *beta.split(bank.groups)]
        if bank.levels:
            parts += grid.unbind(0)
        return None, None, *parts


_Key = tuple[type, int, int, bool, float]


def _key(quantizer: Any, weight: Tensor) -> _Key | None:
    """What weights of one bank have in common; None for one that has to go alone."""
    if type(quantizer) not in (RFA, LSQ) or quantizer.bits is None or quantizer.official:
        return None
    if not quantizer._flags["initialized"] or weight.dtype != torch.float32:
        return None
    axis = quantizer._state_axis
    if axis is not None and axis % weight.dim() != 0:  # groups have to lie end to end
        return None
    return type(quantizer), quantizer.bits, quantizer.qmin, quantizer.scale_gradient, quantizer.eps


def quantize_weights(quantizers: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
    """``[q(w) for q, w in zip(quantizers, weights)]``, differentiable in weights and quantizers."""
    banks: dict[_Key, list[int]] = {}
    for i, (quantizer, weight) in enumerate(zip(quantizers, weights, strict=True)):
        key = _key(quantizer, weight)
        if key is not None and quantize.serves(weight, quantizer.alpha, quantizer.beta):
            banks.setdefault(key, []).append(i)
    out: list[Tensor | None] = [None] * len(weights)
    for (kind, bits, qmin, scaled, eps), members in banks.items():
        if len(members) < 2:
            continue
        some = [quantizers[i] for i in members]
        counts = tuple(weights[i].numel() for i in members)
        levels = 2**bits if kind is RFA else 0
        bank = Bank(counts, tuple(q.num_groups for q in some), qmin, qmin + 2**bits - 1, levels, scaled)
        tensors = [weights[i] for i in members] + [q.alpha for q in some] + [q.beta for q in some]
        tensors += [q.grid for q in some] if levels else []
        for i, value in zip(members, _BankFunction.apply(bank, eps, *tensors), strict=True):
            out[i] = value
    return [q(w) if value is None else value for q, w, value in zip(quantizers, weights, out, strict=True)]
