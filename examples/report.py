"""Tables and the figure of a comparison, from the cells that are finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import methods
from cells import Cell, Settings, detail, read_result

from ssmquant.restore import find_images, open_image

__all__ = ["mean_psnr", "paired", "write"]

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
Group = tuple[str, int | None]


def mean_psnr(images: Scores, key: str = "psnr") -> float:
    """The mean over sets of a set's mean."""
    return statistics.fmean(statistics.fmean(row[key] for row in rows) for rows in images.values())


def _by_picture(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """PSNR of every picture, averaged over seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for name, rows in result["images"].items():
            for row in rows:
                found.setdefault((name, row["name"]), []).append(row["psnr"])
    return {k: statistics.fmean(v) for k, v in found.items()}


def paired(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean over pictures of PSNR of ``a`` minus that of ``b``, and its standard error: what pictures have in common
    cancels. Every picture counts alike here."""
    ours, theirs = _by_picture(a), _by_picture(b)
    apart = [ours[k] - theirs[k] for k in ours if k in theirs]
    if not apart:
        return math.nan, math.nan
    spread = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return statistics.fmean(apart), spread


def _row(group: Group, results: Sequence[Mapping[str, Any]], base: float | None) -> dict[str, Any]:
    """The figures of a method at a bit width, averaged over its seeds."""
    method, bits = group
    means = [mean_psnr(r["images"]) for r in results]
    sets = {
        name: {
            k: statistics.fmean(statistics.fmean(row[k] for row in r["images"][name]) for r in results)
            for k in ("psnr", "ssim")
        }
        for name in results[0]["images"]
    }
    frozen = [mean_psnr(r["frozen"]) for r in results if "frozen" in r]
    return {
        "method": method, "label": results[0]["label"], "bits": bits, "seeds": len(results), "sets": sets,
        "psnr": statistics.fmean(means), "psnr_seeds": means,
        "loss": None if base is None else base - statistics.fmean(means),
        "frozen_psnr": statistics.fmean(frozen) if len(frozen) == len(results) else None,
        "train_seconds": statistics.fmean(r["train_seconds"] for r in results),
        "file_bytes": results[0]["file_bytes"], "bitops": results[0]["bitops"],
        "verify_max_rel": max((r.get("verify_max_rel", 0.0) for r in results), default=0.0),
    }  # fmt: skip


def collect(cells: Sequence[Cell], settings: Settings, out: Path) -> tuple[dict[Group, list[Any]], int]:
    """Results by method and bits, and how many cells are not finished."""
    groups: dict[Group, list[Any]] = {}
    left = 0
    for cell in cells:
        result = read_result(cell, settings, out)
        if result is None:
            left += 1
        else:
            groups.setdefault((cell.method, cell.bits), []).append(result)
    return groups, left


def _against(group: Group, groups: Mapping[Group, list[Any]], rows: Mapping[Group, Any]) -> Group | None:
    """What a row is compared with: an ablation with "ours", any other with the best baseline at its bits."""
    method, bits = group
    if method in methods.ABLATIONS:
        parent = ("official" if method.startswith("official") else "ours", bits)
        return parent if parent in groups else None
    rivals = [g for g in groups if g[1] == bits and g[0] in methods.METHODS and g[0] not in ("ours", method)]
    return max(rivals, key=lambda g: rows[g]["psnr"]) if rivals and bits is not None else None


def write(cells: Sequence[Cell], settings: Settings, out: Path, folders: Sequence[str]) -> int:
    """Print and write the tables; how many cells are not finished."""
    groups, left = collect(cells, settings, out / "cells")
    if not groups:
        return left
    floats = groups.get(("float", None))
    base = statistics.fmean(mean_psnr(r["images"]) for r in floats) if floats else None
    rows = {g: _row(g, r, base) for g, r in groups.items()}
    order = [*methods.METHODS, *methods.ABLATIONS]
    for group, row in rows.items():
        other = _against(group, groups, rows)
        if other is not None:
            mean, error = paired(groups[group], groups[other])
            row["against"] = {"method": other[0], "mean": mean, "standard_error": error}
    ordered = sorted(rows, key=lambda g: (-(g[1] or 99), order.index(g[0])))
    lines = [
        f"{settings.steps} steps of {settings.batch} patches of {settings.patch}x{settings.patch}, from "
        f"{settings.init.name}; devices: {', '.join(sorted({r['device'] for g in groups.values() for r in g}))}.",
        "",
    ]
    for title, names in (("Methods", methods.METHODS), ("Changes to a method", methods.ABLATIONS)):
        shown = [g for g in ordered if g[0] in names]
        if shown:
            header, body = _table([rows[g] for g in shown])
            narrow = header.index("seeds")  # what a terminal has room for; all of it is in the file
            common.print_table(title, header[:narrow], [line[:narrow] for line in body])
            lines += [f"## {title}", "", *_markdown(header, body), ""]
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    everything = {"settings": settings.describe(), "rows": [rows[g] for g in ordered], "unfinished": left}
    common.write_json(common.plain(everything), out / "compare.json")
    picture([g for g in ordered if g[0] in methods.METHODS], rows, settings, out, folders)
    return left


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
            f"{r['psnr']:.3f}{spread}", "" if r["loss"] is None or r["bits"] is None else f"{r['loss']:.3f}",
            "" if r["frozen_psnr"] is None else f"{r['frozen_psnr']:.3f}",
            _difference(r.get("against")),
            str(r["seeds"]), *(f"{r['sets'][s]['ssim']:.4f}" for s in sets), f"{r['train_seconds']:.0f}",
            f"{r['file_bytes']:,}", f"{r['bitops'] / 1e9:.1f}", f"{r['verify_max_rel']:.0e}",
        ])  # fmt: skip
    return header, body


def _difference(against: Mapping[str, Any] | None) -> str:
    if not against:
        return ""
    error = against["standard_error"]
    return f"{against['method']} {against['mean']:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in body]


def picture(
    groups: Sequence[Group],
    rows: Mapping[Group, Mapping[str, Any]],
    settings: Settings,
    out: Path,
    folders: Sequence[str],
) -> None:
    """Crops of the original, of the float model and of every method at the fewest bits, side by side."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    least = min((bits for _, bits in groups if bits is not None), default=None)
    columns = [g for g in groups if g[1] in (None, least)]
    boxes = []
    for folder in folders:
        for path in find_images(folder):
            name = f"{Path(folder).name}_{path.stem}.png"
            if all(_crop(out, g, name).exists() for g in columns):
                image = settings.task.target(open_image(path))
                boxes.append((name, image.crop(detail(image))))
    if not boxes:
        return
    wide = 1 + len(columns)
    figure, axes = plt.subplots(len(boxes), wide, figsize=(1.7 * wide, 1.9 * len(boxes)), squeeze=False)
    for line, (name, original) in zip(axes, boxes, strict=True):
        line[0].imshow(original)
        line[0].set_title(f"{name[:-4]}\noriginal", fontsize=7)
        for axis, group in zip(line[1:], columns, strict=True):
            axis.imshow(open_image(_crop(out, group, name)))
            axis.set_title(f"{rows[group]['label']}\n{group[1] or 32} bits", fontsize=7)
        for axis in line:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(out / "compare.png", dpi=130)
    plt.close(figure)


def _crop(out: Path, group: Group, name: str) -> Path:
    return out / "cells" / Cell(group[0], group[1], 0).name / "crops" / name
