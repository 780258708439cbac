"""Selective scans, float and of deployed models, against mamba-ssm, plain PyTorch and the limits of the machine.

Is it right, then how fast.

    python benchmarks/scan.py                                   # all cases, on the GPU if there is one
    python benchmarks/scan.py --quick                           # small shapes, a minute on a CPU
    python benchmarks/scan.py --case scan/16x288x10x4096/fp16 --case scan/16x288x10x4096/q4 --out scan.json

A case is scan/BxDxNxL/dtype, the dtype of u, delta, B and C; the rest is float32. B and C have 4 groups (Vim: 1). Step
sizes are as a Mamba starts, log-uniform in [0.001, 0.1]. Modes are a back end and what is timed: fwd, fwd_bwd (from the
call to the gradients of all seven operands), bwd (the backward operator alone). "ours_float" is the automatic choice;
"mamba_ssm" calls the functions of its extension, without autograd around them; "reference" is the definition, a loop.

Gate: output, last state and all gradients against the definition in float64 (a scan longer than 8,192: against
``chunked`` in float64), relative Frobenius error. The whole case runs, with an output gradient that is zero except in
the first and last sample and the first and last channel of each group: those are compared, and the rest has to be zero.
"ours" must also give the same bits twice; if it fails it is not timed, and the exit status is 1. Others are timed all
the same, and the definition is not compared with itself.

Cases scan/BxDxNxL/qBITS are of deployed models: D channels in four orders of an image (rows, columns, both turned
round), or in one for Vim; decays are evenly spaced. Modes: "quantized", the scan of codes; "quantized_core", the same
from values, with encoding and projection; "float_core", what that replaces: MambaIR's glue in PyTorch around our float
scan, in float32. Where a model leaves it to the next kernel to add up several paths, so do the quantized ones. Gate:
all of the result against decoded values in ``chunked`` in float64, with a tolerance for codes at ties, and the same
bits twice (not of float_core). What fails is not timed, and the exit status is 1.

Columns: "roof" is the bytes of operands and results, each moved once, at the bandwidth of a copy that is measured here;
"MUFU" is one exponential a state, step and pass, at 16 a clock and multiprocessor. Times are of single calls, by events
behind a long memset on a GPU, so that launching is hidden and L2 is cold. "/mamba" is the time as a part of mamba-ssm's
of the same case and pass, for quantized cases of its forward scan of float16, where the run has that.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import scan_quantized
import torch
from common import heading, write
from torch import Tensor

from ssmquant.modules.deployed import engine_of
from ssmquant.ops import selective_scan, use_backend
from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.ops.selective_scan.backends import choose, explain

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
SHAPES = (
    "16x288x10x4096", "1x288x10x230400", "4x1440x16x4096", "64x384x1x3136", "64x768x1x784", "64x1536x1x196",
    "64x3072x1x49", "64x384x16x197",
)  # fmt: skip
CASES = {
    "cuda": [f"scan/{shape}/{dtype}" for dtype in ("fp32", "fp16", "q4") for shape in SHAPES],
    "cpu": [
        "scan/1x480x16x4096/fp32", "scan/1x288x10x4096/fp32", "scan/1x384x1x3136/fp32", "scan/4x384x16x197/fp32",
        "scan/1x480x16x4096/bf16", "scan/1x480x16x4096/q4", "scan/1x288x10x4096/q4", "scan/1x384x1x3136/q4",
        "scan/4x384x16x197/q4",
    ],
}  # fmt: skip
QUICK = [
    "scan/2x72x10x197/fp32", "scan/3x60x1x49/fp32", "scan/1x160x8x1024/bf16", "scan/2x72x10x192/q4",
    "scan/1x48x16x197/q4",
]  # fmt: skip
OTHERS = ("mamba_ssm", "triton", "chunked", "reference")
FORWARD_ONLY = ("1x288x10x230400",)
LONGEST = 8192  # steps that the definition is asked for
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
OPS = torch.ops.ssmquant


def sizes_of(name: str) -> tuple[int, int, int, int, int]:
    """Batch, channels, states, steps and groups of a case."""
    batch, channels, states, length = map(int, name.split("/")[1].split("x"))
    return batch, channels, states, length, 1 if (states, length) == (16, 197) or channels % 4 else 4


class Case:
    """Operands, an output gradient, and what the results have to be on the part that is compared."""

    def __init__(self, name: str, device: torch.device) -> None:
        _, sizes, kind = name.split("/")
        self.name, self.device, self.dtype = name, device, DTYPES[kind]
        self.batch, self.channels, self.states, self.length, self.groups = sizes_of(name)
        self.forward_only = sizes in FORWARD_ONLY
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        full = (self.batch, self.channels, self.length)
        matrix = (self.batch, self.groups, self.states, self.length)
        log_dt = (
            torch.rand(self.channels, generator=generator, device=device) * 4.6 - 6.9
        )  # ln 0.001 .. ln 0.1
        made = (
            normal(*full).to(self.dtype),
            (0.5 * normal(*full)).to(self.dtype),
            -torch.arange(1.0, self.states + 1, device=device).repeat(self.channels, 1),
            normal(*matrix).to(self.dtype),
            normal(*matrix).to(self.dtype),
            torch.ones(self.channels, device=device),
            log_dt.exp() + (-(-log_dt.exp()).expm1()).log(),  # its softplus is exp(log_dt)
        )
        self.operands = [t.requires_grad_(not self.forward_only) for t in made]
        self.g = normal(*full).to(self.dtype)
        size = self.channels // self.groups
        self.rows = sorted({i * size + j for i in range(self.groups) for j in (0, size - 1)})
        self.samples = sorted({0, self.batch - 1})
        self.masked = torch.zeros_like(self.g)
        self.masked[self.at] = self.g[self.at]

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        samples, rows = (torch.tensor(i, device=self.device) for i in (self.samples, self.rows))
        return samples[:, None], rows

    def cost(self, what: str) -> tuple[int, int]:
        """Bytes that have to be moved, and exponentials."""
        wide, matrix = (t.numel() * t.element_size() for t in (self.g, self.operands[3]))
        exponentials = self.g.numel() * self.states
        forward, backward = 3 * wide + 2 * matrix, 5 * wide + 4 * matrix
        passes = {"fwd": (forward, 1), "bwd": (backward, 1), "fwd_bwd": (forward + backward, 2)}
        return passes[what][0], passes[what][1] * exponentials

    def wanted(self) -> list[Tensor]:
        """Output, last state and gradients of the part, in float64, on the CPU where steps are cheap to launch."""
        part = []
        for name, t in zip(NAMES, self.operands, strict=True):
            t = t.detach()[self.rows] if name in ("A", "D", "delta_bias") else t.detach()[self.samples]
            t = t[:, self.rows] if name in ("u", "delta") else t
            part.append(t.double().cpu().requires_grad_(not self.forward_only))
        short = self.length <= LONGEST
        with use_backend("chunked"):
            function: Callable[..., Any] = selective_scan_reference if short else selective_scan
            u, delta, a, b, c, d, bias = part
            out, last = function(u, delta, a, b, c, d, None, bias, True, True)
        if self.forward_only:
            return [out, last]
        g = self.masked[self.at].double().cpu()
        return [out.detach(), last.detach(), *torch.autograd.grad(out, part, g)]

    def errors(self, got: list[Tensor], want: list[Tensor]) -> dict[str, float]:
        """Relative Frobenius errors by name. What is not of the part has to have no gradient at all."""
        found = {}
        for name, have, must in zip(("out", "last", *NAMES), got, want, strict=False):
            if name in ("out", "last", "u", "delta"):
                some = have[self.at]
            else:
                some = have[self.samples] if name in ("B", "C") else have[self.rows]
            error = float((some.double().cpu() - must).norm() / must.norm().clamp(min=1e-30))
            if name not in ("out", "last"):
                rest = have.clone()
                if name in ("u", "delta"):
                    rest[self.at] = 0
                else:
                    rest[self.samples if name in ("B", "C") else self.rows] = 0
                error = float("inf") if bool(rest.any()) else error
            found[name] = error if error == error else float("inf")
        return found


class Modes:
    """What one back end can be asked to do; ``name`` None is the automatic choice."""

    def __init__(self, case: Case, name: str | None) -> None:
        self.case, self.name = case, name
        self.backend = name or choose(case.device, torch.float32, case.states).NAME

    def scan(self) -> tuple[Tensor, Tensor]:
        u, delta, a, b, c, d, bias = self.case.operands
        with use_backend(self.name or "auto"):
            return OPS.selective_scan(u, delta, a, b, c, d, None, bias, True)

    def forward(self) -> object:
        with torch.no_grad():
            return self.scan()

    def results(self, g: Tensor) -> list[Tensor]:
        """Output, last state, and unless only the forward pass is wanted, gradients."""
        out, last = self.scan()
        grads = () if self.case.forward_only else torch.autograd.grad(out, self.case.operands, g)
        return [out.detach(), last.detach(), *grads]

    def runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """(what, function) to be timed."""
        case = self.case
        yield "fwd", self.forward
        if case.forward_only:
            return
        yield "fwd_bwd", lambda: self.results(case.g)
        detached = [t.detach() for t in case.operands]
        *_, saved = OPS._selective_scan_fwd(*detached, True, True, self.backend)
        yield "bwd", lambda: OPS._selective_scan_bwd(case.g, None, saved, *detached, True, self.backend)


class Extension(Modes):
    """mamba-ssm's own functions, called as its own code does."""

    def runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        module = importlib.import_module("selective_scan_cuda")
        case = self.case
        u, delta, a, b, c, d, bias = (t.detach() for t in case.operands)

        def forward() -> Tensor:
            return module.fwd(u, delta, a, b, c, d, None, bias, True)[1]

        def backward(states: Tensor) -> object:
            return module.bwd(u, delta, a, b, c, d, None, bias, case.g, states, None, None, True, False)

        yield "fwd", forward
        if case.forward_only:
            return
        yield "fwd_bwd", lambda: backward(forward())
        states = forward()
        yield "bwd", lambda: backward(states)


