"""Replayed calls compute what plain ones do: on a GPU, and on a CPU with captures that run the work again."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, QConfig
from ssmquant.graph import cuda_graphs
from ssmquant.graph.runtime import runtime_of
from tests.graph.replayed import captured, nothing, same
from tests.graph.test_fuse import Scan2d


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graphs, "_capture", again)
        monkeypatch.setattr(cuda_graphs, "_undone", nothing)
        monkeypatch.setattr(cuda_graphs, "_capturable", bool)
    name: str = request.param
    return name


def again(work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """As ``_capture``: a replay runs the work once more and writes into the first results."""
    result, mode = work(), torch.is_grad_enabled()

    def replay() -> None:
        with torch.set_grad_enabled(mode):  # replayed by a Function it is off
            new = work()
        with torch.no_grad():
            for old, value in zip(tensors(result), tensors(new), strict=True):
                old.copy_(value)

    return result, replay


def tensors(result: Any) -> list[Tensor]:
    values = result.values() if isinstance(result, dict) else result
    return [v for v in values if isinstance(v, Tensor)]


def prepared(device: str, model: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 5, device=device)
    model = (Scan2d() if model is None else model).to(device)
    p = ssmquant.prepare(model, QConfig(w_bits=4, a_bits=4), example_inputs=(x,))
    return ssmquant.calibrate(p, [x], progress=False).train(), x


def steps(p: nn.Module, batches: list[Tensor], accumulate: int = 1, half: bool = False) -> list[Tensor]:
    """Losses, and at the end all parameters, of a plain loop."""
    optimizer = torch.optim.SGD(p.parameters(), 0.05)
    out = []
    for i, x in enumerate(batches):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            loss = p(x).float().square().mean()
        loss.backward()
        out.append(loss.detach().clone())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [*out, *(q.detach().clone() for q in p.parameters())]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training(device: str, accumulate: int) -> None:
    p, x = prepared(device)
    plain = copy.deepcopy(p)
    batches = [torch.randn_like(x) for _ in range(6)]
    assert ssmquant.cuda_graph(p) is p
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = steps(p, batches, accumulate)
    assert captured(p) == 1
    same(got, steps(plain, batches, accumulate))


def test_autocast(device: str) -> None:
    """Weights are cast by the graph, not before it."""
    p, x = prepared(device)
    ssmquant.cuda_graph(p)
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(plain, max_graphs=0)
    batches = [torch.randn_like(x) for _ in range(5)]
    got, want = steps(p, batches, half=True), steps(plain, batches, half=True)
    assert captured(p) == 1
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() + 1e-3


def test_kinds_of_calls(device: str) -> None:
    p, x = prepared(device)
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p, max_graphs=3)
    other = torch.randn(3, 3, 4, 4, device=device)
    for _ in range(3):
        for value in (x, other):
            value = value.clone().requires_grad_()
            mine = torch.autograd.grad(p(value).sum(), value)
            same(list(mine), list(torch.autograd.grad(plain(value).sum(), value)))
    assert captured(p) == 2
    p.eval(), plain.eval()
    with torch.no_grad():
        for _ in range(3):
            same([p(x)], [plain(x)])
    assert captured(p) == 3
    with torch.inference_mode():
        for _ in range(3):
            same([p(x)], [plain(x)])
    assert captured(p) == 3  # the oldest went


def test_results_are_kept(device: str) -> None:
    p, x = prepared(device)
    ssmquant.cuda_graph(p)
    p.eval()
    with torch.no_grad():
        first, second = [p(x) for _ in range(3)][1:]
        kept = second.clone()
        p(2 * x)
    assert torch.equal(first, second)
    assert torch.equal(second, kept)


def test_the_model_may_change(device: str) -> None:
    p, x = prepared(device)
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p)
    for model in (p, plain):
        for _ in range(3):
            model(x).sum().backward()
        model.zero_grad()
    for model in (p, plain):
        next(iter(model.parameters())).requires_grad_(False)  # frozen: captured anew
        model.linear.weight = nn.Parameter(2 * model.linear.weight.detach())  # type: ignore[union-attr]
    for _ in range(3):
        same([p(x)], [plain(x)])
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    for model in (p, plain):
        model.load_state_dict(state)
    same([p(x)], [plain(x)])


def test_first_batch_initialises(device: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6, 5, device=device)
    p = ssmquant.prepare(Scan2d().to(device), QConfig(w_bits=4, a_bits=4), example_inputs=(x,)).train()
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p)
    same(steps(p, [x] * 4), steps(plain, [x] * 4))
    assert captured(p) == 1


def test_several_outputs(device: str) -> None:
    class Many(Scan2d):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"y": y, "index": y.argmax(1), "none": None, "rest": (y.detach() * 2, 3)}

    p, x = prepared(device, Many())
    ssmquant.cuda_graph(p)
    for _ in range(4):
        out = p(x)
    assert captured(p) == 1
    assert out["none"] is None
    assert out["rest"][1] == 3
    assert torch.equal(out["rest"][0], 2 * out["y"])
    assert out["index"].dtype == torch.int64
    assert not out["rest"][0].requires_grad
    out["y"].sum().backward()


def test_copies_and_deployed_models(device: str) -> None:
    p, x = prepared(device)
    ssmquant.cuda_graph(p)
    for _ in range(3):
        p(x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(p)))
    same([again(x)], [p(x)])
    deployed = ssmquant.convert(p)
    want = deployed(x)
    for _ in range(3):
        same([deployed(x)], [want])
    assert captured(deployed) == 1
    assert ssmquant.verify(p, deployed, (x,)).worst_rel < 1e-4


def test_off_and_errors(device: str) -> None:
    p, x = prepared(device)
    ssmquant.cuda_graph(p)
    ssmquant.cuda_graph(p, max_graphs=0)
    p(x)
    assert runtime_of(p).graphs is None
    with pytest.raises(ConfigError, match="max_graphs=-1"):
        ssmquant.cuda_graph(p, max_graphs=-1)
    with pytest.raises(ConfigError, match="prepare"):
        ssmquant.cuda_graph(nn.Linear(2, 2))


def test_what_cannot_be_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    p, x = prepared(device)
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p)
    monkeypatch.setattr(cuda_graphs, "_capture", refuse)
    p(x)
    with pytest.warns(UserWarning, match="cannot be captured and runs as it is"):
        p(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            same([p(x)], [plain(x)])
    assert captured(p) == 0
