"""The choice of a back end: automatic, by the user, and what is said where a back end is passed over."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmquant import cli
from ssmquant.errors import InputError
from ssmquant.ops import backend_report, nvrtc, quantize, selection, selective_scan, use_backend
from ssmquant.ops.selective_scan import backends, chunked, selective_scan_reference
from tests.conftest import ROOT
from tests.ops.test_selective_scan import OP, assert_close, operands, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing chosen, nothing said, nothing known; afterwards as it was."""
    monkeypatch.setattr(selection, "_STATE", selection._State())
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    caches = (backends._automatic, backends._reason)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Fake(types.SimpleNamespace):
    """A back end that is ``chunked``, by another name, and knows who it was that ran."""

    def __init__(self, name: str, reason: str | None = None) -> None:
        super().__init__(NAME=name, reason=reason, ran=[], saved_shape=chunked.saved_shape)

    def unavailable(self, device: torch.device, dtype: torch.dtype, states: int) -> str | None:
        return self.reason if states < 100 or self.NAME == "chunked" else "too many states"

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.ran.append("forward")
        return chunked.forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        self.ran.append("backward")
        return chunked.backward(*args)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Back ends by name, as the registry finds them; a string is why one cannot be imported."""
    found: dict[str, Any] = {n: Fake(n) for n in ("cuda", "triton", "cpu", "chunked", "mamba_ssm")}
    monkeypatch.setattr(backends, "_load", lambda name: found[name])
    monkeypatch.setattr(backends, "_is_here", lambda device: True)
    return found


def chosen(device: torch.device = CPU, states: int = 16) -> str:
    backends._automatic.cache_clear()
    backends._reason.cache_clear()
    return backends.choose(device, torch.float32, states).NAME


def test_the_best_that_can(fakes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert (chosen(CPU), chosen(CUDA), chosen(torch.device("meta"))) == ("cpu", "cuda", "chunked")
    fakes["cuda"].reason = "no compiler"
    assert chosen(CUDA) == "triton"
    assert not capsys.readouterr().err
    fakes["triton"] = "it cannot be imported (No module named 'triton')"
    for _ in range(2):
        assert chosen(CUDA) == "chunked"
    (line,) = capsys.readouterr().err.splitlines()
    assert "plain PyTorch" in line
    assert "cuda: no compiler; triton: it cannot be imported" in line


def test_a_back_end_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._MODULES, "cpu", "no_such_module")
    backends._load.cache_clear()
    try:
        assert chosen(CPU) == "chunked"
        assert "no_such_module" in str(dict(backends.explain(CPU, torch.float32, 16))["cpu"])
    finally:
        backends._load.cache_clear()


def test_the_choice_of_the_user(fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selection.VARIABLE, " chunked ")
    assert chosen() == "chunked"
    with use_backend("auto"):
        assert chosen() == "cpu"
        with use_backend("chunked"):
            assert chosen() == "chunked"
        assert chosen() == "cpu"
    assert chosen() == "chunked"
    use_backend("cpu")
    assert chosen() == "cpu"
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(chosen()))
    use_backend("chunked")
    thread.start()
    thread.join()
    assert seen == ["chunked"]
    with use_backend("mamba_ssm"):
        assert chosen(CUDA) == "mamba_ssm"


@pytest.mark.parametrize("variable", [None, "", " auto ", " chunked", "triton"])
def test_choices_are_what_is_selected(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs are told apart by them."""

    def agree() -> None:
        assert selection.choices() == tuple(selection.selected(op) or "auto" for op in selection.OPERATORS)

    if variable is not None:
        monkeypatch.setenv(selection.VARIABLE, variable)
    agree()
    with use_backend("cpu", op="fuse"):
        agree()
        for name in ("auto", "chunked"):
            with use_backend(name), use_backend(name, op="quantize"):
                agree()
    agree()


def test_a_name_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        InputError, match="no back end 'cudnn'; choose one of auto, cuda, triton, cpu, chunked"
    ):
        use_backend("cudnn")
    assert selection.selected("selective_scan") is None
    monkeypatch.setenv(selection.VARIABLE, "cudnn")
    with pytest.raises(InputError, match="SSMQUANT_BACKEND: there is no back end 'cudnn'"):
        selective_scan(**operands(dtype=torch.float32))
    assert cli.main(["env"]) == 2
    assert "SSMQUANT_BACKEND" in capsys.readouterr().err


def test_a_choice_that_cannot_serve_says_so_once(fakes: dict[str, Any]) -> None:
    args = operands(dtype=torch.float32, length=9)
    want = selective_scan(**args)
    fakes["cpu"].ran.clear()
    with use_backend("triton"):
        with pytest.warns(UserWarning, match=r"'triton' cannot serve .*it does not run on cpu tensors"):
            got = selective_scan(**args)
        assert torch.equal(got, want)
        assert torch.equal(selective_scan(**args), want)  # a second warning would be an error
        with pytest.warns(UserWarning, match="does not run on meta tensors"):
            chosen(torch.device("meta"))
    assert fakes["cpu"].ran == ["forward"] * 2
    with use_backend("cuda"), pytest.warns(UserWarning, match="too many states"):
        assert chosen(CUDA, states=128) == "chunked"


def test_gradients_come_from_the_back_end_that_ran(fakes: dict[str, Any]) -> None:
    args = operands(dtype=torch.float32, length=9)
    with use_backend("chunked"):
        out = selective_scan(**args)
    thread = threading.Thread(target=out.sum().backward)
    thread.start()
    thread.join()
    assert (fakes["chunked"].ran, fakes["cpu"].ran) == (["forward", "backward"], [])


