"""``QConfig.mambaquant`` on every family of docs/families.md: its twin in tests/patterns, or the zoo's own model.

All that the preset has is done or listed with a reason, a deployed model computes what the prepared one does, and
transforms alone are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph import trace
from ssmquant.ops import use_backend
from tests.patterns import steps
from tests.patterns.steps import TWINS, call, close, tensors
from tests.patterns.twin import Twin, draw_values
from tests.small import tiny_mambair

PRESET = QConfig.mambaquant(8, 8)
KINDS = {"dt_scale": "dt", "dt_rotation": "dt", "dt_mean": "dt"}
VMAMBA = {"depths": (1, 1), "dims": 8, "ssm_d_state": 2, "num_classes": 3, "drop_path_rate": 0.0}
VIM = {
    "img_size": 16, "patch_size": 4, "stride": 4, "depth": 2, "d_state": 2, "num_classes": 3, "embed_dim": 12,
    "drop_path_rate": 0.0, "final_pool_type": "mean",
}  # fmt: skip


def ours(name: str, build: Callable[[], nn.Module]) -> Twin:
    return Twin(name, build, ((3, 16, 16),), (), 0, batches=(2,), draw=draw_values)


MODELS = dict(TWINS) | {
    t.name: t
    for t in (
        ours("MambaIR", tiny_mambair),
        ours("Vim", functools.partial(zoo.build, "VisionMamba", **VIM)),
        ours("VMamba", functools.partial(zoo.build, "VSSM", **VMAMBA, forward_type="v05_noz", norm_layer="ln2d")),
        ours("VMamba v0", functools.partial(zoo.build, "VSSM", **VMAMBA, forward_type="v0", norm_layer="ln")),
    )
}  # fmt: skip
# Of the zoo's models tests/graph/test_transforms.py knows it, and windows of scans are nothing to transforms.
EXACT = [name for name in TWINS if not name.endswith(", window")]


@torch.no_grad()
def uneven(model: nn.Module) -> nn.Module:
    """Outputs of very different size, as trained models have, so that factors have something to do."""
    for name, p in model.named_parameters():
        if p.dim() >= 2 and p.is_floating_point() and "A_log" not in name:
            p.mul_(torch.exp(0.7 * torch.randn(p.shape[0])).reshape(-1, *[1] * (p.dim() - 1)).to(p.dtype))
    return model


@pytest.fixture(autouse=True)
def _sizes_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether sizes reach C code unseen is tried in half of a trace's runs: tests/patterns do it for these models."""
    monkeypatch.setattr(trace, "_leaks", lambda *_: set())


def calibrated(twin: Twin, model: nn.Module, config: QConfig) -> Any:
    args, kwargs = twin.args()
    with steps.adopting(twin):
        prepared = ssmquant.prepare(model, config, example_inputs=args, example_kwargs=kwargs)

    def forward(prepared: nn.Module, seed: int) -> Any:
        args, kwargs = twin.args(seed=seed)
        torch.manual_seed(0)
        return prepared(*args, **kwargs)

    return ssmquant.calibrate(prepared, range(2), forward=forward).eval()


def assert_nothing_is_silent(model: nn.Module, config: QConfig) -> None:
    """Each transform of the configuration is done somewhere, or there is a reason; each scan has its own."""
    summary = ssmquant.summary(model)
    said = [*summary.transforms, *summary.not_transformed]
    assert all(site and how for _, site, how in said)
    assert {KINDS.get(name, name) for name in config.transforms} == {kind for kind, _, _ in said}
    for row in summary.rows:
        if row.kind == "scan":
            assert {"state", "dt"} <= {kind for kind, site, _ in said if site == row.name}


@pytest.mark.parametrize("name", MODELS)
def test_deployed_as_prepared(name: str) -> None:
    twin = MODELS[name]
    prepared = calibrated(twin, uneven(twin.model()), PRESET)
    assert_nothing_is_silent(prepared, PRESET)
    deployed = ssmquant.convert(prepared)
    assert ssmquant.summary(deployed).transforms == ssmquant.summary(prepared).transforms
    with torch.no_grad():  # calls of another batch size, where they take another graph, are below
        want = call(prepared, twin.args(seed=9))
        # By fused kernels a code on a tie may go the other way.
        close(call(deployed, twin.args(seed=9)), want, 0.05)
        with use_backend("chunked", op="fuse"):
            close(call(deployed, twin.args(seed=9)), want, 1e-4)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that cast to float32 or make their own tensors have float64 here: nothing but transforms rounds."""
    with monkeypatch.context() as m:
        m.setattr(Tensor, "float", Tensor.double)
        for name in ("float", "float32"):
            m.setattr(torch, name, torch.float64)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.usefixtures("double")
def test_transforms_alone_are_exact(name: str) -> None:
    twin = MODELS[name]
    model = uneven(twin.model().double())
    config = QConfig(w_bits=None, a_bits=None, transforms=PRESET.transforms)
    prepared = calibrated(twin, model, config)
    assert_nothing_is_silent(prepared, config)
    if twin.adopted:  # the code draws its modules anew at each call
        return
    with torch.no_grad():
        for args in (twin.args(seed=9), twin.args(twin.batches[-1], seed=8)):
            out = call(prepared, args)
            assert any(t.dtype == torch.float64 for t in tensors(out))
            close(out, call(model, args), 1e-9)
