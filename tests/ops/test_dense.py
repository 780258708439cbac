"""Linear maps on the CPU; layer norm in Triton's interpreter, compiled for an H100; both on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmquant.ops import dense
from tests.ops.interpreted import in_process, make_interpreter_work

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

HALVES = (torch.float16, torch.bfloat16)
EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-14}


def assert_close(got: Tensor, want: Tensor, tolerance: float, least: float = 1e-6) -> None:
    """Relative to the norm, or to ``least``, with NaN where NaN is wanted."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    assert got.isnan().equal(want.isnan())
    got, want = got.nan_to_num(), want.nan_to_num()
    error = (got - want).norm() / want.norm().clamp(min=least)
    assert error <= tolerance, f"relative error {error:.1e}"


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def results(
    f: Callable[..., Tensor], tensors: list[Tensor | None], g: Tensor, amp: torch.dtype | None = None
) -> list[Tensor]:
    """The result of ``f``, and the gradients of all tensors, in leaves of their layout."""
    leaves = [None if t is None else leaf(t) for t in tensors]
    device = g.device.type
    with torch.autocast(device, dtype=amp or torch.bfloat16, enabled=amp is not None):
        y = f(*leaves)
    y.backward(g.to(y.dtype))
    grads = [t.grad for t in leaves if t is not None]
    assert all(grad is not None for grad in grads)
    return [y, *(grad for grad in grads if grad is not None)]


def check(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: list[Tensor | None],
    amp: torch.dtype | None = None,
    factor: float = 4.0,
) -> None:
    """Dtypes as ``plain`` has them, values as it has them in float64."""
    exact = [None if t is None else t.double() for t in tensors]
    g = torch.randn_like(plain(*exact))
    if amp is not None:
        g = g.to(amp)
    got = results(ours, tensors, g, amp)
    assert [t.dtype for t in got] == [t.dtype for t in results(plain, tensors, g, amp)]
    tolerance = factor * max(EPSILON[t.dtype] for t in [*got, g])
    for a, b in zip(got, results(plain, exact, g), strict=True):
        assert_close(a, b, tolerance, max(float(g.norm()), 1e-6))  # the usual size: sums may cancel out


# ---- linear --------------------------------------------------------------------------------------------------------


def split(pieces: int) -> Callable[..., Tensor]:
    return lambda x, weight, bias=None: dense._split_linear(x, weight, bias, pieces)


@given(
    batch=st.lists(st.integers(0, 9), max_size=3),
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    pieces=st.integers(1, 12),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALVES]),
)
def test_linear_in_pieces(
    batch: list[int], n: int, k: int, pieces: int, bias: bool, dtype: torch.dtype
) -> None:
    x, w, b = torch.randn(*batch, k), torch.randn(n, k), torch.randn(n) if bias else None
    check(split(pieces), F.linear, [None if t is None else t.to(dtype) for t in (x, w, b)])


