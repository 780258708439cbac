"""What the benchmarks share: the heading of their results, writing them, and time by kernel."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def hardware(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def heading(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, and how busy the machine was."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    return {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit.strip() or None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all, so that a run that is cut short keeps what it has."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def breakdown(
    run: Callable[[], object], device: torch.device, runs: int = 3, most: int = 25
) -> dict[str, Any]:
    """Kernels (on a CPU: operators) of a run by name: all together, and the ones that take longest."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            run()
        if gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    found = []
    for event in profiler.key_averages():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", event.key)
            found.append({"name": name[:80], "calls": event.count / runs, "ms": spent / 1e3 / runs})
    found.sort(key=lambda row: -row["ms"])
    total = {"calls": sum(row["calls"] for row in found), "ms": sum(row["ms"] for row in found)}
    return {**total, "kernels": found[:most]}
