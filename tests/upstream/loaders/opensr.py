"""opensr-mamba, a package: a descendant of MambaIR."""

from __future__ import annotations

from torch import nn

from tests.upstream.loaders import enter, load


def build(size: str) -> nn.Module:
    enter()
    MambaSR = load("opensr_mamba.mamba.main").MambaSR
    if size == "default":
        return MambaSR(embed_dim=96, depths=(6, 6, 6, 6), upscale=2, upsampler="pixelshuffledirect")
    return MambaSR(embed_dim=32, depths=(2,), upscale=2, upsampler="pixelshuffledirect", mlp_ratio=1.2)
