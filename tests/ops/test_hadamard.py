"""Hadamard transforms: orthonormal at every size, true Hadamard matrices where they exist, fast equal to slow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmquant.errors import ConfigError
from ssmquant.ops.hadamard import hadamard, hadamard_matrix, is_hadamard, split_size


@given(n=st.integers(1, 97))
def test_the_matrix_is_orthonormal(n: int) -> None:
    h = hadamard_matrix(n)
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 12, 24, 96, 20, 40, 320, 28, 56, 448])
def test_its_entries_are_signs(n: int) -> None:
    assert is_hadamard(n)
    signs = hadamard_matrix(n) * n**0.5
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "parts"), [(6, (3, 2)), (36, (9, 4)), (60, (15, 4)), (7, (7, 1))])
def test_other_sizes_fall_back_to_cosines(n: int, parts: tuple[int, int]) -> None:
    assert not is_hadamard(n)
    assert split_size(n) == parts
    bound = 2**0.5 * n**-0.5
    assert float(hadamard_matrix(n).abs().max()) <= bound + 1e-12


@given(
    n=st.sampled_from([1, 3, 8, 12, 28, 36, 40, 129, 192, 256, 448, 1280]),
    axis=st.integers(-3, 2),
    seed=st.integers(0, 9),
)
def test_fast_equals_product(n: int, axis: int, seed: int) -> None:
    shape = [2, 3, 5]
    shape[axis] = n
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = (x.movedim(axis, -1) @ hadamard_matrix(n).T).movedim(-1, axis)
    torch.testing.assert_close(hadamard(x, axis), expected, rtol=0, atol=1e-12)


def test_gradients_and_dtypes() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x)
    assert hadamard(torch.randn(3, 6, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("n", [0, -4])
def test_sizes_are_positive(n: int) -> None:
    with pytest.raises(ConfigError, match="positive"):
        split_size(n)
