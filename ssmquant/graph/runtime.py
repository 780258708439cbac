"""The prepared model at work: an instance of a generated subclass whose forward picks, and if need be makes, the graph.

``Runtime`` is the one child module that ``prepare`` adds. It holds the quantizers (or, after convert, the packed
tensors) and the traces, and finds the graph that fits a call: sizes, dtypes, flags and training mode that the user's
Python code branched on are guards, and a call that breaks one is traced again on fake tensors with the same sites.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ssmquant.adapter import Adapter
from ssmquant.config import QConfig
from ssmquant.errors import ConfigError, MethodError, SsmquantError, TraceError
from ssmquant.graph.plan import Plan, make_plan
from ssmquant.graph.regions import OWNER, compile_graph
from ssmquant.graph.rewrite import rewrite
from ssmquant.graph.sites import find_sites
from ssmquant.graph.trace import (
    PATCH_LOCK,
    Call,
    Shapes,
    Trace,
    describe_call,
    is_leaf,
    run_once,
    same_graph,
    trace,
)
from ssmquant.graph.tracer import active_recorder
from ssmquant.quantizers import Quantizer

__all__ = [
    "Record",
    "Runtime",
    "attach",
    "bind",
    "forget_baked",
    "initialize_weights",
    "is_prepared",
    "move_plain_tensors",
    "refuse_elsewhere",
    "runtime_of",
]


_MOST_RECORDS = 64


@dataclass
class Record:
    """One graph and the calls that it serves."""

    spec: Any
    static: tuple[Any, ...]
    kinds: tuple[str, ...]
    meta: tuple[Any, ...]
    layout: tuple[bool, ...]
    ndims: tuple[int, ...]
    mode: dict[str, bool]  # the training flags that the code read
    autocast: Any
    trace: Trace
    plan: Plan
    guard: Callable[[Shapes], bool]
    graph: fx.Graph
    code: str
    run: Callable[..., Any]
    verified: list[Shapes] = field(default_factory=list)

    def accepts(self, model: nn.Module, call: Call) -> bool:
        if (
            self.static != call.static
            or self.kinds != call.kinds
            or self.spec != call.spec
            or self.ndims != tuple(t.dim() for t in call.tensors)
        ):
            return False
        t = self.trace.traced
        if (t.reads_dtype or t.uses_device) and self.meta != call.meta:
            return False
        if (t.reads_dtype or t.reads_grad) and self.autocast != _autocast(call):
            return False
        if t.reads_grad and t.grad != torch.is_grad_enabled():
            return False
        if t.reads_layout and self.layout != _layout(call):
            return False
        for name, flag in self.mode.items():
            if model.get_submodule(name).training != flag:
                return False
        return self.guard(call.shapes)


def _layout(call: Call) -> tuple[bool, ...]:
    return tuple(t.is_contiguous() for t in call.tensors)


def _autocast(call: Call) -> Any:
    kind = call.tensors[0].device.type if call.tensors else "cpu"
    return torch.is_autocast_enabled(kind) and (kind, torch.get_autocast_dtype(kind))


def _compile_guards(trace_: Trace) -> Callable[[Shapes], bool]:
    """Guards on input sizes as one Python function (which ``torch.compile`` can follow)."""
    index = {n: i for i, n in enumerate(n for n in trace_.graph.nodes if n.op == "placeholder")}
    symbols = {
        "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/", "pow": "**", "and_": "&",
        "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
        "gt": ">",
        "ge": ">=",
    }  # fmt: skip

    def source(e: Any) -> str:
        if not isinstance(e, tuple):
            return repr(e)
        if e[0] == "size":
            return f"s[{index[e[1]]}][{e[2]}]"
        args = [source(a) for a in e[1:]]
        if e[0] in symbols:
            return f"({args[0]} {symbols[e[0]]} {args[1]})"
        unary = {
            "neg": "-{}",
            "abs": "abs({})",
            "value": "{}",
            "trunc": "int({})",
            "ceil": "-int(-{} // 1)",
            "floor": "int({} // 1)",
        }
        return "(" + unary.get(e[0], f"{e[0]}({{}})").format(", ".join(args)) + ")"

    # In the order in which the code asked: a later question may only make sense after an earlier one.
    terms = list(dict.fromkeys(f"{source(g.expr)} == {g.value!r}" for g in trace_.input_guards))
    if not terms:
        return lambda s: True
    return eval(f"lambda s: {' and '.join(terms)}")  # built from our own expressions


class Constants(nn.Module):
    """Tensors that the user's code made or kept outside its modules; they follow ``.to()`` and are never saved."""

    def add(self, t: Tensor) -> str:
        for name, old in self._buffers.items():
            if (
                old is not None
                and old.shape == t.shape
                and old.dtype == t.dtype
                and torch.equal(old.cpu(), t.cpu())
            ):
                return name
        name = f"c{len(self._buffers)}"
        self.register_buffer(name, t.detach().clone(), persistent=False)
        return name


