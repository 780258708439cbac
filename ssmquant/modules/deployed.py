"""What a deployed graph calls where its nodes are fused: arithmetic on codes, by ``ops.deployed``.

The modules of the graph (quantizers, packed tensors) stay what they were and are handed in; what kernels need of them
is kept as long as their tensors do not change.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ssmquant.modules.activation import ActivationQuantizer, FrozenRange
from ssmquant.modules.packed import PackedTensor
from ssmquant.ops.deployed import Codes, Grid, Norm, RowGrid, Weights, cpu, cuda
from ssmquant.ops.deployed.forms import signed_codes
from ssmquant.quantizers import DLS, Quantizer, Token
from ssmquant.quantizers.bank import hooks_of

__all__ = [
    "Unchanged",
    "blend",
    "by_row",
    "coded",
    "conv2d",
    "dynamic",
    "engine_of",
    "excite",
    "gated_linear",
    "goes_between",
    "is_depthwise",
    "linear",
    "normalize",
    "plain",
    "scan_core",
    "sequence_core",
    "static",
    "takes_weight",
    "writes_codes",
]

Engine = Any
"""``ops.deployed.cpu`` or ``cuda``: modules whose functions have the same names."""
_MOST_PRODUCTS = 2**16
"""That an int32 has room for, of uint8 and int8."""
_MOST_VALUES = 2**14
"""That a model keeps, some of them for each size of input."""
_known: WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Any]]] = WeakKeyDictionary()
_call = threading.local()


def _stamp(modules: Iterable[nn.Module]) -> list[int]:
    """Differs once a tensor of the modules is another one or has been written to."""
    own = [m.__dict__ for m in modules]  # for speed: a model may have a thousand of them
    stores = [*[o["_parameters"] for o in own], *[o["_buffers"] for o in own]]
    tensors = [t for t in chain.from_iterable([d.values() for d in stores]) if t is not None]
    versions = [0 if t.is_inference() else t._version for t in tensors]
    return [*versions, *[t.data_ptr() for t in tensors]]


def _checked(module: nn.Module, form: Any, make: Callable[[], Any]) -> Any:
    stamp = _stamp((module,))
    forms = _known.setdefault(module, {})
    if form not in forms or forms[form][0] != stamp:
        forms[form] = stamp, make()
    return forms[form][1]


def _kept(module: nn.Module, form: Any, make: Callable[[], Any]) -> Any:
    """``make()``, or what it returned before if no tensor of the module has changed since."""
    values = getattr(_call, "values", None)
    if values is None:
        return _checked(module, form, make)
    key = module, form
    if key not in values:
        values[key] = _checked(module, form, make)
    return values[key]


def _in_a_call(key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, which depends on nothing but modules of the call and ``key``, or what it returned before."""
    values = getattr(_call, "values", None)
    if values is None:
        return make()
    if key not in values:
        values[key] = make()
    return values[key]


class Unchanged:
    """Looks once a call, and not once a kernel, whether any tensor of a model's quantizers and weights has changed."""

    def __init__(self) -> None:
        self._stamp: list[Any] = []
        self._values: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[Unchanged], tuple[()]]:
        """A copy, or an unpickled one, knows nothing."""
        return Unchanged, ()

    def values(self) -> list[Any]:
        """What was made of them."""
        return list(self._values.values())

    @contextmanager
    def in_use(self, *stores: nn.ModuleDict) -> Iterator[None]:
        """In this thread the modules of ``stores`` stay as they are."""
        children = list(chain.from_iterable(store.__dict__["_modules"].values() for store in stores))
        modules = [*children, *chain.from_iterable([m.__dict__["_modules"].values() for m in children])]
        stamp = [*map(id, modules), *_stamp(modules)]
        if stamp != self._stamp or len(self._values) > _MOST_VALUES:
            self._stamp, self._values = stamp, {}
        before, _call.values = getattr(_call, "values", None), self._values
        try:
            yield
        finally:
            _call.values = before


def engine_of(device: torch.device) -> Engine:
    """What computes on a device; ``unavailable(device)`` of it says why it cannot."""
    return cuda if device.type == "cuda" else cpu


