"""What the weights of a model multiply: the second moments of the inputs of projections and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.errors import CalibrationError
from ssmquant.graph.plan import einsum_letters
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.graph.sites import Site, op_name
from ssmquant.graph.transforms.calibration import Watched
from ssmquant.graph.transforms.projections import Projection, Unsuitable, projection_of
from ssmquant.modules import ActivationQuantizer

__all__ = ["Inputs", "measure_inputs"]

MOST_INPUTS = 4096
"""Inputs of one output, at most: the moments of so many take 128 MiB, and their inverse some seconds."""
_PART = 2**24
"""Elements of windows of a convolution's input that are made at once."""


@dataclass
class Inputs:
    """The inputs of a weight, over all of its uses.

    ``second``: (g, k, k) float64 on the CPU, the sum of x x^T; None where no batch came by. ``reason``: why they cannot
    be told; the others are then meaningless.
    """

    projection: Projection | None = None
    second: Tensor | None = None
    reason: str | None = None


@torch.no_grad()
def measure_inputs(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> dict[str, Inputs]:
    """Runs the quantized model and adds up the second moments of what its weights multiply.

    Weights are rounded to nearest in front of each. In MambaIR-light, calibrated twice on 8 crops, inputs of the
    quantized model instead of the float one's give 0.5 and 0.4 dB more at W3A8, and 0.4 and 0.1 dB less at W4A8.

    Args:
        model: A prepared model in evaluation mode, traced, with its ranges.
        batches: What it takes.
        forward: ``forward(model, batch)`` calls it.

    Returns:
        By the key of its quantizer, the inputs of each weight in the graphs that the batches reached.

    Raises:
        CalibrationError: NaN or inf in an input.
    """
    runtime = runtime_of(model)
    found: dict[str, Inputs] = {}
    # The records are kept, so that no other one gets the number of one that the runtime forgot.
    seen: dict[int, tuple[Record, Watched]] = {}

    def watch(record: Record) -> Record:
        if id(record) not in seen:
            seen[id(record)] = record, Watched.by(_Watcher(model, record, found), record)
        return seen[id(record)][1]

    runtime.instead = watch
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        runtime.instead = None
    return found


class _Watcher(fx.Interpreter):
    """Runs a prepared graph, quantized as it is, and measures what its projections and convolutions multiply."""

    def __init__(self, model: nn.Module, record: Record, found: dict[str, Inputs]) -> None:
        super().__init__(model, graph=record.graph)
        self.extra_traceback = False
        self.watched: dict[str, tuple[Site, Inputs]] = {}
        for point in record.plan.points:
            if point.what == "weight":
                inputs = found.setdefault(point.key, Inputs())
                try:
                    for site, _ in point.uses:
                        _join(inputs, _suitable(model, site))
                        self.watched[site.name] = site, inputs
                except Unsuitable as why:
                    inputs.reason = str(why)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        wrapper = self.fetch_attr(target) if target.startswith(f"{ACTIVATIONS}.") else None
        if isinstance(wrapper, ActivationQuantizer) and not wrapper.quantizer.ready:
            return wrapper.scaled(args[0])  # of nothing but zeros
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        site, inputs = self.watched.get(n.meta.get("site", ""), (None, None))
        if site is not None and inputs is not None and inputs.reason is None:
            _add(inputs, site, *self.fetch_args_kwargs_from_env(n))
        return out


# ---- which weights -------------------------------------------------------------------------------------------------


def _suitable(model: nn.Module, site: Site) -> Projection:
    """The form of a site.

    Raises:
        Unsuitable: its inputs cannot be told, or are too many.
    """
    projection = projection_of(model, site)
    if op_name(site.node) == "einsum" and site.weight is not None:
        weight, _, out = einsum_letters(site, site.weight)
        term, _, _ = einsum_letters(site, site.inputs[0])
        if any(c not in weight and c not in out for c in term):
            raise Unsuitable(f"'{site.name}' is an einsum that sums over other axes of its input, too")
    k = math.prod(model.get_parameter(projection.parameter).shape) // max(math.prod(projection.groups[:2]), 1)
    if k > MOST_INPUTS:
        raise Unsuitable(f"it has {k} inputs, more than {MOST_INPUTS}")
    return projection


def _join(inputs: Inputs, other: Projection) -> None:
    """Notes one more use of a weight."""
    mine = inputs.projection
    if mine is None:
        inputs.projection = other
    elif not mine.multiplies_like(other):
        names = f"'{mine.site.name}' and '{other.site.name}'"
        raise Unsuitable(f"{names} take its elements in different ways")


# ---- moments -------------------------------------------------------------------------------------------------------


def _add(inputs: Inputs, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Adds what one call of a site multiplies."""
    projection = inputs.projection
    assert projection is not None
    at = site.inputs[0].at
    x = kwargs[at] if isinstance(at, str) else args[at[0]][at[1]] if isinstance(at, tuple) else args[at]
    if not x.numel():
        return
    if not bool(x.isfinite().all()):
        raise CalibrationError(
            f"calibration met NaN or inf at '{site.name}': check the batch and the float model's own output"
        )
    with torch.autocast(x.device.type, enabled=False):
        parts = (
            _windows(projection, x.detach().float(), args, kwargs)
            if site.kind == "conv"
            else iter([_channels(projection, x.detach().float())])
        )
        for rows in parts:
            second = (rows @ rows.mT).cpu().double()
            inputs.second = second if inputs.second is None else inputs.second.add_(second)
    if inputs.second is not None and not bool(inputs.second.isfinite().all()):
        inputs.reason = "its inputs are too large for squares in float32"


def _channels(projection: Projection, x: Tensor) -> Tensor:
    """The inputs of a product, (g, k, n)."""
    groups, _, k = projection.groups
    labels = projection.inputs.to(x.device)
    x = x.expand(torch.broadcast_shapes(x.shape, labels.shape))
    channels = [d for d, s in enumerate(labels.shape) if s > 1]
    rows = x.movedim(channels, list(range(len(channels)))).reshape(labels.numel(), -1)
    ordered = torch.empty_like(rows)
    ordered[labels.reshape(-1)] = rows
    return ordered.reshape(groups, k, -1)


def _windows(
    projection: Projection, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Tensor]:
    """The inputs of a convolution, (g, k, n) with k over channels and taps, in parts."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    size = tuple(given["weight"].shape[2:])
    dims = len(size)
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    reach = [d * (s - 1) for d, s in zip(dilation, size, strict=True)]
    padding = given.get("padding", 0)
    if padding == "same":  # an odd one on the right, as torch has it
        ends = [(r // 2, r - r // 2) for r in reach]
    else:
        ends = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    x = x if x.dim() == dims + 2 else x[None]
    x = F.pad(x, [p for pair in reversed(ends) for p in pair])
    for d in range(dims):
        x = x.unfold(2 + d, reach[d] + 1, stride[d])[..., :: dilation[d]]
    order = (1, *range(dims + 2, 2 * dims + 2), 0, *range(2, dims + 2))  # channels, taps, samples, places
    at_once = max(1, _PART * x.shape[2] // max(x.numel(), 1))
    for part in x.split(at_once, 2):
        yield part.permute(order).reshape(projection.groups[0], projection.groups[2] * math.prod(size), -1)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
