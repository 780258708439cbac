"""A family's model under test, and how outputs are compared."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ssmquant
from ssmquant import Adapter, QConfig
from tests.upstream.families import Family, draw

__all__ = ["Data", "State", "attempt", "difference", "sqnr"]

Data = dict[str, Any]


@dataclass
class State:
    """What the checks of one run share."""

    family: Family
    size: str
    kept: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """A seeded model whose output depends on its input as much as a trained one's.

        Vision models start with weights of 0.02 and zero biases, so that their mixers add next to nothing. Here weights
        keep at least half of a signal's size, and constants are moved a little.
        """
        torch.manual_seed(seed)
        model = self.family.build(self.size).eval()
        with torch.no_grad():
            for p in model.parameters():
                if not p.is_floating_point() or p.numel() < 2:
                    continue
                if (p == p.flatten()[0]).all():
                    p.add_(0.02 * torch.randn_like(p))
                elif p.dim() >= 2:
                    p.mul_(max(1.0, 0.5 * p[0].numel() ** -0.5 / p.std().item()))
        return model

    @property
    def model(self) -> nn.Module:
        return self.kept["model"]

    def batch(self, n: int | None = None, shape: int = 0, seed: int = 0) -> Tensor:
        shapes = self.family.shapes[self.size]
        return draw(self.family, self.family.batches[0] if n is None else n, shapes[shape], seed)

    def prepare(self, config: QConfig, adapter: Adapter | None = None) -> Any:
        kwargs = self.family.kwargs
        example = (self.batch(),)
        return ssmquant.prepare(
            self.model, config, example_inputs=example, example_kwargs=kwargs, adapter=adapter
        )

    def call(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """The tensors that a model returns; random draws in forward are the same every time."""
        torch.manual_seed(5)
        out = model(x.clone(), **self.family.kwargs)
        return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def attempt(job: Callable[[], Data]) -> tuple[Data, str | None]:
    """A result, or the last lines of what was raised."""
    try:
        return job(), None
    except Exception as e:
        lines = traceback.format_exc().strip().splitlines()
        return {}, f"{type(e).__name__}: {str(e)[:1500]}\n" + "\n".join(lines[-9:-1])[-1500:]


def difference(outs: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference relative to the largest value, over all outputs; whole numbers must be equal."""
    if [o.shape for o in outs] != [w.shape for w in wanted]:
        return math.inf
    worst = 0.0
    for a, b in zip(outs, wanted, strict=True):
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else math.inf)
            continue
        error, top = (a.double() - b.double()).abs().max().item(), b.abs().max().item()
        worst = max(worst, error / top if top > 0 else (0.0 if error == 0 else math.inf))
        worst = math.inf if math.isnan(worst) or math.isnan(error) else worst
    return worst


def sqnr(outs: list[Tensor], wanted: list[Tensor]) -> float:
    """Signal to noise ratio over several batches, in dB."""
    a, b = torch.stack(outs).double(), torch.stack(wanted).double()
    noise = (a - b).square().sum().item()
    return round(10 * math.log10(b.square().sum().item() / noise), 2) if noise > 0 else math.inf
