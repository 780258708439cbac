"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for an H100 but not run.

Both go through a process of their own, since Triton reads TRITON_INTERPRET once, when it is imported.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

from tests.ops.interpreted import in_process, make_interpreter_work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

# B, D, N, L, G, the constant ones of B and C; small, for the interpreter takes milliseconds a step
CASES = {
    "vmamba": (1, 60, 1, 49, 1, ""),
    "mambair": (3, 6, 10, 49, 2, ""),
    "padded": (1, 72, 16, 33, 4, ""),
    "long": (1, 8, 4, 197, 2, ""),
    "constant_b": (2, 8, 4, 33, 1, "B"),
    "constant_c": (2, 8, 4, 33, 1, "C"),
    "constant": (2, 8, 4, 5, 1, "BC"),
}


def poisoned(empty: Any) -> Any:
    """What nothing has written to shows as NaN."""
    return lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan)


def interpret(case: str) -> None:
    """Forward and backward of one case against the definition in float64. Runs in the process with the interpreter."""
    make_interpreter_work()
    from ssmquant.ops.selective_scan import selective_scan_reference, triton

    triton._SCRATCH = 1 << 14  # several launches
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))
    batch, channels, states, length, groups, constant = CASES[case]
    torch.manual_seed(0)
    u, delta = torch.randn(2, batch, channels, length)
    b, c = (
        torch.randn(channels, states) if name in constant else torch.randn(batch, groups, states, length)
        for name in "BC"
    )
    a, d, bias = -3 * torch.rand(channels, states), torch.randn(channels), torch.randn(channels)
    for optional, softplus in ((True, True), (False, False)):
        delta = delta if softplus else delta.abs()
        args: list[Any] = [u, delta, a, b, c, *([d, bias] if optional else [None, None])]
        exact: list[Any] = [None if t is None else t.double().requires_grad_() for t in args]
        want, final = selective_scan_reference(*exact[:6], None, exact[6], softplus, True)
        g, g_last = torch.randn(u.shape), torch.randn(batch, channels, states)
        loss = (want * g).sum() + (final * g_last).sum()
        expected = torch.autograd.grad(loss, [t for t in exact if t is not None])
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            if dtype == torch.float16 and case != "mambair":
                continue
            used: list[Any] = [None if t is None else t.to(dtype) for t in args]
            y, last, saved = triton.forward(*used, softplus, torch.float32, True)
            grads = triton.backward(g.to(dtype), g_last, saved, *used, softplus, torch.float32)
            got = (y, last, *(t for t, like in zip(grads, args, strict=True) if like is not None))
            for i, (have, must) in enumerate(zip(got, (want, final, *expected), strict=True)):
                assert have.shape == must.shape
                error = float((have.double() - must).detach().norm() / must.detach().norm())
                assert error < tolerance, (case, dtype, i, error)


def compile_for_h100() -> None:
    """Compile all kernels in all variants; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmquant.ops.selective_scan import triton_kernels

    integers = ("batch", "L", "D", "G", "P", "piece0")
    for dtype, (inner, states, block_d, block_n), constant in (
        ("fp32", (72, 10, 16, 16), False),
        ("fp16", (48, 1, 64, 1), True),
        ("bf16", (384, 16, 16, 16), False),
    ):
        values: dict[str, Any] = {"DG": inner, "N": states, "T": 32, "BLOCK_D": block_d, "BLOCK_N": block_n}
        values |= {"CONSTANT_B": constant, "CONSTANT_C": constant, "SOFTPLUS": not constant}
        values |= {"BLOCK": 128, "REVERSE": constant}
        for name in triton_kernels.__all__:
            kernel = getattr(triton_kernels, name)
            names = [p.name for p in kernel.params]
            constants = {k: v for k, v in values.items() if k in names}
            operands = ("u", "dt", "b", "c", "y", "g")
            signature = {
                n: "constexpr"
                if n in constants
                else "i32"
                if n in integers
                else f"*{dtype if n in operands else 'fp32'}"
                for n in names
            }
            source = ASTSource(kernel, signature, constants)
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
            assert built.asm["cubin"]


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_agree_with_the_definition(case: str) -> None:
    in_process("test_selective_scan_triton", f"interpret({case!r})", TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h100() -> None:
    in_process("test_selective_scan_triton", "compile_for_h100()", TRITON_INTERPRET="0")
