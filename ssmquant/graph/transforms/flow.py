"""Where channels go: the numbers of a value's channels, followed through what moves or scales them.

Labels are a tensor that broadcasts to a value's shape and holds, for every element, the number of the channel that it
belongs to. They are moved by running the graph's own views, flips, splits and concatenations on them, so that no rule
about shapes has to be written down.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.moves import is_cast, is_move, is_number, traced_size
from ssmquant.graph.sites import Site, op_name

__all__ = ["Flow", "Places", "follow", "moved", "name_of", "number", "shape", "uses_last_state"]

_CASTS = {"to", "type_as", "double", "half", "bfloat16", "alias", "detach"}
_MORE_MOVES = {"expand", "expand_as", "view_as"}
_SUMS = {"add", "iadd"}
_PRODUCTS = {"mul", "imul", "div", "truediv", "itruediv"}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
)  # fmt: skip
QUESTIONS = {"size", "dim"}


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The traced shape of a node, None where its value is no tensor."""
    value = node.meta.get("val")
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def number(node: fx.Node) -> int:
    """A size, or arithmetic on sizes, as it was while tracing."""
    if node.op == "call_method":
        return traced_size(node)
    target: Any = node.target
    return int(target(*(number(a) if isinstance(a, fx.Node) else a for a in node.args)))


def name_of(model: nn.Module, node: fx.Node) -> str:
    """What a node does, for people: an operator's name, or the class of a module and its path."""
    if node.op == "call_module":
        return f"{type(model.get_submodule(str(node.target))).__name__} '{node.target}'"
    if node.op == "output":
        return "the model's output"
    return f"'{op_name(node) or node.name}'"


def _squeezed(labels: Tensor) -> Tensor:
    """Axes along which labels are constant become 1. The widest first, after which there is little left to compare."""
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and labels.shape[d] > 1:
            labels = labels.narrow(d, 0, 1)
    for d in sorted(range(labels.dim()), key=lambda d: -labels.shape[d]):
        if labels.shape[d] > 1:
            first, second = labels.narrow(d, 0, 1), labels.narrow(d, 1, 1)
            if torch.equal(first, second) and bool((labels == first).all()):
                labels = first
    return labels.contiguous()


class Places:
    """A graph's nodes in order, and the storages that something in it writes to."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.written = {s for n in graph.nodes for s in n.meta.get("mutates", ())}

    def is_written(self, node: fx.Node) -> bool:
        return "storage" in node.meta and node.meta["storage"] in self.written


@dataclass
class Flow:
    """Labels by node (of a tuple: one entry each, None for others), and who reads them: ``(reader, operand)`` pairs."""

    labels: dict[fx.Node, Any]
    readers: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    def of(self, node: fx.Node) -> Tensor:
        labels = self.labels[node]
        assert isinstance(labels, Tensor)
        return labels

    def readers_of(self, channels: Tensor) -> list[fx.Node]:
        """The nodes that read any of these channels."""
        wanted = channels.unique()
        found = (r for r, o in self.readers if bool(torch.isin(self.of(o).unique(), wanted).any()))
        return list(dict.fromkeys(found))


def _moves(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) in (*_IDENTITIES, nn.Flatten)
    return is_move(node) or op_name(node) in {*_CASTS, *_MORE_MOVES, "dropout"}


def moved(model: nn.Module, node: fx.Node, source: fx.Node, labels: Tensor) -> Any:
    """Labels of ``node`` where it does nothing but move the elements of ``source``, else None."""
    tensors = [i for i in node.all_input_nodes if not is_number(i)]
    return _run(model, node, {source: labels}) if tensors == [source] and _moves(model, node) else None


def _run(model: nn.Module, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The move on labels, at the traced sizes."""
    tensors = [i for i in node.all_input_nodes if i in known]
    if node.op == "call_module" and isinstance(flatten := model.get_submodule(str(node.target)), nn.Flatten):
        return _squeezed(
            known[tensors[0]].expand(shape(tensors[0])).flatten(flatten.start_dim, flatten.end_dim)
        )
    if node.op == "call_module" or is_cast(node) or op_name(node) in {*_CASTS, "dropout"}:
        return known[tensors[0]]

    def value(a: fx.Node) -> Any:
        if a in known:
            size = shape(a)
            return known[a] if size is None else known[a].expand(size)
        return number(a)

    args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
    name = op_name(node)
    if node.op == "call_method":
        # Of expanded labels a view may have to be a copy.
        out = getattr(args[0], "reshape" if name == "view" else str(node.target))(*args[1:], **kwargs)
    else:
        target: Any = node.target
        out = target(*args, **kwargs)
    if isinstance(out, Tensor):
        return _squeezed(out)
    return tuple(_squeezed(o) if isinstance(o, Tensor) else None for o in out)


def _pooled(model: nn.Module, node: fx.Node) -> int:
    """How many axes, the last ones, a node takes means of windows of; 0 if it does not."""
    name = op_name(node)
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        name = type(module).__name__ if type(module) in _POOLS else ""
    name = name.lower().replace("_", "")
    return int(name[-2]) if name.endswith("d") and name[:-2] in ("adaptiveavgpool", "avgpool") else 0


