"""health counts what is there, and names what is wrong with a weight, with a remedy."""

from __future__ import annotations

import copy
import gc
import math
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import HealthMonitor, HealthWarning, QConfig, health
from ssmquant.analysis.measure import FIELDS, Item, measure
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers import QUANTIZERS, Quantizer, get_quantizer
from tests.health_checks import counted, damage, kinds, monitors, quantizer, row, wide
from tests.small import Scanner, X, light, prepared_and_calibrated

# ---- counting ------------------------------------------------------------------------------------------------------


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
