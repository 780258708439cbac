"""Fused fake quantization on the CPU, by the C++ of ``csrc/quantize_cpu.cpp``. The functions are those of ``forms``.

Every chunk of a group is summed by itself and joined with the others in order, so results depend on neither the number
of threads nor the instruction set (AVX-512, AVX2, or whatever the compiler makes of the portable form, chosen when it
runs; ``path`` is an index into ``paths()``). Statistics and sums are accumulated in float64.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops import native
from ssmquant.ops.quantize.forms import Bank, DLSRule, Groups, gradient_scale, like

__all__ = [
    "NAME",
    "bank_backward",
    "bank_forward",
    "dls_backward",
    "dls_bank_backward",
    "dls_bank_forward",
    "dls_forward",
    "dls_range",
    "lsq_backward",
    "lsq_forward",
    "paths",
    "unavailable",
]

NAME = "cpu"

_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}


class _Call(ctypes.Structure):
    """``QuantizeCall`` of quantize_cpu.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("path", "threads", "dtype")),
        *((name, ctypes.c_void_p) for name in ("x", "g", "y")),
        *((name, ctypes.c_int64) for name in ("qmin", "qmax")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("alpha", "beta", "dalpha", "dbeta")),
        ("scale", ctypes.c_double),
        ("workspace", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "groups", "inner")),
        *((name, ctypes.c_int64) for name in ("steps", "floor_first", "dead_pass")),
        ("freedom", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("w", "v", "ranges", "dw", "dv")),
        *((name, ctypes.c_int64) for name in ("weights", "levels")),
        *((name, ctypes.c_void_p) for name in ("counts", "weight_groups", "scales")),
        *((name, ctypes.c_void_p) for name in ("grid", "thresholds", "dgrid")),
    ]
    table: tuple[ctypes.Array[Any], ...]


_kernels = native.Kernels("quantize", "quantize", _Call, "lsq", "dls", "bank")
paths = _kernels.paths


def unavailable(device: torch.device) -> str | None:
    """Why nothing can be quantized there, or None. May compile at first use."""
    if device.type != "cpu":
        return f"for the CPU, not for {device.type}"
    found = _kernels.found
    return found if isinstance(found, str) else None


def _call(x: Tensor, path: int, **fields: Any) -> _Call:
    threads = torch.get_num_threads()
    return _Call(path, threads, _DTYPES[x.dtype], x.data_ptr(), count=x.numel(), **fields)


def _run(kind: str, backward: bool, call: _Call) -> None:
    library = _kernels.loaded()
    size = getattr(library, f"ssmquant_{kind}_workspace")(call, backward)
    workspace = torch.empty(size, dtype=torch.float64)
    call.workspace = workspace.data_ptr()
    getattr(library, f"ssmquant_{kind}_backward" if backward else f"ssmquant_{kind}_forward")(call)


def lsq_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, qmin: int, qmax: int, eps: float, path: int = 0
) -> Tensor:
    """``x`` quantized."""
    y = torch.empty_like(x)
    call = _call(x, path, y=y.data_ptr(), qmin=qmin, qmax=qmax, eps=eps)
    call.alpha, call.beta = alpha.data_ptr(), beta.data_ptr()
    _kernels.loaded().ssmquant_lsq_forward(call)
    return y


