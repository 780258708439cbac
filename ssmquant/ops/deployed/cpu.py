"""Deployed models on the CPU, by the C++ of ``csrc/deployed_cpu.cpp``: codes in, integer products, scans on codes.

All functions take float32 tensors without gradients, on the CPU. ``path`` is an index into ``paths()``: AVX-512 with
VNNI, AVX-512, AVX2, or what the compiler makes of the portable form. Results depend on neither the number of threads
nor, but for the order of sums, on the path.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops.deployed import calls
from ssmquant.ops.deployed.forms import ACTIVATIONS, Codes, Grid, Norm, RowGrid, ScanOperands, Weights
from ssmquant.ops.deployed.memory import new

__all__ = [
    "ADDS",
    "BETWEEN",
    "BY_ROW",
    "CHAINS",
    "DYNAMIC",
    "MOST_INPUTS",
    "MOST_RANK",
    "MOST_SPAN",
    "MOST_STATES",
    "NAME",
    "Core",
    "blend",
    "by_lanes",
    "conv",
    "conv_size",
    "convolve",
    "delta_moments",
    "depthwise",
    "encode",
    "gate",
    "linear",
    "moments",
    "pack",
    "paths",
    "project",
    "ranges",
    "scan",
    "unavailable",
]

NAME = "cpu"
ADDS = CHAINS = False
BETWEEN = 0
"""No codes go from one call to the next: values are in the cache."""
DYNAMIC = BY_ROW = True
"""Whether ranges may depend on the data: of a sample, or of a row."""
MOST_STATES = 256
MOST_RANK = 2**16
MOST_INPUTS = 4096
"""Of a linear layer on values."""
MOST_SPAN = 16
"""Pixels from the first to the last tap of a depthwise convolution."""
_PAD, _SLACK, _MOMENTS, _FACTORS = 16, 64, 5, 3  # of deployed_cpu.h


def unavailable(device: torch.device) -> str | None:
    """Why nothing can run there, or None. May compile at first use."""
    if device.type != "cpu":
        return f"for the CPU, not for {device.type}"
    found = calls.found()
    return found if isinstance(found, str) else None


def paths() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best first."""
    library = calls.library()
    return tuple(library.ssmquant_deployed_path(i).decode() for i in range(library.ssmquant_deployed_paths()))


def _quantizer(grid: Grid) -> calls.Quantizer:
    low, high = (None if t is None else t.data_ptr() for t in (grid.low, grid.high))
    by_sample = grid.scale.numel() > 1
    return calls.Quantizer(
        grid.scale.data_ptr(), grid.shift.data_ptr(), low, high, by_sample, grid.qmin, grid.qmax
    )


def _codes(codes: Codes) -> calls.Codes:
    return calls.Codes(
        codes.data.data_ptr(), codes.sums.data_ptr(), codes.data.shape[-1], *codes.sums.stride()
    )


def _weights(weights: Weights) -> calls.Weights:
    tensors = weights.codes, weights.scale, weights.shift, weights.total
    units = weights.codes.shape[-3] if weights.codes.dim() > 3 else 0
    return calls.Weights(*(t.data_ptr() for t in tensors), units, weights.narrow)


def _values(x: Tensor) -> calls.Values:
    return calls.Values(x.data_ptr(), *x.stride())


def _workspace(batch: int, rows: int) -> Tensor:
    return new(batch * calls.library().ssmquant_deployed_tasks(rows) * _MOMENTS, dtype=torch.float64)


def _room(*shape: int, zero: bool) -> Codes:
    """Codes and sums, with what may be read behind them."""
    size = math.prod(shape)
    data, sums = new(size + _SLACK, dtype=torch.uint8), new(*shape[:-1], dtype=torch.int32)
    if zero:
        data.zero_()
        sums.zero_()
    return Codes(data[:size].view(shape), sums)


def _norm(norm: Norm | None) -> calls.Norm:
    if norm is None:
        return calls.Norm()
    pointers = (None if t is None else t.data_ptr() for t in (norm.weight, norm.bias))
    return calls.Norm(_FACTORS if norm.factors else 2 if norm.rms else 1, *pointers, norm.eps)


