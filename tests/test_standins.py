"""Stand-ins: what is served and what never is, values and gradients, and that nothing is left behind."""

from __future__ import annotations

import builtins
import contextlib
import copy
import importlib
import importlib.util
import io
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant._standins import install_standins, remove_standins, standins, standins_report
from ssmquant._standins import modules as ours
from ssmquant._standins.surface import MODULES
from ssmquant.errors import InputError
from ssmquant.ops import causal_conv1d, lb_window, selective_scan, ssd_scan
from tests.conftest import ROOT

PACKAGES = sorted(name for name in MODULES if "." not in name)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    here = [n for n in PACKAGES if importlib.util.find_spec(n) is not None]
    if here:
        pytest.skip(f"really installed: {here}")
    before = [*sys.meta_path], builtins.__import__, torch.cuda.device.__init__, Tensor.to, nn.Module.to
    yield
    remove_standins()
    assert (
        [*sys.meta_path],
        builtins.__import__,
        torch.cuda.device.__init__,
        Tensor.to,
        nn.Module.to,
    ) == before
    left = {n for n in sys.modules if n.partition(".")[0] in PACKAGES}
    for name in left:
        del sys.modules[name]
    assert not left


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``installed(name, code)`` makes a module importable as if it had been installed."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def install(name: str, code: str, package: bool = False) -> None:
        *folders, last = name.split(".")
        for i in range(len(folders)):
            folder = tmp_path.joinpath(*folders[: i + 1])
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        file = (
            tmp_path.joinpath(*folders, last, "__init__.py")
            if package
            else tmp_path.joinpath(*folders, f"{last}.py")
        )
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
        names.append(name.partition(".")[0])

    yield install
    for name in [n for n in sys.modules if n.partition(".")[0] in names]:
        del sys.modules[name]


# ---- importing -----------------------------------------------------------------------------------------------


def test_every_module_is_served_and_gone_afterwards() -> None:
    with standins():
        for name, contents in MODULES.items():
            module = importlib.import_module(name)
            assert importlib.util.find_spec(name) is not None
            for key in contents:
                assert getattr(module, key) is contents[key]
    for name in PACKAGES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_submodules_are_attributes_without_an_import_of_their_own() -> None:
    with standins():
        mamba_ssm = importlib.import_module("mamba_ssm")
        assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is mamba_ssm.selective_scan_fn


def test_unknown_names_are_import_errors() -> None:
    with standins():
        with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
            exec("from mamba_ssm import nonsense")
        with pytest.raises(AttributeError, match=r"stand-in of ssmquant, which has no 'nonsense'"):
            _ = importlib.import_module("mamba_ssm").nonsense
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.modules.mamba3")


def test_contexts_nest_and_an_installation_outlives_them() -> None:
    with standins():
        module = importlib.import_module("causal_conv1d")
        with standins():
            install_standins()
            install_standins()
    assert importlib.import_module("causal_conv1d") is module
    with standins():
        remove_standins()
        assert importlib.import_module("causal_conv1d") is module
    remove_standins()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d")


def test_an_exception_inside_undoes_everything() -> None:
    with pytest.raises(KeyError), standins(cuda_to_cpu=True):
        raise KeyError  # the fixture looks


def test_threads() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with standins():
                    importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with standins():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_an_installed_package_is_never_shadowed(installed: Any) -> None:
    installed("mamba_ssm", "Mamba = 'the real one'", package=True)
    installed("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn = 'real'")
    with standins():
        mamba_ssm = importlib.import_module("mamba_ssm")
        assert mamba_ssm.Mamba == "the real one"
        assert importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn == "real"
        missing = importlib.import_module("mamba_ssm.modules.mamba2")  # but gets what it lacks
        assert missing.Mamba2 is ours.Mamba2
        assert ("mamba_ssm", "installed") in [row[:2] for row in standins_report()]
    assert sys.modules["mamba_ssm"] is mamba_ssm
    assert "mamba_ssm.modules" not in sys.modules
    assert not hasattr(mamba_ssm, "modules")


