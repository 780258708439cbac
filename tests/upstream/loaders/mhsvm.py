"""PixDeep/MHS-VM: its constructor moves scan routes to CUDA, its routes come from a file that routegen.py writes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import ssmquant
from tests.upstream.loaders import checkout, enter, load, package, smaller


def build(size: str, side: int) -> nn.Module:
    root = checkout("MHS-VM")
    enter(root)
    package("models", root / "models")
    package("models.vmunet", root / "models" / "vmunet")
    routes = load("routegen").calc_posarrays(side, side, 4)
    module = load("models.vmunet.vmunet")
    with tempfile.TemporaryDirectory() as folder, ssmquant.standins(cuda_to_cpu=True):
        file = Path(folder) / "routes.pth"
        torch.save(routes, file)
        if size == "default":
            return module.VMUNet(depths=[2, 2, 2, 2], depths_decoder=[2, 2, 2, 1], route_dict_path=file)
        small = {"dims": [24, 48, 96, 192], "dims_decoder": [192, 96, 48, 24]}
        with smaller(module, "VSSM", **small):
            return module.VMUNet(depths=[1, 1, 1, 1], depths_decoder=[1, 1, 1, 1], route_dict_path=file)
