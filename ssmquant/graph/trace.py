"""Runs the recorder: at which sizes, how often, and what the resulting graph may be used for.

A model is traced twice, at sizes that differ in every free dimension, and the graphs are compared: whatever differs was
baked into the graph, and the dimensions that cause it become guards. See DESIGN.md section 4 and ``tracer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ssmquant.errors import InputError, TraceError
from ssmquant.graph.calls import MODE_DEPENDENT
from ssmquant.graph.functions import FunctionError
from ssmquant.graph.patches import patched, quiet, snapshot, uncached_autocast
from ssmquant.graph.provenance import Guard, SFloat, SInt, leaves
from ssmquant.graph.tracer import Net, Recorder, Traced
from ssmquant.graph.writer import Rules

__all__ = ["SEED", "Call", "Trace", "describe_call", "is_leaf", "same_graph", "trace"]

SEED = 0
"""Of what is drawn for real while tracing: the weights of modules made in forward."""

Shapes = tuple[tuple[int, ...], ...]
_STATIC = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_LEAVES = (Tensor, *_STATIC)
_FLAT = [
    pytree.tree_flatten((None,) * n)[1] for n in range(9)
]  # specs of so many leaves: most calls, at once


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor stands among the flattened arguments."""

    index: int


@dataclass
class Call:
    """One call of the method, flattened. ``static`` and the tensors' dtypes decide which graph serves it."""

    spec: Any
    static: tuple[Any, ...]
    kinds: tuple[str, ...]  # types of the static values: 1, True and 1.0 are equal
    tensors: list[Tensor]

    @property
    def shapes(self) -> Shapes:
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace has tensors for sizes
            return tuple(tuple(map(int, t.shape)) for t in self.tensors)
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def meta(self) -> tuple[tuple[torch.dtype, torch.device], ...]:
        return tuple((t.dtype, t.device) for t in self.tensors)


def describe_call(bound: tuple[Any, ...]) -> Call:
    """Flattens bound arguments into tensors and static values.

    Raises:
        InputError: an argument is of a kind that can be neither.
    """
    flat: Sequence[Any]
    if len(bound) < len(_FLAT) and not [x for x in bound if not isinstance(x, _LEAVES)]:
        flat, spec = bound, _FLAT[len(bound)]
    else:
        flat, spec = pytree.tree_flatten(bound)
    tensors: list[Tensor] = []
    static: list[Any] = []
    kinds: list[str] = []
    for x in flat:
        if isinstance(x, Tensor):
            static.append(TensorSlot(len(tensors)))
            tensors.append(x)
        elif isinstance(x, _STATIC):
            static.append(x)
            kinds.append(type(x).__name__)
        else:
            raise InputError(
                f"an argument of type {type(x).__name__} cannot be traced: pass tensors, numbers, strings, None, or "
                "lists, tuples and dicts of them"
            )
    return Call(spec, tuple(static), tuple(kinds), tensors)


@dataclass
class Trace:
    """A graph with its conditions.

    ``inner_guards`` read sizes of intermediate values: they are checked by a fake retrace, once per new set of sizes.
    """

    traced: Traced
    input_guards: list[Guard]
    inner_guards: list[Guard]
    shapes: Shapes  # sizes that it was traced at
    other: Traced | None = None  # the second trace, at other sizes
    free: frozenset[tuple[int, int]] = frozenset()
    notes: list[str] = field(default_factory=list)
    sample: Traced | None = None  # a run at another batch size, where that is baked into the graph

    @property
    def graph(self) -> fx.Graph:
        return self.traced.graph


