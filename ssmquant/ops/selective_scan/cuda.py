"""The selective scan on an NVIDIA GPU by kernels of our own (``csrc/selective_scan_cuda/``), float32 state.

This chooses the shape of the kernels, lays out their arguments and sums what they leave to sum. Kernels are compiled
for the case: number of states, dtypes, form of B and C.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import nvrtc
from ssmquant.ops.selective_scan.cuda_shapes import (
    SAVE,
    Case,
    Limits,
    Shape,
    Work,
    case_of,
    choose,
    choose_ends,
    unit,
)

__all__ = [
    "LAST_IS_OPTIONAL",
    "NAME",
    "backward",
    "forward",
    "map_backward",
    "map_forward",
    "probes",
    "saved_shape",
    "unavailable",
]

NAME = "cuda"
LAST_IS_OPTIONAL = True
MAX_STATES = 256
_MIN_ARCH = 80  # asynchronous copies
_MOST = 2**30  # channels, steps, blocks: they are ints there, and added up
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
_STRIDES = tuple("u_b u_d delta_b delta_d delta_g g_b g_d b_b b_g b_n c_b c_g c_n".split())
_COUNTS = ("batch", "channels", "length", "groups", "blocks", "chunks", "chunk")


class _Params(ctypes.Structure):
    """``Params`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        *((name, ctypes.c_int) for name in _COUNTS),
    )


class _Step(NamedTuple):
    """A launch, but for its arguments."""

    kernels: Any
    name: str
    grid: tuple[int, int]
    threads: int
    shared: int  # bytes
    blocks: int  # of a group


class _Plan(NamedTuple):
    """All about a call that its sizes and dtypes say."""

    sizes: _Sizes
    steps: tuple[_Step, ...]


@functools.lru_cache(maxsize=1024)
def _plan(device: torch.device, vector: int, *of_work: Any) -> _Plan:
    """``of_work``: the fields of ``Work``. Kept, for working it out takes the host longer than many a scan the GPU."""
    work = Work(*of_work)
    try:
        return _planned(device, vector, work)
    except nvrtc.CompileError as error:  # what was tried to see that this back end serves was another case
        raise nvrtc.CompileError(
            f"selective_scan: no CUDA kernel for {work.states} states, {work.length} steps and {work.types}: {error}\n"
            "The back ends 'triton' and 'chunked' do without: ssmquant.ops.use_backend"
        ) from None


def _planned(device: torch.device, vector: int, work: Work) -> _Plan:
    limits = _limits(device)
    shape, chunks = choose(work, limits)
    s = _cut(work, shape, chunks)
    if max(s.length, s.channels, s.grid[0]) >= _MOST:
        raise InputError(
            f"selective_scan: {s.batch} samples of {s.channels} channels and {s.length} steps are more than the CUDA "
            "kernels count; pass fewer at once, or choose the back end 'chunked'"
        )
    steps = []
    if s.chunks > 1:
        case = case_of(work, choose_ends(work, limits), vector, ends=True)
        kernels, threads = _kernels(case, device), 32 * case.shape.warps
        blocks = -(-work.inner // case.shape.channels)
        grid = (s.batch * s.groups * blocks, s.chunks - 1)
        steps.append(_Step(kernels, "scan_ends", grid, threads, case.shared, blocks))
        lanes = s.batch * s.states * s.channels
        steps.append(_Step(kernels, "scan_carry", (-(-lanes // 128), 1), 128, 0, blocks))
    case = case_of(work, shape, vector)
    kernels, threads = _kernels(case, device), 32 * case.shape.warps
    name = "scan_backward" if work.backward else "scan_forward"
    steps.append(_Step(kernels, name, s.grid, threads, case.shared, s.blocks))
    if work.backward:
        sums = s.channels * (s.states + 2)
        full = s.batch * s.groups * s.states * s.length // vector if s.blocks > 1 else 0
        for constant in (work.constant_b, work.constant_c):
            sums += s.channels * s.states if constant else full
        steps.append(_Step(kernels, "scan_sum", (-(-sums // 256), 1), 256, 0, s.blocks))
    return _Plan(s, tuple(steps))


class _Call:
    """One call of the operator: arguments of its kernels, filled in step by step. ``g`` makes it the backward pass."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
        softplus: bool, path: Tensor | None = None, g: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._kept: list[Tensor] = []
        self._values: dict[str, int] = {}
        # Where rows begin, in elements, all in one by "or": its last bits say how they are aligned.
        self._starts = 0
        self.device = u.device
        if path is None:
            batch, channels, length = u.shape
            groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
            self._starts = length
            forms = ("bd", "bd", "bgn")
            B, C = (x[:, None] if x.dim() == 3 else x for x in (B, C))
        else:
            (batch, length, _), channels, groups = u.shape, A.shape[0], len(path)
            self._starts = 1
            forms = ("bd", "bdg", "bng")
            self.set(path=path)
        self.operand("u", u, forms[0])
        self.operand("delta", delta, forms[1])
        self.operand("b", B, forms[2])
        self.operand("c", C, forms[2])
        if g is not None:
            self.operand("g", g.to(u.dtype), forms[0])
        self.set(
            a=A.float().contiguous(),
            bias=None if bias is None else bias.float().contiguous(),
            skip=None if D is None else D.float().contiguous(),
        )
        types = (_TYPES[u.dtype], _TYPES[delta.dtype], _TYPES[B.dtype], _TYPES[C.dtype])
        sizes, self._steps = _plan(
            self.device, 1 if self._starts % 4 else 4, g is not None, batch, groups, channels // groups, A.shape[1],
            length, softplus, B.dim() == 2, C.dim() == 2, types, path is not None,
        )  # fmt: skip
        self.sizes = sizes
        if sizes.chunks > 1:  # where states, or gradients, are handed from chunk to chunk
            self.set(
                carry=self.new(sizes.chunks, sizes.batch, sizes.states, sizes.channels),
                totals=self.new(sizes.chunks, sizes.batch, sizes.channels),
            )

    def set(self, **tensors: Tensor | None) -> None:
        """Contiguous tensors by the name of their pointer, kept alive until the launch."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self._values[name] = tensor.data_ptr()
                self._kept.append(tensor)

    def operand(self, name: str, x: Tensor, axes: str) -> None:
        """One with strides, named by ``axes`` and the last one 1. Of constant B or C, (D, N), there are none."""
        if x.stride(-1) != 1 or x.dim() == 2:
            x = x.contiguous()
        self._kept.append(x)
        address = x.data_ptr()
        self._values[name] = address
        if x.dim() > 2:
            self._starts |= address // x.element_size()
            for axis, stride in zip(axes, x.stride(), strict=False):
                self._values[f"{name}_{axis}"] = stride
                self._starts |= stride

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def parts(self, x: Tensor) -> Tensor | None:
        """Room for the parts of the gradient of B or C; None if there is one part."""
        s = self.sizes
        if x.dim() == 2:
            return self.new(s.chunks * s.batch, s.channels, s.states)
        return self.new(s.blocks, s.batch, s.groups, s.states, s.length) if s.blocks > 1 else None

    def run(self) -> None:
        """Launch the kernels."""
        s = self.sizes
        values = {
            **self._values,
            "batch": s.batch,
            "channels": s.channels,
            "length": s.length,
            "groups": s.groups,
        }
        params = _Params(**values, chunks=s.chunks, chunk=s.chunk)
        for step in self._steps:
            params.blocks = step.blocks  # the driver copies the arguments when it is told to launch
            step.kernels.launch(step.name, step.grid, step.threads, step.shared, params, self.device)


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


def probes(states: int, limits: Limits) -> list[Case]:
    """What is compiled to see whether a device and its compiler can serve; in every wheel for common ``states``."""
    kinds = ("float",) * 4
    works = [Work(back, 1, 1, 64, states, 4096, True, False, False, kinds, False) for back in (False, True)]
    return [case_of(work, choose(work, limits)[0], 4) for work in works]


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
        for case in probes(states, _limits(device)):
            _kernels(case, device)
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
    call = _Call(u, delta, A, B, C, D, bias, softplus)
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
    call = _Call(x, delta, A, B, C, D, bias, softplus, path)
    y = torch.empty((x.shape[0], len(path), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return y, _forward(call, y, save)[1]


def _forward(call: _Call, y: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Fills ``y``; returns the last state and what is saved."""
    s = call.sizes
    shape = saved_shape(s.batch, s.channels, s.states, s.length)
    saved = call.new(*shape) if save else call.new(0, *shape[1:])
    last = call.new(s.batch, s.channels, s.states)
    call.set(y=y, last=last, saved=saved if save else None)
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
    call = _Call(u, delta, A, B, C, D, bias, softplus, g=g)
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
    call = _Call(x, delta, A, B, C, D, bias, softplus, path, g)
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