@pytest.mark.parametrize("pieces", [2, 7])
def test_linear_of_other_layouts(pieces: int) -> None:
    w, b = torch.randn(6, 5).t(), torch.randn(10)[::2]
    for x in (
        torch.randn(3, 6, 11).transpose(1, 2),
        torch.randn(6, 40).t(),
        torch.randn(4, 1, 6).expand(4, 9, 6),
    ):
        check(split(pieces), F.linear, [x, w, b])
    x, w = leaf(torch.randn(4, 9, 5)), leaf(torch.randn(7, 5))
    split(pieces)(x, w).sum().backward()  # an expanded gradient
    assert x.grad is not None
    assert w.grad is not None
    assert_close(w.grad, x.detach().sum((0, 1)).expand(7, 5), 1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_under_autocast(kind: torch.dtype, bias: bool) -> None:
    x, w, b = torch.randn(3, 50, 8).to(kind), torch.randn(5, 8), torch.randn(5) if bias else None
    check(split(7), F.linear, [x, w, b], amp=torch.bfloat16)


def test_autocast_rounds_the_weight_gradient_once_and_leaves_nothing_in_its_cache() -> None:
    x, w = torch.rand(512, 8), leaf(torch.randn(5, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = split(64)(x, w)
        again = F.linear(x, w)  # would take the weight from the cache
        y.sum().backward()  # and the backward pass, against advice, in here
    assert w.grad is not None
    got, w.grad = w.grad, None
    assert_close(got, x.bfloat16().double().sum(0).expand(5, 8), 1e-3)
    assert not got.equal(got.bfloat16().float())
    again.sum().backward()
    assert w.grad is not None
    assert_close(w.grad, got, 1e-2)


def test_linear_is_twice_differentiable_and_may_be_modified() -> None:
    tensors = [leaf(torch.randn(*shape).double()) for shape in ((2, 7, 3), (4, 3), (4,))]
    assert torch.autograd.gradcheck(split(5), tensors)
    assert torch.autograd.gradgradcheck(split(5), tensors)
    for x in (torch.randn(20, 3), torch.randn(4, 5, 3)):
        w = leaf(torch.randn(4, 3))
        y = split(5)(x, w)
        y.relu_()
        y.sum().backward()
        assert w.grad is not None
        want = (F.linear(x, w.detach()) > 0).flatten(0, -2).float().t() @ x.flatten(0, -2)
        assert_close(w.grad, want, 1e-5)


def test_gradients_that_nobody_needs() -> None:
    x, w, b = torch.randn(20, 3), leaf(torch.randn(4, 3)), torch.randn(4)
    split(5)(x, w, b).sum().backward()
    assert w.grad is not None
    assert x.grad is b.grad is None
    x = leaf(x)
    (grad,) = torch.autograd.grad(split(5)(x, w, b).sum(), x)
    assert_close(grad, w.detach().sum(0).expand(20, 3), 1e-6)


def test_pieces() -> None:
    assert dense._pieces(36864, 60, 60) == 256
    assert dense._pieces(36864, 120, 60) == 128
    assert dense._pieces(36864, 300, 300) == 9  # of at most 10
    assert dense._pieces(36864, 512, 512) == 1
    assert dense._pieces(4095, 60, 60) == 1
    assert dense._pieces(4096, 60, 60) == 32
    assert dense._pieces(40009, 60, 60) == 264  # a prime
    assert dense._pieces(4096, 0, 60) == 1
    for rows in range(4096, 40000, 1001):
        for n, k in ((16, 16), (60, 180), (300, 70), (1000, 64)):
            pieces, tiles = dense._pieces(rows, n, k), -(-n // 64) * -(-k // 64)
            assert rows // pieces >= 128
            assert pieces * tiles <= 264


def test_what_goes_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as if it were a GPU."""
    x, w, b = torch.randn(2, 2048, 6), leaf(torch.randn(4, 6)), leaf(torch.randn(4))
    assert not dense.serves(x)
    assert dense._pieces_for(x, w, b) == 1
    monkeypatch.setattr(dense, "serves", dense._plain)
    assert dense._pieces_for(x, w, b) == dense._pieces_for(x, w, None) == 32
    assert "_Linear" in str(dense.linear(x, w, b).view(-1, 4)._base.grad_fn)  # type: ignore[union-attr]
    assert dense._pieces_for(x, nn.Parameter(w.detach()), b) == 32
    assert dense._pieces_for(x.double(), w.double(), None) == 1
    assert dense._pieces_for(x, w.detach(), b) == 1
    assert dense._pieces_for(x[:1], w, b) == 1
    assert dense._pieces_for(x.bfloat16(), w, b) == 1
    assert dense._pieces_for(x, w, b.bfloat16()) == 1
    assert dense._pieces_for(x, w[0], None) == 1
    assert dense._pieces_for(x, w[:, :3], None) == 1
    assert dense._pieces_for(x, w, b[:1]) == 1
    assert dense._pieces_for(x.as_subclass(Subclass), w, b) == 1
    with torch.autocast("cpu"):
        assert dense._pieces_for(x.bfloat16(), w, b) == 32
    with torch.no_grad():
        assert dense._pieces_for(x, w, b) == 1
    torch.func.grad(lambda v: dense.linear(v, w, b).sum())(x)
    torch.func.vmap(lambda v: dense.linear(v, w, b))(x[None])
    _, tangent = torch.func.jvp(lambda v: dense.linear(v, w, b), (x,), (x,))
    assert_close(tangent, F.linear(x, w), 1e-6)
    with torch.autograd.forward_ad.dual_level():
        dense.linear(torch.autograd.forward_ad.make_dual(x, x), w, b)
    compiled = torch.compile(dense.linear, backend="aot_eager", fullgraph=True)
    compiled(x, w, b).sum().backward()
    traced = torch.fx.symbolic_trace(lambda x: dense.linear(x, w, b))
    assert F.linear in [node.target for node in traced.graph.nodes]


class Subclass(Tensor):
    pass


# ---- grouped and shared --------------------------------------------------------------------------------------------


def einsum(equation: str) -> Callable[..., Tensor]:
    return lambda *operands: torch.einsum(equation, *operands)


GROUPED, SHARED = einsum("b k r l, k d r -> b k d l"), einsum("b d l, k c d -> b k c l")
SIZES = [(2, 4, 3, 5, 11), (1, 1, 1, 1, 1), (3, 2, 7, 4, 1), (0, 2, 3, 4, 5), (2, 3, 2, 4, 0)]


@pytest.mark.parametrize(("b", "g", "n", "k", "length"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_and_shared(b: int, g: int, n: int, k: int, length: int, dtype: torch.dtype) -> None:
    w = torch.randn(g, n, k).to(dtype)
    check(dense.grouped_linear, GROUPED, [torch.randn(b, g, k, length).to(dtype), w])
    check(dense.shared_linear, SHARED, [torch.randn(b, k, length).to(dtype), w])
    assert dense.shared_linear(torch.randn(b, k, length).to(dtype), w).is_contiguous()


def test_grouped_and_shared_of_other_layouts_and_under_autocast() -> None:
    w = torch.randn(5, 4, 3).transpose(0, 2)
    x = torch.randn(2, 11, 5, 3).permute(0, 3, 2, 1)
    for amp in (None, torch.bfloat16):
        check(dense.grouped_linear, GROUPED, [x, w], amp)
        check(dense.shared_linear, SHARED, [x[:, 0], w], amp)
    tensors = [leaf(x.double()), leaf(w.double())]
    assert torch.autograd.gradgradcheck(dense.grouped_linear, tensors)
    assert torch.autograd.gradgradcheck(dense.shared_linear, [leaf(tensors[0][:, 0]), tensors[1]])


# ---- layer norm ----------------------------------------------------------------------------------------------------


def norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def test_layer_norm_elsewhere_is_pytorchs() -> None:
    x, w, b = (leaf(torch.randn(*shape)) for shape in ((3, 4, 5), (5,), (5,)))
    assert dense.layer_norm(x, (5,), w, b, 1e-3).equal(F.layer_norm(x, (5,), w, b, 1e-3))
    assert dense.layer_norm(x, [4, 5]).equal(F.layer_norm(x, [4, 5]))
    with pytest.raises(RuntimeError):
        dense.layer_norm(x, (4,))


@needs_triton
def test_which_norms_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as if it were a GPU."""
    from ssmquant.ops.quantize import triton

    monkeypatch.setattr(dense, "serves", dense._plain)
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    x, w = torch.randn(3, 4, 5), torch.randn(5)
    serves = dense._norm_serves
    assert serves(x, [5], w, w)
    assert serves(x, (5,), None, None)
    assert serves(x.bfloat16(), x.shape[-1:], w, w.bfloat16())
    assert not serves(x, (5,), w, None)
    assert not serves(x, (4, 5), None, None)
    assert not serves(x[:0], (5,), w, w)
    assert not serves(x, (5,), w[:1], w)
    assert not serves(x, (5,), w.bfloat16(), w)
    assert not serves(x.double(), (5,), w.double(), w.double())
    assert not serves(torch.randn(1, 8193), (8193,), None, None)
    assert not serves(x.as_subclass(Subclass), (5,), w, w)


def check_norm(
    x: Tensor, w: Tensor | None, b: Tensor | None, dtype: torch.dtype | None = None, factor: float = 4.0
) -> None:
    """``dtype``: of the result, if not x's."""

    def ours(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        out: Tensor = dense._LayerNorm.apply(x.contiguous(), w, b, 1e-5, dtype or x.dtype)
        return out

    tensors = [x, w, b]
    exact = [None if t is None else t.double() for t in tensors]
    g = torch.randn_like(x).to(dtype or x.dtype)
    got = results(ours, tensors, g)
    assert [t.dtype for t in got] == [g.dtype, *(t.dtype for t in tensors if t is not None)]
    for a, want in zip(got, results(norm, exact, g), strict=True):
        # The gradient of one channel is nothing but rounding, times 1 / sqrt(eps).
        assert_close(a, want, factor * EPSILON[a.dtype], 300 * float(g.norm()) if x.shape[-1] == 1 else 1e-6)
    for a, again in zip(got, results(ours, tensors, g), strict=True):
        assert a.nan_to_num().equal(again.nan_to_num())


def check_norms(device: Any, large: bool) -> None:
    """``large`` needs a GPU."""
    from ssmquant.ops.dense import triton

    torch.manual_seed(0)
    programs = triton._PROGRAMS
    for channels in (60, 72, 180, 1, *((64, 96, 768, 5000, 8192) if large else [700])):
        w, b = torch.randn(2, channels, device=device)
        for rows in (1, 49, 1000, *([36864] if large and channels < 800 else [])):
            triton._PROGRAMS = programs if large else 3  # more tiles than programs
            x = 3 * torch.randn(rows, channels, device=device) + 2
            check_norm(x, w, b)
            if rows == 1000 and not large:
                continue
            check_norm(x, None, None)
            check_norm(x.half(), w, b)
            check_norm(x.half(), w.half(), b.half())
            check_norm(x.half(), w, b, torch.float32)  # as under autocast
            if large:  # the interpreter cuts bfloat16 off instead of rounding
                check_norm(x.bfloat16(), w, b.bfloat16())
    triton._PROGRAMS = programs
    w, b = torch.randn(2, 6, device=device)
    check_norm(torch.randn(3, 6, 5, device=device).transpose(1, 2), w, b)
    far = 1000 + torch.randn(70, 6, device=device)
    check_norm(far, torch.randn(12, device=device)[::2], b, factor=100)  # float32 has the mean to 6e-5
    x = torch.randn(40, 60, device=device)
    x[7, 3] = math.nan
    y = leaf(x)
    z = dense._LayerNorm.apply(y, None, None, 1e-5, x.dtype)
    z.backward(torch.randn_like(z))
    assert y.grad is not None
    for t in (z, y.grad):
        assert t.isnan().any(1).nonzero().tolist() == [[7]]
        assert t[7].isnan().all()
    check_second_derivatives(device)


def check_second_derivatives(device: Any) -> None:
    def second(f: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf(t) for t in tensors]
        grads = torch.autograd.grad(f(*leaves).pow(3).sum(), leaves, create_graph=True)
        total = torch.stack([grad.square().sum() for grad in grads]).sum()
        return torch.autograd.grad(total, leaves)

    x, w, b = (torch.randn(*shape, device=device) for shape in ((2, 5, 6), (6,), (6,)))
    ours = second(lambda *a: dense._LayerNorm.apply(*a, 1e-5, torch.float32), x, w, b)
    for a, want in zip(ours, second(norm, x.double(), w.double(), b.double()), strict=True):
        assert_close(a, want, 1e-4)
    x = leaf(x)
    y = dense._LayerNorm.apply(x, w, b, 1e-5, torch.float32)
    many = torch.randn(3, *y.shape, device=device)
    (batched,) = torch.autograd.grad(y, x, many, retain_graph=True, is_grads_batched=True)
    for got, g in zip(batched, many, strict=True):
        assert_close(got, torch.autograd.grad(y, x, g, retain_graph=True)[0], 1e-5)


def interpret() -> None:
    make_interpreter_work()
    for owner, name in ((torch, "empty"), (torch, "empty_like")):  # what nothing has written to shows as NaN
        fresh = getattr(owner, name)
        setattr(owner, name, lambda *a, fresh=fresh, **k: fresh(*a, **k).fill_(math.nan))
    check_norms("cpu", False)


def compile_for_h100() -> None:
    """Compile the kernels in a few variants; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmquant.ops.dense import triton as launcher
    from ssmquant.ops.dense import triton_kernels

    for kind, channels, affine in (
        ("fp32", 60, True),
        ("bf16", 180, False),
        ("fp32", 8192, True),
        ("fp16", 1, True),
    ):
        for name in triton_kernels.__all__:
            kernel = getattr(triton_kernels, name)
            elements = launcher._FORWARD_TILE if name == "norm_forward" else launcher._BACKWARD_TILE
            rows, columns, warps = launcher._tile(channels, elements)
            constants = {"C": channels, "AFFINE": affine, "ROWS": rows, "COLUMNS": columns}
            others = {"rows": "i32", "eps": "fp32"} | dict.fromkeys(("mean", "rstd", "parts"), "*fp32")
            names = [p.name for p in kernel.params]
            signature = {n: "constexpr" if n in constants else others.get(n, f"*{kind}") for n in names}
            aligned = {
                (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
            }
            built = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": warps},
            )
            assert built.asm["cubin"]
            wide = ".v4.b32" if kind == "fp32" else ".v2.b32"  # 16 bytes of 60 channels, 8 of 180
            assert channels == 1 or f"ld.global{wide}" in built.asm["ptx"]


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_agree_with_pytorch() -> None:
    in_process("test_dense", "interpret()", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_an_h100() -> None:
    in_process("test_dense", "compile_for_h100()", TRITON_INTERPRET="0")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check_norms("cuda", True)
    x, w, b = torch.randn(16, 2304, 60), torch.randn(120, 60), torch.randn(120)
    operands = [x.cuda(), w.cuda(), b.cuda()]
    assert dense._pieces_for(operands[0], leaf(operands[1]), operands[2]) == 128
    check(dense.linear, F.linear, operands)
    check(dense.linear, F.linear, [x.cuda()[:, :2303], operands[1], None])  # pieces and a rest
    check(dense.linear, F.linear, [x.bfloat16().cuda(), operands[1], operands[2]], amp=torch.bfloat16)
    y, z = torch.randn(4, 4, 60, 400, device="cuda"), torch.randn(4, 33, 60, device="cuda")
    for amp in (None, torch.bfloat16):
        check(dense.grouped_linear, GROUPED, [y, z], amp)
        check(dense.shared_linear, SHARED, [y[:, 0], z], amp)
    for dtype in (torch.float32, *HALVES):
        v = (60 * torch.rand(3, 60, device="cuda")).to(dtype)
        norms = [
            v.view(3, 60),
            torch.randn(60, device="cuda").to(dtype),
            torch.randn(60, device="cuda").to(dtype),
        ]
        assert dense._norm_serves(norms[0], (60,), norms[1], norms[2])

        def ours(*operands: Tensor) -> Tensor:
            return dense.layer_norm(operands[0], (60,), *operands[1:])

        check(ours, norm, norms)
        with torch.autocast("cuda"):
            assert ours(*norms).dtype == norm(*norms).dtype == torch.float32
