"""What the deployed graph of a GPU has beyond a CPU's: codes and sums between calls, norms, attention; fall backs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.graph.deploy import deploy
from ssmquant.graph.deploy_calls import conv2d_call, excite_call, linear_call
from ssmquant.graph.orders import Unfit
from ssmquant.modules import deployed, deployed_norms
from ssmquant.ops import use_backend
from ssmquant.ops.deployed import Norm, cpu, cuda
from ssmquant.ops.nvrtc import CompileError
from tests.graph.deployed import converted, make, names, record
from tests.graph.test_fuse import ByConvolution, Scan2d, SquareOrders


def test_channel_attention_on_a_gpu() -> None:
    """Is one call, which hooks of its modules turn into calls of these, where no layer makes it with its blend."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    graph = deploy(record(model).graph, model, cuda)
    calls = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "excite_call"]
    assert len(calls) == 1
    modules = [model.get_submodule(str(n.target)) for n in calls[0].args[1:]]
    x = torch.randn(2, modules[1].in_channels, 4, 5)
    plain = nn.Sequential(*modules)
    before = plain(x)
    modules[2].register_forward_hook(lambda module, args, out: out + 1)
    target: Any = calls[0].target
    assert torch.equal(target(x, *modules), plain(x))
    assert not torch.equal(plain(x), before)


def test_attention_is_given_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the depthwise convolution in front of it, unless its activation has a hook."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    graph = deploy(record(model).graph, model, cuda)
    calls = [n for n in graph.nodes if n.target is excite_call]
    blended: Any = [n.kwargs["blended"] for n in graph.nodes if "blended" in n.kwargs]
    given = [(n.args[0], n.kwargs["parts"]) for n in calls] + [(scale[0], scale[-1]) for *_, scale in blended]
    assert len(given) == 2
    result: Any
    parts: Any
    for result, parts in given:
        assert result.args[0] is parts.args[0]
        assert [result.args[1], parts.args[1]] == [0, 1]
        convolution: Any = result.args[0]
        assert convolution.kwargs["sums"]
        others = [n for n in convolution.users if n not in (result, parts)]
        assert not others
    weight: Any = model.get_submodule(str(calls[0].args[0].args[0].args[2].target))
    of_x: Any = model.get_submodule(str(calls[0].args[0].args[0].args[1].target))
    seen: list[bool] = []

    def kernel(*operands: Any, sums: bool = False) -> Any:
        seen.append(sums)
        y = cpu.depthwise(*operands)
        return (y, y.sum((1, 2))[:, None]) if sums else y

    monkeypatch.setattr(cuda, "depthwise", kernel)
    monkeypatch.setattr(cuda, "by_lanes", cpu.by_lanes)
    monkeypatch.setattr(deployed, "engine_of", lambda _: cuda)
    image, window, act = torch.randn(2, weight.shape[0], 5, 6), ((1, 1), (1, 1), (1, 1)), nn.GELU()
    y, parts = deployed.conv2d(image, of_x, weight, None, window, act, sums=True)
    torch.testing.assert_close(parts.sum(1), y.sum((2, 3)))
    act.register_forward_hook(lambda module, args, out: out + 1)
    changed, none = deployed.conv2d(image, of_x, weight, None, window, act, sums=True)
    torch.testing.assert_close(changed, y + 1)
    assert none is None
    assert seen == [True, False]


