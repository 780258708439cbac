"""Deployed models on a GPU, by the names of ``cpu``: Triton, and CUDA C++ for what takes most of the time.

All take float32 tensors without gradients. Quantizers are static: a model whose ranges depend on the data keeps its
modules there. Results do not depend on how blocks are scheduled.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops.deployed import cuda_fronted, cuda_scan, cuda_thin
from ssmquant.ops.deployed.cpu import conv_size
from ssmquant.ops.deployed.cuda_conv import convolve_floats, convolves_floats, taps_of
from ssmquant.ops.deployed.cuda_depthwise import convolve as convolve_channels
from ssmquant.ops.deployed.cuda_depthwise import depthwise, whole_rows
from ssmquant.ops.deployed.forms import (
    ACTIVATIONS,
    MOST_ELEMENTS,
    UNITS,
    Attention,
    Depthwise,
    Grid,
    Layer,
    Norm,
    ScanOperands,
    Weights,
    extent,
    kind_of,
)
from ssmquant.ops.selective_scan import cuda as float_scan

__all__ = [
    "ADDS",
    "BETWEEN",
    "BY_ROW",
    "CHAINS",
    "DYNAMIC",
    "MOST_COLUMNS",
    "MOST_INPUTS",
    "MOST_RANK",
    "MOST_SPAN",
    "MOST_STATES",
    "NAME",
    "Core",
    "blend",
    "by_lanes",
    "convolve",
    "convolve_floats",
    "convolves_floats",
    "depthwise",
    "excite",
    "fronted",
    "normalize",
    "normalizes",
    "pack",
    "paths",
    "project",
    "taps_of",
    "unavailable",
]

NAME = "cuda"
ADDS = True
"""``convolve`` takes what is added to its result."""
CHAINS = True
"""``project`` takes an input that it blends itself, and a layer that reads its result."""
DYNAMIC = BY_ROW = False
BETWEEN = 128
"""Levels of codes that may go from one kernel to the next, as int8 from 0, and -1 for NaN."""
MOST_STATES = 64
"""Each lane of a scan has all states of its channels in registers."""
MOST_RANK = 64
MOST_INPUTS = 2**16
MOST_SPAN = 64
MOST_COLUMNS = 1024
"""Of a norm: a block has them all."""
_VECTOR = 16  # codes that are read at once
_FEW_COLUMNS = 256  # inputs and outputs of a linear layer that encodes its input itself
_MOST_OF_ROW = 8192  # inputs that a block encodes at once


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why nothing can run there, or None. Compiles a scan at first use."""
    if device.type != "cuda":
        return f"for CUDA devices, not for {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return float_scan.unavailable(device, torch.float32, 1)


def _power(n: int, least: int = 16) -> int:
    """The size of a block for ``n``."""
    from ssmquant.ops.triton_launch import power

    return max(least, power(n))


@functools.cache
def _kernel(name: str) -> Any:
    from ssmquant.ops.deployed import triton_kernels
    from ssmquant.ops.triton_launch import Kernel

    return Kernel(getattr(triton_kernels, name), exact=False, early=True)


def _launch(
    name: str, grid: tuple[int, ...], tensors: Any, numbers: Any, constants: Any, warps: int = 4
) -> None:
    """``tensors`` that are not there are stood for by the first one, which nothing reads then."""
    first = tensors[0]
    whole = tuple(first if t is None else t for t in tensors)
    _kernel(name)((*grid, 1, 1)[:3], whole, tuple(numbers), tuple(map(int, constants)), warps)


def _small_enough(*tensors: Tensor) -> None:
    """Kernels count the elements of a sample by 31 bits, samples by 16.

    Raises:
        InputError: one of these has more.
    """
    if tensors[0].shape[0] >= 2**16:
        raise InputError(f"deployed: {tensors[0].shape[0]} samples are more than the kernels for GPUs count")
    for t in tensors:
        if extent(t) >= MOST_ELEMENTS:
            shape = tuple(t.shape[1:])
            raise InputError(f"deployed: {shape} is larger than what the kernels for GPUs count: use tiles")


