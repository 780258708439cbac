"""health and HealthMonitor count what is there, name what is wrong with a remedy, and leave the model alone."""

from __future__ import annotations

import copy
import gc
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, HealthMonitor, HealthReport, HealthRow, HealthWarning, QConfig, health
from ssmquant.analysis.measure import FIELDS, Item, measure, thin
from ssmquant.errors import InputError, NotCalibratedError
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers import QUANTIZERS, Quantizer, get_quantizer
from tests.small import Chain, Scanner, images, light, prepared_and_calibrated, rows

X = images(2, 3, 6, 5)
monitors: Any = sys.modules["ssmquant.analysis.health"]


def wide(config: QConfig | None = None, width: int = 16) -> Any:
    """A calibrated Scanner whose weights are large enough to be judged."""
    torch.manual_seed(0)
    return prepared_and_calibrated(Scanner(width).eval(), config or QConfig(w_bits=2, a_bits=2), X)


def quantizer(model: nn.Module, key: str) -> Any:
    return runtime_of(model).weights[key]


def row(report: HealthReport, name: str) -> HealthRow:
    (found,) = [r for r in report.rows if r.name == name]
    return found


def kinds(report: HealthReport) -> dict[str, list[str]]:
    return {r.name: [kind for kind, _ in r.problems] for r in report.rows if r.problems}


@torch.no_grad()
def damage(model: nn.Module, key: str, factor: float) -> Any:
    """Scales alpha and drops the shift."""
    q = quantizer(model, key)
    q.alpha.mul_(factor)
    q.beta.zero_()
    return model


# ---- counting ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def counted(q: Quantizer, x: Tensor) -> dict[str, float]:
    """The same by numpy, from what encode says."""
    code = q.encode(x, check=False)
    codes, y = code.codes.numpy(), code.decode().double().numpy()
    levels = code.levels.double().numpy()
    near = levels[np.arange(len(levels)), np.abs(levels).argmin(1)].reshape(code.scale.shape)
    values, half = x.double().numpy(), code.scale.abs().double().numpy() / 2
    low, high = (end(levels, 1).reshape(code.scale.shape) for end in (np.min, np.max))
    return {
        "used": len(np.unique(codes)),
        "zero": int((y == near).sum()),
        "scale": float(code.scale.abs().double().mean()),
        "clipped": int(((values < low - half) | (values > high + half)).sum()),
        "signal": float((values**2).sum()),
        "noise": float(((values - y) ** 2).sum()),
        "blank": int((values == 0).sum()),
    }


@given(
    st.sampled_from(sorted(QUANTIZERS)),
    st.integers(2, 8),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([0.1, 1.0, 7.0]),
    st.integers(0, 10**6),
)
def test_counts_are_those_of_the_codes(
    method: str, bits: int, axis: int | None, stretch: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    items = []
    for k in range(3):  # two of one shape go together
        x = torch.randn((6, 5, 4) if k < 2 else (3, 7), generator=g).float()
        groups = {} if axis is None or method == "dls" else {"axis": axis, "num_groups": x.shape[axis]}
        q = get_quantizer(method)(bits, is_weight=True, **groups)
        q.fit([x])
        with torch.no_grad():
            for p in q.parameters():
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=g))
        x[x.abs() < 0.1] = 0.0
        items.append(Item(str(k), "weight", str(k), bits, q, stretch * x))
    order, numbers = measure(items)
    assert sorted(order) == [0, 1, 2]
    for i, line in zip(order, numbers.tolist(), strict=True):
        found = dict(zip(FIELDS, line, strict=True))
        q, x = items[i].holder, items[i].value
        assert isinstance(q, Quantizer)
        assert x is not None
        for name, expected in counted(q, x).items():
            assert found[name] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
        assert found["distinct"] <= len(x.unique())


