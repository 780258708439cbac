"""The Triton kernels of fake quantization: in Triton's interpreter, compiled for an H100, on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmquant.ops.quantize import DLSRule
from tests.ops.interpreted import in_process, make_interpreter_work
from tests.ops.quantize_checks import check_bank, check_dls, check_dls_bank, check_lsq, same

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def coefficients(bits: int, device: Any) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    w = torch.tensor([1 / top, 3 / top, -0.02, 0.03], device=device)
    return w, torch.tensor([-1.0, 0.1, 0.05, -0.05], device=device)


def rules() -> Iterator[tuple[int, DLSRule]]:
    for bits in (2, 4, 8):
        low = -(2 ** (bits - 1))
        yield bits, DLSRule(bits, low, 1e-12, False, False, True)
        yield bits, DLSRule(bits, low, 1e-12, False, True, True, copies=4)
        yield bits, DLSRule(bits, 0, 1e-6, True, True, False)


def check_all(module: ModuleType, device: Any, large: bool) -> None:
    """``large`` needs a GPU: the interpreter takes a second for 100,000 elements."""
    torch.manual_seed(0)
    # The interpreter cuts bfloat16 off instead of rounding.
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if large else [])):
        for shape in [(1,), (2, 49, 60), *([(16, 4, 72, 2304), (3, 3136, 180)] if large else [])]:
            x = (3 * torch.randn(shape, device=device)).to(dtype)
            for alpha, beta, qmin, qmax in ((0.5, 0.1, -8, 7), (-0.7, -0.2, -2, 1), (1e-9, 0.0, 0, 255)):
                check_lsq(module, x, alpha, beta, qmin, qmax)
        x = torch.randn(4, 6, 5, device=device).to(dtype).transpose(1, 2)
        x[0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        y = module.lsq_forward(x, *(torch.tensor([s], device=device) for s in (0.5, 0.0)), -8, 7, 0.0)
        assert y[0, 0, :3].tolist() == pytest.approx([math.nan, 3.5, -4.0], nan_ok=True)
        for bits, rule in rules():
            if not large and (dtype != torch.float32 or bits == 8):
                continue
            w, v = coefficients(bits, device)
            cases: list[tuple[Tensor, int | None]] = [
                (torch.randn(1, device=device), None),
                (torch.randn(3, 49, 7, device=device), 0),
                (5 + torch.randn(2, 3, 50, device=device), 1),
                (torch.randn(2, 30, 5, device=device).transpose(1, 2), 2),
                (torch.randn(2, 1100, device=device).exp(), 0),
                (torch.full((2, 9), 3.0, device=device), 0),
                (1000 + torch.randn(9000, device=device), None),
            ]
            if large:
                cases += [
                    (torch.randn(16, 4, 72, 2304, device=device), 0),
                    (torch.randn(3, 3136, 180, device=device), None),
                ]
            for x, axis in cases:
                check_dls(module, x.to(dtype), w, v, axis, rule)
    w, v = coefficients(4, device)
    x = torch.randn(3, 4000, device=device)
    x[1, 7] = math.nan
    y = module.dls_forward(x, w, v, *dls_arguments(x))[0]
    assert y.isnan().any(1).tolist() == y.isnan().all(1).tolist() == [False, True, False]
    shapes = [(7,), (12, 60), (60, 3, 3), (1, 1)]
    for bits in (2, 4, 8) if large else (2, 4):
        for rfa in (True, False):
            for by_channel in (True, False):
                check_bank(module, [*shapes, (144, 720)] if large else shapes, bits, rfa, by_channel, device)
    for _, rule in rules():
        if rule.floor_first or (not large and rule.bits == 8):
            continue
        check_dls_bank(module, (1, 7, 300, 2600, *([23040, 5760] * 36 if large else [])), rule, device)
    check_views(module, device)


def check_views(module: ModuleType, device: Any) -> None:
    """Addresses that are no multiples of 16 bytes, after those that are: compiled code depends on them."""
    w, v = coefficients(4, device)
    alpha, beta = (torch.tensor([0.0, s], device=device)[1:] for s in (0.3, 0.1))
    rule = DLSRule(4, -8, 1e-12, False, False, True)
    flat = torch.randn(3 * 4000 + 4, device=device)
    for at in (0, 1, 2, 4):
        x = flat[at : at + 12000]
        g = flat.flip(0)[:12000].clone()
        for _ in range(2):
            y, ranges = module.dls_forward(x, w, v, *dls_arguments(x.view(3, 4000))[:1], rule)
            want, its = module.dls_forward(x.clone(), w, v, *dls_arguments(x.view(3, 4000))[:1], rule)
            same(y, want)
            same(ranges, its)
            same(
                module.lsq_forward(x, alpha, beta, -8, 7, 1e-9),
                module.lsq_forward(x.clone(), alpha.clone(), beta.clone(), -8, 7, 1e-9),
            )
            got = module.lsq_backward(g, x, alpha, beta, -8, 7, 1e-9, 1)
            for p, q in zip(
                got,
                module.lsq_backward(g, x.clone(), alpha.clone(), beta.clone(), -8, 7, 1e-9, 1),
                strict=True,
            ):
                same(p, q)


def dls_arguments(x: Tensor) -> tuple[Any, ...]:
    from ssmquant.ops.quantize import Groups

    return Groups(x.shape[0], x.stride(0)), DLSRule(4, -8, 1e-12, False, False, True)


def interpret() -> None:
    make_interpreter_work()
    from ssmquant.ops.quantize import triton

    poison()
    check_all(triton, "cpu", False)


def poison() -> None:
    """What nothing has written to shows as NaN."""

    def poisoned(empty: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Any:
            t = empty(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() else t

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))


def compile_for_h100() -> None:
    """Compile all kernels in a few variants; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmquant.ops.quantize import triton_bank_kernels, triton_kernels

    integers = ("n", "size", "inner", "tiles", "programs", "groups", "blocks", "longest")
    floats = ("qmin", "qmax", "eps", "codes", "scale", "freedom")
    tables = ("starts", "lengths", "group_of", "weight_of", "first_block", "sizes")
    for dtype, flag, levels in (("fp32", True, 16), ("bf16", False, 0)):
        values: dict[str, Any] = {
            "BLOCK": 1024,
            "TILE": 4096,
            "TILES": 8,
            "LEVELS": levels,
            "COLUMNS": 34,
            "WIDTH": 64,
        }
        for name in ("CONTIGUOUS", "ONE", "FLOOR_FIRST", "VALUES", "DEAD_PASS", "NEED_X"):
            values[name] = flag
        values["VALUES"] = values["NEED_X"] = True
        for module, name in [(m, n) for m in (triton_kernels, triton_bank_kernels) for n in m.__all__]:
            kernel = getattr(module, name)
            names = [p.name for p in kernel.params]
            constants = {k: v for k, v in values.items() if k in names}
            signature = {}
            for n in names:
                kind = "*fp32"
                if n in constants:
                    kind = "constexpr"
                elif n in integers:
                    kind = "i32"
                elif n in floats:
                    kind = "fp32"
                elif n in tables:
                    kind = "*i32"
                elif n in ("x", "y", "g", "dx") and module is triton_kernels:
                    kind = f"*{dtype}"
                signature[n] = kind
            options = {"num_warps": 4, "enable_fp_fusion": False}
            built = triton.compile(
                ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options
            )
            assert built.asm["cubin"]