def lsq_backward(
    g: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    qmin: int,
    qmax: int,
    eps: float,
    copies: int,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, alpha and beta."""
    g = like(g, x)
    dx, dalpha, dbeta = (torch.empty_like(t) for t in (x, alpha, beta))
    call = _call(x, path, g=g.data_ptr(), y=dx.data_ptr(), qmin=qmin, qmax=qmax, eps=eps)
    call.scale = gradient_scale(x.numel(), qmax, copies)
    call.alpha, call.beta = alpha.data_ptr(), beta.data_ptr()
    call.dalpha, call.dbeta = dalpha.data_ptr(), dbeta.data_ptr()
    _run("lsq", True, call)
    return dx, dalpha, dbeta


def _dls_call(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule, path: int) -> _Call:
    """``w`` and ``v`` are contiguous."""
    call = _call(x, path, qmin=rule.qmin, qmax=rule.qmax, eps=rule.eps)
    call.groups, call.inner, call.steps = groups.count, groups.inner, 2**rule.bits
    call.floor_first, call.dead_pass = rule.floor_first, rule.dead_pass
    call.freedom = rule.freedom(x.numel() // groups.count)
    call.w, call.v = w.data_ptr(), v.data_ptr()
    return call


def _dls_forward(
    x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule, y: Tensor | None, path: int
) -> Tensor:
    w, v = w.contiguous(), v.contiguous()
    ranges = torch.empty((6, groups.count), dtype=torch.float32)
    call = _dls_call(x, w, v, groups, rule, path)
    call.ranges = ranges.data_ptr()
    if y is not None:
        call.y = y.data_ptr()
    _run("dls", False, call)
    return ranges


def dls_range(x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule, path: int = 0) -> Tensor:
    """The ranges that ``dls_forward`` returns, bit for bit."""
    return _dls_forward(x, w, v, groups, rule, None, path)


def dls_forward(
    x: Tensor, w: Tensor, v: Tensor, groups: Groups, rule: DLSRule, path: int = 0
) -> tuple[Tensor, Tensor]:
    """``x`` quantized, and the ranges of its groups."""
    y = torch.empty_like(x)
    return y, _dls_forward(x, w, v, groups, rule, y, path)


def dls_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    v: Tensor,
    ranges: Tensor,
    groups: Groups,
    rule: DLSRule,
    need_x: bool,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless ``need_x``), w and v."""
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    dw, dv = (torch.empty(4, dtype=torch.float32) for _ in range(2))
    _dls_backward(like(g, x), x, w, v, ranges, groups, rule, (dx if need_x else None, dw, dv), path)
    return dx, dw, dv


def _dls_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    v: Tensor,
    ranges: Tensor,
    groups: Groups,
    rule: DLSRule,
    results: tuple[Tensor | None, Tensor, Tensor],
    path: int,
) -> None:
    w, v, ranges = w.contiguous(), v.contiguous(), ranges.contiguous()
    dx, dw, dv = results
    call = _dls_call(x, w, v, groups, rule, path)
    call.g, call.ranges = g.data_ptr(), ranges.data_ptr()
    call.dw, call.dv = dw.data_ptr(), dv.data_ptr()
    call.scale = rule.scale(x.numel() // groups.count)
    if dx is not None:
        call.y = dx.data_ptr()
    _run("dls", True, call)


def dls_bank_forward(
    x: Tensor, w: Tensor, v: Tensor, counts: tuple[int, ...], rule: DLSRule, path: int = 0
) -> tuple[Tensor, Tensor]:
    """The quantized values and the ranges of all tensors, those of ``dls_forward`` bit for bit."""
    y = torch.empty_like(x)
    parts = zip(x.split(counts), w.unbind(0), v.unbind(0), y.split(counts), strict=True)
    ranges = [_dls_forward(a, b, c, Groups(), rule, to, path) for a, b, c, to in parts]
    return y, torch.cat(ranges, 1)


def dls_bank_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    v: Tensor,
    ranges: Tensor,
    counts: tuple[int, ...],
    rule: DLSRule,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and v, those of ``dls_backward`` bit for bit."""
    dx, dw, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w, v))
    given = g.split(counts), x.split(counts), w.unbind(0), v.unbind(0), ranges.split(1, 1)
    results = zip(dx.split(counts), dw.unbind(0), dv.unbind(0), strict=True)
    for one, to in zip(zip(*given, strict=True), results, strict=True):
        _dls_backward(*one, Groups(), rule, to, path)
    return dx, dw, dv


@functools.lru_cache(maxsize=64)
def _table(bank: Bank) -> tuple[ctypes.Array[Any], ...]:
    """What a bank's weights are, for C++."""
    size = len(bank.counts)
    integers, reals = ctypes.c_int64 * size, ctypes.c_double * size
    return integers(*bank.counts), integers(*bank.groups), reals(*bank.scales)


def _bank_call(x: Tensor, alpha: Tensor, beta: Tensor, bank: Bank, eps: float, path: int) -> _Call:
    """``alpha`` and ``beta`` are contiguous."""
    call = _call(x, path, qmin=bank.qmin, qmax=bank.qmax, eps=eps)
    call.alpha, call.beta = alpha.data_ptr(), beta.data_ptr()
    call.weights, call.levels = len(bank.counts), bank.levels
    call.table = table = _table(bank)  # what C++ reads must live as long as the call
    call.counts, call.weight_groups, call.scales = map(ctypes.addressof, table)
    return call


def bank_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, thresholds: Tensor, bank: Bank, eps: float, path: int = 0
) -> Tensor:
    """All weights quantized."""
    alpha, beta, thresholds = alpha.contiguous(), beta.contiguous(), thresholds.contiguous()
    y = torch.empty_like(x)
    call = _bank_call(x, alpha, beta, bank, eps, path)
    call.y, call.thresholds = y.data_ptr(), thresholds.data_ptr()
    _run("bank", False, call)
    return y


def bank_backward(
    g: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    grid: Tensor,
    thresholds: Tensor,
    bank: Bank,
    eps: float,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, alpha, beta and, for RFA, the grid (else empty)."""
    alpha, beta, grid, thresholds = (t.contiguous() for t in (alpha, beta, grid, thresholds))
    dx = torch.empty_like(x)
    dalpha, dbeta = torch.empty_like(alpha), torch.empty_like(beta)
    dgrid = torch.empty_like(grid) if bank.levels else x.new_empty(0)
    call = _bank_call(x, alpha, beta, bank, eps, path)
    call.g, call.y = g.data_ptr(), dx.data_ptr()
    call.dalpha, call.dbeta = dalpha.data_ptr(), dbeta.data_ptr()
    call.grid, call.thresholds, call.dgrid = grid.data_ptr(), thresholds.data_ptr(), dgrid.data_ptr()
    _run("bank", True, call)
    return dx, dalpha, dbeta, dgrid
