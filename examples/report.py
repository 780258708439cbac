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

from ssmquant.errors import ConfigError
from ssmquant.restore import open_image, psnr, to_tensor

__all__ = ["mean_psnr", "paired", "write"]

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
Group = tuple[str, int | None]
Results = Mapping[int, Mapping[str, Any]]
"""Of one method at one bit width, by seed."""


def mean_psnr(images: Scores, key: str = "psnr") -> float:
    """The mean over sets of a set's mean."""
    return statistics.fmean(statistics.fmean(row[key] for row in rows) for rows in images.values())


def paired(a: Results, b: Results) -> tuple[float, float, int]:
    """Mean over pictures of PSNR of ``a`` minus that of ``b``, its standard error, and of how many seeds.

    Pairs are of one seed and one picture, so what these have in common cancels; seeds that one side lacks are
    left out. A picture's differences are averaged over the seeds, then every picture counts alike, whatever
    its set. The standard error is over pictures only.
    """
    seeds = sorted(a.keys() & b.keys())
    differences: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        theirs = {(n, row["name"]): row["psnr"] for n, rows in b[seed]["images"].items() for row in rows}
        for name, rows in a[seed]["images"].items():
            for row in rows:
                if (name, row["name"]) in theirs:
                    apart = row["psnr"] - theirs[name, row["name"]]
                    differences.setdefault((name, row["name"]), []).append(apart)
    means = [statistics.fmean(d) for d in differences.values()]
    if not means:
        return math.nan, math.nan, len(seeds)
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return statistics.fmean(means), spread, len(seeds)


def _mean_over(results: Results, seeds: Iterable[int]) -> float:
    return statistics.fmean(mean_psnr(results[seed]["images"]) for seed in seeds)