def is_leaf(extra: tuple[str, ...] = ()) -> Callable[[nn.Module], bool]:
    """Leaves: modules whose forward is torch.nn's own, mode-dependent ones, and ``extra`` class names."""

    def leaf(mod: nn.Module) -> bool:
        names = {c.__name__ for c in type(mod).__mro__}
        if names & {*extra, *MODE_DEPENDENT} or isinstance(mod, torch.jit.ScriptModule):
            return True
        if "forward" in vars(mod) or isinstance(mod, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        if isinstance(mod, (nn.Linear, nn.modules.conv._ConvNd)) and (
            _hooked(mod) or "weight" not in mod._parameters or mod._parameters["weight"] is None
        ):
            return False  # hooks and parametrizations run only if the code is looked into
        return type(mod).forward.__module__.startswith("torch.nn.") and type(mod) is not nn.Module

    return leaf


def _hooked(mod: nn.Module) -> bool:
    pre = [h for h in mod._forward_pre_hooks.values() if not getattr(h, "is_ssmquant", False)]
    return bool(pre or mod._forward_hooks or mod._backward_hooks or mod._backward_pre_hooks)


# ---- one run -------------------------------------------------------------------------------------------------------


def _output(rec: Recorder, out: Any) -> Any:
    """The return value as arguments of the graph's output node."""
    if isinstance(out, (Tensor, SInt, SFloat)):
        return rec.lower(out, False)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        kwargs = {f.name: _output(rec, getattr(out, f.name)) for f in dataclasses.fields(out) if f.init}
        kwargs = {k: v for k, v in kwargs.items() if v is not None} if isinstance(out, dict) else kwargs
        return rec.add_node("call_function", type(out), (), kwargs)
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return rec.add_node("call_function", type(out), tuple(_output(rec, v) for v in out), {})
    if isinstance(out, (tuple, list)):
        return type(out)([_output(rec, v) for v in out])
    if isinstance(out, dict):
        items = {k: _output(rec, v) for k, v in out.items()}
        return items if type(out) is dict else rec.add_node("call_function", type(out), (items,), {})
    if isinstance(out, _STATIC):
        return out
    raise rec.fail(
        f"The method returns an object of type {type(out).__name__}, which a graph cannot build.",
        "Return tensors, numbers, or tuples, lists, dicts and dataclasses of them (a cache: switch it off, as by "
        "example_kwargs={'use_cache': False} for models of Hugging Face).",
    )


def run_once(
    model: nn.Module,
    method: Callable[..., Any],
    call: Call,
    shapes: Shapes,
    rules: Rules,
    unbind: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], dict[str, Any]]],
) -> Traced:
    """Traces ``method`` once at ``shapes``. ``unbind`` turns bound arguments back into ``*args, **kwargs``."""
    grad = torch.is_grad_enabled()
    for hashable in (False, True):
        rec = Recorder(model, rules, hashable=hashable)
        rec.again = lambda bound: _call_bound(method, unbind, bound)
        inputs = [
            rec.add_input(f"arg_{i}", t, s) for i, (t, s) in enumerate(zip(call.tensors, shapes, strict=True))
        ]
        values = [inputs[s.index] if isinstance(s, TensorSlot) else s for s in call.static]
        args, kwargs = unbind(pytree.tree_unflatten(values, call.spec))
        try:
            # The code runs several times here; its warnings are for when the model runs.
            with (
                quiet(),
                uncached_autocast(),
                patched(rec, model),
                snapshot(model, rec),
                torch.set_grad_enabled(grad),
                Net(rec),
                rec,
            ):
                torch.default_generator.manual_seed(SEED)  # snapshot puts the state back
                rec.stack.append("")
                rec.reads_grad = False  # our own set_grad_enabled above asked, too
                out = method(*args, **kwargs)
                rec.stack.clear()
                result = _output(rec, out)
        except TypeError:
            if rec.asked_hash and not hashable:
                continue
            raise
        rec.graph.output(result)
        return Traced(
            rec.graph, rec.guards, rec.constants, rec.functions, rec.baked, rec.rebound,
            rec.reads_dtype, rec.uses_device, rec.reads_layout, rec.reads_grad, rec.sets_modes,
            rec.reads_parameter_dtype, grad, dict(rec.training_read),
        )  # fmt: skip
    raise AssertionError("unreachable")


def _call_bound(method: Callable[..., Any], unbind: Callable[..., Any], bound: tuple[Any, ...]) -> Any:
    args, kwargs = unbind(bound)
    return method(*args, **kwargs)


def _equal(a: Any, b: Any, index: dict[fx.Node, int]) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and isinstance(b, fx.Node) and index[a] == index[b]
    if type(a) is not type(b) and not (isinstance(a, (tuple, list)) and isinstance(b, (tuple, list))):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y, index) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(v, b[k], index) for k, v in a.items())
    if isinstance(a, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step), index)
    return bool(a == b) or (a != a and b != b)


