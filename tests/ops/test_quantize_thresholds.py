"""The Triton kernels of PACT, RLQ and thresholds: in Triton's interpreter, compiled for an H100, on a GPU if any."""

from __future__ import annotations

import importlib.util
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmquant.ops.quantize import MOST_LEVELS, ThresholdRule, operators, serving
from ssmquant.quantizers import N2UQ, PACT, QUANTIZERS, RLQ
from ssmquant.quantizers.lsq import floored
from ssmquant.quantizers.n2uq import _N2UQFunction
from ssmquant.quantizers.pact import _PACTFunction
from ssmquant.quantizers.rfa import _RFAFunction
from ssmquant.quantizers.rlq import _RLQFunction
from tests.ops.interpreted import in_process, make_interpreter_work
from tests.ops.quantize_checks import close, one, same
from tests.ops.test_quantize_triton import poison
from tests.strategies import learnt, make

triton_only = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
NAMES = "pact_backward pact_forward soft_backward threshold_backward threshold_forward".split()


def like(x: Tensor) -> Tensor:
    """A gradient, not always with the strides of ``x``."""
    g = torch.randn(x.shape, device=x.device).to(x.dtype)
    return g if x.dim() < 3 else torch.empty_like(x).copy_(g)


def tolerance(x: Tensor) -> float:
    return 1e-5 if x.dtype == torch.float32 else 1e-2


def check_pact(module: ModuleType, x: Tensor, alpha: float, low: int, high: int) -> None:
    eps = 1e-3
    a = one(alpha, x.device)
    used = a.clamp(min=eps).reshape(())
    y = module.pact_forward(x, a, low, high, eps)
    same(y, _PACTFunction.apply(x, used, low, high, None))
    assert y.stride() == x.stride()
    g = like(x)
    dx, da = module.pact_backward(g, x, a, low, eps)
    leaves = [x.detach().requires_grad_(), used.requires_grad_()]
    gx, ga = torch.autograd.grad(_PACTFunction.apply(*leaves, low, high, None), leaves, g)
    same(dx, gx)
    assert dx.stride() == x.stride()
    assert da.shape == a.shape
    close(da.reshape(()), ga, 1e-5, float(g.double().norm()))
    for p, q in zip((dx, da), module.pact_backward(g, x, a, low, eps), strict=True):
        same(p, q)


def check_soft(module: ModuleType, x: Tensor, alpha: float, qmin: int, qmax: int) -> None:
    eps, copies = 1e-3, 3
    a, b = one(alpha, x.device), one(0.0, x.device)
    used = floored(a, eps).reshape(())
    g = like(x)
    u = x.double() / used.double()
    unclear = (u - u.round()).abs() < 1e-3  # the slope is the same on both sides, but not what is clipped
    unclear |= (u - u.floor() - 0.5).abs() < 1e-3
    g[unclear] = 0.0
    leaves = [x.double().requires_grad_(), used.double().requires_grad_()]
    out = _RLQFunction.apply(*leaves, b[0].double(), qmin, qmax, None, copies)
    gx, ga = torch.autograd.grad(out, leaves, g.double())
    dx, da = module.soft_backward(g, x, a, b, qmin, qmax, eps, copies)
    size = float(g.double().norm())
    close(dx, gx, tolerance(x), size * 1e-3)
    assert (dx.stride(), da.shape) == (x.stride(), a.shape)
    close(da.reshape(()), ga, 1e-5, size * max(-qmin, qmax) / math.sqrt(copies * x.numel() * qmax))
    for p, q in zip((dx, da), module.soft_backward(g, x, a, b, qmin, qmax, eps, copies), strict=True):
        same(p, q)


