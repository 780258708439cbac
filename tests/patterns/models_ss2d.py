"""Four-directional scans with raw parameters: as in MambaIR, and as in VMamba from v05 on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant import ops
from tests.patterns import native
from tests.patterns.twin import Twin, under

__all__ = ["SS2D", "TWINS", "LayerNorm2d", "Linear2d", "SS2DConv", "VMamba", "oflex", "scan_parameters"]


def scan_parameters(mod: nn.Module, inner: int, states: int, rank: int, directions: int = 4) -> None:
    """Registers x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs and Ds."""
    mod.x_proj_weight = nn.Parameter(torch.randn(directions, rank + 2 * states, inner) / math.sqrt(inner))
    mod.dt_projs_weight = nn.Parameter(torch.randn(directions, inner, rank) / math.sqrt(rank))
    mod.dt_projs_bias = nn.Parameter(torch.rand(directions, inner) * 2 - 3)
    mod.A_logs = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(directions * inner, 1))
    mod.Ds = nn.Parameter(torch.ones(directions * inner))


# ---- MambaIR: einsum, v0 -------------------------------------------------------------------------------------------


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None, delta_bias: Any = None,
    delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    return native.SelectiveScanFn.apply(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


class SS2D(nn.Module):
    """(B, H, W, C); the scan is an attribute of the instance."""

    def __init__(self, d_model: int, d_state: int = 4, expand: float = 1.5, dt_rank: int = 2) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = int(expand * d_model), d_state, dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv2d = nn.Conv2d(self.d_inner, self.d_inner, 3, padding=1, groups=self.d_inner)
        self.act = nn.SiLU()
        scan_parameters(self, self.d_inner, d_state, dt_rank)
        self.selective_scan = selective_scan_fn
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward_core(self, x: Tensor) -> tuple[Tensor, ...]:
        B, _, H, W = x.shape
        L, K = H * W, 4
        both = torch.stack([x.view(B, -1, L), x.transpose(2, 3).contiguous().view(B, -1, L)], dim=1)
        xs = torch.cat([both.view(B, 2, -1, L), torch.flip(both.view(B, 2, -1, L), dims=[-1])], dim=1)
        mixed = torch.einsum("b k d l, k c d -> b k c l", xs.view(B, K, -1, L), self.x_proj_weight)
        dts, Bs, Cs = torch.split(mixed, [self.dt_rank, self.d_state, self.d_state], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts.view(B, K, -1, L), self.dt_projs_weight)
        xs, dts = xs.float().view(B, -1, L), dts.contiguous().float().view(B, -1, L)
        Bs, Cs = Bs.float().view(B, K, -1, L), Cs.float().view(B, K, -1, L)
        As = -torch.exp(self.A_logs.float()).view(-1, self.d_state)
        out_y = self.selective_scan(
            xs, dts, As, Bs, Cs, self.Ds.float().view(-1), z=None,
            delta_bias=self.dt_projs_bias.float().view(-1), delta_softplus=True, return_last_state=False,
        ).view(B, K, -1, L)  # fmt: skip
        assert out_y.dtype == torch.float
        back = torch.flip(out_y[:, 2:4], dims=[-1]).view(B, 2, -1, L)
        columns = out_y[:, 1].view(B, -1, W, H).transpose(2, 3).contiguous().view(B, -1, L)
        columns_back = back[:, 1].view(B, -1, W, H).transpose(2, 3).contiguous().view(B, -1, L)
        return out_y[:, 0], back[:, 0], columns, columns_back

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        y1, y2, y3, y4 = self.forward_core(x)
        assert y1.dtype == torch.float32
        y = torch.transpose(y1 + y2 + y3 + y4, dim0=1, dim1=2).contiguous().view(B, H, W, -1)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class Restorer(nn.Module):
    """A residual image network that keeps a mean as a plain tensor and rebinds it in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, 3, 1, 1), 0.3)
        self.conv_first = nn.Conv2d(3, 8, 3, 1, 1)
        self.layers = nn.ModuleList([nn.ModuleDict({"ln_1": nn.LayerNorm(8), "self_attention": SS2D(8)})])
        self.skip_scale = nn.Parameter(torch.ones(8))
        self.conv_last = nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        first = self.conv_first(x - self.mean)
        y = first.permute(0, 2, 3, 1).contiguous()
        for layer in self.layers:
            y = y * self.skip_scale + layer["self_attention"](layer["ln_1"](y))
        return x + self.conv_last(first + y.permute(0, 3, 1, 2).contiguous())


# ---- VMamba: grouped convolutions over views -----------------------------------------------------------------------


