"""Bags of features of any length, of which a second scan sees another order (MambaMIL)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant import ops
from tests.patterns.models_vim import mamba_parameters
from tests.patterns.native import MambaInnerFnNoOutProj
from tests.patterns.twin import Twin, under

__all__ = ["TWINS"]


class SRMamba(nn.Module):
    """All weights are read, no module is called. With a window the insides of the fused call are written out."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window, self.use_fast_path = window, True
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        for suffix in ("", "_b"):
            mamba_parameters(self, width, width, 2, 2, suffix)
        self.out_proj = nn.Linear(width, width, bias=False)

    def one_way(self, xz: Tensor, suffix: str) -> Any:
        conv, x_proj, dt_proj, D = (getattr(self, n + suffix) for n in ("conv1d", "x_proj", "dt_proj", "D"))
        A = -torch.exp(getattr(self, f"A{suffix}_log").float())
        if not self.window:
            return MambaInnerFnNoOutProj.apply(
                xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A, None, None, D.float(), dt_proj.bias,
                None, None, True,
            )  # fmt: skip
        x, z = xz.chunk(2, dim=1)
        x = F.silu(F.conv1d(x, conv.weight, conv.bias, padding=3, groups=conv.groups)[..., : xz.shape[-1]])
        dt, B, C = torch.split(F.linear(x.transpose(1, 2), x_proj.weight), [2, 2, 2], dim=-1)
        dt = dt_proj.weight @ dt.transpose(1, 2)
        return ops.selective_scan(
            x, dt, A, B.transpose(1, 2), C.transpose(1, 2), D, z, dt_proj.bias, True, window=self.window
        )

    def forward(self, hidden_states: Tensor, rate: int) -> Tensor:
        assert self.use_fast_path
        batch, seqlen, dim = hidden_states.shape
        pad = (rate - seqlen % rate) % rate
        if pad > 0:
            hidden_states = F.pad(hidden_states, (0, 0, 0, pad))
        length = seqlen + pad
        xz = (self.in_proj.weight @ hidden_states.permute(2, 0, 1).reshape(dim, -1)).view(-1, batch, length)
        xz = xz.transpose(0, 1)
        turned = xz.reshape(batch, -1, rate, length // rate).transpose(2, 3).reshape(batch, -1, length)
        out, other = self.one_way(xz, ""), self.one_way(turned, "_b")
        other = other.reshape(batch, -1, length // rate, rate).transpose(2, 3).reshape(batch, -1, length)
        out = F.linear((out + other).transpose(1, 2), self.out_proj.weight, self.out_proj.bias)
        return out[:, :seqlen]


class MambaMIL(nn.Module):
    """Returns logits, probabilities, the class, a number and None."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self._fc1 = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1))
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), SRMamba(8, window))])
        self.norm = nn.LayerNorm(8)
        self.attention = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        self.classifier, self.rate, self.n_classes = nn.Linear(8, 3), 4, 3

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        if len(x.shape) == 2:
            x = x.expand(1, -1, -1)
        h = self._fc1(x.float())
        for layer in self.layers:
            h_ = h
            h = layer[1](layer[0](h), rate=self.rate)
            h = h + h_
        h = self.norm(h)
        A = F.softmax(torch.transpose(self.attention(h), 1, 2), dim=-1)
        h = torch.bmm(A, h).squeeze(1)
        logits = self.classifier(h)
        return logits, F.softmax(logits, dim=1), torch.topk(logits, 1, dim=1)[1], self.n_classes, None


_WAYS = "conv1d x_proj dt_proj scan conv1d_b x_proj_b dt_proj_b scan#2"
_SITES = (
    "_fc1.0",
    *under("layers.0.1", f"in_proj {_WAYS} out_proj"),
    *under("attention", "0 2"),
    "classifier",
)
_SIZES = ((20, 6), (33, 6))

TWINS = (
    Twin("bags", MambaMIL, _SIZES, _SITES, 2, batches=(1, 2, 5), tolerance=2e-6),
    Twin(
        "bags, window",
        functools.partial(MambaMIL, 8),
        _SIZES,
        _SITES,
        2,
        batches=(1, 2, 5),
        note="s6_lb, window 8",
    ),
)
