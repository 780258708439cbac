"""Deployed models, fused and not, and what their calls stand for, for tests of their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.graph.deploy import deploy
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.ops import selective_scan, use_backend
from ssmquant.ops.deployed import cpu


def dynamic(bits: int, **changes: Any) -> QConfig:
    """With ranges of the scan's inputs that are those of each sample."""
    return QConfig.recommended(bits, bits, scan="dls", **changes)


CONFIGS: dict[str, Callable[[], QConfig]] = {
    "recommended 4": lambda: QConfig.recommended(4, 4),
    "recommended 2": lambda: QConfig.recommended(2, 2),
    "dynamic 4": lambda: dynamic(4),
    "dynamic 2": lambda: dynamic(2),
    "published 4": lambda: QConfig.qmambair(4),
    "published 3": lambda: QConfig.qmambair(3, statistics="tensor"),
    "lsq 8": lambda: QConfig.lsq(8, 8),
    "min-max 5": lambda: QConfig.minmax(5, 5),
    "smooth 4": lambda: QConfig.recommended(4, 4, scan_output="token", smooth=1.0),
    "smooth 8": lambda: QConfig.minmax(8, 8, scan_output="token", smooth=0.5),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mambair": (
        lambda: zoo.MambaIR(
            embed_dim=20, depths=(2,), d_state=5, mlp_ratio=1.2, upsampler="pixelshuffledirect"
        ),
        (2, 3, 9, 12),
    ),
    "vmamba": (lambda: zoo.vmamba_nano(num_classes=5), (2, 3, 32, 64)),
    "vim": (lambda: zoo.vim_nano(num_classes=5), (2, 3, 32, 32)),
}


