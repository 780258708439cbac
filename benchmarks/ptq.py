"""Quantization without training: every method on the same float models, in one run.

    python benchmarks/ptq.py --digits digits5000.npz --set5 FOLDER [--case NAME ...] [--quick] [--out FILE.json]

Cases: ``vim_digits`` and ``vmamba_digits`` (examples/classify.py, trained here, once for each seed, or read from
``--models``), ``mambair_light_x2`` (the float weights that come with the examples; 16 crops of examples/photos for
calibration, PSNR of luma on ``--set5``), ``hf_mamba`` (Hugging Face's MambaForCausalLM, trained on the bytes of this
project's docs; needs transformers), ``qat_start`` (fine-tuning at W2A2, MambaIR-tiny x2 by ``QConfig.recommended``,
from a calibration with and without MambaQuant's transforms, on the photographs of the examples).

What is scored is the deployed model. Classifiers: accuracy on the test pictures, KL divergence from the float model's
classes and SQNR of the logits; the language model: the same of the next byte.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import heading, write
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.analysis.decibels import bounded
from ssmquant.io import load_float, save_float
from ssmquant.restore import evaluate, find_images, open_image
from ssmquant.restore.metrics import psnr
from ssmquant.restore.pictures import downscale, to_tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from classify import Pictures, accuracy, logits, train_float
from finetune import TASK, photographs
from patches import PatchData
from tables import print_table
from training import Recipe, fit

ROOT = Path(__file__).resolve().parents[1]


def _ranges(observer: str) -> Callable[[int, int], QConfig]:
    options = {"observer": observer}
    return lambda w, a: QConfig.minmax(w, a, activation_options=options, scan_options=options)


METHODS: dict[str, Callable[[int, int], QConfig]] = {
    "minmax": QConfig.minmax,
    "percentile": _ranges("percentile"),
    "mse": _ranges("mse"),
    "least_squares": lambda w, a: QConfig.minmax(
        w, a, weight="lsq"
    ),  # of weights; mambaquant has it below 8 bits
    "smoothquant": QConfig.smoothquant,
    "quarot": QConfig.quarot,  # Hadamard matrices alone
    "quarot_least_squares": lambda w, a: QConfig.quarot(w, a, weight="lsq"),
    "klt": lambda w, a: QConfig.quarot(w, a, rotation="klt_only"),
    "klt_hadamard": lambda w, a: QConfig.quarot(w, a, rotation="klt"),
    "ptq4vm": QConfig.ptq4vm,
    "ptq4vm_learnt": QConfig.ptq4vm,
    "mambaquant": QConfig.mambaquant,
    "mambaquant_gptq": lambda w, a: QConfig.mambaquant(w, a, rounding="gptq"),
}
LEARNT = 50  # steps of learn_ranges, of methods with _learnt
BITS = ((8, 8), (4, 8))

Row = dict[str, Any]


def deployed(
    model: nn.Module, method: str, bits: tuple[int, int], batches: list[Tensor]
) -> tuple[nn.Module, float]:
    """The converted model, and the seconds that calibration took."""
    prepared = ssmquant.prepare(model, METHODS[method](*bits), example_inputs=(batches[0],))
    start = time.perf_counter()
    ssmquant.calibrate(prepared, batches, progress=False)
    if method.endswith("_learnt"):
        ssmquant.learn_ranges(
            prepared, batches, model, steps=LEARNT, progress=False, forward=lambda m, x: first(m(x))
        )
    seconds = time.perf_counter() - start
    return ssmquant.convert(prepared), seconds


def first(out: Any) -> Tensor:
    """The tensor that counts of what a model returns."""
    return out if isinstance(out, Tensor) else out.logits


def classes(out: Tensor, reference: Tensor, labels: Tensor) -> Row:
    """Of logits (N, classes), against the float model's and the labels (N,)."""
    log, wanted = out.double().log_softmax(1), reference.double().log_softmax(1)
    return {
        "accuracy": accuracy(out, labels),
        "kl": float(F.kl_div(log, wanted, log_target=True, reduction="batchmean")),
        "sqnr_db": sqnr([out], [reference]),
    }


