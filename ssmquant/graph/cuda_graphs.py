"""CUDA graphs of prepared and deployed models: the forward pass is one launch, and so is the backward pass in training.

A model with hundreds of quantizers launches thousands of small kernels, which takes Python longer than the GPU. They
are captured once for each kind of call and then launched together, in the user's own training loop.
"""

from __future__ import annotations

import operator
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from ssmquant.ops.checks import recorded
from ssmquant.ops.selection import choices
from ssmquant.quantizers import Quantizer
from ssmquant.quantizers.bank import hooks_of

__all__ = ["CudaGraphs", "restorer"]

_NUMBERS = {bool, int, float, str}
_RESULTS = (Tensor, *_NUMBERS, type(None))

_SECONDS = 0.1  # between looks at a deployed model
_ALIKE = 2  # calls that replay the same graph, before the next one is taken to
_WARM_UP = 3  # runs before a capture: they compile and tune kernels, and allocate


def _capture(work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """What ``work`` returns, in memory of the graph, and the function that launches the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return result, graph.replay


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and of a GPU's."""
    gpu = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if gpu else [])]


def restorer(model: nn.Module, plain: Sequence[Tensor], device: torch.device) -> Callable[[], None]:
    """A function that gives buffers, ``plain`` tensors and the random states the values that they have now.

    Quantizers keep a range that the runs in between initialised: it is right, and they know of it in Python too. What a
    deployed model has of ours nobody writes to, and kernels would take it for another one afterwards.
    """
    ours = {id(b) for m in model.modules() if isinstance(m, Quantizer) for b in m.buffers(recurse=False)}
    runtime: Any = model._modules.get("_ssmquant")
    if runtime is not None and runtime.stage == "deployed":
        ours |= {id(b) for b in runtime.buffers()}
    tensors = [(t, t.detach().clone()) for t in (*model.buffers(), *plain) if id(t) not in ours]
    random = _random_states(device)

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in tensors:
            tensor.copy_(value)
        torch.set_rng_state(random[0])
        for state in random[1:]:
            torch.cuda.set_rng_state(state, device)

    return restore


