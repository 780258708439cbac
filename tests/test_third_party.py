"""Code that knows nothing of us: mambapy's Mamba, which reads the weights of a module that it never calls."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ssmquant
from ssmquant import QConfig
from tests.small import points, prepared_and_calibrated, rows

mamba = pytest.importorskip("mambapy.mamba")
LENGTHS = (7, 24, 32, 33)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = mamba.Mamba(mamba.MambaConfig(d_model=16, n_layers=2, d_state=4))
    return built


@pytest.fixture(scope="module")
def prepared(model: nn.Module) -> Any:
    return prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), tokens(2, 24))


def test_bypass_is_exact_at_other_lengths(model: nn.Module) -> None:
    bypass = ssmquant.prepare(model, QConfig(), example_inputs=(tokens(2, 24),))
    for length in LENGTHS:
        for batch in (1, 3):
            with torch.no_grad():
                assert torch.equal(bypass(tokens(batch, length)), model(tokens(batch, length))), length


def test_sites_are_found_where_modules_are_never_called(prepared: Any) -> None:
    found = set(points(prepared))
    for i in (0, 1):
        for name in ("dt_proj", "x_proj", "conv1d"):
            assert f"layers.{i}.mixer.{name}:weight" in found, name
            assert f"layers.{i}.mixer.{name}:input" in found
    kinds = {n: r.kind for n, r in rows(prepared).items()}
    assert kinds["layers.0.mixer.dt_proj"] == "matmul"
    assert kinds["layers.0.mixer.conv1d"] == "conv"


def test_the_whole_way(model: nn.Module, prepared: Any, tmp_path: Path) -> None:
    trained = copy.deepcopy(prepared).train()
    optimizer = torch.optim.AdamW(ssmquant.param_groups(trained, 1e-3))
    with torch.no_grad():
        goal = model(tokens(2, 24))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (trained(tokens(2, 24)) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained.eval()
    deployed = ssmquant.convert(trained)
    ssmquant.save(deployed, tmp_path / "m")
    torch.manual_seed(7)
    again = ssmquant.load(tmp_path / "m", mamba.Mamba(mamba.MambaConfig(d_model=16, n_layers=2, d_state=4)))
    for length in LENGTHS:
        with torch.no_grad():
            torch.testing.assert_close(
                deployed(tokens(3, length)), trained(tokens(3, length)), rtol=1e-5, atol=1e-5
            )
            assert torch.equal(again(tokens(3, length)), deployed(tokens(3, length)))
    assert ssmquant.verify(trained, again, (tokens(1, 24),)).worst_rel < 1e-5
    assert again.layers[0].mixer.dt_proj.weight is None
    file = io.BytesIO()
    torch.save(deployed.state_dict(), file)
    assert file.tell() > 0
