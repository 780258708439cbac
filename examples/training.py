"""A training loop for restorers, classifiers and segmenters, float or prepared: plain PyTorch, resumable bit by bit,
GPU-efficient.

Per step the host only launches work: learning rates and losses stay on the device, the loss is read back
once every ``log_every`` steps. A step runs in one of three ways (:class:`Step`): eagerly, with the model
compiled (``compile``), or as one launch of a CUDA graph that holds forward, backward, clipping, Adam and EMA
(``cuda_graph``); a compiled model can be in the graph too.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant.errors import ConfigError, FormatError, SsmquantError


class Data(Protocol):
    """What :func:`fit` asks of its data (:class:`patches.PatchData` has it)."""

    device: torch.device

    def seed(self, seed: int) -> None: ...
    def sample(self, batch: int) -> tuple[Tensor, Tensor]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """How to train; ``steps=None`` needs ``time_limit`` (seconds) and anneals the learning rate over that."""

    steps: int | None = 1000
    batch: int = 16
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup: int = 50
    anneal: float = 1.0  # power of the cosine: above 1, more of the steps at low rates
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    loss: str = "l1"  # or "charbonnier"; "cross_entropy" for class numbers, of pictures or of pixels
    distill: float = 0.0  # share of the loss that compares with the teacher's output instead of the target
    clip: float | None = 1.0  # largest norm of the gradient of all parameters
    ema: float | None = None  # decay, such as 0.999; the averaged weights are what fit leaves in the model
    bf16: bool = False
    cuda_graph: bool = False
    compile: bool = False
    time_limit: float | None = None
    log_every: int = 50
    checkpoint: Path | None = None
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        if self.steps is None and self.time_limit is None:
            raise ConfigError("give steps, time_limit, or both")
        if self.loss not in ("l1", "charbonnier", "cross_entropy"):
            raise ConfigError(f"loss must be 'l1', 'charbonnier' or 'cross_entropy', not {self.loss!r}")
        if self.anneal <= 0:
            raise ConfigError(f"anneal is a power above 0, not {self.anneal!r}")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill is a share from 0 to 1, not {self.distill!r}")


@dataclass
class Result:
    """What :func:`fit` did: steps in all, seconds of this call, steps and seconds of those that it goes on
    from, (step, mean loss) log of all of them, whether all steps are done.
    """

    step: int
    seconds: float
    begun: int = 0
    earlier: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    finished: bool = True


def learning_rate(recipe: Recipe, step: int, elapsed: float) -> float:
    """Linear warm-up, then a power of a cosine down to ``min_lr``, over the steps or else over the time."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.steps is not None:
        done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    else:
        done = elapsed / (recipe.time_limit or 1.0)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share**recipe.anneal


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for :func:`fit`: weights decay; vectors, A and what the model itself excepts do not."""
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    decays = {n: p.dim() > 1 and n not in skip and "A_log" not in n for n, p in model.named_parameters()}
    return [
        {"params": [p for n, p in model.named_parameters() if decays[n] == own], "weight_decay": rate}
        for own, rate in ((True, weight_decay), (False, 0.0))
    ]


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """What a CPU generator drew, on ``device``; the host does not wait."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


