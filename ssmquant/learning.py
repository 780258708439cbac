"""Learning of ranges alone, on unlabelled data, against the float model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ssmquant.errors import CalibrationError, ConfigError, InputError
from ssmquant.graph.prepared import evaluating
from ssmquant.graph.runtime import runtime_of
from ssmquant.progress import limited
from ssmquant.quantizers import Quantizer
from ssmquant.workflow import call_model

__all__ = ["learn_ranges"]

_LOSSES = ("cosine", "mse")


def learn_ranges(
    prepared: nn.Module,
    batches: Iterable[Any],
    reference: nn.Module,
    *,
    steps: int = 100,
    lr: float = 5e-3,
    loss: str = "cosine",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Learns the quantizers' own parameters (steps, shifts) from the float model's output. Returns ``prepared``.

    The joint learning of PTQ4VM (arXiv 2412.20386, JLSS), but of the whole model's output at once instead of one block
    after the other, and without its smoothing factors, which stay powers of two. Weights of the model do not change; no
    labels are needed. Runs in evaluation mode. Adam moves each step, and each shift in units of its step, by about
    ``lr`` of itself an update, less and less towards the end (cosine). The loss over all batches is measured before,
    after each turn of them and at the end, and what was best is kept: on these batches it is never worse than before.
    All batches and the float model's outputs are kept in memory, and those of one batch for its backward pass. Ranks of
    a distributed run do not talk to each other: give them the same batches, or load what one has learnt.

    Args:
        prepared: A calibrated model; changed in place.
        batches: An iterable of what the prepared method takes, as :func:`calibrate` has it; used in turn.
        reference: The float model that ``prepared`` was made of, with the same method. Modes are as before afterwards.
        steps: Updates, 1 or more.
        lr: Relative size of the first update, above 0.
        loss: ``"cosine"``: 1 - cos of the outputs of each sample (first axis), as published; ``"mse"``: squared error
            over the mean square of the float output, where lengths matter, as in restoration.
        forward: ``forward(model, batch)`` overrides how a batch is passed, to both models.
        progress: Show a progress bar; by default where stderr is a terminal and rich is installed.

    Raises:
        ConfigError: Not a prepared model, bad arguments, or quantizers without parameters (min-max has none).
        InputError: There is no batch, or the two models' outputs do not match.
        CalibrationError: An output, the loss or a gradient is NaN or inf.
        NotCalibratedError: Calibrate first.

        Whatever is raised, ``prepared`` is as it was.
    """
    runtime = runtime_of(prepared, "prepared")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"learn_ranges: steps={steps!r}, expected a whole number from 1")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise ConfigError(f"learn_ranges: lr={lr!r}, expected a number above 0")
    if loss not in _LOSSES:
        raise ConfigError(f"learn_ranges: loss={loss!r}, expected one of {', '.join(map(repr, _LOSSES))}")
    if not isinstance(reference, nn.Module) or reference is prepared:
        raise ConfigError("learn_ranges: reference is the float model that prepare was given")
    scalars = _scalars(runtime)
    if not scalars:
        raise ConfigError(
            "learn_ranges: no quantizer of this model has parameters that require gradients; "
            "min-max ranges have none, those of 'lsq' and 'pts' do"
        )

    def run(model: nn.Module, batch: Any) -> list[Tensor]:
        out = call_model(model, batch, runtime.method) if forward is None else forward(model, batch)
        return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]

    gradients = {p: p.requires_grad for p in prepared.parameters()}
    before = [p.detach().clone() for p, _ in scalars]
    graphs, runtime.graphs = runtime.graphs, None
    try:
        for p in gradients:
            p.requires_grad_(False)
        with evaluating(prepared, reference), torch.inference_mode(False):
            with torch.no_grad():
                pairs = [(batch, run(reference, batch)) for batch in batches]
            for p, _ in scalars:
                p.requires_grad_(True)
            with torch.enable_grad():
                _descend(prepared, pairs, scalars, run, steps, float(lr), loss, progress)
    except BaseException:
        with torch.no_grad():
            for (p, _), old in zip(scalars, before, strict=True):
                p.copy_(old)
        raise
    finally:
        runtime.graphs = graphs
        for p, flag in gradients.items():
            p.requires_grad_(flag)
    return prepared


