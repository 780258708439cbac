"""The pictures and numbers of a report, against the quantizers and against plain arithmetic."""

from __future__ import annotations

import math
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.analysis.histogram import BINS, histogram_of_codes, histogram_of_values
from ssmquant.analysis.svg import draw
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.ops.selective_scan import selective_scan
from ssmquant.quantizers import QUANTIZERS, QTensor
from tests.report_page import check_pictures, quantizer, written
from tests.small import Chain, Scanner, images, prepared_and_calibrated, scanner

X = images(2, 3, 6, 5)


@pytest.mark.parametrize("method", sorted({"lsq", "minmax", "rfa", "pact", "n2uq", "rlq"}))
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_levels_are_those_of_the_quantizers(method: str, bits: int, tmp_path: Path) -> None:
    config = QConfig(w_bits=bits, a_bits=bits, weight=method, activation=method)
    model = prepared_and_calibrated(Chain(nn.Conv2d(4, 4, 3)).eval(), config, X)
    page = written(tmp_path, model, [X])
    check_pictures(page)
    values = {"middle:weight": model.middle.weight, "middle:input": model.first(X)}
    for name, value in values.items():
        q = quantizer(model, name)
        levels = q.encode(value.detach()).levels[0].sort().values.tolist()
        if method == "pact" and q.is_signed:
            levels = levels[1:]  # the lowest code is not in use
        drawn = levels if len(levels) <= 16 else [levels[0], levels[-1]]
        assert page.ticks(name) == pytest.approx(drawn, abs=page.resolution(name))
        assert ("r" in page.cards[name]["path"]) == (len(levels) > 16)
        label = page.cards[name]["svg"]["aria-label"]
        assert f"; {len(levels)} levels" in label
        if method == "rfa" and bits < 6:
            grid = q.thresholds() * q.encode(value.detach()).scale - q.encode(value.detach()).shift
            low, high = (float(page.cards[name]["svg"][f"data-{end}"]) for end in ("low", "high"))
            grid = [t for t in grid.sort().values.tolist() if low <= t <= high]
            assert page.ticks(name, "t") == pytest.approx(grid, abs=page.resolution(name))


@pytest.mark.parametrize(
    "config",
    [
        QConfig(w_bits=3, a_bits=3, granularity="channel", activation="dls"),
        QConfig(w_bits=3, a_bits=3, weight="minmax", granularity="channel", activation="token"),
        QConfig(w_bits=3, a_bits=3, weight="minmax", granularity="channel", activation="pts"),
        QConfig.recommended(3, 3),
    ],
    ids=["dls", "token", "pts", "recommended"],
)
def test_several_scales_are_shown_in_code_units(config: QConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = prepared_and_calibrated(Chain(nn.Conv2d(4, 4, 3)).eval(), config, X)
    page = written(tmp_path, model, [X, X[:1]])
    check_pictures(page)
    names = ["middle:weight"] + ["middle:input"] * (config.activation != "lsq")
    for name in names:
        code_min = quantizer(model, name).code_min
        assert page.ticks(name) == pytest.approx(range(code_min, code_min + 8), abs=page.resolution(name))
        assert "units of" in page.cards[name]["text"]


def test_one_value_a_state(tmp_path: Path) -> None:
    config = QConfig(w_bits=4, a_bits=4, scan="lsq", decay="ladder")
    prepared = prepared_and_calibrated(Scanner(4, 3).eval(), config, X)
    decay = -torch.exp(prepared.A_log)
    kept = sorted(quantizer(prepared, "scan.A")(decay.detach())[0].tolist())
    for model in (prepared, ssmquant.convert(prepared)):
        page = written(tmp_path, model)
        assert page.ticks("scan.A") == pytest.approx(kept, abs=page.resolution("scan.A"))


def test_numbers_of_inputs_and_outputs(tmp_path: Path) -> None:
    """Against plain arithmetic in float64."""
    torch.manual_seed(1)
    config = QConfig(w_bits=4, a_bits=4, weight="lsq", smooth=0.5)
    floats = Chain(nn.Conv2d(4, 4, 3, padding=1)).eval()
    with torch.no_grad():  # channels that there is something to even out in
        floats.first.weight.mul_(torch.tensor([0.1, 1.0, 3.0, 20.0])[:, None, None, None])
    model = prepared_and_calibrated(floats, config, X)
    batches = [X, images(1, 3, 6, 5, seed=4)]
    page = written(tmp_path, model, batches)

    def db(signal: Tensor, noise: Tensor) -> float:
        return float(10 * torch.log10(signal.double().square().sum() / noise.double().square().sum()))

    wrapper = runtime_of(model).activations["middle:input"]
    assert isinstance(wrapper, ActivationQuantizer)
    gain = wrapper.gain
    assert gain is not None
    assert len(gain.unique()) > 1
    with torch.no_grad():
        scaled = torch.cat([wrapper.scaled(model.first(x)) for x in batches])
        y = wrapper.quantizer(scaled)
        weight = model.middle.weight / gain.reshape(1, -1, 1, 1)
        rounded = runtime_of(model).weights["middle:weight"](weight)
        exact = F.conv2d(scaled.double(), weight.double(), model.middle.bias.double(), padding=1)
        coarse = F.conv2d(y.double(), rounded.double(), model.middle.bias.double(), padding=1)
    q = wrapper.quantizer.encode(scaled)
    levels, step = q.levels[0], q.scale.abs()
    clipped = ((scaled < levels.min() - step / 2) | (scaled > levels.max() + step / 2)).double().mean()
    card = page.cards["middle:input"]["text"]
    assert f"SQNR {db(scaled, scaled - y):.1f} dB" in card
    assert f"clipped {100 * clipped:.1f} %" in card or clipped < 0.0005
    assert "smooth" in card
    cells = page.rows["middle"]
    assert cells[6] == f"{db(weight, weight - rounded):.1f}"
    assert cells[7] == f"{db(scaled, scaled - y):.1f}"
    assert cells[8] == f"{db(exact, exact - coarse):.1f}"


def test_the_output_of_a_scan(tmp_path: Path) -> None:
    """Its operands as its quantizers get them, and as they leave."""
    model = scanner(4)
    got: dict[str, tuple[Tensor, Tensor]] = {}
    runtime = runtime_of(model)

    def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, ActivationQuantizer)
        got[module.name] = args[0].clone(), out.clone()

    hooks = [m.register_forward_hook(look) for m in runtime.activations.values()]
    with torch.no_grad():
        model(X)
    for hook in hooks:
        hook.remove()
    floats = {"A": -torch.exp(model.A_log), "D": model.D, "delta_bias": model.dt_bias}
    for name, value in floats.items():
        key = f"scan/{name}"
        got[f"scan.{name}"] = value, runtime.weights[key](value) if key in runtime.weights else value

    def scan(which: int) -> Tensor:
        u, delta, a, b, c, d, bias = (
            got[f"scan.{n}"][which].detach() for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")
        )
        out: Tensor = selective_scan(u, delta, a, b, c, d, delta_bias=bias, delta_softplus=True)
        return out.double()

    exact, coarse = scan(0), scan(1)
    db = float(10 * torch.log10(exact.square().sum() / (exact - coarse).square().sum()))
    shown = float(written(tmp_path, model, [X]).rows["scan"][8].replace("\N{MINUS SIGN}", "-"))
    assert shown == pytest.approx(db, abs=0.06)


