"""What transforms are chosen by: the largest magnitude of channels, and moments, of a float model on some batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.errors import CalibrationError
from ssmquant.graph.transforms.candidates import Candidate

__all__ = ["Moments", "Statistics", "Watcher"]


@dataclass
class Moments:
    """Number of rows, and sums of rows (n,) and of their outer products (n, n), float64."""

    count: int
    total: Tensor
    outer: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    def covariance(self, *, centred: bool = True) -> Tensor:
        """(n, n); about 0 where not ``centred``."""
        out = self.outer / max(self.count, 1)
        return out - torch.outer(self.mean, self.mean) if centred else out


@dataclass
class Statistics:
    """By key of a candidate: for each of its values the largest magnitudes by label, and the moments."""

    largest: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    moments: dict[str, dict[int, Moments]] = field(default_factory=dict)

    def see(self, candidate: Candidate, which: int, value: Tensor, labels: Tensor) -> None:
        """Notes the largest magnitudes of the ``which``-th watched value."""
        if not value.numel():
            return
        over = [d for d, s in enumerate(labels.shape) if s == 1]
        x = value.detach().abs()
        x = (x.amax(dim=over, keepdim=True) if over else x).expand(labels.shape).double().cpu()
        kept = labels >= 0
        if not kept.any():
            return
        # Another graph may watch more values, or see more of their channels; whether it counts is decided later.
        store = self.largest.setdefault(candidate.key, {})
        old = store.get(which, torch.zeros(0, dtype=torch.float64))
        now = torch.zeros(max(int(labels.max()) + 1, old.numel()), dtype=torch.float64)
        now[: old.numel()] = old
        store[which] = now.scatter_reduce_(0, labels[kept], x[kept], "amax")

    def correlate(self, candidate: Candidate, which: int, value: Tensor, labels: Tensor) -> None:
        """Adds to the moments of the ``which``-th value; labels number its channels from 0."""
        if not value.numel():
            return
        channels = [d for d, s in enumerate(labels.shape) if s > 1]
        rows = (
            value.detach().movedim(channels, list(range(len(channels)))).flatten(0, max(len(channels) - 1, 0))
        )
        rows = rows.reshape(labels.numel(), -1).double().cpu()
        order = labels.reshape(-1)
        sorted_rows = torch.empty_like(rows)
        sorted_rows[order] = rows
        store = self.moments.setdefault(candidate.key, {})
        if which not in store:
            n = labels.numel()
            zero = torch.zeros(n, dtype=torch.float64)
            store[which] = Moments(0, zero, torch.zeros(n, n, dtype=torch.float64))
        m = store[which]
        if m.total.numel() != labels.numel():
            return  # of a graph that has another transform here, so that none will be chosen
        m.count += rows.shape[1]
        m.total += sorted_rows.sum(1)
        m.outer += sorted_rows @ sorted_rows.T


class Watcher(fx.Interpreter):
    """Runs a traced float graph and measures what its candidates watch."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, candidates: Sequence[Candidate], statistics: Statistics
    ) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.statistics = statistics
        self.watched: dict[fx.Node, list[tuple[str, Candidate, int, Tensor]]] = {}
        for c in candidates:
            for kind, values in (("see", c.watch), ("correlate", c.moments)):
                for k, (node, labels) in enumerate(values):
                    self.watched.setdefault(node, []).append((kind, c, k, labels))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Not through hooks: those of a prepared model refuse, as nothing but its graph may compute with the weights.
        return self.fetch_attr(target).forward(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        for kind, candidate, which, labels in self.watched.get(n, ()):
            if not bool(out.isfinite().all()):
                raise CalibrationError(
                    f"calibration met NaN or inf at '{candidate.site}': check the batch and the float model's own "
                    "output"
                )
            getattr(self.statistics, kind)(candidate, which, out, labels)
        return out
