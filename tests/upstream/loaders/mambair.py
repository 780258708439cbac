"""csguoh/MambaIR: both architectures, without the rest of BasicSR (data sets, metrics, training)."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import checkout, enter, load, package, stub

_V1 = {
    "light": {"embed_dim": 60, "d_state": 10, "mlp_ratio": 1.2, "upsampler": "pixelshuffledirect"},
    "classic": {"embed_dim": 180, "d_state": 16, "mlp_ratio": 2, "upsampler": "pixelshuffle"},
}
_V1_DEPTHS = {"light": (6,) * 4, "classic": (6,) * 6}
_V2 = {
    "v2light": {
        "embed_dim": 48, "d_state": 8, "inner_rank": 32, "num_tokens": 64, "mlp_ratio": 1.0,
        "upsampler": "pixelshuffledirect",
    },
    "v2base": {
        "embed_dim": 174, "d_state": 16, "inner_rank": 64, "num_tokens": 128, "mlp_ratio": 2.0,
        "upsampler": "pixelshuffle",
    },
}  # fmt: skip
_V2_HEADS = {"v2light": 4, "v2base": 6}
_V2_DEPTHS = {"v2light": (5,) * 4, "v2base": (6,) * 6}


def build(variant: str, size: str) -> nn.Module:
    root = checkout("MambaIR") / "basicsr"
    enter(root.parent)
    package("basicsr", root)
    package("basicsr.archs", root / "archs")
    package("basicsr.utils", root / "utils")
    # Two helpers out of arch_util, which itself imports half of BasicSR.
    from timm.layers import to_2tuple, trunc_normal_

    stub("basicsr.archs.arch_util", to_2tuple=to_2tuple, trunc_normal_=trunc_normal_)
    common: dict[str, Any] = {
        "img_size": 64,
        "in_chans": 3,
        "upscale": 2,
        "img_range": 1.0,
        "resi_connection": "1conv",
    }
    if variant in _V1:
        depths = _V1_DEPTHS[variant] if size == "default" else (2,)
        small = {} if size == "default" or variant == "light" else {"embed_dim": 48}
        arch: Any = load("basicsr.archs.mambair_arch").MambaIR
        return arch(**{**common, **_V1[variant], "depths": depths, **small})
    depths = _V2_DEPTHS[variant] if size == "default" else (2,)
    small = {} if size == "default" or variant == "v2light" else {"embed_dim": 48}
    heads = [_V2_HEADS[variant]] * len(depths)
    module = load("basicsr.archs." + ("mambairv2light_arch" if variant == "v2light" else "mambairv2_arch"))
    arch = module.MambaIRv2Light if variant == "v2light" else module.MambaIRv2
    more = {"window_size": 16, "convffn_kernel_size": 5, "num_heads": heads, "depths": depths}
    return arch(**{**common, **_V2[variant], **more, **small})
