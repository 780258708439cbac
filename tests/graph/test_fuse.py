"""Fused training graphs compute what the graphs they are made of compute, and fuse what they are meant to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph import runtime as runtime_module
from ssmquant.graph.bank import bank_weights
from ssmquant.graph.fuse import Unfit, fuse
from ssmquant.graph.layers import faster_layers
from ssmquant.graph.orders import count, order_of
from ssmquant.graph.regions import compile_graph
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.ops import selective_scan

D, N, K = 6, 3, 4


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Scan2d(nn.Module):
    """A scan over an image; subclasses write the sequences and their sum in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv2d(3, D, 1)
        self.mid = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.x_proj = nn.Parameter(torch.randn(K, 2 + 2 * N, D) * 0.3)
        self.dt_proj = nn.Parameter(torch.randn(K, D, 2) * 0.3)
        self.bias = nn.Parameter(torch.randn(K * D) * 0.3)
        self.A_log = nn.Parameter(torch.rand(K * D, N))
        self.D = nn.Parameter(torch.ones(K * D))
        self.norm = nn.LayerNorm(D)
        self.linear = nn.Linear(D, D)
        self.out = nn.Conv2d(D, 3, 1)

    def sequences(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        rows = torch.stack([x.view(B, D, H * W), x.transpose(2, 3).contiguous().view(B, D, H * W)], 1)
        return torch.cat([rows, rows.flip(-1)], 1)

    def merged(self, y: Tensor, H: int, W: int) -> Tensor:
        B = y.shape[0]
        y = y.view(B, K, D, H * W)
        back = torch.flip(y[:, 2:4], dims=[-1])
        down = y[:, 1].view(B, D, W, H).transpose(2, 3).contiguous().view(B, D, H * W)
        up = back[:, 1].view(B, D, W, H).transpose(2, 3).contiguous().view(B, D, H * W)
        return y[:, 0] + back[:, 0] + down + up

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        x_dbl = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj)
        dts, Bs, Cs = torch.split(x_dbl, [2, N, N], dim=2)
        return torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_proj), Bs, Cs

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.mid(self.inp(x)))
        B, _, H, W = x.shape
        xs = self.sequences(x)
        dts, Bs, Cs = self.projections(xs)
        y: Any = selective_scan(
            xs.reshape(B, K * D, H * W), dts.contiguous().view(B, K * D, H * W), -self.A_log.exp(), Bs, Cs, self.D,
            delta_bias=self.bias, delta_softplus=True,
        )  # fmt: skip
        y = self.merged(y, H, W).transpose(1, 2)
        y = self.linear(self.norm(y)).transpose(1, 2).view(B, D, H, W)
        return self.out(x + y)


class ByConvolution(Scan2d):
    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        B, L = xs.shape[0], xs.shape[-1]
        x_dbl = F.conv1d(xs.reshape(B, K * D, L), self.x_proj.view(-1, D, 1), groups=K).view(B, K, -1, L)
        dts, Bs, Cs = torch.split(x_dbl, [2, N, N], dim=2)
        dts = F.conv1d(dts.reshape(B, K * 2, L), self.dt_proj.view(K * D, 2, 1), groups=K)
        return dts.view(B, K, D, L), Bs, Cs


class Summed(Scan2d):
    """The sum by ``sum``, of a stack."""

    def merged(self, y: Tensor, H: int, W: int) -> Tensor:
        B = y.shape[0]
        y = y.view(B, K, D, H * W)
        y = torch.cat([y[:, :2], y[:, 2:].flip(-1)], 1)
        parts = [
            y[:, k] if k % 2 == 0 else y[:, k].view(B, D, W, H).mT.reshape(B, D, H * W) for k in range(K)
        ]
        return torch.stack(parts).sum(0)


