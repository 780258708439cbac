"""The benchmarks at their smallest size: gates, rows, exit status."""

from __future__ import annotations

import contextlib
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
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import cpu as deployed_cpu
from tests.ops import emulator

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = "mambair_nano_x2/6x5/b2"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of the folder, and forgets it afterwards: the examples have a ``common`` of their own."""
    names = (
        "classify", "common", "finetune", "infer_cpu", "infer_cuda", "labelled", "patches", "ptq", "qmambair",
        "scan", "scan_quantized", "tables", "train", "training",
    )  # fmt: skip
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


def test_time_of_kernels_that_overlap(infer: Any) -> None:
    """One that waits in the GPU while others run takes what it adds to them."""
    added = sys.modules["common"].added
    spans = [("scan", 10.0, 14.0), ("norm", 0.0, 4.0), ("scan", 1.0, 6.0), ("copy", 2.0, 3.0)]
    assert added(iter(spans)) == {"norm": (1, 4.0), "scan": (2, 6.0), "copy": (1, 0.0)}
    assert added([]) == {}


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


@pytest.fixture
def scan(script: Callable[[str], Any], no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = script("scan")
    reason = deployed_cpu.unavailable(CPU)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(module, "limits", lambda device: {"bytes_per_s": 1e10, "exponentials_per_s": None})
    return module


def test_the_scan_of_codes(
    scan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scan.json"
    options = ["scan", "--quick", "--bits", "8", "--out", str(out)]
    monkeypatch.setattr(scan, "QUICK", ["scan/2x48x3x35/q4", "scan/1x40x16x197/q4"])
    monkeypatch.setattr(sys, "argv", options)
    assert scan.main() == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["back_ends"]["quantized"] == "here"
    modes = ["quantized", "quantized_core", "float_core"]
    names = ["scan/2x48x3x35/q8", "scan/1x40x16x197/q8"]
    assert [(row["case"], row["mode"]) for row in report["rows"]] == [(n, m) for n in names for m in modes]
    for row in report["rows"]:
        assert row["gate"]["passed"]
        assert row["gate"].get("same_bits", True)
        assert row.keys() >= {
            "backend",
            "pass",
            "median_ms",
            "min_ms",
            "runs",
            "peak_mib",
            "bytes",
            "roof_us",
        }
    base, core = report["rows"][2], report["rows"][1]
    assert core["of_float_core"] == pytest.approx(core["median_ms"] / base["median_ms"])
    assert "of float_core" in capsys.readouterr().out
    monkeypatch.setitem(scan.scan_quantized.TOLERANCE, "quantized_core", 0.0)
    monkeypatch.setattr(sys, "argv", [*options, "--case", "scan/1x12x1x20/q2"])
    assert scan.main() == 1
    rows = {row["mode"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert [name for name, row in rows.items() if "median_ms" in row] == ["quantized", "float_core"]
    assert "GATE NOT PASSED" in capsys.readouterr().out
    monkeypatch.setattr(scan.scan_quantized, "MOST_MEMORY", 0)
    case, engine = scan.scan_quantized.Case((1, 12, 1, 20, 4), 4), scan.engine_of(CPU)
    made = scan.scan_quantized.rows_of(case, engine, CPU, lambda run: {"median_ms": 1.0})
    assert [row["mode"] for row in made] == modes[:2]


def test_scans_of_codes_beside_those_of_mamba_ssm(
    scan: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(case: Any, *_: Any) -> list[dict[str, Any]]:
        return [{**row, "case": case.name, "mode": "mamba_ssm_fwd", "median_ms": 8.0}]

    row = {"backend": "cpu", "pass": "fwd", "min_ms": 1.0, "roof_us": 1.0, "mufu_us": None}
    row["gate"] = {"passed": True, "relative_error": 0.0}
    monkeypatch.setattr(scan, "rows_of", rows)
    monkeypatch.setattr(
        scan, "quantized_rows", lambda *_: [{**row, "case": "q", "mode": "quantized", "median_ms": 2.0}]
    )
    shapes = ["scan/1x12x1x20/fp16", "scan/1x12x1x21/q4", "scan/1x12x1x20/q4"]
    monkeypatch.setattr(sys, "argv", ["scan", *[word for shape in shapes for word in ("--case", shape)]])
    assert scan.main() == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[-2] for line in lines] == ["1.00", "0.00", "0.25"]


def test_the_scan_of_codes_by_cuda(scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels, run by a CPU."""
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    kinds = {"scan_ends": "deployed_scan", "thin(": "deployed_thin"}

    def load(source: str, _: Any) -> emulator.Emulated:
        return emulator.load(source, False, next(kind for name, kind in kinds.items() if name in source))

    monkeypatch.setattr(nvrtc, "load", load)
    case, engine = scan.scan_quantized.Case((1, 24, 3, 20, 4), 4), scan.engine_of(torch.device("cuda"))
    quantized, core = scan.scan_quantized.quantized_modes(case, engine, CPU)
    want = case.wanted(True)
    for mode in (quantized, core):
        assert mode.backend == "cuda"
        assert mode.run().shape == (2, *case.size)  # paths apart
        torch.testing.assert_close(mode.result(mode.run()).double(), want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def infer(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``infer_cuda`` on the CPU: what asks a GPU for times, memory and graphs has answers of its own."""

    def peak(work: Callable[[], object]) -> int:
        work()
        return 3 * 2**20

    module = script("infer_cuda")
    monkeypatch.setenv("COLUMNS", "140")  # of the table
    monkeypatch.setattr(module, "DEVICE", CPU)
    monkeypatch.setattr(module, "gpu", lambda: True)
    monkeypatch.setattr(module, "tidy", lambda: None)
    monkeypatch.setattr(module, "allocated", lambda: 2**20)
    monkeypatch.setattr(module, "peak_of", peak)
    monkeypatch.setattr(module, "capture", lambda call, x: (call, 5 * 2**20))
    monkeypatch.setattr(module, "replays", lambda model: True)
    monkeypatch.setattr(module, "milliseconds", lambda run, x, runs: [3.0, 1.0, 2.0][:runs])
    return module


INFER = "mambair_tiny_x2/12x10/b2"


@pytest.mark.slow
def test_deployed_models_on_a_gpu(infer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, models = tmp_path / "infer.json", tmp_path / "models"
    options = ["--quick", "--case", INFER, "--models", str(models), "--commit", "abc", "--out", str(out)]
    assert infer.main([*options, "--breakdown"]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report.keys() >= {"hardware", "torch", "triton", "commit", "tf32", "kernels", "rows"}
    assert (report["commit"], report["tf32"]) == ("abc", "default")
    assert [(row["case"], row["mode"]) for row in report["rows"]] == [(INFER, m) for m in infer.QUICK_MODES]
    for row in report["rows"]:
        assert row["gate"]["passed"]
        assert (row["median_ms"], row["min_ms"], row["runs"]) == (2.0, 1.0, 3)
        assert row["call_mib"] == (4 if row["mode"] == "float_graph" else 2)
        assert row["peak_mib"] == pytest.approx(row["call_mib"] + row["model_bytes"] / 2**20, abs=0.01)
        assert ("breakdown" in row) == row["mode"].startswith("deployed")
    assert report["rows"][2]["breakdown"]["kernels"][0]["ms"] > 0
    gates = {row["mode"]: row["gate"] for row in report["rows"]}
    assert gates["float_eager"]["against"] == "float, chunked"
    assert 0 < gates["float_eager"]["error"] < 1e-5
    assert gates["deployed_w4a4_graph"]["same_as_eager"]
    assert gates["deployed_w4a4_graph"]["error"] == gates["deployed_w4a4"]["error"]
    assert [path.name for path in models.iterdir()] == ["mambair_tiny_x2_w4a4.safetensors"]
    shown = capsys.readouterr().out
    assert f"{INFER:28} float_eager" in shown
    assert "x fp32" in shown


def test_rows_of_a_file_are_kept(
    infer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken, calls = tmp_path / "infer.json", {"float_graph"}, []

    def fill(row: dict[str, Any], models: Any, runs: int, explain: bool) -> None:
        calls.append(row["mode"])
        row |= {
            "call_mib": 1.0,
            "peak_mib": 2.0,
            "model_bytes": 2**20,
            "gate": {"passed": True, "error": 0.0},
        }
        row |= {"median_ms": 2.0, "min_ms": 1.0, "runs": runs, "at": len(calls)}
        if row["mode"] in broken:
            raise RuntimeError("not today")
        if explain and not row["mode"].startswith("float"):
            row["breakdown"] = {"kernels": [{"name": "k", "ms": 1.0, "calls": 1.0}]}

    def run(*options: str, commit: str = "abc") -> list[dict[str, Any]]:
        calls.clear()
        passed = infer.main(["--quick", "--case", INFER, "--commit", commit, "--out", str(out), *options])
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
        assert passed == any(not row["gate"]["passed"] for row in rows)
        return rows

    monkeypatch.setattr(infer, "fill", fill)
    first = run()
    assert calls == [row["mode"] for row in first] == infer.QUICK_MODES
    assert "GATE NOT PASSED RuntimeError: not today" in capsys.readouterr().out
    assert "median_ms" not in first[1]
    broken.clear()
    second = run("--mode", "float_*")
    assert calls == [
        "float_compile_graph",
        "float_compile_amp16_graph",
        "float_graph",
    ]  # what failed is the last
    assert [row["mode"] for row in second] == [*infer.QUICK_MODES, *calls[:2]]
    assert [second[i] for i in (0, 2, 3)] == [first[i] for i in (0, 2, 3)]
    assert capsys.readouterr().out.count("(kept)") == 1
    assert "breakdown" in run("--mode", "*w4a4", "--breakdown")[2]  # rows without one are measured again
    assert calls == ["deployed_w4a4"]
    run("--mode", "*w4a4", "--breakdown")
    run("--mode", "*w4a4")
    assert calls == []
    assert len(run("--mode", "*w4a4", commit="other")) == 1
    assert "of another commit" in capsys.readouterr().out
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    rows = run("--mode", "*w4a4", "--tf32", "off", commit="other")
    assert "of another tf32" in capsys.readouterr().out
    assert [row["tf32"] for row in rows] == ["off"]
    assert not torch.backends.cudnn.allow_tf32
    assert not any(json.loads(out.read_text(encoding="utf-8"))["tf32_allowed"].values())


def test_errors_that_tf32_allows(infer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = "float_eager", "float_graph", "float_compile_graph", "float_compile_amp16_graph"
    torch.set_float32_matmul_precision("highest")  # whatever ran before; the fixture puts it back
    for allowed, limits in ((True, (1e-3, 1e-2, 1e-2, 0.1)), (False, (1e-3, 1e-3, 1e-3, 0.1))):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert infer.tf32() == {"convolutions": allowed, "products": False}
        assert tuple(map(infer.most_error, modes)) == limits


def test_what_a_deployed_model_on_a_gpu_has_to_compute(infer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, 8, 8)
    logits = torch.randn(4, 10)
    assert infer.compare(x, x) == {"error": 0.0, "finite": True, "psnr": None}
    assert infer.compare(x + 0.1, x)["psnr"] == pytest.approx(20, abs=0.3)
    assert infer.compare(1.1 * logits, logits) == {"error": pytest.approx(0.1, rel=1e-4), "finite": True}
    nan = infer.compare(torch.full_like(x, float("nan")), x)
    assert (nan["finite"], nan["error"], nan["psnr"]) == (False, None, None)
    model = infer.Models(Path(), CPU).of(INFER, "float_eager")
    monkeypatch.setattr(infer, "without_graphs", lambda model: contextlib.nullcontext())
    y = torch.rand(1, 3, 12, 10)
    with torch.no_grad():
        right = model(y)
        for mode, change, passed in (
            ("float_eager", 0.0, True),
            ("float_graph", 0.01, False),
            ("float_compile_amp16_graph", 0.01, True),
            ("deployed_w4a4", 0.01, True),
            ("deployed_w4a4", 0.2, False),
            ("deployed_w4a4_graph", 0.0, True),
            ("deployed_w4a4_graph", 1e-4, False),
            ("deployed_w4a4", float("inf"), False),
        ):
            gate = infer.gate(model, mode, lambda _, change=change: right + change, y)
            assert gate["passed"] is passed, (mode, change, gate)
            json.dumps(gate, allow_nan=False)


def test_cases_and_modes_of_a_gpu(
    infer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, str]] = []

    def row(case: str, mode: str, *_: Any) -> dict[str, Any]:
        seen.append((case, mode))
        return {
            "case": case,
            "mode": mode,
            "gate": {"passed": True},
            "median_ms": 1.0,
            "min_ms": 1.0,
            "peak_mib": 1.0,
        }

    monkeypatch.setattr(infer, "measure", row)
    assert infer.main([]) == 0
    assert seen == [(case, mode) for case in infer.CASES for mode in infer.MODES]
    assert len(seen) == 9 * 10
    seen.clear()
    modes = ["--mode", "deployed_w2a2*", "--mode", "float_graph", "--mode", "deployed_w2a2_frozen"]
    assert infer.main(["--case", "vim*", "--case", INFER, *modes]) == 0
    wanted = ["deployed_w2a2", "deployed_w2a2_graph", "float_graph", "deployed_w2a2_frozen"]
    assert seen == [(c, m) for c in ("vim_tiny/224/b1", "vim_tiny/224/b64", INFER) for m in wanted]
    out = tmp_path / "out.json"
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    for options, words in (
        (["--mode", "float_bf16"], "no mode 'float_bf16'"),
        (["--case", "vmamba_tiny"], "a case is MODEL/HxW/bBATCH"),
        (["--case", "mambair_huge_x2/8x8/b1"], "no zoo model 'mambair_huge'"),
        (["--make"], "--models FOLDER"),
        (["--out", str(tmp_path / "other.json")], "holds no results"),
    ):
        assert infer.main(options) == 2
        assert words in capsys.readouterr().err

    def lost() -> None:
        raise infer.Lost("an illegal memory access")

    # The first row leaves a GPU that no call reaches: its row is in the file.
    monkeypatch.setattr(
        infer, "measure", lambda *args: [monkeypatch.setattr(infer, "tidy", lost), row(*args)][1]
    )
    assert infer.main(["--quick", "--out", str(out)]) == 1
    assert "the GPU is lost to this process (an illegal memory access)" in capsys.readouterr().err
    assert [r["mode"] for r in json.loads(out.read_text(encoding="utf-8"))["rows"]] == infer.QUICK_MODES[:1]


def test_without_a_gpu_deployed_models_are_only_made(
    script: Callable[[str], Any],
    no_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    infer = script("infer_cuda")
    monkeypatch.setattr(infer, "deploy", lambda model, mode, x: model)
    monkeypatch.setattr(infer.ssmquant, "save", lambda model, path: path.write_bytes(b"model"))
    assert infer.main(["--quick"]) == 2
    assert "this is for a CUDA GPU, and PyTorch" in capsys.readouterr().err
    options = ["--make", "--models", str(tmp_path), "--case", "mambair_*/64x64/b1", "--case", INFER]
    assert infer.main([*options, "--mode", "deployed_w4a4*", "--mode", "float_eager"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mambair_tiny_x2_w4a4.safetensors"]
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4
    assert str(infer.WEIGHTS["mambair_light_x2"].parent) in shown[0]  # those have shipped ones


@pytest.mark.gpu
def test_inference_on_a_gpu(script: Callable[[str], Any], tmp_path: Path) -> None:
    infer, out = script("infer_cuda"), tmp_path / "infer.json"
    assert infer.main(["--quick", "--breakdown", "--out", str(out)]) == 0
    rows = {row["mode"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == infer.QUICK_MODES
    assert all(row["min_ms"] > 0 and row["call_mib"] > 0 for row in rows.values())
    assert rows["deployed_w4a4_graph"]["breakdown"]["ms"] > 0


def test_methods_without_training(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them makes a deployed model; what is told of its classes, against plain arithmetic."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    ptq = script("ptq")
    monkeypatch.setattr(ptq, "LEARNT", 1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
    ).eval()
    batches = [torch.randn(16, 6)]
    wanted = model(batches[0]).detach()
    labels = wanted.argmax(1)
    for method in ptq.METHODS:
        ours, _ = ptq.deployed(model, method, (8, 8), batches)
        out = ours(batches[0]).detach()
        row = ptq.classes(out, wanted, labels)
        assert row["accuracy"] >= 80
        p = wanted.double().softmax(1)
        kl = (p * (p / out.double().softmax(1)).log()).sum(1).mean()
        assert row["kl"] == pytest.approx(float(kl), rel=1e-6)
        assert row["kl"] > 0
        assert row["sqnr_db"] > 20
