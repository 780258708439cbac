"""Factors of an input's channels (``QConfig.smooth``) in a graph: left to a norm, or a product of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.orders import shape_of
from ssmquant.graph.plan import Plan, Point
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.sites import op_name
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers.bank import hooks_of

__all__ = ["axes_of", "fold_gains", "foldable", "gains_in_sight", "product_of", "times"]

_NORMS = nn.LayerNorm, nn.RMSNorm
_QUESTIONS = {"size", "dim"}


def _norm_of(point: Point) -> str | None:
    """The name of the called module whose result, channels in its last axis, goes to this point alone."""
    assert point.channels is not None
    node, axis = point.node, point.channels[0]
    readers: set[fx.Node] = {site.node for site, _ in point.uses}
    while {n for n in node.users if op_name(n) not in _QUESTIONS} == readers and not node.meta.get("mutates"):
        if node.op == "call_module":
            shape = shape_of(node)
            return str(node.target) if shape is not None and axis == len(shape) - 1 else None
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        above = node.args[0]
        dims = len(shape_of(above) or ())
        order = axes_of(node, dims)
        if order is None:
            return None
        readers, node, axis = {node}, above, order[axis]
    return None


def axes_of(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    """Which axis of its argument each axis of ``node`` is, if it does nothing but move whole axes."""
    name, args = op_name(node), cast(tuple[Any, ...], node.args[1:])
    if node.kwargs or not all(isinstance(a, (int, tuple, list)) for a in args):
        return None
    axes = list(range(dims))
    if name == "contiguous" and not args:
        return tuple(axes)
    if name == "transpose" and len(args) == 2:
        a, b = (i % dims for i in args)
        axes[a], axes[b] = axes[b], axes[a]
        return tuple(axes)
    if name == "permute":
        order: Any = args[0] if len(args) == 1 else args
        return tuple(axes[i] for i in order) if len(order) == dims else None
    return None


def foldable(model: nn.Module, plans: Iterable[Plan], activations: nn.ModuleDict) -> dict[str, str]:
    """The norms that can take the factors of the quantizers, by key, that alone read them."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, set[str | None]] = {}
    often: set[str] = set()
    for plan in plans:
        points = [p for p in plan.points if p.what == "activation" and p.gain is not None]
        for point in points:
            found.setdefault(point.key, set()).add(_norm_of(point))
        nodes = points[0].node.graph.nodes if points else ()
        calls = Counter(str(n.target) for n in nodes if n.op == "call_module")
        often |= {name for name, count in calls.items() if count > 1}
    out = {}
    for key, norms in found.items():
        (name, *others), wrapper = norms, activations[key]
        assert isinstance(wrapper, ActivationQuantizer)
        if others or name is None or name in often or wrapper.gain is None:
            continue
        module: Any = model.get_submodule(name)
        own = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if t is not None]
        takes = type(module) in _NORMS and module.weight is not None and not hooks_of(module)
        if takes and all(t.shape == wrapper.gain.shape and owners[id(t)] == 1 for t in own):
            out[key] = name
    return out


@torch.no_grad()
def fold_gains(model: nn.Module, plans: Iterable[Plan], activations: nn.ModuleDict) -> None:
    """Multiplies the weights and shifts of norms, in place, by the factors of the quantizers that alone read them.

    Factors are powers of two: the products are the same ones, exactly, down to the smallest numbers. Factors that are
    all 1 go, too.
    """
    for key, name in foldable(model, plans, activations).items():
        wrapper: Any = activations[key]
        for t in model.get_submodule(name).parameters(recurse=False):
            t.mul_(wrapper.gain.to(t.dtype))
        wrapper.gain = None
    for each in activations.values():
        if isinstance(each, ActivationQuantizer) and each.gain is not None and bool((each.gain == 1).all()):
            each.gain = None


def times(x: Tensor, gain: Tensor, behind: int) -> Tensor:
    """``x`` by factors of the channels, which ``behind`` axes follow."""
    return x * gain.reshape(-1, *[1] * behind).to(x.dtype)


def product_of(graph: fx.Graph, node: fx.Node, model: nn.Module) -> fx.Node:
    """What the quantizer gets that ``node`` calls with its factors: they by its argument."""
    wrapper: Any = model.get_submodule(str(node.target))
    gain = graph.get_attr(f"{node.target}.gain")
    shape = shape_of(node)
    assert shape is not None
    product = graph.call_function(times, (node.args[0], gain, len(shape) - 1 - wrapper.channel_axis))
    product.meta["shape"] = shape
    return product


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
        made[n] = new.node_copy(n, made.__getitem__)
        if has_gain(n):
            with new.inserting_before(made[n]):
                made[n].args = (product_of(new, made[n], model),)
            made[n].target = f"{n.target}.quantizer"
    return new
