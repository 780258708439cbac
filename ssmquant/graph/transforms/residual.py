"""Rotation of the residual stream (R1): free where norms read it, and projections write to it.

RMS norms without weights commute with rotations, so their weights go to the columns of their readers first. Then all
that writes to the stream (embeddings, tokens, every out_proj) is rotated, and all that reads it is rotated back.
Nothing is left to do at run time, at the ends neither.

Layer norms subtract the mean over channels, too. They commute with the rotations that leave the vector of ones where it
is: ``mean(Q x) == mean(x)`` if ``Q^T 1 == 1``. SliceGPT takes the mean out of all that writes to a stream, so that RMS
norms can take the place of layer norms and any rotation will do. With these rotations the norms stay, and with them
their kernels, and nothing is lost: a centred value has no share along the ones that a rotation could spread. A norm's
weight g goes to the columns of its readers; its bias b, which some readers have no bias to take, becomes ``Q (b / g)``.

Several pieces of a stream may be read side by side, as by the norm of a patch merging: each is rotated by itself.

Source: MambaQuant (arXiv 2501.13484), R1; SliceGPT (arXiv 2401.15024) for the invariance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.transforms.candidates import Candidate, Norm, Skipped, View
from ssmquant.graph.transforms.flow import shape
from ssmquant.graph.transforms.projections import Projection, Unsuitable
from ssmquant.graph.transforms.stream import Stream

__all__ = ["Residual", "residuals"]

_QUOTED = re.compile("'[^']*'")


@dataclass
class Residual(Candidate):
    """One stream of ``channels``: what writes to it, and the norms between it and its readers.

    ``writers``: projections; ``parameters``: names, and the axis that holds the channels; ``readers``: projections with
    the norm in front of each (None where there is none). A reader of several pieces of the stream side by side has so
    many times the channels.
    """

    channels: int = field(kw_only=True)
    writers: list[Projection] = field(kw_only=True)
    parameters: list[tuple[str, int]] = field(kw_only=True)
    readers: list[tuple[Projection, Norm | None]] = field(kw_only=True)

    @property
    def identity(self) -> tuple[Any, ...]:
        readers = [(p.identity, "" if n is None else n.weight) for p, n in self.readers]
        ends = [(p.identity, "writes") for p in self.writers] + readers
        own = self.channels, set(self.parameters), tuple(sorted(ends, key=lambda e: (e[0][0], e[1])))
        layers = {(n.weight, n.bias or "") for n in self.norms if not n.rms}
        return (*own, layers) if layers else own

    @property
    def norms(self) -> list[Norm]:
        """Those between the stream and its readers, each once, in the order of their names."""
        return sorted(
            {n.weight: n for _, n in self.readers if n is not None}.values(), key=lambda n: n.weight
        )

    @property
    def centred(self) -> bool:
        """Whether layer norms read it, so that rotations have to leave the vector of ones where it is."""
        return any(not n.rms for n in self.norms)

    @property
    def touched(self) -> set[str]:
        names = {p.parameter for p, _ in self.readers} | {n.weight for n in self.norms}
        names |= {n.bias for n in self.norms if n.bias is not None}
        return names.union({name for name, _ in self.parameters}, *(p.touched for p in self.writers))

    @torch.no_grad()
    def offset(self, model: nn.Module, norm: Norm) -> Tensor:
        """A norm's bias over its weight, (n,) float64: not finite where the weight is 0 and the bias is not."""
        weight = model.get_parameter(norm.weight).detach().double().cpu()
        if norm.bias is None:
            return torch.zeros_like(weight)
        bias = model.get_parameter(norm.bias).detach().double().cpu()
        return torch.where(bias == 0, 0.0, bias / weight)

    @torch.no_grad()
    def fold(self, model: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        """Changes the weights so that the stream x becomes ``matrix @ x``; ``matrix`` (channels, channels), orthogonal.

        Raises:
            ValueError: it is not orthogonal, or moves the vector of ones although layer norms read the stream; or a
                norm's bias cannot be kept, see :meth:`offset`.
        """
        matrix = matrix.detach().cpu().double().contiguous()  # kron wants it so
        one = torch.eye(self.channels, dtype=torch.float64)
        if matrix.shape != one.shape or not torch.allclose(matrix @ matrix.T, one, rtol=0, atol=1e-9):
            raise ValueError(f"{self.key}: expected an orthogonal matrix {tuple(one.shape)}")
        if self.centred and not torch.allclose(matrix.sum(1), one[0].new_ones(()), rtol=0, atol=1e-9):
            raise ValueError(
                f"{self.key}: expected a rotation that keeps the vector of ones, for layer norms"
            )
        offsets = {n.weight: self.offset(model, n) for n in self.norms}
        if not all(bool(t.isfinite().all()) for t in offsets.values()):
            raise ValueError(f"{self.key}: the weight of a norm is 0 where its bias is not")
        for p, norm in self.readers:
            if norm is not None:
                p.scale_inputs(model, model.get_parameter(norm.weight).detach().double().cpu())
        for norm in self.norms:
            model.get_parameter(norm.weight).fill_(1.0)
            if norm.bias is not None:
                pieces = offsets[norm.weight].reshape(-1, self.channels)
                model.get_parameter(norm.bias).copy_((pieces @ matrix.T).reshape(-1))
        for p, _ in self.readers:
            pieces = torch.eye(p.groups[2] // self.channels, dtype=torch.float64)
            p.turn_inputs(model, torch.kron(pieces, matrix))
        rows = torch.arange(self.channels)
        for p in self.writers:
            p.turn_outputs(model, matrix, rows)
        for name, axis in self.parameters:
            t = model.get_parameter(name)
            moved = t.detach().cpu().double().movedim(axis, -1) @ matrix.T
            t.copy_(moved.movedim(-1, axis))
        return {}


def residuals(view: View) -> tuple[list[Residual], list[Skipped]]:
    """Streams that norms read; of others the reason."""
    found: list[Residual] = []
    skipped: list[Skipped] = []
    known: set[fx.Node] = set()
    said: dict[str, tuple[Skipped, int]] = {}  # one line for all reasons that differ in names alone
    for node in view.graph.nodes:
        norm = view.norm(node)
        size = None if norm is None else shape(norm.input)
        if norm is None or size is None or norm.input in known or norm.channels < 2:
            continue
        try:
            stream = Stream(view, norm.input, len(size) - 1, norm.channels)
        except Unsuitable as e:
            first = Skipped("residual_rotation", norm.name, str(e))
            alike = _QUOTED.sub("", str(e))
            said[alike] = (said[alike][0], said[alike][1] + 1) if alike in said else (first, 0)
            continue
        known |= stream.seen
        if not stream.readers:
            skipped.append(Skipped("residual_rotation", norm.name, "no projection reads it"))
            continue
        c = Residual(
            "residual_rotation",
            norm.name,
            channels=norm.channels,
            writers=list(stream.writers.values()),
            parameters=list(stream.parameters.items()),
            readers=list(stream.readers.values()),
        )
        for n in c.norms:
            dims = len(shape(n.node) or ())
            c.moments.append((n.node, torch.arange(n.channels).reshape((1,) * (dims - 1) + (-1,))))
        found.append(c)
    for first, more in said.values():
        also = f"; likewise at {more} more norm{'s' * (more > 1)}" if more else ""
        skipped.append(Skipped(first.kind, first.site, first.reason + also))
    return found, skipped
