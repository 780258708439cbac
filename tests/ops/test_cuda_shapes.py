"""What is chosen for any work and device is something that the kernels can do and the device can hold."""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmquant.ops.selective_scan import cuda, cuda_shapes
from ssmquant.ops.selective_scan.cuda_shapes import (
    SAVE,
    TYPES,
    Case,
    Limits,
    Shape,
    Work,
    case_of,
    choose,
    choose_ends,
    unit,
)
from tests.ops import emulator

DEVICES = {
    "H100": Limits(132, 232_448, 233_472),
    "A100": Limits(108, 166_912, 167_936),
    "L40": Limits(128, 101_376, 102_400),
}
WORKS = st.builds(
    Work,
    backward=st.booleans(),
    batch=st.integers(1, 64),
    groups=st.integers(1, 8),
    inner=st.integers(1, 1000),
    states=st.one_of(st.integers(1, 32), st.integers(1, cuda.MAX_STATES)),
    length=st.one_of(st.integers(1, 130), st.integers(1, 70_000)),
    softplus=st.booleans(),
    constant_b=st.booleans(),
    constant_c=st.booleans(),
    types=st.tuples(*[st.sampled_from(sorted(TYPES))] * 4),
    map=st.booleans(),
)


def is_power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


def check(work: Work, limits: Limits) -> None:
    shape, chunks = choose(work, limits)
    assert all(map(is_power_of_two, (shape.steps, shape.columns, shape.lanes)))
    assert shape.steps % 4 == 0  # steps are read by four
    assert shape.lanes <= 32
    assert SAVE % shape.steps == 0  # where a lane begins, a state may have to be saved
    assert 1 <= shape.staged <= work.states
    assert 32 * shape.warps <= 1024
    if work.backward:  # a tile begins with a saved state
        assert shape.tile % SAVE == 0 or shape.tile >= work.length
    whole = case_of(work, shape, 1)
    assert whole.shape == shape
    assert whole.shared <= limits.block_shared
    assert whole.shared + 1024 <= limits.processor_shared
    before = choose_ends(work, limits)
    assert case_of(work, before, 1, ends=True).shared + 1024 <= limits.processor_shared
    assert case_of(work, before, 1, ends=True).shared <= limits.block_shared
    assert 1 <= before.staged <= work.states
    assert before.channels <= work.inner

    cut = cuda._cut(work, shape, chunks)
    assert 1 <= cut.chunks <= chunks
    assert cut.chunks * cut.chunk >= work.length > (cut.chunks - 1) * cut.chunk
    assert cut.chunk % shape.tile == 0
    if cut.chunks > 1:
        assert cut.chunk % SAVE == 0
        assert cut.chunk % unit(shape, work.length) == 0
        assert cut.chunks < 65536  # of a grid's second size
    assert (cut.blocks - 1) * shape.channels < work.inner <= cut.blocks * shape.channels
    assert choose.__wrapped__(work, limits) == (shape, chunks)


@settings(max_examples=200)
@given(WORKS, st.sampled_from(sorted(DEVICES)))
def test_what_is_chosen_can_be_done(work: Work, device: str) -> None:
    check(work, DEVICES[device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 8, 9, 16, 17, 32, 33, 49, 63, 64, 65, 128, 129, 4096])
def test_short_scans_and_large_states(length: int, device: str) -> None:
    for back in (False, True):
        for states in (1, 16, 100, cuda.MAX_STATES):
            for inner in (1, 161):
                work = Work(back, 2, 4, inner, states, length, True, True, True, ("float",) * 4, False)
                check(work, DEVICES[device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("states", [1, 16])
def test_time_is_cut_where_processors_would_be_idle(states: int, back: bool, device: str) -> None:
    def chunks(batch: int, inner: int, length: int) -> int:
        types = ("float",) * 4
        return choose(
            Work(back, batch, 1, inner, states, length, True, False, False, types, False), DEVICES[device]
        )[1]

    assert chunks(1, 16, 16384) > 4
    assert chunks(1, 16, 64) == 1
    assert chunks(64, 768, 4096) == 1


def any_case(random: Random) -> Case:
    states = random.randint(1, 64)
    shape = Shape(
        steps=random.choice([4, 8, 16, 32]),
        columns=random.choice([1, 2, 4]),
        lanes=random.choice([1, 2, 4, 8, 16, 32]),
        warps=random.randint(1, 12),
        blocks=1,
        staged=random.randint(1, min(8, states)),
    )
    backward, ends, softplus, constant_b, constant_c = (random.random() < 0.5 for _ in range(5))
    types = tuple(random.choice(sorted(TYPES)) for _ in range(4))
    return Case(shape, backward, ends, states, softplus, constant_b, constant_c, types)


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++ or clang++ on Linux")
def test_shared_memory_is_what_the_source_lays_out(tmp_path: Path) -> None:
    # Each in a namespace of its own, all in one file; a compiler refuses it if one differs.
    random = Random(0)
    folder = Path(str(files("ssmquant").joinpath("csrc")))
    base = folder / "selective_scan_cuda" / "base.cu"
    lines = ['#include "cuda.h"', f'#include "{folder / "cuda_math.cu"}"']
    for i in range(100):
        case = any_case(random)
        definitions = case.source().removesuffix(cuda_shapes._text()).splitlines()
        lines += [*definitions, f"namespace case{i} {{", f'#include "{base}"']
        lines += [f'static_assert(BYTES == {case.shared}, "bytes");', "}"]
        lines += [f"#undef {line.split()[1]}" for line in definitions]
    (tmp_path / "all.cpp").write_text("\n".join(lines))
    assert emulator.COMPILER is not None
    command = [emulator.COMPILER, *emulator.FLAGS, f"-I{emulator.HERE}", "-fsyntax-only", "all.cpp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
