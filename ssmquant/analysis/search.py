"""Mixed precision: the bit width of every site, under the budget of a uniform model."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ssmquant.analysis.knapsack import allocate
from ssmquant.analysis.sensitivity import BITS, Loss, Sensitivity, check_bits, require_calibrated, sensitivity
from ssmquant.analysis.summary import bit_operations, operands_of, site_widths, stored_shape
from ssmquant.analysis.widths import Unit, units_of
from ssmquant.config import QConfig, Rule
from ssmquant.errors import ConfigError
from ssmquant.graph.plan import Point
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.graph.sites import Site
from ssmquant.pack import packed_size
from ssmquant.quantizers import Quantizer
from ssmquant.workflow import ensure_traced

__all__ = ["search"]


def search(
    prepared: nn.Module,
    batches_or_sensitivity: Iterable[Any] | Sensitivity,
    *,
    effective_bits: float = 3.0,
    bits: Sequence[int] | None = None,
    loss: Loss = "auto",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> QConfig:
    """Chooses a bit width for every site: the least loss at no more than a uniform model's cost.

    A uniform model of ``effective_bits`` has all quantized operands at that width (between two whole widths its bytes
    are interpolated). The result takes no more bytes of codes (of weights and of static operands of scans) and no more
    bit operations (as :func:`ssmquant.summary` counts them: bits of the weight times bits of the input times
    multiply-accumulates; of a scan, bits of its operands). The loss that is minimised is the sum of the sites' losses
    in a :class:`Sensitivity`, each made non-increasing in the width. At most 2048 partial choices are followed, by
    their Lagrangian bounds, so the sum is the least there is for small models and close to it for large ones.

    A weight and its input share a width, and so do the operands of a scan, and sites that read one weight. Sites in
    float stay so. A rule of the user that sets ``w_bits`` or ``a_bits`` fixes its sites (and a rule for one operand of
    a scan that operand): they count as they are, and what the budget leaves goes to the others. The widths of the
    configuration itself (``w_bits``, ``a_bits``, ``scan_bits``) are what is searched for.

    Args:
        prepared: A prepared, calibrated model; it is not changed.
        batches_or_sensitivity: What :func:`ssmquant.sensitivity` takes or returns, of this model.
        effective_bits: The budget, a number from the smallest width to the greatest (or to what fixed sites need).
        bits: Widths to choose from; all those of the sensitivity, 2, 3, 4 and 8 where it is measured here.
        loss, forward, max_batches, progress: Of the measurement, see :func:`ssmquant.sensitivity`.

    Returns:
        The configuration of ``prepared`` with a rule for each searched site. Prepare the float model with it;
        ``print`` shows it as Python that can be edited.

    Raises:
        NotCalibratedError: ``prepared`` was never calibrated or trained.
        ConfigError: bad widths, a budget that cannot be met (names the span that can), or a sensitivity of another
            model or without these widths.
        CalibrationError: see :func:`ssmquant.sensitivity`.
    """
    runtime = runtime_of(prepared, "prepared")
    given = batches_or_sensitivity
    measured = given.bits if isinstance(given, Sensitivity) else None
    widths = check_bits(bits if bits is not None else measured or BITS)
    e = effective_bits
    if isinstance(e, bool) or not isinstance(e, (int, float)) or not math.isfinite(e):
        raise ConfigError(f"effective_bits={e!r}: expected a number of bits, such as 3.0")
    if measured is not None and not set(widths) <= set(measured):
        raise ConfigError(f"bits={widths}: the sensitivity was measured at {measured}")
    ensure_traced(prepared)
    require_calibrated(runtime)
    costs = _Costs(prepared, runtime.records[0])
    if not costs.free:
        raise ConfigError("search: rules fix every site, or all are in float; there is nothing to choose")
    lowest, highest = costs.needed(widths[0]), max(widths[-1], min(costs.needed(widths[-1]), 8))
    if not lowest <= e <= highest:
        besides = " and what rules fix" if costs.fixes_some() else ""
        span = f"expected {lowest:g} to {highest:g}" if lowest <= highest else "no budget does"
        raise ConfigError(f"effective_bits={e:g} cannot be met with bits={widths}{besides}: {span}")
    if not isinstance(given, Sensitivity):
        given = sensitivity(
            prepared,
            given,
            bits=widths,
            loss=loss,
            forward=forward,
            max_batches=max_batches,
            progress=progress,
        )
    losses = _losses(given, costs, widths)
    size, work = (
        np.array([[cost(u, b) for b in widths] for u in costs.free], dtype=np.int64)
        for cost in (costs.size, costs.work)
    )
    fixed = [u for u in costs.units if u not in costs.free]
    budget = (
        costs.size_budget(e) - sum(costs.size(u, widths[0]) for u in fixed),
        costs.work_budget(e) - sum(costs.work(u, widths[0]) for u in fixed),
    )
    best = allocate(losses, size, work, budget)
    assert best is not None, "the smallest widths fit"
    chosen = {name: widths[k] for u, k in zip(costs.free, best, strict=True) for name in u.sites}
    return replace(runtime.config, rules=_rules(runtime.config, costs, chosen))


def _losses(measured: Sensitivity, costs: _Costs, widths: Sequence[int]) -> Any:
    """Losses of free units, (units, widths), none larger than that of a smaller width."""
    rows = {r.sites: r.loss for r in measured.rows}
    other = sorted({u.sites[0] for u in costs.units if u.sites not in rows})
    if other or len(rows) != len(costs.units):
        raise ConfigError(
            "the sensitivity is of another model or configuration"
            + (f": it does not have {', '.join(other[:3])}" if other else ", with more sites")
        )
    at = [measured.bits.index(b) for b in widths]
    losses = np.array([[rows[u.sites][k] for k in at] for u in costs.free], dtype=np.float64)
    return np.minimum.accumulate(losses, axis=1)


# ---- what a width costs --------------------------------------------------------------------------------------------


class _Costs:
    """Bytes of codes and bit operations of the units of a prepared model, at any widths."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model, self.record = model, record
        self.runtime = runtime_of(model)
        self.units = units_of(record)
        self.operands = operands_of(record)
        self.sites = {s.name: s for s in record.plan.sites}
        self.free = [u for u in self.units if not any(self.fixed(self.sites[n]) for n in u.sites)]
        self.codes = {p.key: self._codes(p) for p in record.plan.points if p.what != "activation"}

    def rule(self, site: Site, operand: str = "") -> Rule | None:
        """The user's rule that decides a site, or one operand of a scan."""
        names = (f"{site.name}.{operand}", site.name) if operand and site.kind == "scan" else (site.name,)
        return self.runtime.config.rule_for(names, site.types, (site.kind,))

    def fixed(self, site: Site, operand: str = "") -> bool:
        """Whether that rule sets a width."""
        r = self.rule(site, operand)
        sets_weight = r is not None and r.w_bits != "inherit" and site.kind != "scan"
        return r is not None and (r.keep_float or r.a_bits != "inherit" or sets_weight)

    def fixes_some(self) -> bool:
        """Whether any rule does."""
        quantized = (self.sites[name] for u in self.units for name in u.sites)
        return any(self.fixed(site, o) for site in quantized for o in self.operands[site.name])

    def _bits(self, unit: Unit, site: Site, bits: float) -> dict[str, float | None]:
        """Widths of a site's quantized operands."""
        free = unit in self.free
        return {
            name: bits if free and not self.fixed(site, name) else point.scheme.bits
            for name, point in self.operands[site.name].items()
        }

    def work(self, unit: Unit, bits: float) -> int:
        """Bit operations at a width; fixed operands keep theirs."""
        return sum(self._work(self.sites[n], self._bits(unit, self.sites[n], bits)) for n in unit.sites)

    def _work(self, site: Site, bits: dict[str, float | None]) -> int:
        return bit_operations(self.model, self.record, site, *site_widths(bits))

    def work_budget(self, bits: float) -> int:
        """Bit operations of a model with all quantized operands at a width."""
        sites = [self.sites[name] for unit in self.units for name in unit.sites]
        return sum(self._work(site, dict.fromkeys(self.operands[site.name], bits)) for site in sites)

    def size(self, unit: Unit, bits: int) -> int:
        """Bytes of codes at a width; fixed operands keep theirs."""
        sizes = {}
        for name in unit.sites:
            widths = self._bits(unit, self.sites[name], bits)
            for operand, p in self.operands[name].items():
                if p.what != "activation":
                    sizes[p.key] = packed_size(self.codes[p.key], int(widths[operand] or 8))
        return sum(sizes.values())

    def size_budget(self, bits: float) -> int:
        """Bytes of codes of a model with all quantized operands at a width."""
        whole = math.floor(bits)
        ends = (whole, min(whole + 1, 8))
        below, above = (sum(packed_size(n, b) for n in self.codes.values()) for b in ends)
        return math.floor(below + (above - below) * (bits - whole))

    def _codes(self, point: Point) -> int:
        holder = self.runtime.weights[point.key]
        assert isinstance(holder, Quantizer)
        return holder.stored(stored_shape(point))[0]

    def needed(self, bits: int) -> float:
        """The smallest budget in bits, to a hundredth, for a width of all that is free; above 8 if none is enough."""
        size = sum(self.size(u, bits) for u in self.units)
        work = sum(self.work(u, bits) for u in self.units)

        def enough(hundredths: int) -> bool:
            e = hundredths / 100
            return self.size_budget(e) >= size and self.work_budget(e) >= work

        return bisect.bisect_left(range(801), True, lo=200, key=enough) / 100


