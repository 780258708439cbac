"""Replayed calls compute what plain ones do: on a GPU, and on a CPU with captures that run the work again."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ssmquant
from ssmquant import ConfigError, QConfig
from ssmquant.graph import cuda_graphs
from ssmquant.graph.runtime import runtime_of
from ssmquant.ops import use_backend
from ssmquant.quantizers import MinMax, Quantizer
from tests.graph.test_fuse import Scan2d


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graphs, "_capture", again)
        monkeypatch.setattr(cuda_graphs, "_undone", nothing)
        monkeypatch.setattr(cuda_graphs, "_capturable", bool)
    name: str = request.param
    return name


@contextmanager
def nothing(*_: Any) -> Iterator[None]:
    yield


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


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


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


def captured(p: nn.Module) -> int:
    graphs = runtime_of(p).graphs
    assert graphs is not None
    return sum(known.graph is not None for known in graphs.known.values())


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


# ---- what a replay cannot see ----------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """Records what runs, to repeat it on the same memory: what Python decided stays as it was, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for op, args, kwargs, out in self.calls:
                written = any(
                    a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments
                )
                view = any(a.alias_info is not None for a in op._schema.returns)
                if view and not written:
                    continue
                new = op(*args, **kwargs)
                if written:
                    continue
                for old, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
                    if isinstance(old, Tensor):
                        with torch.autograd._unsafe_preserve_version_counter(old):
                            old.copy_(value)


def taped(work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    with Tape() as tape:
        result = work()
    return result, tape.replay


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_graphs, "_capture", taped)
    monkeypatch.setattr(cuda_graphs, "_undone", nothing)
    monkeypatch.setattr(cuda_graphs, "_capturable", bool)
    with use_backend("chunked", op="quantize"), use_backend("chunked"):
        yield


def pair(model: nn.Module | None = None, x: Tensor | None = None) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model whose calls are replayed (captured already), and a copy whose are not."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 5) if x is None else x
    config = QConfig(w_bits=4, a_bits=4, keep_first_last=False)
    p = ssmquant.prepare(Scan2d() if model is None else model, config, example_inputs=(x,))
    ssmquant.calibrate(p, [x], progress=False).train()
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p)
    for m in (p, plain):
        for _ in range(3):
            m(x).square().mean().backward()
            m.zero_grad()
    assert captured(p) == 1
    return p, plain, x


def gradients(m: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(q) if q.grad is None else q.grad for q in m.parameters()]


def both(p: nn.Module, plain: nn.Module, x: Tensor) -> None:
    outputs = []
    for m in (p, plain):
        m.zero_grad()
        outputs.append(m(x))
        outputs[-1].square().mean().backward()
    same([outputs[0].detach(), *gradients(p)], [outputs[1].detach(), *gradients(plain)])


@pytest.mark.usefixtures("stale")
def test_two_calls_before_their_backward_pass() -> None:
    p, plain, x = pair()
    for m in (p, plain):
        (m(x).square().mean() + m(2 * x).square().mean()).backward()
    same(gradients(p), gradients(plain))
    for m in (p, plain):
        m.zero_grad()
        loss = m(x).square().mean()
        m(3 * x)  # for a log
        loss.backward()
    same(gradients(p), gradients(plain))
    both(p, plain, x)


@pytest.mark.usefixtures("stale")
def test_a_second_backward_pass_is_an_error() -> None:
    p, plain, x = pair()
    loss = p(x).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    loss = p(x).square().mean()
    with torch.no_grad():
        p.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
    with torch.no_grad():
        p.linear.weight.div_(2)
    del loss
    both(p, plain, x)


@pytest.mark.usefixtures("stale")
def test_parameters_that_are_replaced_on_their_memory() -> None:
    p, plain, x = pair()
    for m in (p, plain):
        m.linear.weight = nn.Parameter(m.linear.weight.data)
    both(p, plain, x)
    assert p.linear.weight.grad is not None
    for m in (p, plain):
        m.load_state_dict(m.state_dict(), assign=True)
    both(p, plain, x)


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mean = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x - self.mean))


@pytest.mark.usefixtures("stale")
def test_what_is_kept_in_python() -> None:
    """Sign flags of quantizers, plain tensors."""
    positive, signed = torch.rand(8, 4) + 1.5, torch.randn(8, 4) + 1
    p, plain, _ = pair(Row(), positive)
    other, _, _ = pair(Row(), signed)
    for m in (p, plain):
        m.load_state_dict(other.state_dict())
    both(p, plain, signed)
    p, plain, _ = pair(Row(), positive)
    for m in (p, plain):
        ssmquant.calibrate(m, [signed], progress=False)
    both(p, plain, signed)
    for _ in range(2):
        both(p, plain, signed)
    for m in (p, plain):
        m.mean = torch.full((4,), 3.0)
    both(p, plain, signed)


