"""One HTML page about a prepared or deployed model: what is quantized, what it costs, how exact it is.

What ``summary`` and ``health`` tell, with histograms of weights and activations over the levels of their quantizers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssmquant.analysis.measure import points_of
from ssmquant.analysis.page import Card, Content, SiteView, render
from ssmquant.analysis.samples import Measured, Measurement, measure_batches, measure_parameters
from ssmquant.analysis.summary import Summary, summary
from ssmquant.errors import ConfigError
from ssmquant.files import check_new, replacing
from ssmquant.graph.plan import Point
from ssmquant.graph.runtime import Runtime, runtime_of
from ssmquant.progress import limited

__all__ = ["report"]


def report(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    reference: nn.Module | None = None,
    title: str | None = None,
    force: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> Path:
    """Writes one HTML page about a prepared or deployed model. It needs nothing else: no network, no other file.

    The page has the totals and the table of ``summary`` (sortable, with a filter), the warnings of ``health``, SQNR of
    weights and, from ``batches``, of inputs and of sites' outputs, and a histogram for every quantizer with its levels
    and the share of clipped values. The model is as before afterwards: mode, state, gradients, hooks, random number
    generators.

    Args:
        model: Prepared or deployed. The SQNR of weights and of sites' outputs takes a prepared one.
        path: Of the page. It is there whole or not at all.
        batches: An iterable of what the prepared method takes, as for ``calibrate``; all of it is run, in evaluation
            mode with everything quantized. None: weights and other parameters only.
        reference: The float model (or any other that takes the batches), to tell the SQNR of the model's output
            against its.
        title: Of the page; by default the model's class and its bits.
        force: Replace an existing file.
        forward: ``forward(model, batch)`` overrides how a batch is passed, to the reference too.
        progress: Show a progress bar; by default where stderr is a terminal and rich is installed.

    Returns:
        ``path``.

    Raises:
        ConfigError: ``model`` is neither prepared nor deployed, ``path`` exists (without ``force``) or cannot be
            written, or there is a ``reference`` or a ``forward`` without batches.
        InputError: there is no batch in ``batches``, it is not known how to pass one, NaN or inf comes to a quantizer
            (names it), or the reference's output has other shapes.
        NotCalibratedError: with ``batches``, the ranges of activations are not known yet.
    """
    runtime = runtime_of(model)
    target = check_new(path, force=force)
    if batches is None and (reference is not None or forward is not None):
        raise ConfigError("report: reference= and forward= need batches")
    looked = summary(model)
    measured = measure_parameters(model)
    found: Measurement | None = None
    if batches is not None:
        found = measure_batches(model, limited(batches, None, progress, "measuring"), forward, reference)
        measured |= found.activations
    page = render(_content(model, runtime, looked, measured, found, title))
    with replacing(target) as new:
        new.write_text(page, encoding="utf-8", newline="\n")
    return target


def _versions() -> str:
    try:
        own = version("ssmquant")
    except PackageNotFoundError:
        own = "of a checkout"
    return f"ssmquant {own}, torch {torch.__version__}"


# ---- from measurements to the page ----------------------------------------------------------------------------------


def _content(
    model: nn.Module,
    runtime: Runtime,
    looked: Summary,
    measured: dict[str, Measured],
    found: Measurement | None,
    title: str | None,
) -> Content:
    config = runtime.config
    name = type(model).__name__
    bits = f"W{config.w_bits or 'float'} A{config.a_bits or 'float'}"
    points = [p for _, p in points_of(runtime, ("weight", "static", "activation"))]
    return Content(
        title=title if title is not None else f"{name}, {bits}",
        model=name,
        stage=runtime.stage,
        config=str(config),
        summary=looked,
        sites=_sites(runtime, looked, points, measured, found),
        problems=tuple(sentence for m in measured.values() for _, sentence in m.row.problems),
        batches=None if found is None else found.batches,
        output=None if found is None else found.output,
        versions=_versions(),
    )


def _sites(
    runtime: Runtime,
    looked: Summary,
    points: list[Point],
    measured: dict[str, Measured],
    found: Measurement | None,
) -> tuple[SiteView, ...]:
    """The sites of the summary, then those that only other graphs have."""
    rows = {r.name: r for r in looked.rows}
    reads: dict[str, list[tuple[str, Point]]] = {}
    for p in points:
        for site, operand in p.uses:
            reads.setdefault(site.name, []).append(("weight" if p.what == "weight" else operand.name, p))
    views = []
    for name in dict.fromkeys([*rows, *reads]):
        operands = reads.get(name, [])
        own = [(o, p) for o, p in operands if p.uses[0][0].name == name]
        exact = [(o, p.what, measured[p.name].row.sqnr_db) for o, p in operands if p.name in measured]
        weight = next((db for _, what, db in exact if what == "weight"), None)
        inputs = [(o, db) for o, what, db in exact if what != "weight" and db is not None]
        views.append(
            SiteView(
                name,
                rows.get(name),
                tuple(_card(runtime, operand, p, measured) for operand, p in own),
                weight,
                min(inputs, key=lambda pair: pair[1]) if inputs and found else None,
                found.sites.get(name) if found else None,
                tuple((o, p.uses[0][0].name) for o, p in operands if (o, p) not in own),
            )
        )
    return tuple(views)


def _card(runtime: Runtime, operand: str, point: Point, measured: dict[str, Measured]) -> Card:
    scheme = f"{point.scheme.method} {point.scheme.bits} bits"
    notes = []
    gain = None if point.gain is None else getattr(runtime.activations[point.gain], "gain", None)
    if gain is not None and not bool((gain == 1).all()):
        notes.append("After the factors that even out channels (smooth).")
    return Card(point.name, operand, scheme, measured.get(point.name), tuple(notes))
