"""Scans of images in a deployed graph: with all around them one call on codes (``modules.deployed``).

Found by structure in the graph that ``fuse`` has made, where cross-scans are already orders of pixels:

    image -> projection -> dt, B, C      dt -> projection -> step sizes      scan -> sum of the directions

is one call. What it leaves out are quantizers and packed tensors that it gets as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.deploy_strides import called
from ssmquant.graph.fuse import between, flat_sequences, is_quantizer, projected, projection
from ssmquant.graph.moves import (
    evaluate,
    is_move,
    is_number,
    once,
    signature,
    sizes_of,
    traced_size,
    written_in,
)
from ssmquant.graph.orders import Merges, PathsOf, Unfit, count, shape_of
from ssmquant.graph.rewrite import ACTIVATIONS, WEIGHTS
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed
from ssmquant.ops.cross_scan import Paths

__all__ = ["KERNEL", "SCAN", "Deployer", "NoMatch", "order_at_trace", "traced_shape"]

SCAN = torch.ops.ssmquant.selective_scan.default
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"}
_MOST_SHAPES = 64
KERNEL = "scan on codes"


def traced_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor while tracing."""
    found = shape_of(node)
    if found is None:
        raise NoMatch
    return found


class NoMatch(Exception):
    """This chain is none that kernels know."""


class _Rows:
    """Moves from a projection of sequences, (B, K, E, L) or (B, K * E, L), to some of its rows, (B, K, n, L)."""

    def __init__(self, source: fx.Node, target: fx.Node, rows: int) -> None:
        self.source, self.target, self.rows = source, target, rows
        self.nodes = between(source, target)
        self.sizes = sizes_of(self.nodes, source)

    def find(self, shape: tuple[int, ...], directions: int, size: Any) -> tuple[int, int] | None:
        """Where the rows begin and how many there are; None if they are no rows next to each other."""

        def rows() -> tuple[int, int] | None:
            return self._find(shape, directions, size)

        found: tuple[int, int] | None = once(
            "rows", self.source, self.nodes, [self.target], shape, size, rows, directions, self.rows
        )
        return found

    def _find(self, shape: tuple[int, ...], directions: int, size: Any) -> tuple[int, int] | None:
        batch, length = shape[0], shape[-1]
        elements = count(shape)
        try:
            terms = evaluate(self.nodes, self.source, elements, size, [self.target])[self.target]
            if len(terms) != 1 or not isinstance(terms[0], Tensor) or terms[0].dim() not in (3, 4):
                return None
            found = terms[0].reshape(batch, directions, -1, length)
        except (KeyError, RuntimeError):
            return None
        first = int(found.flatten()[0]) // length if found.numel() else 0
        every = elements.reshape(batch, directions, self.rows, length)
        fits = torch.equal(found, every[:, :, first : first + found.shape[2]])
        return (first, found.shape[2]) if fits else None


