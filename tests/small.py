"""Small models that the tests of configuration, workflow, files and analysis share."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph.plan import Point
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor
from ssmquant.ops import use_backend
from ssmquant.ops.selective_scan import selective_scan


class Scanner(nn.Module):
    """(B, 3, H, W) -> the same: a convolution, one scan over the pixels with raw parameters, a convolution.

    Inputs of projections are contiguous: of others torch folds the batch depending on the weight's requires_grad, so
    that a prepared and a deployed model differ in the last bit.
    """

    def __init__(self, width: int = 4, states: int = 2) -> None:
        super().__init__()
        self.width, self.states = width, states
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.in_proj = nn.Linear(width, width, bias=False)
        self.x_proj = nn.Parameter(0.5 * torch.randn(width + 2 * states, width))
        self.dt_bias = nn.Parameter(torch.rand(width) - 3)
        self.A_log = nn.Parameter(torch.rand(width, states))
        self.D = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.out_proj = nn.Linear(width, width)
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        stem = self.stem(x)
        tokens = stem.flatten(2).transpose(1, 2).contiguous()
        u = F.silu(self.in_proj(tokens)).transpose(1, 2).contiguous()  # (B, C, L)
        delta, b, c = torch.einsum("bcl,kc->bkl", u, self.x_proj).split(
            [self.width, self.states, self.states], 1
        )
        y = selective_scan(
            u, delta, -torch.exp(self.A_log), b, c, self.D, delta_bias=self.dt_bias, delta_softplus=True
        )
        y = self.out_proj(y.transpose(1, 2).contiguous()).transpose(1, 2).reshape(B, self.width, H, W)
        return self.head(y + stem) + x


class Chain(nn.Module):
    """``middle`` between two convolutions that stay in float."""

    def __init__(self, middle: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.middle = middle
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.middle(self.first(x))))


def tiny_mambair(**changes: Any) -> nn.Module:
    """The smallest MambaIR: one block, width 8, two states."""
    args = {
        "embed_dim": 8, "depths": (1,), "d_state": 2, "mlp_ratio": 1.2, "upscale": 2,
        "upsampler": "pixelshuffledirect", "drop_path_rate": 0.0,
    }  # fmt: skip
    model = zoo.build("MambaIR", **{**args, **changes})
    with (
        torch.no_grad()
    ):  # out_proj and the like start near zero; weights that matter make tests that can fail
        for name, p in model.named_parameters():
            if p.dim() == 2 or name.endswith("Ds"):
                p.add_(0.1 * torch.randn_like(p))
            if name.endswith("attention.1.bias"):  # before a ReLU on one channel: alive
                p.add_(1.0)
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


X = images(2, 3, 6, 5)


def prepared_and_calibrated(model: nn.Module, config: QConfig, x: Tensor) -> Any:
    prepared = ssmquant.prepare(model, config, example_inputs=(x,))
    return ssmquant.calibrate(prepared, [x]).eval()


@functools.cache
def _scanner(bits: int) -> Any:
    torch.manual_seed(0)
    return prepared_and_calibrated(Scanner().eval(), QConfig(w_bits=bits, a_bits=bits), X)


def scanner(bits: int = 2) -> Any:
    """A calibrated Scanner in evaluation mode. Shared: copy it before changing it."""
    return _scanner(bits)


@functools.cache
def light() -> Any:
    """The calibrated W2A2 mambair_light."""
    torch.manual_seed(0)
    x = images(1, 3, 8, 8)
    model = zoo.build("mambair_light", upscale=2).eval()
    return prepared_and_calibrated(model, QConfig.qmambair(2), x)


def points(model: nn.Module) -> dict[str, Point]:
    """The quantization points of all graphs, by name."""
    return {p.name: p for r in runtime_of(model).records for p in r.plan.points}


def rows(model: nn.Module) -> dict[str, ssmquant.analysis.SummaryRow]:
    return {r.name: r for r in ssmquant.summary(model).rows}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_state(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """The packed codes of every weight and static operand of a conversion."""
    weights = runtime_of(ssmquant.convert(model)).weights
    return {k: m.codes.clone() for k, m in weights.items() if isinstance(m, PackedTensor)}


def packed(model: nn.Module) -> dict[str, PackedTensor]:
    return {k: m for k, m in runtime_of(model).weights.items() if isinstance(m, PackedTensor)}


def fresh(config: QConfig | None = None) -> Any:
    torch.manual_seed(0)
    return ssmquant.prepare(Scanner(), config or QConfig(w_bits=2, a_bits=2), example_inputs=(X,))


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def computes_the_same(deployed: nn.Module, prepared: nn.Module, x: Tensor) -> None:
    """On decoded values to 1e-4; by fused kernels but for codes on a tie, where the order of sums decides.

    It is a matter of the processor which ones these are, for the prepared model's sums are PyTorch's.
    """
    with torch.no_grad():
        want, got = prepared(x), deployed(x)
        with use_backend("chunked", op="fuse"):
            torch.testing.assert_close(deployed(x), want, rtol=1e-4, atol=1e-4)
    assert float((got - want).norm()) <= 0.02 * float(want.norm())
