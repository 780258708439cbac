"""Deployed models on a CUDA GPU beside every float that a user could have on it: are they right, how fast, how large.

    python benchmarks/infer_cuda.py --out infer.json       # all cases and modes; again: what is missing
    python benchmarks/infer_cuda.py --quick                # a small model and few modes
    python benchmarks/infer_cuda.py --case 'mambair_light_x2/*' --mode 'deployed_w4a4*' --mode float_graph --breakdown
    python benchmarks/infer_cuda.py --make --models FOLDER # only makes the deployed models, on a CPU: takes long

A case is MODEL/HxW/bBATCH (vmamba_tiny/224/b1): a model of the zoo and the size of its input; MambaIR-light x2 has its
shipped weights, float and deployed, others are as initialised. Modes:

    float_eager                our CUDA scan, eager, float32
    float_graph                the same captured in a CUDA graph
    float_compile_graph        torch.compile of it, captured
    float_compile_amp16_graph  torch.compile of it under float16 autocast, captured; without _compile or with _eager too
    deployed_w8a8              as shipped, or QConfig.recommended, calibrated and converted: w4a4, w2a2 as well; with
                               _frozen static ranges of DLS
    deployed_w8a8_graph        the same after ssmquant.cuda_graph

--tf32 default leaves PyTorch's settings as they are for every mode, as one who has not touched them has them: float32
convolutions may use TF32, products of matrices may not. It counts for deployed models too, whose first and last layers
are float. --tf32 off allows it nowhere. Both are in the file, which has rows of one setting only. How cuDNN chooses its
algorithms (torch.backends.cudnn.benchmark: by its rules, without trying them) is PyTorch's default in any case.

A row's times are of single calls, by events, from a call of an idle GPU to the end of what it launched: Python's time
counts where the GPU waits for it. A graph's call has the copy of its input in it. Memory: "call_mib" is what a call
takes at most over what was there before the first, the model and its input; of a graph that is the call that captures
it, whose memory it keeps. "peak_mib" has the model too.

Gate, on an input that nothing was captured or tuned with: float_eager against the same with the scan in plain PyTorch,
other float modes against float_eager (relative error to 1e-3, float16 to 0.1, where TF32 is allowed 1e-2); deployed
ones against the same model without kernels of ours, finite, and pictures to 30 dB of PSNR (over the range of what they
are compared with), logits to a relative error of 0.2: one code on a tie that goes the other way spreads through the
model (tests hold every call of a kernel to its own input). A graph of a deployed model has to give the same bits as the
model does without it. What fails has no time, and the exit status is 1.

An --out file of the same commit, GPU, torch and setting of TF32 is added to; what failed in it is tried again, last.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gc
import json
import math
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import breakdown, heading, write
from infer_cpu import DEPLOYED, WEIGHTS, build, deploy, example
from torch import Tensor, nn

import ssmquant
from ssmquant.errors import ConfigError
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules.deployed import engine_of
from ssmquant.ops import use_backend

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from tables import print_table

DEVICE = torch.device("cuda", 0)
CASES = [
    "mambair_light_x2/64x64/b1", "mambair_light_x2/64x64/b16", "mambair_light_x2/180x320/b1",
    "mambair_light_x2/360x640/b1", "mambair_classic_x2/64x64/b4", "vmamba_tiny/224/b1", "vmamba_tiny/224/b64",
    "vim_tiny/224/b1", "vim_tiny/224/b64",
]  # fmt: skip
QUICK = ["mambair_tiny_x2/32x32/b1"]
FLOATS = ["float_eager", "float_graph", "float_compile_graph", "float_compile_amp16_graph"]
MODES = FLOATS + [mode + end for mode in DEPLOYED for end in ("", "_graph")]
QUICK_MODES = ["float_eager", "float_graph", "deployed_w4a4", "deployed_w4a4_graph"]
MODE = re.compile(r"float(_compile)?(_amp16)?_(eager|graph)|deployed_w[2-8]a[2-8](_frozen)?(_graph)?")
WARM_UP = 3
LEAST_PSNR, MOST_ERROR = 30.0, 0.2  # of deployed models: pictures, logits
HALF_ERROR, FLOAT_ERROR = 0.1, 1e-3  # of float models: in float16, in float32
# A compiled convolution may have another algorithm, of another precision: TF32 rounds operands by up to 2^-11, 5e-4.
TF32_ERROR = 1e-2


class Models:
    """The models of the cases. Each is made once, and deployed ones are loaded from files, as one who uses them does.

    Args:
        folder: Of deployed models, ``mambair_classic_x2_w4a4.safetensors``; those that are not there are made.
        device: Where they are calibrated.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.known: dict[tuple[str, str], nn.Module] = {}

    def of(self, case: str, mode: str) -> nn.Module:
        """A copy of the mode's model, on the CPU."""
        key = case.partition("/")[0], _what(mode)
        if key not in self.known:
            made = build(case)[0] if key[1] == "float" else ssmquant.load(self.file(case, mode))
            self.known[key] = made.eval()
        return copy.deepcopy(self.known[key])

    def file(self, case: str, mode: str) -> Path:
        """Of a deployed model: the shipped one, one of the folder, or one that is made there."""
        kind = case.partition("/")[0]
        name = f"{kind}_{_what(mode)}.safetensors"
        if kind in WEIGHTS and WEIGHTS[kind].with_name(name).exists():
            return WEIGHTS[kind].with_name(name)
        path = self.folder / name
        if not path.exists():
            model, x = build(case)
            with torch.enable_grad():
                deployed = deploy(model.to(self.device), mode, x[:1].to(self.device))
            ssmquant.save(deployed.cpu(), path)
        return path


