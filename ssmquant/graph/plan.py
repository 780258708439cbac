"""From sites and a configuration to quantization points: which value gets which quantizer, and which ones share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ssmquant.config import DECAYS, QConfig, Rule, Scheme, decay_only
from ssmquant.errors import ConfigError, CoverageError
from ssmquant.graph.sites import FloatParameter, Operand, Site, Sites, op_name
from ssmquant.graph.trace import Trace
from ssmquant.quantizers import get_quantizer

__all__ = ["Plan", "Point", "make_plan", "module_key"]

_SCALE_BITS = 16


def module_key(name: str) -> str:
    """A site's name as a key of an ``nn.ModuleDict``, which takes no dots."""
    return name.replace(".", "/")


@dataclass
class Point:
    """One quantizer and the values that go through it.

    ``what`` is ``"weight"`` (a parameter, quantized where it is read), ``"static"`` (a value made of parameters only,
    encoded once at convert) or ``"activation"``. ``axis``: the sample axis of an activation whose statistics are taken
    per sample, or the channel axis of a weight, with ``leading`` axes in front counting as one. ``channels``: axis and
    number of an activation's channels, over which its projection or convolution sums. ``position_axes``: those axes of
    an activation that are neither samples nor channels; none where the samples have no axis of their own. ``gain``: the
    key of the activation whose channels have factors (its own, or that of a weight's input), see ``QConfig.smooth``.
    """

    name: str
    what: str
    scheme: Scheme
    node: fx.Node
    axis: int | None
    groups: int = 1
    leading: int = 1
    channels: tuple[int, int] | None = None
    position_axes: tuple[int, ...] = ()
    gain: str | None = None
    uses: list[tuple[Site, Operand]] = field(default_factory=list)
    parameter: str | None = None
    weight_shape: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return module_key(self.name)


@dataclass
class Plan:
    """All points of a trace, and for every site that stays in float the reason."""

    points: list[Point]
    floats: dict[str, str]
    parameters: list[FloatParameter]
    sites: list[Site]


def sample_axis(trace: Trace) -> Callable[[fx.Node], int | None]:
    """Finds the axis of a value that numbers the samples: the one that changed with the batch between two traces.

    Where code folds the batch into another dimension there is none.
    """
    inputs = [n for n in trace.graph.nodes if n.op == "placeholder"]
    batch = [i for i, d in sorted(trace.free) if d == 0]
    nodes: dict[fx.Node, fx.Node] = {}
    if batch and trace.other is not None:
        nodes = dict(zip(trace.graph.nodes, trace.other.graph.nodes, strict=True))
    elif trace.sample is not None:
        nodes = _aligned(trace.graph, trace.sample.graph)
        batch = [i for i, n in enumerate(inputs) if n in nodes and _first_size(n) != _first_size(nodes[n])]

    def axis(node: fx.Node) -> int | None:
        if not batch or node not in nodes or "val" not in node.meta or "val" not in nodes[node].meta:
            return None
        here, there = _first_size(inputs[batch[0]]), _first_size(nodes[inputs[batch[0]]])
        mine, other = node.meta["val"].shape, nodes[node].meta["val"].shape
        if here == there or len(mine) != len(other):
            return None
        found = [d for d, (a, b) in enumerate(zip(mine, other, strict=True)) if a == here and b == there]
        return found[0] if len(found) == 1 else None

    return axis


def _first_size(node: fx.Node) -> int | None:
    shape = node.meta["val"].shape
    return int(shape[0]) if shape else None


