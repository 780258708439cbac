"""The tables of docs/accuracy.md: the float models that they start from, then compare.py for each; resumable.

    python examples/accuracy.py sr_x4 denoise_* jpeg_* --data PACK --eval Set5 Set14 Kodak24 --out runs/accuracy
    python examples/accuracy.py vim vmamba --digits digits5000.npz --out runs/accuracy
    python examples/accuracy.py --list

A table has a folder in OUT: float/ with the model that it starts from, where none comes with the examples, and what
compare.py writes. What is finished is not done again; --time-limit stops after so many seconds, or when a float model
of labelled pictures, which cannot stop on its way, is trained; the same command goes on. --at-once N does N tables at
once, each on one GPU (a single table has all of them), with --jobs processes. With --report nothing is trained. The end
is OUT/accuracy.md: a line for every bit width of all tables in OUT, the scores below the float model's.

It ends with 0 if all tables that were asked for are complete, 1 if some are not, 3 if all others are but cells of some
failed, 2 on an error.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from common import read_json
from compare import claimed, environments
from methods import METHODS
from problems import Metric, metrics_of
from report import difference, markdown
from training import reporter

from ssmquant.errors import ConfigError

ROOT = Path(__file__).parent
LIGHT = ROOT / "weights" / "mambair_light_x2_float.safetensors"
X4 = ROOT / "weights" / "mambair_light_x4_float.safetensors"
_BODY = ("--model", "light", "--body", str(LIGHT))
_HOW = ("--batch", "16", "--ema", "0.998", "--cuda-graph")
_LONG = ("--steps", "2500", "--lr", "8e-4", "--warmup", "200")
SPARE = 30.0
"""Seconds before the time limit when no training of a float model is begun: its scores take that long."""
GRID = ("2,4:lsq,official,ours:0",)


@dataclass(frozen=True)
class Table:
    """What compare.py compares.

    ``init``: the float model. ``script`` and ``train`` make it otherwise; ``after`` is the table whose float model
    that training starts from. ``labelled``: the option that names its .npz file of labelled pictures. ``ours``: the
    method that the overview has as ours.
    """

    title: str
    grid: tuple[str, ...]
    compare: tuple[str, ...]
    init: Path | None = None
    script: str = "train_restore.py"
    train: tuple[str, ...] = ()
    after: str | None = None
    labelled: str | None = None
    ours: str = "ours"


def _restoration(
    task: tuple[str, ...], title: str, after: str | None, schedule: tuple[str, ...] = _LONG
) -> Table:
    body = _BODY if after is None else ()
    train = (*task, *schedule, *body, *_HOW)
    return Table(title, GRID, (*task, "--steps", "400"), train=train, after=after)


def _denoise(sigma: str, after: str | None = None) -> Table:
    # Another strength of noise moves a model far: trained for 1,000 steps it is not done, and then what is trained to
    # give its output ends below what learns from the pictures.
    return _restoration(("--task", "denoise", "--sigma", sigma), f"Gaussian noise, sigma {sigma}", after)


def _jpeg(quality: str, after: str | None = None) -> Table:
    schedule = _LONG if after is None else ("--steps", "1000", "--lr", "4e-4")
    return _restoration(
        ("--task", "jpeg", "--quality", quality), f"JPEG artifacts, quality {quality}", after, schedule
    )


TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "sr_x2": Table("super-resolution x2", ("2,4:lsq,quantsr,n2uq,official,ours:0",), (), LIGHT),
        "sr_x4": Table("super-resolution x4", GRID, (), X4),
        "classic_x2": Table(  # of the published width, with 4 blocks of its 36
            "classic x2, 4 blocks",
            ("2,4:lsq,official,ours-rate-1:0",),
            ("--steps", "400", "--lr", "4e-4"),  # what it was trained at; ours diverges at 4e-3
            train=(
                *("--model", "classic", "--depths", "2", "2"),
                *("--steps", "2500", "--lr", "4e-4", "--warmup", "200", *_HOW),
            ),
            ours="ours-rate-1",
        ),
        "mixed_x2": Table(
            "x2, mixed precision", ("2,3:ours:0", "2.5,3:searched:0", "2:ours-transforms:0"), (), LIGHT
        ),
        "denoise_25": _denoise("25"),
        "denoise_15": _denoise("15", "denoise_25"),
        "denoise_50": _denoise("50", "denoise_25"),
        "jpeg_40": _jpeg("40"),
        "jpeg_30": _jpeg("30", "jpeg_40"),
        "jpeg_10": _jpeg("10", "jpeg_40"),
        **{
            name: Table(
                f"digits, {title}",
                ("8,4,2:lsq,ours,ours-no-distill:0,1,2", "8,4,2:mambaquant:0"),
                ("--task", "classify", "--batch", "64", "--steps", "600", "--lr", "5e-4"),
                script="classify.py",
                train=("--model", name),
                labelled="digits",
            )
            for name, title in (("vim", "Vim"), ("vmamba", "VMamba"))
        },
        "vmunet": Table(
            "slices, VM-UNet",
            ("8,4,2:lsq,ours,ours-no-distill:0,1,2", "8,4,2:mambaquant:0"),
            ("--task", "segment", "--batch", "16", "--patch", "96", "--steps", "1000"),
            script="segment.py",
            train=("--model", "vmunet", "--steps", "4000"),
            labelled="slices",
        ),
    }
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("tables", nargs="*", default=["*"], metavar="TABLE", help="names or patterns (default: all)")
    add("--list", action="store_true", help="name the tables and stop")
    add("--report", action="store_true", help="train nothing, write the tables of what is finished")
    add("--floats", action="store_true", help="train the float models only")
    add("--data", help="training pictures of restoration: a folder or an .npz pack")
    add("--digits", metavar="FILE.npz", help="of classify.py: pictures x and classes y")
    add("--slices", metavar="FILE.npz", help="of segment.py: slices x and classes of their pixels y")
    add("--eval", nargs="+", default=[], metavar="FOLDER", help="clean test pictures of restoration")
    add("--out", type=Path, default=Path("runs/accuracy"))
    add("--at-once", type=int, default=1, metavar="N", help="tables at once")
    add("--jobs", type=int, default=1, help="processes at once, of a table")
    add("--time-limit", type=float, metavar="SECONDS")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


class Run:
    """The commands of the tables, in order; each waits for the float model that it starts from."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        places = environments(args.device) if args.at_once > 1 else [dict(os.environ)]
        self.free = [places[i % len(places)] for i in range(args.at_once)]
        self.locks = {name: threading.Lock() for name in TABLES}
        self.failed: set[str] = set()  # float models

    def left(self) -> float | None:
        limit = self.args.time_limit
        return None if limit is None else limit - (time.monotonic() - self.began)

    def floats(self, name: str) -> Path:
        """Where a table's float model is, or will be."""
        return TABLES[name].init or self.args.out / name / "float" / "model.safetensors"

    def data(self, table: Table) -> str | None:
        path: str | None = getattr(self.args, table.labelled or "data")
        return path

    def train(self, name: str, place: Mapping[str, str]) -> int:
        """Trains the float model of a table if need be: 0 if it is there, 1 if it is not yet, 2 on an error."""
        table, target = TABLES[name], self.floats(name)
        if table.init is not None:
            return 0
        with self.locks[name]:
            if _finished(table, target):
                return 0
            before = 0 if table.after is None else self.train(table.after, place)
            if before or name in self.failed:
                return before or 2
            target.parent.mkdir(parents=True, exist_ok=True)
            with claimed(target.parent) as mine:  # by no other run with this folder
                left = self.left()
                if mine and _finished(table, target):
                    return 0
                if not mine or (left is not None and left < SPARE):
                    return 1
                if self.call(self.training(table, target, left), name, place):
                    self.failed.add(name)
                    return 2
            return 0 if _finished(table, target) else 1

    def training(self, table: Table, target: Path, left: float | None) -> list[Any]:
        """The command that writes the float model ``target``, in ``left`` seconds if it can stop before its end."""
        args = self.args
        command: list[Any] = [table.script, *table.train, "--data", self.data(table), "--device", args.device]
        if table.labelled:
            return [*command, "--out", target]
        command += ["--out", target.parent, "--resume", "--eval", *args.eval]
        command += [] if table.after is None else ["--init", self.floats(table.after)]
        return command + ([] if left is None else ["--time-limit", left - SPARE])

    def table(self, name: str) -> int:
        """The exit status of a table's comparison."""
        place = self.free.pop(0)
        try:
            return self.compare(name, place)
        finally:
            self.free.append(place)

    def compare(self, name: str, place: Mapping[str, str]) -> int:
        """``table`` in an environment."""
        table, args = TABLES[name], self.args
        status = 0 if args.report else self.train(name, place)
        if status:
            return status
        if args.floats:
            return 0
        if not self.floats(name).exists():
            return 1
        command = [
            "compare.py",
            *table.grid,
            *table.compare,
            "--init",
            self.floats(name),
            "--out",
            args.out / name,
        ]
        data = self.data(table)
        command += [] if data is None else ["--data", data]
        command += ["--eval", *args.eval] if args.eval and not table.labelled else []
        if args.report:
            command += ["--report"]
        else:
            command += ["--jobs", args.jobs, "--device", args.device]
            left = self.left()
            if left is not None:
                command += ["--time-limit", max(left, 0.0)]
        return self.call(command, name, place)

    def call(self, command: Sequence[Any], name: str, place: Mapping[str, str]) -> int:
        log = self.args.out / name / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        script, *rest = map(str, command)
        with open(log, "a", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, os.fspath(ROOT / script), *rest],
                env=place,
                stdout=file,
                stderr=file,
                check=False,
            )
        if done.returncode not in ((0, 1) if script == "compare.py" else (0,)):  # 1: not complete
            print(f"{name}: {script} failed, see {log}", file=sys.stderr)
        return done.returncode


