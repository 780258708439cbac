"""Norms of a deployed graph that no layer has taken in: one kernel each, where there is one for them.

PyTorch's own is slow where rows are next to each other in memory and columns are not, as behind a convolution.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ssmquant.modules import deployed

__all__ = ["deploy_norms", "is_norm", "norm_of"]


def is_norm(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a layer or RMS norm over the last axis."""
    if node.target in deployed.NORM_FUNCTIONS:
        known = len(node.args) == 2 and not set(node.kwargs) - {"weight", "bias", "eps"}
        shape: Any = node.args[1] if known else ()
        return known and isinstance(shape, (tuple, list)) and len(shape) == 1
    if node.op != "call_module" or len(node.args) != 1:
        return False
    module: Any = model.get_submodule(str(node.target))
    return type(module) in deployed.NORMS and len(module.normalized_shape) == 1


def norm_of(node: fx.Node) -> tuple[Any, ...]:
    """What ``modules.deployed`` takes for it, made where its graph inserts nodes."""
    if node.op == "call_module":
        return (node.graph.get_attr(str(node.target)),)
    rms = node.target is not F.layer_norm
    usual = None if rms else 1e-5
    return rms, node.kwargs.get("weight"), node.kwargs.get("bias"), node.kwargs.get("eps", usual)


def deploy_norms(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
    """Replaces the norms that ``deploy_layers`` has left in ``graph``, in place."""
    if not hasattr(engine, "normalize"):
        return
    for node in list(graph.nodes):
        if not is_norm(node, model):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(deployed.normalize, (node.args[0], norm_of(node)))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
