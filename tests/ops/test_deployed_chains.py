"""Linear layers of deployed models on a GPU that do more than their own: a blend in front, another layer behind.

Run by a CPU (``emulator``), against the same calls one by one; and on a GPU if there is one.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ssmquant import QConfig
from ssmquant.graph.deploy import deploy
from ssmquant.graph.deploy_calls import blend_call, excite_call, gated_linear_call, linear_call
from ssmquant.modules import deployed, deployed_norms, deployed_values
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import Attention, Layer, Norm, cpu, cuda, cuda_thin
from tests.graph.deployed import converted, make, record, unfused
from tests.ops.deployed_cpu import close, make_grid
from tests.ops.deployed_cuda import Operands, emulated, same_codes, there_is
from tests.ops.interpreted import in_process, make_interpreter_work

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))
NORMS: Any = (None, {}, {"bias": False}, {"rms": True}, {"factors": True})
WIDTHS = st.integers(5, 96)
CASES: Any = st.fixed_dictionaries(
    {
        "samples": st.sampled_from([1, 3]),
        "rows": st.integers(1, 50),
        "inputs": WIDTHS,
        "outputs": WIDTHS,
        "norm": st.sampled_from(NORMS),
        "odd": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a failure is small, and each case is compiled
FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)


def wide(*sizes: int, odd: bool, device: str) -> Tensor:
    """Random rows that are parts of longer ones, of odd length or as kernels like them."""
    more = 3 if odd else 4 + -sizes[-1] % 4
    whole = torch.full((*sizes[:-1], sizes[-1] + more), math.nan)
    whole[..., : sizes[-1]] = torch.randn(sizes)
    return whole.to(device)[..., : sizes[-1]]


def norm_of(kind: Any, inputs: int, device: str) -> Norm | None:
    if kind is None:
        return None
    options = dict(kind)
    bias = torch.randn(inputs, device=device) if options.pop("bias", not options) else None
    return Norm(torch.rand(inputs, device=device) + 0.5, bias, 1e-5, **options)


def weights_of(outputs: int, inputs: int, device: str) -> Any:
    return cuda.pack(*(t.to(device) for t in Operands.weight((outputs, inputs), 4, 1.0)))


def near(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """A GPU may round a sum before it is a code otherwise: then codes next to a tie are others."""
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    default = 2e-6 if got.device.type == "cpu" else 1e-2
    close(got.nan_to_num(), want.nan_to_num().double(), default if tolerance is None else tolerance)


def alike(got: Any, want: Any) -> None:
    """Values, or codes and values."""
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        if a.dtype == torch.int8:
            same_codes(a, b.cpu())
        else:
            near(a, b)


def blend(x: Tensor, gain: Tensor | None, v: Tensor, scale: Tensor) -> Tensor:
    return (x if gain is None else x * gain) + v * scale[:, None]


def check_blended(
    device: str, case: Any, gained: bool, columns: int | None, ends: bool, tiles: int = 0
) -> None:
    """A projection of a blend, and the blend; with codes, or with a bias, an activation and a residual.

    ``tiles``: of so many the blend's factors are channel attention.
    """
    torch.manual_seed(case["seed"])
    sizes, outputs = (case["samples"], case["rows"], case["inputs"]), case["outputs"]
    x, v, held = (wide(*sizes[:2], n, odd=case["odd"], device=device) for n in (sizes[2], sizes[2], outputs))
    gain = torch.randn(sizes[2], device=device) if gained else None
    scale: Any = torch.rand(sizes[0], sizes[2], device=device)
    factors = scale
    if tiles:
        hidden = 1 + case["seed"] % 7
        of_tiles = torch.randn(sizes[0], tiles, sizes[2]) * sizes[1] / tiles
        shapes = (hidden, sizes[2]), (hidden,), (sizes[2], hidden), (sizes[2],)
        scale = Attention(*(t.to(device) for t in (of_tiles, *(torch.randn(s) for s in shapes))))
        inside = (of_tiles.double().sum(1) / sizes[1]) @ scale.first.cpu().double().T
        inside = (inside + scale.first_bias.cpu()).relu() @ scale.second.cpu().double().T
        factors = torch.sigmoid(inside + scale.second_bias.cpu()).float().to(device)
    x[-1, -1, 2] = v[0, 0, -1] = math.nan
    grid, following = (there_is(make_grid(4, 1), device) for _ in range(2))
    options: Any = {"norm": norm_of(case["norm"], sizes[2], device)}
    if ends:
        options |= {"act": "gelu", "residual": (held, None)}
    if columns is not None:
        columns = min(columns, outputs)
        options["codes"] = following, columns, None
    bias = torch.randn(outputs, device=device) if ends else None
    weights = weights_of(outputs, sizes[2], device)
    got, total = cuda.project(x, grid, weights, bias, blended=(gain, v, scale), **options)
    want, tolerance = blend(x, gain, v, factors), 1e-4 if tiles else 1e-6
    torch.testing.assert_close(total, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert total.is_contiguous()
    alike(got, cuda.project(total, grid, weights, bias, **options))


@FEW
@given(CASES, st.booleans(), st.one_of(st.none(), WIDTHS), st.booleans(), st.sampled_from([0, 0, 1, 7, 64]))
def test_blended(by_cpu: None, case: Any, gained: bool, columns: int | None, ends: bool, tiles: int) -> None:
    check_blended("cpu", case, gained, columns, ends, tiles)


def check_blended_by_triton(device: str) -> None:
    """Where there is no kernel that does both."""
    case: Any = {"samples": 2, "rows": 20, "inputs": 300, "outputs": 120, "norm": {}, "odd": True, "seed": 0}
    check_blended(device, case, True, 40, True)
    check_blended(device, case, False, None, True, 5)
    check_blended(
        device, {**case, "inputs": 40}, True, None, False, 65
    )  # more tiles than a block should add up


def check_two_layers(device: str, case: Any, last: int, ends: Any, columns: int | None, kept: bool) -> None:
    """A projection and one of its result, by one call and by two.

    Args:
        ends: parts of x, and whether there are a gate, residual, gain, and a bias and activation of the last one.
        columns: of codes that the last one gives.
    """
    torch.manual_seed(case["seed"])
    parts, gated, held, gained, active = ends
    sizes, outputs = (case["samples"], case["rows"], case["inputs"]), case["outputs"]
    many = torch.stack([wide(*sizes, odd=case["odd"], device=device) for _ in range(parts)])
    z, residual = (wide(*sizes[:2], n, odd=case["odd"], device=device) for n in (sizes[2], outputs))
    if parts == 1:
        many = many.clone() if not case["odd"] else many
    many[0, -1, -1, 2] = math.nan
    grid, between, following = (there_is(make_grid(4, 1), device) for _ in range(3))
    gain = torch.randn(outputs, device=device) if gained else None
    options: Any = {"norm": norm_of(case["norm"], sizes[2], device), "more": tuple(many[1:])}
    if gated:
        options["z"] = z
    if held:
        residual[0, 0, 1] = math.nan
        options["residual"] = residual, gain
    codes = None if columns is None else (following, min(columns, last), None)
    if codes is not None and active:
        codes = (*codes[:2], torch.rand(codes[1], device=device) + 0.5)
    bias = torch.randn(last, device=device) if active else None
    norm = norm_of(NORMS[case["seed"] % len(NORMS)], outputs, device)
    act = "silu" if active else None
    then = Layer(between, weights_of(last, outputs, device), bias, norm, act, codes)
    operands = many[0], grid, weights_of(outputs, sizes[2], device)
    got = cuda.project(*operands, **options, then=then, kept=kept)
    first = cuda.project(*operands, **options)
    want = cuda.project(first, between, then.weights, bias, norm=norm, act=act, codes=codes)
    if kept:
        values, got = got
        near(values, first)
    alike(got, want)


ENDS = st.tuples(st.sampled_from([1, 2]), *[st.booleans()] * 4)


@FEW
@given(CASES, WIDTHS, ENDS, st.one_of(st.none(), WIDTHS), st.booleans())
def test_two_layers(by_cpu: None, case: Any, last: int, ends: Any, columns: int | None, kept: bool) -> None:
    check_two_layers("cpu", case, last, ends, columns, kept)


def test_two_layers_of_codes(by_cpu: None) -> None:
    """The first one reads codes, the last one gives some."""
    torch.manual_seed(0)
    grid, between = make_grid(4, 1), make_grid(4, 1)
    codes = torch.randint(-1, 16, (1, 37, 30), dtype=torch.int8)
    codes[0, 5:] = codes[0, 5:].clamp(min=0)
    weights, behind = weights_of(44, 30, "cpu"), weights_of(20, 44, "cpu")
    first = cuda.project(codes, grid, weights, act="gelu")
    want, rest = cuda.project(first, between, behind, codes=(grid, 9, None))
    then = Layer(between, behind, None, None, None, (grid, 9, None))
    made, others = cuda.project(codes, grid, weights, act="gelu", then=then, kept=False)
    same_codes(made, want)
    near(others, rest)


@pytest.mark.parametrize(("outputs", "last", "inputs"), [(97, 20, 40), (90, 400, 40), (60, 20, 200)])
def test_layers_that_no_kernel_does_together(
    by_cpu: None, monkeypatch: pytest.MonkeyPatch, outputs: int, last: int, inputs: int
) -> None:
    """Are two calls: the last one's weights, or what is between, or the first one's input is too large."""
    torch.manual_seed(0)
    calls: list[bool] = []
    one = cuda_thin.project
    monkeypatch.setattr(cuda_thin, "project", lambda *a: calls.append(a[11] is not None) or one(*a))
    monkeypatch.setattr(cuda, "_launch", lambda *a: calls.append(False))
    grid = make_grid(4, 1)
    then = Layer(grid, weights_of(last, outputs, "cpu"), None, None, None, None)
    y, behind = cuda.project(torch.randn(1, 20, inputs), grid, weights_of(outputs, inputs, "cpu"), then=then)
    assert len(calls) >= 2
    assert not any(calls)
    assert y.shape == (1, 20, outputs)
    assert behind.shape == (1, 20, last)


@pytest.mark.slow
@pytest.mark.skipif(nvrtc.describe() is None, reason="needs NVRTC or nvcc")
def test_compiles_for_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in MambaIR, at the sizes of small images and of large ones."""
    sources: set[str] = set()

    class Compiled:
        def launch(self, *_: Any, **__: Any) -> None:
            pass

    monkeypatch.setattr(nvrtc, "load", lambda source, _: sources.add(source) or Compiled())
    ones, grid = torch.ones, make_grid(4, 1)
    norms = [Norm(ones(n), ones(n), 1e-5) for n in (60, 72)]
    for rows in (4096, 57600):
        x, z = (ones(1, rows, n) for n in (60, 72))
        then = Layer(grid, weights_of(30, 60, "cpu"), ones(30), norms[0], None, (grid, 30, None))
        residual = x, ones(60)
        weights = weights_of(60, 72, "cpu")
        cuda.project(z, grid, weights, norm=norms[1], z=z, residual=residual, more=(z.clone(),), then=then)
        blended = ones(60), x, ones(1, 60)
        cuda.project(
            x, grid, weights_of(144, 60, "cpu"), norm=norms[0], codes=(grid, 72, None), blended=blended
        )
    assert len(sources) == 4
    assert all(nvrtc.compile_source(source, 90) for source in sources)


