"""The prepared model: an instance of a generated subclass of the user's class, whose method asks the runtime.

``attach`` makes it one. What the subclass does besides (copies, pickles, ``.to()``, ``train``, ``load_state_dict``)
is here too, as is what keeps quantized modules from being called past the graph (``refuse_elsewhere``).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ssmquant.errors import ConfigError, MethodError, TraceError
from ssmquant.graph.patches import PATCH_LOCK
from ssmquant.graph.plan import Point
from ssmquant.graph.regions import OWNER
from ssmquant.graph.runtime import Record, Runtime, runtime_of
from ssmquant.graph.trace import Call, describe_call
from ssmquant.graph.tracer import active_recorder
from ssmquant.graph.transforms.undo import Snapshot
from ssmquant.graph.writer import ADOPTED
from ssmquant.modules.activation import over_gain
from ssmquant.quantizers import Quantizer

__all__ = [
    "Undone",
    "Values",
    "attach",
    "bind",
    "copied",
    "evaluating",
    "forget_baked",
    "initialize_weights",
    "input_ranges",
    "move_plain_tensors",
    "refuse_elsewhere",
]


# ---- the generated class -------------------------------------------------------------------------------------------


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
    # The signature is the user's; only names go into the source.
    exec(compile(body, f"<ssmquant {owner}.{method}>", "exec"), space)
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
        PATCH_LOCK.acquire()  # another thread traces it: wait
        PATCH_LOCK.release()
    runtime = model._modules["_ssmquant"]  # half the time of an attribute
    if runtime.stage == "prepared" and torch._C._get_tracing_state() is not None:
        raise TraceError("torch.jit.trace cannot follow quantizers that are trained: convert the model first")
    ahead = None if runtime.graphs is None else runtime.graphs.ahead(bound)
    call = describe_call(bound)
    record = runtime.select(model, call)
    if record.trace.traced.sets_modes:
        return _run_restoring(record, model, call)
    if runtime.graphs is not None:
        return runtime.graphs(record, model, call.tensors, ahead)
    return record(model, call.tensors)


def _run_restoring(record: Record, model: Any, call: Call) -> Any:
    """A graph that switches grad mode or autocast must not leave them switched when something in it raises."""
    grad = torch.is_grad_enabled()
    kind = call.tensors[0].device.type if call.tensors else "cpu"
    autocast = torch.is_autocast_enabled(kind)
    try:
        return record(model, call.tensors)
    except BaseException:
        torch.set_grad_enabled(grad)
        torch.set_autocast_enabled(kind, autocast)
        raise


_VIEWS = {
    "graph": property(lambda self: self._ssmquant.records[0].graph if self._ssmquant.records else None),
    "code": property(lambda self: self._ssmquant.records[0].code if self._ssmquant.records else ""),
}


def _subclass(
    base: type[nn.Module], method: str, sig: inspect.Signature, views: tuple[str, ...]
) -> type[nn.Module]:
    def _reduce(self: Any, protocol: int) -> Any:
        return _restore, (base, method, views), dict(vars(self))

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
        runtime.dropped = {
            name: (shape, fn(torch.empty(0, dtype=dtype)).dtype)
            for name, (shape, dtype) in runtime.dropped.items()
        }
        # Code that asked for a parameter's dtype or device is traced again.
        runtime.records = [r for r in runtime.records if not r.trace.traced.reads_parameter_dtype]
        return self

    def _train(self: Any, mode: bool = True) -> Any:
        runtime_of(self).check_mode(mode)  # before anything is switched
        return base.train(self, mode)

    def _load(self: nn.Module, state: Any, strict: bool = True, assign: bool = False) -> Any:
        result = _load_state(self, base, state, strict, assign)
        if any(not k.startswith("_ssmquant.activations.") for k in state):  # of other weights
            runtime_of(self).rounded = {}
        return result

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
        **{name: _VIEWS[name] for name in views},
    }
    cls: Any = type(base.__name__, (base,), space)
    return cls


def _restore(base: type[nn.Module], method: str, views: tuple[str, ...]) -> nn.Module:
    plain: Any = base.__new__(base)
    sig = inspect.signature(getattr(base, method).__get__(plain))
    cls = _subclass(base, method, sig, views)
    return cls.__new__(cls)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ConfigError: the model holds what Python cannot copy.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        remedy = ""
        if "graph leaves" in str(e):
            remedy = (
                ". It keeps a tensor that was computed with gradients, as torch.nn.utils.weight_norm does: call it "
                "once under torch.no_grad(), or use torch.nn.utils.parametrizations"
            )
        raise ConfigError(f"{type(model).__name__} cannot be copied ({type(e).__name__}: {e}){remedy}") from e


def attach(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Makes ``model`` (already a copy) an instance of the generated subclass, with ``runtime`` as a child."""
    base = type(model)
    if runtime.method == "forward" and "forward" in vars(model):
        runtime.instance_forward = vars(model).pop("forward")
    sig = runtime.signature(model)
    views = tuple(
        name for name in _VIEWS if not hasattr(model, name)
    )  # a name that the model uses stays its own
    model.__class__ = _subclass(base, runtime.method, sig, views)
    model._ssmquant = runtime
    return model


