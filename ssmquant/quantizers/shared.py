"""Quantizers that look at a whole operand of a scan: for its decay A, (channels, states), one value for each state.

``"shared"``     y[.., n] = mean of x[.., n]                        over all other axes
``"ladder"``     y[.., n] = first + n * gap                         the least-squares line through these means

Training hardly moves A from its start -1, -2, .., -N of all channels (in MambaIR-light by 0.04 to 0.3), while b bits a
channel round it to 2**b of these N values at best: at 2 bits DLS costs 0.12 dB where a shared value, or multiples of
one, cost 0.005 (docs/accuracy.md; after calibration, without training). A mean of negative values is negative, so the
scan stays stable, and every state keeps its own time constant, slow ones included. A kernel needs N exponentials a step
and no codes, and for a ladder only two: decays are exp(step * first) times powers of exp(step * gap).

The gradient is that of the mean or the line: channels move together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.quantizers.affine import Affine, compute_dtype, group_dims, in_dtype
from ssmquant.quantizers.base import QTensor, Quantizer

__all__ = ["Ladder", "Shared"]


class Shared(Quantizer):
    """Mean over all axes but the last; see the module's docstring and :class:`Quantizer` for the arguments.

    For static operands: there is no state, ``axis`` and ``num_groups`` change nothing. Every code is 0, the shift of an
    entry is minus its value.

    Raises:
        InputError: the tensor has fewer than two axes.
    """

    @property
    def needs_data(self) -> bool:
        return False

    @property
    def elementwise(self) -> bool:
        return False

    @property
    def is_signed(self) -> bool:
        return False

    def stored(self, shape: Sequence[int]) -> tuple[int, int]:
        return 1, shape[-1]

    def encode(self, x: Tensor, *, check: bool = True) -> QTensor:
        encoded = super().encode(x, check=check)
        code = torch.zeros((), dtype=torch.uint8, device=x.device)
        return replace(encoded, codes=code.expand(x.shape))  # one code in memory, and in a packed tensor

    def _reset_state(self) -> None:
        """There is none."""

    def _values(self, x: Tensor) -> Tensor:
        """One for each index of the last axis, other axes of size 1."""
        return self._mean(x)

    def _mean(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise InputError(
                f"{type(self).__name__} keeps one value for each index of the last axis of a (channels, states) "
                f"tensor, got shape {tuple(x.shape)}"
            )
        return x.to(compute_dtype(x)).mean(group_dims(x.dim(), -1), keepdim=True)

    def _affine(self, x: Tensor) -> Affine:
        values = self._values(x)
        return Affine(values.new_ones(values.shape), -values)

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        return (x + affine.shift) * 0.0  # the product keeps a NaN a NaN

    def _quantize(self, x: Tensor) -> Tensor:
        return in_dtype(self._values(x).expand(x.shape), x.dtype)

    def _fit(self, batches: list[Tensor], stats: object) -> None:
        """Nothing to search."""


class Ladder(Shared):
    """Evenly spaced values: the line through the means of :class:`Shared`.

    Where all means are negative, so are they: the line is made flatter if it would end above half of the largest mean.
    """

    def _values(self, x: Tensor) -> Tensor:
        mean = self._mean(x)
        half = (mean.shape[-1] - 1) / 2
        if half < 1:
            return mean
        place = torch.arange(mean.shape[-1], dtype=mean.dtype, device=mean.device) - half
        centre, most = mean.mean(-1, keepdim=True), mean.amax(-1, keepdim=True)
        gap = (mean * place).sum(-1, keepdim=True) / (place * place).sum()
        steepest = torch.where(most < 0, (most / 2 - centre) / half, torch.inf)
        return centre + place * torch.clamp(gap, -steepest, steepest)
