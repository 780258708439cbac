"""Compare quantization methods: the same float start, patches, steps and seeds; scores of the models loaded back.

    python examples/compare.py 2,4:lsq,official,ours --init examples/weights/mambair_light_x2_float.safetensors \
        --data PACK_OR_FOLDER --eval Set5 Set14 Kodak24 --out runs/compare
    python examples/compare.py 2,4:lsq,quantsr,n2uq,official,ours:0,1,2 8:lsq,ours:0,1,2 2:ours-*:0 ...

A grid is BITS:METHODS:SEEDS (seeds default to 0; methods may be patterns; --list names them). Every cell of it is
fine-tuned, converted to packed codes, saved, loaded back from the file and scored on clean pictures. The float model,
trained for the same number of steps more, is always among them: losses are measured from it.

A cell that was interrupted goes on where it stopped, one that is finished is not run again; --jobs N runs N processes
at once, which fills a GPU better. --time-limit stops after so many seconds, for another run to go on. It writes
OUT/compare.md, OUT/compare.json and OUT/compare.png from all cells that are finished; with --report it does only that.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import common
import methods
import report
import torch
from cells import Cell, Settings, read_result, run_cell
from patches import PatchData

from ssmquant.errors import ConfigError, SsmquantError
from ssmquant.io import load_float
from ssmquant.restore import Task, model_scale

ROOT = Path(__file__).parent
SPARE = (
    30.0  # seconds before the time limit when no further cell is begun: conversion and scores take that long
)


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
            bits, names = [int(b) for b in parts[0].split(",")], parts[1].split(",")
            seeds = [int(s) for s in parts[2].split(",")] if len(parts) > 2 else [0]
        except (ValueError, IndexError):
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


def work(cells: Sequence[Cell], settings: Settings, args: argparse.Namespace, deadline: float | None) -> None:
    """Run what is not finished."""
    sets = {Path(f).name: common.read_folder(f) for f in args.eval}
    data = None
    for cell in cells:
        if deadline is not None and time.monotonic() > deadline - SPARE:
            return
        if read_result(cell, settings, args.out / "cells") is not None:
            continue
        with claimed(args.out / "cells" / cell.name) as mine:
            if not mine or read_result(cell, settings, args.out / "cells") is not None:
                continue
            if data is None:
                data = PatchData.load(args.data, settings.task, device=args.device, patch=settings.patch)
            end = None if deadline is None else deadline - SPARE
            if run_cell(cell, settings, data, sets, args.out / "cells", end):
                result = read_result(cell, settings, args.out / "cells")
                assert result is not None
                psnr = report.mean_psnr(result["images"])
                print(f"{cell.name}: {psnr:.3f} dB, {result['seconds']:.0f} s", file=sys.stderr, flush=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("grid", nargs="*", default=["2,4:lsq,official,ours"], metavar="BITS:METHODS:SEEDS")
    add("--list", action="store_true", help="name the methods and stop")
    add("--report", action="store_true", help="train nothing, write the tables of what is finished")
    add("--task", choices=("sr", "denoise", "jpeg"), default="sr")
    add("--sigma", type=float, default=25.0, help="of the noise, of 255 (default 25)")
    add("--quality", type=int, default=40, help="of the JPEG files (default 40)")
    add(
        "--init",
        type=Path,
        default=ROOT / "weights" / "mambair_light_x2_float.safetensors",
        help="float model",
    )
    add("--data", help="training pictures: a folder or an .npz pack")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=16)
    add("--patch", type=int, default=48, help="side of the input patches (default 48)")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=50, help="steps of linear warm-up")
    add("--calibration", type=int, default=4, metavar="BATCHES")
    add("--eval", nargs="+", default=[str(ROOT / "photos")], metavar="FOLDER", help="clean test pictures")
    add("--out", type=Path, default=Path("runs/compare"))
    add("--jobs", type=int, default=1, help="processes at once")
    add("--time-limit", type=float, metavar="SECONDS")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads of a process")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add("--worker", action="store_true", help=argparse.SUPPRESS)  # one of --jobs: the first one reports
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    if args.list:
        for m in (*methods.METHODS.values(), *methods.ABLATIONS.values()):
            print(f"{m.name:22} {m.label}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        scale = model_scale(load_float(args.init))
        task = Task(args.task, scale, args.sigma, args.quality)
        settings = Settings(
            task, args.init, args.steps, args.batch, args.patch, args.lr, args.warmup, args.calibration, args.bf16
        )  # fmt: skip
        cells = grid(args.grid)
        if not args.report:
            if args.data is None:
                raise ConfigError("--data: training pictures are needed, a folder or an .npz pack")
            helpers = _start(argv, args) if args.jobs > 1 else []
            work(cells, settings, args, deadline)
            for process in helpers:
                process.wait()
            if args.worker:
                return 0
        left = report.write(cells, settings, args.out, args.eval)
    except (SsmquantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if left:
        print(f"{left} of {len(cells)} cells are not finished; run the same command again", file=sys.stderr)
    return 1 if left else 0


def _start(argv: list[str] | None, args: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Further processes for the same cells."""
    own = list(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, os.fspath(Path(__file__).resolve()), *own, "--jobs", "1", "--worker"]
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(args.jobs - 1)]


if __name__ == "__main__":
    sys.exit(main())
