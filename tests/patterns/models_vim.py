"""Fused mixers that get weights of modules which are never called (Vim), and one over voxels (LightM-UNet)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.native import BiMambaInnerFn, MambaInnerFn, MambaInnerFnNoOutProj, New, Old
from tests.patterns.twin import Twin, under

__all__ = ["TWINS", "Mamba", "RMSNorm", "Vim", "add_norm", "mamba_parameters", "rearranged"]


def mamba_parameters(
    mod: nn.Module, d_model: int, inner: int, states: int, rank: int, suffix: str = "", conv: int = 4
) -> None:
    """Registers conv1d, x_proj, dt_proj, A_log and D, with ``_b`` behind the names of the backward direction."""
    setattr(mod, f"conv1d{suffix}", nn.Conv1d(inner, inner, conv, groups=inner, padding=conv - 1))
    setattr(mod, f"x_proj{suffix}", nn.Linear(inner, rank + 2 * states, bias=False))
    dt_proj = nn.Linear(rank, inner)
    nn.init.uniform_(dt_proj.bias, -3, -1)
    setattr(mod, f"dt_proj{suffix}", dt_proj)
    A = torch.arange(1.0, states + 1).repeat(inner, 1)
    setattr(mod, f"A{suffix}_log", nn.Parameter(torch.log(A)))
    setattr(mod, f"D{suffix}", nn.Parameter(torch.ones(inner)))


def rearranged(weight: Tensor, hidden_states: Tensor) -> Tensor:
    """in_proj by weight: samples and tokens in one axis."""
    batch, length, _ = hidden_states.shape
    xz = weight @ hidden_states.permute(2, 0, 1).reshape(-1, batch * length)
    return xz.view(-1, batch, length).transpose(0, 1)


class Mamba(nn.Module):
    """``use_fast_path=False`` computes something else, as it does upstream: one direction only."""

    def __init__(self, d_model: int, kind: str, states: int = 3, rank: int = 2) -> None:
        super().__init__()
        inner = 12
        self.kind, self.use_fast_path = kind, True
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.activation, self.act = "silu", nn.SiLU()
        mamba_parameters(self, d_model, inner, states, rank)
        if kind == "v1":
            self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        if kind == "v2":
            mamba_parameters(self, d_model, inner, states, rank, "_b")
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def operands(self, suffix: str = "") -> tuple[Any, ...]:
        parts = [getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")]
        return (*parts, -torch.exp(getattr(self, f"A{suffix}_log").float()))

    def one_way(self, xz: Tensor, suffix: str = "") -> Tensor:
        conv, x_proj, dt_proj, D, A = self.operands(suffix)
        return MambaInnerFnNoOutProj.apply(
            xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A, None, None, D.float(), dt_proj.bias.float(),
            None, None, True,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        xz = rearranged(self.in_proj.weight, hidden_states)
        if self.in_proj.bias is not None:
            xz = xz + self.in_proj.bias.to(dtype=xz.dtype)[:, None]
        if not (self.use_fast_path and inference_params is None):
            y = self.one_way(xz)
            return F.linear(y.transpose(1, 2), self.out_proj.weight, self.out_proj.bias)
        if self.kind == "v2":
            out, back = self.one_way(xz), self.one_way(xz.flip([-1]), "_b")
            out = (out + back.flip([-1])) / 2
            return F.linear(out.transpose(1, 2), self.out_proj.weight, self.out_proj.bias)
        conv, x_proj, dt_proj, D, A = self.operands()
        fused, more = MambaInnerFn, (A,)
        if self.kind == "v1":
            fused, more = BiMambaInnerFn, (A, -torch.exp(self.A_b_log.float()))
        return fused.apply(
            xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, self.out_proj.weight, self.out_proj.bias, *more,
            None, None, D.float(), dt_proj.bias.float(), None, None, True,
        )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5
        self.register_parameter("bias", None)


def add_norm(x: Tensor, norm: nn.Module, residual: Any, prenorm: bool, rms: bool, old: bool) -> Any:
    """The fused add and norm, of either version."""
    if old:
        return Old.LayerNormFn.apply(x, norm.weight, norm.bias, residual, norm.eps, prenorm, True, rms)
    return New.LayerNormFn.apply(
        x, norm.weight, norm.bias, residual, None, None, None, norm.eps, 0.0, None, prenorm, True, rms, False
    )


class Block(nn.Module):
    def __init__(self, width: int, kind: str, rms: bool, old: bool) -> None:
        super().__init__()
        self.rms, self.old = rms, old
        self.mixer, self.norm = Mamba(width, kind), RMSNorm(width) if rms else nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden_states, residual = add_norm(hidden_states, self.norm, residual, True, self.rms, self.old)
        return self.mixer(hidden_states), residual


class Vim(nn.Module):
    """Patches, a class token in the middle of them, pairs of (hidden, residual)."""

    def __init__(self, kind: str, rms: bool, old: bool) -> None:
        super().__init__()
        self.rms, self.old = rms, old
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(0.2 * torch.randn(1, 17, 8))
        self.layers = nn.ModuleList([Block(8, kind, rms, old)])
        self.norm_f = RMSNorm(8) if rms else nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, return_features: bool = False, inference_params: Any = None) -> Tensor:
        B, _, H, W = x.shape
        assert H == 16 and W == 16, f"input size {H}x{W} does not match 16x16"  # noqa: PT018
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        middle = x.shape[1] // 2
        x = torch.cat((x[:, :middle], self.cls_token.expand(B, -1, -1), x[:, middle:]), dim=1)
        hidden_states, residual = x + self.pos_embed, None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        hidden_states = add_norm(hidden_states, self.norm_f, residual, False, self.rms, self.old)
        features = hidden_states[:, middle, :]
        return features if return_features else self.head(features)


# ---- LightM-UNet ---------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """One direction over any number of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        mamba_parameters(self, width, width, 2, 1)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        xz = rearranged(self.in_proj.weight, hidden_states)
        return MambaInnerFn.apply(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, -torch.exp(self.A_log.float()), None, None, self.D.float(), self.dt_proj.bias.float(),
            None, None, True,
        )  # fmt: skip


