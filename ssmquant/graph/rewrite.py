"""Writes the quantized graph: the traced one with quantizers at every point of the plan.

The prepared and the deployed model run the same graph; they differ in the modules behind its ``call_module`` nodes, and
in that deployed weights and static operands take no argument, so that their float ancestors drop out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ssmquant.graph.plan import Plan, Point
from ssmquant.graph.provenance import OPS
from ssmquant.graph.sites import Operand, Site, ancestors
from ssmquant.graph.trace import Trace
from ssmquant.modules.activation import over_gain
from ssmquant.ops import selective_scan as _s6
from ssmquant.ops import ssd_scan as _ssd

__all__ = ["ACTIVATIONS", "WEIGHTS", "rewrite"]

WEIGHTS = "_ssmquant.weights"
ACTIVATIONS = "_ssmquant.activations"
assert _s6 is not None  # importing them registered the operators
assert _ssd is not None
_SCANS = {"s6": torch.ops.ssmquant.selective_scan.default, "ssd": torch.ops.ssmquant.ssd_scan.default}
_SCAN_OPTIONS = {
    "s6": ("window",),
    "ssd": ("initial_states", "dt_min", "dt_max", "window", "chunk_size"),
}
_ARITHMETIC = set(OPS.values())
_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _target(point: Point) -> str:
    return f"{WEIGHTS if point.what != 'activation' else ACTIVATIONS}.{point.key}"


class _Writer:
    def __init__(self, model: nn.Module, graph: fx.Graph, plan: Plan, deployed: bool) -> None:
        self.model, self.plan, self.deployed = model, plan, deployed
        self.graph = fx.Graph()
        self.map: dict[fx.Node, fx.Node] = {}
        for n in graph.nodes:
            self.map[n] = self.graph.node_copy(n, lambda a: self.map[a])
        self.order = {n: i for i, n in enumerate(graph.nodes)}

    def new(self, like: fx.Node, op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        for k in ("module", "where", "region"):
            if k in like.meta:
                node.meta[k] = like.meta[k]
        return node

    def fold_sizes(self, trace: Trace) -> None:
        """Sizes that a guard pins are numbers, and so is arithmetic on them: scan orders, index tables."""
        known: dict[fx.Node, Any] = {}
        pinned = {
            (g.expr[1][1], g.expr[1][2]): g.value
            for g in (*trace.input_guards, *trace.inner_guards)
            if isinstance(g.expr, tuple) and g.expr[0] == "value" and isinstance(g.expr[1], tuple)
            if g.expr[1][0] == "size"
        }
        for old in trace.graph.nodes:
            if old.op == "call_method" and old.target == "size" and len(old.args) == 2:
                value = pinned.get((old.args[0], old.args[1]))
            elif old.op == "call_function" and old.target in _ARITHMETIC and not old.kwargs:
                if not old.all_input_nodes or not all(a in known for a in old.all_input_nodes):
                    continue
                value = old.target(*(known.get(a, a) if isinstance(a, fx.Node) else a for a in old.args))
            else:
                continue
            if value is not None:
                known[old] = value
        numbers = {self.map[old]: value for old, value in known.items()}
        for user in {user for node in numbers for user in node.users}:
            user.args = fx.node.map_aggregate(user.args, partial(_number, numbers))
            user.kwargs = fx.node.map_aggregate(user.kwargs, partial(_number, numbers))

    # ---- quantizers ----------------------------------------------------------------------------------------------
    def place(self, point: Point) -> None:
        """Inserts the point's quantizer and leads its uses through it."""
        uses = sorted(point.uses, key=lambda u: self.order[u[0].node])
        if point.what == "weight":
            for site, operand in uses:
                self._place_weight(point, site, operand)
            return
        made: dict[Any, fx.Node] = {}  # by checkpoint region: each computes it for itself
        for site, operand in uses:
            node = self.map[site.node]
            region = node.meta.get("region")
            if region not in made:
                with self.graph.inserting_before(node):
                    args = () if self.deployed and point.what == "static" else (self.map[point.node],)
                    made[region] = self.new(node, "call_module", _target(point), args)
                    made[region].meta["point"] = point.name
                    made[region].meta["shape"] = tuple(point.node.meta["val"].shape)
            self._replace(site, operand, made[region])

    def _place_weight(self, point: Point, site: Site, operand: Operand) -> None:
        node = self.map[site.node]
        with self.graph.inserting_before(node):
            if site.weight is None:  # a called nn.Linear or conv: the functional form shows its weight
                root: fx.Node | None = None
                if not self.deployed:
                    root = self._over_gain(point, self.new(node, "get_attr", site.parameter, ()), node)
                q = self.new(node, "call_module", _target(point), () if root is None else (root,))
                site.scan["weight"] = q
            elif site.view_chain:
                assert site.parameter_node is not None
                source = self.map[site.parameter_node]
                if not self.deployed:
                    source = self._over_gain(point, source, node)
                q = self.new(node, "call_module", _target(point), () if self.deployed else (source,))
                chain = self._clone_chain(operand.node, site.parameter_node, q, node)
                self._replace(site, operand, chain)
            else:
                q = self.new(
                    node, "call_module", _target(point), () if self.deployed else (self.map[operand.node],)
                )
                self._replace(site, operand, q)
            q.meta["point"] = point.name
            own = site.weight is None or site.view_chain  # the parameter itself, as it is stored
            q.meta["shape"] = point.weight_shape if own else tuple(operand.node.meta["val"].shape)

    def _over_gain(self, point: Point, weight: fx.Node, like: fx.Node) -> fx.Node:
        """The weight for an input whose channels have factors."""
        if point.gain is None:
            return weight
        gain = self.new(like, "get_attr", f"{ACTIVATIONS}.{point.gain}.gain", ())
        return self.new(like, "call_function", over_gain, (weight, gain))

    def _clone_chain(self, node: fx.Node, root: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node:
        """The views that lead from ``root`` to ``node``, applied to ``value`` instead."""
        if node is root:
            return value
        done = {
            i: self._clone_chain(i, root, value, like) for i in node.all_input_nodes if root in ancestors(i)
        }
        new = self.graph.node_copy(node, lambda a: done.get(a, self.map.get(a, a)))
        new.meta.update({k: like.meta[k] for k in ("region",) if k in like.meta})
        return new

    def _replace(self, site: Site, operand: Operand, value: fx.Node) -> None:
        if site.kind == "scan":
            site.scan[f"new:{operand.name}"] = value
            return
        node = self.map[site.node]
        at = operand.at
        if isinstance(at, str):
            node.kwargs = {**node.kwargs, at: value}
        elif isinstance(at, tuple):
            inner = list(node.args[at[0]])  # type: ignore[arg-type]
            inner[at[1]] = value
            node.args = (*node.args[: at[0]], inner, *node.args[at[0] + 1 :])
        else:
            node.args = (*node.args[:at], value, *node.args[at + 1 :])

    # ---- operators -----------------------------------------------------------------------------------------------
    def functional(self, site: Site) -> None:
        """A called module becomes the function it computes, on the quantized weight."""
        weight = site.scan.pop("weight", None)
        node = self.map[site.node]
        node.meta["site"] = site.name
        if weight is None and (node.op != "call_module" or site.name in self.plan.floats):
            return
        mod = self.model.get_submodule(str(node.target))
        x = node.args[0] if node.args else node.kwargs["input"]
        with self.graph.inserting_before(node):
            if weight is None:  # only its input is quantized; the module itself refuses to be called
                weight = self.new(node, "get_attr", str(site.parameter), ())
            bias = self.new(node, "get_attr", f"{node.target}.bias", ()) if mod.bias is not None else None
            if isinstance(mod, nn.Linear):
                new = self.new(node, "call_function", F.linear, (x, weight, bias))
            else:
                assert isinstance(mod, _ConvNd)
                new = self._conv(node, mod, x, weight, bias)
        new.meta.update({k: v for k, v in node.meta.items() if k in ("val", "storage", "site")})
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.map[site.node] = new

    def _conv(self, node: fx.Node, mod: _ConvNd, x: Any, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        dims = len(mod.kernel_size)
        if isinstance(mod, _ConvTransposeNd):
            args = (x, weight, bias, mod.stride, mod.padding, mod.output_padding, mod.groups, mod.dilation)
            return self.new(node, "call_function", _TRANSPOSED[dims], args)
        padding: Any = mod.padding
        if mod.padding_mode != "zeros":
            pad = tuple(mod._reversed_padding_repeated_twice)
            x = self.new(node, "call_function", F.pad, (x, pad, mod.padding_mode))
            padding = (0,) * dims
        return self.new(
            node,
            "call_function",
            _CONVS[dims],
            (x, weight, bias, mod.stride, padding, mod.dilation, mod.groups),
        )

    def scan(self, site: Site, float_too: bool) -> None:
        """Any scan of the role tables becomes ours, on quantized operands."""
        node = self.map[site.node]
        node.meta["site"] = site.name
        new = {k[4:]: site.scan.pop(k) for k in list(site.scan) if k.startswith("new:")}
        assert site.role is not None
        if not new and not (float_too and site.role.kind == "s6"):
            return
        old = {k: (self.map[v] if isinstance(v, fx.Node) else v) for k, v in site.scan.items()}
        ops = {**old, **new}
        args: tuple[Any, ...] = tuple(
            ops.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        )
        args = (*args, bool(ops.get("delta_softplus", False)))
        kwargs = {k: ops[k] for k in _SCAN_OPTIONS[site.role.kind] if ops.get(k) is not None}
        with self.graph.inserting_before(node):
            both = self.new(node, "call_function", _SCANS[site.role.kind], args, kwargs)
            whole = site.role.always_state or ops.get("return_last_state", False)
            out = both if whole else self.new(node, "call_function", _first, (both,))
            dtype = node.meta["val"].dtype if not whole and "val" in node.meta else None
            if dtype is not None and dtype != site.scan["u"].meta["val"].dtype:
                out = self.new(
                    node, "call_method", "to", (out, dtype)
                )  # some scans return fp32 for half inputs
        both.meta["site"] = site.name
        out.meta.update({k: v for k, v in node.meta.items() if k in ("val", "storage", "region")})
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)
        self.map[site.node] = both

    def prune(self) -> None:
        """Drops what nothing reads any more. Nodes with an effect stay, and so do the user's own modules."""
        for n in reversed(list(self.graph.nodes)):
            if n.users or n.op in ("placeholder", "output") or n.meta.get("impure") or "mutates" in n.meta:
                continue
            if n.meta.get("random") or (n.op == "call_module" and "point" not in n.meta):
                continue
            self.graph.erase_node(n)


def _number(numbers: dict[fx.Node, Any], a: Any) -> Any:
    return numbers.get(a, a) if isinstance(a, fx.Node) else a


def _first(pair: Any) -> Any:
    return pair[0]


def rewrite(
    model: nn.Module, trace: Trace, plan: Plan, *, deployed: bool = False, float_scans: bool = False
) -> fx.Graph:
    """A new graph with the plan's quantizers in it; the trace's own stays as it is.

    ``float_scans``: also the scans that stay in float become ours.

    Nodes of quantizers carry ``meta["point"]`` (the point's name), nodes of sites ``meta["site"]``.
    """
    w = _Writer(model, trace.graph, plan, deployed)
    w.fold_sizes(trace)
    for point in plan.points:
        w.place(point)
    for site in plan.sites:
        if site.kind == "scan":
            w.scan(site, float_scans)
        else:
            w.functional(site)
    w.prune()
    return w.graph
