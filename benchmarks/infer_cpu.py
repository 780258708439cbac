"""Deployed models on a CPU beside the best float that a user could have on it: are they right, how fast, how large.

    python benchmarks/infer_cpu.py            # all cases and modes; the compiled ones take minutes
    python benchmarks/infer_cpu.py --quick    # a small model, seconds
    python benchmarks/infer_cpu.py --case mambair_light_x2/64x64/b1 --mode float_eager --mode deployed_w4a4 --out a.json

A case is MODEL/HxW/bBATCH (vmamba_tiny/224/b1): a model of the zoo and the size of its input; MambaIR-light x2 has its
shipped weights, others are as initialised. Modes:

    float_eager              our C++ scan, eager
    float_channels_last      the same with weights and input channels last
    float_compile            torch.compile of it
    float_bf16               eager under bf16 autocast
    float_upstream           the scan in plain PyTorch, in chunks, as code without a kernel has it
    deployed_w8a8            QConfig.recommended, converted: w4a4, w2a2 as well; with _frozen static ranges of DLS,
                             with _unfused the same without fused kernels

Each mode runs in a process of its own, which loads the model from a file as one who uses it does; what a deployed one
takes to make happens in another. Peak memory is what a call takes at most, but for the first one, over what the process
had before it had a model: the model is included, the parts of PyTorch that loading a deployed one imports (some
200 MiB) are not. Linux only.
Gate: float modes against float_eager (relative error of the output; bf16 to 0.1, others to 1e-3); deployed ones against
the same model without fused kernels, to 0.5: one code on a tie that goes the other way spreads through the model, most
of all one of random weights at 2 bits (tests hold every call of a kernel to its own input).
What fails has no time, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import heading, write
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.errors import ConfigError
from ssmquant.ops import use_backend

ROOT = Path(__file__).resolve().parents[1]
CASES = ["mambair_light_x2/64x64/b1", "mambair_light_x2/180x320/b1", "vmamba_tiny/224/b1", "vim_tiny/224/b1"]
QUICK = ["mambair_tiny_x2/12x10/b1"]
FLOATS = ["float_eager", "float_channels_last", "float_compile", "float_bf16", "float_upstream"]
DEPLOYED = ["deployed_w8a8", "deployed_w4a4", "deployed_w2a2"]
QUICK_MODES = ["float_eager", "float_channels_last", "float_bf16", "deployed_w4a4", "deployed_w4a4_unfused"]
WEIGHTS = {"mambair_light_x2": ROOT / "examples" / "weights" / "mambair_light_x2_float.safetensors"}
TOLERANCE = {"float_bf16": 0.1, "deployed": 0.5}


def build(case: str) -> tuple[nn.Module, Tensor]:
    """The float model of a case and an input."""
    found = re.fullmatch(r"([a-z]\w*)/(\d+)(?:x(\d+))?/b(\d+)", case)
    if found is None:
        raise ConfigError(f"a case is MODEL/HxW/bBATCH, such as mambair_light_x2/64x64/b1, not {case!r}")
    kind = found[1]
    torch.manual_seed(0)
    name, _, scale = kind.partition("_x")
    if kind in WEIGHTS:
        model = ssmquant.io.load_float(WEIGHTS[kind])
    else:
        model = zoo.build(name, **({"upscale": int(scale)} if scale else {}))
    return model.eval(), example(case)


def example(case: str) -> Tensor:
    """An input of the size that a case names."""
    height, _, width = case.split("/")[1].partition("x")
    generator = torch.Generator().manual_seed(0)
    return torch.rand(
        int(case.rpartition("/b")[2]), 3, int(height), int(width or height), generator=generator
    )


def deploy(model: nn.Module, mode: str, x: Tensor) -> Any:
    """A deployed model, calibrated on ``x``."""
    found = re.match(r"deployed_w(\d)a(\d)", mode)
    if found is None:
        raise ConfigError(f"there is no mode {mode!r}")
    prepared = calibrated(model, int(found[1]), int(found[2]), x)
    frozen = "frozen" if "frozen" in mode else "dynamic"
    return ssmquant.convert(prepared, dls=frozen, float_dtype=torch.float16)


def calibrated(model: nn.Module, w_bits: int, a_bits: int, x: Tensor) -> nn.Module:
    """Models of the zoo are traced with the small example that their adapters have."""
    example = (x,) if isinstance(model, nn.Conv2d) else None
    prepared = ssmquant.prepare(model, QConfig.recommended(w_bits, a_bits), example_inputs=example)
    return ssmquant.calibrate(prepared, [x[..., :64, :64] if x.shape[-1] > 224 else x], progress=False)


def form(mode: str, model: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What is timed, and what it has to agree with. ``model``: as the mode wants it, float or deployed."""
    if not mode.startswith("float"):
        deployed = model

        def unfused() -> Tensor:
            with use_backend("chunked", op="fuse"):
                return deployed(x)  # type: ignore[no-any-return]

        return unfused if mode.endswith("unfused") else lambda: deployed(x), unfused
    plain = lambda: model(x)  # noqa: E731
    if mode == "float_compile":
        compiled = torch.compile(model)
        return lambda: compiled(x), plain
    if mode == "float_bf16":

        def bf16() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()  # type: ignore[no-any-return]

        return bf16, plain
    if mode == "float_upstream":

        def chunked() -> Tensor:
            with use_backend("chunked"):
                return model(x)  # type: ignore[no-any-return]

        return chunked, plain
    if mode == "float_channels_last":
        other, y = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )  # type: ignore[call-overload]
        return lambda: other(y), plain
    if mode != "float_eager":
        raise ConfigError(f"there is no mode {mode!r}")
    return plain, plain


