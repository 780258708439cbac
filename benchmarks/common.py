"""What the benchmarks share: the heading of their results, writing them, and time by kernel."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
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
    """Kernels (on a CPU: operators) of a run by name: all together, and the ones that take longest.

    On a GPU a kernel's time is what it adds to those before it: it may have begun, and waited, while they ran.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            run()
        if gpu:
            torch.cuda.synchronize()
    if gpu:
        times = added(
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        )
    else:
        known = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
        times = {e.key: (e.count, e.self_cpu_time_total) for e in known if not e.is_user_annotation}
    found = []
    for key, (count, spent) in times.items():
        name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", key)
        found.append({"name": name[:80], "calls": count / runs, "ms": spent / 1e3 / runs})
    found.sort(key=lambda row: -row["ms"])
    total = {"calls": sum(row["calls"] for row in found), "ms": sum(row["ms"] for row in found)}
    return {**total, "kernels": found[:most]}


def added(spans: Iterable[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """Of spans of time (name, begin, end), by name: how many, and the time in which none was that had begun before."""
    found: dict[str, tuple[int, float]] = {}
    last = -math.inf
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        count, spent = found.get(name, (0, 0.0))
        found[name] = count + 1, spent + max(0.0, end - max(begin, last))
        last = max(last, end)
    return found
