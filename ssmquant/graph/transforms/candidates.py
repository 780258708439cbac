"""What a transform of one place is: which weights it touches, which nodes it adds, what calibration measures for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.adapter import ScanRole
from ssmquant.graph.sites import find_sites, op_name
from ssmquant.graph.trace import Trace
from ssmquant.graph.transforms.flow import QUESTIONS, Flow, Places, follow
from ssmquant.graph.transforms.projections import Projection, Unsuitable, has_parameter, projection_of

__all__ = ["Applied", "Candidate", "Norm", "Place", "Scale", "Scaled", "Skipped", "View", "key_of"]


@dataclass(frozen=True)
class Skipped:
    """A transform that does not apply to a site, and why."""

    kind: str
    site: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """A transform that was folded: how, its digest (:meth:`Candidate.mark`), and the parameters that it changed."""

    kind: str
    site: str
    how: str
    mark: str
    touched: tuple[str, ...]

    @property
    def key(self) -> str:
        return key_of(self.kind, self.site)


@dataclass(frozen=True)
class Norm:
    """A layer or RMS norm over the last axis: its node, its input and the names of its parameters."""

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str | None
    rms: bool
    channels: int
    name: str


@dataclass(frozen=True)
class Place:
    """One change of the graph: ``function(value, tensor)`` instead of ``node``, or of its ``operand``.

    ``labels`` broadcast to the value and number the elements of what the transform computes for it.
    """

    function: str
    node: fx.Node
    operand: fx.Node | None
    labels: Tensor


def key_of(kind: str, site: str) -> str:
    """The name of a transform of a site; it may be a buffer's."""
    return f"{kind}:{site.replace('.', '/')}"