class Linear2d(nn.Linear):
    """A linear layer over channels that come first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> Any:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].view(self.weight.shape)
        return super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        ctx.size = (B, C, H, W)
        y = x.new_empty((B, 4, C, H * W))
        y[:, 0] = x.flatten(2, 3)
        y[:, 1] = x.transpose(2, 3).flatten(2, 3)
        y[:, 2:4] = torch.flip(y[:, 0:2], dims=[-1])
        return y

    @staticmethod
    def backward(ctx: Any, ys: Tensor) -> Tensor:
        B, C, H, W = ctx.size
        both = ys[:, 0:2] + ys[:, 2:4].flip(dims=[-1])
        return both[:, 0].reshape(B, C, H, W) + both[:, 1].reshape(B, C, W, H).transpose(2, 3)


class CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ys: Tensor) -> Tensor:
        B, K, D, H, W = ys.shape
        ctx.shape = (H, W)
        both = ys.view(B, K, D, -1)
        both = both[:, 0:2] + both[:, 2:4].flip(dims=[-1])
        return both[:, 0] + both[:, 1].view(B, -1, W, H).transpose(2, 3).contiguous().view(B, D, -1)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Tensor:
        H, W = ctx.shape
        B, C, L = x.shape
        xs = x.new_empty((B, 4, C, L))
        xs[:, 0] = x
        xs[:, 1] = x.view(B, C, H, W).transpose(2, 3).flatten(2, 3)
        xs[:, 2:4] = torch.flip(xs[:, 0:2], dims=[-1])
        return xs.view(B, 4, C, H, W)


def oflex(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return native.SelectiveScanOflex.apply(u, delta, A, B, C, D, bias, True, 1, 1, True)


def windowed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """LBMamba's scan in the place of the plain one."""
    y = ops.selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, window=8)
    assert isinstance(y, Tensor)
    return y.float()


class SS2DConv(nn.Module):
    """(B, C, H, W); ``forward`` and ``forward_core`` are attributes of the instance."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 1,
        ratio: float = 1.5,
        dt_rank: int = 2,
        scan: Callable[..., Any] = oflex,
    ) -> None:
        super().__init__()
        inner = int(ratio * d_model)
        self.d_inner, self.dt_rank = inner, dt_rank
        self.in_proj = Linear2d(d_model, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.act, self.out_act = nn.SiLU(), nn.Identity()
        scan_parameters(self, inner, d_state, dt_rank)
        self.out_norm = LayerNorm2d(inner)
        self.out_proj = Linear2d(inner, d_model, bias=False)
        self.forward = self.forwardv2
        self.forward_core = functools.partial(self.forward_corev2, scan=scan, no_einsum=True)

    def forward_corev2(self, x: Tensor, scan: Callable[..., Any], no_einsum: bool) -> Tensor:
        assert no_einsum
        B, D, H, W = x.shape
        N = self.A_logs.shape[1]
        K, D, R = self.dt_projs_weight.shape
        L = H * W
        xs = CrossScan.apply(x)
        weight = self.x_proj_weight.view(-1, D, 1)
        mixed = F.conv1d(xs.view(B, -1, L), weight, bias=None, groups=K)
        dts, Bs, Cs = torch.split(mixed.view(B, K, -1, L), [R, N, N], dim=2)
        weight = self.dt_projs_weight.view(K * D, -1, 1)
        dts = F.conv1d(dts.contiguous().view(B, -1, L), weight, groups=K)
        As = -self.A_logs.to(torch.float).exp()
        Bs, Cs = Bs.contiguous().view(B, K, N, L), Cs.contiguous().view(B, K, N, L)
        bias = self.dt_projs_bias.view(-1).to(torch.float)
        ys = scan(xs.view(B, -1, L), dts.contiguous(), As, Bs, Cs, self.Ds.to(torch.float), bias)
        y = CrossMerge.apply(ys.view(B, K, -1, H, W)).view(B, -1, H, W)
        return self.out_norm(y).to(x.dtype)

    def forwardv2(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.act(self.conv2d(self.in_proj(x)))
        return self.out_proj(self.out_act(self.forward_core(x)))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = Linear2d(width, 2 * width), nn.GELU(), Linear2d(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VSSBlock(nn.Module):
    def __init__(self, width: int, scan: Callable[..., Any]) -> None:
        super().__init__()
        self.norm, self.op = LayerNorm2d(width), SS2DConv(width, scan=scan)
        self.norm2, self.mlp = LayerNorm2d(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.op(self.norm(x))
        return x + self.mlp(self.norm2(x))


class VMamba(nn.Module):
    """A classifier."""

    def __init__(self, scan: Callable[..., Any] = oflex) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), LayerNorm2d(8), nn.GELU())
        down = nn.Sequential(nn.Identity(), nn.Conv2d(8, 12, 3, 2, 1), nn.Identity(), LayerNorm2d(12))
        self.layers = nn.ModuleList([nn.ModuleDict({"blocks": VSSBlock(8, scan), "downsample": down})])
        self.classifier = nn.Sequential()
        self.classifier.add_module("norm", LayerNorm2d(12))
        self.classifier.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
        self.classifier.add_module("flatten", nn.Flatten(1))
        self.classifier.add_module("head", nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer["downsample"](layer["blocks"](x))
        return self.classifier(x)


_V0 = "in_proj conv2d x_proj_weight dt_projs_weight scan out_proj"
_V05 = (
    "patch_embed.0",
    *under("layers.0.blocks.op", _V0),
    *under("layers.0", "blocks.mlp.fc1 blocks.mlp.fc2 downsample.1"),
    "classifier.head",
)

TWINS = (
    Twin(
        "ss2d, einsum", Restorer, ((3, 8, 8), (3, 6, 10)),
        ("conv_first", *under("layers.0.self_attention", _V0), "conv_last"), 1, elsewhere=True,
    ),
    Twin("ss2d, grouped conv1d", VMamba, ((3, 16, 16), (3, 12, 20)), _V05, 1, elsewhere=True),
    Twin(
        "ss2d, grouped conv1d, window", functools.partial(VMamba, windowed), ((3, 16, 16), (3, 12, 20)), _V05, 1,
        note="s6_lb, window 8",
    ),
)  # fmt: skip
