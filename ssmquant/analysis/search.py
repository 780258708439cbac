"""Mixed precision: the bit width of every site, under the budget of a uniform model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    float stay so. A rule of the user that sets ``w_bits`` or ``a_bits`` fixes its sites (and a rule for one operand of a
    scan that operand): they count as they are, and what the budget leaves goes to the others. The widths of the
    configuration itself (``w_bits``, ``a_bits``, ``scan_bits``) are what is searched for.

    Args:
        prepared: A prepared, calibrated model; it is not changed.
        batches_or_sensitivity: What :func:`ssmquant.sensitivity` takes or returns, of this model.
        effective_bits: The budget, a number from the smallest width to the greatest.
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
    measured = batches_or_sensitivity if isinstance(batches_or_sensitivity, Sensitivity) else None
    widths = check_bits(bits if bits is not None else measured.bits if measured else BITS)
    e = effective_bits
    if isinstance(e, bool) or not isinstance(e, (int, float)) or not math.isfinite(e):
        raise ConfigError(f"effective_bits={e!r}: expected a number of bits, such as 3.0")
    if measured is not None and not set(widths) <= set(measured.bits):
        raise ConfigError(f"bits={widths}: the sensitivity was measured at {measured.bits}")
    ensure_traced(prepared)
    require_calibrated(runtime)
    costs = _Costs(prepared, runtime.records[0])
    lowest = costs.lowest(widths)
    if not lowest <= e <= widths[-1]:
        raise ConfigError(
            f"effective_bits={e:g} cannot be met with bits={widths}" + " and what rules fix" * costs.fixes_some
            + f": expected {lowest:g} to {widths[-1]}"
        )  # fmt: skip
    if measured is None:
        measured = sensitivity(
            prepared, batches_or_sensitivity, bits=widths, loss=loss, forward=forward, max_batches=max_batches,
            progress=progress,
        )  # fmt: skip
    losses = _losses(measured, costs.units, widths)
    free = [i for i, unit in enumerate(costs.units) if costs.free(unit)]
    chosen: dict[str, int] = {}
    if free:
        size, work = (
            np.array([[cost(costs.units[i], b) for b in widths] for i in free], dtype=np.int64)
            for cost in (costs.size, costs.work)
        )
        fixed = [costs.units[i] for i in range(len(costs.units)) if i not in free]
        budget = (
            costs.size_budget(e) - sum(costs.size(u, widths[0]) for u in fixed),
            costs.work_budget(e) - sum(costs.work(u, widths[0]) for u in fixed),
        )
        best = allocate(losses[free], size, work, budget)
        assert best is not None, "the smallest widths fit"
        chosen = {name: widths[k] for i, k in zip(free, best, strict=True) for name in costs.units[i].sites}
    return replace(runtime.config, rules=_rules(runtime.config, costs, chosen))


def _losses(measured: Sensitivity, units: Sequence[Unit], widths: Sequence[int]) -> Any:
    """Losses (units, widths), none larger than that of a smaller width."""
    rows = {r.sites: r for r in measured.rows}
    if {u.sites for u in units} != set(rows):
        other = sorted({u.sites[0] for u in units} ^ {s[0] for s in rows})
        raise ConfigError(
            f"the sensitivity is of another model or configuration: it differs at {', '.join(other[:3])}"
        )
    at = [measured.bits.index(b) for b in widths]
    losses = np.array([[rows[u.sites].loss[k] for k in at] for u in units], dtype=np.float64)
    return np.minimum.accumulate(losses.reshape(len(units), len(widths)), axis=1)


# ---- what a width costs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decided:
    """The user's rule for a site or for one operand of a scan."""

    rule: Rule | None

    @property
    def fixed(self) -> bool:
        r = self.rule
        return r is not None and (r.keep_float or r.w_bits != "inherit" or r.a_bits != "inherit")


