"""What a replay cannot see: what changes after the capture, in prepared and in deployed models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import ssmquant
from ssmquant import QConfig
from ssmquant.graph import cuda_graphs
from ssmquant.graph.runtime import runtime_of
from ssmquant.ops import use_backend
from ssmquant.quantizers import MinMax, Quantizer
from tests.graph.replayed import captured, nothing, same, taped
from tests.graph.test_fuse import Scan2d


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


def deployed_pair(
    monkeypatch: pytest.MonkeyPatch, seconds: float, model: nn.Module | None = None
) -> tuple[Any, Any, Tensor]:
    """A deployed model that is captured, looked at every ``seconds``, and a copy that is not."""
    monkeypatch.setattr(cuda_graphs, "_SECONDS", seconds)
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    config = QConfig(w_bits=4, a_bits=4, keep_first_last=False)
    p = ssmquant.prepare(Normed() if model is None else model, config, example_inputs=(x,))
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
@pytest.mark.parametrize(
    "change", sorted({*CHANGES, *IN_PLACE} - {"strides of a parameter"})
)  # weights are packed
def test_what_changes_in_a_deployed_model(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("stale")
def test_two_calls_of_a_deployed_model_before_their_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    p, plain, x = deployed_pair(monkeypatch, 1e9)
    xs = [x.clone().requires_grad_(), (3 * x).requires_grad_()]
    for _ in range(4):
        p(xs[0]).sum().backward()
    assert captured(p) == 2
    found = [torch.autograd.grad(sum(m(v).square().sum() for v in xs), xs) for m in (p, plain)]  # type: ignore[arg-type]
    same(list(found[0]), list(found[1]))


class Flagged(Normed):
    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return super().forward(2 * x if twice else x)


@pytest.mark.usefixtures("stale")
def test_calls_that_begin_before_all_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of two like calls is replayed at once for a third one, which may be of another kind after all."""
    replays = []
    forward = cuda_graphs._Graph.forward

    def counted(graph: Any, inputs: Any) -> Any:
        replays.append(graph)
        return forward(graph, inputs)

    monkeypatch.setattr(cuda_graphs._Graph, "forward", counted)
    p, plain, x = deployed_pair(monkeypatch, 1e9, Flagged())
    kinds = {
        "other values": lambda m: m(3 * x),
        "a flag": lambda m: m(x, twice=True),
        "a larger batch": lambda m: m(torch.cat([x, x])),
        "autocast": autocast,
        "a hook": hooked,
        "another back end": backed,
    }

    def ahead() -> int:
        """Replays of a call like those before."""
        for m in (p, p, p):
            m(x)
        replays.clear()
        assert torch.equal(p(x), plain(x))
        return len(replays)

    with torch.no_grad():
        for name, call in kinds.items():
            assert ahead() == 1, name
            replays.clear()
            for _ in range(4):
                assert torch.equal(call(p), call(plain)), name
            assert name != "a hook" or len(replays) == 1  # the first one was in vain, no further ones are
        # To and fro there is nothing to rely on: no call is replayed twice.
        for _ in range(3):
            p(x), kinds["a flag"](p)
        replays.clear()
        for _ in range(3):
            p(x), kinds["a flag"](p)
        assert len(replays) == 6
        assert ahead() == 1
        for m in (p, plain):
            m.load_state_dict({k: v * 2 if k.startswith("norm.") else v for k, v in m.state_dict().items()})
        assert torch.equal(p(x), plain(x))


def autocast(m: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = m(torch.ones(8, 4))
    return y


def backed(m: nn.Module) -> Tensor:
    with use_backend("triton", op="selective_scan"):
        y: Tensor = m(torch.ones(8, 4))
    return y


def hooked(m: nn.Module) -> Tensor:
    handle = register_module_forward_hook(lambda module, args, out: None)
    y: Tensor = m(torch.ones(8, 4))
    handle.remove()
    return y


@pytest.mark.usefixtures("stale")
def test_choices_of_back_ends_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    p, plain, x = deployed_pair(monkeypatch, 1e9)
    with torch.no_grad(), use_backend("triton", op="selective_scan"):
        for _ in range(3):
            assert torch.equal(p(x), plain(x))
        assert captured(p) == 2


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_is_left_or_entered(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p, plain, x = deployed_pair(monkeypatch, 1e9)
    for mode in (inside, not inside, inside):
        with torch.inference_mode(mode), torch.no_grad():
            for _ in range(5):
                assert torch.equal(p(x), plain(x))


class Drawing(Flagged):
    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return super().forward(x + torch.rand_like(x), twice)


@pytest.mark.usefixtures("stale")
def test_random_numbers_are_drawn_once_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_SECONDS", 0.0)
    x = torch.randn(8, 4)
    config = QConfig(w_bits=4, a_bits=4, keep_first_last=False)
    p = ssmquant.prepare(Drawing(), config, example_inputs=(x,))
    ssmquant.calibrate(p, [x], progress=False)
    p = ssmquant.convert(p)
    plain = copy.deepcopy(p)
    ssmquant.cuda_graph(p)
    with torch.no_grad():
        for twice in (True, False):
            for _ in range(4):
                p(x, twice)
        assert captured(p) == 2
        torch.manual_seed(3)
        found = [p(x), p(x), p(x, True), p(x)]
        torch.manual_seed(3)
        same(found, [plain(x), plain(x), plain(x, True), plain(x)])
        for m in (p, plain):
            m.norm.weight.mul_(1.5)
        torch.manual_seed(3)
        found = [p(x)]  # finds that the model has changed
        torch.manual_seed(3)
        same(found, [plain(x)])


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("twice", [True, False])
def test_calls_of_other_threads(twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is in the middle of a replay when another one, of the same shape, begins."""
    p, plain, x = deployed_pair(monkeypatch, 1e9, Flagged())
    reached, go = threading.Event(), threading.Event()
    results: dict[str, Tensor] = {}

    def call(name: str, *args: Any) -> threading.Thread:
        def run() -> None:
            with torch.no_grad():
                results[name] = p(*args)

        thread = threading.Thread(target=run, name=name)
        thread.start()
        return thread

    with torch.no_grad():
        for _ in range(4):
            p(x, True)
        p(x)
        graph: Any = runtime_of(p).graphs._last.graph  # type: ignore[union-attr]
        replay = graph.replay_forward

        def slowly() -> None:
            replay()
            if threading.current_thread().name == "first":
                reached.set()
                go.wait(10)

        graph.replay_forward = slowly
        first = call("first", x)
        reached.wait(10)
        second = call("second", 5 * x, twice)
        second.join(0.3)  # it has time to write over what the first one has not read yet
        go.set()
        first.join()
        second.join()
        assert torch.equal(results["first"], plain(x))
        assert torch.equal(results["second"], plain(5 * x, twice))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_does_not_depend_on_the_calls_before() -> None:
    x = torch.randn(8, 4)
    p = ssmquant.prepare(Normed(), QConfig(w_bits=4, a_bits=4, keep_first_last=False), example_inputs=(x,))
    p = ssmquant.convert(ssmquant.calibrate(p, [x], progress=False))
    ssmquant.cuda_graph(p)
    graphs: Any = runtime_of(p).graphs
    compiled = torch.compile(p, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        want = compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count in range(3):
                graphs._alike, graphs._last = count, object()
                assert torch.equal(compiled(x), want)


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


# ---- captures --------------------------------------------------------------------------------------------------------


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
