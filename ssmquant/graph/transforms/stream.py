"""The closure of a residual stream: all that is connected to it without a change of basis, found by structure.

What writes to it, and what reads it through which norms, is what a rotation of the stream has to change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.calls import MODE_DEPENDENT
from ssmquant.graph.moves import is_number
from ssmquant.graph.sites import ancestors, op_name
from ssmquant.graph.transforms.candidates import Norm, View
from ssmquant.graph.transforms.flow import follow, moved, name_of, shape
from ssmquant.graph.transforms.projections import Projection, Unsuitable, has_parameter

__all__ = ["Stream"]

_PASSES = {
    "contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as", "alias", "detach", "dropout",
}  # fmt: skip
_MIXES = {"cat", "concat", "stack", "add", "iadd", "sub"}
_RESHAPES = {
    "getitem", "select", "narrow", "flip", "transpose", "permute", "expand", "unsqueeze", "squeeze", "flatten", "view",
    "reshape", "roll", "swapaxes", "movedim",
}  # fmt: skip
_MODULES = {"Identity", "Dropout", *MODE_DEPENDENT}


def _first(node: fx.Node) -> fx.Node:
    """What a move or a mean is of."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise Unsuitable(f"'{op_name(node)}' is called with keywords")
    return node.args[0]


class _Behind(NamedTuple):
    """Where a value's channels go by moves and sums: the nodes, and the readers with the axis that has all of them."""

    nodes: set[fx.Node]
    readers: list[tuple[fx.Node, fx.Node, int | None]]


