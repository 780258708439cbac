"""The parts of VMamba: the four-way scan of its first version and of v01 to v05, and the blocks around it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmquant.errors import ConfigError
from ssmquant.ops import selective_scan
from ssmquant.zoo.initial import s4d_real_, step_sizes_
from ssmquant.zoo.mambair_blocks import DropPath

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "SS2D",
    "ForwardType",
    "LayerNorm2d",
    "Linear2d",
    "Mlp",
    "PatchMerging2D",
    "Permute",
    "VSSBlock",
    "gMlp",
]

_DIRECTIONS = 4


class ForwardType(NamedTuple):
    """What a ``forward_type`` such as ``"v05_noz"`` stands for."""

    version: str
    out_norm: str
    gated: bool
    gate_activation: bool
    out_activation: bool
    float32: bool

    @classmethod
    def parse(cls, text: Any) -> ForwardType:
        """Reads ``v0``, or ``v01`` to ``v05`` with upstream's suffixes in upstream's order.

        Raises:
            ConfigError: anything else, with the list of what there is.
        """
        pattern = r"(v0[1-5]?)(?:_on(none|dwconv3|cnorm|softmax|sigmoid))?(_nozact)?(_noz)?(_oact)?(_no32)?"
        found = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if found is None or (found[1] == "v0" and text != "v0"):
            raise ConfigError(
                f"VSSM: forward_type={text!r}, expected 'v0', or 'v01', 'v02', 'v03', 'v04' or 'v05' followed by any "
                "of '_onnone' ('_ondwconv3', '_oncnorm', '_onsoftmax', '_onsigmoid'), '_nozact', '_noz', '_oact' and "
                "'_no32', in this order: the published models have 'v05_noz' and 'v0'"
            )
        version, norm, plain_gate, no_gate, out_activation, no_float32 = found.groups()
        return cls(
            version,
            out_norm=norm or "norm",
            gated=no_gate is None,
            gate_activation=plain_gate is None,
            out_activation=out_activation is not None,
            float32=version == "v0" or (version < "v04" and no_float32 is None),
        )


class Linear2d(nn.Linear):
    """A linear layer over the channels of (B, C, H, W); takes the weights of a 1x1 convolution too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.shape[2:] == (1, 1):
            state_dict[f"{prefix}weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Reorders dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


class SoftmaxSpatial(nn.Module):
    """Softmax over the pixels."""

    def __init__(self, channel_first: bool) -> None:
        super().__init__()
        self.dims = (2, 3) if channel_first else (1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(*self.dims).softmax(self.dims[0]).view(x.shape)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "ln": nn.LayerNorm,
    "ln2d": LayerNorm2d,
    "bn": nn.BatchNorm2d,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}


def _linear(channel_first: bool) -> type[nn.Linear]:
    return Linear2d if channel_first else nn.Linear


def _out_norm(kind: str, dim: int, channel_first: bool) -> nn.Module:
    if kind == "softmax":
        return SoftmaxSpatial(channel_first)
    if kind in ("none", "sigmoid"):
        return nn.Sigmoid() if kind == "sigmoid" else nn.Identity()
    norm = LayerNorm2d(dim) if channel_first else nn.LayerNorm(dim)
    if kind == "norm":
        return norm
    conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
    before = nn.Identity() if channel_first else Permute(0, 3, 1, 2)
    after = nn.Identity() if channel_first else Permute(0, 2, 3, 1)
    return nn.Sequential(*([norm] if kind == "cnorm" else []), before, conv, after)


class SS2D(nn.Module):
    """Selective scans of an image along rows and columns, forwards and backwards, with weights of their own, summed.

    Args:
        d_model: channels in and out.
        d_state: N, states a channel.
        ssm_ratio: width of the scan relative to ``d_model``.
        dt_rank: inner width of the step sizes' projection, ``"auto"`` for one sixteenth of ``d_model``.
        act_layer: activation after the convolution and of the gate.
        d_conv: kernel of the depthwise convolution; below 2 there is none.
        conv_bias: whether that has a bias.
        dropout: of the result.
        initialize: "v0" (S4D-real decays, log-uniform steps), "v1" (normal) or "v2" (constant decays, small steps).
        forward_type: how scan and gate are computed.
        channel_first: images are (B, C, H, W) rather than (B, H, W, C).
        scan_window: passed to the scan if not 0 (LBMamba's locally bidirectional scan).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        ssm_ratio: float,
        dt_rank: int | str,
        act_layer: Callable[[], nn.Module],
        d_conv: int,
        conv_bias: bool,
        dropout: float,
        initialize: str,
        forward_type: ForwardType,
        channel_first: bool,
        scan_window: int = 0,
    ) -> None:
        super().__init__()
        kind = forward_type
        if kind.version == "v0":  # has no such options
            act_layer, d_conv, conv_bias, initialize = nn.SiLU, 3, True, "v0"
        self.d_state = d_state
        self.d_inner = int(ssm_ratio * d_model)
        self.dt_rank = int(dt_rank) if dt_rank != "auto" else math.ceil(d_model / 16)
        self.kind = kind
        self.channel_first = channel_first
        self.scan_options: dict[str, Any] = {"window": scan_window} if scan_window else {}

        linear = _linear(channel_first)
        self.in_proj = linear(d_model, (1 + kind.gated) * self.d_inner, bias=False)
        self.act = act_layer()
        self.conv2d: nn.Module = nn.Identity()
        if d_conv > 1:
            pad = (d_conv - 1) // 2
            self.conv2d = nn.Conv2d(
                self.d_inner, self.d_inner, d_conv, padding=pad, groups=self.d_inner, bias=conv_bias
            )
        self.x_proj_weight = nn.Parameter(torch.empty(_DIRECTIONS, self.dt_rank + 2 * d_state, self.d_inner))
        self.out_norm = _out_norm(kind.out_norm, self.d_inner, channel_first)
        self.out_act = nn.GELU() if kind.out_activation else nn.Identity()
        self.out_proj = linear(self.d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.A_logs = nn.Parameter(torch.empty(_DIRECTIONS * self.d_inner, d_state))
        self.Ds = nn.Parameter(torch.ones(_DIRECTIONS * self.d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(_DIRECTIONS, self.d_inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(_DIRECTIONS, self.d_inner))
        self._reset(initialize)

    @torch.no_grad()
    def _reset(self, how: str) -> None:
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        for parameter in (self.A_logs, self.Ds):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if how == "v0":
            nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            step_sizes_(self.dt_projs_bias)
            s4d_real_(self.A_logs)
        elif how == "v1":
            nn.init.normal_(self.A_logs)
            nn.init.normal_(self.dt_projs_weight, std=0.1)
            nn.init.normal_(self.dt_projs_bias, std=0.1)
        else:
            nn.init.zeros_(self.A_logs)
            nn.init.uniform_(self.dt_projs_weight, 0.0, 0.1)
            nn.init.uniform_(self.dt_projs_bias, 0.0, 0.1)

    def forward_core(self, x: Tensor) -> Tensor:  # (B, C, H, W), result too
        B, _, H, W = x.shape
        K, C, R, N, L = _DIRECTIONS, self.d_inner, self.dt_rank, self.d_state, H * W
        forwards = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
        xs = torch.cat([forwards, forwards.flip(-1)], dim=1)  # (B, K, C, L)

        if self.kind.version == "v05":  # the same projections as grouped convolutions
            x_dbl = F.conv1d(xs.view(B, -1, L), self.x_proj_weight.view(-1, C, 1), groups=K).view(B, K, -1, L)
            dts, Bs, Cs = x_dbl.split([R, N, N], dim=2)
            dts = F.conv1d(dts.reshape(B, -1, L), self.dt_projs_weight.view(-1, R, 1), groups=K)
        else:
            x_dbl = torch.einsum("b k c l, k r c -> b k r l", xs, self.x_proj_weight)
            dts, Bs, Cs = x_dbl.split([R, N, N], dim=2)
            dts = torch.einsum("b k r l, k c r -> b k c l", dts, self.dt_projs_weight)
        xs, dts = xs.view(B, -1, L), dts.reshape(B, -1, L)
        if self.kind.float32:
            xs, dts, Bs, Cs = xs.float(), dts.float(), Bs.float(), Cs.float()
        ys = selective_scan(
            xs,
            dts,
            -self.A_logs.float().exp(),
            Bs.contiguous(),
            Cs.contiguous(),
            self.Ds.float(),
            delta_bias=self.dt_projs_bias.float().view(-1),
            delta_softplus=True,
            **self.scan_options,
        )
        assert isinstance(ys, Tensor)
        ys = ys.view(B, K, C, L)
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        return ys[:, 0].view(B, C, H, W) + ys[:, 1].view(B, C, W, H).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, d_model, H, W) or (B, H, W, d_model), as the result
        x = self.in_proj(x)
        z = None
        if self.kind.gated:
            x, z = x.chunk(2, dim=1 if self.channel_first else -1)
            if self.kind.gate_activation:
                z = self.act(z)
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2).contiguous()
        x = self.act(self.conv2d(x))
        y = self.forward_core(x)
        if not self.channel_first:
            y = y.permute(0, 2, 3, 1)
        y = self.out_norm(y.contiguous().to(self.Ds.dtype)).to(x.dtype)  # casts only in other precisions
        y = self.out_act(y)
        if z is not None:
            y = y * z
        return self.dropout(self.out_proj(y))


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(
        self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop: float, channel_first: bool
    ) -> None:
        super().__init__()
        linear = _linear(channel_first)
        self.fc1 = linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class gMlp(nn.Module):
    """A gated layer: one half of the first projection scales the other."""

    def __init__(
        self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop: float, channel_first: bool
    ) -> None:
        super().__init__()
        linear = _linear(channel_first)
        self.axis = 1 if channel_first else -1
        self.fc1 = linear(dim, 2 * hidden)
        self.act = act_layer()
        self.fc2 = linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.fc1(x).chunk(2, dim=self.axis)
        return self.drop(self.fc2(x * self.act(z)))


class VSSBlock(nn.Module):
    """A scan and, if ``mlp`` is given, a channel mixer, each behind a norm and within a skip connection."""

    def __init__(
        self,
        dim: int,
        op: SS2D,
        mlp: nn.Module | None,
        norm_layer: Callable[[int], nn.Module],
        drop_path: float,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.op = op
        self.drop_path = DropPath(drop_path)
        self.has_mlp = mlp is not None
        if mlp is not None:
            self.norm2 = norm_layer(dim)
            self.mlp = mlp
        self.use_checkpoint = use_checkpoint

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.has_mlp:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class PatchMerging2D(nn.Module):
    """Halves height and width (odd ones are padded): four pixels' channels go through a norm and a linear layer."""

    def __init__(
        self, dim: int, out_dim: int, norm_layer: Callable[[int], nn.Module], channel_first: bool
    ) -> None:
        super().__init__()
        self.channel_first = channel_first
        self.reduction = _linear(channel_first)(4 * dim, out_dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (2, 3) if self.channel_first else (1, 2)
        H, W = x.shape[rows], x.shape[columns]
        if H % 2 or W % 2:
            x = F.pad(x, (0, W % 2, 0, H % 2) if self.channel_first else (0, 0, 0, W % 2, 0, H % 2))
        even = (slice(None),) * rows
        quarters = [
            x[(*even, slice(i, None, 2), slice(j, None, 2))] for j in (0, 1) for i in (0, 1)
        ]  # top left, bottom left, top right, bottom right
        return self.reduction(self.norm(torch.cat(quarters, dim=1 if self.channel_first else -1)))
