"""The selective scan: its definition (``reference``), plain torch (``chunked``), Triton, and the operator (``op``)."""

from ssmquant.ops.selective_scan.op import selective_scan
from ssmquant.ops.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]
