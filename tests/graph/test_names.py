"""Modules may have any names that PyTorch lets them have: keys of a ModuleDict are not always identifiers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssmquant
from ssmquant import QConfig


class Named(nn.Module):
    def __init__(self, name: str, saving: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8), "last": nn.ModuleDict({name: nn.Linear(8, 8)})})
        self.parts["last"].register_parameter(name + "0", nn.Parameter(torch.ones(8)))
        self.name, self.saving = name, saving

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.parts[self.name], self.parts["last"]
        x = checkpoint(first, x, use_reentrant=False) if self.saving else first(x)
        return last[self.name](x * getattr(last, self.name + "0"))


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "class",
        "None",
        "it's",
        'say "x"',
        "both '\"",
        "a b",
        "a-b",
        "\\",
        "a\nb",
        "{x}",
        "[b]x[/b]",
        "é",
        "ﬁ",
        "_reference_0",
    ],
)
def test_any_name(name: str, saving: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Named(name, saving), torch.randn(2, 8)
    config = QConfig.recommended(4, 4, keep_first_last=False)
    prepared = ssmquant.calibrate(ssmquant.prepare(model, config, example_inputs=(x,)), [x], progress=False)
    prepared.train()(x).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    deployed = ssmquant.convert(prepared)
    torch.testing.assert_close(deployed(x), prepared.eval()(x))
    ssmquant.save(deployed, tmp_path / "model.safetensors")
    loaded = ssmquant.load(tmp_path / "model.safetensors", Named(name, saving))
    assert torch.equal(loaded(x), deployed(x))
    assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))
    for site in (f"parts.{name}", f"parts.last.{name}"):
        assert site in [row.name for row in ssmquant.summary(deployed).rows]
        assert ascii(name)[1:-1] in ascii(str(ssmquant.summary(deployed)))