@contextmanager
def reporter(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A progress callback: a bar with rich on a terminal, else a plain line now and then."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        interactive = False
    else:
        interactive = sys.stderr.isatty()
    if interactive:
        from rich.console import Console

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    last = time.monotonic()

    def line(done: float, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 10 or done >= total:
            last = time.monotonic()
            print(f"{title}: {100 * done / max(total, 1e-9):3.0f} %  {note}", file=sys.stderr, flush=True)

    yield line


WARM_UP = 5  # real steps on a side stream before a capture: they compile, tune and allocate


class Step:
    """One optimiser step of ``model``: call it with a batch.

    It runs eagerly, through ``torch.compile`` with ``recipe.compile``, and after :meth:`capture` (on a GPU) as a
    CUDA graph on static buffers, whatever ran before. ``loss_sum`` adds up the losses. No way waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        recipe: Recipe,
        device: torch.device,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.recipe, self.device, self.teacher = model, recipe, device, teacher
        self.forward = torch.compile(model) if recipe.compile else model
        gpu = device.type == "cuda"
        self.base = [float(group.get("lr", recipe.lr)) for group in groups]
        groups = [
            {**g, "lr": torch.tensor(lr, device=device) if gpu else lr}
            for g, lr in zip(groups, self.base, strict=True)
        ]
        self.params = [p for g in groups for p in g["params"]]
        make = torch.optim.AdamW if any(g.get("weight_decay") for g in groups) else torch.optim.Adam
        self.optimizer = make(groups, betas=recipe.betas, fused=True, capturable=gpu)
        self.ema = [p.detach().clone() for p in self.params] if recipe.ema is not None else []
        self.loss_sum = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.side = torch.cuda.Stream(device) if gpu else None  # type: ignore[no-untyped-call]
        self.x = self.y = torch.empty(0)

    def set_rate(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    def _work(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            out = self.forward(x)
            share = self.recipe.distill if self.teacher is not None else 0.0
            loss = (1 - share) * self._loss(out, y)
            if self.teacher is not None and share:
                with torch.no_grad():
                    wanted = self.teacher(x)
                loss = loss + share * self._loss(out, wanted)
        loss.backward()
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.params, self.recipe.clip)
        self.optimizer.step()
        if self.ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.params, 1 - (self.recipe.ema or 0.0))
        self.loss_sum += loss.detach()

    def _loss(self, out: Tensor, wanted: Tensor) -> Tensor:
        if self.recipe.loss == "cross_entropy":  # class numbers, or a teacher's logits; (B, classes, ...)
            target = wanted.float().softmax(1) if wanted.is_floating_point() else wanted
            return F.cross_entropy(out.float(), target)
        error = out.float() - wanted.float()
        return error.abs().mean() if self.recipe.loss == "l1" else (error.square() + 1e-6).sqrt().mean()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if self.graph is None:
            return self._work(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()

    def warm_up(self, x: Tensor, y: Tensor) -> None:
        """A step as any other, but on a side stream: :meth:`capture` wants ``WARM_UP`` of them before."""
        if self.side is None:
            return self(x, y)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self(x, y)
        torch.cuda.current_stream().wait_stream(self.side)

    def capture(self, x: Tensor, y: Tensor) -> None:
        """Record the step; nothing runs. ``x`` and ``y`` only tell the shapes."""
        self.x, self.y = x.clone(), y.clone()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._work(self.x, self.y)
        self.graph = graph


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    groups: list[dict[str, Any]] | None = None,
    title: str = "train",
    resume: bool = False,
    teacher: nn.Module | None = None,
) -> Result:
    """Train ``model`` in place, on its own device, and leave it in eval mode.

    ``teacher``: a float model in eval mode on the same device, which ``recipe.distill`` needs.

    ``groups``: optimiser parameter groups with their own peak ``lr`` (``ssmquant.param_groups(prepared,
    ...)``); all parameters by default. ``resume`` goes on from ``recipe.checkpoint`` if that exists: on a
    CPU (and, with deterministic kernels, on a GPU) 3 + 3 steps equal 6 bit by bit, and so do the losses.
    Reaching ``time_limit`` stops after a whole step with a checkpoint written. Raises :class:`SsmquantError`
    as soon as a loss that is not finite is seen.
    """
    model.train()
    device = next(model.parameters()).device
    if recipe.distill and teacher is None:
        raise ConfigError("distill needs a teacher, the float model")
    own = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
    step = Step(model, own, recipe, device, teacher)
    result = Result(0, 0.0)
    logged = 0
    if resume and recipe.checkpoint is not None and recipe.checkpoint.exists():
        result, logged = _load(recipe.checkpoint, model, step, data)
    done = saved = result.step
    started = time.monotonic()
    running: deque[torch.cuda.Event] = deque()
    gpu = device.type == "cuda"
    if recipe.cuda_graph and not gpu:
        print(f"no CUDA graph on a {device.type} device, going on step by step", file=sys.stderr)
    warm = done + WARM_UP if recipe.cuda_graph and gpu else -1
    with reporter(title, recipe.steps or recipe.time_limit or 1.0) as report:
        while recipe.steps is None or done < recipe.steps:
            elapsed = time.monotonic() - started
            if recipe.time_limit is not None and elapsed >= recipe.time_limit:
                result.finished = recipe.steps is None
                break
            x, y = data.sample(recipe.batch)
            if done == warm:
                _try_capture(step, x, y)
            step.set_rate(learning_rate(recipe, done, elapsed) / recipe.lr)
            if done < warm:
                step.warm_up(x, y)
            else:
                step(x, y)
            done += 1
            if gpu:  # the host may run at most 4 steps ahead, or time limits would not hold
                running.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
                running[-1].record()
                if len(running) > 4:
                    running.popleft().synchronize()
            if done - logged >= recipe.log_every or done == recipe.steps:
                result.losses.append((done, _read(step, done - logged)))
                logged = done
                speed = (done - result.begun) / (time.monotonic() - started)
                note = f"step {done}  loss {result.losses[-1][1]:.5f}  {speed:.2f} steps/s"
                report(done if recipe.steps else elapsed, note)
            result.step, result.seconds = done, time.monotonic() - started
            if recipe.checkpoint is not None and done - saved >= recipe.checkpoint_every:
                _save(recipe.checkpoint, model, step, data, result, logged)
                saved = done
    if recipe.checkpoint is not None and saved != done:
        _save(recipe.checkpoint, model, step, data, result, logged)
    if done > logged:
        result.losses.append((done, _read(step, done - logged)))
    with torch.no_grad():
        for p, average in zip(step.params, step.ema, strict=False):
            p.copy_(average)
    model.zero_grad(set_to_none=True)
    model.eval()
    result.seconds = time.monotonic() - started
    return result


def _try_capture(step: Step, x: Tensor, y: Tensor) -> None:
    try:
        step.capture(x, y)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"no CUDA graph, going on step by step: {reason}", file=sys.stderr)


def _read(step: Step, count: int) -> float:
    mean = step.loss_sum.item() / count
    step.loss_sum.zero_()
    if not math.isfinite(mean):
        raise SsmquantError(
            "the training loss is not finite; lower lr, or look for broken pictures in the data"
        )
    return mean


def _save(path: Path, model: nn.Module, step: Step, data: Data, result: Result, logged: int) -> None:
    """``logged``: the step up to which ``result.losses`` goes; later ones are in ``step.loss_sum``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "step": result.step,
        "log": {
            "seconds": result.earlier + result.seconds,
            "losses": result.losses,
            "logged": logged,
            "sum": step.loss_sum,
        },
        "model": model.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "ema": step.ema,
        "data": data.state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(step.device) if step.device.type == "cuda" else None,
    }
    temporary = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _load(path: Path, model: nn.Module, step: Step, data: Data) -> tuple[Result, int]:
    """What was done so far, and up to which step its losses go."""
    try:
        state = torch.load(path, map_location=step.device, weights_only=True)
        model.load_state_dict(state["model"])
        # The device's own kinds of Adam, and the tensor of the rate that a captured step reads.
        own = [
            {k: g[k] for k in ("lr", "fused", "foreach", "capturable")} for g in step.optimizer.param_groups
        ]
        step.optimizer.load_state_dict(copy.copy(state["optimizer"]))
        for group, options in zip(step.optimizer.param_groups, own, strict=True):
            group.update(options)
        for average, value in zip(step.ema, state["ema"], strict=True):
            average.copy_(value)
        data.load_state({name: value.cpu() for name, value in state["data"].items()})
        torch.set_rng_state(state["rng"].cpu())
        if step.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), step.device)
        done = int(state["step"])
        result = Result(done, 0.0, begun=done)
        log = state.get("log")
        if log is None:  # of an earlier version
            return result, done
        step.loss_sum.copy_(log["sum"])
        result.earlier, result.losses = float(log["seconds"]), [(int(n), float(v)) for n, v in log["losses"]]
        return result, int(log["logged"])
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise FormatError(f"cannot resume from {path}: {str(error).splitlines()[0]}") from error
