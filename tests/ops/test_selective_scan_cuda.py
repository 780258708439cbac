"""The CUDA back end of the selective scan against its definition, its kernels run by a CPU (``emulator``).

There they also run with threads and copies in another order (``late``), which shows a barrier that is missing. That the
shared memory of a block is as large as the source wants is checked by every launch of the emulator.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmquant.errors import InputError
from ssmquant.ops import selective_scan, use_backend
from ssmquant.ops.nvrtc import CompileError
from ssmquant.ops.selective_scan import cuda
from ssmquant.ops.selective_scan.cuda_shapes import Case, Limits, Shape, Work
from tests.ops import emulator
from tests.ops.emulator.scan import (
    assert_close,
    assert_same,
    by_chunked,
    check,
    guarded,
    map_definition,
    map_operands,
    moved,
    operands,
    run,
    run_map,
    run_with,
    weights,
)

NAMES = ("u", "delta", "A", "B", "C", "D", "bias")
# 16 channels a block, 64 steps a tile.
SMALL = Shape(steps=8, columns=2, lanes=4, warps=2, blocks=1, staged=2)

Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Runs kernels on the CPU; called, it sets their shapes (None: as would be chosen) and the order of threads."""
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    choose, choose_ends = cuda.choose, cuda.choose_ends

    def use(
        forward: Shape | None = SMALL,
        backward: Shape | None = SMALL,
        *,
        chunks: int = 1,
        late: bool = False,
        processors: int = 4,
    ) -> None:
        def chosen(work: Work, limits: Limits) -> tuple[Shape, int]:
            shape = backward if work.backward else forward
            return choose(work, limits) if shape is None else (shape, chunks)

        def chosen_ends(work: Work, limits: Limits) -> Shape:
            shape = backward if work.backward else forward
            return choose_ends(work, limits) if shape is None else shape

        monkeypatch.setattr(cuda, "choose", chosen)
        monkeypatch.setattr(cuda, "choose_ends", chosen_ends)
        monkeypatch.setattr(cuda, "_limits", lambda device: Limits(processors, 232448, 233472))
        monkeypatch.setattr(cuda, "_kernels", lambda case, device: emulator.load(cuda._source(case), late))
        cuda._plan.cache_clear()

    use()
    yield use
    cuda._plan.cache_clear()


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("length", [1, 7, 49, 64, 65, 197, 300])
@pytest.mark.parametrize(
    ("constant", "without", "softplus"),
    [("", "", True), ("", "D bias", False), ("B", "D", True), ("C", "bias", True), ("B C", "", False)],
)
def test_agrees_with_the_definition(length: int, constant: str, without: str, softplus: bool) -> None:
    args = operands(2, 40, 3, length, 2, constant=constant, without=without, softplus=softplus)
    check(args, softplus, last=length != 49)


@pytest.mark.parametrize(
    ("batch", "channels", "states", "length", "groups"),
    [
        (1, 24, 1, 197, 1),
        (2, 72, 10, 49, 4),
        (1, 9, 40, 130, 1),
        (1, 10, 256, 68, 2),
        (70, 8, 4, 6, 1),
        (1, 161, 1, 49, 1),
    ],
)
def test_agrees_with_the_definition_in_the_shapes_that_are_chosen(
    batch: int, channels: int, states: int, length: int, groups: int, use: Use
) -> None:
    for processors in (1, 132):  # few want short tiles, many long ones
        use(None, None, processors=processors)
        check(operands(batch, channels, states, length, groups))


