"""Streams that layer norms read are rotated by matrices that keep the vector of ones; what norms hold moves along."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.transforms import Residual
from ssmquant.graph.transforms.choose import rotation
from ssmquant.ops.hadamard import is_hadamard
from tests.graph.test_transforms import VIM, assert_same, find, fold, keeping_ones

KIND = "residual_rotation"
ALONE = QConfig(w_bits=None, a_bits=None, transforms=(KIND,))


@given(n=st.integers(2, 60), seed=st.integers(0, 1000), klt=st.booleans(), signs=st.booleans())
def test_rotations_that_keep_the_ones(n: int, seed: int, klt: bool, signs: bool) -> None:
    rows = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows * torch.linspace(0, 3, n).exp()
    rows = rows - rows.mean(1, keepdim=True)  # as behind a layer norm
    moments = rows.T @ rows / len(rows)
    q = rotation(n, moments if klt else None, signs=signs, keep_ones=True)
    one = torch.ones(n, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ one, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(F.layer_norm(rows @ q.T, (n,)), F.layer_norm(rows, (n,)) @ q.T)
    if klt and is_hadamard(n):  # and nothing of what rotations are for is lost
        variances = (q @ moments @ q.T).diagonal()
        torch.testing.assert_close(variances, variances.mean().expand(n), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [16, 24, 96, 192])
def test_entries_stay_small(n: int) -> None:
    """All but those of one column are those of a Hadamard matrix, nearly."""
    largest = rotation(n, keep_ones=True).abs().amax(0) * n**0.5
    assert int((largest > 1 + 8 / n**0.5).sum()) <= 1
    assert float(largest.max()) < 3.5


def test_a_covariance_that_is_not_finite_counts_for_nothing() -> None:
    broken = torch.full((8, 8), float("nan"), dtype=torch.float64)
    assert torch.equal(rotation(8, broken, keep_ones=True), rotation(8, keep_ones=True))


class Pieces(nn.Module):
    """(B, H, W, 6) -> (B, 3): a stream of two blocks, whose pixels are merged by four, then one of 5 channels.

    ``case`` says what else there is. The norm's parameters are never those that a norm starts with.
    """

    def __init__(self, case: str = "") -> None:
        super().__init__()
        self.case = case
        bias = case != "no bias"
        self.embed = nn.Linear(6, 6)
        self.start = nn.LayerNorm(6)
        self.norm, self.one, self.two = (
            nn.LayerNorm(6, bias=bias),
            nn.Linear(6, 9, bias=False),
            nn.Linear(9, 6),
        )
        self.merge = nn.RMSNorm(24) if case == "rms" else nn.LayerNorm(24, bias=bias)
        self.reduce = nn.Linear(24, 5, bias=False)
        self.last, self.head = nn.LayerNorm(5), nn.Linear(5, 3)
        self.gamma, self.pool = nn.Parameter(torch.rand(6) + 0.5), nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            for p in (
                p for m in self.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) for p in m.parameters()
            ):
                p.add_(0.2 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        image, x = x, self.embed(x)
        if self.case == "starts with a norm":
            x = self.start(x)
        out = self.norm(x)
        if self.case == "backwards":
            out = out.flip(-1)
        out = self.two(F.gelu(self.one(out)))
        if self.case == "layer scale":
            out = self.gamma * out
        x = x + out
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2), value=1.0 if self.case == "pads with ones" else 0.0)
        if self.case == "part of the channels":
            x = torch.cat([x, x[..., :2], x[..., 2:4], x[..., 4:], x, x], -1)
        elif self.case == "something narrower beside":
            x = torch.cat([x, x, x, image[..., :5], image[..., :1]], -1)
        else:
            x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        if self.case == "activated":
            x = x.relu()
        x = self.reduce(self.merge(x))
        y = self.last(x).permute(0, 3, 1, 2)
        return self.head(self.pool(y).flatten(1) if self.case == "pool" else y.mean((2, 3)))


def pieces(case: str = "") -> nn.Module:
    torch.manual_seed(0)
    return Pieces(case).double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("case", ["", "no bias", "pool", "rms"])
def test_pieces_side_by_side(case: str) -> None:
    original, x = pieces(case), images(2, 4, 6, 6)
    model = ssmquant.prepare(original, QConfig(), example_inputs=x)
    found, skipped = find(model, {KIND})
    assert [(c.channels, len(c.readers)) for c in found if isinstance(c, Residual)] == [(6, 2), (5, 1)]
    assert not skipped
    fold(model, found)
    assert torch.equal(model.merge.weight, torch.ones(24, dtype=torch.float64))
    assert_same(model, original, x)
    assert_same(model, original, images(1, 3, 5, 6))  # padded, another graph


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("starts with a norm", "the norm 'start' writes to it, whose weights scale its channels one by one"),
        ("layer scale", "'gamma' scales its channels one by one"),
        ("activated", "'relu' reads pieces of the stream side by side"),
        ("part of the channels", "'getitem' reads it"),
        ("something narrower beside", "has not the channels of the stream in one axis"),
        ("backwards", "reads 'norm', whose weights it cannot take"),
        ("pads with ones", "'pad' reads it"),
    ],
)
def test_reasons(case: str, reason: str) -> None:
    original, x = pieces(case), images(2, 6 if "channels" in case or "beside" in case else 5, 6, 6)
    model = ssmquant.prepare(original, QConfig(), example_inputs=x)
    found, skipped = find(model, {KIND})
    assert all(isinstance(c, Residual) and c.channels == 5 for c in found)
    assert any(reason in s.reason for s in skipped), skipped
    fold(model, found)
    assert_same(model, original, x)


def test_other_rotations_are_refused() -> None:
    model = ssmquant.prepare(pieces(), QConfig(), example_inputs=images(1, 4, 4, 6))
    c = next(c for c in find(model, {KIND})[0] if isinstance(c, Residual))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="vector of ones"):
        c.fold(model, -torch.eye(6, dtype=torch.float64))
    with torch.no_grad():
        model.norm.weight[2] = 0
    with pytest.raises(ValueError, match="is 0 where its bias is not"):
        c.fold(model, keeping_ones(6))
    with torch.no_grad():
        model.norm.weight.copy_(before["norm.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_a_weight_of_zero() -> None:
    """Where the bias is 0, too, it is nothing; else the stream stays, with a reason, as it does for a weight near 0."""
    x = images(4, 4, 6, 6)
    original = pieces()
    original.norm.weight[2] = original.norm.bias[2] = 0
    model = ssmquant.prepare(original, ALONE, example_inputs=x)
    ssmquant.calibrate(model, [x])
    assert [site for _, site, _ in ssmquant.summary(model).transforms] == ["norm", "last"]
    assert_same(model.eval(), original, x)
    original.norm.bias[2] = 1
    for small in (0.0, 1e-6):
        original.norm.weight[2] = small
        model = ssmquant.prepare(original, ALONE, example_inputs=x)
        ssmquant.calibrate(model, [x])
        assert [site for _, site, _ in ssmquant.summary(model).transforms] == ["last"]
        ((kind, site, reason),) = ssmquant.summary(model).not_transformed
        assert (kind, site) == (KIND, "norm")
        assert "biases that are large beside its weights" in reason
        assert_same(model.eval(), original, x)


@pytest.mark.parametrize("how", ["klt", "hadamard"])
def test_calibrated(how: str) -> None:
    x = images(8, 4, 6, 6)
    model = ssmquant.prepare(pieces(), QConfig(transforms=(KIND,), rotation=how), example_inputs=x)
    ssmquant.calibrate(model, [x])
    assert len(ssmquant.summary(model).transforms) == 2
    assert_same(model.eval(), pieces(), x)
    fresh = ssmquant.prepare(pieces(), QConfig(transforms=(KIND,), rotation=how), example_inputs=x)
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh.eval(), pieces(), x)


BUILDS: dict[str, Any] = {
    "vim": functools.partial(zoo.build, "VisionMamba", **VIM, embed_dim=16, rms_norm=False),
    "vmamba": functools.partial(
        zoo.build, "VSSM", depths=(1, 1), dims=8, ssm_d_state=1, num_classes=3, drop_path_rate=0.0,
        forward_type="v05_noz", norm_layer="ln2d", patch_norm=False, downsample_version="v1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_deployed_models_keep_their_kernels(name: str) -> None:
    torch.manual_seed(0)
    model, x = BUILDS[name]().eval(), torch.rand(4, 3, 16, 16)

    def deployed(**changes: Any) -> Any:
        prepared = ssmquant.prepare(model, QConfig.mambaquant(8, 8, **changes), example_inputs=x)
        ssmquant.calibrate(prepared, [x]).eval()
        out = ssmquant.convert(prepared)
        torch.testing.assert_close(out(x), prepared(x), rtol=1e-4, atol=1e-4)
        return out

    def used(model: Any) -> list[str]:
        return sorted(runtime_of(model).records[0].kernels(model).values())

    ours, others = deployed(), tuple(t for t in QConfig.mambaquant().transforms if t != KIND)
    assert any(kind == KIND for kind, _, _ in ssmquant.summary(ours).transforms)
    assert used(ours) == used(deployed(transforms=others)) != []