class MambaBlock(nn.Module):
    """As Mamba's slow path has it: projections of flat rows, the gate inside or behind the scan, or both directions."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.inp, self.out = nn.Linear(6, 40, bias=False), nn.Linear(20, 6, bias=False)
        self.conv = nn.Conv1d(20, 20, 3, padding=2, groups=20)
        self.act = nn.SiLU()
        self.x_proj, self.dt = nn.Linear(20, 3 + 2 * 4, bias=False), nn.Linear(3, 20)
        self.A_log, self.D = nn.Parameter(torch.rand(20, 4)), nn.Parameter(torch.rand(20))

    def scan(self, x: Tensor, z: Tensor | None) -> Tensor:
        b, _, n = x.shape
        x = self.act(self.conv(x)[..., :n])
        rows = x.transpose(1, 2).reshape(b * n, -1)
        dt, b_, c = torch.split(self.x_proj(rows), [3, 4, 4], dim=-1)
        if self.form == "linear":
            delta = F.linear(dt, self.dt.weight).view(b, n, -1).transpose(1, 2)
        else:
            delta = (self.dt.weight @ dt.t()).view(-1, b, n).transpose(0, 1)
        b_, c = (t.view(b, n, 4).transpose(1, 2).contiguous() for t in (b_, c))
        a = -torch.exp(self.A_log)
        y = selective_scan(x, delta, a, b_, c, self.D, z, self.dt.bias, True)
        assert isinstance(y, Tensor)
        return y

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = x.flatten(2).transpose(1, 2)
        if "columns" in self.form:  # as mamba_ssm has it
            y = self.inp.weight @ x.permute(2, 0, 1).reshape(6, -1)
            x, z = y.view(40, b, -1).permute(1, 0, 2).chunk(2, dim=1)
        else:
            x, z = self.inp(x).transpose(1, 2).chunk(2, dim=1)
        if self.form.startswith("both"):
            y = self.scan(x, z)
            size = y.shape  # read before the other direction
            y = y + self.scan(x.flip(-1), z.flip(-1)).flip(-1)
            y = y.view(size) if self.form == "both, sized" else y
        elif self.form == "turned":  # it does not come back to the order of the rows
            y = self.scan(x.flip(-1), z.flip(-1))
        elif self.form == "other gate":
            y = self.scan(x, x * z)
        elif self.form == "behind":
            y = self.scan(x, None) * F.silu(z)
        else:
            y = self.scan(x, z)
        return self.out(y.permute([0, 2, 1]) if "columns" in self.form else y.transpose(1, 2))


def make(family: str, config: QConfig, **options: Any) -> tuple[Any, Tensor]:
    build, shape = MODELS[family]
    torch.manual_seed(1)
    model, x = build().eval(), torch.rand(shape)
    prepared = ssmquant.prepare(model, config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    return ssmquant.convert(prepared, **options), x


def record(model: nn.Module) -> Record:
    return runtime_of(model).records[0]


def unfused(model: Any, x: Tensor) -> Tensor:
    with use_backend("chunked", op="fuse"), torch.no_grad():
        out: Tensor = model(x)
    return out


def fused(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    assert record(model).fused["cpu"] is not record(model).run
    return out


def names(model: Any) -> list[str]:
    graph = deploy(record(model).graph, model, cpu)
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


def converted(model: nn.Module, config: QConfig, x: Tensor) -> Any:
    prepared = ssmquant.prepare(model.eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    return ssmquant.convert(prepared)


# ---- what calls stand for --------------------------------------------------------------------------------------------


def quantized(x: Tensor, module: nn.Module, copies: int = 1) -> Tensor:
    q: Any = getattr(module, "quantizer", module)
    return q(x, copies=copies)  # type: ignore[no-any-return]


def normed(norm: Any, x: Tensor) -> Tensor:
    if norm is None:
        return x
    if isinstance(norm[0], Tensor):
        return x * norm[0]
    if len(norm) == 1:
        return norm[0](x)  # type: ignore[no-any-return]
    rms, weight, bias, eps = norm
    shape = x.shape[-1:]
    return F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)


def plain_linear(
    x: Tensor, of_x: Any, weight: Any, bias: Any, norm: Any = None, act: Any = None, axis: int = -1,
    residual: Any = None,
) -> Tensor:  # fmt: skip
    y = F.linear(quantized(normed(norm, x), of_x), weight().flatten(1), bias)
    return added(activated(y.movedim(-1, axis), act).movedim(axis, -1), residual)


def plain_gate(
    x: Tensor, z: Tensor, norm: Any, of_x: Any, weight: Any, bias: Any, residual: Any = None
) -> Tensor:
    return added(F.linear(quantized(normed(norm, x) * F.silu(z), of_x), weight(), bias), residual)


def activated(y: Tensor, act: Any) -> Tensor:
    act = {"silu": F.silu, "gelu": F.gelu}.get(act, act)
    return y if act is None else act(y)


def added(y: Tensor, residual: Any) -> Tensor:
    if residual is None:
        return y
    x, gain = residual
    return y + (x if gain is None else x * gain)


def plain_blend(x: Tensor, gain: Any, v: Tensor, scale: Tensor) -> Tensor:
    return (x if gain is None else x * gain) + v * scale.flatten(1)[:, None, None]


def plain_conv(
    x: Tensor, of_x: Any, weight: Any, bias: Any, window: Any, act: Any = None, gain: Any = None,
    residual: Any = None,
) -> Tensor:  # fmt: skip
    x = x if gain is None else x * gain[:, None, None]
    w = weight() if len(weight.shape) == 4 else weight()[:, :, None, None]
    depthwise = w.shape[1] == 1 and w.shape[0] == x.shape[1]
    y = F.conv2d(quantized(x, of_x), w, bias, *window, w.shape[0] if depthwise else 1)
    y = activated(y, act)
    return y if residual is None else y + residual[0]


def plain_core(
    x: Tensor, order: Tensor, ranks: Any, places: Any, of_x: Any, projection: Any, of_rank: Any, dt_weight: Any,
    of_u: Any, of_delta: Any, of_b: Any, of_c: Any, a: Any, skip: Any, bias: Any, *, softplus: bool,
) -> Tensor:  # fmt: skip
    (rows, rank, states), k, channels = ranks, len(order), x.shape[2]
    image = x.transpose(1, 2).contiguous()
    made = torch.einsum("bdl,ked->bkel", quantized(image, of_x, k), projection().reshape(k, rows, channels))
    path = order.long()[None, :, None]
    made = made.gather(3, path.expand(*made.shape[:3], -1))
    low, b, c = (made[:, :, i : i + n] for i, n in zip(places, (rank, states, states), strict=True))
    weight = dt_weight().reshape(k, channels, rank)
    delta = torch.einsum("bkrl,kdr->bkdl", quantized(low, of_rank), weight).flatten(1, 2)
    u = (
        quantized(image, of_u, k)[:, None]
        .expand(-1, k, -1, -1)
        .gather(3, path.expand(len(x), -1, channels, -1))
    )
    values = [v() if isinstance(v, nn.Module) else v for v in (a, skip, bias)]
    y = selective_scan(
        u.flatten(1, 2), delta if of_delta is None else quantized(delta, of_delta), values[0], quantized(b, of_b),
        quantized(c, of_c), values[1], None, values[2], softplus,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    out = torch.zeros_like(image)
    for one, steps in zip(y.unflatten(1, (k, -1)).unbind(1), order.long(), strict=True):
        out[:, :, steps] += one
    return out.transpose(1, 2)


def plain_sequence(
    x: Tensor, reverse: bool, shift: int, ranks: Any, places: Any, of_taps: Any, taps: Any, bias: Any, act: Any,
    *modules: Any, softplus: bool,
) -> Tensor:  # fmt: skip
    u = quantized(x.transpose(1, 2).contiguous(), of_taps)
    u = u.flip(-1) if reverse else u
    assert shift == 1 - taps.shape[2]  # causal
    u = F.conv1d(u, taps(), bias, padding=-shift, groups=u.shape[1])[..., : x.shape[1]]
    y = plain_core(
        F.silu(u).transpose(1, 2), torch.arange(x.shape[1])[None], ranks, places, *modules, softplus=softplus
    )
    return y.flip(1) if reverse else y


PLAIN = {
    "linear": plain_linear,
    "gated_linear": plain_gate,
    "blend": plain_blend,
    "conv2d": plain_conv,
    "scan_core": plain_core,
    "sequence_core": plain_sequence,
}
