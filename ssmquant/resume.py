"""Calibration that goes on where it was interrupted: what was collected so far, in one safetensors file.

Layout: ``meta``, zlib-compressed JSON (uint8): whose calibration it is, and for each of the two passes over the batches
how many are done, their digests, those that reached new graphs, and the shapes of what was collected; ``float32`` and
``float64``, the collected tensors one after the other. The header has a SHA-256 of the three, so that a damaged file
is refused. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ssmquant.errors import CalibrationError, ConfigError, FormatError
from ssmquant.files import MALFORMED, Reader, read, read_shape, write
from ssmquant.graph.runtime import Runtime, runtime_of
from ssmquant.graph.transforms.statistics import Moments, Statistics
from ssmquant.modules import ActivationQuantizer
from ssmquant.quantizers import PTS, MinMax, PositionSample

__all__ = ["CalibrationFile", "Ranges", "Sums"]

_FORMAT, _VERSION = "ssmquant-calibration", "1"
_META_LIMIT = 2**26
_OWN_TIME = 0.1
"""Part of the time that writing may take: large files are written less often."""


class Collected(Protocol):
    """What a pass over the batches collects."""

    def snapshot(self) -> Any:
        """As it is now; later batches do not change it."""

    def write(self, snapshot: Any, put: Callable[[Tensor], list[int]]) -> Any:
        """A snapshot as JSON; ``put`` stores a tensor and returns its shape."""

    def fill(self, table: Any, take: Callable[[Any, torch.dtype], Tensor]) -> None:
        """Puts back what :meth:`write` wrote; ``take`` reads a tensor of a shape that the table has."""


class Ranges:
    """What the quantizers of activations have seen."""

    _LISTS = ("samples", "stats", "largest")

    def __init__(self, quantizers: list[ActivationQuantizer]) -> None:
        self.quantizers = quantizers

    def snapshot(self) -> Any:
        return [[list(getattr(q, name) or ()) for name in self._LISTS] for q in self.quantizers]

    def write(self, snapshot: Any, put: Callable[[Tensor], list[int]]) -> Any:
        return [[[_written(t, put) for t in kept] for kept in lists] for lists in snapshot]

    def fill(self, table: Any, take: Callable[[Any, torch.dtype], Tensor]) -> None:
        for q, lists in zip(self.quantizers, table, strict=True):
            for name, entries in zip(self._LISTS, lists, strict=True):
                by_position = name == "samples" and isinstance(q.quantizer, PTS)
                kept: list[Any] = []
                for entry in entries:
                    shape, share = (entry["shape"], entry["share"]) if by_position else (entry, 1.0)
                    t = take(shape, torch.float32)
                    if not _fits(q, name, t) or not _is_share(share):
                        raise ValueError(f"not of '{q.name}'")
                    t = t.to(q.seen.device)
                    kept.append(PositionSample(t[0], t[1], t[2], share) if by_position else t)
                setattr(q, name, kept)


def _written(kept: Tensor | PositionSample, put: Callable[[Tensor], list[int]]) -> Any:
    if isinstance(kept, Tensor):
        return put(kept)
    return {"shape": put(torch.stack((kept.low, kept.high, kept.picks))), "share": kept.share}


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _fits(q: ActivationQuantizer, name: str, t: Tensor) -> bool:
    """Whether a tensor is one that the quantizer may have collected."""
    if not t.numel() or not bool(t.isfinite().all()):
        return False
    channels = None if q.gain is None else q.gain.numel()
    if name == "stats":
        return t.dim() == 2 and t.shape[1] == 4
    if name == "largest":
        return t.shape == (channels,)
    if isinstance(q.quantizer, MinMax):
        return t.dim() == 3 and t.shape[:2] == (2, channels or 1)
    if isinstance(q.quantizer, PTS):  # lowest, highest and picked elements, of columns of cells
        axes = max(len(q.quantizer.position_axes), 1)
        return t.dim() == 2 + axes and t.shape[0] == 3 and channels in (None, t.shape[1])
    return channels is None or (t.dim() > q.channel_axis and t.shape[q.channel_axis] == channels)


class Sums:
    """What transforms are chosen by."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def snapshot(self) -> Any:
        s = self.statistics
        largest = {key: dict(of.items()) for key, of in s.largest.items()}  # replaced, never written to
        moments = {
            key: {k: (m.count, m.total.clone(), m.outer.clone()) for k, m in of.items()}
            for key, of in s.moments.items()
        }
        return largest, moments

    def write(self, snapshot: Any, put: Callable[[Tensor], list[int]]) -> Any:
        largest, moments = snapshot
        return {
            "largest": [[key, k, put(t)] for key, of in largest.items() for k, t in of.items()],
            "moments": [
                [key, k, count, put(total), put(outer)]
                for key, of in moments.items()
                for k, (count, total, outer) in of.items()
            ],
        }

    def fill(self, table: Any, take: Callable[[Any, torch.dtype], Tensor]) -> None:
        s = self.statistics
        s.largest.clear()
        s.moments.clear()
        for key, k, shape in table["largest"]:
            s.largest.setdefault(key, {})[k] = _vector(take(shape, torch.float64))
        for key, k, count, shape, square in table["moments"]:
            total, outer = _vector(take(shape, torch.float64)), take(square, torch.float64)
            if type(count) is not int or count < 0 or outer.shape != (len(total), len(total)):
                raise ValueError(f"moments of '{key}'")
            s.moments.setdefault(key, {})[k] = Moments(count, total, outer)


