"""What a deployed graph calls where its nodes are fused: arithmetic on codes, by ``ops.deployed``.

Layers here, scans in ``deployed_scans``, norms in ``deployed_norms``. The modules of the graph (quantizers, packed
tensors) are handed in; what kernels need of them is ``deployed_values``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.modules.deployed_convs import FloatConv, float_conv2d
from ssmquant.modules.deployed_norms import (
    NORM_FUNCTIONS,
    NORMS,
    Act,
    LastNorm,
    fused_norm,
    is_plain,
    normalize,
    operand_of,
    own_name,
)
from ssmquant.modules.deployed_scans import scan_core, sequence_core
from ssmquant.modules.deployed_values import (
    Engine,
    Unchanged,
    bias_of,
    by_row,
    coded,
    dense,
    dynamic,
    encode,
    engine_of,
    goes_between,
    grid_of,
    inner,
    kept,
    matrix,
    no_moments,
    packed_for,
    plain,
    row_grid,
    static,
    takes_weight,
)
from ssmquant.modules.packed import PackedTensor
from ssmquant.ops.deployed import Attention, Depthwise, Grid, Layer, Norm, cpu, cuda
from ssmquant.quantizers import DLS, Token

__all__ = [
    "NORMS",
    "NORM_FUNCTIONS",
    "Act",
    "Engine",
    "FloatConv",
    "Front",
    "LastNorm",
    "Unchanged",
    "blend",
    "by_row",
    "coded",
    "conv2d",
    "depthwise_of",
    "dynamic",
    "engine_of",
    "excite",
    "float_conv2d",
    "gated_linear",
    "goes_between",
    "is_depthwise",
    "is_pointwise",
    "linear",
    "normalize",
    "plain",
    "scan_core",
    "sequence_core",
    "static",
    "takes_weight",
    "through",
    "writes_codes",
]


def _product(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    moments: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """(batch, rows, inputs), any strides, by a weight of (outputs, inputs) and any number of ones: (.., outputs)."""
    codes, grid = encode(x.unsqueeze(2), of_x, norm=norm, moments=moments)
    weights = matrix(weight, (weight.shape[0], x.shape[2]), values=grid.low is not None)
    return cpu.linear(codes, grid, weights, bias_of(bias), act=act)


def _project(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    z: Tensor | None = None,
    act: str | None = None,
    residual: Residual = None,
    more: tuple[Tensor, ...] = (),
    codes: Between = None,
    blended: Blended = None,
    then: Then = None,
) -> Any:
    """``_product`` of a static quantizer, or one of rows, without the values and codes of all rows."""
    weights = matrix(weight, (weight.shape[0], x.shape[2]))
    if residual is not None:
        rows, gain = residual
        residual = (
            dense(rows).reshape(*x.shape[:2], weights.outputs),
            None if gain is None else gain.contiguous(),
        )
    q = inner(of_x)
    grid = kept(q, "grid", partial(row_grid, q)) if isinstance(q, Token) else grid_of(of_x, no_moments, 0)
    project = engine_of(x.device).project
    options: dict[str, Any] = {"more": more} if more else {}
    if codes is not None:
        options["codes"] = _codes_operands(codes, weights.outputs)
    if then is not None:
        options |= {"then": _layer(then, weights.outputs, x.device), "kept": then[7]}
    if blended is not None:
        options["blended"] = _blend_operands(*blended)
    return project(x, grid, weights, bias_of(bias), norm=norm, z=z, act=act, residual=residual, **options)


def _codes_operands(codes: Between, outputs: int) -> tuple[Grid, int, Tensor | None] | None:
    """As kernels take them."""
    if codes is None:
        return None
    module, columns, factors = codes
    return grid_of(module, no_moments, 0), outputs if columns is None else columns, bias_of(factors)


def _layer(then: Then, inputs: int, device: torch.device) -> Layer:
    """The layer that reads a result of so many columns, float32."""
    assert then is not None
    of_x, weight, bias, norm, act, _, codes, _ = then
    weights = matrix(weight, (weight.shape[0], inputs))
    of_inputs = operand_of(norm, inputs, torch.float32, device)
    following = _codes_operands(codes, weights.outputs)
    return Layer(grid_of(of_x, no_moments, 0), weights, bias_of(bias), of_inputs, own_name(act), following)


def _followed(y: Tensor, then: Then) -> Any:
    """``y`` and what its reader makes of it, by a call of its own."""
    assert then is not None
    *args, codes, kept_too = then
    last = linear(y, *args, codes=codes)
    return (y, last) if kept_too else last


def _shaped(made: Any, shape: torch.Size, codes: Between, then: Then = None) -> Any:
    """Rows of a product as rows of its input lie; of what is all codes these alone."""
    if then is not None:
        first, last = made if then[7] else (None, made)
        last = _shaped(last, shape, then[6])
        return last if first is None else (_shaped(first, shape, codes), last)
    if codes is None:
        return made.view(*shape[:-1], -1)
    both = tuple(t.view(*shape[:-1], t.shape[-1]) for t in made)
    return both[0] if codes[1] is None else both


def _written(y: Tensor, codes: Between) -> Any:
    """``y`` as the caller wants it, where no kernel has written codes of it."""
    if codes is None:
        return y
    module, columns, factors = codes
    first = y if columns is None else y[..., :columns]
    first = first if factors is None else first * factors
    grid = grid_of(module, no_moments, 0)
    level = ((first + grid.shift) / grid.scale).clamp(grid.qmin, grid.qmax).round() - grid.qmin
    made = level.nan_to_num(nan=-1.0).to(torch.int8)
    return made if columns is None else (made, y[..., columns:])


def _added(y: Tensor, residual: Residual) -> Tensor:
    if residual is None:
        return y
    rows, gain = residual
    return y + (rows if gain is None else rows * gain)


def _rows(x: Tensor) -> Tensor:
    """(samples, .., columns) -> (samples, rows, columns)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