class Snake(Scan2d):
    """Other orders than the cross-scan's: every second row from right to left."""

    def sequences(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        cut = H // 2 * 2
        pairs = x[:, :, :cut].view(B, D, cut // 2, 2, W)
        snake = torch.stack([pairs[:, :, :, 0], pairs[:, :, :, 1].flip(-1)], 3).view(B, D, cut, W)
        snake = torch.cat([snake, x[:, :, cut:]], 2).view(B, D, H * W)
        rows = x.view(B, D, H * W)
        return torch.stack([rows, snake, rows.flip(-1), snake.flip(-1)], 1)


class NotAnOrder(Scan2d):
    """Sequences that show some pixels twice, others not at all."""

    def sequences(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        rows = x.view(B, D, H * W)
        half = rows[:, :, : H * W // 2]
        twice = torch.cat([half, half, rows[:, :, : H * W % 2]], 2)
        return torch.stack([rows, twice, rows.flip(-1), twice.flip(-1)], 1)


class Written(Scan2d):
    """The image is written to after the sequences were made: views of it see that, copies do not."""

    def sequences(self, x: Tensor) -> Tensor:
        xs = super().sequences(x)
        x[:, :1].mul_(0.5)
        return xs


def prepared(model: nn.Module, x: Tensor, config: QConfig | None = None) -> nn.Module:
    """In float64: float32 rounds some value to the other side of a level's edge in one run of eight."""
    model = model.to(x.dtype)
    p = ssmquant.prepare(
        model, config or QConfig(w_bits=4, a_bits=4, keep_first_last=False), example_inputs=(x,)
    )
    return ssmquant.calibrate(p, [x], progress=False).train()


def record(p: nn.Module) -> Record:
    return runtime_of(p).records[-1]


def names(graph: fx.Graph) -> list[str]:
    return [str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op.startswith("call")]


def step(p: nn.Module, run: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = run(p, x)
    leaves = [x, *(q for q in p.parameters() if q.requires_grad)]
    grads = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves, allow_unused=True
    )
    return y.detach(), [torch.zeros_like(q) if g is None else g for g, q in zip(grads, leaves, strict=True)]


def compare(p: nn.Module, graph: fx.Graph, x: Tensor, tolerance: float = 1e-10) -> None:
    want, want_grads = step(p, record(p).run, x)
    got, got_grads = step(p, compile_graph(graph)[0], x)
    assert (got - want).norm() <= tolerance * want.norm()
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        assert (mine - theirs).norm() <= 10 * tolerance * (theirs.norm() + 1)


@pytest.mark.parametrize("kind", [Scan2d, ByConvolution, Summed])
def test_fuses_and_computes_the_same(kind: type[Scan2d]) -> None:
    torch.manual_seed(1)
    x = randn(2, 3, 5, 7)
    p = prepared(kind(), x)
    graph = fuse(record(p).graph, p)
    found = names(graph)
    # What a convolution reads is off the way to u, so that its order is found on its own.
    paths = 2 if kind is ByConvolution else 1
    assert [found.count(n) for n in ("paths_of", "projected", "merges", "flat_sequences")] == [
        paths,
        1,
        1,
        1,
    ]
    assert not {"flip", "stack", "cat", "transpose"} & set(found[: found.index("selective_scan.default")])
    compare(p, graph, x)
    compare(p, graph, randn(3, 3, 4, 9))  # another batch and size, no square


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("statistics", ["sample", "tensor"])
def test_quantizers_count_the_copies(bits: int, statistics: Any) -> None:
    torch.manual_seed(2)
    x = randn(2, 3, 3, 2)  # so small that the deviation's n - 1 shows
    config = QConfig(w_bits=None, a_bits=bits, statistics=statistics, keep_first_last=False)
    p = prepared(Scan2d(), x, config)
    compare(p, fuse(record(p).graph, p), x)


def test_other_orders() -> None:
    torch.manual_seed(3)
    x = randn(2, 3, 5, 4)
    p = prepared(Snake(), x)
    graph = fuse(record(p).graph, p)
    assert "paths_of" in names(graph)
    assert "merges" not in names(graph)  # its sum is not that of these orders
    compare(p, graph, x)


class CloneWritten(Scan2d):
    """A copy of the sequences is written to."""

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        z = xs.clone()
        z[:, 0].mul_(0.5)
        return super().projections(z)


class SquareOrders(Scan2d):
    """What is projected has the orders of u where images are square."""

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        H, W = self.size
        r = xs[:, 0]
        turned = r.view(-1, D, W, H).transpose(2, 3).reshape(-1, D, H * W)
        z = torch.stack([r, turned], 1)
        return super().projections(torch.cat([z, z.flip(-1)], 1))

    def sequences(self, x: Tensor) -> Tensor:
        self.size = x.shape[2:]
        return super().sequences(x)


class OtherView(Scan2d):
    """The sequences are read as a tensor of another shape, and convolved along."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(K * D, 1, 1, 3))

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        B, L = xs.shape[0], xs.shape[-1]
        gate = xs.reshape(B, 2, 2 * D, L).amax(1).mean((1, 2)).view(B, 1, 1, 1)
        z = F.conv2d(xs.reshape(B, K * D, 1, L), self.taps, padding=(0, 1), groups=K * D).view(B, K, D, L)
        return super().projections(z * gate)


class Diagonal(Scan2d):
    """An einsum that is no projection."""

    def __init__(self) -> None:
        super().__init__()
        self.squares = nn.Parameter(torch.randn(K, D, D))

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        return super().projections(torch.einsum("bkdl,kdd->bkdl", xs, self.squares))


class Twice(Scan2d):
    """Two scans of the same sequences."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.mid(self.inp(x)))
        B, _, H, W = x.shape
        xs = self.sequences(x)
        dts, Bs, Cs = self.projections(xs)
        out = torch.zeros_like(x)
        for factor in (1.0, 0.5):
            steps = factor * dts.contiguous().view(B, K * D, H * W)
            y: Any = selective_scan(
                xs.reshape(B, K * D, H * W), steps, -self.A_log.exp(), Bs, Cs, self.D, delta_bias=self.bias,
                delta_softplus=True,
            )  # fmt: skip
            out = out + self.merged(y, H, W).view(B, D, H, W)
        return self.out(x + out)


class PartlyWithoutGradients(Scan2d):
    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return super().projections(xs)


@pytest.mark.parametrize("kind", [CloneWritten, SquareOrders, OtherView, Diagonal, Twice])
def test_what_looks_alike_computes_the_same(kind: type[Scan2d]) -> None:
    torch.manual_seed(8)
    x = randn(2, 3, 4, 4)
    p = prepared(kind(), x)
    graph = fuse(record(p).graph, p)
    assert graph is not record(p).graph
    assert all(n.users or n.meta.get("mutates") for n in graph.nodes if n.op.startswith("call"))
    compare(p, graph, x)
    compare(p, graph, randn(2, 3, 4, 6))


def test_switched_gradients_are_left_alone() -> None:
    p = prepared(PartlyWithoutGradients(), randn(2, 3, 4, 4))
    for r in runtime_of(p).records:
        assert fuse(r.graph, p) is r.graph


@pytest.mark.parametrize("shape", [(1, 8, D), (K, 8, 1)])
def test_weights_that_einsum_repeats(shape: tuple[int, ...]) -> None:
    x = randn(2, 3, 4, 5)
    model = Scan2d()
    model.x_proj = nn.Parameter(torch.randn(shape))
    p = prepared(model, x)
    graph = fuse(record(p).graph, p)
    assert "projected" not in names(graph)
    compare(p, graph, x)


class Cut(Scan2d):
    """Sequences read in pieces of 16 pixels, which images of 4 x 4 have."""

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        pieces = self.pieces(xs).softmax(-1).square().sum((1, 2, 3))
        return super().projections(xs * pieces.view(-1, 1, 1, 1))

    def pieces(self, xs: Tensor) -> Tensor:
        return xs.reshape(xs.shape[0], -1, D, 16)


class CutOnTheWay(Cut):
    """The same, and the pieces lead to u."""

    def pieces(self, xs: Tensor) -> Tensor:
        return xs

    def sequences(self, x: Tensor) -> Tensor:
        return super().sequences(x).reshape(x.shape[0], -1, D, 16)

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        pieces = xs.softmax(-1).square().sum((1, 2, 3))
        whole = xs.reshape(xs.shape[0], K, D, -1)
        return Scan2d.projections(self, whole * pieces.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", [Cut, CutOnTheWay])
def test_readers_whose_shape_differs_at_other_sizes(kind: type[Scan2d]) -> None:
    torch.manual_seed(1)
    x = randn(2, 3, 4, 4)
    p = prepared(kind(), x)
    graph = fuse(record(p).graph, p)
    assert "paths_of" in names(graph)
    compare(p, graph, x)
    with pytest.raises(Unfit):
        compile_graph(graph)[0](p, randn(2, 3, 4, 8))


def test_convolutions_with_keywords() -> None:
    class Keywords(ByConvolution):
        def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
            B, L = xs.shape[0], xs.shape[-1]
            weight = self.x_proj.view(-1, D, 1)
            x_dbl = F.conv1d(xs.reshape(B, K * D, L), weight=weight, groups=K).view(B, K, -1, L)
            dts, Bs, Cs = torch.split(x_dbl, [2, N, N], dim=2)
            return torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_proj), Bs, Cs

    torch.manual_seed(2)
    x = randn(2, 3, 4, 5)
    p = prepared(Keywords(), x)
    graph = fuse(record(p).graph, p)
    assert "projected" in names(graph)
    compare(p, graph, x)


@pytest.mark.parametrize("method", ["rfa", "lsq", "minmax", "rlq", "n2uq", "pact"])
def test_any_quantizer_at_the_sequences(method: str) -> None:
    torch.manual_seed(9)
    x = randn(2, 3, 3, 4)
    p = prepared(Scan2d(), x, QConfig(w_bits=None, a_bits=3, activation=method, scan=method))
    graph = fuse(record(p).graph, p)
    assert "paths_of" in names(graph)
    compare(p, graph, x)


@pytest.mark.parametrize("kind", [NotAnOrder, Written])
def test_leaves_alone_what_is_no_cross_scan(kind: type[Scan2d]) -> None:
    x = randn(2, 3, 4, 5)
    p = prepared(kind(), x)
    assert fuse(record(p).graph, p) is record(p).graph


def test_other_layers() -> None:
    torch.manual_seed(4)
    x = randn(2, 3, 5, 7)
    p = prepared(Scan2d(), x)
    graph = faster_layers(fuse(record(p).graph, p), p)
    found = names(graph)
    assert {"linear", "_layer_norm", "grouped_linear"} <= set(found)
    assert "norm" not in found
    compare(p, graph, x)
    calls: list[int] = []
    handle = p.norm.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    compile_graph(graph)[0](p, x)
    handle.remove()
    assert calls == [1]


class Uneven(Scan2d):
    """Channels of different size before a projection of the image, one of its sequences, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(D, 2 + 2 * N)
        self.norm.weight.data = 4.0 ** torch.arange(-2, 4)
        self.inp.weight.data *= 4.0 ** torch.arange(-2, 4)[:, None, None, None]

    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        x_dbl = self.each(xs.transpose(2, 3)).transpose(2, 3)
        dts, Bs, Cs = torch.split(x_dbl, [2, N, N], dim=2)
        return torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_proj), Bs, Cs


@pytest.mark.parametrize("scan", ["lsq", "dls"])
def test_factors_of_channels(scan: str) -> None:
    torch.manual_seed(4)
    x = randn(2, 3, 5, 7)
    config = QConfig.recommended(4, 4, keep_first_last=False, smooth=1.0, scan_output="token", scan=scan)
    p = prepared(Uneven(), x, config)
    ssmquant.calibrate(p, [x])
    gains = {n: b for n, b in p.named_buffers() if n.endswith(".gain")}
    uneven = {n.split(".")[-2] for n, b in gains.items() if b.max() >= 4 * b.min()}
    assert uneven == {"out:input"}
    graph = bank_weights(faster_layers(fuse(record(p).graph, p), p))
    compare(p, graph, x)
    compare(p, graph, randn(3, 3, 4, 9))


class OneChannel(Scan2d):
    """einsum repeats the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dt_proj = nn.Parameter(torch.randn(K, D, 1))


class OfDiagonals(Scan2d):
    def projections(self, xs: Tensor) -> tuple[Tensor, ...]:
        x_dbl = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj)
        dts, Bs, Cs = torch.split(x_dbl, [2, N, N], dim=2)
        return torch.einsum("bkrll,kdr->bkdl", torch.diag_embed(dts), self.dt_proj), Bs, Cs


@pytest.mark.parametrize("kind", [OneChannel, OfDiagonals])
def test_einsums_that_are_no_grouped_layers(kind: type[Scan2d]) -> None:
    torch.manual_seed(4)
    x = randn(2, 3, 4, 5)
    p = prepared(kind(), x)
    graph = faster_layers(record(p).graph, p)
    assert "einsum" in names(graph)
    compare(p, graph, x)


def test_a_sum_that_differs_at_other_sizes() -> None:
    """Right for squares only, which is what the trace saw: the plain graph takes over."""

    class Square(Scan2d):
        def merged(self, y: Tensor, H: int, W: int) -> Tensor:
            return super().merged(y, W, H)

    torch.manual_seed(5)
    x = randn(2, 3, 4, 4)
    p = prepared(Square(), x)
    r = record(p)
    graph = fuse(r.graph, p)
    if "merges" not in names(graph):
        pytest.skip("the trace's second size showed it")
    wide = randn(2, 3, 4, 6)
    with pytest.raises(Unfit):
        compile_graph(graph)[0](p, wide)


def test_casts() -> None:
    """Of half precision: the sum is float32 where the code says so."""

    class Cast(Scan2d):
        def merged(self, y: Tensor, H: int, W: int) -> Tensor:
            total = super().merged(y.float(), H, W)
            assert total.dtype == torch.float32
            return total.to(y.dtype)

    torch.manual_seed(8)
    x = torch.randn(2, 3, 4, 6)
    p = prepared(Cast().bfloat16(), x.bfloat16(), QConfig(w_bits=8, a_bits=8, keep_first_last=False))
    graph = fuse(record(p).graph, p)
    assert "merges" in names(graph)
    want, _ = step(p, record(p).run, x.bfloat16())
    got, _ = step(p, compile_graph(graph)[0], x.bfloat16())
    assert got.dtype == want.dtype
    assert (got - want).norm() <= 0.05 * want.norm()


def test_records_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    x = randn(2, 3, 4, 6)
    p = prepared(Scan2d(), x)
    plain = p(x)
    assert not record(p).fused
    monkeypatch.setattr(runtime_module, "_form", lambda *_: "training")
    fused = p(x)
    assert len(record(p).fused) == 1
    assert record(p).fused["training"] is not record(p).run
    torch.testing.assert_close(fused, plain)

    def unfit(*_: Any) -> None:
        raise Unfit

    y = randn(2, 3, 4, 5)  # sizes that it has not run at before
    wanted = record(p).run(p, y)
    record(p).fused["training"] = unfit
    assert torch.equal(p(y), wanted)
    assert record(p).fused["training"] is record(p).run


@pytest.mark.parametrize("inner", [False, True])
def test_hooks_see_the_calls_of_quantizers(monkeypatch: pytest.MonkeyPatch, inner: bool) -> None:
    """Also those that come after the fused graph."""
    x = randn(2, 3, 4, 6)
    p = prepared(Scan2d(), x)
    monkeypatch.setattr(runtime_module, "_form", lambda *_: "training")
    p(x)
    for wrapper in runtime_of(p).activations.values():
        module: Any = wrapper.quantizer if inner else wrapper
        seen: list[Any] = []
        handle = module.register_forward_hook(
            lambda _, args, out, to=seen: to.append(args[0].shape) or 0 * out
        )
        got = p(x)
        want_seen, seen[:] = list(seen), []
        want = record(p).run(p, x)
        handle.remove()
        assert seen == want_seen != []
        assert torch.equal(got, want)
    calls: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    p(x)
    handle.remove()
    assert {"ActivationQuantizer", "LayerNorm"} <= set(calls)


def test_unfit_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(Scan2d):
        def __init__(self) -> None:
            super().__init__()
            self.count = nn.BatchNorm2d(3)
            self.drop = nn.Dropout(0.3)
            self.calls = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            x.mul_(0.5)
            return super().forward(self.drop(self.count(x)))

    x = randn(2, 3, 4, 6)
    p = prepared(Normed(), x)
    monkeypatch.setattr(runtime_module, "_form", lambda *_: "training")
    p(x)
    y, run = randn(2, 3, 5, 5), record(p).run
    before, calls = int(p.count.num_batches_tracked), int(p.calls)

    def unfit(model: nn.Module, *given: Tensor) -> None:
        run(model, *given)
        raise Unfit

    record(p).fused["training"] = unfit
    given = y.clone()
    torch.manual_seed(1)
    got = p(given)
    assert torch.equal(given, 0.5 * y)
    assert int(p.count.num_batches_tracked) == before + 1
    assert int(p.calls) == calls + 1
    torch.manual_seed(1)
    torch.testing.assert_close(got, run(p, y))


@pytest.mark.parametrize("name", ["mambair_tiny", "vmamba_nano", "vim_nano"])
def test_zoo(name: str) -> None:
    torch.manual_seed(7)
    options = {"upscale": 2} if name.startswith("mambair") else {}
    x = torch.rand(2, 3, 16, 24) if options else torch.rand(2, 3, 32, 32)
    model = zoo.build(name, **options)
    p = prepared(model, x, QConfig(w_bits=None, a_bits=8, scan_bits=8))
    graph = fuse(record(p).graph, p)
    assert ("paths_of" in names(graph)) == (name != "vim_nano")
    want, _ = step(p, record(p).run, x)
    got, _ = step(p, compile_graph(faster_layers(graph, p))[0], x)
    assert (got - want).norm() <= 0.02 * want.norm()  # a value on a tie, rounded otherwise, spreads


def test_orders_do_not_keep_the_numbers_of_all_elements() -> None:
    shape = (2, 3, 4, 5)
    elements = count(shape).flatten(2)
    order = order_of([torch.stack((elements, elements.flip(-1)), 1)], shape)
    assert order is not None
    assert order.untyped_storage().nbytes() == 2 * 20 * 4
