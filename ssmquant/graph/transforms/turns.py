"""Rotations: of the low-rank input of step sizes (free), of what out_proj reads (one transform at run time).

Source: MambaQuant (arXiv 2501.13484), section 4.2: R5 and R2 in its code; the mean shift is its ``reduce_mean``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.sites import Site, ancestors
from ssmquant.graph.transforms.candidates import Candidate, Place, Skipped, View
from ssmquant.graph.transforms.flow import name_of
from ssmquant.graph.transforms.projections import (
    Projection,
    Unsuitable,
    has_parameter,
    parameter_index,
    scatter,
)

__all__ = ["LowRank", "OutRotation", "low_ranks", "out_rotations"]


@dataclass
class LowRank(Candidate):
    """The low-rank value x between two projections of step sizes becomes ``matrix @ (x - mean)``, group by group.

    ``rows`` (g, r): the outputs of ``source`` that are the inputs of ``sink``. ``bias``: a parameter's name, its
    elements that belong to the outputs of ``sink`` (g * o,), None where nothing can take the mean.
    """

    source: Projection = field(kw_only=True)
    sink: Projection = field(kw_only=True)
    rows: Tensor = field(kw_only=True)
    bias: tuple[str, Tensor] | None = field(kw_only=True)

    @property
    def groups(self) -> int:
        return int(self.rows.shape[0])

    @property
    def rank(self) -> int:
        return int(self.rows.shape[1])

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.source.identity, self.sink.identity, self.rows, self.bias

    @property
    def touched(self) -> set[str]:
        return {*self.source.touched, self.sink.parameter, *([] if self.bias is None else [self.bias[0]])}

    @torch.no_grad()
    def fold(self, model: nn.Module, matrix: Tensor, mean: Tensor | None = None) -> dict[str, Tensor]:
        """Changes the weights; returns tensors for the places, by key.

        Args:
            model: The traced model, changed in place.
            matrix: (g, r, r), invertible.
            mean: (g, r), of x.
        """
        matrix = matrix.detach().cpu().double()
        if matrix.shape != (self.groups, self.rank, self.rank):
            raise ValueError(f"{self.key}: expected matrices {(self.groups, self.rank, self.rank)}")
        if mean is not None:
            if self.bias is None:
                raise ValueError(f"{self.key}: no bias takes the mean")
            mean = mean.detach().cpu().double()
            w = self.sink.read(model)[..., 0]
            more = torch.einsum("goi,gi->go", w, mean).reshape(-1)
            name, elements = self.bias
            p = model.get_parameter(name)
            scatter(p, elements, p.detach().cpu().double().reshape(-1)[elements] + more)
        for m, rows in zip(matrix, self.rows, strict=True):
            self.source.turn_outputs(model, m, rows)
        self.sink.turn_inputs(model, matrix)
        if mean is None:
            return {}
        moved = torch.einsum("gij,gj->gi", matrix, mean).reshape(-1)
        return {f"{self.key}#{k}": moved[p.labels] for k, p in enumerate(self.places)}


def low_ranks(view: View) -> tuple[list[LowRank], list[Skipped]]:
    """Pairs of projections that make a scan's step sizes through a low rank."""
    found: list[LowRank] = []
    skipped: list[Skipped] = []
    for scan in view.scans:
        delta = scan.scan.get("delta")
        try:
            if not isinstance(delta, fx.Node):
                raise Unsuitable("no step sizes")
            found.append(_low_rank(view, scan, delta))
        except Unsuitable as e:
            skipped.append(Skipped("dt", scan.name, str(e)))
    return found, skipped


