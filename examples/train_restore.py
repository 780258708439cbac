r"""Train a MambaIR model for super-resolution, denoising or JPEG artifacts, or fine-tune it with any quantizer.

A float model, then a 4-bit one that starts from it:

    python examples/train_restore.py --task sr --scale 2 --model tiny --data PACK_OR_FOLDER --out runs/float
    python examples/train_restore.py --data PACK_OR_FOLDER --init runs/float/model.safetensors --quant dls_rfa \
        --w-bits 4 --a-bits 4 --steps 2000 --lr 2e-4 --out runs/w4a4

It writes OUT/model.safetensors (float, or deployed), OUT/checkpoint.pt (for --resume) and OUT/metrics.json; the scores
are those of the model loaded back from the file. --time-limit alone anneals the learning rate over that time; with
--steps it only stops (go on later with --resume).

A training step runs in one of three ways:

    eager        the default: every kernel is launched from Python
    compiled     --compile: torch.compile makes fewer, larger kernels of the model; the first step takes minutes
    graphed      --cuda-graph, on a GPU: after 5 eager steps the whole step (forward, backward, clipping, Adam, EMA) is
                 recorded once, and is one launch from then on; fastest where many small kernels wait for Python

Both options together record the compiled model's kernels. Results are the same up to rounding; benchmarks/train.py
times them. --bf16 goes with each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import common
import torch
from evalsets import set_names
from patches import PatchData
from torch import nn
from training import Recipe, Result, fit

import ssmquant
import ssmquant.zoo
from ssmquant.errors import ConfigError, SsmquantError
from ssmquant.io import load_float, save_float
from ssmquant.restore import Task, model_scale
from ssmquant.zoo import mambair

ROOT = Path(__file__).parent


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--task", choices=("sr", "denoise", "jpeg"), default="sr")
    add("--scale", type=int, default=2, help="of super-resolution (default 2)")
    add("--sigma", type=float, default=25.0, help="of the noise, of 255 (default 25)")
    add("--quality", type=int, default=40, help="of the JPEG files (default 40)")
    add(
        "--model",
        choices=("tiny", "light", "classic"),
        default="tiny",
        help="new model, unless --init gives one",
    )
    add(
        "--depths",
        type=int,
        nargs="+",
        metavar="N",
        help="blocks of each group of a new model (default: as published)",
    )
    add("--data", required=True, help="training pictures: a folder or an .npz pack")
    add("--steps", type=int, help="optimiser steps (default: 1000, or as many as fit --time-limit)")
    add("--time-limit", type=float, metavar="SECONDS", help="of training, without evaluation")
    add("--batch", type=int, default=16)
    add("--patch", type=int, default=48, help="side of the input patches (default 48)")
    add("--lr", type=float, default=5e-4)
    add("--lr-quantizer", type=float, help="of the quantizers' own scalars (default: lr)")
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--loss", choices=("l1", "charbonnier"), default="l1")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of a new model (default 0)")
    add("--ema", type=float, help="decay of averaged weights, such as 0.999")
    add("--quant", choices=("none", *common.SCHEMES), default="none")
    add("--w-bits", type=int, default=4)
    add("--a-bits", type=int, default=4)
    add("--calibration", type=int, default=8, metavar="BATCHES")
    add("--init", type=Path, metavar="FILE", help="float model (.safetensors) to start from")
    add(
        "--body",
        type=Path,
        metavar="FILE",
        help="float model of another scale to start all but the enlarging part from",
    )
    add("--out", type=Path, default=Path("runs/restore"))
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt if it is there")
    add("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    add("--log-every", type=int, default=50, metavar="STEPS")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add("--cuda-graph", action="store_true", help="graphed steps: one launch a step (GPU)")
    add("--compile", action="store_true", help="compiled steps: torch.compile the model")
    add("--no-tf32", action="store_true", help="full fp32 matrix products on the GPU")
    add("--eval", nargs="*", default=[str(ROOT / "photos")], metavar="FOLDER", help="clean test pictures")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, task: Task) -> nn.Module:
    """The float model to start from; its scale must fit the task."""
    if args.init is not None and args.body is not None:
        raise ConfigError("give --init or --body, not both")
    if args.init is None:
        config = getattr(mambair, f"mambair_{args.model}")(task.scale).zoo_config
        config["args"]["drop_path_rate"] = args.drop_path
        if args.depths:
            config["args"]["depths"] = args.depths
        if task.scale == 1:  # restores at the same size by a residual
            config["args"].update(upsampler="", is_light_sr=True)
        new: nn.Module = ssmquant.zoo.build(config)
        if args.body is not None:
            start_body(new, load_float(args.body))
        return new
    model: nn.Module = load_float(args.init)
    if model_scale(model) != task.scale:
        raise ConfigError(
            f"{args.init} enlarges {model_scale(model)} times, the task {task.scale} times: give --scale"
        )
    return model


def start_body(model: nn.Module, other: nn.Module) -> None:
    """Copy what ``other`` has of the same name and shape.

    Raises:
        ConfigError: that is less than half of ``model``.
    """
    own = model.state_dict()
    same = {k: v for k, v in other.state_dict().items() if k in own and own[k].shape == v.shape}
    if 2 * sum(v.numel() for v in same.values()) < sum(v.numel() for v in own.values()):
        raise ConfigError("--body: the model in that file is another one")
    model.load_state_dict(same, strict=False)


def train(args: argparse.Namespace, task: Task) -> tuple[nn.Module, float | None, Result, dict[str, Any]]:
    """Train and write OUT/model.safetensors: the model loaded back from it, worst deployed error, log, extra facts."""
    data = PatchData.load(args.data, task, device=args.device, seed=args.seed, patch=args.patch)
    print(f"{len(data)} training pictures, {len(data.skipped)} too small; {task}", file=sys.stderr)
    model = build(args, task).to(args.device)
    steps = args.steps if args.steps or args.time_limit else 1000
    recipe = Recipe(
        steps=steps, batch=args.batch, lr=args.lr, warmup=args.warmup, loss=args.loss, ema=args.ema, bf16=args.bf16,
        cuda_graph=args.cuda_graph, compile=args.compile, time_limit=args.time_limit, log_every=args.log_every,
        checkpoint=args.out / "checkpoint.pt", checkpoint_every=args.checkpoint_every,
    )  # fmt: skip
    path: Path = args.out / "model.safetensors"
    if args.quant == "none":
        trained = model
        if torch.device(args.device).type == "cuda":
            # Prepared without a quantizer: the same function, as a graph of our kernels (docs/training.md).
            example = torch.zeros(1, 3, args.patch, args.patch, device=args.device)
            trained = ssmquant.prepare(model, ssmquant.QConfig(), example_inputs=(example,))
        result = fit(trained, data, recipe, title="float", resume=args.resume)
        model.load_state_dict(trained.state_dict())
        save_float(model, path, half=True)
        return load_float(path).to(args.device), None, result, {"params": common.parameters(model)}
    config = common.qconfig(args.quant, args.w_bits, args.a_bits)
    prepared = common.quantize(model, config, data, recipe, calibration=args.calibration)
    data.seed(args.seed)
    rate = args.lr if args.lr_quantizer is None else args.lr_quantizer
    result = common.fine_tune(prepared, data, recipe, lr_quantizer=rate, title=args.quant, resume=args.resume)
    x = data.sample(2)[0]
    loaded, worst = common.deploy(prepared, x, path)
    return loaded, worst, result, {"params": common.parameters(model), "bitops": common.bitops(loaded)}


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest" if args.no_tf32 else "high")
    torch.backends.cudnn.allow_tf32 = not args.no_tf32
    clock = common.Clock()
    try:
        task = Task(args.task, args.scale, args.sigma, args.quality)
        names = set_names(args.eval)
        folders = [(name, common.read_folder(folder)) for name, folder in zip(names, args.eval, strict=True)]
        args.out.mkdir(parents=True, exist_ok=True)
        model, worst, result, facts = train(args, task)
        rows: list[dict[str, Any]] = []
        details: dict[str, Any] = {}
        for name, images in folders:
            plain, _ = common.score(None, images, task, f"{name}: input")
            mean, details[name] = common.score(model, images, task, name)
            rows.append(
                {
                    "set": name,
                    "images": len(images),
                    "input_psnr": plain["psnr"],
                    "input_ssim": plain["ssim"],
                    **mean,
                }
            )
    except (SsmquantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = (args.out / "model.safetensors").stat().st_size
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    device = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "cpu"
    common.write_json(
        {
            "options": options, "device": device, "torch": torch.__version__, "ssmquant": ssmquant.__version__,
            "steps": result.step, "finished": result.finished, "losses": result.losses,
            "train_seconds": result.earlier + result.seconds,
            "file_bytes": size, "verify_max_rel": worst, **facts, "sets": rows, "images": details, "seconds": clock(),
        },
        args.out / "metrics.json",
    )  # fmt: skip
    scheme = "float" if args.quant == "none" else f"{args.quant} W{args.w_bits}A{args.a_bits}"
    speed = (
        f"{result.step} steps in all, {result.seconds:.0f} s of training in this run, {size:,} bytes on disk"
    )
    if worst is not None:
        speed += f", deployed against prepared: worst relative error {worst:.1e}"
    print(f"{scheme}: {speed}")
    common.print_table(
        f"{args.task}, scores of the model loaded back from the file",
        ["set", "images", "input PSNR", "input SSIM", "PSNR", "SSIM"],
        [
            [
                r["set"],
                str(r["images"]),
                *(
                    f"{r[k]:.{d}f}"
                    for k, d in (("input_psnr", 2), ("input_ssim", 4), ("psnr", 2), ("ssim", 4))
                ),
            ]
            for r in rows
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