def _plain(x: Any) -> Any:
    """Nested tuples of numbers and names, in an order that does not depend on the graph."""
    if isinstance(x, Tensor):
        return tuple(x.shape), hashlib.sha256(x.long().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(x, (set, frozenset)):
        return tuple(sorted((_plain(i) for i in x), key=repr))
    return tuple(_plain(i) for i in x) if isinstance(x, (list, tuple)) else x


@dataclass
class Candidate:
    """A transform that applies. ``places`` is empty where it costs nothing at run time.

    ``watch``: values with labels, of which calibration notes each label's largest magnitude; ``moments``: of which it
    notes means and covariances.
    """

    kind: str
    site: str
    places: list[Place] = field(default_factory=list)
    watch: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    moments: list[tuple[fx.Node, Tensor]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return key_of(self.kind, self.site)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What it does to which parameters, equal in all graphs that can share it (plain values and tensors)."""
        raise NotImplementedError

    @property
    def touched(self) -> set[str]:
        """Names of the parameters that it changes."""
        raise NotImplementedError

    def mark(self, *, placed: bool = True) -> str:
        """A digest (16 letters) of what it does: graphs where it differs compute another function.

        Args:
            placed: Whether its places are in the graph, too, and not weights alone changed.
        """
        places = [(p.function, p.labels) for p in self.places] if placed else []
        return hashlib.sha256(repr(_plain((self.key, self.identity, places))).encode()).hexdigest()[:16]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of its places; a Hadamard transform has an empty one."""
        return {
            f"{self.key}#{k}": (0,) if p.function == "hadamard" else tuple(p.labels.shape)
            for k, p in enumerate(self.places)
        }


@dataclass(frozen=True)
class Scaled:
    """One end of a projection whose channels get factors: ``factor[ids] ** power``, and 1 where ``ids`` is -1."""

    projection: Projection
    outputs: bool
    ids: Tensor
    power: int

    def apply(self, model: nn.Module, factor: Tensor) -> None:
        f = torch.where(self.ids >= 0, factor.double()[self.ids.clamp(min=0)] ** self.power, 1.0)
        (self.projection.scale_outputs if self.outputs else self.projection.scale_inputs)(model, f)


@dataclass
class Scale(Candidate):
    """A value's channels divided by factors, and what reads them multiplied."""

    size: int = 0
    ends: list[Scaled] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)

    @torch.no_grad()
    def fold(self, model: nn.Module, factor: Tensor) -> dict[str, Tensor]:
        """Changes the weights; returns tensors for the places, by key.

        Args:
            model: The traced model, changed in place.
            factor: (size,), positive.
        """
        if factor.shape != (self.size,) or not bool((factor.isfinite() & (factor > 0)).all()):
            raise ValueError(f"{self.key}: expected {self.size} positive factors, got {tuple(factor.shape)}")
        factor = factor.detach().double().cpu()
        for end in self.ends:
            end.apply(model, factor)
        for norm in self.norms:
            for name in (norm.weight, norm.bias):
                if name is not None:
                    p = model.get_parameter(name)
                    p.copy_(p.detach().cpu().double() / factor)
        return {f"{self.key}#{k}": factor[p.labels] for k, p in enumerate(self.places)}

    @property
    def identity(self) -> tuple[Any, ...]:
        ends = {(_plain(e.projection.identity), e.outputs, _plain(e.ids), e.power) for e in self.ends}
        return self.size, ends, {(n.weight, n.bias, n.rms) for n in self.norms}

    @property
    def touched(self) -> set[str]:
        names = {n.bias for n in self.norms if n.bias is not None} | {n.weight for n in self.norms}
        for e in self.ends:
            names |= e.projection.touched if e.outputs else {e.projection.parameter}
        return names

    def weight_range(self, model: nn.Module) -> Tensor:
        """The largest magnitude of what the weights of readers do to each channel (size,), float64."""
        out = torch.zeros(self.size, dtype=torch.float64)
        for end in self.ends:
            if not end.outputs:
                w = end.projection.read(model).abs().amax(dim=(1, 3)).reshape(-1)
                out.scatter_reduce_(0, end.ids, w, "amax")
        return out


class View:
    """A traced model as the finders look at it: its sites, their projections, and who reads a parameter."""

    def __init__(self, model: nn.Module, trace: Trace, scans: tuple[ScanRole, ...] = ()) -> None:
        self.model, self.graph = model, trace.graph
        found = find_sites(model, trace, scans)
        self.static = found.static
        self.sites = {s.node: s for s in found.sites}
        self.places = Places(model, trace.graph)
        self.baked = set(trace.traced.baked)
        self._read_by = self._readers()
        self.scans = [s for s in found.sites if s.kind == "scan"]
        self.projections: dict[fx.Node, Projection] = {}
        self.unsuitable: dict[fx.Node, str] = {}
        for site in found.sites:
            if site.kind == "scan":
                continue
            try:
                self.projections[site.node] = self._alone(projection_of(model, site))
            except Unsuitable as e:
                self.unsuitable[site.node] = str(e)
        self._flows: dict[fx.Node, Flow] = {}

    def _alone(self, p: Projection) -> Projection:
        for name in (p.parameter, p.bias):
            if name is not None and self.readers(name) != {p.site.node}:
                raise Unsuitable(f"'{name}' is read elsewhere too")
            if name in self.baked:  # the number is in the graph, of the weight as it was
                raise Unsuitable(f"'{name}' is read as a Python number")
        return p

    def _readers(self) -> dict[int, set[fx.Node]]:
        """By identity of a parameter, whatever its names: the nodes that compute with it and something else."""
        made_of: dict[fx.Node, set[int]] = {}
        out: dict[int, set[fx.Node]] = {}
        for n in self.graph.nodes:
            if n.op == "call_module":
                for p in self.model.get_submodule(str(n.target)).parameters():
                    out.setdefault(id(p), set()).add(n)
            if n.op == "get_attr" and n in self.static:
                made_of[n] = {id(attrgetter(str(n.target))(self.model))}
                continue
            parts = {p for i in n.all_input_nodes for p in made_of.get(i, ())}
            if n in self.static:
                made_of[n] = parts
            elif op_name(n) not in QUESTIONS:
                for part in parts:
                    out.setdefault(part, set()).add(n)
        return out

    def readers(self, parameter: str) -> set[fx.Node]:
        """The nodes that compute with a parameter (whichever its name) and something else."""
        return self._read_by.get(id(self.model.get_parameter(parameter)), set())

    def flow(self, p: Projection) -> Flow:
        """Where the outputs of a projection go by moves alone."""
        node = p.site.node
        if node not in self._flows:
            self._flows[node] = follow(self.places, {node: p.outputs})
        return self._flows[node]

    def norm(self, node: fx.Node) -> Norm | None:
        """The norm that a node computes, where it is one over the last axis with weights of its own."""
        called = self._called_norm(node) if node.op == "call_module" else self._norm_function(node)
        if called is None:
            return None
        x, weight, bias, rms = called
        for name in (weight, bias):
            if name is not None and not (has_parameter(self.model, name) and self._mine(name, node)):
                return None
        if not isinstance(x, fx.Node) or self.model.get_parameter(weight).dim() != 1:
            return None
        channels = self.model.get_parameter(weight).numel()
        return Norm(node, x, weight, bias, rms, channels, weight.rpartition(".")[0])

    def _mine(self, name: str, node: fx.Node) -> bool:
        return self.readers(name) == {node} and name not in self.baked

    def _called_norm(self, node: fx.Node) -> tuple[Any, str, str | None, bool] | None:
        mod = self.model.get_submodule(str(node.target))
        if type(mod) not in (nn.LayerNorm, nn.RMSNorm) or mod.weight is None:
            return None
        bias = f"{node.target}.bias" if getattr(mod, "bias", None) is not None else None
        x = node.args[0] if node.args else node.kwargs.get("input")
        return x, f"{node.target}.weight", bias, type(mod) is nn.RMSNorm

    def _norm_function(self, node: fx.Node) -> tuple[Any, str, str | None, bool] | None:
        if op_name(node) not in ("layer_norm", "rms_norm") or node.op != "call_function":
            return None
        names = ("input", "normalized_shape", "weight", "bias")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        rms = op_name(node) == "rms_norm"
        weight, bias = given.get("weight"), None if rms else given.get("bias")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or weight not in self.static:
            return None
        if bias is not None and (bias.op != "get_attr" or bias not in self.static):
            return None
        return given.get("input"), str(weight.target), None if bias is None else str(bias.target), rms
