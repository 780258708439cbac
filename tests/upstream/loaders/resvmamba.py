"""ChiShengChen/ResVMamba. Widths are fixed by its code, so the small one differs in depth only.

Its forward makes three convolutions each time, with fresh random weights. Here these are the same every time, so that
there is something to compare with; a prepared model keeps the first ones.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from tests.upstream.loaders import checkout, enter, load, package


def _seeded(**arguments: Any) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments["in_channels"])
        return nn.Conv2d(**arguments)


def build(size: str) -> nn.Module:
    root = checkout("ResVMamba")
    enter(root)
    package("models", root / "models")
    depths = [2, 2, 27, 2] if size == "default" else [1, 1, 1, 1]
    module: Any = load("models.resvmamba")
    module.nn = nn
    model: nn.Module = module.VSSM(num_classes=10, depths=depths, dims=[96, 192, 384, 768])
    module.nn = types.SimpleNamespace(**{**vars(nn), "Conv2d": _seeded})
    return model
