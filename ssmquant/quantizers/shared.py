"""One value for each index of the last axis, shared over all other axes: for the decay A of a selective scan.

    y[.., n] = mean of x[.., n]

A is (channels, states). Training hardly moves it from its start -1, -2, .., -N of all channels (in MambaIR-light by
0.04 to 0.3), while b bits a channel round it to 2**b of these N values at best: at 2 bits DLS costs 0.12 dB where the
shared value costs 0.005 (docs/accuracy.md). A mean of negative values is negative, so the scan stays stable, every
state keeps its own time constant, slow ones included, and a kernel needs N decays a step and no codes.

The gradient is that of the mean: channels move together.
"""

from __future__ import annotations

from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.quantizers.affine import Affine, compute_dtype, group_dims, in_dtype
from ssmquant.quantizers.base import Quantizer

__all__ = ["Shared"]


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

    def _reset_state(self) -> None:
        """There is none."""

    def _mean(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise InputError(
                f"'shared' keeps one value for each index of the last axis of a (channels, states) tensor, got shape "
                f"{tuple(x.shape)}"
            )
        return x.to(compute_dtype(x)).mean(group_dims(x.dim(), -1), keepdim=True)

    def _affine(self, x: Tensor) -> Affine:
        mean = self._mean(x)
        return Affine(mean.new_ones(mean.shape), -mean)

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        return (x + affine.shift) * 0.0  # the product keeps a NaN a NaN

    def _quantize(self, x: Tensor) -> Tensor:
        return in_dtype(self._mean(x).expand(x.shape), x.dtype)

    def _fit(self, batches: list[Tensor], stats: object) -> None:
        """Nothing to search."""
