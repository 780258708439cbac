"""Orders of an image's pixels, and what turns an image to sequences and back, found again at each size.

The objects here stand in a fused graph (``fuse``), which was made at the sizes of a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ssmquant.graph.moves import evaluate, is_cast, once, signature, sizes_of
from ssmquant.graph.sites import op_name
from ssmquant.ops.cross_scan import Paths, cross_merge

__all__ = ["Merges", "PathsOf", "Unfit", "by_direction", "count", "is_merge", "order_of", "shape_of"]

_MOST_PATHS = 64  # sizes of images that a model keeps the orders of


class Unfit(Exception):
    """The fused graph does not compute the same at these sizes (it was checked at those of the trace)."""


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a tensor while tracing; that of a quantizer's output was noted by the rewrite."""
    if "shape" in node.meta:
        shape: tuple[int, ...] = node.meta["shape"]
        return shape
    value = node.meta.get("val")
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def by_direction(node: fx.Node) -> bool:
    """Whether an einsum multiplies (B, K, C, L) by a weight of each direction, (K, E, C), to (B, K, E, L).

    einsum itself would repeat a weight of one direction or channel, and take diagonals.
    """
    if op_name(node) != "einsum" or len(node.args) != 3 or node.kwargs:
        return False
    equation, x, weight = node.args
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return False
    given, _, out = str(equation).replace(" ", "").partition("->")
    first, _, second = given.partition(",")
    if len(first) != 4 or len(second) != 3 or len({*first, second[1]}) != 5:
        return False
    if second[::2] != first[1:3] or out != first[:2] + second[1] + first[3]:
        return False
    shape, kernel = shape_of(x), shape_of(weight)
    return shape is not None and kernel is not None and kernel[::2] == shape[1:3]


def order_of(terms: Sequence[Any], shape: tuple[int, ...]) -> Tensor | None:
    """(K, L) if ``terms`` is one tensor, (B, K, C, L) or (B, K * C, L), of K orders of the pixels of (B, C, ...)."""
    batch, channels, pixels = shape[0], shape[1], torch.Size(shape[2:]).numel()
    size = batch * channels * pixels
    if len(terms) != 1 or not isinstance(terms[0], Tensor) or not size:
        return None
    elements = terms[0]
    directions = elements.numel() // size
    stacks = (batch, directions, channels, pixels), (batch, directions * channels, pixels)
    if not directions or elements.shape not in stacks:
        return None
    elements = elements.reshape(batch, -1, channels, pixels)
    order = elements[0, :, 0].clone()  # not a view, which would keep the numbers of all elements
    rows = count((batch, 1, channels, 1), order.device) * pixels
    straight = count((pixels,), order.device).expand_as(order)
    fits = torch.equal(order.sort(1).values, straight) and torch.equal(elements, rows + order[None, :, None])
    return order if fits else None


def is_merge(terms: list[Any], order: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``terms`` take, each from another of K sequences, (B, K * C, L), every step to its pixel.

    They have the shape of the image, (B, C, L) or (B, C, H, W).
    """
    batch, channels = shape[:2]
    pixels = order.shape[1]
    wanted = (torch.Size(shape), torch.Size((batch, channels, pixels)))
    if len(terms) != len(order) or any(t.shape not in wanted for t in terms):
        return False
    step = order.argsort(1).to(torch.int32)
    row = count((batch, 1, 1), order.device) * (len(order) * channels)
    rows = row + count((channels, 1), order.device)
    left = set(range(len(order)))
    for term in terms:
        k = int(term.flatten()[0]) // (channels * pixels) if term.numel() else 0
        if k not in left or not torch.equal(term.flatten(2), (rows + k * channels) * pixels + step[k]):
            return False
        left.remove(k)
    return True


def count(shape: tuple[int, ...], device: Any = "cpu") -> Tensor:
    """The numbers of a tensor's elements. Raises RuntimeError for more than int32 has."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)


class PathsOf:
    """Called in the graph with an image and sizes: the orders in which ``nodes`` lead from it to all ``targets``."""

    __name__ = "paths_of"

    def __init__(self, source: fx.Node, nodes: list[fx.Node], target: fx.Node) -> None:
        self.source, self.nodes, self.targets = source, nodes, [target]  # more may be appended
        self.sizes = sizes_of(nodes, source)
        self.known: dict[Any, Paths] = {}
        self.captured: list[Paths] = []  # CUDA graphs have their addresses

    def signature(self) -> Any:
        """Equal for objects that may share what they know."""
        return type(self), signature(self.source, self.nodes, self.targets)

    def find(
        self, shape: tuple[int, ...], size: Callable[[fx.Node], int], device: Any = "cpu"
    ) -> Tensor | None:
        def orders() -> Tensor | None:
            try:
                values = evaluate(self.nodes, self.source, count(shape, device), size, self.targets)
            except RuntimeError:
                return None
            first, *others = (order_of(values.get(t, ()), shape) for t in self.targets)
            if first is None or any(o is None or not torch.equal(o, first) for o in others):
                return None
            return first

        found: Tensor | None = once(
            "paths", self.source, self.nodes, self.targets, shape, size, orders, device
        )
        return found

    @torch.no_grad()
    def __call__(self, x: Tensor, *sizes: int) -> Paths:
        key = (x.shape, sizes, x.device)
        if (known := self.known.get(key)) is not None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                self.captured.append(known)
            return known
        given = dict(zip(self.sizes, sizes, strict=True)).__getitem__
        order = self.find(tuple(x.shape), given, x.device)
        if order is None:
            raise Unfit
        if len(self.known) >= _MOST_PATHS:
            self.known.clear()
        paths = self.known[key] = Paths.of(order)
        return paths


class Merges:
    """Called in the graph with sequences, the image, orders and sizes: the sum that ``nodes`` lead to."""

    __name__ = "merges"

    def __init__(self, source: fx.Node, nodes: list[fx.Node], target: fx.Node) -> None:
        self.source, self.nodes, self.target = source, nodes, target
        self.like_image = len(shape_of(target) or ()) == 4
        self.cast = any(is_cast(n) for n in nodes)
        self.sums = any(op_name(n) == "sum" for n in nodes)
        self.sizes = sizes_of(nodes, source)
        self.known: dict[Any, Paths] = {}

    def signature(self) -> Any:
        """Equal for objects that may share what they know."""
        return type(self), signature(self.source, self.nodes, [self.target])

    def fits(self, image: tuple[int, ...], order: Tensor, size: Callable[[fx.Node], int]) -> bool:
        try:
            elements = count((image[0], len(order) * image[1], order.shape[1]), order.device)
            values = evaluate(self.nodes, self.source, elements, size, [self.target])
        except RuntimeError:
            return False
        return self.target in values and is_merge(values[self.target], order, image)

    def __call__(self, y: Tensor, x: Tensor, paths: Paths, *sizes: int) -> Tensor:
        key = (x.shape, sizes)
        if self.known.get(key) is not paths:
            given = dict(zip(self.sizes, sizes, strict=True)).__getitem__
            if not self.fits(tuple(x.shape), paths.order, given):
                raise Unfit
            if len(self.known) >= _MOST_PATHS:
                self.known.clear()
            self.known[key] = paths
        y = y.unflatten(1, (len(paths.order), -1))
        wide = self.cast or (self.sums and torch.is_autocast_enabled(y.device.type))  # it sums in float32
        out = cross_merge(y.float() if wide else y, paths)
        return out.view(x.shape) if self.like_image else out
