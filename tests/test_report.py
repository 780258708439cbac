"""The HTML report: whole, escaped, and nothing left behind."""

from __future__ import annotations

import copy
import html
import math
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, InputError, NotCalibratedError, QConfig, Rule
from ssmquant.analysis.page import text
from ssmquant.config import TRANSFORMS
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor
from tests.report_page import check_pictures, quantizer, written
from tests.small import Chain, Scanner, images, points, prepared_and_calibrated, scanner, tiny_mambair

X = images(2, 3, 6, 5)


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
        quantized = r.scheme != "float"
        assert bool(cells[7]) == bool(cells[8]) == quantized
        assert bool(cells[6]) == (quantized and r.kind != "scan")
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


def test_nothing_is_loaded_and_script_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "PIL", "rich"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    page = written(tmp_path, scanner(4), [X])
    assert not {"link", "img", "iframe", "object", "embed"} & {t for t, _ in page.tags}
    assert not any(k in ("src", "srcset") or k.startswith("on") for _, a in page.tags for k in a)
    assert all(str(a.get("href", "#")).startswith("#") for _, a in page.tags)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert sum(t == "script" for t, _ in page.tags) == 1


def test_without_batches(tmp_path: Path) -> None:
    page = written(tmp_path, scanner(4))
    assert "--images" in page.source
    assert "input dB" not in page.text["th"]
    assert page.cards["in_proj:input"]["text"].endswith("not measured")
    assert "svg" in page.cards["in_proj:weight"]
    fresh = ssmquant.prepare(Scanner(), QConfig(w_bits=4, a_bits=4), example_inputs=(X,))
    written(tmp_path, fresh)  # not calibrated
    with pytest.raises(NotCalibratedError, match=r"before evaluating$"):
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
            with pytest.raises(InputError, match=r"NaN or inf to 'in_proj:input'$"):
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


# ---- the rest ------------------------------------------------------------------------------------------------------
