"""Turns a graph into a Python function. Checkpoint regions become functions of their own, called through checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import fx

__all__ = ["OWNER", "compile_graph"]

OWNER = "_ssmquant_owner"
"""A property of prepared models that returns the model itself, so that a graph can hand it to a region."""


def _python(graph: fx.Graph, name: str) -> tuple[Callable[..., Any], str]:
    code = graph.python_code("self", verbose=False)
    space = dict(code.globals)
    exec(
        compile(code.src, f"<ssmquant graph {name}>", "exec"), space
    )  # fx's own way to make a graph runnable
    return space["forward"], code.src


def _region_call(fn: Callable[..., Any], index: int) -> Callable[..., Any]:
    def run(owner: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(fn, owner, *args, use_reentrant=False)

    run.__name__ = run.__qualname__ = f"checkpoint_region_{index}"
    return run


def _extract(
    graph: fx.Graph, region: int, nodes: list[fx.Node]
) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    inside = set(nodes)
    inputs: list[fx.Node] = []
    outputs: list[fx.Node] = []
    sub = fx.Graph()
    m: dict[fx.Node, fx.Node] = {}
    for n in nodes:
        for i in n.all_input_nodes:
            if i not in inside and i.op != "get_attr" and i not in inputs:
                inputs.append(i)
    for i in inputs:
        m[i] = sub.placeholder(f"in_{i.name}")
    for n in nodes:
        for i in n.all_input_nodes:
            if i.op == "get_attr" and i not in m:
                m[i] = sub.node_copy(i)
        m[n] = sub.node_copy(n, lambda a: m[a])
        if any(u not in inside for u in n.users):
            outputs.append(n)
    sub.output(tuple(m[n] for n in outputs))
    return sub, inputs, outputs


def compile_graph(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """``(function(self, *tensors), source)`` of a graph whose module calls are relative to ``self``."""
    regions: dict[int, list[fx.Node]] = {}
    for n in graph.nodes:
        if n.meta.get("region") is not None and n.op not in ("get_attr", "placeholder", "output"):
            regions.setdefault(n.meta["region"], []).append(n)
    if not regions:
        return _python(graph, "forward")
    main = fx.Graph()
    m: dict[fx.Node, fx.Node] = {}
    member = {n: r for r, nodes in regions.items() for n in nodes}
    sources = []
    owner: fx.Node | None = None
    for n in graph.nodes:
        r = member.get(n)
        if r is None:
            m[n] = main.node_copy(n, lambda a: m[a])
            continue
        if n is not regions[r][-1]:
            continue
        sub, inputs, outputs = _extract(graph, r, regions[r])
        fn, src = _python(sub, f"region {r}")
        sources.append(f"# checkpointed region {r}\n{src}")
        owner = owner or main.get_attr(OWNER)
        call = main.call_function(_region_call(fn, r), (owner, *(m[i] for i in inputs)))
        for k, o in enumerate(outputs):
            m[o] = main.call_function(_item, (call, k))
    fn, src = _python(main, "forward")
    return fn, "\n".join([*sources, src])


def _item(values: Any, k: int) -> Any:
    return values[k]