Residual = tuple[Tensor, Tensor | None] | None
"""Of the result's shape, and what its columns are multiplied by (None: 1) before they are added."""
Between = tuple[nn.Module, int | None, Tensor | None] | None
"""The quantizer by whose codes results are written, of how many columns, the first ones (None: of all), and factors
of these columns before (None: none)."""
Blended = tuple[Tensor | None, Tensor, Any] | None
"""Gain, v and scale of ``blend``; or instead of scale the convolutions and parts of ``excite`` of v, which gives it."""
Then = tuple[Any, ...] | None
"""Arguments of ``linear`` for what reads a result: those behind x up to ``axis``, and ``codes``; whether the result is
wanted too."""


def linear(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    norm: LastNorm = None,
    act: Act = None,
    axis: int = -1,
    residual: Residual = None,
    *,
    more: tuple[Tensor, ...] = (),
    codes: Between = None,
    blended: Blended = None,
    then: Then = None,
) -> Any:
    """``F.linear`` of the quantized x, whose first axis numbers the samples; with a ``norm`` that of x.

    Args:
        x: (samples, .., inputs) or (samples, inputs), float32, any strides; or codes of it (``Between``).
        act: of the result, before the residual is added.
        axis: where a module of that has the outputs, if it has to be called.
        more: what is added to x first.
        codes: what is returned as codes.
        blended: x is (B, H, W, inputs), and its ``blend`` with these takes its place.
        then: a layer that reads the result, which has no ``codes`` then, and an x that is not ``blended``. This and
            the three before: for static quantizers, and engines that have it.

    Returns:
        (samples, .., outputs), float32, or codes, or a tuple of both; with ``blended`` a tuple of that and the blend,
        with ``then`` one of that and the same of ``then``, or the latter alone.
    """
    own = own_name(act)
    if blended is not None:
        if not is_plain(norm, act):
            total = blend(x, *blended)
            return linear(total, of_x, weight, bias, norm, act, axis, residual, codes=codes), total
        x = dense(x)
    if then is not None and not (is_plain(None, act) and is_plain(*then[3:5])):
        return _followed(linear(x, of_x, weight, bias, norm, act, axis, residual, more=more), then)
    if isinstance(act, nn.Module) and own is None:
        y = linear(x, of_x, weight, bias, norm, more=more)
        return _written(_added(act(y.movedim(-1, axis)).movedim(axis, -1), residual), codes)
    x, fused, more = fused_norm(norm, x, more)
    rows = _rows(x)
    q = inner(of_x)
    together = blended is None and (not isinstance(q, DLS) or q.stats_axis is None)  # samples do not matter
    if together:
        rows = rows.flatten(0, 1)[None]
    if static(of_x) or isinstance(q, Token):
        others = tuple(_rows(t).flatten(0, 1)[None] if together else _rows(t) for t in more)
        options: dict[str, Any] = {"act": own, "residual": residual, "more": others, "codes": codes}
        if blended is None:
            made = _project(rows, of_x, weight, bias, fused, then=then, **options)
            return _shaped(made, x.shape, codes, then)
        made, total = _project(rows, of_x, weight, bias, fused, blended=blended, **options)
        return _shaped(made, x.shape, codes), total.view(x.shape)
    return _added(_product(rows, of_x, weight, bias, fused, act=own).view(*x.shape[:-1], -1), residual)


