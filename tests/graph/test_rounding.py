"""Rounding by GPTQ: the arithmetic against a plain one, the inputs of every form of site, models before and after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import CalibrationError, QConfig
from ssmquant.graph.rounding import inputs as inputs_module
from ssmquant.graph.rounding.gptq import DAMPING, Levels, quadratic_error, round_rows
from ssmquant.graph.rounding.inputs import measure_inputs
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers import Quantizer
from tests.graph.test_transforms import vim, vmamba
from tests.model_files import meta_of, with_meta
from tests.small import Scanner, images, points, prepared_and_calibrated, rows, tiny_mambair

DOUBLE = torch.float64


def gptq(w_bits: int = 3, **options: Any) -> QConfig:
    base: dict[str, Any] = {
        "w_bits": w_bits,
        "a_bits": 8,
        "weight": "lsq",
        "granularity": "channel",
        "keep_first_last": False,
        "rounding": "gptq",
    }
    return QConfig(**{**base, **options})


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def nearest(w: Tensor, scale: Tensor, shift: Tensor, low: int, count: int) -> Tensor:
    """The nearest level by looking at all of them."""
    levels = scale[..., None] * (torch.arange(count, dtype=DOUBLE) + low) - shift[..., None]
    return (levels - w[..., None]).abs().argmin(-1).double()


def one_by_one(w: Tensor, h: Tensor, scale: Tensor, shift: Tensor, low: int, count: int) -> Tensor:
    """Optimal Brain Quantization in a fixed order, of one group: (o, k), (k, k) -> indices (o, k)."""
    mean = h.diagonal().mean()
    dead = h.diagonal() == 0
    damped = h + torch.diag(torch.where(dead, mean if mean > 0 else 1.0, DAMPING * mean))
    inverse = torch.linalg.inv(damped)
    w, index = w.clone(), torch.zeros_like(w)
    for j in h.diagonal().sort(descending=True, stable=True).indices.tolist():
        index[:, j] = nearest(w[:, j], scale[:, j], shift[:, j], low, count)
        error = w[:, j] - (scale[:, j] * (index[:, j] + low) - shift[:, j])
        w -= torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return index


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Levels, Tensor]:
    """Weights, moments (dead inputs, fewer samples than inputs, none at all), levels, nearest indices."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    g, o = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    k = draw(st.sampled_from([1, 2, 5, 9, 40, 150]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    x = normal(g, k, draw(st.sampled_from([0, 1, 3, 200])))
    x = (
        normal(g, k, k).div(k**0.5).add(torch.eye(k, dtype=DOUBLE))
        @ x
        * draw(st.sampled_from([1e-3, 1, 1e4]))
    )
    if draw(st.booleans()):
        x[:, torch.randint(k, (1,), generator=generator)] = 0
    bits = draw(st.integers(2, 5))
    w = normal(g, o, k)
    size = draw(st.sampled_from([(1, 1, 1), (g, 1, 1), (g, o, 1)]))
    scale = (normal(*size).abs() + 0.5) * 2 / 2**bits
    levels = Levels(scale, normal(*size) * scale, -(2 ** (bits - 1)), 2**bits)
    wide = levels.expand(w.shape)
    return w, x @ x.mT, levels, nearest(w, wide.scale, wide.shift, levels.code_min, levels.count)


@settings(deadline=None, max_examples=40)
@given(problems())
def test_as_optimal_brain_quantization_column_by_column(problem: Any) -> None:
    w, h, levels, start = problem
    index = round_rows(w, h, levels, start)
    wide = levels.expand(w.shape)
    for g in range(len(w)):
        own = one_by_one(w[g], h[g], wide.scale[g], wide.shift[g], levels.code_min, levels.count)
        ours = quadratic_error(levels.value(index) - w, h)[g]
        theirs = [
            quadratic_error(levels.value(i.expand(w.shape)) - w, h)[g] for i in (own[None], start[g][None])
        ]
        torch.testing.assert_close(ours, torch.minimum(*theirs), rtol=1e-6, atol=1e-9 * float(h.abs().max()))