# ---- quantizers ------------------------------------------------------------------------------------------------------


def _inner(module: nn.Module) -> nn.Module:
    return module.quantizer if isinstance(module, ActivationQuantizer) else module


def static(module: nn.Module) -> bool:
    """Whether a quantizer's codes are integers on one grid, known beforehand: products of them are exact."""
    q = _inner(module)
    if not isinstance(q, Quantizer) or q.bits is None:
        return False
    known: bool = _kept(q, "static", lambda: q.static_affine() is not None)
    return known


def dynamic(module: nn.Module, engine: Engine) -> bool:
    """Whether a quantizer takes its grid from statistics that kernels know."""
    q = _inner(module)
    return (
        engine.DYNAMIC
        and isinstance(q, DLS)
        and q.bits is not None
        and not q.official
        and q.stats_axis in (None, 0)
    )


def by_row(module: nn.Module, axis: int, engine: Engine) -> bool:
    """Whether a quantizer gives each row, the elements along ``axis``, a range of its own."""
    q = _inner(module)
    return engine.BY_ROW and isinstance(q, Token) and q.bits is not None and q.channel_axis == axis


def goes_between(module: nn.Module, engine: Engine) -> bool:
    """Whether codes of this quantizer can go from the kernel that makes its input to the one that reads it."""
    q = _inner(module)
    return static(module) and isinstance(q, Quantizer) and q.qmax - q.qmin < engine.BETWEEN


def coded(module: nn.Module, engine: Engine) -> bool:
    """Whether kernels know how to encode as this quantizer does."""
    return static(module) or dynamic(module, engine)


def _static_grid(q: Quantizer) -> Grid:
    affine = q.static_affine()
    assert affine is not None
    scale, shift = (t.detach().float().reshape(1).clone() for t in (affine.scale, affine.shift))
    qmin, qmax = q.qmin, q.qmax
    if isinstance(q, FrozenRange):  # whose ends are levels
        ends = ((torch.stack((q.lo, q.hi)) + q.beta) / q.alpha).round().nan_to_num()
        qmin, qmax = ends.clamp(qmin, qmax).sort(dim=0).values.flatten().int().tolist()  # they may be far off
    return Grid(scale, shift, qmin, qmax)


def _dynamic_grid(q: DLS, moments: Tensor, count: int, copies: int = 1) -> Grid:
    """From the moments of samples of ``count`` elements, each of which stands for ``copies``."""
    samples = len(moments)
    if q.stats_axis is None and samples > 1:
        m = moments.double()
        mean = m[:, 0].mean()
        squares = (m[:, 1] ** 2 * (count - 1) + count * (m[:, 0] - mean) ** 2).sum()
        count *= samples
        std = (squares / max(count - 1, 1)).sqrt()
        moments = torch.stack((mean, std, m[:, 2].min(), m[:, 3].max()))[None].float().contiguous()
    w, v = (t.detach().float().contiguous() for t in (q.w, q.v))
    scale, shift, low, high = cpu.ranges(moments, count, copies, w, v, q.qmax - q.qmin + 1, q.eps)
    return Grid(scale, shift, q.qmin, q.qmax, low, high)


def _grid(module: nn.Module, moments: Callable[[], Tensor], count: int, copies: int = 1) -> Grid:
    q = _inner(module)
    if isinstance(q, DLS):
        return _dynamic_grid(q, moments(), count, copies)
    assert isinstance(q, Quantizer)
    grid: Grid = _kept(q, "grid", lambda: _static_grid(q))
    return grid


def _row_grid(q: Token) -> RowGrid:
    return RowGrid(q.clip.detach().float().contiguous(), q.qmax - q.qmin + 1, q.eps)


