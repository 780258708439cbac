"""Layers of deployed graphs: residuals, norms and activations as part of them, what stays a call of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.graph.deploy import deploy
from ssmquant.graph.sites import op_name
from ssmquant.ops import use_backend
from ssmquant.ops.deployed import cpu
from tests.graph.deployed import converted, dynamic, fused, make, names, record, unfused

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


def test_residuals_of_images_are_part_of_the_layers_before_them() -> None:
    """VMamba: 1x1 convolutions, with and without a norm before, behind what does nothing in eval mode."""
    model, x = make("vmamba", QConfig.minmax(8, 8))
    assert {"DropPath", "Identity"} <= {type(m).__name__ for m in model.modules()}
    fused(model, x)
    graph = deploy(record(model).graph, model, cpu)
    called = [n for n in graph.nodes if n.op == "call_module"]
    assert not [n for n in graph.nodes if op_name(n) in ("add", "contiguous")]
    assert not [n for n in called if type(model.get_submodule(str(n.target))) in (nn.Identity, nn.Dropout)]
    lengths = {"linear_call": 8, "conv2d_call": 9}  # with a residual
    found = [n for n in graph.nodes if len(n.args) == lengths.get(getattr(n.target, "__name__", ""))]
    assert len(found) == 6  # two of each block


class Layers(nn.Module):
    """``form``: how they are put together."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.norm = form, nn.LayerNorm(8)
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.single, self.rows = nn.Conv2d(8, 8, 1, groups=8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "depthwise":
            x = self.first(x)
            return x + self.single(x)
        if self.form == "depthwise behind a norm":
            y = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.last(self.single(y))
        small = x.mean((2, 3), keepdim=True)
        if self.form == "residual of one pixel":
            return self.first(x) + self.last(small)
        if self.form == "result of one pixel":
            return self.first(small) + x
        return (self.rows(small.permute(0, 2, 3, 1)) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "form",
    [
        "depthwise",
        "depthwise behind a norm",
        "residual of one pixel",
        "result of one pixel",
        "rows of one pixel",
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (6, 5)])
def test_sums_that_are_no_residuals(form: str, size: tuple[int, int]) -> None:
    """Also those that have the same shapes at the size of the example alone."""
    torch.manual_seed(0)
    example = torch.randn(2, 8, 1, 1)
    model = converted(Layers(form), QConfig.minmax(8, 8, keep_first_last=False), example)
    x = torch.randn(2, 8, *size)
    with torch.no_grad():
        got = model(x)
    torch.testing.assert_close(got, unfused(model, x), rtol=1e-4, atol=1e-5)


class DropPath(nn.Module):
    """Another one than the usual: of what it leaves it has the expectation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize("how", ["training", "hook", "another class"])
def test_what_does_something_in_eval_mode_is_not_left_out(how: str) -> None:
    torch.manual_seed(0)
    middle: nn.Module = {"training": nn.Dropout(0.5), "hook": nn.Identity()}.get(how, DropPath())
    x = torch.randn(3, 8)
    layers = nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 8))
    model = converted(layers, QConfig.minmax(8, 8, keep_first_last=False), x)
    before = fused(model, x)
    if how == "training":
        model[1].train()
        with torch.no_grad():
            assert not torch.equal(model(x), model(x))
        model[1].eval()
    elif how == "hook":
        handle = model[1].register_forward_hook(lambda module, args, out: out * 2)
        with torch.no_grad():
            assert not torch.allclose(model(x), before, rtol=0.1)
        handle.remove()
    torch.testing.assert_close(fused(model, x), before)
    torch.testing.assert_close(before, unfused(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("as_module", [False, True])
def test_rms_norms_are_part_of_what_reads_them(eps: float | None, as_module: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(6, eps=eps), nn.Linear(6, 5)
            nn.init.normal_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x) if as_module else F.rms_norm(x, (6,), weight=self.norm.weight, eps=eps)
            return self.linear(y)

    torch.manual_seed(0)
    x = torch.randn(2, 9, 6)
    x[0, 3] *= 1e-4  # where eps matters
    config = QConfig.recommended(8, 8, keep_first_last=False)
    prepared = ssmquant.prepare(Normed().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    assert float((a - b).norm() / b.norm()) < 1e-5
    # A module's weights have the factors of the channels; a function's get them at the call.
    assert [name for name in names(model) if name != "mul"] == ["linear_call"]
    assert ("mul" in names(model)) is not as_module
    handle = model.norm.register_forward_hook(lambda module, args, out: out * 0)
    still = fused(model, x)
    handle.remove()
    assert torch.equal(still, a) is not as_module


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_behind_a_function_that_norms(weighted: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.weight = nn.Parameter(torch.tensor([1.0, -9.0, 0.1, 2.0, 30.0, 0.5])) if weighted else None
            self.bias = nn.Parameter(torch.tensor([0.1, 1.0, 8.0, -0.5, 0.0, 40.0])) if weighted else None

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.layer_norm(x, (6,), self.weight, self.bias))

    torch.manual_seed(0)
    x = torch.randn(2, 9, 6) * torch.tensor([1.0, 9.0, 0.1, 2.0, 30.0, 0.5])
    prepared = ssmquant.prepare(
        Normed().eval(), QConfig.recommended(8, 8, keep_first_last=False), example_inputs=(x,)
    )
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    assert float((a - b).norm() / b.norm()) < 1e-5
    assert [name for name in names(model) if name != "mul"] == ["linear_call"]


class Mlp(nn.Module):
    """VMamba's, of an image with channels last, by linear layers or, channels first, by convolutions."""

    def __init__(self, image: bool, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.image, self.norm = image, nn.LayerNorm(6)
        self.fc1 = nn.Conv2d(6, 20, 1) if image else nn.Linear(6, 20)
        self.fc2 = nn.Conv2d(20, 6, 1) if image else nn.Linear(20, 6)
        self.act, self.drop = act, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y.permute(0, 3, 1, 2) if self.image else y
        y = self.drop(self.fc2(self.drop(self.act(self.fc1(y)))))
        return x + (y.permute(0, 2, 3, 1) if self.image else y)


def activations_left(model: Any) -> int:
    graph = deploy(record(model).graph, model, cpu)
    kinds = nn.GELU, nn.SiLU, nn.ReLU
    modules = [
        n for n in graph.nodes if n.op == "call_module" and type(model.get_submodule(n.target)) in kinds
    ]
    return len(modules) + sum(name in ("gelu", "silu", "relu") for name in names(model))


def nearly(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() < 1e-5 * b.norm())


OF_LAYERS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], bool]] = {
    "gelu": (nn.GELU, True),
    "silu": (nn.SiLU, True),
    "in place": (lambda: nn.SiLU(inplace=True), True),
    "F.gelu": (lambda: F.gelu, True),
    "F.silu": (lambda: F.silu, True),
    "tanh": (lambda: nn.GELU("tanh"), False),
    "F.gelu, tanh": (lambda: lambda x: F.gelu(x, approximate="tanh"), False),
    "relu": (nn.ReLU, False),
}


