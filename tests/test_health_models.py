"""health of activations, of deployed models and in summaries; it leaves the model alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, HealthMonitor, QConfig, health
from ssmquant.analysis.measure import thin
from ssmquant.errors import InputError, NotCalibratedError
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers import get_quantizer
from tests.health_checks import counted, damage, kinds, monitors, row, wide
from tests.small import Chain, Scanner, X, images, prepared_and_calibrated, rows

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
    }  # fmt: skip
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
