"""The benchmarks at their smallest size: gates, rows, exit status."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssmquant.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = "mambair_nano_x2/6x5/b2"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of the folder, and forgets it afterwards: the examples have a ``common`` of their own."""
    names = ("common", "finetune", "patches", "qmambair", "scan", "train", "training")
    monkeypatch.syspath_prepend(FOLDER)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    precision, threads, tf32 = (
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.backends.cudnn.allow_tf32,
    )
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def train(script: Callable[[str], Any]) -> Any:
    return script("train")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_steps_are_checked_and_timed(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    options = ["--quick", "--bf16", "--seconds", "0.01", "--threads", "1", "--out", str(out)]
    assert train.main([*options, "--mode", "prepared_w4a4_train_eager"]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report.keys() >= {"hardware", "torch", "triton", "commit", "threads", "tf32", "rows"}
    rows = {row["mode"]: row for row in report["rows"]}
    assert list(rows) == [
        f"{model}_train_eager{end}" for model in ("float", "prepared_w4a4") for end in ("", "_bf16")
    ]
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert row["case"] == train.QUICK[0]
        assert row["gate"]["passed"]
        assert row["runs"] >= train.LEAST
        assert row["min_ms"] <= row["median_ms"]
        base = rows["float_train_eager" + "_bf16" * name.endswith("_bf16")]
        assert row["of_float"] == pytest.approx(row["median_ms"] / base["median_ms"])
        assert f"{row['case']:27} {name} " in shown
    gates = {name: row["gate"] for name, row in rows.items()}
    assert gates["prepared_w4a4_train_eager"]["gradients"] > gates["float_train_eager"]["gradients"]
    losses = [gate["loss"] for gate in gates.values()]
    assert max(losses) < 1.05 * min(losses)  # the same weights and the same batch


@pytest.mark.gpu
def test_graphs_are_checked_and_timed(train: Any, tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    options = ["--quick", "--bf16", "--seconds", "0.1", "--out", str(out)]
    assert train.main([*options, "--mode", "prepared_w4a4_train_graph"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
    assert all(row["gate"]["against"] == row["mode"].replace("graph", "eager") for row in rows)
    assert all(row["peak_mib"] > 0 and row["peak_of_float"] > 0 for row in rows)


def test_time_by_kernel(train: Any, no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    options = ["--case", SMALL, "--breakdown", "--mode", "float_train_eager", "--seconds", "0.01"]
    assert train.main([*options, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    found = row["breakdown"]
    kernels = found["kernels"]
    assert len(kernels) == 25
    assert kernels == sorted(kernels, key=lambda k: -k["ms"])
    assert sum(k["ms"] for k in kernels) <= found["ms"]
    assert f"calls  {kernels[0]['name']}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_step_has_the_loss_of_the_eager_one(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="aot_eager"))
    modes, case = train.all_modes(CPU), train.Case(SMALL, CPU)
    name = "prepared_lsq_w4a4_train_compile"
    row = train.run(modes[name], case, modes, 0.01, False)
    assert row["gate"]["passed"], row["gate"]
    assert row["gate"]["against"] == "prepared_lsq_w4a4_train_eager"
    assert row["gate"]["relative_error"] < 1e-4
    assert row["gate"]["grad_norm_error"] < 1e-2
    assert set(case.first) == {name, row["gate"]["against"]}
    assert "median_ms" in row


def test_what_fails_its_gate_is_not_timed(
    train: Any,
    no_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def changed(value: float) -> Callable[[Any], nn.Module]:
        def build(case: Any) -> nn.Module:
            model = train._float_model("mambair_nano_x2")
            model.load_state_dict(case.start.state_dict())
            with torch.no_grad():
                model.conv_first.bias.add_(value)
            return model

        return build

    def refuses(case: Any) -> nn.Module:
        raise ConfigError("no such model")

    def modes(*_: Any) -> dict[str, Any]:
        found = [
            train.Mode("float_train_eager", "float", lambda case: case.start),
            train.Mode("nan", "nan", changed(float("nan"))),
            train.Mode("other", "other", changed(1.0), against="float_train_eager"),
            train.Mode("refuses", "refuses", refuses),
            train.Mode("foreign", "nan", changed(float("nan")), ours=False),
        ]
        return {mode.name: mode for mode in found}

    monkeypatch.setattr(train, "all_modes", modes)
    options = ["--case", SMALL, "--seconds", "0.01", "--out", str(tmp_path / "out.json")]
    assert train.main([*options, "--mode", "eager", "--mode", "foreign"]) == 0
    assert train.main(options) == 1
    rows = {r["mode"]: r for r in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]}
    assert {name for name, row in rows.items() if row["gate"]["passed"]} == {"float_train_eager"}
    assert {name for name, row in rows.items() if "median_ms" in row} == {"float_train_eager", "foreign"}
    assert rows["nan"]["gate"]["not_finite"]
    assert rows["refuses"]["gate"]["reason"] == "ConfigError: no such model"
    assert "GATE NOT PASSED" in capsys.readouterr().out


def test_a_selection_brings_its_baselines(train: Any, no_gpu: None) -> None:
    modes = train.all_modes(torch.device("cuda"), bf16=True)
    chosen = [mode.name for mode in train.select(modes, ["w2a2_train_compile_graph"])]
    assert chosen == [
        f"{model}_train_compile_graph{end}"
        for model in ("float", "prepared_w2a2", "prepared_lsq_w2a2")
        for end in ("", "_bf16")
    ]
    default = {mode.execution for mode in train.select(modes, [])}
    assert default == {"eager", "graph", "replay"}
    slow = [name for name in modes if "compile" in name or "plain" in name]
    assert not {mode.name for mode in train.select(modes, ["w4a4_train"])} & set(slow)
    assert all(mode.baseline in modes for mode in modes.values())
    assert all(mode.against is None or mode.against in modes for mode in modes.values())


def test_fine_tunings_are_compared(
    script: Callable[[str], Any], no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune, out = script("finetune"), tmp_path / "finetune.json"
    case = "mambair_tiny_x2/w4a4"
    assert finetune.main(["--quick", "--case", case, "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["mode"], row["steps"]) for row in rows] == [(case, m, 2) for m in finetune.RUNS]
    assert rows[-1]["gate"].keys() == {"psnr", "loss", "passed"}
    assert f"{case}   fused" in capsys.readouterr().out
    values = [{"psnr": 30 + k, "loss": 0.1 + k} for k in (0.0, 0.1, 0.2, 0.1)]
    assert finetune.judge(values)["passed"]
    assert not finetune.judge([*values[:3], {"psnr": 30.5, "loss": 0.1}])["passed"]
    assert finetune.main(["--quick", "--case", "mambair_tiny_x2/w9a4"]) == 2
    assert "expected mambair_tiny_x2/wBaB" in capsys.readouterr().err


def test_mistakes_are_named(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--mode", "nonsense"], "no mode has 'nonsense'"),
        (["--case", "mambair_tiny"], "a case is MODEL/HxW/bBATCH"),
        (["--case", "mambair_huge_x2/8x8/b1"], "no zoo model 'mambair_huge'"),
        (["--quick", "--official", str(tmp_path)], "no checkout of Q-MambaIR"),
    ):
        assert train.main(options) == 2
        assert words in capsys.readouterr().err


ARCHITECTURE = """
import torch
from timm.models.layers import DropPath
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from basicsr.utils.registry import NAME
from .QuantSR_operator import Hadamard
from ssmquant.zoo import MambaIR

class QuantBL_L_MambaIR(MambaIR):
    def __init__(self, embed_dim, depths, d_state, mlp_ratio, upscale, upsampler, k_bits=32, **kwargs):
        super().__init__(embed_dim=embed_dim, depths=depths, d_state=d_state, mlp_ratio=mlp_ratio, upscale=upscale,
                         upsampler=upsampler, drop_path_rate=0.0)
        self.alpha = torch.nn.Parameter(torch.tensor(2.0 ** -k_bits))

    def forward(self, x):
        return super().forward(x) + self.alpha
"""


def test_a_checkout_of_the_official_code(train: Any, tmp_path: Path) -> None:
    """One that looks like it: packages that must not be run, modules that are missing."""
    for package in ("basicsr", "basicsr/archs", "basicsr/utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError\n", encoding="utf-8")
    (tmp_path / "basicsr/utils/registry.py").write_text("NAME = 1\n", encoding="utf-8")
    (tmp_path / "basicsr/archs/BL_L_U_mambair_arch.py").write_text(ARCHITECTURE, encoding="utf-8")
    before = set(sys.modules)
    modes, case = train.all_modes(CPU, root=tmp_path), train.Case(SMALL, CPU)
    mode = modes["official_w2a2_train_eager"]
    row = train.run(mode, case, modes, 0.01, False)
    assert row["gate"]["passed"], row["gate"]
    assert "median_ms" in row
    model = case.model(mode)
    assert model.alpha == 0.25
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in case.start.named_parameters())
    assert not any(name.startswith("basicsr") for name in set(sys.modules) - before)
    other = train.Case("vim_nano/32/b1", CPU)
    assert "light kind" in train.run(mode, other, modes, 0.01, False)["gate"]["reason"]


def test_the_scan(script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = script("scan")
    if torch.cuda.is_available():
        pytest.skip("the case is one for a CPU")
    monkeypatch.setattr(scan, "limits", lambda device: {"bytes_per_s": 1e10, "exponentials_per_s": None})
    out = tmp_path / "scan.json"
    monkeypatch.setattr(sys, "argv", ["scan", "--quick", "--case", "scan/2x8x2x19/fp32", "--out", str(out)])
    assert scan.main() == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report.keys() >= {"hardware", "torch", "triton", "commit", "bytes_per_s", "back_ends", "rows"}
    assert {"ours_float_fwd", "ours_float_fwd_bwd", "chunked_fwd"} <= {row["mode"] for row in report["rows"]}
