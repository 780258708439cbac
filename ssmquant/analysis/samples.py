"""What goes through the quantizers of a model, in samples, for a report: health rows, histograms, noise of sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ssmquant.analysis.decibels import sqnr
from ssmquant.analysis.health import (
    HealthRow,
    activations_of,
    numbers_of,
    row_of,
    undisturbed,
    weight_rows,
)
from ssmquant.analysis.histogram import (
    Histogram,
    histogram_of_codes,
    histogram_of_values,
    in_code_units,
)
from ssmquant.analysis.measure import Item, parameters_of, thin
from ssmquant.errors import InputError
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.modules import PackedTensor
from ssmquant.modules.activation import over_gain
from ssmquant.quantizers import PTS, RFA, QTensor, Quantizer, Token
from ssmquant.workflow import call_model

__all__ = ["Measured", "Measurement", "measure_batches", "measure_parameters"]

_MOST = 2**14  # values of a histogram
_RANGE = "levels follow from each call's data"
_SHOWN = {
    "values": "Values, with the levels.",
    "channel": "Values in units of their channel's step.",
    "dls": f"Values in units of the step of their sample or call: {_RANGE}.",
    "token": f"Values in units of the step of their token: {_RANGE}.",
    "pts": "Values in units of the step of their position.",
}


@dataclass(frozen=True)
class Measured:
    """One quantizer: what :func:`ssmquant.health` says of it, and a histogram where there is something to show."""

    row: HealthRow
    histogram: Histogram | None


@dataclass(frozen=True)
class Measurement:
    """What batches brought to light."""

    batches: int
    activations: dict[str, Measured]
    """By quantizer."""
    sites: dict[str, float]
    """SQNR in dB of sites' outputs, prepared models only: of each with its operands quantized, against the same inputs
    and weights unquantized."""
    output: float | None
    """SQNR in dB of the model's output against the reference's."""


# ---- parameters ----------------------------------------------------------------------------------------------------


def measure_parameters(model: nn.Module) -> dict[str, Measured]:
    """Weights and static operands, by quantizer. The model is left as it is."""
    items = parameters_of(model)
    rows = weight_rows(model, items)
    return {item.name: Measured(rows[item.name], _parameter_histogram(item)) for item in items}


@torch.no_grad()
def _parameter_histogram(item: Item) -> Histogram | None:
    if not item.measurable(wait=True):
        return None
    holder = item.holder
    if isinstance(holder, PackedTensor):
        q = holder.qtensor()
        if item.coded:
            return histogram_of_codes(q, _first_level(item.method, q))
        levels = q.levels[:, 0].tolist()
        return histogram_of_values(q.levels[:, 0], levels, "Values that are kept, one for each state.")
    assert isinstance(holder, Quantizer)
    assert item.value is not None
    q = holder.encode(item.value, check=False)
    if not item.coded:
        return histogram_of_values(
            item.value, q.levels[:, 0].tolist(), "Values; all channels share the levels."
        )
    q, x = thin(q, item.value)
    if q.scale.numel() == 1:
        return _of_values(item, x, q)
    return histogram_of_values(in_code_units(q, x), _codes(item, q), _SHOWN["channel"], _thresholds(item))


def _of_values(item: Item, x: Tensor, q: QTensor) -> Histogram | None:
    """Under one scale."""
    levels: list[float] = q.levels[0].double().tolist()
    scale, shift = q.scale.item(), q.shift.item()
    thresholds = [t * scale - shift for t in _thresholds(item)]
    return histogram_of_values(x, levels[_first_level(item.method, q) :], _SHOWN["values"], thresholds)


def _thresholds(item: Item) -> list[float]:
    """Learnt ones, in code units."""
    return item.holder.thresholds().tolist() if isinstance(item.holder, RFA) else []


def _first_level(method: str, q: QTensor) -> int:
    """PACT leaves out the lowest code of signed data, so that 0 is a level."""
    return 1 if method == "pact" and q.code_min < 0 else 0


def _codes(item: Item, q: QTensor) -> list[float]:
    first = _first_level(item.method, q)
    return [float(q.code_min + i) for i in range(first, 2**q.bits)]


# ---- activations ---------------------------------------------------------------------------------------------------
_SUMS = ("zero", "floor", "clipped", "signal", "noise", "blank")


@dataclass(eq=False)
class _Pool(Item):
    """The samples of one activation quantizer in all batches."""

    count: int = 0
    batches: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    used: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)
    step: int = 1
    last: QTensor | None = None

    @property
    def elements(self) -> int:
        return self.count

    def add(self, item: Item, numbers: dict[str, float]) -> None:
        """One batch: FIELDS of ``measure``, and the sample that they are of."""
        assert item.encoded is not None
        q, x = item.encoded
        self.holder, self.last = item.holder, q
        if not math.isfinite(numbers["signal"] + numbers["noise"]):
            raise InputError(f"values or ranges of '{self.name}' are NaN or inf on this batch")
        self.batches += 1
        self.count += x.numel()
        for name, value in numbers.items():
            old = self.numbers.get(name, 0.0)
            if name in _SUMS:
                self.numbers[name] = old + value
            elif name == "scale":
                self.numbers[name] = old + (value - old) / self.batches
            else:
                self.numbers[name] = max(old, value)
        used = torch.bincount(q.codes.reshape(-1).long(), minlength=2**q.bits) > 0
        self.used = used if self.used is None else self.used | used
        self.numbers["used"] = float(self.used.sum())
        self._keep(x if self.kind == "values" else in_code_units(q, x))

    @property
    def kind(self) -> str:
        """What an axis shows, see ``_SHOWN``: ``"values"`` where one scale serves all batches."""
        holder = self.holder
        assert isinstance(holder, Quantizer)
        if isinstance(holder, PTS) and holder.position_axes:
            return "pts"
        if holder.dynamic:
            return "token" if isinstance(holder, Token) else "dls"
        return "values" if holder.num_groups == 1 else "channel"

    def _keep(self, values: Tensor) -> None:
        """Every ``step``-th value of every batch, so that all batches weigh the same."""
        self.kept.append(values.reshape(-1)[:: self.step].float().cpu())
        while sum(t.numel() for t in self.kept) > _MOST:
            self.kept = [t[::2] for t in self.kept]
            self.step *= 2

    def measured(self) -> Measured:
        assert self.last is not None
        values, q = torch.cat(self.kept), self.last
        if self.kind == "values":
            histogram = _of_values(self, values, q)
        else:
            histogram = histogram_of_values(values, _codes(self, q), _SHOWN[self.kind], _thresholds(self))
        return Measured(row_of(self, self.numbers, {}), histogram)


def measure_batches(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    reference: nn.Module | None,
) -> Measurement:
    """Runs the batches in evaluation mode, everything quantized; the model and the reference are as before afterwards.

    Raises:
        InputError: there is no batch, or NaN or inf comes to a quantizer (names it); the reference's output differs in
            shape.
        NotCalibratedError: the ranges of activations are not known yet.
    """
    pools: dict[str, _Pool] = {}
    noise: dict[str, list[float]] = {}
    output = [0.0, 0.0]
    n = 0
    with _comparing_sites(model, noise):
        for batch in batches:
            results: list[Any] = []

            def passed(m: nn.Module, b: Any, results: list[Any] = results) -> None:
                results.append((forward or call_model)(m, b))

            items = activations_of(model, batch, passed, finite=True)
            numbers = numbers_of(items)
            for item in items:
                if item.name not in pools:
                    own = {
                        k: getattr(item, k)
                        for k in ("name", "what", "match", "bits", "holder", "coded", "method")
                    }
                    pools[item.name] = _Pool(**own)
                if item.name in numbers:
                    pools[item.name].add(item, dict(numbers[item.name]))
            if reference is not None:
                _compare(results[0], _reference(reference, batch, forward, runtime_of(model).method), output)
            n += 1
    if n == 0:
        raise InputError(
            "report: there was no batch; pass a list, not a used-up iterator, or leave batches out"
        )
    if runtime_of(model).activations and not pools:
        raise InputError("report: the batches reached no quantizer (are they empty?)")
    measured = {name: p.measured() for name, p in pools.items() if p.count}
    sites = {name: sqnr(signal, error) for name, (signal, error) in noise.items()}
    return Measurement(n, measured, sites, None if reference is None else sqnr(output[0], output[1]))


def _reference(
    reference: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None, method: str
) -> Any:
    with undisturbed(reference):
        return forward(reference, batch) if forward is not None else call_model(reference, batch, method)


def _compare(out: Any, reference: Any, sums: list[float]) -> None:
    """Adds signal and noise of all floating-point tensors of two results."""
    pairs = [
        [t for t in tree_leaves(r) if isinstance(t, Tensor) and t.is_floating_point()]
        for r in (out, reference)
    ]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        raise InputError(
            "report: the reference returns other shapes than the model: is it the float model of this one?"
        )
    for a, b in zip(*pairs, strict=True):
        b = b.double()
        sums[0] += b.square().sum().item()
        sums[1] += (a.double().to(b.device) - b).square().sum().item()


# ---- outputs of sites ----------------------------------------------------------------------------------------------


@contextmanager
def _comparing_sites(model: nn.Module, noise: dict[str, list[float]]) -> Iterator[None]:
    """Within, every call of a prepared model adds signal and noise of its sites' outputs."""
    runtime = runtime_of(model)
    if runtime.stage != "prepared":
        yield
        return

    def watch(record: Record) -> Record:
        sites = _Sites(model, record, noise)
        return replace(record, run=lambda _, *tensors: sites.run(*tensors))

    runtime.instead = watch
    try:
        yield
    finally:
        runtime.instead = None


