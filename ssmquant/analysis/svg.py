"""A histogram as inline SVG, drawn in few characters: a report holds hundreds of them."""

from __future__ import annotations

from ssmquant.analysis.histogram import Histogram

__all__ = ["ALL_LEVELS", "HEIGHT", "WIDTH", "draw", "place"]

WIDTH, HEIGHT = 260, 92
"""The view box."""
ALL_LEVELS = 16
"""Up to so many levels each is drawn; of more, the range and its ends."""
_LEFT, _SPAN = 2, 256
_TOP, _FLOOR = 4, 70
_TICK = 76


def place(histogram: Histogram, value: float) -> float:
    """The x coordinate of a value."""
    return _LEFT + _SPAN * (value - histogram.low) / (histogram.high - histogram.low)


def number(value: float) -> str:
    """Three digits; a zero has no sign."""
    return f"{value + 0.0:.3g}".replace("-", "\N{MINUS SIGN}")


def _short(x: float) -> str:
    text = f"{x:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _bars(h: Histogram) -> str:
    """The outline of the bars, whose heights are square roots of the counts: tails would not be seen otherwise."""
    most = max(h.counts) or 1
    width = _SPAN / len(h.counts)
    path, y = [f"M{_LEFT} {_FLOOR}"], _FLOOR
    for i, count in enumerate(h.counts):
        top = _FLOOR - round((_FLOOR - _TOP) * (count / most) ** 0.5)
        if count and top == _FLOOR:
            top -= 1  # what is there is seen
        if top != y:
            path.append(f"H{_short(_LEFT + i * width)}V{top}")
            y = top
    return "".join(path) + f"H{_LEFT + _SPAN}V{_FLOOR}z"


def draw(h: Histogram) -> str:
    """The SVG element. ``data-low`` and ``data-high`` are the values at x = 2 and x = 258."""
    levels = h.levels if len(h.levels) <= ALL_LEVELS else (h.levels[0], h.levels[-1])
    ticks = "".join(f"M{_short(place(h, v))} {_TOP}V{_TICK}" for v in levels)
    parts = []
    if len(h.levels) > ALL_LEVELS:
        x, end = place(h, levels[0]), place(h, levels[1])
        parts.append(
            f'<rect class="r" x="{_short(x)}" y="{_TOP}" width="{_short(end - x)}" height="{_FLOOR - _TOP}"/>'
        )
    parts.append(f'<path class="h" d="{_bars(h)}"/><path class="l" d="{ticks}"/>')
    if h.thresholds and len(h.levels) <= ALL_LEVELS:
        marks = "".join(f"M{_short(place(h, t))} {_FLOOR}V{_TICK}" for t in h.thresholds)
        parts.append(f'<path class="t" d="{marks}"/>')
    parts.append(
        f'<text x="{_LEFT}" y="{HEIGHT - 3}">{number(h.low)}</text>'
        f'<text class="e" x="{_LEFT + _SPAN}" y="{HEIGHT - 3}">{number(h.high)}</text>'
    )
    label = (
        f"Histogram from {number(h.low)} to {number(h.high)}; {len(h.levels)} levels from {number(h.levels[0])} "
        f"to {number(h.levels[-1])}"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" data-low="{h.low:.9g}" '
        f'data-high="{h.high:.9g}">{"".join(parts)}</svg>'
    )
