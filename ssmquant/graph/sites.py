"""Finds what can be quantized in a traced graph: projections, convolutions and selective scans.

A projection is found by where its *parameter* goes, not by module class: most Mamba code reads the weights of modules
that it never calls. A scan is found by the role tables. Everything else that a parameter reaches is either harmless in
float (added, indexed, normed, gathered) or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ssmquant.adapter import ScanRole
from ssmquant.graph.functions import FunctionModule
from ssmquant.graph.roles import scan_operands
from ssmquant.graph.trace import Trace

__all__ = ["FloatParameter", "Operand", "Site", "Sites", "ancestors", "find_sites", "op_name"]

SCAN_OPERANDS = ("u", "delta", "A", "B", "C", "D", "delta_bias")
_PROJECTIONS: dict[str, tuple[str, tuple[int, int]]] = {
    "linear": ("linear", (0, 1)), "conv1d": ("conv", (0, 1)), "conv2d": ("conv", (0, 1)), "conv3d": ("conv", (0, 1)),
    "conv_transpose1d": ("conv", (0, 1)), "conv_transpose2d": ("conv", (0, 1)), "conv_transpose3d": ("conv", (0, 1)),
    "matmul": ("matmul", (0, 1)), "mm": ("matmul", (0, 1)), "bmm": ("matmul", (0, 1)), "mv": ("matmul", (0, 1)),
    "addmm": ("matmul", (1, 2)), "baddbmm": ("matmul", (1, 2)), "addbmm": ("matmul", (1, 2)),
}  # fmt: skip
_PRODUCTS = {
    "einsum", "tensordot", "inner", "bilinear", "conv_tbc", "convolution", "multi_dot", "linalg_multi_dot",
    "chain_matmul", "multi_head_attention_forward", "scaled_dot_product_attention",
}  # fmt: skip
"""Further operators that multiply: a parameter that reaches one must be a site or be kept in float on purpose."""
_KEYWORDS = (("input", "mat1", "batch1"), ("weight", "other", "mat2", "batch2", "vec"))
VIEWS = {
    "view", "reshape", "permute", "transpose", "t", "T", "mT", "unsqueeze", "squeeze", "getitem", "flatten",
    "contiguous",
    "float", "half", "bfloat16", "double", "to", "type_as", "alias", "clone", "detach", "expand", "movedim", "swapaxes",
    "chunk", "split", "unbind", "narrow", "select", "view_as", "unflatten", "data", "type", "expand_as", "moveaxis",
}  # fmt: skip
_POOLS = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean"}
_SIGMOIDS = {"sigmoid", "sigmoid_", "hardsigmoid", "Sigmoid", "Hardsigmoid"}
_HARMLESS_LEAVES = (
    _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.LocalResponseNorm,
)  # fmt: skip


def op_name(node: fx.Node) -> str:
    """``"linear"``, ``"view"`` ...: the plain name of what a node does."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.op == "call_function":
        if node.target is getattr and len(node.args) > 1:
            return str(node.args[1])
        return str(getattr(node.target, "__name__", "")).strip("_").split(".")[0]
    return ""


@dataclass(frozen=True)
class Operand:
    """One argument of a site's node. ``at`` is its position or keyword; einsum's list form has a position inside it."""

    name: str
    at: Any
    node: fx.Node


@dataclass
class Site:
    """A place where an operator meets a parameter (or a scan).

    ``reads_scan``: its input is made of a scan's output, without another site between; ``feeds_scan``: so is a scan's
    operand of its output. ``float_reason`` is set where the default placement leaves it in float.
    """

    name: str
    kind: str
    node: fx.Node
    module: str
    types: tuple[str, ...]
    inputs: list[Operand]
    weight: Operand | None = None
    parameter: str | None = None
    parameter_node: fx.Node | None = None
    view_chain: bool = True
    reads_scan: bool = False
    feeds_scan: bool = False
    first: bool = False
    last: bool = False
    gate: bool = False
    scan: dict[str, Any] = field(default_factory=dict)
    role: ScanRole | None = None


@dataclass(frozen=True)
class FloatParameter:
    """A parameter that no site covers: harmless (``reason``), or an error where ``must_cover``."""

    name: str
    reason: str
    where: str
    must_cover: bool = False


