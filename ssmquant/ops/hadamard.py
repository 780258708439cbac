"""Hadamard transforms: orthogonal, and every output a mean (with signs) of all inputs, which spreads outliers.

A matrix of +1 and -1 with orthogonal rows exists for the sizes below (Sylvester 1867; Paley 1933). Sizes are split into
a power of two, done in butterflies, and a remainder, done as one small product. Where no matrix is known for the
remainder (odd sizes above all) an orthonormal cosine transform stands in, whose entries are at most ``sqrt(2 / n)``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ssmquant.errors import ConfigError

__all__ = ["hadamard", "hadamard_matrix", "is_hadamard", "split_size"]

_PALEY = {12: 11, 20: 19, 28: 13}
"""Orders beside the powers of two, and the prime whose quadratic residues give them."""


def split_size(n: int) -> tuple[int, int]:
    """``(m, p)`` with ``n == m * p``: ``p`` a power of two for butterflies, ``m`` 1, 12, 20, 28 or what is left.

    Raises:
        ConfigError: ``n`` is not positive.
    """
    if n < 1:
        raise ConfigError(f"a Hadamard transform of size {n}: expected a positive size")
    power = n & -n
    for order in _PALEY:
        # 12, 20 and 28 are 4 times an odd number
        if n % order == 0 and (n // order) & (n // order - 1) == 0:
            return order, n // order
    return n // power, power


def is_hadamard(n: int) -> bool:
    """Whether the transform of that size is a Hadamard matrix, up to the factor ``n ** -0.5``."""
    return split_size(n)[0] in (1, *_PALEY)


@functools.lru_cache(maxsize=64)
def _core(m: int) -> Tensor:
    """The orthonormal matrix (m, m) of the remainder, float64."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m in _PALEY:
        return _paley(_PALEY[m]) / m**0.5
    k = torch.arange(m, dtype=torch.float64)
    cosines = torch.cos(torch.pi / m * (k + 0.5) * k[:, None]) * (2 / m) ** 0.5
    cosines[0] = m**-0.5
    return cosines


def _paley(q: int) -> Tensor:
    """Paley's constructions from the residues of a prime q: of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4)."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0 if i == 0 else 1 if i in squares else -1 for i in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[1:, 1:] = chi[(index[:, None] - index) % q]
    border[0, 1:] = 1
    border[1:, 0] = -1 if q % 4 == 3 else 1
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return border + one
    signs, turn = (torch.tensor(t, dtype=torch.float64) for t in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(border, signs) + torch.kron(one, turn)


def hadamard_matrix(n: int) -> Tensor:
    """The matrix (n, n) that :func:`hadamard` multiplies with, float64, orthonormal: ``hadamard(x) == x @ H.T``.

    Raises:
        ConfigError: ``n`` is not positive.
    """
    return hadamard(torch.eye(n, dtype=torch.float64), -1).T.contiguous()


def hadamard(x: Tensor, axis: int = -1) -> Tensor:
    """The orthonormal transform along one axis, in O(n (m + log p)) for n = m p (see :func:`split_size`).

    Args:
        x: (..., n, ...), any float dtype.
        axis: which one.

    Returns:
        The transformed tensor, of the same shape and dtype.
    """
    n = x.shape[axis]
    m, power = split_size(n)
    moved = x.movedim(axis, -1)
    y = moved.reshape(-1, m, power)  # rows come as the batch, whatever their number
    width = power
    while width > 1:
        width //= 2
        pairs = y.reshape(-1, 2, width)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
    y = y.reshape(-1, m, power)
    if m > 1:
        y = torch.einsum("ij,bjp->bip", _core(m).to(x), y)
    return (y * power**-0.5).reshape(moved.shape).movedim(-1, axis)
