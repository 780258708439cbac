"""Before a graph becomes code: parameters are quantized at its start, all by one call."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from ssmquant.graph.regions import OWNER
from ssmquant.graph.rewrite import WEIGHTS
from ssmquant.quantizers.bank import quantize_weights

__all__ = ["bank_weights"]


def _quantize(owner: Any, keys: tuple[str, ...], weights: list[Tensor]) -> list[Tensor]:
    found = owner.get_submodule(WEIGHTS)
    return quantize_weights([found[key] for key in keys], weights)


def _is_candidate(node: fx.Node, written: set[Any]) -> bool:
    if node.op != "call_module" or not str(node.target).startswith(f"{WEIGHTS}.") or len(node.args) != 1:
        return False
    root = node.args[0]
    return isinstance(root, fx.Node) and root.op == "get_attr" and root.meta.get("storage") not in written


def bank_weights(graph: fx.Graph) -> fx.Graph:
    """The same computation with all quantizers of plain parameters in one call; ``graph`` itself if there are few."""
    written = {s for n in graph.nodes for s in n.meta.get("mutates", ()) if s is not None}
    candidates = dict.fromkeys(n for n in graph.nodes if _is_candidate(n, written))
    roots = {str(n.target): str(n.all_input_nodes[0].target) for n in candidates}
    if len(roots) < 2:
        return graph
    new = fx.Graph()
    m: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for n in inputs:
        m[n] = new.node_copy(n)
    values = {root: new.get_attr(root) for root in dict.fromkeys(roots.values())}
    keys = tuple(target.removeprefix(f"{WEIGHTS}.") for target in roots)
    weights = [values[root] for root in roots.values()]
    bank = new.call_function(_quantize, (new.get_attr(OWNER), keys, weights))
    made = {target: new.call_function(operator.getitem, (bank, i)) for i, target in enumerate(roots)}
    for n in graph.nodes:
        if n in candidates:
            m[n] = made[str(n.target)]
        elif n not in m:
            m[n] = new.node_copy(n, lambda a: m[a])
    for n in reversed(list(new.nodes)):
        if n.op == "get_attr" and not n.users:
            new.erase_node(n)
    return new