class _Sites(fx.Interpreter):
    """Runs a prepared graph, and every site a second time on what its quantizers were given."""

    def __init__(self, model: nn.Module, record: Record, noise: dict[str, list[float]]) -> None:
        super().__init__(model, graph=record.graph)
        self.extra_traceback = False
        self.noise = noise
        self.plain: dict[fx.Node, Any] = {}
        """Values of nodes as they would be without the quantizers in front of them."""
        self.written = any("mutates" in n.meta for n in record.graph.nodes)

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.target is over_gain or (n.op == "call_module" and "point" in n.meta):
            source = n.all_input_nodes[0]
            value = self.plain.get(source, self.env[source])
            self.plain[n] = value.clone() if self.written and isinstance(value, Tensor) else value
        elif n.op in ("call_function", "call_method") and any(a in self.plain for a in n.all_input_nodes):
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: self.plain.get(a, self.env[a]))
            value = getattr(self, n.op)(n.target, args, kwargs)
            if "site" in n.meta:
                self._add(n.meta["site"], out, value)
            else:
                self.plain[n] = value
        for done in self.user_to_last_uses.get(n, ()):
            self.plain.pop(done, None)
        return out

    def _add(self, site: str, out: Any, value: Any) -> None:
        y, x = (t if isinstance(t, Tensor) else t[0] for t in (out, value))
        sums = self.noise.setdefault(site, [0.0, 0.0])
        sums[0] += x.double().square().sum().item()
        sums[1] += (y.double() - x.double()).square().sum().item()
