"""Runs the recorder: at which sizes, how often, and what the resulting graph may be used for.

A model is traced twice, at sizes that differ in every free dimension, and the graphs are compared: whatever differs was
baked into the graph, and the dimensions that cause it become guards. See DESIGN.md section 4 and ``tracer``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ssmquant.errors import InputError, TraceError
from ssmquant.graph import tracer as _t
from ssmquant.graph.provenance import Guard, IntShim, SFloat, SInt, leaves
from ssmquant.graph.tracer import Recorder, Traced

__all__ = ["Call", "Trace", "describe_call", "is_leaf", "same_graph", "trace"]

Shapes = tuple[tuple[int, ...], ...]
PATCH_LOCK = threading.RLock()
"""Held while a model is traced: patches are global, and the model is not whole."""
_STATIC = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)


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
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def meta(self) -> tuple[tuple[torch.dtype, torch.device], ...]:
        return tuple((t.dtype, t.device) for t in self.tensors)


def describe_call(bound: tuple[Any, ...]) -> Call:
    """Flattens bound arguments into tensors and static values.

    Raises:
        InputError: an argument is of a kind that can be neither.
    """
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

    @property
    def graph(self) -> fx.Graph:
        return self.traced.graph


def is_leaf(extra: tuple[str, ...] = ()) -> Callable[[nn.Module], bool]:
    """Leaves: modules whose forward is torch.nn's own, mode-dependent ones, and ``extra`` class names."""

    def leaf(mod: nn.Module) -> bool:
        names = {c.__name__ for c in type(mod).__mro__}
        if names & {*extra, *_t._MODE_DEPENDENT}:
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


# ---- patches, snapshot ---------------------------------------------------------------------------------------------


def _swap_apply(hook: Callable[..., Any]) -> Callable[[], None]:
    """Leads ``autograd.Function.apply`` to ``hook(cls, args, kwargs, original)`` until the returned function is called.

    The code of the function is exchanged, not the attribute: ``pscan = PScan.apply`` at the top of a module is an
    alias that a new attribute would not reach.
    """
    function = torch.autograd.Function.__dict__["apply"].__func__
    code = function.__code__
    original = types.FunctionType(
        code, function.__globals__, "apply", function.__defaults__, function.__closure__
    )

    def make(__class__: Any) -> Any:  # the exchanged code must close over the same names: (__class__,)
        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            __class__  # noqa: B018
            from ssmquant.graph.tracer import APPLY_HOOK

            return APPLY_HOOK[-1](cls, args, kwargs)

        return apply

    _t.APPLY_HOOK.append(lambda cls, args, kwargs: hook(cls, args, kwargs, original))
    function.__code__ = make(None).__code__

    def restore() -> None:
        function.__code__ = code
        _t.APPLY_HOOK.pop()

    return restore


@contextlib.contextmanager
def _patched(rec: Recorder, model: nn.Module) -> Iterator[None]:
    """The two patches (and the seams of checkpoint, autocast and ``int``), thread-local in effect, always undone."""
    module_call = nn.Module.__call__
    autocast = torch.amp.autocast_mode.autocast
    enter, leave = autocast.__enter__, autocast.__exit__
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    mine = threading.get_ident()
    asked = {
        (space, name): getattr(space, name)
        for space, name in (
            (torch, "is_grad_enabled"),
            (torch, "is_autocast_enabled"),
            (torch, "get_autocast_dtype"),
            (torch, "get_autocast_gpu_dtype"),
        )
        if hasattr(space, name)
    }

    def active() -> bool:
        return threading.get_ident() == mine and not rec.busy

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return rec.module(self, args, kwargs, module_call) if active() else module_call(self, *args, **kwargs)

    def apply(cls: Any, args: Any, kwargs: Any, original: Callable[..., Any]) -> Any:
        call_original = functools.partial(original, cls)
        return (
            rec.function(cls, args, call_original)
            if active() and not kwargs
            else call_original(*args, **kwargs)
        )

    def autocast_enter(self: Any) -> Any:
        if active():
            rec.reads_grad = rec.sets_modes = True
            args = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
            node = rec._node("call_function", torch.amp.autocast_mode._enter_autocast, args, {})
            node.meta["impure"] = True
            self._ssmquant_node = node
        rec.busy += 1
        try:
            return enter(self)
        finally:
            rec.busy -= 1

    def autocast_exit(self: Any, *exc: Any) -> Any:
        if active():
            node = rec._node(
                "call_function", torch.amp.autocast_mode._exit_autocast, (self._ssmquant_node,), {}
            )
            node.meta["impure"] = True
        rec.busy += 1
        try:
            return leave(self, *exc)
        finally:
            rec.busy -= 1

    def region(fn: Any, *args: Any, **kwargs: Any) -> Any:
        if not active():
            yield from generator(fn, *args, **kwargs)
            return
        with rec.checkpointed():
            yield

    def asking(original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if active():
                rec.reads_grad = True
            return original(*args, **kwargs)

        return ask

    class Training:
        """``self.training`` as the user's code reads it: what is read is a guard, what is not read does not matter."""

        def __get__(self, mod: Any, owner: Any = None) -> Any:
            if mod is None:
                return self
            if active():
                rec.read_training(mod)
            return vars(mod)["training"]

        def __set__(self, mod: Any, value: bool) -> None:
            vars(mod)["training"] = value

    shimmed: list[dict[str, Any]] = []
    restore_apply: Callable[[], None] = lambda: None  # noqa: E731
    with PATCH_LOCK:
        try:
            if _t.active_recorder() is not None:
                raise TraceError(
                    "a model was prepared or traced inside the forward of another one that is being traced"
                )
            nn.Module.training = Training()  # type: ignore[assignment]
            for (space, name), original in asked.items():
                setattr(space, name, asking(original))
            nn.Module.__call__ = call  # type: ignore[method-assign]
            restore_apply = _swap_apply(apply)
            autocast.__enter__, autocast.__exit__ = autocast_enter, autocast_exit  # type: ignore[method-assign]
            torch.utils.checkpoint._checkpoint_without_reentrant_generator = region
            for cls in {c for m in model.modules() for c in type(m).__mro__}:
                name = cls.__module__
                if name.split(".")[0] not in ("torch", "builtins", "ssmquant") or name.startswith(
                    "ssmquant.zoo"
                ):
                    globals_ = vars(sys.modules[name]) if name in sys.modules else dict[str, Any](int=int)
                    if "int" not in globals_:
                        globals_["int"] = IntShim
                        shimmed.append(globals_)
            _t._LOCAL.recorder = rec
            yield
        finally:
            _t._LOCAL.recorder = None
            del nn.Module.training
            nn.Module.__call__ = module_call  # type: ignore[method-assign]
            restore_apply()
            autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]
            torch.utils.checkpoint._checkpoint_without_reentrant_generator = generator
            for shim in shimmed:
                del shim["int"]
            for (space, name), original in asked.items():
                setattr(space, name, original)


