"""CUDA scans of one state of deployed models against those of a CPU, run by one (``emulator``) and by a GPU."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import cpu, cuda, cuda_scan
from ssmquant.ops.deployed.cuda_scan import Case, Scan, Shape
from ssmquant.ops.deployed.cuda_scan_tiles import TileCase, Tiles, choose
from tests.ops import emulator
from tests.ops.deployed_cpu import close
from tests.ops.deployed_cuda import Operands, emulated

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


def case_of(operands: Operands, shape: Any = None, apart: bool = True) -> Case | TileCase:
    made = operands.operands(lambda g: g, lambda t: t, cuda.pack(*operands.steps))
    return Scan(operands.size, made, apart, shape).case


@pytest.mark.parametrize(
    ("sizes", "options", "tiles"),
    [
        ((2, 59, 6, 6), {}, Tiles(1, 2)),
        ((2, 59, 36, 6), {"bits": 8}, Tiles(2, 3)),  # blocks of channels, the last one not whole
        (
            (1, 21, 36, 13),
            {"bits": 8, "quantized": False},
            Tiles(2, 7),
        ),  # one tile, and room behind the last step
        ((2, 40, 6, 6), {"turned": False, "paths": 1}, Tiles(1, 1)),
        ((1, 49, 34, 33), {"bits": 2, "paths": 1}, Tiles(4, 4)),  # two products for a step size
        ((1, 30, 20, 64), {"bits": 8, "softplus": False}, Tiles(4, 5)),
        ((1, 9, 2, 1), {}, Tiles(1, 1)),
    ],
)
def test_scans(by_cpu: None, sizes: Any, options: dict[str, Any], tiles: Tiles) -> None:
    torch.manual_seed(0)
    batch, pixels, channels, rank = sizes
    operands = Operands(batch, pixels, channels, 1, rank, **options)
    operands.bias[::3] += 6  # steps after which nothing is left of what was before
    assert isinstance(case_of(operands, tiles), TileCase)
    close(operands.scan(tiles, apart=True), operands.scan_on_cpu().double())
    operands.bias = operands.skip = None
    close(operands.scan(tiles, apart=True), operands.scan_on_cpu().double())


@settings(max_examples=8)
@given(
    st.integers(1, 2), st.integers(1, 70), st.sampled_from([2, 4, 16, 18]), st.sampled_from([1, 4, 6, 33]),
    st.sampled_from([1, 2, 5]), st.integers(0, 1000), st.booleans(),
)  # fmt: skip
def test_scans_of_any_size(
    batch: int, pixels: int, channels: int, rank: int, run: int, seed: int, late: bool
) -> None:
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    torch.manual_seed(seed)
    operands = Operands(batch, pixels, channels, 1, rank)
    assume(operands.nearest_tie() > 1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "load", lambda source, _: emulated(source, late))
        close(operands.scan(Tiles(2, run), apart=True), operands.scan_on_cpu().double())


def test_states_that_grow(by_cpu: None) -> None:
    """What would follow the last step does not, however fast it grew: on the way back it comes first."""
    torch.manual_seed(0)
    operands = Operands(1, 15, 16, 1, 1, bits=2, paths=1, softplus=False)
    operands.bias.fill_(-3.0)
    want = operands.scan_on_cpu().double()
    assert want.isfinite().all()
    assert (
        float((operands.scan(Tiles(2, 14)) - want).norm() / want.norm()) < 1e-4
    )  # what is rounded grows too


@pytest.mark.parametrize("turned", [False, True])
def test_a_nan_reaches_what_comes_after_it(by_cpu: None, turned: bool) -> None:
    torch.manual_seed(0)
    operands = Operands(2, 40, 6, 1, 4, paths=1, turned=turned)
    bad = torch.zeros(80, dtype=torch.uint8)
    bad[17] = 1
    got, want = operands.scan(Tiles(1, 2), bad), operands.scan_on_cpu()
    assert got[0, 0 if turned else 17 :].isnan().all()
    if not turned:
        close(got[0, :17], want[0, :17].double())
    close(got[1], want[1].double())


@pytest.mark.parametrize(
    ("sizes", "options", "tiles"),
    [
        ((64, 3136, 96, 1, 6), {}, Tiles(6, 14)),  # VMamba's stages
        ((64, 784, 192, 1, 12), {}, Tiles(6, 14)),
        ((64, 196, 384, 1, 24), {}, Tiles(4, 25)),
        ((64, 49, 768, 1, 48), {}, None),  # short
        ((32, 3136, 128, 1, 8), {}, Tiles(4, 14, 3)),
        ((1, 3136, 96, 1, 6), {}, None),  # few
        ((64, 3136, 96, 2, 6), {}, None),
        ((64, 3136, 97, 1, 6), {}, None),
        ((64, 3136, 96, 1, 6), {"apart": False}, None),
        (
            (9000, 144, 96, 1, 6),
            {},
            Tiles(4, 18),
        ),  # whose blocks of channels are on the other axis of the grid
    ],
)
def test_what_is_scanned_by_tiles(
    sizes: tuple[int, ...], options: dict[str, Any], tiles: Tiles | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_scan, "_processors", lambda _: 132)
    case = case_of(Operands(*sizes), **options)
    assert (case.tiles if isinstance(case, TileCase) else None) == tiles


def test_paths_of_one_and_of_two_directions(by_cpu: None) -> None:
    """Have no such kernel."""
    torch.manual_seed(0)
    operands = Operands(1, 20, 4, 1, 4, paths=2)
    operands.order[3] = operands.order[3].roll(1)
    assert not isinstance(case_of(operands), TileCase)
    close(operands.scan(apart=True), operands.scan_on_cpu().double())


def test_step_sizes_are_made_there() -> None:
    operands = Operands(1, 20, 4, 1, 4)
    made = operands.operands(lambda g: g, lambda t: t, cuda.pack(*operands.steps))
    assert Scan(operands.size, made, True, Tiles(1, 2)).steps() is None
    assert Scan(operands.size, made, True, Shape(2, 2, 1, 16)).steps() is not None


def test_tiles() -> None:
    sizes = (1, 49), (64, 100), (64, 197), (64, 201), (500, 3136), (1000, 57600), (20000, 96)
    for (batch, pixels), channels, rank, levels in product(
        sizes, (2, 60, 96, 360, 3072), (1, 24, 64), (16, 0)
    ):
        row = -(-4 * (-(-rank // 4) + 1) // 4) * 4
        tiles = choose(batch, pixels, channels, 1, 2, 132, rank, True, levels, row)
        if tiles is None:
            continue
        case = TileCase(tiles, rank, True, levels, True, 2, 2, row, True)
        assert case.shared(pixels) <= 96 * 1024  # any GPU since sm_80 has 99 KB for a block
        assert 32 <= case.threads <= 256
        assert case.threads * tiles.resident * (255 if tiles.run > 14 else 168) <= 65536 + 8 * 256
        assert tiles.steps >= pixels or tiles.run == 14


@pytest.mark.slow
@pytest.mark.skipif(nvrtc.describe() is None, reason="needs NVRTC or nvcc")
def test_compiles_for_an_h100() -> None:
    for tiles, rank, row, levels in (
        (Tiles(6, 14), 6, 12, 16),
        (Tiles(4, 25), 24, 28, 0),
        (Tiles(4, 7), 48, 52, 16),
    ):
        assert nvrtc.compile_source(TileCase(tiles, rank, True, levels, True, 2, 2, row, True).source(), 90)


@pytest.mark.gpu
def test_scans_on_a_gpu() -> None:
    torch.manual_seed(0)
    for sizes, options in (
        ((64, 3136, 96, 1, 6), {}),
        ((70, 197, 128, 1, 12), {"bits": 8}),
        ((64, 230, 192, 1, 24), {"quantized": False}),
        ((300, 100, 36, 1, 5), {"paths": 1, "turned": False, "bits": 2}),
    ):
        operands = Operands(*sizes, **options, device="cuda")
        got, want = operands.scan(apart=True), operands.scan_on_cpu().double()
        # Step sizes are rounded to levels in the kernel: some lie on a tie, which moves their channel.
        error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert (error > 5e-6).float().mean() <= (0.1 if options.get("bits") == 8 else 0.01)
        assert error.max() < 0.02
        assert torch.equal(got, operands.scan(apart=True))
