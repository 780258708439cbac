"""Tables and the figure of a comparison, from the cells that are finished."""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import methods
from cells import Cell, Settings, failure, has_models, load_result, scores_on, shown_crops
from evalsets import EvalSet
from problems import Metric, Problem

from ssmquant.errors import ConfigError
from ssmquant.restore import open_image

__all__ = ["difference", "markdown", "mean_score", "paired", "write"]

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
Group = tuple[str, float | None]
Results = Mapping[int, Mapping[str, Any]]
"""Of one method at one bit width, by seed."""


def mean_score(images: Scores, key: str) -> float:
    """The mean over sets of a set's mean."""
    return statistics.fmean(statistics.fmean(row[key] for row in rows) for rows in images.values())


def paired(a: Results, b: Results, key: str) -> tuple[float, float, int]:
    """Mean over pictures of the score of ``a`` minus that of ``b``, its standard error, and of how many seeds.

    Pairs are of one seed and one picture, so what these have in common cancels; seeds that one side lacks are
    left out. A picture's differences are averaged over the seeds, then every picture counts alike, whatever
    its set. The standard error is over pictures only.
    """
    seeds = sorted(a.keys() & b.keys())
    differences: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        theirs = {(n, row["name"]): row[key] for n, rows in b[seed]["images"].items() for row in rows}
        for name, rows in a[seed]["images"].items():
            for row in rows:
                if (name, row["name"]) in theirs:
                    apart = row[key] - theirs[name, row["name"]]
                    differences.setdefault((name, row["name"]), []).append(apart)
    means = [statistics.fmean(d) for d in differences.values()]
    if not means:
        return math.nan, math.nan, len(seeds)
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return statistics.fmean(means), spread, len(seeds)


def _mean_over(results: Results, seeds: Iterable[int], key: str) -> float:
    return statistics.fmean(mean_score(results[seed]["images"], key) for seed in seeds)


def _row(group: Group, by_seed: Results, floats: Results, metrics: Sequence[Metric]) -> dict[str, Any]:
    """The figures of a method at a bit width, averaged over seeds; its loss over those of the float model."""
    (method, bits), key = group, metrics[0].key
    results = [by_seed[seed] for seed in sorted(by_seed)]
    means = [mean_score(r["images"], key) for r in results]
    sets = {
        name: {
            m.key: statistics.fmean(
                statistics.fmean(row[m.key] for row in r["images"][name]) for r in results
            )
            for m in metrics
        }
        for name in results[0]["images"]
    }
    frozen = [mean_score(r["frozen"], key) for r in results if "frozen" in r]
    both = sorted(by_seed.keys() & floats.keys())
    costs = {name: results[0][name] for name in ("file_bytes", "bitops")}
    less = {f"{n}_reduction": 1 - v / floats[s][n] for n, v in costs.items() for s in sorted(floats)[:1]}
    return {
        "method": method, "label": results[0]["label"], "bits": bits, "seeds": len(results), "sets": sets,
        "score": statistics.fmean(means), "score_seeds": means,
        "loss": _mean_over(floats, both, key) - _mean_over(by_seed, both, key) if both else None,
        "loss_seeds": len(both),
        "frozen_score": statistics.fmean(frozen) if len(frozen) == len(results) else None,
        "train_seconds": statistics.fmean(r["train_seconds"] for r in results),
        **costs, **less,
        "verify_max_rel": max((r.get("verify_max_rel", 0.0) for r in results), default=0.0),
    }  # fmt: skip


