"""Vision Mamba (Vim): an image classifier of scans over patch tokens in both directions (Zhu et al. 2024, 2401.09417).

Written from the architecture, with the parameter names of hustvl/Vim, so that its checkpoints load strictly. The mixer
is what upstream's fused kernels compute, in plain calls: upstream's own slow path leaves out the backward direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import ConfigError, InputError
from ssmquant.ops import selective_scan
from ssmquant.zoo.initial import s4d_real_, step_sizes_
from ssmquant.zoo.mambair_blocks import DropPath

__all__ = ["Mamba", "VisionMamba", "vim_base", "vim_nano", "vim_small", "vim_tiny"]

Norm = nn.RMSNorm | nn.LayerNorm


class PatchEmbed(nn.Module):
    """(B, C, H, W) of a fixed size -> tokens (B, L, embed_dim)."""

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        stride: int,
        in_chans: int,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        rows, columns = ((i - p) // stride + 1 for i, p in zip(img_size, patch_size, strict=True))
        self.grid_size = (rows, columns)
        self.num_patches = rows * columns
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        if (H, W) != self.img_size:
            raise InputError(
                f"VisionMamba takes images of {self.img_size[0]} x {self.img_size[1]} pixels, got {H} x {W}: resize "
                "them, or build it with this img_size (its position embedding is fitted to that on loading)"
            )
        return self.proj(x).flatten(2).transpose(1, 2)


class Mamba(nn.Module):
    """Tokens (B, L, d_model) -> the same: a gated selective scan forwards and, with ``bidirectional``, one backwards.

    Args:
        d_model: width of a token.
        d_state: N, states a channel.
        bidirectional: a second scan, with weights of its own, from the last token to the first.
        divide_out: average the two rather than sum them.
        layer_scale: start of a learned scale of the result, None for no scale.
        scan_window: passed to the scans if not 0 (LBMamba's locally bidirectional scan).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        bidirectional: bool,
        divide_out: bool,
        layer_scale: float | None,
        scan_window: int,
    ) -> None:
        super().__init__()
        d_conv, expand = 4, 2
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.divide_out = divide_out
        self.scan_options: dict[str, Any] = {"window": scan_window} if scan_window else {}
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((d_model,), layer_scale))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.ends = ("", "_b") if bidirectional else ("",)
        for (
            end
        ) in self.ends:  # parameters of the backward direction are named conv1d_b, x_proj_b, A_b_log ...
            conv = nn.Conv1d(self.d_inner, self.d_inner, d_conv, padding=d_conv - 1, groups=self.d_inner)
            setattr(self, f"conv1d{end}", conv)
            setattr(self, f"x_proj{end}", nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{end}", nn.Linear(self.dt_rank, self.d_inner))
            setattr(self, f"A{end}_log", nn.Parameter(torch.empty(self.d_inner, d_state)))
            setattr(self, f"D{end}", nn.Parameter(torch.ones(self.d_inner)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        for name, parameter in self.named_parameters():
            if name in ("A_log", "A_b_log"):
                s4d_real_(parameter)
            elif name in ("dt_proj.weight", "dt_proj_b.weight"):
                nn.init.uniform_(parameter, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            elif name in ("dt_proj.bias", "dt_proj_b.bias"):
                step_sizes_(parameter)
            if name in ("A_log", "A_b_log", "D", "D_b"):
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def _scan(self, xz: Tensor, end: str) -> Tensor:
        """(B, 2 * d_inner, L) -> (B, d_inner, L): convolution, projections, scan and gate of one direction."""
        conv1d, x_proj, dt_proj = (getattr(self, f"{name}{end}") for name in ("conv1d", "x_proj", "dt_proj"))
        A_log, D = getattr(self, f"A{end}_log"), getattr(self, f"D{end}")
        x, z = xz.chunk(2, dim=1)
        x = F.silu(conv1d(x)[..., : x.shape[-1]])  # padded at both ends, so causal when cut here
        x_dbl = x_proj(x.transpose(1, 2)).transpose(1, 2)
        dt, B, C = x_dbl.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        out = selective_scan(
            x,
            dt_proj.weight @ dt,
            -A_log.float().exp(),
            B.contiguous(),
            C.contiguous(),
            D.float(),
            z=z,
            delta_bias=dt_proj.bias.float(),
            delta_softplus=True,
            **self.scan_options,
        )
        assert isinstance(out, Tensor)
        return out

    def forward(self, x: Tensor) -> Tensor:
        xz = self.in_proj(x).transpose(1, 2)
        out = self._scan(xz, "")
        if "_b" in self.ends:
            out = out + self._scan(xz.flip(-1), "_b").flip(-1)
            if self.divide_out:
                out = out / 2
        out = self.out_proj(out.transpose(1, 2))
        return out if self.gamma is None else out * self.gamma


class Block(nn.Module):
    """Adds the last mixer's result to the residual stream, normalises that and mixes; returns both."""

    def __init__(self, mixer: Mamba, norm: Norm, drop_path: float, residual_in_fp32: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + self.drop_path(hidden)
        hidden = self.norm(residual.to(self.norm.weight.dtype))
        if self.residual_in_fp32:
            residual = residual.float()
        return self.mixer(hidden), residual


class VisionMamba(nn.Module):
    """Classifies images of one size: (B, channels, H, W) -> (B, num_classes).

    Constructor arguments are upstream's, as far as they have an effect.

    Args:
        img_size: height and width of the images, or both in one number.
        patch_size: of a token, likewise.
        stride: between tokens.
        depth: blocks.
        embed_dim: width of a token.
        d_state: N, states a channel.
        channels: of the image.
        num_classes: outputs; 0 leaves the features as they are.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        norm_epsilon: of all norms.
        rms_norm: RMSNorm instead of LayerNorm.
        fused_add_norm: kept for upstream's configurations; it chooses a kernel there.
        residual_in_fp32: keep the residual stream in float32.
        final_pool_type: without a class token, "none" takes the last token, "mean" their mean, "max" the largest
            logit of all, "all" gives logits for every token.
        if_abs_pos_embed: add a learned position embedding.
        if_rope: not served.
        init_layer_scale: start of a learned scale of every mixer's result, None for no scale.
        bimamba_type: "v2" (both directions) or "none" (forwards only).
        if_cls_token: classify by a learned token: in the middle of the sequence, or at its start or both ends.
        if_divide_out: average the directions rather than sum them.
        use_double_cls_token, use_middle_cls_token: where the token is; the first goes before the second.
        scan_window: window of a locally bidirectional scan (LBMamba); 0 for the plain one.

    Raises:
        ConfigError: an argument is out of range, or asks for what is not served.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        stride: int = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = True,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        init_layer_scale: float | None = None,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool = True,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        scan_window: int = 0,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        image, patch = _pair(img_size), _pair(patch_size)
        arguments["img_size"], arguments["patch_size"] = list(image), list(patch)
        _validate(arguments)
        self.zoo_config: dict[str, Any] = {"name": "VisionMamba", "args": arguments}
        self.num_classes = num_classes
        self.embed_dim = self.num_features = embed_dim
        self.final_pool_type = final_pool_type
        self.residual_in_fp32 = residual_in_fp32
        self.cls_place = ""
        if if_cls_token:
            self.cls_place = "ends" if use_double_cls_token else "middle" if use_middle_cls_token else "start"

        def norm() -> Norm:
            return (nn.RMSNorm if rms_norm else nn.LayerNorm)(embed_dim, eps=norm_epsilon)

        def token(count: int = 1) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, embed_dim), std=0.02))

        self.patch_embed = PatchEmbed(image, patch, stride, channels, embed_dim)
        if self.cls_place == "ends":
            self.cls_token_head, self.cls_token_tail = token(), token()
        elif self.cls_place:
            self.cls_token = token()
        extra = len(self._cls_positions(self.patch_embed.num_patches))
        self.pos_embed = token(self.patch_embed.num_patches + extra) if if_abs_pos_embed else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        rates = [0.0, *(drop_path_rate * i / max(1, depth - 1) for i in range(depth - 1))]
        self.layers = nn.ModuleList(
            Block(
                Mamba(embed_dim, d_state, bimamba_type == "v2", if_divide_out, init_layer_scale, scan_window),
                norm(),
                rate,
                residual_in_fp32,
            )
            for rate in rates
        )
        self.norm_f = norm()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        conv = self.patch_embed.proj
        nn.init.trunc_normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for module in self.modules():
            if isinstance(module, Mamba):  # as in GPT-2, the deeper the model the less each block adds
                module.out_proj.weight.div_(math.sqrt(len(self.layers)))

    def _cls_positions(self, patches: int) -> list[int]:
        """Where class tokens stand among that many patches, in the sequence that holds both."""
        return {"": [], "start": [0], "middle": [patches // 2], "ends": [0, patches + 1]}[self.cls_place]

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of the class token, or as ``final_pool_type`` says."""
        x = self.patch_embed(x)
        B, positions = x.shape[0], self._cls_positions(self.patch_embed.num_patches)
        if self.cls_place == "ends":
            x = torch.cat(
                [self.cls_token_head.expand(B, -1, -1), x, self.cls_token_tail.expand(B, -1, -1)], dim=1
            )
        elif positions:
            at = positions[0]
            x = torch.cat([x[:, :at], self.cls_token.expand(B, -1, -1), x[:, at:]], dim=1)
        if self.pos_embed is not None:
            x = self.pos_drop(x + self.pos_embed)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        x = residual + self.drop_path(x)
        x = self.norm_f(x.to(self.norm_f.weight.dtype))
        if len(positions) == 2:
            return (x[:, positions[0]] + x[:, positions[1]]) / 2
        if positions:
            return x[:, positions[0]]
        if self.final_pool_type == "none":
            return x[:, -1]
        return x.mean(dim=1) if self.final_pool_type == "mean" else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.forward_features(x))
        return x.amax(dim=1) if self.final_pool_type == "max" and not self.cls_place else x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}pos_embed"
        if self.pos_embed is not None and isinstance(state_dict.get(key), Tensor):
            state_dict[key] = self._fit_positions(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_positions(self, embed: Tensor) -> Tensor:
        """The position embedding of a model for square images of another size, interpolated to this one's grid."""
        assert self.pos_embed is not None
        if embed.shape == self.pos_embed.shape or embed.dim() != 3:
            return embed
        patches = embed.shape[1] - len(self._cls_positions(0))
        side = math.isqrt(max(patches, 0))
        if patches <= 0 or side * side != patches:
            return embed  # which does not load
        old = self._cls_positions(patches)
        grid = embed[:, [i for i in range(embed.shape[1]) if i not in old]].float()
        grid = grid.transpose(1, 2).reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=self.patch_embed.grid_size, mode="bicubic").flatten(2).transpose(1, 2)
        out = list(grid.to(embed.dtype).unbind(1))
        for source, target in zip(old, self._cls_positions(self.patch_embed.num_patches), strict=True):
            out.insert(target, embed[:, source])
        return torch.stack(out, dim=1)


def _pair(x: Any) -> tuple[int, int]:
    pair = (x, x) if isinstance(x, int) else tuple(x)
    if len(pair) != 2:
        raise ConfigError(f"VisionMamba: expected a size, or height and width, got {x!r}")
    return pair


def _validate(args: Mapping[str, Any]) -> None:
    def need(fine: bool, name: str, wanted: str) -> None:
        if not fine:
            raise ConfigError(f"VisionMamba: {name}={args[name]!r}, expected {wanted}")

    for name in ("stride", "depth", "embed_dim", "d_state", "channels"):
        need(type(args[name]) is int and args[name] >= 1, name, "a positive integer")
    for name in ("num_classes", "scan_window"):
        need(type(args[name]) is int and args[name] >= 0, name, "0 or a positive integer")
    for name in ("img_size", "patch_size"):
        need(all(type(i) is int and i >= 1 for i in args[name]), name, "positive integers")
    fits = all(i >= p for i, p in zip(args["img_size"], args["patch_size"], strict=True))
    need(fits, "img_size", "at least the patch size")
    for name in ("drop_rate", "drop_path_rate"):
        need(0.0 <= args[name] < 1.0, name, "a number in [0, 1)")
    need(args["norm_epsilon"] > 0, "norm_epsilon", "a positive number")
    need(not args["if_rope"], "if_rope", "False: rotary position embeddings are not served")
    # Upstream runs any other string as "none", in silence.
    need(args["bimamba_type"] in ("none", "v2"), "bimamba_type", "'v2' or 'none'")
    pools = ("none", "mean", "max", "all")
    need(args["final_pool_type"] in pools, "final_pool_type", f"one of {', '.join(pools)}")


def _published(embed_dim: int, img_size: int | Sequence[int], stride: int, **args: Any) -> VisionMamba:
    return VisionMamba(img_size, stride=stride, embed_dim=embed_dim, final_pool_type="mean", **args)


def vim_tiny(img_size: int | Sequence[int] = 224, stride: int = 16, num_classes: int = 1000) -> VisionMamba:
    """The published Vim-T, 7.1 M parameters; ``stride=8`` for the long-sequence one."""
    return _published(192, img_size, stride, num_classes=num_classes)


def vim_small(img_size: int | Sequence[int] = 224, stride: int = 16, num_classes: int = 1000) -> VisionMamba:
    """The published Vim-S, 25.8 M parameters; ``stride=8`` for the long-sequence one."""
    return _published(384, img_size, stride, num_classes=num_classes)


def vim_base(img_size: int | Sequence[int] = 224, stride: int = 16, num_classes: int = 1000) -> VisionMamba:
    """The published Vim-B, 97.6 M parameters."""
    return _published(768, img_size, stride, num_classes=num_classes)


def vim_nano(img_size: int | Sequence[int] = 32, num_classes: int = 10, channels: int = 3) -> VisionMamba:
    """A small model of the published kind that trains on a CPU: width 32, two blocks, 4 states, patches of 8 x 8."""
    args = {"num_classes": num_classes, "channels": channels, "drop_path_rate": 0.0}
    return _published(32, img_size, 8, patch_size=8, depth=2, d_state=4, **args)