@contextmanager
def _undone(model: nn.Module, plain: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Runs on a stream of its own that leave no trace."""
    restore = restorer(model, plain, device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.synchronize(device)
        restore()


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[list[Tensor]]:
    """The trained parameters, in their order, as others with the same memory.

    Autograd has one node for each parameter, which belongs to the stream it was made on: while the user's loop still
    holds its last loss, a backward pass that is captured would wait for the stream of that one.
    """
    others: dict[nn.Parameter, nn.Parameter] = {}
    places = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                others.setdefault(p, nn.Parameter(p.detach()))
                places.append((module._parameters, name, p))
    for table, name, p in places:
        table[name] = others[p]
    try:
        yield [others[p] for p in others]
    finally:
        for table, name, p in places:
            table[name] = p


@contextmanager
def _moved(model: nn.Module, names: Sequence[str], device: torch.device) -> Iterator[list[Tensor]]:
    """Plain tensors of the model that lie on the CPU, as copies on the GPU: a captured pass cannot bring them there."""
    places, copies = [], []
    for name in names:
        owner, _, attr = name.rpartition(".")
        module = model.get_submodule(owner)
        value = getattr(module, attr, None)
        if isinstance(value, Tensor) and value.device.type == "cpu":
            places.append((module, attr, value))
            copies.append(value.to(device))
    for (module, attr, _), copy in zip(places, copies, strict=True):
        setattr(module, attr, copy)
    try:
        yield copies
    finally:
        for module, attr, value in places:
            setattr(module, attr, value)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class _Use:
    """One replay of a forward pass, alive as long as something may still ask for its backward pass."""

    __slots__ = ("__weakref__",)


class _Graph:
    """The captured passes of one kind of call, on inputs and outputs of its own.

    There is one set of activations. While a forward pass waits for its backward pass, ``waits``: another replay would
    write over what it needs.
    """

    def __init__(self, record: Any, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.use: weakref.ref[_Use] | None = None
        self.lock = threading.Lock()
        self.stream: torch.cuda.Stream | None = None
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # or a graph would use the weights as cast before it
        record.plain_tensors(model)
        try:
            with _moved(model, record.plain, inputs[0].device) as copies:
                self._make(record, model, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.kept = copies, record.made(model)  # the graph reads their memory

    def _make(self, record: Any, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.detach().clone() for x in inputs]
        wanted = [x.requires_grad for x in inputs]
        leaves: list[Tensor] = []
        live: list[Any] = []
        grads: list[Tensor] = []

        def forward() -> list[Any]:
            live.clear()
            given = [x.detach().requires_grad_(w) for x, w in zip(self.inputs, wanted, strict=True)]
            with _stand_ins(model) as parameters:
                leaves[:] = [x for x in (*given, *parameters) if x.requires_grad]
                live[:], self.spec = pytree.tree_flatten(record(model, given))
            odd = [type(x).__name__ for x in live if not isinstance(x, _RESULTS)]
            if odd:
                raise RuntimeError(f"its result holds a {odd[0]}, which every call would share")
            # A detached tensor keeps the one it is of, and with it the autograd graph of the capture.
            return [x.data if isinstance(x, Tensor) else x for x in live]

        def backward() -> dict[torch.dtype, Tensor]:
            ends = [x for x in live if _differentiable(x)]
            return self._joined(torch.autograd.grad(ends, leaves, grads, allow_unused=True))

        device = self.inputs[0].device
        with _undone(model, record.plain_tensors(model), device):
            random = _random_states(device)
            for _ in range(_WARM_UP):
                forward()
                self.needed = [_differentiable(x) for x in live]
                grads[:] = [torch.zeros_like(x) for x in live if _differentiable(x)]
                if grads:
                    backward()
            now = _random_states(device)
            self.draws = not all(torch.equal(a, b) for a, b in zip(now, random, strict=True))
        pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.outputs, self.replay_forward = _capture(forward, pool)
        if grads:
            self.joined, self.replay_backward = _capture(backward, pool)
        live.clear()
        self.leaves = leaves  # their memory, for a backward pass after a parameter's data were replaced
        self.grads = grads
        self.wanted = wanted
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def _joined(self, grads: Sequence[Tensor | None]) -> dict[torch.dtype, Tensor]:
        """Gradients end to end, so that the copies that a call returns are one launch."""
        self.parts = [None if g is None else (g.dtype, g.shape) for g in grads]
        kinds = dict.fromkeys(g.dtype for g in grads if g is not None)
        return {k: torch.cat([g.reshape(-1) for g in grads if g is not None and g.dtype == k]) for k in kinds}

    def forward(self, inputs: Sequence[Tensor]) -> list[Any]:
        with self.lock:  # there is one set of inputs and outputs, for all threads and streams
            if inputs[0].is_cuda:
                stream = torch.cuda.current_stream(inputs[0].device)
                if self.stream is not None and stream != self.stream:
                    stream.wait_stream(self.stream)
                self.stream = stream
            with torch.no_grad():
                for own, x in zip(self.inputs, inputs, strict=True):
                    own.copy_(x)
            self.replay_forward()
            return [x.clone() if isinstance(x, Tensor) else x for x in self.outputs]

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether they can be copied to the graph's own ones."""
        kinds = [[(x.shape, x.dtype, x.device) for x in tensors] for tensors in (inputs, self.inputs)]
        return kinds[0] == kinds[1] and (
            torch.is_inference_mode_enabled() or not self.inputs[0].is_inference()
        )

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        for own, g in zip(self.grads, grads, strict=True):
            own.copy_(g)
        self.replay_backward()
        rest = {}
        for kind, joined in self.joined.items():
            sizes = [part[1].numel() for part in self.parts if part is not None and part[0] == kind]
            rest[kind] = iter(joined.clone().split(sizes))
        return [None if part is None else next(rest[part[0]]).view(part[1]) for part in self.parts]

    def waits(self) -> bool:
        return self.use is not None and self.use() is not None

    def versions(self) -> int:
        """Changes whenever a parameter is written to."""
        return sum(p._version for p in self.parameters)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        if self.grads:
            leaves = (x for x, wanted in zip(inputs, self.wanted, strict=True) if wanted)
            values = list(_Replay.apply(self, inputs, *leaves, *self.parameters))
        else:
            values = self.forward(inputs)
        return pytree.tree_unflatten(values, self.spec)


class _Replay(torch.autograd.Function):
    """``leaves``: the inputs that need gradients, and the parameters."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, inputs: Sequence[Tensor], *leaves: Tensor) -> tuple[Any, ...]:
        ctx.graph, ctx.use, ctx.versions = graph, _Use(), graph.versions()
        graph.use = weakref.ref(ctx.use)
        values = graph.forward(inputs)
        plain = [
            v for v, needed in zip(values, graph.needed, strict=True) if isinstance(v, Tensor) and not needed
        ]
        ctx.mark_non_differentiable(*plain)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        graph = ctx.graph
        if ctx.use is None:
            raise RuntimeError(
                "cuda_graph: a second backward pass through one call of the model. The activations of a replayed call "
                "serve one backward pass: add the losses up before it, or turn graphs off with "
                "ssmquant.cuda_graph(model, max_graphs=0)"
            )
        if ctx.versions != graph.versions():
            raise RuntimeError(
                "cuda_graph: a parameter was changed in place between the forward and the backward pass"
            )
        ctx.use = None
        return None, None, *graph.backward([g for g, n in zip(grads, graph.needed, strict=True) if n])


def _capturable(tensors: Sequence[Tensor]) -> bool:
    """Whether a call with these inputs can be captured: ordinary tensors of one GPU, and nothing traces or captures."""
    return (
        bool(tensors)
        and all(t.is_cuda and type(t) is Tensor and t.device == tensors[0].device for t in tensors)
        and not recorded()
        and not torch.cuda.is_current_stream_capturing()
    )


def _modules(model: nn.Module) -> list[nn.Module]:
    """As ``model.modules()``, which makes a name of each on the way and takes longer than all the rest of a call."""
    found: dict[int, nn.Module] = {id(model): model}
    todo = [model]
    while todo:
        for m in todo.pop()._modules.values():
            if m is not None and id(m) not in found:
                found[id(m)] = m
                todo.append(m)
    return list(found.values())


def _constants(module: nn.Module) -> tuple[Any, ...]:
    """What a module keeps in Python that decides what its call computes: of quantizers, and of PyTorch's own modules.

    What the user's modules keep is in the graph, as it was when they were traced.
    """
    if isinstance(module, Quantizer):
        return module.constants()
    if module.__module__.startswith("torch."):
        return tuple([v for v in vars(module).values() if type(v) in _NUMBERS])
    return ()


def _state(record: Any, model: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """What a captured call relies on, compared before each replay, and what has to stay alive for that.

    The model's tensors, and the plain ones that the graph reads: where and how they lie, which are trained. Its
    modules: modes, hooks, what they keep in Python. Nothing here waits for the GPU.
    """
    modules = _modules(model)
    tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
    tensors = [t for table in tables for t in table.values() if t is not None] + record.plain_tensors(model)
    # Kernels of a deployed model read what was made of its tensors.
    versions = [0 if t.is_inference() else t._version for t in tensors] if record.is_deployed(model) else []
    state: list[Any] = [
        *versions,
        *((id(t), t.data_ptr(), t.requires_grad, t.dtype, t.shape, t.stride()) for t in tensors),
    ]
    state += [(type(m), m.training, hooks_of(m), _constants(m)) for m in modules]
    return state, tensors


def _choices(kind: str) -> tuple[Any, ...]:
    """Settings of the process that decide which kernels a call launches."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        choices(),
    )


