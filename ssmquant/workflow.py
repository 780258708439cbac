"""prepare, calibrate, convert: the only orchestration."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.adapter import Adapter, find_adapter, get_adapter
from ssmquant.config import QConfig
from ssmquant.errors import CalibrationError, ConfigError, InputError
from ssmquant.graph.cuda_graphs import CudaGraphs
from ssmquant.graph.gains import fold_gains
from ssmquant.graph.plan import Point
from ssmquant.graph.prepared import (
    Undone,
    Values,
    attach,
    bind,
    copied,
    initialize_weights,
    input_ranges,
    move_plain_tensors,
    refuse_elsewhere,
)
from ssmquant.graph.rounding.inputs import measure_inputs
from ssmquant.graph.rounding.weights import round_weights, rounded_gains
from ssmquant.graph.runtime import Runtime, adopted_modules, is_prepared, runtime_of
from ssmquant.graph.sites import ancestors
from ssmquant.graph.trace import SEED, describe_call
from ssmquant.graph.transforms.calibration import measure, transform
from ssmquant.graph.transforms.statistics import Statistics
from ssmquant.graph.writer import ADOPTED
from ssmquant.modules import ActivationQuantizer, FrozenRange, PackedTensor
from ssmquant.ops.checks import outside_inference_mode
from ssmquant.progress import known_length, limited
from ssmquant.quantizers import DLS, PTS, RLQ, Quantizer, Token, get_quantizer
from ssmquant.quantizers.lsq import LearnedScale
from ssmquant.resume import CalibrationFile, Ranges, Sums
from ssmquant.synthetic import SYNTHETIC, synthetic_batches

__all__ = ["calibrate", "convert", "cuda_graph", "param_groups", "prepare"]


def prepare(
    model: nn.Module,
    qconfig: QConfig,
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str = "forward",
    adapter: str | Adapter | None = None,
) -> Any:
    """Returns a fake-quantized copy of ``model`` that trains like any module; ``model`` stays as it is.

    The copy is an instance of a subclass of the model's own class: same submodules, parameter names and methods, and
    a float checkpoint of the model loads strictly. Weights are initialised here, activation ranges by
    :func:`calibrate` or else by the first training batch.

    Args:
        model: Any module that computes with torch operators.
        qconfig: What to quantize, see :class:`QConfig`.
        example_inputs: Arguments of one call; only shapes and dtypes matter. Batch size and resolution stay free.
            May be omitted where an adapter knows the model.
        example_kwargs: Keyword arguments of that call.
        method: The method to prepare.
        adapter: Name of an adapter, or an ``Adapter``; by default the one that names the model's class.

    Raises:
        ConfigError: bad arguments, or no example where none is known.
        TraceError: the model's code cannot be traced; names the line.
        CoverageError: something would silently stay in float, or a rule matches nothing.
    """
    new = prepare_unchecked(model, qconfig, example_inputs, example_kwargs, method, adapter, check=True)
    for i, mod in enumerate(adopted_modules(new)):
        warnings.warn(
            f"{type(model).__name__} makes a {type(mod).__name__}({mod.extra_repr()}) in {method}, or keeps it in a "
            f"plain list, so that no checkpoint holds its weights. The prepared model has it as '{ADOPTED}.{i}': "
            f"trained, saved, and the same in every call. If it is made anew, its weights were drawn under seed {SEED}",
            stacklevel=2,
        )
    return new


@outside_inference_mode
def prepare_unchecked(
    model: nn.Module,
    qconfig: QConfig,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str = "forward",
    adapter: str | Adapter | None = None,
    *,
    check: bool = False,
) -> Any:
    """As :func:`prepare`, for a look at a model: what no site covers is no error, and stands in ``summary``."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"prepare: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(qconfig, QConfig):
        raise ConfigError(
            f"prepare: expected a QConfig, got {type(qconfig).__name__}; e.g. QConfig(w_bits=4, a_bits=4)"
        )
    if is_prepared(model):
        raise ConfigError(
            "this model is prepared already: prepare the float model again, or use QConfig rules"
        )
    # The compiler is slow to import, and there if the model is compiled.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    compiled = dynamo is not None and isinstance(model, dynamo.OptimizedModule)
    if compiled or isinstance(model, torch.jit.ScriptModule):
        made = "compiled" if compiled else "scripted"
        raise ConfigError(
            f"prepare: the model is {made}; prepare the one that it was made from, which can be compiled"
        )
    if not callable(getattr(model, method, None)):
        raise ConfigError(f"prepare: {type(model).__name__} has no method {method!r}")
    if isinstance(adapter, str):
        adapter = get_adapter(adapter)
    adapter = adapter or find_adapter(model)
    if example_inputs is None and not example_kwargs:
        if adapter is None or adapter.example is None:
            raise ConfigError(
                f"no adapter knows an example input for {type(model).__name__}: pass prepare(..., example_inputs=(x,))"
            )
        example_inputs = adapter.example(model)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    new = copied(model)
    runtime = Runtime(qconfig, adapter, method)
    attach(new, runtime)
    runtime.train(new.training)
    try:
        bound = bind(runtime.signature(new), tuple(example_inputs or ()), dict(example_kwargs or {}))
    except TypeError as e:
        raise ConfigError(f"prepare: the example does not fit {type(model).__name__}.{method}: {e}") from None
    trace_example(new, bound, check=check)
    _make_quantizers(new)
    initialize_weights(new)
    refuse_elsewhere(new, runtime)
    return new