def encode(
    x: Tensor,
    grid: Grid,
    border: tuple[int, int] = (0, 0),
    *,
    norm: Norm | None = None,
    by_group: bool = False,
    path: int = 0,
) -> Codes:
    """(batch, rows, groups, columns), any strides, as codes.

    Args:
        norm: a layer norm that comes first; x has columns next to each other then.
        border: rows and groups of zeros (codes and sums) on all sides, for ``conv``.
        by_group: in memory groups come before rows, for ``scan``.
    """
    batch, rows, groups, columns = x.shape
    padded, (down, right) = -(-columns // _PAD) * _PAD, border
    if by_group:
        codes = _room(batch, groups, rows, padded, zero=False)
        codes = Codes(codes.data.transpose(1, 2), codes.sums.transpose(1, 2))
    else:
        codes = _room(batch, rows + 2 * down, groups + 2 * right, padded, zero=border != (0, 0))
    inner = Codes(codes.data[:, down:, right:], codes.sums[:, down:, right:])
    call = calls.EncodeCall(path, torch.get_num_threads(), batch, rows, groups, columns)
    call.x, call.norm, call.quantizer, call.codes = _values(x), _norm(norm), _quantizer(grid), _codes(inner)
    calls.library().ssmquant_deployed_encode(call)
    return codes


def moments(x: Tensor, path: int = 0) -> Tensor:
    """Mean, unbiased standard deviation (0 of a single element), minimum and maximum of each sample: (batch, 4)."""
    batch, rows, groups, columns = x.shape
    out, workspace = torch.empty(batch, 4), _workspace(batch, rows)
    call = calls.MomentsCall(path, torch.get_num_threads(), batch, rows, groups, columns)
    call.x, call.workspace, call.moments = _values(x), workspace.data_ptr(), out.data_ptr()
    calls.library().ssmquant_deployed_moments(call)
    return out


def gate(
    x: Tensor, z: Tensor, norm: Norm | None, *, with_moments: bool = False, path: int = 0
) -> tuple[Tensor, Tensor | None]:
    """``norm(x) * silu(z)``, (batch, rows, columns), and its moments.

    x and z: (batch, rows, 1, columns), columns next to each other.
    """
    batch, rows, _, columns = x.shape
    y, workspace = new(batch, rows, columns), _workspace(batch, rows)
    out = torch.empty(batch, 4) if with_moments else None
    call = calls.GateCall(
        path, torch.get_num_threads(), batch, rows, columns, _values(x), _values(z), _norm(norm)
    )
    call.y, call.workspace, call.moments = (
        y.data_ptr(),
        workspace.data_ptr(),
        None if out is None else out.data_ptr(),
    )
    calls.library().ssmquant_deployed_gate(call)
    return y, out


def ranges(
    moments: Tensor, count: int, copies: int, w: Tensor, v: Tensor, levels: int, eps: float
) -> tuple[Tensor, ...]:
    """Scale, shift, low and high of DLS for samples of ``count`` elements, from their moments, (samples, 4)."""
    out = torch.empty(4, len(moments))
    call = calls.RangesCall(
        moments.data_ptr(), len(moments), count, copies, w.data_ptr(), v.data_ptr(), levels, eps
    )
    call.ranges = out.data_ptr()
    calls.library().ssmquant_deployed_ranges(call)
    return out.unbind(0)


def pack(
    codes: Tensor, scale: Tensor, shift: Tensor, *, values: bool = False, steps: bool = False, path: int = 0
) -> Weights:
    """Signed codes (..., outputs, inputs), int8, with scales and shifts (..., outputs) as ``path`` wants them.

    ``values``: for ``linear`` of an input whose grid has ``low`` and ``high``. ``steps``: for the step sizes of a scan.
    """
    library = calls.library()
    lanes, unit = library.ssmquant_deployed_lanes(path), library.ssmquant_deployed_unit(path)
    *lead, outputs, inputs = codes.shape
    total = scale.double() * codes.sum(-1, dtype=torch.int64) - inputs * shift.double()
    tiles = -(-outputs // lanes)
    wide = F.pad(codes, (0, 0, 0, tiles * lanes - outputs))
    narrow = 0
    if values:
        wide = wide.view(*lead, tiles, lanes, inputs).transpose(-1, -2).contiguous()
    else:
        most = max(1, int(codes.max()), -int(codes.min())) if codes.numel() else 1
        if not steps and unit != 4 and most <= library.ssmquant_deployed_narrow(path):
            unit, narrow = 4, most
        units = -(-inputs // unit)
        wide = F.pad(wide, (0, units * unit - inputs)).view(*lead, tiles, lanes, units, unit)
        wide = wide.transpose(-3, -2).to(torch.int8 if unit == 4 else torch.int16).contiguous()
    scale, shift, total = (by_lanes(t, path) for t in (scale, shift, total))
    return Weights(wide, scale, shift, total, outputs, narrow)


def by_lanes(x: Tensor, path: int = 0) -> Tensor:
    """(..., outputs) as float32 with zeros behind, up to whole vectors."""
    return F.pad(x.float(), (0, -x.shape[-1] % calls.library().ssmquant_deployed_lanes(path))).contiguous()


def linear(
    x: Codes,
    grid: Grid,
    weights: Weights,
    bias: Tensor | None = None,
    path: int = 0,
    *,
    act: str | None = None,
) -> Tensor:
    """``act(value(x) @ value(weights).T + bias)``: (batch, rows, outputs), float32.

    Args:
        x: of one group.
        grid: where it has ``low`` and ``high``, values are multiplied, else codes.
        bias: from ``by_lanes``.
        act: as of ``depthwise``.
    """
    batch, rows, _, _ = x.data.shape
    y = new(batch, rows, weights.outputs)
    inputs = weights.codes.shape[-2]  # of those for values
    if grid.low is not None and inputs > MOST_INPUTS:
        raise InputError(f"deployed: a product of values takes up to {MOST_INPUTS} inputs, not {inputs}")
    call = calls.LinearCall(path, torch.get_num_threads(), batch, rows, inputs, weights.outputs)
    call.x, call.quantizer, call.weights = _codes(x), _quantizer(grid), _weights(weights)
    call.bias, call.act, call.y = (
        None if bias is None else bias.data_ptr(),
        ACTIVATIONS[act],
        y.data_ptr(),
    )
    calls.library().ssmquant_deployed_linear(call)
    return y


def project(
    x: Tensor,
    grid: Grid | RowGrid,
    weights: Weights,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    z: Tensor | None = None,
    act: str | None = None,
    residual: tuple[Tensor, Tensor | None] | None = None,
    path: int = 0,
) -> Tensor:
    """``linear`` of the codes of ``norm(x)``, or of ``norm(x) * silu(z)``: (batch, rows, outputs), float32.

    Args:
        x: (batch, rows, inputs), any strides; with a norm or a z, columns next to each other.
        grid: without ``low`` and ``high``.
        z: as x.
        act: as of ``depthwise``; comes before the residual is added.
        residual: (batch, rows, outputs), columns next to each other, and its gain, (outputs,), contiguous, or None:
            their product is added.
    """
    batch, rows, inputs = x.shape
    y = new(batch, rows, weights.outputs)
    call = calls.ProjectCall(path, torch.get_num_threads(), batch, rows, inputs, weights.outputs)
    call.x, call.norm = _values(x.unsqueeze(2)), _norm(norm)
    if z is not None:
        call.z = _values(z.unsqueeze(2))
    if residual is not None:
        call.residual = _values(residual[0].unsqueeze(2))
        call.gain = None if residual[1] is None else residual[1].data_ptr()
    if isinstance(grid, RowGrid):
        call.quantizer.qmax, call.eps, call.clip = grid.levels - 1, grid.eps, grid.clip.data_ptr()
    else:
        call.quantizer = _quantizer(grid)
    call.weights, call.act = _weights(weights), ACTIVATIONS[act]
    call.bias, call.y = None if bias is None else bias.data_ptr(), y.data_ptr()
    library = calls.library()
    scratch = new(library.ssmquant_deployed_project_workspace(call), dtype=torch.uint8)
    call.workspace = scratch.data_ptr()
    library.ssmquant_deployed_project(call)
    return y


def blend(x: Tensor, gain: Tensor | None, v: Tensor, scale: Tensor, path: int = 0) -> Tensor:
    """``x * gain + v * scale``, (batch, rows, columns).

    x, v: columns next to each other; gain: (columns,); scale: (batch, columns), both contiguous.
    """
    batch, rows, columns = x.shape
    y = new(batch, rows, columns)
    call = calls.BlendCall(path, torch.get_num_threads(), batch, rows, columns)
    call.x, call.v = _values(x.unsqueeze(2)), _values(v.unsqueeze(2))
    call.gain, call.scale = None if gain is None else gain.data_ptr(), scale.data_ptr()
    call.y = y.data_ptr()
    calls.library().ssmquant_deployed_blend(call)
    return y


def conv_size(
    sizes: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> tuple[int, int]:
    """Height and width of what a convolution makes of an image, its padding included; below 1 if that is too small."""
    height, width = (
        (n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(sizes, kernel, dilation, stride, strict=True)
    )
    return height, width


def conv(
    x: Codes,
    grid: Grid,
    weights: Weights,
    bias: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    path: int = 0,
) -> Tensor:
    """A convolution: (batch, height, width, outputs), sizes as PyTorch has them, which must not be 0.

    Args:
        x: with a border as wide as ``padding``.
        grid: without ``low`` and ``high``.
        weights: (taps, outputs, inputs), with the same scales and shifts for all taps.
        bias: from ``by_lanes``.
    """
    batch, *sizes, _ = x.data.shape
    height, width = conv_size(sizes, kernel, dilation, stride)
    y = new(batch, height, width, weights.outputs)
    call = calls.ConvCall(path, torch.get_num_threads(), batch, height, width, weights.outputs)
    call.image_height, call.image_width = (n - 2 * p for n, p in zip(sizes, padding, strict=True))
    call.above, call.before = padding
    call.step_down, call.step_right = stride
    call.window = calls.Window(*kernel, *dilation)
    call.x, call.quantizer, call.weights = _codes(x), _quantizer(grid), _weights(weights)
    call.bias, call.y = None if bias is None else bias.data_ptr(), y.data_ptr()
    calls.library().ssmquant_deployed_conv(call)
    return y


def convolve(
    x: Tensor,
    grid: Grid,
    weights: Weights,
    bias: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    norm: Norm | None = None,
) -> Tensor:
    """``conv`` of the codes of ``norm(x)``, (batch, height, width, channels), any strides."""
    codes = encode(x, grid, padding, norm=norm)
    return conv(codes, grid, weights, bias, kernel, dilation, stride, padding)


def depthwise(
    x: Tensor,
    grid: Grid,
    weights: Tensor,
    bias: Tensor,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    act: str | None = None,
    path: int = 0,
) -> Tensor:
    """A convolution of each channel of quantized values, with as much padding as keeps the size, and ``act``.

    Args:
        x: (batch, height, width, channels), any strides.
        weights: values, (taps, channels) from ``by_lanes``; bias: the same, (channels,).
        act: "silu", "gelu" (to 1.5e-7 of the exact one), or None.
    """
    window = calls.Window(*kernel, *dilation)
    y = new(*x.shape)
    call = calls.DepthwiseCall(path, torch.get_num_threads(), *x.shape, window)
    call.x, call.quantizer, call.act = _values(x), _quantizer(grid), ACTIVATIONS[act]
    call.weights, call.bias, call.y = weights.data_ptr(), bias.data_ptr(), y.data_ptr()
    calls.library().ssmquant_deployed_depthwise(call)
    return y


def _scan_call(rank: Codes, of_rank: Grid, weights: Weights, path: int) -> calls.ScanCall:
    batch, pixels, directions, _ = rank.data.shape
    call = calls.ScanCall(path, torch.get_num_threads(), batch, pixels, weights.outputs, 0, directions)
    call.rank, call.of_rank, call.weights = _codes(rank), _quantizer(of_rank), _weights(weights)
    return call


def delta_moments(rank: Codes, of_rank: Grid, weights: Weights, path: int = 0) -> Tensor:
    """``moments`` of the step sizes that ``scan`` makes of ``rank``, before bias and softplus: (batch, 4)."""
    batch, pixels, _, _ = rank.data.shape
    call = _scan_call(rank, of_rank, weights, path)
    out, workspace = torch.empty(batch, 4), _workspace(batch, pixels)
    call.workspace, call.moments = workspace.data_ptr(), out.data_ptr()
    calls.library().ssmquant_deployed_delta_moments(call)
    return out


def scan(
    u: tuple[Codes, Grid],
    rank: tuple[Codes, Grid],
    weights: Weights,
    of_delta: Grid | None,
    a: Tensor,
    b: tuple[Codes, Grid],
    c: tuple[Codes, Grid],
    skip: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    order: Tensor,
    path: int = 0,
) -> Tensor:
    """Selective scans over an image in K orders, added up at their pixels: (B, L, D).

    Args:
        u: the image, (B, L, 1, D).
        rank: the low rank of the step sizes, (B, L, K, R).
        weights: (K, D, R), from which the step sizes come.
        of_delta: quantizes them before bias and softplus.
        a: (K * D, N), contiguous float32, N up to ``MOST_STATES``. Where it is the same for all channels and evenly
            spaced, decays are powers of one exponential.
        b, c: (B, L, K, N).
        skip, bias: (K * D,), contiguous float32.
        order: (K, L) int32, contiguous, each row a permutation: the pixel of every step.
    """
    call = _scan_call(*rank, weights, path)
    y, _done = _fill(call, u, of_delta, a, b, c, skip, bias, softplus, order)
    calls.library().ssmquant_deployed_scan(call)
    return y


def _fill(
    call: calls.ScanCall,
    u: tuple[Codes, Grid],
    of_delta: Grid | None,
    a: Tensor,
    b: tuple[Codes, Grid],
    c: tuple[Codes, Grid],
    skip: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """The operands of ``scan``; its result, and what has to live as long as the call."""
    call.states = a.shape[1]
    if call.states > MOST_STATES:
        raise InputError(f"deployed: a scan takes up to {MOST_STATES} states, not {call.states}")
    call.u, call.of_u = _codes(u[0]), _quantizer(u[1])
    call.b, call.of_b = _codes(b[0]), _quantizer(b[1])
    call.c, call.of_c = _codes(c[0]), _quantizer(c[1])
    if of_delta is not None:
        call.of_delta = _quantizer(of_delta)
    call.a, call.softplus, call.order = a.data_ptr(), softplus, order.data_ptr()
    call.skip, call.bias = (None if t is None else t.data_ptr() for t in (skip, bias))
    done = torch.zeros(call.batch * -(-call.channels // 4), dtype=torch.int64)  # more than tiles
    y = new(call.batch, call.pixels, call.channels)
    call.done, call.y = done.data_ptr(), y.data_ptr()
    return y, done


class Core:
    """``scan`` of an image from its values: (B, L, D) -> (B, L, D). No grid has ``low`` or ``high``.

    Everything but x is known when it is made, for one size of x and the number of threads at that time: a call then
    takes some microseconds besides the kernels.

    Args:
        shape: of x.
        of_x: of what is projected; None if that has the codes of ``of_u``.
        projection: (K * E, D); of E rows, ``places`` say where the low rank, B and C begin.
        scan: of the scans.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        of_x: Grid | None,
        projection: Weights,
        places: tuple[int, int, int],
        scan: ScanOperands,
        path: int = 0,
    ) -> None:
        batch, pixels, channels = shape
        s = scan
        directions, states = len(s.order), s.a.shape[1]
        columns = {"u": (1, channels), "rank": (directions, s.ranks), "b": (directions, states)}
        columns["c"] = columns["b"]
        # All codes and sums of a call are one piece of memory; this one only tells where in it they are.
        self._bytes = 0
        places_of: dict[str, tuple[int, int]] = {}
        made: dict[str, Codes] = {}
        for name, (groups, n) in columns.items():
            codes = _room(batch, groups, pixels, -(-n // _PAD) * _PAD, zero=False)
            made[name] = Codes(codes.data.transpose(1, 2), codes.sums.transpose(1, 2))
            at = self._take(codes.data.numel() + _SLACK)
            places_of[name] = at, self._take(4 * codes.sums.numel())
        call = calls.CoreCall()
        if of_x is not None:
            call.of_x = _quantizer(of_x)
        call.projection, call.rows = _weights(projection), projection.outputs // directions
        call.at_rank, call.at_b, call.at_c = places
        call.ranks = s.ranks
        call.scan = _scan_call(made["rank"], s.of_rank, s.steps, path)
        others = (made["u"], s.of_u), s.of_delta, s.a, (made["b"], s.of_b), (made["c"], s.of_c)
        _, done = _fill(call.scan, *others, s.skip, s.bias, s.softplus, s.order)
        self._run = calls.library().ssmquant_deployed_core
        self._workspace = self._take(calls.library().ssmquant_deployed_core_workspace(call))
        self._done, self._done_bytes = self._take(8 * done.numel()), 8 * done.numel()
        self._call, self._shape, self._places = call, shape, places_of
        # Their memory is in the call.
        self._operands = of_x, projection, scan

    def _take(self, size: int) -> int:
        at = self._bytes
        self._bytes += -(-size // 64) * 64
        return at

    def __call__(self, x: Tensor) -> Tensor:
        """x: any strides."""
        call = calls.CoreCall.from_buffer_copy(self._call)
        memory, y = new(self._bytes, dtype=torch.uint8), new(*self._shape)
        start = memory.data_ptr()
        batch, row, column = x.stride()
        call.x = calls.Values(x.data_ptr(), batch, row, 0, column)
        scan = call.scan
        for name, (data, sums) in self._places.items():
            codes = getattr(scan, name)
            codes.data, codes.sums = start + data, start + sums
        call.workspace, scan.done, scan.y = start + self._workspace, start + self._done, y.data_ptr()
        ctypes.memset(scan.done, 0, self._done_bytes)
        self._run(call)
        return y