def check_threshold(module: ModuleType, x: Tensor, levels: int, signed: bool, alpha: float = 0.6) -> None:
    """As N2UQ uses it."""
    eps, device = 1e-3, x.device
    code_min = -(levels // 2) if signed else 0
    widths = 0.4 + torch.rand(levels - 1, device=device)
    grid = torch.cat((widths.new_zeros(1), widths.cumsum(0))) + code_min
    thresholds = (grid[:-1] + grid[1:]) / 2
    a, b, c = (one(t, device) for t in (alpha, -0.15, 0.45))
    rule = ThresholdRule(levels, code_min, eps)
    y = module.threshold_forward(x, a, b, c, thresholds, rule)
    scalars = [t.reshape(()) for t in (a.clamp(min=eps), b, c.clamp(min=eps))]
    same(y, _N2UQFunction.apply(x, *scalars, grid, thresholds, code_min, None))
    assert y.stride() == x.stride()

    g = like(x)
    u = ((x.double() + scalars[1]) / scalars[0].double())[..., None]
    g[((u - grid).abs() < 1e-3).any(-1) | ((u - thresholds).abs() < 1e-3).any(-1)] = 0.0
    leaves = [t.double().requires_grad_() for t in (x, *scalars, grid)]
    wanted = torch.autograd.grad(
        _N2UQFunction.apply(*leaves, thresholds.double(), code_min, None), leaves, g.double()
    )
    got = module.threshold_backward(g, x, a, b, c, grid, thresholds, rule)
    compare(got, wanted, x, g, max(1.0, float(u.abs().max())) * levels)
    for p, q in zip(got, module.threshold_backward(g, x, a, b, c, grid, thresholds, rule), strict=True):
        same(p, q)


def check_as_rfa(module: ModuleType, x: Tensor, bits: int, alpha: float) -> None:
    """As RFA could use it: gamma is alpha."""
    eps, device, qmin, qmax = 1e-3, x.device, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grid = qmin - 0.3 + (0.4 + torch.rand(2**bits, device=device)).cumsum(0)
    thresholds = (grid[:-1] + grid[1:]) / 2
    a, b = one(alpha, device), one(0.1, device)
    used = floored(a, eps).reshape(())
    rule = ThresholdRule(2**bits, qmin, eps, True, 0.1, qmin, qmax)
    y = module.threshold_forward(x, a, b, a, thresholds, rule)
    same(y, _RFAFunction.apply(x, used, b[0], grid, thresholds, qmin, qmax, None, 0))
    g = like(x)
    u = ((x.double() + b.double()) / used.double())[..., None]
    g[((u - grid).abs() < 1e-3).any(-1) | ((u - thresholds).abs() < 1e-3).any(-1)] = 0.0
    g[((u - qmin).abs() < 1e-3).any(-1) | ((u - qmax).abs() < 1e-3).any(-1)] = 0.0
    leaves = [t.double().requires_grad_() for t in (x, used, b[0], grid)]
    out = _RFAFunction.apply(*leaves, thresholds.double(), qmin, qmax, None, 0)
    wanted = torch.autograd.grad(out, leaves, g.double())
    dx, da, db, dc, dgrid = module.threshold_backward(g, x, a, b, a, grid, thresholds, rule)
    compare((dx, da + dc, db, dgrid), wanted, x, g, 4.0 * 2**bits)


def compare(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], x: Tensor, g: Tensor, scale: float) -> None:
    size = float(g.double().norm())
    assert got[0].stride() == x.stride()
    close(got[0], wanted[0], tolerance(x), size * 1e-3)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        close(a.reshape(b.shape), b, 1e-5, size * scale)


def check_all(module: ModuleType, device: Any, large: bool) -> None:
    torch.manual_seed(0)
    # The interpreter cuts bfloat16 off instead of rounding.
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if large else [])):
        shapes: list[tuple[int, ...]] = [(1,), (3, 5, 7), (2, 23, 60)]
        for shape in [*shapes, *([(16, 4, 72, 2304), (3, 3136, 180)] if large else [])]:
            values = (2 * torch.randn(shape, device=device)).to(dtype)
            for x in (values, values.transpose(0, -1)):
                for alpha, low, high in ((1.7, -7, 7), (2.3, 0, 15), (1e-9, -1, 1), (-0.2, 0, 3)):
                    check_pact(module, x, alpha, low, high)
                for alpha, low, high in ((0.5, -8, 7), (-0.7, -2, 1), (1e-9, 0, 255)):
                    check_soft(module, x, alpha, low, high)
                for levels, signed in ((4, True), (8, False), (16, True)):
                    check_threshold(module, x, levels, signed)
                check_as_rfa(module, x, 2, -0.5)
                check_as_rfa(module, x, 4, 0.4)
        check_not_finite(module, dtype, device)
    check_threshold(module, torch.randn(40, device=device), 4, True, -0.3)  # raised to eps


