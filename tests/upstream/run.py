"""Runs all checks on one family, in this process: ``python -m tests.upstream.run FAMILY SIZE --out result.json``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.upstream import checks
from tests.upstream.families import FAMILIES, Family
from tests.upstream.loaders import VARIABLE, checkout
from tests.upstream.state import State, attempt

__all__ = ["main", "missing", "run"]


def missing(family: Family) -> str | None:
    """Why a family cannot run here, or None."""
    if VARIABLE not in os.environ:
        return f"{VARIABLE} is not set: a folder of checkouts, see tests/upstream/__init__.py"
    for folder in family.folders:
        if not checkout(folder).is_dir():
            return f"no checkout {folder} (github.com/{family.repo}) in {os.environ[VARIABLE]}"
    for name in family.needs:
        if importlib.util.find_spec(name) is None:
            return f"needs the package {name}"
    return None


def revision(family: Family) -> str:
    """The commit that is checked out, the version that is installed, else the commit that the loader was made for."""
    if not family.folders:
        return f"{importlib.metadata.version(family.needs[0])} (pip)"
    for folder in family.folders[:1]:
        if (checkout(folder) / ".git").exists():
            command = ["git", "-C", str(checkout(folder)), "rev-parse", "--short=7", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return family.commit


def run(family: Family, size: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """All results, or those of some checks, as plain data; one that raises leaves its error and stops no other."""
    result: dict[str, Any] = {
        "family": family.name, "size": size, "repo": family.repo, "commit": revision(family),
        "torch": torch.__version__, "python": platform.python_version(), "notes": family.notes,
    }  # fmt: skip
    started = time.perf_counter()
    state = State(family, size)
    if family.refused is not None:
        result["refused"] = checks.refusal(state)
    else:
        for name, check in checks.CHECKS.items():
            if name not in (only or (checks.CHEAP if size == "default" else checks.CHECKS)):
                continue
            begun = time.perf_counter()
            value, error = attempt(lambda check=check: check(state))
            result[name] = value if error is None else {"error": error}
            result[name]["took"] = round(time.perf_counter() - begun, 2)
            if name == "build" and error is not None:
                break
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream.run")
    parser.add_argument("family", choices=[f.name for f in FAMILIES])
    parser.add_argument("size", nargs="?", default="small")
    parser.add_argument(
        "--check", action="append", default=[], choices=list(checks.CHECKS), help="only these"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    family = next(f for f in FAMILIES if f.name == options.family)
    reason = missing(family)
    if reason is not None:
        parser.exit(2, f"{family.name}: {reason}\n")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = json.dumps(run(family, options.size, ["build", *options.check] if options.check else ()), indent=1)
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