class Compiled:
    """Stands for a kernel that counts how often Triton itself is asked, and for what it compiles."""

    def __init__(self, compiles: bool = True) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            self.asked.append((grid, args, options))
            return self if self.compiles else None

        def run(*args: Any, stream: int) -> None:
            self.ran.append((grid, args, stream))

        return lambda *args, **options: (
            run(*args, **options) if "stream" in options else ask(*args, **options)
        )


def test_what_is_compiled_is_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmquant.ops import triton_launch

    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    fake = Compiled()
    kernel = triton_launch.Kernel(fake)
    x, y = torch.zeros(64), torch.zeros(64)
    launches: list[tuple[Any, ...]] = [
        ((2, 1, 1), (x, y), (64, 1.0), (True, 32), 4),
        ((2, 1, 1), (x, y), (1, 1.0), (True, 32), 4),  # integers
        ((2, 1, 1), (x[1:], y), (64, 1.0), (True, 32), 4),  # alignment, of each
        ((2, 1, 1), (x, y[1:]), (64, 1.0), (True, 32), 4),
        ((2, 1, 1), (x, y), (64, 1.0), (False, 32), 4),  # constants
        ((2, 1, 1), (x, y), (64, 1.0), (True, 32), 8),
        ((2, 1, 1), (x.half(), y), (64, 1.0), (True, 32), 4),
    ]
    for _ in range(2):
        for launch in launches:
            kernel(*launch)
    assert len(fake.asked) == len(fake.ran) == len(launches)
    for launch, (grid, args, options), (again, same_args, stream) in zip(
        launches, fake.asked, fake.ran, strict=True
    ):
        assert grid == again == launch[0]
        assert len(args) == len(same_args) == 6
        assert options == {"num_warps": launch[4], "enable_fp_fusion": False}
        assert stream == 7
    kernel((5, 1, 1), (x[4:], y), (64, 1.0), (True, 32), 4)  # another grid, other addresses alike
    assert fake.ran[-1][0] == (5, 1, 1)
    monkeypatch.setattr(triton_launch, "_MOST", 3)
    for n in range(20):
        kernel((2, 1, 1), (x, y), (n, 1.0), (True, 32), 4)
    assert len(kernel.compiled) <= 3
    interpreted = triton_launch.Kernel(Compiled(compiles=False))
    interpreted(*launches[0])
    assert not interpreted.compiled


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_quantizers() -> None:
    in_process("test_quantize_triton", "interpret()", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compile_for_an_h100() -> None:
    in_process("test_quantize_triton", "compile_for_h100()", TRITON_INTERPRET="0")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    from ssmquant.ops.quantize import triton

    check_all(triton, "cuda", True)
