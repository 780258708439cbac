"""Small segmentation networks on slices of volumes: data, models, Dice, float training; classify.py's counterpart.

    python examples/segment.py --data slices.npz --model vmunet --out runs/vmunet.safetensors

The data are an .npz file of ``x`` uint8 (N, H, W), slices in their order in the volume, and ``y`` uint8 (N, H, W),
class numbers with 0 for background. Every fifth block of eight slices, the same ones in every run, is for testing only:
neighbours are alike, and single slices drawn at random would all have a near copy in the training part.
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
from ssmquant.errors import ConfigError, FormatError, InputError, SsmquantError
from ssmquant.io import save_float

__all__ = ["MODELS", "Slices", "build", "dice", "logits", "padded", "train_float"]

MODELS: dict[str, dict[str, Any]] = {
    "vmunet": {
        "name": "VMUNet",
        "args": {
            "input_channels": 1, "dims": 24, "depths": [1, 1, 1], "depths_decoder": [1, 1, 1], "patch_size": 2,
            "d_state": 4, "drop_path_rate": 0.0,
        },
    },
}  # fmt: skip
"""As published, but small: three stages of one block, 4 states; and patches of 2 x 2 pixels, since labels are thin."""

BLOCK, EVERY = 8, 5
MULTIPLE = 32  # of the sides that networks see: enough for four stages of patches of 4 x 4 pixels


class Slices(Labelled):
    """Labelled slices in two parts, and a stream of augmented crops of the first (see ``training.Data``).

    All lie on ``device``; what is random comes from a CPU generator, so that it is the same on every device.

    Attributes:
        x, y: for training, float32 (N, 1, H, W) in -1 .. 1 and int64 (N, H, W).
        test_x, test_y: for testing.
        classes: the largest class number and 1.

    Args:
        x, y: uint8 (N, H, W), see the module.
        seed: of the stream.
        device: where all tensors lie.
        side: pixels a side of a training crop.

    Raises:
        FormatError: arrays of other shapes or dtypes, fewer than 33 slices, or no foreground.
        ConfigError: ``side`` does not fit.
    """

    def __init__(
        self,
        x: np.ndarray[Any, Any],
        y: np.ndarray[Any, Any],
        seed: int = 0,
        device: str | torch.device = "cpu",
        side: int = 96,
    ) -> None:
        if x.ndim != 3 or x.dtype != np.uint8 or y.shape != x.shape or y.dtype != np.uint8:
            raise FormatError("expected x uint8 (N, H, W), and y uint8 (N, H, W)")
        if not x.size or len(x) <= BLOCK * (EVERY - 1) or not y.any():
            raise FormatError(
                f"there are not {BLOCK * (EVERY - 1) + 1} slices, or no pixel of a class above 0"
            )
        if type(side) is not int or not 1 <= side <= min(x.shape[1:]):
            raise ConfigError(f"side={side!r}: crops have between 1 and {min(x.shape[1:])} pixels a side")
        self.side = side
        slices = torch.from_numpy(x).float().div_(127.5).sub_(1.0).unsqueeze(1)
        labels = torch.from_numpy(y.astype(np.int64))
        test = torch.arange(len(x)) // BLOCK % EVERY == EVERY - 1
        super().__init__(slices, labels, test, seed, device)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Slices:
        """From an .npz file, see the module.

        Raises:
            FormatError: no such arrays.
        """
        return cls(*read_arrays(path), **options)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """The next batch of crops, (batch, 1, side, side) and (batch, side, side).

        Half of them are mirrored left to right; brightness, counted from black, is scaled by 0.9 to 1.1.
        """
        drawn = torch.rand(batch, 5, generator=self._generator, dtype=torch.float64)
        sizes = torch.tensor([len(self.x), *(n - self.side + 1 for n in self.x.shape[2:]), 2])
        whole = to_device((drawn[:, :4] * sizes).long(), self.device)
        gain = to_device((0.9 + 0.2 * drawn[:, 4]).float(), self.device)[:, None, None, None]
        index, top, left, mirror = (value[:, None, None] for value in whole.unbind(1))
        line = torch.arange(self.side, device=self.device)
        rows, columns = top + line[:, None], left + torch.where(mirror > 0, line.flip(0), line)
        x, y = self.x[:, 0][index, rows, columns].unsqueeze(1), self.y[index, rows, columns]
        return (x + 1) * gain - 1, y

    def calibration(self, count: int, batch: int = 4) -> list[Tensor]:
        """``count`` training slices, evenly spaced, whole and ``padded``, in batches."""
        at = torch.linspace(0, len(self.x) - 1, min(count, len(self.x)), device=self.device).round().long()
        return list(padded(self.x[at]).split(batch))


def padded(x: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """(N, C, H, W) with black rows below and columns to the right, so that both sides are multiples."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple), value=-1.0)