class _Watch:
    """Whether a deployed model is what it was when this was made: tensors, modules, hooks, modes and numbers.

    To look takes longer than a small image takes the GPU, however it is done: ten thousand objects are nowhere near the
    processor. So it is done once in ``_SECONDS``; ``Runtime`` tells of what changes the whole model.
    """

    def __init__(self, record: Any, model: nn.Module) -> None:
        modules = _modules(model)
        tables = [
            (m._parameters, m._buffers, m._modules, m._forward_hooks, m._forward_pre_hooks) for m in modules
        ]
        self._tables: list[Any] = list(chain.from_iterable(tables))
        self._held = list(chain.from_iterable([d.values() for d in self._tables]))
        self._tensors = [t for t in self._held if isinstance(t, Tensor) and not t.is_inference()]
        self._tensors += [t for t in record.plain_tensors(model) if not t.is_inference()]
        known = [m for m in modules if isinstance(m, Quantizer) or type(m).__module__.startswith("torch.nn")]
        self._numbers = [(vars(m), k) for m in known for k, v in vars(m).items() if type(v) in _NUMBERS]
        plain = [n.rpartition(".") for n in record.plain]
        self._plain = [(vars(model.get_submodule(owner)), name) for owner, _, name in plain]
        self._plain += [(vars(m), "forward") for m in modules]
        self._held += [d.get(k) for d, k in self._plain]
        self._seen = self._look()
        self._next = time.monotonic() + _SECONDS

    def _look(self) -> tuple[Any, ...]:
        entries = chain.from_iterable([d.values() for d in self._tables])
        return (
            list(map(id, entries)),
            list(map(_version, self._tensors)),
            [d.get(k) for d, k in self._numbers],
            [id(d.get(k)) for d, k in self._plain],
        )

    def same(self) -> bool:
        """Nothing has changed, or had when this was last looked at."""
        now = time.monotonic()
        if now < self._next:
            return True
        self._next = now + _SECONDS
        return self._look() == self._seen