def _encode(
    x: Tensor,
    module: nn.Module,
    copies: int = 1,
    *,
    moments: Tensor | None = None,
    norm: Norm | None = None,
    by_group: bool = False,
) -> tuple[Codes, Grid]:
    """(batch, rows, groups, columns) as codes. With a ``norm`` the quantizer is static."""

    def known() -> Tensor:
        return cpu.moments(x) if moments is None else moments

    grid = _grid(module, known, x.numel() // x.shape[0], copies)
    return cpu.encode(x, grid, norm=norm, by_group=by_group), grid


# ---- weights ---------------------------------------------------------------------------------------------------------


def takes_weight(module: nn.Module, outputs: int = 1) -> bool:
    """Whether kernels multiply by this weight: one scale for all, or for each entry of the first ``outputs`` axes."""
    if not isinstance(module, PackedTensor) or module.lo is not None or len(module.shape) <= outputs:
        return False
    fits = math.prod(module.shape[outputs:]) < _MOST_PRODUCTS
    return fits and all(n == 1 for n in module.scale.shape[outputs:])


def _weights(
    module: PackedTensor, form: Any, arrange: Callable[[Tensor], Tensor], **options: bool
) -> Weights:
    """A packed weight for kernels; ``arrange``: its codes as (.., outputs, inputs), which ``form`` names.

    ``options``: of ``cpu.pack``.
    """

    def make() -> Weights:
        q = module.qtensor()
        scale, shift = (arrange(t.float().expand(q.codes.shape))[..., 0] for t in (q.scale, q.shift))
        codes, shift = signed_codes(arrange(q.codes), q.bits, q.code_min, shift, scale)
        return engine_of(codes.device).pack(codes, scale, shift, **options)

    made: Weights = _kept(module, (form, *options.items()), make)
    return made


def _matrix(module: PackedTensor, shape: tuple[int, ...], **options: bool) -> Weights:
    return _weights(module, shape, lambda t: t.reshape(shape), **options)


def plain(value: Any) -> Any:
    """A packed tensor's values, float32 and contiguous; a tensor as such; None."""
    if isinstance(value, PackedTensor):
        return _kept(value, "plain", lambda: value().float().contiguous())
    return value.float().contiguous() if isinstance(value, Tensor) else value


# ---- projections and convolutions ------------------------------------------------------------------------------------


_padded: MutableMapping[Tensor, tuple[tuple[int, int], Tensor]] = WeakTensorKeyDictionary()


def _bias(bias: Tensor | None) -> Tensor | None:
    """As kernels want it; what was made of the same tensor before, if it has not changed."""
    if bias is None:
        return None
    by_lanes = engine_of(bias.device).by_lanes
    if bias.is_inference():
        wide: Tensor = by_lanes(bias)
        return wide
    stamp, known = (bias.data_ptr(), bias._version), _padded.get(bias)
    if known is None or known[0] != stamp:
        known = _padded[bias] = stamp, by_lanes(bias.detach())
    return known[1]


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
    codes, grid = _encode(x.unsqueeze(2), of_x, norm=norm, moments=moments)
    weights = _matrix(weight, (weight.shape[0], x.shape[2]), values=grid.low is not None)
    return cpu.linear(codes, grid, weights, _bias(bias), act=act)


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
) -> Any:
    """``_product`` of a static quantizer, or one of rows, without the values and codes of all rows."""
    weights = _matrix(weight, (weight.shape[0], x.shape[2]))
    if residual is not None:
        rows, gain = residual
        residual = _dense(rows).reshape(*x.shape[:2], -1), None if gain is None else gain.contiguous()
    q = _inner(of_x)
    grid = _kept(q, "grid", partial(_row_grid, q)) if isinstance(q, Token) else _grid(of_x, _no_moments, 0)
    project = engine_of(x.device).project
    options: dict[str, Any] = {"more": more} if more else {}
    if codes is not None:
        module, columns, factors = codes
        columns = weights.outputs if columns is None else columns
        options["codes"] = _grid(module, _no_moments, 0), columns, _bias(factors)
    return project(x, grid, weights, _bias(bias), norm=norm, z=z, act=act, residual=residual, **options)


def _shaped(made: Any, shape: torch.Size, codes: Between) -> Any:
    """Rows of a product as rows of its input lie; of what is all codes these alone."""
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
    grid = _grid(module, _no_moments, 0)
    made = engine_of(y.device).encode(first.reshape(1, -1, 1, first.shape[-1]), grid).reshape(first.shape)
    return made if columns is None else (made, y[..., columns:])


