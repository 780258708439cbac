"""From Python code to a ``torch.fx`` graph: a recording function mode on static fake tensors.

The user's code runs once with fake tensors (shapes and dtypes without data), while a ``TorchFunctionMode`` writes every
torch call into a graph. Real ``torch.Tensor`` objects and real ``int`` sizes (see ``provenance``) flow through it, so
isinstance tests, einops, factories, item assignment and caches work natively and no kernel runs. Two things are patched
while it runs, ``nn.Module.__call__`` and ``autograd.Function.apply``, besides the seams of checkpoint and autocast.

This file holds the recorder; ``trace`` decides at which sizes to run it and what the result is worth.
"""

from __future__ import annotations

import functools
import linecache
import operator
import os
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssmquant.errors import TraceError
from ssmquant.graph.provenance import Guard, IntShim, SFloat, SInt, SSize, _strip, _wrap
from ssmquant.graph.roles import FunctionModule, function_rule

__all__ = ["Recorder", "active_recorder"]

_LOCAL = threading.local()
APPLY_HOOK: list[Callable[..., Any]] = []
"""What ``autograd.Function.apply`` leads to while a trace runs (see ``trace``)."""
_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))

_OPERATORS: dict[str, tuple[Callable[..., Any], bool]] = {
    "__getitem__": (operator.getitem, False), "__setitem__": (operator.setitem, False),
    "__delitem__": (operator.delitem, False), "__matmul__": (operator.matmul, False),
    "__rmatmul__": (operator.matmul, True), "__rsub__": (operator.sub, True), "__radd__": (operator.add, True),
    "__rmul__": (operator.mul, True), "__rdiv__": (operator.truediv, True), "__rtruediv__": (operator.truediv, True),
    "__rpow__": (operator.pow, True), "__rfloordiv__": (operator.floordiv, True), "__rmod__": (operator.mod, True),
    "__eq__": (operator.eq, False), "__ne__": (operator.ne, False), "__lt__": (operator.lt, False),
    "__le__": (operator.le, False), "__gt__": (operator.gt, False), "__ge__": (operator.ge, False),
    "__add__": (operator.add, False), "__sub__": (operator.sub, False), "__mul__": (operator.mul, False),
    "__truediv__": (operator.truediv, False), "__floordiv__": (operator.floordiv, False),
    "__mod__": (operator.mod, False), "__pow__": (operator.pow, False), "__neg__": (operator.neg, False),
    "__and__": (operator.and_, False), "__or__": (operator.or_, False), "__xor__": (operator.xor, False),
    "__invert__": (operator.invert, False), "__iadd__": (operator.iadd, False), "__isub__": (operator.isub, False),
    "__imul__": (operator.imul, False), "__itruediv__": (operator.itruediv, False), "__abs__": (operator.abs, False),
}  # fmt: skip
_READS_DATA = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy", "__array__",
    "__contains__", "__format__", "__dlpack__", "data_ptr",
}  # fmt: skip
_RANDOM = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like",
    "randint_like", "dropout", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_",
    "log_normal_", "gumbel_softmax", "feature_dropout", "alpha_dropout", "rrelu",
}  # fmt: skip
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward"}
_MODE_DEPENDENT = {"DropPath", "StochasticDepth"}


def active_recorder() -> Recorder | None:
    """The recorder that runs in this thread, if one does."""
    return getattr(_LOCAL, "recorder", None)


def user_frame() -> tuple[str, str]:
    """``file:line`` and the source text of the innermost frame of the user's code."""
    f: types.FrameType | None = sys._getframe(1)
    while f is not None:
        name = f.f_code.co_filename
        if not name.startswith((_HERE, _TORCH)) and not name.startswith("<"):
            return f"{name}:{f.f_lineno}", linecache.getline(name, f.f_lineno).strip()
        f = f.f_back
    return "<unknown>", ""


@dataclass
class Traced:
    """What one run of the recorder leaves: the graph and everything that it rests on."""

    graph: fx.Graph
    guards: list[Guard]
    constants: dict[str, Tensor]
    functions: dict[str, nn.Module]
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