def test_an_installed_package_gets_the_extension_that_it_lacks(installed: Any) -> None:
    installed(
        "causal_conv1d", "import causal_conv1d_cuda\nfwd = causal_conv1d_cuda.causal_conv1d_fwd", package=True
    )
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d")
    with standins():
        assert (
            importlib.import_module("causal_conv1d").fwd is MODULES["causal_conv1d_cuda"]["causal_conv1d_fwd"]
        )


def test_an_extension_that_does_not_load_is_served(installed: Any) -> None:
    installed("selective_scan_cuda", "raise ImportError('undefined symbol: _ZN3c10')")
    with standins():
        assert importlib.import_module("selective_scan_cuda").fwd is MODULES["selective_scan_cuda"]["fwd"]
        assert ("selective_scan_cuda", "stand-in", "undefined symbol: _ZN3c10") in standins_report()
    with pytest.raises(ImportError, match="undefined symbol"):
        importlib.import_module("selective_scan_cuda")


def test_a_module_that_was_renamed_is_the_installed_one(installed: Any) -> None:
    installed("mamba_ssm.ops.triton.layer_norm", "RMSNorm = 'real'\ndef rms_norm_fn(x): return 'real'")
    with standins():
        module = importlib.import_module("mamba_ssm.ops.triton.layernorm")
        assert module.RMSNorm == "real"


@pytest.mark.parametrize(
    "where", ["mamba_ssm.ops.triton", "vendored_models.mamba2", "vendored_fork.mamba_ssm.ops.triton"]
)
@pytest.mark.parametrize("early", [False, True])
def test_functions_over_triton_kernels_get_a_path_for_the_cpu(
    installed: Any, where: str, early: bool
) -> None:
    name = f"{where}.layernorm"
    code = "def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, eps=1e-6): raise RuntimeError('0 drivers')"
    installed(name, code)
    if early:
        importlib.import_module(name)
    with standins():
        function = importlib.import_module(name).rms_norm_fn
    x, weight = torch.randn(2, 3, 8), torch.rand(8)
    out, total = function(x, weight, None, x, True)  # outside: models keep working
    torch.testing.assert_close(out, F.rms_norm(2 * x, (8,), weight, 1e-6))
    torch.testing.assert_close(total, 2 * x)
    with pytest.raises(RuntimeError, match="0 drivers"):
        function(x.to("meta"), weight, None)


def test_language_models_that_need_an_old_transformers_do_not_stand_in_the_way(installed: Any) -> None:
    installed("mamba_ssm", "from mamba_ssm.utils.generation import GenerationMixin", package=True)
    installed("mamba_ssm.utils.generation", "import no_longer_there")
    with standins():
        mixin = importlib.import_module("mamba_ssm").GenerationMixin()
    with pytest.raises(InputError, match="text generation"):
        mixin.generate()


def test_report() -> None:
    rows = {name: (state, why) for name, state, why in standins_report()}
    assert rows["mamba_ssm"][0] == "missing"
    assert set(rows) == {*PACKAGES, "triton"}
    with standins():
        assert {state for name, state, _ in standins_report() if name != "triton"} == {"stand-in"}


# ---- Triton and devices --------------------------------------------------------------------------------------

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


# ---- scans ---------------------------------------------------------------------------------------------------


class Operands:
    def __init__(self, length: int = 11, states: int = 3, dtype: torch.dtype = torch.float32) -> None:
        batch, channels, groups = 2, 4, 2
        like_u = partial(torch.randn, batch, channels, length, dtype=dtype)
        like_B = partial(torch.randn, batch, groups, states, length, dtype=dtype)
        self.u, self.delta, self.z = like_u(), like_u(), like_u()
        self.A, self.B, self.C = -torch.rand(channels, states), like_B(), like_B()
        self.D, self.bias = torch.randn(channels), torch.randn(channels)

    def __call__(self, gate: bool) -> list[Tensor]:
        names = ["u", "delta", "A", "B", "C", "D", *["z"] * gate, "bias"]
        return [getattr(self, name).clone().requires_grad_() for name in names]