def test_a_stack_of_weights() -> None:
    """Groups of two leading axes."""
    x = torch.randn(4, 3, 50)
    q = get_quantizer("rfa")(2, is_weight=True, axis=0, num_groups=12)
    q.leading = 2
    q.fit([x])
    minmax = get_quantizer("minmax")(2, is_weight=True, axis=0, num_groups=12)
    minmax.leading = 2
    minmax.fit([x])
    order, numbers = measure([Item("a", "weight", "a", 2, q, x), Item("b", "weight", "b", 2, minmax, x)])
    for i, line in zip(order, numbers.tolist(), strict=True):
        found = dict(zip(FIELDS, line, strict=True))
        expected = counted((q, minmax)[i], x)
        assert found["noise"] == pytest.approx(expected["noise"], rel=1e-5)
        assert (found["used"], found["zero"]) == (expected["used"], expected["zero"])


@pytest.mark.parametrize("official", [False, True])
def test_rows_of_a_model_are_those_of_its_codes(official: bool) -> None:
    model = wide(QConfig(w_bits=2, a_bits=3, granularity="channel", official=official))
    report = health(model)
    assert {r.what for r in report.rows} == {"weight", "static"}
    for r in report.rows:
        q = quantizer(model, r.name.replace(".", "/"))
        x = {"A": -model.A_log.exp(), "D": model.D, "delta_bias": model.dt_bias}.get(
            r.name.rpartition(".")[2]
        )
        if x is None:
            name = r.name.removesuffix(":weight")
            x = model.get_parameter(name if name == "x_proj" else f"{name}.weight")
        expected = counted(q, x.detach())
        n = x.numel()
        assert (r.levels_used, r.elements) == (expected["used"], n)
        assert r.dead_levels == 2**r.bits - expected["used"]
        assert (r.zero_ratio, r.clipped) == (expected["zero"] / n, expected["clipped"] / n)
        assert r.scale == pytest.approx(expected["scale"])
        assert r.sqnr_db == pytest.approx(10 * math.log10(expected["signal"] / expected["noise"]), abs=1e-3)
        assert r.drift == 1.0


# ---- what is wrong -------------------------------------------------------------------------------------------------


def test_a_sound_model_has_no_warnings() -> None:
    for model in (wide(), wide(QConfig.minmax(8, 8)), wide(QConfig.lsq(4, 4)), light()):
        assert health(model).warnings == []
    assert health(wide(), X).warnings == []
    assert health(wide(QConfig(w_bits=8, a_bits=8), width=32), X).warnings == []


def test_zero_ratio_collapse() -> None:
    model = damage(wide(), "in_proj:weight", 50.0)
    report = health(model)
    assert kinds(report) == {"in_proj:weight": ["zero"]}
    assert row(report, "in_proj:weight").zero_ratio == 1.0
    assert row(report, "in_proj:weight").levels_used == 1
    assert report.warnings == [
        "zero ratio 1.00 of 'in_proj:weight' (2 bits): zero-ratio collapse; lower the quantizers' learning rate "
        "(param_groups(quantizer_lr=...)), use granularity='channel', or keep it at 4 bits with "
        "Rule('in_proj', w_bits=4)"
    ]
    lines = str(report).splitlines()
    assert lines[2].startswith("in_proj:weight")  # worst first
    assert lines[-1] == f"warning: {report.warnings[0]}"
    assert lines[-2] == "6 quantizers, 1 warning"
    # The remedy's rule is one that prepare takes.
    config = QConfig(w_bits=2, a_bits=2, rules=(ssmquant.Rule("in_proj", w_bits=4),))
    assert row(health(wide(config)), "in_proj:weight").bits == 4