@dataclass(eq=False)
class _Core:
    """Called in the graph with an image, orders, sizes and modules: projections, scans and the sum of directions."""

    __name__ = "scan_core"

    merges: Merges
    rows: list[_Rows]  # low rank, B, C; then the step sizes, of another projection
    places: tuple[int, int, int]
    ranks: tuple[int, int, int]
    softplus: bool

    def __post_init__(self) -> None:
        self.known: dict[Any, Paths] = {}

    def signature(self) -> Any:
        """Equal for objects that may share what they know."""
        rows = tuple(
            (signature(r.source, r.nodes, [r.target]), len(traced_shape(r.source)), r.rows) for r in self.rows
        )
        return self.merges.signature(), rows, self.places, self.ranks

    def _fits(self, shape: tuple[int, ...], order: Tensor, sizes: tuple[tuple[int, ...], ...]) -> bool:
        directions, length = order.shape
        _, rank, states = self.ranks
        for r, given, place in zip(self.rows, sizes, (*self.places, 0), strict=False):
            size = dict(zip(r.sizes, given, strict=True)).__getitem__
            flat = len(traced_shape(r.source)) == 3
            inner = (directions * r.rows,) if flat else (directions, r.rows)
            found = r.find((shape[0], *inner, length), directions, size)
            wanted = shape[1] if r is self.rows[3] else rank if r is self.rows[0] else states
            if found != (place, wanted):
                return False
        size = dict(zip(self.merges.sizes, sizes[4], strict=True)).__getitem__
        return self.merges.fits(shape, order, size)

    def __call__(
        self,
        x: Tensor,
        paths: Paths,
        sizes: tuple[tuple[int, ...], ...],
        modules: tuple[Any, ...],
        apart: int = 0,
        u: Tensor | None = None,
        coded: bool = False,
        other: Paths | None = None,
        front: deployed.Front | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """``apart``, ``u``: see ``deployed.scan_core``; ``coded``: x is codes; ``other``: orders of the projection.

        ``front``: a depthwise convolution that makes codes of x first.
        """
        key = (x.shape, sizes)
        if x.dtype != (torch.int8 if coded else torch.float32) or not x.numel():
            raise Unfit
        if self.known.get(key) is not paths:
            if other is not None and not torch.equal(other.order, paths.order):
                raise Unfit
            if not self._fits(tuple(x.shape), paths.order, sizes):
                raise Unfit
            if len(self.known) >= _MOST_SHAPES:
                self.known.clear()
            self.known[key] = paths
        options: Any = {"apart": apart} if apart else {}
        if front is not None:
            options["front"] = deployed.depthwise_of(x, front)
            if options["front"] is None:
                x, u = deployed.through(x, front)
        pixels = x.flatten(2).transpose(1, 2)
        if u is not None:
            options["u"] = u.flatten(2).transpose(1, 2)
        made = deployed.scan_core(
            pixels, paths.order, self.ranks, self.places, *modules, softplus=self.softplus, **options
        )
        parts = []
        for part in made if apart else (made,):
            y = part.transpose(1, 2)
            parts.append(y.unflatten(2, x.shape[2:]) if self.merges.like_image else y)
        return tuple(parts) if apart else parts[0]


def order_at_trace(node: Any) -> Tensor | None:
    """The orders that a node makes, at the sizes of the trace; None if it makes none."""
    made = node.target
    return made.find(traced_shape(made.source), traced_size) if isinstance(made, PathsOf) else None


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


class Deployer:
    """Looks at ``old``, which stays as it is, and changes a copy of it."""

    def __init__(self, old: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
        self.old, self.model, self.engine = old, model, engine
        self.graph = fx.Graph()
        self.copy: dict[fx.Node, fx.Node] = {}
        for n in old.nodes:
            self.copy[n] = self.graph.node_copy(n, self.copy.__getitem__)
        self.dead: set[fx.Node] = set()  # of the old graph: what is left out, if nothing else reads it
        self.known: dict[Any, dict[Any, Any]] = {}  # of cores that are alike
        self.written = written_in(old)
        self.changed = False

    def module(self, node: Any, prefix: str) -> nn.Module:
        """The quantizer or packed tensor that a node calls."""
        module = called(self.model, node, prefix)
        if module is None:
            raise NoMatch
        return module

    def quantizer(self, node: Any, *, exact: bool = False) -> fx.Node:
        module = self.module(node, ACTIVATIONS)
        if not (deployed.static(module) if exact else deployed.coded(module, self.engine)):
            raise NoMatch
        assert isinstance(node, fx.Node)
        self.dead.add(node)
        return node

    def weight(self, node: Any, outputs: int) -> fx.Node:
        """The call of the packed tensor of which ``node`` is another shape, and no other order.

        ``outputs``: so many axes in front number its outputs.
        """
        while isinstance(node, fx.Node) and node.op != "call_module":
            if op_name(node) not in _RESHAPES:
                raise NoMatch
            self.dead.add(node)
            node = node.args[0]
        module = self.module(node, WEIGHTS)
        if not deployed.takes_weight(module, outputs):
            raise NoMatch
        assert isinstance(node, fx.Node)
        self.dead.add(node)
        return node

    def owner(self, node: Any) -> Any:
        """The module behind a node, as an argument; other values as they are."""
        if not isinstance(node, fx.Node):
            return node
        return self.graph.get_attr(str(node.target)) if node.op == "call_module" else self.copy[node]

    def source(self, node: Any) -> fx.Node:
        """Where the elements of ``node`` come from."""
        if not isinstance(node, fx.Node):
            raise NoMatch
        while is_move(node):
            self.dead.add(node)
            tensors = [i for i in node.all_input_nodes if not is_number(i)]
            if len(tensors) != 1:
                raise NoMatch
            node = tensors[0]
        return node

    def rows(self, source: fx.Node, target: Any, directions: int) -> tuple[_Rows, int, int]:
        shape = traced_shape(source)
        each = shape[1] if len(shape) == 3 else shape[1] * shape[2]
        rows = _Rows(source, target, each // directions)
        try:
            found = rows.find(shape, directions, traced_size)
        except KeyError:  # a size of what has no known shape
            raise NoMatch from None
        if found is None:
            raise NoMatch
        return rows, *found

    def core(self, scan: fx.Node) -> None:
        """One scan with all around it."""
        arguments: tuple[Any, ...] = scan.args
        u, delta, a, b, c, skip, z, bias, softplus, *_ = arguments
        if z is not None or any(scan.kwargs.values()) or not isinstance(u, fx.Node):
            raise NoMatch
        if u.target is not flat_sequences or not isinstance(softplus, bool):
            raise NoMatch
        of_u, paths = self.quantizer(u.args[0]), u.args[1]
        assert isinstance(paths, fx.Node)
        outputs = [n for n in scan.users if n.users]
        merges = next((n for n in outputs[0].users), None) if len(outputs) == 1 else None
        if merges is None or len(outputs[0].users) != 1 or not isinstance(merges.target, Merges):
            raise NoMatch
        image = merges.args[1]
        assert isinstance(image, fx.Node)
        directions = traced_shape(outputs[0])[1] // traced_shape(image)[1]

        of_delta = self.quantizer(delta) if is_quantizer(delta) else None
        delta = delta if of_delta is None else of_delta.args[0]
        steps = self.source(delta)
        of_rank = next((i for i in steps.all_input_nodes if is_quantizer(i)), None)
        of_rank = self.quantizer(of_rank, exact=True)
        dt_weight = projection(steps, of_rank, traced_shape(of_rank), directions)
        of_b, of_c = self.quantizer(b), self.quantizer(c)
        readers = [q.args[0] for q in (of_rank, of_b, of_c)]
        made = {self.source(n) for n in readers}
        if len(made) != 1 or dt_weight is None:
            raise NoMatch
        rows_node = made.pop()
        if rows_node.target is not projected:
            raise NoMatch
        value, x_weight, other, _ = rows_node.args
        assert isinstance(other, fx.Node)
        of_x = self.quantizer(value, exact=True)
        # Both look at the same image, in the same orders.
        pixels: list[Any] = [q.args[0] for q in (of_u, of_x)]
        if {p.args[0] for p in pixels} != {image} or other not in self._same(paths):
            raise NoMatch
        found = [self.rows(rows_node, n, directions) for n in readers]
        last = self.rows(steps, delta, directions)
        rank, states, same = (f[2] for f in found)
        if states > self.engine.MOST_STATES or rank > self.engine.MOST_RANK:
            raise NoMatch
        if states != same or last[1:] != (0, traced_shape(image)[1]):
            raise NoMatch
        core = _Core(
            merges.target,
            [*(f[0] for f in found), last[0]],
            (found[0][1], found[1][1], found[2][1]),
            (found[0][0].rows, rank, states),
            softplus,
        )
        if other is paths:
            core.known = self.known.setdefault(core.signature(), core.known)
        weights = self.weight(x_weight, 2), self.weight(dt_weight, 2)
        there = self.copy[merges]
        with self.graph.inserting_before(there):
            modules = (of_x, weights[0], of_rank, weights[1], of_u, of_delta, of_b, of_c, a, skip, bias)
            sizes = (*(tuple(self.copy[n] for n in r.sizes) for r in core.rows), there.args[3:])
            args = (self.copy[image], self.copy[paths], sizes, tuple(self.owner(m) for m in modules))
            # At other sizes they may differ.
            given: dict[str, Any] = {} if other is paths else {"other": self.copy[other]}
            node = self.graph.call_function(core, args, given)
            whole = self.graph.call_method("contiguous", (node,))  # dropped again where nothing needs it
        node.meta.update(merges.meta)
        node.meta["kernels"] = {n.meta["site"]: KERNEL for n in (scan, rows_node, steps) if "site" in n.meta}
        there.replace_all_uses_with(whole)
        self.dead |= {merges, scan, outputs[0], steps, rows_node, u}
        self.dead |= {n for n in (a, skip, bias) if isinstance(n, fx.Node) and n.op == "call_module"}
        self.dead |= set(pixels)
        self.changed = True

    def _same(self, paths: fx.Node) -> set[fx.Node]:
        """Nodes that make the orders that ``paths`` makes, of the same image."""
        wanted = order_at_trace(paths)
        return {
            n
            for n in self.old.nodes
            if n is paths or (n.args[:1] == paths.args[:1] and _equal(order_at_trace(n), wanted))
        }

    def prune(self) -> None:
        dead = {self.copy[n] for n in self.dead}
        for n in reversed(list(self.graph.nodes)):
            unread = not n.users and n.op not in ("placeholder", "output")
            gone = n in dead or is_move(n) or is_number(n) or n.op == "get_attr"
            gone = gone or isinstance(n.target, PathsOf)
            if unread and gone and not n.meta.get("mutates"):
                self.graph.erase_node(n)
