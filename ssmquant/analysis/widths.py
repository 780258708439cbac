"""A copy of a prepared model in which every site can be set to one of several bit widths, or to float, at once.

What is measured at many widths would otherwise be prepared, traced and calibrated as often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ssmquant.analysis.decibels import bounded
from ssmquant.analysis.summary import operands_of
from ssmquant.analysis.verify import Student, Teacher, rng_states, set_rng
from ssmquant.config import QConfig, Rule
from ssmquant.errors import ConfigError
from ssmquant.graph.plan import Plan, Point, module_key
from ssmquant.graph.regions import compile_graph
from ssmquant.graph.rewrite import rewrite
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.progress import limited
from ssmquant.workflow import calibrate, reconfigured

__all__ = ["Unit", "Widths", "at_width", "units_of"]


def at_width(config: QConfig, bits: int) -> QConfig:
    """The configuration with every bit width that is not float, of rules too, replaced."""

    def changed(rule: Rule) -> Rule:
        return replace(
            rule,
            w_bits=bits if isinstance(rule.w_bits, int) else rule.w_bits,
            a_bits=bits if isinstance(rule.a_bits, int) else rule.a_bits,
        )

    return replace(
        config,
        w_bits=None if config.w_bits is None else bits,
        a_bits=None if config.a_bits is None else bits,
        scan_bits=bits if isinstance(config.scan_bits, int) else config.scan_bits,
        rules=tuple(changed(r) for r in config.rules),
    )


@dataclass(frozen=True)
class Unit:
    """Sites of one width: one site, or all those that read one weight (or one static operand of scans)."""

    sites: tuple[str, ...]
    kind: str


def units_of(record: Record) -> list[Unit]:
    """The units of a graph, in its order; sites that are wholly in float are in none."""
    quantized = operands_of(record)
    sites = [s for s in record.plan.sites if s.name in quantized]
    group = {s.name: s.name for s in sites}
    for p in record.plan.points:
        if p.what != "activation":
            tied = {group[site.name] for site, _ in p.uses}
            if len(tied) > 1:
                group = {name: min(tied) if g in tied else g for name, g in group.items()}
    members: dict[str, list[str]] = {}
    for s in sites:
        members.setdefault(group[s.name], []).append(s.name)
    kinds = {s.name: s.kind for s in sites}
    return [Unit(tuple(names), kinds[names[0]]) for names in members.values()]


class _Switch(nn.Module):
    """One value's quantizers, by width; ``bits`` is the one in use, None: the value passes."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: dict[int, Any] = {}  # no children: those of several models
        self.bits: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.bits is None else self.choices[self.bits](x)

    @property
    def gain(self) -> Tensor:
        """Factors of channels, which the graph takes from the weight."""
        if self.bits is None:
            return torch.ones_like(next(iter(self.choices.values())).gain)
        gain: Tensor = self.choices[self.bits].gain
        return gain


