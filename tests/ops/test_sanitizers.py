"""The C++ kernels under the address and undefined-behaviour sanitizers, by every instruction set of this machine.

The library is compiled with them, and a process that has their runtime in front of all others calls it: here with
sizes next to those of vectors and tasks and buffers that end with what is in them, then by the kernels' own tests.
torch takes memory from ``posix_memalign``, which the runtime replaces, so a read behind a tensor ends the process.

Loads and stores of AVX-512 that have a mask are seen by neither; in their place the other instruction sets have
``memcpy``. For other tests than those below, by hand::

    python -m tests.ops.test_sanitizers tests/ops/test_quantize_cpu.py -k dls
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmquant.ops import native

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    # Half of the time of -O1, and a load stays whose result is not used.
    *("-O0", "-g1", "-w"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    # What a wrong pointer does is seen where it is used. Calls rather than code in line: these two take two thirds of
    # the time.
    *(
        "-fno-sanitize=null,object-size,pointer-overflow",
        "--param",
        "asan-instrumentation-with-call-threshold=0",
    ),
)
TESTS = tuple(f"tests/ops/test_deployed_{kernels}.py" for kernels in ("codes", "layers", "scan"))
LIBRARY = "SSMQUANT_SANITIZED"
"""Names the library to the process that runs it."""


def runtime() -> str:
    """The runtime of the compiler's address sanitizer.

    Raises:
        LookupError: there is none that could be used; the message says why.
    """
    if sys.platform != "linux":
        raise LookupError("sanitizers are used on Linux only")
    try:
        command = native._compiler()
        path = Path(native._finish(native._start([*command, "-print-file-name=libasan.so"])).strip())
    except native._Failed as error:
        raise LookupError(str(error)) from None
    if not path.is_absolute() or path.read_bytes()[:4] != b"\x7fELF":
        raise LookupError(f"{command[0]} comes without a shared address sanitizer (libasan.so)")
    tried = subprocess.run(
        [sys.executable, "-c", ""], env=environment(str(path)), capture_output=True, check=False
    )
    if tried.returncode:
        raise LookupError(f"the address sanitizer does not start here: {tried.stderr.decode()[-300:]}")
    return str(path)


def environment(preloaded: str) -> dict[str, str]:
    # Of an outer pytest, whose worker this is not.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return {**inherited, **options, "LD_PRELOAD": preloaded, "PYTHONPATH": str(ROOT), "CI": "1"}


def run(
    preloaded: str, folder: Path, arguments: list[str], **options: Any
) -> subprocess.CompletedProcess[str]:
    env = {**environment(preloaded), LIBRARY: str(native.build(folder, FLAGS))}
    command = [sys.executable, "-m", "tests.ops.test_sanitizers", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, text=True, check=False, **options)


@pytest.mark.slow
def test_kernels_read_and_write_what_is_theirs(tmp_path: Path) -> None:
    try:
        preloaded = runtime()
    except LookupError as error:
        pytest.skip(str(error))
    ran = run(preloaded, tmp_path, [], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ran.returncode == 0, ran.stdout[-20_000:]
    assert "all functions called" in ran.stdout, ran.stdout[-20_000:]


# ---- in the process with the runtime ---------------------------------------------------------------------------------


class Library(ctypes.CDLL):
    """Knows which of its functions were called."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.called = called = set[str]()
        plain: Any = self._FuncPtr

        class Function(plain):  # type: ignore[misc]
            _flags_, _restype_ = plain._flags_, plain._restype_

            def __call__(self, *args: Any) -> Any:
                called.add(self.__name__)
                return super().__call__(*args)

        self._FuncPtr = Function


def exported() -> set[str]:
    """What the sources export."""
    sources = "".join(path.read_text() for path in native._SOURCES.glob("*_cpu*"))
    return set(re.findall(r"SSMQUANT_EXPORT[\w\s*]*?(ssmquant_\w+)\(", sources))


