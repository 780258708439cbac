"""What tests of replayed calls share: captures on a CPU, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ssmquant.graph.runtime import runtime_of


@contextmanager
def nothing(*_: Any) -> Iterator[None]:
    yield


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def captured(p: nn.Module) -> int:
    graphs = runtime_of(p).graphs
    assert graphs is not None
    return sum(known.graph is not None for known in graphs.known.values())


class Tape(TorchDispatchMode):
    """Records what runs, to repeat it on the same memory: what Python decided stays as it was, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        inference = any(
            isinstance(x, Tensor) and x.is_inference()
            for *_, out in self.calls
            for x in pytree.tree_leaves(out)
        )
        with torch.inference_mode() if inference else torch.no_grad():
            for op, args, kwargs, out in self.calls:
                written = any(
                    a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments
                )
                view = any(a.alias_info is not None for a in op._schema.returns)
                if view and not written:
                    continue
                new = op(*args, **kwargs)
                if written:
                    continue
                for old, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
                    if isinstance(old, Tensor) and old.is_inference():
                        old.copy_(value)
                    elif isinstance(old, Tensor):
                        with torch.autograd._unsafe_preserve_version_counter(old):
                            old.copy_(value)


def taped(work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    with Tape() as tape:
        result = work()
    return result, tape.replay