def _row(group: Group, by_seed: Results, floats: Results) -> dict[str, Any]:
    """The figures of a method at a bit width, averaged over seeds; its loss over those of the float model."""
    method, bits = group
    results = [by_seed[seed] for seed in sorted(by_seed)]
    means = [mean_psnr(r["images"]) for r in results]
    sets = {
        name: {
            k: statistics.fmean(statistics.fmean(row[k] for row in r["images"][name]) for r in results)
            for k in ("psnr", "ssim")
        }
        for name in results[0]["images"]
    }
    frozen = [mean_psnr(r["frozen"]) for r in results if "frozen" in r]
    both = sorted(by_seed.keys() & floats.keys())
    return {
        "method": method, "label": results[0]["label"], "bits": bits, "seeds": len(results), "sets": sets,
        "psnr": statistics.fmean(means), "psnr_seeds": means,
        "loss": _mean_over(floats, both) - _mean_over(by_seed, both) if both else None,
        "loss_seeds": len(both),
        "frozen_psnr": statistics.fmean(frozen) if len(frozen) == len(results) else None,
        "train_seconds": statistics.fmean(r["train_seconds"] for r in results),
        "file_bytes": results[0]["file_bytes"], "bitops": results[0]["bitops"],
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


def _against(group: Group, groups: Mapping[Group, Results]) -> Group | None:
    """What a row is compared with: an ablation with "ours", any other with the best baseline at its bits.

    Which is best is judged by the seeds that it has in common with the row.
    """
    method, bits = group
    if method in methods.ABLATIONS:
        parent = ("official" if method.startswith("official") else "ours", bits)
        return parent if parent in groups and groups[parent].keys() & groups[group].keys() else None
    if bits is None:
        return None
    best, most = None, -math.inf
    for other, results in groups.items():
        both = groups[group].keys() & results.keys()
        rival = other[1] == bits and other[0] in methods.METHODS and other[0] not in ("ours", method)
        # Relative to the row itself, for rivals may have different seeds in common with it.
        if rival and both and (lead := _mean_over(results, both) - _mean_over(groups[group], both)) > most:
            best, most = other, lead
    return best


def write(
    cells: Sequence[Cell], settings: Settings, out: Path, sets: Sequence[EvalSet] | None
) -> tuple[int, int]:
    """Print and write the tables: how many cells are not finished, and how many failed.

    ``sets=None``: of the sets that all cells with scores have.
    """
    found = collect(cells, settings, out / "cells", sets)
    groups, counts = found.groups, (len(found.unfinished), len(found.failed))
    for note in found.notes:
        print(note, file=sys.stderr)
    if not groups:
        return counts
    rows = {g: _row(g, r, groups.get(("float", None), {})) for g, r in groups.items()}
    order = [*methods.METHODS, *methods.ABLATIONS]
    for group, row in rows.items():
        other = _against(group, groups)
        if other is not None:
            mean, error, seeds = paired(groups[group], groups[other])
            row["against"] = {"method": other[0], "mean": mean, "standard_error": error, "seeds": seeds}
    ordered = sorted(rows, key=lambda g: (-(g[1] or 99), order.index(g[0])))
    devices = sorted({r["device"] for g in groups.values() for r in g.values()})
    lines = [
        f"{settings.steps} steps of {settings.batch} patches of {settings.patch}x{settings.patch}, from "
        f"{settings.init.name}; devices: {', '.join(devices)}.",
        "",
        'Mean PSNR: ± is the standard deviation over seeds. "below float" and "against": of common seeds. '
        '"against": mean over pictures of the difference to that method, paired by seed and picture; the '
        "standard error is over pictures only and says nothing about seeds.",
        "",
    ]
    for title, names in (("Methods", methods.METHODS), ("Changes to a method", methods.ABLATIONS)):
        shown = [g for g in ordered if g[0] in names]
        if shown:
            header, body = _table([rows[g] for g in shown])
            narrow = header.index("seeds")  # what a terminal has room for; all of it is in the file
            common.print_table(title, header[:narrow], [line[:narrow] for line in body])
            lines += [f"## {title}", "", *_markdown(header, body), ""]
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
    picture([g for g in ordered if g[0] in methods.METHODS], groups, out)
    return counts


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    sets = list(rows[0]["sets"])
    header = [
        "bits", "method", *sets, "mean PSNR", "below float", "frozen", "against", "seeds", *(f"{s} SSIM" for s in sets),
        "train s", "bytes", "GBitOPs", "worst verify error",
    ]  # fmt: skip
    body = []
    for r in rows:
        seeds = r["psnr_seeds"]
        spread = f" ± {statistics.stdev(seeds):.3f}" if len(seeds) > 1 else ""
        body.append([
            "32" if r["bits"] is None else str(r["bits"]), r["label"],
            *(f"{r['sets'][s]['psnr']:.2f}" for s in sets),
            f"{r['psnr']:.3f}{spread}", _loss(r),
            "" if r["frozen_psnr"] is None else f"{r['frozen_psnr']:.3f}",
            _difference(r.get("against")),
            str(r["seeds"]), *(f"{r['sets'][s]['ssim']:.4f}" for s in sets), f"{r['train_seconds']:.0f}",
            f"{r['file_bytes']:,}", f"{r['bitops'] / 1e9:.1f}", f"{r['verify_max_rel']:.0e}",
        ])  # fmt: skip
    return header, body


def _loss(row: Mapping[str, Any]) -> str:
    """How far below the float model, and of how many seeds where these are not all of the row's."""
    if row["loss"] is None or row["bits"] is None:
        return ""
    return f"{row['loss']:.3f}" + (f" ({row['loss_seeds']})" if row["loss_seeds"] < row["seeds"] else "")


def _difference(against: Mapping[str, Any] | None) -> str:
    if not against:
        return ""
    error, seeds = against["standard_error"], against["seeds"]
    spread = "" if math.isnan(error) else f" ± {error:.3f}"
    return f"{against['method']} {against['mean']:+.3f}{spread}, {seeds} seed{'s' if seeds > 1 else ''}"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in body]


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def picture(groups: Sequence[Group], results: Mapping[Group, Results], out: Path) -> None:
    """Crops of the original, of the float model and of every method at the fewest bits, with PSNR, side by side.

    All are of one seed, which most of them have, and of the cells whose results are in the tables; without
    such crops there is no figure.
    """
    target = out / "compare.png"
    target.unlink(missing_ok=True)
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
            quality = psnr(to_tensor(restored), to_tensor(original))
            axis.imshow(restored)
            label = results[group][seed]["label"].partition(",")[0]
            axis.set_title(f"{label}\n{group[1] or 32} bits, {quality:.2f} dB", fontsize=7)
        for axis in line:
            axis.axis("off")
    figure.tight_layout(h_pad=2)
    figure.savefig(target, dpi=130)
    plt.close(figure)
