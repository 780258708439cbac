"""The CPU kernels of scans against ``selective_scan`` on decoded values in float64, for every instruction set."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmquant.ops.deployed import ScanOperands, cpu
from tests.ops.deployed_cpu import (
    FEW,
    PATHS,
    Core,
    bit_widths,
    close,
    decays,
    make_grid,
    make_weight,
    needs_kernels,
    per_sample,
    seeds,
)

pytestmark = needs_kernels


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ladder", "shared", "own"])
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 5, 16, 33, 72]),
    st.sampled_from([1, 2, 3, 8, 10, 16, 17, 37]),
    st.sampled_from([1, 4, 5, 12, 37]),
    st.sampled_from([None, 2, 4, 8]),
    seeds,
)
def test_scan(
    path: int, kind: str, batch: int, height: int, width: int, channels: int, states: int, rank: int, bits: int | None,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    core = Core(batch, height, width, channels, states, rank, path)
    delta = core.delta()
    flat = delta.flatten(1)
    std = flat.std(1) if flat.shape[1] > 1 else torch.zeros(batch).double()
    moments = torch.stack((flat.mean(1), std, flat.amin(1), flat.amax(1)), 1)
    got = cpu.delta_moments(*core.rank, core.weights, path)
    torch.testing.assert_close(got.double(), moments, rtol=1e-5, atol=1e-5)
    grid, tolerance = None, 1e-5
    if bits is not None:
        grid = make_grid(bits, batch, clamped=True)
        level = (delta + per_sample(grid.shift)) / per_sample(grid.scale)
        # Step sizes so near a tie may go either way: one level of one step.
        if bool((((level - level.floor()) - 0.5).abs() < 2e-6 * 2**bits).any()):
            tolerance = 0.02
    a = decays(kind, core.directions, channels, states)
    y = core.run(grid, a)
    close(y, core.want(grid, a), tolerance)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(core.run(grid, a), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(
    st.integers(1, 2),
    st.integers(1, 150),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 5, 16, 33, 72]),
    st.sampled_from([1, 3, 10, 16]),
    st.sampled_from([1, 5, 12]),
    bit_widths,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_a_core_is_its_parts(
    path: int, batch: int, pixels: int, directions: int, channels: int, states: int, ranks: int, bits: int, same: bool,
    by_column: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    shape = (batch, channels, pixels) if by_column else (batch, pixels, channels)
    x = torch.randn(shape).transpose(1, 2) if by_column else torch.randn(shape)
    if pixels > 3:
        x[0, 2, 0] = math.nan
    of_x, of_u, of_rank, of_b, of_c, of_delta = (make_grid(bits, 1) for _ in range(6))
    rows = ranks + 2 * states + 1
    places = (1, 1 + ranks, 1 + ranks + states)
    projection, _ = make_weight((directions * rows, channels), bits, path)
    steps, _ = make_weight((directions, channels, ranks), bits, path, steps=True)
    a = decays("ladder", directions, channels, states)
    skip, bias = torch.randn(directions * channels), torch.randn(directions * channels)
    order = torch.stack([torch.randperm(pixels) for _ in range(directions)]).int()

    image = x.unsqueeze(2)
    u = cpu.encode(image, of_u, path=path)
    codes, grid = (u, of_u) if same else (cpu.encode(image, of_x, path=path), of_x)
    made = cpu.linear(codes, grid, projection, path=path).view(batch, pixels, directions, rows)
    rank, b, c = (
        cpu.encode(made[..., at : at + n], g, by_group=True, path=path)
        for at, n, g in zip(places, (ranks, states, states), (of_rank, of_b, of_c), strict=True)
    )
    want = cpu.scan(
        (u, of_u), (rank, of_rank), steps, of_delta, a, (b, of_b), (c, of_c), skip, bias, True, order, path
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            operands = ScanOperands(
                of_u, of_rank, steps, of_delta, a, of_b, of_c, skip, bias, True, order, ranks
            )
            size = batch, pixels, channels
            core = cpu.Core(size, None if same else of_x, projection, places, operands, path)
            for given in (x, x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                torch.testing.assert_close(core(given), want, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
def test_a_large_scan_is_the_same_on_any_number_of_threads(path: int) -> None:
    torch.manual_seed(0)
    core = Core(2, 40, 37, 72, 10, 4, path)
    grid, a = make_grid(4, 2, clamped=True), decays("ladder", 4, 72, 10)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(core.run(grid, a))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_nan_of_the_low_rank_reaches_all_later_steps(path: int, bits: int) -> None:
    torch.manual_seed(0)
    core = Core(1, 4, 5, 20, 3, 4, path)
    x = torch.randn(1, 20, 4, 4)
    x[0, 7] = math.nan
    core.rank = core.coded(x, make_grid(4, 1), by_group=True)
    y = core.run(make_grid(bits, 1, clamped=True), decays("ladder", 4, 20, 3))
    assert y.isnan().all()  # forwards and backwards, every pixel is behind it


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_after_a_fork() -> None:
    """GNU's OpenMP does not survive one: a child that went on with its threads would wait for ever."""
    torch.manual_seed(0)
    core = Core(1, 60, 60, 72, 10, 4, 0)
    a = decays("ladder", 4, 72, 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = core.run(None, a)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            os._exit(0 if core.run(None, a).numpy().tobytes() == want.numpy().tobytes() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
