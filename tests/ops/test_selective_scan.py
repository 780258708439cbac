from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ssmquant.errors import InputError
from ssmquant.ops import selective_scan, use_backend
from ssmquant.ops.selective_scan import plan, selective_scan_reference
from ssmquant.ops.selective_scan.backends import choose

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
OP = torch.ops.ssmquant.selective_scan.default


@pytest.fixture(autouse=True, params=["auto", "chunked"])
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with what is used here, and with what is used where nothing else can be."""
    with use_backend(request.param):
        if request.param == "auto" and choose(torch.device("cpu"), torch.float32, 16).NAME == "chunked":
            pytest.skip("they are the same here")
        yield request.param


def operands(
    batch: int = 2,
    channels: int = 12,
    states: int = 4,
    length: int = 49,
    groups: int | None = 4,
    *,
    constant: str = "",
    without: str = "",
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> dict[str, Any]:
    """Random operands by name; ``constant`` names the constant ones of B and C, ``without`` the absent operands."""

    def matrix(name: str) -> Tensor:
        if name in constant:
            return torch.randn(channels, states, dtype=dtype)
        shape = (batch, states, length) if groups is None else (batch, groups, states, length)
        return torch.randn(shape, dtype=dtype)

    made: dict[str, Any] = {
        "u": torch.randn(batch, channels, length, dtype=dtype),
        "delta": torch.rand(batch, channels, length, dtype=dtype),
        "A": -3 * torch.rand(channels, states, dtype=dtype) - 0.05,
        "B": matrix("B"),
        "C": matrix("C"),
        "D": torch.randn(channels, dtype=dtype),
        "z": torch.randn(batch, channels, length, dtype=dtype),
        "delta_bias": torch.rand(channels, dtype=dtype),
    }
    for name in without.split():
        made[name] = None
    return {k: None if v is None else v.requires_grad_(grad) for k, v in made.items()}


def run(function: Any, args: dict[str, Any], softplus: bool = True) -> list[Tensor]:
    """Output, last state and the gradients of every operand, of both results at once."""
    out, last = function(**args, delta_softplus=softplus, return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, last)]
    loss = (out * weights[0]).sum() + (last * weights[1]).sum()
    given = [t for t in args.values() if t is not None]
    return [out, last, *torch.autograd.grad(loss, given, materialize_grads=True)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float, floor: float = 1e-12) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        error = (g.double() - w.double()).norm() / w.double().norm().clamp(min=floor)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 49, 197])
@pytest.mark.parametrize(("channels", "states"), [(60, 1), (72, 10), (180, 4), (360, 16)])
def test_agrees_with_the_definition(length: int, channels: int, states: int) -> None:
    args = operands(1 if channels > 100 else 3, channels, states, length)
    assert_close(run(selective_scan, args), run(selective_scan_reference, args), 1e-12)


@pytest.mark.parametrize("channels", [4, 72])
def test_agrees_with_the_definition_on_an_image(channels: int) -> None:
    args = operands(1, channels, 1, 3136)
    with torch.no_grad():
        want = selective_scan_reference(**args, delta_softplus=True, return_last_state=True)
        got = selective_scan(**args, delta_softplus=True, return_last_state=True)
    assert_close(list(got), list(want), 1e-12)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from(["", "B", "C", "B C"]),
    st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    st.booleans(),
    st.integers(1, 4000),
)
def test_agrees_with_the_definition_in_every_form(
    batch: int,
    groups: int,
    inner: int,
    states: int,
    length: int,
    constant: str,
    without: set[str],
    softplus: bool,
    lanes: int,
) -> None:
    args = operands(
        batch, groups * inner, states, length, groups, constant=constant, without=" ".join(without)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_LANES", lanes)  # many ways to cut even small shapes
        got = run(selective_scan, args, softplus)
    assert_close(got, run(selective_scan_reference, args, softplus), 1e-11)


def test_one_matrix_for_all_channels_may_leave_out_the_group_axis() -> None:
    args = operands(groups=None)
    assert_close(run(selective_scan, args), run(selective_scan_reference, args), 1e-12)


@pytest.mark.parametrize("constant", ["", "B", "C"])
def test_gradients_numerically(constant: str) -> None:
    args = operands(2, 4, 2, 5, 2, constant=constant)
    assert torch.autograd.gradcheck(lambda *a: OP(*a, True), tuple(args.values()))


@pytest.mark.parametrize("softplus", [True, False])
def test_decays_that_underflow_are_harmless(softplus: bool) -> None:
    args = operands(length=300, dtype=torch.float32)
    args["A"] = (args["A"].detach() * 1e4).requires_grad_()
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items() if v is not None}
    got = run(selective_scan, args, softplus)
    assert all(t.isfinite().all() for t in got)
    assert_close(got, run(selective_scan_reference, exact, softplus), 1e-5)


def test_operands_in_any_memory_layout() -> None:
    args = operands()
    want = run(selective_scan, args)

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        view = wide[..., ::2].transpose(0, -1).contiguous().transpose(0, -1)
        return view.copy_(x.detach()).requires_grad_()

    assert_close(run(selective_scan, {k: strided(v) for k, v in args.items() if v is not None}), want, 1e-14)


def test_every_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(math.nan)

    args = operands(length=70)
    want = run(selective_scan, args)
    monkeypatch.setattr(plan, "_LANES", 100)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    assert_close(run(selective_scan, args), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_keep_a_float_state(dtype: torch.dtype) -> None:
    args = operands(length=197, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items() if v is not None}
    got, want = run(selective_scan, args), run(selective_scan_reference, exact)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in got[2:])
    assert_close(got[:1], want[:1], 2 * torch.finfo(dtype).eps)
    assert_close(got[1:2], want[1:2], 1e-5)  # no rounding inside
    assert_close(got[2:], want[2:], 4 * torch.finfo(dtype).eps)


def test_dtypes_may_differ() -> None:
    args = operands(dtype=torch.float32)
    for name in ("u", "z"):
        args[name] = args[name].detach().bfloat16().requires_grad_()
    got = run(selective_scan, args)
    assert got[0].dtype == torch.bfloat16
    assert [g.dtype for g in got[2:]] == [t.dtype for t in args.values() if t is not None]


def test_autocast_leaves_it_alone() -> None:
    args = operands(dtype=torch.float32, grad=False)
    want = selective_scan(**args, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = selective_scan(**args, delta_softplus=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 12, 4, 49), (2, 12, 4, 0), (2, 12, 0, 7)])
def test_empty_operands(shape: tuple[int, int, int, int]) -> None:
    args = operands(*shape)
    assert_close(run(selective_scan, args), run(selective_scan_reference, args), 1e-12)


def test_results_are_contiguous_and_deterministic() -> None:
    args = operands(length=197, dtype=torch.float32)
    first, second = run(selective_scan, args), run(selective_scan, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(t.is_contiguous() for t in first)


def test_gradients_only_where_wanted() -> None:
    args = operands(grad=False)
    args["B"].requires_grad_()
    (got,) = torch.autograd.grad((selective_scan(**args, delta_softplus=True)).square().sum(), [args["B"]])
    expected = torch.autograd.grad(
        selective_scan_reference(**args, delta_softplus=True).square().sum(), [args["B"]]
    )
    assert_close([got], list(expected), 1e-12)


@pytest.mark.parametrize("wanted", ["u", "A", "delta_bias"])
def test_a_second_derivative_is_an_error(wanted: str) -> None:
    args = operands(dtype=torch.float32)
    out = selective_scan(**args, delta_softplus=True)
    assert isinstance(out, Tensor)
    (g,) = torch.autograd.grad(out.square().sum(), [args[wanted]], create_graph=True)
    with pytest.raises(InputError, match="differentiable once"):
        g.square().sum().backward()


BAD: dict[str, dict[str, Tensor]] = {
    "u has shape": {"u": torch.zeros(2, 12)},
    "delta has shape": {"delta": torch.zeros(2, 12, 48)},
    "A has shape": {"A": torch.zeros(11, 4)},
    "B has shape": {"B": torch.zeros(2, 5, 4, 49)},
    "C has shape": {"C": torch.zeros(2, 4, 48)},
    "B has 2 groups but C has 4": {"B": torch.zeros(2, 2, 4, 49)},
    "D has shape": {"D": torch.zeros(1)},
    "z has shape": {"z": torch.zeros(2, 12, 1)},
    "delta_bias has shape": {"delta_bias": torch.zeros(12, 1)},
    "A is complex": {"A": torch.zeros(12, 4, dtype=torch.complex64)},
    "B has dtype torch.float8_e4m3fn": {"B": torch.zeros(2, 4, 4, 49).to(torch.float8_e4m3fn)},
    "u has dtype torch.int64": {"u": torch.zeros(2, 12, 49, dtype=torch.int64)},
    "D is on meta": {"D": torch.zeros(12, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_operands(message: str) -> None:
    with pytest.raises(InputError, match=message):
        selective_scan(**{**operands(grad=False), **BAD[message]})


@pytest.mark.parametrize("without", ["", "z", "D z delta_bias"])
@pytest.mark.parametrize("constant", ["", "B C"])
def test_opcheck(without: str, constant: str) -> None:
    args = operands(1, 4, 2, 40, 2, dtype=torch.float32, without=without, constant=constant)
    torch.library.opcheck(OP, tuple(args.values()), {"delta_softplus": True})
    inner = [args[name] for name in NAMES if name != "z"]
    torch.library.opcheck(torch.ops.ssmquant._selective_scan_fwd.default, (*inner, True, True, "chunked"))


def test_is_one_call_of_torch() -> None:
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    args = operands()
    with Recorder():
        selective_scan(**args, delta_softplus=True)
    assert [str(f) for f in seen] == ["ssmquant.selective_scan"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("without", ["", "z"])
def test_compiles_whole_with_any_length(without: str) -> None:
    function = torch.compile(selective_scan, fullgraph=True, dynamic=True)
    for length in (40, 70):
        args = operands(2, 8, 2, length, 2, dtype=torch.float32, without=without)
        assert_close(run(function, args), run(selective_scan, args), 1e-5)


def test_exports_as_one_node() -> None:
    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Tensor:
            out = selective_scan(u, delta, A, B, B, delta_softplus=True)
            assert isinstance(out, Tensor)
            return out

    args = operands(2, 8, 2, 40, 2, dtype=torch.float32, grad=False)
    inputs = tuple(args[k] for k in ("u", "delta", "A", "B"))
    length = torch.export.Dim("length", min=2)
    shapes = ({2: length}, {2: length}, None, {3: length})
    program = torch.export.export(Scan(), inputs, dynamic_shapes=shapes)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "selective_scan" in str(n.target)]
    assert len(calls) == 1
    longer = operands(2, 8, 2, 55, 2, dtype=torch.float32, grad=False)
    inputs = tuple(longer[k] for k in ("u", "delta", "A", "B"))
    assert torch.equal(program.module()(*inputs), Scan()(*inputs))


def test_import_needs_neither_triton_nor_mamba_ssm() -> None:
    code = "import sys; import ssmquant.ops as _; print([m for m in ('mamba_ssm', 'triton') if m in sys.modules])"
    plain = "import sys; import torch; print([m for m in ('mamba_ssm', 'triton') if m in sys.modules])"
    outputs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, plain)
    ]
    assert outputs[0] == outputs[1]
