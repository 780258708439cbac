"""What is made of parameters alone is quantized at the graph's start, where that computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssmquant
from ssmquant import QConfig
from ssmquant.ops import quantize, use_backend
from ssmquant.ops.quantize import cpu
from ssmquant.ops.selective_scan import selective_scan
from tests.small import Scanner, images, prepared_and_calibrated

pytestmark = pytest.mark.skipif(
    quantize.serving(torch.zeros(1)) is None, reason="needs a C++ compiler: there are no kernels here"
)


class Scan(nn.Module):
    """(B, 4, L) -> the same, by a scan of its own parameters alone; ``how``: what stands around it."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.A_log = nn.Parameter(torch.rand(4, 2))
        self.D = nn.Parameter(1 + 0.1 * torch.randn(4))
        self.bias = nn.Parameter(torch.rand(4) - 3)
        self.project = nn.Linear(4, 8, bias=False)

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return -self.A_log.float().exp(), self.D.float(), self.bias.float()

    def scan(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                A, D, bias = self.operands()
        elif self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                A, D, bias = self.operands()
        elif self.how == "written":
            self.D.data.mul_(1.0)
            A, D, bias = self.operands()
        else:
            A, D, bias = self.operands()
        delta, b, c = self.project(x.transpose(1, 2)).transpose(1, 2).split([4, 2, 2], 1)
        return selective_scan(x, delta.contiguous(), A, b, c, D, delta_bias=bias, delta_softplus=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            out: Tensor = checkpoint(self.scan, x, use_reentrant=False)
            return out
        return self.scan(x)


class Two(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 3, 1)
        self.a, self.b = Scan(how), Scan(how)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.a(y)
        return self.head(y + self.b(y))


def step(model: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize("how", ["", "checkpoint", "no_grad", "autocast", "written"])
def test_static_operands(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 9)
    model = prepared_and_calibrated(Two(how).eval(), QConfig(w_bits=4, a_bits=4), x).train()
    banks: list[int] = []
    forward = cpu.dls_bank_forward
    monkeypatch.setattr(cpu, "dls_bank_forward", lambda *args: banks.append(len(args[3])) or forward(*args))
    got = step(model, x)
    assert banks == {"no_grad": [], "autocast": [], "written": [4]}.get(how, [6])
    assert ("_ssmquant.weights" in model.code) == (how in ("no_grad", "autocast"))
    assert ("checkpoint_region" in model.code) == (how == "checkpoint")
    alone = copy.deepcopy(model)
    monkeypatch.setattr(
        "ssmquant.graph.bank.quantize_weights", lambda qs, ws: [q(w) for q, w in zip(qs, ws, strict=True)]
    )
    for a, b in zip(got, step(alone, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert (model.a.A_log.grad is None) == (how == "no_grad")


@pytest.mark.usefixtures("plain_graphs")
def test_as_plain_pytorch_and_as_deployed() -> None:
    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = prepared_and_calibrated(Scanner().eval(), QConfig(w_bits=8, a_bits=8), x).train()
    fused = step(model, x)
    with use_backend("chunked", op="quantize"):
        plain = step(model, x)
    for a, b in zip(fused, plain, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-6
    deployed = ssmquant.convert(model.eval())
    assert "_quantize(" not in deployed.code
    torch.testing.assert_close(deployed(x), model(x), rtol=0, atol=0)
