"""A report's page, read back: balanced tags, the rows of its table, the numbers in its pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from torch import nn

import ssmquant
from ssmquant.analysis.svg import HEIGHT, WIDTH
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers import Quantizer
from tests.small import points

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
