"""Rounding by GPTQ: the inputs of every form of site, and what stays at nearest and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant.graph.rounding import inputs as inputs_module
from ssmquant.graph.rounding.gptq import quadratic_error
from ssmquant.graph.rounding.inputs import measure_inputs
from ssmquant.graph.runtime import runtime_of
from tests.graph.rounded import FORMS, Form, gptq, prepared_form
from tests.small import points, rows

# ---- inputs of all forms ---------------------------------------------------------------------------------------------


def run(model: nn.Module, x: Tensor) -> Any:
    return model(x)


@pytest.mark.parametrize("name", FORMS)
def test_moments_tell_the_error_of_the_output(name: str) -> None:
    model, x = prepared_form(name, a_bits=None)
    (found,) = measure_inputs(model, [x, 2 * x], run).values()
    assert found.reason is None
    assert found.projection is not None
    assert found.second is not None
    parameter = model.get_parameter(found.projection.parameter)
    change = torch.randn_like(parameter)
    groups, outputs, _ = found.projection.groups
    moved = found.projection.arranged(change).reshape(groups, outputs, -1).double()
    predicted = quadratic_error(moved, found.second).sum()
    if name == "in a loop":  # one of the two sees what the other one changes
        (quantizer,) = runtime_of(model).weights.values()
        seen = [x, 2 * x, *(torch.tanh(F.linear(t, quantizer(parameter))) for t in (x, 2 * x))]
        actual = sum(F.linear(t, change).square().sum().detach() for t in seen)
    else:
        original = FORMS[name][0]()
        original.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("_")})
        before = [original(t) for t in (x, 2 * x)]
        with torch.no_grad():
            original.weight.add_(change)  # type: ignore[operator]
        after = [original(t) for t in (x, 2 * x)]
        actual = sum((a - b).detach().square().sum() for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(float(actual), float(predicted), rtol=1e-4, atol=0)


def test_parts_of_large_inputs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared_form("conv2d", a_bits=None)
    (whole,) = measure_inputs(model, [x], run).values()
    monkeypatch.setattr(inputs_module, "_PART", 1)
    (parts,) = measure_inputs(model, [x], run).values()
    torch.testing.assert_close(parts.second, whole.second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, "channel") for name in FORMS),
        ("depthwise conv2d", "tensor"),
        ("einsum by direction", "direction"),
        ("grouped conv1d by direction", "direction"),
        ("conv2d in groups", "tensor"),
    ],
)
def test_codes_come_back_and_a_second_calibration_changes_nothing(name: str, granularity: str) -> None:
    model, x = prepared_form(name, granularity=granularity)
    plain = ssmquant.prepare(
        FORMS[name][0](), gptq(rounding="nearest", granularity=granularity), example_inputs=x
    )
    plain.load_state_dict(model.state_dict())
    ssmquant.calibrate(model, [x])
    ((key, note),) = runtime_of(model).rounded.items()
    assert note.startswith("gptq: ")
    quantizer: Any = runtime_of(model).weights[key]
    value = model.get_parameter(str(next(p for p in points(model).values() if p.key == key).parameter))
    encoded = quantizer.encode(value)
    assert torch.equal(encoded.decode(), value)
    before: Any = runtime_of(plain).weights[key]
    assert all(torch.equal(a, b) for a, b in zip(quantizer.parameters(), before.parameters(), strict=True))
    kept = value.detach().clone()
    ssmquant.calibrate(model, [x * 3])
    assert torch.equal(value, kept)
    assert runtime_of(model).rounded == {key: note}
    deployed = ssmquant.convert(model)
    torch.testing.assert_close(deployed(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(runtime_of(deployed).weights[key].qtensor().codes, encoded.codes)  # type: ignore[operator]


# ---- what stays at nearest -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding((x * 4).long())))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.aux = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.aux(x) if self.training else self.main(x)


class Two(nn.Module):
    """One weight as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight.t())


