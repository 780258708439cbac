"""verify finds the site that is wrong; summary counts what can be counted by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor
from ssmquant.ops.selective_scan import selective_scan
from tests.small import Chain, Scanner, images, light, prepared_and_calibrated, rows, scanner, tiny_mambair

X = images(2, 3, 6, 5)


def packed(model: nn.Module, name: str) -> PackedTensor:
    found = runtime_of(model).weights[name]
    assert isinstance(found, PackedTensor)
    return found


# ---- verify --------------------------------------------------------------------------------------------------------


def test_equal_models() -> None:
    prepared = scanner()
    deployed = ssmquant.convert(prepared)
    for inputs in ((X,), X, [images(1, 3, 9, 4)]):
        report = ssmquant.verify(prepared, deployed, inputs)  # type: ignore[arg-type]
        assert (report.worst_abs, report.worst_rel, report.min_sqnr_db) == (0.0, 0.0, math.inf)
        assert [r.name for r in report.rows] == ["stem", "in_proj", "x_proj", "scan", "out_proj", "head"]
    by_keyword = ssmquant.verify(prepared, deployed, (), x=X)
    assert by_keyword.worst_abs == 0
    assert "6 sites, worst relative error 0.00e+00" in str(report)
    assert len(str(report).splitlines()) == 7


@pytest.mark.parametrize("site", ["in_proj:weight", "x_proj:weight", "out_proj:weight", "scan/D", "scan/A"])
def test_a_tampered_code_is_found_at_its_site(site: str) -> None:
    prepared = scanner()
    deployed = ssmquant.convert(prepared)
    codes = packed(deployed, site).codes
    codes[0] ^= 0b11  # the first code: 0 <-> 3, 1 <-> 2
    report = ssmquant.verify(prepared, deployed, (X,))
    wrong = {r.name for r in report.rows if r.max_abs > 0}
    assert wrong == {site.split(":", maxsplit=1)[0].split("/", maxsplit=1)[0]}
    assert 0 < report.min_sqnr_db < 120
    assert report.worst_rel > 1e-6
    assert str(report).splitlines()[1].split()[0] in wrong


def test_other_damage_is_found() -> None:
    prepared = scanner()
    for change in (
        lambda m: m.scale.mul_(1.01),
        lambda m: m.shift.add_(0.01),
        lambda m: m.scale.fill_(float("nan")),
    ):
        deployed = ssmquant.convert(prepared)
        change(packed(deployed, "x_proj:weight"))
        report = ssmquant.verify(prepared, deployed, (X,))
        assert {r.name for r in report.rows if r.max_abs > 0} == {"x_proj"}
    assert report.worst_rel == math.inf
    deployed = ssmquant.convert(prepared)
    deployed.head.bias.add_(1.0)
    assert {r.name for r in ssmquant.verify(prepared, deployed, (X,)).rows if r.max_abs > 0} == {"head"}
    deployed = ssmquant.convert(prepared, dls="frozen")
    assert {r.name for r in ssmquant.verify(prepared, deployed, (X,)).rows if r.max_abs > 0} == {
        "scan",
        "out_proj",
    }


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True).add_(1)
        y = self.b(x)
        return torch.sigmoid_(y)


def test_code_that_goes_on_in_place() -> None:
    prepared = prepared_and_calibrated(Chain(InPlace()), QConfig(w_bits=3, a_bits=3), X)
    deployed = ssmquant.convert(prepared)
    report = ssmquant.verify(prepared, deployed, (X,))
    assert report.worst_abs == 0
    packed(deployed, "middle/b:weight").codes[0] ^= 1
    report = ssmquant.verify(prepared, deployed, (X,))
    assert {r.name for r in report.rows if r.max_abs > 0} == {"middle.b"}


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_verify_of_what_overflows(value: float) -> None:
    prepared = scanner(4)
    deployed = ssmquant.convert(prepared)
    with torch.no_grad():
        deployed.out_proj.bias[1] = value
    (worst,) = (r for r in ssmquant.verify(prepared, deployed, (X,)).rows if r.name == "out_proj")
    assert (worst.max_abs, worst.max_rel, worst.sqnr_db) == (torch.inf, torch.inf, -torch.inf)


def test_verify_leaves_both_models_as_they_are() -> None:
    prepared = copy.deepcopy(scanner()).train()
    prepared.stem.eval()
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    ssmquant.verify(prepared, ssmquant.convert(prepared), (X,))
    assert prepared.training
    assert not prepared.stem.training
    for k, v in prepared.state_dict().items():
        assert torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)), k


def test_models_that_do_not_belong_together() -> None:
    prepared, deployed = scanner(), ssmquant.convert(scanner())
    other = prepared_and_calibrated(Chain(nn.Conv2d(4, 4, 1)), QConfig(w_bits=4, a_bits=4), X)
    with pytest.raises(ConfigError, match="different sites"):
        ssmquant.verify(prepared, ssmquant.convert(other), (X,))
    for wrong in ((deployed, deployed), (prepared, prepared), (Scanner(), deployed), (prepared, Scanner())):
        with pytest.raises(ConfigError):
            ssmquant.verify(*wrong, (X,))  # type: ignore[arg-type]


# ---- summary -------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """(B, 4, 6, 5): one of every kind, each of which can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 7)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.directions = nn.Parameter(torch.randn(2, 5, 4))
        self.left = nn.Parameter(torch.randn(3, 4))
        self.A, self.D = nn.Parameter(-torch.rand(4, 3)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Any:
        y = x.flatten(2)
        linear = self.linear(y.transpose(1, 2)).sum()
        up = self.up(self.depthwise(self.conv(x))).sum()
        einsum = torch.einsum("bkdl,kcd->bkcl", torch.stack((y, y * 2), 1), self.directions).sum()
        left = self.left @ y
        return selective_scan(y, y * 0.1, self.A, left, left, self.D) + linear + up + einsum


def test_bit_operations_by_hand() -> None:
    config = QConfig(w_bits=3, a_bits=5, scan_bits=4, keep_first_last=False, keep_float=("left",))
    model = ssmquant.prepare(Counted(), config, example_inputs=(torch.randn(2, 4, 6, 5),))
    pixels = 6 * 5
    expected = {
        "linear": pixels * 4 * 7 * 3 * 5,
        "conv": pixels * 6 * (4 // 2) * 9 * 3 * 5,
        "depthwise": pixels * 6 * 3 * 3 * 5,
        "up": pixels * 6 * 4 * 4 * 3 * 5,
        "directions": 2 * 5 * 4 * pixels * 3 * 5,
        "left": 3 * 4 * pixels * 32 * 32,
        "scan": pixels * 4 * 3 * (2 * 4 * 4 + 32 * 4 + 32 * 32),
    }
    assert {n: r.bitops for n, r in rows(model).items()} == expected
    summary = ssmquant.summary(model)
    assert summary.bitops == sum(expected.values())
    assert summary.input_shapes == ((1, 4, 6, 5),)
    assert {n: r.kind for n, r in rows(model).items()} == {
        "linear": "linear", "conv": "conv", "depthwise": "conv", "up": "conv", "directions": "matmul", "left": "matmul",
        "scan": "scan",
    }  # fmt: skip
    assert rows(model)["scan"].scheme == "A4"
    assert rows(model)["left"].scheme == "float"
    assert rows(model)["left"].note == "keep_float (left)"


def test_bit_operations_do_not_depend_on_the_examples_batch() -> None:
    config = QConfig(w_bits=3, a_bits=5)
    one, four = (
        ssmquant.summary(ssmquant.prepare(Counted(), config, example_inputs=(torch.randn(b, 4, 6, 5),)))
        for b in (1, 4)
    )
    assert [(r.name, r.bitops) for r in one.rows] == [(r.name, r.bitops) for r in four.rows]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_bytes_are_those_of_the_file(granularity: str, dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for model, x in ((Scanner(width=24), X), (tiny_mambair(embed_dim=24), images(1, 3, 8, 8))):
        prepared = prepared_and_calibrated(model, QConfig.qmambair(2, granularity=granularity), x)
        deployed = ssmquant.convert(prepared, float_dtype=dtype)
        ssmquant.save(deployed, tmp_path / "m")
        size = (tmp_path / "m").stat().st_size
        meta = size - ssmquant.summary(deployed).bytes
        assert -100 < meta < 5000, meta
        assert ssmquant.summary(prepared).parameters == sum(p.numel() for p in model.parameters())
        if dtype is None:
            assert ssmquant.summary(prepared).bytes == ssmquant.summary(deployed).bytes
        assert ssmquant.summary(deployed).parameters == ssmquant.summary(prepared).parameters


SCHEMES = {
    "recommended": QConfig.recommended(2, 2),
    "shared": QConfig.recommended(8, 5, decay="shared"),
    "minmax": QConfig.minmax(4, 4),
    "dorefa, pact": QConfig(w_bits=4, a_bits=4, weight="dorefa", activation="pact", scan="pact"),
    "n2uq": QConfig(w_bits=2, a_bits=2, weight="n2uq", activation="n2uq", scan="n2uq", granularity="channel"),
    "rlq": QConfig(w_bits=2, a_bits=2, weight="rlq", activation="rlq", scan="rlq"),
    "dls": QConfig(w_bits=4, a_bits=8, weight="dls", granularity="channel"),
    "official": QConfig(w_bits=4, a_bits=8, weight="dls", granularity="channel", official=True),
    "pruned": QConfig.recommended(3, 3),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_quantizer_stores_what_summary_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Scanner(24, 8)
    if name == "pruned":
        nn.init.zeros_(model.out_proj.weight)
        nn.init.zeros_(model.D)
    prepared = prepared_and_calibrated(model, SCHEMES[name], X)
    deployed = ssmquant.convert(prepared)
    ssmquant.save(deployed, tmp_path / "m")
    with safe_open(str(tmp_path / "m"), framework="pt") as f:
        tensors = [f.get_tensor(k) for k in f.keys() if k != "meta"]
    stored = sum(t.numel() * t.element_size() for t in tensors)
    for m in (prepared, deployed, ssmquant.load(tmp_path / "m", Scanner(24, 8))):
        assert ssmquant.summary(m).bytes == stored
    assert [r.bytes for r in ssmquant.summary(prepared).rows] == [
        r.bytes for r in ssmquant.summary(deployed).rows
    ]
    frozen = ssmquant.convert(prepared, dls="frozen")
    ssmquant.save(frozen, tmp_path / "f")
    with safe_open(str(tmp_path / "f"), framework="pt") as f:
        tensors = [f.get_tensor(k) for k in f.keys() if k != "meta"]
    assert ssmquant.summary(frozen).bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_summary_of_the_light_model() -> None:
    summary = ssmquant.summary(light())
    model_bytes = 4 * summary.parameters
    assert summary.parameters == 905_016
    assert 0.8 < 1 - summary.bytes / model_bytes < 0.9  # notes: 84.4 % at 2 bits
    assert summary.float_bytes < 0.6 * summary.bytes
    assert not [r for r in summary.rows if r.scheme not in ("W2A2", "A2", "float")]


def test_summary_reads_well() -> None:
    prepared = scanner()
    text = str(ssmquant.summary(prepared))
    lines = text.splitlines()
    columns = ["site", "kind", "scheme", "quantizers", "bytes", "MBitOPs", "dead", "zero", "kernel"]
    assert lines[0].split() == columns
    for name in ("stem", "in_proj", "x_proj", "scan", "out_proj", "head"):
        assert any(line.startswith(name + " ") for line in lines)
    assert "first layer" in text
    assert "rfa/lsq" in text
    assert "fake-quantized" in text
    assert "parameters in" in text
    assert "float parameters outside sites: " in text
    deployed = str(ssmquant.summary(ssmquant.convert(prepared)))
    assert "fake-quantized" not in deployed
    with pytest.raises(ConfigError, match=r"ssmquant\.prepare"):
        ssmquant.summary(Scanner())


def test_float_sites_say_why() -> None:
    notes = {
        n: r.note
        for n, r in rows(ssmquant.prepare(Scanner(), QConfig(w_bits=4), example_inputs=(X,))).items()
    }
    assert notes["scan"] == "bits=None"
    assert notes["stem"] == "first layer"
    assert notes["in_proj"] == ""