_version = operator.attrgetter("_version")


@dataclass
class _Known:
    """A kind of call: what it relies on, and its graph once it is captured. ``held``: ids are of what is alive."""

    record: Any
    state: list[Any]
    held: list[Tensor]
    graph: _Graph | None = None
    refused: bool = False
    watch: _Watch | None = None


@dataclass
class _Ahead:
    """A graph that was replayed before it was known whether it serves the call, and its result."""

    known: _Known
    result: Any


class CudaGraphs:
    """The graphs of a model, each captured when a call of its kind comes for the second time.

    Args:
        most: graphs that are kept, each with the memory of a whole pass; the one longest unused goes first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.known: OrderedDict[Any, _Known] = OrderedDict()
        self._last: _Known | None = None
        self._alike = 0  # calls in a row that ``_last`` has served, counted to ``_ALIKE``

    def forget(self) -> None:
        """Captures anew."""
        self.known.clear()
        self._last = None

    def ahead(self, bound: Sequence[Any]) -> _Ahead | None:
        """Replays the last graph where a call, ``bound``, looks like those before it, so that the GPU has begun.

        Whether that was right is seen while the GPU is busy; a replay in vain leaves no trace. Graphs that draw random
        numbers are not replayed so.
        """
        if torch.compiler.is_compiling():  # else compiled code would depend on the calls before
            return None
        last = self._last
        if last is None or last.graph is None or last.graph.draws or self._alike < _ALIKE:
            return None
        tensors = [x for x in bound if isinstance(x, Tensor)]
        if not _capturable(tensors) or not last.graph.fits(tensors):
            return None
        self._alike = 0  # until this turns out to be right
        return _Ahead(last, last.graph(tensors))

    def _served(self, known: _Known, ahead: _Ahead | None, tensors: Sequence[Tensor]) -> Any:
        """The result of a deployed model's graph."""
        if ahead is not None and ahead.known is known:
            self._alike = _ALIKE
            return ahead.result
        self._alike = min(self._alike + 1, _ALIKE) if known is self._last else 1
        self._last = known
        assert known.graph is not None
        return known.graph(tensors)

    def __call__(
        self, record: Any, model: nn.Module, tensors: Sequence[Tensor], ahead: _Ahead | None = None
    ) -> Any:
        """``record(model, tensors)``, replayed if possible; ``ahead``: what has been."""
        if not _capturable(tensors) or _has_any_global_hook():
            return record(model, tensors)
        shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)
        key = id(record), shapes, _choices(tensors[0].device.type)
        known = self.known.get(key)
        if known is not None and known.graph is not None and known.watch is not None:
            self.known.move_to_end(key)
            if not known.graph.draws:
                result = self._served(known, ahead, tensors)  # leaves no trace, should it be in vain
                if known.watch.same():  # looked at while the GPU is busy
                    return result
            elif known.watch.same():
                return known.graph(tensors)
        state, held = _state(record, model)
        if known is None or known.state != state:
            # The first call runs as it is: it may initialise quantizers, which waits for the GPU.
            self._keep(key, _Known(record, state, held))
            return record(model, tensors)
        self.known.move_to_end(key)
        if known.graph is None and not known.refused:
            try:
                if record.writes_inputs():
                    raise RuntimeError("it writes to its input")
                known.graph = _Graph(record, model, tensors)
                if record.is_deployed(model) and not known.graph.grads:
                    known.watch = _Watch(record, model)
            except RuntimeError as error:
                warnings.warn(
                    f"cuda_graph: this call cannot be captured and runs as it is ({str(error).splitlines()[0]})",
                    stacklevel=4,
                )
                known.refused = True
        if known.graph is None or known.graph.waits():
            return record(model, tensors)
        return known.graph(tensors)

    def _keep(self, key: Any, value: _Known) -> None:
        self._last = None
        self.known.pop(key, None)
        self.known[key] = value
        while len(self.known) > self.most:
            self.known.popitem(last=False)