def _aligned(a: fx.Graph, b: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes of two graphs of the same code: the n-th that a line of a module wrote of an operator, in both.

    A loop over the batch writes more of them at a larger batch; its n-th pass is still its n-th pass.
    """

    def keyed(graph: fx.Graph) -> dict[object, fx.Node]:
        count: dict[object, int] = {}
        out: dict[object, fx.Node] = {}
        for n in graph.nodes:
            name = "" if n.op == "placeholder" else str(n.target)
            key = (n.op, name, n.meta.get("module", ""), n.meta.get("where", ""))
            count[key] = count.get(key, 0) + 1
            out[(key, count[key])] = n
        return out

    ours, theirs = keyed(a), keyed(b)
    return {n: theirs[k] for k, n in ours.items() if k in theirs}


def _reason(site: Site, rule: Rule | None, config: QConfig, adapter_float: tuple[Rule, ...]) -> str | None:
    """Why a site stays in float, or None.

    A rule that names sites (exactly, by expression or glob) speaks louder than the default placement; one for a whole
    module type or operator kind says how to quantize those that are quantized.
    """
    if rule is not None and rule.keep_float:
        return f"keep_float ({rule.match})"
    if rule is not None and rule.precedence((site.name,), (), ()) is not None:
        return None
    for r in adapter_float:
        if r.precedence((site.name,), site.types, (site.kind,)) is not None:
            return "published placement"
    if config.keep_first_last and site.kind != "scan" and (site.first or site.last):
        return "first layer" if site.first else "last layer"
    if config.keep_gates and site.gate:
        return "channel attention"
    return None


def einsum_letters(site: Site, operand: Operand) -> tuple[str, str, str]:
    """Those of an operand's axes, of the other operands' and of the output's; nothing where there is an ellipsis."""
    left, arrow, out = str(site.node.args[0]).replace(" ", "").partition("->")
    terms = left.split(",")
    letters = left.replace(",", "").replace(".", "")
    term = terms.pop(operand.at[1] if isinstance(operand.at, tuple) else operand.at - 1)
    if len(term) != operand.node.meta["val"].dim() or "." in term:
        return "", "", ""
    return term, "".join(terms), out if arrow else "".join(c for c in letters if letters.count(c) == 1)


def _channel_axis(model: nn.Module, site: Site) -> int | None:
    """The axis of a weight that numbers output channels (directions, where it has those in front), if there is one."""
    if site.weight is None:
        return 1 if isinstance(model.get_submodule(site.module), _ConvTransposeNd) else 0
    if site.weight.node is not site.parameter_node:  # through views
        return 0
    if op_name(site.node) == "einsum":
        term, others, out = einsum_letters(site, site.weight)
        kept = [i for i, c in enumerate(term) if c in out]
        own = [i for i in kept if term[i] not in others]  # a letter that others have, too, numbers a batch
        return next(iter(own or kept), None)
    if site.kind == "matmul" and site.weight.at != min(site.weight.at, *(o.at for o in site.inputs), key=str):
        return len(site.weight.node.meta["val"].shape) - 1  # x @ W
    return 1 if "transpose" in op_name(site.node) else 0


def _stacked(site: Site, shape: tuple[int, ...]) -> bool:
    """Whether a weight is a stack (directions, output channels, inputs)."""
    if len(shape) != 3 or site.weight is None:
        return False
    used = tuple(site.weight.node.meta["val"].shape)
    if op_name(site.node) == "einsum":
        term, _, out = einsum_letters(site, site.weight)
        return used == shape and [c in out for c in term] == [True, True, False]
    # A view for a convolution in groups; of one output channel a direction, or of a depthwise weight, it is no stack.
    return shape[1] > 1 and used[:1] == (shape[0] * shape[1],)


def _weight_groups(
    model: nn.Module, site: Site, shape: tuple[int, ...], scheme: Scheme
) -> tuple[int | None, int, int]:
    """Axis, number of groups and leading axes of a weight's scales."""
    assert scheme.bits is not None
    if scheme.granularity == "tensor":
        return None, 1, 1
    axis, stacked = _channel_axis(model, site), _stacked(site, shape)
    if scheme.granularity == "channel" and axis is not None:
        groups = shape[0] * shape[1] if stacked else shape[axis]
        # A channel gets a scale of its own where its codes take more room than one.
        if math.prod(shape) // max(groups, 1) * scheme.bits >= _SCALE_BITS:
            return (0, groups, 2) if stacked else (axis, groups, 1)
    return (0, shape[0], 1) if stacked else (None, 1, 1)


def _input_channels(model: nn.Module, site: Site, operand: Operand) -> tuple[int, int] | None:
    """Axis and number of the channels that a projection or a convolution of ``operand`` sums over."""
    shape = tuple(operand.node.meta["val"].shape)
    if site.kind == "linear":
        axis = len(shape) - 1
    elif site.kind == "conv":
        weight = site.weight.node.meta["val"] if site.weight else model.get_parameter(str(site.parameter))
        axis = len(shape) - weight.dim() + 1  # in front of the spatial axes
    elif op_name(site.node) == "einsum":
        term, _, out = einsum_letters(site, operand)
        summed = [i for i, c in enumerate(term) if c not in out]
        if len(summed) != 1:
            return None
        axis = summed[0]
    else:
        return None
    return axis, shape[axis]


def _position_axes(site: Site, operand: Operand, sample: int | None, channels: int | None) -> tuple[int, ...]:
    """The axes of an input that number neither samples nor channels."""
    dims = operand.node.meta["val"].dim()
    if (
        channels is None
        and site.kind == "matmul"
        and op_name(site.node) != "einsum"
        and site.weight is not None
    ):
        channels = dims - (1 if operand.at == 0 else 2)  # x @ W or W @ x
    if sample is None or channels is None:
        return ()
    return tuple(d for d in range(dims) if d not in (sample, channels % dims))


def make_plan(
    model: nn.Module,
    trace: Trace,
    found: Sites,
    config: QConfig,
    adapter_float: tuple[str, ...] = (),
    *,
    check: bool = True,
) -> Plan:
    """Decides every site.

    Raises:
        CoverageError: a rule matched nothing, or a parameter reaches a matmul, convolution or scan that no site covers
            (only with ``check``).
    """
    adapter_rules = tuple(Rule(p, keep_float=True) for p in adapter_float)
    axis_of = sample_axis(trace)
    written = {s for n in trace.graph.nodes for s in n.meta.get("mutates", ())}
    points: dict[object, Point] = {}
    floats: dict[str, str] = {}
    used: set[int] = set()
    weights = dict(model.named_parameters(remove_duplicate=False))
    alias: dict[int, str] = {}
    for name, p in weights.items():
        alias.setdefault(id(p), name)

    def pick(names: tuple[str, ...], site: Site) -> Rule | None:
        kinds = (site.kind,)
        for i, r in enumerate(config.all_rules()):
            if r.precedence(names, site.types, kinds) is not None:
                used.add(i)
        return config.rule_for(names, site.types, kinds)

    for site in found.sites:
        rule = pick((site.name,), site)
        reason = _reason(site, rule, config, adapter_rules)
        if reason is not None:
            floats[site.name] = reason
            continue
        quantized = False
        if site.parameter is not None:
            scheme = config.weight_scheme(rule)
            if scheme.bits is not None:
                quantized = True
                parameter = weights[site.parameter]
                name = alias[id(parameter)]
                base = name[: -len(".weight")] if name.endswith(".weight") else name
                shared = None if site.view_chain else site.node
                key: object = ("weight", id(parameter), shared, scheme)
                axis, groups, leading = _weight_groups(model, site, tuple(parameter.shape), scheme)
                operand = site.weight or Operand("weight", None, site.node)
                if not site.view_chain:
                    axis, groups, leading = None, 1, 1
                # Views are applied to the quantized parameter, so that all its uses share the codes.
                node = site.parameter_node if site.view_chain and site.parameter_node else operand.node
                if key not in points:
                    taken = any(p.name == f"{base}:weight" for p in points.values())
                    point = Point(
                        f"{site.name if taken else base}:weight",
                        "weight",
                        scheme,
                        node,
                        axis,
                        groups,
                        leading,
                    )
                    point.parameter, point.weight_shape = site.parameter, tuple(parameter.shape)
                    points[key] = point
                points[key].uses.append((site, operand))
        for o in site.inputs:
            names = (f"{site.name}.{o.name}", site.name) if site.kind == "scan" else (site.name,)
            size = o.node.meta["val"].shape
            is_a = site.kind == "scan" and o.name == "A" and len(size) == 2
            scheme = config.activation_scheme(
                pick(names, site),
                scan=site.kind == "scan",
                reads_scan=site.reads_scan,
                decay=is_a and size[1] > 1,
            )
            if scheme.bits is None:
                continue
            if scheme.method in DECAYS and not is_a:
                what = f"{names[0]!r} cannot have the quantizer {scheme.method!r}"
                raise ConfigError(f"{what}: {decay_only(scheme.method)}")
            quantized = True
            static = o.node in found.static
            sample = None if static else axis_of(o.node)
            axis = sample if config.statistics == "sample" else None
            # A value whose storage is written later may differ from one reader to the next: no sharing.
            alone = site.node if o.node.meta.get("storage") in written else None
            key = (o.node, scheme, axis, alone)
            name = f"{site.name}.{o.name}" if site.kind == "scan" else f"{site.name}:{o.name}"
            what = "static" if static else "activation"
            point = points.setdefault(key, Point(name, what, scheme, o.node, axis))
            point.channels = point.channels or _input_channels(model, site, o)
            if site.kind != "scan" and not point.position_axes:
                own = None if point.channels is None else point.channels[0]
                point.position_axes = _position_axes(site, o, sample, own)
            point.uses.append((site, o))
        if not quantized:
            floats[site.name] = "bits=None"
    if config.smooth:
        _pair_up(model, list(points.values()), behind_norms=config.smooth_weights)
    # A tied weight has one quantizer, an operand of several sites too; every point's name must be its own.
    assert len({p.name for p in points.values()}) == len(points), "quantizer names collide"
    parameters = [p for p in found.floats if p.name]
    if check:
        _check_coverage(config, used, parameters, found.sites, floats)
    return Plan(list(points.values()), floats, parameters, found.sites)


def _sums_over_axis_1(model: nn.Module, site: Site) -> bool:
    """Whether it is a projection or a convolution whose weight, as it is stored, has inputs in axis 1."""
    if site.kind not in ("linear", "conv") or "transpose" in op_name(site.node):
        return False
    if site.weight is None:
        mod = model.get_submodule(site.module)
        return not isinstance(mod, _ConvTransposeNd) and getattr(mod, "groups", 1) == 1
    groups = site.node.kwargs.get("groups", site.node.args[6] if len(site.node.args) > 6 else 1)
    return site.weight.node is site.parameter_node and bool(groups == 1)


def _pair_up(model: nn.Module, points: list[Point], *, behind_norms: bool) -> None:
    """Factors of channels for inputs that go to quantized weights alone, and these to no other input.

    The low-rank projections of a scan have none, as their input is the scan's, too, nor what reads a scan, where a gate
    stands between: one kernel does all of it. (In MambaIR it would make no difference to that input's error.)
    ``behind_norms``: what comes from a norm has factors all the same, as in_proj's input where its gate goes to a scan
    (Vim); the norm takes them.
    """
    weights = {id(site): p for p in points if p.what == "weight" for site, _ in p.uses}
    for p in points:
        if p.what != "activation" or p.channels is None or get_quantizer(p.scheme.method).dynamic:
            continue
        sites = [site for site, _ in p.uses]
        readers = [weights.get(id(site)) for site in sites]
        normed = behind_norms and p.node.op == "call_module"
        normed = normed and isinstance(model.get_submodule(str(p.node.target)), (nn.LayerNorm, nn.RMSNorm))
        near_scan = any(site.reads_scan or (site.feeds_scan and not normed) for site in sites)
        if near_scan or not all(_sums_over_axis_1(model, site) for site in sites):
            continue
        own = {id(site) for site in sites}
        pairs = [w for w in readers if w is not None and own.issuperset(id(site) for site, _ in w.uses)]
        if len(pairs) == len(sites):
            for one in (p, *pairs):
                one.gain = p.key


def _check_coverage(
    config: QConfig,
    used: set[int],
    parameters: list[FloatParameter],
    sites: list[Site],
    floats: dict[str, str],
) -> None:
    problems = []
    for i, rule in enumerate(config.all_rules()):
        if i not in used:
            hit = [p.name for p in parameters if rule.precedence(_names(p), (), ()) is not None]
            if rule.keep_float and hit:
                continue
            if hit:
                problems.append(
                    f"rule {rule.match!r} matches {hit[0]}, which is no site ({_why(parameters, hit[0])})"
                )
            else:
                near = ", ".join(s.name for s in sites[:4])
                problems.append(f"rule {rule.match!r} matches no site; there are: {near or 'none'}")
    kept = [r for r in config.all_rules() if r.keep_float]
    wanted = config.w_bits is not None or config.a_bits is not None
    for p in parameters:
        if p.must_cover and wanted:
            if not any(r.precedence(_names(p), (), ()) is not None for r in kept):
                problems.append(f"parameter {p.name} {p.reason} at {p.where}, which no quantizer covers")
    if problems:
        raise CoverageError(
            "\n".join(problems)
            + "\nKeep such a parameter in float on purpose with QConfig(keep_float=['its name']), or correct the rule."
        )


def _names(p: FloatParameter) -> tuple[str, ...]:
    """A parameter's own name and those of the modules around it."""
    parts = p.name.split(".")
    return tuple(".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _why(parameters: list[FloatParameter], name: str) -> str:
    return next((p.reason for p in parameters if p.name == name), "")
