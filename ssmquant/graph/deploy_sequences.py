"""Scans of sequences in a deployed graph, as in Mamba's own block and in Vim's, which has two directions.

Found by structure in the user's own graph:

    rows -> causal convolution -> SiLU -> scan, and -> projection -> dt, B, C -> scan

is one call that reads rows in the order in which they lie and writes its result so, whatever the code turns round
before and after it. Gates of both directions by the same values become one, behind their sum. Calls that read the same
rows, as those of both directions, run at once when a GPU's are captured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.deploy_scans import KERNEL, SCAN, Deployer, NoMatch, traced_shape
from ssmquant.graph.forks import Fork
from ssmquant.graph.fuse import between, is_quantizer
from ssmquant.graph.moves import evaluate, signature, sizes_of, traced_size
from ssmquant.graph.orders import Unfit, count
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed

__all__ = ["deploy_sequences", "fork_sequences"]

_MOST_SHAPES = 64


class _Rows:
    """Where sequences come from: rows, (B, L, E), or columns of all samples, (E, B * L)."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        shape = traced_shape(node)
        self.columns = len(shape) == 2
        self.width = shape[0] if self.columns else shape[-1]
        if len(shape) not in (2, 3):
            raise NoMatch

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        return (self.width, batch * length) if self.columns else (batch, length, self.width)

    def sequence(self, first: int, channels: int, reverse: bool, batch: int, length: int) -> Tensor:
        """The numbers of some columns' elements, as (B, channels, L)."""
        elements = count(self.shape(batch, length))
        if self.columns:
            found = elements[first : first + channels].view(channels, batch, length).transpose(0, 1)
        else:
            found = elements[:, :, first : first + channels].transpose(1, 2)
        return found.flip(-1) if reverse else found

    def place(self, found: Tensor) -> tuple[int, bool]:
        """Which columns (B, channels, L) seems to be, and whether it is turned round."""
        reverse = bool(found[0, 0, 0] > found[0, 0, -1])
        element = int(found[0, 0, -1 if reverse else 0])
        return element // (found.shape[0] * found.shape[2]) if self.columns else element, reverse


class _Chain:
    """Nodes that move elements from ``source`` to ``target``, where they are as ``wanted`` says.

    ``shape`` and ``wanted`` (of the elements' numbers; its shape may be another one) get batch and length.
    """

    def __init__(
        self,
        source: fx.Node,
        target: fx.Node,
        shape: Callable[[int, int], tuple[int, ...]],
        wanted: Callable[[int, int], Tensor],
    ) -> None:
        self.source, self.target, self.shape, self.wanted = source, target, shape, wanted
        self.nodes = between(source, target)
        self.sizes = sizes_of(self.nodes, source)

    def moved(self, batch: int, length: int, size: Any) -> Tensor | None:
        """The numbers of the elements at the target; None if it has other things."""
        try:
            elements = count(self.shape(batch, length))
            terms = evaluate(self.nodes, self.source, elements, size, [self.target])[self.target]
        except (KeyError, RuntimeError):
            return None
        return terms[0] if len(terms) == 1 and isinstance(terms[0], Tensor) else None

    def fits(self, batch: int, length: int, size: Any) -> bool:
        found, wanted = self.moved(batch, length, size), self.wanted(batch, length)
        return (
            found is not None
            and found.numel() == wanted.numel()
            and torch.equal(found.reshape(-1), wanted.reshape(-1))
        )


