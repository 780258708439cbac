"""Before a graph becomes code: what is made of parameters alone is quantized at its start, all by one call.

These are weights, and static operands of scans (``-exp(A_log)``), of which what they are computed by moves as well.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ssmquant.graph.moves import written_in
from ssmquant.graph.regions import OWNER
from ssmquant.graph.rewrite import WEIGHTS
from ssmquant.quantizers.bank import quantize_weights

__all__ = ["bank_weights"]

_ENTER, _LEAVE = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def _quantize(owner: Any, keys: tuple[str, ...], weights: list[Tensor]) -> list[Tensor]:
    found = owner.get_submodule(WEIGHTS)._modules
    return quantize_weights([found[key] for key in keys], weights)


def _movable(graph: fx.Graph) -> set[fx.Node]:
    """What computes the same at the graph's start: of tensors that nothing writes to, in the modes of the call."""
    written = written_in(graph)
    out: set[fx.Node] = set()
    autocasts: set[Any] = set()
    switched = False  # grad mode; whether it is that of the call again is not known
    for n in graph.nodes:
        if n.target is _ENTER:
            autocasts.add(n)
        elif n.target is _LEAVE:
            autocasts.discard(n.args[0])
        elif n.target is torch._C._set_grad_enabled:
            switched = True
        elif n.meta.get("storage") in written:
            continue
        elif n.op == "get_attr":
            out.add(n)
        elif n.op in ("call_function", "call_method") and n.all_input_nodes and not (autocasts or switched):
            effects = any(n.meta.get(k) for k in ("random", "impure", "mutates"))
            if not effects and all(i in out for i in n.all_input_nodes):
                out.add(n)
    return out


def _is_candidate(node: fx.Node, movable: set[fx.Node]) -> bool:
    if node.op != "call_module" or not str(node.target).startswith(f"{WEIGHTS}.") or len(node.args) != 1:
        return False
    return node.args[0] in movable


def _with_ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    out: set[fx.Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in out:
            out.add(node)
            nodes.extend(node.all_input_nodes)
    return out


def bank_weights(graph: fx.Graph) -> fx.Graph:
    """The same computation with all quantizers of what is made of parameters in one call; ``graph`` itself if few."""
    movable = _movable(graph)
    candidates = [n for n in graph.nodes if _is_candidate(n, movable)]
    moved = _with_ancestors([n.all_input_nodes[0] for n in candidates])
    new = fx.Graph()
    m: dict[fx.Node, fx.Node] = {}
    parameters: dict[str, fx.Node] = {}
    for n in graph.nodes:
        if n.op == "placeholder":
            m[n] = new.node_copy(n)
    for n in graph.nodes:
        if n in moved and n.op == "get_attr":
            name = str(n.target)
            m[n] = parameters[name] = parameters.get(name) or new.get_attr(name)
        elif n in moved:
            m[n] = new.node_copy(n, m.__getitem__)
            m[n].meta.pop("region", None)  # computed once, for all checkpoint regions
    # One quantizer may stand at several places, once in every region that reads its result.
    roots = {(str(n.target), m[n.all_input_nodes[0]]): n for n in candidates}
    if len(roots) < 2:
        return graph
    keys = tuple(target.removeprefix(f"{WEIGHTS}.") for target, _ in roots)
    bank = new.call_function(_quantize, (new.get_attr(OWNER), keys, [value for _, value in roots]))
    made = {root: new.call_function(operator.getitem, (bank, i)) for i, root in enumerate(roots)}
    for n in candidates:
        m[n] = made[str(n.target), m[n.all_input_nodes[0]]]
    for n in graph.nodes:
        if n not in m:
            m[n] = new.node_copy(n, m.__getitem__)
    for n in reversed(list(new.nodes)):
        if n.op == "get_attr" and not n.users:
            new.erase_node(n)
    return new
