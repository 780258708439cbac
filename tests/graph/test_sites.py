"""What shares a quantizer, what stays in float and why, and what is refused; scans and the published placement."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import Adapter, CoverageError, QConfig, Rule, zoo
from ssmquant.graph.runtime import runtime_of
from ssmquant.ops.selective_scan import selective_scan
from tests.graph.sites import check, quantized
from tests.small import (
    Chain,
    Scanner,
    X,
    images,
    light,
    points,
    prepared_and_calibrated,
    rows,
    scanner,
    tiny_mambair,
)

# ---- activations ---------------------------------------------------------------------------------------------------


class Fork(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = self.a(x)
        if self.in_place:
            x.mul_(3).add_(1)
        return y + self.b(x)


def test_one_value_has_one_quantizer() -> None:
    prepared = check(Fork(), (6, 4), (9, 4))
    found = points(prepared)
    assert [k for k in found if ":input" in k] == ["a:input"]
    assert [site.name for site, _ in found["a:input"].uses] == ["a", "b"]
    config = QConfig(w_bits=3, a_bits=4, keep_first_last=False, rules=(Rule("b", a_bits=8),))
    differing = check(Fork(), (6, 4), config=config)
    assert [k for k in points(differing) if ":input" in k] == ["a:input", "b:input"]


def test_a_value_changed_in_place_is_another_value() -> None:
    prepared = check(Fork(in_place=True), (6, 4), (9, 4))
    assert [k for k in points(prepared) if ":input" in k] == ["a:input", "b:input"]
    x = torch.randn(5, 4)
    t, runtime = torch.tanh(x), runtime_of(prepared)
    w = {n: runtime.weights[f"{n}:weight"](getattr(prepared, n).weight) for n in "ab"}
    expected = F.linear(quantized(prepared, "a:input", t), w["a"], prepared.a.bias)
    expected = expected + F.linear(quantized(prepared, "b:input", t * 3 + 1), w["b"], prepared.b.bias)
    assert torch.equal(prepared(x), expected)


def test_a_scan_and_a_projection_read_one_value_with_different_quantizers() -> None:
    found = points(scanner())
    assert found["x_proj:input"].node is found["scan.u"].node
    assert (found["x_proj:input"].scheme.method, found["scan.u"].scheme.method) == ("lsq", "dls")
    same = ssmquant.prepare(Scanner(), QConfig.lsq(4, 4), example_inputs=(X,))
    assert "scan.u" not in points(same)
    assert [site.name for site, _ in points(same)["x_proj:input"].uses] == ["x_proj", "scan"]


def test_samples_are_followed() -> None:
    found = points(scanner())
    axes = {
        k: found[k].axis
        for k in ("scan.u", "scan.delta", "scan.B", "scan.C", "out_proj:input", "in_proj:input")
    }
    assert set(axes.values()) == {0}
    assert found["scan.A"].axis is None
    assert not [r for r in rows(scanner()).values() if "statistics per tensor" in r.note]


class Folds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 4)
        y = self.a(x)
        first = self.inner(y.reshape(-1, 4)).view(x.shape)
        return self.b(first.transpose(0, 1)).transpose(0, 1)


def test_samples_are_lost_where_the_code_folds_the_batch() -> None:
    config = QConfig(w_bits=4, a_bits=4, activation="dls", keep_first_last=False)
    prepared = check(Folds(), (2, 6, 4), (3, 5, 4), config=config)
    assert {k: p.axis for k, p in points(prepared).items() if ":input" in k} == {
        "a:input": 0, "inner:input": None, "b:input": 1,
    }  # fmt: skip
    notes = {n: r.note for n, r in rows(prepared).items()}
    assert "folds the batch away" in notes["inner"]
    assert not notes["a"]
    assert not notes["b"]
    assert "folds the batch away" in str(ssmquant.summary(prepared))
    x = torch.randn(2, 6, 4)
    per_tensor = ssmquant.prepare(
        Folds(), dataclasses.replace(config, statistics="tensor"), example_inputs=(x,)
    )
    assert not [r for r in rows(per_tensor).values() if r.note]


# ---- scans ---------------------------------------------------------------------------------------------------------


def test_the_seven_operands_of_a_scan() -> None:
    found = {k: p.what for k, p in points(scanner()).items() if k.startswith("scan")}
    dynamic, static = ("u", "delta", "B", "C"), ("A", "D", "delta_bias")
    assert found == {
        **{f"scan.{k}": "activation" for k in dynamic},
        **{f"scan.{k}": "static" for k in static},
    }
    assert {p.scheme.method for k, p in points(scanner()).items() if k.startswith("scan")} == {"dls"}


def test_the_projection_behind_the_scan_reads_it() -> None:
    methods = {k: p.scheme.method for k, p in points(scanner()).items() if k.endswith(":input")}
    assert methods == {"in_proj:input": "lsq", "x_proj:input": "lsq", "out_proj:input": "dls"}
    assert [s.name for s in runtime_of(scanner()).records[0].plan.sites if s.reads_scan] == ["out_proj"]


def test_a_scan_computes_on_its_quantized_operands() -> None:
    model = scanner(4)
    with torch.no_grad():
        tokens = model.stem(X).flatten(2).transpose(1, 2).contiguous()
        w = runtime_of(model).weights
        u = F.linear(quantized(model, "in_proj:input", tokens), w["in_proj:weight"](model.in_proj.weight))
        u = F.silu(u).transpose(1, 2).contiguous()
        parts = torch.einsum(
            "bcl,kc->bkl", quantized(model, "x_proj:input", u), w["x_proj:weight"](model.x_proj)
        )
        delta, b, c = parts.split([4, 2, 2], 1)
        operands = {"u": u, "delta": delta, "A": -torch.exp(model.A_log), "B": b, "C": c, "D": model.D}
        q = [quantized(model, f"scan.{k}", v) for k, v in operands.items()]
        bias = quantized(model, "scan.delta_bias", model.dt_bias)
        y = selective_scan(*q, delta_bias=bias, delta_softplus=True).transpose(1, 2).contiguous()
        weight = w["out_proj:weight"](model.out_proj.weight)
        y = F.linear(quantized(model, "out_proj:input", y), weight, model.out_proj.bias)
        y = model.head(y.transpose(1, 2).reshape(2, 4, 6, 5) + model.stem(X)) + X
        torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)


# ---- what stays in float -------------------------------------------------------------------------------------------


def test_first_and_last_layers_stay_in_float() -> None:
    model = Chain(nn.Conv2d(4, 4, 1))
    reasons = {
        n: r.note for n, r in rows(prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), X)).items()
    }
    assert reasons == {"first": "first layer", "middle": "", "last": "last layer"}
    everything = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4, keep_first_last=False), X)
    assert {r.scheme for r in rows(everything).values()} == {"W4A4"}
    ruled = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4, rules=(Rule("first", w_bits=8),)), X)
    assert [r.scheme for r in rows(ruled).values()] == [
        "W8A4",
        "W4A4",
        "float",
    ]  # a rule outweighs the placement


class Gate(nn.Module):
    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        pooled = y.mean((2, 3), keepdim=True) if self.pool == "mean" else F.adaptive_avg_pool2d(y, 1)
        return y * torch.sigmoid(self.excite(F.gelu(self.squeeze(pooled))))


@pytest.mark.parametrize("pool", ["mean", "adaptive"])
def test_channel_attention_stays_in_float(pool: str) -> None:
    prepared = prepared_and_calibrated(Chain(Gate(pool)), QConfig(w_bits=4, a_bits=4), X)
    notes = {n: r.note for n, r in rows(prepared).items()}
    assert notes["middle.squeeze"] == notes["middle.excite"] == "channel attention"
    assert notes["middle.body"] == ""
    opened = prepared_and_calibrated(Chain(Gate(pool)), QConfig(w_bits=4, a_bits=4, keep_gates=False), X)
    assert rows(opened)["middle.squeeze"].scheme == "W4A4"


def test_norms_biases_and_embeddings_are_listed_as_float() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            self.position, self.scale = nn.Parameter(torch.randn(1, 7, 4)), nn.Parameter(torch.ones(4))
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.proj(x + self.position)) * self.scale

    prepared = check(Mixed(), (2, 7, 4), (5, 7, 4))
    floats = dict(ssmquant.summary(prepared).floats)
    assert floats["proj.bias"] == "bias"
    assert floats["norm.weight"] == floats["norm.bias"] == "LayerNorm"
    assert floats["position"] == "add"
    assert floats["scale"] == "mul"


# ---- coverage ------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.flatten(0, -2).t() @ g.flatten(0, -2)


class UsesFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.w, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Scale.apply(self.first(x), self.w))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Bilinear(8, 8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.inner(x, x))


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.first, self.inner, self.last = nn.Linear(8, 8), inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.parametrize(
    ("cls", "named", "patterns"),
    [
        (Attends, "attention.in_proj_weight", ["attention"]),
        (UsesFunction, "parameter w", ["w"]),
        (Bilinear, "inner.weight", ["inner"]),
        (WeightNorm, "inner.parametrizations.weight", ["inner"]),
    ],
)
def test_nothing_is_skipped_in_silence(cls: type[nn.Module], named: str, patterns: list[str]) -> None:
    x = torch.randn(2, 5, 8)
    with pytest.raises(CoverageError, match=named) as caught:
        ssmquant.prepare(cls(), QConfig(w_bits=4, a_bits=4), example_inputs=(x,))
    assert "keep_float" in str(caught.value)
    assert "test_sites.py:" in str(caught.value)
    model = cls()
    prepared = prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4, keep_float=tuple(patterns)), x)
    torch.testing.assert_close(prepared(x), model(x))  # all else is first or last
    torch.testing.assert_close(ssmquant.convert(prepared)(x), prepared(x))
    assert ssmquant.prepare(model, QConfig(), example_inputs=(x,)) is not None  # nothing was asked for


@pytest.mark.parametrize(
    "rule", [Rule("nonesuch", w_bits=2), Rule("re:layer.*"), Rule("*.qkv", keep_float=True), Rule("Conv4d")]
)
def test_a_rule_that_matches_nothing(rule: Rule) -> None:
    with pytest.raises(CoverageError, match=r"matches no site; .*: stem, in_proj"):
        ssmquant.prepare(Scanner(), QConfig(w_bits=2, a_bits=2, rules=(rule,)), example_inputs=(X,))


def test_a_rule_for_a_parameter_that_is_no_site() -> None:
    with pytest.raises(CoverageError, match=r"matches stem\.bias, which is no site \(bias\)"):
        ssmquant.prepare(
            Scanner(), QConfig(w_bits=2, rules=(Rule("stem.bias", w_bits=4),)), example_inputs=(X,)
        )


def test_adapters_say_what_stays_in_float_and_rules_overrule_them() -> None:
    adapter = Adapter("mine", keep_float=("re:in_.*",))
    prepared = ssmquant.prepare(Scanner(), QConfig(w_bits=2, a_bits=2), example_inputs=(X,), adapter=adapter)
    assert rows(prepared)["in_proj"].note == "published placement"
    for rule, scheme in ((Rule("in_*", w_bits=5), "W5A2"), (Rule("Linear", w_bits=5), "float")):
        config = QConfig(w_bits=2, a_bits=2, rules=(rule,))
        overruled = ssmquant.prepare(Scanner(), config, example_inputs=(X,), adapter=adapter)
        assert (
            rows(overruled)["in_proj"].scheme == scheme
        )  # a rule that names it speaks louder, one for a type does not
        assert rows(overruled)["out_proj"].scheme == ("W2A2" if scheme == "W5A2" else "W5A2")


# ---- the published placement ---------------------------------------------------------------------------------------


def count(model: nn.Module) -> dict[tuple[str, str], int]:
    out: dict[tuple[str, str], int] = {}
    for p in points(model).values():
        out[p.what, p.scheme.method] = out.get((p.what, p.scheme.method), 0) + 1
    return out


def test_placement_on_a_tiny_mambair() -> None:
    model = ssmquant.prepare(tiny_mambair(depths=(1, 1)), QConfig.qmambair(2))
    kept = {n for n, r in rows(model).items() if r.scheme == "float"}
    assert kept == {"conv_first", "conv_after_body", "upsample.0"} | {
        f"layers.{i}.residual_group.blocks.0.conv_blk.cab.5.attention.{j}" for i in (0, 1) for j in (1, 3)
    }


def test_placement_on_the_light_model() -> None:
    assert count(light()) == {
        ("weight", "rfa"): 220, ("activation", "lsq"): 196, ("activation", "dls"): 120, ("static", "dls"): 72,
    }  # fmt: skip


@pytest.mark.slow
def test_placement_on_the_classic_model() -> None:
    x = images(1, 3, 8, 8)
    model = ssmquant.prepare(
        zoo.build("mambair_classic", upscale=2), QConfig.qmambair(2), example_inputs=(x,)
    )
    assert count(model) == {
        ("weight", "rfa"): 258, ("activation", "lsq"): 222, ("activation", "dls"): 180, ("static", "dls"): 108,
    }  # fmt: skip