class Reference(Modes):
    """The definition."""

    def __init__(self, case: Case) -> None:
        self.case, self.name, self.backend = case, None, "reference"

    def scan(self) -> tuple[Tensor, Tensor]:
        u, delta, a, b, c, d, bias = self.case.operands
        return selective_scan_reference(u, delta, a, b, c, d, None, bias, True, True)

    def runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        yield "fwd", self.forward
        if (
            self.case.g.numel() * self.case.states * self.case.length < 2**32
        ):  # its gradients take L^2 of memory traffic
            yield "fwd_bwd", lambda: self.results(self.case.g)


def modes_of(case: Case, skip: list[str]) -> Iterator[tuple[str, Modes]]:
    """The back ends that can serve a case, by the prefix of their modes; ours first, for it decides."""
    yield "ours_float", Modes(case, None)
    able = {name for name, reason in explain(case.device, torch.float32, case.states) if reason is None}
    for name in ("mamba_ssm", "triton", "chunked"):
        if name in able and name not in skip and (name != "chunked" or case.dtype == torch.float32):
            yield name, Extension(case, name) if name == "mamba_ssm" else Modes(case, name)
    small = case.g.numel() * case.states < 2**25 and not case.forward_only
    if case.device.type == "cpu" and "reference" not in skip and small:
        yield "reference", Reference(case)