def _dense(x: Tensor) -> Tensor:
    """Columns next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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
Act = nn.Module | str | None
"""``"silu"`` or ``"gelu"``, or a module that was one of these when the graph was made."""
LastNorm = tuple[Any, ...] | None
"""None, ``(module,)``, or ``(rms, weight, bias, eps)``: a norm over the last axis. ``(gain,)``: factors alone."""
NORMS = nn.LayerNorm, nn.RMSNorm
NORM_FUNCTIONS = F.layer_norm, F.rms_norm, torch.rms_norm


def _norm_of(norm: LastNorm, dtype: torch.dtype) -> tuple[bool, Any, Any, Any] | None:
    """(rms, weight, bias, eps) of a norm that kernels take; None if it has to be called."""
    assert norm is not None
    if len(norm) == 1:
        module = norm[0]
        if hooks_of(module):
            return None
        rms = type(module) is nn.RMSNorm
        weight, bias, eps = module.weight, None if rms else module.bias, module.eps
    else:
        rms, weight, bias, eps = norm
    fits = all(t is None or t.dtype == dtype for t in (weight, bias))
    return (rms, weight, bias, eps) if fits else None


def _as_kernels_take(found: tuple[bool, Any, Any, Any], dtype: torch.dtype) -> Norm:
    rms, weight, bias, eps = found
    weight, bias = (None if t is None else t.detach().contiguous() for t in (weight, bias))
    return Norm(weight, bias, torch.finfo(dtype).eps if eps is None else eps, rms)


def _plainly(norm: tuple[Any, ...], x: Tensor) -> Tensor:
    """By PyTorch."""
    if len(norm) == 1:
        y: Tensor = norm[0](x)
        return y
    rms, weight, bias, eps = norm
    shape = x.shape[-1:]
    return F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)


def normalize(x: Tensor, norm: tuple[Any, ...]) -> Tensor:
    """A norm over the last axis (a ``LastNorm``), and nothing else, of x with any strides: contiguous.

    What is watched by hooks, or not what kernels take, is called as ever.
    """
    engine = engine_of(x.device)
    found = _norm_of(norm, torch.float32) if hasattr(engine, "normalize") and x.dim() else None
    if found is None:
        return _plainly(norm, x)
    fits = all(t is None or t.shape == x.shape[-1:] for t in found[1:3])
    if len(norm) == 1:
        fits = fits and tuple(norm[0].normalized_shape) == x.shape[-1:]
    rows = x[(None,) * (3 - x.dim())] if x.dim() < 3 else x.flatten(1, -2)
    if not fits or not engine.normalizes(rows):
        return _plainly(norm, x)
    made: Tensor = engine.normalize(rows, _as_kernels_take(found, x.dtype))
    return made.view(x.shape)


def _fused_norm(
    norm: LastNorm, x: Tensor, more: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Norm | None, tuple[Tensor, ...]]:
    """The norm for a kernel, and ``x`` with columns next to each other; or no norm any more, and its result.

    ``more``: what is added to x before; empty if that has been done.
    """
    if norm is None:
        return x, None, more
    if isinstance(norm[0], Tensor):
        factors = Norm(norm[0].to(x.dtype).contiguous(), None, 0.0, factors=True)
        return _dense(x), factors, tuple(map(_dense, more))
    found = _norm_of(norm, x.dtype)
    if found is None:
        return _plainly(norm, sum(more, x)), None, ()
    return _dense(x), _as_kernels_take(found, x.dtype), tuple(map(_dense, more))


def _own(act: Act) -> str | None:
    """The kernels' name of an activation; None where there is none, or its module has to be called."""
    if act is None or isinstance(act, str):
        return act
    if hooks_of(act) or getattr(act, "approximate", "none") != "none":
        return None
    return "gelu" if type(act) is nn.GELU else "silu" if type(act) is nn.SiLU else None


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
) -> Any:
    """``F.linear`` of the quantized x, whose first axis numbers the samples; with a ``norm`` that of x.

    Args:
        x: (samples, .., inputs) or (samples, inputs), float32, any strides; or codes of it (``Between``).
        act: of the result, before the residual is added.
        axis: where a module of that has the outputs, if it has to be called.
        more: what is added to x first.
        codes: what is returned as codes. This and ``more``: for static quantizers, and engines that have it.

    Returns:
        (samples, .., outputs), float32, or codes, or a tuple of both.
    """
    own = _own(act)
    if isinstance(act, nn.Module) and own is None:
        y = linear(x, of_x, weight, bias, norm, more=more)
        return _written(_added(act(y.movedim(-1, axis)).movedim(axis, -1), residual), codes)
    x, fused, more = _fused_norm(norm, x, more)
    rows = _rows(x)
    q = _inner(of_x)
    together = not isinstance(q, DLS) or q.stats_axis is None  # samples do not matter
    if together:
        rows = rows.flatten(0, 1)[None]
    if static(of_x) or isinstance(q, Token):
        others = tuple(_rows(t).flatten(0, 1)[None] if together else _rows(t) for t in more)
        made = _project(rows, of_x, weight, bias, fused, act=own, residual=residual, more=others, codes=codes)
        return _shaped(made, x.shape, codes)
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
) -> Any:
    """``linear`` of ``norm(x) * silu(z)``, all (samples, .., columns)."""
    x, fused, more = _fused_norm(norm, x, more)
    x3, z3, *others = (_rows(_dense(t)) for t in (x, z, *more))
    if static(of_x) or isinstance(_inner(of_x), Token):
        made = _project(x3, of_x, weight, bias, fused, z3, residual=residual, more=tuple(others), codes=codes)
        return _shaped(made, x.shape, codes)
    y, moments = cpu.gate(x3.unsqueeze(2), z3.unsqueeze(2), fused, with_moments=True)
    return _added(_product(y, of_x, weight, bias, moments=moments).view(*x.shape[:-1], -1), residual)