def _finished(table: Table, model: Path) -> bool:
    """Whether a float model is trained: some are written whole only, others come with what train_restore.py says."""
    if table.labelled or not model.exists():
        return model.exists()
    found = read_json(model.parent / "metrics.json")
    return bool(found.get("finished"))


def overview(names: Sequence[str], out: Path) -> list[str]:
    """A Markdown table for each metric: every table and bit width of it in a line, methods in columns."""
    found = {name: read_json(out / name / "compare.json") for name in names}
    shown = {name: one for name, one in found.items() if one.get("rows")}
    lines: list[str] = []
    kinds = {name: metrics_of(one["settings"]["task"]["kind"])[0] for name, one in shown.items()}
    for metric in dict.fromkeys(kinds.values()):
        own = [name for name, kind in kinds.items() if kind == metric]
        rows = {n: [_named(r, TABLES[n].ours) for r in shown[n]["rows"]] for n in own}
        there = {r["method"] for n in own for r in rows[n]}
        order = [m for m in METHODS if m in there and m != "float"]
        unit = f", {metric.unit}" if metric.unit else ""
        lines += ["", f"Mean {metric.label}{unit}; in brackets below the float model, trained as long:", ""]
        lines += markdown(
            ["", "bits", "float", *(METHODS[m].label for m in order), "ours against"],
            [line for name in own for line in _lines(TABLES[name].title, rows[name], order, metric)],
        )
    return lines


