"""Projections of every form are found, and the rewritten graph computes with quantized weights and inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, Rule
from ssmquant.graph.runtime import runtime_of
from tests.graph.sites import check, quantized
from tests.small import points, rows

torch.manual_seed(0)
CALLED: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...], str]] = {
    "Linear": (nn.Linear(4, 5), (2, 7, 4), (3, 2, 4), "linear"),
    "Conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9), (1, 4, 12), "conv"),
    "Conv2d": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 6, 5), (3, 4, 7, 7), "conv"),
    "Conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 4, 6), (1, 2, 6, 6, 4), "conv"),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, 2, groups=2), (2, 4, 5), (1, 4, 8), "conv"),
    "ConvTranspose2d": (
        nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1),
        (2, 4, 3, 5),
        (1, 4, 6, 6),
        "conv",
    ),
}


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("keyword", [False, True])
def test_called_modules(name: str, keyword: bool) -> None:
    module, *shapes, kind = CALLED[name]

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x) if keyword else self.inner(x)

    prepared = check(Calls(), *shapes)  # type: ignore[arg-type]
    assert {k: p.what for k, p in points(prepared).items()} == {
        "inner:weight": "weight",
        "inner:input": "activation",
    }
    row = rows(prepared)["inner"]
    assert (row.kind, row.scheme, row.methods) == (kind, "W3A4", "rfa/lsq")
    x = torch.randn(shapes[0])
    inner = prepared.inner
    old, inner.weight = inner.weight, nn.Parameter(quantized(prepared, "inner:weight", inner.weight))
    expected = type(inner).forward(inner, quantized(prepared, "inner:input", x))
    inner.weight = old
    assert torch.equal(prepared(x), expected)


class Raw(nn.Module):
    """Parameters that no module of their own owns."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))


class LinearOfAView(Raw):
    def forward(self, x: Tensor) -> Tensor:  # (B, 4)
        return F.linear(x, self.w.view(5, 4))


class WeightLeft(Raw):
    def forward(self, x: Tensor) -> Tensor:  # (B, 4, L)
        return self.w @ x


class WeightRight(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w)


class Directions(Raw):
    def forward(self, x: Tensor) -> Tensor:  # (B, K, D, L)
        return torch.einsum("bkdl,kcd->bkcl", x, self.w)


