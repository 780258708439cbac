"""Float convolutions of deployed models on a GPU: the kernel against PyTorch in float64, who calls it, and when not.

Triton's interpreter runs the kernel here; what chooses it is tested with the CPU's kernels for all else.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph import runtime
from ssmquant.graph.deploy import deploy, kernels
from ssmquant.graph.deploy_calls import FLOAT_CONV, float_conv2d_call
from ssmquant.modules import deployed, deployed_convs, deployed_scans, deployed_values
from ssmquant.ops import nvrtc, use_backend
from ssmquant.ops.deployed import cpu, cuda, cuda_conv
from ssmquant.ops.deployed.cuda_conv import Tile, convolve_floats, convolves_floats, taps_of
from tests.graph.deployed import converted, record
from tests.ops.deployed_cuda import emulated, poison
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
        for module in (deployed, deployed_convs):
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


def interpret_model() -> None:
    """A whole model by the kernels of a GPU, with and without this one."""
    cuda.unavailable = lambda _: None  # type: ignore[assignment]
    for module in (runtime, deployed, deployed_convs, deployed_scans, deployed_values):
        module.engine_of = lambda _: cuda  # type: ignore[attr-defined]
    nvrtc.load = lambda source, _: emulated(source)  # type: ignore[assignment]
    interpret()
    model, x = a_model("light")
    seen: list[bool] = []
    plain = cuda.convolve_floats
    cuda.convolve_floats = lambda *operands: seen.append(True) or plain(*operands)
    with torch.no_grad():
        got = model(x)
        assert seen == [True] * 3
        with precision("allow_tf32"):
            want = model(x)
        assert seen == [True] * 3
    error = float((got - want).norm() / want.norm())
    assert 0 < error < 2e-2


@pytest.mark.slow
@needs_triton
@needs_kernels
def test_interpreted_model() -> None:
    in_process("test_deployed_float_conv", "interpret_model()", TRITON_INTERPRET="1")


@needs_triton
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


# ---- who calls it ----------------------------------------------------------------------------------------------------


class Calls:
    """An engine of the CPU's kernels that has the one under test too, by PyTorch in float32; counts its calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.made = 0, 0
        self.engine = SimpleNamespace(**{k: v for k, v in vars(cpu).items() if not k.startswith("__")})
        self.engine.convolves_floats, self.engine.convolve_floats = convolves_floats, self.convolve
        self.engine.taps_of = self.taps_of
        patch.setattr(runtime, "engine_of", lambda _: self.engine)
        patch.setattr(deployed_convs, "engine_of", lambda _: self.engine)

    def taps_of(self, weight: Tensor) -> Tensor:
        self.made += 1
        return weight.permute(0, 2, 3, 1).flatten(1).contiguous()

    def convolve(
        self, x: Tensor, taps: Tensor, bias: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, residual: Any,
        last: bool,
    ) -> Tensor:  # fmt: skip
        self.count += 1
        weight = taps.view(len(taps), *kernel, -1).permute(0, 3, 1, 2)
        y = F.conv2d(x, weight, None if bias is None else bias[: len(taps)], stride, padding, dilation)
        y = y if residual is None else y + residual
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def test_what_a_module_computes(calls: Calls) -> None:
    x = torch.randn(2, 4, 6, 5)
    for conv, by_kernel in (
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), True),
        (nn.Conv2d(4, 6, (1, 2), dilation=2, bias=False), True),
        (nn.Conv2d(4, 6, 3, padding="same"), False),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(4, 6, 3, groups=2), False),
        (nn.Conv2d(4, 6, 8, padding=4), False),
    ):
        want = conv(x)
        for residual in (None, torch.randn_like(want), torch.randn(6, 1, 1)):
            calls.count = 0
            got = deployed.float_conv2d(x, conv, residual)
            torch.testing.assert_close(got, want if residual is None else want + residual)
            fits = residual is None or residual.shape == want.shape
            assert calls.count == (by_kernel and fits)
    given_tensors = (conv.weight[:, :, :3, :3].contiguous(), conv.bias, (2, 1), (1, 0), (1, 1))
    calls.count = 0
    torch.testing.assert_close(deployed.float_conv2d(x, given_tensors), F.conv2d(x, *given_tensors))
    assert calls.count == 1
    with pytest.raises(RuntimeError, match="channels"):  # as ever
        deployed.float_conv2d(x[:, :3], nn.Conv2d(4, 6, 3))


