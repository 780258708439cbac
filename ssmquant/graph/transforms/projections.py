"""Projections and convolutions as one thing: a weight (groups, outputs, inputs, taps) and the channels at both ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ssmquant.graph.plan import einsum_letters
from ssmquant.graph.sites import Operand, Site, op_name
from ssmquant.graph.transforms.flow import number, shape

__all__ = ["Projection", "Unsuitable", "has_parameter", "parameter_index", "projection_of", "scatter"]


class Unsuitable(Exception):
    """Why a transform does not apply; ``str`` is the reason that users read."""


def has_parameter(model: nn.Module, name: str) -> bool:
    """Whether that is the name of a parameter, and not of a buffer or another tensor."""
    owner, _, attr = name.rpartition(".")
    return isinstance(model.get_submodule(owner)._parameters.get(attr), nn.Parameter)


@torch.no_grad()
def scatter(p: nn.Parameter, at: Tensor, values: Tensor) -> None:
    """Writes ``values`` (n,) to the elements ``at`` (n,) of a parameter, counted in its shape's order.

    Through a copy: a parameter in channels-last order, say, has no flat view.
    """
    flat = p.detach().reshape(-1).clone()
    flat[at.to(p.device)] = values.to(p.device, p.dtype)
    p.copy_(flat.reshape(p.shape))


def parameter_index(node: fx.Node, root: fx.Node, size: tuple[int, ...]) -> Tensor:
    """The element of a parameter (of that size) that each element of a view of it is, in the view's shape."""

    def run(n: fx.Node) -> Any:
        if n is root:
            return torch.arange(math.prod(size)).reshape(size)
        if n.op == "get_attr":
            raise Unsuitable("the weight is computed from several tensors")
        if op_name(n) in ("float", "double", "half", "bfloat16", "to", "type_as"):
            return run(n.all_input_nodes[0])
        if "val" not in n.meta:  # a size
            return number(n)
        args, kwargs = fx.node.map_arg(n.args, run), fx.node.map_arg(n.kwargs, run)
        target: Any = n.target
        return (
            target(*args, **kwargs)
            if n.op == "call_function"
            else getattr(args[0], target)(*args[1:], **kwargs)
        )

    index: Tensor = run(node)
    if index.numel() != math.prod(size) or index.unique().numel() != index.numel():
        raise Unsuitable("the weight is used in part, or more than once")
    return index