class Added(nn.Module):
    """A dense convolution, and what is added to its image or to the rows of it."""

    def __init__(self, rows: bool, stride: int = 1, twice: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 5, 3, stride=stride, padding=1)
        self.rows, self.twice = rows, twice

    def forward(self, x: Tensor, other: Tensor) -> Any:
        y = self.layer(x)
        if self.rows:
            y = y.flatten(2).transpose(1, 2)
        return (y + other, y * 2) if self.twice else y + other


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"rows": True}, True),
        ({"rows": False}, True),
        ({"rows": False, "stride": 2}, True),
        ({"rows": True, "stride": 2}, False),  # of another size than what is known of the input
        ({"rows": True, "twice": True}, False),
    ],
)
def test_what_is_added_to_a_dense_convolution(
    options: Any, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stride = options.get("stride", 1)
    x = torch.randn(2, 6, 8, 4)
    other = torch.randn(2, 5, 8 // stride, 4 // stride)
    other = other.flatten(2).transpose(1, 2).contiguous() if options["rows"] else other
    config = QConfig.recommended(4, 4, keep_first_last=False)
    prepared = ssmquant.prepare(Added(**options), config, example_inputs=(x, other))
    prepared(x, other)
    model = ssmquant.convert(prepared.eval())
    with torch.no_grad():
        want = model(x, other)
    graph = deploy(record(model).graph, model, cuda)
    calls = [n for n in graph.nodes if n.target is conv2d_call]
    assert [len(n.args) == 9 for n in calls] == [fused]
    assert any(n.name.startswith("add") for n in graph.nodes) is not fused
    plain = deploy(record(model).graph, model, cpu)
    assert [len(n.args) for n in plain.nodes if n.target is conv2d_call] == [8]

    def kernel(*operands: Any, residual: Tensor | None = None) -> Tensor:
        y = cpu.convolve(*operands)
        return y if residual is None else y + residual.view(y.shape)

    for name in ("by_lanes", "pack"):
        monkeypatch.setattr(cuda, name, getattr(cpu, name))
    monkeypatch.setattr(cuda, "convolve", kernel)
    monkeypatch.setattr(deployed, "engine_of", lambda _: cuda)
    with torch.no_grad():
        got = fx.GraphModule(model, graph)(x, other)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("others", [1, 3])
def test_rows_that_are_added_to_all_samples(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of one sample does not tell them from those of one each: what does not fit is no sum of a kernel."""
    torch.manual_seed(0)
    x, other = torch.randn(1, 6, 8, 4), torch.randn(1, 32, 5)
    config = QConfig.recommended(4, 4, keep_first_last=False)
    prepared = ssmquant.prepare(Added(rows=True), config, example_inputs=(x, other))
    prepared(x, other)
    model = ssmquant.convert(prepared.eval())
    graph = deploy(record(model).graph, model, cuda)
    (call,) = [n for n in graph.nodes if n.target is conv2d_call]
    assert len(call.args) == 9
    x, other = torch.randn(3, 6, 8, 4), torch.randn(others, 32, 5)
    with torch.no_grad():
        want = model(x, other)
    for name in ("by_lanes", "pack"):
        monkeypatch.setattr(cuda, name, getattr(cpu, name))
    monkeypatch.setattr(
        cuda, "convolve", lambda *operands, residual: cpu.convolve(*operands) + residual.unflatten(1, (8, 4))
    )
    monkeypatch.setattr(deployed, "engine_of", lambda _: cuda)
    with torch.no_grad():
        fused = fx.GraphModule(model, graph)
        if others == 1:
            with pytest.raises(Unfit):
                fused(x, other)
        else:
            torch.testing.assert_close(fused(x, other), want, rtol=1e-4, atol=1e-5)
        with pytest.raises(Unfit):
            fused(x[:0], other[:0])


def with_one_norm(model: nn.Module) -> tuple[fx.Graph, fx.Node]:
    """The graph of a GPU, and the call of the one norm that no layer takes in."""
    graph = deploy(record(model).graph, model, cuda)
    (call,) = [n for n in graph.nodes if n.target is deployed.normalize]
    return graph, call


def test_norms_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no layer takes in are one call each, which hooks turn into a call of the module."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    assert "normalize" not in names(model)
    graph = deploy(record(model).graph, model, cuda)
    calls = [n for n in graph.nodes if n.target is deployed.normalize]
    modules = [model.get_submodule(str(n.args[1][0].target)) for n in calls]
    assert modules == [model.patch_embed.norm, model.norm]
    assert not any(n.op == "call_module" and n.target in ("patch_embed.norm", "norm") for n in graph.nodes)
    norm = modules[0]
    launched: list[Any] = []

    def kernel(x: Tensor, norm: Norm, before: Tensor | None, act: str | None) -> Tensor:
        assert before is act is None
        launched.append(norm)
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps).contiguous()

    monkeypatch.setattr(cuda, "normalize", kernel)
    monkeypatch.setattr(deployed_norms, "engine_of", lambda _: cuda)
    image = torch.randn(2, 20, 35).transpose(1, 2)
    before = deployed.normalize(image, (norm,))
    assert torch.equal(before, norm(image))
    assert len(launched) == 1
    handle = norm.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(deployed.normalize(image, (norm,)), before + 1)
    handle.remove()
    assert len(launched) == 1


@pytest.mark.parametrize("kind", ["plain", "read twice", "reflect", "no bias", "tanh"])
def test_norms_of_images_on_a_gpu(kind: str) -> None:
    """With the bias of the float convolution in front and the activation behind, where nothing else reads these."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mode = "reflect" if kind == "reflect" else "zeros"
            self.conv = nn.Conv2d(3, 6, 3, padding=1, padding_mode=mode, bias=kind != "no bias")
            self.norm, self.act = nn.LayerNorm(6), nn.GELU(approximate="tanh" if kind == "tanh" else "none")
            self.last, self.head = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out: Tensor = self.head(self.last(self.act(z)))
            return out + y.mean() if kind == "read twice" else out

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 9)
    model = converted(Stem(), QConfig.recommended(8, 8), x)
    _, call = with_one_norm(model)
    taken = kind in ("plain", "tanh")
    value: Any = call.args[0]
    assert value.target == ("arg_0" if taken else "permute")
    assert len(call.args) == 2 + taken
    assert ("act" in call.kwargs) is (kind != "tanh")
    with torch.no_grad():
        rows = model.conv(x).permute(0, 2, 3, 1)
        want = model.norm(rows) if kind == "tanh" else model.act(model.norm(rows))
        more: Any = {} if kind == "tanh" else {"act": model.act}
        got = deployed.normalize(x if taken else rows, (model.norm,), model.conv if taken else None, **more)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_norms_of_images_are_of_what_was_there() -> None:
    """A convolution whose input is written to before its norm stays where it is."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = (
                nn.Conv2d(3, 6, 3, padding=1),
                nn.LayerNorm(6),
                nn.Conv2d(6, 6, 3),
            )
            self.head = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.conv(x)
            x.mul_(2)
            z = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out: Tensor = self.head(self.last(z)) + x.mean()
            return out

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 9)
    model = converted(Written(), QConfig.recommended(8, 8), x)
    _, call = with_one_norm(model)
    assert len(call.args) == 2
    assert call.args[0].target == "permute"


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_hooks_of_activations_behind_norms_see_their_layout(quantized: bool, first: bool) -> None:
    """Of a float convolution or another one in front; with channels first or last."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Conv2d(6, 6, 1) if quantized else nn.Identity()  # the first one stays in float
            self.conv, self.norm = nn.Conv2d(6, 6, 3), nn.LayerNorm(6)
            self.act, self.last, self.head = nn.SiLU(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(self.before(x)).permute(0, 2, 3, 1))
            y = self.act(y.permute(0, 3, 1, 2)) if first else self.act(y).permute(0, 3, 1, 2)
            out: Tensor = self.head(self.last(y))
            return out

    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 9)
    model = converted(Stem(), QConfig.recommended(8, 8), x)
    graph, call = with_one_norm(model)
    assert len(call.args) == 2 + (not quantized)
    assert "act" in call.kwargs
    seen: list[tuple[int, ...]] = []
    with torch.no_grad():
        want = model(x)
        model.act.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        got = fx.GraphModule(model, graph)(x)
    assert seen == [(2, 6, 6, 7) if first else (2, 6, 7, 6)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_norms_of_images_keep_the_dtype_of_the_convolution() -> None:
    """Also where autocast has it in another one than its bias."""
    convolution, norm = nn.Conv2d(3, 6, 3), nn.RMSNorm(6, elementwise_affine=False)
    x = torch.randn(2, 3, 8, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = deployed.normalize(x, (norm,), convolution)
        want = norm(convolution(x).permute(0, 2, 3, 1))
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_norms_that_are_functions_on_a_gpu() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)
            self.both = nn.LayerNorm((3, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.first(x)
            a, b = F.layer_norm(y, (6,), eps=1e-3), F.rms_norm(y, (6,), eps=1e-4)
            return self.last(F.layer_norm(y, (6,))), a + a, b, self.both(y), F.layer_norm(y, (3, 6))

    torch.manual_seed(0)
    model = converted(Normed(), QConfig.recommended(8, 8, keep_first_last=False), torch.randn(2, 3, 6))
    graph = deploy(record(model).graph, model, cuda)
    calls = [n.args[1] for n in graph.nodes if n.target is deployed.normalize]
    assert calls == [(False, None, None, 1e-3), (True, None, None, 1e-4)]
    assert [n.args[1] for n in graph.nodes if n.target is F.layer_norm] == [(3, 6)]


def test_codes_go_from_call_to_call_on_a_gpu() -> None:
    """What one quantizer alone reads, of at most 7 bits; parts of a scan go to the layer that reads their sum."""
    for bits in (7, 8):
        model, _ = make("mambair", QConfig.recommended(bits, bits))
        graph = deploy(record(model).graph, model, cuda)
        assert not any(
            n.kwargs for n in deploy(record(model).graph, model, cpu).nodes if "call" in str(n.target)
        )
        of_then: Any = {n: n.kwargs["then"][6] for n in graph.nodes if "then" in n.kwargs}
        given = {n: n.kwargs.get("codes", of_then.get(n)) for n in graph.nodes}
        written = [n for n in graph.nodes if given[n] is not None]
        cores = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "scan_core"]
        assert [n.kwargs["apart"] for n in cores] == [2] * 2
        summed = [n for n in graph.nodes if "more" in n.kwargs]
        assert [n.target.__name__ for n in summed] == ["gated_linear_call"] * 2
        fronts = [n for n in graph.nodes if "front" in n.kwargs]
        if bits == 8:
            assert not written
            assert not fronts
            continue
        calls = ["linear_call", "gated_linear_call", "conv2d_call"]
        assert [n.target.__name__ for n in written] == calls * 2
        columns, factors = ([given[n][i] for n in written] for i in (1, 2))
        inner = model.layers[0].residual_group.blocks[0].self_attention.d_inner
        assert columns == [inner, None, None] * 2
        assert [f is not None for f in factors] == [False] * 6
        # Depthwise convolutions of codes, for the scan and for the 1x1 convolution of the channel attention.
        assert [n.target.__name__ for n in fronts] == ["scan_core", "conv2d_call"] * 2
        assert all(n.kwargs["coded"] for n in fronts)
        assert not any("u" in n.kwargs for n in fronts)
        codes, also = ([n.kwargs["front"][i] for n in fronts] for i in (5, 6))
        assert [c[2] is not None for c in codes] == [False, True] * 2  # factors
        assert [o is not None for o in also] == [True, False] * 2
        written += [n for n in fronts if n not in written]
        given |= {n: n.kwargs["front"][5] for n in fronts}
        readers = {str(given[n][0].target) for n in written}
        assert all(deployed.static(model.get_submodule(name)) for name in readers)


def test_what_is_read_twice_is_no_code() -> None:
    class Twice(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.first, self.last, self.twice = nn.Linear(6, 8), nn.Linear(8, 5), twice

        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return (self.last(y), y + 1) if self.twice else self.last(y)

    for twice in (False, True):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 6)
        model = converted(Twice(twice), QConfig.recommended(4, 4, keep_first_last=False), x)
        graph = deploy(record(model).graph, model, cuda)
        calls = [n for n in graph.nodes if n.target is linear_call]
        assert [("codes" in n.kwargs) for n in calls] == ([False] if twice else [True, False])
        assert [("then" in n.kwargs) for n in calls] == ([True] if twice else [False, False])


class Edge(nn.Module):
    """Two layers and what is between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], last: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last, self.between = (
            nn.Linear(6, 8),
            nn.Linear(8, 8) if last is None else last,
            between,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.first(x))


@pytest.mark.parametrize(
    ("between", "last", "coded"),
    [
        (lambda m, y: m.last(y.view(6, 8)), None, False),  # of which it is not known where channels end up
        (lambda m, y: m.last(y.transpose(0, 1).contiguous()), None, True),
        (lambda m, y: y + m.last(y), None, False),
        (lambda m, y: m.last(torch.flatten(input=y, end_dim=1)), None, False),
        (lambda m, y: m.last(y.transpose(1, 2)), nn.Linear(3, 5), None),
        (lambda m, y: m.last(y.permute(2, 0, 1)[:, None]), nn.Conv2d(1, 4, 1), False),
        (lambda m, y: m.last(y.transpose(1, 2)[..., None]), nn.Conv2d(8, 4, 1), False),
        (lambda m, y: m.last(y.view(torch.float32)), None, False),
    ],
)
def test_what_goes_through_moves(between: Any, last: Any, coded: bool | None) -> None:
    """``coded`` None: if there are no factors, which would be of another axis."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    config = QConfig.recommended(4, 4, keep_first_last=False)
    assert config.smooth  # so that there are factors
    model = converted(Edge(between, last), config, x)
    graph = deploy(record(model).graph, model, cuda)
    calls = [n for n in graph.nodes if n.target is linear_call]
    assert calls
    written = [n.kwargs["codes"] for n in calls if "codes" in n.kwargs]
    assert sum("coded" in n.kwargs for n in graph.nodes) == len(written)
    assert len(written) == coded if coded is not None else all(c[2] is None for c in written)


def test_integers_that_are_added() -> None:
    """Are no codes."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, x: Tensor, flags: Tensor) -> Tensor:
            return self.layer(x) + flags

    torch.manual_seed(0)
    x, flags = torch.randn(2, 3, 6), torch.randint(-3, 4, (2, 3, 8), dtype=torch.int8)
    config = QConfig.recommended(8, 8, keep_first_last=False)
    prepared = ssmquant.prepare(Added(), config, example_inputs=(x, flags))
    prepared(x, flags)  # ranges start
    model = ssmquant.convert(prepared.eval())
    with torch.no_grad(), use_backend("chunked", op="fuse"):
        want = model(x, flags)
    with torch.no_grad():
        torch.testing.assert_close(model(x, flags), want)


@pytest.mark.parametrize("kind", [SquareOrders, ByConvolution])
def test_scans_in_orders_that_are_alike_at_one_size(kind: Any) -> None:
    """At others the graph that is not fused runs; so it does where sizes of projections are not known."""
    torch.manual_seed(0)
    model = converted(kind(), QConfig.recommended(8, 8, keep_first_last=False), torch.randn(2, 3, 6, 6))
    for size in ((6, 6), (5, 7)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad(), use_backend("chunked", op="fuse"):
            want = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=0, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize("form", ["shape", "residual", "gate"])
def test_scans_whose_result_is_read_in_other_ways_are_summed(form: str) -> None:
    class Read(Scan2d):
        def merged(self, y: Tensor, H: int, W: int) -> Tensor:
            y = super().merged(y, H, W)
            rows = y.transpose(1, 2)
            if form == "shape":
                b, d, n = y.shape
                return self.linear(rows.reshape(b, n, d)).mT
            if form == "residual":
                return (rows + self.linear(self.norm(rows))).mT
            return self.linear(rows * F.silu(rows)).mT

    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6)
    model = converted(Read(), QConfig.recommended(8, 8, keep_first_last=False), x)
    graph = deploy(record(model).graph, model, cuda)
    cores = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "scan_core"]
    assert len(cores) == 1
    assert "apart" not in cores[0].kwargs


def test_both_directions_of_a_sequence_are_added_up_by_the_layer_behind_them() -> None:
    """With what their sum is divided by."""
    model, _ = make("vim", QConfig.minmax(8, 8))
    graph = deploy(record(model).graph, model, cuda)
    gated = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "gated_linear_call"]
    assert len(gated) == 2
    for n in gated:
        (more,) = n.kwargs["more"]
        assert all(getattr(t.target, "__name__", "") == "sequence_core" for t in (n.args[0], more))
        assert n.args[2] == (0.5,)


class Summed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second, self.last = how, nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        a, b = F.tanh(self.first(x)), F.tanh(self.second(x))
        if self.how == "read twice":
            y = a + b
            return self.last(y), y
        if self.how == "twice":
            return self.last(a + a)
        if self.how == "a third":
            return self.last((a + b) / 3)
        if self.how == "broadcast":
            return self.last(a + b[:, :1])
        if self.how == "scaled and normed":
            return self.last(self.norm((a + b) / 2))
        if self.how == "normed":
            return self.last(self.norm(a + b))
        return self.last((a + b) * 3 if self.how == "three times" else a + b)


@pytest.mark.parametrize(
    ("how", "fused"),
    [
        ("plain", True), ("three times", True), ("normed", True), ("a third", False), ("twice", False),
        ("read twice", False), ("broadcast", False), ("scaled and normed", False),
    ],
)  # fmt: skip
def test_sums(how: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = converted(Summed(how), QConfig.minmax(8, 8, keep_first_last=False), torch.randn(2, 7, 6))
    graph = deploy(record(model).graph, model, cuda)
    last = [n for n in graph.nodes if n.target is linear_call][-1]
    assert bool(last.kwargs.get("more")) == fused


def test_activations_that_are_watched_are_followed_by_codes() -> None:
    """A module that has to be called itself gives floats, which are encoded behind it."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 5))
    model = converted(net, QConfig.recommended(4, 4, keep_first_last=False), x)
    graph = deploy(record(model).graph, model, cuda)
    call = next(n for n in graph.nodes if "codes" in n.kwargs)
    module = model.get_submodule(str(call.kwargs["codes"][0].target))
    factors = attrgetter(call.kwargs["codes"][2].target)(model)
    model.get_submodule(str(call.args[5].target)).register_forward_hook(lambda m, args, out: out + 0.25)
    args: Any = fx.node.map_arg(call.args[1:], lambda n: attrgetter(n.target)(model))
    floats = deployed.linear(x, *args)
    codes = deployed.linear(x, *args, codes=(module, None, factors))
    assert codes.dtype == torch.int8
    grid = deployed.grid_of(module, lambda: floats, 0)
    assert torch.equal(codes, encoded(floats * factors, grid))
    x[1, 2, 3] = torch.nan
    codes = deployed.linear(x, *args, codes=(module, None, factors))
    assert torch.equal(codes < 0, torch.isnan(deployed.linear(x, *args)))


def encoded(y: Tensor, grid: Any) -> Tensor:
    return (((y + grid.shift) / grid.scale).clamp(grid.qmin, grid.qmax).round() - grid.qmin).to(torch.int8)


def test_kernels_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("mambair", QConfig.recommended(4, 4))
    with use_backend("chunked", op="fuse"):
        want = model(x)
    record(model).fused.clear()

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise CompileError("no such instruction\nand more")

    monkeypatch.setattr(deployed, "blend", fails)
    with pytest.warns(UserWarning, match="without kernels of its own: no such instruction$"):
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), want)
    assert not record(model).kernels(model)


def test_kernels_that_cannot_be_compiled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("mambair", QConfig.recommended(4, 4))
    with use_backend("chunked", op="fuse"):
        want = model(x)
    model(x)

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise CompileError("another variant")

    monkeypatch.setattr(deployed, "blend", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="another variant"):
            model(x)
    assert torch.equal(model(x), want)
