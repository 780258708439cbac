"""The graph of a prepared model for training on a GPU: cross-scans in one pass, and quantizers before them.

Found by structure, whatever the code looks like: of the chain from an image to the scan's ``u``, and of that from its
output to a sum, ``moves`` finds out where each element goes. If the sequences are K orders of the image's pixels,

- ``u`` is quantized as an image, with a K-th of the work, and reordered by one kernel (``ops.cross_scan``);
- the projection to dt, B and C reads the image, and its result is reordered, which is less than the sequences;
- the sum of the sequences, back at their pixels, is one kernel.

The record's own graph stays as the user's code wrote it: this one computes the same up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.layers import hooked
from ssmquant.graph.moves import evaluate, is_cast, is_move, is_number, numbers_of, traced_number
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.sites import op_name
from ssmquant.ops.cross_scan import Paths, cross_merge, cross_scan, reorder
from ssmquant.ops.dense import shared_linear
from ssmquant.quantizers import Quantizer

__all__ = ["Unfit", "fuse"]

_SCAN = torch.ops.ssmquant.selective_scan.default
_FLAT = {"view", "reshape", "flatten", "contiguous"}  # they leave elements in their order
_MOST_PATHS = 64  # sizes of images that a model keeps the orders of


class Unfit(Exception):
    """The fused graph does not compute the same at these sizes (it was checked at those of the trace)."""


# ---- orders of pixels ----------------------------------------------------------------------------------------------


def _order(terms: list[Any], shape: tuple[int, ...]) -> Tensor | None:
    """(K, L) if ``terms`` is one tensor, (B, K, C, L) or (B, K * C, L), of K orders of the pixels of (B, C, ...)."""
    batch, channels, pixels = shape[0], shape[1], torch.Size(shape[2:]).numel()
    if len(terms) != 1 or terms[0].dim() not in (3, 4) or terms[0].shape[-1] != pixels:
        return None
    elements = terms[0]
    size = batch * channels * pixels
    if elements.shape[0] != batch or not size or elements.numel() % size:
        return None
    elements = elements.reshape(batch, -1, channels, pixels)
    order = elements[0, :, 0]
    rows = _count((batch, 1, channels, 1), order.device) * pixels
    straight = _count((pixels,), order.device).expand_as(order)
    fits = torch.equal(order.sort(1).values, straight) and torch.equal(elements, rows + order[None, :, None])
    return order if fits else None


def _is_merge(terms: list[Any], order: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``terms`` take, each from another of K sequences, (B, K * C, L), every step to its pixel.

    They have the shape of the image, (B, C, L) or (B, C, H, W).
    """
    batch, channels = shape[:2]
    pixels = order.shape[1]
    wanted = (torch.Size(shape), torch.Size((batch, channels, pixels)))
    if len(terms) != len(order) or any(t.shape not in wanted for t in terms):
        return False
    step = order.argsort(1).to(torch.int32)
    row = _count((batch, 1, 1), order.device) * (len(order) * channels)
    rows = row + _count((channels, 1), order.device)
    left = set(range(len(order)))
    for term in terms:
        k = int(term.flatten()[0]) // (channels * pixels) if term.numel() else 0
        if k not in left or not torch.equal(term.flatten(2), (rows + k * channels) * pixels + step[k]):
            return False
        left.remove(k)
    return True


