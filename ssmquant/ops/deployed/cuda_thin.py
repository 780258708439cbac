"""Linear layers of few inputs on a GPU: calls of ``csrc/deployed_cuda/thin.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops import nvrtc
from ssmquant.ops.deployed.forms import ACTIVATIONS, UNITS, Attention, Grid, Layer, Norm, Weights, kind_of

__all__ = ["Params", "affine", "blends", "chains", "codes_of_core", "project", "takes", "tiles"]

_MOST_INPUTS = 192  # that a lane has its share of in registers, of two rows
_MOST_WEIGHTS = 2**15  # bytes, which each multiprocessor should keep in its cache
_WARPS = 4  # of a block
_FEW_WARPS = 6 * UNITS
_RESIDENT = 7  # blocks of a multiprocessor: those of 57,600 rows at once on an H100
_FEW_RESIDENT = 3  # where there are no more
_FEW_INPUTS = 96
_FEW_BLOCKS_OF_LAYER = 4 * UNITS  # up to there the next kernel's are not let in before these end
_FEW_BLOCKS = 2 * UNITS  # of two layers, which have as few warps as blocks of rows
_RESIDENT_OF_TWO = 4, 2  # of few inputs, and of more: what they hold takes as many registers
_FEW_TILES = 64  # that each block adds up itself
_MOST_BETWEEN = 96  # values of a row between two layers

Made = tuple[Tensor | None, Tensor | None]
"""Values and codes of outputs that a kernel writes; None for none, or for what is not wanted."""


Launch = Callable[..., None]
"""Another kernel's that has a layer in it: called with what is read, (samples, rows), ``Params`` and definitions."""


