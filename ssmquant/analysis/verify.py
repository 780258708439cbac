"""Does the deployed model compute what the prepared one does? Site by site, with teacher-forced inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.analysis.decibels import sqnr
from ssmquant.errors import ConfigError
from ssmquant.graph.prepared import bind, evaluating
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.graph.trace import describe_call

__all__ = ["SiteError", "VerifyReport", "verify"]


@dataclass(frozen=True)
class SiteError:
    """One site: largest absolute error, the same relative to the largest reference value, and SQNR in dB."""

    name: str
    max_abs: float
    max_rel: float
    sqnr_db: float


@dataclass(frozen=True)
class VerifyReport:
    """All sites of one comparison. ``print`` it for a table of the worst."""

    rows: tuple[SiteError, ...]

    @property
    def worst_rel(self) -> float:
        """Largest relative error of any site (0.0 if there are none)."""
        return max((r.max_rel for r in self.rows), default=0.0)

    @property
    def worst_abs(self) -> float:
        return max((r.max_abs for r in self.rows), default=0.0)

    @property
    def min_sqnr_db(self) -> float:
        return min((r.sqnr_db for r in self.rows), default=math.inf)

    def __str__(self) -> str:
        worst = sorted(self.rows, key=lambda r: -r.max_rel)
        width = max([len(r.name) for r in worst[:10]] or [4])
        lines = [f"{len(self.rows)} sites, worst relative error {self.worst_rel:.2e}"]
        lines += [
            f"  {r.name:<{width}}  rel {r.max_rel:.2e}  abs {r.max_abs:.2e}  SQNR {r.sqnr_db:6.1f} dB"
            for r in worst[:10]
        ]
        return "\n".join(lines)


class Teacher(fx.Interpreter):
    """Runs a graph and keeps what every site returns."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        super().__init__(model, graph=record.graph)
        self.extra_traceback = False
        self.outputs: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if "site" in n.meta:
            # A copy: the user's code may go on in place.
            self.outputs[n.meta["site"]] = fx.node.map_aggregate(
                out, lambda t: t.clone() if isinstance(t, Tensor) else t
            )
        return out


class Student(fx.Interpreter):
    """Runs a graph; every site's result is compared with the teacher's, and the teacher's is what goes on."""

    def __init__(self, model: nn.Module, record: Record, outputs: dict[str, Any]) -> None:
        super().__init__(model, graph=record.graph)
        self.extra_traceback = False
        self.outputs = outputs
        self.rows: list[SiteError] = []

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        name = n.meta.get("site")
        if name is None:
            return out
        reference = self.outputs[name]
        pair = (out, reference) if isinstance(out, Tensor) else (out[0], reference[0])
        self.rows.append(_compare(name, *pair))
        return fx.node.map_aggregate(reference, lambda t: t.clone() if isinstance(t, Tensor) else t)


def _compare(name: str, out: Tensor, reference: Tensor) -> SiteError:
    if out.shape != reference.shape:
        return SiteError(name, math.inf, math.inf, -math.inf)
    a, b = out.double(), reference.double()
    if a.numel() == 0:
        return SiteError(name, 0.0, 0.0, math.inf)
    error = (a - b).abs().max().item()
    top = b.abs().max().item()
    noise, signal = (a - b).square().sum().item(), b.square().sum().item()
    if not math.isfinite(error):
        return SiteError(name, math.inf, math.inf, -math.inf)
    relative = error / top if top > 0 else (0.0 if error == 0 else math.inf)
    return SiteError(name, error, relative, sqnr(signal, noise))


def rng_states(tensors: list[Tensor]) -> dict[torch.device, Tensor]:
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    states = {d: torch.cuda.get_rng_state(d) for d in devices}
    return {torch.device("cpu"): torch.random.get_rng_state(), **states}


def set_rng(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.random.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


@torch.no_grad()
def verify(
    prepared: nn.Module, deployed: nn.Module, example_inputs: tuple[Any, ...] | Tensor, **example_kwargs: Any
) -> VerifyReport:
    """Compares every site of a deployed model with the prepared one it came from.

    Both run in evaluation mode on the same inputs. Each site's output is compared, and then the prepared model's
    output is passed on in both, so that errors do not add up.

    Raises:
        ConfigError: the models are not a prepared and a deployed one with the same sites.
    """
    teacher_rt, student_rt = runtime_of(prepared, "prepared"), runtime_of(deployed, "deployed")
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with evaluating(prepared):
        call = describe_call(bind(teacher_rt.signature(prepared), args, example_kwargs))
        first, second = teacher_rt.select(prepared, call), student_rt.select(deployed, call)
        states = rng_states(call.tensors)
        teacher = Teacher(prepared, first)
        teacher.run(*(t.clone() for t in call.tensors))  # the user's code may write into its input
    names = {n.meta["site"] for n in second.graph.nodes if "site" in n.meta}
    if names != set(teacher.outputs):
        raise ConfigError(
            "verify: the two models have different sites; compare a model with its own conversion"
        )
    student = Student(deployed, second, teacher.outputs)
    after = rng_states(call.tensors)
    set_rng(states)  # models that draw in evaluation draw the same
    try:
        student.run(*(t.clone() for t in call.tensors))
    finally:
        set_rng(after)
    return VerifyReport(tuple(student.rows))