@dataclass(eq=False)
class _Sequence:
    """Called in the graph with rows, sizes and modules: (B, L, E) -> (B, L, D)."""

    __name__ = "sequence_core"

    first: int  # of the rows' columns, where those of the sequence begin
    channels: int
    reverse: bool
    shift: int  # step t of the convolution reads t + shift, t + shift + 1, ..
    ranks: tuple[int, int, int]
    places: tuple[int, int, int]
    softplus: bool
    chains: list[_Chain]
    known: dict[Any, bool] = field(default_factory=dict)
    fork: Fork = field(default_factory=lambda: Fork(1))
    lane: int = 0  # of the fork

    def signature(self) -> Any:
        """Equal for objects that may share what they know."""
        facts = self.first, self.channels, self.reverse, self.shift, self.ranks, self.places
        return tuple(
            (signature(c.source, c.nodes, [c.target]), traced_shape(c.source)) for c in self.chains
        ), facts

    def fits(self, shape: tuple[int, ...], sizes: tuple[tuple[int, ...], ...]) -> bool:
        return all(
            chain.fits(shape[0], shape[1], dict(zip(chain.sizes, given, strict=True)).__getitem__)
            for chain, given in zip(self.chains, sizes, strict=True)
        )

    def __call__(self, x: Tensor, sizes: tuple[tuple[int, ...], ...], modules: tuple[Any, ...]) -> Tensor:
        if x.dtype != torch.float32 or not x.numel():
            raise Unfit
        key = (x.shape, sizes)
        if key not in self.known:
            if len(self.known) >= _MOST_SHAPES:
                self.known.clear()
            self.known[key] = self.fits(tuple(x.shape), sizes)
        if not self.known[key]:
            raise Unfit
        rows = x[..., self.first : self.first + self.channels]
        with self.fork.lane(self.lane, x.device):
            return deployed.sequence_core(
                rows, self.reverse, self.shift, self.ranks, self.places, *modules, softplus=self.softplus
            )


@dataclass(eq=False)
class _Result:
    """What a scan's output is replaced by."""

    node: fx.Node  # of the old graph: (B, D, L) in the order of the rows
    rows: fx.Node  # of the new one: (B, L, D)
    read: fx.Node  # of the old one: where the sequence came from
    source: fx.Node  # of the new one: these rows, (B, L, E)
    gate: int | None  # where in them the gate's columns begin