def sqnr(outs: list[Tensor], references: list[Tensor]) -> float:
    """Of all together, in dB."""
    pairs = [(o.double(), r.double()) for o, r in zip(outs, references, strict=True)]
    noise = sum(float((o - r).square().sum()) for o, r in pairs)
    return bounded(noise / sum(float(r.square().sum()) for _, r in pairs))


def classifier(name: str, args: argparse.Namespace, methods: list[str]) -> Iterator[Row]:
    data = Pictures.load(args.digits)
    batches = data.calibration(32 if args.quick else 128)
    for seed in range(1 if args.quick else args.seeds):
        path = args.models / f"{name}-{seed}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_float(train_float(name, data, 50 if args.quick else 1500, seed), path)
        model = load_float(path).eval()
        reference = logits(model, data.test_x)
        yield {"mode": "float", "seed": seed, "accuracy": accuracy(reference, data.test_y)}
        for (w, a), method in ((b, m) for b in BITS for m in methods):
            ours, seconds = deployed(model, method, (w, a), batches)
            row = classes(logits(ours, data.test_x), reference, data.test_y)
            yield {"mode": f"w{w}a{a}_{method}", "seed": seed, **row, "calibration_s": round(seconds, 1)}


def restorer(args: argparse.Namespace, methods: list[str]) -> Iterator[Row]:
    model = load_float(ROOT / "examples" / "weights" / "mambair_light_x2_float.safetensors").eval()
    photos = [open_image(p).convert("RGB") for p in find_images(ROOT / "examples" / "photos")]
    small = [to_tensor(downscale(p, 2)) for p in photos]
    crops = [x[..., top : top + 64, top : top + 64] for top in (40, 80) for x in small][
        : 4 if args.quick else 16
    ]
    pairs = []
    for path in find_images(args.set5):
        image = open_image(path).convert("RGB")
        image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))
        side = 32 if args.quick else 10**6
        x, y = to_tensor(downscale(image, 2)), to_tensor(image)
        pairs.append((x[..., :side, :side], y[..., : 2 * side, : 2 * side]))

    @torch.no_grad()
    def score(restore: nn.Module) -> list[Tensor]:
        return [restore(x) for x, _ in pairs]

    def figures(out: list[Tensor]) -> Row:
        values = [psnr(o.clamp(0, 1), y, border=2) for o, (_, y) in zip(out, pairs, strict=True)]
        return {"psnr": round(statistics.fmean(values), 4)}

    reference = score(model)
    base = figures(reference)
    yield {"mode": "float", **base}
    for (w, a), method in ((b, m) for b in BITS for m in methods):
        ours, seconds = deployed(model, method, (w, a), crops)
        out = score(ours)
        row = figures(out)
        row["drop_db"] = round(base["psnr"] - row["psnr"], 4)
        row["sqnr_db"] = sqnr(out, reference)
        yield {"mode": f"w{w}a{a}_{method}", **row, "calibration_s": round(seconds, 1)}


