"""Habits of foreign code that once gave wrong numbers in silence, each found by an independent review.

A size, dtype, mode or layout that the code asked for in a way the tracer did not see; hooks, ties and regions that a
rewriting lost. Every case compares with the float model (nothing quantized), or expects an error that says what to do.
"""

from __future__ import annotations

import functools
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssmquant
from ssmquant import CoverageError, QConfig, Rule, TraceError

FLOAT = QConfig()
W8 = QConfig(w_bits=8, a_bits=8, keep_first_last=False)


class Model(nn.Module):
    """A linear layer and a function of (self, x): what the function does is the case."""

    def __init__(self, code: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.code = code

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.code(self, x, *args)


def same(model: nn.Module, example: tuple[Any, ...], *calls: tuple[Any, ...]) -> None:
    prepared = ssmquant.prepare(model.eval(), FLOAT, example_inputs=example).eval()
    for call in (example, *calls):
        torch.testing.assert_close(prepared(*call), model(*call), rtol=0, atol=0)


def quantized(model: nn.Module, config: QConfig, x: Tensor) -> Any:
    prepared = ssmquant.prepare(model.eval(), config, example_inputs=(x,))
    return ssmquant.calibrate(prepared, [x]).eval()


def loop_over_time(self: Any, x: Tensor) -> Tensor:  # (B, C, T): the last dimension is the one that is free
    h = torch.zeros_like(x[..., 0])
    for t in range(x.shape[-1]):
        h = torch.tanh(self.f(h) + x[..., t])
    return h


def test_sizes_are_free_or_guarded_in_every_dimension() -> None:
    same(Model(loop_over_time), (torch.randn(2, 4, 6),), (torch.randn(3, 4, 8),), (torch.randn(1, 4, 5),))
    rows = Model(lambda self, x: self.f(x) * sum(range(x.shape[1])))  # (B, H, W, C)
    same(rows, (torch.randn(2, 6, 5, 4),), (torch.randn(2, 7, 5, 4),), (torch.randn(2, 6, 9, 4),))


@pytest.mark.parametrize(
    "code",
    [
        lambda self, x: functools.reduce(lambda y, _: y * 2, range(x.shape[1] % 4), self.f(x)),
        lambda self, x: self.f(x) * math.gcd(x.shape[1], 8),
    ],
    ids=["range", "gcd"],
)
def test_sizes_that_reach_c_code(code: Any) -> None:
    same(Model(code), (torch.randn(2, 16, 4),), (torch.randn(2, 14, 4),), (torch.randn(2, 12, 4),))


def test_a_guard_that_makes_no_sense_alone() -> None:
    def code(self: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        return self.f(x) * (2 if n >= 4 and 8 // (n // 4) == 2 else 3)

    same(Model(code), (torch.randn(2, 16, 4),), (torch.randn(2, 2, 4),))


@pytest.mark.parametrize(
    ("code", "call"),
    [
        (
            lambda self, x: self.f(x if x.is_floating_point() else x.float() / 255),
            torch.ones(2, 4, dtype=torch.uint8),
        ),
        (lambda self, x: self.f(x) * (1 if x.is_contiguous() else 2), torch.randn(4, 2).t()),
        (lambda self, x: self.f(x) * (2 if torch.is_grad_enabled() else 3), torch.randn(2, 4)),
        (lambda self, x: self.f(x) * (2 if torch.is_autocast_enabled("cpu") else 3), torch.randn(2, 4)),
    ],
    ids=["dtype predicate", "layout", "grad mode", "autocast"],
)
def test_questions_that_are_guards(code: Any, call: Tensor) -> None:
    model = Model(code)
    same(model, (torch.randn(2, 4),), (call,))
    prepared = ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 4),)).eval()
    with torch.no_grad():
        torch.testing.assert_close(prepared(call), model(call), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prepared(call), model(call), rtol=0, atol=0)


def test_static_arguments_of_other_types() -> None:
    model = Model(
        lambda self, x, k: self.f(x) * (5 if isinstance(k, bool) else 7 if isinstance(k, float) else 9)
    )
    same(model, (torch.randn(2, 4), 1), (torch.randn(2, 4), True), (torch.randn(2, 4), 1.0))


@pytest.mark.parametrize("where", ["forward", "pre"])
def test_hooks_on_quantized_layers_run(where: str) -> None:
    model = Model(lambda self, x: self.f(x))
    if where == "forward":
        model.f.register_forward_hook(lambda m, a, out: out * 10)
    else:
        model.f.register_forward_pre_hook(lambda m, a: (a[0] * 10,))
    x = torch.randn(64, 4)
    prepared = quantized(model, W8, x)
    assert len(prepared._ssmquant.weights) == 1
    assert (prepared(x) - model(x)).norm() < 0.05 * model(x).norm()  # without the hook: ten times off


def test_transposed_convolutions_keep_their_output_size() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x), output_size=x.shape[-2:])

    same(Up(), (torch.randn(2, 3, 8, 8),), (torch.randn(2, 3, 7, 8),))
    prepared = quantized(Up(), W8, torch.randn(2, 3, 8, 8))
    assert prepared(torch.randn(1, 3, 8, 7)).shape == (1, 3, 8, 7)


