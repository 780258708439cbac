"""All tensors of a model as they were, to go back to when something fails half way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """Parameters and buffers of all modules: which they are, and copies of their values.

    Takes as much memory as the model's own tensors, until it is dropped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.own: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.values: dict[int, tuple[Tensor, Tensor]] = {}
        for mod in model.modules():
            for tensors in (mod._parameters, mod._buffers):
                self.own.append((tensors, dict(tensors)))
                for t in tensors.values():
                    if t is not None and id(t) not in self.values:
                        self.values[id(t)] = (t, t.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all of them back, the same objects."""
        for now, before in self.own:
            now.clear()
            now.update(before)
        for t, value in self.values.values():
            t.copy_(value)