def _low_rank(view: View, scan: Site, delta: fx.Node) -> LowRank:
    sink = next((p for p in view.projections.values() if delta in view.flow(p).labels), None)
    if sink is None:
        raise Unsuitable("its step sizes do not come from a projection by moves alone")
    operand = sink.site.inputs[0].node
    for source in view.projections.values():
        flow = view.flow(source)
        if source is sink or not isinstance(flow.labels.get(operand), Tensor):
            continue
        rows = sink.input_map(flow.of(operand)).reshape(sink.groups[0], sink.groups[2])
        if rows.unique().numel() != rows.numel():
            raise Unsuitable(f"'{sink.site.name}' reads outputs of '{source.site.name}' more than once")
        for reader in flow.readers_of(rows):
            if reader is not sink.site.node:
                raise Unsuitable(f"{name_of(view.model, reader)} reads these channels too")
        if sink.read(view.model).shape[3] != 1:
            raise Unsuitable(f"'{sink.site.name}' is a convolution of several taps")
        bias = _step_bias(view, scan, sink, delta)
        labels = torch.arange(rows.numel())[sink.inputs]
        return LowRank(
            "dt",
            scan.name,
            [Place("minus", sink.site.node, operand, labels)],
            moments=[(operand, sink.inputs)],
            source=source,
            sink=sink,
            rows=rows,
            bias=bias,
        )
    raise Unsuitable(f"the input of '{sink.site.name}' does not come from a projection by moves alone")


def _step_bias(view: View, scan: Site, sink: Projection, delta: fx.Node) -> tuple[str, Tensor] | None:
    outputs = sink.groups[0] * sink.groups[1]
    if sink.bias is not None:
        return sink.bias, torch.arange(outputs)
    flow = view.flow(sink)
    node = scan.scan.get("delta_bias")
    if (
        not isinstance(node, fx.Node)
        or node not in view.static
        or flow.readers_of(torch.arange(outputs)) != [scan.node]
    ):
        return None
    roots = [n for n in ancestors(node) if n.op == "get_attr"]
    name = str(roots[0].target) if len(roots) == 1 else ""
    if not name or not has_parameter(view.model, name):
        return None
    if view.readers(name) != {scan.node} or name in view.baked:
        return None
    try:
        index = parameter_index(node, roots[0], tuple(view.model.get_parameter(name).shape)).reshape(-1)
    except Unsuitable:
        return None
    channels = flow.of(delta).reshape(-1)  # which output each channel of delta is
    if channels.numel() != index.numel() or not torch.equal(channels.sort().values, torch.arange(outputs)):
        return None
    elements = torch.empty(outputs, dtype=torch.long)
    elements[channels] = index
    return name, elements


@dataclass
class OutRotation(Candidate):
    """What a projection behind a scan reads, transformed by a Hadamard matrix, and the weight by its inverse."""

    sink: Projection = field(kw_only=True)

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.sink.identity,)

    @property
    def touched(self) -> set[str]:
        return {self.sink.parameter}

    @torch.no_grad()
    def fold(self, model: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        """Changes the weight for inputs ``matrix @ x``; ``matrix`` (i, i) is the one that the place computes with."""
        self.sink.turn_inputs(model, matrix.expand(self.sink.groups[0], -1, -1))
        return {f"{self.key}#0": torch.zeros(0)}


def out_rotations(view: View) -> tuple[list[OutRotation], list[Skipped]]:
    """Projections that read a scan's output, and not a scan's input."""
    found: list[OutRotation] = []
    skipped: list[Skipped] = []
    for node, site in view.sites.items():
        if site.kind == "scan" or not site.reads_scan or site.feeds_scan:
            continue
        if node not in view.projections:
            skipped.append(Skipped("out_rotation", site.name, view.unsuitable[node]))
            continue
        p = view.projections[node]
        axes = [d for d, s in enumerate(p.inputs.shape) if s > 1]
        if p.groups[0] != 1 or len(axes) != 1:
            skipped.append(
                Skipped("out_rotation", site.name, "its inputs come in groups, or along several axes")
            )
            continue
        place = Place("hadamard", node, site.inputs[0].node, p.inputs)
        found.append(OutRotation("out_rotation", site.name, [place], sink=p))
    return found, skipped
