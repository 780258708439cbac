"""Transforms keep the function: exact in float64 with random factors and rotations, on every family that has them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.transforms import (
    Candidate,
    LowRank,
    OutRotation,
    Residual,
    Scale,
    Skipped,
    View,
    find_transforms,
)
from ssmquant.graph.transforms.candidates import Applied
from ssmquant.ops.hadamard import hadamard_matrix
from ssmquant.ops.selective_scan import selective_scan
from ssmquant.workflow import trace_example
from tests.small import Scanner, tiny_mambair

VMAMBA = {
    "patch_size": 4,
    "depths": (1, 1),
    "dims": 12,
    "ssm_d_state": 3,
    "drop_path_rate": 0.0,
    "num_classes": 5,
}
VIM = {
    "img_size": 16, "patch_size": 4, "stride": 4, "depth": 2, "d_state": 3, "num_classes": 5, "drop_path_rate": 0.0,
    "residual_in_fp32": False, "final_pool_type": "mean",
}  # fmt: skip


def vim(**changes: Any) -> nn.Module:
    return zoo.build("VisionMamba", **{**VIM, "embed_dim": 20, **changes})


def vmamba(forward_type: str, **changes: Any) -> nn.Module:
    return zoo.build("VSSM", **{**VMAMBA, "forward_type": forward_type, **changes})


FAMILIES = {
    "vim": (vim, (2, 3, 16, 16), {"conv_input", "scan_input", "state", "dt", "out_rotation", "residual_rotation"}),
    "vim, an odd width, forwards, cls at the start": (
        functools.partial(
            vim, embed_dim=35, bimamba_type="none", if_cls_token=True, use_middle_cls_token=False
        ),
        (2, 3, 16, 16),
        {"conv_input", "scan_input", "state", "dt", "out_rotation", "residual_rotation"},
    ),
    "vim, two tokens, summed": (
        functools.partial(vim, use_double_cls_token=True, if_divide_out=False),
        (2, 3, 16, 16),
        {"conv_input", "scan_input", "state", "dt", "out_rotation", "residual_rotation"},
    ),
    "vim with layer norms": (
        functools.partial(vim, rms_norm=False),
        (2, 3, 16, 16),
        {"conv_input", "scan_input", "state", "dt", "out_rotation", "residual_rotation"},
    ),
    "vmamba v05": (
        functools.partial(vmamba, "v05_noz", norm_layer="ln2d"),
        (2, 3, 16, 16),
        {"conv_input", "scan_input", "gate", "state", "dt", "out_rotation"},
    ),
    "vmamba v0, as in VM-UNet": (
        functools.partial(vmamba, "v0", norm_layer="ln"),
        (2, 3, 16, 16),
        {"conv_input", "scan_input", "gate", "state", "dt", "out_rotation"},
    ),
    "vmamba v0 with patch merging, as published": (
        functools.partial(vmamba, "v0", norm_layer="ln", downsample_version="v1", mlp_ratio=0.0),
        (2, 3, 16, 16),
        {"conv_input", "scan_input", "gate", "state", "dt", "out_rotation", "residual_rotation"},
    ),
    "mambair": (tiny_mambair, (2, 3, 8, 8), {"conv_input", "scan_input", "gate", "state", "dt", "out_rotation"}),
    "raw parameters": (Scanner, (2, 3, 5, 6), {"scan_input", "state", "out_rotation"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that cast to float32 cast to float64 here, so that nothing but the transforms rounds."""
    with monkeypatch.context() as m:
        m.setattr(Tensor, "float", Tensor.double)
        yield


@functools.cache
def _family(name: str) -> tuple[nn.Module, Tensor]:
    build, size, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = build().double().eval()  # type: ignore[operator]
    with torch.no_grad():
        for p in model.parameters():  # biases and norms start at 0 and 1, where nothing can go wrong
            p.add_(0.2 * torch.randn_like(p) * p.abs().mean().clamp(min=0.05))
    return model, torch.rand(size, dtype=torch.float64)


def prepared(name: str) -> tuple[Any, nn.Module, Tensor]:
    model, x = _family(name)
    return ssmquant.prepare(model, QConfig(), example_inputs=x), model, x


def find(model: nn.Module, kinds: set[str] | None = None) -> tuple[list[Candidate], list[Skipped]]:
    runtime = runtime_of(model)
    scans = runtime.adapter.scans if runtime.adapter else ()
    return find_transforms(View(model, runtime.records[0].trace, scans), kinds)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def keeping_ones(n: int) -> Tensor:
    """A random rotation of what is orthogonal to the vector of ones."""
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), orthogonal(n)[:, 1:]], 1)).Q
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(n - 1)
    return basis @ inner @ basis.T


