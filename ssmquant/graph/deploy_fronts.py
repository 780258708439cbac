"""Depthwise convolutions of a deployed graph whose codes one projection reads: both are one call."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ssmquant.graph.deploy_calls import conv2d_call
from ssmquant.graph.deploy_edges import occurrences, part, reads_shape
from ssmquant.graph.deploy_strides import is_core
from ssmquant.graph.moves import written_in
from ssmquant.modules import deployed

__all__ = ["deploy_fronts"]


class _Fronts:
    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.written = written_in(graph)

    def front(self, reader: fx.Node) -> None:
        """Leaves it to ``reader``, a scan or a 1x1 convolution of codes, to make them."""
        if not (is_core(reader) or self._is_pointwise(reader)) or not reader.kwargs.get("coded"):
            return
        first: Any = reader.args[0]
        second: Any = reader.kwargs.get("u")
        made: Any = first
        if second is not None:
            if first.target is not part or second.target is not part or list(second.users) != [reader]:
                return
            made = first.args[0]
            if second.args[0] is not made or set(made.users) != {first, second}:
                return
        if not self._is_depthwise(made) or (second is None) != (made.kwargs.get("also") is None):
            return
        others = [n for n in first.users if n is not reader]
        if occurrences(reader, first) != 1 or not all(reads_shape(n, first) for n in others):
            return
        if any(n.meta.get("storage") in self.written for n in (made, first, made.args[0])):
            return
        # The image in front has the shape of what the convolution makes of it.
        image = made.args[0]
        for node in others:
            node.replace_input_with(first, image)
        front = (*made.args[1:6], made.kwargs["codes"], made.kwargs.get("also"))
        kept = {k: v for k, v in reader.kwargs.items() if k not in ("u", "coded")}
        reader.args = (image, *reader.args[1:])
        reader.kwargs = {**kept, "coded": made.kwargs.get("coded", False), "front": front}
        for node in dict.fromkeys((second, first, made)):
            if isinstance(node, fx.Node) and not node.users:
                self.graph.erase_node(node)

    def _packed(self, node: fx.Node) -> nn.Module:
        args: Any = node.args
        return self.model.get_submodule(str(args[2].target))

    def _is_depthwise(self, node: fx.Node) -> bool:
        """A depthwise convolution that writes codes and nothing else."""
        args: Any = node.args
        if node.target is not conv2d_call or not args[6] or any(a is not None for a in args[7:]):
            return False
        known = node.kwargs.keys() <= {"codes", "also", "coded"} and node.kwargs.get("codes") is not None
        return known and deployed.is_depthwise(self._packed(node))

    def _is_pointwise(self, node: fx.Node) -> bool:
        """A 1x1 convolution, without factors before it."""
        args: Any = node.args
        if node.target is not conv2d_call or (len(args) > 7 and args[7] is not None):
            return False
        packed: Any = self._packed(node)
        return not deployed.is_depthwise(packed) and deployed.is_pointwise(
            packed.shape[2:] or (1, 1), args[4]
        )


def deploy_fronts(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
    """Changes ``graph``, which ``deploy_edges`` has been through, in place."""
    if not engine.CHAINS:
        return
    fronts = _Fronts(graph, model)
    for node in list(graph.nodes):
        fronts.front(node)
