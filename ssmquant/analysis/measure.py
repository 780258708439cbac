"""Statistics of the codes of many quantizers at once: what :mod:`ssmquant.analysis.health` tells of a model.

Tensors of one shape under quantizers of one kind go through the same calls, so that it takes some hundred kernels to
measure the hundreds of weights of a model, whose blocks are alike. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmquant.graph.plan import Point
from ssmquant.graph.prepared import Values
from ssmquant.graph.runtime import Record, Runtime, runtime_of
from ssmquant.modules import PackedTensor
from ssmquant.quantizers import DLS, LSQ, OPERANDS, RFA, QTensor, Quantizer
from ssmquant.quantizers.affine import Affine, affine_decode, affine_index, compute_dtype
from ssmquant.quantizers.affine_fit import shift_of
from ssmquant.quantizers.lsq import floored
from ssmquant.quantizers.observers import group_rows
from ssmquant.quantizers.rfa import grid_thresholds, ordered_grid
from ssmquant.workflow import ensure_traced

__all__ = [
    "FIELDS",
    "PER_LEVEL",
    "Item",
    "by_device",
    "item_of",
    "measure",
    "parameters_of",
    "points_of",
    "thin",
]

PER_LEVEL = 16
"""So many elements a level are looked at to count distinct ones."""

_KEEP = 2**14  # elements of an activation
_AT_ONCE = 2**21  # elements that go through one call


# ---- what there is to measure --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Item:
    """A quantizer and what it is given: a ``value``, or what is ``encoded`` already. A packed tensor needs neither."""

    name: str
    what: str
    match: str
    """The name by which a Rule finds it."""
    bits: int
    holder: nn.Module
    """A Quantizer or a PackedTensor."""
    value: Tensor | None = None
    encoded: tuple[QTensor, Tensor] | None = None
    coded: bool = True
    """Whether codes and levels say anything: not of values that are there without codes, one for each state."""
    method: str = ""
    """The quantizer's name in a QConfig."""

    @property
    def device(self) -> torch.device:
        if isinstance(self.holder, PackedTensor):
            return self.holder.codes.device
        return self._tensor().device

    @property
    def elements(self) -> int:
        if isinstance(self.holder, PackedTensor):
            return math.prod(self.holder.shape)
        return self._tensor().numel()

    def measurable(self, *, wait: bool) -> bool:
        """Whether there are elements and a range. ``wait``: for the latter the host may look at the device."""
        if not self.elements or self.device.type == "meta":
            return False
        if isinstance(self.holder, Quantizer):
            return self.holder.ready if wait else self.holder._flags["initialized"]
        return True

    def _tensor(self) -> Tensor:
        t = self.encoded[1] if self.encoded is not None else self.value
        assert t is not None
        return t


def points_of(runtime: Runtime, kinds: Iterable[str]) -> Iterator[tuple[Record, Point]]:
    """Every quantizer's point, once, with a record that has it."""
    done: set[str] = set()
    for record in runtime.records:
        for p in record.plan.points:
            if p.what in kinds and p.key not in done:
                done.add(p.key)
                yield record, p


def item_of(point: Point, holder: nn.Module) -> Item:
    """The item of a point, without a value yet."""
    site, operand = point.uses[0]
    assert point.scheme.bits is not None
    match = f"{site.name}.{operand.name}" if site.kind == "scan" else site.name
    method = point.scheme.method
    return Item(
        point.name, point.what, match, point.scheme.bits, holder, coded=method not in OPERANDS, method=method
    )


def parameters_of(model: nn.Module, kinds: Iterable[str] = ("weight", "static")) -> list[Item]:
    """Weights and static operands, in the order of the model."""
    runtime = runtime_of(model)
    ensure_traced(model)
    values: dict[int, Values] = {}
    out = []
    for record, p in points_of(runtime, kinds):
        item = item_of(p, runtime.weights[p.key])
        if not isinstance(item.holder, PackedTensor):
            of = values.setdefault(id(record), Values(model))
            item.value = of.of(p).detach()  # holds the storage while a side stream reads it
        out.append(item)
    return out


def _by_group(t: Tensor, scale: Tensor) -> Tensor:
    """``t`` as (groups, elements), groups in the order of ``scale``, which broadcasts to ``t``."""
    if scale.numel() == 1:
        return t.reshape(1, -1)
    sizes = (1,) * (t.dim() - scale.dim()) + tuple(scale.shape)
    front = [d for d, size in enumerate(sizes) if size > 1]
    rest = [d for d, size in enumerate(sizes) if size == 1]
    return t.permute(*front, *rest).reshape(scale.numel(), -1)


