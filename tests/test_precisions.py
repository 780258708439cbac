"""Prepared and deployed models in other precisions, on views, and on batches without samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ssmquant
from ssmquant import QConfig
from tests.small import Chain, Scanner, X, images, packed, prepared_and_calibrated, scanner

pytestmark = pytest.mark.usefixtures("plain_graphs")


def test_half_precision_remainder() -> None:
    deployed = ssmquant.convert(scanner(), float_dtype=torch.float16)
    for p in (deployed.stem.weight, deployed.head.bias):
        assert p.dtype == torch.float32
        assert torch.equal(p.half().float(), p)
    assert not torch.equal(scanner().stem.weight.half().float(), scanner().stem.weight)
    assert deployed(X).dtype == torch.float32
    assert (deployed(X) - scanner()(X)).abs().mean() < 0.1


def test_double_precision() -> None:
    torch.manual_seed(0)
    model = Scanner().double()
    x = X.double()
    bypass = ssmquant.prepare(model, QConfig(), example_inputs=(x,))
    assert torch.equal(bypass(x), model(x))
    prepared = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), x)
    assert prepared(x).dtype == torch.float64
    assert torch.equal(ssmquant.convert(prepared)(x), prepared(x))
    single = copy.deepcopy(scanner(4)).double()
    assert single(x).dtype == torch.float64
    assert (single(x) - scanner(4)(X)).abs().mean() < 0.02
    assert torch.equal(ssmquant.convert(single)(x), single(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_casts_of_prepared_and_deployed(dtype: torch.dtype, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(4, 4, 2)))
    prepared = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4, activation="dls"), X)
    dls = "frozen" if frozen else "dynamic"
    reference = prepared(X) if not frozen else ssmquant.convert(prepared, dls=dls)(X)
    x = X.to(dtype)
    cast_then_convert = ssmquant.convert(copy.deepcopy(prepared).to(dtype), dls=dls)
    convert_then_cast = ssmquant.convert(prepared, dls=dls).to(dtype)
    for deployed in (cast_then_convert, convert_then_cast):
        out = deployed(x)
        assert out.dtype == dtype
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 0.01}[dtype]
        assert (out.float() - reference).abs().mean() < tolerance * reference.abs().mean()
    # The scales stay in full precision: codes decode to what they did before, rounded once.
    exact = packed(ssmquant.convert(prepared))
    for key, m in packed(convert_then_cast).items():
        assert torch.equal(m(), exact[key]().to(dtype)), key


def test_non_contiguous_inputs(mambair: Any) -> None:
    x = images(2, 3, 8, 10)
    strange = x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    sliced = images(2, 3, 8, 20)[..., ::2]
    for model in (mambair, ssmquant.convert(mambair)):
        assert not strange.is_contiguous()
        torch.testing.assert_close(model(strange), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(sliced), model(sliced.contiguous()), rtol=1e-4, atol=1e-4)


def test_a_call_without_samples() -> None:
    for model in (scanner(), ssmquant.convert(scanner())):
        assert model(X[:0]).shape == (0, 3, 6, 5)
