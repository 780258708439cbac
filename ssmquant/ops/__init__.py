"""Operators of the library, each in ``torch.ops.ssmquant`` and as a function here. Needs torch only."""

from ssmquant.ops.selective_scan import selective_scan

__all__ = ["selective_scan"]
