"""Scales of channels that cost nothing, or next to it: where they can go, found by the structure around scans.

============  ==========================================================  =============================================
kind          the channels divided by s                                   what makes up for it
============  ==========================================================  =============================================
conv_input    a projection's outputs that only convolutions read          the convolutions' taps (MambaQuant's S7)
scan_input    a scan's u: the projection in front of its SiLU, which       columns of what reads u; the scan is linear
              becomes ``x * sigmoid(s * x)``                              in u, so columns of what reads y (S2, S3), or
                                                                          one product in front of a norm
gate          a norm's outputs, through gates, to projections             their columns (S2 where a norm comes first)
state         the B of a scan                                             its C (S4; A needs no change)
============  ==========================================================  =============================================

Source: MambaQuant (arXiv 2501.13484), section 4.3; "S-SiLU" there is the identity
``silu(s x) / s == x * sigmoid(s x)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.sites import op_name
from ssmquant.graph.transforms.candidates import Place, Scale, Scaled, Skipped, View
from ssmquant.graph.transforms.flow import Flow, follow, name_of, shape, uses_last_state
from ssmquant.graph.transforms.projections import Projection, Unsuitable

__all__ = ["conv_inputs", "gates", "scan_inputs", "states"]

Found = tuple[list[Scale], list[Skipped]]


def _ids(count: int, rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """-1 everywhere but at ``rows``, which get ``ids`` (0, 1, ..)."""
    out = torch.full((count,), -1)
    out[rows] = torch.arange(len(rows)) if ids is None else ids
    return out


def _outputs(p: Projection) -> int:
    return p.groups[0] * p.groups[1]


# ---- convolutions ---------------------------------------------------------------------------------------------------


def conv_inputs(view: View) -> Found:
    """Projections whose outputs convolutions alone read."""
    found: list[Scale] = []
    skipped: list[Skipped] = []
    for p in view.projections.values():
        flow = view.flow(p)
        convs = [(r, o) for r, o in flow.readers if r in view.sites and view.sites[r].kind == "conv"]
        if not convs:
            continue
        try:
            found.append(_conv_input(view, p, flow, convs))
        except Unsuitable as e:
            skipped.append(Skipped("conv_input", p.site.name, str(e)))
    return found, skipped


def _conv_input(view: View, p: Projection, flow: Flow, convs: list[tuple[fx.Node, fx.Node]]) -> Scale:
    maps = []
    for reader, operand in convs:
        maps.append((_projection(view, reader), flow.of(operand)))
    rows = torch.cat([c.input_map(labels) for c, labels in maps]).unique()
    _only(view, flow, rows, [r for r, _ in convs])
    number = _ids(_outputs(p), rows)
    ends = [Scaled(p, True, number, -1)]
    ends += [Scaled(c, False, number[c.input_map(labels)], 1) for c, labels in maps]
    watch = [(operand, number[flow.of(operand)]) for _, operand in convs]
    return Scale("conv_input", p.site.name, watch=watch, size=len(rows), ends=ends)


def _projection(view: View, node: fx.Node) -> Projection:
    if node not in view.projections:
        raise Unsuitable(
            view.unsuitable.get(node, f"{name_of(view.model, node)} reads it, which is no projection")
        )
    return view.projections[node]


def _only(view: View, flow: Flow, rows: Tensor, allowed: list[fx.Node]) -> None:
    for reader in flow.readers_of(rows):
        if reader not in allowed:
            raise Unsuitable(f"{name_of(view.model, reader)} reads these channels too")


# ---- the input of a scan --------------------------------------------------------------------------------------------


def is_silu(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a SiLU."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.SiLU
    return op_name(node) == "silu"


class _Activated:
    """A projection whose outputs one SiLU alone reads, all of them, in order along one axis."""

    def __init__(self, view: View, p: Projection, silu: fx.Node) -> None:
        flow = view.flow(p)
        self.p, self.silu = p, silu
        operand = next(o for r, o in flow.readers if r is silu)
        if len(flow.readers) != 1:
            raise Unsuitable(f"more than its SiLU reads '{p.site.name}'")
        self.labels = flow.of(operand)
        if not torch.equal(self.labels.reshape(-1), torch.arange(_outputs(p))):
            raise Unsuitable(f"the SiLU of '{p.site.name}' reads its channels in another order")


def scan_inputs(view: View) -> Found:
    """Scans whose u is the SiLU of a projection (a convolution, as a rule)."""
    found: list[Scale] = []
    skipped: list[Skipped] = []
    starts: dict[fx.Node, _Activated] = {}
    reasons: dict[fx.Node, str] = {}
    for p in view.projections.values():
        for reader, _ in view.flow(p).readers:
            if is_silu(view.model, reader):
                try:
                    starts[reader] = _Activated(view, p, reader)
                except Unsuitable as e:
                    reasons[reader] = str(e)
    flows = {silu: _follow(view, {silu: a}) for silu, a in starts.items()}
    done: set[fx.Node] = set()
    served: set[str] = set()
    for silu, a in starts.items():
        reached = [s for s in view.scans if s.node in flows[silu].labels]
        if silu in done or not reached:
            continue
        try:
            group = _group(view, silu, starts, flows)
            done |= group.keys()
            reached = [s for s in view.scans if any(s.node in flows[g].labels for g in group)]
            found.append(_scan_input(view, group))
        except Unsuitable as e:
            done.add(silu)
            skipped.append(Skipped("scan_input", a.p.site.name, str(e)))
        served |= {s.name for s in reached}
    for scan in view.scans:
        if scan.name not in served:
            why = next(iter(reasons.values()), "its u is not the SiLU of a projection alone")
            if uses_last_state(scan.node):
                why = "its last state is used, which is linear in u, too"
            kind = "" if scan.role is None or scan.role.kind == "s6" else "a Mamba-2 scan; "
            skipped.append(Skipped("scan_input", scan.name, kind + why))
    return found, skipped


def _follow(view: View, group: dict[fx.Node, _Activated]) -> Flow:
    starts = {silu: a.labels for silu, a in group.items()}
    return follow(view.places, starts, scans=view.scans, gates=True)


def _group(
    view: View, silu: fx.Node, starts: dict[fx.Node, _Activated], flows: dict[fx.Node, Flow]
) -> dict[fx.Node, _Activated]:
    """The SiLUs whose scans are added up: they share factors."""
    group = {silu: starts[silu]}
    while True:
        flow = _follow(view, group)
        more = None
        for reader, operand in flow.readers:
            if op_name(reader) in ("add", "iadd"):
                others = [i for i in reader.all_input_nodes if i is not operand]
                more = next(
                    (s for s in starts if s not in group and any(i in flows[s].labels for i in others)), None
                )
                if more is None or starts[more].labels.shape != starts[silu].labels.shape:
                    raise Unsuitable(
                        "the scan's output is added to something that does not come from a scan's SiLU"
                    )
                break
        if more is None:
            return group
        group[more] = starts[more]


def _scan_input(view: View, group: dict[fx.Node, _Activated]) -> Scale:
    flow = _follow(view, group)
    first = next(iter(group.values()))
    size = _outputs(first.p)
    ends = [Scaled(a.p, True, torch.arange(size), -1) for a in group.values()]
    places = [Place("smooth_silu", silu, None, a.labels) for silu, a in group.items()]
    for reader, operand in flow.readers:
        labels = flow.of(operand)
        if reader in view.projections:
            p = view.projections[reader]
            ends.append(Scaled(p, False, p.input_map(labels), 1))
        elif _is_norm(view.model, reader) and reader.args and reader.args[0] is operand:
            places.append(Place("times", reader, operand, labels))
        else:
            raise Unsuitable(
                view.unsuitable.get(reader, f"{name_of(view.model, reader)} reads what depends on it")
            )
    watch = [(silu, a.labels) for silu, a in group.items()]
    return Scale("scan_input", first.p.site.name, places, watch, size=size, ends=ends)


def _is_norm(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    return op_name(node) in ("layer_norm", "rms_norm", "group_norm")


# ---- norms and gates ------------------------------------------------------------------------------------------------


def gates(view: View) -> Found:
    """Norms behind a scan, whose outputs reach projections alone, through gates or directly."""
    found: list[Scale] = []
    skipped: list[Skipped] = []
    for node in view.graph.nodes:
        norm = view.norm(node)
        if norm is None:
            continue
        size = shape(node)
        assert size is not None
        labels = torch.arange(norm.channels).reshape((1,) * (len(size) - 1) + (-1,))
        flow = follow(view.places, {node: labels}, gates=True)
        sites = [view.sites[r] for r, _ in flow.readers if r in view.sites]
        if not any(s.reads_scan for s in sites):
            continue
        try:
            ends = []
            for reader, operand in flow.readers:
                p = _projection(view, reader)
                ends.append(Scaled(p, False, p.input_map(flow.of(operand)), 1))
            watch = [(operand, flow.of(operand)) for _, operand in flow.readers]
            found.append(Scale("gate", norm.name, [], watch, size=norm.channels, ends=ends, norms=[norm]))
        except Unsuitable as e:
            skipped.append(Skipped("gate", norm.name, str(e)))
    return found, skipped


# ---- states ---------------------------------------------------------------------------------------------------------


def states(view: View) -> Found:
    """Scans whose B and C are outputs of projections."""
    found: list[Scale] = []
    skipped: list[Skipped] = []
    for scan in view.scans:
        try:
            if scan.role is None or scan.role.kind != "s6":
                raise Unsuitable("a Mamba-2 scan")
            if uses_last_state(scan.node):
                raise Unsuitable("its last state is used")
            ends, watch, sizes = [], [], []
            for name, power in (("B", -1), ("C", 1)):
                node = scan.scan.get(name)
                if not isinstance(node, fx.Node):
                    raise Unsuitable(f"no {name}")
                p, flow = _source(view, node, name)
                labels = flow.of(node)
                if labels.dim() not in (3, 4) or labels.shape[0] != 1 or labels.shape[-1] != 1:
                    raise Unsuitable(f"{name} is not laid out as (batch, groups, states, positions)")
                rows = labels.reshape(-1)
                if rows.unique().numel() != rows.numel() or min(rows.tolist()) < 0:
                    raise Unsuitable(f"outputs of '{p.site.name}' are used more than once in {name}")
                _only(view, flow, rows, [scan.node])
                ids = torch.arange(rows.numel()).reshape(labels.shape)
                ends.append(Scaled(p, True, _ids(_outputs(p), rows), power))
                watch.append((node, ids))
                sizes.append(rows.numel())
            if sizes[0] != sizes[1]:
                raise Unsuitable("B and C have different groups")
            if scan.scan["B"] is scan.scan["C"]:
                raise Unsuitable("B and C are the same value")
            found.append(Scale("state", scan.name, watch=watch, size=sizes[0], ends=ends))
        except Unsuitable as e:
            skipped.append(Skipped("state", scan.name, str(e)))
    return found, skipped


def _source(view: View, node: fx.Node, name: str) -> tuple[Projection, Flow]:
    for p in view.projections.values():
        flow = view.flow(p)
        if isinstance(flow.labels.get(node), Tensor):
            return p, flow
    raise Unsuitable(f"{name} does not come from a projection by moves alone")