def build(name: str, data: Slices) -> nn.Module:
    """An untrained model of ``MODELS`` for these slices."""
    return zoo.build(MODELS[name], num_classes=data.classes)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch: int = 4) -> Tensor:
    """(N, classes, H, W) of whole slices (N, 1, H, W), in the mode that the model is in.

    The model sees them ``padded``; what it says of the padding is cut off.
    """
    height, width = x.shape[2:]
    return torch.cat([model(part)[..., :height, :width] for part in padded(x).split(batch)])


def dice(out: Tensor, y: Tensor, classes: int | None = None) -> Tensor:
    """Mean Dice coefficient of the foreground for each slice, float64 (N,), in 0..1.

    Dice of a class is ``2 |P & T| / (|P| + |T|)`` with the pixels P of the prediction and T of the truth. The mean goes
    over the classes from 1 on that occur in the prediction or in the truth: one that is only predicted counts as 0, one
    that occurs in neither does not count. A slice without any foreground in both has 1.

    Args:
        out: logits (N, classes, H, W), whose largest is the prediction, or class numbers (N, H, W).
        y: class numbers (N, H, W).
        classes: their number; needed if ``out`` holds class numbers.

    Raises:
        InputError: shapes or dtypes do not fit, or a class number is out of range.
    """
    if out.is_floating_point():
        if out.dim() != 4 or classes not in (None, out.shape[1]):
            raise InputError(f"expected logits (N, {classes or 'classes'}, H, W), got {tuple(out.shape)}")
        out, classes = out.argmax(1), out.shape[1]
    if classes is None or out.shape != y.shape or y.dim() != 3 or y.is_floating_point():
        raise InputError("dice: expected logits, or class numbers and classes, and as many labels (N, H, W)")
    scores = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    if not y.numel():
        return scores + 1
    if min(int(out.min()), int(y.min())) < 0 or max(int(out.max()), int(y.max())) >= classes:
        raise InputError(f"dice: a class number is not in 0 .. {classes - 1}")
    counted = torch.zeros_like(scores)
    for label in range(1, classes):
        ours, truth = out == label, y == label
        size = (ours.sum((1, 2)) + truth.sum((1, 2))).double()
        scores += 2 * (ours & truth).sum((1, 2)) / size.clamp(min=1)
        counted += size > 0
    return torch.where(counted > 0, scores / counted.clamp(min=1), 1.0)


def train_float(name: str, data: Slices, steps: int, seed: int = 0, **options: Any) -> nn.Module:
    """A float model on the data's device, trained with AdamW, batches of 16; in evaluation mode.

    ``options``: further fields of ``training.Recipe``, such as ``cuda_graph``.
    """
    torch.manual_seed(seed)
    data.seed(seed)
    model = build(name, data).to(data.device)
    own = {"batch": 16, "lr": 4e-3, "betas": (0.9, 0.999), "log_every": 100, **options}
    recipe = Recipe(steps, loss="cross_entropy", **own)
    fit(model, data, recipe, decay_groups(model, 0.05), title=f"{name}, seed {seed}")
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--model", choices=sorted(MODELS), default="vmunet")
    parser.add_argument("--steps", type=int, default=1500, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--side", type=int, default=96, metavar="N", help="of the training crops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    args = parser.parse_args(argv)
    try:
        data = Slices.load(args.data, device=args.device, side=args.side)
        model = train_float(args.model, data, args.steps, args.seed, cuda_graph=data.device.type == "cuda")
        save_float(model, args.out)
    except (SsmquantError, OSError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    scores = dice(logits(model, data.test_x), data.test_y)
    print(f"{args.out}: mean Dice {float(scores.mean()):.4f} of {len(scores)} test slices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
