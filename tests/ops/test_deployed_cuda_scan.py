"""The CUDA scan of deployed models against the CPU's, run by a CPU (``emulator``), and by a GPU if there is one."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssmquant.errors import InputError
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import ScanOperands, cpu, cuda, cuda_scan
from ssmquant.ops.deployed.cuda_scan import Case, Scan, Shape, arrangement, choose
from tests.ops import emulator
from tests.ops.deployed_cpu import close, make_grid
from tests.ops.deployed_cuda import Operands, emulated

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))
FEW = settings(max_examples=8)
SMALL = Shape(columns=2, lanes=3, chunks=3, steps=16, group=2)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, SMALL),
        ({"bits": 2, "ladder": 1}, SMALL),
        ({"bits": 8}, Shape(1, 6, 2, 32, segments=1)),
        ({"quantized": False, "paths": 1, "turned": False}, Shape(2, 3, 1, 64)),
        ({"ladder": 0, "paths": 3, "turned": False}, Shape(2, 3, 4, 16, segments=4, held=4)),
        ({"bits": 8, "ladder": 0}, None),
        ({}, Shape(2, 3, 3, 16, both=True)),
        ({"quantized": False}, Shape(1, 6, 2, 16, both=True)),
        ({}, Shape(2, 3, 3, 32, both=True)),  # chunks of two stages: one after the other
        ({"turned": False}, Shape(2, 3, 3, 16, both=True)),
    ],
)
def test_scans(by_cpu: None, options: dict[str, Any], shape: Shape | None) -> None:
    torch.manual_seed(0)
    operands = Operands(2, 59, 6, 5, 6, **options)
    operands.bias[::3] += 6  # steps after which nothing is left of what was before
    want = operands.scan_on_cpu()
    close(operands.scan(shape), want)
    close(operands.scan(shape, apart=True), want.double())


@FEW
@given(
    st.integers(1, 2), st.sampled_from([1, 15, 16, 17, 49, 64, 80]), st.sampled_from([1, 4, 7, 32]),
    st.sampled_from([1, 2, 5]), st.sampled_from([1, 4, 6, 33]), st.integers(0, 1000), st.booleans(), st.booleans(),
)  # fmt: skip
def test_scans_of_any_size(
    batch: int, pixels: int, channels: int, states: int, rank: int, seed: int, late: bool, both: bool
) -> None:
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    torch.manual_seed(seed)
    columns = 2 if channels % 2 == 0 else 1
    operands = Operands(batch, pixels, channels, states, rank)
    assume(operands.nearest_tie() > 1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "load", lambda source, _: emulated(source, late))
        lanes = min(8, channels // columns)
        shape = Shape(columns, lanes, 2, 16, both=both)
        close(operands.scan(shape, apart=both), operands.scan_on_cpu())


@pytest.mark.parametrize("ladder", [1, 2])
def test_scans_that_forget(by_cpu: None, ladder: int) -> None:
    """Of the first steps of a chunk nothing is left at its end, but a NaN."""
    torch.manual_seed(0)
    operands = Operands(1, 200, 6, 5, 6, ladder=ladder)
    operands.bias += 8
    shape, want = Shape(2, 3, 2, 64), operands.scan_on_cpu()
    close(operands.scan(shape), want)
    bad = torch.zeros(200, dtype=torch.uint8)
    bad[3] = 1
    assert operands.scan(shape, bad).isnan().all(-1).all(-1)


def test_blocks_of_channels_begin_where_copies_do() -> None:
    with pytest.raises(InputError, match="a block of 4 channels"):
        Operands(1, 40, 6, 3, 4).scan(Shape(2, 2, 2, 16))


@pytest.mark.parametrize("channels", [8, 12, 7])
def test_rows_of_codes_of_any_length(by_cpu: None, channels: int) -> None:
    torch.manual_seed(0)
    operands = Operands(1, 40, channels, 3, 4)
    close(operands.scan(wide=False), operands.scan_on_cpu())


def test_a_nan_reaches_what_comes_after_it(by_cpu: None) -> None:
    torch.manual_seed(0)
    operands = Operands(2, 40, 6, 3, 4, paths=1, turned=False)
    bad = torch.zeros(80, dtype=torch.uint8)
    bad[17] = 1
    got, want = operands.scan(SMALL, bad), operands.scan_on_cpu()
    assert got[0, 17:].isnan().all()
    close(got[0, :17], want[0, :17].double())
    close(got[1], want[1].double())


@pytest.mark.parametrize(
    ("channels", "states", "quantized"), [(16, 16, True), (72, 10, False), (6, 64, True), (130, 16, True)]
)
def test_shapes_that_are_chosen(
    channels: int, states: int, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several groups, with as many registers for them as there are."""
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    torch.manual_seed(0)
    monkeypatch.setattr(nvrtc, "load", lambda source, _: emulated(source))
    monkeypatch.setattr(cuda_scan, "_processors", lambda _: 132)
    operands = Operands(1, 700, channels, states, 5, quantized=quantized, paths=1)
    steps = cuda.pack(*operands.steps)
    assert Scan(operands.size, operands.operands(lambda g: g, lambda t: t, steps)).groups > 1
    close(operands.scan(), operands.scan_on_cpu())