def interpret(check: str) -> None:
    make_interpreter_work()
    nvrtc.load = lambda source, _: emulated(source)  # type: ignore[assignment]
    globals()[check]("cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_blended_by_triton() -> None:
    in_process("test_deployed_chains", "interpret('check_blended_by_triton')", TRITON_INTERPRET="1")


# ---- graphs ----------------------------------------------------------------------------------------------------------


class Attended(nn.Module):
    """A blend, as behind channel attention, and a layer that reads it, as a block of pixels or of windows."""

    def __init__(self, written: str = "", rows: int = 3) -> None:
        super().__init__()
        self.inner, self.norm, self.last = nn.Conv2d(12, 12, 1), nn.LayerNorm(12), nn.Linear(12, 20)
        self.gain, self.written, self.rows = nn.Parameter(torch.rand(12) + 0.5), written, rows

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, h, w, c = x.shape
        y = self.inner(x.permute(0, 3, 1, 2))
        y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        z = x * self.gain + y.permute(0, 2, 3, 1).contiguous()
        if self.written == "before":
            z.mul_(2)
        rows = z.view(b, h * w, c).contiguous()
        n = rows.size(0)
        image = rows.view(n, -1, w, c) if self.rows == 3 else rows.view(n, -1, 4, w // 4 * c)
        out = self.last(self.norm(image if self.rows == 3 else rows))
        if self.written == "after":
            rows.add_(1)
        return out, z * 2


class Attending(nn.Module):
    """Channel attention, of a depthwise convolution's result, and the layer that reads the blend."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.depthwise = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.act, self.norm, self.last = nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 20)
        layers = nn.Conv2d(12, 3, 1), nn.ReLU(), nn.Conv2d(3, 12, 1), nn.Sigmoid()
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.depthwise(self.inner(x.permute(0, 3, 1, 2))))
        z = x + (y * self.attention(y)).permute(0, 2, 3, 1)
        return self.last(self.norm(z)), z * 2


class Behind(nn.Module):
    """Two layers, one behind the other, and what may be between."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 9)
        self.act, self.between = nn.GELU(), between

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.between == "act":
            y = self.act(y)
        if self.between == "views":
            rows = y.view(y.size(0), -1, 20).contiguous()
            return self.last(F.layer_norm(rows.view(-1, 20), (20,))), y * 2
        if self.between == "turned":
            return self.last(self.norm(y.transpose(1, 2))), y
        if self.between == "windows":  # the norm, if it had a hook, would be called with another shape
            return self.last(self.norm(y.view(y.size(0), -1, 20))), y
        if self.between == "written":
            z = self.last(self.norm(y))
            return z, y.mul_(2)
        if self.between == "alone":
            return self.act(self.last(self.norm(y)))
        return self.last(self.norm(y)), y * 2


def graph_of(model: nn.Module) -> fx.Graph:
    return deploy(record(model).graph, model, cuda)


def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (deployed, deployed_norms, deployed_values):
        monkeypatch.setattr(module, "engine_of", lambda _: cuda)
    monkeypatch.setattr(cuda, "blend", blend)
    monkeypatch.setattr(cuda, "normalizes", lambda _: False)


def excite(
    x: Tensor, first: Tensor, a: Tensor, second: Tensor, b: Tensor, parts: Tensor | None = None
) -> Tensor:
    return torch.sigmoid(F.relu(x.mean(1) @ first.T + a) @ second.T + b)


def agree(model: nn.Module, graph: fx.Graph, x: Tensor) -> None:
    want: Any = unfused(model, x)
    with torch.no_grad():
        got = fx.GraphModule(model, graph)(x)
    for a, b in zip(got, want, strict=True):
        near(a, b, 1e-2)  # the other kernels round as they do


@pytest.mark.parametrize("rows", [3, 2])
def test_a_layer_takes_in_the_blend_that_it_reads(
    by_cpu: None, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    torch.manual_seed(0)
    model = converted(
        Attended(rows=rows), QConfig.recommended(6, 6, keep_first_last=False), torch.randn(2, 5, 8, 12)
    )
    graph = graph_of(model)
    calls = [n for n in graph.nodes if n.target is linear_call]
    fused = rows == 3  # else the norm, if it had a hook, would be called with another shape
    assert [("blended" in n.kwargs) for n in calls] == [fused]
    assert any(n.target is blend_call for n in graph.nodes) is not fused
    engines(monkeypatch)
    for shape in ((2, 5, 8, 12), (1, 3, 4, 12), (3, 16, 16, 12)):
        agree(model, graph, torch.randn(shape))
    shapes: list[Any] = []
    model.norm.register_forward_hook(lambda module, args, out: shapes.append(out.shape) or out * 2)
    agree(model, graph, torch.randn(2, 5, 8, 12))
    assert len(set(shapes)) == 1


def test_a_layer_makes_the_attention_of_the_blend_that_it_reads(
    by_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks, of the convolution whose sums it would read too, have it made by calls as ever."""
    torch.manual_seed(0)
    config = QConfig.recommended(6, 6, keep_first_last=False)
    model = converted(Attending(), config, torch.randn(2, 5, 8, 12))
    graph = graph_of(model)
    (call,) = [n for n in graph.nodes if n.target is linear_call]
    assert len(call.kwargs["blended"][2]) == 7
    assert not any(n.target in (blend_call, excite_call) for n in graph.nodes)
    engines(monkeypatch)
    seen: list[int] = []
    monkeypatch.setattr(cuda, "excite", lambda *a: seen.append(len(a)) or excite(*a))
    for shape in ((2, 5, 8, 12), (1, 3, 4, 12), (3, 16, 16, 12)):
        agree(model, graph, torch.randn(shape))
    assert not seen
    with monkeypatch.context() as patch:
        patch.setattr(cuda_thin, "_FEW_TILES", 0)
        agree(model, graph, torch.randn(1, 9, 40, 12))
    assert len(seen) == 1
    for module in (model.act, model.norm, model.attention[1]):
        handle = module.register_forward_hook(lambda module, args, out: out * 2)
        agree(model, graph, torch.randn(2, 5, 8, 12))
        handle.remove()
    assert len(seen) == 3


@pytest.mark.parametrize("written", ["before", "after"])
def test_blends_that_are_written_to_stay(written: str) -> None:
    torch.manual_seed(0)
    model = converted(
        Attended(written), QConfig.recommended(6, 6, keep_first_last=False), torch.randn(2, 5, 8, 12)
    )
    assert not any("blended" in n.kwargs for n in graph_of(model).nodes)


def test_blends_of_mambair() -> None:
    """All but the last of each group, which convolutions read."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    graph = graph_of(model)
    calls = [n for n in graph.nodes if "blended" in n.kwargs]
    assert [n.target for n in calls] == [linear_call]
    assert len(calls[0].kwargs["blended"][2]) == 7  # with its attention
    assert len([n for n in graph.nodes if n.target is blend_call]) == 1
    assert len([n for n in graph.nodes if n.target is excite_call]) == 1
    assert not any("blended" in n.kwargs for n in deploy(record(model).graph, model, cpu).nodes)


@pytest.mark.parametrize(
    ("between", "fused"),
    [
        ("act", True),
        ("views", True),
        ("alone", True),
        ("turned", False),
        ("windows", False),
        ("written", False),
    ],
)
def test_a_layer_does_what_the_one_that_reads_it_does(
    by_cpu: None, monkeypatch: pytest.MonkeyPatch, between: str, fused: bool
) -> None:
    torch.manual_seed(0)
    model = converted(
        Behind(between), QConfig.recommended(8, 8, keep_first_last=False), torch.randn(2, 5, 8, 12)
    )
    graph = graph_of(model)
    calls = [n for n in graph.nodes if n.target is linear_call]
    assert len(calls) == 2 - fused
    assert [n.kwargs["then"][-1] for n in calls if "then" in n.kwargs] == [between != "alone"] * fused
    assert not any("then" in n.kwargs for n in deploy(record(model).graph, model, cpu).nodes)
    of_sites = {name for n in graph.nodes for name in n.meta.get("kernels", {})}
    assert len(of_sites) == 2
    engines(monkeypatch)
    for shape in ((2, 5, 8, 12), (1, 3, 4, 12), (3, 16, 16, 12)):
        agree(model, graph, torch.randn(shape))
    if between in ("act", "alone"):
        for module in (model.norm, model.act):
            shapes: list[Any] = []
            module.register_forward_hook(
                lambda module, args, out, shapes=shapes: shapes.append(out.shape) or out * 2
            )
            agree(model, graph, torch.randn(2, 5, 8, 12))
            assert len(set(shapes)) == 1


class Coded(nn.Module):
    """As ``Behind``, of codes that a layer in front has written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.before, self.behind = kind, nn.Linear(12, 12), Behind("norm")
        nn.init.uniform_(self.behind.norm.weight, 0.5, 2)
        nn.init.normal_(self.behind.norm.bias)

    def forward(self, x: Tensor) -> Any:
        x = F.gelu(self.before(x))
        if self.kind == "norm":
            return self.behind(x)
        y = self.behind.first(x)
        return self.behind.last(F.rms_norm(y, (20,)) if self.kind == "rms" else y * 2), y + 1


@pytest.mark.parametrize("kind", ["norm", "rms", "factors"])
@pytest.mark.parametrize("bits", [4, 7])
def test_two_layers_of_codes_in_front(
    by_cpu: None, monkeypatch: pytest.MonkeyPatch, bits: int, kind: str
) -> None:
    torch.manual_seed(0)
    config = QConfig.recommended(bits, bits, keep_first_last=False)
    model = converted(Coded(kind), config, torch.randn(2, 5, 8, 12))
    graph = graph_of(model)
    assert kind == "factors" or any("then" in n.kwargs and n.kwargs.get("coded") for n in graph.nodes)
    engines(monkeypatch)
    agree(model, graph, torch.randn(3, 4, 4, 12))


def test_two_layers_of_mambair() -> None:
    """The output projection and the first 1x1 convolution of channel attention; blends go to the input projections."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    graph = graph_of(model)
    calls = [n for n in graph.nodes if "then" in n.kwargs]
    assert [n.target for n in calls] == [gated_linear_call] * 2
    for call in calls:
        of_x, weight, *_, codes, kept = call.kwargs["then"]
        assert kept
        assert codes[1] is codes[2] is None
        assert str(weight.target).endswith("cab/0:weight")
        assert "cab/0" in str(of_x.target)
    assert len([n for n in graph.nodes if n.target is linear_call]) == 2
    assert sum("more" in n.kwargs for n in calls) == 2


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def with_norms(**sizes: int) -> list[Any]:
    """A case of each kind of norm."""
    return [{**sizes, "norm": norm, "odd": i == 1, "seed": i} for i, norm in enumerate(NORMS)]


@pytest.mark.gpu
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(4096, 60, 144), (50, 9, 33), (1000, 96, 5)])
def test_blended_on_a_gpu(gained: bool, samples: int, rows: int, inputs: int, outputs: int) -> None:
    for i, case in enumerate(with_norms(samples=samples, rows=rows, inputs=inputs, outputs=outputs)):
        check_blended("cuda", case, gained, (None, outputs // 2, outputs)[i % 3], i % 2 == 0)
        check_blended("cuda", case, gained, (None, outputs)[i % 2], i % 2 == 0, (64, 3, 1, 33, 65)[i])
    check_blended_by_triton("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "last"),
    [(4096, 72, 60, 30), (57600, 72, 60, 30), (50, 9, 33, 80), (1000, 96, 96, 5), (333, 192, 90, 17)],
)
def test_two_layers_on_a_gpu(
    kept: bool, samples: int, rows: int, inputs: int, outputs: int, last: int
) -> None:
    for i, case in enumerate(with_norms(samples=samples, rows=rows, inputs=inputs, outputs=outputs)):
        ends = 1 + i % 2, i % 3 != 0, i != 2, i % 2 == 0, i > 1
        check_two_layers("cuda", case, last, ends, (last, None, last // 2)[i % 3], kept)


@pytest.mark.gpu
def test_graphs_on_a_gpu() -> None:
    """As their nodes compute them, with hooks."""
    x = torch.randn(2, 5, 8, 12)
    for module in (Attended(), Attending(), Behind("views"), Behind("alone"), Behind("act")):
        torch.manual_seed(0)
        model = converted(module, QConfig.recommended(6, 6, keep_first_last=False), x).cuda()
        graph = graph_of(model)
        assert any({"then", "blended"} & n.kwargs.keys() for n in graph.nodes)
        agree(model, graph, x.cuda())
        model.norm.register_forward_hook(lambda module, args, out: out * 2)
        agree(model, graph, x.cuda())