def writes_into_a_view(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(2, 4)
    for i in range(2):
        out[i].copy_(x[i])
    return out


def carries_state(self: Any, x: Tensor) -> Tensor:
    self.memory = 0.5 * self.memory + x
    return self.memory


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (writes_into_a_view, "view"),
        (carries_state, "register_buffer"),
        (lambda self, x: self.f(x) * (2 if random.random() < 0.5 else 3), "random generator"),
        (lambda self, x: self.f(x) * float(np.random.rand()), "random generator"),
        (lambda self, x: x + torch.randn(4, generator=torch.Generator()), "generator"),
    ],
    ids=["view of a constant", "state in an attribute", "random", "numpy", "generator"],
)
def test_what_a_graph_cannot_do_is_refused(code: Any, says: str) -> None:
    model = Model(code)
    model.memory = torch.zeros(2, 4)
    with pytest.raises(TraceError, match=says):
        ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 4),))
    model.memory = torch.zeros(2, 4)
    model(torch.randn(2, 4))  # still runs


def test_a_parameter_in_a_closure_is_refused() -> None:
    model = Model(lambda self, x: self.core(x))
    weight = nn.Parameter(torch.randn(4, 4))
    model.core = lambda x: F.linear(x, weight)
    with pytest.raises(TraceError, match="does not belong"):
        ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 4),))


def test_attributes_that_the_prepared_model_no_more_changes_are_listed() -> None:
    def code(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.f(x)
        return self.last

    model = Model(code)
    model.calls, model.last = 0, None
    notes = " ".join(
        ssmquant.summary(ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 4),))).notes
    )
    assert "'calls'" in notes
    assert "'last'" in notes
    assert model.calls == 0
    assert model.last is None


@pytest.mark.parametrize(
    "code",
    [
        lambda self, x: torch.tensordot(x, self.w, 1),
        lambda self, x: torch.inner(x, self.w),
        lambda self, x: F.linear(x, self.w * x.mean()),
        lambda self, x: F.scaled_dot_product_attention(x[None], self.w[None], self.w[None])[0],
    ],
    ids=["tensordot", "inner", "modulated weight", "attention"],
)
def test_products_that_no_site_covers(code: Any) -> None:
    model = Model(code)
    model.w = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(CoverageError, match="parameter w"):
        ssmquant.prepare(model, W8, example_inputs=(torch.randn(2, 4),))
    kept = QConfig(w_bits=8, a_bits=8, keep_float=["w"])
    assert ssmquant.prepare(model, kept, example_inputs=(torch.randn(2, 4),)) is not None


def test_grad_mode_is_the_callers_again_after_an_error() -> None:
    def code(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.f(x)
        with torch.no_grad(), torch.enable_grad():
            return self.f(y)

    prepared = ssmquant.prepare(Model(code), W8, example_inputs=(torch.randn(2, 4),)).eval()
    with pytest.raises(ssmquant.NotCalibratedError):
        prepared(torch.randn(2, 4))
    assert torch.is_grad_enabled()
    ssmquant.calibrate(prepared, [torch.randn(2, 4)])
    with torch.no_grad():
        prepared(torch.randn(2, 4))
        assert not torch.is_grad_enabled()


def scaling(factor: float) -> Any:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * factor

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * factor

    return Scale


def test_functions_of_one_name_stay_apart() -> None:
    two, three = scaling(2.0), scaling(3.0)
    model = Model(lambda self, x: two.apply(self.f(x)) + three.apply(x) * two.apply(x))
    same(model, (torch.randn(2, 4),), (torch.randn(5, 4),))


def test_whole_and_broken_multiples_of_a_size() -> None:
    def code(self: Any, x: Tensor) -> tuple[Tensor, Any, Any]:
        n = x.shape[0]
        return self.f(x), n * 2, n * 2.0

    model = Model(code).eval()
    prepared = ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 4),)).eval()
    assert [type(v) for v in prepared(torch.randn(5, 4))[1:]] == [int, float]


def test_a_sequential_root() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    same(model, (torch.randn(2, 4),), (torch.randn(5, 4),))


def test_forward_that_walks_over_its_parameters() -> None:
    model = Model(lambda self, x: self.f(x) + sum(p.square().sum() for p in self.parameters()))
    x = torch.randn(64, 4)
    prepared = quantized(model, QConfig(w_bits=8, keep_first_last=False), x)
    torch.testing.assert_close(prepared(x[:, None]), model(x[:, None]), rtol=0.05, atol=0.1)  # traced again


def test_a_layer_quantized_at_one_of_its_uses() -> None:
    model = Model(lambda self, x: self.f(torch.relu(self.f(torch.relu(self.f(x))))))
    prepared = quantized(model, QConfig(w_bits=8, a_bits=8), torch.randn(64, 4))  # first and last in float
    x = torch.randn(64, 4)
    torch.testing.assert_close(prepared(x), model(x), rtol=0.05, atol=0.1)
    second = quantized(
        model, QConfig(w_bits=8, rules=[Rule("f#2", keep_float=True)], keep_first_last=False), x
    )
    assert second(x).isfinite().all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.f, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.f(self.emb(ids))
        return self.head(h * 2 if ids.shape[1] > 6 else h)


