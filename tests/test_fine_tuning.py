"""Training a prepared model: groups of parameters, gradients, autocast, moving averages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ssmquant
from ssmquant import ConfigError, QConfig
from tests.small import Scanner, X, fresh, images, tiny_mambair

pytestmark = pytest.mark.usefixtures("plain_graphs")


def test_param_groups_hold_every_trainable_parameter_once(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair)
    prepared.conv_first.weight.requires_grad_(False)
    frozen = next(p for n, p in prepared.named_parameters() if n.endswith("quantizer.alpha"))
    frozen.requires_grad_(False)
    groups = ssmquant.param_groups(prepared, 1e-3, 0.1, quantizer_lr=1e-4)
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in prepared.parameters() if p.requires_grad}
    names = {id(p): n for n, p in prepared.named_parameters()}
    for g in groups:
        ours = {names[id(p)].startswith("_ssmquant.") for p in g["params"]}
        assert len(ours) == 1
        assert (g["weight_decay"], g["lr"]) == ((0.0, 1e-4) if True in ours else (0.1, 1e-3))
    assert len(groups) == 2
    assert ssmquant.param_groups(prepared, 1e-3)[1]["lr"] == 1e-3
    torch.optim.AdamW(groups).step()
    assert len(ssmquant.param_groups(ssmquant.prepare(Scanner(), QConfig(), example_inputs=(X,)), 1e-3)) == 1
    with pytest.raises(ConfigError):
        ssmquant.param_groups(Scanner(), 1e-3)


def test_gradients_reach_everything(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # at their start, the gradient of beta and of w is zero where nothing is clipped
        for n, p in prepared.named_parameters():
            if n.startswith("_ssmquant."):
                p.add_(0.1 * torch.rand(p.shape, generator=generator) * p.abs().mean())
    x = images(2, 3, 8, 10).requires_grad_()
    out = prepared(x)
    (out * torch.rand(out.shape, generator=generator)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    # Documented to be zero: DLS's w where the ceiling decides the scale, LSQ's beta where nothing is clipped.
    dead = []
    for name, p in prepared.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if not p.grad.any():
            dead.append(name)
    assert not [n for n in dead if not n.endswith((".w", ".beta"))], dead
    kinds = {
        n.rpartition(".")[2] for n, p in prepared.named_parameters() if "_ssmquant" in n and p.grad.any()
    }
    assert {"alpha", "beta", "grid", "w", "v"} <= kinds, kinds
    block = prepared.layers[0].residual_group.blocks[0].self_attention
    for own in (block.A_logs, block.Ds, block.dt_projs_bias, block.x_proj_weight, block.dt_projs_weight):
        assert own.grad.any()


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    x = images(4, 3, 8, 8)
    goal = F.interpolate(x, scale_factor=2, mode="nearest").flip(1)
    prepared = ssmquant.prepare(tiny_mambair(), QConfig.qmambair(4), example_inputs=(x,)).train()
    optimizer = torch.optim.AdamW(ssmquant.param_groups(prepared, 5e-3, 1e-4))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (prepared(x) - goal).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    prepared.eval()
    after = (prepared(x) - goal).abs().mean().item()
    assert after < 0.75 * losses[0]
    assert torch.equal(ssmquant.convert(prepared)(x), prepared(x))


def test_autocast_trains(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair).train()
    x = images(1, 3, 8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prepared(x)
        loss = out.float().square().mean()
    loss.backward()
    assert out.isfinite().all()
    for name, p in prepared.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    with torch.no_grad():
        full = copy.deepcopy(mambair)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = mambair(x)
            deployed = ssmquant.convert(mambair)(x)
    assert (half.float() - full).abs().max() < 0.1
    torch.testing.assert_close(deployed.float(), half.float(), rtol=0, atol=0)


def test_moving_average(mambair: Any) -> None:
    prepared = copy.deepcopy(mambair).train()
    ema = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(ssmquant.param_groups(prepared, 0.01))
    x = images(2, 3, 8, 10)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
        ema.update_parameters(prepared)
    assert ema.eval()(x).isfinite().all()
    assert not torch.equal(ema(x), prepared.eval()(x))
    assert torch.equal(ssmquant.convert(ema.module)(x), ema(x))


def test_moving_average_from_an_uncalibrated_start() -> None:
    prepared = fresh().train()
    ema = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    prepared(X)
    ema.update_parameters(prepared)
    assert torch.equal(ema.eval()(X), prepared.eval()(X))