def zero() -> nn.Module:
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    return model


UNSUITABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], str]] = {
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(3, 4, 2),
        (1, 3, 5, 5),
        {},
        "transposed convolution",
    ),
    "tied to an embedding": (Tied, (2, 5), {}, "read in float"),
    "two quantizers": (
        Two,
        (2, 4),
        {"rules": [ssmquant.Rule("weight#2", w_bits=4)]},
        "by another quantizer",
    ),
    "two ways": (Two, (2, 4), {}, "in different ways"),
    "computed": (lambda: Form((3, 4), lambda x, w: F.linear(x, w * 2)), (2, 4), {}, "computed"),
    "a part": (lambda: Form((6, 4), lambda x, w: F.linear(x, w[:3])), (2, 4), {}, "in part"),
    "too many inputs": (lambda: nn.Linear(4097, 2), (1, 4097), {}, "4097 inputs"),
    "sums over more": (
        lambda: Form((3, 4), lambda x, w: torch.einsum("bld,od->bo", x, w)),
        (2, 3, 4),
        {},
        "sums over other axes",
    ),
    "levels of the moment": (lambda: nn.Linear(7, 5), (2, 7), {"weight": "n2uq"}, "levels of N2UQ"),
    "all zero": (zero, (2, 4), {}, "all zero"),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_the_rest_stays_at_nearest_and_says_why(name: str) -> None:
    torch.manual_seed(0)
    build, shape, options, reason = UNSUITABLE[name]
    x = torch.rand(shape)
    model = ssmquant.prepare(build(), gptq(**options), example_inputs=x)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("_")}
    ssmquant.calibrate(model, [x])
    notes = [r.note for r in rows(model).values() if "nearest: " in r.note]
    assert any(reason in note for note in notes), notes
    left = {
        p.parameter for p in points(model).values() if "nearest: " in runtime_of(model).rounded.get(p.key, "")
    }
    assert left
    assert all(torch.equal(model.get_parameter(str(k)), before[str(k)]) for k in left)
    assert ssmquant.convert(model)(x).isfinite().all()


def test_what_no_batch_reaches_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = ssmquant.prepare(Auxiliary(), gptq(), example_inputs=x)
    before = model.aux.weight.clone()
    ssmquant.calibrate(model, [x])
    assert runtime_of(model).rounded["aux:weight"] == "rounded to nearest: no batch reached it"
    assert torch.equal(model.aux.weight, before)
    assert runtime_of(model).rounded["main:weight"].startswith("gptq")


def test_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    x[:, [1, 4]] = 0
    model = ssmquant.prepare(nn.Linear(6, 5), gptq(), example_inputs=x)
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    expected = quantizer(model.weight)[:, [1, 4]]
    ssmquant.calibrate(model, [x])
    assert torch.equal(model.weight[:, [1, 4]], expected)
    dead = ssmquant.prepare(Chained(), gptq(), example_inputs=x)  # its second layer reads zeros alone
    nearest = runtime_of(dead).weights["second:weight"](dead.second.weight)
    ssmquant.calibrate(dead, [x])
    assert torch.equal(dead.second.weight, nearest)


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x) - 100))


def test_inputs_too_large_to_be_squared_stay_at_nearest() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4) * 1e30
    model = ssmquant.prepare(nn.Linear(4, 3), gptq(), example_inputs=x)
    ssmquant.calibrate(model, [x])
    assert "too large" in runtime_of(model).rounded["weight:weight"]


def test_nearest_is_left_alone() -> None:
    model, x = prepared_form("linear", rounding="nearest")
    before = model.weight.clone()
    ssmquant.calibrate(model, [x])
    assert torch.equal(model.weight, before)
    assert runtime_of(model).rounded == {}
    measured, x = prepared_form("linear")
    ssmquant.calibrate(measured, [x])
    kept = measured.weight.clone()
    ssmquant.calibrate(measured, [x], fit=False)
    assert torch.equal(measured.weight, kept)
