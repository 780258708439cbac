"""The selective scan on the CPU, by the C++ of ``csrc/selective_scan_cpu.cpp``.

Channels are the lanes of vectors (AVX-512, AVX2 with FMA, or whatever the compiler makes of the portable form, chosen
when it runs), time is walked step by step with the states in registers. Operands are converted and turned a piece of
time at a time, so those of two bytes cost no copies. States before each piece of 32 steps, (pieces, B, N, D), survive
the forward pass. Results depend on shapes and the instruction set, and not on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmquant.ops import native

__all__ = ["LAST_IS_OPTIONAL", "NAME", "backward", "forward", "paths", "saved_shape", "unavailable"]

NAME = "cpu"
LAST_IS_OPTIONAL = True

_PIECE = 32
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _fields(text: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in text.split()]


class _Operand(ctypes.Structure):
    _fields_ = [*_fields("data", ctypes.c_void_p), *_fields("dtype batch group row time", ctypes.c_int64)]


class _Result(ctypes.Structure):
    _fields_ = [*_fields("data", ctypes.c_void_p), *_fields("dtype", ctypes.c_int64)]


class _Call(ctypes.Structure):
    """``Call`` of selective_scan_cpu.h."""

    _fields_ = [
        *_fields("path threads wide softplus save", ctypes.c_int64),
        *_fields("batch channels states length groups constant_b constant_c", ctypes.c_int64),
        *_fields("u delta b c", _Operand),
        *_fields("matrix_a matrix_b matrix_c skip bias saved workspace", ctypes.c_void_p),
        *_fields("y", _Result),
        *_fields("last", ctypes.c_void_p),
        *_fields("g", _Operand),
        *_fields("g_last", ctypes.c_void_p),
        *_fields("gu gdelta gb gc", _Result),
        *_fields("ga gskip gbias", ctypes.c_void_p),
    ]


_kernels = native.Kernels("selective_scan", "scan", _Call, "scan")
paths = _kernels.paths


def unavailable(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why no scan with a state of ``dtype`` and size ``states`` can run there, or None. May compile at first use."""
    if device.type != "cpu":
        return f"for the CPU, not for {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"keeps states in float32 or float64, not in {dtype}"
    found = _kernels.found
    return found if isinstance(found, str) else None


def saved_shape(batch: int, channels: int, states: int, length: int) -> tuple[int, ...]:
    """Shape of what ``forward`` saves: the states before each piece of time. Sizes may be symbolic."""
    return (-(-length // _PIECE), batch, states, channels)


def _operand(x: Tensor) -> _Operand:
    """u, delta or a gradient of (B, D, L); B or C of (B, N, L) or (B, G, N, L)."""
    batch, *group, row, time = x.stride()
    return _Operand(x.data_ptr(), _DTYPES[x.dtype], batch, group[0] if group else 0, row, time)


def _result(x: Tensor) -> _Result:
    return _Result(x.data_ptr(), _DTYPES[x.dtype])


class _Job:
    """One call of the library: its arguments, and the tensors that must live until it returns."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
        dtype: torch.dtype,
        path: int,
    ) -> None:
        self.dtype = dtype
        self._alive: list[Tensor] = []
        groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
        self.call = call = _Call(
            path=path,
            threads=torch.get_num_threads(),
            wide=dtype == torch.float64,
            softplus=softplus,
            batch=u.shape[0],
            channels=u.shape[1],
            states=A.shape[1],
            length=u.shape[2],
            groups=groups,
            constant_b=B.dim() == 2,
            constant_c=C.dim() == 2,
            u=_operand(u),
            delta=_operand(delta),
            matrix_a=self.plain(A),
        )
        if B.dim() == 2:
            call.matrix_b = self.plain(B)
        else:
            call.b = _operand(B)
        if C.dim() == 2:
            call.matrix_c = self.plain(C)
        else:
            call.c = _operand(C)
        if D is not None:
            call.skip = self.plain(D)
        if bias is not None:
            call.bias = self.plain(bias)

    def plain(self, x: Tensor) -> int:
        """Address of a contiguous tensor in the dtype of the state."""
        self._alive.append(x.to(self.dtype).contiguous())
        return self._alive[-1].data_ptr()

    def run(self, backward: bool) -> None:
        library = _kernels.loaded()
        size = library.ssmquant_scan_workspace(self.call, backward)
        workspace = torch.empty(size, dtype=self.dtype)
        self.call.workspace = workspace.data_ptr()
        (library.ssmquant_scan_backward if backward else library.ssmquant_scan_forward)(self.call)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
    save: bool,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, D, L) in u's dtype, the last state (B, D, N) and what ``saved_shape`` says, both in ``dtype``.

    First size of what is saved is 0 unless ``save``. ``path`` is an index into ``paths()``.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    shape = saved_shape(batch, channels, states, length)
    y = torch.empty(u.shape, dtype=u.dtype)
    last = torch.empty((batch, channels, states), dtype=dtype)
    saved = torch.empty(shape if save else (0, *shape[1:]), dtype=dtype)
    job = _Job(u, delta, A, B, C, D, bias, softplus, dtype, path)
    job.call.save = save
    job.call.y, job.call.last, job.call.saved = _result(y), last.data_ptr(), saved.data_ptr()
    job.run(backward=False)
    return y, last, saved


def backward(
    g: Tensor,
    g_last: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    dtype: torch.dtype,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, bias in their dtypes; empty ones where D or bias is None.

    ``g_last`` is None where nothing depends on the last state.
    """
    job = _Job(u, delta, A, B, C, D, bias, softplus, dtype, path)
    call = job.call
    call.g, call.saved = _operand(g), saved.data_ptr()
    if g_last is not None:
        call.g_last = job.plain(g_last)

    def fresh(like: Tensor, wide: bool) -> Tensor:
        return torch.empty(like.shape, dtype=dtype if wide else like.dtype)

    gu, gdelta, ga = fresh(u, False), fresh(delta, False), fresh(A, True)
    gb, gc = fresh(B, B.dim() == 2), fresh(C, C.dim() == 2)
    call.gu, call.gdelta, call.gb, call.gc = _result(gu), _result(gdelta), _result(gb), _result(gc)
    call.ga = ga.data_ptr()
    empty = u.new_empty(0)
    gd, gbias = empty, empty
    if D is not None:
        gd = fresh(D, True)
        call.gskip = gd.data_ptr()
    if bias is not None:
        gbias = fresh(bias, True)
        call.gbias = gbias.data_ptr()
    job.run(backward=True)
    return (
        gu,
        gdelta,
        ga.to(A.dtype),
        gb.to(B.dtype),
        gc.to(C.dtype),
        gd if D is None else gd.to(D.dtype),
        gbias if bias is None else gbias.to(bias.dtype),
    )
