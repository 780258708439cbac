"""The selective scan: definition (``reference``), plain torch (``chunked``), Triton kernels, and the operator (``op``)."""

from .op import selective_scan
from .reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]