def test_dead_levels() -> None:
    model = damage(wide(QConfig(w_bits=4, a_bits=4)), "in_proj:weight", 8.0)
    report = health(model)
    assert kinds(report) == {"in_proj:weight": ["dead"]}
    assert row(report, "in_proj:weight").dead_levels == 13
    assert "13 of 16 levels of 'in_proj:weight' (4 bits) are unused" in report.warnings[0]
    assert "8 bits with Rule('in_proj', w_bits=8)" in report.warnings[0]
    # A weight of few distinct values needs no more levels.
    with torch.no_grad():
        model.in_proj.weight.copy_(model.in_proj.weight.sign())
    assert not health(model).warnings


def test_clipping() -> None:
    report = health(damage(wide(), "out_proj:weight", 0.05))
    assert kinds(report) == {"out_proj:weight": ["clipped"]}
    assert row(report, "out_proj:weight").clipped > 0.5  # type: ignore[operator]
    assert re.match(r"\d\d % of the elements of 'out_proj:weight' \(2 bits\) lie beyond", report.warnings[0])


@pytest.mark.parametrize("what", ["alpha", "weight", "inf"])
def test_nan(what: str) -> None:
    model = wide()
    with torch.no_grad():
        if what == "alpha":
            quantizer(model, "in_proj:weight").alpha.fill_(math.nan)
        else:
            model.in_proj.weight[2, 1] = math.nan if what == "weight" else math.inf
    report = health(model)
    assert kinds(report) == {"in_proj:weight": ["nan"]}
    assert "go back to a checkpoint" in report.warnings[0]
    assert str(report).splitlines()[2].startswith("in_proj:weight")


def test_alpha_at_the_floor() -> None:
    model = wide(QConfig(w_bits=2, a_bits=2, granularity="channel"))
    with torch.no_grad():
        quantizer(model, "in_proj:weight").alpha[3:5] = 0.0
    report = health(model)
    assert kinds(report) == {"in_proj:weight": ["floor"]}
    assert "at its floor in 2 group(s)" in report.warnings[0]


def test_drift_is_since_the_first_look() -> None:
    model = wide()
    assert row(health(model), "in_proj:weight").drift == 1.0
    with torch.no_grad():
        quantizer(model, "in_proj:weight").alpha.mul_(0.05)
    report = health(model)
    assert row(report, "in_proj:weight").drift == pytest.approx(0.05)
    assert "drift" in kinds(report)["in_proj:weight"]
    assert row(health(copy.deepcopy(model)), "in_proj:weight").drift == 1.0  # a copy is another model
    before = len(monitors._FIRST)
    del model
    gc.collect()
    assert len(monitors._FIRST) < before


def test_constants_and_small_tensors_are_no_trouble() -> None:
    torch.manual_seed(0)
    scanner = Scanner(80)
    nn.init.ones_(scanner.D)
    nn.init.constant_(scanner.A_log, 0.5)
    for bits in (2, 8):
        model = prepared_and_calibrated(scanner.eval(), QConfig(w_bits=bits, a_bits=bits), X)
        report = health(model)
        assert report.warnings == []
        assert row(report, "scan.D").sqnr_db == math.inf
        assert health(ssmquant.convert(model)).warnings == []
    small = prepared_and_calibrated(Scanner(4).eval(), QConfig(w_bits=2, a_bits=2), X)
    assert not health(damage(small, "in_proj:weight", 50.0)).warnings


