"""Compare quantization methods: the same float start, patches, steps and seeds; scores of the models loaded back.

    python examples/compare.py 2,4:lsq,official,ours --init examples/weights/mambair_light_x2_float.safetensors \
        --data PACK_OR_FOLDER --eval Set5 Set14 Kodak24 --out runs/compare
    python examples/compare.py 2,4:lsq,quantsr,n2uq,official,ours:0,1,2 8:lsq,ours:0,1,2 2:ours-*:0 ...

A grid is BITS:METHODS:SEEDS (seeds default to 0; methods may be patterns; --list names them). Every cell of it is
fine-tuned, converted to packed codes, saved, loaded back from the file and scored on clean pictures. The float model,
trained for the same number of steps more, is always among them: losses are measured from it. "searched" takes the
bits of a uniform model, which may be a fraction (2.5), and gives every site a width of its own.

Tasks: sr (scaled as the float model), denoise, jpeg; classify and segment: --data is an .npz file as classify.py and
segment.py have it, --init a model of theirs, scores are of the file's test part.

A cell that was interrupted goes on where it stopped, one that is trained is not trained again: sets that it
has no scores of are scored from its saved models. Other settings or training pictures make it another cell;
which folder the pictures are in does not matter. One that fails is noted and left out, until --retry or other
settings. --jobs N runs N processes at once, spread over all GPUs; several to a GPU fill it better. --time-limit
stops after so many seconds, for another run to go on. It writes OUT/compare.md, OUT/compare.json,
OUT/compare.png (crops) and OUT/sizes.png (scores over file sizes) from all cells that are finished; with
--report it does only that, and needs nothing but their result.json: without --eval for the sets that all of
them have, without --data for whatever pictures all of them were trained on.

It ends with 0 if all cells are finished, 1 if some are not, 3 if all others are but some failed, 2 on an
error.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import methods
import report
import torch
from cells import (
    Cell,
    Settings,
    failure,
    forget_failure,
    has_models,
    load_result,
    mark_failed,
    read_result,
    run_cell,
    score_cell,
)
from evalsets import EvalSet, fingerprint
from problems import problem_of

from ssmquant.errors import ConfigError, SsmquantError
from ssmquant.io import load_float

ROOT = Path(__file__).parent
SPARE = 30.0
"""Seconds before the time limit when no further cell is begun: conversion and scores take that long."""


def grid(specs: Sequence[str]) -> list[Cell]:
    """The cells of BITS:METHODS[:SEEDS] and those of the float model, lowest seeds first.

    Raises:
        ConfigError: a specification cannot be read.
    """
    cells: dict[Cell, None] = {}
    known = [*methods.METHODS, *methods.ABLATIONS]
    for spec in specs:
        parts = spec.split(":")
        try:
            widths, names = [float(b) for b in parts[0].split(",")], parts[1].split(",")
            bits = [int(b) if b == int(b) else b for b in widths]
            seeds = [int(s) for s in parts[2].split(",")] if len(parts) > 2 else [0]
        except (ValueError, IndexError, OverflowError):
            raise ConfigError(f"{spec!r}: expected BITS:METHODS:SEEDS, such as 2,4:lsq,ours:0,1") from None
        for name in names:
            found = [m for m in known if fnmatch.fnmatchcase(m, name) and m != "float"]
            if not found and name != "float":
                raise ConfigError(f"no method {name!r}; there are {', '.join(known)}")
            cells |= {Cell("float", None, s): None for s in seeds}
            cells |= {Cell(m, b, s): None for s in seeds for b in bits for m in found}
    for cell in cells:
        cell.config()  # bit widths out of range show here
    return sorted(cells, key=lambda c: c.seed)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may work in ``folder``: no other one does."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: one process at a time
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def work(
    cells: Sequence[Cell],
    settings: Settings,
    sets: Sequence[EvalSet],
    args: argparse.Namespace,
    deadline: float | None,
) -> None:
    """Run what is neither finished nor failed; what runs out of GPU memory is left unfinished."""
    out: Path = args.out / "cells"
    end = None if deadline is None else deadline - SPARE

    def done(cell: Cell) -> bool:
        if read_result(cell, settings, out, sets) is not None:
            return True
        return failure(cell, settings, out, {one.name: one.sha256 for one in sets}) is not None

    for one in sets:  # pictures that cannot be read or scored show before any training
        settings.problem.check(one)
    data = None

    def run(cell: Cell) -> None:
        nonlocal data
        result = load_result(cell, settings, out)
        if result is not None and not has_models(cell, result, out):
            return  # the report says so
        if result is None and data is None:
            data = settings.problem.load(args.data, args.device, settings.patch)
            settings.problem.check_model(load_float(settings.init).to(args.device), data)
        began = time.monotonic()
        try:
            if result is None:
                assert data is not None
                if not run_cell(cell, settings, data, out, end):
                    return
            score_cell(cell, settings, sets, out, args.device)
        except SsmquantError as error:
            mark_failed(cell, settings, out, sets, error)
            print(f"{cell.name} failed: {error}", file=sys.stderr, flush=True)
            return
        found = read_result(cell, settings, out, sets)
        assert found is not None
        metric, seconds = settings.problem.metric, time.monotonic() - began
        score = metric.show(report.mean_score(found["images"], metric.key), 1)
        print(f"{cell.name}: {score} {metric.unit}, {seconds:.0f} s", file=sys.stderr, flush=True)

    for cell in cells:
        if end is not None and time.monotonic() > end:
            return
        if done(cell):
            continue
        with claimed(out / cell.name) as mine:
            if not mine or done(cell):
                continue
            try:
                run(cell)
            except torch.OutOfMemoryError:  # no fault of the cell's if other processes have the memory
                advice = "with fewer --jobs or a smaller --batch it needs less"
                print(f"{cell.name}: out of GPU memory; {advice}", file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # for other processes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("grid", nargs="*", default=["2,4:lsq,official,ours"], metavar="BITS:METHODS:SEEDS")
    add("--list", action="store_true", help="name the methods and stop")
    add("--report", action="store_true", help="train nothing, write the tables of what is finished")
    add("--task", choices=("sr", "denoise", "jpeg", "classify", "segment"), default="sr")
    add("--sigma", type=float, default=25.0, help="of the noise, of 255 (default 25)")
    add("--quality", type=int, default=40, help="of the JPEG files (default 40)")
    add(
        "--init",
        type=Path,
        default=ROOT / "weights" / "mambair_light_x2_float.safetensors",
        help="float model (default: MambaIR-light x2)",
    )
    add("--data", help="training pictures: a folder or an .npz pack, of labelled ones an .npz file")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=16)
    add("--patch", type=int, default=48, help="side of the input patches (default 48)")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=50, help="steps of linear warm-up")
    add("--calibration", type=int, default=4, metavar="BATCHES")
    add(
        "--eval",
        nargs="+",
        metavar="FOLDER",
        help="test pictures (default: the photographs here, or the file's test part)",
    )
    add("--out", type=Path, default=Path("runs/compare"))
    add("--jobs", type=int, default=1, help="processes at once")
    add("--time-limit", type=float, metavar="SECONDS")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads of a process")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add("--retry", action="store_true", help="try the cells that failed again, from the start")
    # One of --jobs, and when (time.time) the first one, which reports, began.
    add("--worker", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def deadline_of(args: argparse.Namespace) -> float | None:
    """The time limit as a time of ``time.monotonic``; that of a helper is the first process's."""
    if args.time_limit is None:
        return None
    late = 0.0 if args.worker is None else time.time() - args.worker
    limit: float = args.time_limit
    return time.monotonic() + limit - late


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    deadline = deadline_of(args)
    began = time.time()
    if args.list:
        for m in (*methods.METHODS.values(), *methods.ABLATIONS.values()):
            print(f"{m.name:22} {m.label}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        problem = problem_of(args.task, args.init, args.sigma, args.quality)
        cells = grid(args.grid)
        settings = Settings(
            problem, args.init, args.steps, args.batch, args.patch, args.lr, args.warmup, args.calibration,
            args.bf16, data=None if args.data is None else fingerprint(args.data),
        )  # fmt: skip
        sets = None
        if args.eval or not args.report:
            sets = problem.sets(args.eval or [], args.data)
        if not args.report:
            assert sets is not None
            if args.data is None:
                raise ConfigError("--data: training pictures are needed, a folder or an .npz pack")
            if args.retry and args.worker is None:
                for cell in cells:
                    forget_failure(cell, args.out / "cells")
            helpers = _start(argv, args, began) if args.jobs > 1 else []
            try:
                work(cells, settings, sets, args, deadline)
            finally:
                for process in helpers:
                    process.wait()
            if helpers:  # cells that had no memory beside others, or whose process died
                work(cells, settings, sets, args, deadline)
            if args.worker is not None:
                return 0
        left, failed = report.write(cells, settings, args.out, sets)
    except (SsmquantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"{failed} of {len(cells)} cells failed; --retry tries them again", file=sys.stderr)
    if left:
        print(f"{left} of {len(cells)} cells are not finished; run the same command again", file=sys.stderr)
    return 1 if left else 3 if failed else 0


def _start(argv: list[str] | None, args: argparse.Namespace, began: float) -> list[subprocess.Popen[bytes]]:
    """Further processes for the same cells, on one GPU after the other; this one has the first."""
    own = list(sys.argv[1:] if argv is None else argv)
    own += ["--jobs", "1", "--worker", str(began)]
    command = [sys.executable, os.fspath(Path(__file__).resolve()), *own]
    places = environments(args.device)
    return [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, env=places[i % len(places)])
        for i in range(1, args.jobs)
    ]


def environments(device: str) -> list[dict[str, str]]:
    """The environments of processes that see one GPU each, or this process's where there are not several.

    A process that sees one GPU only needs not care which it is.
    """
    here = dict(os.environ)
    if device != "cuda" or torch.cuda.device_count() < 2:
        return [here]
    seen = [one for one in here.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    names = seen or [str(i) for i in range(torch.cuda.device_count())]
    return [{**here, "CUDA_VISIBLE_DEVICES": name} for name in names]


if __name__ == "__main__":
    sys.exit(main())