class _Matcher:
    """What one scan is made of.

    ``turned``: rows, of the new graph, of columns that scans before it have read too.
    """

    def __init__(self, d: Deployer, scan: fx.Node, turned: dict[fx.Node, fx.Node]) -> None:
        self.d, self.scan, self.turned = d, scan, turned
        self.chains: list[_Chain] = []

    def chain(self, source: fx.Node, target: Any, shape: Any, wanted: Any = None) -> Tensor:
        """Adds a chain; the numbers of the elements at its target, at the sizes of the trace.

        ``wanted`` gets these first, then batch and length. Without one, elements stay where they are.
        """
        if not isinstance(target, fx.Node):
            raise NoMatch
        chain = _Chain(source, target, shape, lambda batch, length: count(shape(batch, length)))
        found = chain.moved(self.batch, self.length, traced_size)
        if found is None or not found.numel():
            raise NoMatch
        if wanted is not None:
            first = int(found.flatten()[0])
            chain.wanted = lambda batch, length: wanted(first, batch, length)
        steady = not any(
            n.meta.get("mutates") or n.meta.get("storage") in self.d.written for n in (source, *chain.nodes)
        )
        if not steady or not chain.fits(self.batch, self.length, traced_size):
            raise NoMatch
        self.chains.append(chain)
        return found

    def columns(self, source: fx.Node, target: Any, columns: int, turn: Any = None) -> int:
        """Where in rows (B, L, E) the columns begin that are at ``target``.

        ``turn`` makes its order of (B, columns, L).
        """
        width = traced_shape(source)[-1]
        flat = len(traced_shape(source)) == 2

        def shape(batch: int, length: int) -> tuple[int, ...]:
            return (batch * length, width) if flat else (batch, length, width)

        def wanted(first: int, batch: int, length: int) -> Tensor:
            made = count((batch, length, width))[:, :, first : first + columns].transpose(1, 2)
            return made if turn is None else turn(made)

        return int(self.chain(source, target, shape, wanted).flatten()[0])

    def match(self) -> _Result:
        d = self.d
        arguments: tuple[Any, ...] = self.scan.args
        if len(arguments) != 9:
            raise NoMatch
        u, delta, a, b, c, skip, z, bias, softplus = arguments
        outputs = [n for n in self.scan.users if n.users]
        if any(self.scan.kwargs.values()) or not isinstance(softplus, bool) or len(outputs) != 1:
            raise NoMatch
        of_u = d.quantizer(u)
        self.batch, channels, self.length = traced_shape(of_u)
        states = traced_shape(a)[-1] if isinstance(a, fx.Node) else a.shape[-1]

        silu = d.source(of_u.args[0])
        if not self._is_silu(silu):
            raise NoMatch
        conv = d.source(silu.args[0])
        options = _conv_options(conv)
        of_conv, weight = d.quantizer(options["input"]), d.weight(options["weight"], 1)
        taps = traced_shape(weight)[-1]
        rows = _Rows(d.source(of_conv.args[0]))
        if traced_shape(weight) != (channels, 1, taps) or options["groups"] != channels:
            raise NoMatch
        first, reverse = self._sequence(rows, of_conv.args[0], channels)

        def image(batch: int, length: int) -> tuple[int, ...]:
            return batch, channels, length

        def convolved(batch: int, length: int) -> tuple[int, ...]:
            return batch, channels, length + 2 * options["padding"] - taps + 1

        def cut(begin: int, batch: int, length: int) -> Tensor:
            return count(convolved(batch, length))[..., begin : begin + length]

        shift = int(self.chain(conv, silu.args[0], convolved, cut).flatten()[0]) - options["padding"]
        if 2 * max(-shift, shift + taps - 1, 0) > d.engine.MOST_SPAN:
            raise NoMatch
        self.chain(silu, of_u.args[0], image)

        of_delta = d.quantizer(delta) if is_quantizer(delta) else None
        steps_at = delta if of_delta is None else of_delta.args[0]
        steps = d.source(steps_at)
        of_rank, dt_weight = self._steps(steps)
        ranks = traced_shape(dt_weight)[-1]
        if traced_shape(dt_weight) != (channels, ranks):
            raise NoMatch
        of_b, of_c = d.quantizer(b), d.quantizer(c)
        made = d.source(of_rank.args[0])
        same = all(d.source(q.args[0]) is made for q in (of_b, of_c))
        if not same or made.target is not F.linear or _argument(made, 2, "bias") is not None:
            raise NoMatch
        of_x, x_weight = d.quantizer(made.args[0], exact=True), d.weight(made.args[1], 1)
        if d.source(of_x.args[0]) is not silu or traced_shape(x_weight)[1:] != (channels,):
            raise NoMatch
        self.chain(silu, of_x.args[0], image, lambda _, *size: count(image(*size)).transpose(1, 2))
        places = (
            self.columns(made, of_rank.args[0], ranks, self._turn_rank(steps, of_rank)),
            self.columns(made, of_b.args[0], states),
            self.columns(made, of_c.args[0], states),
        )
        self._steps_at(steps, steps_at, channels)
        if states > d.engine.MOST_STATES or ranks > d.engine.MOST_RANK:
            raise NoMatch

        gate = None if z is None else self._gate(rows, z, channels, reverse)
        node = self._end(outputs[0], channels, reverse)
        core = _Sequence(
            first,
            channels,
            reverse,
            shift,
            (traced_shape(x_weight)[0], ranks, states),
            places,
            softplus,
            self.chains,
        )
        core.known = d.known.setdefault(core.signature(), core.known)
        there = d.copy[node]
        with d.graph.inserting_before(there):
            act = d.owner(silu) if silu.op == "call_module" else None
            modules = (
                of_conv, weight, options["bias"], act, of_x, x_weight, of_rank, dt_weight, of_u, of_delta, of_b, of_c,
                a, skip, bias,
            )  # fmt: skip
            sizes = tuple(tuple(d.copy[n] for n in chain.sizes) for chain in self.chains)
            owners = tuple(d.owner(m) if m is not act else m for m in modules)
            source = self.turned.get(rows.node, d.copy[rows.node])
            if rows.columns and rows.node not in self.turned:
                batch = d.graph.call_method("size", (d.owner(of_conv.args[0]), 0))
                turned = d.graph.call_method("t", (source,))
                source = d.graph.call_method("reshape", (turned, batch, -1, rows.width))
                self.turned[rows.node] = source
            source.meta["shape"] = (self.batch, self.length, rows.width)
            new = d.graph.call_function(core, (source, sizes, owners))
        new.meta["shape"] = (self.batch, self.length, channels)
        sites = (n.meta["site"] for n in (self.scan, conv, made, steps) if "site" in n.meta)
        new.meta["kernels"] = dict.fromkeys(sites, KERNEL)
        d.dead |= {self.scan, outputs[0], steps, made, silu, conv, node}
        d.dead |= {n for n in (a, skip, bias) if isinstance(n, fx.Node) and n.op == "call_module"}
        d.changed = True
        return _Result(node, new, rows.node, source, gate)

    def _is_silu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.d.model.get_submodule(str(node.target))) is nn.SiLU
        return node.target is F.silu

    def _sequence(self, rows: _Rows, target: Any, channels: int) -> tuple[int, bool]:
        """Which columns of the rows the sequence has, and whether it is turned round."""
        chain = _Chain(rows.node, target, rows.shape, lambda *_: torch.empty(0))
        found = chain.moved(self.batch, self.length, traced_size)
        if found is None or tuple(found.shape) != (self.batch, channels, self.length):
            raise NoMatch
        first, reverse = rows.place(found)
        self.chain(
            rows.node, target, rows.shape, lambda _, *size: rows.sequence(first, channels, reverse, *size)
        )
        return first, reverse

    def _gate(self, rows: _Rows, z: Any, channels: int, reverse: bool) -> int:
        if self.d.source(z) is not rows.node:
            raise NoMatch
        first, turned = self._sequence(rows, z, channels)
        if turned != reverse and self.length > 1:
            raise NoMatch
        return first

    def _steps(self, steps: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The quantizer of the low rank, and the weight that makes step sizes of it."""
        if steps.target is F.linear and _argument(steps, 2, "bias") is None:
            x, weight = steps.args[:2]
        elif op_name(steps) in ("matmul", "mm") and len(steps.args) == 2:
            weight, x = steps.args
        else:
            raise NoMatch
        return self.d.quantizer(x, exact=True), self.d.weight(weight, 1)

    def _turn_rank(self, steps: fx.Node, of_rank: fx.Node) -> Callable[[Tensor], Tensor] | None:
        """(B, R, L) as the projection of the step sizes reads it."""
        if steps.target is F.linear:
            return lambda t: t.transpose(1, 2)
        return None if len(traced_shape(of_rank)) == 3 else lambda t: t.transpose(0, 1)

    def _steps_at(self, steps: fx.Node, target: Any, channels: int) -> None:
        """Step sizes become (B, D, L)."""
        dims = len(traced_shape(steps))

        def shape(batch: int, length: int) -> tuple[int, ...]:
            if steps.target is F.linear:
                return (batch * length, channels) if dims == 2 else (batch, length, channels)
            return (channels, batch * length) if dims == 2 else (batch, channels, length)

        def wanted(_: int, batch: int, length: int) -> Tensor:
            made = count(shape(batch, length))
            if steps.target is F.linear:
                return made.reshape(batch, length, channels).transpose(1, 2)
            return made.reshape(channels, batch, length).transpose(0, 1) if dims == 2 else made

        self.chain(steps, target, shape, wanted)

    def _end(self, y: fx.Node, channels: int, reverse: bool) -> fx.Node:
        """The node, after the scan, that has its output in the order of the rows."""
        if not reverse:
            return y
        node = next(iter(y.users))
        if len(y.users) != 1 or op_name(node) != "flip":
            raise NoMatch
        self.chain(
            y, node, lambda batch, length: (batch, channels, length),
            lambda _, batch, length: count((batch, channels, length)).flip(-1),
        )  # fmt: skip
        return node


def _argument(node: fx.Node, at: int, name: str) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def _conv_options(node: fx.Node) -> dict[str, Any]:
    """Of a convolution along a sequence with stride 1; numbers are numbers."""
    if node.target is not F.conv1d:
        raise NoMatch
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, (None, None, None, 1, 0, 1, 1), strict=True))
    given |= {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in ("stride", "padding", "dilation"):
        value = given[name]
        given[name] = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    if given["stride"] != 1 or given["dilation"] != 1 or not isinstance(given["padding"], int):
        raise NoMatch
    return given


_SCALES: dict[str, Any] = {"div": operator.truediv, "truediv": operator.truediv, "mul": operator.mul}


def _dims(node: fx.Node) -> tuple[int, ...]:
    """The axes that a node names, one by one or in a list."""
    given = node.args[1] if len(node.args) == 2 else node.args[1:]
    dims = tuple(given) if isinstance(given, (list, tuple)) else ()
    return dims if all(isinstance(d, int) for d in dims) else ()


def _is_scaled(node: fx.Node, value: fx.Node) -> bool:
    return (
        len(node.args) == 2
        and node.args[0] is value
        and isinstance(node.args[1], (int, float))
        and not node.kwargs
    )


class _Ends:
    """Puts results where scans' outputs were, with one gate behind the sum of those that have the same."""

    def __init__(self, d: Deployer) -> None:
        self.d = d
        self.found: dict[fx.Node, _Result] = {}

    def place(self) -> None:
        done: set[fx.Node] = set()
        for node, result in self.found.items():
            if node not in done:
                done |= self._sum(node, result) or self._alone(node, result)

    def _alone(self, node: fx.Node, result: _Result) -> set[fx.Node]:
        with self.d.graph.inserting_before(self.d.copy[node]):
            self._replace(node, result.rows, result)
        return {node}

    def _sum(self, node: fx.Node, result: _Result) -> set[fx.Node] | None:
        """Both directions and their sum, if there are two."""
        total = next(iter(node.users)) if len(node.users) == 1 else None
        if total is None or op_name(total) != "add" or total.kwargs or len(set(total.args)) != 2:
            return None
        both: list[Any] = [self.found.get(n) for n in total.args if isinstance(n, fx.Node)]
        alike = [r for r in both if r is not None and (r.read, r.gate) == (result.read, result.gate)]
        if len(alike) != 2 or any(len(r.node.users) != 1 for r in alike):
            return None
        with self.d.graph.inserting_before(self.d.copy[total]):
            rows = self.d.graph.call_function(operator.add, (alike[0].rows, alike[1].rows))
            rows.meta["shape"] = result.rows.meta["shape"]
            self._replace(total, rows, result)
        self.d.dead.add(total)
        return {r.node for r in alike}

    def _replace(self, node: fx.Node, rows: fx.Node, result: _Result) -> None:
        """``node``, (B, D, L), by rows and their gate: as far down as nothing but a factor and views come between."""
        graph, dead = self.d.graph, self.d.dead
        scales: list[tuple[Any, Any]] = []
        last, columns = node, True
        end, scaled = node, 0
        while len(last.users) == 1:
            user = next(iter(last.users))
            name = op_name(user)
            if name in _SCALES and _is_scaled(user, last):
                scales.append((_SCALES[name], user.args[1]))
            elif name == "transpose" and {d % 3 for d in _dims(user)} == {1, 2}:
                columns = not columns
            elif name == "permute" and _dims(user) == (0, 2, 1):
                columns = not columns
            elif name != "contiguous" or len(user.args) != 1:
                break
            last = user
            if not columns:
                end, scaled = last, len(scales)
        dead |= set(self._path(node, end))
        shape = result.rows.meta["shape"]
        with graph.inserting_before(self.d.copy[end]):
            for scale, number in scales[:scaled]:
                rows = graph.call_function(scale, (rows, number))
                rows.meta["shape"] = shape
            if result.gate is not None:
                at: Any = (Ellipsis, slice(result.gate, result.gate + shape[-1]))
                z = graph.call_function(operator.getitem, (result.source, at))
                silu = graph.call_function(F.silu, (z,))
                rows = graph.call_function(operator.mul, (rows, silu))
                for n in (z, silu, rows):
                    n.meta["shape"] = shape
            if end is node:
                rows = graph.call_method("transpose", (rows, 1, 2))
                rows.meta["shape"] = (shape[0], shape[2], shape[1])
        self.d.copy[end].replace_all_uses_with(rows)

    def _path(self, node: fx.Node, end: fx.Node) -> list[fx.Node]:
        path = [node]
        while path[-1] is not end:
            path.append(next(iter(path[-1].users)))
        return path


def deploy_sequences(d: Deployer) -> None:
    """Replaces the scans of sequences in ``d``'s new graph."""
    ends, turned = _Ends(d), dict[fx.Node, fx.Node]()
    for scan in d.old.nodes:
        if scan.target is SCAN and scan in d.copy and d.copy[scan].users:
            try:
                result = _Matcher(d, scan, turned).match()
            except NoMatch:
                continue
            ends.found[result.node] = result
    ends.place()


def fork_sequences(graph: fx.Graph) -> None:
    """Scans of the same rows with nothing between them but what they are given come to run at once."""
    group: list[fx.Node] = []
    for n in [*graph.nodes, graph.output_node()]:
        core: Any = n.target
        apart = any(n in call.users for call in group)
        if group and not apart and isinstance(core, _Sequence) and n.args[0] is group[0].args[0]:
            group.append(n)
            continue
        if not apart and (n.op == "get_attr" or (n.op == "call_method" and core == "size")):
            continue
        fork = Fork(len(group))
        for lane, call in enumerate(group):
            member: Any = call.target
            member.fork, member.lane = fork, lane
            if call is not group[-1]:
                group[-1].prepend(call)
        group = [n] if isinstance(core, _Sequence) else []