class Normed(nn.Module):
    """With modules that the graph calls as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.act, self.drop = nn.LayerNorm(4), nn.Sigmoid(), nn.Dropout(0.0)
        self.register_buffer("turn", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.drop(self.act(self.norm(self.b(x @ self.turn)))))
        return y


CHANGES: dict[str, Callable[[Any], Any]] = {
    "strides of a parameter": lambda m: setattr(m.b.weight, "data", m.b.weight.data.t()),
    "strides of a buffer": lambda m: setattr(m, "turn", m.turn.t()),
    "another module": lambda m: setattr(m, "act", nn.Tanh()),
    "a number of a module": lambda m: setattr(m.drop, "p", 1.0),
    "a forward of its own": lambda m: setattr(m.norm, "forward", torch.zeros_like),
    "a hook": lambda m: m.norm.register_forward_hook(lambda module, args, out: out * 2),
}


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_capture(change: str) -> None:
    p, plain, x = pair(Normed(), torch.randn(8, 4))
    before = p(x).detach()
    for m in (p, plain):
        CHANGES[change](m)
    both(p, plain, x)
    assert not torch.equal(p(x), before)
    both(p, plain, x)


@pytest.mark.usefixtures("stale")
def test_hooks_that_are_exchanged() -> None:
    p, plain, x = pair(Normed(), torch.randn(8, 4))
    handles = [m.norm.register_forward_hook(lambda module, args, out: out * 2) for m in (p, plain)]
    for _ in range(3):
        both(p, plain, x)
    for m, handle in zip((p, plain), handles, strict=True):
        handle.remove()
        m.norm.register_forward_hook(lambda module, args, out: out * 3)
    both(p, plain, x)


@pytest.mark.usefixtures("stale")
def test_hooks_of_all_modules() -> None:
    p, plain, x = pair(Normed(), torch.randn(8, 4))
    counts = []
    for m in (p, plain):
        calls: list[str] = []
        handle = register_module_forward_hook(lambda module, *_, to=calls: to.append(type(module).__name__))
        m(x)
        handle.remove()
        counts.append(sorted(calls))
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("stale")
def test_settings_of_the_process() -> None:
    """Each has graphs of its own; those of PyTorch's newer interface do not mix with its older one."""
    p, plain, x = pair(Normed(), torch.randn(8, 4))
    known = runtime_of(p).graphs.known  # type: ignore[union-attr]
    matmul, conv = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee" if matmul == "tf32" else "tf32"
        both(p, plain, x)
        assert len(known) == 2
        torch.backends.cudnn.conv.fp32_precision = "ieee" if conv == "tf32" else "tf32"
        both(p, plain, x)
        assert len(known) == 3
    finally:
        torch.backends.cuda.matmul.fp32_precision = matmul
        torch.backends.cudnn.conv.fp32_precision = conv
    deterministic = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = not deterministic
        both(p, plain, x)
        assert len(known) == 4
    finally:
        torch.backends.cudnn.deterministic = deterministic


@pytest.mark.usefixtures("stale")
def test_the_memory_of_the_backward_pass_is_kept() -> None:
    """Of parameters that get other memory between a call and its backward pass."""
    p, _, _ = pair()
    (known,) = runtime_of(p).graphs.known.values()  # type: ignore[union-attr]
    assert known.graph is not None
    memory = p.linear.weight.data_ptr()
    p.linear.weight.data = p.linear.weight.data.clone()
    assert memory in [leaf.data_ptr() for leaf in known.graph.leaves]


@pytest.mark.usefixtures("stale")
def test_calibration_starts_anew() -> None:
    p, plain, x = pair()
    for m in (p, plain):
        ssmquant.calibrate(m, [2 * x], progress=False)
    assert not runtime_of(p).graphs.known  # type: ignore[union-attr]
    both(p, plain, x)


# ---- deployed models -------------------------------------------------------------------------------------------------


def deployed_pair(monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[Any, Any, Tensor]:
    """A deployed model that is captured, looked at every ``seconds``, and a copy that is not."""
    monkeypatch.setattr(cuda_graphs, "_SECONDS", seconds)
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    p = ssmquant.prepare(Normed(), QConfig(w_bits=4, a_bits=4, keep_first_last=False), example_inputs=(x,))
    ssmquant.calibrate(p, [x], progress=False)
    p = ssmquant.convert(p)
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(p(x), plain(x))
    assert captured(p) == 1
    return p, plain, x


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "a parameter": lambda m: m.norm.weight.add_(1),
    "what a kernel's form of the weights is of": lambda m: packed(m).scale.mul_(2),
    "another parameter": lambda m: setattr(m.norm, "bias", nn.Parameter(torch.ones(4))),
}


