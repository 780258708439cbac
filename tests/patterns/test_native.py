"""An autograd.Function of native code that no table knows: refused with a remedy, and the remedies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import Adapter, CoverageError, QConfig, TraceError
from ssmquant.adapter import FunctionRole, register_adapter
from ssmquant.graph.runtime import runtime_of
from tests.patterns import native
from tests.patterns.steps import sqnr

W8 = QConfig.minmax(8, 8, keep_first_last=False)
WEIGHTS = ("w1.weight", "w1.bias", "w2.weight")


def gated_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, gain: float) -> Tensor:
    a, b = (x @ w1.mT + b1).chunk(2, dim=-1)
    return gain * (a * torch.sigmoid(a) * b) @ w2.mT


class GatedMlpFn(native.Compiled):
    """Reads bytes."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight1: Any, bias1: Any, weight2: Any, gain: float = 1.0) -> Any:
        return native.Compiled.launch(ctx, gated_mlp, x, weight1, bias1, weight2, gain)


LIBRARY = torch.library.Library("ssmquant_patterns", "DEF")
LIBRARY.define("gated_mlp(Tensor x, Tensor w1, Tensor b1, Tensor w2, float gain) -> Tensor")
LIBRARY.impl("gated_mlp", gated_mlp, "CPU")


class OperatorFn(torch.autograd.Function):
    """Calls an operator that has a kernel for a CPU, and says nothing of shapes."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight1: Any, bias1: Any, weight2: Any, gain: float = 1.0) -> Any:
        return torch.ops.ssmquant_patterns.gated_mlp(x, weight1, bias1, weight2, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class PickyFn(torch.autograd.Function):
    """Has no place for what is no tensor with an address."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight1: Any, bias1: Any, weight2: Any, gain: float = 1.0) -> Any:
        if x.untyped_storage().data_ptr() == 0:
            raise RuntimeError("gated_mlp: x has no storage")
        return gated_mlp(x, weight1, bias1, weight2, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class Fused(nn.Module):
    def __init__(self, function: Any = GatedMlpFn) -> None:
        super().__init__()
        self.function = function
        self.embed, self.w1, self.w2 = nn.Linear(4, 6), nn.Linear(6, 16), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.function.apply(x, self.w1.weight, self.w1.bias, self.w2.weight, 2.0)  # the line
        return self.head(x)


def unfold(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, gain: float) -> Tensor:
    a, b = F.linear(x, weight1, bias1).chunk(2, dim=-1)
    return gain * F.linear(F.silu(a) * b, weight2)


def shape(x: Tensor, weight2: Tensor, **others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight2.shape[0]))


OPAQUE = Adapter("patterns-opaque", ("Fused",), functions=(FunctionRole("GatedMlpFn", shape=shape),))
OPEN = Adapter(
    "patterns-open", ("Fused",), functions=(FunctionRole("test_native.GatedMlpFn", unfold=unfold),)
)


@pytest.fixture
def registered() -> Iterator[None]:
    from ssmquant import adapter

    for each in (OPAQUE, OPEN):
        register_adapter(each)
    yield
    for each in (OPAQUE, OPEN):
        del adapter._REGISTERED[each.name]


def model() -> Fused:
    torch.manual_seed(0)
    return Fused().eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("function", [GatedMlpFn, OperatorFn, PickyFn])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_an_unknown_native_function_is_refused(function: Any) -> None:
    """The error names the Function, the line that calls it, and what to write."""
    lines, start = inspect.getsourcelines(Fused.forward)
    line = start + next(i for i, text in enumerate(lines) if text.rstrip().endswith("# the line"))
    before = nn.Module.__call__
    foreign = Fused(function)
    with pytest.raises(TraceError) as caught:
        ssmquant.prepare(foreign, W8, example_inputs=(draw(2, 5, 4),))
    text = str(caught.value)
    assert function.__name__ in text
    assert f"{Path(__file__).name}:{line}" in text
    assert f"FunctionRole('{function.__name__}'" in text or f'FunctionRole("{function.__name__}"' in text
    assert nn.Module.__call__ is before
    foreign(draw(2, 5, 4))  # still runs