def _samples(*tensors: Tensor | None, apart: bool = False) -> tuple[int, int]:
    """Samples and rows of each, (batch, rows, ..): all rows as one sample where their strides allow it.

    ``apart``: samples stay apart, for something is of each.
    """
    there = [t for t in tensors if t is not None]
    batch, rows = there[0].shape[:2]
    joined = batch == 1 or (not apart and all(t.stride(0) == rows * t.stride(1) for t in there))
    if joined and all(extent(t) + (batch - 1) * rows * t.stride(1) < MOST_ELEMENTS for t in there):
        return 1, batch * rows
    _small_enough(*there)
    return batch, rows


def _off(grid: Grid) -> int:
    """What codes of the grid are less when they are int8."""
    return 128 if grid.qmax - grid.qmin + 1 > BETWEEN else 0


def _parts(x: Tensor, more: tuple[Tensor, ...]) -> tuple[Tensor, int, int]:
    """A tensor whose sum with others a kernel makes while it reads: their distance in elements, and how many."""
    if not more:
        return x, 0, 1
    distance = more[0].data_ptr() - x.data_ptr()
    alike = all(t.stride() == x.stride() and t.dtype == x.dtype for t in more)
    evenly = all(t.data_ptr() - x.data_ptr() == (i + 1) * distance for i, t in enumerate(more))
    if alike and evenly and distance % x.element_size() == 0:
        return x, distance // x.element_size(), 1 + len(more)
    return sum(more, x), 0, 1