def _what(mode: str) -> str:
    """What a mode is of: "float", "w4a4", "w4a4_frozen"."""
    return "float" if mode.startswith("float") else mode.removeprefix("deployed_").removesuffix("_graph")


# ---- calls -----------------------------------------------------------------------------------------------------------


def form(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """What a mode calls, or captures."""
    call: Callable[[Tensor], Tensor] = torch.compile(model) if "_compile" in mode else model
    if "_amp16" not in mode:
        return call

    def half(x: Tensor) -> Tensor:
        # A graph casts its weights itself.
        with torch.autocast(DEVICE.type, torch.float16, cache_enabled=False):
            return call(x)

    return half


def gpu() -> bool:
    """Whether there is one."""
    return torch.cuda.is_available()


def allocated() -> int:
    """Bytes that are in use on the GPU."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that were in use at most while it ran."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def capture(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function that copies its input and launches a graph, whose output is always in the same place; the peak."""
    own = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call(own)
    graph, outputs = torch.cuda.CUDAGraph(), []

    def once() -> None:
        with torch.cuda.graph(graph):
            outputs.append(call(own))

    peak = peak_of(once)

    def replay(y: Tensor) -> Tensor:
        own.copy_(y)
        graph.replay()
        return outputs[0]

    return replay, peak


def replays(model: nn.Module) -> bool:
    """Whether a deployed model has captured a call."""
    graphs = runtime_of(model).graphs
    return graphs is not None and any(known.graph is not None for known in graphs.known.values())


def ready(model: nn.Module, mode: str, x: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """What is timed, compiled and captured, and the peak of a call."""
    call = form(model, mode)
    call(x)  # compiles, tunes, and makes what is kept
    if not mode.endswith("_graph"):
        return call, peak_of(lambda: call(x))
    if mode.startswith("float"):
        return capture(call, x)
    ssmquant.cuda_graph(model)

    def calls() -> None:
        for _ in range(1 + WARM_UP):
            model(x)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph:")  # that it is not captured
        peak = peak_of(calls)
    if not replays(model):
        raise RuntimeError("cuda_graph has captured nothing")
    return model, peak


@contextlib.contextmanager
def without_graphs(model: nn.Module) -> Iterator[None]:
    """Calls of a deployed model as if ``cuda_graph`` had not been called."""
    runtime = runtime_of(model)
    graphs, runtime.graphs = runtime.graphs, None
    try:
        yield
    finally:
        runtime.graphs = graphs


# ---- the gate --------------------------------------------------------------------------------------------------------


def _number(value: float) -> float | None:
    """None for what JSON does not have."""
    return value if math.isfinite(value) else None


def compare(got: Tensor, want: Tensor) -> dict[str, Any]:
    """The relative error, of pictures the PSNR (None: the same, or not finite), and whether all is finite."""
    got, want = got.double(), want.double()
    finite = bool(got.isfinite().all()) and bool(want.isfinite().all())
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    found = {"error": _number(error), "finite": finite}
    if got.dim() == 4:
        spread, square = float(want.max() - want.min()), float((got - want).square().mean())
        there = finite and spread > 0 and square > 0
        found["psnr"] = 10 * math.log10(spread**2 / square) if there else None
    return found


def tf32() -> dict[str, bool]:
    """Whether PyTorch allows TF32 in convolutions and in products of matrices."""
    return {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
    }


def most_error(mode: str) -> float:
    """What a float mode may differ by from what it is compared with.

    ``float_eager`` has the very convolutions of what it is compared with, whatever their precision.
    """
    if "_amp16" in mode:
        return HALF_ERROR
    return TF32_ERROR if mode != "float_eager" and any(tf32().values()) else FLOAT_ERROR


def gate(model: nn.Module, mode: str, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    """Whether a mode computes what it has to."""
    got = run(x).clone()
    if mode.startswith("float"):
        if mode == "float_eager":
            with use_backend("chunked"):
                found = {"against": "float, chunked", **compare(got, model(x))}
        else:
            found = {"against": "float_eager", **compare(got, model(x))}
        return {**found, "passed": found["finite"] and found["error"] < most_error(mode)}
    with without_graphs(model):
        with use_backend("chunked"):
            found = {"against": "deployed, chunked", **compare(got, model(x))}
        passed = found["finite"] and found["error"] is not None
        if mode.endswith("_graph"):
            found["same_as_eager"] = torch.equal(got, model(x))
            passed = passed and found["same_as_eager"]
    if "psnr" in found:
        passed = passed and (found["error"] == 0 or (found["psnr"] or 0) >= LEAST_PSNR)
    else:
        passed = passed and found["error"] < MOST_ERROR
    return {**found, "passed": passed}


# ---- one row ---------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[Tensor], Tensor], x: Tensor, runs: int) -> list[float]:
    """Times of single calls."""
    for _ in range(WARM_UP):
        run(x)
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def fill(row: dict[str, Any], models: Models, runs: int, explain: bool) -> None:
    """Measure a row, which has its case and mode."""
    case, mode = row["case"], row["mode"]
    model = models.of(case, mode).to(DEVICE)
    if mode.startswith("float") and isinstance(getattr(model, "mean", None), Tensor):
        model.mean = model.mean.to(DEVICE)  # of MambaIR: no buffer, and a graph cannot fetch it
    x = example(case)
    x, other = x.to(DEVICE), x.flip(-1).contiguous().to(DEVICE)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gc.collect()  # what was left of making the model
    before = allocated()
    begun = time.perf_counter()
    run, peak = ready(model, mode, other)
    row |= {
        "weights": "shipped" if case.partition("/")[0] in WEIGHTS else "initial",
        "ready_s": round(time.perf_counter() - begun, 2), "model_bytes": size,
        "call_mib": round((peak - before) / 2**20, 2), "peak_mib": round((peak - before + size) / 2**20, 2),
    }  # fmt: skip
    row["gate"] = gate(model, mode, run, x)
    if not row["gate"]["passed"]:
        return
    times = milliseconds(run, x, runs)
    row |= {"median_ms": statistics.median(times), "min_ms": min(times), "runs": len(times)}
    if explain and not mode.startswith("float"):
        row["breakdown"] = breakdown(lambda: run(x), DEVICE)


@torch.no_grad()
def measure(case: str, mode: str, setting: str, models: Models, runs: int, explain: bool) -> dict[str, Any]:
    """The row of a case, a mode and a setting of TF32; what raises has failed its gate, and takes no other with it."""
    row: dict[str, Any] = {"case": case, "mode": mode, "tf32": setting, "gate": {}}
    try:
        fill(row, models, runs, explain)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row["gate"] |= {"passed": False, "reason": reason}
        for name in ("median_ms", "min_ms", "runs"):
            row.pop(name, None)
    return row


class Lost(Exception):
    """No call of this process reaches the GPU any more."""


def tidy() -> None:
    """Nothing of one row is left for the next.

    Raises:
        Lost: a kernel of the row before has gone wrong for good.
    """
    torch._dynamo.reset()
    gc.collect()
    try:
        torch.cuda.synchronize()
        with contextlib.suppress(AttributeError):
            torch._C._cuda_clearCublasWorkspaces()  # or the first row alone would have paid for them
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise Lost(str(error).strip().partition("\n")[0]) from error


# ---- what is measured, and what is shown -----------------------------------------------------------------------------


def select(wanted: Sequence[str], known: Sequence[str], check: Callable[[str], object]) -> list[str]:
    """The names that patterns fit; one that fits none has to be a name that ``check`` does not refuse."""
    chosen: list[str] = []
    for pattern in wanted:
        found = fnmatch.filter(known, pattern)
        if not found:
            check(pattern)
            found = [pattern]
        chosen += [name for name in found if name not in chosen]
    return chosen


def check_mode(mode: str) -> None:
    """Raises ConfigError where there is none of this name."""
    if MODE.fullmatch(mode) is None:
        raise ConfigError(f"there is no mode {mode!r}; there are {', '.join(MODES)}")


def kept(path: Path | None, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of the same commit, GPU, torch and setting of TF32.

    Raises:
        ConfigError: the file is none of results.
    """
    if path is None or not path.exists():
        return []
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = [r for r in old["rows"] if r["case"] and r["mode"] and "gate" in r]
        changed = [
            name
            for name in ("hardware", "torch", "commit", "tf32")
            if report[name] is None or old[name] != report[name]
        ]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is there and holds no results: choose another --out") from None
    if changed:
        print(
            f"{path}: of another {' and '.join(changed)}, or of one not known: all is measured again",
            flush=True,
        )
        return []
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    text, found = f"{row['case']:28} {row['mode']:26}", row["gate"]
    if "median_ms" in row:
        text += f" {row['median_ms']:9.3f} ms (min {row['min_ms']:9.3f}) {row['peak_mib']:9.1f} MiB"
    error = found.get("error")
    text += "" if error is None else f"  error {error:.1e}"
    text += "" if found["passed"] else f"  GATE NOT PASSED {found.get('reason', found)}"
    return text


def best(rows: Sequence[dict[str, Any]], amp: bool) -> float | None:
    """The shortest float time, with autocast or without."""
    floats = [r for r in rows if r["mode"].startswith("float") and "median_ms" in r]
    return min((r["median_ms"] for r in floats if amp or "_amp16" not in r["mode"]), default=None)


def show(case: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of a case: how many times faster than the best float32 and the best float of all each mode is."""
    order = {mode: i for i, mode in enumerate(MODES)}
    limits = [best(rows, amp) for amp in (False, True)]
    body = []
    for row in sorted(rows, key=lambda r: order.get(r["mode"], len(order))):
        median, found = row.get("median_ms"), row["gate"]
        cells = [row["mode"]]
        cells += ["-", "-"] if median is None else [f"{median:.3f}", f"{row['min_ms']:.3f}"]
        cells += [f"{limit / median:.2f}x" if limit and median else "-" for limit in limits]
        cells += (
            [f"{row['call_mib']:.1f}", f"{row['model_bytes'] / 2**20:.2f}"]
            if "call_mib" in row
            else ["-", "-"]
        )
        cells.append("-" if found.get("error") is None else f"{found['error']:.1e}")
        cells.append(f"{found['psnr']:.1f}" if found.get("psnr") else "-")
        cells.append("ok" if found["passed"] else "FAILED")
        body.append(cells)
    header = [
        "mode",
        "median ms",
        "min ms",
        "x fp32",
        "x float",
        "call MiB",
        "model",
        "error",
        "PSNR",
        "gate",
    ]
    print_table(case, header, body)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", metavar="NAME", help="MODEL/HxW/bBATCH, or a pattern (*, ?); repeatable")
    add("--mode", action="append", metavar="NAME", help="a mode, or a pattern; repeatable")
    add("--quick", action="store_true", help="a small model, few modes and runs")
    add("--runs", type=int, help="calls that are timed (default 30; quick 5)")
    add("--tf32", choices=("default", "off"), default="default", help="as PyTorch has it, or nowhere")
    add("--breakdown", action="store_true", help="time by kernel, of deployed models")
    add("--models", type=Path, metavar="FOLDER", help="keep deployed models there, and take them from there")
    add("--make", action="store_true", help="only make the deployed models in --models, on the CPU")
    add("--commit", metavar="NAME", help="of the code, where there is no git")
    add("--out", type=Path, metavar="FILE.json", help="add the results to this file, row by row")
    args = parser.parse_args(argv)
    args.runs = args.runs or (5 if args.quick else 30)
    return args


def make(cases: Sequence[str], modes: Sequence[str], folder: Path) -> None:
    """The files of the deployed models that ``modes`` need."""
    models = Models(folder, torch.device("cpu"))
    for case in cases:
        for mode in modes:
            if not mode.startswith("float"):
                path = models.file(case, mode)
                print(f"{case:28} {mode:26} {path} {path.stat().st_size:,} B", flush=True)


def run_all(
    cases: Sequence[str], modes: Sequence[str], folder: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measures what is missing; all rows.

    Raises:
        Lost: what was measured is in the file.
    """
    report = heading(DEVICE) | {"cuda": torch.version.cuda, "tf32": args.tf32, "tf32_allowed": tf32()}
    report["commit"] = args.commit or report["commit"]
    report["kernels"] = engine_of(DEVICE).unavailable(DEVICE) or "here"
    rows = report["rows"] = kept(args.out, report)
    print(
        f"{report['hardware']}, torch {report['torch']}, TF32 {args.tf32}, kernels: {report['kernels']}",
        flush=True,
    )

    def place(pair: tuple[str, str]) -> int | None:
        row = (*pair, args.tf32)
        return next((i for i, r in enumerate(rows) if (r["case"], r["mode"], r.get("tf32")) == row), None)

    todo = [(case, mode) for case in cases for mode in modes]
    todo.sort(key=lambda pair: place(pair) is not None)
    models = Models(folder, DEVICE)
    for case, mode in todo:
        at = place((case, mode))
        explain = args.breakdown and not mode.startswith("float")
        if at is not None and "median_ms" in rows[at] and ("breakdown" in rows[at] or not explain):
            print(f"{line(rows[at])}  (kept)", flush=True)
            continue
        tidy()
        row = measure(case, mode, args.tf32, models, args.runs, args.breakdown)
        if at is None:
            rows.append(row)
        else:
            rows[at] = row
        print(line(row), flush=True)
        for kernel in row.get("breakdown", {}).get("kernels", ()):
            print(f"    {kernel['ms']:10.3f} ms {kernel['calls']:8.1f} calls  {kernel['name']}", flush=True)
        if args.out:
            write(args.out, report)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        cases = select(args.case or (QUICK if args.quick else CASES), CASES + QUICK, build)
        modes = select(args.mode or (QUICK_MODES if args.quick else MODES), MODES, check_mode)
        if args.make and args.models is None:
            raise ConfigError("--make wants a folder to make models in: --models FOLDER")
        if not args.make and not gpu():
            raise ConfigError(
                f"this is for a CUDA GPU, and PyTorch {torch.__version__} sees none; infer_cpu.py is for CPUs"
            )
        if args.tf32 == "off":
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.models or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            if args.make:
                make(cases, modes, folder)
                return 0
            rows = run_all(cases, modes, folder, args)
    except ConfigError as error:
        print(f"infer_cuda: {error}", file=sys.stderr)
        return 2
    except Lost as error:
        print(
            f"infer_cuda: the GPU is lost to this process ({error}): call it again for the rest",
            file=sys.stderr,
        )
        return 1
    for case in cases:
        show(case, [row for row in rows if row["case"] == case])
    wanted = [row for row in rows if row["case"] in cases and row["mode"] in modes]
    return 0 if all(row["gate"]["passed"] for row in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
