"""HealthMonitor measures every so many steps, warns once, and does not wait for a GPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import ssmquant
from ssmquant import HealthMonitor, HealthWarning, health
from ssmquant.analysis.measure import Item
from tests.health_checks import damage, monitors, wide
from tests.small import X


def test_the_monitor_measures_every_so_many_steps() -> None:
    model = wide()
    monitor = HealthMonitor(model, every=3)
    for _ in range(7):
        monitor.step()
    assert [step for step, _ in monitor.history] == [0, 3, 6]
    assert monitor.history[0][1] == health(model)


def test_every_warning_comes_once() -> None:
    model = wide()
    monitor = HealthMonitor(model, every=1)
    damage(model, "in_proj:weight", 50.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            monitor.step()
    assert {w.category for w in caught} == {HealthWarning}
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2  # the scale ran away, too
    assert texts[0].startswith("step 1: zero ratio 1.00 of 'in_proj:weight'")
    assert "times what it was" in texts[1]
    assert caught[0].filename == __file__
    damage(model, "out_proj:weight", 0.05)
    with pytest.warns(HealthWarning, match="out_proj"):
        monitor.step()
    silent = HealthMonitor(damage(wide(), "in_proj:weight", 50.0), every=1, warn=False)
    silent.step()
    assert [len(r.warnings) for _, r in silent.history] == [1, 1]


def test_warnings_as_errors_lose_nothing() -> None:
    model = wide()
    monitor = HealthMonitor(model, every=1)
    damage(model, "in_proj:weight", 50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(HealthWarning, match="zero ratio"):
            monitor.step()
        with pytest.raises(HealthWarning, match="times what"):
            monitor.step()
        monitor.step()
    assert [step for step, _ in monitor.history] == [0, 1, 2, 3]


class Event:
    """Stands for a CUDA event that happens when it is told to."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


def test_results_are_read_when_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    send = monitors._send

    def slow(items: list[Item]) -> Any:
        part = send(items)
        events.append(Event())
        part.event = events[-1]
        return part

    monkeypatch.setattr(monitors, "_send", slow)
    model = wide()
    monitor = HealthMonitor(model, every=2)
    assert (monitor.history, len(events)) == ([], 1)
    monitor.step()
    assert monitor.history == []
    events[0].happened = True
    monitor.step()  # reads that of step 0 and starts the next
    assert [step for step, _ in monitor.history] == [0]
    assert len(events) == 2
    for _ in range(5):
        monitor.step()  # one is on its way: no second
    assert len(events) == 2
    damage(model, "in_proj:weight", 50.0)
    events[1].happened = True
    monitor.step()  # step 8
    assert [step for step, _ in monitor.history] == [0, 2]
    assert monitor.history[-1][1].warnings == []  # as it was at step 2
    assert len(events) == 3
    with pytest.warns(HealthWarning, match=r"^step 8: "):
        monitor.wait()
    assert [step for step, _ in monitor.history] == [0, 2, 8]
    monitor.wait()
    assert len(monitor.history) == 3


def test_the_history_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "_MOST_REPORTS", 8)
    monitor = HealthMonitor(wide(), every=1)
    for _ in range(30):
        monitor.step()
    steps = [step for step, _ in monitor.history]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (0, 30)
    assert steps == sorted(set(steps))


def test_watching_a_training_run() -> None:
    model = wide().train()
    groups = ssmquant.param_groups(model, lr=1e-3, quantizer_lr=1e-4)
    optimizer = torch.optim.Adam(groups)
    monitor = HealthMonitor(model, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(X) - X).square().mean().backward()
        optimizer.step()
        monitor.step()
    assert [step for step, _ in monitor.history] == [0, 2, 4]
    assert monitor.history[-1][1].rows == health(model).rows
    drifts = [r.drift for r in monitor.history[-1][1].rows]
    assert any(d != 1.0 for d in drifts)


@pytest.mark.gpu
def test_the_monitor_beside_a_cuda_graph() -> None:
    device = torch.device("cuda")
    model = wide().to(device)
    weight = model.in_proj.weight
    monitor = HealthMonitor(model, every=1, warn=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        weight.mul_(0.5)
        monitor.step()  # is not recorded
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                graph.replay()
                monitor.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    monitor.wait()
    assert monitor.history[0][0] == 0
    monitor.step()
    monitor.wait()
    assert monitor.history[-1][0] == 4  # the call while capturing did not count
    cpu = health(copy.deepcopy(model).cpu())
    for a, b in zip(monitor.history[-1][1].rows, cpu.rows, strict=True):
        if a.what == "weight":
            assert (a.levels_used, a.zero_ratio) == (b.levels_used, b.zero_ratio)
