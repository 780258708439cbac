"""CUDA graphs of prepared and deployed models: the forward pass is one launch, and so is the backward pass in training.

A model with hundreds of quantizers launches thousands of small kernels, which takes Python longer than the GPU. They
are captured once for each kind of call and then launched together, in the user's own training loop.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

__all__ = ["CudaGraphs"]

_WARM_UP = 3  # runs before a capture: they compile and tune kernels, and allocate


def _capture(work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """What ``work`` returns, in memory of the graph, and the function that launches the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return result, graph.replay


@contextmanager
def _undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Runs on a stream of its own that leave no trace: buffers and the random state become what they were."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    random = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize(device)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    torch.cuda.set_rng_state(random, device)


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


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class _Graph:
    """The captured passes of one kind of call, on inputs and outputs of its own."""

    def __init__(self, run: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor]) -> None:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # or a graph would use the weights as cast before it
        try:
            self._make(run, model, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _make(self, run: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor]) -> None:
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
                live[:], self.spec = pytree.tree_flatten(run(model, *given))
            # A detached tensor keeps the one it is of, and with it the autograd graph of the capture.
            return [x.data if isinstance(x, Tensor) else x for x in live]

        def backward() -> dict[torch.dtype, Tensor]:
            ends = [x for x in live if _differentiable(x)]
            return self._joined(torch.autograd.grad(ends, leaves, grads, allow_unused=True))

        with _undone(model, self.inputs[0].device):
            for _ in range(_WARM_UP):
                forward()
                self.needed = [_differentiable(x) for x in live]
                grads[:] = [torch.zeros_like(x) for x in live if _differentiable(x)]
                if grads:
                    backward()
        pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.outputs, self.replay_forward = _capture(forward, pool)
        if grads:
            self.joined, self.replay_backward = _capture(backward, pool)
        live.clear()
        self.grads = grads
        self.wanted = wanted
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def _joined(self, grads: Sequence[Tensor | None]) -> dict[torch.dtype, Tensor]:
        """Gradients end to end, so that the copies that a call returns are one launch."""
        self.parts = [None if g is None else (g.dtype, g.shape) for g in grads]
        kinds = dict.fromkeys(g.dtype for g in grads if g is not None)
        return {k: torch.cat([g.reshape(-1) for g in grads if g is not None and g.dtype == k]) for k in kinds}

    def forward(self, inputs: Sequence[Tensor]) -> list[Any]:
        with torch.no_grad():
            for own, x in zip(self.inputs, inputs, strict=True):
                own.copy_(x)
        self.replay_forward()
        return [x.clone() if isinstance(x, Tensor) else x for x in self.outputs]

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        for own, g in zip(self.grads, grads, strict=True):
            own.copy_(g)
        self.replay_backward()
        rest = {}
        for kind, joined in self.joined.items():
            sizes = [part[1].numel() for part in self.parts if part is not None and part[0] == kind]
            rest[kind] = iter(joined.clone().split(sizes))
        return [None if part is None else next(rest[part[0]]).view(part[1]) for part in self.parts]

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
        ctx.graph = graph
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
        return None, None, *graph.backward([g for g, n in zip(grads, graph.needed, strict=True) if n])


def _capturable(tensors: Sequence[Tensor]) -> bool:
    """Whether a call with these inputs can be captured: ordinary tensors of one GPU, and nothing traces or captures."""
    return (
        bool(tensors)
        and all(t.is_cuda and type(t) is Tensor and t.device == tensors[0].device for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.cuda.is_current_stream_capturing()
    )


def _state(model: nn.Module) -> list[Any]:
    """What a captured call relies on: where the model's tensors are, which are trained, which modules train."""
    tensors = [(p.data_ptr(), p.requires_grad) for p in model.parameters()]
    return [tensors, [b.data_ptr() for b in model.buffers()], [m.training for m in model.modules()]]


class CudaGraphs:
    """The graphs of a model, each captured when a call of its kind comes for the second time.

    Args:
        most: graphs that are kept, each with the memory of a whole pass; the one longest unused goes first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.known: OrderedDict[Any, tuple[Any, list[Any], Callable[..., Any] | None]] = OrderedDict()

    def __call__(self, record: Any, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """``record(model, tensors)``, replayed if possible."""
        if not _capturable(tensors):
            return record(model, tensors)
        kind = tensors[0].device.type
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind)
        shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)
        key = id(record), shapes, modes, torch.get_autocast_dtype(kind)
        state = _state(model)
        known = self.known.get(key)
        if known is None or known[1] != state:
            # The first call runs as it is: it may initialise quantizers, which waits for the GPU.
            self._keep(key, (record, state, None))
            return record(model, tensors)
        self.known.move_to_end(key)
        graph = known[2]
        if graph is None:
            try:
                graph = _Graph(lambda m, *xs: record(m, xs), model, tensors)
            except RuntimeError as error:
                warnings.warn(
                    f"cuda_graph: this call cannot be captured and runs as it is ({str(error).splitlines()[0]})",
                    stacklevel=4,
                )
                graph = partial(record, model)
            self.known[key] = record, state, graph
        return graph(tensors)

    def _keep(self, key: Any, value: tuple[Any, list[Any], Callable[..., Any] | None]) -> None:
        self.known.pop(key, None)
        self.known[key] = value
        while len(self.known) > self.most:
            self.known.popitem(last=False)
