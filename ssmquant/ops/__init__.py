"""Operators of the library, each in ``torch.ops.ssmquant`` and as a function here. Needs torch only."""

import torch

from ssmquant.ops import nvrtc, quantize, upstream
from ssmquant.ops.deployed import cpu as deployed
from ssmquant.ops.mixers import causal_conv1d, mamba2_split_conv1d_scan, mamba_inner
from ssmquant.ops.norms import gated_norm, layer_norm
from ssmquant.ops.selection import selected, use_backend
from ssmquant.ops.selective_scan import cpu, lb_window, scan_paths, selective_scan, selective_scan_map
from ssmquant.ops.selective_scan.backends import explain
from ssmquant.ops.ssd_scan import ssd_scan

__all__ = [
    "backend_report",
    "causal_conv1d",
    "gated_norm",
    "layer_norm",
    "lb_window",
    "mamba2_split_conv1d_scan",
    "mamba_inner",
    "scan_paths",
    "selective_scan",
    "selective_scan_map",
    "ssd_scan",
    "use_backend",
]


def backend_report() -> list[tuple[str, str, str]]:
    """Which implementation serves which operator on this machine: rows of (operator and device, name, why).

    Where kernels of ours are compiled at first use, asking for them here compiles them.

    Raises:
        InputError: ``SSMQUANT_BACKEND`` names no back end.
    """
    choice = selected("selective_scan")
    rows = [("ssd_scan", "chunked", "PyTorch's matrix products over chunks of time; runs anywhere")]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    for device in ("cpu", *gpus):
        found = dict(explain(torch.device(device), torch.float32, 16))
        able = [name for name, reason in found.items() if reason is None]
        name = choice if choice in able else able[0]
        why = [f"not {other}: {reason}" for other, reason in found.items() if reason is not None]
        if choice is not None and choice not in found:
            why.append(f"not {choice}, which was chosen: it is not for this device")
        if len(able) > 1:
            why.append(f"can be chosen: {', '.join(n for n in able if n != name)}")
        if name == "cuda":
            why.insert(0, f"our CUDA C++, from a wheel or compiled by {nvrtc.describe() or 'no one here'}")
        if name == "cpu":
            why.insert(0, f"C++ with {cpu.paths()[0]} instructions")
        rows.append((f"selective_scan, {device}", name, "; ".join(why) or "the only one for this device"))
        if device == "cpu":
            reason = deployed.unavailable(torch.device(device))
            served = ("cpu", f"products and scans on codes, C++ with {deployed.paths()[0]} instructions")
            rows.append(("deployed models, cpu", *(served if reason is None else ("torch", reason))))
        module, reason = quantize.explain(torch.device(device))
        fused = "fused kernels of fake quantization"
        rows.append((f"quantize, {device}", *(("torch", reason) if module is None else (module.NAME, fused))))
    fuse = "off, as chosen" if selected("fuse") == "chunked" else "cross-scans, linear layers and norms fused"
    rows += [
        (f"training graphs, {device}", "torch" if fuse.startswith("off") else "fused", fuse)
        for device in gpus
    ]
    if not gpus:
        return [*rows, ("selective_scan, cuda", "none", "PyTorch sees no CUDA device")]
    package = upstream.find("causal_conv1d")
    if isinstance(package, str):
        return [*rows, ("causal_conv1d, cuda", "torch", f"not mamba_ssm: {package}")]
    if choice == "mamba_ssm":
        return [*rows, ("causal_conv1d, cuda", "mamba_ssm", "the package causal-conv1d, as chosen")]
    return [*rows, ("causal_conv1d, cuda", "torch", "can be chosen: mamba_ssm")]
