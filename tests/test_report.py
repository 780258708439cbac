"""The HTML report: whole and escaped, pictures that tell the truth, numbers that can be checked."""

from __future__ import annotations

import copy
import html
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, InputError, NotCalibratedError, QConfig, Rule, cli
from ssmquant.analysis.histogram import BINS, histogram_of_codes, histogram_of_values
from ssmquant.analysis.page import text
from ssmquant.analysis.report import describe
from ssmquant.analysis.svg import HEIGHT, WIDTH, draw
from ssmquant.config import TRANSFORMS
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer, PackedTensor
from ssmquant.quantizers import QUANTIZERS, QTensor, Quantizer
from tests.conftest import ROOT
from tests.small import Chain, Scanner, images, points, prepared_and_calibrated, scanner, tiny_mambair

X = images(2, 3, 6, 5)
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Insists on balanced tags, and keeps what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self.cards: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[str]] = {}
        self._card: dict[str, Any] = {}
        self._row: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        links = [a["href"] for t, a in self.tags if t == "a"]
        assert {str(href)[1:] for href in links} <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID and tag not in ("rect", "path"):
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "figure":
            self._card = self.cards[str(found["title"])] = {"text": "", "path": {}}
        elif "figure" in self.open and tag in ("path", "rect"):
            self._card["path"][found["class"]] = found.get("d") or found
            if tag == "path":
                self.open.append(tag)
        elif tag == "svg":
            self._card["svg"] = found
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._row.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag == "path":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.getpos())
        if tag == "tr" and "tbody" in self.open:
            self.rows[self._row[0]] = self._row

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)
        if "figure" in self.open:
            self._card["text"] += data
        if self._row is not None and {"td", "th"} & set(self.open):
            self._row[-1] += data

    def ticks(self, name: str, kind: str = "l") -> list[float]:
        """The values of the lines of a card, from their places."""
        card = self.cards[name]
        low, high = float(card["svg"]["data-low"]), float(card["svg"]["data-high"])
        places = [float(x) for x in re.findall(r"M([\d.]+) ", card["path"][kind])]
        return [low + (high - low) * (x - 2) / 256 for x in places]

    def resolution(self, name: str) -> float:
        """What a hundredth of a unit of the picture stands for."""
        svg = self.cards[name]["svg"]
        return (float(svg["data-high"]) - float(svg["data-low"])) / 256 * 0.006