def milliseconds(run: Callable[[], object], device: torch.device, runs: int, budget: float) -> list[float]:
    """Times of single calls: ``runs`` of them after a warm-up, or what fits into ``budget`` seconds, but two.

    Of what takes longer than ten budgets, the first call is the only one.
    """
    flush = torch.empty(2**31 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def once() -> float:
        if device.type == "cpu":
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        for _ in range(3):  # about two milliseconds, in which everything is launched
            flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    first = once()  # compiles, allocates
    if first > 1e4 * budget:
        return [first]
    if first < 250 * budget:
        once()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 2 or (len(times) < runs and time.perf_counter() - begin < budget):
        times.append(once())
    return times


def timed(run: Callable[[], object], device: torch.device, runs: int) -> dict[str, Any]:
    """Times of a row, and on a GPU its memory."""
    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**20
    times = milliseconds(run, device, runs, 1.0 if device.type == "cuda" else 3.0)
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "runs": len(times),
        "peak_mib": peak,
    }


def limits(device: torch.device) -> dict[str, float | None]:
    """Bandwidth of a copy, and exponentials a second (None on a CPU)."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device, 20, 2.0))
    exponentials = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clock = 1e3 * getattr(properties, "clock_rate", 1_755_000)  # Hz
        exponentials = 16.0 * properties.multi_processor_count * clock
    return {"bytes_per_s": 2 * size / (best * 1e-3), "exponentials_per_s": exponentials}


def rows_of(
    case: Case, bounds: dict[str, float | None], runs: int, skip: list[str]
) -> Iterator[dict[str, Any]]:
    """Gate and times of one case, mode by mode."""
    want = case.wanted()
    against = "definition" if case.length <= LONGEST else "chunked"
    for prefix, modes in modes_of(case, skip):
        ours = prefix == "ours_float"
        gate: dict[str, Any] = {"against": f"{against}, float64", "relative_error": 0.0, "passed": True}
        if prefix != "reference":
            got = modes.results(case.masked)
            gate["errors"] = case.errors(got, want)
            gate["relative_error"] = max(gate["errors"].values())
            gate["passed"] = gate["relative_error"] < TOLERANCE[case.dtype]
            if ours:
                again = modes.results(case.masked)
                gate["same_bits"] = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                gate["passed"] = gate["passed"] and gate["same_bits"]
                del again
            del got
        head = {"case": case.name, "backend": modes.backend, "gate": gate}
        if ours and not gate["passed"]:
            yield {**head, "mode": "gate"}
            return
        for what, run in modes.runs():
            moved, exponentials = case.cost(what)
            mufu = bounds["exponentials_per_s"]
            yield {
                **head,
                "mode": f"{prefix}_{what}",
                "pass": what,
                **timed(run, case.device, runs),
                "bytes": moved,
                "roof_us": 1e6 * moved / (bounds["bytes_per_s"] or 1),
                "mufu_us": None if mufu is None else 1e6 * exponentials / mufu,
            }


def quantized_rows(
    name: str, device: torch.device, bounds: dict[str, float | None], runs: int
) -> Iterator[dict[str, Any]]:
    """``rows_of`` of a case of deployed models; none where nothing computes on codes."""
    engine = engine_of(device)
    reason = engine.unavailable(device)
    if reason is not None:
        print(f"{name:27} left out: {reason}")
        return
    case = scan_quantized.Case(sizes_of(name), int(name.rpartition("/q")[2]))
    for row in scan_quantized.rows_of(case, engine, device, lambda run: timed(run, device, runs)):
        if "bytes" in row:
            row |= {"roof_us": 1e6 * row["bytes"] / (bounds["bytes_per_s"] or 1), "mufu_us": None}
        yield {"case": name, **row}


def scan_heading(device: torch.device, bounds: dict[str, float | None]) -> dict[str, Any]:
    """What a reader of the numbers has to know of the machine."""
    back_ends = {n: why or "here" for n, why in explain(device, torch.float32, 16)}
    back_ends["quantized"] = engine_of(device).unavailable(device) or "here"
    return {**heading(device), **bounds, "back_ends": back_ends}


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one case."""
    for row in rows:
        gate = row["gate"]
        state = "" if gate.get("same_bits", True) else "  NOT THE SAME BITS TWICE"
        state += "" if gate["passed"] else "  GATE NOT PASSED"
        line = f"{row['case']:27} {row['mode']:18} {row['backend']:9}"
        if "median_ms" in row:
            over = 1e3 * row["median_ms"] / row["roof_us"]
            line += f" {row['median_ms']:10.4f} {row['min_ms']:10.4f} {row['roof_us']:8.1f} {over:6.2f}"
            line += f" {row['mufu_us'] or 0:8.1f} {row.get('of_mamba_ssm', 0):6.2f}"
        if "of_float_core" in row:
            state += f"  {row['of_float_core']:.2f} of float_core"
        print(f"{line} {gate['relative_error']:8.1e}{state}", flush=True)


