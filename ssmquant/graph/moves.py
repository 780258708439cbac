"""Where views, flips, transposes and ``cat`` take a tensor's elements, found by taking their numbers there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ssmquant.graph.provenance import OPS
from ssmquant.graph.sites import op_name

__all__ = [
    "evaluate",
    "is_cast",
    "is_move",
    "is_number",
    "once",
    "signature",
    "sizes_of",
    "traced_size",
    "written_in",
]

_MOVES = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "flip", "unbind", "chunk", "split",
    "select", "unsqueeze", "squeeze", "narrow", "swapaxes", "movedim", "moveaxis", "T", "mT", "t", "getitem", "stack",
    "cat", "concat", "clone", "rot90", "fliplr", "flipud", "roll",
}  # fmt: skip

_ARITHMETIC = set(OPS.values())


def written_in(graph: fx.Graph) -> set[Any]:
    """The storages that something in a graph writes to."""
    return {s for n in graph.nodes for s in n.meta.get("mutates", ()) if s is not None}


def is_number(node: fx.Node) -> bool:
    """Whether a node is a size, or arithmetic on sizes."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 2
    return (
        node.op == "call_function"
        and node.target in _ARITHMETIC
        and all(is_number(i) for i in node.all_input_nodes)
    )


def is_cast(node: fx.Node) -> bool:
    """Whether a node casts to float32, whatever its input is."""
    if op_name(node) == "float":
        return True
    return op_name(node) == "to" and node.args[1:] == (torch.float32,) and not node.kwargs


def is_move(node: fx.Node) -> bool:
    """Whether a node only moves elements (or casts them to float32)."""
    return node.op in ("call_method", "call_function") and (op_name(node) in _MOVES or is_cast(node))


def sizes_of(nodes: Iterable[fx.Node], start: fx.Node) -> list[fx.Node]:
    """The sizes that ``nodes`` need of other tensors than themselves and ``start``."""
    nodes = list(nodes)
    inside = {start, *nodes}
    todo = [i for n in nodes for i in n.all_input_nodes if is_number(i)]
    found: dict[fx.Node, None] = {}
    for number in todo:  # grows
        if number.op == "call_function":
            todo += number.all_input_nodes
        elif number.args[0] not in inside:
            found[number] = None
    return list(found)


def traced_size(node: fx.Node) -> int:
    """A size as it was while tracing."""
    tensor, dim = node.args
    assert isinstance(tensor, fx.Node)
    made = tensor.meta.get("val")  # what a graph's rewriting has made has a shape alone
    return int((tensor.meta["shape"] if made is None else made.shape)[dim])


def _number(node: fx.Node, size: Callable[[fx.Node], int]) -> int:
    if node.op == "call_method":
        return size(node)
    target: Any = node.target
    value: int = target(*(_number(a, size) if isinstance(a, fx.Node) else a for a in node.args))
    return value


_Values = dict[fx.Node, list[Any]]
"""What nodes are: terms of a sum, each a tensor (or tuple of such) of numbers of elements."""


def _do(node: fx.Node, inputs: dict[fx.Node, Any]) -> Any:
    if is_cast(node):
        return inputs[node.all_input_nodes[0]]
    args = fx.node.map_arg(node.args, lambda a: inputs[a])
    kwargs = fx.node.map_arg(node.kwargs, lambda a: inputs[a])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _terms(node: fx.Node, values: _Values, size: Callable[[fx.Node], int]) -> list[Any] | None:
    tensors = [i for i in node.all_input_nodes if not is_number(i)]
    if not tensors or not all(t in values for t in tensors):
        return None
    name = op_name(node)
    if name in ("add", "iadd"):
        if len(tensors) != len(node.args) or node.kwargs:
            return None
        return [term for t in tensors for term in values[t]]
    if name == "sum":
        dim = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
        if not isinstance(dim, int) or len(node.args) + len(node.kwargs) != 2 or len(tensors) != 1:
            return None
        return [part for term in values[tensors[0]] for part in term.unbind(dim)]
    counts = {len(values[t]) for t in tensors}
    if not is_move(node) or len(counts) != 1:
        return None
    numbers = {i: _number(i, size) for i in node.all_input_nodes if is_number(i)}
    return [_do(node, {**numbers, **{t: values[t][i] for t in tensors}}) for i in range(counts.pop())]


def evaluate(
    nodes: Sequence[fx.Node],
    start: fx.Node,
    elements: Tensor,
    size: Callable[[fx.Node], int],
    only: Sequence[fx.Node] = (),
) -> _Values:
    """All of ``nodes``, in order, that move (and add up) elements of ``start``, whose numbers are ``elements``.

    ``size`` knows the sizes of other tensors (``sizes_of``). With ``only`` what nothing needs any more is dropped on
    the way.

    Raises:
        RuntimeError: shapes do not fit, as in the code itself.
    """
    values: _Values = {start: [elements]}
    shapes: dict[Any, torch.Size] = {start: elements.shape}
    last = {i: node for node in nodes for i in node.all_input_nodes} if only else {}

    def any_size(node: fx.Node) -> int:
        tensor, dim = node.args
        return shapes[tensor][dim] if tensor in shapes else size(node)  # type: ignore[index]

    for node in nodes:
        if node not in values and not is_number(node):
            terms = _terms(node, values, any_size)
            if terms is not None:
                values[node] = terms
                if all(isinstance(t, Tensor) for t in terms):
                    shapes[node] = torch.Size(torch.broadcast_shapes(*(t.shape for t in terms)))
        for i in node.all_input_nodes:
            if last.get(i) is node and i not in only:
                values.pop(i, None)
    return values


def signature(source: fx.Node, nodes: Sequence[fx.Node], targets: Sequence[fx.Node]) -> tuple[str, ...]:
    """Equal for chains of nodes that do the same, as those of the blocks of a model do."""
    places = {n: f"%{i}" for i, n in enumerate((source, *nodes))}
    outside = {n: f"#{i}" for i, n in enumerate(sizes_of(nodes, source))}

    def name(a: Any) -> Any:
        return _Name(places.get(a) or outside.get(a) or text(a)) if isinstance(a, fx.Node) else a

    def text(n: fx.Node) -> str:
        target: Any = n.target
        what = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
        arguments = (fx.node.map_aggregate(part, name) for part in (n.args, n.kwargs))
        return f"{n.op} {what} " + " ".join(map(repr, arguments))

    return (*map(text, nodes), *(places.get(t, "") for t in targets))


_MOST_ANSWERS = 256
_answers: dict[Any, Any] = {}


def once(
    what: str,
    source: fx.Node,
    nodes: Sequence[fx.Node],
    targets: Sequence[fx.Node],
    shape: Sequence[int],
    size: Callable[[fx.Node], int],
    find: Callable[[], Any],
    *more: Any,
) -> Any:
    """``find()``, or what it found for the same chain of another block: numbers of elements take long in large images.

    ``shape`` is that of ``source``; ``more``: what else the answer depends on.
    """
    sizes = tuple(size(n) for n in sizes_of(nodes, source))
    key = (what, signature(source, nodes, targets), tuple(shape), sizes, *more)
    if key not in _answers:
        answer = find()
        while len(_answers) >= _MOST_ANSWERS:
            _answers.pop(next(iter(_answers), None), None)
        _answers[key] = answer
    return _answers[key]


class _Name(str):
    """Shows without quotes, unlike a string in the code."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