def thin(q: QTensor, x: Tensor) -> tuple[QTensor, Tensor]:
    """Codes and values as (groups, elements), copies of at most 2**14 of them, evenly strided."""
    codes, x = _by_group(q.codes, q.scale), _by_group(x, q.scale)
    few = -(-len(x) // _KEEP)
    x, codes = x[::few], codes[::few]
    step = -(-x.shape[1] // (_KEEP // len(x))) | 1  # odd: coprime to power-of-two layouts
    scale, shift, lo, hi = (None if t is None else _column(t, q.scale)[::few].clone() for t in _map(q))
    assert scale is not None
    assert shift is not None
    return QTensor(codes[:, ::step].clone(), q.bits, q.code_min, scale, shift, lo, hi, q.dtype), x[
        :, ::step
    ].clone()


def _map(q: QTensor) -> tuple[Tensor | None, ...]:
    return q.scale, q.shift, q.lo, q.hi


def _column(t: Tensor, scale: Tensor) -> Tensor:
    return t.expand_as(scale).reshape(-1, 1)


# ---- measuring -----------------------------------------------------------------------------------------------------

FIELDS = ("used", "zero", "scale", "floor", "clipped", "signal", "noise", "distinct", "blank")
"""Numbers of levels in use and of elements at the level nearest to zero; mean magnitude of the scale; groups at the
floor that are not constant; elements beyond the ends; sums of squares of values and of errors; distinct values among
``PER_LEVEL`` a level; elements that are zero. Without values the floor's is 0, and all after it are NaN."""


def _statistics(
    index: Tensor, x: Tensor | None, affine: Affine, bits: int, code_min: int, eps: float
) -> Tensor:
    """``FIELDS`` of K tensors of one shape, ``(K, len(FIELDS))`` float64.

    Args:
        index: code indices as floats, ``(K, groups, elements)``; 0 for NaN.
        x: the values, of the same shape and dtype.
        affine: ``(K, groups, 1)`` each.
    """
    n = 2**bits
    levels = affine_decode(torch.arange(n, dtype=index.dtype, device=index.device), affine, code_min)
    near = levels.gather(-1, levels.abs().argmin(-1, keepdim=True))
    y = affine_decode(index, affine, code_min)
    seen = torch.zeros(len(index), n, dtype=torch.bool, device=index.device)
    scale = affine.scale.abs()
    out = [
        seen.scatter_(1, index.flatten(1).long(), True).sum(-1),
        (y == near).sum((1, 2)),
        scale.mean((1, 2)),
    ]
    if x is None:
        nothing = torch.full_like(out[2], torch.nan)
        out += [torch.zeros_like(nothing), *[nothing] * (len(FIELDS) - len(out) - 1)]
    else:
        low, high = x.aminmax(dim=-1, keepdim=True)
        bottom, top = levels.aminmax(dim=-1, keepdim=True)
        flat = x.flatten(1)
        most = PER_LEVEL * n
        some = flat[:, :: max(1, flat.shape[1] // most) | 1][:, :most].sort(-1).values
        out += [
            ((scale <= eps) & (high > low)).sum((1, 2)),
            ((x < bottom - scale / 2) | (x > top + scale / 2)).sum((1, 2)),
            x.square().sum((1, 2), dtype=torch.float64),
            (x - y).square().sum((1, 2), dtype=torch.float64),
            (some.diff() != 0).sum(-1) + 1,
            (x == 0).sum((1, 2)),
        ]
    return torch.stack([t.double() for t in out], -1)


def _alike(q: nn.Module) -> bool:
    """Whether :func:`_index_together` knows the quantizer (exact types: who derives one changes the arithmetic)."""
    if type(q) is DLS:
        return not q.official and q.stats_axis is None
    return type(q) in (LSQ, RFA) and not q.official


def _index_together(quantizers: Sequence[Any], x: Tensor) -> tuple[Tensor, Affine]:
    """What ``encode`` of K quantizers of one kind makes of ``x`` (K, groups, elements), to the same bits.

    Returns code indices, 0 for NaN, and the map of shape (K, groups, 1).
    """
    first = quantizers[0]
    if isinstance(first, DLS):
        ranges = [q._affine(rows) for q, rows in zip(quantizers, x, strict=True)]
        table = torch.stack([torch.stack((a.scale, a.shift, a.lo, a.hi)) for a in ranges], 1)
        affine = Affine(*table[..., None, None])
        index = affine_index(x.to(table.dtype), affine.scale, affine.shift, first.qmin, first.qmax)
        return index.nan_to_num(0.0), affine
    alpha = torch.stack([q.alpha for q in quantizers])
    cd = compute_dtype(x, alpha)
    alpha = floored(alpha.to(cd), first.eps)
    shifts = zip(quantizers, alpha, strict=True)
    beta = torch.stack([q.beta.to(cd) if q.shift == "learned" else shift_of(a, q.shift) for q, a in shifts])
    affine = Affine(alpha.unsqueeze(-1), beta.unsqueeze(-1))
    if not isinstance(first, RFA):
        index = affine_index(x.to(cd), affine.scale, affine.shift, first.qmin, first.qmax)
        return index.nan_to_num(0.0), affine
    bounds = grid_thresholds(ordered_grid(torch.stack([q.grid for q in quantizers]).to(cd)))
    u = ((x.to(cd) + affine.shift) / affine.scale).clamp(first.qmin, first.qmax)
    if bounds.shape[-1] > 15:
        index = torch.searchsorted(bounds, u.flatten(1)).reshape(u.shape).to(cd)
        return torch.where(u.isnan(), 0.0, index), affine
    below = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)  # faster than a search
    for bound in bounds.unbind(-1):
        below += u > bound[:, None, None]
    return below.to(cd), affine


class _Kind(NamedTuple):
    """What tensors that go together have in common."""

    together: type | None
    bits: int
    qmin: int
    code_min: int
    eps: float
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size | None, ...]


def _sorted_out(item: Item) -> tuple[_Kind, tuple[Tensor | None, ...]]:
    """An item's kind and its tensors, as (groups, elements): the value, or the codes, the value and their map."""
    q, x = item.holder, item.value
    if isinstance(q, Quantizer) and x is not None and _alike(q):
        rows = group_rows(q._merged(x), q._state_axis, q.num_groups)
        dtypes = rows.dtype, next(q.parameters()).dtype
        kind = _Kind(type(q), item.bits, q.qmin, q.code_min, q.eps, dtypes, (rows.shape,))
        return kind, (rows,)
    if item.encoded is not None:
        code, x = item.encoded
    elif isinstance(q, PackedTensor):
        code = q.qtensor()
    else:
        assert isinstance(q, Quantizer)
        assert x is not None
        code = q.encode(x, check=False)
    scale = code.scale
    values = (None if t is None else _by_group(t, scale).to(scale.dtype) for t in (code.codes, x))
    tensors = (*values, *(None if t is None else _column(t, scale) for t in _map(code)))
    shapes = tuple(None if t is None else t.shape for t in tensors)
    eps = q.eps if isinstance(q, Quantizer) else 0.0
    return _Kind(None, item.bits, code.code_min, code.code_min, eps, (scale.dtype,), shapes), tensors


@torch.no_grad()
def measure(items: Sequence[Item]) -> tuple[list[int], Tensor]:
    """``FIELDS`` of measurable items of one device: rows ``(len(items), len(FIELDS))``, and which item each is of."""
    kinds: dict[_Kind, list[tuple[int, tuple[Tensor | None, ...]]]] = {}
    for i, item in enumerate(items):
        kind, tensors = _sorted_out(item)
        kinds.setdefault(kind, []).append((i, tensors))
    order: list[int] = []
    parts: list[Tensor] = []
    for kind, members in kinds.items():
        size = kind.shapes[0]
        assert size is not None
        step = max(1, _AT_ONCE // max(size.numel(), 1))
        for start in range(0, len(members), step):
            some = members[start : start + step]
            order += [i for i, _ in some]
            stacked = [_stack(column) for column in zip(*(tensors for _, tensors in some), strict=True)]
            first = stacked[0]
            assert first is not None
            if kind.together is not None:
                index, affine = _index_together([items[i].holder for i, _ in some], first)
                x: Tensor | None = first.to(index.dtype)
            else:
                index, x, scale, shift, lo, hi = first, *stacked[1:]
                assert scale is not None
                assert shift is not None
                affine = Affine(scale, shift, lo, hi)
            parts.append(_statistics(index, x, affine, kind.bits, kind.code_min, kind.eps))
    return order, torch.cat(parts)


def _stack(column: tuple[Tensor | None, ...]) -> Tensor | None:
    filled = [t for t in column if t is not None]
    return torch.stack(filled) if filled else None


def by_device(items: Iterable[Item]) -> dict[torch.device, list[Item]]:
    """Items apart by where they are."""
    out: dict[torch.device, list[Item]] = {}
    for item in items:
        out.setdefault(item.device, []).append(item)
    return out
