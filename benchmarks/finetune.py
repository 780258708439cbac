"""Do fused kernels change what a fine-tuning ends at? Runs with them on and off, beside the spread of plain runs.

    python benchmarks/finetune.py --out finetune.json            # 300 steps of each run; a GPU does it in minutes
    python benchmarks/finetune.py --quick                        # a few steps, for a look

A case is MODEL/wBaB: the shipped float MambaIR-tiny x2, fine-tuned at so many bits (RFA, DLS, LSQ as published). All
runs of a case start from the same weights and calibration and see the same patches in the same order. Three, plain_0 to
plain_2, with all kernels of quantizers and graphs off, differ in the order of sums only: the samples of every batch are
rolled by 0, 1 and 2 places, which a mean over the batch does not see but its rounding does. "fused" has the kernels on.

Quantization amplifies rounding (a value beside a tie takes another code), so that runs drift apart. The gate: "fused"
ends no further from the plain runs' mean than their range, PSNR and loss each.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import heading, write
from PIL import Image
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.errors import ConfigError, SsmquantError
from ssmquant.io import load_float
from ssmquant.ops import use_backend
from ssmquant.restore import Task, evaluate, open_image

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from patches import PatchData
from training import Recipe, fit

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CASES = ("mambair_tiny_x2/w4a4", "mambair_tiny_x2/w2a2")
EVALUATED = ("astronaut.png", "chelsea.png", "coffee.png", "life_by_Aitzol_Berasategi.png")
TASK = Task("sr", 2)
RUNS = ("plain_0", "plain_1", "plain_2", "fused")


class Rolled:
    """The batches of ``data`` with their samples rolled by so many places."""

    def __init__(self, data: PatchData, places: int) -> None:
        self.data, self.places = data, places

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        x, y = self.data.sample(batch)
        return x.roll(self.places, 0), y.roll(self.places, 0)

    def state(self) -> dict[str, Tensor]:
        return self.data.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.data.load_state(state)


def photographs(side: int | None) -> tuple[list[tuple[str, Image.Image]], list[tuple[str, Image.Image]]]:
    """Those to train on, and the middles of those to score on."""
    train, test = [], []
    for path in sorted((EXAMPLES / "photos").glob("*.png")):
        image = open_image(path).convert("RGB")
        if path.name not in EVALUATED:
            train.append((path.name, image))
            continue
        if side is not None:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        test.append((path.name, image))
    return train, test


def prepared(case: str, data: PatchData, batch: int, device: torch.device) -> nn.Module:
    found = re.fullmatch(r"mambair_tiny_x2/w([2-8])a([2-8])", case)
    if found is None:
        raise ConfigError(f"{case!r}: expected mambair_tiny_x2/wBaB")
    config = QConfig(w_bits=int(found[1]), a_bits=int(found[2]))
    model = load_float(EXAMPLES / "weights" / "mambair_tiny_x2_float.safetensors").to(device)
    data.seed(0)
    batches = list(data.batches(4, batch))
    made: nn.Module = ssmquant.prepare(model, config, example_inputs=(batches[0],))
    return ssmquant.calibrate(made, batches, progress=False)


def run(
    case: str, name: str, data: PatchData, test: Sequence[tuple[str, Image.Image]], recipe: Recipe
) -> dict[str, Any]:
    """The row of one run; the seconds include everything but the preparation."""
    device = data.device
    model = prepared(case, data, recipe.batch, device)
    data.seed(1)
    plain = name.startswith("plain")
    batches = Rolled(data, int(name[-1])) if plain else data
    with contextlib.ExitStack() as stack:
        if plain:
            stack.enter_context(use_backend("chunked", op="quantize"))
            stack.enter_context(use_backend("chunked", op="fuse"))
        start = time.perf_counter()
        groups = list(ssmquant.param_groups(model, recipe.lr, 0.0, recipe.lr))
        result = fit(model, batches, recipe, groups=groups, title=f"{case} {name}")
        seconds = time.perf_counter() - start
        rows = evaluate(model, test, TASK)
    last = [loss for _, loss in result.losses[-3:]]
    return {
        "case": case, "mode": name, "steps": result.step, "loss": statistics.fmean(last),
        "psnr": statistics.fmean(r["psnr"] for r in rows), "seconds": seconds,
    }  # fmt: skip


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far the fused run is from the mean of the plain ones, against their range; for PSNR and loss."""
    *plain, fused = rows
    gate: dict[str, Any] = {}
    for key in ("psnr", "loss"):
        values = [row[key] for row in plain]
        spread, apart = max(values) - min(values), abs(fused[key] - statistics.fmean(values))
        gate[key] = {"spread": spread, "apart": apart}
    gate["passed"] = all(gate[key]["apart"] <= gate[key]["spread"] for key in ("psnr", "loss"))
    return gate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", metavar="NAME", help="mambair_tiny_x2/wBaB, repeatable")
    add("--steps", type=int, default=300)
    add("--quick", action="store_true", help="two steps and small crops: the numbers mean nothing")
    add("--out", type=Path, metavar="FILE.json", help="write the results there as JSON")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    steps = 2 if options.quick else options.steps
    recipe = Recipe(
        steps=steps, batch=2 if options.quick else 16, lr=1e-3, warmup=min(20, steps), log_every=min(10, steps),
        cuda_graph=gpu,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    report = {**heading(device), "recipe": {"batch": recipe.batch, "lr": recipe.lr}, "rows": rows}
    passed = True
    try:
        train, test = photographs(32 if options.quick else 256)
        data = PatchData(train, TASK, seed=0, patch=16 if options.quick else 32, device=device)
        for case in options.case or CASES:
            own: list[dict[str, Any]] = []
            for name in RUNS:
                own.append(run(case, name, data, test, recipe))
                rows.append(own[-1])
                row = own[-1]
                print(
                    f"{case:22} {name:8} {row['psnr']:8.3f} dB  loss {row['loss']:.6f}  {row['seconds']:7.1f} s",
                    flush=True,
                )
                if name == RUNS[-1]:
                    row["gate"] = judge(own)
                    passed = passed and row["gate"]["passed"]
                    for key in ("psnr", "loss"):
                        found = row["gate"][key]
                        print(f"    {key}: {found['apart']:.2g} apart, spread {found['spread']:.2g}")
                if options.out:
                    write(options.out, report)
    except SsmquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if passed or options.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