def same_graph(a: Traced, b: Traced) -> bool:
    """Equal node by node: operators, arguments, constants."""
    na, nb = list(a.graph.nodes), list(b.graph.nodes)
    if len(na) != len(nb) or a.constants.keys() != b.constants.keys():
        return False
    for k, t in a.constants.items():
        o = b.constants[k]
        if t is not o and (t.shape != o.shape or t.dtype != o.dtype or not torch.equal(t, o)):
            return False
    index = {n: i for pair in (na, nb) for i, n in enumerate(pair)}
    return all(
        x.op == y.op
        and (x.target == y.target or x.op == "placeholder")
        and x.meta.get("region") == y.meta.get("region")
        and _equal(x.args, y.args, index)
        and _equal(x.kwargs, y.kwargs, index)
        for x, y in zip(na, nb, strict=True)
    )


def _announced(a: Traced, b: Traced) -> bool:
    """Whether the first difference between what two runs asked is another answer to a comparison."""

    def questions(t: Traced) -> Iterator[tuple[Any, Any]]:
        nodes = [n for n in t.graph.nodes if not (n.op == "call_method" and n.target == "size")]
        index = {n: i for i, n in enumerate(nodes)}

        def plain(e: Any) -> Any:
            return (
                tuple(plain(x) for x in e) if isinstance(e, tuple) else index.get(e, -1) if _is_node(e) else e
            )

        return ((plain(g.expr), g.value) for g in t.guards)

    for (asked, answer), (asked_too, other) in zip(questions(a), questions(b), strict=False):
        if asked != asked_too:
            return False
        if answer != other:
            return bool(asked[0] != "value")  # a size that is pinned has another value at every other size
    return False


def _is_node(e: Any) -> bool:
    return isinstance(e, fx.Node)


# ---- sizes ---------------------------------------------------------------------------------------------------------


def _batch_dims(shapes: Shapes) -> set[tuple[int, int]]:
    first = next((s[0] for s in shapes if len(s) >= 2), None)
    return {(i, 0) for i, s in enumerate(shapes) if len(s) >= 1 and s[0] == first}


def _space_dims(shapes: Shapes) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for i, s in enumerate(shapes):
        # (B, C, *space), (B, L, C) or (B, L)
        out += [(i, d) for d in (range(2, len(s)) if len(s) >= 4 else range(1, min(len(s), 2)))]
    return out


def _resized(shapes: Shapes, change: dict[tuple[int, int], int]) -> Shapes:
    return tuple(tuple(change.get((i, d), v) for d, v in enumerate(s)) for i, s in enumerate(shapes))


def _guard_size(graph: fx.Graph, shapes: Sequence[Sequence[int]]) -> Callable[[Any, int], int]:
    index = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    return lambda node, dim: shapes[index[node]][dim]


def _split(traced: Traced) -> tuple[list[Guard], list[Guard]]:
    seen: set[Any] = set()
    inputs: list[Guard] = []
    inner: list[Guard] = []
    for g in traced.guards:
        if (g.expr, g.value) in seen:
            continue
        seen.add((g.expr, g.value))
        read = list(leaves(g.expr))
        (inputs if all(n.op == "placeholder" for n, _ in read) else inner).append(g)
    return inputs, inner


