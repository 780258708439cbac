"""``torch.ops.ssmquant.ssd_scan``: schema, checks, and the steps around the scan proper.

The operator is composed of plain torch calls, which autograd and compilers see as what they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops.checks import check_operands, check_window, fail, state_dtype, without_autocast
from ssmquant.ops.ssd_scan import chunked

__all__ = ["ssd_scan"]

_NAME = "ssd_scan"
_LIBRARY = torch.library.Library("ssmquant", "FRAGMENT")
_LIBRARY.define(
    f"{_NAME}(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None,"
    " bool dt_softplus=False, Tensor? initial_states=None, float dt_min=0.0, float? dt_max=None, int window=0,"
    " int chunk_size=64) -> (Tensor, Tensor)"
)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
) -> None:
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_operands(_NAME, {**named, "initial_states": initial_states}, "x")
    if x.dim() != 4:
        fail(_NAME, "x", x, "(B, L, H, P)")
    batch, length, heads, width = x.shape
    if tuple(dt.shape) != (batch, length, heads):
        fail(_NAME, "dt", dt, f"({batch}, {length}, {heads})")
    for name, tensor in (("A", A), ("dt_bias", dt_bias)):
        if tensor is not None and tuple(tensor.shape) != (heads,):
            fail(_NAME, name, tensor, f"({heads},)")
    for name, tensor in (("B", B), ("C", C)):
        shape = tuple(tensor.shape)
        if len(shape) != 4 or shape[:2] != (batch, length) or shape[2] < 1 or heads % shape[2] != 0:
            fail(_NAME, name, tensor, f"({batch}, {length}, G, N) with G dividing {heads}")
    if B.shape != C.shape:
        fail(_NAME, "C", C, f"B's {tuple(B.shape)}")
    if D is not None and tuple(D.shape) not in ((heads,), (heads, width)):
        fail(_NAME, "D", D, f"({heads},) or ({heads}, {width})")
    if z is not None and z.shape != x.shape:
        fail(_NAME, "z", z, f"x's {tuple(x.shape)}")
    wanted = (batch, heads, width, B.shape[3])
    if initial_states is not None and tuple(initial_states.shape) != wanted:
        fail(_NAME, "initial_states", initial_states, f"{wanted}")


def _compose(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    window: int = 0,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states)
    check_window(_NAME, window)
    if chunk_size < 1:
        raise InputError(f"{_NAME}: chunk_size is {chunk_size}, expected at least 1")
    if dt_max is not None and not dt_min <= dt_max:
        raise InputError(f"{_NAME}: dt_min {dt_min} is greater than dt_max {dt_max}")
    dtype = state_dtype(x, dt, A, B, C, D, z, dt_bias, initial_states)
    with without_autocast(x.device):
        u, step = x.to(dtype), dt.to(dtype)
        if dt_bias is not None:
            step = step + dt_bias.to(dtype)
        if dt_softplus:
            step = F.softplus(step)
        step = step.clamp(dt_min, dt_max)
        initial = None if initial_states is None else initial_states.to(dtype)
        y, last = chunked.scan(u, step, A.to(dtype), B.to(dtype), C.to(dtype), initial, window, chunk_size)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * u
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(x.dtype).contiguous(), last.contiguous()


_LIBRARY.impl(_NAME, _compose, "CompositeImplicitAutograd")


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_last_state: bool = False,
    *,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    window: int = 0,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state space recurrence of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): one decay a head, not one a state.

    With ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)`` (softplus if ``dt_softplus``), along L, for each head::

        h = exp(dt * A) * h + dt * x B^T        out = (h C + D * x) * silu(z)

    Same meaning as mamba-ssm's ``mamba_chunk_scan_combined``, differentiable in every operand, also through the last
    state. It is one call of ``torch.ops.ssmquant.ssd_scan``.

    Args:
        x: (B, L, H, P), the input, H heads of P channels; sets the dtype of ``out``.
        dt: (B, L, H), step sizes before bias, softplus and clamp.
        A: (H,).
        B: (B, L, G, N), where each of G groups of H / G heads has its own.
        C: as B.
        D: (H,) or (H, P), skip weight.
        z: as x, gate.
        dt_bias: (H,).
        dt_softplus: apply softplus to the step sizes.
        initial_states: (B, H, P, N), the state before the first step; zero without.
        return_last_state: return ``(out, last_state)``.
        dt_min: least step size. The default takes negative ones for 0, as mamba-ssm does.
        dt_max: greatest step size.
        window: looks ahead within windows of so many steps, see ``selective_scan``; 0: does not.
        chunk_size: steps that one matrix product takes; changes the speed, not the result.

    Returns:
        ``out``, contiguous (B, L, H, P) in x's dtype. The state is kept in float32 (float64 if an operand is float64),
        and so is ``last_state``, (B, H, P, N).

    Raises:
        InputError: a shape or a number does not fit, or an operand is complex, an integer or on another device.
    """
    most = None if dt_max == math.inf else dt_max  # a schema knows no infinity
    out, last = torch.ops.ssmquant.ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, dt_min, most, window, chunk_size
    )
    return (out, last) if return_last_state else out
