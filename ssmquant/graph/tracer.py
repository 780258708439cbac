"""From Python code to a ``torch.fx`` graph: a recording function mode on static fake tensors.

The user's code runs once with fake tensors (shapes and dtypes without data), while a ``TorchFunctionMode`` writes every
torch call into a graph. Real ``torch.Tensor`` objects and real ``int`` sizes (see ``provenance``) flow through it, so
isinstance tests, einops, factories, item assignment and caches work natively and no kernel runs. Two things are patched
while it runs, ``nn.Module.__call__`` and ``autograd.Function.apply``, besides the seams of checkpoint and autocast.

This file holds the recorder (its lower half, which writes nodes, is in ``writer``, and the patches in ``patches``);
``trace`` decides at which sizes to run it and what the result is worth.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmquant.errors import TraceError
from ssmquant.graph.calls import (
    HOOKS,
    OPERATORS,
    RANDOM,
    READS_DATA,
    collect_tensors,
    has_state,
    has_tensor,
    is_method,
    plain_ints,
    swapped,
)
from ssmquant.graph.functions import FunctionError, FunctionModule, call_role, role_of
from ssmquant.graph.provenance import Guard, SSize, strip, wrap
from ssmquant.graph.roles import scan_role, scan_shape
from ssmquant.graph.writer import Writer

__all__ = ["APPLY_HOOK", "LOCAL", "Net", "Recorder", "Traced", "active_recorder"]

LOCAL = threading.local()
APPLY_HOOK: list[Callable[..., Any]] = []
"""What ``autograd.Function.apply`` leads to while a trace runs (see ``patches``)."""


def active_recorder() -> Recorder | None:
    """The recorder that runs in this thread, if one does."""
    return getattr(LOCAL, "recorder", None)


@dataclass
class Traced:
    """What one run of the recorder leaves: the graph and everything that it rests on."""

    graph: fx.Graph
    guards: list[Guard]
    constants: dict[str, Tensor]
    functions: dict[str, FunctionModule]
    baked: dict[str, str]  # parameters whose value was read as a Python number -> line
    rebound: dict[str, str]  # attributes rebound to a computed tensor, and how that is treated
    reads_dtype: bool = False
    uses_device: bool = False
    reads_layout: bool = False
    reads_grad: bool = False  # grad mode or autocast state were asked for, or set
    sets_modes: bool = False  # grad mode or autocast are switched inside
    reads_parameter_dtype: bool = False
    grad: bool = True  # grad mode of the trace
    training_read: dict[str, bool] = field(default_factory=dict)  # modules whose ``training`` the code read


class Net(TorchDispatchMode):
    """Second net: operators that no torch function announced (TorchScript, C++ code) become ATen nodes."""

    def __init__(self, rec: Recorder) -> None:
        super().__init__()
        self.rec = rec

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        collect_tensors((args, kwargs), tensors)
        known = any(
            isinstance(t, FakeTensor) or id(t) in self.rec.values or id(t) in self.rec.owned for t in tensors
        )
        if self.rec.busy or not known:
            return func(*args, **kwargs)
        return self.rec.record("call_function", func, args, kwargs, func)


class Recorder(Writer):
    """Records the torch calls of one run of a method."""

    def record(self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """Write one node, run it on fakes, and wrap what comes back."""
        tensors: list[Tensor] = []
        collect_tensors((args, kwargs), tensors)
        before = [(t, self.lookup(t)[1]) for t in tensors]
        versions = [f._version for _, f in before]
        fargs, fkwargs = self.lower(tuple(args), True), self.lower(dict(kwargs), True)
        nargs, nkwargs = self.lower(tuple(args), False), self.lower(dict(kwargs), False)
        self.busy += 1
        try:
            with torch.no_grad(), self.fake:
                out = run(*fargs, **fkwargs)
        except Exception as e:
            if isinstance(e, TraceError):
                raise
            raise self._explain(e, target) from e
        finally:
            self.busy -= 1
        mutated = [t for (t, f), v in zip(before, versions, strict=True) if f._version != v]
        if not mutated and op != "call_module" and out is not None and not has_tensor(out):
            # A question about a tensor (is_floating_point, is_contiguous ...): the answer holds for calls like this.
            self.reads_dtype = self.reads_layout = True
            return out
        if mutated:
            nargs, nkwargs = self._own_copies(mutated, nargs, nkwargs)
        node = self.add_node(op, target, nargs, nkwargs)
        if mutated:
            node.meta["mutates"] = [self.lookup(t)[0].meta.get("storage") for t in mutated]
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name in RANDOM:
            node.meta["random"] = True
        return self._wrap_output(out, node, before, {id(t) for t in mutated})

    def _own_copies(self, mutated: list[Tensor], nargs: Any, nkwargs: Any) -> tuple[Any, Any]:
        """A constant that the code writes into is cloned on every call, as if it had been made anew."""
        for t in mutated:
            old, fake = self.lookup(t)
            if old.op == "get_attr" and str(old.target).startswith("_ssmquant.constants."):
                if (
                    any(
                        other is not old
                        and other.op == "get_attr"
                        and other.meta.get("pointer") == old.meta.get("pointer")
                        for _, other, _ in list(self.values.values())
                    )
                    or getattr(t, "_base", None) is not None
                ):
                    raise self.fail(
                        "The code writes into a view of a tensor that it made from constants only.",
                        "Make the tensor from the input, as in x.new_zeros(...), or write into the tensor itself.",
                    )
                new = self.add_node("call_method", "clone", (old,), {})
                self._bind(t, new, fake)
                swap = {old: new}
                nargs, nkwargs = fx.node.map_arg((nargs, nkwargs), functools.partial(swapped, swap))
        return nargs, nkwargs

    def _explain(self, e: Exception, target: Any) -> Exception:
        text = f"{type(e).__name__}: {e}"
        if (
            "DataDependent" in type(e).__name__
            or "data-dependent" in text.lower()
            or "DynamicOutputShape" in text
        ):
            return self.fail(
                f"The code depends on the values of a tensor ({getattr(target, '__name__', target)}).",
                "Traced graphs cannot follow values. Compute this outside forward, or make the module a leaf: "
                "prepare(..., adapter=Adapter('name', leaf=('ClassName',))).",
            )
        if "data pointer" in text or "doesn't have storage" in text:
            return self.fail(
                f"Native code was called that only runs on real tensors ({getattr(target, '__name__', target)}).",
                "Say what comes out of it: prepare(..., adapter=Adapter('name', functions=(FunctionRole('ClassName', "
                "shape=...),))) for an autograd.Function, or make the module a leaf: Adapter('name', "
                "leaf=('ClassName',)).",
            )
        return e

    def _wrap_output(
        self, out: Any, node: fx.Node, inputs: list[tuple[Tensor, Tensor]], mutated: set[int]
    ) -> Any:
        if isinstance(out, Tensor):
            for user, fake in inputs:
                if out is fake:
                    if id(user) in mutated:
                        self._bind(user, node, fake)
                        return user
                    # x.contiguous(), x.float() ... gave x itself: an object of its own, or the node would be lost.
                    self.busy += 1
                    with torch.no_grad(), self.fake:
                        out = torch.ops.aten.alias.default(fake)
                    self.busy -= 1
                    break
            if not isinstance(out, FakeTensor) or (id(out) in self.values and out is self.values[id(out)][0]):
                # A constant that a leaf returned, or an object that another node made already.
                self.busy += 1
                with torch.no_grad(), self.fake:
                    real = not isinstance(out, FakeTensor)
                    out = self.fake_of(out) if real else torch.ops.aten.alias.default(out)
                self.busy -= 1
            self._bind(out, node, out)
            return out
        if isinstance(out, (tuple, list)):
            items = []
            for i, v in enumerate(out):
                if isinstance(v, (Tensor, tuple, list)):
                    items.append(
                        self._wrap_output(
                            v,
                            self.add_node("call_function", operator.getitem, (node, i), {}),
                            inputs,
                            mutated,
                        )
                    )
                else:
                    items.append(v)
            if type(out) in (tuple, list):
                return type(out)(items)
            return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
        if isinstance(out, dict):
            return {
                k: self._wrap_output(
                    v, self.add_node("call_function", operator.getitem, (node, k), {}), inputs, mutated
                )
                if isinstance(v, (Tensor, tuple, list, dict)) else v
                for k, v in out.items()
            }  # fmt: skip
        return out

    # ---- torch functions -----------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.busy:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._getter(func, args[0])
        if name == "_set_grad_enabled":
            return self._set_grad(args[0])
        tensors: list[Tensor] = []
        sized = collect_tensors((args, kwargs), tensors)
        symbolic = [t for t in tensors if id(t) in self.values or isinstance(t, FakeTensor)]
        traced = [t for t in symbolic if isinstance(t, FakeTensor)]
        owned = [t for t in tensors if id(t) in self.owned]
        if name in ("size", "numel", "nelement", "__len__", "dim", "stride", "element_size") and traced:
            return self._sizes(name, args, kwargs, func)
        if name in HOOKS and traced:
            raise self.fail(
                f"The code registers something on an activation ({name}), which a graph cannot keep.",
                "Use a module's hooks, or an autograd.Function.",
            )
        if name in READS_DATA:
            if traced:
                raise self.fail(
                    f"The code reads the values of a computed tensor ({name}).",
                    "Traced graphs cannot follow values. Compute this outside forward, or make the module a leaf: "
                    "prepare(..., adapter=Adapter('name', leaf=('ClassName',))).",
                )
            for t in owned:
                self.baked.setdefault(self.owned[id(t)], self.where())
            return self._plain(func, args, kwargs)
        if name == "__iter__":
            return iter(self.__torch_function__(torch.Tensor.unbind, types, (args[0], 0)))
        if name in ("requires_grad_", "__hash__"):
            return args[0] if name == "requires_grad_" and traced else self._plain(func, args, kwargs)
        # A module made in forward initialises its parameters: that is no part of the graph.
        foreign = any(isinstance(t, nn.Parameter) and id(t) not in self.owned for t in tensors)
        random = name in RANDOM and not foreign
        if not (traced or owned or sized or symbolic or random):
            return self._plain(func, args, kwargs)
        if name in OPERATORS and is_method(func, name):
            target, swap = OPERATORS[name]
            args = tuple(reversed(args)) if swap else args
            return self.record("call_function", target, args, kwargs, target)
        if is_method(func, name) and args and isinstance(args[0], Tensor):
            return self.record("call_method", name, args, kwargs, func)
        return self.record("call_function", func, args, kwargs, func)

    def _plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on concrete values only: run it for real, unseen."""
        self.busy += 1
        try:
            return func(*plain_ints(args), **plain_ints(kwargs))
        finally:
            self.busy -= 1

    def _getter(self, func: Any, t: Tensor) -> Any:
        attr = func.__self__.__name__
        if attr == "shape" and isinstance(t, FakeTensor):
            return self._sizes("size", (t,), {}, torch.Tensor.size)
        fake = self.values[id(t)][2] if id(t) in self.values else t
        self.busy += 1
        try:
            with torch.no_grad():
                out = func.__self__.__get__(fake if isinstance(t, FakeTensor) else t)
        finally:
            self.busy -= 1
        if isinstance(out, Tensor) and (isinstance(t, FakeTensor) or id(t) in self.owned):
            return self.record("call_function", getattr, (t, attr), {}, getattr)
        if isinstance(t, FakeTensor):
            self.reads_dtype |= attr in ("dtype", "is_cuda", "device", "is_cpu")
            if attr == "requires_grad":  # fakes never do; an activation would, under grad mode
                self.reads_grad = True
                return t.dtype.is_floating_point and torch.is_grad_enabled()
        elif id(t) in self.owned:
            self.reads_parameter_dtype |= attr in ("dtype", "is_cuda", "device", "is_cpu")
        return out

    def _sizes(self, name: str, args: Any, kwargs: Any, func: Any) -> Any:
        node, fake = self.lookup(args[0])
        self.busy += 1
        try:
            shape = tuple(fake.shape)
            if name in ("dim", "stride", "element_size"):
                return func(fake, *plain_ints(args[1:]), **plain_ints(kwargs))
        finally:
            self.busy -= 1
        sizes = SSize(wrap(self, ("size", node, i), s) for i, s in enumerate(shape))
        if name == "__len__":
            if not shape:
                raise TypeError("len() of a 0-d tensor")
            # len() must return a plain int, so it pins.
            self.guard(("value", ("size", node, 0)), shape[0])
            return shape[0]
        if name in ("numel", "nelement"):
            return sizes.numel()
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return sizes if dim is None else sizes[strip(dim)]

    def _set_grad(self, value: bool) -> None:
        self.reads_grad = self.sets_modes = True
        node = self.add_node("call_function", torch._C._set_grad_enabled, (bool(value),), {})
        node.meta["impure"] = True
        self.busy += 1
        torch._C._set_grad_enabled(value)
        self.busy -= 1

    # ---- modules, functions, regions -------------------------------------------------------------------------------
    def module(self, mod: nn.Module, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        mod = self.stand_ins.get(id(mod), mod)
        name = self.module_names.get(id(mod))
        if name is None:
            if not has_state(mod):
                return call(mod, *args, **kwargs)
            mod = self.adopt(mod)
            name = self.module_names[id(mod)]
        if isinstance(mod, torch.jit.ScriptModule) and has_state(mod):
            raise self.fail(
                f"'{name}' is a torch.jit.ScriptModule with parameters, whose code cannot be followed.",
                "Give the Python module that it was made from.",
            )
        tensors: list[Tensor] = []
        sized = collect_tensors((args, kwargs), tensors)
        sized_output = isinstance(mod, nn.modules.conv._ConvTransposeNd) and (
            len(args) > 1 or "output_size" in kwargs
        )
        if self.rules.leaf(mod) and (sized or tensors) and not sized_output:
            return self.record(
                "call_module", name, args, kwargs, lambda *a, **k: self._leaf_run(mod, call, a, k)
            )
        self.stack.append(name)
        try:
            return call(mod, *args, **kwargs)
        finally:
            self.stack.pop()

    def _leaf_run(self, mod: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a leaf on fakes, with fakes in the place of its buffers: BatchNorm counts batches in one of them."""
        real = [(m, k, b) for m in mod.modules() for k, b in m._buffers.items() if b is not None]
        try:
            for m, k, b in real:
                m._buffers[k] = self.fake_of(b)
            return call(mod, *args, **kwargs)
        finally:
            for m, k, b in real:
                m._buffers[k] = b

    def function(self, cls: Any, args: Any, call: Callable[..., Any]) -> Any:
        if cls is torch.utils.checkpoint.CheckpointFunction:
            with self.checkpointed():
                return args[0](*args[2:])
        tensors: list[Tensor] = []
        sized = collect_tensors(args, tensors)
        if not (sized or tensors):
            return call(*args)
        role = role_of(cls, self.rules.functions)
        if role is not None and role.unfold is not None:
            return call_role(role.unfold, cls, args, self.rules.platform)
        # The same Function class is one leaf module, wherever it is used; classes that a factory made share a name.
        base = name = f"{cls.__module__}.{cls.__qualname__}".replace(".", "/").replace("<locals>", "_")
        count = 1
        while name in self.functions and self.functions[name].cls is not cls:
            count += 1
            name = f"{base}#{count}"
        leaf = self.functions.setdefault(name, FunctionModule(cls))
        scan = scan_role(cls, self.rules.scans)

        def run(*fakes: Any) -> Any:
            if role is not None and role.shape is not None:
                return call_role(role.shape, cls, fakes, self.rules.platform)
            if scan is not None:
                return scan_shape(scan, cls, fakes)
            try:
                return leaf.shape_run(*fakes)
            except TraceError:
                raise
            except Exception as e:
                error = self.fail(
                    f"{cls.__qualname__} (an autograd.Function) does not run on fake tensors, which have sizes but no "
                    f"data: {type(e).__name__}: {e}",
                    "If it is native code, say what comes out of it, or what it computes: prepare(..., adapter=Adapter("
                    f"'name', functions=(FunctionRole('{cls.__qualname__}', shape=...),))), or unfold=... instead.",
                )
                raise FunctionError(str(error)) from e

        return self.record("call_module", f"_ssmquant.functions.{name}", args, {}, run)

    def checkpointed(self) -> _Region:
        return _Region(self)


class _Region:
    def __init__(self, rec: Recorder) -> None:
        self.rec = rec
        self.outer: int | None = None

    def __enter__(self) -> None:
        self.outer = self.rec.region
        if self.outer is None:  # nested regions belong to the outermost
            self.rec.region = self.rec.regions
            self.rec.regions += 1

    def __exit__(self, *exc: Any) -> None:
        self.rec.region = self.outer