def main(arguments: list[str]) -> int:
    """All that is here and ``TESTS``, or the tests named, in this process if it was started for that."""
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            return run(runtime(), Path(folder), arguments).returncode
    os.environ.pop("LD_PRELOAD")
    library = Library(os.environ.pop(LIBRARY))
    native._found = lambda: library  # type: ignore[assignment]
    # What the runtime says at the end is for stderr itself.
    options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = int(pytest.main([*options, *(arguments or TESTS)]))
    if code or arguments:
        return code
    torch.manual_seed(0)
    check_that_errors_end_the_process()
    call_deployed()
    call_quantize()
    call_selective_scan()
    missing = exported() - library.called
    print(f"never called: {missing}" if missing else "all functions called")
    return bool(missing)


def short(x: Tensor) -> Tensor:
    """As ``x``, but the memory ends before the last element."""
    flat = x.reshape(-1)[:-1].clone().numpy()
    strides = [s * x.element_size() for s in torch.empty(x.shape, device="meta").stride()]
    return torch.from_numpy(np.lib.stride_tricks.as_strided(flat, x.shape, strides))


def misaligned(x: Tensor) -> Tensor:
    room = torch.zeros(x.numel() * x.element_size() + 1, dtype=torch.uint8).numpy()[1:]
    return torch.from_numpy(room.view(np.float32).reshape(x.shape))


def check_that_errors_end_the_process() -> None:
    """Such an error of a kernel would: else all that follows shows nothing."""
    from ssmquant.ops.deployed import cpu as deployed
    from ssmquant.ops.quantize import cpu as quantize
    from ssmquant.ops.selective_scan import cpu as selective_scan
    from tests.ops.deployed_cpu import make_grid, make_weight
    from tests.ops.test_selective_scan_cpu import operands

    def linear(path: int, damage: Callable[[Tensor], Tensor]) -> None:
        codes = deployed.encode(torch.randn(1, 3, 1, 9), grid := make_grid(4, 1), path=path)
        weights, _ = make_weight((5, 9), 4, path)
        bias = damage(deployed.by_lanes(torch.randn(5), path))
        deployed.linear(codes, grid, weights, bias, path)

    def lsq(path: int, damage: Callable[[Tensor], Tensor]) -> None:
        quantize.lsq_forward(damage(torch.randn(33)), torch.tensor(0.3), torch.tensor(0.1), -8, 7, 0.0, path)

    def scan(path: int, damage: Callable[[Tensor], Tensor]) -> None:
        _, *others = operands(2, 5, 3, 33, dtype=torch.float32)
        u: Any = damage(torch.randn(2, 5, 33))
        selective_scan.forward(u, *others, True, torch.float32, False, path)  # type: ignore[arg-type]

    paths = range(len(deployed.paths()))
    for call, path in (*((linear, path) for path in paths), (lsq, 0), (scan, 0)):
        call(path, torch.Tensor.clone)
        said = said_at_its_end(lambda call=call, path=path: call(path, short))
        assert "ERROR: AddressSanitizer" in said, (call, path, said)
    said = said_at_its_end(lambda: linear(0, misaligned))
    assert "runtime error: load of misaligned address" in said, said


