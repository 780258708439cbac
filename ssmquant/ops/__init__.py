"""Operators of the library, each in ``torch.ops.ssmquant`` and as a function here. Needs torch only."""

import importlib.util

import torch

from ssmquant.ops.mixers import causal_conv1d, mamba2_split_conv1d_scan, mamba_inner
from ssmquant.ops.norms import gated_norm, layer_norm
from ssmquant.ops.selective_scan import lb_window, selective_scan
from ssmquant.ops.ssd_scan import ssd_scan

__all__ = [
    "backend_report",
    "causal_conv1d",
    "gated_norm",
    "layer_norm",
    "lb_window",
    "mamba2_split_conv1d_scan",
    "mamba_inner",
    "selective_scan",
    "ssd_scan",
]


def backend_report() -> list[tuple[str, str, str]]:
    """Which implementation serves which operator on this machine: rows of (operator and device, name, why)."""
    rows = [
        ("ssd_scan", "chunked", "PyTorch's matrix products over chunks of time; runs anywhere"),
        ("selective_scan, cpu", "chunked", "PyTorch in chunks of time; runs anywhere"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("selective_scan, cuda", "none", "PyTorch sees no CUDA device")]
    if importlib.util.find_spec("triton") is None:
        why = "Triton is not installed (pip install triton)"
    elif torch.cuda.get_device_capability() < (7, 0):
        why = "the GPU is older than compute capability 7.0"
    else:
        return [
            *rows,
            ("selective_scan, cuda", "triton", "float32 state; chunked for float64 or more than 64 states"),
        ]
    return [*rows, ("selective_scan, cuda", "chunked", why)]
