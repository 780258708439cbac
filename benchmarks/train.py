"""Whole training steps, float and quantized, side by side in one run: are they right, then how fast.

    python benchmarks/train.py                                     # the cases of the GPU, or of the CPU
    python benchmarks/train.py --quick                             # a small model, seconds on a CPU
    python benchmarks/train.py --case mambair_light_x2/48x48/b16 --mode w4a4 --breakdown --out train.json
    python benchmarks/train.py --list                              # all modes

A case is MODEL/HxW/bBATCH: a model of the zoo (mambair_*_xSCALE; also vmamba_tiny/224/b16) and the size of its input.
A mode is MODEL_train_EXECUTION. Models: float, the user's own code; prepared_unquantized, the same prepared without a
quantizer, which leaves the graph with our kernels; prepared_w4a4, as published (RFA, LSQ, DLS); prepared_lsq_w4a4; with
--official official_w4a4; also w2a2 and w8a8. Executions: eager; graph (the whole step is one CUDA graph);
replay (eager, of a model that ssmquant.cuda_graph replays); compile (torch.compile of the model, which takes minutes)
and compile_graph, with a --mode that says so. Suffixes: _bf16 (autocast, with --bf16), _mamba_ssm (its scan, where it
is installed), _plain (kernels of quantizers and graphs off, with a --mode that says so).

A step is that of examples/training.py: forward, L1 loss, backward, fused Adam; no clipping, no EMA. All modes of a
case start from the same weights (as initialised, plus a little noise, for the official scale of a constant tensor is
0 / 0) and see one batch; prepared models are calibrated on it. Matrix products are fp32, on a GPU through TF32 unless
--no-tf32.

Gate, on the first step: the loss and all gradients are finite and every parameter of a quantizer has a gradient. What
does not run eagerly, or on another scan, must have the loss of the plain eager step (to 1e-3, bf16 1e-2, relative) and
its norm of the weights' gradients (to 0.1). What fails is not timed, and the exit status is 1; official code is timed
all the same.

Columns: median and minimum of single steps, by events on a GPU; "/float" is over the float model in the same execution
and precision, which is always timed too; peak memory is that of a step (of a graph: while it is recorded).
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import breakdown, heading, write
from qmambair import architecture_file, official
from torch import nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.errors import ConfigError, SsmquantError
from ssmquant.graph.runtime import is_prepared
from ssmquant.ops import use_backend
from ssmquant.ops.selective_scan.backends import explain

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from training import WARM_UP, Recipe, Step

CASES = {
    "cuda": ["mambair_light_x2/48x48/b16", "mambair_tiny_x2/48x48/b16"],
    "cpu": ["mambair_tiny_x2/32x32/b8"],
}
QUICK = ["mambair_nano_x2/8x8/b2"]
NANO = {"embed_dim": 32, "depths": [1], "d_state": 4, "mlp_ratio": 1.2, "upsampler": "pixelshuffledirect"}
SCHEMES: dict[str, Callable[[int], QConfig]] = {
    "prepared": QConfig.qmambair,
    "prepared_lsq": lambda bits: QConfig.lsq(bits, bits),
}
BITS = (2, 4, 8)
LEAST, MOST = 3, 100  # steps that are timed
NOISE = 0.01
RATE = 2e-4


@dataclass(frozen=True)
class Mode:
    """One way to train: what is built, and how its step runs."""

    name: str
    model: str
    """What is built; modes of equal names start from copies of one model."""
    build: Callable[[Case], nn.Module]
    execution: str = "eager"
    bf16: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Holds while the model is built, checked and timed."""
    against: str | None = None
    """The mode whose first loss this one must have."""
    baseline: str = "float_train_eager"
    """The float mode that it is compared with."""
    ours: bool = True
    """Whether a gate that fails stops it."""
    default: bool = True
    """Whether it runs unless ``--mode`` asks for it."""


class Case:
    """The float model that all modes of a case start from, and one batch."""

    def __init__(self, name: str, device: torch.device) -> None:
        found = re.fullmatch(r"([a-z]\w*)/(\d+)(?:x(\d+))?/b(\d+)", name)
        if found is None:
            raise ConfigError(f"a case is MODEL/HxW/bBATCH, such as mambair_tiny_x2/48x48/b16, not {name!r}")
        kind, height, width, batch = found.groups()
        self.name, self.device = name, device
        torch.manual_seed(0)
        self.start = _float_model(kind)
        with torch.no_grad():
            for p in self.start.parameters():
                p.add_(NOISE * torch.randn_like(p))
        self.start.to(device).train()
        args = zoo.describe(self.start)["args"]
        h, w, b = int(height), int(width or height), int(batch)
        channels, scale = args.get("in_chans", args.get("channels", 3)), args.get("upscale")
        shape = (b, channels, h * scale, w * scale) if scale else (b, args["num_classes"])
        self.x, self.y = torch.rand(b, channels, h, w).to(device), torch.rand(shape).to(device)
        self.first: dict[str, tuple[float, float]] = {}  # loss and gradient norm of a mode's first step
        self.made: tuple[str, nn.Module] = ("", self.start)

    def model(self, mode: Mode) -> nn.Module:
        """A copy of what ``mode`` starts from, in training mode."""
        if self.made[0] != mode.model:
            self.made = mode.model, mode.build(self)
        return copy.deepcopy(self.made[1]).train()


