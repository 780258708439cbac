"""The back ends of the float selective scan, and which of them serves a call.

A back end is a module in this folder with the names of :class:`Backend`. The choice depends on the device, the dtype of
the state and its size only, never on values or other sizes, and holds for the process: an operator on fake tensors, its
forward pass and its backward pass have to agree on it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from ssmquant.ops.selection import note, passed_over, selected

__all__ = ["Backend", "choose", "explain"]

# The best first; the last one serves everything. "mamba_ssm" is there for those who choose it.
_ORDER = {"cuda": ("cuda", "triton", "chunked"), "cpu": ("cpu", "chunked")}
_MODULES = {"mamba_ssm": "mamba"}
_OPTIONAL = {"cuda": ("mamba_ssm",)}


class Backend(Protocol):
    """What the module of a back end has."""

    NAME: str

    def unavailable(self, device: torch.device, dtype: torch.dtype, states: int, /) -> str | None:
        """Why it cannot serve a scan there whose state is of ``dtype`` and size ``states``; None if it can.

        Cached. May compile, and says so before in a line on stderr. Does not raise.
        """

    def saved_shape(self, batch: int, channels: int, states: int, length: int, /) -> tuple[int, ...]:
        """The shape of what the forward pass keeps for the backward one. First comes a number of pieces of time.

        Sizes may be symbolic, so it is arithmetic only.
        """

    def forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
        dtype: torch.dtype,
        save: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, last state, and what is saved (of first size 0 unless ``save``), as of ``chunked.forward``."""

    def backward(
        self,
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
        dtype: torch.dtype,
        /,
    ) -> tuple[Tensor, ...]:
        """The gradients of u, delta, A, B, C, D, bias, as of ``chunked.backward``.

        ``g_last`` is None only if the module has ``LAST_IS_OPTIONAL = True``, where nothing depends on the last state.
        """


@functools.cache
def _load(name: str) -> Backend | str:
    """The module of a back end, or why it cannot be imported."""
    try:
        module = importlib.import_module(f"{__package__}.{_MODULES.get(name, name)}")
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return cast(Backend, module)


@functools.cache
def _reason(name: str, device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why a back end cannot serve such a scan; None if it can."""
    known = (*_ORDER.get(device.type, ("chunked",)), *_OPTIONAL.get(device.type, ()))
    if name not in known:
        return f"it does not run on {device.type} tensors"
    module = _load(name)
    return module if isinstance(module, str) else module.unavailable(device, dtype, states)


@functools.cache
def _automatic(device: torch.device, dtype: torch.dtype, states: int) -> Backend:
    order = _ORDER.get(device.type, ("chunked",))
    name = next(n for n in order if _reason(n, device, dtype, states) is None)
    module = _load(name)
    assert not isinstance(module, str)
    if name == order[-1] and len(order) > 1 and _is_here(device):
        why = "; ".join(f"{n}: {_reason(n, device, dtype, states)}" for n in order[:-1])
        note(f"selective_scan on {device.type} runs in plain PyTorch, which is slower ({why})")
    return module


def _is_here(device: torch.device) -> bool:
    """Not so for the device of fake tensors on a machine without one."""
    return device.type != "cuda" or torch.cuda.is_available()


def choose(device: torch.device, dtype: torch.dtype, states: int, name: str | None = None) -> Backend:
    """The back end for a state of ``dtype`` (float32 or float64) and size ``states``.

    Args:
        device: of the operands.
        dtype: of the state.
        states: d_state.
        name: the one to take if it can, as chosen by an earlier call; None: what the user selected. One that cannot is
            passed over with a warning.

    Raises:
        InputError: the environment variable names no back end.
    """
    name = name or selected("selective_scan")
    if name is not None:
        reason = _reason(name, device, dtype, states)
        module = _load(name)
        if reason is None and not isinstance(module, str):
            return module
        passed_over("selective_scan", name, str(reason))
    return _automatic(device, dtype, states)


def explain(device: torch.device, dtype: torch.dtype, states: int) -> list[tuple[str, str | None]]:
    """The back ends of a device, the best first, each with why it cannot serve such a scan (None: it can)."""
    names = (*_ORDER.get(device.type, ("chunked",)), *_OPTIONAL.get(device.type, ()))
    return [(name, _reason(name, device, dtype, states)) for name in names]
