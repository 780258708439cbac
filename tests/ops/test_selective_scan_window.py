"""The selective scan that looks ahead within windows (LBMamba)."""

from __future__ import annotations

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
from ssmquant.ops import lb_window, selective_scan
from ssmquant.ops.selective_scan import selective_scan_reference
from tests.ops.test_selective_scan import assert_close, operands, run

OP = torch.ops.ssmquant.selective_scan.default


def by_hand(args: dict[str, Any], window: int) -> Tensor:
    """The definition summed up instead of walked: every pair of steps with the decays between them; float64."""
    u, delta, A, D, z, bias = (args[k].detach() for k in ("u", "delta", "A", "D", "z", "delta_bias"))
    channels, length = u.shape[1:]
    B, C = (args[k].detach().repeat_interleave(channels // args[k].shape[1], 1) for k in "BC")  # (B, D, N, L)
    dt = torch.nn.functional.softplus(delta + bias[:, None])
    out = D[:, None] * u
    for t in range(length):
        for s in range(length):
            if s <= t:
                span = dt[:, :, s + 1 : t + 1].sum(-1)
            elif s // window == t // window:
                span = dt[:, :, t:s].sum(-1)
            else:
                continue
            passed = torch.exp(span[..., None] * A) * B[..., s] * (dt[..., s] * u[..., s])[..., None]
            out[..., t] += (C[..., t] * passed).sum(-1)
    return out * torch.nn.functional.silu(z)


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (5, 4), (21, 8), (16, 16), (13, 100)])
def test_what_a_window_means(function: Any, length: int, window: int) -> None:
    args = operands(2, 4, 3, length, 2)
    got = function(**args, delta_softplus=True, window=window)
    assert_close([got], [by_hand(args, window)], 1e-12)


@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([1, 2, 10]),
    st.integers(1, 60),
    st.integers(0, 70),
    st.sampled_from(["", "B", "C", "B C"]),
    st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    st.booleans(),
)
def test_agrees_with_the_definition_in_every_form(
    batch: int,
    groups: int,
    inner: int,
    states: int,
    length: int,
    window: int,
    constant: str,
    without: set[str],
    softplus: bool,
) -> None:
    args = operands(
        batch, groups * inner, states, length, groups, constant=constant, without=" ".join(without)
    )
    got = run(partial(selective_scan, window=window), args, softplus)
    assert_close(got, run(partial(selective_scan_reference, window=window), args, softplus), 1e-11)


@pytest.mark.parametrize("window", [4, 8, 16])
@pytest.mark.parametrize(("batch", "states", "length"), [(1, 1, 197), (3, 10, 49), (3, 16, 5), (1, 16, 1)])
def test_agrees_with_the_definition_at_sizes_of_vision(
    batch: int, states: int, length: int, window: int
) -> None:
    args = operands(batch, 24, states, length, None)
    got = run(partial(selective_scan, window=window), args)
    assert_close(got, run(partial(selective_scan_reference, window=window), args), 1e-12)


@given(st.integers(1, 40), st.integers(1, 45))
def test_is_the_plain_scan_and_flipped_windows_less_their_own_terms(length: int, window: int) -> None:
    args = operands(2, 6, 3, length, 3, without="z delta_bias", grad=False)
    got = selective_scan(**args, window=window)
    want = selective_scan(**args)
    assert isinstance(want, Tensor)
    args["D"] = None
    for start in range(0, length, window):
        part = slice(start, start + window)
        cut = {k: v[..., part] if k in ("u", "delta", "B", "C") else v for k, v in args.items()}
        flipped = {k: v.flip(-1) if k in ("u", "delta", "B", "C") else v for k, v in cut.items()}
        own = (cut["B"] * cut["C"]).sum(2).repeat_interleave(2, 1) * cut["delta"] * cut["u"]
        want[..., part] += selective_scan(**flipped).flip(-1) - own
    assert_close([got], [want], 1e-12)


def test_a_window_of_one_step_is_none() -> None:
    args = operands(length=9)
    assert_close(run(partial(selective_scan, window=1), args), run(selective_scan, args), 1e-13)


def test_last_state_is_that_of_the_plain_scan() -> None:
    args = operands(grad=False)
    plain = selective_scan(**args, return_last_state=True)[1]
    assert torch.equal(selective_scan(**args, return_last_state=True, window=8)[1], plain)