def trace(run: Callable[[Shapes], Traced], shapes: Shapes) -> Trace:
    """Traces at (and around) ``shapes``, widening to as many free dimensions as hold.

    Raises:
        TraceError: the code cannot be traced at ``shapes`` itself.
    """
    batch = _batch_dims(shapes)
    hint = _resized(shapes, dict.fromkeys(batch, 3))
    first: Traced | None = None
    try:
        first = run(hint)
        inputs, inner = _split(first)
        ok = all(g.holds(_guard_size(first.graph, shapes)) for g in inputs)
        if ok and inner and not same_graph(first, run(shapes)):
            ok = False
        first = first if ok else None
    except TraceError as e:
        if not isinstance(e, FunctionError):
            raise
    except Exception:
        # Code that accepts only its own batch size; traced below at exactly the sizes it was given.
        first = None
    widen = set(batch) if first is not None else set()
    if first is None:
        hint, first = shapes, run(shapes)
    start = first
    flipped = False

    def holds(c: dict[tuple[int, int], int]) -> Traced | None:
        nonlocal flipped
        flipped = False
        try:
            again = run(_resized(hint, c))
        except Exception:  # whatever the code raises there: it does not accept these sizes
            return None
        same = same_graph(start, again)
        flipped = not same and _announced(start, again)
        return again if same else None

    def spread(keys: Collection[tuple[int, int]], fixed: dict[tuple[int, int], int]) -> Traced | None:
        """Another size for each of ``keys``, different ones for different dimensions: multiples, which keep whatever
        divisibility the model wants, or sizes nearer by where a branch on a size goes the other way there.
        """
        found = holds(fixed | {(i, d): shapes[i][d] * (2 + d % 3) for i, d in keys})
        for pair in ((5, 4), (3, 2)), ((1, 2), (3, 4)):
            if found is not None or not flipped or not keys:
                break
            near = {(i, d): max(1, shapes[i][d] * pair[d % 2][0] // pair[d % 2][1]) for i, d in keys}
            if all(near[i, d] != shapes[i][d] for i, d in keys):
                found = holds(fixed | near)
        return found

    wide = dict.fromkeys(widen, 5)
    space = set(_space_dims(shapes))
    other = spread(space, wide) if wide or space else None
    free = {*wide, *space} if other is not None else set()
    if other is None:
        other = holds(wide) if wide else None
        if other is not None:
            free |= set(wide)
        elif wide:  # the batch size was baked: start from the given one
            hint, start = shapes, run(shapes)
            other = spread(space, {}) if space else None
            free |= space if other is not None else set()
    if not free & space:
        for key in [(i, d) for i, s in enumerate(shapes) for d in range(1, len(s))]:
            single = spread([key], {})
            if single is not None:
                free.add(key)
                other = other or single
    sample: Traced | None = None
    if batch and not free & batch:
        # Which axis numbers the samples shows at another batch size, even where the graph is another one there.
        try:
            sample = run(_resized(hint, {(i, d): hint[i][d] + 2 for i, d in batch}))
        except Exception:  # it takes this batch size only
            sample = None
    free -= _leaks(start, hint, free - set(wide), run)
    # Every other dimension is pinned: another size there is traced anew.
    inputs, inner = _split(start)
    every = {(i, d) for i, s in enumerate(shapes) for d in range(len(s))}
    notes = [] if free else [f"holds for input sizes {list(map(list, shapes))} only"]
    pins = inputs + _pins(start, hint, every - free)
    return Trace(start, pins, inner, hint, other, frozenset(free), notes, sample)


def _leaks(
    start: Traced, hint: Shapes, free: set[tuple[int, int]], run: Callable[[Shapes], Traced]
) -> set[tuple[int, int]]:
    """Free dimensions that reach C code (``range``, ``math.gcd``), which asks no guard.

    Multiples do not show it (``range(H % 4)``), so sizes that are none are tried: where the code runs there, every
    guard holds and the graph is another one, the size went somewhere unseen.
    """

    def differs(dims: set[tuple[int, int]]) -> bool:
        for step in (1, 2, 5):
            sizes = _resized(hint, {(i, d): hint[i][d] + step + 2 * (d % 2) for i, d in dims})
            inputs, _ = _split(start)
            if not all(g.holds(_guard_size(start.graph, sizes)) for g in inputs):
                continue
            try:
                again = run(sizes)
            except Exception:  # these sizes are none that the model takes
                continue
            if same_graph(start, again):
                return False
            if not _announced(start, again):  # else a guard on an inner size sees the difference
                return True
        return False

    if not free or not differs(free):
        return set()
    guilty = {key for key in free if differs({key})}
    return guilty or free


def _pins(traced: Traced, shapes: Shapes, dims: set[tuple[int, int]]) -> list[Guard]:
    nodes = [n for n in traced.graph.nodes if n.op == "placeholder"]
    return [
        Guard(
            ("value", ("size", nodes[i], d)),
            shapes[i][d],
            f"size {d} of input {i} is fixed by the model's code",
        )
        for i, d in sorted(dims)
    ]
