"""Cross-scan, merge and reorder against indexing in float64; the Triton kernels in the interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops import cross_scan as ops
from ssmquant.ops.cross_scan import Paths, cross_merge, cross_scan, reorder
from tests.ops.interpreted import in_process, make_interpreter_work

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def random_paths(count: int, length: int, device: Any = "cpu") -> Paths:
    return Paths.of(torch.stack([torch.randperm(length) for _ in range(count)]).to(device))


def expected(x: Tensor, paths: Paths) -> Tensor:
    """(B, C, L) or (B, K, C, L) -> (B, K, C, L) by plain indexing."""
    each = x[:, None].expand(-1, len(paths.order), -1, -1) if x.dim() == 3 else x
    return torch.stack([each[:, k][..., order.long()] for k, order in enumerate(paths.order)], 1)


def check(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: Any, run: Callable[..., Tensor]
) -> None:
    """``run(name, tensor, order)`` is the gather or the merge of a back end."""
    batch, count, channels, length = shape
    paths = random_paths(count, length, device)
    image = torch.randn(batch, channels, length, device=device).to(dtype)
    each = torch.randn(batch, count, channels, length, device=device).to(dtype)
    for x in (image, each):
        assert torch.equal(run("gather", x, paths.order), expected(x, paths))
    back = expected(each, Paths(paths.step, paths.order)).double().sum(1)
    merged = run("merge", each, paths.step)
    assert merged.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (merged.double() - back).abs().max() <= tolerance * (1 + back.abs().max())


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_against_indexing(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    plain = {"gather": ops._gather, "merge": ops._merge}
    check(shape, dtype, "cpu", lambda name, *args: plain[name](*args))


def test_inverse() -> None:
    paths = random_paths(4, 12)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(cross_merge(cross_scan(x, paths), paths), 4 * x)
    each = torch.randn(2, 4, 3, 12)
    assert torch.equal(reorder(reorder(each, paths), Paths(paths.step, paths.order)), each)


@pytest.mark.parametrize("function", [cross_scan, cross_merge, reorder])
def test_gradients(function: Any) -> None:
    paths = random_paths(3, 7)
    shape = (2, 2, 7) if function is cross_scan else (2, 3, 2, 7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, paths), (x,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, paths), (x,))


def test_any_layout_and_nothing() -> None:
    paths = random_paths(2, 6)
    x = torch.randn(2, 6, 3).transpose(1, 2)
    assert torch.equal(cross_scan(x, paths), expected(x, paths))
    assert cross_scan(torch.zeros(0, 3, 6), paths).shape == (0, 2, 3, 6)
    assert cross_merge(torch.zeros(0, 2, 3, 6), paths).shape == (0, 3, 6)


def interpret() -> None:
    make_interpreter_work()
    from ssmquant.ops.cross_scan import triton

    triton._TILE = 32
    for shape in ((1, 1, 1, 1), (2, 4, 5, 49), (3, 2, 9, 33)):
        check(shape, torch.float32, "cpu", lambda name, *args: getattr(triton, name)(*args))


@needs_triton
def test_in_the_interpreter() -> None:
    in_process("test_cross_scan", "interpret()", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 5, 49), (3, 2, 180, 3136), (16, 4, 72, 2304)])
def test_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from ssmquant.ops.cross_scan import triton

    check(shape, dtype, "cuda", lambda name, *args: getattr(triton, name)(*args))
