"""Configurations with rounding by GPTQ, and every form of site that it rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig


def gptq(w_bits: int = 3, **options: Any) -> QConfig:
    base: dict[str, Any] = {
        "w_bits": w_bits,
        "a_bits": 8,
        "weight": "lsq",
        "granularity": "channel",
        "keep_first_last": False,
        "rounding": "gptq",
    }
    return QConfig(**{**base, **options})


class Form(nn.Module):
    """``function`` of an input and a weight of that shape."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def twice(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat((F.linear(x, w), F.linear(x.flip(-1) * 2, w)), -1)


def looped(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(1):
        x = torch.tanh(F.linear(x, w))
    return F.linear(x, w)


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (2, 7, 5)),
    "linear of one sample": (lambda: nn.Linear(5, 3), (1, 5)),
    "F.linear": (lambda: Form((3, 5), F.linear), (2, 7, 5)),
    "F.linear by keywords": (lambda: Form((3, 5), lambda x, w: F.linear(input=x, weight=w)), (2, 7, 5)),
    "W @ x": (lambda: Form((3, 5), lambda x, w: w @ x), (2, 5, 7)),
    "x @ W": (lambda: Form((5, 3), lambda x, w: x @ w), (2, 7, 5)),
    "transposed weight": (lambda: Form((5, 3), lambda x, w: F.linear(x, w.t())), (2, 7, 5)),
    "viewed weight": (lambda: Form((15,), lambda x, w: F.linear(x, w.view(3, 5))), (2, 7, 5)),
    "1x1": (lambda: nn.Conv2d(5, 3, 1), (2, 5, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    "conv1d without a batch": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 7)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 5, 4)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 5, 4)),
    "conv2d, reflecting": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1, stride=(1, 2, 1)), (1, 2, 3, 4, 5)),
    "F.conv2d": (
        lambda: Form((4, 3, 3, 3), lambda x, w: F.conv2d(x, w, stride=2, padding=1, dilation=1)),
        (2, 3, 8, 7),
    ),
    "depthwise conv1d": (lambda: nn.Conv1d(5, 5, 4, padding=3, groups=5), (2, 5, 9)),
    "depthwise conv2d": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 6, 7)),
    "depthwise of two outputs": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 6, 7)),
    "einsum": (lambda: Form((3, 5), lambda x, w: torch.einsum("bcl,kc->bkl", x, w)), (2, 5, 7)),
    "einsum by direction": (
        lambda: Form((4, 3, 5), lambda x, w: torch.einsum("bkdl,kcd->bkcl", x, w)),
        (2, 4, 5, 7),
    ),
    "einsum, weight first": (
        lambda: Form((4, 5, 3), lambda x, w: torch.einsum("kdc,lkbd->bklc", w, x)),
        (7, 4, 2, 5),
    ),
    "einsum over two axes": (
        lambda: Form((3, 2, 5), lambda x, w: torch.einsum("bhdl,ohd->bol", x, w)),
        (2, 2, 5, 7),
    ),
    "einsum, one for all directions": (
        lambda: Form((4, 3, 5), lambda x, w: torch.einsum("bkdl,kcd->bkcl", x, w)),
        (2, 1, 5, 7),
    ),
    "grouped conv1d by direction": (
        lambda: Form((4, 3, 5), lambda x, w: F.conv1d(x.flatten(1, 2), w.reshape(12, 5, 1), None, groups=4)),
        (2, 4, 5, 7),
    ),
    "twice": (lambda: Form((3, 5), twice), (2, 7, 5)),
    "in a loop": (lambda: Form((5, 5), looped), (2, 7, 5)),
}


def prepared_form(name: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, shape = FORMS[name]
    x = torch.randn(shape)
    return ssmquant.prepare(build(), gptq(**options), example_inputs=x).eval(), x
