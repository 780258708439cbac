"""The graph of a prepared model for training on a GPU: layers that ``ops.dense`` has better gradients for.

Quantizers are called without the wrapper that calibration needs.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.sites import op_name
from ssmquant.modules import ActivationQuantizer
from ssmquant.ops import dense

__all__ = ["faster_layers", "hooked"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than the forward of its class."""
    return "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    if type(module) is not nn.LayerNorm or hooked(module):
        called: Tensor = module(x)
        return called
    return dense.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _is_grouped(node: fx.Node) -> bool:
    """Whether it is the projection of a low rank to step sizes, of each direction."""
    if op_name(node) != "einsum" or len(node.args) != 3 or node.kwargs:
        return False
    given, _, out = str(node.args[0]).replace(" ", "").partition("->")
    first, _, second = given.partition(",")
    if len(set(first)) != 4 or len(set(second)) != 3 or second[0] != first[1] or second[2] != first[2]:
        return False
    return second[1] not in first and out == first[0] + first[1] + second[1] + first[3]


def faster_layers(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """A copy of ``graph`` with other functions for its layers."""
    new = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        copy[n] = made = new.node_copy(n, copy.__getitem__)
        if n.target is F.linear:
            made.target = dense.linear
        elif n.target is F.layer_norm:
            made.target = dense.layer_norm
        elif _is_grouped(n):
            made.target, made.args = dense.grouped_linear, made.args[1:]
        elif n.op == "call_module":
            module = model.get_submodule(str(n.target))
            if str(n.target).startswith(f"{ACTIVATIONS}.") and isinstance(module, ActivationQuantizer):
                if hooked(module):
                    continue
                made.target = f"{n.target}.quantizer"
            elif type(module) is nn.LayerNorm and len(n.args) == 1:
                with new.inserting_before(made):
                    owner = new.get_attr(str(n.target))
                    copy[n] = new.call_function(_layer_norm, (owner, *made.args))
                copy[n].meta.update(made.meta)
                new.erase_node(made)
    return new
