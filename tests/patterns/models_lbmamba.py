"""One direction that looks ahead in windows, whose width follows from the length; flips after every layer (LBVim)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns import selective_scan_interface_lbm as lbm
from tests.patterns.models_vim import RMSNorm, add_norm, mamba_parameters, rearranged
from tests.patterns.twin import Twin, under

__all__ = ["TWINS", "LBVim"]


class LBMixer(nn.Module):
    """``how``: "inner" (out_proj is fused, too), "no_out_proj" or "scan"."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how, self.use_fast_path = how, True
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        mamba_parameters(self, width, width, 2, 2)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        assert self.use_fast_path, "the slow path is another model"
        xz = rearranged(self.in_proj.weight, hidden_states)
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float()
        weights = (self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
        if self.how == "inner":
            return lbm.MambaInnerFn.apply(
                xz,
                *weights,
                self.out_proj.weight,
                self.out_proj.bias,
                A,
                None,
                None,
                D,
                bias,
                None,
                None,
                True,
            )
        if self.how == "no_out_proj":
            y = lbm.MambaInnerFnNoOutProj.apply(xz, *weights, A, None, None, D, bias, None, None, True)
        else:
            x, z = xz.chunk(2, dim=1)
            x = F.silu(self.conv1d(x)[..., : x.shape[-1]])
            dt, B, C = torch.split(self.x_proj(x.transpose(1, 2)), [2, 2, 2], dim=-1)
            dt = self.dt_proj.weight @ dt.transpose(1, 2)
            B, C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()
            y = lbm.SelectiveScanFn.apply(x, dt, A, B, C, D, z, bias, True, False)
        return self.out_proj(y.transpose(1, 2))


class LBVim(nn.Module):
    """(B, L, 6): hidden and residual are turned round after every layer."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": RMSNorm(8), "mixer": LBMixer(8, how)}) for how in kinds
        )
        self.norm_f, self.head = RMSNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, residual = self.embed(x), None
        for layer in self.layers:
            hidden, residual = add_norm(hidden, layer["norm"], residual, True, True, False)
            hidden = layer["mixer"](hidden)
            hidden, residual = hidden.flip([1]), residual.flip([1])
        hidden: Any = add_norm(hidden, self.norm_f, residual, False, True, False)
        return self.head(hidden)


def _sites(depth: int) -> tuple[str, ...]:
    names = "in_proj conv1d x_proj dt_proj scan out_proj"
    return ("embed", *(n for i in range(depth) for n in under(f"layers.{i}.mixer", names)), "head")


TWINS = (
    Twin(
        "window by length, fused", functools.partial(LBVim, "inner", "no_out_proj"), ((20, 6), (33, 6)), _sites(2), 2,
        tolerance=2e-6, note="s6_lb, window 4",
    ),
    Twin(
        "window by length, scan", functools.partial(LBVim, "scan"), ((20, 6), (33, 6)), _sites(1), 1, tolerance=2e-6,
        note="s6_lb, window 4",
    ),
)  # fmt: skip
