"""What goes from one call of a deployed graph to the next, where kernels can hand on less than floats.

- Codes: what only one quantizer reads is written as its codes, a byte instead of four.
- Parts: what a scan computes along paths of pixels at once is added up by the layer that reads the sum, and so are
  two sequences, as those of both directions, and what the sum is divided by.
- Sums of pixels: a depthwise convolution in front of channel attention gives those of its tiles with its result.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.deploy_calls import conv2d_call, excite_call, gated_linear_call, linear_call
from ssmquant.graph.deploy_scans import order_at_trace
from ssmquant.graph.deploy_strides import is_core
from ssmquant.graph.gains import axes_of
from ssmquant.graph.moves import is_cast, written_in
from ssmquant.graph.orders import PathsOf, shape_of
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed

__all__ = ["deploy_edges", "is_plain_move", "occurrences", "part", "reads_shape", "two_of"]

_MOVES = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze", "swapaxes",
    "movedim", "moveaxis", "t",
}  # fmt: skip
_MOST_PARTS = 4


def reads_shape(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node wants nothing but the shape of ``source``."""
    if node.op == "call_method" and node.target == "size":
        return True
    return isinstance(node.target, PathsOf) and node.args[:1] == (source,)


class _Edges:
    def __init__(self, graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
        self.graph, self.model, self.engine = graph, model, engine
        self.written = written_in(graph)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.users if not reads_shape(n, node)]

    def _way(self, reader: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
        """Where what ``reader`` reads first comes from, and the moves from there, which nothing else reads."""
        moves: list[fx.Node] = []
        node: Any = reader.args[0] if reader.args else None
        while isinstance(node, fx.Node):
            last = moves[-1] if moves else reader
            if self._readers(node) != [last] or occurrences(last, node) != 1:
                return None
            if node.meta.get("storage") in self.written:
                return None
            if not is_plain_move(node):
                return node, moves[::-1]
            moves.append(node)
            node = node.args[0]
        return None

    def _quantizer(self, reader: fx.Node) -> tuple[fx.Node, Any] | None:
        """What ``reader`` does with its input first: a quantizer whose codes kernels take, and factors before it."""
        found: Any = None
        factors: Any = None
        if is_core(reader):
            modules: Any = reader.args[3]
            found = modules[0]
        elif reader.target is linear_call:
            norm: Any = reader.args[4]
            if norm is None or (len(norm) == 1 and self._is_tensor(norm[0])):
                found, factors = reader.args[1], None if norm is None else norm[0]
        elif reader.target is conv2d_call:
            if reader.args[7] is None or self._is_tensor(reader.args[7]):
                found, factors = reader.args[1], reader.args[7]
        if not isinstance(found, fx.Node):
            return None
        module = self.model.get_submodule(str(found.target))
        return (found, factors) if deployed.goes_between(module, self.engine) else None

    def _is_tensor(self, node: Any) -> bool:
        """Whether a node is a tensor of the model, which is there before all calls."""
        return node.op == "get_attr" and isinstance(attrgetter(str(node.target))(self.model), Tensor)

    def _without_factors(self, reader: fx.Node) -> None:
        args = list(reader.args)
        args[4 if reader.target is linear_call else 7] = None
        reader.args = tuple(args)

    def codes(self, reader: fx.Node) -> None:
        """Has what ``reader`` quantizes written as codes by the call that makes it."""
        found = self._quantizer(reader)
        way = None if found is None else self._way(reader)
        if found is None or way is None:
            return
        quantizer, factors = found
        source, moves = way
        half = self._first_half(source)
        made = source if half is None else half[0]
        if made.kwargs.get("codes") is not None:
            return
        if made.target is conv2d_call:
            args: Any = made.args
            if not deployed.writes_codes(self.model.get_submodule(str(args[2].target)), args[4]):
                return
        elif made.target not in (linear_call, gated_linear_call):
            return
        if factors is not None and not _keep_channels(made, moves, reader):
            return
        if is_core(reader) and not self._second(reader, made, moves):
            return
        with self.graph.inserting_before(made):
            again = self.graph.get_attr(str(quantizer.target))
            if factors is not None:
                self._without_factors(reader)
                factors = self.graph.get_attr(str(factors.target))
        columns = None
        if half is not None:
            _, chunk, columns = half
            for part in list(chunk.users):
                part.args = (made, *part.args[1:])
            self.graph.erase_node(chunk)
        made.kwargs = {**made.kwargs, "codes": (again, columns, factors)}
        reader.kwargs = {**reader.kwargs, "coded": True}
        for node in moves:
            if is_cast(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                self.graph.erase_node(node)

    def _second(self, core: fx.Node, made: fx.Node, moves: list[fx.Node]) -> bool:
        """Has the scan's codes written too, where its quantizer is not the projection's; whether that is possible."""
        modules: Any = core.args[3]
        if modules[0].target == modules[4].target:
            return True
        args: Any = made.args
        known = deployed.goes_between(self.model.get_submodule(str(modules[4].target)), self.engine)
        if made.target is not conv2d_call or moves or not args[6] or not known:
            return False
        if not deployed.is_depthwise(self.model.get_submodule(str(args[2].target))):
            return False
        with self.graph.inserting_before(made):
            also = self.graph.get_attr(str(modules[4].target))
        second = two_of(self.graph, made)
        made.kwargs = {**made.kwargs, "also": also}
        core.kwargs = {**core.kwargs, "u": second}
        return True

    def means(self, reader: fx.Node) -> None:
        """Has channel attention's means made of sums that the depthwise convolution in front of it gives."""
        made: Any = reader.args[0]
        if made.target is not conv2d_call or "codes" in made.kwargs or not made.args[6]:
            return
        if made.meta.get("storage") in self.written:
            return
        if deployed.is_depthwise(self.model.get_submodule(str(made.args[2].target))):
            second = two_of(self.graph, made)
            made.kwargs = {**made.kwargs, "sums": True}
            reader.kwargs = {"parts": second}

    def _first_half(self, node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
        """(layer, chunk, columns) if ``node`` is the first of two halves of a linear layer's outputs."""
        if op_name(node) != "getitem" or node.args[1:] != (0,):
            return None
        chunk: Any = node.args[0]
        if not isinstance(chunk, fx.Node) or op_name(chunk) != "chunk" or not 1 <= len(chunk.args) <= 3:
            return None
        made: Any = chunk.args[0]
        shape, half = shape_of(made), shape_of(node)
        dim = chunk.args[2] if len(chunk.args) == 3 else chunk.kwargs.get("dim", 0)
        if made.target is not linear_call or shape is None or half is None:
            return None
        last = dim in (-1, len(shape) - 1) and chunk.args[1:2] == (2,) and 2 * half[-1] == shape[-1]
        if not last or list(made.users) != [chunk] or made.meta.get("storage") in self.written:
            return None
        read = all(op_name(n) == "getitem" and n.args[1] in (0, 1) for n in chunk.users)
        return (made, chunk, half[-1]) if read else None

    def sums(self, reader: fx.Node) -> None:
        """Leaves it to ``reader`` to add up two tensors, and to scale the sum."""
        at, quantizer = (2, 3) if reader.target is gated_linear_call else (4, 1)  # norm
        of_x: Any = reader.args[quantizer]
        if reader.kwargs or not deployed.static(self.model.get_submodule(str(of_x.target))):
            return
        last: Any = reader
        node: Any = reader.args[0]
        factor = self._factor(node) if self._alone(node, last) else None
        if factor is not None:
            if reader.args[at] is not None:
                return
            last, node = node, node.args[0]
        if not self._alone(node, last) or op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
            return
        terms: Any = node.args
        shapes = [shape_of(n) if isinstance(n, fx.Node) else None for n in (node, *terms)]
        if None in shapes or len(set(shapes)) > 1 or terms[0] is terms[1]:
            return
        if any(n.meta.get("storage") in self.written for n in (node, *terms)):
            return
        args = [terms[0], *reader.args[1:]]
        if factor is not None:
            args[at] = (factor,)
        reader.args = tuple(args)
        reader.kwargs = {"more": (terms[1],)}
        for gone in (last, node) if last is not reader else (node,):
            self.graph.erase_node(gone)

    def _alone(self, node: Any, reader: fx.Node) -> bool:
        """Whether a node is read by ``reader`` alone, and once."""
        known = isinstance(node, fx.Node) and list(node.users) == [reader] and not node.meta.get("mutates")
        return known and occurrences(reader, node) == 1

    def _factor(self, node: fx.Node) -> float | None:
        """The number that a value is multiplied with; of divisions by powers of two, where that is the same."""
        name = op_name(node)
        if name not in ("mul", "truediv", "div") or len(node.args) != 2 or node.kwargs:
            return None
        number = node.args[1]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            return None
        if name == "mul":
            return float(number)
        return 1.0 / number if abs(math.frexp(number)[0]) == 0.5 else None

    def parts(self, reader: fx.Node) -> None:
        """Leaves it to ``reader`` to add up what a scan computes along paths at once."""
        way = self._way(reader)
        if way is None or not is_core(way[0]):
            return
        core, moves = way
        of_x: Any = reader.args[1 if reader.target is linear_call else 3]
        module = self.model.get_submodule(str(of_x.target))
        order = order_at_trace(core.args[1])
        if order is None or not deployed.static(module):
            return
        count = len(self.engine.paths(order))
        if not 1 < count <= _MOST_PARTS:
            return
        if any(len(n.users) > 1 for n in (core, *moves)):
            return  # they are asked for their shapes
        core.kwargs = {**core.kwargs, "apart": count}
        ends: list[Any] = []
        with self.graph.inserting_before(reader):
            for i in range(count):
                end: Any = self.graph.call_function(part, (core, i))
                for node in moves:
                    known = {node.args[0]: end}
                    end = self.graph.node_copy(node, lambda n, known=known: known.get(n, n))  # type: ignore[misc]
                ends.append(end)
        reader.args = (ends[0], *reader.args[1:])
        reader.kwargs = {**reader.kwargs, "more": tuple(ends[1:])}
        for node in reversed(moves):
            self.graph.erase_node(node)


def part(parts: Any, i: int) -> Any:
    """One of several values of a call."""
    return parts[i]


def two_of(graph: fx.Graph, made: fx.Node) -> fx.Node:
    """Has a call that gives two values read as such; the second one."""
    with graph.inserting_after(made):
        second = graph.call_function(part, (made, 1))
        first = graph.call_function(part, (made, 0))
    made.replace_all_uses_with(first, delete_user_cb=lambda n: n not in (first, second))
    first.meta.update(made.meta)
    return second


def is_plain_move(node: fx.Node) -> bool:
    """Whether a node only moves elements of its first argument, or casts them to float32."""
    retyped = any(isinstance(a, torch.dtype) for a in node.args)
    called = node.op in ("call_method", "call_function") and bool(node.args)
    return called and (is_cast(node) or (op_name(node) in _MOVES and not retyped))


def occurrences(user: fx.Node, node: fx.Node) -> int:
    """How often a node is among the arguments of another one."""
    found: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def _keep_channels(made: fx.Node, moves: list[fx.Node], reader: fx.Node) -> bool:
    """Whether outputs of a layer are what the factors of its reader's inputs are of."""
    axes = len(shape_of(made) or ())
    order = tuple(range(axes))  # of the layer's axes
    for node in moves:
        moved = tuple(range(axes)) if is_cast(node) else axes_of(node, axes)
        if moved is None:
            return False
        order = tuple(order[i] for i in moved)
    first, last = (1 if n.target is conv2d_call else axes - 1 for n in (made, reader))
    return axes > 0 and order[last] == first


def deploy_edges(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
    """Changes ``graph``, which ``deploy_layers`` has been through, in place."""
    if not engine.BETWEEN:
        return
    edges = _Edges(graph, model, engine)
    for node in list(graph.nodes):
        edges.codes(node)
    for node in list(graph.nodes):
        if node.target in (linear_call, gated_linear_call):
            edges.parts(node)
            edges.sums(node)
        elif node.target is excite_call:
            edges.means(node)