class Runtime(nn.Module):
    """State of a prepared (``stage == "prepared"``) or converted (``"deployed"``) model."""

    def __init__(self, config: QConfig, adapter: Adapter | None, method: str) -> None:
        super().__init__()
        self.config, self.adapter, self.method = config, adapter, method
        self.stage = "prepared"
        self.weights = nn.ModuleDict()
        self.activations = nn.ModuleDict()
        self.functions = nn.ModuleDict()
        self.constants = Constants()
        self.records: list[Record] = []
        self.known: set[str] | None = None  # names of the points that may exist
        self.dropped: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.tied: dict[str, str] = {}  # further names of dropped parameters -> the first one
        self.instance_forward: Any = None
        self.example: tuple[Any, ...] = ()  # (static description) of the example call, for save and pickle
        self.notes: list[str] = []
        self.float_dtype: torch.dtype | None = None

    # ---- tracing -------------------------------------------------------------------------------------------------
    def signature(self, model: nn.Module) -> inspect.Signature:
        return inspect.signature(self.user_method(model))

    def user_method(self, model: nn.Module) -> Callable[..., Any]:
        if self.method == "forward" and self.instance_forward is not None:
            return self.instance_forward
        base = type(model).__mro__[1] if is_prepared(model) else type(model)
        return getattr(base, self.method).__get__(model)

    def make_trace(self, model: nn.Module, call: Call, *, exact: bool = False) -> Trace:
        """Traces the model for a call, at its current training mode and autocast state."""
        unbind = _unbinder(self.signature(model))
        leaf = is_leaf(self.adapter.leaf if self.adapter else ())
        method = self.user_method(model)
        with PATCH_LOCK, _Stand(self, model), _Hidden(model):

            def run(shapes: Shapes) -> Any:
                return run_once(model, method, call, shapes, leaf, unbind)

            if exact:
                return Trace(run(call.shapes), [], [], call.shapes)
            return trace(run, call.shapes)

    def adopt(self, model: nn.Module, t: Trace) -> None:
        """Gives a trace's constants and Functions a place in this module."""
        done: dict[str, str] = {}
        for traced in [x for x in (t.traced, t.other) if x is not None]:
            for name, fn in traced.functions.items():
                if name not in self.functions:
                    self.functions[name] = fn
            done.clear()
            for name, value in traced.constants.items():
                done[name] = self.constants.add(value)
            for n in traced.graph.nodes:
                if n.op == "get_attr" and str(n.target).startswith("_ssmquant.constants.const_"):
                    n.target = "_ssmquant.constants." + done[str(n.target).rpartition(".")[2]]

    def build(self, model: nn.Module, call: Call, t: Trace, *, check: bool = False) -> Record:
        """Plans and rewrites a trace."""
        self.adopt(model, t)
        scans = self.adapter.scans if self.adapter else ()
        with _Stand(self, model):
            found = find_sites(model, t, scans)
            keep = self.adapter.keep_float if self.adapter else ()
            plan = make_plan(model, t, found, self.config, keep, check=check)
            baked = {p.parameter for p in plan.points} & set(t.traced.baked)
            if baked:
                name = sorted(str(b) for b in baked)[0]
                raise TraceError(
                    f"the value of parameter '{name}' is read as a Python number at {t.traced.baked[name]}, so it "
                    f"cannot be quantized. Keep it in float: QConfig(keep_float=['{name}'])"
                )
            if self.known is not None:
                new = {p.name for p in plan.points} - self.known
                if new:
                    raise TraceError(
                        f"this call reaches sites that the prepared graph does not have ({', '.join(sorted(new)[:3])} "
                        "...): prepare with an example input of this kind"
                    )
            graph = rewrite(model, t.graph, plan, deployed=self.stage == "deployed")
        run, code = compile_graph(graph)
        return Record(
            call.spec, call.static, call.kinds, call.meta, _layout(call), tuple(x.dim() for x in call.tensors),
            t.traced.training_read, _autocast(call), t, plan,
            _compile_guards(t), graph, code, run, [call.shapes],
        )  # fmt: skip

    def rebuild(self, model: nn.Module) -> None:
        """Writes every record's graph anew for the current stage."""
        records = []
        for r in self.records:
            with _Stand(self, model):
                graph = rewrite(model, r.trace.graph, r.plan, deployed=self.stage == "deployed")
            run, code = compile_graph(graph)
            records.append(replace(r, graph=graph, run=run, code=code))
        self.records = records  # new ones: copies of the model share the old

    # ---- running -------------------------------------------------------------------------------------------------
    def select(self, model: nn.Module, call: Call) -> Record:
        """The record for a call, made if there is none yet."""
        for r in self.records:
            if r.accepts(model, call) and (not r.trace.inner_guards or self._verify(model, r, call)):
                return r
        return self.retrace(model, call)

    def _verify(self, model: nn.Module, r: Record, call: Call) -> bool:
        # Comparisons of numbers, not a set: torch.compile then turns each into a guard.
        for known in r.verified:
            if all(
                a == b for s, t in zip(known, call.shapes, strict=True) for a, b in zip(s, t, strict=True)
            ):
                return True
        self._refuse_while_compiling()
        again = self.make_trace(model, call, exact=True)
        self.adopt(model, again)
        if same_graph(r.trace.traced, again.traced):
            r.verified.append(call.shapes)
            return True
        return False

    def retrace(self, model: nn.Module, call: Call) -> Record:
        self._refuse_while_compiling()
        record = self.build(model, call, self.make_trace(model, call))
        self.records.append(record)
        if len(self.records) > _MOST_RECORDS:  # a number that differs at every call makes a graph each time
            del self.records[2]
        return record

    def _refuse_while_compiling(self) -> None:
        if torch.compiler.is_compiling():
            raise TraceError(
                "torch.compile met a call for which there is no graph yet: call the prepared model once, eagerly, with "
                "an input of these sizes, dtypes and flags before compiling it"
            )

    # ---- state ---------------------------------------------------------------------------------------------------
    def check_mode(self, training: bool) -> None:
        """Refuses to train what cannot be trained."""
        if training and self.stage == "deployed":
            raise SsmquantError(
                "a converted model holds packed codes and cannot be trained: train the prepared one and convert again"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        new = Runtime.__new__(Runtime)
        memo[id(self)] = new
        for k, v in vars(self).items():
            # Graphs are never changed in place, so copies share them; only the set of records is each copy's own.
            new.__dict__[k] = list(v) if k == "records" else copy.deepcopy(v, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["records"] = []  # made again by the first call: graphs hold functions that pickle cannot name
        return state


class _Stand:
    """While the user's code is traced after convert, empty parameters stand where packed ones were."""

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        self.runtime, self.model = runtime, model
        self.added: list[tuple[nn.Module, str]] = []

    def __enter__(self) -> None:
        shared: dict[str, nn.Parameter] = {}
        for name, (shape, dtype) in self.runtime.dropped.items():
            first = self.runtime.tied.get(name, name)
            owner, _, attr = name.rpartition(".")
            mod = self.model.get_submodule(owner)
            if mod._parameters.get(attr) is None:
                # One element, expanded: shape and dtype without the memory.
                p = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
                holder, _, held = first.rpartition(".")
                there = self.model.get_submodule(holder)._parameters.get(held)  # tied to one that stayed
                mod._parameters[attr] = shared.setdefault(first, p if there is None else there)
                self.added.append((mod, attr))

    def __exit__(self, *exc: Any) -> None:
        for mod, attr in self.added:
            mod._parameters[attr] = None


class _Hidden:
    """While the user's code is traced it does not meet the runtime: it may walk over its own children or parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.runtime = self.model._modules.pop("_ssmquant")

    def __exit__(self, *exc: Any) -> None:
        self.model._modules["_ssmquant"] = self.runtime


# ---- the generated class -------------------------------------------------------------------------------------------


def is_prepared(model: nn.Module) -> bool:
    """Whether ``prepare``, ``convert`` or ``load`` made the model."""
    return isinstance(getattr(model, "_ssmquant", None), Runtime)


def runtime_of(model: nn.Module, stage: str | None = None) -> Runtime:
    """The runtime of a prepared or deployed model.

    Raises:
        ConfigError: the model is none, or is at another stage.
    """
    runtime = getattr(model, "_ssmquant", None)
    if not isinstance(runtime, Runtime):
        raise ConfigError(f"{type(model).__name__} was not made by ssmquant.prepare (or load)")
    if stage is not None and runtime.stage != stage:
        raise ConfigError(f"expected a {stage} model, got a {runtime.stage} one")
    return runtime


def _unbinder(sig: inspect.Signature) -> Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], dict[str, Any]]]:
    kinds = [(p.name, p.kind) for p in sig.parameters.values()]

    def unbind(bound: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for (name, kind), value in zip(kinds, bound, strict=True):
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif kind is inspect.Parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)
        return tuple(args), kwargs

    return unbind


def bind(sig: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments in the signature's order, defaults filled in."""
    b = sig.bind(*args, **kwargs)
    b.apply_defaults()
    return tuple(b.arguments[name] for name in sig.parameters)


def _entry(owner: str, method: str, sig: inspect.Signature) -> Callable[..., Any]:
    """A method of the user's own signature that hands its arguments, in order, to the runtime."""
    parts, names, seen_star = [], [], False
    defaults: dict[str, Any] = {}
    for p in sig.parameters.values():
        names.append(p.name)
        if p.kind is inspect.Parameter.VAR_POSITIONAL:
            parts.append(f"*{p.name}")
            seen_star = True
        elif p.kind is inspect.Parameter.VAR_KEYWORD:
            parts.append(f"**{p.name}")
        else:
            if p.kind is inspect.Parameter.KEYWORD_ONLY and not seen_star:
                parts.append("*")
                seen_star = True
            if p.default is inspect.Parameter.empty:
                parts.append(p.name)
            else:
                defaults[f"_default_{p.name}"] = p.default
                parts.append(f"{p.name}=_default_{p.name}")
    body = f"def {method}(self, {', '.join(parts)}):\n    return _run(self, ({', '.join(names)}{',' * bool(names)}))\n"
    space: dict[str, Any] = {"_run": _run, **defaults}
    exec(
        compile(body, f"<ssmquant {owner}.{method}>", "exec"), space
    )  # the signature is the user's; only names go in
    entry = space[method]
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    positional_only = any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in sig.parameters.values())
    me = me if positional_only else me.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    entry.__signature__ = sig.replace(parameters=[me, *sig.parameters.values()])
    return entry


def _run(model: Any, bound: tuple[Any, ...]) -> Any:
    if "_ssmquant" not in model._modules:  # it is being traced
        recorder = active_recorder()
        if recorder is not None and recorder.again is not None:
            return recorder.again(bound)  # the method calls itself
        with PATCH_LOCK:  # by another thread: wait
            pass
    call = describe_call(bound)
    record = model._ssmquant.select(model, call)
    if record.trace.traced.sets_modes:
        return _run_restoring(record, model, call)
    return record.run(model, *call.tensors)


def _run_restoring(record: Record, model: Any, call: Call) -> Any:
    """A graph that switches grad mode or autocast must not leave them switched when something in it raises."""
    grad = torch.is_grad_enabled()
    kind = call.tensors[0].device.type if call.tensors else "cpu"
    autocast = torch.is_autocast_enabled(kind)
    try:
        return record.run(model, *call.tensors)
    except BaseException:
        torch.set_grad_enabled(grad)
        torch.set_autocast_enabled(kind, autocast)
        raise


def _subclass(base: type[nn.Module], method: str, sig: inspect.Signature) -> type[nn.Module]:
    def _reduce(self: Any, protocol: int) -> Any:
        return _restore, (base, method), dict(vars(self))

    def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        new = cls.__new__(cls)
        memo[id(self)] = new
        for k, v in vars(self).items():
            new.__dict__[k] = copy.deepcopy(v, memo)
        return new

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        base._apply(self, fn, recurse)
        move_plain_tensors(self, fn)
        runtime = runtime_of(self)
        runtime.example = tree_map_only(Tensor, fn, runtime.example)
        # Code that asked for a parameter's dtype or device is traced again.
        runtime.records = [r for r in runtime.records if not r.trace.traced.reads_parameter_dtype]
        return self

    def _train(self: Any, mode: bool = True) -> Any:
        runtime_of(self).check_mode(mode)  # before anything is switched
        return base.train(self, mode)

    def _load(self: nn.Module, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return _load_state(self, base, state, strict, assign)

    space = {
        method: _entry(base.__qualname__, method, sig),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        "_apply": _apply,
        "load_state_dict": _load,
        "train": _train,
        OWNER: property(lambda self: self),
        "graph": property(lambda self: self._ssmquant.records[0].graph if self._ssmquant.records else None),
        "code": property(lambda self: self._ssmquant.records[0].code if self._ssmquant.records else ""),
    }
    cls: Any = type(base.__name__, (base,), space)
    return cls


def _restore(base: type[nn.Module], method: str) -> nn.Module:
    plain: Any = base.__new__(base)
    sig = inspect.signature(getattr(base, method).__get__(plain))
    cls = _subclass(base, method, sig)
    return cls.__new__(cls)


def attach(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Makes ``model`` (already a copy) an instance of the generated subclass, with ``runtime`` as a child."""
    base = type(model)
    if runtime.method == "forward" and "forward" in vars(model):
        runtime.instance_forward = vars(model).pop("forward")
    sig = runtime.signature(model)
    model.__class__ = _subclass(base, runtime.method, sig)
    model._ssmquant = runtime
    return model


def _load_state(model: nn.Module, base: Any, state: Any, strict: bool, assign: bool) -> Any:
    """Loads a prepared checkpoint, or a float one: by name, strictly, quantizers then start from the new weights."""
    runtime = runtime_of(model)
    ours = [k for k in state if k.startswith("_ssmquant.")]
    if ours or runtime.stage == "deployed":
        return base.load_state_dict(model, state, strict=strict, assign=assign)
    own = model.state_dict()
    full = {**{k: v for k, v in own.items() if k.startswith("_ssmquant.")}, **state}
    result = base.load_state_dict(model, full, strict=strict, assign=assign)
    forget_baked(model)
    initialize_weights(model)
    return result


def forget_baked(model: nn.Module) -> None:
    """Traces the example again where numbers that were read from parameters are in a graph, or where there is none."""
    runtime = runtime_of(model)
    if not runtime.records or any(r.trace.traced.baked for r in runtime.records):
        runtime.records = []
        runtime.retrace(model, describe_call(runtime.example))


def initialize_weights(model: nn.Module) -> None:
    """Initialises every weight quantizer from the parameter that it reads, and static operands from their values."""
    runtime = runtime_of(model)
    done: set[str] = set()
    for record in runtime.records:
        values = _Values(model)
        for p in record.plan.points:
            if p.what in ("weight", "static") and p.key not in done:
                done.add(p.key)
                quantizer = runtime.weights[p.key]
                assert isinstance(quantizer, Quantizer)
                quantizer.reset()
                quantizer.initialize(values(p.node))


class _Values:
    """Evaluates nodes that depend on parameters only."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def __call__(self, node: fx.Node) -> Any:
        if node not in self.known:
            if node.op == "call_module":  # a called nn.Linear or conv: its weight
                return self.model.get_parameter(f"{node.target}.weight")
            if node.op == "get_attr":
                owner, _, attr = str(node.target).rpartition(".")
                self.known[node] = getattr(self.model.get_submodule(owner), attr)
            else:
                args = fx.node.map_arg(node.args, self)
                kwargs = fx.node.map_arg(node.kwargs, self)
                target: Any = node.target
                self.known[node] = (
                    target(*args, **kwargs)
                    if node.op == "call_function"
                    else getattr(args[0], target)(*args[1:], **kwargs)
                )
        return self.known[node]


def move_plain_tensors(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Applies ``fn`` to the plain tensor attributes that a graph reads.

    ``.to()`` does not know them, and code that moves them by rebinding (``self.mean = self.mean.type_as(x)``) does so
    no more: a graph does not rebind attributes, so it would copy them from the CPU on every call.
    """
    done: set[str] = set()
    for record in runtime_of(model).records:
        for node in record.graph.nodes:
            name = str(node.target)
            if node.op != "get_attr" or name in done or name == OWNER:
                continue
            done.add(name)
            owner, _, attr = name.rpartition(".")
            space = vars(model.get_submodule(owner))
            if isinstance(space.get(attr), Tensor):
                space[attr] = fn(space[attr])


# ---- guards on methods ---------------------------------------------------------------------------------------------


class _Refuse:
    """A forward pre-hook on modules whose parameters are quantized: only the graph may compute with them."""

    def __init__(self, method: str, name: str) -> None:
        self.method, self.name = method, name
        self.is_ssmquant = True

    def __call__(self, module: nn.Module, args: Any) -> None:
        if active_recorder() is None:
            raise MethodError(
                f"'{self.name}' is quantized, but this call does not go through the prepared method "
                f"'{self.method}'. Prepare the method you call: ssmquant.prepare(..., method='its_name'); for the "
                "whole model call model(...)"
            )


def refuse_elsewhere(model: nn.Module, runtime: Runtime) -> None:
    """Puts the hooks on the owners of quantized parameters and on the modules around them."""
    owners: set[str] = set()
    for r in runtime.records:
        for p in r.plan.points:
            for site, _ in p.uses:
                owners |= {site.module, site.module.rpartition(".")[0]}
    # A module that the graph itself calls elsewhere (one use in float, or an embedding tied to a head) cannot refuse.
    called = {str(n.target) for r in runtime.records for n in r.graph.nodes if n.op == "call_module"}
    for name in sorted(owners - {""} - called):
        model.get_submodule(name).register_forward_pre_hook(_Refuse(runtime.method, name))