@dataclass
class Sites:
    """All sites of a trace, the parameters outside them, and the nodes that depend on parameters only."""

    sites: list[Site]
    floats: list[FloatParameter]
    static: set[fx.Node]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """``node`` and everything that it is computed from."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return seen


def _inputs(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


class _Finder:
    def __init__(self, model: nn.Module, trace: Trace, scans: tuple[ScanRole, ...]) -> None:
        self.model, self.trace, self.scans = model, trace, scans
        self.graph = trace.graph
        self.modules = dict(model.named_modules())
        self.parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self.known: dict[fx.Node, tuple[fx.Node | None, bool]] = {}
        self.static = self._static()
        self.by_node: dict[fx.Node, Site] = {}

    def _static(self) -> set[fx.Node]:
        """Nodes that depend on nothing but the model's own tensors."""
        out: set[fx.Node] = set()
        written = {s for n in self.graph.nodes for s in n.meta.get("mutates", ())}
        for n in self.graph.nodes:
            if n.op == "get_attr":
                name = str(n.target)
                if name in self.parameters or name.startswith("_ssmquant.constants."):
                    out.add(n)
            elif (
                n.op in ("call_function", "call_method") and _inputs(n) and all(i in out for i in _inputs(n))
            ):
                if not n.meta.get("random") and not n.meta.get("impure") and "mutates" not in n.meta:
                    out.add(n)
        return {n for n in out if n.meta.get("storage") is None or n.meta["storage"] not in written}

    def is_view(self, node: fx.Node) -> bool:
        """Whether views alone lead from one parameter to ``node``; they may take sizes of the input."""
        if node.op == "get_attr":
            return node in self.static and str(node.target) in self.parameters
        if op_name(node) not in VIEWS or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        sizes = [i for i in _inputs(node) if i is not node.args[0]]
        return self.is_view(node.args[0]) and not any("val" in i.meta for i in sizes)

    def parameter_of(self, node: fx.Node) -> tuple[fx.Node | None, bool]:
        """The one parameter that a static value is made of, and whether views alone lead to it."""
        if node in self.known:
            return self.known[node]
        self.known[node] = self._parameter_of(node)
        return self.known[node]

    def _parameter_of(self, node: fx.Node) -> tuple[fx.Node | None, bool]:
        if node.op == "get_attr":
            return (node, True) if str(node.target) in self.parameters else (None, False)
        found: list[fx.Node] = []
        views = op_name(node) in VIEWS
        for i in _inputs(node):
            if views and i is not node.args[0] and "val" not in i.meta:
                continue  # a size of the input
            p, v = self.parameter_of(i)
            if p is not None:
                found.append(p)
                views = views and v
        return (found[0], views and len(set(found)) == 1) if found else (None, False)

    def _types(self, module: str) -> tuple[str, ...]:
        mod = self.modules.get(module)
        return (
            ()
            if mod is None
            else tuple(c.__name__ for c in type(mod).__mro__ if c not in (nn.Module, object))
        )

    # ---- projections ---------------------------------------------------------------------------------------------
    def projection(self, node: fx.Node) -> Site | None:
        if node.op == "call_module":
            mod = self.modules.get(str(node.target))
            own = isinstance(mod, (nn.Linear, _ConvNd)) and type(mod).forward.__module__.startswith(
                "torch.nn."
            )
            if mod is None or not own or "forward" in vars(mod):
                return None
            kind = "linear" if isinstance(mod, nn.Linear) else "conv"
            name = str(node.target)
            if f"{name}.weight" not in self.parameters:  # computed from others: weight_norm and the like
                return None
            at: Any = 0 if node.args else "input"
            x = node.args[0] if node.args else node.kwargs["input"]
            assert isinstance(x, fx.Node)
            return Site(
                name,
                kind,
                node,
                name,
                self._types(name),
                [Operand("input", at, x)],
                parameter=f"{name}.weight",
            )
        name = op_name(node)
        operands = self._operands(node, name)
        if operands is None:
            return None
        kind = _PROJECTIONS[name][0] if name in _PROJECTIONS else "matmul"
        weights = [
            o
            for o in operands
            if (o.node in self.static or self.is_view(o.node)) and self.parameter_of(o.node)[0] is not None
        ]
        dynamic = [o for o in operands if o.node not in self.static and o not in weights]
        if len(weights) != 1 or not dynamic:
            return None
        pnode, views = self.parameter_of(weights[0].node)
        assert pnode is not None
        pname = str(pnode.target)
        owner = pname.rpartition(".")[0]
        site = pname[: -len(".weight")] if pname.endswith(".weight") else pname
        inputs = [
            Operand("input" if len(dynamic) == 1 else f"input{i}", o.at, o.node)
            for i, o in enumerate(dynamic)
        ]
        return Site(site, kind, node, owner, self._types(owner), inputs, weights[0], pname, pnode, views)

    def _operands(self, node: fx.Node, name: str) -> list[Operand] | None:
        if node.op not in ("call_function", "call_method"):
            return None
        if name == "einsum":
            rest = node.args[1:]
            if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
                return [Operand("", (1, i), n) for i, n in enumerate(rest[0]) if isinstance(n, fx.Node)]
            return [Operand("", i + 1, n) for i, n in enumerate(rest) if isinstance(n, fx.Node)]
        if name not in _PROJECTIONS:
            return None
        found: list[tuple[Any, Any]] = []
        for i, keys in zip(_PROJECTIONS[name][1], _KEYWORDS, strict=True):
            if i < len(node.args):
                found.append((i, node.args[i]))
            else:
                found += [(k, node.kwargs[k]) for k in keys if k in node.kwargs]
        return [Operand("", at, n) for at, n in found if isinstance(n, fx.Node)]

    def scan(self, node: fx.Node) -> Site | None:
        found = scan_operands(self.model, node, self.scans)
        if found is None:
            return None
        role, operands = found
        module = node.meta.get("module", "")
        inputs = [Operand(k, k, v) for k in SCAN_OPERANDS if isinstance(v := operands.get(k), fx.Node)]
        name = f"{module}.scan" if module else "scan"
        return Site(name, "scan", node, module, self._types(module), inputs, scan=operands, role=role)

    # ---- neighbourhood -------------------------------------------------------------------------------------------
    def closure(
        self, node: fx.Node, step: Callable[[fx.Node], Iterator[fx.Node] | list[fx.Node]]
    ) -> set[fx.Node]:
        """Nodes reached from ``node`` by ``step``, up to and including the nearest sites."""
        seen: set[fx.Node] = set()
        todo = list(step(node))
        while todo:
            n = todo.pop()
            if n in seen or (n.op == "call_method" and n.target == "size"):
                continue
            seen.add(n)
            if n not in self.by_node:
                todo.extend(step(n))
        return seen

    def describe(self, site: Site) -> None:
        back = self.closure(site.node, _inputs)
        ahead = self.closure(site.node, lambda n: list(n.users))
        near = [self.by_node[n] for n in back if n in self.by_node]
        after = [self.by_node[n] for n in ahead if n in self.by_node]
        site.first = not near and any(n.op == "placeholder" for n in back)
        site.last = not after and any(n.op == "output" for n in ahead)
        if site.kind != "scan":
            site.reads_scan = any(s.kind == "scan" for s in near)
            site.feeds_scan = any(s.kind == "scan" for s in after)
            pooled = any(self._named(n) & _POOLS or "AdaptiveAvgPool" in str(self._named(n)) for n in back)
            gated = any(self._named(n) & _SIGMOIDS for n in ahead)
            pooled_before = any(s.gate for s in near)
            later = any(
                self._named(n) & _SIGMOIDS
                for s in after
                for n in self.closure(s.node, lambda n: list(n.users))
            )
            ones = site.kind == "conv" and self._spatial(site.inputs[0].node)
            site.gate = bool(
                (pooled and (gated or later) and (ones or site.kind != "conv")) or (pooled_before and gated)
            )

    def _spatial(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        return val is not None and all(s == 1 for s in tuple(val.shape)[2:])

    def _named(self, node: fx.Node) -> set[str]:
        if node.op == "call_module":
            mod = self.modules.get(str(node.target))
            return {type(mod).__name__}
        return {op_name(node)}

    # ---- coverage ------------------------------------------------------------------------------------------------
    def floats(self, sites: list[Site]) -> list[FloatParameter]:
        covered = {s.parameter for s in sites if s.parameter}
        for s in sites:
            for o in s.inputs:
                if o.node in self.static:
                    covered |= {str(p.target) for p in self._roots(o.node)}
        out: dict[str, FloatParameter] = {}
        for n in self.graph.nodes:
            if n.op == "get_attr" and str(n.target) in self.parameters and str(n.target) not in covered:
                reason, must, where = self._use(n)
                old = out.get(str(n.target))
                if old is None or (must and not old.must_cover):
                    out[str(n.target)] = FloatParameter(str(n.target), reason, where, must)
            elif n.op == "call_module":
                mod = self.modules.get(str(n.target))
                if mod is None or isinstance(mod, FunctionModule):
                    continue
                site = self.by_node.get(n)
                for k, _ in mod.named_parameters():
                    name = f"{n.target}.{k}"
                    if name in covered:
                        continue
                    harmless = site is not None or isinstance(mod, _HARMLESS_LEAVES)
                    reason = "bias" if site is not None else f"{type(mod).__name__}"
                    out.setdefault(name, FloatParameter(name, reason, n.meta.get("where", ""), not harmless))
        for name, where in self._computed_weights().items():
            if name not in covered:
                out[name] = FloatParameter(name, "is part of a computed weight", where, must_cover=True)
        return list(out.values())

    def _roots(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in ancestors(node) if n.op == "get_attr" and str(n.target) in self.parameters]

    def _computed_weights(self) -> dict[str, str]:
        """Parameters that reach the weight of a linear or convolution by way of activations: modulated weights."""
        out: dict[str, str] = {}
        for n in self.graph.nodes:
            name = op_name(n)
            if n in self.by_node or name not in _PROJECTIONS or _PROJECTIONS[name][0] == "matmul":
                continue
            for o in self._operands(n, name) or []:
                if o.at in (1, "weight"):
                    for p in self.closure(o.node, _inputs) | {o.node}:
                        if (
                            p.op == "get_attr"
                            and p.meta["val"].dim() > 1
                            and str(p.target) in self.parameters
                        ):
                            out[str(p.target)] = n.meta.get("where", "")
        return out

    def _use(self, node: fx.Node) -> tuple[str, bool, str]:
        """How a parameter without a site is used: (reason, must be covered, where)."""
        todo, seen = [node], {node}
        reason = "unused"
        while todo:
            n = todo.pop()
            for u in n.users:
                if u in self.static or self.is_view(u):
                    if u not in seen:
                        seen.add(u)
                        todo.append(u)
                else:
                    name, where = op_name(u), u.meta.get("where", "")
                    site = self.by_node.get(u)
                    if site is not None:
                        reason = "bias" if site.kind != "scan" else "operand that stays in float"
                    elif name in _PROJECTIONS or name in _PRODUCTS:
                        return f"reaches {name}", True, where
                    elif u.op == "call_module" and isinstance(self._module(u), FunctionModule):
                        return f"reaches {self._module(u)}", True, where
                    else:
                        reason = name or u.op
        return reason, False, node.meta.get("where", "")

    def _module(self, node: fx.Node) -> nn.Module | None:
        try:
            return self.model.get_submodule(str(node.target))
        except AttributeError:
            return None


def find_sites(model: nn.Module, trace: Trace, scans: tuple[ScanRole, ...] = ()) -> Sites:
    """All sites of a trace in execution order, and the parameters that none covers.

    Names are unique: the parameter's path (without ``.weight``), ``<module>.scan`` for scans, ``#2`` and so on where
    the same parameter is used again.
    """
    f = _Finder(model, trace, scans)
    sites: list[Site] = []
    count: dict[str, int] = {}
    for n in f.graph.nodes:
        site = f.projection(n) or f.scan(n)
        if site is None:
            continue
        count[site.name] = count.get(site.name, 0) + 1
        if count[site.name] > 1:
            site.name = f"{site.name}#{count[site.name]}"
        f.by_node[n] = site
        sites.append(site)
    for s in sites:
        f.describe(s)
    return Sites(sites, f.floats(sites), f.static)
