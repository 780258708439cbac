"""All weights of a model quantized by one call, where fused kernels serve; one by one else, to the same bits.

A model has hundreds of weights of a few thousand elements, each of which would cost twenty launches; likewise its
static operands of scans, of a few hundred. (What DLS takes from sums may differ in the last bits on a GPU.)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.ops import quantize
from ssmquant.ops.quantize import Bank, DLSRule
from ssmquant.quantizers.affine import once_differentiable
from ssmquant.quantizers.affine_fit import Shift, shift_of
from ssmquant.quantizers.dls import DLS
from ssmquant.quantizers.lsq import LSQ, floored
from ssmquant.quantizers.rfa import RFA, grid_thresholds, ordered_grid

__all__ = ["hooks_of", "quantize_weights"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """What a call of a module does besides the forward of its class: the numbers of its hooks, a forward of its own."""
    own = module.__dict__
    if not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):  # as nearly always, for hundreds of modules a call
        return (own["forward"],) if "forward" in own else ()
    found = [number for name in _HOOKS for number in own[name]]
    return (*found, own["forward"]) if "forward" in own else tuple(found)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _shaped(x: Tensor, counts: tuple[int, ...], shapes: Sequence[torch.Size]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(x.split(counts), shapes, strict=True)]


class _BankFunction(torch.autograd.Function):
    """``tensors``: the weights, their alphas, their betas (if they are learned) and, for RFA, their grids."""

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, bank: Bank, shift: Shift, eps: float, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(bank.counts)
        x, shapes = _flat(tensors[:count]), [w.shape for w in tensors[:count]]
        alpha, rest = torch.cat(tensors[count : 2 * count]), tensors[2 * count :]
        if shift == "learned":
            beta, rest = torch.cat(rest[:count]), rest[count:]
        else:
            beta = shift_of(floored(alpha, eps), shift)
        grid = thresholds = alpha
        if bank.levels:
            grid = ordered_grid(torch.stack(rest))
            thresholds = grid_thresholds(grid)
        y = kernels.bank_forward(x, alpha, beta, thresholds, bank, eps)
        ctx.save_for_backward(x, alpha, beta, grid, thresholds)
        ctx.static = kernels, bank, shift, eps, shapes
        return tuple(_shaped(y, bank.counts, shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, bank, shift, eps, shapes = ctx.static
        dx, alpha, beta, grid = kernels.bank_backward(_flat(grads), *ctx.saved_tensors, bank, eps)
        parts = _shaped(dx, bank.counts, shapes)
        if shift == "learned":
            parts += [*alpha.split(bank.groups), *beta.split(bank.groups)]
        else:
            parts += (alpha + shift_of(beta, shift)).split(bank.groups)
        if bank.levels:
            parts += grid.unbind(0)
        return None, None, None, None, *parts


class _DLSBankFunction(torch.autograd.Function):
    """``tensors``: the values, their w and their v."""

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, counts: tuple[int, ...], rule: DLSRule, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(counts)
        x, shapes = _flat(tensors[:count]), [t.shape for t in tensors[:count]]
        w, v = torch.stack(tensors[count:]).view(2, count, 4).unbind(0)
        y, ranges = kernels.dls_bank_forward(x, w, v, counts, rule)
        ctx.save_for_backward(x, w, v, ranges)
        ctx.static = kernels, counts, rule, shapes
        return tuple(_shaped(y, counts, shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, counts, rule, shapes = ctx.static
        dx, dw, dv = kernels.dls_bank_backward(_flat(grads), *ctx.saved_tensors, counts, rule)
        return None, None, None, *_shaped(dx, counts, shapes), *dw.unbind(0), *dv.unbind(0)


def _operands(quantizer: Any) -> tuple[Tensor, ...]:
    """What enters the arithmetic besides the weight."""
    if isinstance(quantizer, DLS):
        return quantizer.w, quantizer.v
    scalars = (quantizer.alpha, quantizer.beta) if quantizer.shift == "learned" else (quantizer.alpha,)
    return (*scalars, quantizer.grid) if isinstance(quantizer, RFA) else scalars


_Key = tuple[Any, ...]


def _key(quantizer: Any, weight: Tensor) -> _Key | None:
    """What tensors of one bank have in common; None for one that has to go alone."""
    kind = type(quantizer)
    if kind not in (LSQ, RFA, DLS) or quantizer.bits is None or quantizer.official:
        return None
    if hooks_of(quantizer):  # they want to see a call
        return None
    if weight.dtype != torch.float32 or not weight.numel():
        return None
    if kind is DLS:
        return None if quantizer.axis is not None else (kind, weight.device, *quantizer._rule(1))
    if not quantizer._flags["initialized"]:
        return None
    if quantizer.num_groups > 1 and quantizer.axis % weight.dim() != 0:  # groups have to lie end to end
        return None
    static = quantizer.bits, quantizer.qmin, quantizer.scale_gradient, quantizer.shift, quantizer.eps
    return kind, weight.device, *static


def quantize_weights(quantizers: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
    """``[q(w) for q, w in zip(quantizers, weights)]``, differentiable in weights and quantizers."""
    banks: dict[_Key, list[int]] = {}
    for i, (quantizer, weight) in enumerate(zip(quantizers, weights, strict=True)):
        key = _key(quantizer, weight)
        if key is not None:
            banks.setdefault(key, []).append(i)
    out: list[Tensor | None] = [None] * len(weights)
    for (kind, _, *rest), members in banks.items():
        some = [weights[i] for i in members]
        state = [t for same in zip(*(_operands(quantizers[i]) for i in members), strict=True) for t in same]
        counts = tuple(w.numel() for w in some)
        if len(members) < 2 or sum(counts) > quantize.MOST:
            continue
        kernels = quantize.serving(some[0], *state)
        if kernels is None:
            continue
        if kind is DLS:
            values = _DLSBankFunction.apply(kernels, counts, DLSRule(*rest), *some, *state)
        else:
            bits, qmin, scaled, shift, eps = rest
            groups = tuple(quantizers[i].num_groups for i in members)
            levels = 2**bits if kind is RFA else 0
            bank = Bank(counts, groups, qmin, qmin + 2**bits - 1, levels, scaled)
            values = _BankFunction.apply(kernels, bank, shift, eps, *some, *state)
        for i, value in zip(members, values, strict=True):
            out[i] = value
    return [q(w) if value is None else value for q, w, value in zip(quantizers, weights, out, strict=True)]
