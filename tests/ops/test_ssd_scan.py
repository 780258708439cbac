"""The scan of Mamba-2."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ssmquant.errors import InputError
from ssmquant.ops import backend_report, selective_scan, ssd_scan
from ssmquant.ops.ssd_scan import chunked, ssd_scan_reference
from tests.ops.test_selective_scan import assert_close

OP = torch.ops.ssmquant.ssd_scan.default
ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def operands(
    batch: int = 2,
    length: int = 49,
    heads: int = 4,
    width: int = 3,
    groups: int = 2,
    states: int = 5,
    *,
    without: str = "",
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> dict[str, Any]:
    made = {
        "x": torch.randn(batch, length, heads, width, dtype=dtype),
        "dt": torch.randn(batch, length, heads, dtype=dtype),
        "A": -3 * torch.rand(heads, dtype=dtype) - 0.05,
        "B": torch.randn(batch, length, groups, states, dtype=dtype),
        "C": torch.randn(batch, length, groups, states, dtype=dtype),
        "D": torch.randn(heads, dtype=dtype),
        "z": torch.randn(batch, length, heads, width, dtype=dtype),
        "dt_bias": torch.randn(heads, dtype=dtype),
        "initial_states": torch.randn(batch, heads, width, states, dtype=dtype),
    }
    return {k: None if k in without.split() else v.requires_grad_(grad) for k, v in made.items()}


def run(function: Any, args: dict[str, Any], softplus: bool = True) -> list[Tensor]:
    """Output, last state and the gradients of every operand, of both results at once."""
    out, last = function(**args, dt_softplus=softplus, return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, last)
    ]
    loss = (out * weights[0]).sum() + (last * weights[1]).sum()
    given = [t for t in args.values() if t is not None]
    return [out, last, *torch.autograd.grad(loss, given, materialize_grads=True)]


def agree(
    args: dict[str, Any], tolerance: float = 1e-12, softplus: bool = True, chunk: int = 64, **options: Any
) -> None:
    got = run(partial(ssd_scan, chunk_size=chunk, **options), args, softplus)
    assert_close(got, run(partial(ssd_scan_reference, **options), args, softplus), tolerance)


@pytest.mark.parametrize("window", [0, 4, 8, 16])
@pytest.mark.parametrize(("batch", "length", "states"), [(1, 197, 10), (3, 49, 16), (1, 5, 1), (3, 1, 16)])
def test_agrees_with_the_definition(batch: int, length: int, states: int, window: int) -> None:
    agree(operands(batch, length, states=states), window=window)


@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 10]),
    st.integers(0, 45),
    st.integers(1, 50),
    st.sets(st.sampled_from(["D", "z", "dt_bias", "initial_states"])),
    st.booleans(),
    st.integers(2, 5),
)
def test_agrees_with_the_definition_in_every_form(
    batch: int,
    length: int,
    groups: int,
    share: int,
    width: int,
    states: int,
    window: int,
    chunk: int,
    without: set[str],
    softplus: bool,
    fan: int,
) -> None:
    args = operands(batch, length, groups * share, width, groups, states, without=" ".join(without))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_FAN", fan)  # several levels for even a few chunks
        agree(args, 1e-11, softplus, chunk, window=window)


def test_skip_weights_of_every_channel() -> None:
    args = operands()
    args["D"] = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    agree(args)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 20))
def test_chunks_do_not_change_the_result(length: int, chunk: int, window: int) -> None:
    args = operands(1, length, grad=False)
    got = ssd_scan(**args, return_last_state=True, chunk_size=chunk, window=window)
    want = ssd_scan(**args, return_last_state=True, chunk_size=1, window=window)
    assert_close(list(got), list(want), 1e-12)


@given(st.integers(0, 30), st.integers(1, 30))
def test_a_sequence_in_two_parts(first: int, second: int) -> None:
    args = operands(2, first + second, grad=False)
    whole = ssd_scan(**args, return_last_state=True)
    timed = ("x", "dt", "B", "C", "z")
    out, last = ssd_scan(
        **{k: v[:, :first] if k in timed else v for k, v in args.items()}, return_last_state=True
    )
    args["initial_states"] = last
    rest, last = ssd_scan(
        **{k: v[:, first:] if k in timed else v for k, v in args.items()}, return_last_state=True
    )
    assert_close([torch.cat([out, rest], 1), last], list(whole), 1e-12)


@pytest.mark.parametrize("window", [0, 8])
def test_is_a_selective_scan_with_one_decay_a_head(window: int) -> None:
    args = operands(without="initial_states", grad=False)
    batch, length, heads, width = args["x"].shape
    got, last = ssd_scan(**args, dt_softplus=True, return_last_state=True, window=window)

    def channels(t: Tensor) -> Tensor:  # (B, L, H, P) -> (B, H P, L)
        return t.flatten(2).transpose(1, 2)

    def each(t: Tensor) -> Tensor:  # (H,) -> (H P,)
        return t.repeat_interleave(width)

    want, state = selective_scan(
        channels(args["x"]),
        channels(args["dt"][..., None].expand(args["x"].shape)),
        each(args["A"])[:, None].expand(-1, 5),
        args["B"].permute(0, 2, 3, 1),
        args["C"].permute(0, 2, 3, 1),
        each(args["D"]),
        channels(args["z"]),
        each(args["dt_bias"]),
        True,
        True,
        window=window,
    )
    assert_close([channels(got), last.flatten(1, 2)], [want, state], 1e-12)
    assert (batch, length, heads) == (2, 49, 4)


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.3, 1.2), (0.5, 0.5)])
@pytest.mark.parametrize("softplus", [True, False])
def test_step_sizes_are_clamped(limits: tuple[float, float], softplus: bool) -> None:
    args = operands(length=13)  # dt is negative as often as not, and 0 by default then
    agree(args, softplus=softplus, dt_min=limits[0], dt_max=limits[1])


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_numerically(window: int) -> None:
    args = operands(1, 5, 2, 1, 1, 2)

    def scan(*t: Tensor) -> Any:
        return OP(*t[:8], True, t[8], 0.0, None, window, 3)

    assert torch.autograd.gradcheck(scan, tuple(args.values()))
    assert torch.autograd.gradgradcheck(scan, tuple(args.values()), fast_mode=True)


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e6])
def test_float32_is_exact_to_its_digits(scale: float, window: int) -> None:
    args = operands(length=197, dtype=torch.float32)
    args["A"] = (args["A"].detach() * scale).requires_grad_()
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    got = run(partial(ssd_scan, window=window), args)
    assert all(t.isfinite().all() for t in got)
    assert_close(got, run(partial(ssd_scan_reference, window=window), exact), 3e-6)


def test_small_decays_behind_large_ones_keep_their_digits() -> None:
    args = operands(length=64, without="initial_states dt_bias", dtype=torch.float32)
    dt = torch.full((2, 64, 4), 200.0)
    dt[:, 20:] = 1e-3  # a difference of running sums of about 4000 has no digit of these
    args["dt"] = dt.requires_grad_()
    exact = {k: None if v is None else v.detach().double().requires_grad_() for k, v in args.items()}
    got, want = run(ssd_scan, args, False), run(ssd_scan_reference, exact, False)
    assert_close(got, want, 2e-6)


def test_decays_that_underflow_leave_no_nan() -> None:
    args = operands(length=197, dtype=torch.float32)
    args["A"] = torch.full((4,), -1e30, requires_grad=True)
    got = run(partial(ssd_scan, window=16), args)
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_keep_a_float_state(dtype: torch.dtype) -> None:
    args = operands(length=197, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    got, want = run(ssd_scan, args), run(ssd_scan_reference, exact)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in got[2:])
    assert_close(got[:1], want[:1], torch.finfo(dtype).eps)
    assert_close(got[1:2], want[1:2], 1e-5)
    assert_close(got[2:], want[2:], 4 * torch.finfo(dtype).eps)


def test_autocast_leaves_it_alone() -> None:
    args = operands(dtype=torch.float32, grad=False)
    want = ssd_scan(**args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ssd_scan(**args)
    assert torch.equal(got, want)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(
    "shape", [(0, 9, 4, 3, 2, 5), (2, 0, 4, 3, 2, 5), (2, 9, 4, 0, 2, 5), (2, 9, 4, 3, 2, 0)]
)
@pytest.mark.parametrize("without", ["", "initial_states"])
def test_empty_operands(shape: tuple[int, ...], without: str, window: int) -> None:
    args = operands(*shape, without=without)
    agree(args, window=window)


def test_operands_in_any_memory_layout() -> None:
    args = operands(batch=3)
    want = run(ssd_scan, args)
    strided = {k: v.detach().transpose(0, -1).contiguous().transpose(0, -1) for k, v in args.items()}
    got = run(ssd_scan, {k: v.requires_grad_() for k, v in strided.items()})
    assert_close(got, want, 1e-13)
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()


BAD: dict[str, dict[str, Any]] = {
    "x has shape": {"x": torch.zeros(2, 49, 12)},
    "dt has shape": {"dt": torch.zeros(2, 49, 4, 1)},
    "A has shape": {"A": torch.zeros(4, 5)},
    "B has shape": {"B": torch.zeros(2, 49, 3, 5)},
    "C has shape .* expected B's": {"C": torch.zeros(2, 49, 2, 6)},
    "C has shape": {"C": torch.zeros(2, 48, 2, 5)},
    "D has shape": {"D": torch.zeros(12)},
    "z has shape": {"z": torch.zeros(2, 49, 12)},
    "dt_bias has shape": {"dt_bias": torch.zeros(1)},
    "initial_states has shape": {"initial_states": torch.zeros(2, 4, 5, 3)},
    "A is complex": {"A": torch.zeros(4, dtype=torch.complex64)},
    "dt has dtype torch.int64": {"dt": torch.zeros(2, 49, 4, dtype=torch.int64)},
    "D is on meta, x on cpu": {"D": torch.zeros(4, device="meta")},
    "window is -1": {"window": -1},
    "chunk_size is 0": {"chunk_size": 0},
    "dt_min 2.0 is greater": {"dt_min": 2.0, "dt_max": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_operands(message: str) -> None:
    with pytest.raises(InputError, match=message):
        ssd_scan(**{**operands(grad=False), **BAD[message]})


@pytest.mark.slow
def test_opcheck() -> None:
    args = operands(1, 21, dtype=torch.float32)
    *main, initial = args.values()
    torch.library.opcheck(OP, (*main, True, initial), {"chunk_size": 8, "window": 4})


def test_is_one_call_of_torch() -> None:
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    args = operands()
    with Recorder():
        ssd_scan(**args, return_last_state=True)
    assert seen == ["ssmquant.ssd_scan"]


def test_compiles_whole() -> None:
    function = torch.compile(ssd_scan, backend="eager", fullgraph=True)
    args = operands()
    assert_close(run(function, args), run(ssd_scan, args), 1e-14)


@pytest.mark.slow
def test_one_graph_for_many_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    scan = partial(ssd_scan, window=8, chunk_size=16)
    function = torch.compile(scan, backend=counter, fullgraph=True)
    for length in (40, 71, 150):  # a single chunk and whole chunks may have graphs of their own
        args = operands(2, length)
        for name in ("x", "dt", "B", "C", "z"):
            torch._dynamo.mark_dynamic(args[name], 1)
        assert_close(run(function, args), run(scan, args), 1e-12)
    assert counter.frame_count == 1


def test_exports_as_one_node() -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
            out = ssd_scan(x, dt, A, B, B, dt_softplus=True)
            assert isinstance(out, Tensor)
            return out

    args = operands(grad=False)
    inputs = tuple(args[k] for k in ("x", "dt", "A", "B"))
    program = torch.export.export(Scan(), inputs)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "ssd_scan" in str(n.target)]
    assert len(calls) == 1
    assert torch.equal(program.module()(*inputs), Scan()(*inputs))


def test_shapes_on_fakes() -> None:
    args = operands(3, 197, dtype=torch.bfloat16, grad=False)
    with FakeTensorMode() as mode:
        out, last = ssd_scan(**{k: mode.from_tensor(v) for k, v in args.items()}, return_last_state=True)
    assert (out.shape, out.dtype) == ((3, 197, 4, 3), torch.bfloat16)
    assert (last.shape, last.dtype) == ((3, 4, 3, 5), torch.float32)
    assert out.is_contiguous()


def test_is_reported() -> None:
    assert any(name == "ssd_scan" for name, _, _ in backend_report())