def test_the_histogram_counts(tmp_path: Path) -> None:
    """The areas under the outline are those of the values, up to the square root and whole pixels."""
    model = prepared_and_calibrated(Chain(nn.Conv2d(4, 4, 3)).eval(), QConfig(w_bits=4, a_bits=4), X)
    card = written(tmp_path, model).cards["middle:weight"]
    low, high = float(card["svg"]["data-low"]), float(card["svg"]["data-high"])
    weight = model.middle.weight.detach().double().reshape(-1)
    counts = torch.histc(weight.clamp(low, high), BINS, low, high)
    outline, y = torch.empty(BINS), 70.0
    moves = [(c, float(a)) for c, a in re.findall(r"([HV])([\d.]+)", card["path"]["h"])]
    at = 2.0
    for c, a in moves:
        if c == "H":
            outline[round((at - 2) / 4) : round((a - 2) / 4)] = y
            at = a
        else:
            y = a
    expected = 70 - 66 * (counts / counts.max()).sqrt()
    assert float((outline - expected).abs().max()) <= 1.0 + 1e-3


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_quantizer_has_a_picture(method: str, granularity: str, tmp_path: Path) -> None:
    weight = "lsq" if method in ("token", "pts") else method
    config = QConfig(w_bits=2, a_bits=8, weight=weight, activation=method, granularity=granularity)
    prepared = prepared_and_calibrated(Chain(nn.Conv2d(4, 4, 3)).eval(), config, X)
    for model in (prepared, ssmquant.convert(prepared)):
        page = written(tmp_path, model, [X, X[:, :, :4]])
        check_pictures(page)
        for name in ("middle:weight", "middle:input"):
            assert "svg" in page.cards[name]


# ---- any numbers -----------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40),
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40, unique=True),
)
def test_any_values_make_a_picture(values: list[float], levels: list[float]) -> None:
    found = histogram_of_values(torch.tensor(values, dtype=torch.float64), levels, "shown")
    assert found is not None
    assert sum(found.counts) == len(values)
    assert found.low < found.high
    assert found.low <= found.levels[0] <= found.levels[-1] <= found.high
    assert found.levels == tuple(sorted(levels))
    assert found.extremes == (min(values), max(values))
    places = [float(x) for x in re.findall(r"M([\d.]+) 4V76", draw(found))]
    assert places == sorted(places)
    assert all(2 <= x <= 258 for x in places)


def test_no_picture_of_nothing() -> None:
    assert histogram_of_values(torch.empty(0), [0.0], "") is None
    assert histogram_of_values(torch.ones(2), [], "") is None
    assert histogram_of_values(torch.tensor([1.0, math.nan]), [0.0], "") is None
    assert histogram_of_values(torch.ones(2), [0.0, math.inf], "") is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_counted(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (500,)).to(torch.uint8)
    scale, shift = torch.tensor(0.5), torch.tensor(-0.25)
    q = QTensor(codes, bits, -(2 ** (bits - 1)), scale, shift, None, None, torch.float32)
    found = histogram_of_codes(q)
    assert found is not None
    assert sum(found.counts) == 500
    assert len(found.counts) == min(2**bits, 128)
    if bits < 8:
        assert list(found.counts) == torch.bincount(codes.long(), minlength=2**bits).tolist()
    assert found.levels == pytest.approx(q.levels[0].tolist())
    assert found.extremes == pytest.approx((float(q.decode().min()), float(q.decode().max())))
    grouped = QTensor(
        codes.reshape(2, 250), bits, q.code_min, torch.ones(2, 1), torch.zeros(2, 1), None, None, q.dtype
    )
    units = histogram_of_codes(grouped)
    assert units is not None
    assert units.levels == tuple(range(q.code_min, q.code_min + 2**bits))