def _aligned(labels: Tensor, dims: int) -> Tensor:
    """Labels with axes of size 1 in front, as broadcasting gives them."""
    return labels.reshape((1,) * (dims - labels.dim()) + tuple(labels.shape))


def uses_last_state(scan: fx.Node) -> bool:
    """Whether something reads more of a scan than its output: its last state, or the pair as a whole."""
    if shape(scan) is not None:
        return False
    parts = [u for u in scan.users if op_name(u) == "getitem" and u.args[1] != 0]
    whole = [u for u in scan.users if op_name(u) != "getitem"]
    return bool(whole) or any(u.users for u in parts)


def _scaled(
    node: fx.Node, known: dict[fx.Node, Any], scans: dict[fx.Node, Site], sums: bool, gates: bool
) -> Tensor | tuple[Tensor | None, ...] | None:
    """Labels of what commutes with a factor of each channel, None where that is not known."""
    name, out = op_name(node), shape(node)
    if node in scans:
        site = scans[node]
        operands = {k for k, v in site.scan.items() if isinstance(v, fx.Node) and v in known}
        if operands != {"u"} or site.role is None or site.role.kind != "s6" or uses_last_state(node):
            return None
        labels = known[site.scan["u"]]
        return labels if out is not None else (labels, None)
    if out is None or node.op not in ("call_function", "call_method") or not (sums or gates):
        return None
    inputs = [i for i in node.all_input_nodes if not is_number(i)]
    if name in _SUMS:
        if len(node.args) != 2 or not all(isinstance(a, fx.Node) and a in known for a in node.args):
            return None
        one, two = (_aligned(known[i], len(out)) for i in (inputs[0], inputs[-1]))
        return one if one.shape == two.shape and torch.equal(one, two) else None
    # Not by keyword: ``other`` would be looked at as if it were not there, ``rounding_mode`` is not linear.
    if name in _PRODUCTS and len(node.args) == 2 and not node.kwargs and isinstance(node.args[0], fx.Node):
        own = [a for a in node.args if isinstance(a, fx.Node) and a in known]
        number_only = not any(isinstance(a, fx.Node) and a not in own for a in node.args)
        if len(own) != 1 or not (gates or number_only):
            return None  # a square, or the channels of others
        if name not in ("mul", "imul") and node.args[0] is not own[0]:
            return None
        return _aligned(known[own[0]], len(out))
    if name in ("sum", "mean"):
        labels, dims = known[inputs[0]], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        over = [dims] if isinstance(dims, int) else dims
        if not isinstance(over, (tuple, list)) or any(labels.shape[d] != 1 for d in over):
            return None
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
        return labels if keep else labels.squeeze([d % labels.dim() for d in over])
    return None


def follow(
    places: Places,
    starts: dict[fx.Node, Tensor],
    *,
    scans: Iterable[Site] = (),
    sums: bool = False,
    gates: bool = False,
) -> Flow:
    """Follows channels from ``starts`` to the nodes that compute with them.

    Args:
        places: The graph's nodes.
        starts: Labels of the nodes to begin with, each broadcasting to the node's shape.
        scans: Scans that channels pass from u to the output (which is linear in u).
        sums: Whether channels pass what is linear in them and mixes none of them: sums and means over other axes, also
            of windows (average pooling), sums of equal channels, products with numbers.
        gates: Whether they pass these and, in addition, products with any values that have none of them.
    """
    known: dict[fx.Node, Any] = dict(starts)
    flow = Flow(known)
    by_node = {s.node: s for s in scans}
    todo: list[tuple[int, fx.Node]] = []
    queued: set[fx.Node] = set(starts)

    def queue(node: fx.Node) -> None:
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(todo, (places.order[user], user))

    for start in starts:
        queue(start)
    while todo:  # in the graph's order: all inputs of a node come before it
        _, node = heapq.heappop(todo)
        inputs = [i for i in node.all_input_nodes if known.get(i) is not None]
        if not inputs or op_name(node) in QUESTIONS:
            continue
        if op_name(node) == "getitem" and isinstance(known[inputs[0]], tuple):
            out: Any = known[inputs[0]][node.args[1]]
            if out is None:
                continue  # another part of a tuple
        else:
            out = _step(places, node, known, inputs, by_node, sums, gates)
        if out is None:
            flow.readers += [(node, i) for i in inputs]
        else:
            known[node] = out
            queue(node)
    return flow


def _step(
    places: Places,
    node: fx.Node,
    known: dict[fx.Node, Any],
    inputs: list[fx.Node],
    scans: dict[fx.Node, Site],
    sums: bool,
    gates: bool,
) -> Any:
    if node.op == "output" or any(places.is_written(i) for i in (*inputs, node)):
        return None
    if _moves(places.model, node) and len(inputs) == sum(not is_number(i) for i in node.all_input_nodes):
        return _run(places.model, node, known)
    if sums and (axes := _pooled(places.model, node)):
        return None if any(s > 1 for s in known[inputs[0]].shape[-axes:]) else known[inputs[0]]
    return _scaled(node, known, scans, sums, gates)
