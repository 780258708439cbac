"""Which calls need another trace, and that a retrace is right, after convert too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import InputError, QConfig, TraceError
from ssmquant.graph.runtime import Runtime, runtime_of
from tests.small import images, prepared_and_calibrated, scanner, tiny_mambair

CONFIG = QConfig(w_bits=4, a_bits=4, keep_first_last=False)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every run of the user's code under the tracer."""
    made: list[str] = []
    original = Runtime.make_trace

    def watch(self: Runtime, model: nn.Module, call: Any, **kwargs: Any) -> Any:
        made.append("exact" if kwargs.get("exact") else "full")
        return original(self, model, call, **kwargs)

    monkeypatch.setattr(Runtime, "make_trace", watch)
    return made


def test_known_sizes_are_never_traced_again(traces: list[str]) -> None:
    for model in (copy.deepcopy(scanner()), ssmquant.convert(scanner())):
        for shape in ((1, 3, 9, 4), (5, 3, 6, 5), (2, 3, 16, 16)):
            model(images(*shape))
        traces.clear()
        for _ in range(2):
            for shape in ((1, 3, 9, 4), (5, 3, 6, 5), (2, 3, 16, 16)):
                model(images(*shape))
        assert traces == []
        assert len(runtime_of(model).records) == 1


def test_other_sizes_of_mambair_share_one_graph(traces: list[str]) -> None:
    prepared = ssmquant.prepare(tiny_mambair(depths=(1,)), QConfig(), example_inputs=(images(1, 3, 8, 8),))
    traces.clear()
    for shape in ((1, 3, 8, 8), (4, 3, 8, 8), (2, 3, 5, 9), (2, 3, 5, 9), (1, 3, 1, 7)):
        prepared(images(*shape))
    assert len(runtime_of(prepared).records) <= 2
    assert "full" not in traces


class Windows(nn.Module):
    """Keeps a table for the last size, as window attention does, and branches on sizes and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.wide, self.size, self.table = nn.Linear(4, 4), nn.Linear(4, 4), None, None

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:  # (B, L, 4)
        if self.size != x.shape[1]:
            self.size = x.shape[1]
            self.table = torch.arange(self.size, dtype=torch.float32).div(self.size)[None, :, None]
        y = self.inner(x + self.table)
        if twice:
            y = y * 2
        if x.shape[1] > 10:
            y = y - y.mean(1, keepdim=True)
        if x.shape[1] % 2:
            y = F.pad(y, (0, 0, 0, 1))
        return self.wide(torch.tanh(y))


@pytest.mark.usefixtures("plain_graphs")
def test_caches_and_branches_on_sizes(traces: list[str]) -> None:
    torch.manual_seed(0)
    model = Windows()
    bypass = ssmquant.prepare(model, QConfig(), example_inputs=(torch.randn(2, 6, 4),))
    prepared = prepared_and_calibrated(Windows(), CONFIG, torch.randn(2, 6, 4))
    deployed = ssmquant.convert(prepared)
    assert deployed.inner.weight is None
    shapes = [(2, 6, 4), (3, 8, 4), (2, 12, 4), (1, 7, 4), (2, 13, 4), (5, 6, 4)]
    for twice in (False, True):
        for shape in shapes:
            x = torch.randn(shape)
            assert torch.equal(bypass(x, twice), model(x, twice))
            assert torch.equal(deployed(x, twice), prepared(x, twice))
            assert not torch.allclose(prepared(x, twice), model(x, twice), atol=1e-3)
    traces.clear()
    for twice in (True, False):
        for shape in shapes:
            bypass(torch.randn(shape), twice=twice)
            deployed(torch.randn(shape), twice=twice)
    assert traces == []
    assert bypass.size is None  # the tracer leaves no traces in the model


def test_a_retrace_after_convert_allocates_no_weights_and_leaves_none() -> None:
    prepared = prepared_and_calibrated(Windows(), CONFIG, torch.randn(2, 6, 4))
    deployed = ssmquant.convert(prepared)
    before = dict(deployed.state_dict())
    n = len(runtime_of(deployed).records)
    deployed(torch.randn(2, 13, 4))
    assert len(runtime_of(deployed).records) == n + 1
    assert deployed.inner.weight is None
    assert deployed.wide.weight is None
    assert dict(deployed.state_dict()).keys() == before.keys()
    assert len(runtime_of(prepared).records) == n  # copies do not share the list of graphs


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.training:
            y = y + 1
        return self.norm(self.drop(y))


def test_training_and_evaluation_have_a_graph_each(traces: list[str]) -> None:
    torch.manual_seed(0)
    model = Modes()
    prepared = ssmquant.prepare(model, QConfig(), example_inputs=(torch.randn(6, 4),))
    traces.clear()
    x = torch.randn(6, 4)
    for mode in (True, False, True):
        results = []
        for m in (model, prepared):
            m.train(mode)
            torch.manual_seed(1)
            results.append(m(x))
        assert torch.equal(*results)
    assert traces == []
    assert int(prepared.norm.num_batches_tracked) == int(model.norm.num_batches_tracked) == 2


class NewSite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        y = self.inner(x)
        return self.extra(y) if deep else y


def test_a_call_that_reaches_other_sites_is_refused() -> None:
    prepared = prepared_and_calibrated(NewSite(), CONFIG, torch.randn(6, 4))
    for model in (prepared, ssmquant.convert(prepared)):
        with pytest.raises(TraceError, match=r"extra.*example input of this kind"):
            model(torch.randn(6, 4), deep=True)
        assert model(torch.randn(6, 4)).shape == (6, 4)


def test_arguments_that_cannot_be_traced() -> None:
    with pytest.raises(InputError, match="object"):
        prepared_and_calibrated(NewSite(), CONFIG, torch.randn(6, 4))(torch.randn(6, 4), object())


def test_wrong_sizes_fail_as_in_the_original() -> None:
    prepared = prepared_and_calibrated(NewSite(), CONFIG, torch.randn(6, 4))
    for model in (prepared, ssmquant.convert(prepared)):
        with pytest.raises(Exception, match=r"shape|size|mat1|dim"):
            model(torch.randn(6, 5))
        assert model(torch.randn(6, 4)).shape == (6, 4)