@dataclass
class Found:
    """Results of the finished cells by group and seed; the others by their names."""

    groups: dict[Group, dict[int, dict[str, Any]]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    data: str | None = None
    """Fingerprint of the pictures that all were trained on."""


def collect(cells: Sequence[Cell], settings: Settings, out: Path, sets: Sequence[EvalSet] | None) -> Found:
    """Results of the finished cells on ``sets``, or on those that all cells with scores have.

    Raises:
        ConfigError: they were trained on different pictures, or have no set in common.
    """
    results = {cell: load_result(cell, settings, out) for cell in cells}
    trained = {cell: result for cell, result in results.items() if result is not None}
    data = {result["key"]["data"] for result in trained.values()}
    if len(data) > 1:
        raise ConfigError("the cells were trained on different pictures: give --data")
    found = Found(data=data.pop() if data else settings.data)
    if sets is None:
        wanted = _in_common([result for result in trained.values() if result["sets"]], found.notes)
    else:
        wanted = {one.name: one.sha256 for one in sets}
    for cell, result in results.items():
        scored = scores_on(result, wanted) if result is not None and wanted else None
        why = failure(cell, settings, out, None if sets is None else wanted)
        if scored is not None:
            found.groups.setdefault((cell.method, cell.bits), {})[cell.seed] = scored
        elif why is not None:
            found.failed[cell.name] = why
        else:
            found.unfinished.append(cell.name)
            if result is not None and not has_models(cell, result, out):
                known = [one["sha256"] for one in result["sets"]]
                missing = ", ".join(name for name, sha in wanted.items() if sha not in known)
                found.notes.append(
                    f"{cell.name}: not scored on {missing}, and its models are not in {out / cell.name}; "
                    "put them there, or remove result.json to train it again"
                )
    return found


def _in_common(results: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, str]:
    """Names and fingerprints of the sets that all ``results`` have; a note names those left out."""
    if not results:
        return {}
    names = {one["sha256"]: one["name"] for result in reversed(results) for one in result["sets"]}
    every = [{one["sha256"] for one in result["sets"]} for result in results]
    shared = [one["sha256"] for one in results[0]["sets"] if all(one["sha256"] in own for own in every)]
    if not shared:
        raise ConfigError("there is no set that all cells were scored on: give --eval")
    left = sorted(name for sha, name in names.items() if sha not in shared)
    if left:
        notes.append(f"left out, for not all cells were scored on them: {', '.join(left)}")
    alike = [names[sha] for sha in shared]
    return {names[sha] + (f" {sha[:6]}" if alike.count(names[sha]) > 1 else ""): sha for sha in shared}


def _against(group: Group, groups: Mapping[Group, Results], key: str) -> Group | None:
    """What a row is compared with: variants of "ours" with it, any other with the best baseline at its bits.

    Which is best is judged by the seeds that it has in common with the row.
    """
    method, bits = group
    if method in methods.ABLATIONS or method == "searched":
        parent = ("official" if method.startswith("official") else "ours", bits)
        return parent if parent in groups and groups[parent].keys() & groups[group].keys() else None
    if bits is None:
        return None
    best, most = None, -math.inf
    for other, results in groups.items():
        both = groups[group].keys() & results.keys()
        rival = (
            other[1] == bits and other[0] in methods.METHODS and other[0] not in ("ours", "searched", method)
        )
        # Relative to the row itself, for rivals may have different seeds in common with it.
        if (
            rival
            and both
            and (lead := _mean_over(results, both, key) - _mean_over(groups[group], both, key)) > most
        ):
            best, most = other, lead
    return best


def write(
    cells: Sequence[Cell], settings: Settings, out: Path, sets: Sequence[EvalSet] | None
) -> tuple[int, int]:
    """Print and write the tables: how many cells are not finished, and how many failed.

    ``sets=None``: of the sets that all cells with scores have.
    """
    metrics, key = settings.problem.metrics, settings.problem.metric.key
    found = collect(cells, settings, out / "cells", sets)
    groups, counts = found.groups, (len(found.unfinished), len(found.failed))
    for note in found.notes:
        print(note, file=sys.stderr)
    if not groups:
        return counts
    rows = {g: _row(g, r, groups.get(("float", None), {}), metrics) for g, r in groups.items()}
    order = [*methods.METHODS, *methods.ABLATIONS]
    for group, row in rows.items():
        other = _against(group, groups, key)
        if other is not None:
            mean, error, seeds = paired(groups[group], groups[other], key)
            row["against"] = {"method": other[0], "mean": mean, "standard_error": error, "seeds": seeds}
    ordered = sorted(rows, key=lambda g: (-(g[1] or 99), order.index(g[0])))
    devices = sorted({r["device"] for g in groups.values() for r in g.values()})
    lines = [
        f"{settings.steps} steps of {settings.batch} samples, from {settings.init.name}; "
        f"devices: {', '.join(devices)}.",
        "",
        f"Mean {metrics[0].label}: ± is the standard deviation over seeds. "
        '"below float" and "against": of common seeds. '
        '"against": mean over pictures of the difference to that method, paired by seed and picture; the '
        "standard error is over pictures only and says nothing about seeds.",
        "",
    ]
    for title, names in (("Methods", methods.METHODS), ("Changes to a method", methods.ABLATIONS)):
        shown = [g for g in ordered if g[0] in names]
        if shown:
            header, body = _table([rows[g] for g in shown], metrics)
            narrow = header.index("seeds")  # what a terminal has room for; all of it is in the file
            common.print_table(title, header[:narrow], [line[:narrow] for line in body])
            lines += [f"## {title}", "", *markdown(header, body), ""]
    failed = [f"{name}: {why}" for name, why in found.failed.items()]
    for title, what in (("Not finished", found.unfinished), ("Failed", failed), ("Notes", found.notes)):
        if what:
            lines += [f"## {title}", "", *(f"- {line}" for line in what), ""]
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    everything = {
        "settings": {**settings.describe(), "data": found.data}, "rows": [rows[g] for g in ordered],
        "unfinished": len(found.unfinished), "failed": found.failed, "notes": found.notes,
    }  # fmt: skip
    common.write_json(common.plain(everything), out / "compare.json")
    main = [g for g in ordered if g[0] in methods.METHODS]
    picture(main, groups, settings.problem, out)
    sizes([rows[g] for g in main], metrics[0], out)
    return counts


def _table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    sets, (metric, *others) = list(rows[0]["sets"]), metrics
    header = [
        "bits", "method", *sets, f"mean {metric.label}", "below float", "frozen", "against", "seeds",
        *(f"{s} {m.label}" for m in others for s in sets), "train s", "bytes", "fewer bytes", "GBitOPs",
        "fewer BitOPs", "worst verify error",
    ]  # fmt: skip
    body = []
    for r in rows:
        seeds = r["score_seeds"]
        spread = f" ± {metric.show(statistics.stdev(seeds), 1)}" if len(seeds) > 1 else ""
        body.append([
            "32" if r["bits"] is None else f"{r['bits']:g}", r["label"],
            *(metric.show(r["sets"][s][metric.key]) for s in sets),
            f"{metric.show(r['score'], 1)}{spread}", _loss(r, metric),
            "" if r["frozen_score"] is None else metric.show(r["frozen_score"], 1),
            difference(r.get("against"), metric),
            str(r["seeds"]), *(m.show(r["sets"][s][m.key]) for m in others for s in sets),
            f"{r['train_seconds']:.0f}", f"{r['file_bytes']:,}", _less(r, "file_bytes"),
            f"{r['bitops'] / 1e9:.1f}", _less(r, "bitops"), f"{r['verify_max_rel']:.0e}",
        ])  # fmt: skip
    return header, body


def _less(row: Mapping[str, Any], name: str) -> str:
    """How much less than the float model's, as the papers have it."""
    share = row.get(f"{name}_reduction")
    return "" if share is None or row["bits"] is None else f"{100 * share:.1f} %"


def _loss(row: Mapping[str, Any], metric: Metric) -> str:
    """How far below the float model, and of how many seeds where these are not all of the row's."""
    if row["loss"] is None or row["bits"] is None:
        return ""
    return metric.show(row["loss"], 1) + (
        f" ({row['loss_seeds']})" if row["loss_seeds"] < row["seeds"] else ""
    )


def difference(against: Mapping[str, Any] | None, metric: Metric) -> str:
    """What a row leads another method by, with its standard error and the number of seeds.

    Figures that are not finite may be None, as ``compare.json`` has them.
    """
    if not against or against["mean"] is None:
        return ""
    error, seeds = against["standard_error"], against["seeds"]
    spread = "" if error is None or math.isnan(error) else f" ± {metric.show(error, 1)}"
    mean = metric.show(against["mean"], 1)
    lead = f"{against['method']} {mean if mean.startswith('-') else f'+{mean}'}{spread}"
    return f"{lead}, {seeds} seed{'s' if seeds > 1 else ''}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in body]


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _pyplot() -> Any:
    """``matplotlib.pyplot`` that draws into files; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def sizes(rows: Sequence[Mapping[str, Any]], metric: Metric, out: Path) -> None:
    """The mean score of every method over the size of its file, a line a method, a mark a bit width."""
    target = out / "sizes.png"
    target.unlink(missing_ok=True)
    plt = _pyplot()
    if plt is None or all(r["bits"] is None for r in rows):
        return
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for label in dict.fromkeys(r["label"] for r in rows):
        own = sorted((r for r in rows if r["label"] == label), key=lambda r: r["file_bytes"])
        points = [r["file_bytes"] / 1e6 for r in own], [r["score"] for r in own]
        ours = own[0]["method"] in ("ours", "searched")
        axes.plot(
            *points,
            "*-" if ours else "o-",
            label=label,
            markersize=11 if ours else 5,
            zorder=3 if ours else 2,
        )
        for r, x, y in zip(own, *points, strict=True):
            if r["bits"] is not None and r["method"] == "ours":
                axes.annotate(
                    f"{r['bits']:g} bits", (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8
                )
    axes.set_xscale("log")
    axes.set_xlabel("file, MB")
    axes.set_ylabel(f"mean {metric.label}, {metric.unit}" if metric.unit else f"mean {metric.label}")
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}" if f"{v:.1e}"[0] in "25" else ""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)


def picture(groups: Sequence[Group], results: Mapping[Group, Results], problem: Problem, out: Path) -> None:
    """Crops of the original, of the float model and of every method at the fewest bits, with scores, side by side.

    All are of one seed, which most of them have, and of the cells whose results are in the tables; without
    such crops there is no figure.
    """
    target = out / "compare.png"
    target.unlink(missing_ok=True)
    plt = _pyplot()
    if plt is None:
        return
    least = min((bits for _, bits in groups if bits is not None), default=None)
    columns = [g for g in groups if g[1] in (None, least)]
    seeds = Counter(seed for g in columns for seed in sorted(results[g]))
    seed = max(seeds, key=lambda s: (seeds[s], -s), default=None)
    if seed is None:
        return
    columns = [g for g in columns if seed in results[g]]
    crops = [shown_crops(Cell(*g, seed), results[g][seed], out / "cells") for g in columns]
    boxes = [box for box in crops[0] if all(box in own for own in crops)]
    if not boxes:
        return
    wide = 1 + len(columns)
    figure, axes = plt.subplots(len(boxes), wide, figsize=(1.7 * wide, 1.9 * len(boxes)), squeeze=False)
    for line, box in zip(axes, boxes, strict=True):
        original = open_image(crops[0][box][0])
        line[0].imshow(original)
        line[0].set_title(f"{_short(Path(box[1]).stem)}\noriginal", fontsize=7)
        for axis, group, own in zip(line[1:], columns, crops, strict=True):
            restored = open_image(own[box][1])
            axis.imshow(restored)
            label = results[group][seed]["label"].partition(",")[0]
            axis.set_title(
                f"{label}\n{group[1] or 32:g} bits, {problem.caption(restored, original)}", fontsize=7
            )
        for axis in line:
            axis.axis("off")
    figure.tight_layout(h_pad=2)
    figure.savefig(target, dpi=130)
    plt.close(figure)
