"""The graph of a deployed model: chains of nodes that one call on codes computes (``modules.deployed``).

The record's own graph stays as it is: the one that is made here computes the same up to the order of sums.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ssmquant.graph.deploy_chains import deploy_chains
from ssmquant.graph.deploy_convs import deploy_convs
from ssmquant.graph.deploy_edges import deploy_edges
from ssmquant.graph.deploy_fronts import deploy_fronts
from ssmquant.graph.deploy_layers import deploy_layers
from ssmquant.graph.deploy_norms import deploy_norms
from ssmquant.graph.deploy_scans import SCAN, Deployer, NoMatch
from ssmquant.graph.deploy_sequences import deploy_sequences, fork_sequences
from ssmquant.graph.fuse import fuse
from ssmquant.graph.gains import gains_in_sight
from ssmquant.graph.orders import shape_of
from ssmquant.graph.sites import op_name
from ssmquant.modules.deployed import Engine

__all__ = ["deploy", "kernels", "left_out"]


def deploy(graph: fx.Graph, model: nn.Module, engine: Engine) -> fx.Graph:
    """The graph of a deployed model, fused for ``engine``; ``graph`` itself if nothing in it can be fused."""
    graph = gains_in_sight(graph, model)
    fused = fuse(graph, model)
    d = Deployer(fused, model, engine)
    for n in fused.nodes:
        if n.target is SCAN:
            try:
                d.core(n)
            except NoMatch:
                continue
    if not d.changed:  # what is fused for other devices alone is no gain
        d = Deployer(graph, model, engine)
    deploy_sequences(d)
    for n in d.graph.nodes:
        if n.op == "call_method" and n.target == "size" and len(n.args) == 2:
            n.args = _earlier(model, *n.args)
    d.prune()
    for n in d.graph.nodes:
        n.meta.pop("region", None)  # without gradients there is nothing to compute again
    if not deploy_layers(d.graph, model, engine) and not d.changed:
        return graph
    deploy_norms(d.graph, model, engine)
    deploy_convs(d.graph, model, engine)
    deploy_edges(d.graph, model, engine)
    deploy_chains(d.graph, model, engine)
    deploy_fronts(d.graph, model, engine)
    fork_sequences(d.graph)
    d.graph.lint()
    return d.graph


# But activations, which become part of what they read.
_SAME_SHAPE = (nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout)


def _earlier(model: nn.Module, node: Any, dim: Any) -> tuple[Any, Any]:
    """The tensor and axis that have the size for certain that ``node`` has in ``dim``, so that no copy is asked."""
    while isinstance(node, fx.Node) and isinstance(dim, int):
        shape, name = shape_of(node), op_name(node)
        if shape is None:
            break
        dim %= len(shape)
        above = node.args[0] if node.args else None
        plain = node.op == "call_module" and type(model.get_submodule(str(node.target))) in _SAME_SHAPE
        if plain or name in ("flip", "contiguous", "clone", "float"):
            node = above
        elif name == "transpose" and len(node.args) == 3:
            axes: tuple[Any, ...] = node.args[1:]
            pair = [a % len(shape) for a in axes]
            node, dim = above, pair[1 - pair.index(dim)] if dim in pair else dim
        elif name == "getitem" and isinstance(above, fx.Node) and op_name(above) in ("chunk", "split"):
            cut = above.args[2] if len(above.args) > 2 else above.kwargs.get("dim", 0)
            if not isinstance(cut, int) or cut % len(shape) == dim:
                break
            node = above.args[0]
        else:
            break
    return node, dim


def left_out(graph: fx.Graph) -> list[str]:
    """The modules that ``deploy`` has left out of its graph, for they do nothing: in eval mode and without hooks."""
    found: list[str] = graph.output_node().meta.get("left_out", [])
    return found


def kernels(graph: fx.Graph) -> dict[str, str]:
    """What computes the sites that ``deploy`` has fused in its graph, by their names."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        found |= node.meta.get("kernels", {})
    return found
