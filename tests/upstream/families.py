"""The families: what to build, what to feed it, what may stay in float and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.upstream.loaders import (
    adventurer,
    huggingface,
    lbmamba,
    lightmunet,
    localmamba,
    mambair,
    mambamil,
    mhsvm,
    msvmunet,
    opensr,
    plainmamba,
    resvmamba,
    vim,
    vmamba,
    vmunet,
)

__all__ = ["FAMILIES", "Family", "draw"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One model family.

    ``shapes``: for each size the shapes of one sample that the model takes; the first is the example that ``prepare``
    sees. ``exceptions``: sites that stay in float, by pattern, with the reason. ``refused``: a text that the error
    must contain, for what is known not to work. ``zoo``: for some sizes, our own model of the same parameters, as
    ``zoo.build`` takes it.
    """

    name: str
    repo: str
    commit: str
    build: Callable[[str], nn.Module]
    shapes: dict[str, tuple[Shape, ...]]
    kind: str = "image"
    folders: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("timm", "torchvision", "einops")
    kwargs: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = (2, 1, 3)  # the first is the example's
    exceptions: dict[str, str] = field(default_factory=dict)
    refused: str | None = None
    zoo: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: str = ""

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(self.shapes)


def draw(family: Family, batch: int, shape: Shape, seed: int = 0) -> Tensor:
    """One batch: smooth images with some noise in [0, 1], features, or token numbers."""
    g = torch.Generator().manual_seed(seed)
    if family.kind == "ids":
        return torch.randint(0, 128, (batch, *shape), generator=g)
    if family.kind == "features":
        return torch.randn(batch, *shape, generator=g)
    coarse = torch.rand(batch, shape[0], *[max(2, n // 8) for n in shape[1:]], generator=g)
    mode = "bilinear" if len(shape) == 3 else "trilinear"
    image = nn.functional.interpolate(coarse, size=shape[1:], mode=mode, align_corners=False)
    return (image + 0.05 * torch.randn(image.shape, generator=g)).clamp(0, 1)


MAMBAIR = {"repo": "csguoh/MambaIR", "commit": "33d7b34", "folders": ("MambaIR",)}
VMAMBA = {"repo": "MzeroMiko/VMamba", "commit": "2ed52ea", "folders": ("VMamba",)}
VMAMBA["needs"] = ("timm", "torchvision", "fvcore", "triton")
VIM = {"repo": "hustvl/Vim", "commit": "dd0358a", "folders": ("Vim",)}
LOCAL = {"repo": "hunto/LocalMamba", "commit": "75e5d1f", "folders": ("LocalMamba",)}
LOCAL["needs"] = ("timm", "torchvision", "einops", "fvcore", "triton")
PLAIN = {"repo": "ChenhongyiYang/PlainMamba", "commit": "0975a1d", "folders": ("PlainMamba",)}
MIL = {"repo": "isyangshu/MambaMIL", "commit": "9aea39e", "folders": ("MambaMIL",), "needs": ("einops",)}
HF = {"repo": "huggingface/transformers", "commit": "", "needs": ("transformers",)}
LIGHT = {"repo": "MrBlankness/LightM-UNet", "commit": "6b72e27", "folders": ("LightM-UNet", "mamba")}
LIGHT["needs"] = ("monai", "einops")


def _rgb(*sides: int) -> tuple[Shape, ...]:
    return tuple((3, s, s) for s in sides)


_SR = {"small": ((3, 16, 16), (3, 20, 28)), "default": ((3, 24, 24), (3, 16, 32))}
_CLASSIFY = {"small": ((3, 64, 64), (3, 96, 64)), "default": ((3, 64, 64), (3, 96, 64))}
_FIXED = {"small": _rgb(64), "default": _rgb(224)}
_BAGS = {"small": ((20, 32), (33, 32), (7, 32)), "default": ((100, 1024), (257, 1024))}
_IDS = {"small": ((16,), (24,)), "default": ((32,),)}
_ROUTING = {"re:.*assm\\.route.*": "decides by argmax which tokens are neighbours"}
_V2_SR = {"small": ((3, 32, 32), (3, 20, 40)), "default": ((3, 32, 32), (3, 16, 48))}


def _default(shapes: dict[str, tuple[Shape, ...]]) -> dict[str, tuple[Shape, ...]]:
    return {"default": shapes["default"]}


FAMILIES: tuple[Family, ...] = (
    Family("mambair_light", build=partial(mambair.build, "light"), shapes=_SR, **MAMBAIR),
    Family("mambair_classic", build=partial(mambair.build, "classic"), shapes=_SR, **MAMBAIR),
    Family("mambairv2_light", build=partial(mambair.build, "v2light"), shapes=_V2_SR, exceptions=_ROUTING, **MAMBAIR),
    Family("mambairv2_base", build=partial(mambair.build, "v2base"), shapes=_V2_SR, exceptions=_ROUTING, **MAMBAIR),
    Family("vmamba_tiny", build=partial(vmamba.build, "vmamba_tiny_s1l8"), shapes=_CLASSIFY, **VMAMBA),
    Family("vmamba_small", build=partial(vmamba.build, "vmamba_small_s2l15"), shapes=_default(_CLASSIFY), **VMAMBA),
    Family("vmamba_base", build=partial(vmamba.build, "vmamba_base_s2l15"), shapes=_default(_CLASSIFY), **VMAMBA),
    Family("vmamba_v0", build=partial(vmamba.build, "vanilla_vmamba_tiny"), shapes=_CLASSIFY, **VMAMBA),
    Family(
        "vmamba_v04", build=partial(vmamba.build, "vmamba_tiny_s1l8", forward_type="v04"), shapes=_CLASSIFY, **VMAMBA
    ),
    Family(
        "vmamba_xv", build=partial(vmamba.build, "vmamba_tiny_s1l8", forward_type="xv1a"),
        shapes={"small": _rgb(64)}, refused="not enough values to unpack (expected 5, got 4)",
        notes="fails in the repository's own torch cross scan, without us", **VMAMBA,
    ),
    Family("vmamba_m0", build=partial(vmamba.build, "vmamba_tiny_m2"), shapes=_CLASSIFY, **VMAMBA),
    Family("vim_tiny", build=partial(vim.build, "tiny"), shapes=_FIXED, **VIM),
    Family("vim_small", build=partial(vim.build, "small"), shapes=_default(_FIXED), **VIM),
    Family("vim_base", build=partial(vim.build, "base"), shapes=_default(_FIXED), **VIM),
    Family(
        "vm_unet", repo="JCruan519/VM-UNet", commit="43c495b", folders=("VM-UNet",), build=vmunet.build,
        shapes={"small": (*_rgb(64), (3, 96, 64)), "default": (*_rgb(64), (3, 96, 64))},
        zoo={
            "small": {"name": "VMUNet", "args": {"depths": [1] * 4, "depths_decoder": [1] * 4, "dims": 16}},
            "default": {"name": "vmunet_base"},
        },
    ),
    Family(
        "mhs_vm", repo="PixDeep/MHS-VM", commit="be64b6f", folders=("MHS-VM",), build=partial(mhsvm.build, side=64),
        shapes={"small": _rgb(64), "default": _rgb(64)}, notes="scan routes are files, one for each image size",
    ),
    # Its LayerNorms take tokens that are next to empty, twice a layer: any noise is amplified by 20 dB and more.
    Family(
        "lightm_unet_2d", build=partial(lightmunet.build, 2),
        shapes={"small": ((1, 16, 16), (1, 32, 16)), "default": ((1, 32, 32), (1, 64, 32))}, **LIGHT,
    ),
    Family(
        "lightm_unet_3d", build=partial(lightmunet.build, 3),
        shapes={"small": ((1, 8, 8, 8), (1, 8, 16, 8)), "default": ((1, 16, 16, 16), (1, 16, 32, 16))}, **LIGHT,
    ),
    Family(
        "msvm_unet", repo="gndlwch2w/msvm-unet", commit="abb1a8e", folders=("msvm-unet",), build=msvmunet.build,
        shapes=_CLASSIFY, needs=("timm", "torchvision", "einops", "loguru", "triton"),
    ),
    Family(
        "res_vmamba", repo="ChiShengChen/ResVMamba", commit="b7a080d", folders=("ResVMamba",),
        build=resvmamba.build, shapes=_CLASSIFY, needs=("timm", "torchvision", "einops", "fvcore"),
        notes="forward makes convolutions with fresh random weights; here the same each time, and adopted by prepare",
    ),
    Family("local_vim", build=partial(localmamba.build, "vim"), shapes=_FIXED, **LOCAL),
    Family("local_vmamba", build=partial(localmamba.build, "vmamba"), shapes=_CLASSIFY, **LOCAL),
    Family(
        "plainmamba_l1", build=partial(plainmamba.build, "L1"),
        shapes={"small": (*_rgb(64), (3, 96, 64)), "default": _rgb(224)}, **PLAIN,
    ),
    Family(
        "plainmamba_l2", build=partial(plainmamba.build, "L2"),
        shapes={"small": _rgb(64), "default": _rgb(224)}, **PLAIN,
    ),
    Family("plainmamba_l3", build=partial(plainmamba.build, "L3"), shapes=_default(_FIXED), **PLAIN),
    Family(
        "adventurer", repo="wangf3014/Adventurer", commit="a895f9e", folders=("Adventurer",),
        build=adventurer.build, shapes=_FIXED,
    ),
    *(
        Family(
            f"mambamil_{kind.lower()}", build=partial(mambamil.build, kind), shapes=_BAGS, kind="features",
            batches=(1,), notes="one bag a call, as the repository's own loops do", **MIL,
        )
        for kind in ("SRMamba", "Mamba", "BiMamba")
    ),
    Family(
        "lbvim_tiny", repo="cvlab-stonybrook/LBMamba", commit="5215551", folders=("LBMamba",),
        build=lbmamba.build, shapes=_FIXED,
    ),
    *(
        Family(
            name, build=partial(huggingface.build, cls), shapes=_IDS, kind="ids",
            kwargs={"use_cache": False}, notes="the scan is inlined, in plain torch", **HF,
        )
        for name, cls in (
            ("hf_mamba", "MambaModel"), ("hf_mamba_lm", "MambaForCausalLM"), ("hf_mamba2", "Mamba2Model"),
        )
    ),
    Family(
        "opensr_mamba", repo="ESAOpenSR/opensr-mamba", commit="", build=opensr.build,
        shapes=_SR, needs=("opensr_mamba", "timm", "torchvision", "einops"),
        kwargs={"save_attention_maps": True},
    ),
)  # fmt: skip