class _Layer(ctypes.Structure):
    """``Layer`` of the source."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in "norm_weight norm_bias scale shift tiles of_outputs bias y codes".split()),
        *((n, ctypes.c_void_p) for n in "next_scale next_shift next_factors".split()),
        *((n, ctypes.c_int) for n in "qmin qmax next_min next_max".split()),
        ("eps", ctypes.c_float),
    )  # fmt: skip


class Params(ctypes.Structure):
    """``Params`` of the source."""

    _fields_ = (
        ("layer", _Layer),
        ("then", _Layer),
        *((n, ctypes.c_void_p) for n in "x v x_gain v_scale tiles first first_bias second second_bias".split()),
        *((n, ctypes.c_void_p) for n in "blended z residual gain".split()),
        *((n, ctypes.c_void_p) for n in "inverse moved least most u bad".split()),
        *((n, ctypes.c_longlong) for n in "part x_batch x_row v_batch v_row z_batch z_row r_batch r_row".split()),
        *((n, ctypes.c_int) for n in "rows u_row code_row count".split()),
    )  # fmt: skip


def tiles(codes: Tensor) -> Tensor | None:
    """Codes of weights, (outputs, inputs) int8, as the tensor cores take them; None where these kernels do not.

    Of each 16 outputs by 32 inputs, lane (g, t) has inputs 4 t and following, and 16 + 4 t and following, of outputs
    4 (g // 2) + g % 2 and the next but one: so that it gets sums of outputs 4 t and following.
    """
    outputs, inputs = codes.shape
    if inputs > _MOST_INPUTS or codes.numel() > _MOST_WEIGHTS:
        return None
    whole = F.pad(codes, (0, -inputs % 32, 0, -outputs % 16))
    split = whole.view(whole.shape[0] // 16, 4, 2, 2, whole.shape[1] // 32, 2, 4, 4)
    return split.permute(0, 4, 1, 3, 6, 2, 5, 7).contiguous()


def affine(scale: Tensor, shift: Tensor, total: Tensor) -> Tensor:
    """These, (3, outputs), with zeros up to a multiple of 16 outputs."""
    return F.pad(torch.stack((scale, shift, total)), (0, -len(scale) % 16)).contiguous()


def takes(weights: Weights, *tensors: Tensor | None) -> bool:
    """Whether there is a kernel for a weight, and tensors whose last axis is that of inputs or outputs."""
    lines = all(t is None or t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)
    return weights.tiles is not None and lines and tensors[0] is not None and tensors[0].shape[0] < 2**16


def chains(weights: Weights, then: Layer) -> bool:
    """Whether there is a kernel of a layer, which ``takes`` its tensors, and one that reads its result."""
    return weights.outputs <= _MOST_BETWEEN and then.weights.tiles is not None


def blends(scale: Tensor | Attention) -> bool:
    """Whether the kernel that blends can have channel attention's factors made by each block, or has them."""
    return not isinstance(scale, Attention) or scale.tiles.shape[1] <= _FEW_TILES


def _fits(n: int, *tensors: Tensor | None) -> bool:
    """Whether ``n`` neighbours on the last axis of each tensor can be read at once."""
    for t in tensors:
        if t is not None:
            size = t.element_size()
            places = (t.data_ptr() // size, t.shape[-1], *t.stride()[:-1])
            if t.data_ptr() % size or any(p % n for p in places):
                return False
    return True


def _pointers(**tensors: Tensor | None) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in tensors.items() if t is not None}


def _layer(layer: Layer, made: Made) -> _Layer:
    grid = layer.grid
    norm_weight, norm_bias = _of_inputs(layer.norm)
    following, _, factors = layer.codes if layer.codes is not None else (grid, 0, None)
    return _Layer(
        **_pointers(
            norm_weight=norm_weight, norm_bias=norm_bias, scale=grid.scale, shift=grid.shift,
            tiles=layer.weights.tiles, of_outputs=layer.weights.affine, bias=layer.bias, y=made[0], codes=made[1],
            next_scale=following.scale, next_shift=following.shift, next_factors=factors,
        ),
        qmin=grid.qmin, qmax=grid.qmax, next_min=following.qmin, next_max=following.qmax,
        eps=0.0 if layer.norm is None else layer.norm.eps,
    )  # fmt: skip


def _definitions(layer: Layer | None, made: Made) -> dict[str, int]:
    """What the source wants to know of a layer."""
    codes, norm = made[1], None if layer is None else layer.norm
    norm_weight, norm_bias = _of_inputs(norm)
    return {
        "NORM": kind_of(norm),
        "HAS_W": int(norm_weight is not None),
        "HAS_B": int(norm_bias is not None),
        "HAS_BIAS": int(layer is not None and layer.bias is not None),
        "ACT": 0 if layer is None else ACTIVATIONS[layer.act],
        "CODES": 0 if codes is None else codes.shape[-1],
        "FACTORS": int(layer is not None and layer.codes is not None and layer.codes[2] is not None),
    }


def _behind(then: Layer | None, made: Made = (None, None), kept: bool = True) -> dict[str, int]:
    """What it wants to know of the one behind."""
    at_once = 1 if then is None else next(n for n in (4, 2, 1) if _fits(n, then.bias))
    return {
        "THEN": 0 if then is None else then.weights.outputs,
        "KEPT": int(kept),
        **{f"THEN_{name}": value for name, value in _definitions(then, made).items()},
        "THEN_AT_ONCE": at_once,
    }


def _of_inputs(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _strides(name: str, rows: Tensor | None) -> dict[str, int]:
    return {} if rows is None else {f"{name}_batch": rows.stride(0), f"{name}_row": rows.stride(1)}


def _launch(x: Tensor, samples: tuple[int, int], params: Params, **definitions: int) -> None:
    """``x``: what is read; ``samples``: of how many rows each."""
    several, rows = samples
    tasks = -(-rows // 16) * several  # of a warp
    warps, split = _WARPS, 1
    few = definitions["INPUTS"] <= _FEW_INPUTS
    resident = _RESIDENT if few else _RESIDENT // 2
    if definitions["THEN"]:
        while warps > 1 and tasks < _FEW_BLOCKS * warps:
            warps //= 2
        resident = _RESIDENT_OF_TWO[0 if few and warps == _WARPS else 1] * _WARPS // warps
    else:
        while split < min(_WARPS, -(-definitions["OUTPUTS"] // 16)) and tasks * split < _FEW_WARPS:
            split *= 2
        # What blends hold takes registers.
        if definitions["BLEND"] and tasks * split <= _FEW_RESIDENT * UNITS * warps:
            resident = min(resident, _FEW_RESIDENT)
    grid = -(-rows // (16 * (warps // split))), several
    large = grid[0] * several > _FEW_BLOCKS_OF_LAYER
    definitions |= {"WARPS": warps, "SPLIT": split, "RESIDENT": resident, "LARGE": int(large)}
    hidden = definitions["EXCITE"]
    shared = 4 * ((warps + 1) * definitions["INPUTS"] + hidden) if hidden else 0
    source = nvrtc.specialised("deployed_cuda/thin_layer deployed_cuda/thin", *definitions.items())
    with torch.cuda.device_of(x):
        kernels = nvrtc.load(source, x.device)
        kernels.launch("thin", grid, 32 * warps, shared, params, x.device, early=True)


def project(
    x: Tensor,
    part: int,
    parts: int,
    samples: tuple[int, int],
    layer: Layer,
    z: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    made: Made,
    blended: tuple[Tensor | None, Tensor, Tensor | Attention] | None,
    total: Tensor | None,
    then: Layer | None,
    then_made: Made,
    launch: Launch | None = None,
) -> None:
    """Writes values and codes of a layer, ``made``, and of one that reads its values: see ``cuda.project``.

    Args:
        part, parts: what x is the sum of: elements between tensors, and their number.
        samples: (samples, rows), as which all tensors are read.
        total: where x is written if it is ``blended``.
        then: where ``made`` has no values, those of ``layer`` are not written.
    """
    x_gain, v, scale = blended if blended is not None else (None, None, None)
    attention = scale if isinstance(scale, Attention) else None
    v_scale = None if isinstance(scale, Attention) else scale
    of_inputs = x, z, x_gain, v, v_scale, total, *_of_inputs(layer.norm)
    vector = next(n for n in (4, 2, 1) if part % n == 0 and _fits(n, *of_inputs))
    of_then = (None, None) if then is None else _of_inputs(then.norm)
    at_once = next(n for n in (4, 2, 1) if _fits(n, layer.bias, residual, gain, *of_then))
    params = Params(
        layer=_layer(layer, made),
        **({} if then is None else {"then": _layer(then, then_made)}),
        **_pointers(x=x, v=v, x_gain=x_gain, v_scale=v_scale, blended=total, z=z, residual=residual, gain=gain),
        **({} if attention is None else _pointers(**vars(attention))),
        **_strides("x", x), **_strides("v", v), **_strides("z", z), **_strides("r", residual),
        part=part, rows=samples[1], count=0 if attention is None else attention.tiles.shape[1],
    )  # fmt: skip
    (launch or _launch)(
        x, samples, params, INPUTS=x.shape[2], OUTPUTS=layer.weights.outputs,
        CODED=int(x.dtype == torch.int8), PARTS=parts, BLEND=0 if v is None else 1 if x_gain is None else 2,
        EXCITE=0 if attention is None else attention.first.shape[0],
        **_definitions(layer, made), GATE=int(z is not None), RESIDUAL=int(residual is not None),
        HAS_GAIN=int(gain is not None), CORE=0, VEC=vector, AT_ONCE=at_once,
        **_behind(then, then_made, made[0] is not None),
    )  # fmt: skip


def codes_of_core(
    x: Tensor,
    samples: tuple[int, int],
    of_x: Grid,
    of_u: Grid,
    weights: Weights,
    made: list[Tensor],
    u: Tensor,
    columns: int,
    codes: Tensor,
    width: int,
    bad: Tensor,
    launch: Launch | None = None,
) -> None:
    """Writes the codes of an image and of its projection, and which pixels had a NaN: see ``cuda.Core.encode``.

    ``made``: the quantizers of the projection's outputs; ``columns``, ``width``: of rows of ``u`` and ``codes``.
    """
    inverse, moved, least, most = made
    vector = next(n for n in (4, 2, 1) if _fits(n, x))
    at_once = next(n for n in (4, 2, 1) if _fits(n, *made))
    outputs = weights.outputs
    layer = Layer(of_x, weights, None, None, None, (of_u, outputs, None))
    params = Params(
        layer=_layer(layer, (None, codes)),
        **_pointers(x=x, inverse=inverse, moved=moved, least=least, most=most, u=u, bad=bad),
        **_strides("x", x), rows=samples[1], u_row=columns, code_row=width,
    )  # fmt: skip
    (launch or _launch)(
        x, samples, params, INPUTS=x.shape[2], OUTPUTS=outputs,
        CODED=int(x.dtype == torch.int8), PARTS=1, BLEND=0, EXCITE=0,
        **{**_definitions(layer, (None, None)), "CODES": outputs},
        GATE=0, RESIDUAL=0, HAS_GAIN=0, CORE=2 if of_u is of_x else 1, VEC=vector, AT_ONCE=at_once, **_behind(None),
    )  # fmt: skip