def gated_linear(
    x: Tensor,
    z: Tensor,
    norm: LastNorm,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    residual: Residual = None,
    *,
    more: tuple[Tensor, ...] = (),
    codes: Between = None,
    then: Then = None,
) -> Any:
    """``linear`` of ``norm(x) * silu(z)``, all (samples, .., columns)."""
    if then is not None and not is_plain(*then[3:5]):
        return _followed(gated_linear(x, z, norm, of_x, weight, bias, residual, more=more), then)
    x, fused, more = fused_norm(norm, x, more)
    x3, z3, *others = (_rows(dense(t)) for t in (x, z, *more))
    if static(of_x) or isinstance(inner(of_x), Token):
        options: dict[str, Any] = {"residual": residual, "more": tuple(others), "codes": codes, "then": then}
        return _shaped(_project(x3, of_x, weight, bias, fused, z3, **options), x.shape, codes, then)
    y, moments = cpu.gate(x3.unsqueeze(2), z3.unsqueeze(2), fused, with_moments=True)
    return _added(_product(y, of_x, weight, bias, moments=moments).view(*x.shape[:-1], -1), residual)


def blend(x: Tensor, gain: Tensor | None, v: Tensor, scale: Any) -> Tensor:
    """``x * gain + v * scale``: x and v (B, H, W, C), any strides, gain (C,) or None for 1, scale (B, C, 1, 1).

    Or see ``Blended``.
    """
    if isinstance(scale, tuple):
        scale = excite(v.permute(0, 3, 1, 2), *scale)
    gain, v, scale = _blend_operands(gain, v, scale)
    made: Tensor = engine_of(x.device).blend(dense(x).flatten(1, 2), gain, v, scale)
    return made.view(x.shape)


def _blend_operands(gain: Tensor | None, v: Tensor, scale: Any) -> tuple[Tensor | None, Tensor, Any]:
    """As kernels take them."""
    gain = None if gain is None else gain.contiguous()
    if isinstance(scale, tuple):
        first, second, parts = scale
        scale = Attention(parts, *_matrix(first), *_matrix(second))
    else:
        scale = scale.flatten(1).contiguous()
    return gain, dense(v).flatten(1, 2), scale


