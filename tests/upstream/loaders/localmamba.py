"""hunto/LocalMamba: LocalVim (over its own mamba_ssm) and LocalVMamba."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, package, smaller

_VIM = (["h", "v_flip", "w7", "w7_flip"], ["h_flip", "w2_flip", "v", "w2"])
_VMAMBA = [
    ["h", "h_flip", "w7", "w7_flip"], ["h_flip", "v_flip", "w2", "w2_flip"], ["h", "v", "v_flip", "w7"],
    ["h", "h_flip", "v", "v_flip"],
]  # fmt: skip


def build(which: str, size: str) -> nn.Module:
    root = checkout("LocalMamba")
    models = root / "classification" / "lib" / "models"
    enter(root / "mamba-1p1p1")
    package("lib", models.parent)
    package("lib.models", models)
    changes: dict[str, Any] = {}
    if which == "vim":
        module = load("lib.models.local_vim")
        if size == "small":
            changes = {"embed_dim": 32, "depth": 2, "directions": _VIM, "img_size": 64, "num_classes": 10}
            changes |= {"pt_hw_seq_len": 4}
        with smaller(module, "VisionMamba", **changes):
            return module.local_vim_tiny()
    module = load("lib.models.local_vmamba")
    if size == "small":
        changes = {"dims": [16, 32, 64, 128], "depths": [1] * 4, "directions": _VMAMBA, "num_classes": 10}
    with smaller(module, "VSSM", **changes):
        return module.local_vssm_tiny()
