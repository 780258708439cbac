"""Calls that run at once when they are captured: which ones, and on which streams."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.graph import forks
from ssmquant.graph.deploy import deploy
from ssmquant.graph.deploy_sequences import _Sequence, fork_sequences
from ssmquant.graph.forks import Fork
from ssmquant.ops.deployed import cpu, cuda
from tests.graph.deployed import MambaBlock, make, record
from tests.graph.replayed import captured


def sequence() -> _Sequence:
    return _Sequence(0, 4, False, 0, (3, 1, 1), (0, 1, 2), True, [])


def lanes(graph: fx.Graph) -> list[tuple[int, int]]:
    """Of each scan, in their order: its lane, and how many its fork has."""
    cores: list[Any] = [n.target for n in graph.nodes if isinstance(n.target, _Sequence)]
    return [(core.lane, core.fork.calls) for core in cores]


@pytest.mark.skipif(cpu.unavailable(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_both_directions_of_vim_run_at_once() -> None:
    model, _ = make("vim", QConfig.minmax(8, 8))
    graph = deploy(record(model).graph, model, cuda)
    found = lanes(graph)
    assert found == [(0, 2), (1, 2)] * (len(found) // 2)
    assert len(found) == 4
    nodes = list(graph.nodes)
    for i, n in enumerate(nodes):
        core: Any = n.target
        if isinstance(core, _Sequence) and core.lane == 0:
            other: Any = nodes[i + 1].target
            assert other.fork is core.fork


@pytest.mark.skipif(cpu.unavailable(torch.device("cpu")) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("form", ["both", "both columns", "both, sized"])
def test_foreign_code(form: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 6, 5, 4)
    config = QConfig.recommended(8, 8, keep_first_last=False)
    prepared = ssmquant.prepare(MambaBlock(form).eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    graph = deploy(record(model).graph, model, cuda)
    assert lanes(graph) == ([(0, 1), (0, 1)] if form == "both, sized" else [(0, 2), (1, 2)])


@pytest.mark.parametrize(
    ("between", "want"),
    [
        ("nothing", [(0, 2), (1, 2)]),
        ("what they are given", [(0, 2), (1, 2)]),
        ("three", [(0, 3), (1, 3), (2, 3)]),
        ("a reader", [(0, 1), (0, 1)]),
        ("a size of the first", [(0, 1), (0, 1)]),
        ("a size of the first for the second", [(0, 1), (0, 1)]),
        ("the second reads the first", [(0, 1), (0, 1)]),
        ("a write", [(0, 1), (0, 1)]),
        ("other rows", [(0, 1), (0, 1)]),
        ("two pairs", [(0, 2), (1, 2)] * 2),
    ],
)
def test_what_runs_at_once(between: str, want: list[tuple[int, int]]) -> None:
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(1))
    graph = fx.Graph(root)
    x, other = graph.placeholder("x"), graph.placeholder("other")
    calls = [graph.call_function(sequence(), (x, (), ()))]
    given: tuple[Any, ...] = ()
    if between in ("what they are given", "three"):
        given = graph.call_method("size", (x, 0)), graph.get_attr("weight")
    if between == "a reader":
        graph.call_function(operator.neg, (calls[0],))
    if between.startswith("a size of the first"):
        size = graph.call_method("size", (calls[0], 0))
        given = (size,) if between.endswith("second") else ()
    if between == "the second reads the first":
        given = (calls[0],)
    if between == "a write":
        graph.call_method("mul_", (x, 2.0))
    rows = other if between == "other rows" else x
    calls.append(graph.call_function(sequence(), (rows, given, ())))
    if between == "three":
        graph.get_attr("weight")
        calls.append(graph.call_function(sequence(), (x, (), ())))
    if between == "two pairs":
        calls += [graph.call_function(sequence(), (other, (), ())) for _ in range(2)]
    graph.output(tuple(calls))
    order = [n for n in graph.nodes if n in calls]
    fork_sequences(graph)
    graph.lint()
    assert [n for n in graph.nodes if n in calls] == order
    assert lanes(graph) == want


class Stream:
    """Notes what is asked of it."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def record_event(self) -> str:
        self.notes.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams are asked for in a capture."""
    found: list[str] = []

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        found.append(f"on {stream.name}")
        yield
        found.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("main", found))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(forks, "_stream", lambda _, lane: Stream(f"side {lane}", found))
    return found


def test_others_begin_with_the_first(notes: list[str]) -> None:
    fork = Fork(3)
    for lane in range(3):
        with fork.lane(lane, torch.device("cuda", 0)):
            notes.append(f"call {lane}")
    assert notes == [
        "main records", "call 0",
        "side 1 waits for event of main", "on side 1", "call 1", "off side 1", "main waits for side 1",
        "side 2 waits for event of main", "on side 2", "call 2", "off side 2", "main waits for side 2",
    ]  # fmt: skip


def test_an_error_leaves_no_stream_behind(notes: list[str]) -> None:
    fork = Fork(2)
    with fork.lane(0, torch.device("cuda", 0)):
        pass
    with pytest.raises(ValueError, match="wrong"), fork.lane(1, torch.device("cuda", 0)):
        raise ValueError("wrong")
    assert notes[-1] == "main waits for side 1"
    with fork.lane(1, torch.device("cuda", 0)):  # of a call whose first one did not come
        notes.append("alone")
    assert notes[-2:] == ["main waits for side 1", "alone"]


def test_nothing_changes_elsewhere(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Fork(2).lane(1, torch.device("cpu")):
        pass
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for lane in range(2):
        with Fork(2).lane(lane, torch.device("cuda", 0)):
            pass
    assert notes == []


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The same bits as calls that come one after the other."""
    model, x = make("vim", QConfig.recommended(8, 8))
    model, x = model.cuda(), x.cuda()
    with torch.no_grad():
        inputs = [x, x.flip(0).contiguous(), x[:1]]
        want = [model(y) for y in inputs]
        ssmquant.cuda_graph(model)
        for _ in range(4):
            for y, w in zip(inputs, want, strict=True):
                assert torch.equal(model(y), w)
    assert captured(model) == 2