def test_pruned_empty_and_zero_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero, self.pruned = nn.Linear(12, 12), nn.Linear(12, 12)
            self.empty = nn.Linear(12, 0)
            nn.init.zeros_(self.zero.weight)
            with torch.no_grad():
                self.pruned.weight[1:] = 0.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.pruned(self.zero(x) + x)
            return torch.cat((y, self.empty(y)), -1)

    config = QConfig(w_bits=2, keep_first_last=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about empty weights
        model = ssmquant.prepare(Odd(), config, example_inputs=(torch.randn(2, 12),))
    report = health(model)
    assert report.warnings == []
    for name, elements in (("zero:weight", 144), ("empty:weight", 0)):
        r = row(report, name)
        assert (r.elements, r.levels_used, r.zero_ratio, r.clipped, r.scale, r.drift, r.sqnr_db) == (
            elements, *[None] * 6,
        )  # fmt: skip
        assert r.dead_levels is None
    assert row(report, "pruned:weight").zero_ratio > 0.9  # type: ignore[operator]
    assert "1 quantizers, 0 warnings" in str(report)
    assert ssmquant.summary(model).rows[0].dead_levels is None
    monitor = HealthMonitor(model, every=1)
    monitor.step()
    assert monitor.history[-1][1] == report
    deployed = health(ssmquant.convert(model.eval()))
    assert row(deployed, "empty:weight").levels_used is None
    assert (row(deployed, "zero:weight").zero_ratio, row(deployed, "zero:weight").levels_used) == (1.0, 1)
    with torch.no_grad():
        model.zero.weight[0, 0] = 1.0  # it has no range until the next training step
    assert row(health(model), "zero:weight").levels_used is None


def test_values_of_states_have_no_codes_to_judge() -> None:
    torch.manual_seed(0)
    for bits in (2, 8):
        config = QConfig.recommended(bits, bits)
        model = prepared_and_calibrated(Scanner(80, 4).eval(), config, X)
        deployed = ssmquant.convert(model)
        for m in (model, deployed):
            report = health(m)
            assert report.warnings == []
            r = row(report, "scan.A")
            assert (r.elements, r.levels_used, r.dead_levels, r.zero_ratio, r.clipped, r.scale, r.drift) == (
                320, *[None] * 6,
            )  # fmt: skip
            assert (r.sqnr_db is None) == (m is deployed)
        assert "scan.A " in str(health(model))
        assert row(health(model), "scan.A").sqnr_db > 10  # type: ignore[operator]
    monitor = HealthMonitor(model, every=1)
    with torch.no_grad():
        model.A_log[0, 0] = math.nan
    with pytest.warns(HealthWarning, match="'scan.A'"):
        monitor.step()
    assert kinds(health(model)) == {"scan.A": ["nan"]}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_collapse_where_no_level_is_zero(granularity: str) -> None:
    config = QConfig.recommended(2, 2, granularity=granularity)
    model = wide(config)
    assert health(model).warnings == []
    with torch.no_grad():
        quantizer(model, "in_proj:weight").alpha.mul_(7.0)
    report = health(model)
    assert kinds(report) == {"in_proj:weight": ["zero"]}
    assert re.match(
        r"SQNR -\d+\.\d dB of 'in_proj:weight' \(2 bits\): .*; .*quantizer_lr", report.warnings[0]
    )


def test_every_warning_names_a_quantizer_and_a_remedy() -> None:
    seen = set()
    for bits in (2, 3, 4, 8):
        for method in ("rfa", "lsq", "dls"):
            for factor in (0.0, 0.01, 100.0, math.nan):
                config = QConfig(
                    w_bits=bits, a_bits=bits, scan=method, weight="lsq" if method == "dls" else method
                )
                model = wide(config)
                health(model, X)
                with torch.no_grad():
                    for q in runtime_of(model).parameters():
                        q.mul_(factor)
                for r in health(model, X).rows:
                    for kind, sentence in r.problems:
                        seen.add(kind)
                        trouble, _, remedy = sentence.partition("; ")
                        assert f"'{r.name}' ({bits} bits)" in trouble
                        assert re.search(r"quantizer_lr|Rule\('|checkpoint", remedy), sentence
    assert seen == {"nan", "floor", "zero", "dead", "clipped", "drift"}


# ---- activations ---------------------------------------------------------------------------------------------------


def test_activations_with_a_batch() -> None:
    model = wide(QConfig(w_bits=4, a_bits=3))
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.update({m.name: args[0]}))  # type: ignore[call-overload]
        for m in runtime_of(model).activations.values()
    ]
    with torch.no_grad():
        model(X)
    for h in hooks:
        h.remove()
    report = health(model, X)
    activations = [r for r in report.rows if r.what == "activation"]
    assert {r.name for r in activations} == set(seen) == {
        "in_proj:input", "x_proj:input", "scan.u", "scan.delta", "scan.B", "scan.C", "out_proj:input",
    } - ({"scan.u"} - set(seen))  # fmt: skip
    for r in activations:
        wrapper = runtime_of(model).activations[r.name.replace(".", "/")]
        assert isinstance(wrapper, ActivationQuantizer)
        expected = counted(wrapper.quantizer, seen[r.name])
        n = seen[r.name].numel()
        assert (r.elements, r.levels_used, r.bits) == (n, expected["used"], 3)
        assert (r.zero_ratio, r.clipped) == (expected["zero"] / n, expected["clipped"] / n)
        assert r.sqnr_db == pytest.approx(10 * math.log10(expected["signal"] / expected["noise"]), abs=1e-2)
    assert [r for r in report.rows if r.what != "activation"] == list(health(model).rows)
    for batch, forward in (((X, None), None), ({"x": X}, None), (7, lambda m, b: m(X))):
        assert health(model, batch, forward=forward).rows == report.rows