def test_a_long_scan_of_few_channels_is_cut(use: Use) -> None:
    use(None, None, processors=132)
    args = operands(1, 4, 3, 5000)
    launched: list[str] = []
    kernels = cuda._kernels

    def recording(case: Case, device: torch.device) -> Any:
        launched.append("ends" if case.ends else "whole")
        return kernels(case, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_kernels", recording)
        cuda._plan.cache_clear()
        got = run(args)
    assert launched == ["ends", "whole"] * 2
    assert_close(got, by_chunked(args))


def test_a_case_that_cannot_be_compiled(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(case: Case, device: torch.device) -> Any:
        raise CompileError("the compiler says no")

    monkeypatch.setattr(cuda, "_kernels", refused)
    with pytest.raises(CompileError, match=r"(?s)3 states, 49 steps.*the compiler says no.*use_backend"):
        run(operands(1, 8, 3, 49))


@pytest.mark.parametrize(("channels", "states", "length"), [(24, 3, 1536), (8, 40, 600)])
def test_states_forget_at_their_own_pace(channels: int, states: int, length: int, use: Use) -> None:
    use(chunks=3)
    # The definition that it is compared with takes length ** 2 numbers for each channel and state.
    args = operands(1, channels, states, length)
    args[2] = -torch.logspace(-3, 2, states).repeat(channels, 1)
    args[2][:4] *= 50
    check(args)


def test_more_than_the_kernels_can_count(use: Use) -> None:
    use(None, None)

    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="more than the CUDA kernels count"):
        cuda._plan(cpu, 1, False, 1, 1, 1, 1, 2**30, True, False, False, ("F16",) * 4, False)


SHAPES = {  # steps, columns, lanes, warps of the forward and the backward pass; channels, length, chunks
    "one lane": ((16, 1, 1, 2), (8, 2, 1, 1), 3, 600, 1),
    "columns across segments": ((8, 4, 2, 1), (4, 4, 2, 3), 11, 197, 1),
    "more columns than segments": ((16, 4, 16, 1), (32, 4, 16, 1), 70, 130, 1),
    "tiles of different length": ((8, 2, 8, 1), (16, 1, 8, 2), 20, 300, 2),
    "long tiles in chunks": ((8, 1, 2, 1), (8, 1, 1, 1), 4, 1100, 2),
    "all lanes": ((16, 2, 32, 1), (8, 2, 32, 1), 70, 8, 1),
    "more lanes than steps": ((4, 1, 32, 2), (4, 1, 16, 4), 70, 7, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_right(name: str, use: Use) -> None:
    forward, backward, channels, length, chunks = SHAPES[name]
    use(Shape(*forward, 1, 3), Shape(*backward, 1, 2), chunks=chunks)
    check(operands(1, channels, 5, length))


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda a: a,
    "over at once": lambda a: 100 * a,
    "hardly any": lambda a: 1e-4 * a,
    "growth": lambda a: -2e-3 * a,
    "one slow state": lambda a: a * torch.tensor([100.0] * (a.shape[1] - 1) + [1e-3]),
    "one slow channel": lambda a: a * torch.tensor([100.0] * 17 + [1e-3] + [100.0] * (len(a) - 18))[:, None],
    "huge": lambda a: 1e30 * a,
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("states", "constant"), [(3, ""), (3, "B C"), (40, "")])
def test_chunks(decay: str, states: int, constant: str, use: Use) -> None:
    use(chunks=3)
    args = operands(1, 20, states, 430, constant=constant)
    args[2] = DECAYS[decay](args[2])
    check(args, last=decay != "ordinary")


def test_steps_of_both_signs(use: Use) -> None:
    use(chunks=3)
    args = operands(1, 20, 3, 600, without="bias")
    # The state grows by e+30 and later decays by as much: what a chunk begins with does get to its end.
    args[1] = torch.full((1, 20, 600), 1e-3)
    args[1][..., 40:50], args[1][..., 100:110] = -1.0, 1.0
    args[2] = torch.full((20, 3), -3.0)
    check(args, softplus=False)


def test_chunks_are_read_as_far_as_they_matter(use: Use) -> None:
    use(chunks=2)
    args = operands(1, 20, 3, 600)
    args[2] = 100 * args[2]
    args[0][..., 0] = math.nan  # never seen by the second chunk
    y, last, _ = cuda.forward(*args, True, torch.float32, False)
    assert y[..., :300].isnan().all()
    assert y[..., 320:].isfinite().all()
    assert last.isfinite().all()


TYPES = {
    "half": (torch.float16,) * 4,
    "bfloat16": (torch.bfloat16,) * 4,
    "autocast": (torch.float16, torch.float32, torch.float16, torch.float16),
    "all kinds": (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("length", [300, 197])
@pytest.mark.parametrize("types", TYPES)
def test_half_precision_operands_keep_a_float_state(types: str, length: int, use: Use) -> None:
    use(chunks=2)
    args = operands(2, 20, 3, length, dtypes=TYPES[types])
    check(args)
    args[2], args[5], args[6] = args[2].half(), args[5].bfloat16(), args[6].half()
    check(args)


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("how", ["last first", "channels last", "strided", "offset", "odd rows"])
def test_operands_in_any_memory_layout(how: str, dtype: torch.dtype) -> None:
    args = operands(2, 20, 3, 64, 2, dtypes=(dtype,) * 4)
    args[3] = args[3][:1].expand(2, -1, -1, -1)
    want = run(args)
    strange = [moved(t, how) for t in args]
    with guarded():
        assert_same(run(strange), want)
    one = [moved(t, how) if name == "C" else t for name, t in zip(NAMES, args, strict=True)]
    assert_same(run(one), want)
    _, state, saved = cuda.forward(*args, True, torch.float32, True)
    for g in (moved(weights(args)[0], how), torch.ones((), dtype=dtype).expand(args[0].shape)):
        grads = cuda.backward(g, moved(state, how), saved, *args, True, torch.float32)
        plain = cuda.backward(g.contiguous(), state, saved, *args, True, torch.float32)
        assert_same(list(grads), list(plain))


@pytest.mark.usefixtures("use")
def test_one_matrix_for_all_channels_may_leave_out_the_group_axis() -> None:
    args = operands(2, 40, 3, 65)
    want = run(args)
    args[3], args[4] = args[3][:, 0], args[4][:, 0]
    for got, like in zip(run(args), want, strict=True):
        assert torch.equal(got.flatten(), like.flatten())


@pytest.mark.parametrize("constant", ["", "B C"])
@pytest.mark.parametrize("states", [3, 40])
def test_the_order_of_threads_does_not_matter(states: int, constant: str, use: Use) -> None:
    args = operands(1, 20, states, 430, constant=constant)
    args[2] = DECAYS["one slow state"](args[2])
    use(chunks=3)
    want = run(args)
    assert_same(run(args), want)
    use(chunks=3, late=True)
    assert_same(run(args), want)


@pytest.mark.usefixtures("use")
def test_nan_shows_from_its_step_on() -> None:
    args = operands(2, 20, 3, 197)
    clean = cuda.forward(*args, True, torch.float32, False)
    args[0][1, 5, 100] = math.nan
    y, last, _ = cuda.forward(*args, True, torch.float32, False)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 5, 100:] = True
    assert torch.equal(y.isnan(), reached)
    assert torch.equal(y[~reached], clean[0][~reached])
    assert torch.equal(last.isnan(), reached[..., -1:].expand_as(last))


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("factor", [1e4, 1e30])
def test_decays_that_underflow_are_harmless(factor: float, softplus: bool) -> None:
    args = operands(2, 20, 3, 300, softplus=softplus)
    args[2] = factor * args[2]
    check(args, softplus)


@pytest.mark.usefixtures("use")
def test_interface() -> None:
    args = operands(2, 20, 3, 65)
    _, last, saved = cuda.forward(*args, True, torch.float32, True)
    assert saved.shape == cuda.saved_shape(2, 20, 3, 65)
    _, again, nothing = cuda.forward(*args, True, torch.float32, False)
    assert nothing.shape == (0, *saved.shape[1:])
    assert torch.equal(last, again)
    g = weights(args)[0]
    none, zeros = (
        cuda.backward(g, x, saved, *args, True, torch.float32) for x in (None, torch.zeros_like(last))
    )
    assert_same(list(none), list(zeros))


@pytest.mark.parametrize(
    ("pixels", "channels", "states", "directions", "chunks", "dtype"),
    [
        (99, 6, 3, 2, 1, torch.float32),
        (400, 20, 3, 4, 3, torch.float32),
        (64, 20, 40, 1, 1, torch.float32),
        (300, 20, 3, 2, 3, torch.bfloat16),
    ],
)
def test_maps(
    pixels: int, channels: int, states: int, directions: int, chunks: int, dtype: torch.dtype, use: Use
) -> None:
    use(chunks=chunks)
    args = map_operands(2, pixels, channels, states, directions, dtype)
    with guarded():
        got = run_map(args)
    want = map_definition(args)
    assert_close([got[0], *got[2:]], [want[0], *want[2:]])
    assert_close([got[1].double().sum(1)], [want[1]], 1e-5 + torch.finfo(dtype).eps)  # rounded, then added
    use(chunks=chunks, late=True)
    assert_same(run_map(args), got)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_path_that_leads_out_of_the_map_is_harmless(chunks: int, use: Use) -> None:
    use(chunks=chunks)
    args = map_operands(1, 300, 20, 3, 2, torch.float32)
    path = args[7]
    missed = torch.zeros(2, 300, dtype=torch.bool)
    for step, wrong in ((0, -1), (100, 300), (200, 2**31 - 1), (299, -(2**31))):
        missed[1, path[1, step]] = True
        path[1, step] = wrong
    with guarded():
        y, *grads = run_map(args)
    assert torch.equal(y[0].isnan(), missed[..., None].expand_as(y[0]))  # nothing else writes there
    assert grads[2].isfinite().all()  # of A


@pytest.mark.gpu
class TestOnAGpu:
    """The same kernels where they belong."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("batch", "channels", "states", "length", "groups"),
        [
            (16, 72, 10, 1024, 4),
            (2, 384, 16, 197, 1),
            (4, 96, 1, 3136, 4),
            (1, 32, 256, 300, 1),
            (1, 16, 16, 16384, 1),
            (3, 9, 3, 65, 1),
        ],
    )
    def test_agrees_with_the_definition(
        self, batch: int, channels: int, states: int, length: int, groups: int, dtype: torch.dtype
    ) -> None:
        args = operands(batch, channels, states, length, groups, dtypes=(dtype,) * 4, device="cuda")
        with guarded():
            got = run(args)
        assert_close(got, by_chunked(args), 2e-5)
        for _ in range(3):
            assert_same(run(args), got)

    @pytest.mark.parametrize("constant", ["B", "C", "B C"])
    @pytest.mark.parametrize("softplus", [True, False])
    def test_every_form(self, constant: str, softplus: bool) -> None:
        args = operands(2, 40, 10, 301, constant=constant, softplus=softplus, device="cuda")
        args[0] = moved(args[0], "odd rows")
        with guarded():
            got = run(args, softplus)
        assert_close(got, by_chunked(args, softplus), 2e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("pixels", [144, 4096])
    def test_maps(self, pixels: int, dtype: torch.dtype) -> None:
        args = [t.cuda() for t in map_operands(1, pixels, 90, 10, 4, dtype)]
        with guarded():
            got = run_map(args)
        assert_same(run_map(args), got)
        if pixels > 1000:
            return
        want = [t.cuda() for t in map_definition([t.cpu() for t in args])]
        assert_close([got[0], *got[2:]], [want[0], *want[2:]], 2e-5)

    def test_can_be_captured_in_a_graph(self) -> None:
        args = operands(1, 16, 16, 16384, device="cuda")  # in chunks
        g = weights(args)
        want = run(args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run_with(*g, args)
        for result in got:
            result.fill_(math.nan)
        graph.replay()
        assert_same(got, want)

    @pytest.mark.parametrize("own", [False, True])
    def test_runs_in_any_thread_and_stream(self, own: bool) -> None:
        args = operands(2, 72, 10, 1024, 4, device="cuda")
        want = [run(args) for _ in range(2)][
            1
        ]  # twice, so that the thread gets memory without asking the driver
        g = weights(args)
        stream = torch.cuda.Stream() if own else torch.cuda.current_stream()
        torch.cuda.synchronize()
        got: list[Any] = []

        def work() -> None:
            with torch.cuda.stream(stream):
                y, last, saved = cuda.forward(*args, True, torch.float32, True)
                got.extend([y, last, *cuda.backward(*g, saved, *args, True, torch.float32)])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        torch.cuda.synchronize()
        assert_same(got, want)

    def test_serves_the_operator(self) -> None:
        args = operands(2, 72, 10, 1024, 4, device="cuda")
        want = run(args)
        leaves = [t.requires_grad_() for t in args]
        with use_backend("cuda"):
            y, last = selective_scan(*leaves[:6], None, leaves[6], True, True)
        grads = torch.autograd.grad((y, last), leaves, weights(args))
        assert_same([y, last, *grads], want)