def _vector(t: Tensor) -> Tensor:
    if t.dim() != 1 or not bool(t.isfinite().all()):
        raise ValueError("not a vector of numbers")
    return t


class _Pass:
    """One pass over the batches: those that the file has are left out."""

    def __init__(self, file: CalibrationFile, collected: Collected, found: Any) -> None:
        self.file, self.collected, self.found = file, collected, found
        self.count = 0
        self.digests: list[str] = []
        self.graphs: list[int] = []
        self.latest: Any = None

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that have to run, which the caller does before it asks for the next one.

        Of those that are done these are the ones that reached graphs which were not there before: the graphs are made
        again, and what is collected meanwhile is thrown away.

        Raises:
            CalibrationError: a batch is not the one that was seen in its place, or there are fewer than were.
        """
        if self.file.path is None:
            for batch in batches:
                yield batch
                self.count += 1
            return
        known: list[str] = [] if self.found is None else self.found["digests"]
        if self.found is not None:
            self.graphs = list(self.found["graphs"])
        for batch in batches:
            digest = _digest(batch)
            if self.count < len(known) and digest != known[self.count]:
                raise CalibrationError(
                    f"calibrate: batch {self.count} is not the one that {self.file.path} has seen in this place. "
                    "A calibration goes on only with the same batches in the same order (no shuffling, no random "
                    "crops; else remove the file)"
                )
            if self.count == len(known):
                self._go_on()
            if self.count >= len(known) or self.count in self.graphs:
                before = _graphs(self.file.runtime)
                yield batch
                if self.count >= len(known) and _graphs(self.file.runtime) != before:
                    self.graphs.append(self.count)
            self.digests.append(digest)
            self.count += 1
            if self.count > len(known):
                self.latest = self.collected.snapshot()
                self.file.batch_done()
        if self.count < len(known):
            raise CalibrationError(
                f"calibrate: {self.file.path} has seen {len(known)} batches, and there are {self.count}: go on with "
                "the same ones, or remove the file"
            )
        self._go_on()

    def _go_on(self) -> None:
        """Puts back what the file has."""
        if self.found is None:
            return
        self.file.fill(self.collected, self.found)
        self.found, self.latest = None, self.collected.snapshot()


class CalibrationFile:
    """The state of a calibration in a file; with ``path`` None, none.

    Args:
        path: Read if it is there.
        model: The prepared model, as it is before.
        fit, total: what ``calibrate`` does, and the number of batches (None: not known).
        every: Seconds between two writes, at least.

    Raises:
        ConfigError: the file could not be written there.
        FormatError: the file is cut short, damaged, or of another model, configuration or number of batches.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        model: nn.Module,
        *,
        fit: bool,
        total: int | None,
        every: float,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.runtime = runtime_of(model)
        self.passes: dict[str, _Pass] = {}
        self.found: dict[str, Any] = {}
        self.every = every
        self.news = False
        if self.path is None:
            return
        if not every >= 0:
            raise ConfigError(f"calibrate: checkpoint_every={every}: expected seconds, 0 or more")
        if not self.path.parent.is_dir() or (self.path.exists() and not self.path.is_file()):
            raise ConfigError(f"calibrate: checkpoint={str(path)!r} is no place for a file")
        self.identity = _identity(model, fit, total)
        self.due = time.monotonic() + every
        if self.path.exists():
            self._read()

    def start(self, name: str, collected: Collected) -> _Pass:
        """The pass of that name, from where the file has it."""
        self.passes[name] = _Pass(self, collected, self.found.get(name))
        return self.passes[name]

    def batch_done(self) -> None:
        """Writes if it is time to."""
        self.news = True
        if time.monotonic() >= self.due:
            self.save()

    def save(self) -> None:
        """Writes what is new, whole batches only."""
        if self.path is None or not self.news:
            return
        begin = time.monotonic()
        parts: dict[str, list[Tensor]] = {"float32": [], "float64": []}

        def put(t: Tensor) -> list[int]:
            parts[str(t.dtype).removeprefix("torch.")].append(t.detach().reshape(-1).cpu())
            return list(t.shape)

        meta: dict[str, Any] = {"identity": self.identity, "passes": {}}
        for name, p in self.passes.items():
            if p.latest is not None:
                table = p.collected.write(p.latest, put)
                meta["passes"][name] = {"digests": p.digests, "graphs": p.graphs, "table": table}
        blob = zlib.compress(json.dumps(meta, separators=(",", ":")).encode(), 1)
        tensors = {
            "meta": torch.frombuffer(bytearray(blob), dtype=torch.uint8),
            **{k: torch.cat([torch.zeros(0, dtype=getattr(torch, k)), *v]) for k, v in parts.items()},
        }
        checksum = _checksum(tensors)
        write(self.path, tensors, {"format": _FORMAT, "format_version": _VERSION, "sha256": checksum})
        self.news = False
        end = time.monotonic()
        self.due = end + max(self.every, (end - begin) / _OWN_TIME)

    def finish(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    # ---- reading -----------------------------------------------------------------------------------------------------
    def fill(self, collected: Collected, found: Any) -> None:
        """Gives what a pass of the file has to ``collected``."""

        def take(shape: Any, dtype: torch.dtype) -> Tensor:
            size = read_shape(shape)
            key = str(dtype).removeprefix("torch.")
            return self.reader.take(key, math.prod(size), dtype, "its shapes").reshape(size)

        try:
            collected.fill(found["table"], take)
            self.found = {name: entry for name, entry in self.found.items() if entry is not found}
            if not self.found:
                self.reader.done()
        except MALFORMED as e:
            raise FormatError(f"{self.path}: malformed contents ({type(e).__name__}: {e})") from None

    def _read(self) -> None:
        assert self.path is not None
        header, tensors = read(self.path)
        self.reader = Reader(self.path, tensors)
        if header.get("format") != _FORMAT:
            raise self.reader.fail("this is no file of calibrate; choose another name")
        if header.get("format_version") != _VERSION:
            raise self.reader.fail(f"format version {header.get('format_version')!r}, expected {_VERSION}")
        if sorted(tensors) != ["float32", "float64", "meta"] or header.get("sha256") != _checksum(tensors):
            raise self.reader.fail("the file is damaged; remove it to start again")
        try:
            unzip = zlib.decompressobj()
            meta = json.loads(unzip.decompress(tensors["meta"].numpy().tobytes(), _META_LIMIT))
            theirs, found = meta["identity"], dict(meta["passes"])
            if not found.keys() <= {"transforms", "ranges"}:
                raise ValueError
            for entry in found.values():
                digests, graphs = entry["digests"], entry["graphs"]
                if not all(isinstance(d, str) for d in digests) or not all(type(g) is int for g in graphs):
                    raise ValueError
            theirs = {k: theirs[k] for k in self.identity}
        except (*MALFORMED, zlib.error, RecursionError) as e:
            raise self.reader.fail(f"the metadata cannot be read ({type(e).__name__})") from None
        other = [k for k, v in self.identity.items() if theirs[k] != v]
        if other:
            raise self.reader.fail(
                f"a calibration of another model: {', '.join(other)} differ. Remove the file, or choose another name"
            )
        self.found = found


def _identity(model: nn.Module, fit: bool, total: int | None) -> dict[str, Any]:
    """What a model must have in common with the one that the file is of; names are for the message."""
    runtime = runtime_of(model)
    weights = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        if isinstance(t, Tensor):  # not a module's extra state
            weights.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
            weights.update(_bytes(t))
    names = [q.name for q in runtime.activations.values() if isinstance(q, ActivationQuantizer)]
    return {
        "configuration": hashlib.sha256(runtime.config.to_json().encode()).hexdigest(),
        "method": runtime.method,
        "sites": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "fit": fit,
        "number of batches": total,
    }


def _graphs(runtime: Runtime) -> Any:
    """Changes when a call makes a graph, or shows that one fits other sizes, too."""
    return [(id(r), len(r.verified)) for r in runtime.records]


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(batch: Any) -> str:
    """Of the tensors and plain values in a batch; of anything else the type only."""
    out = hashlib.sha256()
    leaves, spec = pytree.tree_flatten(batch)
    out.update(str(spec).encode())
    for x in leaves:
        if isinstance(x, Tensor):
            out.update(f"{x.dtype}{tuple(x.shape)}".encode())
            out.update(_bytes(x))
        else:
            out.update(repr(x if isinstance(x, (bool, int, float, str, bytes)) else type(x)).encode())
    return out.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    out = hashlib.sha256()
    for name in sorted(tensors):
        out.update(f"{name}{tensors[name].dtype}".encode())
        out.update(_bytes(tensors[name]))
    return out.hexdigest()