def memory(field: str) -> float:
    """ "VmRSS" (now) or "VmHWM" (at most) of this process, MiB; NaN where there is no /proc."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else float("nan")


def forget_peak() -> None:
    """What making a model took does not count."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def run(case: str, mode: str, file: Path, seconds: float) -> dict[str, Any]:
    """One row. ``file``: of the mode's model."""
    small = torch.rand(1, 3, 8, 8)
    deploy(nn.Conv2d(3, 3, 3), "deployed_w8a8", small)(small)  # loads what is loaded when it is needed
    forget_peak()
    before = memory("VmRSS")
    load = ssmquant.io.load_float if mode.startswith("float") else ssmquant.load
    model, x = load(file).eval(), example(case)
    timed, right = form(mode, model, x)
    del model
    begun = time.perf_counter()
    got = timed()  # compiles what is compiled, and finds out what fits
    first = time.perf_counter() - begun
    forget_peak()
    timed()
    peak = memory("VmHWM") - before
    want = right()
    error = float((got - want).norm() / want.norm())
    limit = next((v for k, v in TOLERANCE.items() if mode.startswith(k)), 1e-3)
    row: dict[str, Any] = {"case": case, "mode": mode, "gate": {"error": error, "passed": error < limit}}
    row |= {"peak_mib": round(peak, 1), "first_call_s": round(first, 2)}
    if not row["gate"]["passed"]:
        return row
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        begun = time.perf_counter()
        timed()
        times.append(1e3 * (time.perf_counter() - begun))
    return row | {"median_ms": statistics.median(times), "min_ms": min(times), "runs": len(times)}


def make_file(case: str, mode: str, path: Path) -> None:
    """The mode's model: float32, or packed with a float16 remainder."""
    model, x = build(case)
    if mode.startswith("float"):
        ssmquant.io.save_float(model, path)
    else:
        ssmquant.save(deploy(model, mode, x), path)


def child(case: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """``run`` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        make_file(case, mode, path)
        command = [sys.executable, __file__, "--child", str(path), "--case", case, "--mode", mode]
        command += ["--seconds", str(args.seconds), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip()[-500:]
            return {"case": case, "mode": mode, "gate": {"passed": False, "reason": reason}}
        row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return row | ({"bytes": path.stat().st_size} if row["gate"]["passed"] else {})


def show(row: dict[str, Any], best: float | None) -> None:
    if "median_ms" not in row:
        print(f"{row['case']:28} {row['mode']:22} gate: {row['gate']}", flush=True)
        return
    faster = f"{best / row['median_ms']:6.2f}x" if best else "       "
    print(
        f"{row['case']:28} {row['mode']:22} {row['median_ms']:9.1f} ms {faster} {row['peak_mib']:8.0f} MiB "
        f"{row.get('bytes', 0):>10,} B  error {row['gate']['error']:.1e}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", metavar="NAME")
    parser.add_argument("--mode", action="append", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a small model and few modes")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each mode, once it has been checked")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        if args.child:
            print(json.dumps(run(args.case[0], args.mode[0], args.child, args.seconds)))
            return 0
        for case in args.case or []:
            build(case)
    except ConfigError as error:
        print(f"infer_cpu: {error}", file=sys.stderr)
        return 2
    report = heading(torch.device("cpu")) | {"rows": []}
    failed = False
    for case in args.case or (QUICK if args.quick else CASES):
        best: float | None = None
        for mode in args.mode or (QUICK_MODES if args.quick else FLOATS + DEPLOYED):
            row = child(case, mode, args)
            failed |= not row["gate"]["passed"]
            report["rows"].append(row)
            # The best float32 mode so far stands for float.
            if "median_ms" in row and mode.startswith("float") and mode != "float_bf16":
                best = min(best or row["median_ms"], row["median_ms"])
            show(row, best)
            if args.out:
                write(args.out, report)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
