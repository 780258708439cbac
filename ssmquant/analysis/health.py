"""Is every quantizer of a model still at work? Unused levels, collapse to zero, clipping, scales that ran away.

At 2 bits a learnt step size can drive nearly all of a weight to the level next to zero ("zero-ratio collapse"), after
which hardly any gradient is left to bring it back; the loss tells much later. :func:`health` looks at a model once,
:class:`HealthMonitor` watches one in training.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.analysis.decibels import sqnr
from ssmquant.analysis.measure import (
    FIELDS,
    PER_LEVEL,
    Item,
    by_device,
    item_of,
    measure,
    parameters_of,
    points_of,
    thin,
)
from ssmquant.errors import ConfigError, InputError
from ssmquant.graph.runtime import Runtime, is_prepared, runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers import DLS
from ssmquant.workflow import call_model

__all__ = ["HealthMonitor", "HealthReport", "HealthRow", "HealthWarning", "health", "weight_rows"]

ZERO_RATIO = 0.9
"""A weight has collapsed where a larger share of its elements takes the level nearest to zero, though not zero ..."""
ZERO_BITS = 3
"""... at no more bits than these. Or, where no level is zero, ..."""
LOUD = -0.5
"""... where its SQNR is lower than this: a weight of nothing but zeros would do better."""
UNUSED = 0.5
"""Share of the levels that may lie idle, in a tensor of ``PER_LEVEL`` elements a level and as many distinct values."""
CLIPPED = 0.25
"""Share of the elements that may lie beyond the end levels by more than half a step."""
DRIFT = 8.0
"""A learnt scale may become so many times as large, or as small, as it was when first looked at."""
FEW = 64
"""Shares of tensors with fewer elements say nothing."""

_MOST_REPORTS = 512
_SHOWN = 20


class HealthWarning(UserWarning):
    """A quantizer of a model in training is in trouble; the text names it and a remedy."""


# ---- reports -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HealthRow:
    """One quantizer. Where something cannot be known it is None.

    That is everything of a tensor that is empty or of a quantizer that has no range yet, of the packed weights of a
    deployed model what compares with the float values, ``clipped`` and ``sqnr_db``, and of values that take no codes,
    one for each state, all but ``sqnr_db``.
    """

    name: str
    what: str
    """``"weight"``, ``"static"`` (a scan's operand that is made of parameters) or ``"activation"``."""
    bits: int
    elements: int
    """Elements that were looked at."""
    levels_used: int | None
    """Of ``2**bits``: how many codes occur."""
    zero_ratio: float | None
    """Share of the elements whose decoded value is the level nearest to zero, of two equally near ones the lower."""
    clipped: float | None
    """Share of the elements beyond the end levels by more than half a step."""
    scale: float | None
    """Mean magnitude of the step sizes of all groups, in units of the values."""
    drift: float | None
    """``scale`` over what it was when the quantizer of this model (a copy is another) was first looked at."""
    sqnr_db: float | None
    """Signal to quantization noise; inf where the tensor is represented exactly."""
    problems: tuple[tuple[str, str], ...] = ()
    """(kind, sentence) pairs; kinds: ``nan``, ``floor``, ``zero``, ``dead``, ``clipped``, ``drift``."""

    @property
    def dead_levels(self) -> int | None:
        """Unused levels."""
        return None if self.levels_used is None else 2**self.bits - self.levels_used


@dataclass(frozen=True, slots=True)
class HealthReport:
    """All quantizers of a model, in its order. ``print`` it for a table, worst first, and the warnings."""

    rows: tuple[HealthRow, ...]

    @property
    def warnings(self) -> list[str]:
        """Sentences: which quantizer, what is wrong, and a remedy."""
        return [sentence for r in self.rows for _, sentence in r.problems]

    def __str__(self) -> str:
        known = [r for r in self.rows if (r.levels_used, r.sqnr_db) != (None, None)]
        shown = sorted(known, key=_badness)[:_SHOWN]
        width = max([len(r.name) for r in shown] or [9])
        columns = f"{'what':<10}  bits  {'levels':>7}  {'zero':>6}  {'clip':>6}  {'scale':>8}  {'drift':>6}  SQNR dB"
        lines = [f"{'quantizer':<{width}}  {columns}"]
        lines.append("-" * len(lines[0]))
        for r in shown:
            lines.append(
                f"{r.name:<{width}}  {r.what:<10}  {r.bits:>4}  {_used(r):>7}  "
                f"{_percent(r.zero_ratio):>6}  {_percent(r.clipped):>6}  {_number(r.scale, '.2e'):>8}  "
                f"{_number(r.drift, '.2f'):>6}  {_number(r.sqnr_db, '.1f'):>7}"
            )
        if len(known) > len(shown):
            lines.append(f"... and {len(known) - len(shown)} in better health")
        found = self.warnings
        lines.append("-" * len(lines[0]))
        lines.append(f"{len(known)} quantizers, {len(found)} warning{'s' * (len(found) != 1)}")
        lines.extend(f"warning: {w}" for w in found)
        return "\n".join(lines)


_KINDS = ("nan", "floor", "zero", "dead", "clipped", "drift")


def _badness(r: HealthRow) -> tuple[int, float]:
    worst = min((_KINDS.index(kind) for kind, _ in r.problems), default=len(_KINDS))
    decibels = math.inf if r.sqnr_db is None else -math.inf if math.isnan(r.sqnr_db) else r.sqnr_db
    return worst, decibels


def _used(r: HealthRow) -> str:
    return "" if r.levels_used is None else f"{r.levels_used}/{2**r.bits}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- from numbers to rows ------------------------------------------------------------------------------------------

_FIRST: weakref.WeakKeyDictionary[Runtime, dict[str, float]] = weakref.WeakKeyDictionary()
"""The scale of every quantizer when it was first looked at. Not in the module: looking leaves no trace in a model."""

_Numbers = Mapping[str, float]


def _read(items: list[Item], order: list[int], numbers: Tensor) -> dict[str, _Numbers]:
    """Numbers that lie on the host, by the name of the quantizer."""
    rows = numbers.tolist()
    return {items[i].name: dict(zip(FIELDS, row, strict=True)) for i, row in zip(order, rows, strict=True)}


def _report(items: list[Item], numbers: Mapping[str, _Numbers], first: dict[str, float]) -> HealthReport:
    return HealthReport(tuple(row_of(item, numbers.get(item.name), first) for item in items))


def row_of(item: Item, found: _Numbers | None, first: dict[str, float]) -> HealthRow:
    n = item.elements
    if found is None:
        return HealthRow(item.name, item.what, item.bits, n, None, None, None, None, None, None)
    floats = not math.isnan(found["clipped"])  # NaN: codes only
    decibels = sqnr(found["signal"], found["noise"]) if floats else None
    if not item.coded:
        row = HealthRow(item.name, item.what, item.bits, n, None, None, None, None, None, decibels)
        problems = tuple(_broken(row, found))
        return replace(row, problems=problems) if problems else row
    scale = found["scale"]
    if math.isfinite(scale) and scale > 0:
        first.setdefault(item.name, scale)
    start = first.get(item.name)
    clipped = found["clipped"] / n if floats else None
    row = HealthRow(
        item.name, item.what, item.bits, n, int(found["used"]), found["zero"] / n, clipped, scale,
        None if start is None else scale / start, decibels,
    )  # fmt: skip
    problems = tuple(_problems(item, row, found))
    return replace(row, problems=problems) if problems else row


_SLOWER = "lower the quantizers' learning rate (param_groups(quantizer_lr=...))"


def _wider(item: Item) -> str:
    field = "w_bits" if item.what == "weight" else "a_bits"
    if item.bits == 8:
        return f"keep it in float with Rule({item.match!r}, {field}=None)"
    more = 4 if item.bits < 4 else 8
    return f"keep it at {more} bits with Rule({item.match!r}, {field}={more})"


def _other_range(item: Item) -> str:
    """What helps where the levels do not suit the values."""
    if item.what == "weight":
        return f"{_SLOWER}, use granularity='channel', or {_wider(item)}"
    if isinstance(item.holder, DLS) or item.what == "static":
        return f"use another quantizer with Rule({item.match!r}, activation='lsq'), or {_wider(item)}"
    return f"calibrate with such data, {_SLOWER}, or {_wider(item)}"


def _who(row: HealthRow) -> str:
    return f"of '{row.name}' ({row.bits} bits)"


def _broken(row: HealthRow, found: _Numbers) -> Iterator[tuple[str, str]]:
    noise = 0.0 if row.sqnr_db is None else found["signal"] + found["noise"]
    if not math.isfinite(noise + found["scale"]):
        yield (
            "nan",
            f"values or scale {_who(row)} are NaN or inf; go back to a checkpoint from before, lower the learning "
            "rate, or clip gradients",
        )


def _problems(item: Item, row: HealthRow, found: _Numbers) -> Iterator[tuple[str, str]]:
    assert row.levels_used is not None
    assert row.zero_ratio is not None
    broken = tuple(_broken(row, found))
    if broken:
        yield from broken
        return
    n, who = 2**row.bits, _who(row)
    floats, dynamic = row.clipped is not None, isinstance(item.holder, DLS)
    floor = bool(found["floor"]) and not dynamic  # a constant is no trouble for DLS
    if floor:
        yield (
            "floor",
            f"alpha {who} is at its floor in {found['floor']:.0f} group(s), all of whose codes are end codes; "
            f"{_SLOWER}, keep it out of weight decay (as param_groups does), or {_wider(item)}",
        )
    blank = floats and found["blank"] > ZERO_RATIO * row.elements  # pruned, or zero from the start
    judged = row.what == "weight" and row.bits <= ZERO_BITS and row.elements >= FEW and not blank
    to_zero = row.zero_ratio > ZERO_RATIO
    collapsed = judged and (to_zero or (row.sqnr_db is not None and row.sqnr_db < LOUD))
    if collapsed and to_zero:
        yield (
            "zero",
            f"zero ratio {row.zero_ratio:.2f} {who}: zero-ratio collapse; {_other_range(item)}",
        )
    elif collapsed:
        yield (
            "zero",
            f"SQNR {row.sqnr_db:.1f} dB {who}: even the levels nearest to zero are too large for its values; "
            f"{_other_range(item)}",
        )
    # Of a deployed model only codes are known: what is static there may well be constant.
    varied = found["distinct"] >= n if floats else row.what == "weight"
    unused = n - row.levels_used
    if unused > UNUSED * n and varied and row.elements >= PER_LEVEL * n and not collapsed and not blank:
        yield (
            "dead",
            f"{unused} of {n} levels {who} are unused: its steps are too coarse; {_other_range(item)}",
        )
    if row.clipped is not None and row.clipped > CLIPPED and row.elements >= FEW:
        yield (
            "clipped",
            f"{100 * row.clipped:.0f} % of the elements {who} lie beyond its levels: its range is too small; "
            f"{_other_range(item)}",
        )
    if row.drift is not None and not (dynamic or floor or 1 / DRIFT <= row.drift <= DRIFT):
        yield (
            "drift",
            f"the scale {who} is {row.drift:.3g} times what it was when first looked at; {_SLOWER}, or go back to a "
            "checkpoint from before",
        )


# ---- looking once --------------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards modes, buffers and random number generators are as they were."""
    runtime = runtime_of(model) if is_prepared(model) else None
    modes = {m: m.training for m in model.modules()}
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_inference()]
    cuda = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    graphs = None if runtime is None else runtime.graphs
    if runtime is not None:
        runtime.graphs = None  # a replayed graph calls no hooks
    try:
        with torch.random.fork_rng(devices=sorted(d.index or 0 for d in cuda)), torch.no_grad():
            model.eval()
            yield
    finally:
        if runtime is not None:
            runtime.graphs = graphs
        for b, old in buffers:
            # Through data: autograd, which may hold it for a backward pass yet to come, finds it unchanged.
            b.data.copy_(old)
        for m, flag in modes.items():
            m.training = flag