@torch.no_grad()
def test_hooks_of_a_module_run(calls: Calls) -> None:
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)
    want = conv(x)
    for register in (
        lambda: conv.register_forward_hook(lambda module, args, out: out + 1),
        lambda: conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    ):
        handle = register()
        got = deployed.float_conv2d(x, conv, want)
        assert torch.equal(got, conv(x) + want)
        assert not torch.equal(got, 2 * want)
        handle.remove()
    assert calls.count == 0
    conv.forward = lambda x: x + 3  # type: ignore[method-assign, assignment]
    assert torch.equal(deployed.float_conv2d(x, conv), x + 3)
    del conv.forward
    torch.testing.assert_close(deployed.float_conv2d(x, conv), want)
    assert calls.count == 1


def test_gradients_are_pytorchs(calls: Calls) -> None:
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)
    deployed.float_conv2d(x, conv).sum().backward()
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    assert calls.count == 0
    assert not deployed.float_conv2d(x, conv).requires_grad
    assert calls.count == 1


@contextmanager
def precision(name: str) -> Iterator[None]:
    """TF32 forbidden by ``allow_tf32`` (an older name) or ``fp32_precision``, or no cuDNN; undone by the same name."""
    cudnn: Any = torch.backends.cudnn
    assert cudnn.conv.fp32_precision == "tf32"
    try:
        if name == "allow_tf32":
            cudnn.allow_tf32 = False
        elif name == "conv":
            cudnn.conv.fp32_precision = "ieee"
        elif name == "cudnn":
            cudnn.conv.fp32_precision, cudnn.fp32_precision = "none", "ieee"
        else:
            cudnn.enabled = False
        yield
    finally:
        if name == "allow_tf32":
            cudnn.allow_tf32 = True
        elif name != "enabled":
            cudnn.fp32_precision, cudnn.conv.fp32_precision = "none", "tf32"
        cudnn.enabled = True
        assert cudnn.allow_tf32


@torch.no_grad()
def test_tf32_has_to_be_allowed(calls: Calls) -> None:
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)
    for name in ("allow_tf32", "conv", "cudnn", "enabled"):
        with precision(name):
            assert torch.equal(deployed.float_conv2d(x, conv), conv(x))
        assert calls.count == 0
    deployed.float_conv2d(x, conv)
    assert calls.count == 1


@torch.no_grad()
def test_changed_weights_are_noticed(calls: Calls) -> None:
    """Within calls of a model and without; one that stays is arranged once."""
    conv, x, store = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5), nn.ModuleDict()
    unchanged = deployed_values.Unchanged()

    def replaced() -> None:
        conv.weight = nn.Parameter(torch.randn_like(conv.weight))

    changes: Any = (
        lambda: None,
        lambda: conv.weight.mul_(2),
        lambda: conv.bias.add_(1),
        lambda: conv.load_state_dict(nn.Conv2d(4, 6, 3).state_dict()),
        replaced,
    )
    for change in changes:
        change()
        for _ in range(2):
            torch.testing.assert_close(deployed.float_conv2d(x, conv), conv(x))
            with unchanged.in_use(store):
                torch.testing.assert_close(deployed.float_conv2d(x, conv), conv(x))
    assert calls.made == 4
    held = [t for t in unchanged.values() if t.shape == (6, 36)]
    assert len(held) == 2  # what calls have read, as captured graphs keep it
    conv.half().float()  # other values, by chance at the same address
    torch.testing.assert_close(deployed.float_conv2d(x, conv), conv(x))
    assert calls.made == 5
    with torch.inference_mode():
        other = nn.Conv2d(4, 6, 3)
        torch.testing.assert_close(deployed.float_conv2d(x, other), other(x))


