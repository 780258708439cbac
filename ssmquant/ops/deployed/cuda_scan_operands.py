"""Operands of scans on a GPU as the kernels of ``csrc/deployed_cuda`` want them."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops.deployed.forms import ScanOperands

__all__ = [
    "COPIED",
    "MOST_LEVELS",
    "MOST_SHARED",
    "Params",
    "arrangement",
    "levels_of",
    "paths_of",
    "rates_of",
    "tensors_of",
    "up",
]

COPIED = 16
"""Bytes that are copied at once: where the channels of a block begin."""
MOST_LEVELS = 16
"""Of step sizes that are looked up."""
MOST_SHARED = 96 * 1024
"""Bytes of shared memory that a block has on any GPU since sm_80."""
_LOG2E = 1.4426950408889634


def up(n: int, multiple: int) -> int:
    """The least multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


class Params(ctypes.Structure):
    """``Params`` of ``scan_params.cu``."""

    _fields_ = (
        *(
            (n, ctypes.c_void_p)
            for n in "u bad codes sizes order ways scales table words affine rates bias skip".split()
        ),
        *((n, ctypes.c_void_p) for n in "befores times ends totals y".split()),
        *(
            (n, ctypes.c_int)
            for n in "u_row row size_row batch pixels channels chunks groups chunk blocks".split()
        ),
        ("paths", ctypes.c_void_p),
        ("part", ctypes.c_longlong),
        *((n, ctypes.c_int) for n in "directions stretch qmin qmax lanes rows tile path add".split()),
    )


def paths_of(order: Tensor) -> tuple[list[tuple[int, int]], list[int]]:
    """Directions along the same path, (forward, back) with -1 for none; of each one 2 * its row of order + back."""
    rows = order.cpu()
    found: list[tuple[int, int]] = []
    ways = [-1] * len(rows)
    for i in range(len(rows)):
        if ways[i] >= 0:
            continue
        ways[i] = 2 * i
        turned = rows[i].flip(0)
        same = (j for j in range(i + 1, len(rows)) if ways[j] < 0 and torch.equal(rows[j], turned))
        back = next(same, -1)
        if back >= 0:
            ways[back] = 2 * i + 1
        found.append((i, back))
    return found, ways


def rates_of(a: Tensor, directions: int) -> tuple[int, Tensor]:
    """How the rates of each channel are spaced (``Case.ladder``), and they as the source wants them."""
    states = a.shape[1]
    rates = a.double().view(directions, -1, states).transpose(1, 2)
    first = rates[:, :1]
    step = rates[:, 1:2] - first if states > 1 else torch.zeros_like(first)
    at = torch.arange(states, dtype=torch.float64, device=a.device).view(-1, 1)
    least = 1e-6 * rates.abs().amax()
    ladder = int((first + at * step - rates).abs().amax() <= least)
    if ladder and states > 1 and (first - step).abs().amax() <= least:
        ladder = 2
    return ladder, (torch.cat((first, step), 1) if ladder else rates) * _LOG2E


def arrangement(ranks: int, states: int, places: tuple[int, int, int]) -> list[int]:
    """Which row of a direction's projection each of its codes is of, -1 for none: the low rank, then B and C in turn.

    Both fill whole words of four codes.
    """
    rank, b, c = places
    low = [rank + i if i < ranks else -1 for i in range(-(-ranks // 4) * 4)]
    both = [at + n if n < states else -1 for n in range(-(-states // 2) * 2) for at in (b, c)]
    return low + both


def levels_of(operands: ScanOperands) -> int:
    """Of step sizes that are looked up, an even number; 0 for none."""
    grid = operands.of_delta
    levels = 0 if grid is None else grid.qmax - grid.qmin + 1
    return levels + levels % 2 if levels <= MOST_LEVELS else 0


def tensors_of(
    operands: ScanOperands, channels: int, rates: Tensor, lanes: int, columns: int, level: int
) -> dict[str, Tensor]:
    """What ``Params`` points to, by its names, but for the order and paths.

    Args:
        rates: as ``rates_of`` gives them.
        lanes, columns, level: of the step sizes' table: lanes of a block, channels of each, and values of a level.
    """
    o, d, device = operands, torch.float64, operands.a.device
    k = len(o.order)
    w, shift, total = (
        t.to(d).view(k, -1)[:, :channels] for t in (o.steps.scale, o.steps.shift, o.steps.total)
    )
    scale, origin = o.of_rank.scale.to(d), o.of_rank.qmin * o.of_rank.scale.to(d) - o.of_rank.shift.to(d)
    affine = torch.stack((scale * w, -scale * shift, origin * total), 1)
    biases = (
        torch.zeros(k, channels, dtype=d, device=device) if o.bias is None else o.bias.to(d).view(k, channels)
    )
    found: dict[str, Tensor | None] = {}
    if o.of_delta is None:
        affine[:, 2] += biases
    else:
        found["bias"] = o.bias
        affine[:, 2] += o.of_delta.shift.to(d)
        affine = affine / o.of_delta.scale.to(d)
    levels = levels_of(o)
    if o.of_delta is not None and levels:
        at = torch.arange(levels, dtype=d, device=device).view(1, -1, 1) + o.of_delta.qmin
        dt = at * o.of_delta.scale.to(d) - o.of_delta.shift.to(d) + biases[:, None]
        dt = F.softplus(dt, threshold=50) if o.softplus else dt
        table = torch.stack((dt, torch.exp2(dt * rates[:, :1])), 3)
        blocks = -(-channels // (lanes * columns))
        table = F.pad(table, (0, 0, 0, blocks * lanes * columns - channels))
        table = table.view(k, levels, blocks, lanes, columns, 2).permute(0, 2, 1, 4, 3, 5).flatten(3)
        found["table"] = F.pad(table, (0, level - table.shape[3]))
    grids = [g for g in (o.of_u, o.of_b, o.of_c, o.of_delta) if g is not None]
    of_codes = [t.to(d) for g in grids for t in (g.scale, g.qmin * g.scale.to(d) - g.shift.to(d))]
    words = -(-o.ranks // 4)
    packed = F.pad(o.steps.codes, (0, 4 * words - o.ranks)).view(k, channels, words, 4).view(torch.int32)
    found |= {
        "scales": F.pad(torch.cat(of_codes), (0, 8 - len(of_codes))),
        "words": F.pad(packed.squeeze(3).transpose(1, 2), (0, -channels % COPIED)),
        "affine": F.pad(affine, (0, -channels % COPIED)),
        "rates": rates,
        "skip": o.skip,
    }
    return {
        n: (t.float() if t.is_floating_point() else t).contiguous() for n, t in found.items() if t is not None
    }
