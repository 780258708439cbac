"""Stand-ins of scans, convolutions, norms and single steps: values and gradients."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant._standins import standins
from ssmquant.errors import InputError
from ssmquant.ops import causal_conv1d, lb_window, selective_scan, ssd_scan

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
