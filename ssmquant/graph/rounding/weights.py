"""Rounds the weights of a model, from the second moments of their inputs, into its own float parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from ssmquant.graph.plan import Point
from ssmquant.graph.prepared import Values
from ssmquant.graph.rewrite import WEIGHTS
from ssmquant.graph.rounding.gptq import Levels, quadratic_error, round_rows
from ssmquant.graph.rounding.inputs import Inputs
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.sites import op_name
from ssmquant.graph.transforms.calibration import from_first, has_ranks
from ssmquant.graph.transforms.flow import QUESTIONS
from ssmquant.modules.activation import over_gain
from ssmquant.quantizers import Quantizer
from ssmquant.quantizers.base import QTensor

__all__ = ["round_weights", "rounded_gains"]


def _weight_points(model: nn.Module) -> dict[str, tuple[Point, Values]]:
    """All weights' points by key, with what evaluates their graph."""
    out: dict[str, tuple[Point, Values]] = {}
    for record in runtime_of(model).records:
        values = Values(model)
        for p in record.plan.points:
            if p.what == "weight":
                out.setdefault(p.key, (p, values))
    return out


@torch.no_grad()
def rounded_gains(model: nn.Module) -> set[str]:
    """Keys of the inputs whose factors have to stay, as a weight that reads them was rounded for them before.

    It is if it is not all zero and all of its elements are levels of its quantizer, bit for bit.
    """
    out: set[str] = set()
    for point, values in _weight_points(model).values():
        quantizer = runtime_of(model).weights[point.key]
        assert isinstance(quantizer, Quantizer)
        if point.gain is not None and quantizer.ready:
            value = values.of(point)
            if bool(value.any()) and torch.equal(quantizer.encode(value).decode(), value):
                out.add(point.gain)
    return out


@torch.no_grad()
def round_weights(model: nn.Module, found: dict[str, Inputs]) -> None:
    """Rounds every weight that ``found`` tells the inputs of, and notes for all what was done (``Runtime.rounded``).

    The model's parameters become values for which their quantizers give exactly the codes that were chosen. All ranks
    of a distributed run take those of rank 0, whose inputs count. A failure leaves some rounded: the caller puts them
    back (see ``Undone``).
    """
    if not has_ranks():
        notes, _ = _round_all(model, found)
    else:
        own = _round_all(model, found) if dist.get_rank() == 0 else None
        notes, values = from_first(own)
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    runtime_of(model).rounded = notes


def _round_all(model: nn.Module, found: dict[str, Inputs]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Rounds the weights in place: what was done by key of a quantizer, the new values by name of a parameter."""
    runtime = runtime_of(model)
    notes: dict[str, str] = {}
    changed: dict[str, Tensor] = {}
    graphs = [_readers(model, record.graph) for record in runtime.records]
    for key, (point, values) in _weight_points(model).items():
        quantizer = runtime.weights[key]
        assert isinstance(quantizer, Quantizer)
        inputs = found.get(key, Inputs())
        parameter = model.get_parameter(str(point.parameter))
        reason = inputs.reason
        if reason is None and any(graph.get(id(parameter), set()) - {key} for graph in graphs):
            reason = "its parameter is read in float, or by another quantizer, elsewhere"
        if reason is None and inputs.second is None:
            reason = "no batch reached it"
        if reason is None and not quantizer.ready:
            reason = "it is all zero"
        if reason is not None:
            notes[key] = f"rounded to nearest: {reason}"
            continue
        value = values.of(point)
        encoded = quantizer.encode(value)
        if torch.equal(encoded.decode(), value):
            notes[key] = runtime.rounded.get(key, "on its levels before")
            continue
        codes, share = _codes(inputs, value, encoded)
        before = parameter.detach().clone()
        new = replace(encoded, codes=codes).decode()
        factors = None if point.gain is None else runtime.activations[point.gain].gain
        if isinstance(factors, Tensor):
            new = new * factors.reshape(-1, *[1] * (new.dim() - 2)).to(new.dtype)
        parameter.copy_(new)
        if _gives(quantizer, values.of(point), codes, encoded):
            notes[key] = f"gptq: {share:.2f} of nearest's squared error"
            changed[str(point.parameter)] = parameter.detach().cpu()
        else:
            parameter.copy_(before)
            what = f"the levels of {type(quantizer).__name__}"
            notes[key] = f"rounded to nearest: {what} follow the values, or it has trained thresholds"
    return notes, changed


def _readers(model: nn.Module, graph: fx.Graph) -> dict[int, set[str | None]]:
    """By id of a parameter, the keys of the quantizers that read it in a graph; None is anything else."""
    out: dict[int, set[str | None]] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr":
            owner, _, attr = name.rpartition(".")
            users = {u for n in node.users for u in ({n} if n.target is not over_gain else n.users)}
            keys = {_key_of(n) for n in users if op_name(n) not in QUESTIONS}
            out.setdefault(id(getattr(model.get_submodule(owner), attr, None)), set()).update(keys)
        elif node.op == "call_module" and not name.startswith("_ssmquant."):
            for p in model.get_submodule(name).parameters():
                out.setdefault(id(p), set()).add(None)
    return out


def _key_of(node: fx.Node) -> str | None:
    """The key of the weight's quantizer that a node calls."""
    called = node.op == "call_module" and str(node.target).startswith(f"{WEIGHTS}.")
    return str(node.target).removeprefix(f"{WEIGHTS}.") if called else None


def _codes(inputs: Inputs, value: Tensor, encoded: QTensor) -> tuple[Tensor, float]:
    """The codes of a weight, and their squared error as a part of nearest's."""
    projection, second = inputs.projection, inputs.second
    assert projection is not None
    assert second is not None
    groups, outputs, _ = projection.groups

    def rows(t: Tensor) -> Tensor:
        wide = t.detach().cpu().double().expand(value.shape)
        return projection.arranged(wide).reshape(groups, outputs, -1)

    weight, nearest = rows(value), rows(encoded.codes)
    levels = Levels(rows(encoded.scale), rows(encoded.shift), encoded.code_min, 2**encoded.bits)
    index = round_rows(weight, second, levels, nearest)
    errors = [float(quadratic_error(levels.value(i) - weight, second).sum()) for i in (index, nearest)]
    codes = projection.stored(index, value.shape).to(encoded.codes.device, torch.uint8)
    return codes, errors[0] / errors[1] if errors[1] > 0 else 1.0


def _gives(quantizer: Quantizer, value: Tensor, codes: Tensor, encoded: QTensor) -> bool:
    """Whether the quantizer gives these codes for the values that they stand for, on the same levels."""
    again = quantizer.encode(value)
    same = ((again.scale, encoded.scale), (again.shift, encoded.shift), (again.codes, codes))
    return all(torch.equal(a, b) for a, b in same)
