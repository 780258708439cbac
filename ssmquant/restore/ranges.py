"""Ranges of a whole picture for a quantized model that sees it in parts.

Dynamic DLS takes a range from the statistics of what a call sees: mean, deviation, minimum and maximum. Of a picture
in tiles that would be each tile's own, and equal pixels would become different ones on the two sides of a seam.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.graph.runtime import is_prepared, runtime_of
from ssmquant.modules import ActivationQuantizer, FrozenRange
from ssmquant.quantizers import DLS
from ssmquant.quantizers.dls import dls_statistics

__all__ = ["has_dynamic_ranges", "with_picture_ranges"]


def _dynamic(model: nn.Module) -> list[ActivationQuantizer]:
    """The quantizers whose ranges depend on the call; but the published form, which stays as it is."""
    found = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    return [
        m
        for m in found
        if isinstance(m.quantizer, DLS) and m.quantizer.bits is not None and not m.quantizer.official
    ]


def has_dynamic_ranges(model: nn.Module) -> bool:
    """Whether the model holds quantizers with dynamic DLS, so that what it computes depends on the tile it sees."""
    return bool(_dynamic(model))


@dataclass
class _Pool:
    """Of all values that a quantizer has seen: their number, mean, sum of squared deviations, minimum and maximum."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    usable: bool = True
    """Every call was of finite values with one range in all."""

    def look(self, wrapper: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        x = args[0]
        quantizer = wrapper.quantizer
        if not isinstance(x, Tensor) or not isinstance(quantizer, DLS) or not x.numel():
            return
        statistics = dls_statistics(x.detach().float(), quantizer.stats_axis).reshape(4, -1)
        if statistics.shape[1] != 1:
            self.usable = False
            return
        self.add(x.numel(), *statistics[:, 0].tolist())

    def add(self, count: int, mean: float, std: float, low: float, high: float) -> None:
        """One more call's values. ``std`` is the unbiased one."""
        self.usable = self.usable and all(math.isfinite(v) for v in (mean, std, low, high))
        both = self.count + count
        apart = mean - self.mean
        self.squares += std * std * (count - 1) + apart * apart * self.count * count / both
        self.mean += apart * count / both
        self.low, self.high, self.count = min(self.low, low), max(self.high, high), both

    def statistics(self) -> Tensor | None:
        """Mean, unbiased deviation, minimum and maximum, (4,) float32; None if there is not one range for all."""
        if not self.count or not self.usable:
            return None
        std = math.sqrt(self.squares / max(self.count - 1, 1))
        return torch.tensor([self.mean, std, self.low, self.high])


def with_picture_ranges(model: nn.Module, visit: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of ``model`` whose dynamic ranges are frozen to the statistics of what ``visit`` shows it.

    Args:
        model: prepared or deployed, or a module around such ones, in evaluation mode; left as it is.
        visit: calls the copy that it is given, with ranges that are dynamic still, on every part of one picture.

    A quantizer that gets no value in ``visit``, one that is not finite, or several ranges in one call, stays dynamic.
    """
    runtimes = [runtime_of(m) for m in model.modules() if is_prepared(m)]
    # Weights are the same tensors, and packed ones the same modules, so that what kernels keep of them serves both.
    shared = [*model.parameters(), *(w for r in runtimes for w in r.weights.values())]
    new = copy.deepcopy(model, {id(s): s for s in shared})
    owners = [(m, runtime_of(m), runtime_of(m).graphs) for m in new.modules() if is_prepared(m)]
    pools = [(wrapper, _Pool()) for wrapper in _dynamic(new)]
    # With a hook on a quantizer its model calls every one, where a fused graph would leave it out.
    hooks = [wrapper.register_forward_pre_hook(pool.look) for wrapper, pool in pools]
    for _, runtime, _ in owners:
        runtime.graphs = None  # a replayed CUDA graph calls no hook
    visit(new)
    for hook in hooks:
        hook.remove()
    for wrapper, pool in pools:
        statistics = pool.statistics()
        if statistics is not None:
            wrapper.seen = statistics.to(wrapper.seen)
            wrapper.quantizer = FrozenRange.from_dls(wrapper).to(wrapper.seen.device).eval()
    for owner, runtime, graphs in owners:
        runtime.graphs = graphs
        runtime.rebuild(owner)  # its graphs were the model's, fused for dynamic ranges
    return new