def _scalars(runtime: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """The quantizers' parameters, each with the unit of its changes: a step, or its own mean magnitude."""
    found = []
    for q in runtime.modules():
        if not isinstance(q, Quantizer):
            continue
        step = getattr(q, "alpha", None)
        for p in q.parameters(recurse=False):
            if p.requires_grad:
                unit = p if step is None or step.shape != p.shape else step
                size = unit.detach().abs()
                found.append((p, size if unit is step else size.mean().expand_as(p)))
    return [(p, torch.where(size > 0, size, 1.0)) for p, size in found]


def _descend(
    prepared: nn.Module,
    pairs: list[tuple[Any, list[Tensor]]],
    scalars: list[tuple[nn.Parameter, Tensor]],
    run: Callable[[nn.Module, Any], list[Tensor]],
    steps: int,
    lr: float,
    loss: str,
    progress: bool | None,
) -> None:
    if not pairs:
        raise InputError("learn_ranges: there was no batch; pass a list, not a used-up iterator")
    if not all(bool(t.isfinite().all()) for _, wanted in pairs for t in wanted):
        raise CalibrationError("learn_ranges: the float model's own output holds NaN or inf")
    start = [p.detach().clone() for p, _ in scalars]
    moves = [torch.zeros_like(p, requires_grad=True) for p in start]
    optimizer = torch.optim.Adam(moves, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parameters = [p for p, _ in scalars]

    def place(positions: list[Tensor]) -> None:
        for position, old, (p, unit) in zip(positions, start, scalars, strict=True):
            p.copy_(old + position * unit)

    @torch.no_grad()
    def total() -> float:
        return _require_finite(
            sum(float(_distance(run(prepared, batch), wanted, loss)) for batch, wanted in pairs), lr
        )

    best, least = [m.detach().clone() for m in moves], total()
    turns = limited(itertools.islice(itertools.cycle(pairs), steps), None, progress, "learning ranges", steps)
    for n, (batch, wanted) in enumerate(turns, 1):
        value = _distance(run(prepared, batch), wanted, loss)
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        with torch.no_grad():
            for move, gradient, (_, unit) in zip(moves, found, scalars, strict=True):
                move.grad = None if gradient is None else gradient * unit
            sizes = [m.grad.abs().max() for m in moves if m.grad is not None]
            _require_finite(float(torch.stack([value.to(sizes[0]), *sizes]).sum()), lr)
            optimizer.step()
            schedule.step()
            place(moves)
        if (n % len(pairs) == 0 or n == steps) and (now := total()) < least:
            best, least = [m.detach().clone() for m in moves], now
    with torch.no_grad():
        place(best)


def _require_finite(value: float, lr: float) -> float:
    if not math.isfinite(value):
        raise CalibrationError(
            f"learn_ranges: an output, the loss or a gradient became NaN or inf (lr={lr}); all is as it was before"
        )
    return value


def _distance(outputs: list[Tensor], wanted: list[Tensor], loss: str) -> Tensor:
    """Mean over the tensors of an output, in float64: 1 - cos loses most digits of float32."""
    if [t.shape for t in outputs] != [t.shape for t in wanted] or not outputs:
        raise InputError(
            f"learn_ranges: the prepared model returns tensors of shapes {[tuple(t.shape) for t in outputs]}, the "
            f"float model {[tuple(t.shape) for t in wanted]}"
        )
    total = []
    for y, t in zip(outputs, wanted, strict=True):
        a, b = (v.double().reshape(len(v) if v.dim() > 1 else 1, -1) for v in (y, t))
        if loss == "cosine":
            total.append((1 - torch.cosine_similarity(a, b, dim=1, eps=1e-30)).mean())
        else:
            total.append((a - b).square().mean() / b.square().mean().clamp(min=1e-30))
    return torch.stack(total).mean()
