"""The transforms of a prepared model: measured in its float graphs, folded into its weights, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from ssmquant.graph.runtime import Record, Runtime, runtime_of
from ssmquant.graph.transforms.candidates import Candidate, Skipped, View
from ssmquant.graph.transforms.choose import fold_transforms, plan_transforms
from ssmquant.graph.transforms.find import find_transforms
from ssmquant.graph.transforms.statistics import Statistics, Watcher

__all__ = ["Watched", "from_first", "has_ranks", "measure", "transform"]

_KINDS = {"dt_scale": "dt", "dt_rotation": "dt", "dt_mean": "dt"}


@dataclass
class Watched(Record):
    """A record whose calls run in an interpreter that measures."""

    watcher: fx.Interpreter | None = None

    @classmethod
    def by(cls, watcher: fx.Interpreter, record: Record) -> Watched:
        """The record with that interpreter of one of its graphs."""
        return cls(**{f.name: getattr(record, f.name) for f in fields(record)}, watcher=watcher)

    def __call__(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        assert self.watcher is not None
        return self.watcher.run(*tensors)


class _Graphs:
    """What applies in each of a model's graphs, as calls reach them."""

    def __init__(self, model: nn.Module, runtime: Runtime, statistics: Statistics) -> None:
        self.model, self.runtime, self.statistics = model, runtime, statistics
        self.kinds = {_KINDS.get(name, name) for name in runtime.config.transforms}
        # The records are kept: the runtime forgets some where there are very many.
        self.seen: dict[int, tuple[Record, list[Candidate], list[Skipped]]] = {}
        self.watched: dict[int, Watched] = {}

    def look(self, record: Record) -> list[Candidate]:
        if id(record) not in self.seen:
            scans = self.runtime.adapter.scans if self.runtime.adapter else ()
            found, skipped = find_transforms(View(self.model, record.trace, scans), self.kinds)
            self.seen[id(record)] = record, found, skipped
        return self.seen[id(record)][1]

    def watch(self, record: Record) -> Record:
        if id(record) not in self.watched:
            watcher = Watcher(self.model, record.trace.graph, self.look(record), self.statistics)
            self.watched[id(record)] = Watched.by(watcher, record)
        return self.watched[id(record)]

    def common(self) -> tuple[list[Candidate], list[Skipped]]:
        """What all graphs have in common: a weight is changed for all of them."""
        graphs = list(self.seen.values())
        _, found, skipped = graphs[0]
        kept = {c.key: c for c in found}
        reasons = {(s.kind, s.site): s for s in skipped}
        for _, others, why in graphs[1:]:
            marks = {c.key: c.mark() for c in others}
            explained = {(s.kind, s.site): s.reason for s in why}
            for c in [c for c in kept.values() if marks.get(c.key) != c.mark()]:
                reason = explained.get((c.kind, c.site), "it has other weights or values there")
                del kept[c.key]
                reasons[c.kind, c.site] = Skipped(
                    c.kind, c.site, f"not in all graphs of this model: {reason}"
                )
            for c in others:
                if c.key not in {d.key for d in found}:
                    reasons.setdefault(
                        (c.kind, c.site), Skipped(c.kind, c.site, "not in all graphs of this model")
                    )
        return list(kept.values()), list(reasons.values())


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    statistics: Statistics | None = None,
) -> tuple[list[Candidate], list[Skipped], Statistics]:
    """Runs the float model and measures what transforms depend on. Nothing is changed.

    Args:
        model: A prepared model in evaluation mode, traced, not transformed yet.
        batches: What it takes.
        forward: ``forward(model, batch)`` calls it.
        statistics: What is measured is added to them; by default to new ones.

    Returns:
        The candidates that all graphs of the model share (those of the example in both modes, and those of the
        batches), what does not apply, and the statistics.

    Raises:
        CalibrationError: NaN or inf in a measured value.
    """
    runtime = runtime_of(model)
    statistics = Statistics() if statistics is None else statistics
    graphs = _Graphs(model, runtime, statistics)
    for record in runtime.records:
        graphs.look(record)
    runtime.instead = graphs.watch
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        runtime.instead = None
    found, skipped = graphs.common()
    return found, skipped, statistics


def transform(
    model: nn.Module, found: list[Candidate], skipped: list[Skipped], statistics: Statistics
) -> tuple[bool, bool]:
    """Folds the transforms; all ranks of a distributed run fold those that rank 0 decides on.

    A failure leaves weights half folded: the caller puts them back (see ``undo``).

    Returns:
        Whether weights changed, so that their quantizers have to start again, and whether the graph changes, so that
        the model has to be traced again.
    """
    runtime = runtime_of(model)
    names, kind = runtime.config.transforms, runtime.config.rotation
    several = has_ranks()
    if several:
        found, skipped = _shared(found, skipped)
    plan, without = plan_transforms(model, found, statistics, names, kind=kind)
    skipped = [*skipped, *without]
    if several:  # of other batches, so decided otherwise; the reasons, too, are in a buffer of the same size
        plan, skipped = from_first((plan, skipped))
    tensors, applied = fold_transforms(model, found, plan)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    runtime.transforms.settle(tensors, applied, skipped, like)
    return bool(applied), bool(tensors)


def has_ranks() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _shared(found: list[Candidate], skipped: list[Skipped]) -> tuple[list[Candidate], list[Skipped]]:
    """What all ranks have found: their batches may have reached other graphs."""
    marks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(marks, {c.key: c.mark() for c in found})
    kept = [c for c in found if all(m.get(c.key) == c.mark() for m in marks)]
    left = [Skipped(c.kind, c.site, "not in all graphs of all ranks") for c in found if c not in kept]
    return kept, [*skipped, *left]
