"""``torch.ops.ssmquant.selective_scan``: schema, shape checks, fake kernels and autograd.

The public operator is composed of two opaque ones, ``_selective_scan_fwd`` and ``_selective_scan_bwd``, and of the gate
``y * silu(z)``, which autograd and compilers see as what it is. Both opaque ones run on every device. With a window the
forward one is called twice (``window``).

The back end (``backends``) is chosen in the public operator and handed on by its name, for what one saves in the
forward pass no other one can read in the backward pass. A compiled graph holds the name too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops.checks import (
    check_operands,
    check_window,
    differentiable_once,
    fail,
    state_dtype,
    unfilled,
    without_autocast,
)
from ssmquant.ops.selective_scan.backends import choose
from ssmquant.ops.selective_scan.window import ahead

__all__ = ["selective_scan"]

_NAME = "selective_scan"
_OPERANDS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D"
_LIBRARY = torch.library.Library("ssmquant", "FRAGMENT")
_LIBRARY.define(
    f"selective_scan({_OPERANDS}=None, Tensor? z=None, Tensor? delta_bias=None, bool delta_softplus=False,"
    " int window=0) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"_selective_scan_fwd({_OPERANDS}, Tensor? delta_bias, bool delta_softplus, bool save, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"_selective_scan_bwd(Tensor g, Tensor? g_last, Tensor saved, {_OPERANDS}, Tensor? delta_bias, bool delta_softplus,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
) -> None:
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}
    check_operands(_NAME, named, "u")
    if u.dim() != 3:
        fail(_NAME, "u", u, "(B, D, L)")
    batch, channels, length = u.shape
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            fail(_NAME, name, tensor, f"u's {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != channels:
        fail(_NAME, "A", A, f"({channels}, N)")
    states = A.shape[1]
    groups: dict[str, int] = {}
    for name, tensor in (("B", B), ("C", C)):
        shape, rank = tuple(tensor.shape), tensor.dim()
        if (
            rank == 4
            and shape[1] > 0
            and channels % shape[1] == 0
            and shape == (batch, shape[1], states, length)
        ):
            groups[name] = shape[1]
        elif rank == 3 and shape == (batch, states, length):
            groups[name] = 1
        elif not (rank == 2 and shape == (channels, states)):
            fail(
                _NAME,
                name,
                tensor,
                f"({batch}, {states}, {length}), ({batch}, G, {states}, {length}) with G dividing {channels}, "
                f"or ({channels}, {states})",
            )
    if len(groups) == 2 and groups["B"] != groups["C"]:
        raise InputError(
            f"selective_scan: B has {groups['B']} groups but C has {groups['C']}; give both the same number"
        )
    for name, tensor in (("D", D), ("delta_bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            fail(_NAME, name, tensor, f"({channels},)")


def _saved(A: Tensor, u: Tensor, save: bool, dtype: torch.dtype, backend: str) -> Tensor:
    """What the back end saves, not filled."""
    batch, channels, length = u.shape
    states = A.shape[1]
    kernels = choose(u.device, dtype, int(states), backend)
    pieces, *rest = kernels.saved_shape(batch, channels, states, length)
    return A.new_empty((pieces if save else 0, *rest), dtype=dtype)


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(u, delta, A, B, C, D, bias)
    batch, channels, length = u.shape
    if 0 in (batch, channels, length, A.shape[1]):
        y = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
        if D is not None and y.numel():
            y.copy_(D.to(dtype)[:, None] * u)
        last = A.new_zeros((batch, channels, A.shape[1]), dtype=dtype)
        return y, last, _saved(A, u, save, dtype, backend)
    kernels = choose(u.device, dtype, A.shape[1], backend)
    return kernels.forward(u, delta, A, B, C, D, bias, softplus, dtype, save)


def _fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(u, delta, A, B, C, D, bias)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = A.new_empty((*u.shape[:2], A.shape[1]), dtype=dtype)
    return y, last, _saved(A, u, save, dtype, backend)


def _backward(
    g: Tensor,
    g_last: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = state_dtype(u, delta, A, B, C, D, bias)
    if 0 in (*u.shape, A.shape[1]):
        grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C)]
        optional = [u.new_empty(0) if t is None else torch.zeros_like(t) for t in (D, bias)]
        if D is not None and u.numel():
            grads[0].copy_(D[:, None] * g)
            optional[0].copy_((g.to(dtype) * u).sum((0, 2)))
        return (*grads, *optional)
    kernels = choose(u.device, dtype, A.shape[1], backend)
    if g_last is None and not getattr(kernels, "LAST_IS_OPTIONAL", False):
        g_last = A.new_zeros((*u.shape[:2], A.shape[1]), dtype=dtype)
    return kernels.backward(g, g_last, saved, u, delta, A, B, C, D, bias, softplus, dtype)


def _fake_backward(
    g: Tensor,
    g_last: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    return unfilled(u, delta, A, B, C, D, bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, save, backend = inputs
    if not save:
        raise InputError("selective_scan: _selective_scan_fwd needs save=True where gradients are wanted")
    ctx.softplus, ctx.backend = softplus, backend
    # Mostly nothing depends on the last state, and a back end may save work where it knows.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx: Any, g: Tensor | None, g_last: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    saved, u, delta, A, B, C, D, bias = ctx.saved_tensors
    g = torch.zeros_like(u) if g is None else g
    operands = (u, delta, A, B, C, D, bias)
    grads = torch.ops.ssmquant._selective_scan_bwd(g, g_last, saved, *operands, ctx.softplus, ctx.backend)
    *main, g_D, g_bias = grads
    return (*main, None if D is None else g_D, None if bias is None else g_bias, None, None, None)


def _compose(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    check_window(_NAME, window)
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (u, delta, A, B, C, D, delta_bias)
    )
    scan = torch.ops.ssmquant._selective_scan_fwd
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    backend = choose(u.device, dtype, int(A.shape[1])).NAME
    # With a window outputs are added to, and rounded to u's dtype only then.
    x = u.to(dtype) if window else u
    y, last, _ = scan(x, delta, A, B, C, D, delta_bias, delta_softplus, save, backend)
    if window:
        with without_autocast(u.device):
            y = y + ahead(x, delta.to(dtype), A, B, C, delta_bias, delta_softplus, window, save, backend)
    if z is not None:
        wide = state_dtype(u, delta, A, B, C, D, z, delta_bias)
        y = y.to(wide) * F.silu(z.to(wide))
    return y.to(u.dtype), last


_LIBRARY.impl("selective_scan", _compose, "CompositeImplicitAutograd")
_LIBRARY.impl("_selective_scan_fwd", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("_selective_scan_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ssmquant::_selective_scan_fwd", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ssmquant::_selective_scan_bwd", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "ssmquant::_selective_scan_fwd", _autograd, setup_context=_setup, lib=_LIBRARY
)
differentiable_once(_NAME, "_selective_scan_bwd", _LIBRARY)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    window: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space recurrence of Mamba (Gu & Dao 2023, arXiv 2312.00752), zero-order hold.

    With ``dt = softplus(delta + delta_bias)`` (softplus if ``delta_softplus``), step by step along L::

        h = exp(dt * A) * h + dt * B * u        out = (<C, h> + D * u) * silu(z)

    Same arguments and meaning as mamba-ssm's ``selective_scan_fn``, differentiable once in every operand, also through
    the last state. It is one call of ``torch.ops.ssmquant.selective_scan``.

    With a ``window`` of w steps, y at step t also reads what the rest of its window adds (LBMamba, Zhang et al., TMLR
    2025; windows begin at steps 0, w, 2 w ...), walked from its end with E = 0 there::

        r[t] = exp(dt[t] * A) * E[t + 1]        E[t] = r[t] + dt[t] * B[t] * u[t]
        out = (<C, h + r> + D * u) * silu(z)

    Args:
        u: (B, D, L), the input; sets the dtype of ``out``.
        delta: (B, D, L), step sizes before bias and softplus.
        A: (D, N), real.
        B: (B, N, L), or (B, G, N, L) where each of G groups of D / G channels has its own, or constant (D, N).
        C: as B.
        D: (D,), skip weight.
        z: (B, D, L), gate.
        delta_bias: (D,).
        delta_softplus: apply softplus to the step sizes.
        return_last_state: return ``(out, last_state)``, the state of the forward recurrence.
        window: steps in a window, 0 for none. LBMamba's own depends on the length, see ``lb_window``.

    Returns:
        ``out``, contiguous (B, D, L) in u's dtype. The state is kept in float32 (float64 if an operand is float64), and
        so is ``last_state``, (B, D, N).

    Raises:
        InputError: a shape does not fit, an operand is complex, an integer or on another device, or a negative window.
    """
    out, last = torch.ops.ssmquant.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window)
    return (out, last) if return_last_state else out
