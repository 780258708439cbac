"""What transforms leave in the graph: their functions, their tensors, and the writing of both into every new trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.adapter import ScanRole
from ssmquant.errors import TraceError
from ssmquant.graph.trace import Trace
from ssmquant.graph.transforms.candidates import Applied, Place, Skipped, View
from ssmquant.graph.transforms.find import find_transforms
from ssmquant.graph.transforms.turns import LowRank
from ssmquant.ops.hadamard import hadamard

__all__ = ["MARKER", "Transforms", "minus", "read_entries", "smooth_silu", "times"]

_OWNER = "_ssmquant.transforms"


def smooth_silu(x: Tensor, factor: Tensor) -> Tensor:
    """``silu(factor * x) / factor``: MambaQuant's S-SiLU (arXiv 2501.13484, section 4.3); ``factor`` broadcasts."""
    return x * torch.sigmoid(x * factor.to(x.dtype))


def times(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` by factors that broadcast to it."""
    return x * factor.to(x.dtype)


def minus(x: Tensor, mean: Tensor) -> Tensor:
    """``x`` less means that broadcast to it."""
    return x - mean.to(x.dtype)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"smooth_silu": smooth_silu, "times": times, "minus": minus}


MARKER = "chosen"
"""The buffer that says which transforms a model went through. Places have a colon in their names."""


def read_entries(entries: Any) -> tuple[bool, list[Applied], list[Skipped]]:
    """Whether transforms are chosen, which, and what does not apply: of a file or a checkpoint, checked.

    Raises:
        ValueError: malformed.
    """
    try:
        settled, applied, skipped = (entries[k] for k in ("settled", "applied", "skipped"))
        folded = [Applied(k, s, how, mark, tuple(names)) for k, s, how, mark, names in applied]
        reasons = [Skipped(*e) for e in skipped]
        rows = [*((a.kind, a.site, a.how, a.mark, *a.touched) for a in folded)]
        rows += [(s.kind, s.site, s.reason) for s in reasons]
        words = all(isinstance(word, str) for row in rows for word in row)
        alone = len({a.key for a in folded}) == len(folded)
    except (TypeError, KeyError, IndexError, ValueError) as e:
        raise ValueError(f"malformed transforms ({type(e).__name__})") from None
    if not words or not alone or not isinstance(settled, bool) or (folded and not settled):
        raise ValueError("malformed transforms")
    return settled, folded, reasons


class Transforms(nn.Module):
    """The transforms that a prepared or deployed model went through.

    Buffers are the tensors of their places in the graph, named ``<kind>:<site>#<number>``; of a Hadamard transform an
    empty one. Where the configuration has transforms, one more (uint8, JSON) says what was done, free ones included: a
    checkpoint without it is none of such a model. ``folded`` and ``skipped``: the same as Python values. ``settled``:
    they are chosen, and a further calibration leaves them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folded: list[Applied] = []
        self.skipped: list[Skipped] = []
        self.settled = False

    def put(self, tensors: Mapping[str, Tensor], like: Tensor | None = None) -> None:
        """Replaces the tensors of the places by copies, in the dtype and on the device of ``like``."""
        for name in self.places:
            del self._buffers[name]
        # Where calibration runs in inference mode, training has to be able to save the copies for the backward pass.
        with torch.inference_mode(False):
            for name, t in tensors.items():
                value = t.detach() if like is None else t.detach().to(like.device, like.dtype)
                self.register_buffer(name, value.clone())

    def settle(
        self,
        tensors: Mapping[str, Tensor],
        folded: list[Applied],
        skipped: list[Skipped],
        like: Tensor | None,
        *,
        settled: bool = True,
    ) -> None:
        """Notes what was done; ``like``: a parameter of the model, for dtype and device of the tensors."""
        self.put(tensors, like)
        self.folded, self.skipped, self.settled = folded, skipped, settled
        text = json.dumps(self.entries(), separators=(",", ":")).encode()
        with torch.inference_mode(False):
            device = None if like is None else like.device
            marker = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
            self.register_buffer(MARKER, marker)

    def forget(self, like: Tensor | None = None) -> None:
        """No transforms any more, or not yet."""
        self.settle({}, [], [], like, settled=False)

    def entries(self) -> dict[str, Any]:
        """What :func:`read_entries` reads, for JSON."""
        return {
            "settled": self.settled,
            "applied": [[a.kind, a.site, a.how, a.mark, list(a.touched)] for a in self.folded],
            "skipped": [[s.kind, s.site, s.reason] for s in self.skipped],
        }

    @property
    def applied(self) -> list[tuple[str, str, str]]:
        """Kind, site and how of each, for ``summary``."""
        return [(a.kind, a.site, a.how) for a in self.folded]

    @property
    def touched(self) -> set[str]:
        """Names of the parameters that were changed."""
        return {name for a in self.folded for name in a.touched}

    @property
    def places(self) -> dict[str, Tensor]:
        """The tensors of the places that are in the graph, by name."""
        return {k: t for k, t in self._buffers.items() if k != MARKER and t is not None}

    def _device(self) -> torch.device | None:
        marker = self._buffers.get(MARKER)
        return None if marker is None else marker.device

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def differ(self, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint (of the whole prepared model) says that it was transformed in another way."""
        marker = state.get(f"{_OWNER}.{MARKER}")
        return marker is not None and not self._alike(marker)

    def _alike(self, marker: Any) -> bool:
        """Whether it is of a model of the same graphs; factors, and how they are listed, are its own."""
        settled, folded, _ = _read_marker(marker)
        return settled == self.settled and {(a.key, a.mark) for a in folded} == {
            (a.key, a.mark) for a in self.folded
        }

    def adopt(self, state: Mapping[str, Any], like: Tensor | None) -> None:
        """Takes over the transforms of a checkpoint; their places get its tensors.

        Raises:
            RuntimeError: malformed, or the checkpoint lacks weights that its transforms or this model's changed.
        """
        settled, folded, skipped = _read_marker(state[f"{_OWNER}.{MARKER}"])
        lacking = sorted(self.touched.union(*(a.touched for a in folded)) - state.keys())
        if lacking:
            raise RuntimeError(
                "the checkpoint's model went through other transforms than this one, and it lacks weights that they "
                f"changed: {', '.join(lacking[:3])}{' ...' * (len(lacking) > 3)}"
            )
        keys = {a.key for a in folded}
        names = {k: k[len(_OWNER) + 1 :] for k in state if k.startswith(f"{_OWNER}.")}
        tensors = {n: state[k] for k, n in names.items() if n.rpartition("#")[0] in keys}
        if not all(isinstance(t, Tensor) for t in tensors.values()):
            raise RuntimeError("the checkpoint's transforms are malformed")
        self.settle(tensors, folded, skipped, like, settled=settled)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = prefix + MARKER
        if name in state_dict:
            if not self._alike(state_dict[name]):
                # Reached where the model could not adopt them: it is converted, or a part of a module that is loaded.
                error_msgs.append(
                    f"'{name}': the checkpoint's model went through other transforms than this one"
                )
                return
            if MARKER in self._buffers:
                _, self.folded, self.skipped = _read_marker(state_dict[name])
                self.register_buffer(MARKER, state_dict[name].detach().clone().to(self._device()))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.settled:  # nothing to lose
            for keys in (missing_keys, unexpected_keys):
                keys[:] = [k for k in keys if k != name]

    # ---- graphs ------------------------------------------------------------------------------------------------------
    def write(self, model: nn.Module, trace: Trace, scans: tuple[ScanRole, ...] = ()) -> None:
        """Changes the graph of a fresh trace (and of its further runs), in place.

        Raises:
            TraceError: the graph cannot have a transform that the weights went through, or has other places for it.
        """
        if not self.folded:
            return
        places = self._found(model, trace, scans)
        nodes = list(trace.graph.nodes)
        for graph in [trace.graph, *([trace.other.graph] if trace.other is not None else [])]:
            same = nodes if graph is trace.graph else list(graph.nodes)
            _write_all(graph, places, dict(zip(nodes, same, strict=True)))
        if trace.sample is None:
            return
        # Another graph, of another batch size: its nodes are told apart by what they do, so it changes alike.
        sample = replace(trace, traced=trace.sample, other=None, sample=None)
        try:
            there = self._found(model, sample, scans)
        except TraceError:
            trace.sample = None
            return
        _write_all(sample.graph, there, {n: n for n in sample.graph.nodes})

    def _found(self, model: nn.Module, trace: Trace, scans: tuple[ScanRole, ...]) -> list[tuple[str, Place]]:
        """The places of all transforms in a graph."""
        found, skipped = find_transforms(View(model, trace, scans), {a.kind for a in self.folded})
        by_key = {c.key: c for c in found}
        out: list[tuple[str, Place]] = []
        expected: dict[str, tuple[int, ...]] = {}
        for a in self.folded:
            c = by_key.get(a.key)
            if c is not None and a.mark == c.mark():
                out += [(f"{c.key}#{k}", place) for k, place in enumerate(c.places)]
                expected |= c.tensor_shapes()
            elif not isinstance(c, LowRank) or a.mark != c.mark(placed=False):
                why = [s.reason for s in skipped if (s.kind, s.site) == (a.kind, a.site)]
                why += ["" if c is None else "it has other weights or values here"]
                raise TraceError(
                    f"calibrate changed weights by the transform '{a.kind}' of '{a.site}', which is not to be found in "
                    f"the graph of this call{': ' * bool(why[0])}{why[0]}. Have a call of this kind among the batches "
                    "of calibrate, which then leaves it out, or leave it out of QConfig(transforms=...)"
                )
        if expected != (own := {k: tuple(t.shape) for k, t in self.places.items()}):
            odd = sorted(k for k in expected.keys() | own.keys() if expected.get(k) != own.get(k))
            raise TraceError(f"tensors of transforms do not fit the graph: {', '.join(odd[:3])}")
        return out


def _read_marker(marker: Any) -> tuple[bool, list[Applied], list[Skipped]]:
    try:
        return read_entries(json.loads(bytes(marker.cpu().tolist())))
    except (AttributeError, TypeError, ValueError, RecursionError) as e:
        raise RuntimeError(f"the checkpoint's transforms are malformed ({type(e).__name__})") from None


def _write_all(graph: fx.Graph, places: list[tuple[str, Place]], twin: dict[fx.Node, fx.Node]) -> None:
    for name, place in places:
        _write(graph, name, place, twin[place.node], None if place.operand is None else twin[place.operand])


def _write(graph: fx.Graph, name: str, place: Place, node: fx.Node, operand: fx.Node | None) -> None:
    value = operand if operand is not None else node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    with graph.inserting_before(node):
        if place.function == "hadamard":
            axis = next(d for d, s in enumerate(place.labels.shape) if s > 1)
            function: Callable[..., Tensor] = hadamard
            args: tuple[Any, ...] = (value, axis)
        else:
            function = _FUNCTIONS[place.function]
            args = (value, graph.get_attr(f"{_OWNER}.{name}"))
        if operand is None:  # in place: guards and sizes know the node
            node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}
            return
        new = graph.call_function(function, args)
    new.meta.update({k: node.meta[k] for k in ("module", "where", "region") if k in node.meta})
    new.meta["val"] = operand.meta["val"]
    node.replace_input_with(operand, new)