@pytest.mark.parametrize("config", [lambda: QConfig.recommended(8, 8, keep_first_last=False),
                                    lambda: QConfig.qmambair(8, keep_first_last=False)],
                         ids=["static", "dynamic"])  # fmt: skip
@pytest.mark.parametrize("act", OF_LAYERS)
@pytest.mark.parametrize("image", [False, True])
def test_activations_are_part_of_the_layer_before(
    image: bool, act: str, config: Callable[[], QConfig], checked: dict[str, int]
) -> None:
    torch.manual_seed(0)
    make_act, known = OF_LAYERS[act]
    model = converted(Mlp(image, make_act()), config(), torch.randn(2, 5, 4, 6))
    for shape in ((2, 5, 4, 6), (1, 3, 7, 6), (3, 1, 1, 6)):
        x = torch.randn(shape)
        assert nearly(fused(model, x), unfused(model, x))
    assert activations_left(model) == (not known)
    assert checked["linear"] + checked["conv2d"] == 6


@pytest.mark.parametrize("image", [False, True])
def test_an_activation_that_is_watched_or_another_one_is_called(image: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6)
    model = converted(Mlp(image, nn.GELU()), QConfig.recommended(8, 8, keep_first_last=False), x)
    before = fused(model, x)
    seen = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append((args[0].shape, out.shape))
        return out * torch.arange(out.shape[1]).view(-1, *[1] * (out.dim() - 2))

    handle = model.act.register_forward_hook(hook)
    a, b = fused(model, x), unfused(model, x)
    handle.remove()
    assert nearly(a, b)
    assert not nearly(a, before)
    assert seen[0] == seen[1]
    assert torch.equal(fused(model, x), before)
    model.act.approximate = "tanh"
    assert nearly(fused(model, x), unfused(model, x))
    assert not torch.equal(fused(model, x), before)
    model.act.forward = torch.tanh
    assert nearly(fused(model, x), unfused(model, x))
    model.act = nn.Softplus()
    assert nearly(fused(model, x), unfused(model, x))


