"""Which back end of fake quantization serves a device."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from ssmquant.ops.selection import selected

__all__ = ["backend", "explain"]


@functools.cache
def _automatic(device: torch.device) -> tuple[ModuleType | None, str]:
    if device.type == "cpu":
        from ssmquant.ops.quantize import cpu as module
    elif device.type != "cuda":
        return None, f"plain PyTorch: there are no kernels for {device.type}"
    elif importlib.util.find_spec("triton") is None:
        return None, "plain PyTorch: Triton is not installed"
    else:
        from ssmquant.ops.quantize import triton as module  # type: ignore[no-redef]
    reason = module.unavailable(device)
    return (module, module.NAME) if reason is None else (None, f"plain PyTorch: {reason}")


def explain(device: torch.device) -> tuple[ModuleType | None, str]:
    """The back end for a device, and why it is that one."""
    if selected("quantize") == "chunked":
        return None, "plain PyTorch, as chosen"
    return _automatic(device)


def backend(device: torch.device) -> ModuleType | None:
    """The back end for a device, or None."""
    return None if selected("quantize") == "chunked" else _automatic(device)[0]
