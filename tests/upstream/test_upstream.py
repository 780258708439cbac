"""Every family, every size: one process each, and what its result must say. See this folder's ``__init__``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.upstream.families import FAMILIES, Family
from tests.upstream.run import missing

ROOT = Path(__file__).resolve().parents[2]
CASES = [pytest.param(f, size, id=f"{f.name}-{size}") for f in FAMILIES for size in f.sizes]


def result_of(family: Family, size: str, folder: Path) -> dict[str, Any]:
    file = folder / f"{family.name}.{size}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.upstream.run",
        family.name,
        size,
        "--out",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def problems(family: Family, result: dict[str, Any]) -> list[str]:
    """What a result lacks. Empty: all is well."""
    if family.refused is not None:
        refused = result["refused"]
        good = refused["stage"] is not None and family.refused in refused["error"]
        return [] if good else [f"expected an error with {family.refused!r}, got {refused}"]
    checks = {k: v for k, v in result.items() if isinstance(v, dict)}
    bad = [f"{name}: {value['error']}" for name, value in checks.items() if "error" in value]

    def want(name: str, key: str, good: Any, text: str) -> None:
        value = checks.get(name, {}).get(key)
        if name in checks and "error" not in checks[name] and not good(value):
            bad.append(f"{name}.{key}: {text}, is {value}")

    want("build", "finite", bool, "outputs are finite")
    want("trace", "original_unchanged", bool, "prepare leaves the user's model alone")
    want("trace", "same_keys", bool, "the copy has the model's own state_dict keys")
    want("trace", "checkpoint", lambda v: v == "loads", "a float checkpoint loads strictly")
    for key in checks.get("exact", {}):
        if "x" in key:
            want("exact", key, lambda v: v <= 1e-6, "traced equals original within 1e-6")
    want("exact_training", "outputs", lambda v: v <= 1e-6, "so it does in training mode")
    want("exact_training", "gradients", lambda v: v <= 1e-4, "and its gradients")
    want("exact_training", "gradients_missing", lambda v: v == 0, "no gradient more or less")
    want("coverage", "uncovered", lambda v: not v, "every weight that reaches a product is a site")
    want("coverage", "mixer_missed", lambda v: not v, "all weights of the mixers are quantized")
    want("coverage", "unaccounted", lambda v: not v, "every other matrix is listed with a reason")
    want("coverage", "float_sites", lambda v: _named(family, v), "only named exceptions stay in float")
    if "w8a8" in checks and "error" not in checks["w8a8"]:
        w8a8 = checks["w8a8"]
        best, floor = max(w8a8[k] for k in ("default", "minmax", "lsq")), min(20.0, w8a8["noisy"] - 6)
        if best < floor:
            bad.append(f"w8a8: the best preset reaches {best} dB, not {floor}")
    want("mambaquant", "function", lambda v: v <= 1e-3, "transforms keep the function")
    want("mambaquant", "silent", lambda v: not v, "every transform applies, or says why not")
    want("mambaquant", "worst", lambda v: v <= 1e-5, "deployed sites equal prepared ones")
    for key, text in (("none", "every quantizer has a gradient"), ("not_finite", "gradients are finite")):
        want("w4a4", key, lambda v: not v, text)
    want("w4a4", "finite_after", bool, "parameters are finite after a step")
    want("deploy", "worst", lambda v: v <= 1e-5, "deployed sites equal prepared ones")
    want("deploy", "reloaded_equal", bool, "a loaded model computes the same bits")
    if result["size"] in family.zoo:
        want("zoo", "checkpoint", lambda v: v == "loads", "the zoo's model takes its weights")
        want("zoo", "worst", lambda v: v <= 1e-5, "and computes the same")
    return bad


def _named(family: Family, sites: dict[str, str]) -> bool:
    return all(any(pattern in reason for pattern in family.exceptions) for reason in sites.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("family", "size"), CASES)
def test_family(family: Family, size: str, tmp_path: Path) -> None:
    reason = missing(family)
    if reason is not None:
        pytest.skip(reason)
    kept = os.environ.get("SSMQUANT_UPSTREAM_RESULTS")
    result = result_of(family, size, Path(kept).resolve() if kept else tmp_path)
    assert not problems(family, result)