@settings(deadline=None, max_examples=60)
@given(problems())
def test_no_row_gets_worse_and_codes_are_codes(problem: Any) -> None:
    w, h, levels, start = problem
    index = round_rows(w, h, levels, start)
    assert torch.equal(index, index.round())
    assert 0 <= int(index.min()) <= int(index.max()) < levels.count
    errors = [quadratic_error(levels.value(i) - w, h) for i in (index, start)]
    assert bool((errors[0] <= errors[1]).all())
    dead = (h.diagonal(dim1=-2, dim2=-1) == 0)[:, None].expand(w.shape)
    assert torch.equal(index[dead], start[dead])


def test_correlated_inputs_gain_much() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1000, generator=generator, dtype=DOUBLE) * 0.3
    x += torch.randn(1, 1000, generator=generator, dtype=DOUBLE)
    w = torch.randn(1, 16, 64, generator=generator, dtype=DOUBLE)
    levels = Levels(torch.tensor(0.7, dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE), -4, 8)
    start, h = levels.nearest(w), (x @ x.T)[None]
    errors = [quadratic_error(levels.value(i) - w, h).sum() for i in (round_rows(w, h, levels, start), start)]
    assert float(errors[0] / errors[1]) < 0.5


def test_an_indefinite_matrix_is_damped_until_it_is_none() -> None:
    h = torch.tensor([[[1.0, 1.5], [1.5, 1.0]]], dtype=DOUBLE)
    w = torch.tensor([[[0.3, -0.6]]], dtype=DOUBLE)
    levels = Levels(torch.ones(()), torch.zeros(()), -2, 4)
    index = round_rows(w, h, levels, levels.nearest(w))
    assert bool(index.isfinite().all())


# ---- inputs of all forms ---------------------------------------------------------------------------------------------


class Form(nn.Module):
    """``function`` of an input and a weight of that shape."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def twice(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat((F.linear(x, w), F.linear(x.flip(-1) * 2, w)), -1)


def looped(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(1):
        x = torch.tanh(F.linear(x, w))
    return F.linear(x, w)


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (2, 7, 5)),
    "linear of one sample": (lambda: nn.Linear(5, 3), (1, 5)),
    "F.linear": (lambda: Form((3, 5), F.linear), (2, 7, 5)),
    "F.linear by keywords": (lambda: Form((3, 5), lambda x, w: F.linear(input=x, weight=w)), (2, 7, 5)),
    "W @ x": (lambda: Form((3, 5), lambda x, w: w @ x), (2, 5, 7)),
    "x @ W": (lambda: Form((5, 3), lambda x, w: x @ w), (2, 7, 5)),
    "transposed weight": (lambda: Form((5, 3), lambda x, w: F.linear(x, w.t())), (2, 7, 5)),
    "viewed weight": (lambda: Form((15,), lambda x, w: F.linear(x, w.view(3, 5))), (2, 7, 5)),
    "1x1": (lambda: nn.Conv2d(5, 3, 1), (2, 5, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    "conv1d without a batch": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 7)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 5, 4)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 5, 4)),
    "conv2d, reflecting": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1, stride=(1, 2, 1)), (1, 2, 3, 4, 5)),
    "F.conv2d": (
        lambda: Form((4, 3, 3, 3), lambda x, w: F.conv2d(x, w, stride=2, padding=1, dilation=1)),
        (2, 3, 8, 7),
    ),
    "depthwise conv1d": (lambda: nn.Conv1d(5, 5, 4, padding=3, groups=5), (2, 5, 9)),
    "depthwise conv2d": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 6, 7)),
    "depthwise of two outputs": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 6, 7)),
    "einsum": (lambda: Form((3, 5), lambda x, w: torch.einsum("bcl,kc->bkl", x, w)), (2, 5, 7)),
    "einsum by direction": (
        lambda: Form((4, 3, 5), lambda x, w: torch.einsum("bkdl,kcd->bkcl", x, w)),
        (2, 4, 5, 7),
    ),
    "einsum, weight first": (
        lambda: Form((4, 5, 3), lambda x, w: torch.einsum("kdc,lkbd->bklc", w, x)),
        (7, 4, 2, 5),
    ),
    "einsum over two axes": (
        lambda: Form((3, 2, 5), lambda x, w: torch.einsum("bhdl,ohd->bol", x, w)),
        (2, 2, 5, 7),
    ),
    "einsum, one for all directions": (
        lambda: Form((4, 3, 5), lambda x, w: torch.einsum("bkdl,kcd->bkcl", x, w)),
        (2, 1, 5, 7),
    ),
    "grouped conv1d by direction": (
        lambda: Form((4, 3, 5), lambda x, w: F.conv1d(x.flatten(1, 2), w.reshape(12, 5, 1), None, groups=4)),
        (2, 4, 5, 7),
    ),
    "twice": (lambda: Form((3, 5), twice), (2, 7, 5)),
    "in a loop": (lambda: Form((5, 5), looped), (2, 7, 5)),
}


def prepared_form(name: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, shape = FORMS[name]
    x = torch.randn(shape)
    return ssmquant.prepare(build(), gptq(**options), example_inputs=x).eval(), x


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
    dead = ssmquant.prepare(Chained(), gptq(), example_inputs=x)
    ssmquant.calibrate(dead, [x])
    assert all(p.isfinite().all() for p in dead.parameters())


class Chained(nn.Module):
    """The second layer reads zeros in one of two batches' worth of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x) - 2))


