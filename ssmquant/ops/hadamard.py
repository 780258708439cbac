"""Hadamard transforms: orthogonal, and every output a mean (with signs) of all inputs, which spreads outliers.

A matrix of +1 and -1 with orthogonal rows exists for the sizes below (Sylvester 1867; Paley 1933). Sizes are split into
a power of two and a remainder, of which small ones are done in one product, others in one for each factor. Where no
matrix is known for the remainder (odd sizes above all) an orthonormal cosine transform stands in, whose entries are at
most ``sqrt(2 / n)``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ssmquant.errors import ConfigError

__all__ = ["hadamard", "hadamard_matrix", "is_hadamard", "split_size"]

_PALEY = {12: 11, 20: 19, 28: 13}
"""Orders beside the powers of two, and the prime whose quadratic residues give them."""
_AT_ONCE = 128
_MOST_COLUMNS = 64


def split_size(n: int) -> tuple[int, int]:
    """``(m, p)`` with ``n == m * p``: ``p`` a power of two, ``m`` 1, 12, 20, 28 or what is left.

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


@functools.lru_cache(maxsize=64)
def _matrix(n: int) -> Tensor:
    # Whatever the context of the first call, all others get this one.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return _new_matrix(n)


def _new_matrix(n: int) -> Tensor:
    m, power = split_size(n)
    out = _core(m)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * 0.5**0.5
    while power > 1:
        out = torch.kron(out, pair)
        power //= 2
    return out


def hadamard_matrix(n: int) -> Tensor:
    """The matrix (n, n) that :func:`hadamard` multiplies with, float64, orthonormal: ``hadamard(x) == x @ H.T``.

    Raises:
        ConfigError: ``n`` is not positive.
    """
    return _matrix(n).clone()


_converted: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
"""Matrices as products read them: converting and moving one costs as much as a small product. Never dropped, as CUDA
graphs read them; there are few, of at most 128 columns but for remainders."""


def _like(n: int, y: Tensor) -> Tensor:
    """The matrix of size n in the dtype and on the device of ``y``."""
    if torch.compiler.is_compiling() or type(y) not in (Tensor, torch.nn.Parameter):
        return _matrix(n).to(y)  # a fake tensor or the like, which must not be kept
    key = n, y.dtype, y.device
    if key not in _converted:
        with torch.inference_mode(False), torch.no_grad():
            _converted[key] = _matrix(n).to(y.device, y.dtype)
    return _converted[key]


def hadamard(x: Tensor, axis: int = -1) -> Tensor:
    """The orthonormal transform along one axis: a product up to size 128, above it one for each factor of the size.

    Factors are products of their own, not butterflies: on CPUs and GPUs a product of 64 columns costs less than six
    passes over the memory.

    Args:
        x: (..., n, ...), any float dtype.
        axis: which one.

    Returns:
        The transformed tensor, of the same shape and dtype.
    """
    n = x.shape[axis]
    moved = x.movedim(axis, -1)
    y = moved.reshape(-1, n)  # rows come as the batch, whatever their number
    if n <= _AT_ONCE:
        return (y @ _like(n, y).T).reshape(moved.shape).movedim(-1, axis)
    behind = 1
    for size in _factors(n):
        y = _like(size, y) @ y.reshape(-1, size, behind)
        behind *= size
    return y.reshape(moved.shape).movedim(-1, axis)


def _factors(n: int) -> list[int]:
    """Sizes whose product is n, innermost first: the powers of two, then the remainder."""
    m, power = split_size(n)
    out = []
    while power > 1:
        out.append(min(power, _MOST_COLUMNS))
        power //= out[-1]
    return [*out, *([m] if m > 1 else [])]
