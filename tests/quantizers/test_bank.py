"""Weights quantized by one call are those quantized one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ssmquant
from ssmquant import QConfig
from ssmquant.ops import quantize, use_backend
from ssmquant.ops.quantize import cpu
from ssmquant.quantizers import DLS, bank
from ssmquant.quantizers.bank import quantize_weights
from tests.small import images, prepared_and_calibrated, tiny_mambair
from tests.strategies import learnt, make

pytestmark = pytest.mark.skipif(
    quantize.serving(torch.zeros(1)) is None, reason="needs a C++ compiler: there are no kernels here"
)


def some() -> tuple[list[Any], list[Tensor]]:
    """Three banks' worth, and what has to go alone: of another dtype, by another axis, official, not initialised."""
    torch.manual_seed(0)
    quantizers, weights = [], []
    for name in ("rfa", "lsq", "dls"):
        for shape, options in (
            ((12, 7), {}),
            ((6, 3, 3, 3), {"axis": 0, "num_groups": 6}),
            ((1,), {}),
            ((5, 8), {"axis": 1, "num_groups": 8}),
            ((9,), {"official": True}),
            ((2, 3), {"dtype": torch.float64}),
            ((40, 3), {}),
        ):
            given: dict[str, Any] = dict(options)
            w = torch.randn(shape, dtype=given.pop("dtype", torch.float32))
            quantizers.append(learnt(make(name, 4, w, is_weight=True, **given), 1, 0.1).train())
            if w.dim() == 2 and name != "dls":  # whose statistics are sums in the order of memory
                w = w.t().contiguous().t()
            weights.append(w.requires_grad_())
    quantizers.append(make("rfa", 4, torch.randn(3), is_weight=True))
    quantizers[-1].reset()
    weights.append(torch.zeros(3, requires_grad=True))
    return quantizers, weights


def results(values: list[Tensor], quantizers: list[Any], weights: list[Tensor]) -> list[Tensor]:
    leaves = [*weights, *(p for q in quantizers for p in q.parameters())]
    loss = torch.stack(
        [(v.double() * torch.arange(1.0, v.numel() + 1).view(v.shape).cos()).sum() for v in values]
    ).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def test_one_by_one_or_together(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizers, weights = some()
    banks = []
    forward, of_dls = cpu.bank_forward, cpu.dls_bank_forward
    monkeypatch.setattr(cpu, "bank_forward", lambda *args: banks.append(args[4].counts) or forward(*args))
    monkeypatch.setattr(cpu, "dls_bank_forward", lambda *args: banks.append(args[3]) or of_dls(*args))
    got = quantize_weights(quantizers, weights)
    assert banks == [(84, 162, 1, 120), (84, 162, 1, 120), (84, 1, 120)]
    want = [q(w) for q, w in zip(quantizers, weights, strict=True)]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(results(got, quantizers, weights), results(want, quantizers, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_an_error() -> None:
    for name in ("lsq", "dls"):
        x = torch.randn(3, 8, requires_grad=True)
        q = make(name, 4, x.detach()).train()
        (g,) = torch.autograd.grad(q(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo itself does it
def test_fullgraph() -> None:
    quantizers, weights = some()
    few = [i for i, w in enumerate(weights) if w.dtype == torch.float32 and i % 7 in (0, 1, 2, 3, 6)][:-1]
    quantizers, weights = [quantizers[i] for i in few], [weights[i] for i in few]
    compiled = torch.compile(quantize_weights, backend="aot_eager", fullgraph=True)
    got, want = compiled(quantizers, weights), quantize_weights(quantizers, weights)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results(got, quantizers, weights), results(want, quantizers, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_without_kernels() -> None:
    quantizers, weights = some()
    want = quantize_weights(quantizers, weights)
    with use_backend("chunked", op="quantize"):
        got = quantize_weights(quantizers, weights)
    for q, a, b in zip(quantizers, got, want, strict=True):
        if isinstance(q, DLS):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)


def test_a_prepared_model_has_one_bank_and_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2, 3, 8, 8)
    model = prepared_and_calibrated(tiny_mambair(), QConfig(w_bits=4, a_bits=4), x).train()
    assert model.code.count("_quantize(") == 1
    assert "_ssmquant.weights" not in model.code
    calls = []
    once = bank.quantize_weights
    monkeypatch.setattr("ssmquant.graph.bank.quantize_weights", lambda *args: calls.append(1) or once(*args))

    def step() -> list[Tensor]:
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    fused = step()
    assert calls == [1]
    with use_backend("chunked", op="quantize"):
        plain = step()
    assert len(fused) == len(plain)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-3, atol=1e-3)
    model.eval()
    with torch.no_grad():
        deployed = ssmquant.convert(model)
        report = ssmquant.verify(model, deployed, (x,))
    assert report.rows
    assert report.worst_rel == 0
