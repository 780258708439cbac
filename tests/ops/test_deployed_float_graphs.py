"""Float convolutions in deployed graphs for a GPU: which ones a kernel takes, and when PyTorch computes them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph import runtime
from ssmquant.graph.deploy import deploy, kernels
from ssmquant.graph.deploy_calls import FLOAT_CONV, float_conv2d_call
from ssmquant.modules import deployed, deployed_convs, deployed_scans, deployed_values
from ssmquant.ops import nvrtc, use_backend
from ssmquant.ops.deployed import cpu, cuda
from ssmquant.ops.deployed.cuda_conv import convolves_floats
from tests.graph.deployed import converted, record
from tests.ops.deployed_cuda import emulated, poison
from tests.ops.interpreted import in_process, make_interpreter_work

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_kernels = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason="needs the kernels for CPUs"
)


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


def interpret_model() -> None:
    """A whole model by the kernels of a GPU, with and without this one."""
    cuda.unavailable = lambda _: None  # type: ignore[assignment]
    for module in (runtime, deployed, deployed_convs, deployed_scans, deployed_values):
        module.engine_of = lambda _: cuda  # type: ignore[attr-defined]
    nvrtc.load = lambda source, _: emulated(source)  # type: ignore[assignment]
    make_interpreter_work()
    poison(setattr)
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
    in_process("test_deployed_float_graphs", "interpret_model()", TRITON_INTERPRET="1")


@needs_triton
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
