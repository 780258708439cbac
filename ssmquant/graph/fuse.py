"""The graph of a prepared model for training on a GPU: cross-scans in one pass, and quantizers before them.

Found by structure, whatever the code looks like: of the chain from an image to the scan's ``u``, and of that from its
output to a sum, ``moves`` finds out where each element goes. If the sequences are K orders of the image's pixels,

- ``u`` is quantized as an image, with a K-th of the work, and reordered by one kernel (``ops.cross_scan``);
- the projection to dt, B and C reads the image, and its result is reordered, which is less than the sequences;
- the sum of the sequences, back at their pixels, is one kernel.

The record's own graph stays as the user's code wrote it: this one computes the same up to the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.moves import evaluate, is_cast, is_move, is_number, once, traced_size
from ssmquant.graph.orders import Merges, PathsOf, Unfit, by_direction, count, is_merge, order_of, shape_of
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.sites import op_name
from ssmquant.ops.cross_scan import Paths, cross_scan, reorder
from ssmquant.ops.dense import shared_linear
from ssmquant.quantizers import Quantizer

__all__ = ["Unfit", "between", "flat_sequences", "fuse", "is_quantizer", "projected", "projection"]

_SCAN = torch.ops.ssmquant.selective_scan.default


# ---- what a scan is made of ------------------------------------------------------------------------------------------


@dataclass
class _CrossScan:
    image: fx.Node
    paths: PathsOf
    nodes: list[fx.Node]  # between the image and u
    order: Tensor  # at the sizes of the trace
    cast: bool  # u is cast to float32


def is_quantizer(node: Any) -> bool:
    """Whether a node is a call of an activation's quantizer, wrapped."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and str(node.target).startswith(f"{ACTIVATIONS}.")
        and not str(node.target).endswith(".quantizer")
        and len(node.args) == 1
        and not node.kwargs
    )


def _cross_scan(u: fx.Node, place: dict[fx.Node, int], written: set[Any]) -> _CrossScan | None:
    """How ``u``, (B, K * C, L), is made of an image."""
    wanted = shape_of(u)
    if wanted is None or len(wanted) != 3:
        return None
    todo = {u}
    nodes: list[fx.Node] = []
    while todo:
        node = max(todo, key=place.__getitem__)
        shape = shape_of(node)
        if todo == {node} and shape is not None and len(shape) in (3, 4) and node is not u:
            size, of_all = torch.Size(shape).numel(), torch.Size(wanted).numel()
            if shape[0] == wanted[0] and size and of_all >= 2 * size:
                paths = PathsOf(node, nodes[::-1], u)
                order = paths.find(shape, traced_size)
                if order is not None and node.meta.get("storage") not in written:
                    cast = any(is_cast(n) for n in nodes)
                    return _CrossScan(node, paths, nodes[::-1], order, cast)
        if not is_move(node) or node.meta.get("mutates") or node.meta.get("storage") in written:
            return None
        todo.remove(node)
        nodes.append(node)
        todo |= {i for i in node.all_input_nodes if not is_number(i)}
    return None


def projection(node: fx.Node, x: fx.Node, shape: tuple[int, ...], directions: int) -> fx.Node | None:
    """The weight, (K, E, C) or (K * E, C, 1), by which a node projects each direction of ``x``: a stack, or flat."""
    if by_direction(node) and node.args[1] is x:
        weight = node.args[2]
    elif node.target is F.conv1d and node.args[:1] == (x,) and len(shape) == 3:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weight = options.get("weight")
        kernel = shape_of(weight) if isinstance(weight, fx.Node) else None
        plain = all(options.get(name, 1) in (1, (1,)) for name in ("stride", "dilation"))
        plain = plain and options.get("padding", 0) in (0, (0,)) and options.get("bias") is None
        if not plain or options.get("groups") != directions or kernel is None or kernel[2] != 1:
            return None
    else:
        return None
    return weight if isinstance(weight, fx.Node) else None


# ---- rewriting ------------------------------------------------------------------------------------------------------


def _pixels(x: Tensor, cast: bool) -> Tensor:
    x = x.flatten(2).contiguous()
    return x.float() if cast else x


def _sequences(x: Tensor, paths: Paths) -> Tensor:
    return cross_scan(x, paths)


def flat_sequences(x: Tensor, paths: Paths) -> Tensor:
    """(B, C, L) -> (B, K * C, L): the pixels of each path in its order."""
    return cross_scan(x, paths).flatten(1, 2)


def projected(x: Tensor, weight: Tensor, paths: Paths, flat: bool) -> Tensor:
    """The projection of sequences, from their image: (B, K, E, L), or (B, K * E, L)."""
    weight = weight.reshape(len(paths.order), -1, x.shape[1])
    y = reorder(shared_linear(x, weight), paths)
    return y.flatten(1, 2) if flat else y