def said_at_its_end(call: Callable[[], None]) -> str:
    """What a child says that makes the call, which ends it."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 2)
            call()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        said = file.read().decode(errors="replace")
    return said if code else f"nothing that ended it: {said}"


def apart(x: Tensor) -> Tensor:
    """``x`` with others between its elements, and none behind the last."""
    memory = torch.full((max(2 * x.numel() - 1, 0),), math.nan, dtype=x.dtype)
    strides = [2 * s for s in torch.empty(x.shape, device="meta").stride()]
    return memory.as_strided(x.shape, strides).copy_(x)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """``x`` with its last axis, its second, or nothing next to each other in memory; no element too many."""
    yield x.contiguous()
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    if x.dim() > 3:
        yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield apart(x)


def call_deployed() -> None:
    from ssmquant.ops.deployed import Norm, ScanOperands, cpu
    from tests.ops.deployed_cpu import Core, decays, make_grid, make_weight

    w, v = torch.randn(2, 4)
    for path in range(len(cpu.paths())):

        def lanes(*shape: int, path: int = path) -> Tensor:
            return cpu.by_lanes(torch.randn(shape), path)

        for shape in ((1, 1, 1, 1), (2, 65, 1, 17), (1, 3, 5, 31), (2, 7, 17, 16), (1, 2, 1, 1031)):
            x, grid = torch.randn(shape), make_grid(4, shape[0], True)
            for given in layouts(x):
                cpu.encode(given, grid, path=path)
                cpu.encode(given, grid, by_group=True, path=path)
                cpu.encode(given, grid, (3, 1), path=path)
                cpu.ranges(cpu.moments(given, path), x[0].numel(), 3, w, v, 16, 1e-6)
            for norm in (None, Norm(None, None, 1e-5, True), Norm(*torch.randn(2, shape[-1]), 1e-5)):
                cpu.encode(x, grid, norm=norm, path=path)
                one, other = torch.randn(*shape[:2], 1, 2 * shape[-1]).chunk(2, -1)  # rows of one tensor
                for with_moments in (False, True):
                    cpu.gate(one, other, norm, with_moments=with_moments, path=path)
        for rows, inputs, outputs in (
            (1, 1, 1),
            (7, 15, 5),
            (65, 33, 18),
            (2, 64, 79),
            (7, cpu.MOST_INPUTS, 3),
        ):
            for clamped in (False, True):
                grid = make_grid(8, 2, clamped)
                codes = cpu.encode(torch.randn(2, rows, 1, inputs), grid, path=path)
                weights, _ = make_weight((outputs, inputs), 8, path, values=clamped)
                cpu.linear(codes, grid, weights, None, path)
                for act in (None, "silu", "gelu"):
                    cpu.linear(codes, grid, weights, lanes(outputs), path, act=act)
                if clamped:
                    continue
                x, z = torch.randn(2, rows, 2 * inputs).chunk(2, -1)
                norm, bias = Norm(*torch.randn(2, inputs), 1e-5), lanes(outputs)
                for given in layouts(torch.randn(1, rows, inputs)):
                    cpu.project(given, make_grid(8, 1), weights, bias, act="gelu", path=path)
                more = torch.randn(2, rows, outputs + 1)[..., 1:]
                for gate in (None, z):
                    for one in (None, norm):
                        for sum_with in (None, (more, None), (more, torch.randn(outputs))):
                            cpu.project(
                                x, make_grid(8, 1), weights, None, norm=one, z=gate, residual=sum_with, path=path
                            )  # fmt: skip
                for gain in (None, torch.randn(outputs)):
                    cpu.blend(more, gain, torch.randn(2, rows, outputs), torch.randn(2, outputs), path)
        windows = (
            ((3, 3), 1),
            ((3, 1), cpu.MOST_SPAN // 2),
            ((1, cpu.MOST_SPAN + 1), 1),
            ((5, 3), 2),
            ((1, 1), 1),
        )
        for height, width, channels in ((1, 1, 1), (9, 5, 17), (2, 67, 5)):
            image = torch.randn(2, height, width, channels)
            for kernel, apart_by in windows:
                dilation, taps = (apart_by, apart_by), math.prod(kernel)
                border = tuple((k - 1) * apart_by // 2 for k in kernel)
                grid = make_grid(4, 2)
                weights, _ = make_weight((taps, channels + 2, channels), 4, path, taps=True)
                codes = cpu.encode(image, grid, border, path=path)  # type: ignore[arg-type]
                for bias in (None, lanes(channels + 2)):
                    for stride in ((1, 1), (2, 3)):
                        cpu.conv(codes, grid, weights, bias, kernel, dilation, stride, border, path)  # type: ignore[arg-type]
                for given in layouts(image):
                    own = lanes(taps, channels), lanes(channels)
                    for act in (None, "silu", "gelu"):
                        cpu.depthwise(given, make_grid(4, 2, True), *own, kernel, dilation, act, path)
        for size, channels, states, rank in (
            *(((1, 1), 1, 1, 1), ((5, 7), 17, 2, 4), ((4, 8), 5, 10, 37), ((3, 3), 16, 16, 5)),
            *(((13, 5), 70, 17, 12), ((2, 3), 3, cpu.MOST_STATES, 3)),
        ):
            core = Core(2, *size, channels, states, rank, path)
            cpu.delta_moments(*core.rank, core.weights, path)
            for kind in ("ladder", "shared", "own"):
                a = decays(kind, core.directions, channels, states)
                for bits in (None, 2, 4, 8):
                    core.run(None if bits is None else make_grid(bits, 2, clamped=True), a)
            grids, rows = [make_grid(4, 1) for _ in range(6)], rank + 2 * states
            projection, _ = make_weight((core.directions * rows, channels), 4, path)
            places = 0, rank, rank + states
            for given in layouts(torch.randn(2, math.prod(size), channels)):
                for of_x in (None, grids[0]):
                    scan = ScanOperands(
                        grids[1], grids[2], core.weights, grids[3], a, grids[4], grids[5], core.skip, core.bias, True,
                        core.order, rank,
                    )  # fmt: skip
                    cpu.Core(tuple(given.shape), of_x, projection, places, scan, path)(given)
            operands = core.u, core.rank, core.weights, None, a, core.b, core.c, None, None, False, core.order
            cpu.scan(*operands, path)


def call_quantize() -> None:
    from ssmquant.ops.quantize import cpu
    from ssmquant.ops.quantize.forms import DLSRule, Groups
    from tests.ops.test_quantize_cpu import DTYPES, a_bank

    rule = DLSRule(4, -8, 1e-8, False, False, True)
    w, v = torch.randn(2, 4)
    numbers = torch.tensor(0.3), torch.tensor(0.1), -8, 7, 1e-8
    # A chunk of a group has 2 ** 14 elements, a piece of it 512, a row 16.
    groups = [(Groups(), n) for n in (1, 15, 17, 513, 16_385, 70_001)]
    groups += [(Groups(3, n), 6 * n) for n in (1, 17, 8_193)]
    for path in range(len(cpu.paths())):
        for by, count in groups:
            for dtype in DTYPES:
                x, g = torch.randn(2, count).to(dtype).unbind(0)
                x, g = x.clone(), g.clone()
                cpu.lsq_forward(x, *numbers, path)
                cpu.lsq_backward(g, x, *numbers, 1, path)
                _, ranges = cpu.dls_forward(x, w, v, by, rule, path)
                cpu.dls_range(x, w, v, by, rule, path)
                for need_x in (False, True):
                    cpu.dls_backward(g, x, w, v, ranges, by, rule, need_x, path)
        for bits, rfa in ((4, False), (2, True), (4, True), (5, True), (8, True)):
            bank, (x, alpha, beta, grid, thresholds) = a_bank(bits, rfa, True)
            cpu.bank_forward(x, alpha, beta, thresholds, bank, 1e-8, path)
            cpu.bank_backward(torch.randn(len(x)), x, alpha, beta, grid, thresholds, bank, 1e-8, path)
            one = replace(bank, counts=(7,), groups=(1,))
            few = x[:7].clone(), alpha[:1].clone(), beta[:1].clone()
            cpu.bank_forward(*few, thresholds[:1].clone(), one, 1e-8, path)
            cpu.bank_backward(torch.randn(7), *few, grid[:1].clone(), thresholds[:1].clone(), one, 1e-8, path)


def call_selective_scan() -> None:
    from ssmquant.ops.selective_scan import cpu
    from tests.ops.test_selective_scan_cpu import operands, run, state_dtype

    # A piece has 32 steps; with few channels, 1024 are cut in time.
    shapes = [(1, 1, 1, 1, None), (2, 17, 5, 33, 1), (2, 12, 4, 65, 4), (1, 8, 7, 32, 2), (1, 3, 2, 1057, 1)]
    forms: list[dict[str, Any]] = [
        {},
        {"constant": "B"},
        {"constant": "C"},
        {"constant": "B C", "without": "D bias"},
    ]
    for path in range(len(cpu.paths())):
        for shape in shapes:
            for i, form in enumerate(forms):
                for dtype in (torch.float32, torch.float64) if i else (torch.float16, torch.bfloat16):
                    args: list[Any] = operands(*shape, dtype=dtype, **form)
                    run(args, True, path)
                    if shape[3] > 1000:
                        continue
                    every = (layouts(t) if t.dim() > 2 else [t] * 4 for t in args if t is not None)
                    for moved in zip(*every, strict=False):
                        it = iter(moved)
                        run([None if t is None else next(it) for t in args], False, path)
            args = operands(*shape, dtype=torch.float32)
            y, _, saved = cpu.forward(*args, True, state_dtype(args), True, path)
            cpu.forward(*args, True, state_dtype(args), False, path)
            cpu.backward(y, None, saved, *args, True, state_dtype(args), path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
