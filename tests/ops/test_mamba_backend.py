"""The packages mamba-ssm and causal-conv1d as back ends: how they are called, and on a GPU that has them, parity.

``Extension`` has the calling convention of ``selective_scan_cuda``, with all that it insists on, and computes by the
definition of the scan. So the marshalling of arguments runs everywhere.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmquant
from ssmquant.errors import InputError
from ssmquant.ops import causal_conv1d, selection, selective_scan, upstream, use_backend
from ssmquant.ops.selective_scan import backends, mamba, selective_scan_reference
from tests.ops.test_selective_scan import OP, assert_close, operands, run

CHUNK = 2048


class Extension:
    """``selective_scan_cuda`` in Python. Raises RuntimeError where that does."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def check(self, *operands: Any) -> None:
        u, delta, A, B, C, D, z, bias = operands
        batch, channels, length = u.shape
        states = A.shape[1]
        groups = B.shape[1] if B.dim() > 2 else 1
        ok = u.dtype in (torch.float32, torch.float16, torch.bfloat16) and A.dtype == torch.float32
        ok = (
            ok
            and delta.shape == u.shape
            and delta.dtype == u.dtype
            and A.shape[0] == channels
            and states <= 256
        )
        ok = ok and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta))
        for t in (B, C):
            if t.dim() == 2:
                ok = ok and t.dtype == torch.float32 and t.shape == (channels, states)
            else:
                ok = ok and t.dtype == u.dtype and t.shape == (batch, groups, states, length)
                ok = ok and t.stride(-1) == 1
        for t in (D, bias):
            ok = ok and (
                t is None or (t.dtype == torch.float32 and t.shape == (channels,) and t.stride(0) == 1)
            )
        if not ok or z is not None:
            raise RuntimeError("selective_scan_cuda refuses")

    def scan(self, operands: Any, softplus: bool) -> tuple[Tensor, Tensor]:
        out = selective_scan_reference(*operands, delta_softplus=softplus, return_last_state=True)
        assert isinstance(out, tuple)
        return out

    def fwd(self, *arguments: Any) -> list[Tensor]:
        *operands, softplus = arguments
        self.check(*operands)
        self.calls.append("fwd")
        u, delta, A, B, C, *_ = operands
        batch, channels, length = u.shape
        with torch.no_grad():
            out = torch.empty_like(delta).copy_(self.scan(operands, softplus)[0])
            states = u.new_full(
                (batch, channels, -(-length // CHUNK), 2 * A.shape[1]), torch.nan, dtype=torch.float32
            )
            for i in range(states.shape[2]):
                # as there: a constant B is a factor of what is read out, not of the state
                ones = torch.ones_like(B) if B.dim() == 2 else B
                cut = [t[..., : (i + 1) * CHUNK] if t.dim() > 2 else t for t in (u, delta, ones, C)]
                until = (cut[0], cut[1], A, cut[2], cut[3], *operands[5:])
                states[:, :, i, 1::2] = self.scan(until, softplus)[1]
        return [out, states]

    def bwd(self, *arguments: Any) -> list[Tensor | None]:
        *operands, dout, states, out, dz, softplus, recompute = arguments
        self.check(*operands)
        self.calls.append("bwd")
        u, A = operands[0], operands[2]
        shape = (*u.shape[:2], -(-u.shape[2] // CHUNK), 2 * A.shape[1])
        if (
            dout.dtype != u.dtype
            or dout.stride(-1) != 1
            or states.shape != shape
            or not states.is_contiguous()
        ):
            raise RuntimeError("selective_scan_cuda refuses")
        assert (out, dz, recompute) == (None, None, False)
        assert torch.equal(states[..., 1::2], self.fwd(*operands, softplus)[1][..., 1::2]), (
            "another scan's states"
        )
        self.calls.pop()

        def gradients() -> list[Tensor | None]:
            leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
            y = self.scan(leaves, softplus)[0]
            given = [t for t in leaves if t is not None]
            found = iter(torch.autograd.grad(y, given, dout, allow_unused=True, materialize_grads=True))
            return [None if t is None else next(found) for t in leaves]

        # A kernel runs below autograd, where this stand-in for one could not use it; another thread is not there.
        with ThreadPoolExecutor(1) as pool:
            grads = pool.submit(gradients).result()
        return [*grads[:6], grads[7]]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    """``Extension`` in the place of the real one, on the CPU, chosen."""
    fake = Extension()
    monkeypatch.setattr(upstream, "find", lambda name: fake)
    monkeypatch.setattr(mamba, "unavailable", lambda *args: None)
    monkeypatch.setitem(backends._OPTIONAL, "cpu", ("mamba_ssm",))
    backends._reason.cache_clear()
    with use_backend("mamba_ssm"):
        yield fake
    backends._reason.cache_clear()


def exact(args: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v.detach().double().requires_grad_() for k, v in args.items()}


FORMS = [
    {"batch": 2, "channels": 12, "states": 4, "length": 49, "groups": 4},
    {"batch": 1, "channels": 6, "states": 1, "length": 1, "groups": 1},
    {"batch": 3, "channels": 6, "states": 10, "length": 7, "groups": None},
    {"batch": 2, "channels": 12, "states": 3, "length": 20, "groups": 4, "constant": "B"},
    {"batch": 2, "channels": 12, "states": 3, "length": 20, "groups": 4, "constant": "C"},
    {"batch": 2, "channels": 12, "states": 3, "length": 20, "groups": 4, "constant": "B C"},
    {"batch": 2, "channels": 12, "states": 3, "length": 20, "groups": None, "constant": "B"},
    {"batch": 2, "channels": 8, "states": 2, "length": 30, "groups": 2, "without": "D z delta_bias"},
    {"batch": 1, "channels": 4, "states": 2, "length": 2100, "groups": 2},
]


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_results_and_gradients(extension: Extension, form: dict[str, Any], softplus: bool) -> None:
    args = operands(**form, dtype=torch.float32)
    assert_close(
        run(selective_scan, args, softplus), run(selective_scan_reference, exact(args), softplus), 1e-5
    )
    assert "bwd" in extension.calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(extension: Extension, dtype: torch.dtype) -> None:
    args = operands(length=40, dtype=dtype)
    got, want = run(selective_scan, args), run(selective_scan_reference, exact(args))
    assert [t.dtype for t in got] == [dtype, torch.float32] + [dtype] * (len(got) - 2)
    assert_close(got, want, 4 * torch.finfo(dtype).eps)


def test_dtypes_and_layouts_may_differ(extension: Extension) -> None:
    args = operands(dtype=torch.float32)
    args["u"] = args["u"].detach().bfloat16().requires_grad_()
    for name in ("delta", "B", "C"):
        args[name] = args[name].detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    got, want = run(selective_scan, args), run(selective_scan_reference, exact(args))
    assert all(t.is_contiguous() for t in got)
    assert [t.dtype for t in got[2:]] == [t.dtype for t in args.values()]
    assert_close(got[1:2], want[1:2], 1e-5)
    assert_close(got[1:2] + got[3:], want[1:2] + want[3:], 1e-2)  # g was rounded to u's bfloat16


def test_the_second_pass_only_for_the_last_state(extension: Extension) -> None:
    args = operands(dtype=torch.float32, length=9)
    out, last = selective_scan(**args, return_last_state=True)
    out.sum().backward(retain_graph=True)
    assert extension.calls == ["fwd", "bwd"]
    last.sum().backward()
    assert extension.calls == ["fwd", "bwd", "bwd", "fwd", "bwd"]


def test_the_backward_pass_stays_with_the_back_end_of_the_forward_pass(extension: Extension) -> None:
    args = operands(dtype=torch.float32, length=9)
    out = selective_scan(**args)
    with use_backend("chunked"):
        out.sum().backward()
    assert extension.calls == ["fwd", "bwd"]


def test_opcheck(extension: Extension) -> None:
    args = operands(1, 4, 2, 40, 2, dtype=torch.float32)
    torch.library.opcheck(OP, tuple(args.values()), {"delta_softplus": True})


def test_compiled_with_gradients(extension: Extension) -> None:
    args = operands(1, 4, 2, 40, 2, dtype=torch.float32)
    want = run(selective_scan, args)
    got = run(torch.compile(selective_scan, backend="aot_eager", fullgraph=True), args)
    assert_close(got, want, 1e-6)


def test_too_big_for_it_is_an_error(extension: Extension) -> None:
    u = torch.zeros(1, 1, 1).expand(1, 2**16, 2**15)
    B = torch.zeros(1, 1, 1).expand(1, 1, 2**15)
    with pytest.raises(InputError, match="more elements than the back end mamba_ssm can count"):
        mamba.forward(u, u, torch.zeros(2**16, 1), B, B, None, None, False, torch.float32, False)


# ---- what is there, and what is not --------------------------------------------------------------------------------


@pytest.fixture
def nothing_known() -> Iterator[None]:
    upstream.find.cache_clear()
    yield
    upstream.find.cache_clear()


@pytest.mark.parametrize("name", ["selective_scan_cuda", "causal_conv1d"])
def test_a_stand_in_is_not_taken_for_the_package(nothing_known: None, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with ssmquant.standins():
        assert importlib.import_module(name) is not None
        found = upstream.find(name)
    assert isinstance(found, str)
    assert "stand-in" in found


def test_why_it_is_not_there(nothing_known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)  # what cannot be imported
    assert "pip install" in str(upstream.find("selective_scan_cuda"))
    cuda = torch.device("cuda")
    assert mamba.unavailable(torch.device("cpu"), torch.float32, 16) == "it runs on CUDA devices only"
    assert mamba.unavailable(cuda, torch.float64, 16) == "its state is float32"
    assert mamba.unavailable(cuda, torch.float32, 257) == "it holds up to 256 states, not 257"


# ---- causal-conv1d -------------------------------------------------------------------------------------------------


def conv_operands(width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (torch.randn(2, 6, 20), torch.randn(6, 1, width), torch.randn(6))
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2].requires_grad_()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_of_the_package(monkeypatch: pytest.MonkeyPatch, activation: str | None) -> None:
    calls = []

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Any = None) -> Tensor:
        assert x.stride(-1) == 1
        assert weight.shape == (6, 4)
        assert bias is None or bias.dtype == weight.dtype
        calls.append(activation)
        with use_backend("auto"):
            return causal_conv1d(x, weight, bias, activation)

    monkeypatch.setattr(upstream, "find", lambda name: types.SimpleNamespace(causal_conv1d_fn=function))
    monkeypatch.setattr(upstream, "convolution_unavailable", lambda x, weight: None)
    x, weight, bias = conv_operands()
    want = causal_conv1d(x, weight, bias, activation)
    with use_backend("mamba_ssm"):
        got = causal_conv1d(x.transpose(0, 2).contiguous().transpose(0, 2), weight, bias.double(), activation)
        compiled = torch.compile(causal_conv1d, backend="eager", fullgraph=True)(x, weight, bias, activation)
    assert calls == [activation]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled, want)
    grads = [torch.autograd.grad(y.sum(), [x, weight, bias]) for y in (got, want)]
    torch.testing.assert_close(*grads)


def test_convolution_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_STATE", selection._State())
    x, weight, bias = conv_operands()
    want = causal_conv1d(x, weight, bias)
    with use_backend("mamba_ssm"):
        with pytest.warns(
            UserWarning, match="causal_conv1d: the chosen back end 'mamba_ssm' cannot serve .*CUDA"
        ):
            got = causal_conv1d(x, weight, bias)
        causal_conv1d(x, weight, bias)
    assert torch.equal(got, want)


# ---- the real packages ---------------------------------------------------------------------------------------------


def on_gpu(args: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v.detach().cuda().requires_grad_() for k, v in args.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", [*FORMS, {"batch": 2, "channels": 72, "states": 16, "length": 197}], ids=str)
def test_parity_of_mamba_ssm(form: dict[str, Any], dtype: torch.dtype) -> None:
    reason = mamba.unavailable(torch.device("cuda"), torch.float32, 16)
    if reason is not None:
        pytest.skip(reason)
    args = operands(**form, dtype=dtype)
    want = run(selective_scan_reference, exact(args))
    with use_backend("mamba_ssm"):
        got = run(selective_scan, on_gpu(args))
    with use_backend("auto"):
        ours = run(selective_scan, on_gpu(args))
    tolerance = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    floor = 1e-3  # its gradient of A has rounding errors where the exact one is zero
    assert_close([t.cpu() for t in got], want, tolerance, floor)
    assert_close([t.cpu() for t in ours], want, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_parity_of_causal_conv1d(activation: str | None, dtype: torch.dtype) -> None:
    args = [t.detach().to("cuda", dtype).requires_grad_() for t in conv_operands()]
    reason = upstream.convolution_unavailable(args[0], args[1])
    if reason is not None:
        pytest.skip(reason)
    want = causal_conv1d(*(t.detach().double() for t in args), activation)
    with use_backend("mamba_ssm"):
        got = causal_conv1d(*args, activation)
    ours = causal_conv1d(*args, activation)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert_close([got, ours], [want, want], tolerance)
    grads = [torch.autograd.grad(y.sum(), args) for y in (got, ours)]
    assert_close(list(grads[0]), list(grads[1]), tolerance)
