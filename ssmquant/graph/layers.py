"""The graph of a prepared model for training on a GPU: layers that ``ops.dense`` has better gradients for.

Quantizers are called without the wrapper that calibration needs, which no hook may be on.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.gains import product_of
from ssmquant.graph.orders import by_direction
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.modules import ActivationQuantizer
from ssmquant.ops import dense
from ssmquant.quantizers.bank import hooks_of

__all__ = ["faster_layers"]


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    if type(module) is not nn.LayerNorm or hooks_of(module):
        called: Tensor = module(x)
        return called
    return dense.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


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
        elif by_direction(n):  # the projection of a low rank to step sizes
            made.target, made.args = dense.grouped_linear, made.args[1:]
        elif n.op == "call_module":
            module = model.get_submodule(str(n.target))
            if str(n.target).startswith(f"{ACTIVATIONS}.") and isinstance(module, ActivationQuantizer):
                if module.gain is not None:
                    with new.inserting_before(made):
                        made.args = (product_of(new, made, model),)
                made.target = f"{n.target}.quantizer"
            elif type(module) is nn.LayerNorm and len(n.args) == 1:
                with new.inserting_before(made):
                    owner = new.get_attr(str(n.target))
                    copy[n] = new.call_function(_layer_norm, (owner, *made.args))
                copy[n].meta.update(made.meta)
                new.erase_node(made)
    return new