def fold(model: nn.Module, found: list[Candidate], spread: float = 2.0) -> None:
    """Every candidate with random factors or matrices; then the graph anew."""
    tensors: dict[str, Tensor] = {}
    applied: list[Applied] = []
    for c in sorted(found, key=lambda c: isinstance(c, OutRotation)):
        made: dict[str, Tensor] = {}
        if isinstance(c, Scale):
            factor = (spread * (2 * torch.rand(c.size, dtype=torch.float64) - 1)).exp2()
            made = c.fold(model, factor)
        elif isinstance(c, LowRank):
            turns = torch.stack([orthogonal(c.rank) for _ in range(c.groups)])
            factors = torch.rand(c.groups, 1, c.rank, dtype=torch.float64) + 0.5
            mean = torch.randn(c.groups, c.rank, dtype=torch.float64) if c.bias is not None else None
            made = c.fold(model, turns * factors, mean)
        elif isinstance(c, OutRotation):
            made = c.fold(model, hadamard_matrix(c.sink.groups[2]))
        elif isinstance(c, Residual):
            made = c.fold(model, keeping_ones(c.channels) if c.centred else orthogonal(c.channels))
        tensors |= made
        applied.append(Applied(c.kind, c.site, "", c.mark(placed=bool(made)), tuple(sorted(c.touched))))
    runtime = runtime_of(model)
    runtime.transforms.settle(tensors, applied, [], torch.zeros(0, dtype=torch.float64))
    trace_example(model, runtime.example)


@torch.no_grad()
def assert_same(now: nn.Module, before: nn.Module, x: Tensor) -> None:
    expected = before(x)
    error = float((now(x) - expected).abs().max() / expected.abs().max())
    assert error < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_what_applies(name: str) -> None:
    model, _, _ = prepared(name)
    found, skipped = find(model)
    assert {c.kind for c in found} == FAMILIES[name][2]
    # Every scan has each transform, or a reason.
    scans = sum(s.kind == "scan" for s in runtime_of(model).records[0].plan.sites)
    for kind in ("state", "dt"):
        assert sum(c.kind == kind for c in (*found, *skipped)) == scans
    assert all(s.reason for s in skipped)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "kind", ["conv_input", "scan_input", "gate", "state", "dt", "out_rotation", "residual_rotation"]
)
def test_each_kind_alone_is_exact(name: str, kind: str) -> None:
    if kind not in FAMILIES[name][2]:
        return
    model, original, x = prepared(name)
    found, _ = find(model, {kind})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold(model, found)
    assert any(not torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert_same(model, original, x)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.5, 2.0, 6.0]))
def test_all_together_are_exact(name: str, seed: int, spread: float) -> None:
    model, original, x = prepared(name)
    torch.manual_seed(seed)
    fold(model, find(model)[0], spread)
    assert_same(model, original, x)


def test_other_sizes_and_batches_get_the_same_transforms() -> None:
    model, original, _ = prepared("mambair")
    fold(model, find(model)[0])
    assert_same(model, original, torch.rand(1, 3, 7, 10, dtype=torch.float64))
    model, original, _ = prepared("vmamba v0, as in VM-UNet")
    fold(model, find(model)[0])
    assert_same(model, original, torch.rand(3, 3, 20, 13, dtype=torch.float64))


def test_wrong_factors_are_refused() -> None:
    model, _, _ = prepared("vim")
    found, _ = find(model)
    scale = next(c for c in found if isinstance(c, Scale))
    with pytest.raises(ValueError, match="positive factors"):
        scale.fold(model, torch.zeros(scale.size))
    residual = next(c for c in found if isinstance(c, Residual))
    with pytest.raises(ValueError, match="orthogonal"):
        residual.fold(model, 2 * torch.eye(residual.channels, dtype=torch.float64))
    low = next(c for c in found if isinstance(c, LowRank))
    with pytest.raises(ValueError, match="matrices"):
        low.fold(model, torch.eye(low.rank))


# ---- what does not apply says why ----------------------------------------------------------------------------------


