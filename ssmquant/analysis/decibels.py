"""Signal to quantization noise in decibels."""

from __future__ import annotations

import math

__all__ = ["bounded", "sqnr"]


def sqnr(signal: float, noise: float) -> float:
    """SQNR in dB of a signal's and its noise's power: infinite without noise, NaN where one is not finite."""
    if not math.isfinite(signal + noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def bounded(share: float) -> float:
    """SQNR in dB of a share of noise in a signal's power, from -300 to 300 (as good as none): JSON has no infinity."""
    return max(-300.0, min(300.0, -10 * math.log10(max(share, 1e-30)))) if share < math.inf else -300.0
