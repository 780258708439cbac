"""Calls of the C++ kernels of deployed models: the structures of ``csrc/deployed_cpu.h``, member by member."""

# ruff: noqa: D101 -- the header describes them
from __future__ import annotations

import ctypes
import functools

from ssmquant.ops import native

__all__ = [
    "BlendCall",
    "Codes",
    "ConvCall",
    "CoreCall",
    "DepthwiseCall",
    "EncodeCall",
    "GateCall",
    "LinearCall",
    "MomentsCall",
    "Norm",
    "ProjectCall",
    "Quantizer",
    "RangesCall",
    "ScanCall",
    "Values",
    "Weights",
    "Window",
    "found",
    "library",
]


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class Quantizer(ctypes.Structure):
    _fields_ = [*_pointers("scale", "shift", "low", "high"), *_integers("by_sample", "qmin", "qmax")]


class Values(ctypes.Structure):
    _fields_ = [*_pointers("data"), *_integers("batch", "row", "group", "column")]


class Codes(ctypes.Structure):
    _fields_ = [*_pointers("data", "sums"), *_integers("padded", "batch", "row", "group")]


class Weights(ctypes.Structure):
    _fields_ = [*_pointers("codes", "scale", "shift", "total"), *_integers("units", "narrow")]


class Norm(ctypes.Structure):
    _fields_ = [*_integers("kind"), *_pointers("weight", "bias"), ("eps", ctypes.c_double)]


class EncodeCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "rows", "groups", "columns"),
        ("x", Values),
        ("norm", Norm),
        ("quantizer", Quantizer),
        ("codes", Codes),
    ]


class MomentsCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "rows", "groups", "columns"),
        ("x", Values),
        *_pointers("workspace", "moments"),
    ]


class GateCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "rows", "columns"),
        ("x", Values),
        ("z", Values),
        ("norm", Norm),
        *_pointers("y", "workspace", "moments"),
    ]


class RangesCall(ctypes.Structure):
    _fields_ = [
        *_pointers("moments"),
        *_integers("samples", "count", "copies"),
        *_pointers("w", "v"),
        *_integers("levels"),
        ("eps", ctypes.c_double),
        *_pointers("ranges"),
    ]


class LinearCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "rows", "inputs", "outputs"),
        ("x", Codes),
        ("quantizer", Quantizer),
        ("weights", Weights),
        *_pointers("bias"),
        *_integers("act"),
        *_pointers("y"),
    ]


class ProjectCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "rows", "inputs", "outputs"),
        ("x", Values),
        ("z", Values),
        ("norm", Norm),
        ("quantizer", Quantizer),
        *_pointers("clip"),
        ("eps", ctypes.c_double),
        ("weights", Weights),
        *_pointers("bias"),
        *_integers("act"),
        ("residual", Values),
        *_pointers("gain", "workspace", "y"),
    ]


class BlendCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "rows", "columns"),
        ("x", Values),
        ("v", Values),
        *_pointers("gain", "scale", "y"),
    ]


class Window(ctypes.Structure):
    _fields_ = _integers("height", "width", "down", "right")


class ConvCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "height", "width", "outputs"),
        *_integers("image_height", "image_width", "above", "before", "step_down", "step_right"),
        ("window", Window),
        ("x", Codes),
        ("quantizer", Quantizer),
        ("weights", Weights),
        *_pointers("bias", "y"),
    ]


class DepthwiseCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "height", "width", "channels"),
        ("window", Window),
        ("x", Values),
        ("quantizer", Quantizer),
        *_pointers("weights", "bias"),
        *_integers("act"),
        *_pointers("y"),
    ]


class ScanCall(ctypes.Structure):
    _fields_ = [
        *_integers("path", "threads", "batch", "pixels", "channels", "states", "directions"),
        *((name, Codes) for name in ("u", "b", "c", "rank")),
        *((name, Quantizer) for name in ("of_u", "of_b", "of_c", "of_rank", "of_delta")),
        ("weights", Weights),
        *_pointers("a", "bias", "skip"),
        *_integers("softplus"),
        *_pointers("order", "done", "workspace", "moments", "y"),
    ]


class CoreCall(ctypes.Structure):
    _fields_ = [
        ("x", Values),
        ("of_x", Quantizer),
        ("projection", Weights),
        *_integers("rows", "at_rank", "at_b", "at_c", "ranks"),
        *_pointers("workspace"),
        ("scan", ScanCall),
    ]


@functools.cache
def found() -> ctypes.CDLL | str:
    """The kernels, or why there are none. May compile at first use."""
    kernels = native.library()
    if isinstance(kernels, str):
        return kernels
    calls = {
        "encode": EncodeCall,
        "moments": MomentsCall,
        "gate": GateCall,
        "ranges": RangesCall,
        "linear": LinearCall,
        "project": ProjectCall,
        "blend": BlendCall,
        "conv": ConvCall,
        "depthwise": DepthwiseCall,
        "delta_moments": ScanCall,
        "scan": ScanCall,
        "core": CoreCall,
    }
    for name, call in calls.items():
        function = getattr(kernels, f"ssmquant_deployed_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(call)], None
    for name in ("project", "core"):
        function = getattr(kernels, f"ssmquant_deployed_{name}_workspace")
        function.argtypes, function.restype = [ctypes.POINTER(calls[name])], ctypes.c_int64
    for name in ("paths", "path", "lanes", "unit", "narrow", "tasks"):
        function = getattr(kernels, f"ssmquant_deployed_{name}")
        function.argtypes = [] if name == "paths" else [ctypes.c_int64]
        function.restype = ctypes.c_char_p if name == "path" else ctypes.c_int64
    return kernels


def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        RuntimeError: there are none.
    """
    kernels = found()
    if isinstance(kernels, str):
        raise RuntimeError(f"deployed: {kernels}")
    return kernels
