"""What deployed models compute on codes: integer products, and selective scans whose operands are codes.

Activations are encoded once where they are made; products of codes are exact integers, from which scales, shifts and
zero points are taken out afterwards:

    x = s_x * i + o          i: code index 0 .. 2**b - 1,  o: the value of code 0
    w = s_w * j - t_w        j: signed code
    sum x w = s_x * (s_w * sum ij - t_w * sum i) + o * sum w

``cpu`` has the kernels. Their truth is the deployed graph that is not fused, on decoded values.
"""

from ssmquant.ops.deployed import cpu
from ssmquant.ops.deployed.forms import (
    Attention,
    Codes,
    Depthwise,
    Grid,
    Layer,
    Norm,
    RowGrid,
    ScanOperands,
    Weights,
)

__all__ = [
    "Attention",
    "Codes",
    "Depthwise",
    "Grid",
    "Layer",
    "Norm",
    "RowGrid",
    "ScanOperands",
    "Weights",
    "cpu",
]
