"""Models that give the values between their stages too, for distillation from these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ssmquant.errors import ConfigError

__all__ = ["stages", "with_features"]


def stages(model: nn.Module) -> list[str]:
    """The names of a MambaIR's groups of blocks.

    Raises:
        ConfigError: the model has none.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"{type(model).__name__} has no list of layers whose outputs could be compared")
    return [f"layers.{name}" for name in layers._modules]


def with_features(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same model, its modules shared, with ``(output, outputs of the modules names)`` for its output.

    It can be prepared as the model can, and has a state dict of the same names.
    """
    kind: Any = type(model)

    class Observed(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            found: list[Tensor] = []
            handles = [
                self.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out))
                for name in names
            ]
            try:
                out = super().forward(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            return (out, *found)

    observed = copy.copy(model)
    observed.__class__ = Observed
    return observed
