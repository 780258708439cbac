"""Models in which a transform must not apply, or is easily folded wrongly; and what happens when calibration fails."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ssmquant
from ssmquant import QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.transforms import View, find_transforms
from ssmquant.graph.transforms.projections import Projection, scatter
from ssmquant.ops.hadamard import hadamard, hadamard_matrix
from ssmquant.quantizers import MinMax
from tests.gated import TOKENS, WIDTH, Gated, float_error, kinds, seeded, transformed

# ---- where it must not apply -----------------------------------------------------------------------------------------


class LastState(Gated):
    def mix(self, h: Tensor) -> tuple[Tensor, Any]:
        y, state = self.scan(F.silu(self.in_proj(self.norm(h))), return_last_state=True)
        return self.out_proj(y.transpose(1, 2)), state

    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return out, extra


class LastStateUsed(LastState):
    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return out + extra.flatten(1)[:, None, :5]


class LastStateIgnored(LastState):
    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return out


@pytest.mark.parametrize("cls", [LastState, LastStateUsed])
def test_a_last_state_that_is_used(cls: Any) -> None:
    model = seeded(cls)
    prepared = transformed(model)
    assert float_error(prepared, model, TOKENS) < 1e-5
    assert not kinds(prepared) & {"scan_input", "state"}
    reasons = {s.kind: s.reason for s in runtime_of(prepared).transforms.skipped}
    assert "last state" in reasons["state"]
    assert "last state" in reasons["scan_input"]


def test_a_last_state_that_nobody_uses() -> None:
    model = seeded(LastStateIgnored)
    prepared = transformed(model)
    assert {"scan_input", "state"} <= kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5


class GroupsFromASize(Gated):
    """As Hugging Face's Mamba calls its convolution."""

    def more(self) -> None:
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def mix(self, h: Tensor) -> tuple[Tensor, Any]:
        u = self.in_proj(self.norm(h)).transpose(1, 2)
        u = F.conv1d(u, self.conv.weight, self.conv.bias, padding=2, groups=u.shape[1])[..., : u.shape[2]]
        return self.out_proj(self.scan(F.silu(u).transpose(1, 2)).transpose(1, 2)), None


def test_groups_that_are_computed() -> None:
    model = seeded(GroupsFromASize)
    prepared = transformed(model)
    assert {"conv_input", "scan_input"} <= kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5


class AddKeyword(Gated):
    def add(self, h: Tensor) -> Tensor:
        return torch.add(h + self.position, other=0.7)


class SubKeyword(Gated):
    def add(self, h: Tensor) -> Tensor:
        return torch.sub(input=h + self.position, other=0.3)


class MulKeyword(Gated):
    def more(self) -> None:
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def add(self, h: Tensor) -> Tensor:
        return torch.mul(h + self.position, other=self.gamma)


class Rounded(Gated):
    def add(self, h: Tensor) -> Tensor:
        return torch.div(h + self.position, 0.25, rounding_mode="floor")


class ReshapedKeyword(Gated):
    def add(self, h: Tensor) -> Tensor:
        return torch.flip(input=h + self.position, dims=[1])


@pytest.mark.parametrize("cls", [AddKeyword, SubKeyword, MulKeyword, Rounded, ReshapedKeyword])
def test_keywords_on_the_stream(cls: Any) -> None:
    model = seeded(cls)
    prepared = transformed(model)
    assert float_error(prepared, model, TOKENS) < 1e-5
    assert "residual_rotation" not in kinds(prepared)


class AddAlpha(Gated):
    def add(self, h: Tensor) -> Tensor:
        return torch.add(h, self.position, alpha=0.7)


def test_alpha_is_linear() -> None:
    model = seeded(AddAlpha)
    prepared = transformed(model)
    assert "residual_rotation" in kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5


class Square(Gated):
    def mix(self, h: Tensor) -> tuple[Tensor, Any]:
        y = self.scan(F.silu(self.in_proj(self.norm(h))))
        return self.out_proj(torch.mul(y, other=y).transpose(1, 2)), None


class Floor(Gated):
    def mix(self, h: Tensor) -> tuple[Tensor, Any]:
        y = self.scan(F.silu(self.in_proj(self.norm(h))))
        return self.out_proj(torch.div(y, 0.25, rounding_mode="floor").transpose(1, 2)), None


@pytest.mark.parametrize("cls", [Square, Floor])
def test_keywords_on_a_scan_output(cls: Any) -> None:
    model = seeded(cls)
    prepared = transformed(model)
    assert "scan_input" not in kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5


class Baked(Gated):
    def add(self, h: Tensor) -> Tensor:
        return (h + self.position) * self.position.tolist()[0][0][0]


