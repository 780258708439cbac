"""Float convolutions of deployed models on a GPU: the kernel, by Triton's interpreter, against PyTorch in float64."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmquant.modules import deployed, deployed_convs, deployed_norms
from ssmquant.ops.deployed import cpu, cuda, cuda_conv
from ssmquant.ops.deployed.cuda_conv import Tile, convolve_floats, convolves_floats, taps_of
from tests.ops.deployed_cuda import poison
from tests.ops.interpreted import in_process, make_interpreter_work

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_kernels = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason="needs the kernels for CPUs"
)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers with 11 significant bits, ties away from zero, in float64."""
    fraction, exponent = np.frexp(x.double().cpu().numpy())
    whole = np.sign(fraction) * np.floor(np.abs(fraction) * 2**11 + 0.5)
    return torch.from_numpy(np.ldexp(whole / 2**11, exponent))


LAYOUTS = ("first", "last", "sliced", "turned", "every second")


def laid(t: Tensor, layout: str) -> Tensor:
    """The same image in another layout."""
    if layout == "last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "turned":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":  # a pixel's channels among others
        wide = torch.full((*t.permute(0, 2, 3, 1).shape[:3], t.shape[1] + 3), 7.0, device=t.device)
        return wide[..., 2:-1].copy_(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if layout == "every second":
        wide = torch.full((*t.shape[:3], 2 * t.shape[3]), 7.0, device=t.device)
        return wide[..., ::2].copy_(t)
    return t.contiguous()


def check_case(
    device: str, sizes: Any, outputs: int, kernel: Any, stride: Any, padding: Any, dilation: Any, layout: str = "last",
    residual: str | None = None, bias: bool = True, last: bool = True,
) -> None:  # fmt: skip
    """``sizes``: of x, (B, C, H, W)."""
    x, weight = torch.randn(sizes), torch.randn(outputs, sizes[1], *kernel)
    b = torch.randn(outputs) if bias else None
    window = stride, padding, dilation

    def reference(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x.double(), weight.double(), None if b is None else b.double(), *window)

    rounded, exact = reference(to_tf32(x), to_tf32(weight), b), reference(x, weight, b)
    size = reference(x.abs(), weight.abs(), None if b is None else b.abs()).clamp(min=1e-9)
    held = None
    if residual is not None:
        held = torch.randn(exact.shape)
        rounded, exact, size = rounded + held, exact + held, size + held.abs()
        held = laid(held.to(device), residual)
    there = [None if t is None else t.to(device) for t in (x, weight, b)]
    image = laid(x.to(device), layout)
    assert convolves_floats(image, there[1], there[2], *window, held)
    got = convolve_floats(image, taps_of(there[1]), there[2], kernel, *window, held, last)
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    got = got.double().cpu()
    assert got.shape == exact.shape
    order = 2e-6 if device == "cpu" else 1e-5  # tensor cores cut sums off
    assert float(((got - rounded).abs() / size).max()) < order
    assert float(((got - exact).abs() / size).max()) < 2**-10


CASES: Any = (
    ((1, 3, 9, 14), 60, (3, 3), (1, 1), (1, 1), (1, 1), "first"),
    ((2, 60, 7, 9), 60, (3, 3), (1, 1), (1, 1), (1, 1), "last", "last"),
    ((1, 60, 9, 11), 12, (3, 3), (1, 1), (1, 1), (1, 1), "last", "first", True, False),
    ((3, 3, 16, 16), 96, (4, 4), (4, 4), (0, 0), (1, 1), "first", None, False),
    ((2, 48, 9, 9), 96, (3, 3), (2, 2), (1, 1), (1, 1), "first", "sliced"),
    ((1, 130, 5, 4), 140, (1, 1), (1, 1), (0, 0), (1, 1), "last", "turned", False, False),
    ((1, 17, 12, 5), 3, (7, 2), (1, 2), (6, 3), (2, 3), "every second", "last", True, False),
    ((1, 1, 1, 1), 1, (1, 1), (3, 1), (0, 2), (1, 5), "first", "first"),
)


def check_cases(device: str) -> None:
    for case in CASES:
        check_case(device, *case)


def check_tiles(device: str) -> None:
    """The result does not depend on them."""
    plain = cuda_conv._tile
    try:
        for tile in (
            Tile(16, 64, 16, 4, 1, True), Tile(128, 16, 64, 4, 2, True), Tile(32, 32, 32, 4, 4, False),
            Tile(64, 64, 64, 4, 3, False), Tile(128, 64, 32, 8, 2, False),
        ):  # fmt: skip
            cuda_conv._tile = lambda *_, tile=tile: tile
            for case in CASES[:2] if device == "cpu" else CASES:
                check_case(device, *case)
    finally:
        cuda_conv._tile = plain


def check_special_numbers(device: str) -> None:
    """Ties, both ends of what is finite, infinities; NaN of any bits stays one."""
    bits = [
        0x3F800FFF, 0x3F801000, 0x3F803000, 0x3F801001, 0x3FFFF000, 0x7F7FE000, 0x7F7FFFFF, 0x00801000, 0, 0x7F800000,
    ]  # fmt: skip
    numbers = torch.tensor([*bits, *(b - 2**31 for b in bits)], dtype=torch.int32).view(torch.float32)
    want = to_tf32(numbers.nan_to_num(posinf=1.0, neginf=1.0)).float()
    want = torch.where(numbers.isinf(), numbers, want)
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, 0x7F801000 - 2**31], dtype=torch.int32)
    given_x = torch.cat((numbers, nans.view(torch.float32)))
    one = torch.ones(1, 1, 1, 1)
    window: Any = ((1, 1), (1, 1), (0, 0), (1, 1))
    got = convolve_floats(given_x[None, None, None].to(device), taps_of(one).to(device), None, *window)
    got = got.cpu().flatten()
    assert torch.equal(got[: len(numbers)], want)
    assert got[len(numbers) :].isnan().all()
    taps = taps_of(given_x[:, None, None, None])[:, 0]  # and so are weights
    assert torch.equal(taps[: len(numbers)], want)
    assert taps[len(numbers) :].isnan().all()
    many = taps_of(given_x[:, None, None, None].to(device))
    got = convolve_floats(one.to(device), many, None, *window).cpu().flatten()
    assert torch.equal(got.isnan(), given_x.isnan())