def trace_example(
    model: nn.Module, bound: tuple[Any, ...], *, training: bool = True, check: bool = True
) -> None:
    """Traces the example call and makes the first records: one, or two where the code reads ``self.training``."""
    runtime = runtime_of(model)
    call = describe_call(bound)
    if not call.tensors:
        raise ConfigError("the example inputs hold no tensor")
    if any(t.numel() == 0 for t in call.tensors):
        raise InputError("an example input is empty: give one of a usual size")
    runtime.example = bound
    modes = {m: m.training for m in model.modules()}
    runtime.records = []
    try:
        for flag in (False, True):
            for m in modes:
                m.training = flag
            t = runtime.make_trace(model, call)
            runtime.records.append(runtime.build(model, call, t, check=check and not flag))
            if t.traced.reads_grad:  # the other grad mode has a graph of its own
                with torch.set_grad_enabled(not torch.is_grad_enabled()):
                    runtime.records.append(runtime.build(model, call, runtime.make_trace(model, call)))
            # Code that never asked for the mode has one graph for both.
            if not t.traced.training_read or not training:
                break
    finally:
        for m, flag in modes.items():
            m.training = flag
    runtime.known = {p.name for r in runtime.records for p in r.plan.points}
    notes = {n for r in runtime.records for n in r.trace.notes}
    for r in runtime.records:
        for name, where in r.trace.traced.baked.items():
            notes.add(
                f"parameter '{name}' is read as a Python number at {where}: its value is fixed in the graph"
            )
        notes |= {f"attribute '{name}' {how}" for name, how in r.trace.traced.rebound.items()}
    for i, mod in enumerate(adopted_modules(model)):
        notes.add(f"{type(mod).__name__} that the code makes or keeps unregistered: is '{ADOPTED}.{i}' here")
    runtime.notes = sorted(notes)


def ensure_traced(model: nn.Module) -> None:
    """Makes the first records again where there are none: of a model fresh from pickle."""
    runtime = runtime_of(model)
    if not runtime.records:
        trace_example(model, runtime.example, training=runtime.stage == "prepared")