def test_a_hook_of_the_layer_comes_before_the_activation() -> None:
    torch.manual_seed(0)
    x, mlp = torch.randn(2, 5, 4, 6), Mlp(False, nn.GELU())
    mlp.fc1.register_forward_hook(lambda module, args, out: out * 3)
    model = converted(mlp, QConfig.recommended(8, 8, keep_first_last=False), x)
    assert activations_left(model) == 1
    assert nearly(fused(model, x), unfused(model, x))


class Around(nn.Module):
    """Activations of layers whose results others read, too, or that are added to something."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.act = form, nn.SiLU()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.form == "read twice":
            return self.b(self.act(y)) + y
        if self.form == "added before":
            return self.b(self.act(y + x))
        if self.form == "added behind":
            return self.act(y) + x
        return self.b(F.silu(y) * self.c(x))  # a gate


@pytest.mark.parametrize(
    ("form", "left", "smooth", "found"),
    [
        ("read twice", 1, 0.5, {"linear_call": 2}),
        ("added before", 1, 0.5, {"linear_call": 2}),
        ("added behind", 0, 0.5, {"linear_call": 1}),
        ("gate", 0, 0.0, {"linear_call": 2, "gated_linear_call": 1}),
        ("gate", 0, 0.5, {"linear_call": 3}),  # factors of channels are between
    ],
)
def test_activations_and_what_is_around_them(
    form: str, left: int, smooth: float, found: dict[str, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6) * torch.arange(1, 7)
    model = converted(Around(form), QConfig.lsq(8, 8, smooth=smooth, keep_first_last=False), x)
    assert nearly(fused(model, x), unfused(model, x))
    assert activations_left(model) == left
    assert {
        name: names(model).count(name) for name in {*names(model)} - {"times"}
    } == found  # sums are in there
    handle = model.act.register_forward_hook(lambda module, args, out: out * 2)
    assert nearly(fused(model, x), unfused(model, x))
    handle.remove()


def test_layers_of_other_shapes() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Linear(5, 70)
            self.deep = nn.Linear(70, 6, bias=False)
            self.one = nn.Conv2d(1, 4, 3, padding=1)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.even = nn.Conv2d(4, 3, 2, stride=(2, 1), padding=1)
            self.wide = nn.Conv2d(3, 5, (3, 5), padding=(2, 4), dilation=2)

        def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            y = self.deep(torch.relu(self.flat(x)))
            return y, self.wide(self.even(self.grouped(self.one(image)))).reshape(-1)

    torch.manual_seed(0)
    x, image = torch.randn(7, 5), torch.randn(2, 1, 8, 9)
    config = dynamic(8, keep_first_last=False)
    prepared = ssmquant.prepare(Layers().eval(), config, example_inputs=(x, image))
    ssmquant.calibrate(prepared, [(x, image)], forward=lambda m, b: m(*b), progress=False)
    model = ssmquant.convert(prepared)
    with torch.no_grad():
        got = model(x, image)
    assert names(model).count("linear_call") == 2
    assert names(model).count("conv2d_call") == 2
    with use_backend("chunked", op="fuse"), torch.no_grad():
        want = model(x, image)
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous()
        assert float((a - b).norm() / b.norm()) < 0.02


def test_factors_of_channels_take_any_layout() -> None:
    """A convolution whose result has factors, which the next one takes, need not copy it to another layout."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    graph = deploy(record(model).graph, model, cpu)
    convs = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "conv2d_call"]
    assert any(n.args[7] is not None for n in convs)  # factors
    assert all(n.args[6] for n in convs)  # may be channels last


def test_a_result_that_needs_its_layout_is_contiguous() -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x)).view(x.shape[0], -1)

    x = torch.rand(2, 3, 5, 6)
    config = dynamic(4, keep_first_last=False)
    prepared = ssmquant.prepare(View().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