class WeightFirst(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("k c d, b k d l -> b k c l", self.w, x)


class EinsumOfAList(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bkdl,kcd->bkcl", [x, self.w])


class Bmm(Raw):
    def forward(self, x: Tensor) -> Tensor:  # (3, L, 4)
        return torch.bmm(x, self.w)


class GroupedConv(Raw):
    def forward(self, x: Tensor) -> Tensor:  # VMamba: all directions in one grouped convolution
        B, K, D, L = x.shape
        weight = self.w.view(-1, D, 1)
        return F.conv1d(x.view(B, K * D, L), weight, groups=K).view(B, K, -1, L)


class Expanded(Raw):
    def forward(self, x: Tensor) -> Tensor:  # (B, L, 4): a view that takes the batch size
        return torch.bmm(x, self.w.unsqueeze(0).expand(x.size(0), -1, -1))


class Transposed(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.t())


class TransposedTwice(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t()[:, :3].transpose(0, 1).unsqueeze(0)[0].mT


class Cast(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.to(x.dtype).contiguous())


class Addmm(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(torch.ones(5), x, self.w)


class Computed(Raw):
    """Not the parameter itself is what is multiplied: quantized is what is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w / self.w.norm(dim=1, keepdim=True))


class Keywords(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.w)


RAW: dict[str, tuple[type[Raw], tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "linear of a view": (LinearOfAView, (20,), (6, 4), (9, 4), "linear"),
    "weight left": (WeightLeft, (5, 4), (2, 4, 6), (3, 4, 9), "matmul"),
    "weight right": (WeightRight, (4, 5), (6, 4), (9, 4), "matmul"),
    "einsum": (Directions, (3, 5, 4), (2, 3, 4, 6), (1, 3, 4, 9), "matmul"),
    "einsum, weight first": (WeightFirst, (3, 5, 4), (2, 3, 4, 6), (1, 3, 4, 9), "matmul"),
    "einsum of a list": (EinsumOfAList, (3, 5, 4), (2, 3, 4, 6), (1, 3, 4, 9), "matmul"),
    "bmm": (Bmm, (3, 4, 5), (3, 6, 4), (3, 9, 4), "matmul"),
    "grouped conv1d": (GroupedConv, (3, 5, 4), (2, 3, 4, 6), (1, 3, 4, 9), "conv"),
    "expanded over the batch": (Expanded, (4, 5), (2, 6, 4), (3, 9, 4), "matmul"),
    "transposed": (Transposed, (4, 5), (6, 4), (9, 4), "linear"),
    "transposed twice": (TransposedTwice, (5, 4), (6, 4), (9, 4), "matmul"),
    "cast": (Cast, (5, 4), (6, 4), (9, 4), "linear"),
    "addmm": (Addmm, (4, 5), (6, 4), (9, 4), "matmul"),
    "computed": (Computed, (5, 4), (6, 4), (9, 4), "linear"),
    "keywords": (Keywords, (5, 4), (6, 4), (9, 4), "linear"),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_raw_parameters(name: str, granularity: str) -> None:
    cls, weight, *shapes, kind = RAW[name]
    model = cls(*weight)
    config = QConfig(w_bits=3, a_bits=4, granularity=granularity, keep_first_last=False)
    prepared = check(model, *shapes, config=config)  # type: ignore[arg-type]
    assert {k: p.what for k, p in points(prepared).items()} == {"w:weight": "weight", "w:input": "activation"}
    assert rows(prepared)["w"].kind == kind
    assert rows(prepared)["w"].scheme == "W3A4"
    if cls is Computed:
        return
    x = torch.randn(shapes[0])  # The reference: the model's own code on the quantized parameter and input.
    expected = cls(*weight)
    expected.w = nn.Parameter(quantized(prepared, "w:weight", model.w))
    torch.testing.assert_close(prepared(x), expected(quantized(prepared, "w:input", x)), rtol=1e-6, atol=1e-6)
    assert ssmquant.convert(prepared).w is None


@pytest.mark.parametrize(
    ("name", "axis"),
    [("weight left", 0), ("weight right", 1), ("einsum", 0), ("bmm", 2), ("addmm", 1), ("keywords", 0)],
)
def test_channel_scales_belong_to_output_channels(name: str, axis: int) -> None:
    cls, weight, shape, *_ = RAW[name]
    config = QConfig(w_bits=4, granularity="channel", keep_first_last=False)
    prepared = ssmquant.prepare(cls(*weight), config, example_inputs=(torch.randn(shape),))
    quantizer = runtime_of(prepared).weights["w:weight"]
    stacked = name == "einsum"  # (directions, outputs, inputs)
    groups = weight[0] * weight[1] if stacked else weight[axis]
    assert (quantizer.axis, quantizer.num_groups, quantizer.leading) == (axis, groups, 2 if stacked else 1)
    # Channels of 4 weights at 3 bits take less room than a scale and share one, with their direction at most.
    if groups * 4 == torch.Size(weight).numel():
        config = QConfig(w_bits=3, granularity="channel", keep_first_last=False)
        prepared = ssmquant.prepare(cls(*weight), config, example_inputs=(torch.randn(shape),))
        assert runtime_of(prepared).weights["w:weight"].num_groups == (weight[0] if stacked else 1)


class TwoComputed(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * 2) + F.linear(x, self.w.abs()) + F.linear(x, self.w)


def test_one_parameter_in_several_computed_weights() -> None:
    prepared = check(TwoComputed(4, 4), (6, 4), (9, 4))
    assert len([p for p in points(prepared).values() if p.what == "weight"]) == 3
    assert len([p for p in points(prepared).values() if p.what == "activation"]) == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) + F.linear(x * 2, self.b.weight)


def test_tied_weights_have_one_quantizer() -> None:
    prepared = check(Tied(), (6, 4), (9, 4))
    found = points(prepared)
    assert [k for k in found if k.endswith(":weight")] == ["a:weight"]
    assert len(found["a:weight"].uses) == 3
    assert len([k for k in found if ":input" in k]) == 3
    assert prepared.b.weight is prepared.a.weight
    w, x = quantized(prepared, "a:weight", prepared.a.weight), torch.randn(5, 4)
    inputs = [k for k in found if ":input" in k]
    hidden = torch.tanh(F.linear(quantized(prepared, inputs[0], x), w, prepared.a.bias))
    y = F.linear(quantized(prepared, inputs[1], hidden), w, prepared.b.bias)
    assert torch.equal(prepared(x), y + F.linear(quantized(prepared, inputs[2], x * 2), w))
    deployed = ssmquant.convert(prepared)
    assert deployed.a.weight is None
    assert deployed.b.weight is None


def test_a_rule_may_treat_one_use_of_a_tied_weight_differently() -> None:
    config = QConfig(w_bits=3, a_bits=4, keep_first_last=False, rules=(Rule("b", w_bits=8),))
    prepared = check(Tied(), (6, 4), config=config)
    assert [rows(prepared)[n].scheme for n in ("a", "b", "a#2")] == ["W3A4", "W8A4", "W3A4"]
    kept = check(Tied(), (6, 4), config=QConfig(w_bits=3, a_bits=4, keep_first_last=False, keep_float=("b",)))
    assert [rows(kept)[n].scheme for n in ("a", "b", "a#2")] == ["W3A4", "float", "W3A4"]
    assert ssmquant.convert(kept).b.weight is not None


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.inner(x)))


def test_a_module_called_twice() -> None:
    prepared = check(Twice(), (6, 4), (9, 4))
    assert list(points(prepared)) == ["inner:weight", "inner:input", "inner#2:input"]
    assert list(rows(prepared)) == ["inner", "inner#2"]
    w, x = quantized(prepared, "inner:weight", prepared.inner.weight), torch.randn(5, 4)
    hidden = torch.relu(F.linear(quantized(prepared, "inner:input", x), w, prepared.inner.bias))
    expected = F.linear(quantized(prepared, "inner#2:input", hidden), w, prepared.inner.bias)
    assert torch.equal(prepared(x), expected)