def test_activations_are_thinned() -> None:
    model = wide()
    big = images(3, 3, 64, 64)
    for r in health(model, big).rows:
        assert r.elements <= 2**14
    for shape, axis in (((40000,), None), ((3, 70, 90), 0), ((20000, 2), 0), ((2, 9000, 3), 0)):
        x = torch.randn(shape)
        q = get_quantizer("dls")(2, axis=axis)
        code, kept = thin(q.encode(x), x)
        assert 2**12 < kept.numel() <= 2**14
        assert code.codes.shape == kept.shape
        expected, y = q.encode(x).decode(), code.decode()
        pairs = set(zip(x.flatten().tolist(), expected.flatten().tolist(), strict=True))
        assert set(zip(kept.flatten().tolist(), y.flatten().tolist(), strict=True)) <= pairs


def test_activations_without_a_range() -> None:
    model = ssmquant.prepare(Scanner(), QConfig(w_bits=2, a_bits=2), example_inputs=(X,))
    health(model)
    with pytest.raises(NotCalibratedError, match="calibrate"):
        health(model, X)
    assert model.training


def test_activation_warnings_say_calibrate() -> None:
    model = wide()
    text = "\n".join(health(model, 100 * X).warnings)
    assert "lie beyond its levels" in text
    assert "calibrate with such data" in text


