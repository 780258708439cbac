"""Depthwise convolutions of deployed models on a GPU and the projection of their codes, in one kernel.

Run by a CPU (``emulator``), against the same calls one by one; and on a GPU if there is one.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.graph.deploy import deploy
from ssmquant.modules import deployed, deployed_norms, deployed_values
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import Depthwise, cpu, cuda, cuda_depthwise, cuda_fronted
from ssmquant.restore import shipped_model
from tests.graph.deployed import converted, record, unfused
from tests.ops.deployed_cpu import close, make_grid
from tests.ops.deployed_cuda import Operands, as_codes, same_codes, there_is

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a failure is small, and each case is compiled
CASES = st.fixed_dictionaries(
    {
        "size": st.tuples(
            st.sampled_from([1, 3]), st.integers(2, 19), st.integers(1, 35), st.integers(8, 96)
        ),
        "kernel": st.sampled_from([(3, 3), (5, 3), (1, 5)]),
        "act": st.sampled_from([None, "silu", "gelu"]),
        "coded": st.booleans(),
        "factors": st.booleans(),
        "odd": st.booleans(),
    }
)


def convolution(
    device: str,
    size: Any,
    kernel: Any,
    act: str | None,
    coded: bool,
    factors: bool,
    also: bool = False,
    odd: bool = False,
) -> Depthwise:
    grid, made, other = (there_is(make_grid(bits, 1), device) for bits in (4, 5, 3))
    x = torch.randn(size)
    x[-1, size[1] // 2, size[2] // 2, size[3] // 2] = math.nan
    wide = torch.full((*size[:3], size[3] + 4), 99, dtype=torch.int8)
    given = wide[..., : size[3]].copy_(as_codes(x, grid)) if coded else x
    whole = torch.randn(kernel[0] * kernel[1], size[3]), torch.randn(size[3]), torch.rand(size[3]) + 0.5
    taps, bias, gain = (apart(t, odd) for t in whole)
    return Depthwise(
        given.to(device), grid, taps.to(device), bias.to(device), kernel, (1, 1), act, made,
        gain.to(device) if factors else None, other if also else None,
    )  # fmt: skip


def apart(t: Tensor, odd: bool) -> Tensor:
    """The same, if ``odd`` where no vector begins."""
    return torch.cat((torch.full((1,), math.nan), t.flatten()))[1:].view(t.shape) if odd else t


def separately(d: Depthwise) -> Any:
    return cuda_depthwise.convolve(d)


def check_projection(device: str, case: Any, outputs: int, act: str | None, columns: bool) -> None:
    d = convolution(device, **case)
    weights = cuda.pack(*(t.to(device) for t in Operands.weight((outputs, case["size"][3]), 4, 1.0)))
    bias, following = torch.randn(outputs, device=device), there_is(make_grid(5, 1), device)
    codes = (following, outputs, None) if columns else None
    assert d.codes is not None
    assert cuda_fronted.takes(d, weights)
    got = cuda.fronted(d, d.codes, weights, bias, act, codes)
    made = cuda.project(separately(d).flatten(1, 2), d.codes, weights, bias, act=act, codes=codes)
    if columns:
        same_codes(got, made[0].cpu())
    else:
        assert torch.equal(got.isnan(), made.isnan())
        assert got.isnan().any()
        close(got.nan_to_num(), made.nan_to_num().double())


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(case=CASES, outputs=st.integers(3, 96), act=st.sampled_from([None, "silu"]), columns=st.booleans())
def test_projection(by_cpu: None, case: Any, outputs: int, act: str | None, columns: bool) -> None:
    check_projection("cpu", case, outputs, act, columns)


def check_core(device: str, size: Any, rank: int, states: int, also: bool, coded: bool) -> None:
    batch, height, width, channels = size
    operands = Operands(batch, height * width, channels, states, rank, device=device)
    d = convolution(device, size, (3, 3), "silu", coded, False, also)
    assert d.codes is not None
    operands.of_x, operands.of_u = d.codes, d.also or d.codes
    core = operands.core(cuda, one=not also)
    assert cuda_fronted.takes(d, core.projection)
    u, codes, bad, sizes = core.encode_behind(d)
    made = separately(d)
    x, of_u = made if also else (made, None)
    want = core.encode(x.flatten(1, 2), None if of_u is None else of_u.flatten(1, 2))
    there = core.projection.outputs
    same_codes(u.view(torch.int8).cpu(), want[0].reshape(u.shape).view(torch.int8).cpu())
    real = want[2].bool().logical_not()
    same_codes(codes[real, :there].view(torch.int8), want[1][real, :there].view(torch.int8).cpu())
    assert torch.equal(bad.bool(), want[2].bool())
    assert bad.any()
    # Codes of step sizes are those that the scan makes itself; of large images it does.
    assert (sizes is None) == (batch * height * width > 2**14)
    scanned, alone = core.scan(u.flatten(0, -2), codes, bad, sizes), core.scan(u.flatten(0, -2), codes, bad)
    assert torch.equal(scanned.nan_to_num(), alone.nan_to_num())
    assert torch.equal(scanned.isnan(), alone.isnan())
    whole, alone = core(x.flatten(1, 2), front=d), core.scan(*want)
    assert torch.equal(whole.isnan(), alone.isnan())


def test_step_sizes_of_large_images(by_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the scan makes them itself, which is faster."""
    operands = Operands(1, 9 * 20, 60, 4, 3)
    d = convolution("cpu", (1, 9, 20, 60), (3, 3), "silu", True, False)
    assert d.codes is not None
    operands.of_x = operands.of_u = d.codes
    core = operands.core(cuda, one=True)
    few = core.encode_behind(d)
    monkeypatch.setattr(cuda_fronted, "_FEW_BLOCKS", 0)
    many = core.encode_behind(d)
    assert few[3] is not None
    assert many[3] is None
    for a, b in zip(few[:3], many[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(core.scan(*few).nan_to_num(), core.scan(*many).nan_to_num())


CORES = [((1, 9, 20, 72), 4, 10), ((2, 5, 7, 60), 3, 4), ((1, 12, 33, 96), 6, 1), ((3, 4, 4, 18), 2, 3)]


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize(("size", "rank", "states"), CORES)
def test_core(by_cpu: None, size: Any, rank: int, states: int, also: bool) -> None:
    check_core("cpu", size, rank, states, also, coded=also)


def test_what_no_kernel_does_together(by_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fronted, "_MOST_CHANNELS", 8)
    d = convolution("cpu", (1, 4, 6, 12), (3, 3), None, True, False)
    weights = cuda.pack(*Operands.weight((7, 12), 4, 1.0))
    assert not cuda_fronted.takes(d, weights)
    assert d.codes is not None
    want = cuda.project(separately(d).flatten(1, 2), d.codes, weights)
    close(cuda.fronted(d, d.codes, weights, None, None, None).nan_to_num(), want.nan_to_num().double())


@pytest.mark.parametrize(
    ("size", "kernel", "taken"),
    [
        ((1, 12, 12, 96), (31, 31), False),  # no room for the rim
        ((1, 300, 300, 96), (9, 9), False),  # but for tiles that are too small
        ((1, 300, 300, 30), (3, 3), True),
        ((1, 6, 8, 20), (9, 9), True),
    ],
)
def test_windows(by_cpu: None, size: Any, kernel: Any, taken: bool) -> None:
    d = convolution("cpu", size, kernel, None, True, False)
    weights = cuda.pack(*Operands.weight((20, size[3]), 4, 1.0))
    assert cuda_fronted.takes(d, weights) is taken
    if size[1] < 20:
        assert d.codes is not None
        want = cuda.project(separately(d).flatten(1, 2), d.codes, weights)
        close(cuda.fronted(d, d.codes, weights, None, None, None).nan_to_num(), want.nan_to_num().double())


class Pair(nn.Module):
    """A depthwise convolution and a 1x1 one, as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        dilation = 2 if how == "dilated" else 1
        self.first = nn.Conv2d(16, 16, 3, padding=dilation, dilation=dilation, groups=16)
        self.act, self.second, self.last = nn.GELU(), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.first(x))
        if self.how == "written":
            x.mul_(1.0)
        z = self.last(self.second(y))
        return (z, y.mean()) if self.how == "twice" else z


@pytest.mark.parametrize(
    ("how", "fused"),
    [("", True), ("hooked", True), ("dilated", True), ("twice", False), ("written", False)],
)
def test_graphs(by_cpu: None, monkeypatch: pytest.MonkeyPatch, how: str, fused: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 7)
    model = converted(Pair(how), QConfig.recommended(6, 6, keep_first_last=False), x)
    seen: list[Any] = []
    if how == "hooked":
        model.act.register_forward_hook(lambda *_: seen.append(1))
    graph = deploy(record(model).graph, model, cuda)
    assert any("front" in n.kwargs for n in graph.nodes) is fused
    for module in (deployed, deployed_norms, deployed_values):
        monkeypatch.setattr(module, "engine_of", lambda _: cuda)
    want = unfused(model, x.clone())
    seen.clear()
    with torch.no_grad():
        got = fx.GraphModule(model, graph)(x.clone())
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        close(a, b.double(), 1e-2)  # a code on a tie may go the other way
    assert len(seen) == int(how == "hooked")


@pytest.mark.skipif(nvrtc.describe() is None, reason="needs NVRTC or nvcc")
@pytest.mark.parametrize("size", [(1, 16, 16, 72), (1, 180, 320, 30), (1, 180, 320, 96)])
def test_compiles_for_an_h100(monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    sources: list[str] = []

    class Kernels:
        def launch(self, *_args: Any, **_options: Any) -> None:
            pass

    monkeypatch.setattr(nvrtc, "load", lambda source, _: (sources.append(source), Kernels())[1])
    d = convolution("cpu", size, (3, 3), "silu", True, False, True)
    assert d.codes is not None
    assert d.also is not None
    cuda.fronted(
        d, d.codes, cuda.pack(*Operands.weight((60, size[3]), 4, 1.0)), torch.zeros(60), "silu", None
    )
    operands = Operands(1, size[1] * size[2], size[3], 10, 4)
    operands.of_x, operands.of_u = d.codes, d.also
    operands.core(cuda).encode_behind(d)
    assert len(sources) == 2
    assert all(nvrtc.compile_source(source, 90) for source in sources)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 64, 64, 30), (2, 33, 17, 72), (1, 180, 320, 60)])
def test_on_a_gpu(size: Any) -> None:
    case = {"size": size, "kernel": (3, 3), "act": "gelu", "coded": True, "factors": False}
    for columns in (False, True):
        check_projection("cuda", case, 60, None, columns)
    for also in (False, True):
        check_core("cuda", size, 4, 10, also, coded=True)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 64), (180, 320)])
def test_graphs_on_a_gpu(size: tuple[int, int]) -> None:
    """Captured kernels begin while others run: they give what they give one after the other."""
    model = ssmquant.load(shipped_model("w4a4")).cuda().eval()
    alone = copy.deepcopy(model)
    ssmquant.cuda_graph(model)
    with torch.no_grad():
        for _ in range(8):
            x = torch.rand(1, 3, *size, device="cuda")
            assert torch.equal(model(x), alone(x))
