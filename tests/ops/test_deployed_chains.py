"""Linear layers of deployed models on a GPU that do more than their own: a blend in front, another layer behind.

Run by a CPU (``emulator``), against the same calls one by one; and on a GPU if there is one.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ssmquant import QConfig
from ssmquant.graph.deploy import deploy
from ssmquant.graph.deploy_calls import blend_call, linear_call
from ssmquant.modules import deployed, deployed_values
from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import Norm, cpu, cuda
from tests.graph.deployed import converted, make, record, unfused
from tests.ops.deployed_cpu import make_grid
from tests.ops.deployed_cuda import Operands, emulated, there_is
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
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


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


def near(got: Tensor, want: Tensor) -> None:
    """But for codes next to a tie."""
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    got, want = (t.nan_to_num().double().cpu() for t in (got, want))
    off = (got - want).abs() > 1e-4 * want.abs().mean().clamp(min=1)
    assert float(off.double().mean()) <= 0.02


def blend(x: Tensor, gain: Tensor | None, v: Tensor, scale: Tensor) -> Tensor:
    return (x if gain is None else x * gain) + v * scale[:, None]


def check_blended(device: str, case: Any, gained: bool, columns: int | None, ends: bool) -> None:
    """A projection of a blend, and the blend; with codes, or with a bias, an activation and a residual."""
    torch.manual_seed(case["seed"])
    sizes, outputs = (case["samples"], case["rows"], case["inputs"]), case["outputs"]
    x, v, held = (wide(*sizes[:2], n, odd=case["odd"], device=device) for n in (sizes[2], sizes[2], outputs))
    gain = torch.randn(sizes[2], device=device) if gained else None
    scale = torch.rand(sizes[0], sizes[2], device=device)
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
    want = blend(x, gain, v, scale)
    torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert total.is_contiguous()
    plain = cuda.project(total, grid, weights, bias, **options)
    if columns is None:
        torch.testing.assert_close(got, plain, rtol=0, atol=0, equal_nan=True)
        return
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.isnan(), b.isnan())


@FEW
@given(CASES, st.booleans(), st.one_of(st.none(), WIDTHS), st.booleans())
def test_blended(by_cpu: None, case: Any, gained: bool, columns: int | None, ends: bool) -> None:
    check_blended("cpu", case, gained, columns, ends)


def check_blended_by_triton(device: str) -> None:
    """Where there is no kernel that does both."""
    case: Any = {"samples": 2, "rows": 20, "inputs": 300, "outputs": 120, "norm": {}, "odd": True, "seed": 0}
    check_blended(device, case, True, 40, True)


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


def graph_of(model: nn.Module) -> fx.Graph:
    return deploy(record(model).graph, model, cuda)


def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (deployed, deployed_values):
        monkeypatch.setattr(module, "engine_of", lambda _: cuda)
    monkeypatch.setattr(cuda, "blend", blend)


def agree(model: nn.Module, graph: fx.Graph, x: Tensor) -> None:
    want: Any = unfused(model, x)
    with torch.no_grad():
        got = fx.GraphModule(model, graph)(x)
    for a, b in zip(got, want, strict=True):
        near(a, b)


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
    assert len([n for n in graph.nodes if n.target is blend_call]) == 1
    assert not any("blended" in n.kwargs for n in deploy(record(model).graph, model, cpu).nodes)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(4096, 60, 144), (50, 9, 33), (1000, 96, 5)])
def test_blended_on_a_gpu(gained: bool, samples: int, rows: int, inputs: int, outputs: int) -> None:
    for i, norm in enumerate(NORMS):
        case = {
            "samples": samples,
            "rows": rows,
            "inputs": inputs,
            "outputs": outputs,
            "norm": norm,
            "odd": i == 1,
        }
        check_blended("cuda", {**case, "seed": i}, gained, (None, outputs // 2, outputs)[i % 3], i % 2 == 0)
    check_blended_by_triton("cuda")