class _Net(TorchDispatchMode):
    """Second net: operators that no torch function announced (TorchScript, C++ code) become ATen nodes."""

    def __init__(self, rec: Recorder) -> None:
        super().__init__()
        self.rec = rec

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        _collect_tensors((args, kwargs), tensors)
        known = any(
            isinstance(t, FakeTensor) or id(t) in self.rec.values or id(t) in self.rec.owned for t in tensors
        )
        if self.rec.busy or not known:
            return func(*args, **kwargs)
        return self.rec.record("call_function", func, args, kwargs, func)


class Recorder(TorchFunctionMode):
    """Records the torch calls of one run of a method.

    Args:
        root: The model; its parameters and buffers are read, never written.
        leaf: Says whether a module becomes one ``call_module`` node.
        hashable: Let sizes be hashed (at the price of a guard on their value).
    """

    def __init__(self, root: nn.Module, leaf: Callable[[nn.Module], bool], *, hashable: bool = False) -> None:
        super().__init__()
        self.root, self.leaf, self.hashable = root, leaf, hashable
        self.asked_hash = False
        self.again: Callable[[tuple[Any, ...]], Any] | None = (
            None  # what self(...) means inside the traced method
        )
        self.busy = 0
        self.graph = fx.Graph()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # id -> (object, node, fake). The object is held so that no id is ever reused while tracing.
        self.values: dict[int, tuple[Any, fx.Node, Tensor]] = {}
        self.keep: list[Any] = []
        self.owned: dict[int, str] = {}
        self.module_names: dict[int, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.functions: dict[str, nn.Module] = {}
        self.guards: list[Guard] = []
        self.baked: dict[str, str] = {}
        self.rebound: dict[str, str] = {}
        self.size_nodes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.expr_nodes: dict[Any, fx.Node] = {}
        self.stack: list[str] = []
        self.training_read: dict[str, bool] = {}
        self.region: int | None = None
        self.regions = 0
        self.reads_dtype = self.uses_device = self.reads_layout = self.reads_grad = self.sets_modes = False
        self.reads_parameter_dtype = False
        self._collect_owned()

    # ---- what belongs to the model -------------------------------------------------------------------------------
    def _collect_owned(self) -> None:
        for name, mod in self.root.named_modules():
            self.module_names[id(mod)] = name
            prefix = f"{name}." if name else ""
            for store in (mod._parameters, mod._buffers, vars(mod)):
                for k, v in list(store.items()):
                    if isinstance(v, Tensor):
                        self.owned.setdefault(id(v), prefix + k)
                        self.keep.append(v)

    def add_input(self, name: str, example: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A placeholder of ``shape`` with the dtype and device of ``example``."""
        self.busy += 1
        # In the example's memory layout (channels last, say): code may ask whether it is contiguous.
        strides = example.stride()
        order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
        with self.fake:
            t = torch.empty([shape[d] for d in order], dtype=example.dtype, device=example.device)
            t = t.permute([order.index(d) for d in range(len(shape))])
        self.busy -= 1
        node = self.graph.placeholder(name)
        self._bind(t, node, t)
        return t

    def _bind(self, obj: Tensor, node: fx.Node, fake: Tensor) -> None:
        self.values[id(obj)] = (obj, node, fake)
        node.meta["val"] = fake
        if "storage" not in node.meta:
            self.busy += 1
            try:
                node.meta["storage"] = fake.untyped_storage()._cdata
            except (NotImplementedError, RuntimeError):
                node.meta["storage"] = None
            finally:
                self.busy -= 1

    # ---- errors, guards ------------------------------------------------------------------------------------------
    def where(self) -> str:
        return user_frame()[0]

    def fail(self, what: str, remedy: str) -> TraceError:
        place, text = user_frame()
        module = f" in module '{self.stack[-1]}'" if self.stack and self.stack[-1] else ""
        return TraceError(f"{what}\n  at {place}{module}: {text}\n{remedy}")

    def read_training(self, mod: nn.Module) -> None:
        """The user's code asked for ``mod.training``."""
        name = self.module_names.get(id(mod))
        if name is not None:
            self.training_read[name] = vars(mod)["training"]

    def guard(self, expr: Any, value: Any) -> None:
        self.guards.append(Guard(expr, value, self.where()))

    # ---- writing nodes -------------------------------------------------------------------------------------------
    def _size_node(self, node: fx.Node, dim: int) -> fx.Node:
        key = (node, dim)
        if key not in self.size_nodes:
            after = node
            if node.op == "placeholder":
                after = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(after):
                new = self.graph.call_method("size", (node, dim))
            new.meta.update(module=node.meta.get("module", ""), where=node.meta.get("where", ""))
            if node.meta.get("region") is not None:
                new.meta["region"] = node.meta["region"]
            self.size_nodes[key] = new
        return self.size_nodes[key]

    def emit(self, expr: Any) -> Any:
        """The node (or number) that computes a size expression, written once, where it is first needed."""
        from ssmquant.graph.provenance import OPS

        if not isinstance(expr, tuple):
            return expr
        if expr[0] == "size":
            return self._size_node(expr[1], expr[2])
        args = tuple(self.emit(e) for e in expr[1:])
        if not any(isinstance(a, fx.Node) for a in args):
            return OPS[expr[0]](*args)
        key = (expr[0], args)
        if key not in self.expr_nodes:
            self.expr_nodes[key] = self._node("call_function", OPS[expr[0]], args, {})
        return self.expr_nodes[key]

    def _node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["module"] = self.stack[-1] if self.stack else ""
        node.meta["where"] = self.where()
        if self.region is not None:
            node.meta["region"] = self.region
        return node

    def constant(self, t: Tensor) -> tuple[fx.Node, Tensor]:
        """A tensor that is neither an input nor the model's own: kept beside the graph."""
        name = f"const_{len(self.constants)}"
        self.busy += 1
        self.constants[name] = t.detach()
        pointer = t.untyped_storage().data_ptr() if t.numel() else None
        self.busy -= 1
        node, fake = self._get_attr(t, f"_ssmquant.constants.{name}")
        node.meta["pointer"] = pointer
        return node, fake

    def _get_attr(self, t: Tensor, name: str) -> tuple[fx.Node, Tensor]:
        self.busy += 1
        try:
            with torch.no_grad(), self.fake:
                fake = self.fake.from_tensor(t.detach(), static_shapes=True)
        finally:
            self.busy -= 1
        node = self.graph.get_attr(name)
        node.meta["module"], node.meta["where"] = "", ""
        self._bind(t, node, fake)
        return node, fake

    def lookup(self, t: Tensor) -> tuple[fx.Node, Tensor]:
        """The node and the fake that stand for a tensor of the user's code."""
        entry = self.values.get(id(t))
        if entry is not None:
            return entry[1], entry[2]
        if id(t) in self.owned:
            name = self.owned[id(t)]
            # get_attr nodes must not lie inside a region or after a later use: put them where they are met, which
            # dominates every later use because nodes are only appended.
            return self._get_attr(t, name)
        if isinstance(t, FakeTensor):
            raise self.fail(
                "A tensor appeared that no recorded operator made (a Tensor subclass, a cache across traces, or code "
                "that computes outside torch's API).",
                "Make the module that holds this code a leaf: prepare(..., adapter=Adapter(leaf=('ClassName',))).",
            )
        if isinstance(t, nn.Parameter) or t.requires_grad:
            raise self.fail(
                "A parameter was used that does not belong to this model: a closure or a list holds it, so the "
                "prepared copy would compute with the original's weights.",
                "Reach it through self, or use a bound method instead of a closure.",
            )
        self.keep.append(t)
        return self.constant(t)

    def lower(self, x: Any, fakes: bool) -> Any:
        """Arguments as the graph (``fakes=False``) or as the fake run (``fakes=True``) wants them."""
        if isinstance(x, Tensor):
            node, fake = self.lookup(x)
            return fake if fakes else node
        if isinstance(x, (SInt, SFloat)):
            return _strip(x) if fakes else self.emit(x.expr)
        if x is IntShim:
            return int
        if isinstance(x, torch.device):
            self.uses_device = True
            return x
        if isinstance(x, tuple):
            items = [self.lower(i, fakes) for i in x]
            if type(x) in (tuple, SSize, torch.Size):
                return tuple(items)
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, list):
            return [self.lower(i, fakes) for i in x]
        if isinstance(x, dict):
            return {k: self.lower(v, fakes) for k, v in x.items()}
        if isinstance(x, slice):
            return slice(self.lower(x.start, fakes), self.lower(x.stop, fakes), self.lower(x.step, fakes))
        if isinstance(x, torch.Generator):
            raise self.fail(
                "A random generator is an argument of an operator; a graph cannot hold one.",
                "Leave the generator out (the global one is seeded by torch.manual_seed), or draw outside the model.",
            )
        return x

    def record(self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """Write one node, run it on fakes, and wrap what comes back."""
        tensors: list[Tensor] = []
        _collect_tensors((args, kwargs), tensors)
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
        if not mutated and op != "call_module" and out is not None and not _has_tensor(out):
            # A question about a tensor (is_floating_point, is_contiguous ...): the answer holds for calls like this.
            self.reads_dtype = self.reads_layout = True
            return out
        if mutated:
            nargs, nkwargs = self._own_copies(mutated, nargs, nkwargs)
        node = self._node(op, target, nargs, nkwargs)
        if mutated:
            node.meta["mutates"] = [self.lookup(t)[0].meta.get("storage") for t in mutated]
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name in _RANDOM:
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
                new = self._node("call_method", "clone", (old,), {})
                self._bind(t, new, fake)
                swap = {old: new}
                nargs, nkwargs = fx.node.map_arg((nargs, nkwargs), functools.partial(_swapped, swap))
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
                "prepare(..., adapter=Adapter(leaf=('ClassName',))).",
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
                    out = (
                        self.fake.from_tensor(out.detach(), static_shapes=True)
                        if real
                        else torch.ops.aten.alias.default(out)
                    )
                self.busy -= 1
            self._bind(out, node, out)
            return out
        if isinstance(out, (tuple, list)):
            items = []
            for i, v in enumerate(out):
                if isinstance(v, (Tensor, tuple, list)):
                    items.append(
                        self._wrap_output(
                            v, self._node("call_function", operator.getitem, (node, i), {}), inputs, mutated
                        )
                    )
                else:
                    items.append(v)
            if type(out) in (tuple, list):
                return type(out)(items)
            return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
        if isinstance(out, dict):
            return {
                k: self._wrap_output(v, self._node("call_function", operator.getitem, (node, k), {}), inputs, mutated)
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
        sized = _collect_tensors((args, kwargs), tensors)
        symbolic = [t for t in tensors if id(t) in self.values or isinstance(t, FakeTensor)]
        traced = [t for t in symbolic if isinstance(t, FakeTensor)]
        owned = [t for t in tensors if id(t) in self.owned]
        if name in ("size", "numel", "nelement", "__len__", "dim", "stride", "element_size") and traced:
            return self._sizes(name, args, kwargs, func)
        if name in _HOOKS and traced:
            raise self.fail(
                f"The code registers something on an activation ({name}), which a graph cannot keep.",
                "Use a module's hooks, or an autograd.Function.",
            )
        if name in _READS_DATA:
            if traced:
                raise self.fail(
                    f"The code reads the values of a computed tensor ({name}).",
                    "Traced graphs cannot follow values. Compute this outside forward, or make the module a leaf: "
                    "prepare(..., adapter=Adapter(leaf=('ClassName',))).",
                )
            for t in owned:
                self.baked.setdefault(self.owned[id(t)], self.where())
            return self._plain(func, args, kwargs)
        if name == "__iter__":
            return iter(self.__torch_function__(torch.Tensor.unbind, types, (args[0], 0)))
        if name in ("requires_grad_", "__hash__"):
            return args[0] if name == "requires_grad_" and traced else self._plain(func, args, kwargs)
        if not (traced or owned or sized or symbolic or name in _RANDOM):
            return self._plain(func, args, kwargs)
        if name in _OPERATORS and _is_method(func, name):
            target, swap = _OPERATORS[name]
            args = tuple(reversed(args)) if swap else args
            return self.record("call_function", target, args, kwargs, target)
        if _is_method(func, name) and args and isinstance(args[0], Tensor):
            return self.record("call_method", name, args, kwargs, func)
        return self.record("call_function", func, args, kwargs, func)

    def _plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on concrete values only: run it for real, unseen."""
        self.busy += 1
        try:
            return func(*_plain_ints(args), **_plain_ints(kwargs))
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
            if (
                attr == "requires_grad"
            ):  # fakes never do: what stands for an activation would, under grad mode
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
                return func(fake, *_plain_ints(args[1:]), **_plain_ints(kwargs))
        finally:
            self.busy -= 1
        sizes = SSize(_wrap(self, ("size", node, i), s) for i, s in enumerate(shape))
        if name == "__len__":
            if not shape:
                raise TypeError("len() of a 0-d tensor")
            # len() must return a plain int, so it pins.
            self.guard(("value", ("size", node, 0)), shape[0])
            return shape[0]
        if name in ("numel", "nelement"):
            return sizes.numel()
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return sizes if dim is None else sizes[_strip(dim)]

    def _set_grad(self, value: bool) -> None:
        self.reads_grad = self.sets_modes = True
        node = self._node("call_function", torch._C._set_grad_enabled, (bool(value),), {})
        node.meta["impure"] = True
        self.busy += 1
        torch._C._set_grad_enabled(value)
        self.busy -= 1

    # ---- modules, functions, regions -------------------------------------------------------------------------------
    def module(self, mod: nn.Module, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        name = self.module_names.get(id(mod))
        if name is None:
            if next(mod.parameters(), None) is not None:
                raise self.fail(
                    f"A {type(mod).__name__} with parameters was called that is not a registered submodule of the "
                    "model (made inside forward, or kept in a plain list).",
                    "Register it (assign it to an attribute, or use nn.ModuleList).",
                )
            return call(mod, *args, **kwargs)
        tensors: list[Tensor] = []
        sized = _collect_tensors((args, kwargs), tensors)
        sized_output = isinstance(mod, nn.modules.conv._ConvTransposeNd) and (
            len(args) > 1 or "output_size" in kwargs
        )
        if self.leaf(mod) and (sized or tensors) and not sized_output:
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
                m._buffers[k] = self.fake.from_tensor(b.detach(), static_shapes=True)
            return call(mod, *args, **kwargs)
        finally:
            for m, k, b in real:
                m._buffers[k] = b

    def function(self, cls: Any, args: Any, call: Callable[..., Any]) -> Any:
        if cls is torch.utils.checkpoint.CheckpointFunction:
            with self.checkpointed():
                return args[0](*args[2:])
        tensors: list[Tensor] = []
        sized = _collect_tensors(args, tensors)
        if not (sized or tensors):
            return call(*args)
        rule = function_rule(cls)
        # The same Function class is one leaf module, wherever it is used.
        name = f"{cls.__module__}.{cls.__qualname__}".replace(".", "/").replace("<locals>", "_")
        self.functions.setdefault(name, FunctionModule(cls))
        run = rule if rule is not None else FunctionModule(cls).shape_run
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


def _swapped(swap: dict[fx.Node, fx.Node], n: fx.Node) -> fx.Node:
    return swap.get(n, n)


def _is_method(func: Any, name: str) -> bool:
    return getattr(torch.Tensor, name, None) == func


def _collect_tensors(x: Any, out: list[Tensor]) -> bool:
    """Appends the tensors in ``x`` to ``out``; True if a traced size is in there too."""
    if isinstance(x, Tensor):
        out.append(x)
        return False
    if isinstance(x, (SInt, SFloat)):
        return True
    if isinstance(x, (tuple, list)):
        return any([_collect_tensors(i, out) for i in x])
    if isinstance(x, dict):
        return any([_collect_tensors(i, out) for i in x.values()])
    if isinstance(x, slice):
        return any([_collect_tensors(i, out) for i in (x.start, x.stop, x.step)])
    return False


def _has_tensor(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return any(_has_tensor(i) for i in x)
    return any(_has_tensor(i) for i in x.values()) if isinstance(x, dict) else isinstance(x, Tensor)


def _plain_ints(x: Any) -> Any:
    if x is IntShim:
        return int
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(_plain_ints(i) for i in x)
    if isinstance(x, list):
        return [_plain_ints(i) for i in x]
    if isinstance(x, dict):
        return {k: _plain_ints(v) for k, v in x.items()}
    return _strip(x)