def make_quantizer(point: Point, config: QConfig) -> Quantizer:
    """The quantizer of a point, as its scheme says."""
    scheme = point.scheme
    cls = get_quantizer(scheme.method)
    weight = point.what == "weight"
    kwargs: dict[str, Any] = {"official": config.official, **dict(scheme.options)}
    if issubclass(cls, Token):
        if point.channels is None or point.what != "activation":
            raise ConfigError(
                f"'{point.name}' cannot have the quantizer {scheme.method!r}, which is for inputs of projections and "
                "convolutions; see QConfig.scan_output"
            )
        kwargs["channel_axis"] = point.channels[0]
    elif issubclass(cls, PTS):
        if point.what != "activation" or any(site.kind == "scan" for site, _ in point.uses):
            raise ConfigError(
                f"'{point.name}' cannot have the quantizer {scheme.method!r}, which is for inputs of projections and "
                "convolutions; see QConfig.scan_output"
            )
        kwargs["position_axes"] = point.position_axes
    elif weight:
        kwargs |= {"axis": point.axis, "num_groups": point.groups} if point.groups > 1 else {}
    elif issubclass(cls, DLS):
        kwargs["axis"] = point.axis
    elif issubclass(cls, RLQ) and point.what == "activation" and point.channels is not None:
        kwargs |= {"channel_axis": point.channels[0], "channels": point.channels[1]}
    # Weights and static operands are the same on all ranks.
    try:
        quantizer = cls(scheme.bits, is_weight=point.what != "activation", **kwargs)
    except TypeError as e:
        raise ConfigError(f"options of quantizer {scheme.method!r} for '{point.name}': {e}") from None
    quantizer.leading = point.leading
    return quantizer


