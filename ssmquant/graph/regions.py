"""Turns a graph into a Python function. Checkpoint regions become functions of their own, called through checkpoint."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import fx, nn

__all__ = ["OWNER", "compile_graph"]

OWNER = "_ssmquant_owner"
"""A property of prepared models that returns the model itself, so that a graph can hand it to a region."""


def _python(graph: fx.Graph, name: str, model: nn.Module | None) -> tuple[Callable[..., Any], str]:
    numbered, paths = _by_numbers(graph, model)
    code = numbered.python_code("self", verbose=False)
    source = re.sub(r"\bself\._reference_(\d+)\b", lambda m: paths[int(m[1])], code.src)
    space = dict(code.globals)
    exec(compile(source, f"<ssmquant graph {name}>", "exec"), space)  # fx's own way to make a graph runnable
    return space["forward"], source


def _by_numbers(graph: fx.Graph, model: nn.Module | None) -> tuple[fx.Graph, list[str]]:
    """The graph with numbered targets, and Python for each.

    fx writes any name that looks like one into its code, keywords and quotes as well ("class", a key of a ModuleDict).
    """
    new = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    paths: dict[str, int] = {}
    for n in graph.nodes:
        copy[n] = made = new.node_copy(n, copy.__getitem__)
        if n.op in ("get_attr", "call_module") and n.target != OWNER:
            path = _attributes(str(n.target)) if model is None else _path(str(n.target), model)
            made.target = f"_reference_{paths.setdefault(path, len(paths))}"
    return new, list(paths)


def _attributes(target: str) -> str:
    text = "self"
    for name in target.split("."):
        plain = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
        text = f"{text}.{name}" if plain else f"getattr({text}, {name!r})"
    return text


def _path(target: str, model: nn.Module) -> str:
    """Modules' tables, read directly: attributes cost a call of ``nn.Module.__getattr__`` each, ten thousand a step."""
    *owners, last = target.split(".")
    text, module = "self", model
    for owner in owners:
        text += f"._modules[{owner!r}]"
        module = module._modules[owner]  # type: ignore[assignment]
    for table in ("_modules", "_parameters", "_buffers"):
        if last in getattr(module, table):
            return f"{text}.{table}[{last!r}]"
    return f"getattr({text}, {last!r})"


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


def compile_graph(graph: fx.Graph, model: nn.Module | None = None) -> tuple[Callable[..., Any], str]:
    """``(function(self, *tensors), source)`` of a graph whose module calls are relative to ``self``.

    With ``model``, whose tables of modules and parameters have the names that ``self`` will have, it runs with less
    work for Python, but ``torch.fx`` and ``torch.compile`` find it harder to read.
    """
    regions: dict[int, list[fx.Node]] = {}
    for n in graph.nodes:
        if n.meta.get("region") is not None and n.op not in ("get_attr", "placeholder", "output"):
            regions.setdefault(n.meta["region"], []).append(n)
    if not regions:
        return _python(graph, "forward", model)
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
        fn, src = _python(sub, f"region {r}", model)
        sources.append(f"# checkpointed region {r}\n{src}")
        owner = owner or main.get_attr(OWNER)
        call = main.call_function(_region_call(fn, r), (owner, *(m[i] for i in inputs)))
        for k, o in enumerate(outputs):
            m[o] = main.call_function(_item, (call, k))
    fn, src = _python(main, "forward", model)
    return fn, "\n".join([*sources, src])


def _item(values: Any, k: int) -> Any:
    return values[k]