def blend(x: Tensor, gain: Tensor | None, v: Tensor, scale: Tensor) -> Tensor:
    """``x * gain + v * scale``: x and v (B, H, W, C), any strides, gain (C,) or None for 1, scale (B, C, 1, 1)."""
    x3, v3 = (_dense(t).flatten(1, 2) for t in (x, v))
    gain = None if gain is None else gain.contiguous()
    made: Tensor = engine_of(x.device).blend(x3, gain, v3, scale.flatten(1).contiguous())
    return made.view(x.shape)


def excite(x: Tensor, first: nn.Conv2d, second: nn.Conv2d) -> Tensor:
    """Channel attention: ``sigmoid(second(relu(first(mean(x)))))``, (B, C, 1, 1), of (B, C, H, W) with any strides."""
    weights = [t.detach().flatten(1).contiguous() for t in (first.weight, second.weight)]
    biases = [t.detach().contiguous() for t in (first.bias, second.bias) if t is not None]
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return cuda.excite(rows, weights[0], biases[0], weights[1], biases[1])[:, :, None, None]


Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def conv2d(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    window: Window,
    act: Act = None,
    gain: Tensor | None = None,
    *,
    codes: Between = None,
    also: nn.Module | None = None,
) -> Any:
    """A convolution of the quantized x, (B, C, H, W) with any strides; ``window``: stride, padding and dilation.

    Dense, 1x1 without stride and padding (also of values that are clamped), or depthwise, which keeps the size. All are
    float32. ``act``: of the result of one of the last two; ``gain``, (C,): factors of x, for one of the first two.
    ``codes``: see ``linear``, of all outputs of one of the last two. ``also``: of a depthwise one, a second quantizer,
    of which there are codes too, in a tuple.

    Returns:
        (B, outputs, H, W), channels last.
    """
    stride, padding, dilation = window
    engine = engine_of(x.device)
    outputs, inputs, *kernel = weight.shape if len(weight.shape) > 2 else (*weight.shape, 1, 1)
    if inputs == 1 and outputs == x.shape[1]:
        image = x.permute(0, 2, 3, 1)
        batch = x.shape[0]
        grid = _grid(of_x, lambda: cpu.moments(image), x.numel() // batch)
        taps = _kept(weight, "taps", lambda: engine.by_lanes(weight().float().reshape(outputs, -1).T))
        bias = _bias(taps.new_zeros(outputs) if bias is None else bias)
        own = _own(act)
        assert bias is not None
        called = isinstance(act, nn.Module) and own is None
        options: dict[str, Any] = {}
        if codes is not None and not called:
            options = {"codes": _grid(codes[0], _no_moments, 0), "factors": _bias(codes[2])}
            if also is not None:
                options["also"] = _grid(also, _no_moments, 0)
        y = engine.depthwise(image, grid, taps, bias, (kernel[0], kernel[1]), dilation, own, **options)
        if called:
            assert isinstance(act, nn.Module)
            floats = act(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = _written(floats, codes)
            y = y if also is None else (y, _written(floats, (also, None, None)))
        return y.permute(0, 3, 1, 2) if also is None else tuple(t.permute(0, 3, 1, 2) for t in y)
    if is_pointwise(kernel, window):
        factors = None if gain is None else (gain,)
        rows = linear(x.permute(0, 2, 3, 1), of_x, weight, bias, factors, act, 1, codes=codes)
        made: Tensor = rows.permute(0, 3, 1, 2)
        return made
    assert act is None
    taps = _weights(weight, "taps", lambda t: t.permute(2, 3, 0, 1).flatten(0, 1))
    grid = _grid(of_x, _no_moments, 0)
    image, first, _ = _fused_norm(None if gain is None else (gain,), x.permute(0, 2, 3, 1))
    sizes = (kernel[0], kernel[1]), dilation, stride, padding
    y = engine.convolve(image, grid, taps, _bias(bias), *sizes, first)
    return y.permute(0, 3, 1, 2)


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


def _sure(grid: Grid | None) -> Grid:
    assert grid is not None
    return grid


def _no_moments() -> Tensor:
    raise AssertionError("the quantizer of a dense convolution is static")


# ---- the scan of an image --------------------------------------------------------------------------------------------


def scan_core(
    x: Tensor,
    order: Tensor,
    ranks: tuple[int, int, int],
    places: tuple[int, int, int],
    of_x: nn.Module,
    projection: PackedTensor,
    of_rank: nn.Module,
    dt_weight: PackedTensor,
    of_u: nn.Module,
    of_delta: nn.Module | None,
    of_b: nn.Module,
    of_c: nn.Module,
    a: Any,
    skip: Any,
    bias: Any,
    *,
    softplus: bool,
    apart: int = 0,
    u: Tensor | None = None,
) -> Any:
    """Projections of an image, selective scans in K orders of its pixels, and their sum: (B, L, D).

    Args:
        x: (B, L, D), any strides; float32, or codes by ``of_x``, where ``of_u`` is the same or there are codes ``u``.
        order: (K, L).
        ranks: rows that a direction's projection has; of these the low rank of the step sizes, and states, of B and C.
        places: where the low rank, B and C begin among a direction's rows.
        of_x, of_u, of_rank, of_delta, of_b, of_c: quantizers.
        projection: (K, E, D), to the low rank, B and C.
        dt_weight: (K, D, R).
        a: (K * D, N); skip, bias: (K * D,) or None.
        apart: so many tensors are returned, whose sum is the result; 0: one, the result.
    """
    batch, pixels, channels = x.shape
    directions, (rows, rank, states) = len(order), ranks
    order = order.contiguous()
    quantizers = of_x, of_u, of_rank, of_delta, of_b, of_c
    operands = plain(a), plain(skip), plain(bias)

    def weights_of() -> tuple[Weights, Weights]:
        shapes = (directions * rows, channels), (directions, channels, rank)
        return _matrix(projection, shapes[0]), _matrix(dt_weight, shapes[1], steps=True)

    def prepare() -> Callable[..., Tensor] | None:
        """None if one of the grids is known by a call's data only."""
        if not all(q is None or static(q) for q in quantizers):
            return None
        grids = {q: None if q is None else _grid(q, _no_moments, 0) for q in quantizers}
        weights, steps = weights_of()
        return engine_of(x.device).Core(
            (batch, pixels, channels), None if of_x is of_u else grids[of_x], weights, places, _sure(grids[of_u]),
            _sure(grids[of_rank]), steps, grids[of_delta], operands[0], _sure(grids[of_b]), _sure(grids[of_c]),
            *operands[1:], softplus, order, rank, **({"apart": True} if apart else {}),
        )  # fmt: skip

    facts = x.shape, ranks, places, softplus, apart, torch.get_num_threads()
    pointers = tuple(None if t is None else t.data_ptr() for t in (order, *operands))
    core: Callable[..., Tensor] | None = _in_a_call(
        (quantizers, projection, dt_weight, facts, pointers), prepare
    )
    if core is not None:
        made = core(x) if u is None else core(x, u)
        return _as_many(made, apart) if apart else made
    weights, steps = weights_of()
    image = x.unsqueeze(2)
    codes, grid = _encode(image, of_x, directions)
    of_scan = (codes, grid) if of_u is of_x else _encode(image, of_u, directions)
    made = cpu.linear(codes, grid, weights).view(batch, pixels, directions, rows)
    low, b, c = (
        _encode(made[..., at : at + n], q, by_group=True)
        for at, n, q in zip(places, (rank, states, states), (of_rank, of_b, of_c), strict=True)
    )
    of_steps = None
    if of_delta is not None:
        count = pixels * directions * channels
        of_steps = _grid(of_delta, lambda: cpu.delta_moments(*low, steps), count)
    return cpu.scan(of_scan, low, steps, of_steps, operands[0], b, c, *operands[1:], softplus, order)


def _as_many(parts: Tensor, count: int) -> tuple[Tensor, ...]:
    """Tensors whose sum is that of ``parts``: one for each where there are as many as there were while tracing."""
    if len(parts) > count:  # an image may have more paths than another one
        parts = torch.cat((parts[: count - 1], parts[count - 1 :].sum(0, keepdim=True)))
    return (*parts.unbind(), *(torch.zeros_like(parts[0]) for _ in range(count - len(parts))))


def sequence_core(
    x: Tensor,
    reverse: bool,
    shift: int,
    ranks: tuple[int, int, int],
    places: tuple[int, int, int],
    of_taps: nn.Module,
    taps: PackedTensor,
    taps_bias: Tensor | None,
    act: nn.Module | None,
    *modules: Any,
    softplus: bool,
) -> Tensor:
    """A convolution along a sequence, SiLU, and ``scan_core`` of its one direction: (B, L, D).

    Args:
        x: (B, L, D), any strides.
        reverse: the sequence runs from the last row to the first.
        shift: step t reads steps t + shift, t + shift + 1, .., where there are any.
        of_taps: the quantizer of x; taps: (D, 1, T).
        act: the SiLU, where that is a module.
        modules: those of ``scan_core``.
    """
    count = taps.shape[2]
    offsets = [-(shift + i) if reverse else shift + i for i in range(count)]
    reach = max(map(abs, offsets))

    def spread() -> Tensor:
        """Taps of a convolution that looks as far to both sides, zeros where there are none."""
        values = taps().float().reshape(-1, count).T
        wide = values.new_zeros(2 * reach + 1, values.shape[1])
        wide[[reach + o for o in offsets]] = values
        return engine.by_lanes(wide)

    image = x.unsqueeze(1)
    engine = engine_of(x.device)
    grid = _grid(of_taps, lambda: cpu.moments(image), x[0].numel())
    bias = _bias(x.new_zeros(x.shape[2]) if taps_bias is None else taps_bias)
    assert bias is not None
    weights = _kept(taps, ("sequence", reverse, shift), spread)
    silu = "silu" if act is None or not hooks_of(act) else None
    y: Tensor = engine.depthwise(image, grid, weights, bias, (1, 2 * reach + 1), (1, 1), silu)
    y = y.squeeze(1)
    if act is not None and silu is None:
        y = act(y)
    return scan_core(y, _order(x.shape[1], reverse, x.device), ranks, places, *modules, softplus=softplus)


@lru_cache(maxsize=64)
def _order(length: int, reverse: bool, device: torch.device) -> Tensor:
    order = torch.arange(length, dtype=torch.int32, device=device)[None]
    return order.flip(1).contiguous() if reverse else order