@dataclass
class _Switched(Record):
    """A record with a switch for every quantized value of every unit."""

    owner: Widths | None = None
    switches: list[tuple[Unit, _Switch]] = field(default_factory=list)

    def __call__(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        assert self.owner is not None
        return self.owner.called(self, tensors)


class Widths:
    """A calibrated copy of ``prepared`` at each of several widths, as one model.

    Every unit is in float at first. Neither ``prepared`` nor its modules are used or changed later.

    Args:
        prepared: A prepared model.
        batches: Data for the ranges, see :func:`ssmquant.calibrate`.
        bits: The widths. Every operand that ``prepared`` has quantized gets each of them.
        forward: ``forward(model, batch)``, whose result is what is looked at.
        progress: Show a bar while the copies are calibrated.
    """

    def __init__(
        self,
        prepared: nn.Module,
        batches: Sequence[Any],
        bits: Sequence[int],
        forward: Callable[[nn.Module, Any], Any],
        progress: bool | None = False,
    ) -> None:
        def call(model: nn.Module, batch: Any) -> Any:
            """On copies: the user's code may write into what it is given, and each batch is used many times."""
            return forward(model, tree_map_only(Tensor, torch.clone, batch))

        self.batches, self.bits, self.forward = batches, tuple(bits), call
        config = runtime_of(prepared, "prepared").config
        self.found: list[Mapping[str, nn.Module]] = []
        for b in limited(self.bits, None, progress):
            self.model = reconfigured(prepared, at_width(config, b)).eval()
            calibrate(self.model, batches, forward=call, progress=False)
            runtime = runtime_of(self.model)
            self.found.append({**runtime.activations, **runtime.weights})
        self.runtime = runtime
        self.units = units_of(self.runtime.records[0])
        self.unit = {name: u for u in self.units for name in u.sites}
        self.width: dict[Unit, int | None] = dict.fromkeys(self.units)
        self.records: dict[int, tuple[Record, _Switched]] = {}
        self.rng = rng_states(list(self.model.parameters()))
        self.calls = 0
        self.look: Callable[[_Switched, Sequence[Tensor]], Any] = lambda r, tensors: r.run(
            self.model, *tensors
        )
        self.runtime.instead = self._switched

    def set(self, unit: Unit, bits: int | None) -> None:
        """Puts a unit at a width, or in float."""
        self.width[unit] = bits
        for _, record in self.records.values():
            for one, switch in record.switches:
                if one is unit:
                    switch.bits = bits

    def set_all(self, bits: int | None) -> None:
        """Puts all units at a width, or in float."""
        for unit in self.units:
            self.set(unit, bits)

    @torch.no_grad()
    def outputs(self) -> list[Any]:
        """What the model returns for each batch. What it draws at random is the same each time.

        Raises:
            ConfigError: ``forward`` runs another model.
        """
        out = []
        set_rng(self.rng)
        for batch in self.batches:
            before = self.calls
            out.append(self.forward(self.model, batch))
            if self.calls == before:
                raise ConfigError("forward(model, batch) does not call the model that it is given")
        return out

    @torch.no_grad()
    def site_sqnr(self) -> dict[int, dict[str, float]]:
        """For each width and site: SQNR in dB of its output with unquantized inputs, of noise shares averaged."""
        usual = self.look
        self.set_all(None)
        noise: dict[int, dict[str, list[float]]] = {b: {} for b in self.bits}

        def look(record: _Switched, tensors: Sequence[Tensor]) -> Any:
            """One batch may take several calls, so each call is looked at by itself."""
            states = rng_states([*self.model.parameters()])
            teacher = Teacher(self.model, record)
            result = teacher.run(*(t.clone() for t in tensors))
            for b in self.bits:
                self.set_all(b)
                set_rng(states)
                student = Student(self.model, record, teacher.outputs)
                student.run(*(t.clone() for t in tensors))
                for row in student.rows:
                    noise[b].setdefault(row.name, []).append(10 ** (-row.sqnr_db / 10))
            self.set_all(None)
            return result

        self.look = look
        try:
            self.outputs()
        finally:
            self.look = usual
            self.set_all(None)
        return {b: {name: bounded(sum(n) / len(n)) for name, n in rows.items()} for b, rows in noise.items()}

    def called(self, record: _Switched, tensors: Sequence[Tensor]) -> Any:
        """What runs for a call of the model."""
        self.calls += 1
        return self.look(record, tensors)

    def _switched(self, record: Record) -> Record:
        if id(record) not in self.records:
            points: list[Point] = []
            switches: list[tuple[Unit, _Switch]] = []
            for p in record.plan.points:
                for unit in dict.fromkeys(self.unit[s.name] for s, _ in p.uses if s.name in self.unit):
                    one = self._point(p, unit)
                    points.append(one)
                    switches.append((unit, self._switch(p, one, unit)))
            plan = Plan(points, record.plan.floats, record.plan.parameters, record.plan.sites)
            graph = rewrite(self.model, record.trace, plan)
            run, code = compile_graph(graph)
            own = {f.name: getattr(record, f.name) for f in fields(record)}
            own.update(plan=plan, graph=graph, run=run, code=code)
            self.records[id(record)] = record, _Switched(**own, owner=self, switches=switches)
        return self.records[id(record)][1]

    def _point(self, point: Point, unit: Unit) -> Point:
        """What a point is to one unit."""
        mine = [(site, operand) for site, operand in point.uses if site.name in unit.sites]
        mark = f"@{unit.sites[0]}"
        gain = None if point.gain is None else point.gain + module_key(mark)
        return replace(point, name=point.name + mark, uses=mine, gain=gain)

    def _switch(self, point: Point, one: Point, unit: Unit) -> _Switch:
        store = self.runtime.activations if point.what == "activation" else self.runtime.weights
        if one.key not in store:
            switch = _Switch()
            switch.choices = {b: found[point.key] for b, found in zip(self.bits, self.found, strict=True)}
            store[one.key] = switch
        switch = store[one.key]  # type: ignore[assignment]
        switch.bits = self.width[unit]
        return switch
