from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import scan_paths, selective_scan_map
from ssmquant.ops.selective_scan import selective_scan_reference

OP = torch.ops.ssmquant.selective_scan_map.default


def operands(
    batch: int = 2,
    height: int = 5,
    width: int = 7,
    channels: int = 6,
    states: int = 3,
    directions: int = 4,
    *,
    without: str = "",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Random operands by name, differentiable; the path is the cross-scan's or random."""
    pixels = height * width
    made: dict[str, Any] = {
        "x": torch.randn(batch, pixels, channels, dtype=dtype),
        "delta": 0.5 * torch.randn(batch, pixels, directions, channels, dtype=dtype) - 2,
        "A": -3 * torch.rand(directions * channels, states, dtype=dtype) - 0.05,
        "B": torch.randn(batch, pixels, directions, states, dtype=dtype),
        "C": torch.randn(batch, pixels, directions, states, dtype=dtype),
        "D": torch.randn(directions * channels, dtype=dtype),
        "delta_bias": torch.rand(directions * channels, dtype=dtype),
    }
    for name in without.split():
        made[name] = None
    made = {k: None if v is None else v.to(device).requires_grad_() for k, v in made.items()}
    made["path"] = torch.stack([torch.randperm(pixels) for _ in range(directions)]).int().to(device)
    return made


def definition(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    path: Tensor,
    softplus: bool,
) -> Tensor:
    """Direction by direction, each a scan of its own."""
    total = torch.zeros_like(x)
    size = x.shape[2]
    for k, order in enumerate(path.long()):
        mine = slice(k * size, (k + 1) * size)
        y = selective_scan_reference(
            x[:, order].transpose(1, 2),
            delta[:, order, k].transpose(1, 2),
            A[mine],
            B[:, order, k].transpose(1, 2),
            C[:, order, k].transpose(1, 2),
            None if D is None else D[mine],
            None,
            None if delta_bias is None else delta_bias[mine],
            softplus,
        )
        total = total.index_add(1, order, y.transpose(1, 2))
    return total


def results(function: Any, args: dict[str, Any], softplus: bool) -> list[Tensor]:
    out = (
        function(*args.values(), softplus)
        if function is definition
        else function(**args, delta_softplus=softplus)
    )
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = [t for t in args.values() if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad((out * g.to(out)).sum(), given)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["", "D", "delta_bias", "D delta_bias"]),
    st.booleans(),
)
def test_agrees_with_the_definition(
    batch: int,
    height: int,
    width: int,
    channels: int,
    states: int,
    directions: int,
    without: str,
    softplus: bool,
) -> None:
    args = operands(batch, height, width, channels, states, directions, without=without)
    assert_close(results(selective_scan_map, args, softplus), results(definition, args, softplus), 1e-11)


def test_paths_are_those_of_the_cross_scan() -> None:
    image = torch.arange(12).view(3, 4)
    rows, columns, rows_back, columns_back = image.flatten()[scan_paths(3, 4).long()]
    assert rows.tolist() == list(range(12))
    assert columns.tolist() == image.t().flatten().tolist()
    assert rows_back.tolist() == rows.tolist()[::-1]
    assert columns_back.tolist() == columns.tolist()[::-1]
    with pytest.raises(InputError, match="0 x 4"):
        scan_paths(0, 4)


def test_half_precision_keeps_a_float_state() -> None:
    args = operands(dtype=torch.bfloat16)
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in args.items()}
    got = results(selective_scan_map, args, True)
    assert [t.dtype for t in got] == [torch.bfloat16] * 8
    assert_close(got, results(definition, exact, True), 2e-2)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 3, 2, 4), (1, 2, 2, 0, 2, 4), (1, 2, 2, 3, 0, 4)])
def test_empty_operands(sizes: tuple[int, ...]) -> None:
    args = operands(*sizes)
    assert_close(results(selective_scan_map, args, True), results(definition, args, True), 1e-11)


BAD: dict[str, dict[str, Tensor]] = {
    "x has shape": {"x": torch.zeros(2, 5, 7, 6)},
    "delta has shape": {"delta": torch.zeros(2, 35, 24)},
    "A has shape": {"A": torch.zeros(6, 3)},
    "B has shape": {"B": torch.zeros(2, 4, 35, 3)},
    "C has shape": {"C": torch.zeros(2, 35, 4, 2)},
    "D has shape": {"D": torch.zeros(6)},
    "delta_bias has shape": {"delta_bias": torch.zeros(6)},
    "path has shape": {"path": torch.arange(34).expand(4, 34)},
    "path has dtype": {"path": torch.zeros(4, 35)},
    "once in each row": {"path": torch.zeros(4, 35, dtype=torch.int64)},
    "0 to 34": {"path": torch.arange(1, 36).expand(4, 35)},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_operands(message: str) -> None:
    with pytest.raises(InputError, match=message):
        selective_scan_map(**{**operands(), **BAD[message]})


def test_a_path_that_is_changed_is_looked_at_again() -> None:
    args = operands()
    selective_scan_map(**args)
    args["path"][0, 0] = args["path"][0, 1]
    with pytest.raises(InputError, match="once in each row"):
        selective_scan_map(**args)


def test_opcheck() -> None:
    args = operands(1, 2, 3, 2, 2, 2, dtype=torch.float32)
    torch.library.opcheck(OP, tuple(t.detach() for t in args.values()), {"delta_softplus": True})


def test_runs_in_inference_mode() -> None:
    args = operands()
    with torch.inference_mode():
        args["path"] = scan_paths(5, 7)
        for _ in range(2):
            got = selective_scan_map(**args)
        args["path"][0, 0] = 1
        with pytest.raises(InputError, match="once in each row"):
            selective_scan_map(**args)
    want = selective_scan_map(**{**args, "path": scan_paths(5, 7)})
    assert torch.equal(got, want)


def test_shapes_on_meta() -> None:
    args = {k: v.detach().to("meta") for k, v in operands().items()}
    assert selective_scan_map(**args).shape == (2, 35, 6)


@pytest.mark.slow
def test_compiles_whole() -> None:
    args = operands(dtype=torch.float32)
    compiled = torch.compile(selective_scan_map, fullgraph=True)
    assert_close(results(compiled, args, True), results(selective_scan_map, args, True), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sizes", [(1, 64, 64, 72, 10), (3, 14, 14, 96, 1), (2, 7, 9, 60, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    args = operands(*sizes, 4, dtype=dtype, device="cuda")
    args["path"] = scan_paths(*sizes[1:3], device="cuda")
    exact = {
        k: v.detach().cpu().double().requires_grad_() if v.is_floating_point() else v.cpu()
        for k, v in args.items()
    }
    got, again = results(selective_scan_map, args, True), results(selective_scan_map, args, True)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    want = results(selective_scan_map, exact, True)
    assert_close([t.cpu() for t in got], want, 1e-5 if dtype == torch.float32 else 2e-2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert all(
            torch.equal(a, b) for a, b in zip(results(selective_scan_map, args, True), got, strict=True)
        )