def _make_quantizers(model: nn.Module) -> None:
    runtime = runtime_of(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for record in runtime.records:
        for p in record.plan.points:
            if p.what == "activation":
                if p.key not in runtime.activations:
                    channels = p.channels if p.gain is not None else None
                    runtime.activations[p.key] = ActivationQuantizer(
                        p.name, make_quantizer(p, runtime.config), channels
                    )
            elif p.key not in runtime.weights:
                runtime.weights[p.key] = make_quantizer(p, runtime.config)
    runtime.to(device)
    move_plain_tensors(model, lambda t: t.to(device))
    runtime.train(model.training)


def reconfigured(prepared: nn.Module, config: QConfig) -> Any:
    """A copy of a prepared model under another configuration: its weights and transforms, new quantizers.

    Activation ranges are not known in it, and its method is traced anew.
    """
    new = copy.deepcopy(prepared)
    runtime = runtime_of(new, "prepared")
    runtime.config, runtime.graphs, runtime.known = config, None, None
    runtime.weights, runtime.activations = nn.ModuleDict(), nn.ModuleDict()
    trace_example(new, runtime.example, check=False)
    _make_quantizers(new)
    initialize_weights(new)
    return new


# ---- calibrate -----------------------------------------------------------------------------------------------------


def call_model(model: nn.Module, batch: Any, method: str | None = None) -> Any:
    """Calls a model with what a loader yields; ``method``: of one that is not prepared."""
    method = method or runtime_of(model).method
    call = model if method == "forward" else getattr(model, method)
    if isinstance(batch, Tensor):
        return call(batch)
    if isinstance(batch, Mapping):
        return call(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return call(batch[0])
    raise InputError(
        f"a batch of type {type(batch).__name__} is neither a tensor, a tuple or list (its first element is "
        "the input) nor a dict (keyword arguments); pass forward=lambda model, batch: ..."
    )


@torch.no_grad()
def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any] | None = None,
    max_batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    fit: bool = True,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> nn.Module:
    """Initialises the activation ranges from data, by squared error. Returns ``prepared``.

    Runs in evaluation mode, with quantized weights and float activations. The first time, ``QConfig.transforms`` are
    chosen before, from a pass of the float model over the same batches: those that all graphs of the model can have, of
    both modes and of the calls that the batches make. Several ranks fold what the first one decides. Meanwhile the
    batches, and a copy of the model's tensors to go back to, are kept in memory.

    With ``QConfig.rounding="gptq"`` a last pass, of the quantized model, measures what weights multiply, and they are
    rounded for it, in place (several ranks take what the first one has). Weights that are on their levels, as after a
    calibration before, stay as they are, and so do the factors of their inputs; only ranges are measured anew.

    Args:
        batches: An iterable of what the prepared method takes. A tensor is passed as it is, of a tuple or list the
            first element, a dict as keywords. None: synthetic images (:func:`ssmquant.synthetic_batches`), with a
            warning, as real ones are better.
        max_batches: Stop after so many.
        forward: ``forward(model, batch)`` overrides how a batch is passed.
        fit: False leaves the quantizers as they were trained and only measures, in the quantized model, the ranges that
            ``convert(dls="frozen")`` uses: do so after fine-tuning.
        progress: Show a progress bar; by default where stderr is a terminal and rich is installed.
        checkpoint: A file (``"calibration.safetensors"``) for what was collected so far. It is written now and then,
            and when an exception or Ctrl-C ends the call; a next call, also of another process, with the same model
            and the same batches in the same order leaves out those that are done, with the same result bit for bit. It
            is removed at the end. Of several ranks each has a file of its own.
        checkpoint_every: Seconds between two writes, at least (writing takes no more than a tenth of the time).

    Raises:
        CalibrationError: there is no batch, a value is NaN or inf (names where), or the batches are not those that the
            checkpoint has seen.
        FormatError: the checkpoint is damaged, or of another model, configuration or number of batches.

        Whatever is raised (Ctrl-C, too), the model is left as it was.
    """
    runtime = runtime_of(prepared, "prepared")
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"calibrate: max_batches={max_batches}")
    by_key = {k: m for k, m in runtime.activations.items() if isinstance(m, ActivationQuantizer)}
    quantizers = list(by_key.values())
    transforms = fit and bool(runtime.config.transforms) and not runtime.transforms.settled
    rounds = fit and runtime.config.rounding == "gptq"
    modes = {m: m.training for m in prepared.modules()}
    if batches is None:
        warnings.warn(
            "calibrate without batches measures ranges on synthetic images: real ones, a few of those that the model "
            "is for, are better",
            stacklevel=3,  # no_grad wraps this function
        )
        batches = synthetic_batches(prepared, min(max_batches or SYNTHETIC, SYNTHETIC))
    total = known_length(batches, max_batches)
    file = CalibrationFile(checkpoint, prepared, fit=fit, total=total, every=checkpoint_every)
    undo: Undone | None = None
    graphs, runtime.graphs = runtime.graphs, None  # what is collected waits for the GPU
    try:
        prepared.eval()
        if transforms or rounds:
            batches = list(limited(batches, max_batches, False))
            if batches:
                ensure_traced(prepared)
                undo = Undone(prepared)  # of a failure in the passes below, too
                if transforms:
                    _transform(prepared, batches, forward or call_model, file, progress)
        for q in quantizers:
            q.start(passes=fit)
        ranges = file.start("ranges", Ranges(quantizers))
        for batch in ranges.over(limited(batches, max_batches, progress)):
            (forward or call_model)(prepared, batch)
        if ranges.count == 0:
            raise CalibrationError(
                "calibrate: there was no batch; check the loader (or pass a list, not a used-up iterator)"
            )
        if quantizers and not any(q.stats for q in quantizers):
            raise CalibrationError("calibrate: the batches reached no quantizer (are they empty?)")
        undo = undo or Undone(prepared, weights=False)
        kept = rounded_gains(prepared) if rounds else set()
        read = input_ranges(prepared) if fit and runtime.config.smooth_weights else {}
        for k, q in by_key.items():
            smooth = None if k in kept else runtime.config.smooth
            q.finish(search=runtime.config.searches, smooth=smooth, weights=read.get(k))
        smoothed = {k for k, q in by_key.items() if q.gain is not None} - kept
        if fit and smoothed:
            initialize_weights(prepared, smoothed=smoothed)
        if rounds:
            shown = limited(batches, None, progress, "measuring for GPTQ")
            round_weights(prepared, measure_inputs(prepared, shown, forward or call_model))
        file.finish()
    except BaseException:
        try:
            file.save()
        finally:
            for q in quantizers:
                q.abandon()
            if undo is not None:
                undo.restore()
        raise
    finally:
        runtime.graphs = graphs
        if graphs is not None:
            graphs.forget()  # what was captured knows the quantizers as they were
        for m, flag in modes.items():
            m.training = flag
    return prepared