def _load_state(model: nn.Module, base: Any, state: Any, strict: bool, assign: bool) -> Any:
    """Loads a prepared checkpoint, or a float one: by name, strictly, quantizers then start from the new weights."""
    runtime = runtime_of(model)
    transforms = runtime.transforms
    ours = [k for k in state if k.startswith("_ssmquant.")]
    if ours and runtime.stage == "prepared" and transforms.differ(state):
        with Undone(model):
            transforms.adopt(state, next((p for p in model.parameters() if p.is_floating_point()), None))
            result = base.load_state_dict(model, state, strict=strict, assign=assign)
            runtime.records = []
            try:
                runtime.retrace(model, describe_call(runtime.example))
            except TraceError as e:
                raise RuntimeError(f"the checkpoint's transforms do not fit this model: {e}") from e
        return result
    if ours or runtime.stage == "deployed":
        return base.load_state_dict(model, state, strict=strict, assign=assign)
    if not transforms.folded:
        return _load_float(model, base, state, strict, assign)
    with Undone(model):
        given = transforms.touched & state.keys()
        if given == transforms.touched:  # these weights fit the code as it is
            if transforms.places:
                runtime.records = []
            transforms.forget(next(model.parameters(), None))
        elif given and not strict:
            warnings.warn(
                f"the state holds {len(given)} of {len(transforms.touched)} weights that transforms changed: they are "
                "taken as weights of the transformed model",
                stacklevel=3,
            )
        return _load_float(model, base, state, strict, assign)


def _load_float(model: nn.Module, base: Any, state: Any, strict: bool, assign: bool) -> Any:
    own = model.state_dict()
    full = {**{k: v for k, v in own.items() if k.startswith(("_ssmquant.", f"{ADOPTED}."))}, **state}
    result = base.load_state_dict(model, full, strict=strict, assign=assign)
    forget_baked(model)
    initialize_weights(model)
    return result


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each in the mode that it was in."""
    modes = {m: m.training for model in models for m in model.modules()}
    try:
        for m in modes:
            m.training = False
        yield
    finally:
        for m, flag in modes.items():
            m.training = flag


class Undone:
    """Puts tensors, transforms and graphs back where something fails: half a load fits neither kind of graph.

    ``weights``: False leaves out the model's own tensors, for what changes quantizers only.
    """

    def __init__(self, model: nn.Module, *, weights: bool = True) -> None:
        self.runtime = runtime = runtime_of(model)
        self.tensors = Snapshot(model if weights else runtime)
        t = runtime.transforms
        self.transforms = t.folded, t.skipped, t.settled
        self.graphs = list(runtime.records), runtime.known, runtime.notes
        self.rounded = runtime.rounded

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *exc: Any) -> None:
        if kind is not None:
            self.restore()

    def restore(self) -> None:
        self.tensors.restore()
        for quantizer in self.runtime.modules():
            if isinstance(quantizer, Quantizer):
                quantizer._sync_flags()
        t = self.runtime.transforms
        t.folded, t.skipped, t.settled = self.transforms
        self.runtime.records, self.runtime.known, self.runtime.notes = self.graphs
        self.runtime.rounded = self.rounded
        if self.runtime.graphs is not None:
            self.runtime.graphs.forget()


def forget_baked(model: nn.Module) -> None:
    """Traces the example again where numbers that were read from parameters are in a graph, or where there is none."""
    runtime = runtime_of(model)
    if not runtime.records or any(r.trace.traced.baked for r in runtime.records):
        runtime.records = []
        runtime.retrace(model, describe_call(runtime.example))


def initialize_weights(model: nn.Module, *, smoothed: Collection[str] | None = None) -> None:
    """Initialises every weight quantizer from the parameter that it reads, and static operands from their values.

    ``smoothed``: only those of weights whose inputs' channels have factors, of inputs with these keys.
    """
    runtime = runtime_of(model)
    done: set[str] = set()
    for record in runtime.records:
        values = Values(model)
        for p in record.plan.points:
            if (
                p.what in ("weight", "static")
                and p.key not in done
                and (smoothed is None or p.gain in smoothed)
            ):
                done.add(p.key)
                quantizer = runtime.weights[p.key]
                assert isinstance(quantizer, Quantizer)
                quantizer.reset()
                value = values.of(p)
                if value.numel():
                    quantizer.fit([value], search=runtime.config.searches)


@torch.no_grad()
def input_ranges(model: nn.Module) -> dict[str, Tensor]:
    """By the key of an activation whose channels have factors: the largest magnitude (channels,) of what reads each."""
    found: dict[str, list[Tensor]] = {}
    for record in runtime_of(model).records:
        values = Values(model)
        for p in record.plan.points:
            if p.what == "weight" and p.gain is not None:
                found.setdefault(p.gain, []).append(values(p.node).abs().movedim(1, 0).flatten(1).amax(1))
    return {key: torch.stack(each).amax(0) for key, each in found.items()}


class Values:
    """Evaluates nodes that depend on parameters only."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def of(self, point: Point) -> Any:
        """What the quantizer of a weight or static operand gets."""
        value = self(point.node)
        if point.gain is None:
            return value
        owner: Any = runtime_of(self.model).activations[point.gain]
        return over_gain(value, owner.gain)

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