def activations_of(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
    *,
    finite: bool = False,
) -> list[Item]:
    """Activations of one forward pass, in samples. ``finite``: InputError where NaN or inf comes by."""
    runtime = runtime_of(model)
    wanted = {p.name: item_of(p, runtime.activations[p.key]) for _, p in points_of(runtime, ("activation",))}
    found: dict[str, Item] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        assert isinstance(module, ActivationQuantizer)
        item = wanted.get(module.name)
        # A value that several checkpoint regions read comes again: once is enough.
        if item is None or module.name in found or not x.numel() or not module.quantizer.ready:
            return
        if finite and not bool(x.isfinite().all()):
            raise InputError(f"the batch brings NaN or inf to '{module.name}'")
        item.holder = module.quantizer
        x = module.scaled(x.detach())
        item.encoded = thin(module.quantizer.encode(x, check=False), x)
        found[module.name] = item

    hooks = [m.register_forward_pre_hook(look) for m in runtime.activations.values()]
    try:
        with undisturbed(model):
            (forward or call_model)(model, batch)
    finally:
        for h in hooks:
            h.remove()
    return [item for name, item in wanted.items() if name in found]


@torch.no_grad()
def numbers_of(items: list[Item]) -> dict[str, _Numbers]:
    out: dict[str, _Numbers] = {}
    for some in by_device([i for i in items if i.measurable(wait=True)]).values():
        order, numbers = measure(some)
        out |= _read(some, order, numbers.cpu())
    return out