class Stream:
    """The closure of one stream: from a norm's input to all that is connected to it without a change of basis."""

    def __init__(self, view: View, start: fx.Node, axis: int, channels: int) -> None:
        self.view, self.channels = view, channels
        self.axis: dict[fx.Node, int] = {}
        self.seen: set[fx.Node] = set()
        self.todo: list[fx.Node] = []
        self.writers: dict[fx.Node, Projection] = {}
        self.parameters: dict[str, int] = {}
        self.readers: dict[fx.Node, tuple[Projection, Norm | None]] = {}
        self.join(start, axis)
        while self.todo:
            node = self.todo.pop()
            self.made(node, self.axis[node])
            for user in list(node.users):
                self.used(node, user, self.axis[node])

    def join(self, node: fx.Node, axis: int) -> None:
        size = shape(node)
        if size is None:
            raise Unsuitable(f"{name_of(self.view.model, node)} is no tensor")
        axis %= len(size)
        if size[axis] != self.channels:
            raise Unsuitable(
                f"{name_of(self.view.model, node)} has not the channels of the stream in one axis"
            )
        if self.axis.setdefault(node, axis) != axis:
            raise Unsuitable("the stream is added to itself in another order")
        if node not in self.seen:
            self.seen.add(node)
            self.todo.append(node)

    # ---- where it comes from ---------------------------------------------------------------------------------------
    def made(self, node: fx.Node, axis: int) -> None:
        view = self.view
        if view.places.is_written(node):
            raise Unsuitable(f"{name_of(view.model, node)} is written in place")
        if node in view.sites:
            if node not in view.projections:
                raise Unsuitable(
                    view.unsuitable.get(node, f"a scan writes to it ('{view.sites[node].name}')")
                )
            p = view.projections[node]
            place = [d for d, s in enumerate(p.outputs.shape) if s > 1]
            if p.groups[0] != 1 or place != [axis]:
                raise Unsuitable(f"'{p.site.name}' writes to it in groups, as a depthwise convolution does")
            self.writers[node] = p
        elif node.op == "get_attr":
            name = str(node.target)
            if not has_parameter(view.model, name) or name in view.baked:
                raise Unsuitable(f"'{name}' is no parameter, or is read as a Python number")
            if node not in view.static or any(u not in self.seen for u in self._computing(node)):
                raise Unsuitable(f"'{name}' is used elsewhere, or is no parameter")
            self.parameters[name] = axis
        elif self.passes(node):
            self.join(next(i for i in node.all_input_nodes if not is_number(i)), axis)
        elif op_name(node) in _MIXES:
            self._mixed(node, axis)
        elif op_name(node) in ("mul", "div", "truediv"):
            self._scaled(node, axis)
        elif op_name(node) in ("mean", "sum") and self._elsewhere(node) is not None:
            source = self._elsewhere(node)
            assert source is not None
            self.join(_first(node), source[axis])
        elif self.reshapes(node):
            self.join(_first(node), self._axis_before(node, axis))
        elif self.pads(node, axis):
            self.join(_first(node), axis)
        elif (norm := view.norm(node)) is not None:
            raise Unsuitable(
                f"the norm '{norm.name}' writes to it, whose weights scale its channels one by one"
            )
        else:
            raise Unsuitable(f"{name_of(view.model, node)} makes it, which does not commute with a rotation")

    def _computing(self, node: fx.Node) -> list[fx.Node]:
        """Users of a parameter's node outside the stream; views of it join later, so they do not count."""
        return [u for u in node.users if op_name(u) not in {"size", "dim", *_MIXES, *_RESHAPES, *_PASSES}]

    def passes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.view.model.get_submodule(str(node.target))).__name__ in _MODULES
        return op_name(node) in _PASSES

    def reshapes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.view.model.get_submodule(str(node.target))) is nn.Flatten
        return op_name(node) in _RESHAPES

    def pads(self, node: fx.Node, axis: int) -> bool:
        """Whether a node pads other axes than the channels', with zeros or with what is there."""
        if op_name(node) != "pad" or len(node.args) < 2 or not isinstance(node.args[1], (tuple, list)):
            return False
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        behind = len(shape(node) or ()) - 1 - axis
        return value in (None, 0) and all(p == 0 for p in node.args[1][2 * behind : 2 * behind + 2])

    def _mixed(self, node: fx.Node, axis: int) -> None:
        size = shape(node)
        assert size is not None
        operands = [i for i in node.all_input_nodes if not is_number(i) and 0 not in (shape(i) or ())]
        if op_name(node) in ("cat", "concat", "stack"):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if not isinstance(dim, int) or dim % len(size) == axis:
                raise Unsuitable("channels are concatenated")
            for i in operands:
                self.join(i, axis - (op_name(node) == "stack" and dim % len(size) < axis))
            return
        if node.kwargs.keys() - {"alpha"} or len(node.args) != 2:
            raise Unsuitable(f"{name_of(self.view.model, node)} is called with keywords")
        if any(not isinstance(a, fx.Node) for a in node.args):
            raise Unsuitable("a number is added to it")
        for i in operands:
            own = shape(i)
            back = len(size) - axis
            if own is None or len(own) < back or own[len(own) - back] != self.channels:
                raise Unsuitable("the same number is added to all channels")
            self.join(i, len(own) - back)

    def _scaled(self, node: fx.Node, axis: int) -> None:
        size = shape(node)
        assert size is not None
        if node.kwargs or len(node.args) != 2:
            raise Unsuitable(f"{name_of(self.view.model, node)} is called with keywords")
        tensors = [i for i in node.all_input_nodes if not is_number(i)]
        inside = [i for i in tensors if (shape(i) or ())[-(len(size) - axis) :][:1] == (self.channels,)]
        if len(inside) != 1 or (op_name(node) != "mul" and node.args[0] is not inside[0]):
            roots = [n for i in tensors if i in self.view.static for n in ancestors(i) if n.op == "get_attr"]
            by = f"'{roots[0].target}'" if len(roots) == 1 else name_of(self.view.model, node)
            raise Unsuitable(f"{by} scales its channels one by one")
        own = shape(inside[0])
        assert own is not None
        self.join(inside[0], len(own) - len(size) + axis)

    def _elsewhere(self, node: fx.Node) -> list[int] | None:
        """The axes of a mean's argument by axis of the result, where it is over other axes than the channels'."""
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        before = shape(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if before is None or not isinstance(dim, (int, tuple, list)):
            return None
        dims = {d % len(before) for d in ([dim] if isinstance(dim, int) else dim)}
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
        return [d for d in range(len(before)) if keep or d not in dims]

    def _axis_before(self, node: fx.Node, axis: int) -> int:
        source = _first(node)
        for candidate, size in enumerate(shape(source) or ()):
            if size == self.channels and self._axis_after(source, node, candidate) == axis:
                return candidate
        raise Unsuitable(f"{name_of(self.view.model, node)} mixes channels with other axes")

    def _axis_after(self, source: fx.Node, node: fx.Node, axis: int) -> int | None:
        """Where a move takes the channels of an axis: all of them, in order, along one axis; else None."""
        dims = len(shape(source) or ())
        labels = torch.arange(self.channels).reshape([-1 if d == axis else 1 for d in range(dims)])
        after = moved(self.view.model, node, source, labels)
        if not isinstance(after, Tensor) or not torch.equal(after.reshape(-1), torch.arange(self.channels)):
            return None
        return next((d for d, s in enumerate(after.shape) if s > 1), None)

    # ---- where it goes ---------------------------------------------------------------------------------------------
    def used(self, node: fx.Node, user: fx.Node, axis: int) -> None:
        view = self.view
        name = op_name(user)
        if name in ("size", "dim") or is_number(user) or 0 in (shape(user) or ()):
            return  # a number, or nothing at all, as in front of a class token that comes first
        norm = view.norm(user)
        if norm is not None:
            if axis != len(shape(node) or ()) - 1:
                raise Unsuitable(f"'{norm.name}' norms another axis")
            self._read_through(norm)
        elif user in view.sites:
            self._read(user, node, axis, None)
        elif user.op == "output":
            raise Unsuitable("the model returns it")
        elif self.passes(user):
            self.join(user, axis)
        elif name in ("cat", "concat") and self._joins(user, axis):
            self._side_by_side(user, axis)
        elif name in _MIXES or name in ("mul", "div", "truediv"):
            size, own = shape(user), shape(node)
            shift = 0 if size is None or own is None else len(size) - len(own)
            stacked = 0
            if name == "stack":
                dim: Any = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
                stacked, shift = int(dim % len(size or (0,)) <= axis), 0
            self.join(user, axis + shift + stacked)
        elif name in ("mean", "sum") and (axes := self._elsewhere(user)) is not None and axis in axes:
            self.join(user, axes.index(axis))
        elif self.reshapes(user) and (after := self._axis_after(node, user, axis)) is not None:
            self.join(user, after)
        elif self.pads(user, axis):
            self.join(user, axis)
        else:
            raise Unsuitable(f"{name_of(view.model, user)} reads it, which does not commute with a rotation")

    def _read(self, reader: fx.Node, operand: fx.Node, axis: int, norm: Norm | None) -> None:
        if reader not in self.view.projections:
            site = self.view.sites[reader].name
            raise Unsuitable(self.view.unsuitable.get(reader, f"'{site}' reads it, a scan"))
        p = self.view.projections[reader]
        place = [d for d, s in enumerate(p.inputs.shape) if s > 1]
        if p.groups[0] != 1 or place != [axis] or p.site.inputs[0].node is not operand:
            raise Unsuitable(f"'{p.site.name}' reads it in groups, as a depthwise convolution does")
        self.readers[reader] = (p, norm)

    def _read_through(self, norm: Norm) -> None:
        """The projections behind a norm, and nothing else, take its weight."""
        for reader, operand, axis in self._behind(norm.node, -1, norm.channels).readers:
            if reader not in self.view.sites or axis is None:
                raise Unsuitable(
                    f"{name_of(self.view.model, reader)} reads '{norm.name}', whose weights it cannot take"
                )
            self._read(reader, operand, axis, norm)

    def _joins(self, cat: fx.Node, axis: int) -> bool:
        """Whether a concatenation puts channels next to each other."""
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        return isinstance(dim, int) and dim % len(shape(cat) or (0,)) == axis

    def _side_by_side(self, cat: fx.Node, axis: int) -> None:
        """Norms and projections behind a concatenation of pieces of the stream, each of all its channels."""
        operands = [i for i in cat.all_input_nodes if not is_number(i)]
        for i in operands:
            self.join(i, axis)
        size = shape(cat)
        assert size is not None
        behind = self._behind(cat, axis, size[axis])
        self.seen |= behind.nodes
        for reader, operand, place in behind.readers:
            norm = self.view.norm(reader)
            if norm is not None and place == len(shape(operand) or ()) - 1:
                self._read_through(norm)
            elif norm is None and reader in self.view.sites and place is not None:
                self._read(reader, operand, place, None)
            else:
                raise Unsuitable(
                    f"{name_of(self.view.model, reader)} reads pieces of the stream side by side, which does not "
                    "commute with a rotation of each"
                )

    def _behind(self, node: fx.Node, axis: int, channels: int) -> _Behind:
        dims = len(shape(node) or ())
        labels = torch.arange(channels).reshape([-1 if d == axis % dims else 1 for d in range(dims)])
        flow = follow(self.view.places, {node: labels}, sums=True)
        readers = []
        for reader, operand in flow.readers:
            after = flow.of(operand)
            axes = [d for d, s in enumerate(after.shape) if s > 1]
            in_order = len(axes) == 1 and torch.equal(after.reshape(-1), torch.arange(channels))
            readers.append((reader, operand, axes[0] if in_order else None))
        return _Behind({n for n, known in flow.labels.items() if known is not None}, readers)
