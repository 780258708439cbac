"""Stand-ins of modules: parameters, values, and whole models that are copied, prepared and converted."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant._standins import modules as ours
from ssmquant._standins import standins
from ssmquant.errors import InputError
from ssmquant.ops import selective_scan

# ---- modules -------------------------------------------------------------------------------------------------


def test_mamba_has_the_parameters_of_upstream() -> None:
    model = ours.Mamba(32, d_state=5, d_conv=3, bias=True, device="cpu", dtype=torch.float64)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes == {
        "A_log": (64, 5), "D": (64,), "in_proj.weight": (128, 32), "in_proj.bias": (128,), "conv1d.weight": (64, 1, 3),
        "conv1d.bias": (64,), "x_proj.weight": (12, 64), "dt_proj.weight": (64, 2), "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64), "out_proj.bias": (32,),
    }  # fmt: skip
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {"A_log", "D"}
    torch.testing.assert_close(model.A_log.exp(), torch.arange(1.0, 6).expand(64, 5))
    step = F.softplus(model.dt_proj.bias)
    assert step.min() > 0.9e-3
    assert step.max() < 0.11
    assert model.dt_proj.weight.abs().max() <= 2**-0.5
    assert getattr(model.A_log, "_no_weight_decay", False)
    with pytest.raises(InputError, match="dt_init='ones'"):
        ours.Mamba(32, dt_init="ones")


def test_mamba_computes_what_its_parts_say() -> None:
    model, x = ours.Mamba(16, d_state=4), torch.randn(2, 7, 16)
    h, z = model.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    h = F.silu(model.conv1d(h)[..., :7])
    dt, B, C = model.x_proj(h.transpose(1, 2)).split([1, 4, 4], dim=-1)
    dt = F.linear(dt, model.dt_proj.weight).transpose(1, 2)
    A, bias = -model.A_log.exp(), model.dt_proj.bias
    y = selective_scan(h, dt, A, B.transpose(1, 2), C.transpose(1, 2), model.D, z, bias, True)
    torch.testing.assert_close(model(x), model.out_proj(y.transpose(1, 2)))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError, match=r"Mamba: inference_params is not supported"):
        model(x, inference_params=object())


@pytest.mark.parametrize(
    "options", [{}, {"ngroups": 2, "rmsnorm": False, "D_has_hdim": True}, {"d_ssm": 16, "bias": True}]
)
def test_mamba2(options: dict[str, Any]) -> None:
    model = ours.Mamba2(16, d_state=4, headdim=8, **options)
    inner, groups = options.get("d_ssm", 32), options.get("ngroups", 1)
    shapes = {
        name: tuple(p.shape) for name, p in model.state_dict().items() if not name.endswith("proj.bias")
    }
    expected = {
        "dt_bias": (inner // 8,), "A_log": (inner // 8,), "D": (inner if "D_has_hdim" in options else inner // 8,),
        "in_proj.weight": (64 + 8 * groups + inner // 8, 16), "conv1d.weight": (inner + 8 * groups, 1, 4),
        "conv1d.bias": (inner + 8 * groups,), "norm.weight": (inner,), "out_proj.weight": (16, 32),
    }  # fmt: skip
    if not model.rmsnorm:
        del expected["norm.weight"]
    assert shapes == expected
    assert 0 <= model.A_log.min()
    assert model.A_log.max() <= math.log(16)
    x = torch.randn(2, 7, 16)
    y = model(x)
    assert y.shape == x.shape
    torch.testing.assert_close(model(x.flatten(0, 1), seqlen=7), y.flatten(0, 1))
    torch.testing.assert_close(model(x[:, :4]), y[:, :4])  # causal
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError, match="process_group"):
        ours.Mamba2(16, process_group=object())


@pytest.mark.parametrize("fused", [True, False])
def test_blocks(fused: bool) -> None:
    with standins():
        one = importlib.import_module("mamba_ssm.modules.mamba_simple").Block
        two = importlib.import_module("mamba_ssm.modules.block").Block
        mlp = importlib.import_module("mamba_ssm.modules.mlp").GatedMLP
    x, r = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    block = one(8, partial(nn.Linear, out_features=8), fused_add_norm=fused)
    h, total = block(x, r)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(h, block.mixer(F.layer_norm(x + r, (8,), eps=1e-5)))
    assert {n.partition(".")[0] for n in block.state_dict()} == {"norm", "mixer"}
    block = two(8, partial(nn.Linear, out_features=8), mlp, fused_add_norm=fused)
    h2, total2 = block(x)
    mixed = block.mixer(F.layer_norm(x, (8,), eps=1e-5))
    torch.testing.assert_close(total2, x + mixed)
    torch.testing.assert_close(h2, block.mlp(F.layer_norm(x + mixed, (8,), eps=1e-5)))
    assert block.mlp.fc1.weight.shape == (256, 8)


def test_names_for_several_processes_exist_and_raise() -> None:
    with standins():
        parallel = importlib.import_module("mamba_ssm.distributed.tensor_parallel")
    with pytest.raises(InputError, match="tensor parallelism"):
        parallel.ColumnParallelLinear(4, 4)


# ---- together ------------------------------------------------------------------------------------------------


def _model() -> nn.Module:
    with standins():
        mamba_ssm = importlib.import_module("mamba_ssm")
        return nn.Sequential(
            nn.Linear(3, 16), mamba_ssm.Mamba(16, d_state=4), nn.LayerNorm(16), nn.Linear(16, 2)
        )


def test_models_outlive_the_context() -> None:
    model, x = _model(), torch.randn(2, 6, 3)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(x).equal(y)
    with standins():  # a pickle that was made with the package itself
        name = b"cmamba_ssm.modules.mamba_simple\nMamba\n."
        assert pickle.loads(name) is ours.Mamba


def test_a_standin_model_is_prepared_and_converted() -> None:
    model, x = _model(), torch.randn(4, 12, 3)
    prepared = ssmquant.prepare(model, QConfig(w_bits=8, a_bits=8), example_inputs=(x,))
    ssmquant.calibrate(prepared, [x])
    prepared.train()(torch.randn(2, 20, 3)).sum().backward()
    prepared.eval()
    sites = str(ssmquant.summary(prepared))
    for name in ("1.in_proj", "1.conv1d", "1.x_proj", "1.dt_proj", "1.scan", "1.out_proj"):
        assert name in sites
    with torch.no_grad():
        assert (prepared(x) - model(x)).norm() < 0.3 * model(x).norm()
        torch.testing.assert_close(ssmquant.convert(prepared)(x), prepared(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuda_to_cpu", [False, True])
def test_preparing_inside(cuda_to_cpu: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for linear in self.linears:
                with torch.cuda.device(x.device) if not x.is_cuda else contextlib.nullcontext():
                    x = linear(x).to(torch.float32)
            return x

    x = torch.randn(2, 4)
    with standins(cuda_to_cpu=cuda_to_cpu):
        prepared = ssmquant.prepare(Net(), QConfig(w_bits=8, a_bits=8), example_inputs=(x,))
        ssmquant.calibrate(prepared, [x])
    assert prepared.eval()(torch.randn(3, 4)).shape == (3, 4)  # the context is not in the graph
