"""The fused norms of mamba-ssm, unfolded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import gated_norm, layer_norm
from tests.ops.test_selective_scan import assert_close


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def sigmoid_gate(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(3, 8), (2, 0, 8), (1, 5, 8)]),
)
def test_layer_norm(rms: bool, biased: bool, added: bool, prenorm: bool, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    got = layer_norm(
        x, weight, bias if biased else None, residual if added else None, eps=1e-3, prenorm=prenorm, is_rms_norm=rms
    )  # fmt: skip
    total = x + residual if added else x
    want = plain(total, weight, bias if biased else None, 1e-3, rms)
    if prenorm:
        assert_close(list(got), [want, total], 1e-13)
    else:
        assert_close([got], [want], 1e-13)


@pytest.mark.parametrize("rms", [True, False])
def test_the_sum_is_rounded_only_where_it_is_returned(rms: bool) -> None:
    x, residual = torch.randn(2, 5, 64).bfloat16()
    weight = torch.rand(64) + 0.5
    y, total = layer_norm(x, weight, None, residual, prenorm=True, is_rms_norm=rms)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = x.double() + residual.double()
    assert torch.equal(y, plain(exact, weight, None, 1e-6, rms).bfloat16())
    assert torch.equal(total, exact.bfloat16())


@pytest.mark.parametrize(
    ("x", "residual", "in_fp32", "want"),
    [
        (torch.float16, None, False, torch.float16),
        (torch.float16, None, True, torch.float32),
        (torch.float16, torch.float32, False, torch.float32),
        (torch.float16, torch.float16, True, torch.float16),
        (torch.float32, torch.bfloat16, True, torch.bfloat16),
        (torch.float32, None, True, torch.float32),
    ],
)
def test_dtype_of_the_sum(
    x: torch.dtype, residual: torch.dtype | None, in_fp32: bool, want: torch.dtype
) -> None:
    added = None if residual is None else torch.randn(3, 8).to(residual)
    y, total = layer_norm(
        torch.randn(3, 8).to(x), torch.ones(8), None, added, prenorm=True, residual_in_fp32=in_fp32
    )
    assert (y.dtype, total.dtype) == (x, want)


@pytest.mark.parametrize(
    "option",
    [
        {"x1": torch.zeros(3, 8)},
        {"weight1": torch.ones(8)},
        {"bias1": torch.ones(8)},
        {"rowscale": torch.ones(3)},
        {"dropout_p": 0.1},
        {"return_dropout_mask": True},
    ],
)
def test_what_is_not_supported_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))} is not supported"):
        layer_norm(torch.zeros(3, 8), torch.ones(8), **option)


def test_a_residual_of_another_shape() -> None:
    with pytest.raises(InputError, match="residual has shape"):
        layer_norm(torch.zeros(3, 8), torch.ones(8), residual=torch.zeros(8))


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1, 2, 8]),
    st.sampled_from([0, 5]),
)
def test_gated_norm(
    rms: bool, biased: bool, gated: bool, before: bool, size: int | None, length: int
) -> None:
    x, z = torch.randn(2, 3, length, 8, dtype=torch.float64)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    got = gated_norm(
        x, weight, bias if biased else None, z if gated else None, 1e-3, size, before, is_rms_norm=rms
    )
    y = x * sigmoid_gate(z) if gated and not before else x
    y = torch.cat([plain(part, None, None, 1e-3, rms) for part in y.split(size or 8, -1)], -1) * weight
    y = y + bias if biased else y
    y = y * sigmoid_gate(z) if gated and before else y
    assert_close([got], [y], 1e-13)


def test_gated_norm_rounds_once() -> None:
    x, z = torch.randn(2, 5, 64).bfloat16()
    weight = torch.rand(64) + 0.5
    want = plain(x.double(), weight, None, 1e-6, True) * sigmoid_gate(z.double())
    assert torch.equal(gated_norm(x, weight, z=z, is_rms_norm=True), want.bfloat16())


@pytest.mark.parametrize(
    ("option", "message"),
    [({"z": torch.zeros(8)}, "z has shape"), ({"group_size": 3}, "group_size 3"), ({"group_size": 0}, "group_size 0")],
)  # fmt: skip
def test_wrong_gates(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gated_norm(torch.zeros(3, 8), torch.ones(8), **option)


@pytest.mark.parametrize("rms", [True, False])
def test_gradients_numerically(rms: bool) -> None:
    x, z = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True).unbind()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: gated_norm(t[0], t[1], None, t[2], group_size=2, is_rms_norm=rms), (x, weight, z)
    )
    assert torch.autograd.gradcheck(
        lambda *t: layer_norm(t[0], t[1], None, t[2], prenorm=True, is_rms_norm=rms), (x, weight, z)
    )
