"""Mixed precision: the budget holds in what summary counts, users' rules hold, and the result runs to the end."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, NotCalibratedError, QConfig, Rule, Sensitivity, zoo
from ssmquant.analysis.search import _Costs
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor
from tests.small import Scanner, computes_the_same, images, prepared_and_calibrated, rows, tiny_mambair

X = images(2, 3, 6, 5)


def tiny() -> nn.Module:
    return tiny_mambair()


FAMILIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mambair": (tiny, (1, 3, 8, 8)),
    "vim": (
        functools.partial(
            zoo.build,
            "VisionMamba",
            img_size=16,
            patch_size=8,
            stride=8,
            depth=1,
            embed_dim=16,
            d_state=4,
            num_classes=5,
        ),
        (1, 3, 16, 16),
    ),
    "vmamba": (
        functools.partial(
            zoo.build, "VSSM", depths=(1,), dims=8, ssm_d_state=2, num_classes=5, drop_path_rate=0.0
        ),
        (1, 3, 16, 16),
    ),
}


@functools.cache
def family(name: str) -> tuple[nn.Module, Tensor, Any, Sensitivity]:
    build, shape = FAMILIES[name]
    torch.manual_seed(0)
    model, x = build().eval(), images(*shape)
    prepared = prepared_and_calibrated(model, QConfig.recommended(3, 3), x)
    return model, x, prepared, ssmquant.sensitivity(prepared, [x], bits=(2, 3, 4), progress=False)


def code_bytes(deployed: nn.Module) -> int:
    return sum(m.codes.numel() for m in runtime_of(deployed).modules() if isinstance(m, PackedTensor))


def predicted(result: Sensitivity, config: QConfig, default: int = 3) -> float:
    """The summed loss that a search makes least."""
    total = 0.0
    for row in result.rows:
        rule = next((r for r in config.rules if r.match == row.sites[0]), None)
        bits = default if rule is None else rule.a_bits
        total += min(loss for b, loss in zip(result.bits, row.loss, strict=True) if b <= int(bits))  # type: ignore[arg-type]
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_from_search_to_a_deployed_model(name: str) -> None:
    model, x, uniform, measured = family(name)
    config = ssmquant.search(uniform, measured, effective_bits=3.0)
    assert predicted(measured, config) <= predicted(measured, QConfig())
    prepared = ssmquant.prepare(model, QConfig.from_json(config.to_json()), example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False).eval()
    deployed = ssmquant.convert(prepared)
    computes_the_same(deployed, prepared, x)
    before, after = rows(uniform), rows(deployed)
    assert list(before) == list(after)
    chosen = {r.match: r for r in config.rules}
    quantized = {n for n, r in before.items() if r.scheme != "float"}
    assert set(chosen) == quantized
    for n, row in after.items():
        if n in quantized:
            b = chosen[n].a_bits
            assert row.scheme == (f"A{b}" if row.kind == "scan" else f"W{b}A{b}")
        else:
            assert row.scheme == "float"
    assert len({r.a_bits for r in config.rules}) > 1
    # Effective bits, as summary counts: no more than those of the uniform model.
    assert sum(after[n].bitops for n in quantized) <= sum(before[n].bitops for n in quantized)
    assert code_bytes(deployed) <= code_bytes(ssmquant.convert(uniform))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_between_two_widths(name: str) -> None:
    _, _, prepared, measured = family(name)
    costs = _Costs(prepared, runtime_of(prepared).records[0])
    before = copy.deepcopy(prepared.state_dict())
    losses = []
    for e in (2.0, 2.1, 2.5, 2.9, 3.0, 3.3, 3.9, 4.0):
        config = ssmquant.search(prepared, measured, effective_bits=e)
        bits = {r.match: int(r.a_bits) for r in config.rules}  # type: ignore[arg-type]
        size = sum(costs.size(u, bits[u.sites[0]]) for u in costs.units)
        work = sum(costs.work(u, bits[u.sites[0]]) for u in costs.units)
        below, above = int(e), min(int(e) + 1, 8)
        whole = [sum(costs.size(u, b) for u in costs.units) for b in (below, above)]
        assert size <= whole[0] + (whole[1] - whole[0]) * (e - below)
        assert work <= sum(costs.work(u, e) for u in costs.units)
        losses.append(predicted(measured, config))
        if e in (2.0, 4.0):
            assert predicted(measured, config) <= predicted(measured, QConfig(), int(e))
    assert all(b <= a * 1.01 for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) or (v != v).any() for k, v in prepared.state_dict().items())


def test_costs_are_those_of_summary() -> None:
    """Of the uniform model, by sites and in all."""
    model, x, prepared, _ = family("mambair")
    costs = _Costs(prepared, runtime_of(prepared).records[0])
    for bits in (2, 4):
        other = prepared_and_calibrated(model, QConfig.recommended(bits, bits), x)
        listed = rows(other)
        for unit in costs.units:
            assert costs.work(unit, bits) == sum(listed[n].bitops for n in unit.sites)
        assert sum(costs.size(u, bits) for u in costs.units) == code_bytes(ssmquant.convert(other))
        assert costs.size_budget(bits) == code_bytes(ssmquant.convert(other))


@functools.cache
def scanned(config: QConfig) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Scanner().eval()
    return model, prepared_and_calibrated(model, config, X)


def schemes(config: QConfig) -> dict[str, tuple[int | None, str]]:
    """Widths and quantizers of all points of a Scanner prepared with a configuration."""
    prepared = ssmquant.prepare(_model(), config, example_inputs=(X,))
    out = {}
    for p in runtime_of(prepared).records[0].plan.points:
        for site, operand in p.uses:
            name = f"{site.name}.{'weight' if p.what == 'weight' else operand.name}"
            out[name] = (p.scheme.bits, p.scheme.method)
    return out


def _model() -> nn.Module:
    torch.manual_seed(0)
    return Scanner().eval()


def searched(config: QConfig, e: float = 4.0, widths: tuple[int, ...] = (2, 4)) -> QConfig:
    prepared = scanned(config)[1]
    return ssmquant.search(prepared, [X], effective_bits=e, bits=widths, progress=False)


def test_rules_of_the_user_hold() -> None:
    config = QConfig.qmambair(
        4,
        rules=(
            Rule("re:out_.*", w_bits=8, a_bits=8),
            Rule("*.A", activation="minmax", a_bits=7),
            Rule("scan.B", activation="minmax"),
            Rule("*can.C", activation="lsq"),
            Rule("x_proj", weight="lsq"),
            Rule("linear", activation="minmax"),
        ),
        keep_float=("scan.D",),
    )
    out = searched(config, 5.6, (2, 3))
    assert out.rules[0] == config.rules[0]
    assert dict(zip(vars(out), vars(out).values(), strict=True)) == {**vars(config), "rules": out.rules}
    bits = {r.match: r.a_bits for r in out.rules}
    b = bits["scan"]
    got, before = schemes(out), schemes(config)
    assert {k: v[1] for k, v in got.items()} == {k: v[1] for k, v in before.items()}
    assert "scan.D" not in got
    assert got["scan.A"] == (7, "minmax")
    assert got["scan.B"] == (b, "minmax")
    assert got["scan.C"] == (b, "lsq")
    assert got["scan.u"] == (b, "dls")
    assert got["out_proj.weight"] == (8, "rfa")
    assert got["out_proj.input"][0] == 8
    assert got["x_proj.weight"] == (bits["x_proj"], "lsq")
    assert got["in_proj.input"] == (bits["in_proj"], "minmax")
    assert "out_proj" not in bits
    assert sorted(str(r.match) for r in out.rules).count("x_proj") == 1


def test_fixed_sites_take_their_part_of_the_budget() -> None:
    free = searched(QConfig.recommended(4, 4), 3.5)
    assert {r.match for r in free.rules} == {"in_proj", "x_proj", "scan", "out_proj"}
    fixed = QConfig.recommended(4, 4, rules=(Rule("in_proj", w_bits=8, a_bits=8),))
    prepared = scanned(fixed)[1]
    out = searched(fixed, 4.5)
    final = ssmquant.prepare(_model(), out, example_inputs=(X,))
    costs = _Costs(prepared, runtime_of(prepared).records[0])
    quantized = [r for r in ssmquant.summary(final).rows if r.scheme != "float"]
    assert next(r for r in quantized if r.name == "in_proj").scheme == "W8A8"
    assert sum(r.bitops for r in quantized) <= costs.work_budget(4.5)
    with pytest.raises(ConfigError, match=r"what rules fix: expected [23]\.?\d* to [45]") as e:
        searched(fixed, 2.0)
    lowest = float(str(e.value).split("expected ")[1].split(" ")[0])
    searched(fixed, lowest)
    with pytest.raises(ConfigError, match="cannot be met"):
        searched(fixed, lowest - 0.011)


def test_operands_in_float_stay_so() -> None:
    out = searched(QConfig.lsq(4, 4, scan_bits=None), 3.0)
    assert "scan" not in {r.match for r in out.rules}
    weights = ssmquant.search(
        prepared_and_calibrated(_model(), QConfig.lsq(4, None), X),
        [X],
        effective_bits=3.0,
        bits=(2, 4),
        progress=False,
    )
    assert {r.a_bits for r in weights.rules} == {"inherit"}
    assert {r.w_bits for r in weights.rules} <= {2, 4}
    assert all(k.endswith(".weight") for k in schemes(weights))


def test_bad_arguments() -> None:
    _, prepared = scanned(QConfig.recommended(4, 4))
    measured = ssmquant.sensitivity(prepared, [X], bits=(2, 4), progress=False)
    for e, message in (
        (1.99, "expected 2 to 4"), (4.01, "expected 2 to 4"), (float("nan"), "a number of bits"),
        (True, "a number of bits"), ("3", "a number of bits"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            ssmquant.search(prepared, measured, effective_bits=e)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"bits=\(2, 3\): the sensitivity was measured at \(2, 4\)"):
        ssmquant.search(prepared, measured, bits=(2, 3))
    with pytest.raises(ConfigError, match="different whole numbers"):
        ssmquant.search(prepared, measured, bits=(2, 2))
    with pytest.raises(ConfigError, match="of another model"):
        ssmquant.search(family("mambair")[2], measured)
    fewer = Sensitivity(measured.loss, measured.bits, measured.rows[:-1], measured.overall)
    with pytest.raises(ConfigError, match="it does not have out_proj"):
        ssmquant.search(prepared, fewer)
    fixed = QConfig.recommended(4, 4, rules=(Rule("*", w_bits=4, a_bits=4),))
    with pytest.raises(ConfigError, match="nothing to choose"):
        ssmquant.search(scanned(fixed)[1], measured)
    fresh = ssmquant.prepare(_model(), QConfig.recommended(4, 4), example_inputs=(X,))
    with pytest.raises(NotCalibratedError, match=r"ssmquant\.calibrate"):
        ssmquant.search(fresh, measured)
    assert {r.w_bits for r in ssmquant.search(prepared, measured, bits=(4,), effective_bits=4).rules} <= {
        4,
        "inherit",
    }


def test_noise_does_not_buy_bits() -> None:
    """A wider site that measured worse than a narrower one is as good as that."""
    _, prepared = scanned(QConfig.recommended(4, 4))
    measured = ssmquant.sensitivity(prepared, [X], bits=(2, 4), progress=False)
    noisy = Sensitivity(
        "mse",
        (2, 4),
        tuple(
            type(r)(r.sites, r.kind, r.sqnr_db, (1.0, 2.0) if r.kind == "scan" else r.loss)
            for r in measured.rows
        ),
        measured.overall,
    )
    out = ssmquant.search(prepared, noisy, effective_bits=4.0)
    assert next(r for r in out.rules if r.match == "scan").a_bits == 2


def test_text_is_python() -> None:
    out = searched(QConfig.recommended(4, 4), 3.0)
    text = str(out)
    assert eval(text, {"QConfig": QConfig, "Rule": Rule}) == out
    assert "        Rule('in_proj', w_bits=" in text
    assert str(QConfig()) == "QConfig()"
    assert str(Rule("*.a", keep_float=True)) == "Rule('*.a', keep_float=True)"