def _transform(
    prepared: nn.Module,
    batches: list[Any],
    forward: Callable[[nn.Module, Any], Any],
    file: CalibrationFile,
    progress: bool | None,
) -> None:
    """Chooses the transforms and folds them into the weights; graphs and weights' quantizers follow."""
    # Not in inference mode: its tensors cannot be traced, nor trained with.
    with torch.inference_mode(False), torch.no_grad():
        statistics = Statistics()
        watched = file.start("transforms", Sums(statistics))
        shown = limited(batches, None, progress, "choosing transforms")
        changed, placed = transform(prepared, *measure(prepared, watched.over(shown), forward, statistics))
        if placed:
            trace_example(prepared, runtime_of(prepared).example)
        if changed:
            initialize_weights(prepared)


def cuda_graph(model: nn.Module, *, max_graphs: int = 4) -> nn.Module:
    """From now on calls on a GPU replay CUDA graphs: one launch for the forward pass, one for the backward pass.

    For loops that call the model from Python; results, gradients and the loop itself stay as they are. A call is
    captured when one of its kind (shapes, dtypes, modes, autocast) comes for the second time. What cannot be captured
    runs as before, with a warning, and so does, without one, a call while the last still waits for its backward pass
    (there is one set of activations). Copies and pickles of the model capture anew.

    A graph of a deployed model is of its tensors, modules and hooks as they were. ``to`` and ``load_state_dict`` are
    noticed at once, other changes within a tenth of a second.

    A call takes one backward pass: a second one (``retain_graph``) raises RuntimeError. Calls of a kind from several
    threads or on several streams take turns.

    Args:
        model: prepared or deployed; changed in place. A prepared one is captured with its gradients.
        max_graphs: kinds of calls to keep graphs of, each with the memory of a whole pass; 0 turns graphs off.

    Returns:
        ``model``.

    Raises:
        ConfigError: ``model`` is neither prepared nor deployed, or ``max_graphs`` is negative.
    """
    runtime = runtime_of(model)
    if max_graphs < 0:
        raise ConfigError(f"cuda_graph: max_graphs={max_graphs}, expected 0 or more")
    runtime.graphs = CudaGraphs(max_graphs) if max_graphs else None
    return model


# ---- training ------------------------------------------------------------------------------------------------------