def _matrix(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Of a 1x1 convolution, and its bias."""
    assert layer.bias is not None
    return layer.weight.detach().flatten(1).contiguous(), layer.bias.detach().contiguous()


def excite(x: Tensor, first: nn.Conv2d, second: nn.Conv2d, parts: Tensor | None = None) -> Tensor:
    """Channel attention: ``sigmoid(second(relu(first(mean(x)))))``, (B, C, 1, 1), of (B, C, H, W) with any strides.

    ``parts``: sums of x that ``conv2d`` has given with it.
    """
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return cuda.excite(rows, *_matrix(first), *_matrix(second), parts)[:, :, None, None]


Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Front = tuple[nn.Module, PackedTensor, Tensor | None, Window, Act, Between, nn.Module | None]
"""Of a depthwise convolution whose codes one projection reads: the quantizer of its input, weight, bias, window,
activation, and the codes that it makes, as ``conv2d`` takes them."""


def conv2d(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    window: Window,
    act: Act = None,
    gain: Tensor | None = None,
    residual: Residual = None,
    *,
    codes: Between = None,
    also: nn.Module | None = None,
    sums: bool = False,
    front: Front | None = None,
) -> Any:
    """A convolution of the quantized x, (B, C, H, W) with any strides; ``window``: stride, padding and dilation.

    Dense, 1x1 without stride and padding (also of values that are clamped), or depthwise, which keeps the size. All are
    float32. ``act``: of the result of one of the last two; ``gain``, (C,): factors of x, for one of the first two.
    ``residual``: of a 1x1, or of a dense one if the engine ``ADDS``, channels second as in the result, without factors;
    it is added behind ``act``. ``codes``: see ``linear``, of all outputs of one of the last two. ``also``: of a
    depthwise one, a second quantizer, of which there are codes too, in a tuple. ``sums``: of a depthwise one that makes
    no codes, sums of the result over some pixels each, (B, some, outputs), or None where no kernel has them, in a
    tuple. ``front``: of a 1x1 without factors: a depthwise convolution that makes codes of x first.

    Returns:
        (B, outputs, H, W), channels last.
    """
    stride, padding, dilation = window
    engine = engine_of(x.device)
    outputs, inputs, *kernel = weight.shape if len(weight.shape) > 2 else (*weight.shape, 1, 1)
    if inputs == 1 and outputs == x.shape[1]:
        assert residual is None
        own = own_name(act)
        called = isinstance(act, nn.Module) and own is None
        d = _depthwise(x, of_x, weight, bias, window, own, *((None, None) if called else (codes, also)))
        options: dict[str, Any] = {"sums": True} if sums and not called else {}
        if d.codes is not None:
            options = {"codes": d.codes, "factors": d.factors}
            if d.also is not None:
                options["also"] = d.also
        y = engine.depthwise(d.x, d.grid, d.weights, d.bias, d.kernel, d.dilation, d.act, **options)
        if called:
            assert isinstance(act, nn.Module)
            floats = act(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = _written(floats, codes)
            y = y if also is None else (y, _written(floats, (also, None, None)))
        if sums:
            y, parts = (y, None) if called else y
            return y.permute(0, 3, 1, 2), parts
        return y.permute(0, 3, 1, 2) if also is None else tuple(t.permute(0, 3, 1, 2) for t in y)
    if front is not None:
        before, own = depthwise_of(x, front), own_name(act)
        if before is not None and residual is None and (own is not None or act is None):
            made = _behind(before, of_x, weight, bias, own, codes)
            return made.unflatten(1, before.x.shape[1:3]).permute(0, 3, 1, 2)
        x, _ = through(x, front)
    if is_pointwise(kernel, window):
        factors = None if gain is None else (gain,)
        own_codes: dict[str, Any] = {} if codes is None else {"codes": codes}
        added = None if residual is None else (residual[0].permute(0, 2, 3, 1), residual[1])
        rows = linear(x.permute(0, 2, 3, 1), of_x, weight, bias, factors, act, 1, added, **own_codes)
        return rows.permute(0, 3, 1, 2)
    assert act is None
    taps = packed_for(weight, "taps", lambda t: t.permute(2, 3, 0, 1).flatten(0, 1))
    grid = grid_of(of_x, no_moments, 0)
    image, first, _ = fused_norm(None if gain is None else (gain,), x.permute(0, 2, 3, 1))
    sizes = (kernel[0], kernel[1]), dilation, stride, padding
    held = {} if residual is None else {"residual": residual[0].permute(0, 2, 3, 1).flatten(1, 2)}
    y = engine.convolve(image, grid, taps, bias_of(bias), *sizes, first, **held)
    return y.permute(0, 3, 1, 2)


def _depthwise(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    window: Window,
    act: str | None,
    codes: Between,
    also: nn.Module | None,
) -> Depthwise:
    """What kernels want of ``conv2d`` of each channel."""
    image, outputs = x.permute(0, 2, 3, 1), weight.shape[0]
    kernel = weight.shape[2], weight.shape[3]
    by_lanes = engine_of(x.device).by_lanes
    taps = kept(weight, "taps", lambda: by_lanes(weight().float().reshape(outputs, -1).T))
    bias = bias_of(taps.new_zeros(outputs) if bias is None else bias)
    assert bias is not None
    grid = grid_of(of_x, lambda: cpu.moments(image), x.numel() // x.shape[0])
    made = None if codes is None else grid_of(codes[0], no_moments, 0)
    factors = None if codes is None else bias_of(codes[2])
    other = None if also is None else grid_of(also, no_moments, 0)
    return Depthwise(image, grid, taps, bias, kernel, window[2], act, made, factors, other)


def depthwise_of(x: Tensor, front: Front) -> Depthwise | None:
    """A convolution in front of a projection as a kernel takes it; None if its activation has to be called."""
    act = front[4]
    if isinstance(act, nn.Module) and own_name(act) is None:
        return None
    return _depthwise(x, *front[:4], own_name(act), *front[5:])


def _behind(
    d: Depthwise, of_x: nn.Module, weight: PackedTensor, bias: Tensor | None, act: str | None, codes: Between
) -> Tensor:
    """A 1x1 convolution of what a depthwise one makes codes of, (batch, pixels, outputs), float32 or codes."""
    weights = matrix(weight, (weight.shape[0], d.x.shape[3]))
    made = _codes_operands(codes, weights.outputs)
    y: Tensor = cuda.fronted(d, grid_of(of_x, no_moments, 0), weights, bias_of(bias), act, made)
    return y


def through(x: Tensor, front: Front) -> tuple[Tensor, Tensor | None]:
    """The codes that a convolution in front of a projection makes, by one quantizer and by another one, if any."""
    made = conv2d(x, *front[:5], codes=front[5], also=front[6])
    return made if front[6] is not None else (made, None)


def is_pointwise(kernel: Sequence[int], window: Window) -> bool:
    """Whether a convolution is a linear layer of each pixel."""
    return tuple(kernel) == (1, 1) and window[:2] == ((1, 1), (0, 0))


def is_depthwise(weight: nn.Module) -> bool:
    """Whether a convolution that kernels know is one of each channel."""
    return isinstance(weight, PackedTensor) and weight.shape[1] == 1


def writes_codes(weight: nn.Module, window: Window) -> bool:
    """Whether the kernel of a convolution can write codes: not one of a dense kernel."""
    assert isinstance(weight, PackedTensor)
    return is_depthwise(weight) or is_pointwise(weight.shape[2:] or (1, 1), window)