def check_nan(device: str) -> None:
    """Reaches what reads it, in any operand, and nothing else."""
    for channels in (3, 20):
        x, weight, bias = torch.randn(2, channels, 7, 8), torch.randn(18, channels, 3, 3), torch.randn(18)
        held = torch.randn(2, 18, 4, 4)
        x[1, 1, 3, 0], bias[17], held[0, 2, 3, 1] = math.nan, math.nan, math.nan
        weight[5, 2, 0, 1] = math.nan
        window: Any = ((2, 2), (1, 1), (1, 1))
        want = F.conv2d(x, weight, bias, *window) + held
        there = (x.to(device), taps_of(weight).to(device), bias.to(device), (3, 3), *window, held.to(device))
        got = convolve_floats(*there).cpu()
        # Of a weight that is NaN a border is NaN too here: a product of what is not there, which PyTorch may leave out.
        assert torch.equal(got[:, :5].isnan(), want[:, :5].isnan())
        assert torch.equal(got[:, 6:].isnan(), want[:, 6:].isnan())
        assert got[:, 5, 1:].isnan().all()
        assert 0 < int(got[:, :5].isnan().sum()) < got[:, :5].numel()


def check_norms(device: str) -> None:
    """Of a convolution, whose bias the kernel adds; where it may not serve, the norm's kernel does."""
    conv, layer = nn.Conv2d(5, 12, 3, stride=2, padding=1).to(device), nn.LayerNorm(12).to(device)
    image = torch.randn(2, 5, 9, 7, device=device)
    seen: list[bool] = []
    plain = cuda.convolve_floats
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cuda, "convolve_floats", lambda *operands: seen.append(True) or plain(*operands))
        for module in (deployed_norms, deployed_convs):
            patch.setattr(module, "engine_of", lambda _: cuda)
        got = deployed.normalize(image, (layer,), conv)
        assert seen == [True]
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        exact = deployed.normalize(image, (layer,), conv)
        assert seen == [True]
        want = layer(conv(image).permute(0, 2, 3, 1))
        handle = conv.register_forward_hook(lambda module, args, out: out * 2 + 1)
        torch.testing.assert_close(
            deployed.normalize(image, (layer,), conv), layer(conv(image).permute(0, 2, 3, 1))
        )
        handle.remove()
    torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)
    assert not torch.allclose(got, want, rtol=0, atol=1e-5)


def check_anything() -> None:
    """Any sizes, by hypothesis."""
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))

    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(
        batch=st.sampled_from((1, 1, 3)), channels=st.sampled_from((1, 3, 5, 60)),
        outputs=st.sampled_from((1, 2, 12, 20)), image=st.tuples(st.integers(1, 8), st.integers(1, 8)), kernel=pairs,
        stride=pairs, padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=pairs,
        layout=st.sampled_from(LAYOUTS), residual=st.sampled_from((None, *LAYOUTS)), bias=st.booleans(),
        last=st.booleans(),
    )  # fmt: skip
    def check(
        batch: int, channels: int, outputs: int, image: Any, kernel: Any, stride: Any, padding: Any, dilation: Any,
        **options: Any,
    ) -> None:  # fmt: skip
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        image = [max(n, s - 2 * p) for n, s, p in zip(image, spans, padding, strict=True)]
        sizes = batch, channels, *image
        check_case("cpu", sizes, outputs, kernel, stride, padding, dilation, **options)

    check()