def _count(shape: tuple[int, ...], device: Any = "cpu") -> Tensor:
    """The numbers of a tensor's elements. Raises RuntimeError for more than int32 has."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)


class _PathsOf:
    """Called in the graph with an image and sizes: the orders in which ``nodes`` lead from it to ``target``."""

    __name__ = "paths_of"

    def __init__(self, source: fx.Node, nodes: list[fx.Node], target: fx.Node) -> None:
        self.source, self.nodes, self.target = source, nodes, target
        self.numbers = numbers_of(nodes)
        self.known: dict[Any, Paths] = {}
        self.captured: list[Paths] = []  # CUDA graphs have their addresses

    def find(
        self, shape: tuple[int, ...], number: Callable[[fx.Node], int], device: Any = "cpu"
    ) -> Tensor | None:
        try:
            values = evaluate(self.nodes, self.source, _count(shape, device), number, self.target)
        except RuntimeError:
            return None
        return _order(values[self.target], shape) if self.target in values else None

    @torch.no_grad()
    def __call__(self, x: Tensor, *numbers: int) -> Paths:
        key = (x.shape, numbers, x.device)
        if (known := self.known.get(key)) is not None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                self.captured.append(known)
            return known
        given = dict(zip(self.numbers, numbers, strict=True)).__getitem__
        order = self.find(tuple(x.shape), given, x.device)
        if order is None:
            raise Unfit
        if len(self.known) >= _MOST_PATHS:
            self.known.clear()
        paths = self.known[key] = Paths.of(order)
        return paths


class _Merges:
    """Called in the graph with sequences, the image, orders and sizes: the sum that ``nodes`` lead to."""

    __name__ = "merges"

    def __init__(self, source: fx.Node, nodes: list[fx.Node], target: fx.Node) -> None:
        self.source, self.nodes, self.target = source, nodes, target
        self.like_image = len(_shape(target) or ()) == 4
        self.cast = any(is_cast(n) for n in nodes)
        self.sums = any(op_name(n) == "sum" for n in nodes)
        self.numbers = numbers_of(nodes)
        self.known: dict[Any, Paths] = {}

    def fits(self, image: tuple[int, ...], order: Tensor, number: Callable[[fx.Node], int]) -> bool:
        try:
            elements = _count((image[0], len(order) * image[1], order.shape[1]), order.device)
            values = evaluate(self.nodes, self.source, elements, number, self.target)
        except RuntimeError:
            return False
        return self.target in values and _is_merge(values[self.target], order, image)

    def __call__(self, y: Tensor, x: Tensor, paths: Paths, *numbers: int) -> Tensor:
        key = (x.shape, numbers)
        if self.known.get(key) is not paths:
            given = dict(zip(self.numbers, numbers, strict=True)).__getitem__
            if not self.fits(tuple(x.shape), paths.order, given):
                raise Unfit
            if len(self.known) >= _MOST_PATHS:
                self.known.clear()
            self.known[key] = paths
        y = y.unflatten(1, (len(paths.order), -1))
        wide = self.cast or (self.sums and torch.is_autocast_enabled(y.device.type))  # it sums in float32
        out = cross_merge(y.float() if wide else y, paths)
        return out.view(x.shape) if self.like_image else out


# ---- what a scan is made of ------------------------------------------------------------------------------------------


@dataclass
class _CrossScan:
    image: fx.Node
    paths: _PathsOf
    nodes: list[fx.Node]  # between the image and u
    order: Tensor  # at the sizes of the trace
    cast: bool  # u is cast to float32


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def _quantizer(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and str(node.target).startswith(f"{ACTIVATIONS}.")
        and len(node.args) == 1
        and not node.kwargs
    )


def _cross_scan(u: fx.Node, place: dict[fx.Node, int], written: set[Any]) -> _CrossScan | None:
    """How ``u``, (B, K * C, L), is made of an image."""
    wanted = _shape(u)
    if wanted is None or len(wanted) != 3:
        return None
    todo = {u}
    nodes: list[fx.Node] = []
    while todo:
        node = max(todo, key=place.__getitem__)
        shape = _shape(node)
        if todo == {node} and shape is not None and len(shape) in (3, 4) and node is not u:
            size, of_all = torch.Size(shape).numel(), torch.Size(wanted).numel()
            if shape[0] == wanted[0] and size and of_all >= 2 * size:
                paths = _PathsOf(node, nodes[::-1], u)
                order = paths.find(shape, traced_number)
                if order is not None and node.meta.get("storage") not in written:
                    cast = any(is_cast(n) for n in nodes)
                    return _CrossScan(node, paths, nodes[::-1], order, cast)
        if not is_move(node) or node.meta.get("mutates") or node.meta.get("storage") in written:
            return None
        todo.remove(node)
        nodes.append(node)
        todo |= {i for i in node.all_input_nodes if not is_number(i)}
    return None


def _is_projection(node: fx.Node, x: fx.Node, shape: tuple[int, ...], directions: int) -> bool:
    """Whether a node projects ``x``, (B, K, C, L) or (B, K * C, L), by a weight of each direction, (K, E, C)."""
    if not all(isinstance(a, fx.Node) for a in node.args[1:2]):
        return False
    if op_name(node) == "einsum" and len(node.args) == 3 and node.args[1] is x and not node.kwargs:
        given, _, out = str(node.args[0]).replace(" ", "").partition("->")
        first, _, second = given.partition(",")
        if len(first) != 4 or len(second) != 3 or len(shape) != 4:
            return False
        if len(set(first)) != 4 or second[1] in first:
            return False
        wanted = first[0] + first[1] + second[1] + first[3]
        return second[0] == first[1] and second[2] == first[2] and out == wanted and shape[1] == directions
    if node.target is F.conv1d and node.args[0] is x and len(shape) == 3:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        kernel = _shape(options["weight"]) if isinstance(options.get("weight"), fx.Node) else None
        plain = all(options.get(name, 1) in (1, (1,)) for name in ("stride", "dilation"))
        plain = plain and options.get("padding", 0) in (0, (0,)) and options.get("bias") is None
        return plain and options.get("groups") == directions and kernel is not None and kernel[2] == 1
    return False


# ---- rewriting ------------------------------------------------------------------------------------------------------


def _pixels(x: Tensor, cast: bool) -> Tensor:
    x = x.flatten(2).contiguous()
    return x.float() if cast else x


def _sequences(x: Tensor, paths: Paths) -> Tensor:
    return cross_scan(x, paths)


def _flat_sequences(x: Tensor, paths: Paths) -> Tensor:
    return cross_scan(x, paths).flatten(1, 2)


def _projected(x: Tensor, weight: Tensor, paths: Paths, flat: bool) -> Tensor:
    """The projection of sequences, from their image: (B, K, E, L), or (B, K * E, L)."""
    if not flat and weight.shape[::2] != (
        len(paths.order),
        x.shape[1],
    ):  # einsum repeats a weight of one direction
        raise Unfit
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
        self.changed = False

    def new(self, like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta.update({k: like.meta[k] for k in ("module", "where", "region") if k in like.meta})
        return node

    def scan(self, scan: fx.Node) -> None:
        u = scan.args[0]
        if (
            any(scan.kwargs.values()) or scan.args[6] is not None or not isinstance(u, fx.Node)
        ):  # a window, a gate
            return
        quantizer = u if _quantizer(u) else None
        raw = u if quantizer is None else quantizer.args[0]
        if not isinstance(raw, fx.Node) or (quantizer is not None and not self._takes_image(quantizer)):
            return
        found = _cross_scan(raw, self.place, self.written)
        if found is None:
            return
        moved = self._moved(found)
        readers = [(n, user) for n in moved for user in n.users if user not in moved]
        first = min((user for _, user in readers), key=self.place.__getitem__)
        known = all(self._known_at(first, n) for n in found.paths.numbers)
        if not known or any(user.meta.get("region") != scan.meta.get("region") for _, user in readers):
            return
        with self.graph.inserting_before(self.copy[first]):
            numbers = [self._number(n) for n in found.paths.numbers]
            paths = self.new(scan, found.paths, (self.copy[found.image], *numbers))
            image = self.new(scan, _pixels, (self.copy[found.image], False))
        for node, user in readers:
            if user is not quantizer and user is not scan:
                self._reader(node, user, moved[node], found, image, paths)
        with self.graph.inserting_before(self.copy[scan]):
            if found.cast:
                image = self.new(scan, _pixels, (self.copy[found.image], True))
            if quantizer is not None:
                image = self._quantized(quantizer, image, len(found.order))
            self.copy[scan].update_arg(0, self.new(scan, _flat_sequences, (image, paths)))
        self._merge(scan, paths, found)
        self.changed = True

    def _known_at(self, reader: fx.Node, number: fx.Node) -> bool:
        """Whether the tensors that a size is made of are there when ``reader`` runs."""
        if number.op == "call_function":
            return all(self._known_at(reader, i) for i in number.all_input_nodes)
        return self.place[number.all_input_nodes[0]] < self.place[reader]

    def _number(self, node: fx.Node) -> fx.Node:
        """A size once more: the code may ask for it later only."""
        done = {i: self._number(i) if is_number(i) else self.copy[i] for i in node.all_input_nodes}
        return self.graph.node_copy(node, done.__getitem__)

    def _takes_image(self, quantizer: fx.Node) -> bool:
        """Whether a quantizer of sequences does the same to their image: one range, or one a sample."""
        wrapper = self.model.get_submodule(str(quantizer.target))
        module = wrapper.quantizer
        if not isinstance(module, Quantizer) or not module.elementwise or hooked(wrapper):
            return False
        return module.num_groups == 1 and module.axis in (None, 0)

    def _quantized(self, quantizer: fx.Node, image: fx.Node, copies: int) -> fx.Node:
        node = self.graph.call_module(f"{quantizer.target}.quantizer", (image,), {"copies": copies})
        node.meta.update(
            {k: v for k, v in quantizer.meta.items() if k in ("module", "where", "region", "point")}
        )
        return node

    def _moved(self, found: _CrossScan) -> dict[fx.Node, list[Any]]:
        """All that moves elements of the image towards ``u`` or from there: numbers of elements (``moves``)."""
        chain = set(found.nodes)
        for node in self.nodes:
            if not is_move(node) or node.meta.get("mutates") or node.meta.get("storage") in self.written:
                continue
            if any(i in chain for i in node.all_input_nodes):
                chain.add(node)
        shape = _shape(found.image)
        assert shape is not None
        nodes = sorted(chain, key=self.place.__getitem__)
        values = evaluate(nodes, found.image, _count(shape), traced_number)
        del values[found.image]
        return values

    def _reader(
        self, node: fx.Node, user: fx.Node, here: list[Any], found: _CrossScan, image: fx.Node, paths: fx.Node
    ) -> None:
        """What else reads the sequences: a projection of them (or of their quantized values) reads the image."""
        shape, image_shape, directions = _shape(node), _shape(found.image), len(found.order)
        assert image_shape is not None
        order = _order(here, image_shape)
        stack = (image_shape[0], directions, image_shape[1], found.order.shape[1])
        if shape not in (stack, (stack[0], stack[1] * stack[2], stack[3])) or order is None:
            return
        if not torch.equal(order, found.order) or _is_cast_above(node, found):
            return
        if _disordering(found.image, node) != _disordering(found.image, found.paths.target):
            # It has the orders of u at the sizes of the trace; at others they are found out, as u's are.
            own = _PathsOf(found.image, _between(found.image, node), node)
            if not all(self._known_at(user, n) for n in own.numbers):
                return
            with self.graph.inserting_before(self.copy[user]):
                numbers = [self._number(n) for n in own.numbers]
                paths = self.new(user, own, (self.copy[found.image], *numbers))
        if not _quantizer(user):
            self._read(user, node, shape, image, paths, directions)
        elif self._takes_image(user):
            with self.graph.inserting_before(self.copy[user]):
                value = self._quantized(user, image, directions)
            for reader in user.users:
                self._read(reader, user, shape, value, paths, directions)

    def _read(
        self,
        reader: fx.Node,
        old: fx.Node,
        shape: tuple[int, ...],
        value: fx.Node,
        paths: fx.Node,
        directions: int,
    ) -> None:
        """``reader`` takes ``value``, an image, for ``old``, its sequences."""
        flat = len(shape) == 3
        there = self.copy[reader]
        if there.target is _projected:  # another scan of the same sequences was there before
            return
        with self.graph.inserting_before(there):
            if _is_projection(reader, old, shape, directions):
                weight = there.args[2] if op_name(reader) == "einsum" else there.args[1]
                made = self.new(reader, _projected, (value, weight, paths, flat))
                there.replace_all_uses_with(made)
                self.graph.erase_node(there)
                self.copy[reader] = made
            else:
                made = self.new(reader, _flat_sequences if flat else _sequences, (value, paths))
                there.replace_input_with(self.copy[old], made)

    def _merge(self, scan: fx.Node, paths: fx.Node, found: _CrossScan) -> None:
        """The sum of the scan's output, if it comes back to the image's pixels."""
        outputs = [n for n in scan.users if n.users]
        image = _shape(found.image)
        if len(outputs) != 1 or outputs[0].op != "call_function" or image is None:
            return
        y, directions = outputs[0], len(found.order)
        after = self.nodes[self.place[y] + 1 :]
        elements = _count((image[0], directions * image[1], found.order.shape[1]))
        try:
            values = evaluate(after, y, elements, traced_number)
        except RuntimeError:
            return
        total = next((n for n, terms in values.items() if _is_merge(terms, found.order, image)), None)
        if total is None:
            return
        known = {n for n in values if n is total or total in _reached(n)}
        if any(user not in known and not is_number(user) for n in known - {total} for user in n.users):
            return
        bad = any(n.meta.get("mutates") or n.meta.get("storage") in self.written for n in known)
        if bad or any(n.meta.get("region") != scan.meta.get("region") for n in known):
            return
        merges = _Merges(y, [n for n in after if n in known], total)
        there = self.copy[total]
        with self.graph.inserting_before(there):
            numbers = (self.copy[n] for n in merges.numbers)
            made = self.new(scan, merges, (self.copy[y], self.copy[found.image], paths, *numbers))
        there.replace_all_uses_with(made)

    def prune(self) -> None:
        """Drops what led to the sequences."""
        for n in reversed(list(self.graph.nodes)):
            dead = is_move(n) or is_number(n) or _quantizer(n) or n.op == "get_attr" or n.target is _pixels
            dead = dead or isinstance(n.target, _PathsOf)
            if (dead or op_name(n) in ("add", "sum")) and not n.users and not n.meta.get("mutates"):
                self.graph.erase_node(n)


def _between(image: fx.Node, node: fx.Node) -> list[fx.Node]:
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


def _disordering(image: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The moves on the way that do more than to cut the elements differently."""
    return [n for n in _between(image, node) if op_name(n) not in _FLAT]


def _is_cast_above(node: fx.Node, found: _CrossScan) -> bool:
    """Whether something casts on the way from the image to ``node``."""
    return any(is_cast(n) for n in _between(found.image, node))


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
    return f.graph