# ---- quantizers and dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_bits", [2, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"weight": "rfa"},
        {"weight": "rfa", "weight_options": {"shift": "half"}},
        {"weight": "lsq", "granularity": "tensor"},
        {"weight": "minmax"},
        {"weight": "rlq"},
        {"weight": "rfa", "smooth": 1.0},
        {"weight": "lsq", "smooth": 0.5, "initialization": "published"},
    ],
    ids=str,
)
def test_every_static_quantizer(options: dict[str, Any], w_bits: int) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 7, 5)
    model = prepared_and_calibrated(Scanner(width=6).eval(), gptq(w_bits, **options), x)
    assert all(note.startswith("gptq") for note in runtime_of(model).rounded.values())
    assert len(runtime_of(model).rounded) == 5
    before = copy.deepcopy(model.state_dict())
    ssmquant.calibrate(model, [x * 0.3])
    for (
        k,
        v,
    ) in model.state_dict().items():  # gains and weights' scales are those that the weights were rounded for
        assert torch.equal(v, before[k]) or "activations" in k, k
        assert not k.endswith(".gain") or torch.equal(v, before[k]), k
    assert torch.equal(ssmquant.convert(model).eval()(x).argmax(), model(x).argmax())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12).to(dtype)
    model = ssmquant.prepare(nn.Linear(12, 9).to(dtype), gptq(), example_inputs=x)
    ssmquant.calibrate(model, [x])
    assert runtime_of(model).rounded["weight:weight"].startswith("gptq")
    assert model.weight.dtype == dtype
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    assert torch.equal(quantizer.encode(model.weight).decode(), model.weight)


def test_trained_thresholds_that_do_not_give_the_codes_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    model = ssmquant.prepare(nn.Linear(12, 9), gptq(weight="rfa"), example_inputs=x)
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    with torch.no_grad():
        quantizer.grid.add_(1.2)
    before = model.weight.clone()
    ssmquant.calibrate(model, [x])
    assert "trained thresholds" in runtime_of(model).rounded["weight:weight"]
    assert torch.equal(model.weight, before)


def test_in_inference_mode() -> None:
    model, x = prepared_form("conv2d")
    with torch.inference_mode():
        ssmquant.calibrate(model, [x])
    model.train()(x).sum().backward()
    assert next(iter(runtime_of(model).rounded.values())).startswith("gptq")


def test_training_goes_on_from_the_rounded_weights() -> None:
    model, x = prepared_form("linear")
    ssmquant.calibrate(model, [x]).train()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert bool(model.weight.isfinite().all())