class _Fuser:
    """Looks at ``old``, the graph to be fused, and changes a copy of it."""

    def __init__(self, old: fx.Graph, model: nn.Module) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.copy: dict[fx.Node, fx.Node] = {}
        for n in old.nodes:
            self.copy[n] = self.graph.node_copy(n, self.copy.__getitem__)
        self.nodes = list(old.nodes)
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.written = {s for n in self.nodes for s in n.meta.get("mutates", ()) if s is not None}
        self.made: set[fx.Node] = set()  # they have no effects
        self.changed = False

    def new(self, like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(target, args)
        self.made.add(node)
        node.meta.update({k: like.meta[k] for k in ("module", "where", "region", "site") if k in like.meta})
        return node

    def scan(self, scan: fx.Node) -> None:
        u = scan.args[0]
        if (
            any(scan.kwargs.values()) or scan.args[6] is not None or not isinstance(u, fx.Node)
        ):  # a window, a gate
            return
        quantizer = u if is_quantizer(u) else None
        raw = u if quantizer is None else quantizer.args[0]
        if not isinstance(raw, fx.Node) or (quantizer is not None and not self._takes_image(quantizer)):
            return
        found = _cross_scan(raw, self.place, self.written)
        if found is None:
            return
        moved = self._moved(found)
        readers = [(n, user) for n in moved for user in n.users if user not in moved]
        first = min((user for _, user in readers), key=self.place.__getitem__)
        if not self._known_at(first, found.paths.sizes) or any(
            user.meta.get("region") != scan.meta.get("region") for _, user in readers
        ):
            return
        with self.graph.inserting_before(self.copy[first]):
            paths = self._paths(scan, found.paths)
            image = self.new(scan, _pixels, (self.copy[found.image], False))
        for node, user in readers:
            if user is not quantizer and user is not scan:
                self._reader(node, user, moved[node], found, image, paths)
        with self.graph.inserting_before(self.copy[scan]):
            if found.cast:
                image = self.new(scan, _pixels, (self.copy[found.image], True))
            if quantizer is not None:
                image = self._quantized(quantizer, image, len(found.order))
            self.copy[scan].update_arg(0, self.new(scan, flat_sequences, (image, paths)))
        self._merge(scan, paths, found)
        self.changed = True

    def _known_at(self, reader: fx.Node, sizes: list[fx.Node]) -> bool:
        """Whether the tensors that sizes are of are there when ``reader`` runs."""
        return all(self.place[n.all_input_nodes[0]] < self.place[reader] for n in sizes)

    def _paths(self, like: fx.Node, paths: PathsOf) -> fx.Node:
        """Sizes are asked for once more: the code may do so later only."""
        sizes = [self.graph.node_copy(n, self.copy.__getitem__) for n in paths.sizes]
        return self.new(like, paths, (self.copy[paths.source], *sizes))

    def _takes_image(self, quantizer: fx.Node) -> bool:
        """Whether a quantizer of sequences does the same to their image: one range, or one a sample."""
        wrapper: Any = self.model.get_submodule(str(quantizer.target))
        module = wrapper.quantizer
        if wrapper.gain is not None:  # of channels, which may be elsewhere in an image
            return False
        if not isinstance(module, Quantizer) or not module.elementwise:
            return False
        return module.num_groups == 1 and module.axis in (None, 0)

    def _quantized(self, quantizer: fx.Node, image: fx.Node, copies: int) -> fx.Node:
        node = self.graph.call_module(f"{quantizer.target}.quantizer", (image,), {"copies": copies})
        self.made.add(node)
        node.meta.update(
            {k: v for k, v in quantizer.meta.items() if k in ("module", "where", "region", "point")}
        )
        return node

    def _moved(self, found: _CrossScan) -> dict[fx.Node, Tensor | None]:
        """All that moves elements of the image towards ``u`` or from there: the orders that they have, if any."""
        chain = set(found.nodes)
        for node in self.nodes:
            if not is_move(node) or node.meta.get("mutates") or node.meta.get("storage") in self.written:
                continue
            if any(i in chain for i in node.all_input_nodes):
                chain.add(node)
        shape = shape_of(found.image)
        assert shape is not None
        nodes = sorted(chain, key=self.place.__getitem__)

        def orders() -> dict[int, Tensor | None]:
            values = evaluate(nodes, found.image, count(shape), traced_size)
            return {i: order_of(values[n], shape) for i, n in enumerate(nodes) if n in values}

        here = once("moved", found.image, nodes, nodes, shape, traced_size, orders)
        return {nodes[i]: order for i, order in here.items()}

    def _reader(
        self,
        node: fx.Node,
        user: fx.Node,
        order: Tensor | None,
        found: _CrossScan,
        image: fx.Node,
        paths: fx.Node,
    ) -> None:
        """What else reads the sequences: a projection of them (or of their quantized values) reads the image."""
        if order is None or not torch.equal(order, found.order) or _is_cast_above(node, found):
            return
        # It has the orders of u at the sizes of the trace; at others they are found out, as u's are.
        if node not in found.nodes:
            own = PathsOf(found.image, between(found.image, node), node)
            if not self._known_at(user, own.sizes):
                return
            with self.graph.inserting_before(self.copy[user]):
                paths = self._paths(user, own)
        elif node not in found.paths.targets:
            found.paths.targets.append(node)
        if not is_quantizer(user):
            self._read(user, node, found, image, paths)
        elif self._takes_image(user):
            with self.graph.inserting_before(self.copy[user]):
                value = self._quantized(user, image, len(found.order))
            for reader in user.users:
                self._read(reader, user, found, value, paths)

    def _read(self, reader: fx.Node, old: fx.Node, found: _CrossScan, value: fx.Node, paths: fx.Node) -> None:
        """``reader`` takes ``value``, an image, for ``old``, its sequences."""
        shape = shape_of(old)
        there = self.copy[reader]
        assert shape is not None
        flat = len(shape) == 3
        weight = projection(reader, old, shape, len(found.order))
        with self.graph.inserting_before(there):
            if weight is not None:
                made = self.new(reader, projected, (value, self.copy[weight], paths, flat))
                made.meta["val"] = reader.meta["val"]
                there.replace_all_uses_with(made)
                self.graph.erase_node(there)
                self.copy[reader] = made
            else:
                made = self.new(reader, flat_sequences if flat else _sequences, (value, paths))
                there.replace_input_with(self.copy[old], made)

    def _merge(self, scan: fx.Node, paths: fx.Node, found: _CrossScan) -> None:
        """The sum of the scan's output, if it comes back to the image's pixels."""
        outputs = [n for n in scan.users if n.users]
        image = shape_of(found.image)
        if len(outputs) != 1 or outputs[0].op != "call_function" or image is None:
            return
        y, directions = outputs[0], len(found.order)
        after = self._behind(y)
        shape = (image[0], directions * image[1], found.order.shape[1])

        def where() -> tuple[int, list[int]] | None:
            """Which of the nodes has the sum, and which have elements of y."""
            try:
                values = evaluate(after, y, count(shape), traced_size)
            except RuntimeError:
                return None
            for i, n in enumerate(after):
                if n in values and is_merge(values[n], found.order, image):
                    return i, [j for j, m in enumerate(after) if m in values]
            return None

        order = found.paths.signature(), tuple(map(traced_size, found.paths.sizes))
        answer = once("merge", y, after, [], shape, traced_size, where, image, order)
        if answer is None:
            return
        total = after[answer[0]]
        known = {n for n in (y, *(after[i] for i in answer[1])) if n is total or total in _reached(n)}
        if any(user not in known and not is_number(user) for n in known - {total} for user in n.users):
            return
        bad = any(n.meta.get("mutates") or n.meta.get("storage") in self.written for n in known)
        if bad or any(n.meta.get("region") != scan.meta.get("region") for n in known):
            return
        merges = Merges(y, [n for n in after if n in known], total)
        there = self.copy[total]
        with self.graph.inserting_before(there):
            sizes = (self.copy[n] for n in merges.sizes)
            made = self.new(scan, merges, (self.copy[y], self.copy[found.image], paths, *sizes))
        there.replace_all_uses_with(made)

    def _behind(self, y: fx.Node) -> list[fx.Node]:
        """What moves and adds up elements of ``y``, in order."""
        found = {y}
        for n in self.nodes[self.place[y] + 1 :]:
            if any(i in found for i in n.all_input_nodes) and (
                is_move(n) or op_name(n) in ("add", "iadd", "sum")
            ):
                found.add(n)
        return sorted(found - {y}, key=self.place.__getitem__)

    def prune(self) -> None:
        """Drops what led to the sequences, and what one scan replaced that was made for another."""
        for n in reversed(list(self.graph.nodes)):
            dead = is_move(n) or is_number(n) or is_quantizer(n) or n.op == "get_attr" or n in self.made
            if (dead or op_name(n) in ("add", "sum")) and not n.users and not n.meta.get("mutates"):
                self.graph.erase_node(n)


def between(image: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The nodes that make ``node`` of ``image`` by moving elements, in their order."""
    found: dict[fx.Node, None] = {}

    def visit(n: fx.Node) -> None:
        if n is image or n in found or is_number(n):
            return
        for i in n.all_input_nodes:
            visit(i)
        found[n] = None

    visit(node)
    return list(found)


def _is_cast_above(node: fx.Node, found: _CrossScan) -> bool:
    """Whether something casts on the way from the image to ``node``."""
    return any(is_cast(n) for n in between(found.image, node))


def _reached(node: fx.Node) -> set[fx.Node]:
    """The nodes that depend on ``node``."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        for user in n.users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def fuse(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """The fused graph; ``graph`` itself, which stays as it is, if there is nothing to fuse.

    Nor is there if the code switches gradients on and off: what is fused would move between the two.
    """
    if any(n.target is torch._C._set_grad_enabled for n in graph.nodes):
        return graph
    f = _Fuser(graph, model)
    for n in f.nodes:
        if n.target is _SCAN:
            f.scan(n)
    if not f.changed:
        return graph
    f.prune()
    f.graph.lint()
    known: dict[Any, dict[Any, Any]] = {}  # blocks of a model are alike: orders are found out once for all
    for n in f.graph.nodes:
        if isinstance(n.target, (PathsOf, Merges)):
            n.target.known = known.setdefault(n.target.signature(), n.target.known)
    return f.graph
