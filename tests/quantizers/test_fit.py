from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmquant.errors import CalibrationError
from ssmquant.quantizers import DLS, LSQ, QUANTIZERS, Quantizer
from tests.strategies import BITS, COUNTER_CASES, make, sqnr

NAMES = sorted(QUANTIZERS)
DATA = {
    "gauss": lambda: torch.randn(20_000),
    "cubed": lambda: torch.randn(20_000) ** 3,
    "silu": lambda: torch.nn.functional.silu(torch.randn(20_000)),
    "positive": lambda: torch.rand(20_000) + 0.5,
    "negative": lambda: -torch.arange(1.0, 11.0).repeat(50, 1),
    "outlier": lambda: torch.cat((torch.randn(20_000), torch.tensor([1e4]))),
}


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ["lsq", "dls", "rfa"])
def test_fit_never_hurts(name: str, kind: str, official: bool) -> None:
    x = DATA[kind]()
    for n_bits in (2, 4, 8):
        q = make(name, n_bits, x, official=official)
        before = (q(x) - x).square().sum()
        q.fit([x])
        assert (q(x) - x).square().sum() <= before * 1.02  # the search sees a sample of the data


@pytest.mark.parametrize("n_bits", BITS)
def test_dls_gets_past_three_sigma(n_bits: int) -> None:
    x = torch.randn(50_000) ** 3
    start, fitted = DLS(n_bits), DLS(n_bits)
    fitted.fit([x[:25_000], x[25_000:]])
    gain = sqnr(x, fitted(x)) - sqnr(x, start(x))
    assert gain > (5 if n_bits >= 6 else 0)
    uniform = torch.rand(10_000)
    fitted.fit([uniform])
    assert sqnr(uniform, fitted(uniform)) > 6.02 * n_bits - 0.3  # what any quantizer can reach


@pytest.mark.parametrize(("n_bits", "best"), [(2, 9.3), (3, 14.3), (4, 20.2)])
def test_lsq_reaches_the_uniform_optimum(n_bits: int, best: float) -> None:
    """Known least distortions of uniform quantizers for a Gaussian (Max 1960): 9.25, 14.27, 19.38 dB."""
    x = torch.randn(100_000)
    q = LSQ(n_bits)
    q.fit([x])
    assert best - 1.2 < sqnr(x, q(x)) < best


def test_fit_pools_batches() -> None:
    batches = [torch.rand(3, 50) - 0.1, torch.empty(0, 50), 5 * torch.rand(2, 50)]
    q = QUANTIZERS["minmax"](8)
    q.fit(batches)
    whole = make("minmax", 8, torch.cat(batches))
    assert q.ready
    for key, value in whole.state_dict().items():
        assert torch.equal(value, q.state_dict()[key])


@pytest.mark.parametrize("name", ["lsq", "rfa"])
def test_fit_by_group(name: str) -> None:
    w = torch.randn(6, 300) * torch.logspace(-3, 3, 6)[:, None]
    q = QUANTIZERS[name](4, axis=0, num_groups=6, is_weight=True)
    q.fit([w])
    for row, out in zip(w, q(w), strict=True):
        assert sqnr(row, out) > 17


@pytest.mark.parametrize("name", NAMES)
def test_fit_is_deterministic_and_silent(name: str) -> None:
    x = torch.randn(3, 5000)
    states = []
    for _ in range(2):
        q: Quantizer = QUANTIZERS[name](4, axis=0 if name == "dls" else None)
        q.fit([x, 2 * x])
        states.append(q.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("case", COUNTER_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_counter_cases(name: str, case: str) -> None:
    x: Tensor = COUNTER_CASES[case]()
    q = QUANTIZERS[name](4)
    if x.numel() == 0:
        with pytest.raises(CalibrationError, match="not empty"):
            q.fit([x])
        return
    q.fit([x])
    assert q.ready == (case != "constant 0" or not q.needs_data)
    if q.ready:
        y = q(x)
        assert y.isfinite().all()
        assert (y - x).norm() <= x.norm() * 0.6


@pytest.mark.parametrize("name", NAMES)
def test_no_data(name: str) -> None:
    with pytest.raises(CalibrationError, match="at least one"):
        QUANTIZERS[name](4).fit([])


@pytest.mark.parametrize("name", NAMES)
def test_fit_is_quick(name: str) -> None:
    """400 quantizers a model: the aim is 10 ms each; the bound leaves room for a busy machine."""
    x = torch.randn(8, 64, 32, 32)
    q = QUANTIZERS[name](8, axis=0 if name == "dls" else None)
    q.fit([x])
    start = time.perf_counter()
    q.fit([x])
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("value", [0.8, -3.0])
@pytest.mark.parametrize("shift", ["learned", "half", "none"])
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_constant_data_leave_a_step_to_train(n_bits: int, shift: Any, value: float) -> None:
    x = torch.full((4, 8), value)
    q = LSQ(n_bits, shift=shift)
    q.fit([x])
    assert q.alpha.item() > 1e-3 * abs(value)
    torch.testing.assert_close(q(x), x)
