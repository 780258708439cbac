"""VMamba: an image classifier of four-direction selective scans (Liu et al. 2024, arXiv 2401.10166).

Written from the architecture, with the parameter names of MzeroMiko/VMamba, so that its checkpoints load strictly, old
ones included. Served are its first version (``forward_type="v0"``) and v01 to v05; the published models are "v05_noz".
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import ConfigError
from ssmquant.zoo.vmamba_blocks import (
    ACTIVATIONS,
    NORMS,
    SS2D,
    ForwardType,
    Mlp,
    PatchMerging2D,
    Permute,
    VSSBlock,
    gMlp,
)

__all__ = ["VSSM", "vmamba_base", "vmamba_nano", "vmamba_small", "vmamba_tiny", "vmamba_tiny_v0"]

# Names of checkpoints from before 2024.
_LEGACY = (
    (r"patch_embed\.proj\.", "patch_embed.0."),
    (r"patch_embed\.norm\.", "patch_embed.2."),
    (r"(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"norm\.", "classifier.norm."),
    (r"head\.", "classifier.head."),
)


class VSSM(nn.Module):
    """Classifies images: (B, in_chans, H, W) -> (B, num_classes).

    Constructor arguments are upstream's, as far as they have an effect. Upstream's default ``forward_type="v2"`` does
    not run there; in float32 it is the function of "v05", the default here.

    Args:
        patch_size: pixels a side of a token; 4 in all published models.
        in_chans: channels of the image.
        num_classes: outputs.
        depths: blocks in each stage.
        dims: width of each stage, or of the first, from which it doubles.
        ssm_d_state: N, states a channel.
        ssm_ratio: width of the scan relative to the stage's.
        ssm_dt_rank: inner width of the step sizes' projection, or "auto".
        ssm_act_layer, mlp_act_layer: "silu", "gelu", "relu" or "sigmoid".
        ssm_conv: kernel of the depthwise convolution before the scan; below 2 there is none.
        ssm_conv_bias: whether that has a bias.
        ssm_drop_rate, mlp_drop_rate: dropout after the scan and in the channel mixer.
        ssm_init: "v0", "v1" or "v2", how the scan's parameters start.
        forward_type: "v0", or "v01" to "v05" with suffixes such as "_noz" (no gate).
        mlp_ratio: width of the channel mixer relative to the stage's; 0 leaves it out.
        gmlp: gate the channel mixer.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        patch_norm: normalise the tokens.
        norm_layer: "ln" (images are kept (B, H, W, C)), "ln2d" or "bn" (both (B, C, H, W)).
        downsample_version: "v1" (merge 2 x 2 tokens), "v2" (2 x 2 convolution) or "v3" (3 x 3 convolution).
        patchembed_version: "v1" (one convolution) or "v2" (two).
        use_checkpoint: compute blocks again in the backward pass, to save memory.
        posembed: add a learned position embedding, which fixes the size of images.
        imgsize: that size.
        scan_window: window of a locally bidirectional scan (LBMamba); 0 for the plain one.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: str = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v05",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        norm_layer: str = "ln",
        downsample_version: str = "v2",
        patchembed_version: str = "v1",
        use_checkpoint: bool = False,
        posembed: bool = False,
        imgsize: int = 224,
        scan_window: int = 0,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        arguments["depths"] = depths = [int(d) for d in depths]
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        arguments["dims"] = dims
        kind = ForwardType.parse(forward_type)
        _validate(arguments, kind)
        self.zoo_config: dict[str, Any] = {"name": "VSSM", "args": arguments}
        self.num_classes = num_classes
        self.num_layers = len(depths)
        self.dims = dims
        self.num_features = dims[-1]
        norm = NORMS[norm_layer.lower()]
        self.channel_first = norm_layer.lower() != "ln"

        self.pos_embed: nn.Parameter | None = None
        if posembed:
            side = imgsize // patch_size
            self.pos_embed = nn.Parameter(torch.empty(1, dims[0], side, side))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        stem = self._stem_v1 if patchembed_version == "v1" else self._stem_v2
        self.patch_embed = stem(in_chans, dims[0], patch_size, norm if patch_norm else None)

        def block(dim: int, drop_path: float) -> VSSBlock:
            op = SS2D(
                dim, ssm_d_state, ssm_ratio, ssm_dt_rank, ACTIVATIONS[ssm_act_layer.lower()], ssm_conv, ssm_conv_bias,
                ssm_drop_rate, ssm_init, kind, self.channel_first, scan_window,
            )  # fmt: skip
            mixer, hidden = gMlp if gmlp else Mlp, int(dim * mlp_ratio)
            mixed = (dim, hidden, ACTIVATIONS[mlp_act_layer.lower()], mlp_drop_rate, self.channel_first)
            mlp = mixer(*mixed) if mlp_ratio > 0 else None
            return VSSBlock(dim, op, mlp, norm, drop_path, use_checkpoint)

        total = sum(depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            blocks = nn.Sequential(*(block(dims[i], next(rates)) for _ in range(depth)))
            down: nn.Module = nn.Identity()
            if i + 1 < len(depths):
                down = self._downsample(downsample_version, dims[i], dims[i + 1], norm)
            self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))
        self.classifier = nn.Sequential(
            OrderedDict(
                norm=norm(self.num_features),
                permute=self._channels_first(),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(1),
                head=nn.Linear(self.num_features, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _channels_first(self, needed: bool = True) -> nn.Module:
        return nn.Identity() if self.channel_first or not needed else Permute(0, 3, 1, 2)

    def _channels_back(self, needed: bool = True) -> nn.Module:
        return nn.Identity() if self.channel_first or not needed else Permute(0, 2, 3, 1)

    def _stem_v1(
        self, in_chans: int, dim: int, size: int, norm: Callable[[int], nn.Module] | None
    ) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_chans, dim, size, size),
            self._channels_back(),
            nn.Identity() if norm is None else norm(dim),
        )

    def _stem_v2(
        self, in_chans: int, dim: int, size: int, norm: Callable[[int], nn.Module] | None
    ) -> nn.Sequential:
        stride, half = size // 2, dim // 2
        return nn.Sequential(
            nn.Conv2d(in_chans, half, stride + 1, stride, 1),
            self._channels_back(norm is not None),
            nn.Identity() if norm is None else norm(half),
            self._channels_first(norm is not None),
            nn.GELU(),
            nn.Conv2d(half, dim, stride + 1, stride, 1),
            self._channels_back(),
            nn.Identity() if norm is None else norm(dim),
        )

    def _downsample(
        self, version: str, dim: int, out_dim: int, norm: Callable[[int], nn.Module]
    ) -> nn.Module:
        if version == "v1":
            return PatchMerging2D(dim, out_dim, norm, self.channel_first)
        conv = nn.Conv2d(dim, out_dim, 2, 2) if version == "v2" else nn.Conv2d(dim, out_dim, 3, 2, 1)
        return nn.Sequential(self._channels_first(), conv, self._channels_back(), norm(out_dim))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + (self.pos_embed if self.channel_first else self.pos_embed.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:
            for old, new in _LEGACY:
                name, count = re.subn(f"^{old}", new, key[len(prefix) :])
                if count:
                    state_dict[prefix + name] = state_dict.pop(key)
                    break
        embed = state_dict.get(f"{prefix}pos_embed")
        if isinstance(embed, Tensor) and self.pos_embed is not None and embed.dim() == 4:
            size = self.pos_embed.shape[2:]
            if embed.shape[2:] != size:
                state_dict[f"{prefix}pos_embed"] = F.interpolate(embed.float(), size=size, mode="bicubic")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _validate(args: Mapping[str, Any], kind: ForwardType) -> None:
    def need(fine: bool, name: str, wanted: str) -> None:
        if not fine:
            raise ConfigError(f"VSSM: {name}={args[name]!r}, expected {wanted}")

    def choice(name: str, choices: Any) -> None:
        fine = isinstance(args[name], str) and args[name].lower() in choices
        need(fine, name, f"one of {', '.join(choices)}")

    for name in ("patch_size", "in_chans", "num_classes", "ssm_d_state", "imgsize"):
        need(type(args[name]) is int and args[name] >= 1, name, "a positive integer")
    for name in ("ssm_drop_rate", "mlp_drop_rate", "drop_path_rate"):
        need(0.0 <= args[name] < 1.0, name, "a number in [0, 1)")
    for name in ("ssm_conv", "scan_window"):
        need(type(args[name]) is int and args[name] >= 0, name, "0 or a positive integer")
    depths, dims = args["depths"], args["dims"]
    need(len(depths) > 0 and all(d >= 1 for d in depths), "depths", "positive integers")
    fine = len(dims) == len(depths) and all(type(d) is int and d >= 1 for d in dims)
    need(fine, "dims", "a positive integer, or one for each stage")
    need(int(args["ssm_ratio"] * min(dims)) >= 1, "ssm_ratio", "a ratio that leaves at least one channel")
    need(args["mlp_ratio"] == 0 or int(args["mlp_ratio"] * min(dims)) >= 1, "mlp_ratio", "0 or such a ratio")
    rank = args["ssm_dt_rank"]
    need(rank == "auto" or (type(rank) is int and rank >= 1), "ssm_dt_rank", "a positive integer or 'auto'")
    choice("ssm_act_layer", ACTIVATIONS)
    choice("mlp_act_layer", ACTIVATIONS)
    choice("norm_layer", NORMS)
    choice("ssm_init", ("v0", "v1", "v2"))
    choice("downsample_version", ("v1", "v2", "v3"))
    choice("patchembed_version", ("v1", "v2"))
    if args["patchembed_version"] == "v2":
        need(args["patch_size"] >= 2, "patch_size", "2 or more with patchembed_version 'v2'")
        need(dims[0] >= 2, "dims", "2 or more with patchembed_version 'v2'")
    if kind.version == "v0":
        need(args["norm_layer"].lower() == "ln", "norm_layer", "'ln' with forward_type 'v0'")


def _published(depths: Sequence[int], dims: int, ssm_ratio: float, **args: Any) -> VSSM:
    return VSSM(
        depths=depths,
        dims=dims,
        ssm_d_state=1,
        ssm_ratio=ssm_ratio,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        norm_layer="ln2d",
        downsample_version="v3",
        patchembed_version="v2",
        **args,
    )


def vmamba_tiny(num_classes: int = 1000, drop_path_rate: float = 0.2) -> VSSM:
    """The published VMamba-T[s1l8], 30.2 M parameters."""
    return _published((2, 2, 8, 2), 96, 1.0, num_classes=num_classes, drop_path_rate=drop_path_rate)


def vmamba_small(num_classes: int = 1000, drop_path_rate: float = 0.3) -> VSSM:
    """The published VMamba-S[s2l15], 50.1 M parameters."""
    return _published((2, 2, 15, 2), 96, 2.0, num_classes=num_classes, drop_path_rate=drop_path_rate)


def vmamba_base(num_classes: int = 1000, drop_path_rate: float = 0.6) -> VSSM:
    """The published VMamba-B[s2l15], 88.6 M parameters."""
    return _published((2, 2, 15, 2), 128, 2.0, num_classes=num_classes, drop_path_rate=drop_path_rate)


def vmamba_tiny_v0(num_classes: int = 1000, drop_path_rate: float = 0.2) -> VSSM:
    """The first version's tiny model, without channel mixers and with 16 states, 22.9 M parameters."""
    return VSSM(
        num_classes=num_classes,
        forward_type="v0",
        mlp_ratio=0.0,
        downsample_version="v1",
        drop_path_rate=drop_path_rate,
    )


def vmamba_nano(num_classes: int = 10, in_chans: int = 3) -> VSSM:
    """A small model of the published kind that trains on a CPU: widths 24 and 48, one and two blocks."""
    return _published((1, 2), 24, 1.0, num_classes=num_classes, in_chans=in_chans, drop_path_rate=0.0)
