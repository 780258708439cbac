"""The float selective scan on this machine: first is it right, then how fast.

    python benchmarks/scan_check.py                         # all cases, on the GPU if there is one
    python benchmarks/scan_check.py --quick                 # small shapes, seconds on a CPU
    python benchmarks/scan_check.py --case scan/16x288x10x2304/fp32 --out scan.json

The gate compares results and all gradients with the definition in float64. A case that fails it is not timed, and the
script's exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops import selective_scan
from ssmquant.ops.selective_scan import op, selective_scan_reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES = [
    "scan/16x288x10x2304/fp32",
    "scan/32x160x8x1024/fp32",
    "scan/16x288x10x2304/fp16",
    "scan/64x384x1x3136/fp32",
]
QUICK = ["scan/2x72x10x197/fp32", "scan/3x60x1x49/fp32", "scan/1x160x8x1024/bf16"]
GROUPS = 4
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # relative Frobenius error


def operands(case: str, device: torch.device) -> dict[str, Tensor]:
    """Operands of "scan/BxDxNxL/dtype" in the ranges of a trained model, of which u, delta, B and C have the dtype."""
    _, sizes, name = case.split("/")
    batch, channels, states, length = map(int, sizes.split("x"))
    dtype = DTYPES[name]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    made = {
        "u": normal(batch, channels, length).to(dtype),
        "delta": (0.5 * normal(batch, channels, length)).to(dtype),
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "B": normal(batch, GROUPS, states, length).to(dtype),
        "C": normal(batch, GROUPS, states, length).to(dtype),
        "D": torch.ones(channels, device=device),
        "delta_bias": -3.0 + normal(channels),
    }
    return {k: v.requires_grad_() for k, v in made.items()}


def both(function: Callable[..., Any], args: dict[str, Tensor], g: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = function(**args, delta_softplus=True)
    return [out.detach(), *torch.autograd.grad(out, list(args.values()), g.to(out.dtype))]


def gate(args: dict[str, Tensor], g: Tensor) -> float:
    """The worst relative error of the results, sample by sample so that the definition fits in memory."""
    got = both(selective_scan, args, g)
    worst = 0.0
    totals: dict[str, Tensor] = {}
    for i in range(len(g)):
        one = {
            k: (v[i : i + 1] if v.dim() > 2 else v).detach().double().requires_grad_()
            for k, v in args.items()
        }
        want = both(selective_scan_reference, one, g[i : i + 1])
        for name, have, must in zip(("out", *args), got, want, strict=True):
            if must.dim() > 2:
                worst = max(worst, float((have[i : i + 1].double() - must).norm() / must.norm()))
            else:
                totals[name] = totals.get(name, 0) + must
    for name, have in zip(("out", *args), got, strict=True):
        if name in totals:
            worst = max(worst, float((have.double() - totals[name]).norm() / totals[name].norm()))
    return worst


def milliseconds(run: Callable[[], object], runs: int, device: torch.device) -> list[float]:
    """Times of single calls after a warm-up, by events on a GPU."""
    for _ in range(3):
        run()
    times = []
    for _ in range(runs):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def rows_of(case: str, device: torch.device, runs: int) -> list[dict[str, Any]]:
    """Gate and times of one case."""
    args = operands(case, device)
    g = torch.randn(args["u"].shape, generator=torch.Generator(device).manual_seed(1), device=device)
    g = g.to(args["u"].dtype)
    error = gate(args, g)
    passed = error < TOLERANCE[args["u"].dtype]
    head = {"case": case, "gate": {"relative_error": error, "passed": passed}}
    head["backend"] = op.backend(device, torch.float32, args["A"].shape[1])
    if not passed:
        return [{**head, "mode": "gate"}]

    def infer() -> None:
        with torch.no_grad():
            selective_scan(**args, delta_softplus=True)

    modes = {"ours_float_fwd": infer, "ours_float_fwd_bwd": lambda: both(selective_scan, args, g)}
    rows = []
    for mode, run in modes.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = milliseconds(run, runs, device)
        peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
        result = {"median_ms": statistics.median(times), "min_ms": min(times), "runs": runs, "peak_mib": peak}
        rows.append({**head, "mode": mode, **result})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="scan/BxDxNxL/dtype, repeatable")
    parser.add_argument("--quick", action="store_true", help="small shapes, few runs")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for case in options.case or (QUICK if options.quick else CASES):
        for row in rows_of(case, device, 5 if options.quick else 30):
            rows.append(row)
            time_ms = f"{row['median_ms']:9.3f} ms" if "median_ms" in row else "GATE FAILED"
            error = row["gate"]["relative_error"]
            print(f"{case:28} {row['mode']:20} {row['backend']:8} {time_ms}   error {error:.1e}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    triton = importlib.util.find_spec("triton") is not None
    if triton:
        import triton as module
    report = {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": module.__version__ if triton else None,
        "commit": commit,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["gate"]["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