def _results(x: Tensor, outputs: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Where a layer writes what it makes of x: values, and codes of its first outputs, as many as columns."""
    y = torch.empty(*x.shape[:2], outputs - columns, dtype=torch.float32, device=x.device)
    return y, torch.empty(*x.shape[:2], columns, dtype=torch.int8, device=x.device) if columns else None


def pack(codes: Tensor, scale: Tensor, shift: Tensor, *, steps: bool = False, **_options: bool) -> Weights:
    """Signed codes (..., outputs, inputs), int8, with scales and shifts (..., outputs); ``steps``: of step sizes."""
    total = scale.double() * codes.sum(-1, dtype=torch.int64) - codes.shape[-1] * shift.double()
    scale, shift, total = (t.float().contiguous() for t in (scale, shift, total))
    codes = codes.contiguous()
    weights, lacking = Weights(codes, scale, shift, total, codes.shape[-2]), -codes.shape[-1] % _VECTOR
    if codes.dim() == 2:
        return _thin(weights)
    return weights if steps or not lacking else replace(weights, tiles=F.pad(codes, (0, lacking)))


def _thin(weights: Weights) -> Weights:
    """With what kernels for few inputs need."""
    tiles = cuda_thin.tiles(weights.codes)
    if tiles is None:
        return weights
    return replace(weights, tiles=tiles, affine=cuda_thin.affine(weights.scale, weights.shift, weights.total))


def by_lanes(x: Tensor) -> Tensor:
    """Contiguous float32: nothing has to be as wide as a vector here."""
    return x.float().contiguous()


def _rows_at_once(rows: int) -> int:
    """So that small images keep all multiprocessors busy."""
    return 64 if rows >= 64 * UNITS else 32


def _tile(rows: int, inputs: int, outputs: int) -> tuple[int, int, int, int]:
    """Rows, outputs and inputs of a block, and its warps. All inputs in one block are encoded once for all outputs."""
    if inputs > 256:
        return _rows_at_once(rows), min(_power(outputs), 128), 128, 4
    return 32, min(_power(outputs), 64), _power(inputs, 32), 4


def project(
    x: Tensor,
    grid: Grid,
    weights: Weights,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    z: Tensor | None = None,
    residual: tuple[Tensor, Tensor | None] | None = None,
    act: str | None = None,
    more: tuple[Tensor, ...] = (),
    codes: tuple[Grid, int, Tensor | None] | None = None,
    blended: tuple[Tensor | None, Tensor, Tensor | Attention] | None = None,
    then: Layer | None = None,
    kept: bool = True,
) -> Any:
    """See ``cpu.project``; ``act`` comes before the residual.

    Args:
        x: float32, or codes by ``grid``, int8 from 0 and -1 for NaN.
        more: tensors like x, which are added to it first.
        codes: a grid of at most ``BETWEEN`` levels, how many of the first outputs are returned as such codes, and
            factors of these before, or None.
        blended: gain, v and scale as ``blend`` takes them, of whose result with x, float32, this is the projection.
            Instead of scale there may be the attention of v that it is.
        then: a layer that reads the result, which has no ``codes`` then, and an x that is not ``blended``.
        kept: whether the result is wanted too.

    Returns:
        (batch, rows, outputs), float32; with ``codes`` a tuple, codes and the other outputs. With ``blended`` a tuple
        of that and what ``blend`` returns; with ``then`` one of that and the same of ``then``, or the latter alone.
    """
    assert kept or then is not None
    assert then is None or (blended is None and codes is None)
    assert blended is None or not more
    inputs, outputs = x.shape[2], weights.outputs
    held, gain = residual if residual is not None else (None, None)
    v = None if blended is None else blended[1]
    thin = cuda_thin.takes(weights, x, z, held, v)
    if blended is not None and not (thin and cuda_thin.blends(blended[2])):
        x_gain, v, scale = blended
        if isinstance(scale, Attention):
            scale = excite(v, scale.first, scale.first_bias, scale.second, scale.second_bias, scale.tiles)
        if thin:
            blended = x_gain, v, scale
        else:
            whole = blend(x, x_gain, v, scale)
            given = project(
                whole, grid, weights, bias, norm=norm, z=z, residual=residual, act=act, codes=codes
            )
            return given, whole
    if then is not None and not (thin and cuda_thin.chains(weights, then)):
        given = project(x, grid, weights, bias, norm=norm, z=z, residual=residual, act=act, more=more)
        last = project(
            given, then.grid, then.weights, then.bias, norm=then.norm, act=then.act, codes=then.codes
        )
        return (given, last) if kept else last
    coded = x.dtype == torch.int8
    x, part, parts = _parts(x, more)
    following, columns, factors = codes if codes is not None else (grid, 0, None)
    if thin:
        own = _results(x, outputs, columns) if kept else (None, None)
        total = None if blended is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        behind: cuda_thin.Made = (None, None)
        if then is not None:
            behind = _results(x, then.weights.outputs, then.codes[1] if then.codes is not None else 0)
        each = _samples(x, z, held, *own, v, total, *behind, apart=blended is not None)
        layer = Layer(grid, weights, bias, norm, act, codes)
        cuda_thin.project(x, part, parts, each, layer, z, held, gain, own, blended, total, then, behind)
        result = own[0] if codes is None else own[::-1]
        if then is None:
            return result if total is None else (result, total)
        last = behind[0] if then.codes is None else behind[::-1]
        return (result, last) if kept else last
    y, made = _results(x, outputs, columns)
    samples, rows = _samples(x, z, held, y, made)
    if inputs <= _MOST_OF_ROW and max(inputs, outputs) > _FEW_COLUMNS:
        if coded:
            x = x.contiguous().view(samples, rows, inputs)
            found = x.flatten(0, 1), _sums(x)
        else:
            found = _row_codes(x, part, parts, (samples, rows), grid, norm, z)
        _multiply(*found, (samples, rows), grid, weights, bias, held, gain, act, y, made, following, factors)
        return y if codes is None else (made, y)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    tensors = (
        x, z, norm_weight, norm_bias, grid.scale, grid.shift, weights.codes, weights.scale, weights.shift,
        weights.total, bias, held, gain, y, made, following.scale, following.shift, factors,
    )  # fmt: skip
    z_strides = (0, 0) if z is None else z.stride()[:2]
    r_strides = (0, 0) if held is None else held.stride()[:2]
    ends = grid.qmin, grid.qmax, following.qmin, following.qmax
    numbers = rows, part, *x.stride(), *z_strides, *r_strides, float(eps), *ends
    bm, bn, bk, warps = _tile(samples * rows, inputs, outputs)
    constants = (
        inputs, outputs, _off(grid), coded, parts, kind_of(norm), norm_weight is not None, norm_bias is not None,
        z is not None, bias is not None, held is not None, gain is not None, ACTIVATIONS[act], columns,
        factors is not None, bm, bn, bk,
    )  # fmt: skip
    blocks = -(-rows // bm), 1 if bk >= inputs else -(-outputs // bn), samples
    _launch("project", blocks, tensors, numbers, constants, warps)
    return y if codes is None else (made, y)


def fronted(
    d: Depthwise,
    grid: Grid,
    weights: Weights,
    bias: Tensor | None,
    act: str | None,
    codes: tuple[Grid, int, Tensor | None] | None,
) -> Any:
    """``project`` of the pixels that a depthwise convolution makes codes of, by ``grid``: (batch, pixels, outputs).

    ``codes``: of all outputs.
    """
    layer = Layer(grid, weights, bias, None, act, codes)
    if not cuda_fronted.takes(d, weights):
        made = project(convolve_channels(d).flatten(1, 2), grid, weights, bias, act=act, codes=codes)
        return made if codes is None else made[0]
    size = d.x.shape[0], d.x.shape[1] * d.x.shape[2], weights.outputs
    y = torch.empty(size, dtype=torch.float32 if codes is None else torch.int8, device=d.x.device)
    _small_enough(y)
    cuda_fronted.project(d, layer, *((y, None) if codes is None else (None, y)))
    return y


def _row_codes(
    x: Tensor,
    part: int,
    parts: int,
    samples: tuple[int, int],
    grid: Grid,
    norm: Norm | None,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes of what ``project`` multiplies, (rows, inputs) int8 with zeros behind, and sums of rows."""
    count, rows = samples
    inputs = x.shape[2]
    wide, bk = -(-inputs // _VECTOR) * _VECTOR, _power(inputs, 32)
    codes = torch.empty(count * rows, wide, dtype=torch.int8, device=x.device)
    _small_enough(codes.view(count, rows, wide))
    sums = torch.empty(count * rows, dtype=torch.int32, device=x.device)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    bm = max(1, 4096 // bk)
    z_strides = (0, 0) if z is None else z.stride()[:2]
    constants = (
        inputs, wide, _off(grid), parts, kind_of(norm), norm_weight is not None, norm_bias is not None, z is not None,
        bm, bk,
    )  # fmt: skip
    tensors = x, z, norm_weight, norm_bias, grid.scale, grid.shift, codes, sums
    numbers = rows, part, *x.stride(), *z_strides, float(eps), grid.qmin, grid.qmax
    _launch("encode_rows", (-(-rows // bm), 1, count), tensors, numbers, constants)
    return codes, sums


def _sums(codes: Tensor) -> Tensor:
    """The sums of ``_row_codes``, of codes (samples, rows, inputs) from 0 and -1 for NaN."""
    count, rows, inputs = codes.shape
    _small_enough(codes)
    sums = torch.empty(count * rows, dtype=torch.int32, device=codes.device)
    bk = _power(inputs, 32)
    bm = max(1, 8192 // bk)
    numbers = rows, *codes.stride()
    _launch("sum_rows", (-(-rows // bm), 1, count), (codes, sums), numbers, (inputs, bm, bk))
    return sums


def _multiply(
    codes: Tensor,
    sums: Tensor,
    samples: tuple[int, int],
    grid: Grid,
    weights: Weights,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    act: str | None,
    y: Tensor,
    made: Tensor | None,
    following: Grid,
    factors: Tensor | None,
) -> None:
    """Writes ``y`` and ``made`` of what ``_row_codes`` gives: see ``project``."""
    count, rows = samples
    wide, (outputs, inputs) = codes.shape[1], weights.codes.shape
    bn, bk = min(_power(outputs), 128), min(_power(inputs, 32), 128)
    across = -(-outputs // bn)
    bm = next((n for n in (128, 64) if -(-rows // n) * across * count >= UNITS), 32)
    tensors = (
        codes, sums, grid.scale, grid.shift, weights.codes, weights.scale, weights.shift, weights.total, bias, residual,
        gain, y, made, following.scale, following.shift, factors,
    )  # fmt: skip
    r_strides = (0, 0) if residual is None else residual.stride()[:2]
    numbers = rows, *r_strides, grid.qmin, following.qmin, following.qmax
    constants = (
        inputs, wide, outputs, _off(grid), bias is not None, residual is not None, gain is not None, ACTIVATIONS[act],
        0 if made is None else made.shape[2], factors is not None, bm, bn, bk,
    )  # fmt: skip
    _launch(
        "multiply", (-(-rows // bm), across, count), tensors, numbers, constants, 8 if bm * bn >= 2**14 else 4
    )


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
    residual: Tensor | None = None,
) -> Tensor:
    """See ``cpu.convolve``; ``norm`` can only be factors. x: float32, or int8 codes from 0, -1 for NaN.

    ``residual``: (batch, pixels, outputs), float32, is added to the result.

    Raises:
        InputError: too many channels, pixels or samples.
    """
    batch, x_height, x_width, inputs = x.shape
    of_weights = weights.codes
    if inputs > _MOST_OF_ROW:
        raise InputError(f"deployed: convolutions on GPUs take {_MOST_OF_ROW} channels, not {inputs}")
    rows = x.flatten(1, 2)  # encoded, and summed, once and not for every tap
    if x.dtype == torch.int8:
        of_pixels = _sums(rows)
    else:
        codes, of_pixels = _row_codes(rows, 0, 1, (batch, rows.shape[1]), grid, norm, None)
        x = codes.view(batch, x_height, x_width, -1)
        if weights.tiles is not None:  # with the zeros behind both, which make vectors whole
            of_weights, inputs = weights.tiles, weights.tiles.shape[-1]
    height, width = conv_size((x_height + 2 * padding[0], x_width + 2 * padding[1]), kernel, dilation, stride)
    outputs, pixels = weights.outputs, height * width
    y = torch.empty(batch, height, width, outputs, dtype=torch.float32, device=x.device)
    _small_enough(x, y)
    if residual is not None:
        if residual.stride(2) != 1:
            residual = residual.contiguous()
        _small_enough(residual)
    tensors = (
        x, of_pixels, grid.scale, grid.shift, of_weights, weights.scale, weights.shift, weights.total, bias, residual, y
    )  # fmt: skip
    r_strides = (0, 0) if residual is None else residual.stride()[:2]
    numbers = pixels, height, width, x_height, x_width, *x.stride(), *r_strides, grid.qmin, *padding, *stride
    bm, bn = _rows_at_once(batch * pixels), min(_power(outputs), 128)
    bk = min(_power(inputs, 32), 128)
    constants = (
        inputs,
        outputs,
        _off(grid),
        *kernel,
        *dilation,
        bias is not None,
        residual is not None,
        bm,
        bn,
        bk,
    )
    _launch("conv", (-(-pixels // bm), -(-outputs // bn), batch), tensors, numbers, constants)
    return y


def blend(x: Tensor, gain: Tensor | None, v: Tensor, scale: Tensor) -> Tensor:
    """See ``cpu.blend``."""
    batch, rows, columns = x.shape
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _small_enough(x, v)
    bc = min(_power(columns), 128)
    bm = 2048 // bc
    numbers = rows, *x.stride()[:2], *v.stride()[:2]
    blocks = -(-rows // bm), -(-columns // bc), batch
    _launch("blend", blocks, (x, gain, v, scale, y), numbers, (columns, gain is not None, bm, bc))
    return y


def excite(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    parts: Tensor | None = None,
) -> Tensor:
    """Channel attention, ``sigmoid(second @ relu(first @ mean(x) + ..) + ..)``: (batch, columns).

    Args:
        x: (batch, rows, columns), any strides.
        first, second: (hidden, columns) and (columns, hidden), contiguous as all further ones.
        parts: (batch, some, columns), sums of some rows each that add up to those of all, if they are known.
    """
    batch, rows, columns = x.shape
    _small_enough(x)
    bc = _power(columns)
    if parts is None:
        bm = min(max(64, _power(-(-rows // 128))), 512)
        parts = torch.empty(batch, -(-rows // bm), columns, dtype=torch.float32, device=x.device)
        _launch("pool", (parts.shape[1], batch), (x, parts), (rows, *x.stride()), (columns, bm, bc))
    blocks = parts.shape[1]
    y = torch.empty(batch, columns, dtype=torch.float32, device=x.device)
    hidden = first.shape[0]
    tensors = parts, first, first_bias, second, second_bias, y
    at_once = min(
        _power(blocks), max(16, 2**14 // bc)
    )  # one block reads all of a sample's: many of them together
    constants = columns, hidden, at_once, bc, _power(hidden, 1)
    warps = 16 if at_once * bc >= 2**14 else 8 if at_once * bc > 2**12 else 4
    _launch("excite", (batch,), tensors, (blocks, rows), constants, warps)
    return y


def normalizes(x: Tensor) -> bool:
    """Whether ``normalize`` takes x, (batch, rows, columns)."""
    batch, rows, columns = x.shape
    plain = x.dtype == torch.float32 and x.numel() > 0 and columns <= MOST_COLUMNS
    return plain and batch < 2**16 and max(extent(x), rows * columns) < MOST_ELEMENTS


def normalize(x: Tensor, norm: Norm, before: Tensor | None = None, act: str | None = None) -> Tensor:
    """A norm over the columns of x, (batch, rows, columns), any strides, which ``normalizes`` takes: contiguous.

    ``before``: (columns,), contiguous, what is added to x first; ``act``: "silu" or "gelu" of the result.
    """
    columns = x.shape[2]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    samples, rows = _samples(x, y)
    bc = _power(columns)
    # What is next to each other in memory are columns or, as in an image with channels first, rows: then at least so
    # many of them as one access to memory brings.
    bm = 2048 // bc if x.stride(2) <= x.stride(1) else max(4096 // bc, 8)
    dense = x.stride()[1:] == (columns, 1)
    given = norm.weight is not None, norm.bias is not None, before is not None
    constants = columns, dense, norm.rms, *given, ACTIVATIONS[act], bm, bc
    numbers = rows, *x.stride(), float(norm.eps)
    tensors = x, before, norm.weight, norm.bias, y
    warps = 8 if bm * bc > 4096 else 4
    _launch("normalize", (-(-rows // bm), 1, samples), tensors, numbers, constants, warps)
    return y


def paths(order: Tensor) -> list[tuple[int, int]]:
    """What a scan in these orders, (K, L), has results of: pairs of directions, -1 for none."""
    return cuda_scan.paths_of(order)[0]


class Core:
    """``cpu.Core`` on a GPU: codes of an image and of its projection by one kernel, then the scans.

    ``apart``: results of each path of its own, see ``cuda_scan.Scan``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        of_x: Grid | None,
        projection: Weights,
        places: tuple[int, int, int],
        scan: ScanOperands,
        apart: bool = False,
    ) -> None:
        directions, states = len(scan.order), scan.a.shape[1]
        self.shape = shape
        self.of_u, self.of_x = scan.of_u, scan.of_u if of_x is None else of_x
        # Rows of the projection in the order in which the scan wants their codes; rows that are not there are zeros.
        rows = cuda_scan.arrangement(scan.ranks, states, places)
        device = projection.codes.device
        at = torch.tensor(rows, device=device)
        there = (at >= 0).view(1, -1)

        def arranged(t: Tensor) -> Tensor:
            of_rows = t.view(directions, -1, *t.shape[1:])[:, at.clamp(min=0)]
            return (of_rows * there.view(1, -1, *[1] * (t.dim() - 1)).to(t.dtype)).flatten(0, 1).contiguous()

        codes, scale, shift, total = map(
            arranged, (projection.codes, projection.scale, projection.shift, projection.total)
        )
        self.projection = _thin(Weights(codes, scale, shift, total, directions * len(rows)))
        quantizers = [scan.of_rank] * (-(-scan.ranks // 4) * 4) + [scan.of_b, scan.of_c] * (
            -(-states // 2) * 2
        )
        inverse = 1.0 / torch.cat([g.scale for g in quantizers])
        made = [inverse, torch.cat([g.shift for g in quantizers]) * inverse]
        for n in ("qmin", "qmax"):  # all codes of rows that are not there are 0
            ends = [getattr(g, n) if r >= 0 else 0 for g, r in zip(quantizers, rows, strict=True)]
            made.append(torch.tensor(ends, dtype=torch.float32, device=device))
        self.made = [t.repeat(directions) for t in made]
        self.grids = [torch.cat((g.scale, g.shift)) for g in (self.of_x, self.of_u)]
        self.scan = cuda_scan.Scan(shape, scan, apart)

    def __call__(self, x: Tensor, u: Tensor | None = None, front: Depthwise | None = None) -> Tensor:
        """x: any strides, float32, or codes as ``project`` takes them; u: these by the scan's quantizer, if another.

        ``front``: makes these codes, of an image that has the pixels x.
        """
        if front is None:
            return self.scan(*self.encode(x, u))
        return self.scan(*self.encode_behind(front))

    def encode_behind(self, front: Depthwise) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``encode`` of what a depthwise convolution makes, and codes of step sizes if they have been made too."""
        if not cuda_fronted.takes(front, self.projection):
            made = convolve_channels(front)
            x, u = made if front.also is not None else (made, None)
            return *self.encode(x.flatten(1, 2), None if u is None else u.flatten(1, 2)), None
        u = whole_rows(front.x)
        rows, width = u[..., 0].numel(), -(-self.projection.outputs // 16) * 16
        memory = torch.empty(rows * (width + 1), dtype=torch.uint8, device=u.device)
        codes, bad = memory[: rows * width].view(rows, width), memory[rows * width :]
        sizes = cuda_fronted.codes_of_core(
            front, self.of_x, self.projection, self.made, u, codes, width, bad, self.scan.steps()
        )
        return u.view(torch.uint8).flatten(0, 2)[:, : front.x.shape[3]], codes, bad, sizes

    def encode(self, x: Tensor, of_scan: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the image, (B * L, columns), and of all directions' low rank, B and C; which pixels had a NaN."""
        batch, pixels, channels = self.shape
        rows, outputs = batch * pixels, self.projection.outputs
        samples, each = _samples(x)
        coded = x.dtype == torch.int8
        if coded:
            x = x.contiguous()
        columns, width = 0 if coded else -(-channels // 16) * 16, -(-outputs // 16) * 16
        memory = torch.empty(rows * (columns + width + 1), dtype=torch.uint8, device=x.device)
        u, codes = memory[: rows * columns], memory[rows * columns : rows * (columns + width)]
        bad = memory[rows * (columns + width) :]
        p, of_x, of_u = self.projection, self.of_x, self.of_u
        if samples == 1 and rows * max(columns, width) >= MOST_ELEMENTS:  # which are counted by 31 bits
            samples, each = batch, pixels
        if cuda_thin.takes(p, x):
            cuda_thin.codes_of_core(
                x, (samples, each), of_x, of_u, p, self.made, u, columns, codes, width, bad
            )
            return self._given(x, of_scan) if coded else u.view(rows, columns), codes.view(rows, width), bad
        tensors = x, *self.grids, p.codes, p.scale, p.shift, p.total, *self.made, u, codes, bad
        numbers = each, *x.stride(), columns, width, of_x.qmin, of_x.qmax, of_u.qmin, of_u.qmax
        bm, bn, bk, warps = _tile(rows, channels, outputs)
        blocks = -(-each // bm), 1 if bk >= channels else -(-outputs // bn), samples
        same = of_x is of_u
        constants = channels, outputs, _off(of_x), same, coded, bm, bn, bk
        _launch("core_codes", blocks, tensors, numbers, constants, warps)
        return self._given(x, of_scan) if coded else u.view(rows, columns), codes.view(rows, width), bad

    def _given(self, x: Tensor, of_scan: Tensor | None) -> Tensor:
        """Codes that another kernel has written, as the scan wants them: (B * L, D), any stride."""
        u = x if of_scan is None else of_scan
        if u.stride(2) != 1 or (len(u) > 1 and u.stride(0) != u.shape[1] * u.stride(1)):
            u = u.contiguous()
        return u.view(torch.uint8).flatten(0, 1)