def written(tmp_path: Path, model: nn.Module, *args: Any, **options: Any) -> Page:
    path = ssmquant.report(model, tmp_path / "page.html", *args, force=True, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    return Page(path)


def quantizer(model: nn.Module, name: str) -> Quantizer:
    found = points(model)[name]
    runtime = runtime_of(model)
    if found.what != "activation":
        return runtime.weights[found.key]  # type: ignore[return-value]
    wrapper = runtime.activations[found.key]
    assert isinstance(wrapper, ActivationQuantizer)
    return wrapper.quantizer


def check_pictures(page: Page) -> None:
    """Everything lies within the view box, and bars do not overlap."""
    for card in page.cards.values():
        if "svg" not in card:
            continue
        assert card["svg"]["viewbox"] == f"0 0 {WIDTH} {HEIGHT}"
        bars = re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", card["path"]["h"])
        across = [float(a) for c, a, _ in bars if c in "MH"]
        heights = [float(a) for c, a, _ in bars if c == "V"]
        assert across == sorted(across)
        assert across[0] == 2
        assert across[-1] == 258
        assert all(4 <= y <= 70 for y in heights)
        assert min(heights) == 4  # the highest bar
        for kind in ("l", "t"):
            for x in re.findall(r"M([\d.]+) ", card["path"].get(kind, "")):
                assert 2 <= float(x) <= 258
        if "r" in card["path"]:
            rect = {k: float(card["path"]["r"][k]) for k in ("x", "y", "width", "height")}
            assert rect["x"] >= 2
            assert rect["x"] + rect["width"] <= 258.01


# ---- what the page says --------------------------------------------------------------------------------------------


def test_a_prepared_model(tmp_path: Path) -> None:
    model = scanner(4)
    page = written(tmp_path, model, [X, images(1, 3, 4, 4)])
    summary, health = ssmquant.summary(model), ssmquant.health(model)
    assert list(page.rows) == [r.name for r in summary.rows]
    assert set(page.cards) == set(points(model))
    check_pictures(page)
    for r in summary.rows:
        cells = page.rows[r.name]
        assert cells[1:4] == [r.kind, r.scheme, r.methods]
        assert cells[4] == f"{r.bytes:,}"
        assert cells[-1] == r.note
    for row in health.rows:  # weights and static operands are measured as there
        shown = page.cards[row.name]["text"]
        if row.sqnr_db is not None and math.isfinite(row.sqnr_db):
            assert f"SQNR {row.sqnr_db:.1f} dB" in shown.replace("\N{MINUS SIGN}", "-")
        assert f"dead {row.dead_levels} of 16" in shown
    words = " ".join(page.text["dd"])
    assert f"{summary.parameters:,}" in words
    assert f"{summary.bytes:,}" in words
    assert "2 batches" in "".join(page.text["p"])
    assert "QConfig(\n    w_bits=4,\n    a_bits=4,\n)" in page.text["pre"]
    assert ssmquant.__version__ in words
    assert "first layer" in page.source


def test_nothing_is_loaded_and_script_is_ours(tmp_path: Path) -> None:
    page = written(tmp_path, scanner(4), [X])
    assert not {"link", "img", "iframe", "object", "embed"} & {t for t, _ in page.tags}
    assert not any(k in ("src", "srcset") or k.startswith("on") for _, a in page.tags for k in a)
    assert all(str(a.get("href", "#")).startswith("#") for _, a in page.tags)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert sum(t == "script" for t, _ in page.tags) == 1
    assert (
        "matplotlib" not in {m for m in sys.modules if m == "matplotlib"} or "matplotlib" not in page.source
    )


def test_without_batches(tmp_path: Path) -> None:
    page = written(tmp_path, scanner(4))
    assert "--images" in page.source
    assert "input dB" not in page.text["th"]
    assert page.cards["in_proj:input"]["text"].endswith("not measured")
    assert "svg" in page.cards["in_proj:weight"]
    fresh = ssmquant.prepare(Scanner(), QConfig(w_bits=4, a_bits=4), example_inputs=(X,))
    written(tmp_path, fresh)  # not calibrated
    with pytest.raises(NotCalibratedError):
        ssmquant.report(fresh, tmp_path / "other.html", [X])
    assert not (tmp_path / "other.html").exists()


def test_a_deployed_model(tmp_path: Path) -> None:
    model = ssmquant.convert(scanner(4))
    page = written(tmp_path, model, [X])
    check_pictures(page)
    assert [r.name for r in ssmquant.summary(model).rows] == list(page.rows)
    assert "kernel" in page.text["th"]
    assert "weight dB" not in page.text["th"]
    packed = runtime_of(model).weights["in_proj:weight"]
    assert isinstance(packed, PackedTensor)
    q = packed.qtensor()
    assert page.ticks("in_proj:weight") == pytest.approx(
        q.levels[0].tolist(), abs=page.resolution("in_proj:weight")
    )
    assert "Decoded values" in page.cards["in_proj:weight"]["text"]
    for name in (n for n in page.cards if "svg" in page.cards[n]):  # inputs are measured here, too
        assert "%" in page.cards[name]["text"] or "decay" in name
    assert "SQNR" in page.cards["in_proj:input"]["text"]


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
        QConfig.recommended(3, 3),
    ],
    ids=["dls", "token", "recommended"],
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


