"""Models to be judged by health, damage to them, and the counts by NumPy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmquant import HealthReport, HealthRow, QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers import Quantizer
from tests.small import Scanner, X, prepared_and_calibrated

monitors: Any = sys.modules["ssmquant.analysis.health"]  # not the function of that name


def wide(config: QConfig | None = None, width: int = 16) -> Any:
    """A calibrated Scanner whose weights are large enough to be judged."""
    torch.manual_seed(0)
    return prepared_and_calibrated(Scanner(width).eval(), config or QConfig(w_bits=2, a_bits=2), X)


def quantizer(model: nn.Module, key: str) -> Any:
    return runtime_of(model).weights[key]


def row(report: HealthReport, name: str) -> HealthRow:
    (found,) = [r for r in report.rows if r.name == name]
    return found


def kinds(report: HealthReport) -> dict[str, list[str]]:
    return {r.name: [kind for kind, _ in r.problems] for r in report.rows if r.problems}


@torch.no_grad()
def damage(model: nn.Module, key: str, factor: float) -> Any:
    """Scales alpha and drops the shift."""
    q = quantizer(model, key)
    q.alpha.mul_(factor)
    q.beta.zero_()
    return model


@torch.no_grad()
def counted(q: Quantizer, x: Tensor) -> dict[str, float]:
    """What ``measure`` counts, by numpy from what encode says."""
    code = q.encode(x, check=False)
    codes, y = code.codes.numpy(), code.decode().double().numpy()
    levels = code.levels.double().numpy()
    near = levels[np.arange(len(levels)), np.abs(levels).argmin(1)].reshape(code.scale.shape)
    values, half = x.double().numpy(), code.scale.abs().double().numpy() / 2
    low, high = (end(levels, 1).reshape(code.scale.shape) for end in (np.min, np.max))
    return {
        "used": len(np.unique(codes)),
        "zero": int((y == near).sum()),
        "scale": float(code.scale.abs().double().mean()),
        "clipped": int(((values < low - half) | (values > high + half)).sum()),
        "signal": float((values**2).sum()),
        "noise": float(((values - y) ** 2).sum()),
        "blank": int((values == 0).sum()),
    }
