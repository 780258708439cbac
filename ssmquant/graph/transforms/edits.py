"""What transforms leave in the graph: their functions, their tensors, and the writing of both into every new trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.adapter import ScanRole
from ssmquant.graph.trace import Trace
from ssmquant.graph.transforms.candidates import Place, Skipped, View
from ssmquant.graph.transforms.find import find_transforms
from ssmquant.ops.hadamard import hadamard

__all__ = ["Transforms", "minus", "smooth_silu", "times"]

_OWNER = "_ssmquant.transforms"


def smooth_silu(x: Tensor, factor: Tensor) -> Tensor:
    """``silu(factor * x) / factor``: MambaQuant's S-SiLU (arXiv 2501.13484, section 4.3); ``factor`` broadcasts."""
    return x * torch.sigmoid(x * factor.to(x.dtype))


def times(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` by factors that broadcast to it."""
    return x * factor.to(x.dtype)


def minus(x: Tensor, mean: Tensor) -> Tensor:
    """``x`` less means that broadcast to it."""
    return x - mean.to(x.dtype)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"smooth_silu": smooth_silu, "times": times, "minus": minus}


class Transforms(nn.Module):
    """The transforms that a prepared or deployed model went through.

    Buffers are the tensors of their places in the graph, named ``<kind>:<site>#<number>``; of a Hadamard transform an
    empty one. ``applied`` and ``skipped`` are for ``summary``: kind, site and how, or why not. ``settled``: they are
    chosen, and a further calibration leaves them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.applied: list[tuple[str, str, str]] = []
        self.skipped: list[Skipped] = []
        self.settled = False

    def put(self, tensors: Mapping[str, Tensor], like: Tensor | None = None) -> None:
        """Replaces all tensors, in the dtype and on the device of ``like``."""
        for name in list(self._buffers):
            delattr(self, name)
        for name, t in tensors.items():
            self.register_buffer(name, t if like is None else t.to(like.device, like.dtype))

    def forget(self) -> None:
        """No transforms any more."""
        self.put({})
        self.applied, self.skipped, self.settled = [], [], False

    @property
    def places(self) -> set[str]:
        """Names of the places that are in the graph."""
        return set(self._buffers)

    @property
    def kinds(self) -> set[str]:
        """The kinds of transforms that are in the graph."""
        return {name.partition(":")[0] for name in self._buffers}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        like = next((t for t in self._buffers.values() if t is not None), None)
        if given.keys() != self._buffers.keys():
            self.put(given, like)
            self.applied = sorted({(n.partition(":")[0], _site(n), "loaded") for n in given})
        self.settled = self.settled or bool(given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def write(self, model: nn.Module, trace: Trace, scans: tuple[ScanRole, ...] = ()) -> None:
        """Changes the graph of a fresh trace (and of its second run), in place."""
        if not self._buffers:
            return
        found, _ = find_transforms(View(model, trace, scans), self.kinds)
        places = [
            (f"{c.key}#{k}", place)
            for c in found
            for k, place in enumerate(c.places)
            if f"{c.key}#{k}" in self._buffers
        ]
        nodes = list(trace.graph.nodes)
        for graph in [trace.graph, *([trace.other.graph] if trace.other is not None else [])]:
            same = nodes if graph is trace.graph else list(graph.nodes)
            twin = dict(zip(nodes, same, strict=True))
            for name, place in places:
                operand = None if place.operand is None else twin[place.operand]
                _write(graph, name, place, twin[place.node], operand)


def _site(name: str) -> str:
    return name.partition(":")[2].rpartition("#")[0].replace("/", ".")


def _write(graph: fx.Graph, name: str, place: Place, node: fx.Node, operand: fx.Node | None) -> None:
    value = operand if operand is not None else node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    with graph.inserting_before(node):
        if place.function == "hadamard":
            axis = next(d for d, s in enumerate(place.labels.shape) if s > 1)
            function: Callable[..., Tensor] = hadamard
            args: tuple[Any, ...] = (value, axis)
        else:
            function = _FUNCTIONS[place.function]
            args = (value, graph.get_attr(f"{_OWNER}.{name}"))
        if operand is None:  # in place: guards and sizes know the node
            node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}
            return
        new = graph.call_function(function, args)
    new.meta.update({k: node.meta[k] for k in ("module", "where", "region") if k in node.meta})
    new.meta["val"] = operand.meta["val"]
    node.replace_input_with(operand, new)