class Noisy(nn.Module):
    """Draws in evaluation, counts its calls, and has a batch norm."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        x = self.norm(self.a(x))
        return self.b(x + 0.01 * torch.randn_like(x))


def test_nothing_changes() -> None:
    model = prepared_and_calibrated(Chain(Noisy()), QConfig(w_bits=2, a_bits=2), X).train()
    model.middle.norm.eval()
    ssmquant.cuda_graph(model)
    graphs = runtime_of(model).graphs
    loss = model(X).square().mean()
    loss.backward(retain_graph=True)
    grads = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    rng = torch.get_rng_state()
    versions = [p._version for p in model.parameters()]

    def trains(m: nn.Module, batch: Tensor) -> None:
        m.train()
        m(batch)

    def fails(m: nn.Module, batch: Tensor) -> None:
        m(batch)
        raise KeyError("mine")

    health(model)
    health(model, X)
    health(model, X, forward=trains)
    with pytest.raises(KeyError, match="mine"):
        health(model, X, forward=fails)
    HealthMonitor(model, every=1).step()
    for k, v in model.state_dict().items():
        assert torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)), k
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert hooks == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert torch.equal(rng, torch.get_rng_state())
    assert versions == [p._version for p in model.parameters()]
    assert runtime_of(model).graphs is graphs
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)  # type: ignore[arg-type]
    loss.backward()  # of a graph from before


def test_misuse() -> None:
    model = wide()
    with pytest.raises(ConfigError, match=r"ssmquant\.prepare"):
        health(Scanner())
    with pytest.raises(ConfigError, match="needs a batch"):
        health(model, forward=lambda m, b: m(X))
    for batch in (7, [], "x"):
        with pytest.raises(InputError, match="health: a batch of type"):
            health(model, batch)
    with pytest.raises(ConfigError, match="expected a prepared model"):
        HealthMonitor(ssmquant.convert(model))
    for every in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="every="):
            HealthMonitor(model, every=every)  # type: ignore[arg-type]


# ---- deployed models and summaries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_deployed_models(granularity: str) -> None:
    model = wide(QConfig(w_bits=3, a_bits=3, granularity=granularity))
    damage(model, "out_proj:weight", 50.0)
    before, after = health(model), health(ssmquant.convert(model))
    assert [r.name for r in before.rows] == [r.name for r in after.rows]
    for a, b in zip(before.rows, after.rows, strict=True):
        assert (a.what, a.bits, a.elements, a.levels_used, a.zero_ratio) == (
            b.what, b.bits, b.elements, b.levels_used, b.zero_ratio,
        )  # fmt: skip
        assert a.scale == pytest.approx(b.scale)
        assert (b.clipped, b.sqnr_db, b.drift) == (None, None, 1.0)
    assert kinds(after) == {"out_proj:weight": ["zero"]}
    for dls in ("dynamic", "frozen"):
        deployed = ssmquant.convert(model, dls=dls)
        whole = health(deployed, X)
        assert not deployed.training
        assert {r.name for r in whole.rows} == {r.name for r in health(model, X).rows}
        assert str(whole)
    assert [r for r in whole.rows if r.what == "activation" and r.sqnr_db is None] == []


def test_a_deployed_file(tmp_path: Path) -> None:
    deployed = ssmquant.convert(wide())
    ssmquant.save(deployed, tmp_path / "m")
    assert health(ssmquant.load(tmp_path / "m", Scanner(16))).rows == health(deployed).rows


def test_summary_has_the_columns() -> None:
    model = damage(wide(), "in_proj:weight", 50.0)
    report = health(model)
    for m in (model, ssmquant.convert(model)):
        table = rows(m)
        for site in ("in_proj", "x_proj", "out_proj"):
            r = row(report, f"{site}:weight")
            assert (table[site].dead_levels, table[site].zero_ratio) == (r.dead_levels, r.zero_ratio)
        for site in ("stem", "scan", "head"):
            assert (table[site].dead_levels, table[site].zero_ratio) == (None, None)
        text = str(ssmquant.summary(m))
        (line,) = [t for t in text.splitlines() if t.startswith("in_proj ")]
        assert line.split()[6:8] == ["3", "100.0%"]
        (line,) = [t for t in text.splitlines() if t.startswith("scan ")]
        assert line.split()[6:8] == ["-", "-"]


def test_summary_is_no_first_look() -> None:
    model = wide()
    ssmquant.summary(model)
    assert runtime_of(model) not in monitors._FIRST


# ---- monitor -------------------------------------------------------------------------------------------------------


def test_the_monitor_measures_every_so_many_steps() -> None:
    model = wide()
    monitor = HealthMonitor(model, every=3)
    for _ in range(7):
        monitor.step()
    assert [step for step, _ in monitor.history] == [0, 3, 6]
    assert monitor.history[0][1] == health(model)


def test_every_warning_comes_once() -> None:
    model = wide()
    monitor = HealthMonitor(model, every=1)
    damage(model, "in_proj:weight", 50.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            monitor.step()
    assert {w.category for w in caught} == {HealthWarning}
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2  # the scale ran away, too
    assert texts[0].startswith("step 1: zero ratio 1.00 of 'in_proj:weight'")
    assert "times what it was" in texts[1]
    assert caught[0].filename == __file__
    damage(model, "out_proj:weight", 0.05)
    with pytest.warns(HealthWarning, match="out_proj"):
        monitor.step()
    silent = HealthMonitor(damage(wide(), "in_proj:weight", 50.0), every=1, warn=False)
    silent.step()
    assert [len(r.warnings) for _, r in silent.history] == [1, 1]


def test_warnings_as_errors_lose_nothing() -> None:
    model = wide()
    monitor = HealthMonitor(model, every=1)
    damage(model, "in_proj:weight", 50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(HealthWarning, match="zero ratio"):
            monitor.step()
        with pytest.raises(HealthWarning, match="times what"):
            monitor.step()
        monitor.step()
    assert [step for step, _ in monitor.history] == [0, 1, 2, 3]


class Event:
    """Stands for a CUDA event that happens when it is told to."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


