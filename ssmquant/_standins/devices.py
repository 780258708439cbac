"""What upstream code asks of CUDA without need: a device context around CPU tensors, ``.cuda()`` in constructors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["cpu_device_context", "cuda_means_cpu"]


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:  # inherited
            delattr(owner, name)


def _is_cpu(device: Any) -> bool:
    if device is None:  # the index of a CPU tensor's device
        return not torch.cuda.is_available()
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cpu"


@contextlib.contextmanager
def cpu_device_context() -> Iterator[None]:
    """``torch.cuda.device(tensor.device)`` of a CPU tensor does nothing, instead of raising."""
    original = torch.cuda.device.__init__

    @functools.wraps(original)
    def init(self: Any, device: Any) -> None:
        original(self, -1 if _is_cpu(device) else device)  # -1: "no device" in torch.cuda's own convention

    with _patched(torch.cuda.device, "__init__", init):
        yield


def _on_cpu(value: Any) -> Any:
    if type(value) is int:  # a device by its number
        return torch.device("cpu")
    if isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda":
        return torch.device("cpu")
    return value


def _redirected(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *map(_on_cpu, args), **{k: _on_cpu(v) for k, v in kwargs.items()})

    return to


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """``x.cuda()`` and ``x.to("cuda")`` of tensors and modules stay on the CPU."""
    with contextlib.ExitStack() as stack:
        for owner in (Tensor, nn.Module):
            stack.enter_context(_patched(owner, "to", _redirected(owner.to)))
            stack.enter_context(_patched(owner, "cuda", _stay))
        yield