def test_compiled_code_keeps_its_back_end(fakes: dict[str, Any]) -> None:
    args = operands(dtype=torch.float32, length=9)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    with use_backend("chunked"):
        compiled(**args).sum().backward()
    fakes["chunked"].ran.clear()
    compiled(**args).sum().backward()
    assert (fakes["chunked"].ran, fakes["cpu"].ran) == (["forward", "backward"], [])


def test_a_graph_made_for_another_machine(fakes: dict[str, Any]) -> None:
    args = operands(dtype=torch.float32, without="z")
    tensors = [args[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    scan = torch.ops.ssmquant._selective_scan_fwd
    want = scan(*tensors, True, True, "cpu")
    with pytest.warns(UserWarning, match="'cuda' cannot serve this call"):
        got = scan(*tensors, True, True, "cuda")
    torch.autograd.grad(got[0].sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["cpu", "chunked"])
def test_real_back_ends_keep_the_contract(name: str) -> None:
    reason = dict(backends.explain(CPU, torch.float32, 2))[name]
    if reason is not None:
        pytest.skip(reason)
    args = operands(2, 6, 2, 70, 2, dtype=torch.float32, without="z")
    tensors = [args[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    scan = torch.ops.ssmquant._selective_scan_fwd
    module = backends.choose(CPU, torch.float32, 2, name)
    assert module.NAME == name
    for save in (True, False):
        y, last, saved = scan(*(t.detach() for t in tensors), True, save, name)
        pieces, *rest = module.saved_shape(2, 6, 2, 70)
        assert saved.shape == (pieces if save else 0, *rest)
        assert y.is_contiguous()
        assert last.shape == (2, 6, 2)
    with use_backend(name), warnings.catch_warnings():
        torch.library.opcheck(OP, tuple(operands(1, 4, 2, 40, 2, dtype=torch.float32).values()))


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {name: (state, why) for name, state, why in backend_report()}
    assert rows["selective_scan, cpu"][0] == chosen(CPU)
    assert cli.main(["env"]) == 0
    assert "selective_scan, cpu" in capsys.readouterr().out


def test_report_of_a_gpu(fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(quantize, "explain", lambda device: (None, f"plain PyTorch on {device}"))
    fakes["cuda"].reason = "NVRTC is missing"
    fakes["mamba_ssm"] = "it cannot be imported"
    rows = {name: (state, why) for name, state, why in backend_report()}
    assert rows["selective_scan, cuda:0"] == rows["selective_scan, cuda:1"]
    assert rows["quantize, cuda:1"] == ("torch", "plain PyTorch on cuda:1")
    why = "not cuda: NVRTC is missing; not mamba_ssm: it cannot be imported; can be chosen: chunked"
    assert rows["selective_scan, cuda:0"] == ("triton", why)
    fakes["cuda"].reason = None
    backends._reason.cache_clear()
    backends._automatic.cache_clear()
    monkeypatch.setattr(nvrtc, "describe", lambda: "NVRTC 13.0")
    name, why = {row[0]: row[1:] for row in backend_report()}["selective_scan, cuda:0"]
    assert name == "cuda"
    assert "compiled by NVRTC 13.0" in why
    with use_backend("mamba_ssm"):
        fakes["mamba_ssm"] = Fake("mamba_ssm")
        backends._reason.cache_clear()
        rows = {name: (state, why) for name, state, why in backend_report()}
    assert rows["selective_scan, cuda:0"][0] == "mamba_ssm"
    assert "not mamba_ssm, which was chosen" in rows["selective_scan, cpu"][1]


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "states", "groups"), [(288, 10, 4), (60, 1, 1), (360, 16, 1)])
@pytest.mark.parametrize("name", ["cuda", "triton", "chunked"])
def test_on_a_gpu(channels: int, states: int, groups: int, name: str) -> None:
    reason = dict(backends.explain(CUDA, torch.float32, states))[name]
    if reason is not None:
        pytest.skip(reason)
    for constant in ("", "B C"):
        args = operands(2, channels, states, 197, groups, dtype=torch.float32, constant=constant)
        on_gpu = {k: v.detach().cuda().requires_grad_() for k, v in args.items() if v is not None}
        exact = {k: v.detach().double().requires_grad_() for k, v in args.items() if v is not None}
        with use_backend(name):
            got = run(selective_scan, on_gpu)
        assert_close([t.cpu() for t in got], run(selective_scan_reference, exact), 1e-5)


def build(folder: Path, wanted: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    env = {**os.environ, "SSMQUANT_BUILD": wanted}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_libraries_in_a_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    assert build(tmp_path / "pure", "").returncode == 0
    sources = {path.relative_to(ROOT / "ssmquant") for path in (ROOT / "ssmquant" / "csrc").rglob("*.*")}
    assert sources
    assert all((tmp_path / "pure" / "ssmquant" / path).is_file() for path in sources)
    assert not (tmp_path / "pure" / "ssmquant" / "lib").exists()
    assert "'tpu' is none of cpu, cuda" in build(tmp_path, "cpu,tpu").stderr
    if dict(backends.explain(CPU, torch.float32, 16))["cpu"] is None:
        done = build(tmp_path / "cpu", "cpu")
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "cpu" / "ssmquant" / "lib").glob("*.so"))


def test_every_back_end_can_be_chosen_by_name() -> None:
    known = {
        name for table in (backends._ORDER, backends._OPTIONAL) for names in table.values() for name in names
    }
    assert known | {"auto"} == set(selection.NAMES)
