"""The fused functions of the field, unfolded: against plain loops in float64, and as a recorder sees them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ssmquant.errors import InputError
from ssmquant.ops import causal_conv1d, mamba2_split_conv1d_scan, mamba_inner
from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.ops.ssd_scan import ssd_scan_reference
from tests.ops.test_selective_scan import assert_close


def gradients(out: Any, args: dict[str, Any]) -> list[Tensor]:
    """All outputs, and the gradients of all operands that are tensors."""
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in outs)
    leaves = [t for t in args.values() if isinstance(t, Tensor)]
    return [*outs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


# ---- causal convolution --------------------------------------------------------------------------------------------


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    weight = weight.reshape(weight.shape[0], -1)
    length, width = x.shape[-1], weight.shape[-1]
    y = torch.zeros_like(x)
    for back in range(min(width, length)):
        y = y + F.pad(x[..., : length - back], (back, 0)) * weight[:, width - 1 - back, None]
    if bias is not None:
        y = y + bias[:, None]
    return y / (1 + torch.exp(-y)) if silu else y


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "silu", "swish"]),
)
def test_causal_conv1d(
    batch: int, channels: int, length: int, width: int, flat: bool, biased: bool, activation: str | None
) -> None:
    args = {
        "x": rand(batch, channels, length),
        "weight": rand(channels, width) if flat else rand(channels, 1, width),
        "bias": rand(channels) if biased else None,
    }
    got = gradients(causal_conv1d(**args, activation=activation), args)
    want = gradients(plain_conv(args["x"], args["weight"], args["bias"], activation is not None), args)
    assert_close(got, want, 1e-12)


def test_causal_conv1d_does_not_see_the_future() -> None:
    x, weight = rand(1, 3, 9), rand(3, 4)
    (grad,) = torch.autograd.grad(causal_conv1d(x, weight)[..., 5].sum(), [x])
    assert (grad[..., 6:] == 0).all()
    assert (grad[..., 2:6] != 0).all()


def test_causal_conv1d_of_half_precision_by_float_weights() -> None:
    x, weight = torch.randn(2, 3, 9).bfloat16(), torch.randn(3, 4)
    got = causal_conv1d(x, weight, activation="silu")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, causal_conv1d(x.float(), weight, activation="silu").bfloat16())


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [((4, 3), None, "weight"), ((3, 2, 4), None, "weight"), ((3, 4), "relu", "activation is 'relu'")],
)
def test_wrong_convolutions(weight: tuple[int, ...], activation: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        causal_conv1d(torch.zeros(2, 3, 9), torch.zeros(weight), activation=activation)


# ---- Mamba ---------------------------------------------------------------------------------------------------------


def inner(
    batch: int = 3,
    length: int = 21,
    channels: int = 6,
    states: int = 4,
    rank: int = 2,
    *,
    constant: str = "",
    without: str = "",
    project: bool = False,
    both: bool = False,
    norms: bool = False,
) -> dict[str, Any]:
    """Operands of ``mamba_inner`` by name."""
    rows = rank + states * (2 - len(constant))
    args: dict[str, Any] = {
        "xz": rand(batch, 2 * channels, length),
        "conv1d_weight": rand(channels, 1, 4),
        "conv1d_bias": rand(channels),
        "x_proj_weight": rand(rows, channels),
        "delta_proj_weight": rand(channels, rank, scale=0.1),  # torch rounds softplus from 20 on
        "A": (-torch.rand(channels, states, dtype=torch.float64) - 0.1).requires_grad_(),
        "D": rand(channels),
        "delta_bias": rand(channels),
    }
    for name in "BC":
        if name in constant:
            args[name] = rand(channels, states)
        else:
            args[f"{name}_proj_bias"] = rand(states)
    if project:
        args |= {"out_proj_weight": rand(5, channels), "out_proj_bias": rand(5)}
    if both:
        args["A_b"] = (-torch.rand(channels, states, dtype=torch.float64) - 0.1).requires_grad_()
    if norms:
        args |= {"b_rms_weight": rand(states), "c_rms_weight": rand(states), "dt_rms_weight": rand(channels)}
    for name in without.split():
        args[name] = None
    return args


def rms(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMS norm of (B, C, L) over C."""
    if weight is None:
        return x
    return x / (x.pow(2).mean(1, keepdim=True) + eps).sqrt() * weight[:, None]