def _float_model(kind: str) -> nn.Module:
    """A model of the zoo by its name, without anything random in its forward."""
    name, _, scale = kind.partition("_x")
    if scale and not scale.isdigit():
        raise ConfigError(f"{kind!r}: expected a scale after _x")
    options = {"upscale": int(scale)} if scale else {}
    model = zoo.build("MambaIR", **NANO, **options) if name == "mambair_nano" else zoo.build(name, **options)
    config = zoo.describe(model)
    config["args"].update({k: 0.0 for k in config["args"] if k.endswith(("drop_rate", "drop_path_rate"))})
    return zoo.build(config)


def _prepared(config: QConfig, case: Case) -> nn.Module:
    model = ssmquant.prepare(case.start, config, example_inputs=(case.x[:1],))
    return ssmquant.calibrate(model, [case.x], progress=False)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Quantizers and their graph in plain PyTorch."""
    with use_backend("chunked", op="quantize"), use_backend("chunked", op="fuse"):
        yield


def _official(root: Path, bits: int, case: Case) -> nn.Module:
    return official(root, case.start, bits).to(case.device)


def all_modes(device: torch.device, bf16: bool = False, root: Path | None = None) -> dict[str, Mode]:
    """Every mode by its name, the plain float ones first.

    To add one, such as a prepared model under some switch, yield it with a ``model`` name and ``around`` of its own.
    """
    return {mode.name: mode for mode in _modes(device, bf16, root)}


def _modes(device: torch.device, bf16: bool, root: Path | None) -> Iterator[Mode]:
    gpu = device.type == "cuda"
    executions = ("eager", "graph", "replay", "compile", "compile_graph") if gpu else ("eager", "compile")
    models: dict[str, Callable[[Case], nn.Module]] = {"float": lambda case: case.start}
    models["prepared_unquantized"] = partial(_prepared, QConfig())
    for scheme, config in SCHEMES.items():
        models |= {f"{scheme}_w{b}a{b}": partial(_prepared, config(b)) for b in BITS}
    for model, build in models.items():
        for half in (False, True)[: 1 + bf16]:
            end = "_bf16" if half else ""
            for execution in executions:
                if execution == "replay" and model == "float":
                    continue
                plain = execution == "eager"
                yield Mode(
                    f"{model}_train_{execution}{end}", model, build, execution, half,
                    against=None if plain else f"{model}_train_eager{end}",
                    baseline=f"float_train_{execution.replace('replay', 'eager')}{end}",
                    default=execution in ("eager", "graph", "replay"),
                )  # fmt: skip
            if model not in ("float", "prepared_unquantized"):
                yield Mode(
                    f"{model}_train_eager{end}_plain", model, build, "eager", half, _without_kernels,
                    f"{model}_train_eager{end}", f"float_train_eager{end}", default=False,
                )  # fmt: skip
            if model == "float" and gpu and dict(explain(device, torch.float32, 16))["mamba_ssm"] is None:
                for execution in ("eager", "graph"):
                    yield Mode(
                        f"float_train_{execution}{end}_mamba_ssm", "float", build, execution, half,
                        partial(use_backend, "mamba_ssm"), f"float_train_eager{end}", f"float_train_{execution}{end}",
                    )  # fmt: skip
    if root is not None:
        for b in (2, 4):
            name = f"official_w{b}a{b}"
            yield Mode(f"{name}_train_eager", name, partial(_official, root, b), ours=False)


def _meant(word: str, name: str) -> bool:
    """Whether a mode is wanted by a word; those that take long by one that says so."""
    return word in name and all(slow in word for slow in ("compile", "plain") if slow in name)


def select(modes: dict[str, Mode], wanted: list[str], quick: bool = False) -> list[Mode]:
    """The modes whose names contain one of ``wanted``, or the default ones, with their float baselines before them.

    Raises:
        ConfigError: a word that fits no mode.
    """
    unknown = [word for word in wanted if not any(word in name for name in modes)]
    if unknown:
        raise ConfigError(f"no mode has {unknown[0]!r} in its name; --list shows all")
    if wanted:
        chosen = {name for name in modes if any(_meant(word, name) for word in wanted)}
    else:
        few = ("float", "w4a4") if quick else ("",)
        chosen = {m.name for m in modes.values() if m.default and m.model.endswith(few)}
    chosen |= {modes[name].baseline for name in chosen}
    return [mode for mode in modes.values() if mode.name in chosen]


# ---- one mode --------------------------------------------------------------------------------------------------------


def make_step(mode: Mode, case: Case) -> tuple[Step, float | None]:
    """A step that has run no batch yet (or, captured, is back at its start), and the peak memory of a capture."""
    model = case.model(mode)
    groups = [{"params": list(model.parameters())}]
    if is_prepared(model):
        groups = ssmquant.param_groups(model, RATE)
    recipe = Recipe(lr=RATE, clip=None, bf16=mode.bf16, compile="compile" in mode.execution)
    step = Step(model, groups, recipe, case.device)
    if mode.execution in ("eager", "compile"):
        return step, None
    if mode.execution == "replay":
        ssmquant.cuda_graph(model)
    start = [p.detach().clone() for p in step.params]
    for _ in range(WARM_UP):
        (step if mode.execution == "replay" else step.warm_up)(case.x, case.y)
    with torch.no_grad():
        torch._foreach_copy_(step.params, start)
    step.loss_sum.zero_()
    del start
    if mode.execution == "replay":
        return step, torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    step.capture(case.x, case.y)
    return step, torch.cuda.max_memory_allocated() / 2**20


def check(mode: Mode, case: Case, step: Step, modes: dict[str, Mode]) -> dict[str, Any]:
    """The gate: runs the first step and looks at it."""
    step(case.x, case.y)
    loss = step.loss_sum.item()
    step.loss_sum.zero_()
    names = {id(p): name for name, p in step.model.named_parameters()}
    quantized = is_prepared(step.model) and len(step.optimizer.param_groups) > 1
    scalars = step.optimizer.param_groups[-1]["params"] if quantized else []
    missing = [names[id(p)] for p in scalars if p.grad is None]
    grads = {names[id(p)]: p.grad for p in step.params if p.grad is not None}
    spoiled = [name for name, g in grads.items() if not bool(g.isfinite().all())]
    own = [p.grad for p in step.optimizer.param_groups[0]["params"] if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in own]).norm())
    case.first[mode.name] = loss, norm
    gate: dict[str, Any] = {
        "against": mode.against, "loss": loss, "relative_error": None, "grad_norm": norm, "grad_norm_error": None,
        "gradients": len(grads), "without_gradient": missing, "not_finite": spoiled,
        "passed": math.isfinite(loss) and not missing and not spoiled,
    }  # fmt: skip
    if mode.against is not None:
        if mode.against not in case.first:
            other = modes[mode.against]
            with other.around():
                check(other, case, make_step(other, case)[0], modes)
            gc.collect()  # its memory would count as this mode's
        gate["relative_error"], gate["grad_norm_error"] = (
            abs(mine - theirs) / abs(theirs)
            for mine, theirs in zip((loss, norm), case.first[mode.against], strict=True)
        )
        close = gate["relative_error"] < (1e-2 if mode.bf16 else 1e-3) and gate["grad_norm_error"] < 0.1
        gate["passed"] = gate["passed"] and close
    return gate


def timed(step: Step, case: Case, seconds: float) -> tuple[list[float], float | None]:
    """Milliseconds of single steps, as many as fit into ``seconds`` within LEAST and MOST, and their peak memory."""
    gpu = case.device.type == "cuda"

    def mark() -> Any:
        if not gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    begin = time.perf_counter()
    for _ in range(WARM_UP):
        step(case.x, case.y)
        if gpu:
            torch.cuda.synchronize()
        if time.perf_counter() - begin > seconds:
            break
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    marks = [mark()]
    while len(marks) <= LEAST or (len(marks) <= MOST and time.perf_counter() - begin < seconds):
        step(case.x, case.y)
        marks.append(mark())
        if gpu and len(marks) > 4:  # as in training, the host runs at most 4 steps ahead
            marks[-5].synchronize()
    if not gpu:
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)], None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**20
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)], peak


def run(mode: Mode, case: Case, modes: dict[str, Mode], seconds: float, explain_time: bool) -> dict[str, Any]:
    """The row of one mode; what raises has failed its gate."""
    row: dict[str, Any] = {"case": case.name, "mode": mode.name, "gate": {}}
    try:
        with mode.around():
            _fill(row, mode, case, modes, seconds, explain_time)
    except Exception as error:  # one mode that fails does not take the others with it
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row["gate"] |= {"passed": False, "reason": reason}
    torch._dynamo.reset()
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _fill(
    row: dict[str, Any], mode: Mode, case: Case, modes: dict[str, Mode], seconds: float, explain_time: bool
) -> None:
    step, peak = make_step(mode, case)
    row["gate"] = check(mode, case, step, modes)
    if not row["gate"]["passed"] and mode.ours:
        return
    times, steady = timed(step, case, seconds)
    row |= {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "runs": len(times),
        "peak_mib": steady if peak is None or steady is None else max(peak, steady),
    }
    if explain_time and mode.execution == "eager":
        row["breakdown"] = breakdown(lambda: step(case.x, case.y), case.device)


def compare(row: dict[str, Any], baseline: dict[str, Any] | None) -> None:
    """Add the ratios to the float model."""
    for ratio, column in (("of_float", "median_ms"), ("peak_of_float", "peak_mib")):
        mine, theirs = row.get(column), (baseline or {}).get(column)
        row[ratio] = mine / theirs if mine and theirs else None


HEAD = (
    f"{'case':27} {'mode':42} {'median ms':>10} {'min ms':>10} {'runs':>4} {'/float':>6} {'peak MiB':>9} {'/float':>6}"
    f" {'error':>8}"
)


def line(row: dict[str, Any]) -> str:
    """A row as text."""

    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    gate = row["gate"]
    text = f"{row['case']:27} {row['mode']:42} "
    text += " ".join(
        cell(row.get(name), form, width)
        for name, form, width in (
            ("median_ms", ".2f", 10), ("min_ms", ".2f", 10), ("runs", "d", 4), ("of_float", ".2f", 6),
            ("peak_mib", ".0f", 9), ("peak_of_float", ".2f", 6),
        )
    )  # fmt: skip
    text += " " + cell(gate.get("relative_error"), ".1e", 8)
    if not gate["passed"]:
        text += "  GATE NOT PASSED " + gate.get("reason", "")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", metavar="NAME", help="MODEL/HxW/bBATCH, repeatable")
    add(
        "--mode",
        action="append",
        default=[],
        metavar="WORD",
        help="modes with WORD in their name, repeatable",
    )
    add("--list", action="store_true", help="print the names of all modes and stop")
    add("--quick", action="store_true", help="a small model, few modes and steps")
    add("--bf16", action="store_true", help="also under bfloat16 autocast")
    add("--no-tf32", action="store_true", help="full fp32 matrix products on the GPU")
    add("--official", type=Path, metavar="FOLDER", help="a checkout of Areache/Q-MambaIR to time as well")
    add("--breakdown", action="store_true", help="time by kernel, of the eager modes")
    add("--seconds", type=float, help="to time one mode (default 5; quick 0.5)")
    add("--threads", type=int, help="CPU threads")
    add("--out", type=Path, metavar="FILE.json", help="write the results there as JSON")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest" if options.no_tf32 else "high")
    torch.backends.cudnn.allow_tf32 = not options.no_tf32
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    modes = all_modes(device, options.bf16, options.official)
    if options.list:
        print(*modes, sep="\n")
        return 0
    rows: list[dict[str, Any]] = []
    try:
        if options.official:
            architecture_file(options.official)
        chosen = select(modes, options.mode, options.quick)
        report = {
            **heading(device),
            "tf32": device.type == "cuda" and not options.no_tf32,
            "scans": {name: why or "here" for name, why in explain(device, torch.float32, 16)},
            "rows": rows,
        }
        print(
            f"{report['hardware']}, torch {report['torch']}, TF32 {'on' if report['tf32'] else 'off'}\n{HEAD}"
        )
        for name in options.case or (QUICK if options.quick else CASES[device.type]):
            case = Case(name, device)
            done: dict[str, dict[str, Any]] = {}
            for mode in chosen:
                seconds = options.seconds or (0.5 if options.quick else 5.0)
                row = done[mode.name] = run(mode, case, modes, seconds, options.breakdown)
                compare(row, done.get(mode.baseline))
                rows.append(row)
                print(line(row), flush=True)
                for kernel in row.get("breakdown", {}).get("kernels", ()):
                    print(f"    {kernel['ms']:10.3f} ms {kernel['calls']:8.1f} calls  {kernel['name']}")
                if options.out:
                    write(options.out, report)
            del case
    except SsmquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ours = [row for row in rows if modes[row["mode"]].ours]
    return 0 if all(row["gate"]["passed"] for row in ours) else 1


if __name__ == "__main__":
    raise SystemExit(main())
