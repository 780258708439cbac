"""What the benchmarks share: the heading of their results, and writing them."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


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