@pytest.mark.parametrize("constant", ["", "B", "C", "B C"])
def test_gradients_numerically(constant: str) -> None:
    args = operands(2, 4, 2, 5, 2, constant=constant)
    assert torch.autograd.gradcheck(lambda *a: OP(*a, True, 4), tuple(args.values()))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_float32_is_exact_to_its_digits(scale: float) -> None:
    args = operands(length=197, dtype=torch.float32)
    args["A"] = (args["A"].detach() * scale).requires_grad_()
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    got = run(partial(selective_scan, window=16), args)
    assert all(t.isfinite().all() for t in got)
    assert_close(got, run(partial(selective_scan_reference, window=16), exact), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_are_rounded_once(dtype: torch.dtype) -> None:
    args = operands(length=197, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    got = run(partial(selective_scan, window=16), args)
    want = run(partial(selective_scan_reference, window=16), exact)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in got[2:])
    assert_close(got[:1], want[:1], torch.finfo(dtype).eps)
    assert_close(got[2:], want[2:], 4 * torch.finfo(dtype).eps)


def test_autocast_leaves_it_alone() -> None:
    args = operands(dtype=torch.float32, grad=False, constant="B")  # a constant B takes a matrix product
    want = selective_scan(**args, window=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = selective_scan(**args, window=8)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 12, 4, 49), (2, 12, 4, 0), (2, 12, 0, 7)])
def test_empty_operands(shape: tuple[int, int, int, int]) -> None:
    args = operands(*shape)
    got = run(partial(selective_scan, window=4), args)
    assert_close(got, run(partial(selective_scan_reference, window=4), args), 1e-12)


def test_operands_in_any_memory_layout() -> None:
    args = operands(batch=3)
    want = run(partial(selective_scan, window=4), args)
    strided = {k: v.detach().transpose(0, -1).contiguous().transpose(0, -1) for k, v in args.items()}
    got = run(partial(selective_scan, window=4), {k: v.requires_grad_() for k, v in strided.items()})
    assert_close(got, want, 1e-14)
    assert got[0].is_contiguous()


def test_a_negative_window() -> None:
    with pytest.raises(InputError, match="window is -4"):
        selective_scan(**operands(grad=False), window=-4)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # opcheck looks at intermediates
def test_opcheck() -> None:
    args = operands(1, 4, 2, 21, 2, dtype=torch.float32, constant="B")
    torch.library.opcheck(OP, (*args.values(), True, 8))


def test_is_one_call_of_torch() -> None:
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    args = operands()
    with Recorder():
        selective_scan(**args, window=8)
    assert seen == ["ssmquant.selective_scan"]


def test_compiles_whole() -> None:
    function = torch.compile(partial(selective_scan, window=8), backend="eager", fullgraph=True)
    args = operands()
    assert_close(run(function, args), run(partial(selective_scan, window=8), args), 1e-14)


@pytest.mark.slow
def test_one_graph_for_many_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    scan = partial(selective_scan, window=8)
    function = torch.compile(scan, backend=counter, fullgraph=True)
    for length in (41, 71, 100):  # whole windows may have a graph of their own
        args = operands(2, 8, 2, length, 2)
        for name in ("u", "delta", "B", "C", "z"):
            torch._dynamo.mark_dynamic(args[name], -1 % args[name].dim())
        assert_close(run(function, args), run(scan, args), 1e-12)
    assert counter.frame_count == 1


def test_shapes_on_fakes() -> None:
    args = operands(3, 12, 10, 197, dtype=torch.bfloat16, grad=False)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) for k, v in args.items()}
        out, last = selective_scan(**fakes, return_last_state=True, window=16)
    assert (out.shape, out.dtype) == ((3, 12, 197), torch.bfloat16)
    assert (last.shape, last.dtype) == ((3, 12, 10), torch.float32)


class Size(int):
    """A size that may be compared, and no more."""

    asked: list[int]

    def __le__(self, other: int) -> bool:
        self.asked.append(other)
        return int.__le__(self, other)

    def _no(self, *_: Any) -> Any:
        raise AssertionError("arithmetic on a traced size")

    __add__ = __sub__ = __mul__ = __floordiv__ = __mod__ = __neg__ = __index__ = __hash__ = _no


@pytest.mark.parametrize(
    ("platform", "limits"), [("cuda", {4: 128, 8: 256, 16: None}), ("rocm", {4: 256, 8: 512, 16: None})]
)
def test_windows_of_the_kernel(platform: str, limits: dict[int, int | None]) -> None:
    least, known = 1, [x for x in limits.values() if x is not None]
    for window, greatest in limits.items():
        for length in (least, greatest or least + 1000):
            size = Size(length)
            size.asked = []
            assert lb_window(size, platform) == window
            assert size.asked == known[: len(size.asked)] != []
        least = (greatest or 0) + 1


def test_windows_of_an_unknown_platform() -> None:
    with pytest.raises(InputError, match="tpu"):
        lb_window(100, "tpu")
