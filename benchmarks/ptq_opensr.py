"""W8A8 by calibration alone, on weights that others trained: opensr-mamba's x4 model, PSNR on Set5 crops.

    pip install --no-deps opensr-mamba==0.0.1 && pip install timm torchvision einops
    python benchmarks/ptq_opensr.py --set5 FOLDER [--out FILE.json]

The model is a MambaIR relative (C. Aybar, MIT), trained on Sentinel-2 reflectances: pictures go in scaled to 0 .. 0.3.
Ranges are calibrated on crops of the photographs in examples/photos, never on the test pictures. The test: the top left
48x48 of each low-resolution picture, x4, PSNR of luma. No float kernel is needed: stand-ins serve mamba_ssm.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.restore.metrics import psnr
from ssmquant.restore.pictures import downscale, find_images, open_image, to_tensor

ROOT = Path(__file__).resolve().parents[1]
SCALE, CROP, REFLECTANCE = 4, 48, 0.3


def build() -> nn.Module:
    """The package's model with its own weights; its loader wants CUDA, so the file is read here."""
    ssmquant.install_standins()
    from opensr_mamba.mamba.main import MambaSR

    model = MambaSR(
        img_size=64, in_chans=3, embed_dim=60, depths=[2, 2, 2, 2], d_state=16, mlp_ratio=1.5, upscale=SCALE,
        attention_type="sigmoid_02", upsampler="pixelshuffledirect", resi_connection="1conv", operation_attention="sum",
    )  # fmt: skip
    weights = importlib.resources.files("opensr_mamba") / "mamba" / "weights" / "srmodel.pth"
    ssmquant.load_checkpoint(model, str(weights))
    return model.eval()


def low(path: Path) -> tuple[Tensor, Tensor]:
    """A picture's crop at low resolution, and what it should become, both (1, 3, H, W) in 0 .. 1."""
    image = open_image(path).convert("RGB")
    image = image.crop((0, 0, image.width // SCALE * SCALE, image.height // SCALE * SCALE))
    small = to_tensor(downscale(image, SCALE))[..., :CROP, :CROP]
    return small, to_tensor(image)[..., : CROP * SCALE, : CROP * SCALE]


def restore(model: Any, x: Tensor) -> Tensor:
    # The package's plain path does not run (it passes a tuple on); the one that keeps attention maps does.
    out = model(x * REFLECTANCE, save_attention_maps=True)
    return (out[0] if isinstance(out, (tuple, list)) else out) / REFLECTANCE


@torch.no_grad()
def score(model: Any, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [round(psnr(restore(model, x).clamp(0, 1), y, border=SCALE), 3) for x, y in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set5", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    pairs = [low(p) for p in find_images(args.set5)]
    photos = [low(p)[0] for p in find_images(ROOT / "examples" / "photos")]
    model = build()
    rows = [{"case": "set5_x4_crops", "mode": "float", "psnr": score(model, pairs)}]
    configs = {
        "minmax": QConfig.minmax(8, 8),
        "lsq_channel": QConfig.lsq(8, 8, granularity="channel"),
        "qmambair_channel": QConfig(w_bits=8, a_bits=8, granularity="channel"),
        "qmambair": QConfig.qmambair(8),  # as published: one scale a weight
    }
    for name, config in configs.items():
        start = time.perf_counter()
        prepared = ssmquant.prepare(
            model, config, example_inputs=(pairs[0][0],), example_kwargs={"save_attention_maps": True}
        ).eval()
        ssmquant.calibrate(prepared, photos, forward=restore)
        deployed = ssmquant.convert(prepared)
        seconds = time.perf_counter() - start
        exact = ssmquant.verify(prepared, deployed, pairs[0][0], save_attention_maps=True).worst_rel
        rows.append({
            "case": "set5_x4_crops", "mode": f"deployed_w8a8_{name}", "psnr": score(deployed, pairs),
            "worst_rel_against_prepared": exact, "seconds_to_prepare_and_calibrate": round(seconds, 1),
        })  # fmt: skip
    for row in rows:
        row["mean"] = round(sum(row["psnr"]) / len(row["psnr"]), 3)
        row["drop"] = round(rows[0]["mean"] - row["mean"], 3)
        print(f"{row['mode']:<24} {row['mean']:.2f} dB  drop {row['drop']:+.3f}  {row['psnr']}", flush=True)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    result = {
        "hardware": platform.processor() or platform.machine(), "torch": torch.__version__, "triton": None,
        "commit": commit.stdout.strip(), "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    worst = max(row["drop"] for row in rows[1:])
    print(f"largest drop {worst:.3f} dB")
    return 0 if min(row["drop"] for row in rows[1:]) <= 0.3 else 1


if __name__ == "__main__":
    sys.exit(main())