def _named(row: Mapping[str, Any], ours: str) -> dict[str, Any]:
    """A row of a comparison, as "ours" if it is of that method."""
    return {**row, "method": "ours" if row["method"] == ours else row["method"]}


def _lines(
    title: str, rows: Sequence[Mapping[str, Any]], order: Sequence[str], metric: Metric
) -> list[list[str]]:
    by = {(r["method"], r["bits"]): r for r in rows}

    def shown(method: str, bits: float | None, figure: str = "score") -> str:
        value = by.get((method, bits), {}).get(figure)
        return "" if value is None else metric.show(value, 1)

    lines = []
    for bits in sorted({b for _, b in by if b is not None}, reverse=True):
        line = [title, f"{bits:g}", shown("float", None)]
        for method in order:
            loss = shown(method, bits, "loss")
            line.append(shown(method, bits) + (f" ({loss})" if loss else ""))
        line.append(difference(by.get(("ours", bits), {}).get("against"), metric))
        lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.list:
        for name, table in TABLES.items():
            print(f"{name:14} {table.title}")
        return 0
    names = [name for name in TABLES if any(fnmatch.fnmatchcase(name, t) for t in args.tables)]
    try:
        strange = [t for t in args.tables if not any(fnmatch.fnmatchcase(name, t) for name in TABLES)]
        if strange:
            raise ConfigError(f"no table {strange[0]!r}; there are {', '.join(TABLES)}")
        for name in names:
            option = TABLES[name].labelled or "data"
            if getattr(args, option) is None and not args.report:
                raise ConfigError(f"--{option} is needed for {name}")
        if args.at_once < 1 or args.jobs < 1:
            raise ConfigError("--at-once and --jobs are 1 or more")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = Run(args)
    with ThreadPoolExecutor(args.at_once) as pool, reporter("tables", len(names)) as report:
        jobs = {pool.submit(run.table, name): name for name in names}
        states = []
        for job in as_completed(jobs):
            states.append(job.result())
            report(len(states), jobs[job])
    lines = overview(list(TABLES), args.out)
    if lines:
        (args.out / "accuracy.md").write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")
        print("\n".join(lines))
    unfinished = sum(state == 1 for state in states)
    if unfinished:
        print(
            f"{unfinished} of {len(names)} tables are not complete; run the same command again",
            file=sys.stderr,
        )
    if any(state not in (0, 1, 3) for state in states):
        return 2
    return 1 if unfinished else max(states)


if __name__ == "__main__":
    sys.exit(main())
