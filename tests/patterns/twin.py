"""A twin: a small model of our own with the habits of one codebase of the field, and what is expected of it.

No line of it is upstream's; what it shares with it is the way in which weights, scans and sizes are used. Widths are 8
to 16, images 8 to 16 pixels; what takes time is tracing, a millisecond for each node of a graph and each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Args", "Twin", "draw_ids", "draw_values", "settled", "under"]

Args = tuple[tuple[Any, ...], dict[str, Any]]
Shape = tuple[int, ...]


def draw_values(shape: Shape) -> Args:
    """One input of smooth values around zero."""
    return (torch.randn(shape),), {}


def draw_ids(shape: Shape) -> Args:
    """Token numbers, by keyword as libraries of language models want them."""
    return (), {"input_ids": torch.randint(0, 12, shape)}


@dataclass(frozen=True)
class Twin:
    """One pattern.

    ``shapes``: of one sample; the first is the example's. ``batches``: the first is the example's. ``sites``: names of
    all sites in order of execution, written by hand. ``tolerance``: of the traced model, relative to the largest value;
    0 where every call of the original is a call of the graph, more where a fused call was unfolded into others.
    ``adopted``: how many modules the code makes in forward. ``keep``: sites that 8 bits leave in float.
    ``elsewhere``: whether the deployed model is called at the last shape, too (tracing anew takes time).
    ``note``: what the summary says of its scans.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    sites: tuple[str, ...]
    scans: int
    batches: tuple[int, ...] = (2, 1, 5)
    draw: Callable[[Shape], Args] = draw_values
    tolerance: float = 0.0
    adopted: int = 0
    keep: tuple[str, ...] = ()
    elsewhere: bool = False
    note: str = ""

    def args(self, batch: int | None = None, shape: int = 0, seed: int = 0) -> Args:
        """Arguments of a call, the same for the same seed."""
        torch.manual_seed(seed)
        return self.draw((self.batches[0] if batch is None else batch, *self.shapes[shape]))

    def calls(self) -> Iterator[Args]:
        """Every batch size and every shape: the last batch size at the last shape."""
        for batch in self.batches[:-1]:
            yield self.args(batch, seed=batch)
        for i in range(min(1, len(self.shapes) - 1), len(self.shapes)):
            yield self.args(self.batches[-1], i, seed=i)

    def model(self, seed: int = 0) -> nn.Module:
        """A model in evaluation mode with seeded weights."""
        torch.manual_seed(seed)
        return settled(self.build().eval())


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """Moves parameters that start as constants (norms, D, biases, tokens) and statistics of norms away from them."""
    for p in model.parameters():
        if p.is_floating_point() and (p == p.flatten()[0]).all():
            p.add_(0.1 * torch.randn_like(p))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def under(prefix: str, names: str) -> tuple[str, ...]:
    """``under("a.b", "c d")`` is ``("a.b.c", "a.b.d")``."""
    return tuple(f"{prefix}.{name}" for name in names.split())
