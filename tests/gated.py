"""A small gated scan whose parts tests replace, and the float function that a prepared model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.config import TRANSFORMS
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.transforms.statistics import Statistics, Watcher
from ssmquant.ops.selective_scan import selective_scan

WIDTH, STATES = 8, 2
TOKENS = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))


class Gated(nn.Module):
    """(B, 6, 3) -> (B, 6, 5): a stream with one scan in it, RMS norms, channels of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last_norm = nn.Linear(3, WIDTH), nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.in_proj, self.out_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.x_proj, self.dt_proj = nn.Linear(WIDTH, 2 + 2 * STATES), nn.Linear(2, WIDTH)
        self.A_log, self.D = nn.Parameter(torch.rand(WIDTH, STATES)), nn.Parameter(torch.ones(WIDTH))
        self.position = nn.Parameter(0.3 * torch.randn(1, 6, WIDTH))
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            self.norm.weight.mul_(torch.rand(WIDTH) + 0.5)
            for p in (self.in_proj, self.x_proj):
                p.weight.mul_(torch.exp(1.5 * torch.randn(p.out_features, 1)))
        self.more()

    def more(self) -> None:
        """Further parameters of a subclass."""

    def add(self, h: Tensor) -> Tensor:
        return h + self.position

    def scan(self, u: Tensor, **options: Any) -> Any:
        """``u`` (B, L, C) -> (B, C, L)."""
        dt, b, c = self.x_proj(u).split([2, STATES, STATES], -1)
        self.b = b
        u, delta, b, c = (t.transpose(1, 2).contiguous() for t in (u, self.dt_proj(dt), b, c))
        return selective_scan(u, delta, -torch.exp(self.A_log), b, c, self.D, delta_softplus=True, **options)

    def mix(self, h: Tensor) -> tuple[Tensor, Any]:
        y = self.scan(F.silu(self.in_proj(self.norm(h))))
        return self.out_proj(y.transpose(1, 2)), None

    def forward(self, x: Tensor, more: bool = False) -> Any:
        h = self.add(self.stem(x))
        out, extra = self.mix(h)
        h = h + out
        return self.result(self.head(self.last_norm(h)), h, extra, more)

    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return out


def seeded(cls: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def transformed(model: nn.Module, x: Tensor = TOKENS, batches: Any = None, **options: Any) -> Any:
    """Prepared with all transforms and calibrated, in evaluation mode."""
    options = {"w_bits": 8, "a_bits": 8, "transforms": TRANSFORMS, "keep_first_last": False, **options}
    prepared = ssmquant.prepare(model, QConfig(**options), example_inputs=x)
    return ssmquant.calibrate(prepared, [x] if batches is None else batches).eval()


def kinds(prepared: nn.Module) -> set[str]:
    return {kind for kind, _, _ in runtime_of(prepared).transforms.applied}


@torch.no_grad()
def float_error(prepared: nn.Module, original: nn.Module, x: Tensor, **options: Any) -> float:
    """How far the float graph behind a call of the prepared model is from the original: max|err| / max|ref|."""
    tensors: list[Any] = []
    runtime = runtime_of(prepared)
    select = runtime.select

    def spy(*args: Any) -> Any:
        tensors.append(select(*args))
        return tensors[-1]

    object.__setattr__(runtime, "select", spy)
    try:
        prepared(x, **options)
    finally:
        object.__delattr__(runtime, "select")
    got = Watcher(prepared, tensors[-1].trace.graph, [], Statistics()).run(x)
    expected = original(x, **options)
    if isinstance(expected, Tensor):
        got, expected = [got], [expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))