def language_model(args: argparse.Namespace, methods: list[str]) -> Iterator[Row]:
    """Two layers of width 64 on bytes: a check that language models go through, no statement about large ones."""
    ssmquant.install_standins()  # before the import, which looks for mamba_ssm
    from transformers import MambaConfig, MambaForCausalLM

    text = b"".join(p.read_bytes() for p in sorted((*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"))))
    tokens = torch.tensor(list(text))
    cut = len(tokens) * 9 // 10
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8, use_cache=False, pad_token_id=0
    )
    model = MambaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20 if args.quick else 600):
        at = torch.randint(cut - 129, (16,))
        rows = torch.stack([tokens[i : i + 129] for i in at])
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    at = torch.arange(cut, len(tokens) - 129, 128)[:64]
    test = torch.stack([tokens[i : i + 129] for i in at])
    batches = list(torch.stack([tokens[i : i + 128] for i in torch.randint(cut - 129, (32,))]).split(8))

    @torch.no_grad()
    def score(m: Any) -> Tensor:
        return first(m(test[:, :-1])).flatten(0, 1)

    reference, labels = score(model), test[:, 1:].flatten()
    yield {"mode": "float", "accuracy": accuracy(reference, labels)}
    for (w, a), method in ((b, m) for b in BITS for m in methods):
        ours, seconds = deployed(model, method, (w, a), batches)
        row = classes(score(ours), reference, labels)
        yield {"mode": f"w{w}a{a}_{method}", **row, "calibration_s": round(seconds, 1)}


def qat_start(args: argparse.Namespace, methods: list[str]) -> Iterator[Row]:
    """Whether transforms of the weights are a worse place to train from; the methods are of no account here."""
    steps = 10 if args.quick else 300
    train, test = photographs(64 if args.quick else None)
    for seed in range(1 if args.quick else args.seeds):
        for name, transforms in (("plain", ()), ("transforms", QConfig.mambaquant().transforms)):
            model = load_float(ROOT / "examples" / "weights" / "mambair_tiny_x2_float.safetensors")
            data = PatchData(train, TASK, seed=seed)
            batches = list(data.batches(4, 8))
            config = QConfig.recommended(2, 2, transforms=transforms)
            prepared = ssmquant.prepare(model, config, example_inputs=(batches[0],))
            ssmquant.calibrate(prepared, batches, progress=False)
            start = statistics.fmean(r["psnr"] for r in evaluate(prepared.eval(), test, TASK))
            recipe = Recipe(steps, 8, 1e-3)
            groups = list(ssmquant.param_groups(prepared, recipe.lr))
            fit(prepared, data, recipe, groups=groups, title=f"{name}, seed {seed}")
            end = statistics.fmean(r["psnr"] for r in evaluate(prepared, test, TASK))
            yield {"mode": f"w2a2_{name}", "seed": seed, "psnr_start": start, "psnr": end, "steps": steps}


CASES: dict[str, Callable[[argparse.Namespace, list[str]], Iterator[Row]]] = {
    "vim_digits": lambda args, methods: classifier("vim", args, methods),
    "vmamba_digits": lambda args, methods: classifier("vmamba", args, methods),
    "mambair_light_x2": restorer,
    "hf_mamba": language_model,
    "qat_start": qat_start,
}
NEEDS = {"vim_digits": "digits", "vmamba_digits": "digits", "mambair_light_x2": "set5"}
COLUMNS = ("accuracy", "kl", "psnr_start", "psnr", "drop_db", "sqnr_db", "calibration_s")


def show(case: str, rows: list[Row]) -> None:
    """Means over seeds."""
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    columns = [c for c in COLUMNS if any(c in r for r in rows)]
    lines = []
    for mode in modes:
        own = [r for r in rows if r["mode"] == mode]
        means = {c: statistics.fmean(r[c] for r in own) for c in columns if c in own[0]}
        lines.append([mode, *(f"{means[c]:.4g}" if c in means else "" for c in columns)])
    print_table(case, ["mode", *columns], lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="all by default")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="all by default")
    parser.add_argument("--digits", type=Path, metavar="FILE.npz")
    parser.add_argument("--set5", type=Path, metavar="FOLDER")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "ptq", metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of what is trained (default 3)")
    parser.add_argument("--quick", action="store_true", help="small and short, to see whether it runs")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = args.case or list(CASES)
    for name in names:
        if name in NEEDS and getattr(args, NEEDS[name]) is None:
            parser.error(f"{name} needs --{NEEDS[name]}")
    result: dict[str, Any] = {**heading(torch.device("cpu")), "rows": []}
    for name in names:
        rows = []
        for row in CASES[name](args, args.method or list(METHODS)):
            rows.append(row)
            print(name, row, flush=True)
            result["rows"].append({"case": name, **row})
            if args.out:
                write(args.out, result)
        show(name, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
