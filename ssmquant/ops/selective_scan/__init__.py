"""The selective scan: its definition (``reference``), the operators (``op``, ``maps``), and what computes them.

``backends`` chooses: ``cuda``, ``triton``, ``cpu``, ``chunked`` (plain torch) or, if asked to, ``mamba``.
"""

from ssmquant.ops.selective_scan.maps import scan_paths, selective_scan_map
from ssmquant.ops.selective_scan.op import selective_scan
from ssmquant.ops.selective_scan.reference import selective_scan_reference
from ssmquant.ops.selective_scan.window import lb_window

__all__ = ["lb_window", "scan_paths", "selective_scan", "selective_scan_map", "selective_scan_reference"]
