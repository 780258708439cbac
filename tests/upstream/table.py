"""Writes tables of documents from result files.

    python -m tests.upstream.table FOLDER [docs/families.md]
    python -m tests.upstream.table FOLDER [docs/ptq.md] --mambaquant

In the document the table stands between two comments; what is around them is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.upstream.families import FAMILIES

__all__ = ["main", "table"]

BEGIN, END = "<!-- table: python -m tests.upstream.table{} -->", "<!-- end of table -->"
HEAD = (
    "family", "code", "size", "parameters", "nodes", "sites (linear/conv/matmul/scan)", "coverage %", "other sizes",
    "W8A8 dB (preset; noise)", "W4A4 gradients", "converted, bytes of float", "adapter lines", "trace s, MiB",
)  # fmt: skip


def _get(result: dict[str, Any], check: str, key: str) -> Any:
    return (result.get(check) or {}).get(key)


def _exact(result: dict[str, Any]) -> str:
    values = [v for k, v in (result.get("exact") or {}).items() if "x" in k]
    if not values:
        return "error" if "exact" in result else ""
    return "exact" if max(values) == 0 else f"{max(values):.0e}"


def _best(result: dict[str, Any]) -> str:
    found = {k: v for k, v in (result.get("w8a8") or {}).items() if k in ("default", "minmax", "lsq")}
    if not found:
        return "error" if "error" in (result.get("w8a8") or {}) else ""
    best = max(found, key=lambda k: found[k])
    return f"{found[best]:.1f} ({best}; {result['w8a8']['noisy']:.1f})"


def _gradients(result: dict[str, Any]) -> str:
    check = result.get("w4a4")
    if check is None:
        return ""
    if "error" in check:
        return "error"
    bad = len(check["none"]) + len(check["not_finite"])
    return f"all {check['scalars']}" if not bad else f"{bad} of {check['scalars']} bad"


def _deployed(result: dict[str, Any]) -> str:
    check = result.get("deploy")
    if check is None:
        return ""
    if "error" in check:
        return "error"
    good = check["worst"] <= 1e-5 and check["reloaded_equal"]
    return (
        f"{'exact' if check['worst'] == 0 else format(check['worst'], '.0e')}{'' if good else ' (bad)'}, "
        + (f"{100 * check['bytes'] / check['float_bytes']:.0f} %")
    )


def _adapter(result: dict[str, Any]) -> str:
    check = result.get("adapter") or {}
    needed = "0" if "error" not in (result.get("coverage") or {"error": ""}) else "?"
    return f"{needed} (placement: {check['lines']})" if check.get("name") else needed


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    code = f"{result['repo']} {result['commit']}"
    if "refused" in result:
        first = result["refused"]["error"].splitlines()[0] if result["refused"]["error"] else "none"
        empty = [""] * (len(HEAD) - 4)
        return [
            result["family"],
            code,
            result["size"],
            f"refused at {result['refused']['stage']}: {first}",
            *empty,
        ]
    sites = _get(result, "coverage", "sites") or {}
    kinds = "/".join(str(sites.get(k, 0)) for k in ("linear", "conv", "matmul", "scan")) if sites else "error"
    percent = _get(result, "coverage", "percent")
    return [
        result["family"], code, result["size"], f"{_get(result, 'build', 'parameters') or 0:,}",
        str(_get(result, "trace", "nodes") or "error"), kinds, "error" if percent is None else f"{percent:g}",
        _exact(result), _best(result), _gradients(result), _deployed(result),
        _adapter(result), f"{_get(result, 'trace', 'seconds')}, {_get(result, 'trace', 'peak_mib')}",
    ]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table, families in the order of ``FAMILIES``."""
    order = {f.name: i for i, f in enumerate(FAMILIES)}
    results = sorted(results, key=lambda r: (order.get(r["family"], 999), r["size"] == "default"))
    rows = [row(r) for r in results]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in rows]
    versions = sorted({f"Python {r['python']}, torch {r['torch']}" for r in results})
    legend = (
        "*Coverage*: share of the parameters in matrix products, convolutions and scans that is quantized, where "
        "nothing has to stay in float. *Other sizes*: largest relative difference between traced and original forward "
        "at other batch sizes and resolutions. *W8A8*: SQNR of the output after calibration; *noise*: that of the "
        "float model with noise on its weights, 40 dB below them. *Adapter*: lines needed, and those of one that "
        "only says what was published in float. *MiB*: peak memory of prepare, the copy of the weights included."
    )
    return "\n".join([*lines, "", legend, "", f"Measured on a CPU, one thread: {'; '.join(versions)}."])


PRESET_HEAD = ("family", "code", "applied", "not applied", "float function", "deployed")


def _preset_row(result: dict[str, Any]) -> list[str]:
    check = result["mambaquant"]
    if "error" in check:
        return [result["family"], f"{result['repo']} {result['commit']}", "error", "", "", ""]
    kinds = dict.fromkeys(reason.split(":")[0] for reason in check["skipped"])
    return [
        result["family"],
        f"{result['repo']} {result['commit']}",
        ", ".join(f"{n} {kind}" for kind, n in check["applied"].items()),
        ", ".join(kind for kind in kinds if kind not in check["applied"]),
        f"{check['function']:.0e}",
        "exact" if check["worst"] == 0 else f"{check['worst']:.0e}",
    ]


def preset_table(results: list[dict[str, Any]]) -> str:
    """What the check ``mambaquant`` found: the Markdown table."""
    order = {f.name: i for i, f in enumerate(FAMILIES)}
    results = sorted((r for r in results if "mambaquant" in r), key=lambda r: order.get(r["family"], 999))
    rows = [PRESET_HEAD, ["---"] * len(PRESET_HEAD), *(_preset_row(r) for r in results)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream.table")
    parser.add_argument("folder", type=Path, help="of result files")
    parser.add_argument("document", type=Path, nargs="?", help="where to put the table; default: print it")
    parser.add_argument("--mambaquant", action="store_true", help="the table of MambaQuant's preset")
    options = parser.parse_args(arguments)
    results = [json.loads(f.read_text()) for f in sorted(options.folder.glob("*.json"))]
    text = preset_table(results) if options.mambaquant else table(results)
    if options.document is None:
        print(text)
        return 0
    begin = BEGIN.format(" --mambaquant" * options.mambaquant)
    old = (
        options.document.read_text() if options.document.exists() else f"# Model families\n\n{begin}\n{END}\n"
    )
    if begin not in old or END not in old:
        parser.error(f"{options.document} has no lines {begin} and {END}")
    before, rest = old.split(begin)
    after = rest.split(END, 1)[1]
    options.document.parent.mkdir(parents=True, exist_ok=True)
    options.document.write_text(f"{before}{begin}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