@contextlib.contextmanager
def _snapshot(model: nn.Module, rec: Recorder) -> Iterator[None]:
    """Whatever the code does to the modules' attributes (and to the RNGs) is undone; rebindings are noted."""
    saved = []
    for name, mod in model.named_modules():
        attrs = dict(vars(mod))
        inner = {k: v.copy() for k, v in attrs.items() if isinstance(v, (dict, list, set))}
        saved.append((name, mod, attrs, inner))
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
        _note_rebinding(rec, saved)
        drawn = random.getstate() != states[0]
        drawn |= any(not np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
        if drawn:
            raise TraceError(
                f"the forward of {type(model).__name__} draws from Python's or numpy's random generator; a graph would "
                "repeat one draw for ever. Use torch's random functions"
            )
    finally:
        for _, mod, attrs, inner in saved:
            space = vars(mod)
            space.clear()
            space.update(attrs)
            for k, old in inner.items():
                now = space[k]
                now.clear()
                now.extend(old) if isinstance(now, list) else now.update(old)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = logging.getLogger(
            "torch._subclasses.fake_tensor"
        )  # prints tracebacks for sizes that do not fit
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _reads_input(node: fx.Node) -> bool:
    """Whether a value depends on the values of an input (``type_as(x)`` and the like read its kind only)."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder":
            return True
        kind_only = n.op == "call_method" and n.target in ("type_as", "to", "expand_as", "view_as", "size")
        todo.extend(list(n.all_input_nodes)[:1] if kind_only else n.all_input_nodes)
    return False


def _note_rebinding(rec: Recorder, saved: list[Any]) -> None:
    for name, mod, attrs, inner in saved:
        for k, v in vars(mod).items():
            if isinstance(v, (int, float, str)) and k in attrs and v != attrs[k]:
                full = f"{name}.{k}" if name else k
                rec.rebound[full] = "is changed by the code, and no more by the prepared model"
        for store, before in ((vars(mod), attrs), (mod._buffers, inner.get("_buffers", {}))):
            for k, v in store.items():
                if isinstance(v, Tensor) and v is not before.get(k) and id(v) in rec.values:
                    full = f"{name}.{k}" if name else k
                    old = before.get(k)
                    carried = store is not mod._buffers and isinstance(old, Tensor) and id(old) in rec.values
                    if carried and _reads_input(rec.values[id(v)][1]):
                        raise TraceError(
                            f"attribute '{full}' is read and then set to a computed value: it carries state from one "
                            "call to the next, which a graph does only for registered buffers. Use register_buffer"
                        )
                    if not carried and store is not mod._buffers:
                        rec.rebound[full] = "is set by the code, and no more by the prepared model"
                    if store is mod._buffers and isinstance(before.get(k), Tensor):
                        # A registered buffer is state: the rebinding is replayed as a copy into it.
                        target, _ = rec.lookup(before[k])
                        node = rec._node("call_method", "copy_", (target, rec.lookup(v)[0]), {})
                        node.meta["mutates"] = [target.meta.get("storage")]


# ---- one run -------------------------------------------------------------------------------------------------------


def _output(rec: Recorder, out: Any) -> Any:
    """The return value as arguments of the graph's output node."""
    if isinstance(out, (Tensor, SInt, SFloat)):
        return rec.lower(out, False)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        kwargs = {f.name: _output(rec, getattr(out, f.name)) for f in dataclasses.fields(out) if f.init}
        kwargs = {k: v for k, v in kwargs.items() if v is not None} if isinstance(out, dict) else kwargs
        return rec._node("call_function", type(out), (), kwargs)
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return rec._node("call_function", type(out), tuple(_output(rec, v) for v in out), {})
    if isinstance(out, (tuple, list)):
        return type(out)([_output(rec, v) for v in out])
    if isinstance(out, dict):
        items = {k: _output(rec, v) for k, v in out.items()}
        return items if type(out) is dict else rec._node("call_function", type(out), (items,), {})
    if isinstance(out, _STATIC):
        return out
    raise rec.fail(
        f"The method returns an object of type {type(out).__name__}, which a graph cannot build.",
        "Return tensors, numbers, or tuples, lists, dicts and dataclasses of them.",
    )


def run_once(
    model: nn.Module,
    method: Callable[..., Any],
    call: Call,
    shapes: Shapes,
    leaf: Callable[[nn.Module], bool],
    unbind: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], dict[str, Any]]],
) -> Traced:
    """Traces ``method`` once at ``shapes``. ``unbind`` turns bound arguments back into ``*args, **kwargs``."""
    grad = torch.is_grad_enabled()
    for hashable in (False, True):
        rec = Recorder(model, leaf, hashable=hashable)
        rec.again = lambda bound: _call_bound(method, unbind, bound)
        inputs = [
            rec.add_input(f"arg_{i}", t, s) for i, (t, s) in enumerate(zip(call.tensors, shapes, strict=True))
        ]
        values = [inputs[s.index] if isinstance(s, TensorSlot) else s for s in call.static]
        args, kwargs = unbind(pytree.tree_unflatten(values, call.spec))
        try:
            # The code runs several times here; its warnings are for when the model runs.
            with (
                _quiet(),
                _patched(rec, model),
                _snapshot(model, rec),
                torch.set_grad_enabled(grad),
                _t._Net(rec),
                rec,
            ):
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
    except TraceError:
        raise
    except Exception:
        # Code that accepts only its own batch size; traced below at exactly the sizes it was given.
        first = None
    if first is None:
        exact = run(shapes)
        pins = _pins(exact, shapes, {(i, d) for i, s in enumerate(shapes) for d in range(len(s))})
        return Trace(exact, pins, [], shapes, notes=[f"holds for input sizes {list(map(list, shapes))} only"])

    start = first

    def holds(c: dict[tuple[int, int], int]) -> Traced | None:
        try:
            again = run(_resized(hint, c))
        except Exception:  # whatever the code raises there: it does not accept these sizes
            return None
        return again if same_graph(start, again) else None

    # Multiples keep whatever divisibility the model wants; different ones for different dimensions.
    wide = dict.fromkeys(batch, 5)
    space = {(i, d): shapes[i][d] * (2 + d % 3) for i, d in _space_dims(shapes)}
    other = holds(wide | space)
    free = set(wide | space)
    if other is None:
        free = set()
        other = holds(wide) if wide else None
        if other is not None:
            free |= set(wide)
        elif wide:  # the batch size was baked: start from the given one
            hint, start = shapes, run(shapes)
        rest = {(i, d): n * (2 + d % 3) for i, s in enumerate(shapes) for d, n in enumerate(s) if d > 0}
        for key, size in rest.items():
            single = holds({key: size})
            if single is not None:
                free.add(key)
                other = other or single
    free -= _leaks(start, hint, free - set(wide), run)
    # Every other dimension is pinned: another size there is traced anew.
    inputs, inner = _split(start)
    every = {(i, d) for i, s in enumerate(shapes) for d in range(len(s))}
    return Trace(start, inputs + _pins(start, hint, every - free), inner, hint, other, frozenset(free))


def _leaks(
    start: Traced, hint: Shapes, free: set[tuple[int, int]], run: Callable[[Shapes], Traced]
) -> set[tuple[int, int]]:
    """Free dimensions that reach C code (``range``, ``math.gcd``), which asks no guard.

    Multiples do not show it (``range(H % 4)``), so sizes that are none are tried: where the code runs there, every
    guard holds and the graph is another one, the size went somewhere unseen.
    """

    def differs(dims: set[tuple[int, int]]) -> bool:
        sizes = _resized(hint, {(i, d): hint[i][d] + 1 + 2 * (d % 2) for i, d in dims})
        inputs, _ = _split(start)
        if not all(g.holds(_guard_size(start.graph, sizes)) for g in inputs):
            return False
        try:
            again = run(sizes)
        except Exception:  # these sizes are none that the model takes
            return False
        return not same_graph(start, again)

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
