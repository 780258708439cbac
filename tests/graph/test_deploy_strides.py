"""Deployed convolutions leave channels last in memory only where nothing that follows can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant import QConfig
from ssmquant.graph.deploy import deploy
from ssmquant.graph.deploy_calls import conv2d_call
from ssmquant.ops.deployed import cpu
from tests.graph.deployed import converted, record, unfused

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


class Layers(nn.Module):
    """A quantized 1x1 convolution, and what ``behind`` does with its result."""

    def __init__(self, behind: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.behind = behind
        self.conv, self.groups = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.pool, self.shuffle, self.rms = nn.AdaptiveAvgPool2d(2), nn.PixelShuffle(2), nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, self.conv(x))


def doubled(z: Tensor) -> None:
    z.mul_(2)


def written_through(of: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def behind(m: Any, y: Tensor) -> Tensor:
        doubled(of(y))
        changed: Tensor = m.groups(y).relu()
        return changed

    return behind


VIEWED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pooled": lambda m, y: m.pool(y).view(len(y), -1),
    "pooled by a function": lambda m, y: F.adaptive_avg_pool2d(y, 2).view(len(y), -1),
    "reshaped": lambda m, y: y.reshape(len(y), 8, -1).view(len(y), -1),
    "flattened": lambda m, y: F.silu(y.flatten(2)).view(len(y), -1),
    "sliced": lambda m, y: (y[:, 1:] * 2).view(len(y), -1),
    "convolved": lambda m, y: F.relu(m.groups(m.groups(y))).view(len(y), -1),
    "shuffled": lambda m, y: F.relu(m.shuffle(y)).view(len(y), -1),
    "normalized": lambda m, y: m.rms(y).view(len(y), -1),
    "summed": lambda m, y: y.sum(1).view(len(y), -1),
    "averaged": lambda m, y: y.mean(3).view(len(y), -1),
    "written when flat": written_through(lambda y: y.flatten(1)),
    "written when reshaped": written_through(lambda y: y.reshape(len(y), -1)),
    "written when contiguous": written_through(lambda y: y.contiguous()),
}
ROWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rows": lambda m, y: (y.flatten(2).transpose(1, 2) + 1).view(len(y), 6, 6, 8),
    "permuted": lambda m, y: F.relu(y).permute(0, 2, 3, 1).contiguous().view(len(y), -1),
    "attended": lambda m, y: y * torch.sigmoid(y.mean((2, 3)).view(len(y), 8, 1, 1)).relu(),
    "gated": lambda m, y: m.groups(y * torch.sigmoid(y)),
}


@pytest.mark.parametrize(("how", "last"), [*((k, False) for k in VIEWED), *((k, True) for k in ROWS)])
def test_layouts(how: str, last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    grouped = how in ("convolved", "gated") or how.startswith("written")
    config = QConfig.recommended(8, 8, keep_float=("groups",) * grouped, keep_first_last=False)
    model = converted(Layers((VIEWED | ROWS)[how]), config, x)
    graph = deploy(record(model).graph, model, cpu)
    calls = [n for n in graph.nodes if n.target is conv2d_call]
    if how != "attended":  # its result is the model's, which is contiguous
        assert [n.args[6] for n in calls] == [last]
    with torch.no_grad():
        got = fx.GraphModule(model, graph)(x.clone())
    torch.testing.assert_close(got, unfused(model, x.clone()), rtol=1e-4, atol=1e-4)


class Reused(nn.Module):
    """Each value is read twice by what computes the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        for _ in range(40):
            y = y * torch.sigmoid(y)
        return y


def test_values_that_are_read_again_and_again() -> None:
    """What looks at all paths behind a convolution would not end."""
    x = torch.randn(1, 4, 3, 3)
    model = converted(Reused(), QConfig.recommended(8, 8, keep_first_last=False), x)
    assert any(n.target is conv2d_call for n in deploy(record(model).graph, model, cpu).nodes)
