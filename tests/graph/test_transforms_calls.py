"""Transforms are the same in all graphs of a model, or are left out, or a call that cannot have them is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, TraceError
from ssmquant.config import TRANSFORMS
from ssmquant.graph.runtime import runtime_of
from tests.gated import TOKENS, Gated, float_error, kinds, seeded, transformed
from tests.test_mambaquant import uneven_vim


class Stream(Gated):
    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return (out, h) if more else out


class InTraining(Gated):
    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return (out, h) if self.training else out


class ReadsU(Gated):
    def mix(self, h: Tensor) -> tuple[Tensor, Any]:
        u = F.silu(self.in_proj(self.norm(h)))
        return self.out_proj(self.scan(u).transpose(1, 2)), u

    def result(self, out: Tensor, h: Tensor, extra: Any, more: bool) -> Any:
        return out + extra.abs().mean(-1, keepdim=True) if more else out


class Wide(nn.Module):
    """(B, 3, H, W) -> (B, 4, H, W): ``wide`` says which inputs a second convolution reads."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            self.a.weight.mul_(torch.exp(2 * torch.randn(4, 1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        return z + self.c(y) if (x.shape[-1] > 8) == self.wide else z


SMALL, LARGE = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 12)


@pytest.mark.parametrize(("cls", "kind"), [(Stream, "residual_rotation"), (ReadsU, "scan_input")])
def test_a_later_call_that_cannot_have_them_is_refused(cls: Any, kind: str) -> None:
    model = seeded(cls)
    prepared = transformed(model)
    assert kind in kinds(prepared)
    assert float_error(prepared, model, TOKENS) < 1e-5
    with pytest.raises(TraceError, match=kind):
        prepared(TOKENS, more=True)


def test_free_ones_are_checked_too_and_after_conversion() -> None:
    prepared = transformed(seeded(Stream), transforms=("residual_rotation",))
    assert not runtime_of(prepared).transforms.places
    for model in (prepared, ssmquant.convert(prepared), pickle.loads(pickle.dumps(prepared))):
        assert model(TOKENS).shape == (4, 6, 5)
        with pytest.raises(TraceError, match="the model returns it"):
            model(TOKENS, more=True)


@pytest.mark.parametrize(("cls", "kind"), [(Stream, "residual_rotation"), (ReadsU, "scan_input")])
def test_calls_that_calibration_saw_decide(cls: Any, kind: str) -> None:
    model = seeded(cls)
    prepared = transformed(model, batches=[{"x": TOKENS}, {"x": TOKENS, "more": True}])
    assert kind not in kinds(prepared)
    assert "state" in kinds(prepared)
    assert any(s.kind == kind and s.reason for s in runtime_of(prepared).transforms.skipped)
    assert float_error(prepared, model, TOKENS) < 1e-5
    assert float_error(prepared, model, TOKENS, more=True) < 1e-5


def test_training_has_the_same_or_none() -> None:
    model = seeded(InTraining)
    prepared = transformed(model)
    assert "residual_rotation" not in kinds(prepared)
    assert "state" in kinds(prepared)
    assert float_error(prepared.train(), model.train(), TOKENS) < 1e-5


@pytest.mark.parametrize("wide", [True, False])
def test_another_reader_at_other_sizes(wide: bool) -> None:
    torch.manual_seed(0)
    model = Wide(wide).eval()
    # The graph of the example is that of few readers or of both.
    prepared = transformed(model, SMALL, [SMALL, LARGE] if not wide else [SMALL])
    if wide:
        assert kinds(prepared) == {"conv_input"}
        with pytest.raises(TraceError, match="conv_input"):
            prepared(LARGE)
        return
    assert kinds(prepared) == set()
    assert float_error(prepared, model, SMALL) < 1e-5
    assert float_error(prepared, model, LARGE) < 1e-5


def test_static_ranges_with_a_graph_that_calibration_makes() -> None:
    """The new graph is measured before it runs: quantizers have no ranges yet."""
    torch.manual_seed(0)
    config = QConfig.mambaquant(8, 8, keep_first_last=False)
    prepared = ssmquant.prepare(Wide(False).eval(), config, example_inputs=SMALL)
    ssmquant.calibrate(prepared, [SMALL, LARGE])
    assert torch.isfinite(prepared.eval()(LARGE)).all()


def test_each_batch_runs_once_to_be_measured() -> None:
    torch.manual_seed(0)
    prepared = ssmquant.prepare(
        Wide(False).eval(), QConfig(transforms=TRANSFORMS, keep_first_last=False), example_inputs=SMALL
    )
    calls: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        calls.append(batch.shape[-1])
        return model(batch)

    ssmquant.calibrate(prepared, [SMALL, LARGE], forward=forward)
    assert calls == [8, 12, 8, 12]


def test_fresh_from_a_pickle() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    prepared = ssmquant.prepare(uneven_vim(), QConfig.mambaquant(8, 8), example_inputs=x)
    again = pickle.loads(pickle.dumps(prepared))
    ssmquant.calibrate(again, [x])
    ssmquant.calibrate(prepared, [x])
    assert runtime_of(again).transforms.applied == runtime_of(prepared).transforms.applied != []