def test_trained_weights_are_rounded_again() -> None:
    model, x = prepared_form("linear")
    ssmquant.calibrate(model, [x])
    with torch.no_grad():
        model.weight.add_(0.05 * torch.randn_like(model.weight))
    ssmquant.calibrate(model, [x])
    quantizer: Any = runtime_of(model).weights["weight:weight"]
    assert isinstance(quantizer, Quantizer)
    assert torch.equal(quantizer.encode(model.weight).decode(), model.weight)


# ---- whole models ----------------------------------------------------------------------------------------------------


def zoo_mambair() -> nn.Module:
    return tiny_mambair(embed_dim=16)


@pytest.mark.parametrize(
    "build", [zoo_mambair, vim, lambda: vmamba("v05_noz")], ids=["mambair", "vim", "vmamba"]
)
def test_outputs_of_real_models_get_better(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    data = [images(2, 3, 16, 16, seed=s) for s in range(8)]
    errors = []
    for rounding in ("nearest", "gptq"):
        config = QConfig.mambaquant(3, 8, rounding=rounding, transforms=())
        prepared = ssmquant.prepare(model, config, example_inputs=data[0])
        ssmquant.calibrate(prepared, data[:5]).eval()
        with torch.no_grad():
            errors.append(sum(float((prepared(x) - model(x)).square().mean()) for x in data[5:]))
    assert errors[1] < 0.95 * errors[0]


def test_after_transforms_and_everywhere_it_has_to_be_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 16, 16)
    model = ssmquant.prepare(vim(), QConfig.mambaquant(4, 8, rounding="gptq"), example_inputs=x)
    ssmquant.calibrate(model, [x]).eval()
    runtime = runtime_of(model)
    assert runtime.transforms.applied
    assert sum(note.startswith("gptq") for note in runtime.rounded.values()) >= 8
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert runtime_of(other).rounded == runtime.rounded
        assert torch.equal(other(x), model(x))
    deployed = ssmquant.convert(model)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-4)
    path = tmp_path / "model.safetensors"
    ssmquant.save(deployed, path)
    loaded = ssmquant.load(path)
    assert torch.equal(loaded(x), deployed(x))
    notes = {name: row.note for name, row in rows(model).items()}
    assert notes == {name: row.note for name, row in rows(loaded).items()}
    assert any("of nearest's squared error" in note for note in notes.values())
    content = path.read_bytes()
    path.write_bytes(with_meta(content, {**meta_of(content), "rounded": {"a": 1}}))
    with pytest.raises(ssmquant.FormatError, match="rounded"):
        ssmquant.load(path)
    model.load_state_dict(vim().state_dict())
    assert runtime.rounded == {}


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_a_failure_puts_everything_back(error: type[BaseException], smooth: float) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = ssmquant.prepare(Scanner().eval(), gptq(smooth=smooth), example_inputs=x)
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def forward(m: nn.Module, batch: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the pass that measures inputs
            raise error
        m(batch)

    with pytest.raises(error):
        ssmquant.calibrate(model, [x, x], forward=forward)
    assert calls == 4
    assert runtime_of(model).rounded == {}
    assert runtime_of(model).instead is None
    assert all(torch.equal(v, before[k]) or k.endswith(".seen") for k, v in model.state_dict().items())
    assert all(v.isnan().all() for k, v in model.state_dict().items() if k.endswith(".seen"))


def test_undone_after_half_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmquant.graph.rounding import weights

    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = ssmquant.prepare(Scanner().eval(), gptq(), example_inputs=x)
    before = copy.deepcopy(model.state_dict())
    original, count = weights.round_rows, 0

    def failing(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(weights, "round_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        ssmquant.calibrate(model, [x])
    assert all(torch.equal(v, before[k]) or k.endswith(".seen") for k, v in model.state_dict().items())


def test_nan_in_a_batch_names_the_place_and_changes_nothing() -> None:
    torch.manual_seed(0)
    x = images(2, 3, 6, 5)
    model = ssmquant.prepare(
        Scanner().eval(), gptq(a_bits=None), example_inputs=x
    )  # no quantizer looks at it
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="'stem'"):
        ssmquant.calibrate(model, [x, x * float("nan")])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
