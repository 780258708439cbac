"""Factors of an input's channels (``QConfig.smooth``) in a deployed model: left to a norm, or a product of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.orders import shape_of
from ssmquant.graph.plan import Plan, Point
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.sites import op_name
from ssmquant.modules import ActivationQuantizer

__all__ = ["fold_gains", "gains_in_sight"]

_NORMS = nn.LayerNorm, nn.RMSNorm
_QUESTIONS = {"size", "dim"}


def _norm_of(point: Point) -> tuple[str, fx.Node] | None:
    """The called module whose result, its last axis where the point has its channels, goes to this point alone."""
    assert point.channels is not None
    node, axis = point.node, point.channels[0]
    readers: set[fx.Node] = {site.node for site, _ in point.uses}
    while {n for n in node.users if op_name(n) not in _QUESTIONS} == readers and not node.meta.get("mutates"):
        if node.op == "call_module":
            shape = shape_of(node)
            return (str(node.target), node) if shape is not None and axis == len(shape) - 1 else None
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        above = node.args[0]
        dims = len(shape_of(above) or ())
        order = _axes(node, dims)
        if order is None:
            return None
        readers, node, axis = {node}, above, order[axis]
    return None


def _axes(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    """Which axis of its argument each axis of ``node`` is, if it does nothing but move whole axes."""
    name, args = op_name(node), node.args[1:]
    if node.kwargs or not all(isinstance(a, (int, tuple, list)) for a in args):
        return None
    axes = list(range(dims))
    if name == "contiguous" and not args:
        return tuple(axes)
    if name == "transpose" and len(args) == 2:
        a, b = (i % dims for i in args)  # type: ignore[operator]
        axes[a], axes[b] = axes[b], axes[a]
        return tuple(axes)
    if name == "permute":
        order: Any = args[0] if len(args) == 1 else args
        return tuple(axes[i] for i in order) if len(order) == dims else None
    return None


@torch.no_grad()
def fold_gains(model: nn.Module, plans: Iterable[Plan], activations: nn.ModuleDict) -> None:
    """Multiplies the weights and shifts of norms, in place, by the factors of the quantizers that alone read them.

    Factors are powers of two: the products are the same ones, exactly, down to the smallest numbers.
    """
    plans = list(plans)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, set[str | None]] = {}
    calls: Counter[str] = Counter()
    for plan in plans:
        here: Counter[str] = Counter()
        for point in plan.points:
            if point.what != "activation" or point.gain is None:
                continue
            norm = _norm_of(point)
            found.setdefault(point.key, set()).add(None if norm is None else norm[0])
            if norm is not None and not here:
                here = Counter(str(n.target) for n in norm[1].graph.nodes if n.op == "call_module")
        calls |= here
    for key, norms in found.items():
        wrapper, name = activations[key], next(iter(norms))
        assert isinstance(wrapper, ActivationQuantizer)
        if wrapper.gain is not None and bool((wrapper.gain == 1).all()):
            wrapper.gain = None
        if len(norms) > 1 or name is None or calls[name] != 1 or wrapper.gain is None:
            continue
        module: Any = model.get_submodule(name)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if type(module) not in _NORMS or weight is None or weight.shape != wrapper.gain.shape:
            continue
        if any(t is not None and owners[id(t)] != 1 for t in (weight, bias)):
            continue
        for t in (weight, bias):
            if t is not None:
                t.mul_(wrapper.gain.to(t.dtype))
        wrapper.gain = None


def _times(x: Tensor, gain: Tensor, behind: int) -> Tensor:
    return x * gain.reshape(-1, *[1] * behind)


def gains_in_sight(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """The same graph with factors as products in front of the quantizers themselves; ``graph`` if there are none."""

    def has_gain(node: fx.Node) -> bool:
        if node.op != "call_module" or not str(node.target).startswith(f"{ACTIVATIONS}."):
            return False
        wrapper = model.get_submodule(str(node.target))
        return isinstance(wrapper, ActivationQuantizer) and wrapper.gain is not None

    if not any(has_gain(n) for n in graph.nodes):
        return graph
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        if not has_gain(n):
            made[n] = new.node_copy(n, made.__getitem__)
            continue
        wrapper: Any = model.get_submodule(str(n.target))
        gain = new.get_attr(f"{n.target}.gain")
        behind = len(shape_of(n) or ()) - 1 - wrapper.channel_axis
        product = new.call_function(_times, (made[n.args[0]], gain, behind))  # type: ignore[index]
        product.meta["shape"] = shape_of(n)
        made[n] = new.call_module(f"{n.target}.quantizer", (product,))
        made[n].meta.update(n.meta)
    return new