# ---- graphs ----------------------------------------------------------------------------------------------------------


class Functions(nn.Module):
    """Convolutions as functions, of weights that are parameters or made on the way; what is added to some."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.weight, self.bias = nn.Parameter(0.2 * torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8))
        self.linear = nn.Linear(8, 8)
        self.grouped, self.doubled = nn.Conv2d(8, 8, 3, padding=1, groups=2), Doubled(8, 8, 1)
        self.wide, self.last = nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        y = self.linear((x + y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        z = F.conv2d(x, self.weight - self.weight.mean(), stride=1, padding=1)
        y = self.grouped(y) + self.doubled(y) + self.wide(y) + z
        y = self.last(y)
        return y + y.mean((2, 3), keepdim=True)


class Written(nn.Module):
    """What a convolution reads, or what is added, is written to before the sum."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.conv, self.linear = which, nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        other = x * 2
        y = self.conv(x)
        if self.which == "input":
            x.mul_(0.5)
        elif self.which == "other":
            other.sub_(1)
        else:
            y.clamp_(min=0)
        return y + other


class Viewed(nn.Module):
    """The code asks for a shape that channels last in memory do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return self.conv(x).flatten(2).view(x.shape[0], -1)


def mambair(upsampler: str) -> nn.Module:
    return zoo.MambaIR(embed_dim=12, depths=(1,), d_state=3, mlp_ratio=1.2, upsampler=upsampler)


# With whether each convolution adds something, those of channel attention among them.
BUILDS: dict[str, tuple[Any, tuple[int, ...], list[bool]]] = {
    "light": (lambda: mambair("pixelshuffledirect"), (2, 3, 9, 12), [False, False, False, True, False]),
    "classic": (lambda: mambair("pixelshuffle"), (1, 3, 8, 8), [False, False, False, True, False, False, False]),
    "vmamba": (lambda: zoo.vmamba_nano(num_classes=5), (2, 3, 32, 32), [False, False]),
    "vmunet": (
        lambda: zoo.VMUNet(depths=(1, 1), depths_decoder=(1, 1), dims=8, num_classes=3, d_state=2), (2, 3, 64, 64),
        [False, False],
    ),
    "functions": (Functions, (2, 3, 6, 5), [False, True, False, False]),
    "viewed": (Viewed, (2, 3, 6, 5), [False]),
    **{f"written {k}": (functools.partial(Written, k), (1, 3, 6, 5), [False]) for k in ("input", "other", "result")},
}  # fmt: skip


@functools.cache
def _deployed(name: str) -> Any:
    build, shape, _ = BUILDS[name]
    torch.manual_seed(1)
    model, x = build().eval(), torch.rand(shape)
    config = QConfig.recommended(7, 7)
    kept = {Functions: ("first", "weight*", "grouped", "doubled", "wide", "last")}
    if type(model) in (Functions, Viewed, Written):
        sites = kept.get(type(model), ("conv",))
        config = QConfig.recommended(7, 7, keep_float=sites, keep_first_last=False)
    return converted(model, config, x), x


def a_model(name: str) -> Any:
    model, x = _deployed(name)
    return copy.deepcopy(model), x


def float_convs(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is float_conv2d_call]


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDS)
@needs_kernels
def test_graphs(name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are replaced, sums fused, and results those of the graph without either."""
    model, x = a_model(name)
    got = model(x)
    adds = BUILDS[name][2]
    assert [len(n.args) == 4 for n in float_convs(record(model).deployed["cpu"])] == adds
    assert calls.count == len(adds)
    assert record(model).fused["cpu"] is not record(model).run
    monkeypatch.setattr(deployed_convs, "convolved", lambda *_: None)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    if name in ("classic", "functions"):  # a kernel's own result goes out
        assert got.is_contiguous()