def plain_inner(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, A: Tensor, D: Tensor | None, delta_bias: Tensor | None, B: Tensor | None = None,
    C: Tensor | None = None, B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None,
    out_proj_weight: Tensor | None = None, out_proj_bias: Tensor | None = None, A_b: Tensor | None = None,
    b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None, dt_rms_weight: Tensor | None = None,
    window: int = 0,
) -> Tensor:  # fmt: skip
    """A Mamba block with one einsum a projection and the scan walked step by step."""
    channels, states, rank = *A.shape, delta_proj_weight.shape[1]
    x, z = xz[:, :channels], xz[:, channels:]
    x = plain_conv(x, conv1d_weight, conv1d_bias, True)
    made = torch.einsum("rd,bdl->brl", x_proj_weight, x)
    delta = rms(torch.einsum("dr,brl->bdl", delta_proj_weight, made[:, :rank]), dt_rms_weight)
    if B is None:
        B = made[:, rank : rank + states]
        B = rms(B if B_proj_bias is None else B + B_proj_bias[:, None], b_rms_weight)
    if C is None:
        C = made[:, made.shape[1] - states :]
        C = rms(C if C_proj_bias is None else C + C_proj_bias[:, None], c_rms_weight)
    y = selective_scan_reference(x, delta, A, B, C, D, z, delta_bias, True, window=window)
    if A_b is not None:
        x, delta, B, C, z = (t.flip(-1) for t in (x, delta, B, C, z))
        y = y + selective_scan_reference(x, delta, A_b, B, C, D, z, delta_bias, True, window=window).flip(-1)
    if out_proj_weight is None:
        return y
    y = torch.einsum("ed,bdl->ble", out_proj_weight, y)
    return y if out_proj_bias is None else y + out_proj_bias


FORMS: dict[str, dict[str, Any]] = {
    "no_out_proj": {},
    "out_proj": {"project": True},
    "bare": {"project": True, "without": "conv1d_bias D delta_bias B_proj_bias C_proj_bias out_proj_bias"},
    "constant B": {"constant": "B"},
    "constant C": {"constant": "C", "project": True},
    "constant B and C": {"constant": "BC"},
    "bimamba": {"both": True, "project": True},
    "norms": {"norms": True, "project": True},
}


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("form", FORMS)
def test_mamba_inner(form: str, window: int) -> None:
    args = inner(**FORMS[form])
    assert_close(
        gradients(mamba_inner(**args, window=window), args),
        gradients(plain_inner(**args, window=window), args),
        1e-11,
    )


@pytest.mark.parametrize(("batch", "length", "states"), [(1, 1, 1), (3, 5, 10), (1, 49, 16)])
def test_mamba_inner_sizes(batch: int, length: int, states: int) -> None:
    args = inner(batch, length, states=states, project=True)
    assert_close(gradients(mamba_inner(**args), args), gradients(plain_inner(**args), args), 1e-11)


def test_mamba_inner_without_softplus() -> None:
    args = inner()
    args["delta_bias"] = torch.full((6,), 30.0, dtype=torch.float64, requires_grad=True)
    # softplus does next to nothing to 30 and more
    assert_close([mamba_inner(**args, delta_softplus=False)], [mamba_inner(**args)], 1e-6)


