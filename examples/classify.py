"""Small classifiers on small pictures: data, models, float training; what benchmarks/ptq.py quantizes.

    python examples/classify.py --data digits5000.npz --model vim --out runs/vim.safetensors

The data are an .npz file of ``x`` uint8 (N, H, W) or (N, H, W, 3) and ``y`` integers (N,), classes from 0 on. Of each
class one picture in five, the same ones in every run, is for testing only.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from labelled import Labelled, read_arrays
from torch import Tensor, nn
from training import Recipe, decay_groups, fit, to_device

from ssmquant import zoo
from ssmquant.errors import FormatError, SsmquantError
from ssmquant.io import save_float

__all__ = ["MODELS", "Pictures", "accuracy", "build", "logits", "train_float"]

MODELS: dict[str, dict[str, Any]] = {
    "vim": {
        "name": "VisionMamba",
        "args": {"patch_size": 4, "stride": 4, "depth": 6, "embed_dim": 64, "d_state": 8, "drop_path_rate": 0.05},
    },
    "vmamba": {
        "name": "VSSM",
        "args": {
            "patch_size": 2, "depths": [1, 2, 1], "dims": [24, 48, 96], "ssm_d_state": 1, "ssm_ratio": 1.0,
            "forward_type": "v05_noz", "ssm_conv_bias": False, "downsample_version": "v3", "patchembed_version": "v2",
            "norm_layer": "ln2d", "drop_path_rate": 0.05,
        },
    },
}  # fmt: skip
"""As published, but small: Vim with two directions and a class token, VMamba's v05 without gates."""


class Pictures(Labelled):
    """Labelled pictures in two parts, and a stream of augmented batches of the first (see ``training.Data``).

    All lie on ``device``; what is random comes from a CPU generator, so that it is the same on every device.

    Attributes:
        x, y: for training, float32 (N, 3, H, W) in -1 .. 1 and int64 (N,).
        test_x, test_y: for testing.
    """

    def __init__(
        self,
        x: np.ndarray[Any, Any],
        y: np.ndarray[Any, Any],
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if x.ndim not in (3, 4) or x.dtype != np.uint8 or y.shape != (len(x),) or y.dtype.kind not in "ui":
            raise FormatError("expected x uint8 (N, H, W) or (N, H, W, 3), and y integers (N,)")
        if not x.size or y.min() < 0:
            raise FormatError("there is no picture, or a class below 0")
        if len(np.unique(y)) == len(y):
            raise FormatError("there is no class of two pictures, one to train with and one for testing")
        pictures = torch.from_numpy(x).float().div_(127.5).sub_(1.0)
        if x.ndim == 3:
            pictures = pictures.unsqueeze(-1).expand(-1, -1, -1, 3)
        pictures = pictures.permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(y.astype(np.int64))
        test = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            test[(labels == label).nonzero().flatten()[::5]] = True
        super().__init__(pictures, labels, test, seed, device)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Pictures:
        """From an .npz file, see the module.

        Raises:
            FormatError: no such arrays.
        """
        return cls(*read_arrays(path), seed, device)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """The next batch: turned by up to 15 degrees, sheared, scaled by 0.85 to 1.15, moved by up to two pixels."""
        at = to_device(torch.randint(len(self.x), (batch,), generator=self._generator), self.device)
        x = self.x[at]
        u = to_device(torch.rand(batch, 5, generator=self._generator) * 2 - 1, self.device)
        turn, scale, shear = u[:, 0] * 0.26, 1 + u[:, 1] * 0.15, u[:, 2] * 0.2
        move = u[:, 3:] * (4 / x.shape[-1])
        cos, sin = turn.cos() * scale, turn.sin() * scale
        rows = torch.stack((torch.stack((cos, -sin + shear), 1), torch.stack((sin, cos), 1)), 1)
        grid = F.affine_grid(torch.cat((rows, move[:, :, None]), 2), list(x.shape), align_corners=False)
        return F.grid_sample(x + 1, grid, align_corners=False) - 1, self.y[at]

    def calibration(self, count: int, batch: int = 16) -> list[Tensor]:
        """``count`` training pictures as they are, in batches, classes in turn."""
        rank = torch.zeros_like(self.y)  # a picture's number within its class
        for label in self.y.unique():
            own = self.y == label
            rank[own] = torch.arange(int(own.sum()), device=self.device)
        return list(self.x[rank.argsort(stable=True)[:count]].split(batch))


def build(name: str, data: Pictures) -> nn.Module:
    """An untrained model of ``MODELS`` for these pictures."""
    side: dict[str, Any] = {"img_size": data.x.shape[-1]} if name == "vim" else {}
    return zoo.build(MODELS[name], num_classes=data.classes, **side)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch: int = 250) -> Tensor:
    """(N, classes) of pictures (N, 3, H, W), in the mode that the model is in."""
    return torch.cat([model(part) for part in x.split(batch)])


def accuracy(out: Tensor, y: Tensor) -> float:
    """Per cent of rows of logits (N, classes) whose largest is that of the label (N,)."""
    return 100 * float((out.argmax(1) == y).double().mean())


def train_float(name: str, data: Pictures, steps: int, seed: int = 0) -> nn.Module:
    """A float model on the data's device, trained with AdamW, batches of 64; in evaluation mode."""
    torch.manual_seed(seed)
    data.seed(seed)
    model = build(name, data).to(data.device)
    recipe = Recipe(
        steps,
        64,
        2e-3,
        loss="cross_entropy",
        betas=(0.9, 0.999),
        log_every=100,
        cuda_graph=data.device.type == "cuda",
    )
    fit(model, data, recipe, decay_groups(model, 0.05), title=f"{name}, seed {seed}")
    return model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--model", choices=sorted(MODELS), default="vim")
    parser.add_argument("--steps", type=int, default=1500, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    args = parser.parse_args()
    try:
        data = Pictures.load(args.data, device=args.device)
        model = train_float(args.model, data, args.steps, args.seed)
        save_float(model, args.out)
    except (SsmquantError, OSError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    print(
        f"{args.out}: {accuracy(logits(model, data.test_x), data.test_y):.2f} % of {len(data.test_y)} test pictures"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