def health(
    prepared: nn.Module,
    batch: Any = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> HealthReport:
    """Looks at every quantizer of a prepared or deployed model. ``print`` the result.

    Weights and static operands are measured from the parameters, or from the packed codes of a deployed model. The
    model is as before afterwards: its mode, buffers, gradients, and the random number generators.

    Args:
        prepared: The model.
        batch: One batch, to measure activations as well: in one forward pass in evaluation mode, from at most 2**14
            elements of each. A tensor is passed as it is, of a tuple or list the first element, a dict as keywords.
        forward: ``forward(model, batch)`` overrides how the batch is passed.

    Raises:
        ConfigError: the model is neither prepared nor deployed, or there is a ``forward`` without a ``batch``.
        InputError: it is not known how to pass the batch.
        NotCalibratedError: with a ``batch``, the ranges of activations are not known yet.
    """
    runtime = runtime_of(prepared)
    if batch is None and forward is not None:
        raise ConfigError("health: forward= needs a batch")
    passed = isinstance(batch, (Tensor, Mapping)) or (isinstance(batch, (tuple, list)) and len(batch) > 0)
    if not (batch is None or passed or forward is not None):
        raise InputError(
            f"health: a batch of type {type(batch).__name__} is neither a tensor, a tuple or list (its first element "
            "is the input) nor a dict (keyword arguments); pass forward=lambda model, batch: ..."
        )
    items = parameters_of(prepared)
    if batch is not None:
        items += activations_of(prepared, batch, forward)
    return _report(items, numbers_of(items), _FIRST.setdefault(runtime, {}))


def weight_rows(model: nn.Module, items: list[Item] | None = None) -> dict[str, HealthRow]:
    """The rows of a model's weights, or of ``items``, by name. Unlike :func:`health` no first look: scales are not
    remembered.
    """
    items = parameters_of(model, ("weight",)) if items is None else items
    numbers = numbers_of(items)
    return {item.name: row_of(item, numbers.get(item.name), {}) for item in items}


# ---- watching ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Part:
    """Measurements of the items of one device, on their way to the host until ``event`` has happened."""

    items: list[Item]
    order: list[int]
    numbers: Tensor
    event: Any = None


def _send(items: list[Item]) -> _Part:
    order, numbers = measure(items)
    if not numbers.is_cuda:
        return _Part(items, order, numbers.cpu())
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event: Any = torch.cuda.Event()
    event.record(torch.cuda.current_stream(numbers.device))
    return _Part(items, order, host, event)


class HealthMonitor:
    """Watches weights and static operands of a prepared model in training. Call :meth:`step` once a training step.

    On a GPU the work goes to a stream of its own, and the result is read at a later step, when it has arrived: the host
    never waits, and neither does the training stream (so a measurement may mix the values of two steps that follow one
    another). Parameters are only read; CUDA graphs of the step do not mind. On a CPU a measurement is direct.

    Args:
        prepared: The model, on the device that it is trained on, its checkpoint loaded.
        every: Steps from one measurement to the next.
        warn: Issue every new problem of every quantizer once, as a :class:`HealthWarning`.

    Raises:
        ConfigError: not a prepared model, or ``every`` is no positive number.

    ``history`` holds (step, report) pairs, the first of step 0, the model as it was when the monitor was made. Of more
    than 512 pairs every second one between the first and the last is dropped.
    """

    history: list[tuple[int, HealthReport]]

    def __init__(self, prepared: nn.Module, every: int = 100, warn: bool = True) -> None:
        self._runtime = runtime_of(prepared, "prepared")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"HealthMonitor: every={every!r}, expected a number of steps of at least 1")
        self.prepared, self.every, self.warn = prepared, every, warn
        self.history = []
        self._steps = 0
        self._issued: set[tuple[str, str]] = set()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pending: tuple[int, list[Item], list[_Part]] | None = None
        self._start()
        self._poll(stacklevel=3)

    def step(self) -> None:
        """Count a step; read what has arrived, and measure if it is time."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # what is recorded now would run at every replay
        self._steps += 1
        self._poll(stacklevel=3)
        if self._steps % self.every == 0 and self._pending is None:
            self._start()
            self._poll(stacklevel=3)

    def wait(self) -> None:
        """Read the last measurement now, be it that the host has to wait: for the end of a training."""
        for part in self._pending[2] if self._pending else ():
            if part.event is not None:
                part.event.synchronize()
        self._poll(stacklevel=3)

    @torch.no_grad()
    def _start(self) -> None:
        devices = {p.device for p in self.prepared.parameters() if p.is_cuda}
        with ExitStack() as stack:
            for device in devices:
                side = self._streams.get(device)
                if side is None:
                    side = self._streams[device] = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
            items = parameters_of(self.prepared)
            known = [i for i in items if i.measurable(wait=False)]
            # The items are kept until the numbers have arrived, and with them the memory that is being read.
            self._pending = self._steps, items, [_send(some) for some in by_device(known).values()]

    def _poll(self, stacklevel: int) -> None:
        if self._pending is None or not all(p.event is None or p.event.query() for p in self._pending[2]):
            return
        (step, items, parts), self._pending = self._pending, None
        numbers: dict[str, _Numbers] = {}
        for part in parts:
            numbers |= _read(part.items, part.order, part.numbers)
        report = _report(items, numbers, _FIRST.setdefault(self._runtime, {}))
        self.history.append((step, report))
        if len(self.history) > _MOST_REPORTS:
            del self.history[1:-1:2]
        for row in report.rows if self.warn else ():
            for kind, sentence in row.problems:
                if (row.name, kind) not in self._issued:
                    self._issued.add((row.name, kind))
                    warnings.warn(f"step {step}: {sentence}", HealthWarning, stacklevel=stacklevel)
