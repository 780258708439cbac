"""Stand-ins: modules that define Triton kernels, and what asks for a CUDA device."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from ssmquant._standins import install_standins, standins
from tests.conftest import ROOT

_WITHOUT_TRITON = """
import builtins, importlib, sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import ssmquant
from ssmquant._standins import standins, standins_report

code = '''
import triton
import triton.language as tl
from triton import Config, jit
from triton.language.extra import libdevice
from triton.runtime.jit import JITFunction

configs = [config for config in [Config({"BLOCK": 2}, num_warps=2)] if config.num_warps < 8]

@triton.autotune(configs=configs, key=["n"])
@triton.heuristics({"HAS_Z": lambda args: args["z"] is not None})
@triton.jit
def kernel(x, z, n, BLOCK: tl.constexpr, HAS_Z: tl.constexpr, dtype: tl.dtype = tl.float32):
    tl.store(x, 1)

@jit(do_not_specialize=["n"])
def other(n: tl.tensor | None = None):
    pass

assert isinstance(kernel, JITFunction) and kernel.configs == configs
assert (triton.cdiv(5, 2), triton.next_power_of_2(5), triton.next_power_of_2(8)) == (3, 8, 8)
'''
with standins():
    user = {"__name__": "user"}
    exec(code, user)
    for launch in (lambda: user["kernel"][(1,)](1, None, 3, BLOCK=4), lambda: user["other"][lambda meta: (1,)](1)):
        try:
            launch()
        except ssmquant.SsmquantError as e:
            assert "needs Triton, which is not installed" in str(e)
        else:
            raise AssertionError("launched")
    # torch, and whoever asks without an import statement, sees that there is none
    from torch.utils._triton import has_triton_package
    assert not has_triton_package() and sys.modules["triton"] is None
    assert importlib.util.find_spec("triton") is None
    assert ("triton", "stand-in") in [row[:2] for row in standins_report()]
    from torch._inductor.runtime import triton_compat
    assert not triton_compat.HAS_TRITON
    compiled = torch.compile(lambda x: torch.sin(x) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))
try:
    exec("import triton", {"__name__": "user"})
except ImportError:
    print("gone")
"""


def test_modules_that_define_triton_kernels_without_triton() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", _WITHOUT_TRITON],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.strip() == "gone", run.stderr


def test_a_triton_that_is_installed_stays() -> None:
    triton = pytest.importorskip("triton")
    with standins():
        assert importlib.import_module("triton") is triton
        assert builtins.__import__("triton") is triton


def test_a_cuda_device_context_around_cpu_tensors() -> None:
    cpu = torch.zeros(1).device
    with pytest.raises(ValueError, match="Expected a cuda device"), torch.cuda.device(cpu):
        pass
    with standins():
        with torch.cuda.device(cpu), torch.cuda.device("cpu"):
            assert torch.zeros(1).device == cpu
        if not torch.cuda.is_available():
            with torch.cuda.device(cpu.index):  # None
                pass
    with pytest.raises(ValueError, match="Expected a cuda device"), torch.cuda.device(cpu):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_means_cpu_on_request() -> None:
    def move() -> None:
        x = torch.zeros(2)
        for moved in (
            x.cuda(),
            x.to("cuda"),
            x.to(device="cuda:0"),
            x.to(0),
            x.to(torch.device("cuda"), torch.float32),
        ):
            assert moved.device.type == "cpu"
        assert x.to(torch.float64).dtype == torch.float64
        assert nn.Linear(2, 2).cuda().to("cuda", dtype=torch.float64).weight.dtype == torch.float64

    with standins(cuda_to_cpu=True):
        move()
        with standins():
            move()
    with standins(), pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).to("cuda")
    install_standins(cuda_to_cpu=True)
    move()
    install_standins()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).to("cuda")
