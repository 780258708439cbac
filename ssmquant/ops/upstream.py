"""The packages mamba-ssm and causal-conv1d, where they are installed: float back ends for those who choose "mamba_ssm".

Only what is compiled in them is of use here. ``import mamba_ssm`` itself needs packages of language models and is
never done. A stand-in of ours, which may be what is found under the same name, would lead back to where the call came
from; it is told from the real thing by its loader.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

from ssmquant.ops.selection import passed_over, selected

__all__ = ["causal_conv1d", "convolution_unavailable", "find"]

_INSTALL = {
    "selective_scan_cuda": "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm",
    "causal_conv1d": "pip install --no-build-isolation causal-conv1d",
}


@functools.cache
def find(name: str) -> ModuleType | str:
    """The installed module of that name, or why there is none that can be used."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        return f"{missing} is not installed ({_INSTALL.get(name, missing)})"
    except (ImportError, OSError) as error:  # made for another torch or CUDA
        return f"{name} does not load: {str(error).partition(chr(10))[0]}"
    loader = type(getattr(module, "__loader__", None))
    if loader.__module__.partition(".")[0] == "ssmquant":
        return f"{name} is not installed, there is only ssmquant's own stand-in for it"
    return module


def convolution_unavailable(x: Tensor, weight: Tensor) -> str | None:
    """Why causal-conv1d cannot serve x (B, D, L) and weight (D, 1, W); None if it can."""
    if not x.is_cuda:
        return "causal-conv1d runs on CUDA devices only"
    if not 2 <= weight.shape[-1] <= 4:
        return f"causal-conv1d has 2 to 4 taps, not {weight.shape[-1]}"
    if any(t.dtype.itemsize > 4 for t in (x, weight)):
        return "causal-conv1d does not compute in float64"
    found = find("causal_conv1d")
    return found if isinstance(found, str) else None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor | None:
    """causal-conv1d's convolution, of weight (D, 1, W), if the user has chosen it and it can; else None.

    Left to PyTorch as well: what is compiled or traced, for an opaque call would hide the convolution.
    """
    if torch.compiler.is_compiling() or selected("causal_conv1d") != "mamba_ssm":
        return None
    if any(type(t) not in (Tensor, nn.Parameter) for t in (x, weight)):
        return None
    reason = convolution_unavailable(x, weight)
    module = find("causal_conv1d")
    if reason is not None or isinstance(module, str):
        passed_over("causal_conv1d", "mamba_ssm", str(reason))
        return None
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = bias if bias is None else bias.to(weight.dtype)
    out: Tensor = module.causal_conv1d_fn(x, weight.squeeze(1), bias, activation=activation)
    return out
