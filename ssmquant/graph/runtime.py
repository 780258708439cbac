"""The state of a prepared model: picks, and if need be makes, the graph that serves a call.

``Runtime`` is the one child module that ``prepare`` adds. It holds the quantizers (or, after convert, the packed
tensors) and the traces, and finds the graph that fits a call: sizes, dtypes, flags and training mode that the user's
Python code branched on are guards, and a call that breaks one is traced again on fake tensors with the same sites.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _disable_current_modes

from ssmquant.adapter import Adapter
from ssmquant.config import QConfig
from ssmquant.errors import ConfigError, SsmquantError, TraceError
from ssmquant.graph.bank import bank_weights
from ssmquant.graph.cuda_graphs import CudaGraphs, restorer
from ssmquant.graph.deploy import deploy, kernels, left_out
from ssmquant.graph.fuse import Unfit, fuse
from ssmquant.graph.layers import faster_layers
from ssmquant.graph.moves import written_in
from ssmquant.graph.patches import PATCH_LOCK
from ssmquant.graph.plan import Plan, make_plan
from ssmquant.graph.regions import compile_graph
from ssmquant.graph.rewrite import rewrite
from ssmquant.graph.sites import find_sites
from ssmquant.graph.trace import Call, Shapes, Trace, is_leaf, run_once, same_graph, trace
from ssmquant.graph.transforms.edits import Transforms
from ssmquant.graph.writer import ADOPTED, Rules
from ssmquant.modules.deployed import Unchanged, engine_of
from ssmquant.ops.checks import outside_inference_mode, recorded
from ssmquant.ops.deployed.memory import Pool
from ssmquant.ops.nvrtc import CompileError
from ssmquant.ops.selection import selected
from ssmquant.quantizers.bank import hooks_of

__all__ = ["Record", "Runtime", "adopted_modules", "is_prepared", "runtime_of"]


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
    fused: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """What runs for a training step on a GPU, or deployed: made when it first does."""
    fitting: set[Any] = field(default_factory=set)
    """Forms and shapes of inputs that they are known to compute the same at."""
    deployed: dict[str, fx.Graph] = field(default_factory=dict)
    """Graphs of deployed models, by the device type that they are fused for."""
    plain: list[str] | None = None

    def __call__(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Runs the graph, in the form that suits the call."""
        form = _form(model, tensors)
        if form is None or _watched(model) or (form != TRAINING and self._leaves_out_what_acts(model, form)):
            return self.run(model, *tensors)
        runtime = runtime_of(model)
        if form == TRAINING:
            return self._run_fused(model, tensors, form)
        with runtime.memory.in_use(), runtime.unchanged.in_use(runtime.activations, runtime.weights):
            return self._run_fused(model, tensors, form)

    def _run_fused(self, model: nn.Module, tensors: Sequence[Tensor], form: str) -> Any:
        if form not in self.fused:
            self.fused[form] = self._fuse(model, form)
        key = form, *(t.shape for t in tensors)
        known = key in self.fitting
        restore = None
        if not known:
            written = tensors if self.writes_inputs() else ()
            restore = restorer(model, [*self.plain_tensors(model), *written], tensors[0].device)
        try:
            result = self.fused[form](model, *tensors)
        except (Unfit, CompileError) as error:  # in the middle: dropout has drawn, batch norms have counted
            if form == TRAINING and isinstance(error, CompileError):
                raise
            if restore is not None:
                restore()
            elif self.writes_inputs():
                raise
            self.fused[form] = self.run
            if isinstance(error, CompileError):
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"This model runs without kernels of its own: {reason}", stacklevel=2)
            result = self.run(model, *tensors)
        self.fitting.add(key)
        return result

    def kernels(self, model: nn.Module) -> dict[str, str]:
        """What computes sites on this machine, where it is not plain PyTorch on decoded values."""
        device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
        if device is None or runtime_of(model).stage != "deployed":
            return {}
        if engine_of(device).unavailable(device) is not None or self.fused.get(device.type) is self.run:
            return {}
        return kernels(self._deployed(model, device.type))

    def _deployed(self, model: nn.Module, device: str) -> fx.Graph:
        if device not in self.deployed:
            modes = self.trace.traced.sets_modes  # such as autocast for a part
            engine = engine_of(torch.device(device))
            self.deployed[device] = self.graph if modes else deploy(self.graph, model, engine)
        return self.deployed[device]

    def _leaves_out_what_acts(self, model: nn.Module, device: str) -> bool:
        """Whether a module that a deployed graph does without has hooks, or is in training mode by itself."""
        modules = map(model.get_submodule, left_out(self._deployed(model, device)))
        return any(m.training or hooks_of(m) for m in modules)

    def _fuse(self, model: nn.Module, form: str) -> Callable[..., Any]:
        if form != TRAINING:
            graph = self._deployed(model, form)
            return self.run if graph is self.graph else compile_graph(graph, model)[0]
        graph = rewrite(model, self.trace, self.plan, float_scans=True)
        fused = faster_layers(fuse(graph, model), model)
        return compile_graph(bank_weights(fused), model)[0]

    def is_deployed(self, model: nn.Module) -> bool:
        """Whether the model is converted."""
        return runtime_of(model).stage == "deployed"

    def made(self, model: nn.Module) -> list[Any]:
        """What a deployed model's kernels read that was made of its tensors."""
        return runtime_of(model).unchanged.values() if self.is_deployed(model) else []

    def plain_tensors(self, model: nn.Module) -> list[Tensor]:
        """The tensors that the graph reads and that are neither parameters nor buffers."""
        if self.plain is None:
            known = {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
            names = dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "get_attr")
            self.plain = [n for n in names if n not in known and isinstance(_get(model, n), Tensor)]
        values = [_get(model, n) for n in self.plain]
        return [v for v in values if isinstance(v, Tensor)]

    def writes_inputs(self) -> bool:
        """Whether the code writes to a tensor that it was given."""
        graph = self.trace.graph
        given = {n.meta.get("storage") for n in graph.nodes if n.op == "placeholder"}
        return not written_in(graph).isdisjoint(given)

    def accepts(self, model: nn.Module, call: Call) -> bool:
        if (
            self.static != call.static
            or self.kinds != call.kinds
            or (self.spec is not call.spec and self.spec != call.spec)
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


def _get(model: nn.Module, name: str) -> Any:
    owner, _, attr = name.rpartition(".")
    return getattr(model.get_submodule(owner), attr, None)


def _watched(model: nn.Module) -> bool:
    """Whether hooks want to see the calls of modules, some of which fused graphs leave out."""
    if _has_any_global_hook():
        return True
    runtime = runtime_of(model)
    stores = [runtime.activations] if runtime.stage == "prepared" else [runtime.activations, runtime.weights]
    children = [child for store in stores for child in store._modules.values() if child is not None]
    return any(hooks_of(m) for child in children for m in (child, *child._modules.values()) if m is not None)


TRAINING = "training"
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


def _form(model: nn.Module, tensors: Sequence[Tensor]) -> str | None:
    """Where fused kernels pay: ``TRAINING`` on a GPU, or of a deployed model its device's type. Not while tracing."""
    if not tensors or recorded() or selected("fuse") == "chunked":
        return None
    prepared, gradients = runtime_of(model).stage == "prepared", torch.is_grad_enabled()
    if prepared and model.training and gradients and all(t.is_cuda and type(t) is Tensor for t in tensors):
        return TRAINING
    device = tensors[0].device
    plain = device.type in ("cpu", "cuda") and all(
        t.device == device
        and type(t) in (Tensor, nn.Parameter)
        and t.numel()
        and t.dtype not in _OTHER_FLOATS
        for t in tensors
    )
    differentiable = gradients and any(t.requires_grad for t in tensors)
    if not prepared and plain and not differentiable and not torch.is_autocast_enabled(device.type):
        return device.type if engine_of(device).unavailable(device) is None else None
    return None


def _layout(call: Call) -> tuple[bool, ...]:
    return tuple(t.is_contiguous() for t in call.tensors)


def _autocast(call: Call) -> Any:
    kind = call.tensors[0].device.type if call.tensors else "cpu"
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return on and (kind, torch.get_autocast_dtype(kind))


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
        # Some kernels compute another function on AMD GPUs; a file remembers which one was meant.
        self.platform = "rocm" if torch.version.hip else "cuda"
        self.constants = Constants()
        self.transforms = Transforms()
        if config.transforms:
            self.transforms.forget()
        # While calibration measures the float model: what runs instead of the record that serves a call.
        self.instead: Callable[[Record], Record] | None = None
        self.records: list[Record] = []
        self.known: set[str] | None = None  # names of the points that may exist
        self.dropped: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.tied: dict[str, str] = {}  # further names of dropped parameters -> the first one
        self.instance_forward: Any = None
        self.example: tuple[Any, ...] = ()  # (static description) of the example call, for save and pickle
        self.notes: list[str] = []
        # How calibrate rounded each weight, by key; nothing where it did not.
        self.rounded: dict[str, str] = {}
        self.graphs: CudaGraphs | None = None
        self.float_dtype: torch.dtype | None = None
        self.memory, self.unchanged = Pool(), Unchanged()

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
        rules = self.rules(model)
        method = self.user_method(model)
        with PATCH_LOCK, _Stand(self, model), _Hidden(model):

            def run(shapes: Shapes) -> Any:
                return run_once(model, method, call, shapes, rules, unbind)

            made = Trace(run(call.shapes), [], [], call.shapes) if exact else trace(run, call.shapes)
        if rules.adopted:
            model._modules[ADOPTED] = nn.ModuleList(rules.adopted)
        return made

    def rules(self, model: nn.Module) -> Rules:
        a = self.adapter
        return Rules(
            is_leaf(a.leaf if a else ()),
            a.scans if a else (),
            a.functions if a else (),
            list(adopted_modules(model)),
            self.platform,
        )

    def adopt(self, model: nn.Module, t: Trace) -> None:
        """Gives a trace's constants and Functions a place in this module."""
        done: dict[str, str] = {}
        for traced in [x for x in (t.traced, t.other, t.sample) if x is not None]:
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
            self.transforms.write(model, t, scans)
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
            self._check_gains(plan)
            graph = rewrite(model, t, plan, deployed=self.stage == "deployed")
        run, code = compile_graph(bank_weights(graph))
        return Record(
            call.spec, call.static, call.kinds, call.meta, _layout(call), tuple(x.dim() for x in call.tensors),
            t.traced.training_read, _autocast(call), replace(t, other=None, sample=None), plan,
            _compile_guards(t), graph, code, run, [call.shapes],
        )  # fmt: skip

    def _check_gains(self, plan: Plan) -> None:
        """An input's channels have factors in all graphs or in none."""
        known = {p.key: p.gain for r in self.records for p in r.plan.points}
        for p in plan.points:
            if known.get(p.key, p.gain) != p.gain:
                raise TraceError(
                    f"what reads '{p.name}', or its input, differs from one call to another (of training and "
                    "evaluation, say), so that its channels cannot be evened out: use smooth=0"
                )

    def rebuild(self, model: nn.Module) -> None:
        """Writes every record's graph anew for the current stage."""
        records = []
        for r in self.records:
            with _Stand(self, model):
                graph = rewrite(model, r.trace, r.plan, deployed=self.stage == "deployed")
            run, code = compile_graph(bank_weights(graph))
            records.append(replace(r, graph=graph, run=run, code=code, fused={}, fitting=set(), deployed={}))
        self.records = records  # new ones: copies of the model share the old

    # ---- running -------------------------------------------------------------------------------------------------
    def select(self, model: nn.Module, call: Call) -> Record:
        """The record for a call, made if there is none yet."""
        record = self._serving(model, call)
        return record if self.instead is None else self.instead(record)

    def _serving(self, model: nn.Module, call: Call) -> Record:
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
        return self._verify_again(model, r, call)

    @outside_inference_mode
    def _verify_again(self, model: nn.Module, r: Record, call: Call) -> bool:
        again = self.make_trace(model, call, exact=True)
        self.adopt(model, again)
        try:
            with _Stand(self, model):
                self.transforms.write(model, again, self.adapter.scans if self.adapter else ())
        except TraceError:  # another graph, which may be found or made; else that says why not
            return False
        if same_graph(r.trace.traced, again.traced):
            r.verified.append(call.shapes)
            return True
        return False

    def retrace(self, model: nn.Module, call: Call) -> Record:
        self._refuse_while_compiling()
        return self._trace_again(model, call)

    @outside_inference_mode
    def _trace_again(self, model: nn.Module, call: Call) -> Record:
        with _disable_current_modes():  # what counts or records operators is not meant to see our own runs
            record = self.build(model, call, self.make_trace(model, call))
        self.records.append(record)
        if len(self.records) > _MOST_RECORDS:  # a number that differs at every call makes a graph each time
            del self.records[2]
        return record

    def _refuse_while_compiling(self) -> None:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            raise TraceError(
                "torch.compile, or torch.jit.trace, met a call for which there is no graph yet: call the model once, "
                "eagerly, with an input of these sizes, dtypes and flags before"
            )

    # ---- state ---------------------------------------------------------------------------------------------------
    def check_mode(self, training: bool) -> None:
        """Refuses to train what cannot be trained."""
        if training and self.stage == "deployed":
            raise SsmquantError(
                "a converted model holds packed codes and cannot be trained: train the prepared one and convert again"
            )

    def _apply(self, *args: Any, **options: Any) -> Runtime:  # of ``.to(..)`` of the model
        if self.graphs is not None:
            self.graphs.forget()
        return super()._apply(*args, **options)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        if self.graphs is not None:
            self.graphs.forget()
        super()._load_from_state_dict(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        new = Runtime.__new__(Runtime)
        memo[id(self)] = new
        for k, v in vars(self).items():
            # Graphs are never changed in place, so copies share them; only the set of records is each copy's own.
            if k == "graphs":
                new.graphs = None if v is None else CudaGraphs(v.most)
            else:
                new.__dict__[k] = list(v) if k == "records" else copy.deepcopy(v, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["graphs"] = None if self.graphs is None else CudaGraphs(self.graphs.most)
        state["instead"] = None
        state["records"] = []  # made again by the first call: graphs hold functions that pickle cannot name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "transforms" not in self._modules:  # of a version that had none
            self.transforms = Transforms()
        self.__dict__.setdefault("instead", None)
        self.__dict__.setdefault("rounded", {})


class _Stand:
    """While the user's code is traced after convert, empty parameters stand where packed ones were."""

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        self.runtime, self.model = runtime, model
        self.added: list[tuple[nn.Module, str]] = []

    def __enter__(self) -> None:
        shared: dict[str, nn.Parameter] = {}
        tensors = (*self.model.parameters(), *self.model.buffers())
        device = next((t.device for t in tensors), None)
        for name, (shape, dtype) in self.runtime.dropped.items():
            first = self.runtime.tied.get(name, name)
            owner, _, attr = name.rpartition(".")
            mod = self.model.get_submodule(owner)
            if mod._parameters.get(attr) is None:
                # One element, expanded: shape and dtype without the memory.
                p = nn.Parameter(
                    torch.zeros((), dtype=dtype, device=device).expand(shape), requires_grad=False
                )
                holder, _, held = first.rpartition(".")
                there = self.model.get_submodule(holder)._parameters.get(held)  # tied to one that stayed
                mod._parameters[attr] = shared.setdefault(first, p if there is None else there)
                self.added.append((mod, attr))

    def __exit__(self, *exc: Any) -> None:
        for mod, attr in self.added:
            mod._parameters[attr] = None


class _Hidden:
    """While the user's code is traced it meets nothing of ours: it may walk over its own children or parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        modules = self.model._modules
        self.ours = {k: modules.pop(k) for k in ("_ssmquant", ADOPTED) if k in modules}

    def __exit__(self, *exc: Any) -> None:
        self.model._modules.update(self.ours)


# ---- from a model to its runtime ------------------------------------------------------------------------------------


def adopted_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that the user's code makes in ``forward`` or keeps in plain lists, registered by the trace."""
    adopted = model._modules.get(ADOPTED)
    return list(adopted) if isinstance(adopted, nn.ModuleList) else []


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
    """Bound arguments as a call: defaults left away, what has a default by keyword, as a user would write it.

    Wrapped forwards (``def wrapper(self, *args, **kwargs)`` under another signature) look into what they are given.
    """
    parameters = list(sig.parameters.values())
    starred = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)

    def unbind(bound: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for p, value in zip(parameters, bound, strict=True):
            optional = p.default is not p.empty
            by_keyword = p.kind is p.POSITIONAL_OR_KEYWORD and optional and not starred
            if p.kind is p.VAR_POSITIONAL:
                args.extend(value)
            elif p.kind is p.VAR_KEYWORD:
                kwargs.update(value)
            elif p.kind is p.KEYWORD_ONLY or by_keyword:
                if not (optional and value is p.default):
                    kwargs[p.name] = value
            else:
                args.append(value)
        return tuple(args), kwargs

    return unbind