def test_the_output_against_the_float_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    floats = Scanner().eval()
    model = prepared_and_calibrated(floats, QConfig(w_bits=4, a_bits=4), X)
    with torch.no_grad():
        signal, noise = floats(X).square().sum(), (model(X) - floats(X)).square().sum()
    db = float(10 * torch.log10(signal / noise))
    assert f"SQNR {db:.1f} dB" in "".join(written(tmp_path, model, [X], reference=floats).text["dd"])
    called: list[nn.Module] = []

    def forward(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        called.append(m)
        return m(batch["image"])  # type: ignore[no-any-return]

    page = written(tmp_path, model, [{"image": X}], reference=floats, forward=forward)
    assert called == [model, floats]
    assert f"SQNR {db:.1f} dB" in "".join(page.text["dd"])
    with pytest.raises(InputError, match="other shapes"):
        written(tmp_path, model, [X], reference=nn.Conv2d(3, 4, 1))
    with pytest.raises(ConfigError, match="need batches"):
        written(tmp_path, model, reference=floats)


def test_transforms_and_shared_quantizers(tmp_path: Path) -> None:
    config = QConfig.mambaquant(8, 8, transforms=TRANSFORMS)
    model = prepared_and_calibrated(tiny_mambair().eval(), config, images(1, 3, 8, 8))
    page, summary = written(tmp_path, model, [images(1, 3, 8, 8)]), ssmquant.summary(model)
    assert summary.transforms
    assert summary.not_transformed
    for kind, site, how in (*summary.transforms, *summary.not_transformed):
        assert html.escape(f"{site}") in page.source
        assert text(how) in page.source
        assert kind in page.source
    for name, _ in summary.floats:
        assert text(name) in page.source


def test_a_quantizer_of_several_sites_is_shown_once(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = prepared_and_calibrated(Chain(Both()).eval(), QConfig(w_bits=4, a_bits=4), X)
    page = written(tmp_path, model, [X])
    assert set(page.cards) == set(points(model))
    assert "input: the quantizer shown at middle.a" in page.text["p"]
    assert page.rows["middle.a"][7] == page.rows["middle.b"][7] != ""


class TwoHeads(nn.Module):
    """(B, 3, H, W) -> the same, in training with the output of a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.aux, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.middle(self.first(x))
        return (self.last(y), self.last(self.aux(y))) if self.training else self.last(y)


def test_what_only_training_has(tmp_path: Path) -> None:
    model = prepared_and_calibrated(TwoHeads().eval(), QConfig(w_bits=4, a_bits=4), X)
    page = written(tmp_path, model, [X])
    assert "aux" not in page.rows
    assert "svg" in page.cards["aux:weight"]
    assert page.cards["aux:input"]["text"].endswith("not measured")
    assert "svg" in page.cards["middle:input"]


# ---- hostile and broken --------------------------------------------------------------------------------------------


EVIL = "</script><script>alert(1)</script>&\u202e'=\U0001f600"  # as far as a graph can hold it
WORSE = f'{EVIL}"\x00\n\ud800'


def test_hostile_names(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleDict({EVIL: nn.Conv2d(4, 4, 1)})
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.steps[EVIL](self.first(x)).relu())

    Net.__name__ = EVIL
    config = QConfig(w_bits=4, a_bits=4, rules=(Rule(f"re:.*|{re.escape(EVIL)}", a_bits=3),))
    model = prepared_and_calibrated(Net().eval(), config, X)
    runtime_of(model).notes.append(WORSE)
    page = written(tmp_path, model, [X], title=WORSE)
    assert sum(t == "script" for t, _ in page.tags) == 1
    assert "alert" not in "".join(page.text["script"])
    assert f"steps.{EVIL}".replace("\u202e", "\\u202e").replace("\n", "\\n") in page.rows
    assert "\u202e" not in page.source
    assert "\x00" not in page.source
    assert "\\ud800" in page.text["title"][0]


@given(st.text(alphabet=st.characters(codec=None)))
def test_escaping(value: str) -> None:
    shown = text(value)
    assert not set(shown) & set("<>\"'\n\r\t")
    shown.encode("utf-8")
    back = html.unescape(shown)
    if value.isprintable():
        assert back == value


def test_nan_in_a_batch(tmp_path: Path) -> None:
    bad = X.clone()
    bad[0, 0, 0, 0] = math.nan
    for model in (scanner(4), ssmquant.convert(scanner(4))):
        for value in (math.nan, math.inf):
            bad[0, 0, 0, 0] = value
            with pytest.raises(InputError, match="NaN or inf to 'in_proj:input'"):
                ssmquant.report(model, tmp_path / "page.html", [X, bad])
    assert not list(tmp_path.iterdir())
    broken = copy.deepcopy(scanner(4))
    with torch.no_grad():
        broken.in_proj.weight.fill_(math.nan)
        quantizer(broken, "out_proj:weight").alpha.fill_(math.nan)
    page = written(tmp_path, broken)
    assert page.cards["in_proj:weight"]["text"].count("not finite") == 1
    assert page.cards["out_proj:weight"]["text"].count("not finite") == 1
    assert "NaN or inf" in "".join(page.text["li"])


@pytest.mark.parametrize(
    "batches", [[], [torch.empty(0, 3, 6, 5)], [3], ["text"]], ids=["none", "empty", "number", "text"]
)
def test_batches_that_are_none(batches: list[Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        ssmquant.report(scanner(4), tmp_path / "page.html", batches)
    assert not list(tmp_path.iterdir())


def test_where_it_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(ConfigError, match="exists; give force"):
        ssmquant.report(scanner(4), path)
    with pytest.raises(ConfigError, match="it is a folder"):
        ssmquant.report(scanner(4), tmp_path, force=True)
    with pytest.raises(ConfigError, match="no such folder"):
        ssmquant.report(scanner(4), tmp_path / "none" / "page.html")
    with pytest.raises(ConfigError, match="not made by ssmquant"):
        ssmquant.report(Scanner(), path, force=True)

    def fails(*args: Any, **kwargs: Any) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="no space"):
        ssmquant.report(scanner(4), path, force=True)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("stage", ["prepared", "deployed"])
def test_the_model_is_as_before(stage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    floats = tiny_mambair(drop_path_rate=0.2).train()
    floats.norm = nn.Sequential()  # not used by the code
    x = images(1, 3, 8, 8)
    model = ssmquant.calibrate(ssmquant.prepare(floats, QConfig.qmambair(4), example_inputs=(x,)), [x])
    if stage == "deployed":
        model = ssmquant.convert(model)
    else:
        model.train()
        model.layers.eval()
    ssmquant.summary(model)
    runtime = runtime_of(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    generator, records = torch.random.get_rng_state(), list(runtime.records)
    graphs, instead = runtime.graphs, runtime.instead
    for error in (False, True):
        if error:
            with pytest.raises(ZeroDivisionError):
                ssmquant.report(model, tmp_path / "x.html", [x, x], forward=lambda m, b: [m(b), 1 / 0])
        else:
            written(tmp_path, model, [x], reference=floats)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert {n: m.training for n, m in model.named_modules()} == modes
        assert hooks == {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        }
        assert torch.equal(torch.random.get_rng_state(), generator)
        assert runtime.records[: len(records)] == records
        assert (runtime.graphs, runtime.instead) == (graphs, instead)
        assert floats.training
        assert all(p.grad is None for p in model.parameters())


def test_the_same_page_twice(tmp_path: Path) -> None:
    model = scanner(4)
    pages = [written(tmp_path, model, [X]).source for _ in range(2)]
    assert pages[0] == pages[1]


def test_half_precision_and_loops_of_samples(tmp_path: Path) -> None:
    model = copy.deepcopy(scanner(4)).half()
    page = written(tmp_path, model, [X.half()])
    check_pictures(page)
    many = written(tmp_path, scanner(4), (images(1, 3, 40, 40, seed=i) for i in range(6)))
    assert "6 batches" in "".join(many.text["p"])
    check_pictures(many)


# ---- histograms ----------------------------------------------------------------------------------------------------


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


# ---- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        QConfig(),
        QConfig.recommended(4, 2),
        QConfig(
            w_bits=4, rules=(Rule("*.scan.A", a_bits=8), Rule("Linear", weight="lsq")), keep_float=("head",)
        ),
    ],
)
def test_the_configuration_is_code(config: QConfig) -> None:
    assert eval(describe(config), {"QConfig": QConfig, "Rule": Rule}) == config


def test_every_method_has_a_picture() -> None:
    """A new quantizer needs a thought on what to show."""
    known = {"lsq", "dls", "rfa", "minmax", "pact", "dorefa", "n2uq", "rlq", "token"}
    assert set(QUANTIZERS) == known


def run(*args: Any) -> int:
    return cli.main([str(a) for a in args])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ROOT / "examples" / "weights" / "mambair_tiny_x2_float.safetensors"
    out, photo = tmp_path / "r.html", ROOT / "examples" / "photos" / "coffee.png"
    command = ("report", tiny, "-o", out, "--images", photo)
    assert run(*command, "--crop", "12", "--preset", "recommended", "--w-bits", "3", "--title", "<b>") == 0
    assert f"{out.stat().st_size:,} bytes, 1 of 1 pictures" in capsys.readouterr().out
    page = Page(out)
    assert page.text["title"] == ["<b>"]
    assert "against the reference model" in page.source
    assert "W3A4" in page.source
    assert "--force" in failure(capsys, *command)
    assert "is an input" in failure(capsys, "report", out, "-o", out, "--force")
    assert "--crop 0" in failure(capsys, *command, "--force", "--crop", "0")
    assert "no such file" in failure(capsys, "report", tmp_path / "none", "-o", tmp_path / "x.html")
    assert "no such folder" in failure(capsys, "report", tiny, "-o", tmp_path / "no" / "x.html")
    assert "no such file or folder" in failure(capsys, *command[:4], "--force", "--images", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def failure(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ssmquant: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4 * 64, 3)

    def forward(self, x):
        return self.last(self.mix(self.first(x)).flatten(1))

def make():
    return Net()
"""


def test_the_command_for_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    photos = ROOT / "examples" / "photos"
    command = ("report", "report_nets:make", "--input", "1,3,8,8", "-o")
    assert run(*command, "a.html") == 0
    assert "weights only" in capsys.readouterr().out
    assert run(*command, "b.html", "--images", photos, "--crop", "8", "--preset", "minmax") == 0
    assert "13 of 13 pictures" in capsys.readouterr().out
    assert "13 batches" in Path("b.html").read_text(encoding="utf-8")
    said = failure(capsys, *command, "c.html", "--images", photos / "coffee.png", "--crop", "9")
    assert "does not take pictures of 1x3x9x9 (see --crop)" in said
    assert not Path("c.html").exists()


def test_the_command_for_a_quantized_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ssmquant.convert(
        prepared_and_calibrated(tiny_mambair().eval(), QConfig(w_bits=4, a_bits=4), images(1, 3, 8, 8))
    )
    ssmquant.save(saved, tmp_path / "q.safetensors")
    command = ("report", tmp_path / "q.safetensors", "-o", tmp_path / "q.html")
    assert "is quantized" in failure(capsys, *command, "--w-bits", "2")
    assert run(*command) == 0
    assert "deployed" in " ".join(Page(tmp_path / "q.html").text["dd"])