def test_a_weight_that_is_read_as_a_number() -> None:
    model = seeded(Baked)
    prepared = transformed(model)
    assert "residual_rotation" not in kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5


# ---- where it is easily folded wrongly -------------------------------------------------------------------------------


class BufferBias(Gated):
    def more(self) -> None:
        self.register_buffer("shift", torch.rand(WIDTH))
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def add(self, h: Tensor) -> Tensor:
        return F.linear(h, self.matrix, self.shift)


class BufferNorm(Gated):
    def more(self) -> None:
        self.register_buffer("gain", torch.rand(WIDTH) + 0.5)

    def add(self, h: Tensor) -> Tensor:
        return F.rms_norm(h + self.position, (WIDTH,), self.gain)


class BufferPosition(Gated):
    def more(self) -> None:
        value = self.position.detach().clone()
        del self.position
        self.register_buffer("position", value)


@pytest.mark.parametrize("cls", [BufferBias, BufferNorm, BufferPosition])
def test_buffers_instead_of_parameters(cls: Any) -> None:
    model = seeded(cls)
    prepared = transformed(model)
    assert "state" in kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.w = nn.Parameter(torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last))
        with torch.no_grad():
            self.a.weight.mul_(torch.exp(2 * torch.randn(4, 1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.a(x), self.w.reshape(2, 2, 4, 3, 3).reshape(4, 4, 3, 3), padding=1)


def test_a_weight_in_channels_last_order_through_views() -> None:
    model, x = seeded(ChannelsLast), torch.rand(1, 3, 8, 8)
    prepared = transformed(model, x)
    assert kinds(prepared) == {"conv_input"}
    assert prepared.w.is_contiguous(memory_format=torch.channels_last)
    assert float_error(prepared, model, x) < 1e-5
    p = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    scatter(p, torch.arange(24), torch.arange(24.0))
    assert torch.equal(p.reshape(-1), torch.arange(24.0))


def test_an_empty_batch_beside_others() -> None:
    model = seeded(Gated)
    prepared = transformed(model, batches=[TOKENS[:0], TOKENS])
    assert runtime_of(prepared).transforms.applied == runtime_of(transformed(model)).transforms.applied != []


def test_weights_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed across devices: all is on the CPU until it is copied to the parameter."""
    written: list[Tensor] = []
    monkeypatch.setattr(Projection, "write", lambda self, model, value: written.append(value))
    prepared = ssmquant.prepare(seeded(Gated), QConfig(), example_inputs=TOKENS)
    found, _ = find_transforms(View(prepared, runtime_of(prepared).records[0].trace))
    projections = {id(p): p for c in found for p in vars(c).values() if hasattr(p, "turn_inputs")}
    projections |= {id(e.projection): e.projection for c in found for e in getattr(c, "ends", ())}
    assert len(projections) >= 4
    with FakeTensorMode(allow_non_fake_inputs=True):
        for mod in prepared.modules():
            for name, p in mod._parameters.items():
                if p is not None:
                    mod._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
        for p in projections.values():
            g, o, i = p.groups
            assert p.read(prepared).device.type == "cpu"
            p.bias = None
            p.scale_inputs(prepared, torch.ones(g * i))
            p.scale_outputs(prepared, torch.ones(g * o))
            p.turn_inputs(prepared, torch.eye(i))
            p.turn_outputs(prepared, torch.eye(o), torch.arange(o))
    assert len(written) == 4 * len(projections)
    assert {t.device.type for t in written} == {"cpu"}


class Loop(Gated):
    """Its graph is of one batch size, so that the samples' axis shows in a second graph only."""

    def add(self, h: Tensor) -> Tensor:
        return h + torch.cat([self.position for _ in range(h.shape[0])], 0)


def test_samples_stay_apart_where_code_loops_over_them() -> None:
    model = seeded(Loop)

    def axes(**options: Any) -> dict[str, int | None]:
        prepared = transformed(model, a_bits=4, **options)
        points = runtime_of(prepared).records[0].plan.points
        return {p.name: p.axis for p in points if p.what == "activation"}

    plain, ours = axes(transforms=()), axes()
    assert 0 in plain.values()
    assert ours == plain


# ---- contexts and failures -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_matrices() -> Any:
    from ssmquant.ops import hadamard as module

    def clear() -> None:
        module._matrix.cache_clear()
        module._converted.clear()

    clear()
    yield
    clear()


@pytest.mark.usefixtures("fresh_matrices")
def test_matrices_do_not_keep_the_first_context() -> None:
    with torch.inference_mode():
        hadamard(torch.randn(2, 12, dtype=torch.float64))
    w = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    hadamard(w).sum().backward()
    assert w.grad is not None
    with torch.device("meta"):
        hadamard_matrix(4)
    torch.testing.assert_close(hadamard(torch.eye(4)), hadamard_matrix(4).T.float())


@pytest.mark.usefixtures("fresh_matrices")
def test_matrices_are_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmquant.ops import hadamard as module

    x = torch.randn(3, 24)
    expected = hadamard(x)
    monkeypatch.setattr(module, "_matrix", None)
    assert torch.equal(hadamard(x), expected)


def test_calibration_in_inference_mode_and_training() -> None:
    model = seeded(Gated)
    prepared = ssmquant.prepare(model, QConfig.mambaquant(8, 8), example_inputs=TOKENS)
    with torch.inference_mode():
        ssmquant.calibrate(prepared, [TOKENS])
    assert not any(t.is_inference() for t in runtime_of(prepared).transforms.buffers())
    prepared.train()(TOKENS).square().mean().backward()


def everything(prepared: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in prepared.state_dict().items()}


def assert_unchanged(prepared: Any, before: dict[str, Tensor]) -> None:
    now = prepared.state_dict()
    assert now.keys() == before.keys()
    for k, v in now.items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True)
    assert not runtime_of(prepared).transforms.settled
    assert not runtime_of(prepared).transforms.places


def test_a_failure_while_folding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmquant.graph.transforms.residual import Residual

    def fails(*_: Any) -> Any:
        raise RuntimeError("in the middle")

    model = seeded(Gated)
    prepared = ssmquant.prepare(model, QConfig.mambaquant(8, 8), example_inputs=TOKENS)
    before = everything(prepared)
    with monkeypatch.context() as m:
        m.setattr(Residual, "fold", fails)  # the last of all
        with pytest.raises(RuntimeError, match="in the middle"):
            ssmquant.calibrate(prepared, [TOKENS])
    assert_unchanged(prepared, before)
    ssmquant.calibrate(prepared, [TOKENS])
    assert float_error(prepared.eval(), model, TOKENS) < 1e-5


def test_a_failure_in_the_second_pass_changes_nothing() -> None:
    model = seeded(Gated)
    prepared = ssmquant.prepare(model, QConfig.mambaquant(8, 8), example_inputs=TOKENS)
    before, calls = everything(prepared), []

    def forward(m: nn.Module, batch: Tensor) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return m(batch)

    with pytest.raises(KeyboardInterrupt):
        ssmquant.calibrate(prepared, [TOKENS], forward=forward)
    assert_unchanged(prepared, before)
    ssmquant.calibrate(prepared, [TOKENS])
    assert float_error(prepared.eval(), model, TOKENS) < 1e-5


def test_weights_start_anew_only_where_something_was_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmquant import workflow

    started: list[int] = []
    real = workflow.initialize_weights
    monkeypatch.setattr(workflow, "initialize_weights", lambda *a, **k: (started.append(0), real(*a, **k)))
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    prepared = ssmquant.prepare(
        chain, QConfig(transforms=("state",), keep_first_last=False), example_inputs=torch.randn(3, 4)
    )
    started.clear()
    ssmquant.calibrate(prepared, [torch.randn(3, 4)])
    assert not started
    assert runtime_of(prepared).transforms.settled


def test_percentiles_of_mostly_equal_values() -> None:
    x = torch.zeros(200000)
    x[0] = 1.0
    q = MinMax(8, percentile=0.99999)
    q.fit([x])
    assert float(q.high) == 1
    assert float(q(x)[0]) == pytest.approx(1.0)


def test_pickles_of_older_versions() -> None:
    model = seeded(Gated)
    prepared = ssmquant.prepare(
        model, QConfig(weight="minmax", w_bits=8, keep_first_last=False), example_inputs=TOKENS
    )
    runtime = runtime_of(prepared)
    del runtime._modules["transforms"], runtime.__dict__["instead"]
    minmax = next(q for q in runtime.weights.values() if isinstance(q, MinMax))
    for name in ("observer", "percentile", "momentum"):
        del minmax.__dict__[name]
    again = pickle.load(io.BytesIO(pickle.dumps(prepared)))
    ssmquant.calibrate(again, [TOKENS])
    assert torch.isfinite(again.eval()(TOKENS)).all()
    assert ssmquant.summary(again).transforms == ()
    assert copy.deepcopy(again).eval()(TOKENS).shape == (4, 6, 5)
    cut = MinMax(8, percentile=0.99)
    for name in ("observer", "momentum"):
        del cut.__dict__[name]
    assert pickle.loads(pickle.dumps(cut)).observer == "percentile"
