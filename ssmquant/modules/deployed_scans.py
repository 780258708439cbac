"""Scans of a deployed graph with all around them, one call on codes each: images in several orders, sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.modules.deployed_values import (
    bias_of,
    encode,
    engine_of,
    grid_of,
    in_a_call,
    kept,
    matrix,
    no_moments,
    plain,
    static,
)
from ssmquant.modules.packed import PackedTensor
from ssmquant.ops.deployed import Depthwise, Grid, ScanOperands, Weights, cpu
from ssmquant.quantizers.bank import hooks_of

__all__ = ["scan_core", "sequence_core"]


def scan_core(
    x: Tensor,
    order: Tensor,
    ranks: tuple[int, int, int],
    places: tuple[int, int, int],
    of_x: nn.Module,
    projection: PackedTensor,
    of_rank: nn.Module,
    dt_weight: PackedTensor,
    of_u: nn.Module,
    of_delta: nn.Module | None,
    of_b: nn.Module,
    of_c: nn.Module,
    a: Any,
    skip: Any,
    bias: Any,
    *,
    softplus: bool,
    apart: int = 0,
    u: Tensor | None = None,
    front: Depthwise | None = None,
) -> Any:
    """Projections of an image, selective scans in K orders of its pixels, and their sum: (B, L, D).

    Args:
        x: (B, L, D), any strides; float32, or codes by ``of_x``, where ``of_u`` is the same or there are codes ``u``.
        order: (K, L).
        ranks: rows that a direction's projection has; of these the low rank of the step sizes, and states, of B and C.
        places: where the low rank, B and C begin among a direction's rows.
        of_x, of_u, of_rank, of_delta, of_b, of_c: quantizers.
        projection: (K, E, D), to the low rank, B and C.
        dt_weight: (K, D, R).
        a: (K * D, N); skip, bias: (K * D,) or None.
        apart: so many tensors are returned, whose sum is the result; 0: one, the result.
        front: a depthwise convolution in front, of an image with the pixels x, which makes the codes.
    """
    batch, pixels, channels = x.shape
    directions, (rows, rank, states) = len(order), ranks
    order = order.contiguous()
    quantizers = of_x, of_u, of_rank, of_delta, of_b, of_c
    operands = plain(a), plain(skip), plain(bias)

    def weights_of() -> tuple[Weights, Weights]:
        shapes = (directions * rows, channels), (directions, channels, rank)
        return matrix(projection, shapes[0]), matrix(dt_weight, shapes[1], steps=True)

    def prepare() -> Callable[..., Tensor] | None:
        """None if one of the grids is known by a call's data only."""
        if not all(q is None or static(q) for q in quantizers):
            return None
        grids = {q: None if q is None else grid_of(q, no_moments, 0) for q in quantizers}
        weights, steps = weights_of()
        scan = ScanOperands(
            sure(grids[of_u]), sure(grids[of_rank]), steps, grids[of_delta], operands[0], sure(grids[of_b]),
            sure(grids[of_c]), *operands[1:], softplus, order, rank,
        )  # fmt: skip
        return engine_of(x.device).Core(
            (batch, pixels, channels), None if of_x is of_u else grids[of_x], weights, places, scan,
            **({"apart": True} if apart else {}),
        )  # fmt: skip

    facts = x.shape, ranks, places, softplus, apart, torch.get_num_threads()
    pointers = tuple(None if t is None else t.data_ptr() for t in (order, *operands))
    core: Callable[..., Tensor] | None = in_a_call(
        (quantizers, projection, dt_weight, facts, pointers), prepare
    )
    if core is not None:
        made = core(x) if u is None and front is None else core(x, u, front)
        return _as_many(made, apart) if apart else made
    assert front is None
    assert u is None
    assert not apart
    weights, steps = weights_of()
    image = x.unsqueeze(2)
    codes, grid = encode(image, of_x, directions)
    of_scan = (codes, grid) if of_u is of_x else encode(image, of_u, directions)
    made = cpu.linear(codes, grid, weights).view(batch, pixels, directions, rows)
    low, b, c = (
        encode(made[..., at : at + n], q, by_group=True)
        for at, n, q in zip(places, (rank, states, states), (of_rank, of_b, of_c), strict=True)
    )
    of_steps = None
    if of_delta is not None:
        count = pixels * directions * channels
        of_steps = grid_of(of_delta, lambda: cpu.delta_moments(*low, steps), count)
    return cpu.scan(of_scan, low, steps, of_steps, operands[0], b, c, *operands[1:], softplus, order)


def _as_many(parts: Tensor, count: int) -> tuple[Tensor, ...]:
    """Tensors whose sum is that of ``parts``: one for each where there are as many as there were while tracing."""
    if len(parts) > count:  # an image may have more paths than another one
        parts = torch.cat((parts[: count - 1], parts[count - 1 :].sum(0, keepdim=True)))
    return (*parts.unbind(), *(torch.zeros_like(parts[0]) for _ in range(count - len(parts))))


def sequence_core(
    x: Tensor,
    reverse: bool,
    shift: int,
    ranks: tuple[int, int, int],
    places: tuple[int, int, int],
    of_taps: nn.Module,
    taps: PackedTensor,
    taps_bias: Tensor | None,
    act: nn.Module | None,
    *modules: Any,
    softplus: bool,
) -> Tensor:
    """A convolution along a sequence, SiLU, and ``scan_core`` of its one direction: (B, L, D).

    Args:
        x: (B, L, D), any strides.
        reverse: the sequence runs from the last row to the first.
        shift: step t reads steps t + shift, t + shift + 1, .., where there are any.
        of_taps: the quantizer of x; taps: (D, 1, T).
        act: the SiLU, where that is a module.
        modules: those of ``scan_core``.
    """
    count = taps.shape[2]
    offsets = [-(shift + i) if reverse else shift + i for i in range(count)]
    reach = max(map(abs, offsets))

    def spread() -> Tensor:
        """Taps of a convolution that looks as far to both sides, zeros where there are none."""
        values = taps().float().reshape(-1, count).T
        wide = values.new_zeros(2 * reach + 1, values.shape[1])
        wide[[reach + o for o in offsets]] = values
        return engine.by_lanes(wide)

    image = x.unsqueeze(1)
    engine = engine_of(x.device)
    grid = grid_of(of_taps, lambda: cpu.moments(image), x[0].numel())
    bias = bias_of(x.new_zeros(x.shape[2]) if taps_bias is None else taps_bias)
    assert bias is not None
    weights = kept(taps, ("sequence", reverse, shift), spread)
    silu = "silu" if act is None or not hooks_of(act) else None
    y: Tensor = engine.depthwise(image, grid, weights, bias, (1, 2 * reach + 1), (1, 1), silu)
    y = y.squeeze(1)
    if act is not None and silu is None:
        y = act(y)
    return scan_core(y, _order(x.shape[1], reverse, x.device), ranks, places, *modules, softplus=softplus)


@lru_cache(maxsize=64)
def _order(length: int, reverse: bool, device: torch.device) -> Tensor:
    order = torch.arange(length, dtype=torch.int32, device=device)[None]
    return order.flip(1).contiguous() if reverse else order


def sure(grid: Grid | None) -> Grid:
    assert grid is not None
    return grid