@torch.no_grad()
@needs_kernels
def test_views_of_convolutions() -> None:
    """By the CPU's kernels, where PyTorch's convolution would hand on that channels are last in memory."""
    model, x = a_model("viewed")
    got = model(x)
    with use_backend("chunked", op="fuse"):
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "calls", "in_norms"),
    [
        ("light", [False, True, False], 0),
        ("vmamba", [], 2),
        ("vmunet", [False, False], 0),
        ("functions", [False, True, False, False], 0),
    ],
)
@needs_kernels
def test_graphs_of_a_gpu(name: str, calls: list[bool], in_norms: int) -> None:
    """Channel attention and norms have taken theirs before."""
    model, _ = a_model(name)
    graph = deploy(record(model).graph, model, cuda)
    assert [len(n.args) == 4 for n in float_convs(graph)] == calls
    norms = [n for n in graph.nodes if n.target is deployed.normalize]
    assert sum(len(n.args) > 2 for n in norms) == in_norms
    named = [k for k, v in kernels(graph).items() if v == FLOAT_CONV]
    assert len(named) == len(calls) + in_norms
    left = [n.target for n in graph.nodes if n.op == "call_module"]
    left = [name for name in left if type(model.get_submodule(str(name))) is nn.Conv2d]
    assert left == (["grouped", "wide"] if name == "functions" else [])


@torch.no_grad()
@needs_kernels
def test_models_notice_what_changes(calls: Calls) -> None:
    """Weights, hooks, and whether TF32 is allowed, after a first call."""
    model, x = a_model("light")
    model(x)

    def agree(by_kernel: int) -> None:
        calls.count = 0
        got = model(x)
        assert calls.count == by_kernel
        calls.engine.convolves_floats = lambda *_: False
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
        calls.engine.convolves_floats = convolves_floats

    agree(5)
    before = model(x)
    model.upsample[0].weight.mul_(2)
    agree(5)
    assert not torch.allclose(before, model(x), atol=1e-3)
    state = {k: v + 0.1 if k == "conv_after_body.bias" else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    agree(5)
    handle = model.conv_after_body.register_forward_hook(lambda module, args, out: out + 1)
    agree(4)
    handle.remove()
    agree(5)
    with precision("allow_tf32"):
        agree(0)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_cases, check_tiles, check_special_numbers, check_nan, check_norms])
def test_on_a_gpu(check: Any) -> None:
    check("cuda")


@torch.no_grad()
@pytest.mark.gpu
def test_models_on_a_gpu() -> None:
    """In captured graphs too, which notice weights that change; of no less precision where TF32 is not allowed."""
    model, x = a_model("light")
    model, x = model.cuda(), x.cuda()
    seen: list[bool] = []
    plain = cuda.convolve_floats

    def error(got: Tensor, want: Tensor) -> float:
        return float((got - want).norm() / want.norm())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "convolve_floats", lambda *operands: seen.append(True) or plain(*operands))
        for scale in (1.0, 2.0):
            model.upsample[0].weight.mul_(scale)
            seen.clear()
            got = model(x)
            assert seen == [True] * 3
            with precision("allow_tf32"):
                want = model(x)
                with use_backend("chunked", op="fuse"):
                    assert error(want, model(x)) < 2e-2  # codes at ties
            assert seen == [True] * 3
            assert 0 < error(got, want) < 5e-2  # and those that TF32 moves
    first = model(x)
    ssmquant.cuda_graph(model)
    for _ in range(4):
        assert torch.equal(model(x), first)
    model.upsample[0].weight.mul_(0.5)
    time.sleep(0.2)  # until it looks again
    changed = model(x)
    assert not torch.equal(changed, first)
    for _ in range(4):
        assert torch.equal(model(x), changed)
    ssmquant.cuda_graph(model, max_graphs=0)
    assert torch.equal(model(x), changed)


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