@pytest.mark.parametrize(
    ("size", "states", "rank", "paths", "full"),
    [
        ((64, 197, 384), 16, 12, 1, False),  # Vim: less than a block for each multiprocessor
        ((1, 4096, 72), 10, 4, 2, False),  # MambaIR-light
        ((1, 57600, 72), 10, 4, 2, True),
        ((64, 3136, 192), 2, 6, 2, True),
    ],
)
def test_scans_that_fill_a_gpu(
    size: tuple[int, int, int],
    states: int,
    rank: int,
    paths: int,
    full: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only their blocks are spread evenly if they come in before the kernel in front is done."""
    monkeypatch.setattr(cuda_scan, "_processors", lambda _: 132)
    operands = Operands(*size, states, rank, paths=paths)
    made = operands.operands(lambda g: g, lambda t: t, cuda.pack(*operands.steps))
    case = Scan(size, made, apart=True).case
    assert isinstance(case, Case)
    assert case.full == full
    assert case.shape.both is (size == (1, 4096, 72))


def test_shapes() -> None:
    sizes = (1, 4096), (1, 230400), (8, 3136), (64, 49), (64, 197), (3, 5), (1, 1)
    widths = 1, 7, 16, 37, 60, 72, 98, 128, 160, 180, 256, 384, 400, 512, 768, 1024, 3072
    forms = (True, 16), (True, 0), (False, 0)
    for (batch, pixels), channels, states, form in product(sizes, widths, (1, 3, 10, 16, 64), forms):
        shape = choose(batch, pixels, channels, states, 2, 132, *form)
        assert shape.steps % shape.stage == 0
        assert shape.stage % shape.group == 0
        assert channels % shape.columns == 0
        assert shape.lanes * shape.chunks <= 256
        width = shape.lanes * shape.columns
        blocks = -(-channels // width)
        assert blocks == 1 or width % 16 == 0
        groups = math.ceil(math.ceil(pixels / shape.steps) / shape.chunks)
        assert not shape.held or shape.held * shape.segments >= groups
        case = Case(shape, states, 48, *form, 2, True)
        assert max(map(case.shared, (False, True))) <= 96 * 1024  # any GPU since sm_80 has 99 KB for a block


def test_scans_that_are_too_large() -> None:
    grid, weights = make_grid(4, 1), cuda.pack(*Operands.weight((1, 64, 4), 4, 1.0))
    order = torch.empty(1, 2**25, dtype=torch.int32, device="meta")
    args = grid, grid, weights, grid, -torch.ones(64, 2), grid, grid, None, None, True, order, 4
    with pytest.raises(InputError, match="more than the kernels for GPUs count"):
        Scan((1, 2**25, 64), ScanOperands(*args))


def test_more_pixels_of_all_samples_than_a_block_counts() -> None:
    grid, weights = make_grid(4, 1), cuda.pack(*Operands.weight((1, 1, 4), 4, 1.0))
    order = torch.arange(2**15).int().view(1, -1)
    args = grid, grid, weights, grid, -torch.ones(1, 2), grid, grid, None, None, True, order, 4
    Scan((2**15, 2**15, 1), ScanOperands(*args))
    with pytest.raises(InputError, match="more than the kernels for GPUs count"):
        Scan((2**16 - 1, 2**15, 1), ScanOperands(*args))


@pytest.mark.parametrize(("batch", "pixels"), [(0, 40), (2, 0)])
def test_nothing_to_scan(by_cpu: None, batch: int, pixels: int) -> None:
    got = Operands(batch, pixels, 6, 3, 4).scan()
    assert got.shape == (batch, pixels, 6)


@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 16, 1000, 16000]), st.sampled_from([1, 49, 4096, 57600, 230400]),
    st.sampled_from([1, 7, 72, 384, 3072]), st.sampled_from([1, 4, 12, 24, 64]), st.sampled_from([1, 10, 64]),
    st.sampled_from([1, 4]), st.booleans(), st.sampled_from([4, 132]),
)  # fmt: skip
def test_a_gpu_takes_what_is_launched(
    batch: int,
    pixels: int,
    channels: int,
    rank: int,
    states: int,
    paths: int,
    quantized: bool,
    processors: int,
) -> None:
    """Blocks, threads and shared memory of all kernels, for any image that is not refused."""
    grid, weights = make_grid(4, 1), cuda.pack(*Operands.weight((paths, channels, rank), 4, 1.0))
    order = torch.arange(pixels).int().expand(paths, -1)
    a = -torch.ones(paths * channels, states)
    of_delta = grid if quantized else None
    operands = ScanOperands(grid, grid, weights, of_delta, a, grid, grid, None, None, True, order, rank)
    launched: list[str] = []

    def launch(
        name: str, size: tuple[int, int], threads: int, shared: int, params: Any, *_: Any, **__: Any
    ) -> None:
        assert 0 < size[0] < 2**31
        assert 0 < size[1] < 2**16
        assert 0 < threads <= 1024
        assert shared <= 96 * 1024
        if name == "scan_steps":
            assert size[0] * params.stretch >= batch * pixels > (size[0] - 1) * params.stretch
            assert max(params.stretch, batch * pixels + params.tile) < 2**31
        launched.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_scan, "_processors", lambda _: processors)
        patch.setattr(nvrtc, "load", lambda *_: SimpleNamespace(launch=launch))
        try:
            scan = Scan((batch, pixels, channels), operands)
        except InputError:
            return
        scan.device = torch.device("meta")  # so that results have no memory
        wide = channels, paths * len(arrangement(rank, states, (0, 0, 0))), 1
        scan(*(torch.empty(batch * pixels, -(-n // 16) * 16, dtype=torch.uint8, device="meta") for n in wide))
    assert launched == ["scan_tiles"] or (launched[0], launched[-1]) == ("scan_steps", "scan_out")


def test_scans_in_too_many_directions() -> None:
    grid, weights = make_grid(4, 1), cuda.pack(*Operands.weight((500, 8, 64), 4, 1.0))
    order = torch.arange(4).int().expand(500, 4)
    args = grid, grid, weights, grid, -torch.ones(4000, 64), grid, grid, None, None, True, order, 64
    with pytest.raises(InputError, match="scans in 500 directions"):
        Scan((1, 4, 8), ScanOperands(*args))


@pytest.mark.parametrize(("channels", "rank", "bits"), [(72, 4, 4), (37, 6, 4), (384, 24, 2), (5, 64, 2)])
def test_step_sizes(by_cpu: None, channels: int, rank: int, bits: int) -> None:
    """Of several tiles of a block, of the last pixels of an image, and of channels that fill no thread's share."""
    torch.manual_seed(0)
    operands = Operands(3, 131, channels, 1, rank, bits=bits)
    close(operands.scan(), operands.scan_on_cpu())


@pytest.mark.gpu
def test_scans_on_a_gpu() -> None:
    torch.manual_seed(0)
    for sizes, options in (
        ((1, 4096, 72, 10, 4), {}),
        ((2, 1000, 72, 10, 4), {"bits": 8}),
        ((1, 500, 37, 10, 4), {"bits": 2, "ladder": 0}),
        ((3, 196, 192, 1, 12), {"bits": 8, "ladder": 1}),
        ((2, 197, 384, 16, 12), {"quantized": False, "paths": 1, "turned": False}),
    ):
        operands = Operands(*sizes, **options, device="cuda")
        got, want = operands.scan(), operands.scan_on_cpu().double()
        # At 8 bits step sizes are rounded to levels in the kernel: some lie on a tie, which moves their channel.
        error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        moved = (error > 5e-6).float().mean()
        assert moved <= (0.05 if options.get("bits") == 8 else 0)
        assert error.max() < 1e-3
        assert torch.equal(got, operands.scan())
