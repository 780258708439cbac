"""A better teacher: what a float model makes of a picture, averaged over its 8 flips and turns.

The self-ensemble ("EDSR+", Lim et al., arXiv 1707.02921, section 3.4) of a float model is better than the model,
and it sees whole pictures. It takes 8 passes, so it is computed once for every training picture and kept in a file;
patches of it then cost no pass at all in a step.
"""

from __future__ import annotations

import os
from pathlib import Path

import common
import torch
from patches import PatchData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import reporter

__all__ = ["self_ensemble", "targets"]


def self_ensemble(model: nn.Module, x: Tensor) -> Tensor:
    """Mean of ``model`` over the 8 symmetries of ``x`` (1, C, H, W), each turned back."""
    total = None
    for turned in (x, x.transpose(-1, -2)):
        flipped = torch.cat([turned, turned.flip(-2), turned.flip(-1), turned.flip(-2, -1)])
        plain, rows, columns, both = model(flipped.contiguous()).float().split(1)
        back = plain + rows.flip(-2) + columns.flip(-1) + both.flip(-2, -1)
        total = back if total is None else total + back.transpose(-1, -2)
    assert total is not None
    return total / 8


def targets(model: nn.Module, data: PatchData, path: Path) -> list[Tensor]:
    """:func:`self_ensemble` of every picture of ``data``, fp16 (3, H, W) each; from ``path`` if it is there.

    The file is for one model and one set of pictures: its name must tell them apart. Of several processes one makes
    it, and the others wait.
    """
    with common.locked(path.with_name(path.name + ".lock"), wait=True):
        if not path.exists():
            _make(model, data, path)
    kept = load_file(path)
    return [kept[name] for name in sorted(kept)]


def _make(model: nn.Module, data: PatchData, path: Path) -> None:
    found = {}
    with torch.no_grad(), reporter("self-ensemble", len(data)) as report:
        for i in range(len(data)):
            found[f"{i:06}"] = self_ensemble(model, data.degraded(i))[0].half().cpu().contiguous()
            report(i + 1, f"{i + 1} of {len(data)} pictures")
    temporary = path.with_name(path.name + ".tmp")
    save_file(found, temporary)
    os.replace(temporary, path)