def test_mamba_inner_projects_on_request_only() -> None:
    args = inner(project=True)
    assert mamba_inner(**args).shape == (3, 21, 5)
    assert mamba_inner(**args, project=False).shape == (3, 6, 21)
    with pytest.raises(InputError, match="out_proj_weight"):
        mamba_inner(**inner(), project=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mamba_inner_in_half_precision(dtype: torch.dtype) -> None:
    args = {k: v.detach().to(dtype) for k, v in inner(project=True).items()}
    args["A"], args["delta_bias"] = args["A"].float(), args["delta_bias"].float()
    got = mamba_inner(**args)
    assert got.dtype == dtype
    assert_close([got], [plain_inner(**{k: v.double() for k, v in args.items()})], 8 * torch.finfo(dtype).eps)


def test_mamba_inner_under_autocast() -> None:
    args = {k: v.detach().float() for k, v in inner(project=True).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mamba_inner(**args)
    assert got.dtype == torch.bfloat16
    assert_close([got], [mamba_inner(**args)], 0.05)


# ---- Mamba-2 -------------------------------------------------------------------------------------------------------


def split(
    batch: int = 2,
    length: int = 21,
    heads: int = 4,
    width: int = 3,
    groups: int = 2,
    states: int = 5,
    *,
    beside: int = 0,
    norm: bool = False,
    project: bool = False,
    wide_skip: bool = False,
    initial: bool = False,
) -> dict[str, Any]:
    """Operands of ``mamba2_split_conv1d_scan`` by name."""
    channels = heads * width
    mixed = channels + 2 * groups * states
    return {
        "zxbcdt": rand(batch, length, 2 * beside + channels + mixed + heads),
        "conv1d_weight": rand(mixed, 4),
        "conv1d_bias": rand(mixed),
        "dt_bias": rand(heads),
        "A": (-torch.rand(heads, dtype=torch.float64) - 0.1).requires_grad_(),
        "D": rand(heads, width) if wide_skip else rand(heads),
        "chunk_size": 8,
        "headdim": None if wide_skip else width,
        "ngroups": groups,
        "rmsnorm_weight": rand(channels) if norm else None,
        "outproj_weight": rand(7, beside + channels) if project else None,
        "outproj_bias": rand(7) if project else None,
        "initial_states": rand(batch, heads, width, states) if initial else None,
    }


def plain_split(args: dict[str, Any], activation: bool, gate_last: bool, limit: Any) -> tuple[Tensor, Tensor]:
    heads, groups = args["D"].shape[0], args["ngroups"]
    width = args["headdim"] or args["D"].shape[1]
    channels, mixed = heads * width, args["conv1d_weight"].shape[0]
    states = (mixed - channels) // 2 // groups
    *beside, z, xBC, dt = args["zxbcdt"].tensor_split(
        [at + args["zxbcdt"].shape[2] - channels - mixed - heads for at in (0, channels, channels + mixed)],
        dim=2,
    )
    xBC = plain_conv(xBC.mT, args["conv1d_weight"], args["conv1d_bias"], activation).mT
    x, B, C = xBC.tensor_split([channels, channels + groups * states], dim=2)
    batch, length = dt.shape[:2]
    heads_of = (batch, length, heads, width)
    normed = args["rmsnorm_weight"] is not None
    y, last = ssd_scan_reference(
        x.reshape(heads_of), dt, args["A"], B.reshape(batch, length, groups, states),
        C.reshape(batch, length, groups, states), args["D"], None if normed else z.reshape(heads_of), args["dt_bias"],
        True, args["initial_states"], True, dt_min=limit[0], dt_max=limit[1],
    )  # fmt: skip
    y = y.reshape(batch, length, channels)
    if normed:
        gate = z / (1 + torch.exp(-z))
        y = y if gate_last else y * gate
        parts = [p / (p.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for p in y.chunk(groups, -1)]
        y = torch.cat(parts, -1) * args["rmsnorm_weight"]
        y = y * gate if gate_last else y
    first, second = beside[0].chunk(2, -1)
    y = torch.cat([first / (1 + torch.exp(-first)) * second, y], -1)
    if args["outproj_weight"] is not None:
        y = torch.einsum("ed,bld->ble", args["outproj_weight"], y) + args["outproj_bias"]
    return y, last


SPLITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "out_proj": {"project": True, "norm": True},
    "groups of one": {"groups": 1, "norm": True},
    "skip of every channel": {"wide_skip": True, "initial": True},
    "mlp beside": {"beside": 4, "project": True},
    "mlp beside, norm": {"beside": 3, "norm": True},
    "one step": {"length": 1, "project": True},
}


@pytest.mark.parametrize("form", SPLITS)
@pytest.mark.parametrize(
    ("activation", "gate_last", "limit"), [("silu", True, (0.0, math.inf)), (None, False, (0.3, 1.0))]
)
def test_mamba2(form: str, activation: str | None, gate_last: bool, limit: tuple[float, float]) -> None:
    args = split(**SPLITS[form])
    options: dict[str, Any] = {"activation": activation, "norm_before_gate": gate_last, "dt_limit": limit}
    got = mamba2_split_conv1d_scan(**args, **options, return_final_states=True)
    want = plain_split(args, activation is not None, gate_last, limit)
    assert_close(gradients(got, args), gradients(want, args), 1e-11)
    assert torch.equal(mamba2_split_conv1d_scan(**args, **options), got[0])


def test_mamba2_wants_one_sequence_a_sample() -> None:
    with pytest.raises(InputError, match="seq_idx"):
        mamba2_split_conv1d_scan(**split(), seq_idx=torch.zeros(2, 21, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": None}, "headdim"),
        ({"zxbcdt": torch.zeros(2, 21, 30)}, "zxbcdt has shape"),
        ({"zxbcdt": torch.zeros(2, 21, 61)}, "zxbcdt has shape"),
        ({"outproj_bias": torch.zeros(7)}, "outproj_bias"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_mamba2_of_wrong_operands(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mamba2_split_conv1d_scan(**{**split(), **change})


# ---- as a tracer sees them -----------------------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Remembers calls of torch and their tensors; an access to an attribute is no call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in ("__get__", "dim", "is_floating_point"):
            self.calls.append((name, args))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called.split(".")[0] == name]


def faked(args: dict[str, Any], mode: FakeTensorMode, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        k: mode.from_tensor(v.detach().to(dtype)) if isinstance(v, Tensor) else v for k, v in args.items()
    }


def test_parameters_of_mamba_inner_reach_the_calls_as_they_are() -> None:
    with FakeTensorMode() as mode:
        args = faked(inner(project=True), mode)
        with Recorder() as seen:
            out = mamba_inner(**args)
    assert out.shape == (3, 21, 5)
    assert seen.of("conv1d")[0][1] is args["conv1d_weight"]
    assert [
        a[1] is args[k] for a, k in zip(seen.of("linear"), ("x_proj_weight", "out_proj_weight"), strict=True)
    ]
    assert seen.of("matmul")[0][0] is args["delta_proj_weight"]
    (scan,) = [a for name, a in seen.calls if "selective_scan" in name]
    assert scan[2] is args["A"]
    assert [tuple(t.shape) for t in scan[:5]] == [
        (3, 6, 21),
        (3, 6, 21),
        (6, 4),
        (3, 4, 21),
        (3, 4, 21),
    ]
    assert not [name for name, _ in seen.calls if name in ("to", "float", "reshape", "view", "type_as")]


def test_mamba2_as_a_tracer_sees_it() -> None:
    with FakeTensorMode() as mode:
        args = faked(split(norm=True, project=True), mode)
        with Recorder() as seen:
            out, last = mamba2_split_conv1d_scan(**args, return_final_states=True)
    assert (out.shape, last.shape) == ((2, 21, 7), (2, 4, 3, 5))
    assert seen.of("linear")[0][1] is args["outproj_weight"]
    (scan,) = [a for name, a in seen.calls if "ssd_scan" in name]
    assert [tuple(t.shape) for t in scan[:5]] == [
        (2, 21, 4, 3),
        (2, 21, 4),
        (4,),
        (2, 21, 2, 5),
        (2, 21, 2, 5),
    ]
    assert not [name for name, _ in seen.calls if name in ("to", "float", "reshape", "view", "type_as")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_on_fakes(dtype: torch.dtype) -> None:
    with FakeTensorMode() as mode:
        out = mamba_inner(**faked(inner(both=True, norms=True), mode, dtype), window=8)
        assert (out.shape, out.dtype) == ((3, 6, 21), dtype)
        out = mamba2_split_conv1d_scan(**faked(split(beside=4, norm=True), mode, dtype))
        assert (out.shape, out.dtype) == ((2, 21, 16), dtype)


def test_compile_whole() -> None:
    for function, args in ((mamba_inner, inner(project=True)), (mamba2_split_conv1d_scan, split(norm=True))):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert_close([compiled(**args)], [function(**args)], 1e-14)


def test_samples_do_not_mix() -> None:
    args = inner(project=True)
    one = mamba_inner(**{**args, "xz": args["xz"][1:2]})
    assert_close([mamba_inner(**args)[1:2]], [one], 1e-13)