def check_not_finite(module: ModuleType, dtype: torch.dtype, device: Any) -> None:
    x = torch.randn(4, 6, 5, device=device).to(dtype).transpose(1, 2)
    x[0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    a, b = one(0.5, device), one(0.0, device)
    grid = torch.arange(-2.0, 2.0, device=device)
    rule = ThresholdRule(4, -2, 1e-9)
    y = module.threshold_forward(x, a, b, a, grid[:-1] + 0.5, rule)
    assert y[0, 0, :3].tolist() == pytest.approx([math.nan, 0.5, -1.0], nan_ok=True)
    g = torch.ones_like(x)
    dx, *_, dgrid = module.threshold_backward(g, x, a, b, a, grid, grid[:-1] + 0.5, rule)
    assert dx[0, 0, :3].tolist() == [0.0, 0.0, 0.0]
    assert dgrid.isfinite().all()
    ties = (torch.arange(-9, 9, device=device) / 4).to(dtype)
    want = _N2UQFunction.apply(ties, a[0], b[0], a[0], grid, grid[:-1] + 0.5, -2, None)
    same(module.threshold_forward(ties, a, b, a, grid[:-1] + 0.5, rule), want)
    dgamma = module.threshold_backward(torch.ones_like(ties), ties, a, b, a, grid, grid[:-1] + 0.5, rule)[3]
    assert float(dgamma) == float((want / 0.5).sum())
    y = module.pact_forward(x, a, -7, 7, 1e-9)
    assert y[0, 0, :3].tolist() == pytest.approx([math.nan, 0.5, -0.5], nan_ok=True, rel=1e-3)
    dx, da = module.pact_backward(g, x, a, -7, 1e-9)
    assert dx[0, 0, :3].tolist() == [0.0, 0.0, 0.0]
    assert da.isfinite().all()
    dx, da = module.soft_backward(g, x, a, b, -8, 7, 1e-9, 0)
    assert dx[0, 0, 1:3].tolist() == [0.0, 0.0]


def is_fused(y: Tensor) -> bool:
    """A node of the kernels made it, or what it was cast from."""
    node = y.grad_fn
    while node is not None and "Function" not in node.name() and "Fused" not in node.name():
        node = node.next_functions[0][0]
    return node is not None and "Fused" in node.name()


def check_quantizers(device: Any) -> None:
    """The quantizers go to the kernels, and get from them what their own arithmetic gives."""
    from ssmquant.ops import use_backend

    torch.manual_seed(0)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("pact", {}),
        ("n2uq", {}),
        ("rlq", {}),
        ("rlq", {"channel_axis": 2, "channels": 60}),
    ]
    for name, options in cases:
        for dtype in (torch.float32, torch.float16):
            x = torch.nn.functional.silu(2 * torch.randn(2, 23, 60)).to(device)
            q = QUANTIZERS[name](4, **options).to(device)
            q.initialize(x)
            learnt(q, 1, 0.02)
            tau = getattr(q, "tau", None)
            if tau is not None:
                tau.data.copy_(0.01 * torch.randn(60))
            x, g = x.to(dtype).requires_grad_(), torch.randn(2, 23, 60, device=device).to(dtype)
            sides = []
            for choice in ("auto", "chunked"):
                with use_backend(choice, op="quantize"):
                    y = q(x)
                    sides.append((y, torch.autograd.grad(y, [x, *q.parameters()], g)))
            (y, got), (want, grads) = sides
            same(y, want)
            assert is_fused(y)
            assert not is_fused(want)
            size = float(g.float().norm())
            close(got[0], grads[0], tolerance(x), 1e-3 * size)
            for a, b in zip(got[1:], grads[1:], strict=True):
                close(a, b, 1e-5, size)  # sums of terms of both signs, of which little may be left


def interpret() -> None:
    make_interpreter_work()
    from ssmquant.ops.quantize import choice, triton

    choice._automatic = lambda device: (triton, triton.NAME)  # type: ignore[assignment]
    check_quantizers("cpu")
    poison()
    check_all(triton, "cpu", False)


def compile_for_h100() -> None:
    """Compile all kernels in a few variants; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmquant.ops.quantize import triton_threshold_kernels as kernels

    floats = ("low", "high", "ratio", "eps", "qmin", "qmax", "code_min", "tail")
    for dtype, flag, levels in (("fp32", True, 16), ("bf16", False, 4)):
        for name in kernels.__all__:
            kernel = getattr(kernels, name)
            block = 128 if name == "threshold_backward" else 1024
            values = {"BLOCK": block, "LEVELS": levels, "SIGNED": flag, "KEEP_SIGN": flag}
            signature = {}
            for n in [p.name for p in kernel.params]:
                if n in values:
                    kind = "constexpr"
                elif n in ("n", "programs"):
                    kind = "i32"
                elif n in floats:
                    kind = "fp32"
                else:
                    kind = f"*{dtype}" if n in ("x", "y", "g", "dx") else "*fp32"
                signature[n] = kind
            constants = {k: v for k, v in values.items() if k in signature}
            built = triton.compile(
                ASTSource(kernel, signature, constants),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": 4, "enable_fp_fusion": False},
            )
            assert built.asm["cubin"]
            assert ".local" not in built.asm["ptx"]


def test_who_has_them() -> None:
    """The back ends of a CPU and of torch.compile have not: plain PyTorch serves."""
    x = torch.randn(3)
    for module in (serving(x), operators):
        assert not any(hasattr(module, name) for name in NAMES)
    for q in (make("pact", 4, x), make("n2uq", 4, x), make("rlq", 4, x)):
        assert isinstance(q, (PACT, N2UQ, RLQ))
        assert q(x).isfinite().all()
    assert MOST_LEVELS == 16


@triton_only
@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_quantizers() -> None:
    in_process("test_quantize_thresholds", "interpret()", TRITON_INTERPRET="1")


@triton_only
@pytest.mark.slow
def test_kernels_compile_for_an_h100() -> None:
    in_process("test_quantize_thresholds", "compile_for_h100()", TRITON_INTERPRET="0")


@triton_only
@pytest.mark.gpu
def test_on_a_gpu() -> None:
    from ssmquant.ops.quantize import triton

    check_all(triton, "cuda", True)
    check_quantizers("cuda")
