"""What a linear layer of a deployed graph does of its neighbours' work, where kernels can do it in one launch.

- Blends: a sum behind channel attention is made by the linear layer that reads it, which gives it to all others; so is
  the attention, if nothing else reads that.
- Layers behind layers: a linear layer that reads rows of another one is computed with that, from registers.
"""

from __future__ import annotations

import itertools
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from ssmquant.graph.deploy_calls import blend_call, excite_call, gated_linear_call, linear_call
from ssmquant.graph.deploy_edges import is_plain_move, occurrences, two_of
from ssmquant.graph.moves import is_cast, written_in
from ssmquant.graph.orders import shape_of
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed

__all__ = ["deploy_chains"]

_IN_ORDER = {"view", "reshape", "contiguous", "flatten", "unflatten"}
"""Moves that keep the order of elements, whatever the shapes are."""


class _Chains:
    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.written = written_in(graph)

    def blends(self, reader: fx.Node) -> None:
        """Leaves it to ``reader`` to blend what it reads, and to give that to all others too."""
        blend = self._source(reader)
        if blend is None or blend.target is not blend_call:
            return
        moved: Any = reader.args[0]
        scale: Any = blend.args[3]
        reader.args = (blend.args[0], *reader.args[1:])
        reader.kwargs = {**reader.kwargs, "blended": (*blend.args[1:3], self._attention(blend))}
        self._own_before(reader, blend)
        blend.prepend(reader)  # what comes behind the blend, as questions for its size, still does
        total = two_of(self.graph, reader)
        (made,) = (n for n in reader.users if n is not total)
        total.meta.update(blend.meta)
        blend.replace_all_uses_with(total)
        if moved is not blend:
            self._as_rows_of(moved, made)
        self.graph.erase_node(blend)
        if not scale.users:
            self.graph.erase_node(scale)

    def _attention(self, blend: fx.Node) -> Any:
        """The scale of a blend; if it is channel attention of what it scales, and nothing else, what makes it."""
        image: Any = blend.args[2]
        scale: Any = blend.args[3]
        own = scale.target is excite_call and list(scale.users) == [blend] and "parts" in scale.kwargs
        if not own or op_name(image) != "permute" or image.args != (scale.args[0], 0, 2, 3, 1):
            return scale
        return (*scale.args, scale.kwargs["parts"])

    def layers(self, reader: fx.Node) -> None:
        """Leaves what ``reader`` does to the linear layer in front of it."""
        source = self._source(reader)
        if (
            source is None
            or source.target not in (linear_call, gated_linear_call)
            or source.kwargs.keys() - {"coded", "more"}
        ):
            return
        of_x: Any = source.args[1 if source.target is linear_call else 3]
        if not deployed.static(self.model.get_submodule(str(of_x.target))):
            return
        moved: Any = reader.args[0]
        kept = moved is not source or len(source.users) > 1
        self._own_before(reader, source)
        source.kwargs = {**source.kwargs, "then": (*reader.args[1:7], reader.kwargs.get("codes"), kept)}
        last = two_of(self.graph, source) if kept else source
        last.meta.update(
            {**reader.meta, "kernels": {**source.meta.get("kernels", {}), **reader.meta.get("kernels", {})}}
        )
        reader.replace_all_uses_with(last)
        self.graph.erase_node(reader)
        if moved is not source:
            self._as_rows_of(moved, last)

    def _source(self, reader: fx.Node) -> fx.Node | None:
        """What has the rows that ``reader``, a linear layer of nothing else, reads in another shape."""
        args: Any = reader.args
        if (
            reader.target is not linear_call
            or args[7:] not in ((), (None,))
            or reader.kwargs.keys() - {"codes"}
        ):
            return None
        if not deployed.static(self.model.get_submodule(str(args[1].target))):
            return None
        moved = node = args[0]
        while is_plain_move(node) and (is_cast(node) or op_name(node) in _IN_ORDER):
            if node.meta.get("storage") in self.written:
                return None
            node = node.args[0]
        others = [n for n in reader.all_input_nodes if n is not moved]
        if any(n.op != "get_attr" for n in others) or occurrences(reader, moved) != 1:
            return None
        if any(n.meta.get("storage") in self.written for n in (node, *others)):
            return None
        before, after = shape_of(node), shape_of(moved)
        weight: Any = self.model.get_submodule(str(args[2].target))
        if before is None or after is None or not before[-1] == after[-1] == weight.shape[1]:
            return None
        # Hooks of a module, which then is called, see the shape that it reads.
        modules = [n for n in (args[5], *(args[4] or ())) if isinstance(n, fx.Node)]
        return node if before == after or all(map(self._is_tensor, modules)) else None

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(attrgetter(str(node.target))(self.model), Tensor)

    def _own_before(self, call: fx.Node, place: fx.Node) -> None:
        """What a call needs of the model in front of ``place``, if it is behind that."""
        own = [n for n in call.all_input_nodes if n.op == "get_attr"]
        behind = set(itertools.dropwhile(lambda n: n is not place, self.graph.nodes))
        for node in own:
            if node in behind:
                place.prepend(node)

    def _as_rows_of(self, moved: fx.Node, made: fx.Node) -> None:
        """Has rows that were made in another shape read as those of ``moved`` lie."""
        with self.graph.inserting_after(moved):
            shaped = self.graph.call_function(_rows_like, (made, moved))
        shaped.meta.update(made.meta)
        made.replace_all_uses_with(shaped, delete_user_cb=lambda n: n is not shaped)


def _rows_like(made: Any, like: Tensor) -> Any:
    """Rows of a tensor, or of several, as those of ``like`` lie."""
    if isinstance(made, tuple):
        return tuple(_rows_like(t, like) for t in made)
    return made.reshape(*like.shape[:-1], made.shape[-1])


def deploy_chains(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
    """Changes ``graph``, which ``deploy_edges`` has been through, in place."""
    if not engine.CHAINS:
        return
    chains = _Chains(graph, model)
    for node in list(graph.nodes):
        chains.blends(node)
    for node in list(graph.nodes):
        chains.layers(node)
