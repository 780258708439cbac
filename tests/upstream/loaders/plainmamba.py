"""ChenhongyiYang/PlainMamba: its backbone, with a few names of mmcv 1.x and mmcls that it is built on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.upstream.loaders import checkout, enter, load, package, stub


class _BaseModule(nn.Module):
    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()


class _Padding(nn.Module):
    """mmcv's AdaptivePadding: up to whole windows, at the right and at the bottom."""

    def __init__(self, kernel_size: Any, stride: Any, dilation: Any, padding: str) -> None:
        super().__init__()
        self.kernel, self.stride = kernel_size, stride

    def get_pad_shape(self, size: Any) -> tuple[int, ...]:
        steps = zip(size, self.kernel, self.stride, strict=True)
        return tuple(max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in steps)

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.get_pad_shape(x.shape[-2:])
        return nn.functional.pad(x, (0, right, 0, down)) if down or right else x


class _Registry:
    def register_module(self, *args: Any, **kwargs: Any) -> Any:
        return lambda cls: cls


def _norm(cfg: dict[str, Any], width: int, postfix: Any = "") -> tuple[str, nn.Module]:
    return f"ln{postfix}", nn.LayerNorm(width, eps=cfg.get("eps", 1e-5))


def build(arch: str, size: str) -> nn.Module:
    root = checkout("PlainMamba") / "mmcls"
    enter(root.parent)
    from timm.layers import DropPath, to_2tuple, trunc_normal_

    def dropout(cfg: dict[str, Any]) -> nn.Module:
        return DropPath(cfg["drop_prob"])

    stub("mmcv.cnn", build_norm_layer=_norm, build_conv_layer=None)
    stub("mmcv.cnn.utils.weight_init", trunc_normal_=trunc_normal_)
    stub("mmcv.cnn.bricks.transformer", build_dropout=dropout, AdaptivePadding=_Padding)
    stub("mmcv.runner.base_module", ModuleList=nn.ModuleList, BaseModule=_BaseModule)
    stub("mmcv.utils", to_2tuple=to_2tuple, digit_version=None)
    for name in ("mmcls", "mmcls.plain_mamba_dev", "mmcls.plain_mamba_dev.models"):
        package(name, root.joinpath(*name.split(".")[1:]))
    stub("mmcls.models.builder", BACKBONES=_Registry())
    package("mmcls.models.utils", root / "models" / "utils")
    resize = load("mmcls.models.utils.embed").resize_pos_embed
    stub("mmcls.models.utils", to_2tuple=to_2tuple, resize_pos_embed=resize)
    stub("mmcls.models.backbones.base_backbone", BaseBackbone=_BaseModule)
    PlainMamba: Any = load("mmcls.plain_mamba_dev.models.plain_mamba.plain_mamba").PlainMamba
    if size == "small":
        kept = PlainMamba.arch_zoo[arch]
        PlainMamba.arch_zoo = {arch: {**kept, "embed_dims": 32, "num_layers": 2}}
        return PlainMamba(arch=arch, img_size=64, drop_path_rate=0.1)
    return PlainMamba(arch=arch, drop_path_rate=0.1)
