"""The selective scan: its definition (``reference``), plain torch (``chunked``), Triton, and the operator (``op``)."""

from ssmquant.ops.selective_scan.op import selective_scan
from ssmquant.ops.selective_scan.reference import selective_scan_reference
from ssmquant.ops.selective_scan.window import lb_window

__all__ = ["lb_window", "selective_scan", "selective_scan_reference"]
