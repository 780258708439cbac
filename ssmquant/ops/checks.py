"""What the operators have in common: checks of operands, the dtype of a state, a way around autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ssmquant.errors import InputError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_F = TypeVar("_F", bound=Callable[..., Any])

__all__ = [
    "check_operands",
    "check_window",
    "differentiable_once",
    "fail",
    "outside_inference_mode",
    "recorded",
    "state_dtype",
    "unfilled",
    "without_autocast",
]


def fail(op: str, name: str, tensor: Tensor, wanted: str) -> None:
    """Raises the InputError of a wrong shape."""
    raise InputError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {wanted}")


def recorded() -> bool:
    """Whether something notes or transforms operators as they are called: kernels that Python launches do not show.

    ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``make_fx`` and other dispatch modes, ``torch.func``.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._are_functorch_transforms_active()
    )


def outside_inference_mode(function: _F) -> _F:
    """Runs a function without gradients where it is called in inference mode.

    What is made there can neither be trained nor tell that it has been written to.
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(_F, outside)


def check_operands(op: str, named: Mapping[str, Tensor | None], first: str) -> None:
    """Raises InputError unless all are real floating point tensors on the device of the one named ``first``."""
    home = named[first]
    assert home is not None
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.is_complex():
            raise InputError(f"{op}: {name} is complex; only real state spaces are supported")
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{op}: {name} has dtype {tensor.dtype}, expected a float of 16, 32 or 64 bits")
        if tensor.device != home.device:
            raise InputError(
                f"{op}: {name} is on {tensor.device}, {first} on {home.device}; move them together"
            )


def check_window(op: str, window: int) -> None:
    """Raises InputError if negative."""
    if window < 0:
        raise InputError(f"{op}: window is {window}, expected 0 (none) or the number of steps in a window")


def unfilled(*operands: Tensor | None) -> tuple[Tensor, ...]:
    """Their gradients without values, as of a fake kernel; empty for None, which the first one must not be."""
    home = operands[0]
    assert home is not None
    return tuple(
        home.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in operands
    )


def differentiable_once(name: str, operator: str, library: torch.library.Library) -> None:
    """Makes a second derivative through ``operator``, the backward pass of ``name``, an error instead of a zero."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise InputError(f"{name}: it is differentiable once; a gradient of its gradient is not implemented")

    torch.library.register_autograd(f"ssmquant::{operator}", backward, lib=library)


def state_dtype(*operands: Tensor | None) -> torch.dtype:
    """float64 if one of them is, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in operands)
    return torch.float64 if double else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in here keep the dtype of their operands: a scan is not to lose its float32 state to autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