def compare(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Add ratios to mamba-ssm's time of the same pass, which ``others`` may have, and of a core to the float one."""
    timed_rows = [row for row in rows if "median_ms" in row]
    theirs = {r["pass"]: r["median_ms"] for r in (*others, *rows) if r["mode"].startswith("mamba_ssm")}
    whole = {row["mode"]: row["median_ms"] for row in timed_rows}.get("float_core")
    for row in timed_rows:
        if row["mode"] == "quantized_core" and whole is not None:
            row["of_float_core"] = row["median_ms"] / whole
        if row["pass"] in theirs:
            row["of_mamba_ssm"] = row["median_ms"] / theirs[row["pass"]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="scan/BxDxNxL/dtype or /q4, repeatable"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a back end, repeatable")
    parser.add_argument("--quick", action="store_true", help="small shapes, few runs")
    parser.add_argument(
        "--bits", type=int, default=4, choices=range(2, 9), help="of quantized cases, if no --case is given"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there as JSON")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    bounds = limits(device)
    report = {**scan_heading(device, bounds), "rows": []}
    print(
        f"{report['hardware']}, copy {(bounds['bytes_per_s'] or 0) / 1e9:.0f} GB/s, torch {report['torch']}"
    )
    print(
        f"{'case':27} {'mode':18} {'back end':9} {'median ms':>10} {'min ms':>10} {'roof us':>8} {'/ roof':>6}"
        f" {'MUFU us':>8} {'/mamba':>6} {'error':>8}"
    )
    runs = 5 if options.quick else 50
    default = QUICK if options.quick else CASES[device.type]
    for name in options.case or [name.replace("/q4", f"/q{options.bits}") for name in default]:
        shape, _, kind = name.rpartition("/")
        if kind.startswith("q"):
            rows = list(quantized_rows(name, device, bounds, runs))
        else:
            rows = list(rows_of(Case(name, device), bounds, runs, options.skip))
        compare(rows, [row for row in report["rows"] if row["case"] == f"{shape}/fp16"])
        table(rows)
        report["rows"] += rows
        if options.out:
            write(options.out, report)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ours = [row for row in report["rows"] if not row["mode"].startswith(OTHERS)]
    return 0 if all(row["gate"]["passed"] for row in ours) else 1


if __name__ == "__main__":
    raise SystemExit(main())