class _Costs:
    """Bytes of codes and bit operations of the units of a prepared model, at any widths."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model, self.record = model, record
        self.runtime = runtime_of(model)
        self.units = units_of(record)
        self.operands = operands_of(record)
        self.sites = {s.name: s for s in record.plan.sites}

    def decided(self, site: Site, operand: str = "") -> _Decided:
        """What the configuration has for a site, or for an operand of it."""
        names = (f"{site.name}.{operand}", site.name) if operand and site.kind == "scan" else (site.name,)
        return _Decided(self.runtime.config.rule_for(names, site.types, (site.kind,)))

    def free(self, unit: Unit) -> bool:
        """Whether its width may be chosen."""
        return not any(self.decided(self.sites[name]).fixed for name in unit.sites)

    @property
    def fixes_some(self) -> bool:
        """Whether rules fix any width."""
        return any(
            self.decided(self.sites[name], o).fixed for u in self.units for name in u.sites for o in self.operands[name]
        )

    def _bits(self, unit: Unit, site: Site, bits: float | None) -> dict[str, float | None]:
        """Widths of a site's quantized operands; ``bits=None``: as the configuration has them."""
        out: dict[str, float | None] = {}
        for name, point in self.operands[site.name].items():
            fixed = bits is None or not self.free(unit) or self.decided(site, name).fixed
            out[name] = point.scheme.bits if fixed else bits
        return out

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
        total, done = 0, set()
        for name in unit.sites:
            widths = self._bits(unit, self.sites[name], bits)
            for operand, p in self.operands[name].items():
                if p.what != "activation" and p.key not in done:
                    done.add(p.key)
                    b = widths[operand]
                    assert isinstance(b, int)
                    total += packed_size(self._codes(p), b)
        return total

    def size_budget(self, bits: float) -> int:
        """Bytes of codes of a model with all quantized operands at a width."""
        whole = math.floor(bits)
        points = [p for p in self.record.plan.points if p.what != "activation"]
        below, above = (
            sum(packed_size(self._codes(p), b) for p in points) for b in (whole, min(whole + 1, 8))
        )
        return math.floor(below + (above - below) * (bits - whole))

    def _codes(self, point: Point) -> int:
        holder = self.runtime.weights[point.key]
        assert isinstance(holder, Quantizer)
        return holder.stored(stored_shape(point))[0]

    def lowest(self, widths: Sequence[int]) -> float:
        """The smallest budget in bits, to a hundredth, that the smallest widths meet."""
        size = sum(self.size(u, widths[0]) for u in self.units)
        work = sum(self.work(u, widths[0]) for u in self.units)
        for hundredths in range(100 * widths[0], 801):
            e = hundredths / 100
            if self.size_budget(e) >= size and self.work_budget(e) >= work:
                return e
        return 8.01


# ---- rules ---------------------------------------------------------------------------------------------------------


def _rules(config: QConfig, costs: _Costs, chosen: dict[str, int]) -> tuple[Rule, ...]:
    """The user's rules, and one of each site's exact name with its width and all else that it had before.

    An exact name speaks louder than any pattern of the user's, and of two rules for it the first one: so a rule of the
    user's own for that name becomes the site's, and what other rules say of one operand of a scan comes in front.
    """
    own = list(config.rules)
    operands: list[Rule] = []
    sites: list[Rule] = []
    for name, bits in chosen.items():
        site, points = costs.sites[name], costs.operands[name]
        before = costs.decided(site).rule
        made = replace(
            before or Rule(name),
            match=name,
            w_bits=bits if "weight" in points else "inherit",
            a_bits=bits if set(points) - {"weight"} else "inherit",
        )
        for operand in [o.name for o in site.inputs] if site.kind == "scan" else []:
            decided = costs.decided(site, operand)
            exact = f"{name}.{operand}"
            if decided.rule is None or decided.rule == before or decided.rule in own and decided.rule.match == exact:
                if decided.rule is not None and decided.rule.match == exact and not decided.fixed:
                    own[own.index(decided.rule)] = replace(decided.rule, a_bits=bits)
                continue
            rule = replace(decided.rule, match=exact)
            operands.append(rule if decided.fixed else replace(rule, a_bits=bits))
        if before is not None and before.match == name:
            own[own.index(before)] = made
        else:
            sites.append(made)
    return (*own, *operands, *sites)