def test_a_function_of_a_known_shape_is_one_node(registered: None, tmp_path: Path) -> None:
    """It stays in float, and only if the configuration says so for the weights in it."""
    original, x = model(), draw(2, 5, 4)
    with pytest.raises(CoverageError, match=r"w1\.weight.*GatedMlpFn"):
        ssmquant.prepare(original, W8, example_inputs=(x,), adapter=OPAQUE)
    bare = ssmquant.prepare(original, QConfig(), example_inputs=(x,), adapter=OPAQUE)
    kept = QConfig.minmax(8, 8, keep_first_last=False, keep_float=WEIGHTS)
    prepared = ssmquant.prepare(original, kept, example_inputs=(x,), adapter=OPAQUE)
    ssmquant.calibrate(prepared, [x, draw(8, 9, 4)]).eval()
    calls = [n for n in prepared.graph.nodes if "GatedMlpFn" in str(n.target)]
    assert [n.op for n in calls] == ["call_module"]
    assert list(runtime_of(prepared).functions) != []
    assert [r.name for r in ssmquant.summary(prepared).rows] == ["embed", "head"]
    deployed = ssmquant.convert(prepared)
    ssmquant.save(deployed, tmp_path / "opaque.safetensors")
    loaded = ssmquant.load(tmp_path / "opaque.safetensors", Fused())
    for other in (x, draw(1, 5, 4), draw(5, 9, 4)):
        torch.testing.assert_close(bare(other), original(other), rtol=0, atol=0)
        torch.testing.assert_close(loaded(other), deployed(other), rtol=0, atol=0)
        torch.testing.assert_close(deployed(other), prepared(other), rtol=1e-5, atol=1e-5)
        assert 20 < sqnr([prepared(other).detach()], [original(other).detach()]) < 80
    prepared.train()(x).sum().backward()
    assert prepared.w1.weight.grad.isfinite().all()
    assert prepared.w1.weight.grad.abs().sum() > 0


def test_an_unfolded_function_has_sites(registered: None, tmp_path: Path) -> None:
    original, x = model(), draw(2, 5, 4)
    bare = ssmquant.prepare(original, QConfig(), example_inputs=(x,), adapter=OPEN)
    prepared = ssmquant.prepare(original, W8, example_inputs=(x,), adapter=OPEN)
    ssmquant.calibrate(prepared, [x, draw(8, 9, 4)]).eval()
    rows = ssmquant.summary(prepared).rows
    assert [(r.name, r.kind, r.scheme) for r in rows] == [
        (name, "linear", "W8A8") for name in ("embed", "w1", "w2", "head")
    ]
    assert list(runtime_of(prepared).functions) == []
    deployed = ssmquant.convert(prepared)
    assert ssmquant.verify(prepared, deployed, (x,)).worst_rel <= 1e-6
    assert deployed.w1.weight is None
    ssmquant.save(deployed, tmp_path / "open.safetensors")
    loaded = ssmquant.load(tmp_path / "open.safetensors", Fused())
    for other in (x, draw(1, 5, 4), draw(5, 9, 4)):
        torch.testing.assert_close(bare(other), original(other), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(loaded(other), deployed(other), rtol=0, atol=0)
        assert 20 < sqnr([prepared(other).detach()], [original(other).detach()]) < 80


class Newer:
    class MambaInnerFnNoOutProj(native.Compiled):
        """A known name, and an argument that nothing is known of."""

        @staticmethod
        def forward(
            ctx: Any, xz: Any, conv1d_weight: Any, conv1d_bias: Any, x_proj_weight: Any, delta_proj_weight: Any,
            A: Any, D: Any = None, delta_bias: Any = None, delta_softplus: bool = True, temperature: float = 1.0,
        ) -> Any:  # fmt: skip
            weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, None, None)
            others = (None, None, None, D, delta_bias, None, None, delta_softplus)
            return native.Compiled.launch(ctx, native.inner, xz, *weights, A, *others)


class Mixer(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.embed, self.temperature = nn.Linear(4, 8), temperature
        self.conv1d, self.x_proj, self.dt_proj = (
            nn.Conv1d(4, 4, 3, groups=4),
            nn.Linear(4, 5),
            nn.Linear(1, 4),
        )
        self.A_log = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        xz = self.embed(x).transpose(1, 2)
        weights = (self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
        rest = (-self.A_log.exp(), None, self.dt_proj.bias, True, self.temperature)
        return Newer.MambaInnerFnNoOutProj.apply(xz, *weights, *rest)


def test_a_known_function_with_an_argument_of_unknown_effect() -> None:
    """Fine at its default, refused elsewhere: a guess would be another model."""
    x = draw(2, 6, 4)
    plain = Mixer(1.0).eval()
    prepared = ssmquant.prepare(plain, QConfig(), example_inputs=(x,))
    torch.testing.assert_close(prepared(x), plain(x), rtol=2e-6, atol=2e-6)
    with pytest.raises(TraceError, match=r"temperature(.|\n)*FunctionRole"):
        ssmquant.prepare(Mixer(0.5), QConfig(), example_inputs=(x,))