def param_groups(
    prepared: nn.Module, lr: float, weight_decay: float = 0.0, quantizer_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: the model's own, and the quantizers' scalars without weight decay.

    Args:
        lr, weight_decay: For the model's parameters.
        quantizer_lr: For the quantizers' scalars; ``lr`` by default, as published.
    """
    runtime = runtime_of(prepared, "prepared")
    ours = {id(p) for p in runtime.parameters()}
    own = [p for p in prepared.parameters() if id(p) not in ours and p.requires_grad]
    scalars = [p for p in runtime.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": own, "lr": lr, "weight_decay": weight_decay}]
    if scalars:
        groups.append(
            {"params": scalars, "lr": lr if quantizer_lr is None else quantizer_lr, "weight_decay": 0.0}
        )
    return groups


# ---- convert -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@outside_inference_mode
def convert(prepared: nn.Module, dls: str = "dynamic", float_dtype: torch.dtype | None = None) -> Any:
    """Returns a deployed copy: weights and static operands as packed integer codes. ``prepared`` stays trainable.

    Args:
        prepared: A prepared model, calibrated or trained.
        dls: ``"dynamic"`` keeps DLS's statistics per sample, exactly as trained; ``"frozen"`` uses calibrated ranges,
            so that outputs do not depend on tiles or batches (not the trained function: measure the ranges after
            training with ``calibrate(..., fit=False)``, and check the accuracy).
        float_dtype: dtype of the parameters that stay in float (``torch.float16`` makes the file smaller; they are
            cast back when the model runs, so activations keep their dtype).

    Raises:
        ConfigError: not a prepared model, or bad arguments.
        NotCalibratedError: activation ranges are not known.
    """
    runtime_of(prepared, "prepared")
    if dls not in ("dynamic", "frozen"):
        raise ConfigError(f"convert: dls={dls!r}: expected 'dynamic' or 'frozen'")
    if float_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"convert: float_dtype={float_dtype}: expected float32, float16, bfloat16 or None")
    ensure_traced(prepared)
    new = copy.deepcopy(prepared).eval()
    rt = runtime_of(new)
    # What runs in training only (an auxiliary head) is not deployed, and needs no range.
    rt.records = [r for r in rt.records if not any(r.mode.values())]
    used = {p.key for r in rt.records for p in r.plan.points}
    for store in (rt.activations, rt.weights):
        for key in set(store) - used:
            del store[key]
    for q in rt.activations.values():
        if isinstance(q, ActivationQuantizer):
            q.require_range("before converting")
    for record in rt.records:
        values = Values(new)
        for p in record.plan.points:
            quantizer = rt.weights[p.key] if p.what != "activation" else None
            if isinstance(quantizer, Quantizer):
                rule = quantizer.shift if isinstance(quantizer, LearnedScale) else "learned"
                rt.weights[p.key] = PackedTensor.from_qtensor(quantizer.encode(values.of(p)), rule)
    if dls == "frozen":
        for m in rt.activations.values():
            if isinstance(m, ActivationQuantizer) and isinstance(m.quantizer, DLS):
                m.quantizer = FrozenRange.from_dls(m)
    fold_gains(new, (r.plan for r in rt.records), rt.activations)
    rt.stage = "deployed"
    rt.rebuild(new)
    drop_parameters(new)
    if float_dtype is not None:
        halve(new, float_dtype)
    for parameter in new.parameters():
        parameter.requires_grad_(False)
    return new.eval()  # the packed tensors are new


def drop_parameters(model: nn.Module) -> None:
    """Removes the parameters that no graph reads any more; their shapes stay known, for tracing again."""
    runtime = runtime_of(model)
    needed = {str(n.target) for r in runtime.records for n in r.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for r in runtime.records for n in r.graph.nodes if n.op == "call_module"}
    packed: set[str] = set()
    for r in runtime.records:
        for p in r.plan.points:
            if p.what == "weight" and p.parameter:
                packed.add(p.parameter)
            elif p.what == "static":
                packed |= {str(n.target) for n in ancestors(p.node) if n.op == "get_attr"}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    ids = {id(by_name[n]) for n in packed if n in by_name}
    keep = {id(by_name[n]) for n in needed if n in by_name}
    firsts: dict[int, str] = {}
    for name, parameter in by_name.items():
        first = firsts.setdefault(id(parameter), name)
        if first != name:
            runtime.tied[name] = first
        owner, _, attr = name.rpartition(".")
        if (
            id(parameter) in ids
            and id(parameter) not in keep
            and owner not in called
            and not name.startswith("_ssmquant.")
        ):
            runtime.dropped[name] = (tuple(parameter.shape), parameter.dtype)
            model.get_submodule(owner)._parameters[attr] = None


def halve(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the float remainder to ``dtype``; values are kept in their own dtype, so that the graph is the same."""
    runtime = runtime_of(model)
    ours = {id(p) for p in runtime.parameters()} | {id(b) for b in runtime.buffers()}
    for p in model.parameters():
        if id(p) not in ours and p.is_floating_point():
            p.data = p.data.to(dtype).to(p.dtype)
    runtime.float_dtype = dtype
