"""The selective scan on an NVIDIA GPU by kernels of our own (``csrc/selective_scan_cuda/``), float32 state.

This chooses the shape of the kernels, lays out their arguments and sums what they leave to sum. Kernels are compiled
for the case: number of states, dtypes, form of B and C.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmquant.ops import nvrtc
from ssmquant.ops.selective_scan.cuda_shapes import SAVE, Case, Limits, Shape, Work, case_of, choose, unit

__all__ = [
    "LAST_IS_OPTIONAL",
    "NAME",
    "backward",
    "forward",
    "map_backward",
    "map_forward",
    "saved_shape",
    "unavailable",
]

NAME = "cuda"
LAST_IS_OPTIONAL = True
MAX_STATES = 256
_MIN_ARCH = 80  # asynchronous copies
_TYPES = {torch.float32: "float", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a call and how they are cut."""

    batch: int
    channels: int
    length: int
    states: int
    groups: int
    blocks: int  # of a group
    chunks: int
    chunk: int  # steps

    @property
    def grid(self) -> tuple[int, int]:
        return self.batch * self.groups * self.blocks, self.chunks


def _cut(work: Work, shape: Shape, chunks: int) -> _Sizes:
    step = unit(shape, work.length)
    chunk = -(-work.length // chunks // step) * step
    return _Sizes(
        work.batch,
        work.groups * work.inner,
        work.length,
        work.states,
        work.groups,
        -(-work.inner // shape.channels),
        -(-work.length // chunk),
        chunk,
    )


_POINTERS = (
    *("u", "delta", "b", "c", "a", "bias", "skip", "y", "saved", "carry", "totals", "last"),
    *("g", "gu", "gdelta", "ga_parts", "gb_parts", "gc_parts", "gskip_parts", "gbias_parts"),
    *("ga", "gb", "gc", "gskip", "gbias", "path"),
)
_STRIDES = (
    "u_b",
    "u_d",
    "delta_b",
    "delta_d",
    "delta_g",
    "g_b",
    "g_d",
    "b_b",
    "b_g",
    "b_n",
    "c_b",
    "c_g",
    "c_n",
)
_COUNTS = ("batch", "channels", "length", "groups", "blocks", "chunks", "chunk")


class _Params(ctypes.Structure):
    """``Params`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        *((name, ctypes.c_int) for name in _COUNTS),
    )


class _Call:
    """One call of the operator: arguments of its kernels, filled in step by step."""

    def __init__(
        self, backward: bool, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None,
        D: Tensor | None, softplus: bool, path: Tensor | None = None,
    ) -> None:  # fmt: skip
        (channels, states), batch = A.shape, u.shape[0]
        length = u.shape[2] if path is None else u.shape[1]
        groups = len(path) if path is not None else next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
        types = tuple(_TYPES[x.dtype] for x in (u, delta, B, C))
        constant_b, constant_c = (path is None and x.dim() == 2 for x in (B, C))
        self._work = Work(
            backward,
            batch,
            groups,
            channels // groups,
            states,
            length,
            softplus,
            constant_b,
            constant_c,
            types,
            path is not None,
        )
        self._shape, chunks = choose(self._work, _limits(u.device))
        self.device = u.device
        self.sizes = _cut(self._work, self._shape, chunks)
        self.params = _Params(**{name: getattr(self.sizes, name) for name in _COUNTS})
        self._kept: list[Tensor] = []
        self._aligned = length % 4 == 0 and path is None
        if path is None:
            self.rows("u", u)
            self.rows("delta", delta)
            self.matrix("b", B)
            self.matrix("c", C)
        else:
            self.set(path=path)
            self.map("u", u, "bd")
            self.map("delta", delta, "bdg")
            self.map("b", B, "bng")
            self.map("c", C, "bng")
        self.set(a=A.float().contiguous())
        self.set(bias=None if bias is None else bias.float().contiguous())
        self.set(skip=None if D is None else D.float().contiguous())

    def case(self, ends: bool = False) -> Case:
        """What to compile, once all operands are known."""
        return case_of(self._work, self._shape, 4 if self._aligned else 1, ends)

    def _align(self, x: Tensor) -> None:
        """Rows of all operands must begin at multiples of four elements for them to be moved by four."""
        starts = (x.data_ptr() // x.element_size(), *x.stride()[:-1])
        self._aligned = self._aligned and all(start % 4 == 0 for start in starts)

    def set(self, **tensors: Tensor | None) -> None:
        """Contiguous tensors by the name of their pointer, kept alive until the launch."""
        for name, tensor in tensors.items():
            setattr(self.params, name, None if tensor is None else tensor.data_ptr())
            if tensor is not None:
                self._kept.append(tensor)

    def rows(self, name: str, x: Tensor) -> None:
        """A (B, D, L) operand of any strides but that of L, which has to be 1."""
        if x.stride(2) != 1:
            x = x.contiguous()
        self._align(x)
        self.set(**{name: x})
        setattr(self.params, f"{name}_b", x.stride(0))
        setattr(self.params, f"{name}_d", x.stride(1))

    def matrix(self, name: str, x: Tensor) -> None:
        """B or C, in any of its forms."""
        if x.dim() == 2:
            self.set(**{name: x.contiguous()})
            return
        x = x if x.dim() == 4 else x[:, None]
        if x.stride(3) != 1:
            x = x.contiguous()
        self._align(x)
        self.set(**{name: x})
        for axis, letter in enumerate("bgn"):
            setattr(self.params, f"{name}_{letter}", x.stride(axis))

    def map(self, name: str, x: Tensor, axes: str) -> None:
        """A map of pixels, its last axis contiguous; ``axes`` name the strides of the others."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        self.set(**{name: x})
        for axis, letter in enumerate(axes):
            setattr(self.params, f"{name}_{letter}", x.stride(axis))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def parts(self, x: Tensor) -> Tensor | None:
        """Room for the parts of the gradient of B or C; None if there is one part."""
        s = self.sizes
        if x.dim() == 2:
            return self.new(s.chunks * s.batch, s.channels, s.states)
        return self.new(s.blocks, s.batch, s.groups, s.states, s.length) if s.blocks > 1 else None

    def chunk_states(self) -> None:
        """Where states, or gradients, are handed from chunk to chunk; nowhere if there is one chunk."""
        s = self.sizes
        if s.chunks > 1:
            self.set(
                carry=self.new(s.chunks, s.batch, s.states, s.channels),
                totals=self.new(s.chunks, s.batch, s.channels),
            )

    def run(self) -> None:
        """Launch the kernels."""
        s = self.sizes
        if s.chunks > 1:
            case = self.case(ends=True)
            blocks = -(-self._work.inner // case.shape.channels)
            params = _Params.from_buffer_copy(self.params)
            params.blocks = blocks
            grid = (s.batch * s.groups * blocks, s.chunks - 1)
            kernels = _kernels(case, self.device)
            kernels.launch("scan_ends", grid, 32 * case.shape.warps, case.shared, params, self.device)
            lanes = s.batch * s.states * s.channels
            kernels.launch("scan_carry", (-(-lanes // 128), 1), 128, 0, params, self.device)
        case = self.case()
        kernels = _kernels(case, self.device)
        name = "scan_backward" if case.backward else "scan_forward"
        kernels.launch(name, s.grid, 32 * case.shape.warps, case.shared, self.params, self.device)
        if case.backward:
            sums = s.channels * (s.states + 2)
            for parts, constant in (
                (self.params.gb_parts, case.constant_b),
                (self.params.gc_parts, case.constant_c),
            ):
                if parts:
                    full = s.batch * s.groups * s.states * s.length // case.vector
                    sums += s.channels * s.states if constant else full
            kernels.launch("scan_sum", (-(-sums // 256), 1), 256, 0, self.params, self.device)


def _kernels(case: Case, device: torch.device) -> Any:
    return nvrtc.load(_source(case), device)


@functools.cache
def _source(case: Case) -> str:
    return case.source()


@functools.cache
def _limits(device: torch.device) -> Limits:
    properties: Any = torch.cuda.get_device_properties(device)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


@functools.cache
def unavailable(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why this cannot serve a scan on ``device`` with a state of ``dtype`` and size ``states``; None if it can."""
    if device.type != "cuda":
        return f"{device.type} is not a CUDA device"
    if dtype != torch.float32:
        return f"the state would be {dtype}, and its kernels keep float32"
    if states > MAX_STATES:
        return f"more than {MAX_STATES} states"
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < _MIN_ARCH:
        return f"the GPU is sm_{major}{minor}, older than sm_{_MIN_ARCH}"
    try:
        for back in (False, True):
            work = Work(back, 1, 1, 64, states, 4096, True, False, False, ("float",) * 4, False)
            _kernels(case_of(work, choose(work, _limits(device))[0], 4), device)
    except (nvrtc.CompileError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def saved_shape(batch: int, channels: int, states: int, length: int) -> tuple[int, int, int, int]:
    """States at every SAVE-th step: (ceil(L / SAVE), B, N, D)."""
    return -(-length // SAVE), batch, states, channels


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``chunked.forward``; ``dtype`` has to be float32."""
    call = _Call(False, u, delta, A, B, C, bias, D, softplus)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return (y, *_forward(call, y, save))


def map_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The scan of a map (``maps``): the output of each direction, (B, K, P, D / K), and what is saved."""
    call = _Call(False, x, delta, A, B, C, bias, D, softplus, path)
    y = torch.empty((x.shape[0], len(path), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return y, _forward(call, y, save)[1]


def _forward(call: _Call, y: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Fills ``y``; returns the last state and what is saved."""
    s = call.sizes
    shape = saved_shape(s.batch, s.channels, s.states, s.length)
    saved = call.new(*shape) if save else call.new(0, *shape[1:])
    last = call.new(s.batch, s.channels, s.states)
    call.set(y=y, last=last, saved=saved if save else None)
    call.chunk_states()
    with torch.cuda.device_of(y):
        call.run()
    return last, saved


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``chunked.backward``; ``dtype`` has to be float32."""
    call = _Call(True, u, delta, A, B, C, bias, D, softplus)
    call.rows("g", g.to(u.dtype))
    gu = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return _backward(
        call, gu, None if g_last is None else g_last.to(dtype).contiguous(), saved, delta, A, B, C, D, bias
    )


def map_backward(
    g: Tensor,
    saved: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``map_forward`` given that of the sum of its outputs; x's of each direction, (B, K, P, D / K)."""
    call = _Call(True, x, delta, A, B, C, bias, D, softplus, path)
    call.map("g", g.to(x.dtype), "bd")
    gx = torch.empty((x.shape[0], len(path), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return _backward(call, gx, None, saved, delta, A, B, C, D, bias)


def _backward(
    call: _Call,
    gu: Tensor,
    g_last: Tensor | None,
    saved: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = call.sizes
    parts = s.chunks * s.batch
    gdelta, gb, gc = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (delta, B, C))
    ga = call.new(s.channels, s.states)
    gskip, gbias = (None if x is None else call.new(s.channels) for x in (D, bias))
    call.set(saved=saved, last=g_last)
    call.set(gu=gu, gdelta=gdelta, ga=ga, gb=gb, gc=gc, gskip=gskip, gbias=gbias)
    call.set(
        ga_parts=call.new(parts, s.channels, s.states),
        gb_parts=call.parts(B),
        gc_parts=call.parts(C),
        gskip_parts=None if D is None else call.new(parts, s.channels),
        gbias_parts=None if bias is None else call.new(parts, s.channels),
    )
    call.chunk_states()
    with torch.cuda.device_of(gu):
        call.run()
    empty = gu.new_empty(0)
    return (
        gu,
        gdelta,
        ga.to(A.dtype),
        gb,
        gc,
        empty if D is None or gskip is None else gskip.to(D.dtype),
        empty if bias is None or gbias is None else gbias.to(bias.dtype),
    )