@dataclass
class Projection:
    """A site with its weight as (g, o, i, taps): every group of inputs g gives outputs of its own.

    ``inputs`` (g * i numbers) and ``outputs`` (g * o numbers) are labels of the site's operand and its node: they
    broadcast to their shapes. ``bias``: the name of its bias, of (g * o,) elements.
    """

    site: Site
    parameter: str
    groups: tuple[int, int, int]  # g, o, i
    inputs: Tensor
    outputs: Tensor
    bias: str | None
    _index: Tensor | None  # of a view, the parameter's elements
    _order: tuple[int, ...]  # of axes: from the weight as used to (g.., o.., i.., taps)

    def read(self, model: nn.Module) -> Tensor:
        """The weight (g, o, i, taps), float64 on the CPU, as all that is computed of weights here."""
        return self.arranged(model.get_parameter(self.parameter).detach().cpu().double())

    @torch.no_grad()
    def write(self, model: nn.Module, value: Tensor) -> None:
        """Puts a weight (g, o, i, taps) in the place of the model's own."""
        p = model.get_parameter(self.parameter)
        p.copy_(self.stored(value, p.shape))

    def arranged(self, values: Tensor) -> Tensor:
        """Values of the parameter's elements, in its shape, as (g, o, i, taps)."""
        if self._index is not None:
            values = values.reshape(-1)[self._index.to(values.device)]
        return values.permute(self._order).reshape(*self.groups, -1)

    def stored(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`arranged`; ``shape`` is the parameter's."""
        used = shape if self._index is None else self._index.shape
        moved = [used[d] for d in self._order]
        back = sorted(range(len(moved)), key=lambda d: self._order[d])
        values = values.reshape(moved).permute(back)
        if self._index is None:
            return values
        flat = values.new_empty(math.prod(shape))
        flat[self._index.reshape(-1).to(values.device)] = values.reshape(-1)
        return flat.reshape(shape)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What it computes with, equal in all graphs where it is the same."""
        return self.parameter, self.bias, self.groups, self._index, self._order

    def multiplies_like(self, other: Projection) -> bool:
        """Whether the elements of the same parameter stand in the same places of (g, o, i, taps)."""
        indices = self._index, other._index
        same = (
            torch.equal(*indices)  # type: ignore[arg-type]
            if all(isinstance(t, Tensor) for t in indices)
            else indices == (None, None)
        )
        return same and (self.groups, self._order) == (other.groups, other._order)

    @property
    def touched(self) -> set[str]:
        """Names of the parameters that factors and rotations of it may change."""
        return {self.parameter} | ({self.bias} if self.bias is not None else set())

    # ---- factors and products ------------------------------------------------------------------------------------
    @torch.no_grad()
    def scale_inputs(self, model: nn.Module, factor: Tensor) -> None:
        """Multiplies the weight's columns; ``factor`` (g * i,)."""
        g, _, i = self.groups
        self.write(model, self.read(model) * factor.double().reshape(g, 1, i, 1))

    @torch.no_grad()
    def scale_outputs(self, model: nn.Module, factor: Tensor) -> None:
        """Multiplies the weight's rows and the bias; ``factor`` (g * o,)."""
        g, o, _ = self.groups
        self.write(model, self.read(model) * factor.double().reshape(g, o, 1, 1))
        if self.bias is not None:
            b = model.get_parameter(self.bias)
            b.copy_(b.detach().cpu().double() * factor.double())

    @torch.no_grad()
    def turn_inputs(self, model: nn.Module, matrix: Tensor) -> None:
        """For inputs that ``matrix`` (i, i) or (g, i, i) multiplied: the weight times its inverse (float64)."""
        inverse = torch.linalg.inv(matrix.double())
        inverse = inverse.expand(self.groups[0], -1, -1)
        self.write(model, torch.einsum("goit,gij->gojt", self.read(model), inverse))

    @torch.no_grad()
    def turn_outputs(self, model: nn.Module, matrix: Tensor, rows: Tensor) -> None:
        """Multiplies outputs by ``matrix`` (n, n); ``rows`` (n,) says which of the g * o outputs they are."""
        w = self.read(model)
        flat = w.reshape(-1, *w.shape[2:])
        flat[rows] = torch.einsum("ab,bit->ait", matrix.double(), flat[rows])
        self.write(model, flat.reshape(w.shape))
        if self.bias is not None:
            b = model.get_parameter(self.bias)
            scatter(b, rows, matrix.double() @ b.detach().cpu().double().reshape(-1)[rows])

    def input_map(self, labels: Tensor) -> Tensor:
        """For every input its label (g * i,); ``labels`` broadcast to the operand.

        Raises:
            Unsuitable: an input is made of several labels, or a label that goes to part of the operand only.
        """
        g, _, i = self.groups
        node = self.site.inputs[0].node
        dims = len(shape(node) or ())
        both = torch.broadcast_tensors(
            labels.reshape((1,) * (dims - labels.dim()) + tuple(labels.shape)), self.inputs
        )
        pairs = torch.stack([t.reshape(-1) for t in both], 1).unique(dim=0)
        if len(pairs) != g * i:
            raise Unsuitable(f"'{self.site.name}' reads channels in another order at other places")
        out = torch.empty(g * i, dtype=torch.long)
        out[pairs[:, 1]] = pairs[:, 0]
        return out


def _numbered(size: int, dims: int, axis: int) -> Tensor:
    labels = torch.arange(size)
    return labels.reshape([size if d == axis % dims else 1 for d in range(dims)])


def _einsum(site: Site) -> tuple[tuple[int, ...], tuple[int, int, int], Tensor, Tensor]:
    assert site.weight is not None
    weight, inputs, out = einsum_letters(site, site.weight)
    term, _, _ = einsum_letters(site, site.inputs[0])
    if not weight or not term or len(site.inputs) != 1:
        raise Unsuitable("einsum with an ellipsis, or of several values")
    w = shape(site.weight.node)
    assert w is not None
    if any(term.count(c) > 1 or (c in weight and c not in out and c not in term) for c in (*term, *weight)):
        raise Unsuitable("einsum with a diagonal or a sum of its own")
    both = [c for c in weight if c in inputs and c in out]
    own = [c for c in weight if c not in inputs]
    summed = [c for c in weight if c in inputs and c not in out]
    size = {c: w[k] for k, c in enumerate(weight)}
    order = tuple(weight.index(c) for c in (*both, *own, *summed))
    groups = tuple(math.prod(size[c] for c in part) for part in (both, own, summed))

    def labels(letters: str, counted: list[str]) -> Tensor:
        sizes = [size[c] for c in counted]
        t = torch.arange(math.prod(sizes)).reshape(sizes)
        places = [letters.index(c) for c in counted]
        t = t.permute(sorted(range(len(places)), key=lambda k: places[k]))
        return t.reshape([size[c] if c in counted else 1 for c in letters])

    return order, groups, labels(term, [*both, *summed]), labels(out, [*both, *own])  # type: ignore[return-value]


def projection_of(model: nn.Module, site: Site) -> Projection:
    """The site's weight and channels.

    Raises:
        Unsuitable: it is none of linear, convolution, einsum and product with a weight, or its weight is computed.
    """
    if site.kind == "scan" or site.parameter is None:
        raise Unsuitable("no projection")
    if not site.view_chain:
        raise Unsuitable(f"the weight of '{site.name}' is computed from its parameter")
    if len(site.inputs) != 1:
        raise Unsuitable(f"'{site.name}' multiplies several values")
    p = model.get_parameter(site.parameter)
    index, used = None, tuple(p.shape)
    if site.weight is not None and site.weight.node is not site.parameter_node:
        assert site.parameter_node is not None
        index = parameter_index(site.weight.node, site.parameter_node, tuple(p.shape))
        used = tuple(index.shape)
    x, y = shape(site.inputs[0].node), shape(site.node)
    if x is None or y is None:
        raise Unsuitable(f"'{site.name}' is no tensor")
    name = op_name(site.node)
    order = tuple(range(len(used)))
    if name == "einsum":
        order, groups, inputs, outputs = _einsum(site)
    elif site.kind == "linear":
        groups = (1, used[0], used[1])
        inputs, outputs = _numbered(used[1], len(x), -1), _numbered(used[0], len(y), -1)
    elif site.kind == "conv":
        if "transpose" in name or isinstance(model.get_submodule(site.module), _ConvTransposeNd):
            raise Unsuitable(f"'{site.name}' is a transposed convolution")
        spatial = len(used) - 2
        g = x[len(x) - spatial - 1] // used[1]  # the argument may be a size that the code computes
        groups = (g, used[0] // g, used[1])
        inputs = _numbered(g * used[1], len(x), len(x) - spatial - 1)
        outputs = _numbered(used[0], len(y), len(y) - spatial - 1)
    elif name in ("matmul", "mm") and len(used) == 2:
        assert site.weight is not None
        left = _first(site.weight)  # W @ x, else x @ W
        groups = (1, used[0], used[1]) if left else (1, used[1], used[0])
        order = (0, 1) if left else (1, 0)
        if min(len(x), len(y)) < 2:
            raise Unsuitable(f"'{site.name}' multiplies a vector")
        inputs = _numbered(groups[2], len(x), -2 if left else -1)
        outputs = _numbered(groups[1], len(y), -2 if left else -1)
    else:
        raise Unsuitable(f"'{site.name}' is a {name}")
    return Projection(site, site.parameter, groups, inputs, outputs, _bias(model, site), index, order)


def _first(weight: Operand) -> bool:
    return weight.at in (0, "input", "mat1")


def _bias(model: nn.Module, site: Site) -> str | None:
    if site.weight is None:
        mod: Any = model.get_submodule(site.module)
        assert isinstance(mod, (nn.Linear, _ConvNd))
        name = f"{site.module}.bias"
        if mod.bias is not None and not has_parameter(model, name):
            raise Unsuitable(f"the bias of '{site.name}' is no parameter")
        return None if mod.bias is None else name
    if op_name(site.node) not in ("linear", "conv1d", "conv2d", "conv3d"):
        return None
    node = site.node
    bias: Any = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
    if bias is None:
        return None
    if bias.op != "get_attr" or not has_parameter(model, str(bias.target)):
        raise Unsuitable(f"the bias of '{site.name}' is computed, or is no parameter")
    return str(bias.target)
