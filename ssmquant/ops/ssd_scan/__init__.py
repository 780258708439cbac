"""The scan of Mamba-2: its definition (``reference``), plain torch (``chunked``), and the operator (``op``)."""

from ssmquant.ops.ssd_scan.op import ssd_scan
from ssmquant.ops.ssd_scan.reference import ssd_scan_reference

__all__ = ["ssd_scan", "ssd_scan_reference"]