class Vendored(torch.autograd.Function):
    """The shape of every copy of SelectiveScanFn; ``kernels``: (module, has a gate, arguments after softplus)."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, extra: tuple[Any, ...], gate: bool, *operands: Tensor) -> Tensor:
        if not gate:
            out, x, *_ = kernels.fwd(*operands, True, *extra)
            ctx.save_for_backward(*operands, x)
        else:
            out, x, out_z = kernels.fwd(*operands, True, *extra)
            ctx.save_for_backward(*operands, x, out)
            out, ctx.out_z = out_z, out_z
        ctx.kernels, ctx.extra, ctx.gate, ctx.last = kernels, extra, gate, x[:, :, -1, 1::2]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        if not ctx.gate:
            *operands, x = ctx.saved_tensors
            return (None, None, None, *ctx.kernels.bwd(*operands, dout, x, True, *ctx.extra[:1]))
        *operands, x, out = ctx.saved_tensors
        dxz = torch.empty(out.shape[0], 2 * out.shape[1], out.shape[2], dtype=out.dtype)
        dz = dxz.chunk(2, dim=1)[1]
        *found, du_bias, same, out_z = ctx.kernels.bwd(
            *operands, dout, x, out, dz, True, True, *ctx.extra[:1]
        )
        assert same.data_ptr() == dz.data_ptr()  # written in place
        torch.testing.assert_close(out_z, ctx.out_z)
        return (None, None, None, *found, dz, du_bias)


CASES = {
    "selective_scan_cuda": (True, ()),
    "selective_scan_cuda_core": (False, (1,)),
    "selective_scan_cuda_oflex": (False, (1, True)),
    "selective_scan_cuda_nrow": (True, (1,)),
    "selective_scan_cuda_test": (False, (1,)),
    "lbm.pscan_cuda.pscan": (True, ()),
    "lbm.pscan_cuda_seg.pscan": (True, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_vendored_functions_over_extension_modules(name: str) -> None:
    gate, extra = CASES[name]
    with standins():
        kernels = importlib.import_module(name)
    operands = Operands()
    mine, other = operands(gate), operands(gate)
    weights = torch.randn_like(operands.u)
    out = Vendored.apply(kernels, extra, gate, *mine)
    u, delta, A, B, C, D, *z, bias = other
    window = lb_window(u.shape[-1]) if name.startswith("lbm") else 0
    expected = selective_scan(u, delta, A, B, C, D, *(z or [None]), bias, True, window=window)
    torch.testing.assert_close(out, expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_optional_operands_and_the_last_state() -> None:
    with standins():
        kernels = importlib.import_module("selective_scan_cuda")
    o = Operands()
    out, x = kernels.fwd(o.u, o.delta, o.A, o.B, o.C, None, None, None, False)
    expected, last = selective_scan(o.u, o.delta, o.A, o.B, o.C, return_last_state=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x[:, :, -1, 1::2], last)
    found = kernels.bwd(o.u, o.delta, o.A, o.B, o.C, None, None, None, out, x, None, None, False, False)
    assert [f is None for f in found] == [False] * 5 + [True] * 2


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_oflex_takes_half_precision_and_gives_float(half: torch.dtype) -> None:
    with standins():
        oflex, core = (importlib.import_module(f"selective_scan_cuda_{n}") for n in ("oflex", "core"))
    o = Operands(dtype=half)
    leading = (o.u, o.delta, o.A, o.B, o.C, o.D, o.bias)
    out, x = oflex.fwd(*leading, True, 1, True)
    assert out.dtype == torch.float32
    wide = [t.float() for t in leading]
    torch.testing.assert_close(out, selective_scan(*wide[:6], None, wide[6], True))
    assert core.fwd(*leading, True, 1)[0].dtype == half
    assert oflex.fwd(*leading, True, 1, False)[0].dtype == half
    found = oflex.bwd(*leading, torch.ones_like(out), x, True, 1)
    assert [f.dtype for f in found] == [t.dtype for t in leading]


def test_one_state_and_shared_step_sizes() -> None:
    with standins():
        ndstate, core = (importlib.import_module(f"selective_scan_cuda_{n}") for n in ("ndstate", "core"))
    o = Operands(states=1)
    flat = (o.u, o.delta, o.A[:, 0], o.B[:, :, 0], o.C[:, :, 0], o.D, o.bias, True, 1)
    full = (o.u, o.delta, o.A, o.B, o.C, o.D, o.bias, True, 1)
    out, _ = ndstate.fwd(*flat)
    torch.testing.assert_close(out, core.fwd(*full)[0])
    one = ndstate.bwd(*flat[:7], out, None, True, 1)
    two = core.bwd(*full[:7], out, None, True, 1)
    for a, b, operand in zip(one, two, flat, strict=False):
        assert a.shape == operand.shape
        torch.testing.assert_close(a, b.view_as(a))
    shared = (
        o.u,
        o.delta[:, :2],
        o.A,
        o.B,
        o.C,
        o.D,
        o.bias[:2],
        True,
        1,
    )  # VMamba: channels share step sizes
    repeated = (o.u, o.delta[:, [0, 0, 1, 1]], o.A, o.B, o.C, o.D, o.bias[[0, 0, 1, 1]], True, 1)
    torch.testing.assert_close(core.fwd(*shared)[0], core.fwd(*repeated)[0])


def test_functions_and_their_apply() -> None:
    o = Operands()
    expected = selective_scan(o.u, o.delta, o.A, o.B, o.C, o.D, None, o.bias, True)
    with standins():
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        package = importlib.import_module("selective_scan")
    for function in (
        interface.selective_scan_fn,
        interface.SelectiveScanFn.apply,
        interface.selective_scan_ref,
    ):
        torch.testing.assert_close(function(o.u, o.delta, o.A, o.B, o.C, o.D, None, o.bias, True), expected)
        assert len(function(o.u, o.delta, o.A, o.B, o.C, return_last_state=True)) == 2
    for function in (package.selective_scan_fn, package.SelectiveScanFn.apply, package.selective_scan_ref):
        torch.testing.assert_close(function(o.u, o.delta, o.A, o.B, o.C, o.D, o.bias, True), expected)


# ---- causal_conv1d -------------------------------------------------------------------------------------------


@pytest.fixture
def conv() -> Any:
    with standins():
        return importlib.import_module("causal_conv1d"), importlib.import_module("causal_conv1d_cuda")


def _conv_operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 9), torch.randn(4, 3), torch.randn(4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_extension_module_of_every_version(conv: Any, silu: bool, bias: bool) -> None:
    cuda = conv[1]
    x, weight, b = (t.requires_grad_() for t in _conv_operands())
    operands = [x, weight, b] if bias else [x, weight]
    b = b if bias else None
    expected = causal_conv1d(x, weight, b, "silu" if silu else None)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, operands, dout)
    with torch.no_grad():
        out = torch.empty_like(x)
        for rest in ((silu,), (None, silu), (None, None, None, silu), (None, None, out, None, silu)):
            torch.testing.assert_close(cuda.causal_conv1d_fwd(x, weight, b, *rest), expected)
        torch.testing.assert_close(out, expected)
    for rest in ((None, silu), (None, None, silu), (None, None, None, None, False, silu)):
        found = cuda.causal_conv1d_bwd(x, weight, b, dout, *rest)
        assert len(found) == (4 if len(rest) == 6 else 3)
        for a, e in zip(found, gradients, strict=False):
            torch.testing.assert_close(a, e)
        assert bias or found[2] is None
    dx = torch.empty(2, 8, 9).chunk(2, dim=1)[0]  # a half of dxz
    dw, db = torch.empty_like(weight), torch.empty(4) if bias else None
    assert cuda.causal_conv1d_bwd(x, weight, b, dout, None, dx, silu)[0] is dx
    torch.testing.assert_close(dx, gradients[0])
    cuda.causal_conv1d_bwd(x, weight, b, dout, None, None, None, dx.zero_(), dw, db, None, silu)  # 1.5
    torch.testing.assert_close((dx, dw), gradients[:2])


def test_states_of_a_convolution(conv: Any) -> None:
    package, cuda = conv
    x, weight, bias = (t.requires_grad_() for t in _conv_operands())
    expected = causal_conv1d(x, weight, bias, "silu")
    first, state = package.causal_conv1d_fn(
        x[..., :5], weight, bias, return_final_states=True, activation="silu"
    )
    second = package.causal_conv1d_fn(x[..., 5:], weight, bias, initial_states=state, activation="silu")
    whole = torch.cat([first, second], dim=-1)
    torch.testing.assert_close(whole, expected)
    weights = torch.randn_like(expected)
    found, wanted = (
        torch.autograd.grad((y * weights).sum(), (x, weight, bias), retain_graph=True)
        for y in (whole, expected)
    )
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():  # the same through the extension module
        out_state = torch.empty_like(state)
        cuda.causal_conv1d_fwd(x[..., :5], weight, bias, None, None, out_state, True)
        torch.testing.assert_close(out_state, state)
        short = package.causal_conv1d_fn(x[..., :1], weight, None, return_final_states=True)[1]
        torch.testing.assert_close(short, F.pad(x[..., :1], (1, 0)))
        again = cuda.causal_conv1d_bwd(
            x[..., 5:], weight, bias, weights[..., 5:], None, state, None, None, True, True
        )
    state_grad = torch.autograd.grad((second * weights[..., 5:]).sum(), state)[0]
    torch.testing.assert_close(again[3], state_grad)


def test_steps_of_a_convolution(conv: Any) -> None:
    package, cuda = conv
    x, weight, bias = _conv_operands()
    expected = causal_conv1d(x, weight, bias, "silu")
    state, other = torch.zeros(2, 4, 3), torch.zeros(2, 4, 2)
    for i in range(6):
        step = package.causal_conv1d_update(x[..., i], state, weight, bias, "silu")
        torch.testing.assert_close(step, expected[..., i])
        out = torch.empty(2, 4)
        cuda.causal_conv1d_update(x[..., i], other, weight, bias, out, True, None, None)
        torch.testing.assert_close(out, expected[..., i])
    torch.testing.assert_close(
        package.causal_conv1d_update(x[..., 6:], state, weight, bias, "silu"), expected[..., 6:]
    )
    torch.testing.assert_close(state, x[..., -3:])


def test_old_argument_order_and_refusals(conv: Any) -> None:
    package = conv[0]
    x, weight, bias = _conv_operands()
    expected = causal_conv1d(x, weight, bias, "silu")
    for call in (
        partial(package.causal_conv1d_fn, x, weight, bias, "silu"),  # 1.0
        partial(package.causal_conv1d_fn, x, weight, bias, None, "silu"),  # 1.1
        partial(package.causal_conv1d_fn, x, weight, bias, activation="swish"),
    ):
        torch.testing.assert_close(call(), expected)
    with pytest.raises(InputError, match="seq_idx is not supported"):
        package.causal_conv1d_fn(x, weight, bias, seq_idx=torch.zeros(2, 9))
    with pytest.raises(InputError, match="expected None, 'silu' or 'swish'"):
        package.causal_conv1d_fn(x, weight, bias, activation="gelu")


# ---- norms, and single steps ---------------------------------------------------------------------------------


def test_norms() -> None:
    with standins():
        new = importlib.import_module("mamba_ssm.ops.triton.layer_norm")
        old = importlib.import_module("mamba_ssm.ops.triton.layernorm")
        gated = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    x, x1, r, weight, bias = (
        torch.randn(3, 8),
        torch.randn(3, 8),
        torch.randn(3, 8),
        torch.rand(8),
        torch.rand(8),
    )
    norm = partial(F.layer_norm, normalized_shape=(8,), weight=weight, bias=bias, eps=1e-6)
    rms = partial(F.rms_norm, normalized_shape=(8,), weight=weight, eps=1e-6)
    torch.testing.assert_close(new.layer_norm_fn(x, weight, bias, r, prenorm=True), (norm(x + r), x + r))
    torch.testing.assert_close(old.layer_norm_fn(x, weight, bias, r, 1e-6, True), (norm(x + r), x + r))
    torch.testing.assert_close(old.rms_norm_fn(x, weight, None, r, True, False, 1e-6), (rms(x + r), x + r))
    out, second, total = new.rms_norm_fn(
        x, weight, None, r, x1, bias, eps=1e-6, rowscale=torch.full((3,), 2.0), prenorm=True
    )
    torch.testing.assert_close((out, total), (rms(2 * x + x1 + r), 2 * x + x1 + r))
    torch.testing.assert_close(second, F.rms_norm(total, (8,), bias, 1e-6))
    assert new.layer_norm_fn(x, weight, bias, dropout_p=1.0).equal(bias.expand(3, 8))
    linear = torch.randn(5, 8)
    y, total = new.layer_norm_linear_fn(x, weight, bias, linear, None, r, prenorm=True)
    torch.testing.assert_close((y, total), (norm(x + r) @ linear.T, x + r))

    module = new.RMSNorm(8, eps=1e-6)
    assert list(module.state_dict()) == ["weight"]
    assert module.bias is None
    torch.testing.assert_close(module(x.half(), r, prenorm=True)[1], x.half().float() + r)
    z = torch.randn(3, 8)
    groups = F.rms_norm((x * F.silu(z)).unflatten(-1, (2, 4)), (4,), eps=1e-5).flatten(-2)
    torch.testing.assert_close(gated.RMSNorm(8, group_size=4, norm_before_gate=False)(x, z), groups)
    assert list(gated.LayerNorm(8).state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(
        gated.LayerNorm(8, eps=1e-6)(x, z), F.layer_norm(x, (8,), eps=1e-6) * F.silu(z)
    )
    torch.testing.assert_close(gated.rmsnorm_fn(x, weight, None), rms(x))


def test_steps_are_a_scan() -> None:
    with standins():
        step = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    o = Operands(length=5)
    B, C = o.B[:, 0], o.C[:, 0]
    expected = selective_scan(o.u, o.delta, o.A, B, C, o.D, o.z, o.bias, True)
    state = torch.zeros(2, 4, 3)
    for i in range(5):
        now = [t[..., i] for t in (o.u, o.delta, B, C, o.z)]
        out = step(state, now[0], now[1], o.A, now[2], now[3], o.D, now[4], o.bias, True)
        torch.testing.assert_close(out, expected[..., i])


@pytest.mark.parametrize("groups", [1, 2])
def test_steps_with_heads_are_a_chunk_scan(groups: int) -> None:
    heads, size, states = 4, 3, 5
    with standins():
        step = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        chunk = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x, z, dt = torch.randn(2, 6, heads, size), torch.randn(2, 6, heads, size), torch.randn(2, 6, heads)
    B, C = torch.randn(2, 6, groups, states), torch.randn(2, 6, groups, states)
    A, D, bias = -torch.rand(heads), torch.randn(heads), torch.randn(heads)
    expected, last = ssd_scan(x, dt, A, B, C, D, z, bias, True, return_last_state=True)
    got = chunk(x, dt, A, B, C, 256, D, z, bias, dt_softplus=True, return_final_states=True)
    torch.testing.assert_close(got, (expected, last))
    state = torch.zeros(2, heads, size, states)

    def spread(t: Tensor, *more: int) -> Tensor:
        return t.reshape(*t.shape, *[1] * len(more)).expand(*t.shape, *more)

    for i in range(6):
        out = step(
            state, x[:, i], spread(dt[:, i], size), spread(A, size, states), B[:, i], C[:, i], spread(D, size), z[:, i],
            spread(bias, size), True,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, i])
    torch.testing.assert_close(state, last)
    with pytest.raises(InputError, match="several sequences"):
        chunk(x, dt, A, B, C, 256, seq_idx=torch.zeros(2, 6))


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