class Block(nn.Module):
    """(B, L, 6) -> the same: a gated scan, whose parts the cases below change."""

    def __init__(self, case: str = "") -> None:
        super().__init__()
        self.case, d, n, r = case, 6, 2, 2
        self.in_proj = nn.Linear(d, d)
        self.conv = nn.Conv1d(d, d, 3, padding=1, groups=d)
        self.x_proj = nn.Linear(d, r + 2 * n)
        self.dt_proj = nn.Linear(r, d)
        self.A = nn.Parameter(-torch.rand(d, n))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, d)
        self.norm = nn.RMSNorm(d)
        self.gamma = nn.Parameter(torch.rand(d))
        self.head = nn.Linear(d, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.in_proj(self.norm(tokens)).transpose(1, 2)
        extra = x.mean() if self.case == "in_proj is read" else 0.0
        x = self.conv(x)
        u = F.gelu(x) if self.case == "gelu" else F.silu(x)
        dt, b, c = self.x_proj(u.transpose(1, 2)).transpose(1, 2).split([2, 2, 2], 1)
        if self.case == "B is read":
            extra = extra + b.sum()
        if self.case == "activated B":
            b = b.sigmoid()
        delta = self.dt_proj(dt.transpose(1, 2)).transpose(1, 2)
        if self.case == "dt is read":
            extra = extra + dt.sum()
        y = selective_scan(u, delta, self.A, b.contiguous(), c.contiguous(), self.D, delta_softplus=True)
        assert isinstance(y, Tensor)
        if self.case == "y and tokens":
            y = y + tokens.transpose(1, 2)
        out = self.out_proj(y.transpose(1, 2)) + extra
        if self.case == "layer scale":
            out = self.gamma * out
        stream = self.in_place(tokens, out)
        return self.head(self.norm(stream)) if self.case == "norm twice" else self.head(stream)

    def in_place(self, tokens: Tensor, out: Tensor) -> Tensor:
        return tokens + out


@pytest.mark.parametrize(
    ("case", "kind", "reason"),
    [
        ("in_proj is read", "conv_input", "'mean' reads these channels too"),
        ("gelu", "scan_input", "not the SiLU of a projection alone"),
        ("y and tokens", "scan_input", "is added to something"),
        ("B is read", "state", "'sum' reads these channels too"),
        ("activated B", "state", "B does not come from a projection by moves alone"),
        ("dt is read", "dt", "'sum' reads these channels too"),
    ],
)
def test_reasons(case: str, kind: str, reason: str) -> None:
    torch.manual_seed(0)
    original = Block(case).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model = ssmquant.prepare(original, QConfig(), example_inputs=x)
    found, skipped = find(model)
    assert not any(c.kind == kind for c in found)
    assert any(s.kind == kind and reason in s.reason for s in skipped), skipped
    fold(model, found)  # the rest still applies
    assert_same(model, original, x)


class Stream(nn.Module):
    """(B, L, 6) -> the same: a residual stream, which something in the way may not leave alone."""

    def __init__(self, case: str = "") -> None:
        super().__init__()
        self.case, d = case, 6
        self.embed, self.one, self.two, self.head = (nn.Linear(d, d) for _ in range(4))
        self.first, self.second, self.last = nn.RMSNorm(d), nn.RMSNorm(d), nn.RMSNorm(d)
        self.gamma, self.position = nn.Parameter(torch.rand(d) + 0.5), nn.Parameter(torch.randn(5, d))
        self.depthwise = nn.Conv1d(d, d, 1, groups=d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        out = F.gelu(self.one(self.first(x)))
        if self.case == "activation":
            x = x + out
        if self.case == "depthwise":
            x = x + self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        if self.case == "returned":
            return x + self.two(out)
        out = self.two(out)
        x = x + (self.gamma * out if self.case == "layer scale" else out)
        if self.case == "number":
            x = x + 1.0
        if self.case == "backwards":
            return self.head(self.last(x).flip(-1))
        y = self.last(x) if self.case != "both" else self.last(x) * self.second(x)
        return self.head(y.mean(1) if self.case == "pooled" else y)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("activation", "'gelu' makes it"),
        ("depthwise", "in groups"),
        ("returned", "the model returns it"),
        ("layer scale", "one by one"),
        ("number", "a number is added"),
        ("both", "whose weights it cannot take"),
        ("backwards", "whose weights it cannot take"),
    ],
)
def test_reasons_of_streams(case: str, reason: str) -> None:
    model = ssmquant.prepare(Stream(case), QConfig(), example_inputs=torch.randn(2, 5, 6))
    found, skipped = find(model, {"residual_rotation"})
    assert not found
    assert any(reason in s.reason for s in skipped), skipped


@pytest.mark.parametrize("case", ["", "pooled"])
def test_streams(case: str) -> None:
    torch.manual_seed(0)
    original = Stream(case).double().eval()
    with torch.no_grad():
        for norm in (original.first, original.last):
            norm.weight.add_(torch.rand(6))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model = ssmquant.prepare(original, QConfig(), example_inputs=x)
    found, skipped = find(model, {"residual_rotation"})
    assert len(found) == 1
    assert not skipped
    fold(model, found)
    assert torch.equal(model.first.weight, torch.ones(6, dtype=torch.float64))
    assert_same(model, original, x)
