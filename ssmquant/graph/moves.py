"""Where views, flips, transposes and ``cat`` take a tensor's elements, found by taking their numbers there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ssmquant.graph.provenance import OPS
from ssmquant.graph.sites import op_name

__all__ = ["evaluate", "is_cast", "is_move", "is_number", "numbers_of", "traced_number"]

_MOVES = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "flip", "unbind", "chunk", "split",
    "select", "unsqueeze", "squeeze", "narrow", "swapaxes", "movedim", "moveaxis", "T", "mT", "t", "getitem", "stack",
    "cat", "concat", "clone", "rot90", "fliplr", "flipud", "roll",
}  # fmt: skip

_ARITHMETIC = set(OPS.values())


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


def numbers_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The sizes that nodes take as arguments."""
    return list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if is_number(i)))


def traced_number(node: fx.Node) -> int:
    """A size as it was while tracing."""

    def value(a: Any) -> Any:
        return traced_number(a) if isinstance(a, fx.Node) else a

    if node.op == "call_method":
        tensor, dim = node.args
        assert isinstance(tensor, fx.Node)
        return int(tensor.meta["val"].shape[dim])
    target: Any = node.target
    number: int = target(*(value(a) for a in node.args))
    return number


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


def _terms(node: fx.Node, values: _Values, number: Callable[[fx.Node], int]) -> list[Any] | None:
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
    numbers = {i: number(i) for i in node.all_input_nodes if is_number(i)}
    return [_do(node, {**numbers, **{t: values[t][i] for t in tensors}}) for i in range(counts.pop())]


def evaluate(
    nodes: Sequence[fx.Node],
    start: fx.Node,
    elements: Tensor,
    number: Callable[[fx.Node], int],
    only: fx.Node | None = None,
) -> _Values:
    """All of ``nodes``, in order, that move (and add up) elements of ``start``, whose numbers are ``elements``.

    With ``only`` what nothing needs any more is dropped on the way.

    Raises:
        RuntimeError: shapes do not fit, as in the code itself.
    """
    values: _Values = {start: [elements]}
    last = {i: node for node in nodes for i in node.all_input_nodes} if only is not None else {}
    for node in nodes:
        if node not in values and not is_number(node):
            terms = _terms(node, values, number)
            if terms is not None:
                values[node] = terms
        for i in node.all_input_nodes:
            if last.get(i) is node and i is not only:
                values.pop(i, None)
    return values