def test_results_are_read_when_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    send = monitors._send

    def slow(items: list[Item]) -> Any:
        part = send(items)
        events.append(Event())
        part.event = events[-1]
        return part

    monkeypatch.setattr(monitors, "_send", slow)
    model = wide()
    monitor = HealthMonitor(model, every=2)
    assert (monitor.history, len(events)) == ([], 1)
    monitor.step()
    assert monitor.history == []
    events[0].happened = True
    monitor.step()  # reads that of step 0 and starts the next
    assert [step for step, _ in monitor.history] == [0]
    assert len(events) == 2
    for _ in range(5):
        monitor.step()  # one is on its way: no second
    assert len(events) == 2
    damage(model, "in_proj:weight", 50.0)
    events[1].happened = True
    monitor.step()  # step 8
    assert [step for step, _ in monitor.history] == [0, 2]
    assert monitor.history[-1][1].warnings == []  # as it was at step 2
    assert len(events) == 3
    with pytest.warns(HealthWarning, match=r"^step 8: "):
        monitor.wait()
    assert [step for step, _ in monitor.history] == [0, 2, 8]
    monitor.wait()
    assert len(monitor.history) == 3


def test_the_history_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "_MOST_REPORTS", 8)
    monitor = HealthMonitor(wide(), every=1)
    for _ in range(30):
        monitor.step()
    steps = [step for step, _ in monitor.history]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (0, 30)
    assert steps == sorted(set(steps))


def test_watching_a_training_run() -> None:
    model = wide().train()
    groups = ssmquant.param_groups(model, lr=1e-3, quantizer_lr=1e-4)
    optimizer = torch.optim.Adam(groups)
    monitor = HealthMonitor(model, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(X) - X).square().mean().backward()
        optimizer.step()
        monitor.step()
    assert [step for step, _ in monitor.history] == [0, 2, 4]
    assert monitor.history[-1][1].rows == health(model).rows
    drifts = [r.drift for r in monitor.history[-1][1].rows]
    assert any(d != 1.0 for d in drifts)


@pytest.mark.gpu
def test_the_monitor_beside_a_cuda_graph() -> None:
    device = torch.device("cuda")
    model = wide().to(device)
    weight = model.in_proj.weight
    monitor = HealthMonitor(model, every=1, warn=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        weight.mul_(0.5)
        monitor.step()  # is not recorded
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                graph.replay()
                monitor.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    monitor.wait()
    assert monitor.history[0][0] == 0
    monitor.step()
    monitor.wait()
    assert monitor.history[-1][0] == 4  # the call while capturing did not count
    cpu = health(copy.deepcopy(model).cpu())
    for a, b in zip(monitor.history[-1][1].rows, cpu.rows, strict=True):
        if a.what == "weight":
            assert (a.levels_used, a.zero_ratio) == (b.levels_used, b.zero_ratio)


def test_the_sample_in_the_docs_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.partition("## Watching a 2-bit run")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    space: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        exec(compile(code, "training.md", "exec"), space)
    assert len(space["monitor"].history) >= 2