def interpret(*checks: str) -> None:
    make_interpreter_work()
    poison(setattr)
    for check in checks:
        globals()[check](*(() if check == "check_anything" else ("cpu",)))


@pytest.mark.parametrize(
    "checks",
    [
        ("check_cases", "check_special_numbers", "check_nan", "check_norms"),
        ("check_tiles",),
        ("check_anything",),
    ],
)
def test_interpreted(checks: tuple[str, ...]) -> None:
    in_process("test_deployed_float_conv", f"interpret(*{checks!r})", TRITON_INTERPRET="1")


def test_what_the_kernel_takes() -> None:
    """And what PyTorch is left to compute, or to refuse."""
    x, weight, bias = torch.empty(2, 6, 9, 8), torch.empty(5, 6, 3, 3), torch.empty(5)
    window: Any = ((2, 1), (1, 0), (1, 2))
    size = F.conv2d(x, weight, bias, *window).shape
    assert convolves_floats(x, weight, bias, *window, torch.empty(size))
    assert convolves_floats(x, weight, None, *window)
    huge = torch.empty(1, device="meta").as_strided((1, 6, 2**15, 2**14), (0, 1, 2**14 * 6, 6))
    on_meta = weight.to("meta")
    many = torch.empty(2**16, 6, 9, 8, device="meta")
    for others in (
        (x.half(), weight, bias),
        (x, weight.double(), bias),
        (x, weight, bias.double()),
        (x[0], weight, bias),
        (x[:0], weight, bias),
        (x[:, :3], weight, bias),
        (x[:, :3], weight[:, :3], bias[:4]),
        (x[:, :, :2], weight, bias, (1, 1), (0, 0), (1, 1)),
        (x, on_meta, None),
        (x, torch.empty(5, 6, 9, 3), bias, (1, 1), (4, 1), (1, 1)),
        (torch.empty(1, 513, 4, 4), torch.empty(5, 513, 3, 3), bias),
        (x, torch.empty(513, 6, 3, 3), None),
        (x, weight, bias, *window, torch.empty(size)[:, :1]),
        (x, weight, bias, *window, torch.empty(size).half()),
        (huge, on_meta, None),
        (huge[:, :, : 2**14, : 2**13], torch.empty(40, 6, 3, 3, device="meta"), None),
        (many, on_meta, None),
    ):  # fmt: skip
        assert not convolves_floats(*others[:3], *(others[3:6] or window), *others[6:])
    assert convolves_floats(huge[:, :, : 2**12], on_meta, None, *window)
    assert convolves_floats(many[:-1], on_meta, None, *window)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_cases, check_tiles, check_special_numbers, check_nan, check_norms])
def test_on_a_gpu(check: Any) -> None:
    check("cuda")


@torch.no_grad()
def compile_for_h100() -> None:
    """Reads are of 16 bytes and ahead, products the tensor cores' of whole warp groups; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmquant.ops.deployed import triton_conv

    kernel = triton_conv.convolve_floats
    made: list[Any] = []

    def compiled(_: Any, tensors: Any, numbers: Any, constants: Any, warps: int) -> None:
        names = [p.name for p in kernel.params]
        values = dict(zip(names, (*tensors, *numbers, *constants, 1), strict=True))
        fixed = {n: v for n, v in values.items() if n.isupper() or (isinstance(v, int) and v == 1)}
        signature = {n: "constexpr" if n in fixed else "i32" for n in names}
        signature |= {n: "*fp32" for n in names[: len(tensors)]}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))}
        options = {"num_warps": warps, "launch_pdl": True}
        source = ASTSource(kernel, signature, fixed, aligned)
        made.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm)

    cuda_conv._kernel = lambda: compiled  # type: ignore[assignment]
    window: Any = ((1, 1), (1, 1), (1, 1))
    for inputs, outputs, size in ((60, 60, 180), (60, 12, 180), (3, 60, 180), (60, 60, 64), (48, 96, 180)):
        x = laid(torch.empty(1, inputs, size, size), "last")
        convolve_floats(x, taps_of(torch.empty(outputs, inputs, 3, 3)), torch.empty(outputs), (3, 3), *window)
        assert made[-1]["cubin"]
        assert "griddepcontrol.wait" in made[-1]["ptx"]
        assert ("cp.async.cg" in made[-1]["ptx"]) == (inputs > 3)
        assert ("wgmma" in made[-1]["ptx"]) == (size > 64)
        assert "tf32" in made[-1]["ptx"]


@pytest.mark.slow
@needs_triton
def test_compiles_for_an_h100() -> None:
    in_process("test_deployed_float_conv", "compile_for_h100()", TRITON_INTERPRET="0")
