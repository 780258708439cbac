"""The transforms of a prepared model: measured in its float graph, folded into its weights, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.graph.runtime import Record, Runtime, runtime_of
from ssmquant.graph.transforms.candidates import Candidate, Skipped, View
from ssmquant.graph.transforms.choose import apply_transforms
from ssmquant.graph.transforms.find import find_transforms
from ssmquant.graph.transforms.statistics import Statistics, Watcher

__all__ = ["measure", "transform"]

_KINDS = {"dt_scale": "dt", "dt_rotation": "dt", "dt_mean": "dt"}


def _find(model: nn.Module, runtime: Runtime, record: Record) -> tuple[list[Candidate], list[Skipped]]:
    kinds = {_KINDS.get(name, name) for name in runtime.config.transforms}
    return find_transforms(View(model, record.trace, runtime.adapter.scans if runtime.adapter else ()), kinds)


@torch.no_grad()
def measure(
    model: nn.Module, batches: list[Any], forward: Callable[[nn.Module, Any], Any]
) -> tuple[list[Candidate], list[Skipped], Statistics]:
    """Runs the float model and measures what transforms depend on. Nothing is changed.

    Args:
        model: A prepared model in evaluation mode, not transformed yet.
        batches: What it takes.
        forward: ``forward(model, batch)`` calls it.

    Returns:
        The candidates of the example's graph, what does not apply, and the statistics.

    Raises:
        CalibrationError: NaN or inf in a measured value.
    """
    runtime = runtime_of(model)
    own = runtime.records
    statistics = Statistics()
    found, skipped = _find(model, runtime, own[0])
    watched: list[Record] = []

    def watch(record: Record) -> Record:
        candidates = found if record is own[0] else _find(model, runtime, record)[0]
        watcher = Watcher(model, record.trace.graph, candidates, statistics)

        def run(_: nn.Module, *tensors: Tensor) -> Any:
            return watcher.run(*tensors)

        return replace(record, run=run, fused={})

    try:
        for batch in batches:
            # A call that no graph serves is traced; its graph is then run a second time, watched.
            while True:
                known = len(runtime.records)
                if len(watched) < known:
                    watched += [watch(r) for r in runtime.records[len(watched) :]]
                    runtime.records = list(watched)
                forward(model, batch)
                if len(runtime.records) == known:
                    break
    finally:
        runtime.records = own
    return found, skipped, statistics


def transform(
    model: nn.Module, found: list[Candidate], skipped: list[Skipped], statistics: Statistics
) -> bool:
    """Folds the transforms. True: the graph changes too, so that the model has to be traced again.

    Weights' quantizers have to be initialised again in any case.
    """
    runtime = runtime_of(model)
    names = runtime.config.transforms
    tensors, applied = apply_transforms(model, found, statistics, names, klt=runtime.config.rotation == "klt")
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    runtime.transforms.put(tensors, like)
    runtime.transforms.applied, runtime.transforms.skipped = applied, skipped
    runtime.transforms.settled = True
    return bool(tensors)
