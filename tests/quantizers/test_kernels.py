"""Which kernels a quantizer goes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmquant.errors import InputError
from ssmquant.ops import quantize, selection, use_backend
from ssmquant.ops.quantize import cpu, operators
from tests.strategies import make

pytestmark = pytest.mark.skipif(
    quantize.serving(torch.zeros(1)) is None, reason="needs a C++ compiler: there are no kernels here"
)


def test_a_choice_takes_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_STATE", selection._State())
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    x = torch.randn(3)
    assert quantize.serving(x) is cpu
    monkeypatch.setenv(selection.VARIABLE, " chunked ")
    assert quantize.serving(x) is None
    with use_backend("auto"):
        assert quantize.serving(x) is cpu
    with use_backend("cpu", op="quantize"):
        assert quantize.serving(x) is cpu
    assert quantize.serving(x) is None
    monkeypatch.setenv(selection.VARIABLE, "none such")
    with pytest.raises(InputError, match="SSMQUANT_BACKEND"):
        make("lsq", 4, x)(x)
    monkeypatch.setenv(selection.VARIABLE, "")
    assert quantize.serving(x) is cpu


def test_what_they_cannot_compute_with() -> None:
    x = torch.randn(3)
    assert quantize.serving(x.double()) is None
    assert quantize.serving(x, x.half()) is None
    assert quantize.serving(x[:0]) is None
    assert quantize.serving(x.to("meta")) is None

    class Own(torch.Tensor):
        pass

    assert quantize.serving(x.as_subclass(Own)) is operators


@pytest.mark.parametrize("name", ["lsq", "dls"])
def test_a_backward_pass_goes_where_its_forward_pass_went(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    q = make(name, 4, x.detach()).train()
    went: list[Any] = []
    function = getattr(cpu, f"{name}_backward")
    monkeypatch.setattr(cpu, f"{name}_backward", lambda *args: went.append(1) or function(*args))
    y = q(x)
    with use_backend("chunked", op="quantize"):
        plain = q(x)
        y.sum().backward()
        assert went == [1]
    plain.sum().backward()
    assert went == [1]
