"""Linear layers of few inputs on a GPU: calls of ``csrc/deployed_cuda/thin.cu``."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.ops import nvrtc
from ssmquant.ops.deployed.forms import ACTIVATIONS, Grid, Norm, Weights, kind_of

__all__ = ["affine", "codes_of_core", "project", "takes", "tiles"]

_MOST_INPUTS = 192  # that a lane has its share of in registers, of two rows
_MOST_WEIGHTS = 2**15  # bytes, which each multiprocessor should keep in its cache
_WARPS = 4  # of a block
_FEW_WARPS = 132 * 6
_RESIDENT = 7  # blocks of a multiprocessor: those of 57,600 rows at once on an H100
_FEW_INPUTS = 96


class _Params(ctypes.Structure):
    """``Params`` of the source."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in "x v x_gain v_scale blended z norm_weight norm_bias scale shift".split()),
        *((n, ctypes.c_void_p) for n in "tiles of_outputs bias residual gain y codes".split()),
        *((n, ctypes.c_void_p) for n in "next_scale next_shift next_factors".split()),
        *((n, ctypes.c_void_p) for n in "inverse moved least most u bad".split()),
        *((n, ctypes.c_longlong) for n in "part x_batch x_row v_batch v_row z_batch z_row r_batch r_row".split()),
        *((n, ctypes.c_int) for n in "rows u_row code_row qmin qmax next_min next_max".split()),
        ("eps", ctypes.c_float),
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


def _launch(x: Tensor, samples: tuple[int, int], params: _Params, **definitions: int) -> None:
    """``x``: what is read; ``samples``: of how many rows each."""
    several, rows = samples
    warps = -(-rows // 16) * several
    split = 1
    while split < min(_WARPS, -(-definitions["OUTPUTS"] // 16)) and warps * split < _FEW_WARPS:
        split *= 2
    resident = _RESIDENT if definitions["INPUTS"] <= _FEW_INPUTS else _RESIDENT // 2
    definitions |= {"WARPS": _WARPS, "SPLIT": split, "RESIDENT": resident}
    grid = -(-rows // (16 * (_WARPS // split))), several
    with torch.cuda.device_of(x):
        kernels = nvrtc.load(nvrtc.specialised("deployed_cuda/thin", *definitions.items()), x.device)
        kernels.launch("thin", grid, 32 * _WARPS, 0, params, x.device, early=True)


def project(
    x: Tensor,
    part: int,
    parts: int,
    samples: tuple[int, int],
    grid: Grid,
    weights: Weights,
    bias: Tensor | None,
    norm: Norm | None,
    z: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    act: str | None,
    y: Tensor,
    codes: Tensor | None,
    following: Grid,
    factors: Tensor | None,
    blended: tuple[Tensor | None, Tensor, Tensor] | None,
    total: Tensor | None,
) -> None:
    """Writes ``y`` and ``codes``, and ``total`` if x is ``blended``: see ``cuda.project``.

    Args:
        part, parts: what x is the sum of: elements between tensors, and their number.
        samples: (samples, rows), as which all tensors are read.
    """
    inputs, outputs = x.shape[2], weights.outputs
    norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
    x_gain, v, v_scale = blended if blended is not None else (None, None, None)
    of_inputs = x, z, norm_weight, norm_bias, x_gain, v, v_scale, total
    vector = next(n for n in (4, 2, 1) if part % n == 0 and _fits(n, *of_inputs))
    at_once = next(n for n in (4, 2, 1) if _fits(n, bias, residual, gain))
    params = _Params(
        **_pointers(
            x=x, v=v, x_gain=x_gain, v_scale=v_scale, blended=total, z=z, norm_weight=norm_weight,
            norm_bias=norm_bias, scale=grid.scale, shift=grid.shift, tiles=weights.tiles,
            of_outputs=weights.affine, bias=bias, residual=residual, gain=gain, y=y, codes=codes,
            next_scale=following.scale, next_shift=following.shift, next_factors=factors,
        ),
        part=part, x_batch=x.stride(0), x_row=x.stride(1), rows=samples[1],
        v_batch=0 if v is None else v.stride(0), v_row=0 if v is None else v.stride(1),
        z_batch=0 if z is None else z.stride(0), z_row=0 if z is None else z.stride(1),
        r_batch=0 if residual is None else residual.stride(0), r_row=0 if residual is None else residual.stride(1),
        qmin=grid.qmin, qmax=grid.qmax, next_min=following.qmin, next_max=following.qmax,
        eps=0.0 if norm is None else norm.eps,
    )  # fmt: skip
    _launch(
        x, samples, params, INPUTS=inputs, OUTPUTS=outputs,
        CODED=int(x.dtype == torch.int8), PARTS=parts, BLEND=0 if v is None else 1 if x_gain is None else 2,
        NORM=kind_of(norm), HAS_W=int(norm_weight is not None),
        HAS_B=int(norm_bias is not None), GATE=int(z is not None), HAS_BIAS=int(bias is not None),
        RESIDUAL=int(residual is not None), HAS_GAIN=int(gain is not None), ACT=ACTIVATIONS[act],
        CODES=0 if codes is None else codes.shape[2], FACTORS=int(factors is not None), CORE=0, VEC=vector,
        AT_ONCE=at_once,
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
) -> None:
    """Writes the codes of an image and of its projection, and which pixels had a NaN: see ``cuda.Core.encode``.

    ``made``: the quantizers of the projection's outputs; ``columns``, ``width``: of rows of ``u`` and ``codes``.
    """
    inverse, moved, least, most = made
    vector = next(n for n in (4, 2, 1) if _fits(n, x))
    outputs = weights.outputs
    params = _Params(
        **_pointers(
            x=x, scale=of_x.scale, shift=of_x.shift, tiles=weights.tiles, of_outputs=weights.affine,
            codes=codes, next_scale=of_u.scale, next_shift=of_u.shift,
            inverse=inverse, moved=moved, least=least, most=most, u=u, bad=bad,
        ),
        x_batch=x.stride(0), x_row=x.stride(1), rows=samples[1], u_row=columns, code_row=width, qmin=of_x.qmin,
        qmax=of_x.qmax, next_min=of_u.qmin, next_max=of_u.qmax,
    )  # fmt: skip
    at_once = next(n for n in (4, 2, 1) if _fits(n, *made))
    _launch(
        x, samples, params, INPUTS=x.shape[2], OUTPUTS=outputs,
        CODED=int(x.dtype == torch.int8), PARTS=1, BLEND=0, NORM=0, HAS_W=0, HAS_B=0, GATE=0, HAS_BIAS=0,
        RESIDUAL=0, HAS_GAIN=0, ACT=0, CODES=outputs, FACTORS=0, CORE=2 if of_u is of_x else 1, VEC=vector,
        AT_ONCE=at_once,
    )  # fmt: skip
