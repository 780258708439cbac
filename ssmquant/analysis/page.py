"""A report as one HTML page: header, table of sites, histograms. Nothing is loaded from elsewhere.

All text that comes from a model goes through :func:`text`.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssmquant.analysis.samples import Measured
from ssmquant.analysis.style import SCRIPT, STYLE
from ssmquant.analysis.summary import Summary, SummaryRow
from ssmquant.analysis.svg import draw, number

__all__ = ["Card", "Content", "SiteView", "render", "text"]

_FULL_DB = 40.0
"""SQNR of a full bar."""
_CLASSES = (6.0, 12.0, 18.0, 30.0)
"""Where one colour ends and the next begins, dB."""


@dataclass(frozen=True)
class Card:
    """A quantizer, below the first site that reads it."""

    name: str
    operand: str
    scheme: str
    measured: Measured | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteView:
    """A site: its row of the summary (None: only other graphs of the model have it), quantizers and SQNR in dB.

    ``input``: of the operand that is worst, with its name.
    """

    name: str
    row: SummaryRow | None
    cards: tuple[Card, ...]
    weight: float | None
    input: tuple[str, float] | None
    output: float | None
    shared: tuple[tuple[str, str], ...] = ()
    """Operands whose quantizer stands at another site, and that site."""


@dataclass(frozen=True)
class Content:
    """All that a page shows."""

    title: str
    model: str
    stage: str
    config: str
    summary: Summary
    sites: tuple[SiteView, ...]
    problems: tuple[str, ...]
    batches: int | None
    output: float | None
    versions: str


# ---- pieces --------------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Escaped; what does not print, such as marks that turn the direction of text, by its number."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))
    return html.escape("".join(shown), quote=True)


def _lines(value: str) -> str:
    return "\n".join(text(line) for line in value.split("\n"))


def _db(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else number(value)
    return f"{value:.1f}".replace("-", "\N{MINUS SIGN}")


def colour_of(value: float) -> int:
    """The class 0..4 of an SQNR in dB; NaN is the worst."""
    return sum(value >= c for c in _CLASSES)


def _bar(share: float, kind: str = "") -> str:
    width = 0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0)
    colour = f' class="{kind}"' if kind else ""
    return f'<span class="b"><i{colour} style="width:{width:.0f}%"></i></span>'


def _sqnr(value: float | None) -> str:
    return "" if value is None else _bar(value / _FULL_DB, f"q{colour_of(value)}") + _db(value)


def _cell(value: float | None, shown: str) -> str:
    kind = "m" if "<" in shown else "n"  # bars are on the left
    return f'<td class="{kind}" data-v="{"" if value is None else _sortable(value)}">{shown}</td>'


def _sortable(value: float) -> str:
    if math.isnan(value):
        return "-Infinity"
    return f"{value:.6g}".replace("inf", "Infinity")


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return "&lt; 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{i}</li>" for i in items) + "</ul>"


def _fold(title: str, body: str, *, open_: bool = False) -> str:
    return f"<details{' open' * open_}><summary>{title}</summary>{body}</details>"


# ---- header --------------------------------------------------------------------------------------------------------


def _facts(c: Content) -> str:
    s = c.summary
    plain = sum(r.float_bitops for r in s.rows)
    shapes = ", ".join("\N{MULTIPLICATION SIGN}".join(map(str, shape)) for shape in s.input_shapes)
    rows = [
        ("model", f"{text(c.model)}, {text(c.stage)}"),
        ("parameters", f"{s.parameters:,}"),
        (
            "bytes",
            f"{s.bytes:,}, of float32 {_percent(s.bytes / max(4 * s.parameters, 1))} "
            f"({4 * s.parameters:,}); {s.float_bytes:,} of them stay float",
        ),
        (
            "bit operations",
            f"{s.bitops / 1e9:,.2f} G for one sample of {text(shapes)}, of float32 "
            f"{_percent(s.bitops / max(plain, 1))} ({plain / 1e9:,.2f} G)",
        ),
        (
            "coverage",
            f"{s.weights - len(s.uncovered)} of {s.weights} parameters that reach a matmul, convolution or scan "
            "belong to a site",
        ),
    ]
    if c.output is not None:
        rows.append(("output", f"SQNR {_db(c.output)} dB against the reference model"))
    rows.append(("made by", text(c.versions)))
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in rows) + "</dl>"


def _measured_from(c: Content) -> str:
    if c.batches is None:
        return (
            "<p>Activations were not measured: only weights and other parameters are shown. "
            "<code>ssmquant.report(model, path, batches)</code> with some batches, or "
            "<code>ssmquant report FILE -o OUT.html --images FOLDER</code>, shows inputs and outputs as well.</p>"
        )
    more = (
        "A site's output is measured with all its operands quantized against the same operands unquantized, so "
        "that noise from earlier sites does not count."
        if c.stage == "prepared"
        else "Outputs of sites are measured in prepared models only, and so is the SQNR of weights."
    )
    return (
        f"<p>Activations are from {c.batches} batch{'es' * (c.batches != 1)}, in evaluation mode with everything "
        f"quantized, in samples of each. {more}</p>"
    )


def _legend() -> str:
    ends = ["", *(f"{c:g}" for c in _CLASSES), ""]
    names = [
        f"below {b} dB" if not a else f"{a} dB and more" if not b else f"{a} to {b} dB"
        for a, b in itertools.pairwise(ends)
    ]
    keys = "".join(f'<span class="k q{i}"></span>{name}' for i, name in enumerate(names))
    return f"<p>SQNR (signal to quantization noise; a full bar is {_FULL_DB:g} dB):{keys}</p>"


# ---- table ---------------------------------------------------------------------------------------------------------


def _columns(c: Content) -> list[tuple[str, bool]]:
    columns = [("site", False), ("kind", False), ("scheme", False), ("quantizers", False), ("bytes", True)]
    columns.append(("bit operations", True))
    if c.stage == "deployed":
        columns.append(("kernel", False))
    else:
        columns.append(("weight dB", True))
    if c.batches is not None:
        columns.append(("input dB", True))
        if c.stage == "prepared":
            columns.append(("output dB", True))
    return [*columns, ("dead", True), ("zero", True), ("note", False)]


def _row(c: Content, i: int, site: SiteView) -> str:
    r = site.row
    assert r is not None
    name = text(site.name)
    link = f'<a href="#s{i}">{name}</a>' if site.cards or site.shared else name
    share = r.bitops / max(c.summary.bitops, 1)
    most = max(row.bitops for row in c.summary.rows)
    cells = [
        f'<th scope="row">{link}</th><td>{text(r.kind)}</td><td>{text(r.scheme)}</td><td>{text(r.methods)}</td>',
        _cell(r.bytes, f"{r.bytes:,}"),
        _cell(r.bitops, f"{_bar(r.bitops / max(most, 1))}{r.bitops / 1e6:,.1f} M, {_percent(share)}"),
    ]
    if c.stage == "deployed":
        cells.append(f"<td>{text(r.kernel)}</td>")
    else:
        cells.append(_cell(site.weight, _sqnr(site.weight)))
    if c.batches is not None:
        operand, worst = site.input or ("", None)
        of = f" <small>{text(operand)}</small>" if r.kind == "scan" else ""
        cells.append(_cell(worst, _sqnr(worst) + of))
        if c.stage == "prepared":
            cells.append(_cell(site.output, _sqnr(site.output)))
    cells.append(_cell(r.dead_levels, "" if r.dead_levels is None else str(r.dead_levels)))
    cells.append(_cell(r.zero_ratio, _percent(r.zero_ratio)))
    cells.append(f"<td>{text(r.note)}</td>")
    return f'<tr id="r{i}">{"".join(cells)}</tr>'


def _table(c: Content) -> str:
    heads = "".join(f'<th scope="col"{" data-n" * n}>{name}</th>' for name, n in _columns(c))
    rows = "\n".join(_row(c, i, s) for i, s in enumerate(c.sites) if s.row is not None)
    return (
        '<p id="filter"><label>filter <input type="search" id="word"></label> <span id="count" role="status">'
        '</span></p>\n<div class="wide" tabindex="0" role="region" aria-label="sites">'
        f'<table id="sites"><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    )


# ---- histograms ----------------------------------------------------------------------------------------------------


def _card(card: Card) -> str:
    m = card.measured
    facts = []
    picture = ""
    if m is None:
        facts.append("not measured")
    else:
        r, h = m.row, m.histogram
        if r.sqnr_db is not None:
            facts.append(f"SQNR {_sqnr(r.sqnr_db)} dB")
        if r.clipped is not None:
            facts.append(f"clipped {_percent(r.clipped)}")
        if r.dead_levels is not None:
            facts.append(f"dead {r.dead_levels} of {2**r.bits}")
        if r.zero_ratio is not None:
            facts.append(f"zero {_percent(r.zero_ratio)}")
        if h is None:
            facts.append("no range yet, or not finite")
        else:
            picture = (
                draw(h) + f"<small>{text(h.shown)} From {number(h.extremes[0])} to {number(h.extremes[1])}."
            )
            picture += "".join(f" {text(n)}" for n in card.notes) + "</small>"
    return (
        f'<figure title="{text(card.name)}"><figcaption><b>{text(card.operand)}</b> {text(card.scheme)}<br>'
        f"{', '.join(facts)}</figcaption>{picture}</figure>"
    )


def _section(i: int, site: SiteView) -> str:
    shared = "".join(
        f'<p class="dim">{text(operand)}: the quantizer shown at {text(other)}</p>'
        for operand, other in site.shared
    )
    cards = "".join(_card(card) for card in site.cards)
    return f'<section class="s" id="s{i}"><h3>{text(site.name)}</h3>{shared}<div class="g">{cards}</div></section>'


def _reading() -> str:
    return (
        "<p>Bars: how many values, heights by the square root. Coloured lines: the levels; of more than 16 the range "
        "and its ends. Short marks below: thresholds of the rounding, where they are learnt. The outermost bars also "
        "hold what lies further out. Clipped: beyond the end levels by more than half a step.</p>"
    )


# ---- the rest ------------------------------------------------------------------------------------------------------


def _transforms(s: Summary) -> str:
    parts = []
    for title, rows in (("applied", s.transforms), ("not applied", s.not_transformed)):
        if rows:
            lines = (
                f"<b>{text(kind)}</b> <code>{text(site)}</code>: {text(how)}" for kind, site, how in rows
            )
            parts.append(_fold(f"{len(rows)} {title}", _list(lines), open_=len(rows) <= 20))
    return "<h2>Transforms</h2>" + "".join(parts) if parts else ""


def _floats(s: Summary) -> str:
    sites = [(r.name, r.note) for r in s.rows if r.scheme == "float"]
    groups: dict[str, list[str]] = {}
    for what, pairs in (("site", sites), ("parameter", s.floats)):
        for name, reason in pairs:
            groups.setdefault(f"{what}: {reason or 'no bits'}", []).append(name)
    body = "".join(
        _fold(f"{len(names)} {text(reason)}", _list(f"<code>{text(n)}</code>" for n in names))
        for reason, names in sorted(groups.items())
    )
    missing = _list(f"<b>not covered</b>: <code>{text(n)}</code> ({text(why)})" for n, why in s.uncovered)
    if not (body or s.uncovered):
        return ""
    return "<h2>What stays float</h2>" + (missing if s.uncovered else "") + body


def _texts(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    found = _list(text(i) for i in items)
    return f"<h2>{title}</h2>" + (found if len(items) <= 10 else _fold(f"{len(items)}", found))


def render(c: Content) -> str:
    """The page."""
    title = text(c.title)
    sections = "\n".join(_section(i, s) for i, s in enumerate(c.sites) if s.cards or s.shared)
    body = [
        f"<h1>{title}</h1>",
        _facts(c),
        _fold("configuration", f"<pre>{_lines(c.config)}</pre>", open_=True),
        _texts("Warnings", c.problems),
        "<h2>Sites</h2>",
        _measured_from(c),
        _legend(),
        _table(c),
        _transforms(c.summary),
        _floats(c.summary),
        _texts("Notes", c.summary.notes),
        "<h2>Quantizers</h2>" + _reading() if sections else "",
        sections,
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
