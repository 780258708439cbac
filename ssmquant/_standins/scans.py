"""Selective scans under the names and signatures of mamba-ssm, VMamba and LBMamba, computed by ``ssmquant.ops``.

The Python functions are plain functions, so tracers and compilers see through them. The C++ entry points come in pairs:
``fwd``, and ``bwd`` that runs the scan again and differentiates it, for the ``autograd.Function``s that call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops import lb_window, selective_scan

__all__ = [
    "SelectiveScanFn", "SelectiveScanNoGateFn", "core_bwd", "core_fwd", "gradients", "lb_bwd", "lb_fwd", "mamba_bwd",
    "mamba_fwd", "ndstate_bwd", "ndstate_fwd", "nrow_bwd", "nrow_fwd", "selective_scan_fn", "selective_scan_no_gate_fn",
]  # fmt: skip


def selective_scan_fn(
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
) -> Any:
    """mamba-ssm's function of that name."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), return_last_state)


def selective_scan_no_gate_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Any:
    """``selective_scan_fn`` of VMamba's package ``selective_scan``: no gate, no last state."""
    return selective_scan(u, delta, A, B, C, D, None, delta_bias, bool(delta_softplus))


class SelectiveScanFn:
    """The name of the ``autograd.Function`` behind mamba-ssm's function; only ``apply`` is there."""

    apply = staticmethod(selective_scan_fn)


class SelectiveScanNoGateFn:
    """The same for the package ``selective_scan``."""

    apply = staticmethod(selective_scan_no_gate_fn)


# ---- the extension modules: positional arguments, as in C++ --------------------------------------------------------


def gradients(
    function: Callable[..., Tensor], operands: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of ``function(*operands)`` with respect to each operand, by computing it again."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
        out = function(*leaves)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype)))
    return [None if t is None else next(found) for t in leaves]


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """``out`` before the gate, and the states in the kernels' layout: ``states[:, :, -1, 1::2]`` is the last one."""
    if delta.shape[1] != u.shape[1]:  # channels may share their step sizes (VMamba)
        times = u.shape[1] // delta.shape[1]
        delta = delta.repeat_interleave(times, dim=1)
        bias = bias if bias is None else bias.repeat_interleave(times)
    out, last = selective_scan(u, delta, A, B, C, D, None, bias, bool(softplus), True, window=window)
    return out, torch.stack((torch.zeros_like(last), last), dim=-1).flatten(2).unsqueeze(2)


def _gate(y: Tensor, z: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * F.silu(z.to(wide))).to(y.dtype)


def mamba_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *,
    window: int = 0,
) -> list[Tensor]:
    """``selective_scan_cuda.fwd``: [out, states], and the gated out if there is a gate."""
    out, states = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, window)
    return [out, states] if z is None else [out, states, _gate(out, z)]


def mamba_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    states: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool = False,
    *,
    window: int = 0,
) -> list[Tensor | None]:
    """``selective_scan_cuda.bwd``: the gradients of u, delta, A, B, C, D and delta_bias.

    With a gate also that of z (written into ``dz`` if given) and, if asked for, the gated out.
    """
    gated: list[Tensor] = []

    def function(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        z: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(u.dtype, dout.dtype)
        y = _scan(u.to(wide), delta, A, B, C, D, bias, delta_softplus, window)[0]
        gated.append(y if z is None else _gate(y, z))
        return gated[0]

    *found, found_z = gradients(function, (u, delta, A, B, C, D, delta_bias, z), dout)
    if z is None:
        return found
    if dz is not None and found_z is not None:
        found_z = dz.copy_(found_z)
    return [*found, found_z, gated[0].detach()] if recompute_out_z else [*found, found_z]


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = False,
) -> list[Tensor]:
    """``fwd`` of VMamba's ``selective_scan_cuda_core`` and, with ``out_float``, ``_oflex``: [out, states]."""
    if out_float:
        u = u.to(torch.promote_types(u.dtype, torch.float32))
    return [*_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)]


def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    states: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """``bwd`` of both: the gradients of u, delta, A, B, C, D and delta_bias."""

    def function(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        return _scan(u.to(dout.dtype), delta, A, B, C, D, bias, delta_softplus)[0]

    return gradients(function, (u, delta, A, B, C, D, delta_bias), dout)


def ndstate_fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> list[Tensor]:
    """``selective_scan_cuda_ndstate.fwd``: one state, so A is (D,) and B and C are (B, G, L)."""
    return core_fwd(u, delta, A[:, None], B[:, :, None], C[:, :, None], *rest)


def _first(x: Tensor | None, dim: int) -> Tensor | None:
    return x if x is None else x.select(dim, 0)


def ndstate_bwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> list[Tensor | None]:
    """``selective_scan_cuda_ndstate.bwd``."""
    du, ddelta, dA, dB, dC, *others = core_bwd(u, delta, A[:, None], B[:, :, None], C[:, :, None], *rest)
    return [du, ddelta, _first(dA, 1), _first(dB, 2), _first(dC, 2), *others]


def nrow_fwd(*arguments: Any) -> list[Tensor]:
    """``fwd`` of ``selective_scan_cuda_nrow`` and ``_test``, with a gate (10 arguments) or without (9)."""
    return mamba_fwd(*arguments[:9]) if len(arguments) == 10 else core_fwd(*arguments)


def nrow_bwd(*arguments: Any) -> list[Tensor | None]:
    """``bwd`` of both, with a gate (15 arguments) or without (11)."""
    return mamba_bwd(*arguments[:14]) if len(arguments) == 15 else core_bwd(*arguments)


def _lb_window(length: int) -> int:
    return lb_window(length, "rocm" if torch.version.hip else "cuda")


def lb_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_float: bool = True,
) -> list[Tensor]:
    """``fwd`` of LBMamba's ``pscan``: as mamba-ssm's, locally bidirectional, and in float32 unless told otherwise."""
    if out_float:
        u = u.to(torch.promote_types(u.dtype, torch.float32))
    window = _lb_window(u.shape[-1])
    return mamba_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window=window)


def lb_bwd(u: Tensor, *rest: Any) -> list[Tensor | None]:
    """``bwd`` of LBMamba's ``pscan``."""
    return functools.partial(mamba_bwd, window=_lb_window(u.shape[-1]))(u, *rest[:13])