@pytest.mark.usefixtures("plain_graphs")
def test_tied_weights_are_traced_again_after_convert() -> None:
    prepared = quantized(Tied(), W8, torch.randint(0, 10, (2, 5)))
    deployed = ssmquant.convert(prepared)
    longer = torch.randint(0, 10, (2, 9))  # breaks a guard
    torch.testing.assert_close(deployed(longer), prepared(longer), rtol=0, atol=0)


@pytest.mark.usefixtures("plain_graphs")
def test_a_value_shared_by_a_checkpoint_region_and_what_follows() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.i(x))
            return h, self.a(h)

        def forward(self, x: Tensor) -> Tensor:
            h, y = checkpoint(self.part, x, use_reentrant=False)
            return self.b(h) + y

    x = torch.randn(64, 4)
    prepared = quantized(Regions(), W8, x)
    prepared.train()(x).sum().backward()
    assert prepared.i.weight.grad.isfinite().all()
    torch.testing.assert_close(ssmquant.convert(prepared)(x), prepared.eval()(x), rtol=0, atol=0)


@pytest.mark.usefixtures("plain_graphs")
def test_a_head_for_training_only_needs_no_calibration() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.f, self.aux = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.f(torch.relu(self.i(x)))
            return (y, self.aux(y)) if self.training else y

    x = torch.randn(64, 4)
    model = Aux()
    prepared = quantized(model, W8, x)
    deployed = ssmquant.convert(prepared)
    assert not any("aux" in k for k in deployed.state_dict() if k.startswith("_ssmquant."))
    torch.testing.assert_close(deployed(x), prepared(x), rtol=0, atol=0)


def test_numbers_read_from_parameters_follow_a_loaded_file(tmp_path: Any) -> None:
    def build(k: float) -> Model:
        torch.manual_seed(0)
        model = Model(scaled)
        model.k = nn.Parameter(torch.tensor(k))
        return model

    x = torch.randn(8, 4)
    deployed = ssmquant.convert(quantized(build(5.0), W8, x))
    ssmquant.save(deployed, tmp_path / "m.safetensors")
    torch.testing.assert_close(
        ssmquant.load(tmp_path / "m.safetensors", build(1.0))(x), deployed(x), rtol=0, atol=0
    )


def scaled(self: Any, x: Tensor) -> Tensor:
    return self.f(x) * float(self.k)


def test_an_unpickled_model_starts_from_a_float_checkpoint() -> None:
    model = Model(scaled)
    model.k = nn.Parameter(torch.tensor(2.0))
    x = torch.randn(8, 4)
    prepared = quantized(model, W8, x)
    other = pickle.loads(pickle.dumps(prepared))
    larger = {k: v * 100 for k, v in model.state_dict().items()}
    for m in (prepared, other):
        m.load_state_dict(larger)
    alpha = next(p for n, p in other.named_parameters() if n.endswith("f:weight.alpha"))
    torch.testing.assert_close(alpha, dict(prepared.named_parameters())["_ssmquant.weights.f:weight.alpha"])


def test_dtype_of_a_parameter_is_asked_again_after_a_cast() -> None:
    model = Model(lambda self, x: self.f(x.to(self.f.weight.dtype)))
    prepared = ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 4),)).double()
    assert prepared(torch.randn(2, 4)).dtype == torch.float64


def test_verify_leaves_the_input_alone() -> None:
    model = Model(lambda self, x: self.f(x.mul_(2)))
    x = torch.randn(64, 4)
    prepared = quantized(model, W8, x.clone())
    before = x.clone()
    assert ssmquant.verify(prepared, ssmquant.convert(prepared), (x,)).worst_rel == 0
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_preparing_inside_a_traced_forward_is_refused() -> None:
    def code(self: Any, x: Tensor) -> Tensor:
        ssmquant.prepare(nn.Linear(4, 4), FLOAT, example_inputs=(torch.randn(1, 4),))
        return self.f(x)

    with pytest.raises(TraceError):
        ssmquant.prepare(Model(code), FLOAT, example_inputs=(torch.randn(2, 4),))
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"
    assert "training" not in vars(nn.Module)


def test_a_wrapped_forward_sees_keywords_as_they_were_given() -> None:
    """A decorator sets keywords of the function that it wraps: a second value by position would clash."""

    def inner(self: Any, x: Tensor, flag: bool = True, scale: float = 2.0) -> Tensor:
        return self.lin(x) * scale if flag else self.lin(x)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        @functools.wraps(inner)
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return inner(self, *args, **{**kwargs, "flag": kwargs.get("flag", False)})

    model = Wrapped()
    x = torch.randn(2, 3, 4)
    prepared = ssmquant.prepare(model, FLOAT, example_inputs=(x,), example_kwargs={"scale": 3.0})
    assert torch.equal(prepared(x, scale=3.0), model(x, scale=3.0))
    assert torch.equal(prepared(x, flag=False, scale=3.0), model(x, flag=False, scale=3.0))