class MambaLayer(nn.Module):
    """The norm is used before the mixer and, the same one, behind it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.mamba, self.proj = nn.LayerNorm(width), Mixer(width), nn.Linear(width, out)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            x = x.type(torch.float32)
        B, C = x.shape[:2]
        n_tokens, sizes = x.shape[2:].numel(), x.shape[2:]
        tokens = x.reshape(B, C, n_tokens).transpose(-1, -2)
        y = self.norm(self.mamba(self.norm(tokens)) + self.skip_scale * tokens)
        return self.proj(y).transpose(-1, -2).reshape(B, -1, *sizes)


def depthwise(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(width, width, 3, padding=1, groups=width), nn.Conv3d(width, out, 1))


class ResUpBlock(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(4, width), nn.GroupNorm(4, width), act
        self.conv, self.conv2 = depthwise(width, width), nn.Conv3d(width, width, 1)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.act(self.norm1(x))
        x = self.conv2(self.act(self.norm2(self.conv(x) + self.skip_scale * identity)))
        x += identity
        return x


class LightMUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act_mod = nn.ReLU(inplace=True)  # everywhere the same one
        self.convInit = depthwise(1, 4)
        self.down_layers = nn.ModuleList(
            [MambaLayer(4, 4), nn.Sequential(MambaLayer(4, 8), nn.MaxPool3d(2, 2))]
        )
        self.up_samples = nn.Sequential(nn.Conv3d(8, 4, 1), nn.Upsample(scale_factor=2, mode="trilinear"))
        self.up_layers = ResUpBlock(4, self.act_mod)
        self.conv_final = nn.Sequential(nn.GroupNorm(2, 4), self.act_mod, nn.Conv3d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down_layers[0](self.convInit(x))
        x = self.up_samples(self.down_layers[1](skip))
        x += skip
        return self.conv_final(self.up_layers(x))


_DIRECTION = "conv1d x_proj dt_proj scan"
_BACK = "conv1d_b x_proj_b dt_proj_b scan#2"


def _vim(mixer: str) -> tuple[str, ...]:
    return ("patch_embed", *under("layers.0.mixer", f"in_proj {mixer} out_proj"), "head")


_LIGHT = f"mamba.in_proj {' '.join(under('mamba', _DIRECTION))} mamba.out_proj proj"
_SIZES = ((3, 16, 16),)

TWINS = (
    Twin(
        "vim v2, rms norm", functools.partial(Vim, "v2", True, False), _SIZES, _vim(f"{_DIRECTION} {_BACK}"), 2,
        tolerance=2e-6,
    ),
    Twin(
        "vim v1, old layer norm", functools.partial(Vim, "v1", False, True), _SIZES, _vim(f"{_DIRECTION} scan#2"), 2,
        tolerance=2e-6,
    ),
    Twin(
        "vim of one direction, layer norm", functools.partial(Vim, "none", False, False), _SIZES, _vim(_DIRECTION), 1,
        tolerance=2e-6,
    ),
    Twin(
        "voxels, norm twice, in place", LightMUNet, ((1, 4, 4, 4), (1, 2, 4, 6)),
        (
            *under("convInit", "0 1"), *under("down_layers.0", _LIGHT), *under("down_layers.1.0", _LIGHT),
            "up_samples.0", *under("up_layers", "conv.0 conv.1 conv2"), "conv_final.2",
        ), 2, tolerance=2e-6,
    ),
)  # fmt: skip
