"""Which scales a weight gets, and which quantizer a scan's operand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import ConfigError, QConfig, Rule
from ssmquant.graph.runtime import runtime_of
from ssmquant.quantizers.shared import Ladder, Shared
from tests.small import Scanner, images, prepared_and_calibrated

X = images(2, 3, 6, 5)


class Product(nn.Module):
    """An einsum of x and a parameter, in the form that ``form`` names."""

    def __init__(self, equation: str, weight: tuple[int, ...], form: str = "plain") -> None:
        super().__init__()
        self.equation, self.form = equation, form
        self.w = nn.Parameter(torch.randn(weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "list":
            return torch.einsum(self.equation, [x, self.w])
        if self.form == "swapped":
            return torch.einsum(self.equation, self.w, x)
        return torch.einsum(self.equation, x, self.w)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 4, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.conv.weight, groups=16)


def scales(model: nn.Module, x: Tensor, key: str, **changes: Any) -> tuple[int | None, int, int]:
    """Axis, groups and leading axes of a weight's quantizer, in a model that computes the same when deployed."""
    config = QConfig(**{"w_bits": 4, "granularity": "channel", "keep_first_last": False, **changes})
    prepared = prepared_and_calibrated(model, config, x)
    torch.testing.assert_close(ssmquant.convert(prepared)(x), prepared(x), rtol=0, atol=0)
    q: Any = runtime_of(prepared).weights[key]
    return q.axis, q.num_groups, q.leading


@pytest.mark.parametrize(
    ("equation", "shape", "form", "expected"),
    [
        ("bld,de->ble", (8, 12), "plain", (1, 12, 1)),
        ("bld,ed->ble", (12, 8), "plain", (0, 12, 1)),
        ("...d,de", (8, 12), "plain", (1, 12, 1)),
        ("bld , de -> ble", (8, 12), "list", (1, 12, 1)),
        ("de,bld->ble", (8, 12), "swapped", (1, 12, 1)),
        ("bld,kcd->bklc", (3, 5, 8), "plain", (0, 15, 2)),
        ("bld,kcd->bklc", (3, 5, 8), "list", (0, 15, 2)),
        ("bkd,kdc->bkc", (5, 8, 6), "plain", (2, 6, 1)),  # 5 is a batch
        ("bld,ld->b", (5, 8), "plain", (None, 1, 1)),  # no output channel
    ],
)
def test_an_einsum_has_its_channels_in_the_output(
    equation: str, shape: tuple[int, ...], form: str, expected: Any
) -> None:
    torch.manual_seed(0)
    assert scales(Product(equation, shape, form), torch.randn(2, 5, 8), "w:weight") == expected


def test_a_depthwise_weight_is_no_stack() -> None:
    x = torch.randn(2, 16, 9)
    assert scales(Depthwise(), x, "conv:weight") == (0, 16, 1)
    assert scales(Depthwise(), x, "conv:weight", granularity="direction") == (None, 1, 1)
    assert scales(Depthwise(), x, "conv:weight", w_bits=2) == (None, 1, 1)


def test_clamped_weights_of_a_stack_by_channel() -> None:
    torch.manual_seed(0)
    for official in (False, True):
        changes = {"w_bits": 2, "a_bits": 8, "weight": "dls", "initialization": "published"}
        found = scales(
            Product("bld,kcd->bklc", (4, 6, 16)),
            torch.randn(2, 5, 16),
            "w:weight",
            official=official,
            **changes,
        )
        assert found == (0, 24, 2)


@pytest.mark.parametrize("method", ["shared", "ladder"])
def test_quantizers_of_a_whole_operand_are_for_an_a(method: str) -> None:
    for match in ("scan.A", "*.A", r"re:.*\.A"):
        config = QConfig(w_bits=4, a_bits=4, rules=(Rule(match, activation=method),))
        prepared = ssmquant.prepare(Scanner(), config, example_inputs=(X,))
        q = runtime_of(prepared).weights["scan/A"]
        assert type(q) is (Ladder if method == "ladder" else Shared)
    for match in ("scan", "in_proj", "Linear", "scan.D", "scan.u"):
        config = QConfig(w_bits=4, a_bits=4, rules=(Rule(match, activation=method),))
        with pytest.raises(ConfigError, match=rf"'{method}'.*decay='{method}'.*Rule"):
            ssmquant.prepare(Scanner(), config, example_inputs=(X,))
