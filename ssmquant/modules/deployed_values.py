"""What kernels of deployed models need of quantizers and packed tensors: grids, codes, weights in their layouts.

The modules stay what they were; what is made of them is kept as long as their tensors do not change.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ssmquant.modules.activation import ActivationQuantizer, FrozenRange
from ssmquant.modules.packed import PackedTensor
from ssmquant.ops.deployed import Codes, Grid, Norm, RowGrid, Weights, cpu, cuda
from ssmquant.ops.deployed.forms import signed_codes
from ssmquant.quantizers import DLS, Quantizer, Token

__all__ = [
    "Engine",
    "Unchanged",
    "bias_of",
    "by_row",
    "coded",
    "dense",
    "dynamic",
    "encode",
    "engine_of",
    "goes_between",
    "grid_of",
    "in_a_call",
    "inner",
    "kept",
    "made_of",
    "matrix",
    "no_moments",
    "packed_for",
    "plain",
    "row_grid",
    "static",
    "takes_weight",
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


def kept(module: nn.Module, form: Any, make: Callable[[], Any]) -> Any:
    """``make()``, or what it returned before if no tensor of the module has changed since."""
    values = getattr(_call, "values", None)
    if values is None:
        return _checked(module, form, make)
    key = module, form
    if key not in values:
        values[key] = _checked(module, form, make)
    return values[key]


def in_a_call(key: Any, make: Callable[[], Any]) -> Any:
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


def inner(module: nn.Module) -> nn.Module:
    """The quantizer of an activation's module, or what it is itself."""
    return module.quantizer if isinstance(module, ActivationQuantizer) else module


def static(module: nn.Module) -> bool:
    """Whether a quantizer's codes are integers on one grid, known beforehand: products of them are exact."""
    q = inner(module)
    if not isinstance(q, Quantizer) or q.bits is None:
        return False
    known: bool = kept(q, "static", lambda: q.static_affine() is not None)
    return known


def dynamic(module: nn.Module, engine: Engine) -> bool:
    """Whether a quantizer takes its grid from statistics that kernels know."""
    q = inner(module)
    return (
        engine.DYNAMIC
        and isinstance(q, DLS)
        and q.bits is not None
        and not q.official
        and q.stats_axis in (None, 0)
    )


def by_row(module: nn.Module, axis: int, engine: Engine) -> bool:
    """Whether a quantizer gives each row, the elements along ``axis``, a range of its own."""
    q = inner(module)
    return engine.BY_ROW and isinstance(q, Token) and q.bits is not None and q.channel_axis == axis


def goes_between(module: nn.Module, engine: Engine) -> bool:
    """Whether codes of this quantizer can go from the kernel that makes its input to the one that reads it."""
    q = inner(module)
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


def grid_of(module: nn.Module, moments: Callable[[], Tensor], count: int, copies: int = 1) -> Grid:
    """Of a quantizer; ``moments``, ``count`` and ``copies``: of the data, for one that is dynamic."""
    q = inner(module)
    if isinstance(q, DLS):
        return _dynamic_grid(q, moments(), count, copies)
    assert isinstance(q, Quantizer)
    grid: Grid = kept(q, "grid", lambda: _static_grid(q))
    return grid


def row_grid(q: Token) -> RowGrid:
    """Of a quantizer that gives each row a range of its own."""
    return RowGrid(q.clip.detach().float().contiguous(), q.qmax - q.qmin + 1, q.eps)


def encode(
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

    grid = grid_of(module, known, x.numel() // x.shape[0], copies)
    return cpu.encode(x, grid, norm=norm, by_group=by_group), grid


# ---- weights ---------------------------------------------------------------------------------------------------------


def takes_weight(module: nn.Module, outputs: int = 1) -> bool:
    """Whether kernels multiply by this weight: one scale for all, or for each entry of the first ``outputs`` axes."""
    if not isinstance(module, PackedTensor) or module.lo is not None or len(module.shape) <= outputs:
        return False
    fits = math.prod(module.shape[outputs:]) < _MOST_PRODUCTS
    return fits and all(n == 1 for n in module.scale.shape[outputs:])


def packed_for(
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

    made: Weights = kept(module, (form, *options.items()), make)
    return made


def matrix(module: PackedTensor, shape: tuple[int, ...], **options: bool) -> Weights:
    """A packed weight in another shape, (.., outputs, inputs)."""
    return packed_for(module, shape, lambda t: t.reshape(shape), **options)


def plain(value: Any) -> Any:
    """A packed tensor's values, float32 and contiguous; a tensor as such; None."""
    if isinstance(value, PackedTensor):
        return kept(value, "plain", lambda: value().float().contiguous())
    return value.float().contiguous() if isinstance(value, Tensor) else value


_made: MutableMapping[Tensor, dict[str, tuple[tuple[int, int], Tensor, Tensor]]] = WeakTensorKeyDictionary()


def made_of(tensor: Tensor, form: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(tensor)``, which ``form`` names; what was made of the same tensor before, if it has not changed."""
    if tensor.is_inference():
        return make(tensor)
    stamp, forms = (tensor.data_ptr(), tensor._version), _made.setdefault(tensor, {})
    if form not in forms or forms[form][0] != stamp:
        source = tensor.detach()  # is kept: nothing else comes to lie at its address, as after half().float()
        forms[form] = stamp, source, make(source)
    made = forms[form][2]
    values = getattr(_call, "values", None)
    if values is not None:  # captured graphs keep what their call has read
        values["made", id(tensor), form] = made
    return made


def bias_of(bias: Tensor | None) -> Tensor | None:
    """As kernels want it."""
    return None if bias is None else made_of(bias, "bias", engine_of(bias.device).by_lanes)


def no_moments() -> Tensor:
    """For ``grid_of``, of quantizers that are static."""
    raise AssertionError("this quantizer is static")


def dense(x: Tensor) -> Tensor:
    """Columns next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