def packed(model: Any) -> Any:
    return next(iter(runtime_of(model).weights.values())).get_submodule("")


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("change", [*CHANGES, *IN_PLACE])
def test_what_changes_in_a_deployed_model(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "strides of a parameter":
        pytest.skip("its weights are packed")
    p, plain, x = deployed_pair(monkeypatch, 0.0)
    before = p(x)
    with torch.no_grad():
        for m in (p, plain):
            (CHANGES | IN_PLACE)[change](m)
        for _ in range(4):
            assert torch.equal(p(x), plain(x))
    assert not torch.equal(p(x), before) or change == "a number of a module"


@pytest.mark.usefixtures("stale")
def test_a_deployed_model_is_not_looked_at_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    p, plain, x = deployed_pair(monkeypatch, 1e9)
    looks = []
    monkeypatch.setattr(cuda_graphs._Watch, "_look", lambda _: looks.append(1))
    with torch.no_grad():
        p(x)
    assert not looks
    monkeypatch.undo()
    monkeypatch.setattr(cuda_graphs, "_capturable", bool)
    for m in (p, plain):  # what changes the whole model says so itself
        m.load_state_dict({k: v * 2 if k.startswith("norm.") else v for k, v in m.state_dict().items()})
    assert not runtime_of(p).graphs.known  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(p(x), plain(x))
    p(x)
    p.to(torch.float32)
    assert not runtime_of(p).graphs.known  # type: ignore[union-attr]


def test_plain_tensors_are_on_the_gpu_while_a_call_is_captured() -> None:
    model = nn.Sequential(Normed())
    own = model[0].mean = torch.zeros(3)
    with cuda_graphs._moved(model, ["0.mean", "0.none"], torch.device("meta")) as copies:
        assert model[0].mean is copies[0]
        assert copies[0].device.type == "meta"
    assert model[0].mean is own


@pytest.mark.usefixtures("stale")
def test_undoing_runs_does_not_touch_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels would make their forms of the weights again, and do so in the capture."""
    p, _, x = deployed_pair(monkeypatch, 0.0)
    versions = [b._version for b in runtime_of(p).buffers()]
    undo = cuda_graphs.restorer(p, [], torch.device("cpu"))
    p(x)
    undo()
    assert versions == [b._version for b in runtime_of(p).buffers()]


def test_runs_before_a_capture_leave_no_trace() -> None:
    """But for ranges that they initialise, which quantizers know of in Python too."""

    class Counts(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.calls = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            self.turn.mul_(2)
            return super().forward(x)

    x = torch.randn(8, 4)
    config = QConfig(w_bits=4, a_bits=4, activation="minmax", keep_first_last=False)
    p = ssmquant.prepare(Counts(), config, example_inputs=(x,)).train()
    before, random = p.turn.clone(), torch.get_rng_state()
    undo = cuda_graphs.restorer(p, [p.calls], torch.device("cpu"))
    p(x)
    torch.rand(3)
    undo()
    assert torch.equal(p.turn, before)
    assert p.calls == 0
    assert torch.equal(torch.get_rng_state(), random)
    for m in p.modules():
        if isinstance(m, Quantizer) and m.needs_data:
            assert m._flags["initialized"] == bool(m.initialized)
    assert any(bool((m.low != -1).any()) for m in p.modules() if isinstance(m, MinMax))


@dataclass
class Result:
    y: Tensor


@pytest.mark.usefixtures("stale")
def test_results_are_not_shared() -> None:
    class Wrapped(Row):
        def forward(self, x: Tensor) -> Any:
            return Result(super().forward(x))

    x = torch.randn(8, 4)
    config = QConfig(w_bits=4, a_bits=4, keep_first_last=False)
    p = ssmquant.prepare(Wrapped(), config, example_inputs=(x,))
    ssmquant.calibrate(p, [x], progress=False)
    ssmquant.cuda_graph(p)
    p(x)
    with pytest.warns(UserWarning, match="holds a Result"):
        first = p(x)
    kept = first.y.clone()
    assert p(2 * x) is not first
    assert torch.equal(first.y, kept)


@pytest.mark.usefixtures("stale")
def test_inputs_that_are_written_to() -> None:
    class Writes(Row):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(0.5)
            return super().forward(x)

    x = torch.randn(8, 4)
    config = QConfig(w_bits=4, a_bits=4, keep_first_last=False)
    p = ssmquant.prepare(Writes(), config, example_inputs=(x.clone(),))
    ssmquant.calibrate(p, [x.clone()], progress=False)
    ssmquant.cuda_graph(p)
    p(x.clone())
    with pytest.warns(UserWarning, match="writes to its input"):
        p(x.clone())
    given = x.clone()
    p(given)
    assert torch.equal(given, 0.5 * x)