# ---- rules ---------------------------------------------------------------------------------------------------------


def _rules(config: QConfig, costs: _Costs, chosen: dict[str, int]) -> tuple[Rule, ...]:
    """The user's rules, and one of each site's exact name with its width and all else that it had before.

    An exact name speaks louder than any pattern of the user's, and of two rules for it the first one does: so a rule of
    the user's own for that name becomes the site's, and what rules say of one operand of a scan comes in front.
    """
    own = list(config.rules)
    operands: list[Rule] = []
    sites: list[Rule] = []

    def put(made: Rule, before: Rule | None, place: list[Rule]) -> None:
        if before in own and before is not None and before.match == made.match:
            own[own.index(before)] = made
        else:
            place.append(made)

    for name, bits in chosen.items():
        site, points = costs.sites[name], costs.operands[name]
        rule = costs.rule(site)
        made = replace(
            rule or Rule(name),
            match=name,
            w_bits=bits if "weight" in points else "inherit",
            a_bits=bits if set(points) - {"weight"} else "inherit",
        )
        put(made, rule, sites)
        for operand in [o.name for o in site.inputs] if site.kind == "scan" else []:
            special = costs.rule(site, operand)
            if special is not None and special != rule:
                a_bits = special.a_bits if costs.fixed(site, operand) else bits
                put(replace(special, match=f"{name}.{operand}", a_bits=a_bits), special, operands)
    return (*own, *operands, *sites)
