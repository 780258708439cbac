"""Deployed graphs on a CPU: what is fused computes what it stands for, and everything else stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, Rule, zoo
from ssmquant.graph.deploy import deploy
from ssmquant.graph.orders import Unfit
from ssmquant.graph.runtime import Record, runtime_of
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed
from ssmquant.ops import selective_scan, use_backend
from ssmquant.ops.deployed import cpu
from tests.graph.test_fuse import Scan2d

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


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


# ---- what it is made of ----------------------------------------------------------------------------------------------


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


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Compares every call of a kernel, on the values that it gets, with what it stands for."""
    calls = dict.fromkeys(PLAIN, 0)
    inside = False

    def watch(name: str) -> None:
        real, plain = getattr(deployed, name), PLAIN[name]

        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            if inside:
                return real(*args, **kwargs)  # type: ignore[no-any-return]
            inside = True
            got, want = real(*args, **kwargs), plain(*args, **kwargs)
            inside = False
            calls[name] += 1
            assert got.shape == want.shape
            # Codes may differ where a value is on a tie: few of them do, by one step, which a scan carries on.
            error = (got - want).abs()
            assert float(error.norm() / want.norm().clamp(min=1e-6)) < 0.05, name
            if not name.endswith("_core"):
                assert float((error > 1e-5 * want.abs().amax()).float().mean()) < 0.02, name
            return got  # type: ignore[no-any-return]

        monkeypatch.setattr(deployed, name, call)

    for name in PLAIN:
        watch(name)
    return calls


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_every_call_computes_what_it_stands_for(family: str, config: str, checked: dict[str, int]) -> None:
    model, x = make(family, CONFIGS[config]())
    y = fused(model, x)
    assert y.shape == unfused(model, x).shape
    if family == "mambair":
        assert checked["scan_core"] == checked["gated_linear"] == checked["blend"] == 2
        assert checked["conv2d"] >= 8
    if family == "vim":
        depth = checked["gated_linear"]
        assert depth > 0
        assert checked["sequence_core"] == 2 * depth
    elif family == "vmamba":
        assert checked["scan_core"] == 3
        assert checked["conv2d"] >= 7
        assert checked["linear"] >= 6
    assert checked["linear"] > 0


def test_residuals_of_images_are_part_of_the_layers_before_them(checked: dict[str, int]) -> None:
    """VMamba: 1x1 convolutions, with and without a norm before, behind what does nothing in eval mode."""
    model, x = make("vmamba", QConfig.minmax(8, 8))
    assert {"DropPath", "Identity"} <= {type(m).__name__ for m in model.modules()}
    fused(model, x)
    graph = deploy(record(model).graph, model, cpu)
    called = [n for n in graph.nodes if n.op == "call_module"]
    assert not [n for n in graph.nodes if op_name(n) in ("add", "contiguous")]
    assert not [n for n in called if type(model.get_submodule(str(n.target))) in (nn.Identity, nn.Dropout)]
    lengths = {"linear_call": 8, "conv2d_call": 9}  # with a residual
    found = [n for n in graph.nodes if len(n.args) == lengths.get(getattr(n.target, "__name__", ""))]
    assert len(found) == 6  # two of each block


class Layers(nn.Module):
    """``form``: how they are put together."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.norm = form, nn.LayerNorm(8)
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.single, self.rows = nn.Conv2d(8, 8, 1, groups=8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "depthwise":
            x = self.first(x)
            return x + self.single(x)
        if self.form == "depthwise behind a norm":
            y = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.last(self.single(y))
        small = x.mean((2, 3), keepdim=True)
        if self.form == "residual of one pixel":
            return self.first(x) + self.last(small)
        if self.form == "result of one pixel":
            return self.first(small) + x
        return (self.rows(small.permute(0, 2, 3, 1)) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "form",
    [
        "depthwise",
        "depthwise behind a norm",
        "residual of one pixel",
        "result of one pixel",
        "rows of one pixel",
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (6, 5)])
def test_sums_that_are_no_residuals(form: str, size: tuple[int, int]) -> None:
    """Also those that have the same shapes at the size of the example alone."""
    torch.manual_seed(0)
    example = torch.randn(2, 8, 1, 1)
    model = converted(Layers(form), QConfig.minmax(8, 8, keep_first_last=False), example)
    x = torch.randn(2, 8, *size)
    with torch.no_grad():
        got = model(x)
    torch.testing.assert_close(got, unfused(model, x), rtol=1e-4, atol=1e-5)


class DropPath(nn.Module):
    """Another one than the usual: of what it leaves it has the expectation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize("how", ["training", "hook", "another class"])
def test_what_does_something_in_eval_mode_is_not_left_out(how: str) -> None:
    torch.manual_seed(0)
    middle: nn.Module = {"training": nn.Dropout(0.5), "hook": nn.Identity()}.get(how, DropPath())
    x = torch.randn(3, 8)
    layers = nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 8))
    model = converted(layers, QConfig.minmax(8, 8, keep_first_last=False), x)
    before = fused(model, x)
    if how == "training":
        model[1].train()
        with torch.no_grad():
            assert not torch.equal(model(x), model(x))
        model[1].eval()
    elif how == "hook":
        handle = model[1].register_forward_hook(lambda module, args, out: out * 2)
        with torch.no_grad():
            assert not torch.allclose(model(x), before, rtol=0.1)
        handle.remove()
    torch.testing.assert_close(fused(model, x), before)
    torch.testing.assert_close(before, unfused(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mambair", "vmamba"])
def test_frozen(family: str, checked: dict[str, int]) -> None:
    model, x = make(family, dynamic(4), dls="frozen")
    fused(model, x)
    assert checked["scan_core"] > 0
    if family == "mambair":
        alone = fused(model, x[:1])
        torch.testing.assert_close(alone, fused(model, x)[:1])


def test_results_agree_at_other_sizes() -> None:
    model, x = make("mambair", dynamic(8))
    for shape in ((2, 3, 9, 12), (1, 3, 16, 7), (3, 3, 1, 5)):
        x = torch.rand(shape)
        a, b = fused(model, x), unfused(model, x)
        assert float((a - b).norm() / b.norm()) < 0.02
        assert torch.equal(fused(model, x), a)


class Tied(Scan2d):
    """With an in-place change between layers, and a projection that two read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        y = y.contiguous()
        z = y.contiguous()
        z += 1.0
        return super().forward(x) + self.out(y) + self.out(z)


@pytest.mark.parametrize("kind", [Scan2d, Tied])
def test_foreign_code(kind: type[Scan2d], checked: dict[str, int]) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 5)
    config = dynamic(4, keep_first_last=False)
    prepared = ssmquant.prepare(kind().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    assert checked["scan_core"] == 1
    assert float((a - b).abs().max()) < 0.5 * float(b.abs().max())


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
        if self.form == "columns":  # as mamba_ssm has it
            y = self.inp.weight @ x.permute(2, 0, 1).reshape(6, -1)
            x, z = y.view(40, b, -1).permute(1, 0, 2).chunk(2, dim=1)
        else:
            x, z = self.inp(x).transpose(1, 2).chunk(2, dim=1)
        if self.form == "both":
            y = self.scan(x, z) + self.scan(x.flip(-1), z.flip(-1)).flip(-1)
        elif self.form == "turned":  # it does not come back to the order of the rows
            y = self.scan(x.flip(-1), z.flip(-1))
        elif self.form == "other gate":
            y = self.scan(x, x * z)
        elif self.form == "behind":
            y = self.scan(x, None) * F.silu(z)
        else:
            y = self.scan(x, z)
        return self.out(y.permute([0, 2, 1]) if self.form == "columns" else y.transpose(1, 2))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["linear", "matmul", "columns", "both", "behind", "turned", "other gate"])
def test_sequences_of_foreign_code(form: str, bits: int, checked: dict[str, int]) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 6, 5, 4)
    config = QConfig.recommended(bits, bits, keep_first_last=False)
    prepared = ssmquant.prepare(MambaBlock(form).eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    for shape in ((2, 6, 5, 4), (1, 6, 3, 7), (3, 6, 1, 1), (2, 6, 1, 2)):
        x = torch.rand(shape)
        a, b = fused(model, x), unfused(model, x)
        assert float((a - b).abs().max()) < (0.5 if bits == 4 else 0.1) * float(b.abs().max())
    if form in ("turned", "other gate"):
        assert checked["sequence_core"] == 0
    else:
        assert checked["sequence_core"] == (8 if form == "both" else 4)
        assert checked["gated_linear"] == (0 if form == "behind" else 4)


def test_parts_in_float() -> None:
    rules = (Rule("*.self_attention.scan", a_bits=None), Rule("*.conv2d", keep_float=True))
    model, x = make("mambair", dynamic(4, rules=rules))
    assert "scan_core" not in names(model)
    assert "linear_call" in names(model)
    a, b = fused(model, x), unfused(model, x)
    assert float((a - b).norm() / b.norm()) < 0.1


def test_a_quantizer_that_kernels_do_not_know_stays() -> None:
    model, x = make("mambair", QConfig(w_bits=4, a_bits=4, activation="n2uq"))
    found = names(model)
    assert "scan_core" not in found  # its low rank is N2UQ's
    assert "gated_linear_call" in found  # DLS
    a, b = fused(model, x), unfused(model, x)
    assert float((a - b).norm() / b.norm()) < 0.1


# ---- when it is used -------------------------------------------------------------------------------------------------


def test_nan_stays_nan() -> None:
    model, x = make("mambair", dynamic(4))
    x[0, 1, 3, 3] = float("nan")
    a, b = fused(model, x), unfused(model, x)
    assert a[0].isnan().any()
    assert a[1].isfinite().all()
    assert bool((a.isnan() | ~b.isnan()).all())  # nowhere a number that should be none


@pytest.mark.parametrize("how", ["gradients", "half", "double", "autocast", "chosen", "meta"])
def test_other_calls_run_as_ever(how: str) -> None:
    model, x = make("mambair", dynamic(4))
    fused(model, x)
    if how == "gradients":
        x.requires_grad_()
        y = model(x)
        assert torch.equal(y, unfused(model, x))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.any()
    elif how in ("half", "double"):
        dtype = torch.bfloat16 if how == "half" else torch.float64
        model, x = model.to(dtype), x.to(dtype)
        with torch.no_grad():
            assert torch.equal(model(x), unfused(model, x))
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = model(x)
            with use_backend("chunked", op="fuse"):
                assert torch.equal(y, model(x))
    elif how == "chosen":
        with use_backend("chunked", op="fuse"), torch.no_grad():
            assert torch.equal(model(x), record(model).run(model, x))
    else:  # as on any other device
        assert model.to("meta")(x.to("meta")).shape == (2, 3, 18, 24)


def test_a_call_of_another_kind_does_not_turn_it_off() -> None:
    model, x = make("vmamba", dynamic(4))
    y = fused(model, x)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(x.half())
    assert torch.equal(fused(model, x), y)


def test_what_is_written_in_place_is_read_in_time() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x.mul_(3.0)  # between a norm and its reader
            z = self.a(y)
            w = z.contiguous()
            gated = w * F.silu(x)
            z.add_(1.0)
            return self.b(gated) + z

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    config = dynamic(8, keep_first_last=False)
    prepared = ssmquant.prepare(Written().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x.clone()], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x.clone()), unfused(model, x.clone())
    assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("as_module", [False, True])
def test_rms_norms_are_part_of_what_reads_them(eps: float | None, as_module: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(6, eps=eps), nn.Linear(6, 5)
            nn.init.normal_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x) if as_module else F.rms_norm(x, (6,), weight=self.norm.weight, eps=eps)
            return self.linear(y)

    torch.manual_seed(0)
    x = torch.randn(2, 9, 6)
    x[0, 3] *= 1e-4  # where eps matters
    config = QConfig.recommended(8, 8, keep_first_last=False)
    prepared = ssmquant.prepare(Normed().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    assert float((a - b).norm() / b.norm()) < 1e-5
    # A module's weights have the factors of the channels; a function's get them at the call.
    assert [name for name in names(model) if name != "mul"] == ["linear_call"]
    assert ("mul" in names(model)) is not as_module
    handle = model.norm.register_forward_hook(lambda module, args, out: out * 0)
    still = fused(model, x)
    handle.remove()
    assert torch.equal(still, a) is not as_module


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_behind_a_function_that_norms(weighted: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.weight = nn.Parameter(torch.tensor([1.0, -9.0, 0.1, 2.0, 30.0, 0.5])) if weighted else None
            self.bias = nn.Parameter(torch.tensor([0.1, 1.0, 8.0, -0.5, 0.0, 40.0])) if weighted else None

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.layer_norm(x, (6,), self.weight, self.bias))

    torch.manual_seed(0)
    x = torch.randn(2, 9, 6) * torch.tensor([1.0, 9.0, 0.1, 2.0, 30.0, 0.5])
    prepared = ssmquant.prepare(
        Normed().eval(), QConfig.recommended(8, 8, keep_first_last=False), example_inputs=(x,)
    )
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    assert float((a - b).norm() / b.norm()) < 1e-5
    assert [name for name in names(model) if name != "mul"] == ["linear_call"]


class Mlp(nn.Module):
    """VMamba's, of an image with channels last, by linear layers or, channels first, by convolutions."""

    def __init__(self, image: bool, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.image, self.norm = image, nn.LayerNorm(6)
        self.fc1 = nn.Conv2d(6, 20, 1) if image else nn.Linear(6, 20)
        self.fc2 = nn.Conv2d(20, 6, 1) if image else nn.Linear(20, 6)
        self.act, self.drop = act, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y.permute(0, 3, 1, 2) if self.image else y
        y = self.drop(self.fc2(self.drop(self.act(self.fc1(y)))))
        return x + (y.permute(0, 2, 3, 1) if self.image else y)


def converted(model: nn.Module, config: QConfig, x: Tensor) -> Any:
    prepared = ssmquant.prepare(model.eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    return ssmquant.convert(prepared)


def activations_left(model: Any) -> int:
    graph = deploy(record(model).graph, model, cpu)
    kinds = nn.GELU, nn.SiLU, nn.ReLU
    modules = [
        n for n in graph.nodes if n.op == "call_module" and type(model.get_submodule(n.target)) in kinds
    ]
    return len(modules) + sum(name in ("gelu", "silu", "relu") for name in names(model))


def nearly(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() < 1e-5 * b.norm())


OF_LAYERS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], bool]] = {
    "gelu": (nn.GELU, True),
    "silu": (nn.SiLU, True),
    "in place": (lambda: nn.SiLU(inplace=True), True),
    "F.gelu": (lambda: F.gelu, True),
    "F.silu": (lambda: F.silu, True),
    "tanh": (lambda: nn.GELU("tanh"), False),
    "F.gelu, tanh": (lambda: lambda x: F.gelu(x, approximate="tanh"), False),
    "relu": (nn.ReLU, False),
}


@pytest.mark.parametrize("config", [lambda: QConfig.recommended(8, 8, keep_first_last=False),
                                    lambda: QConfig.qmambair(8, keep_first_last=False)],
                         ids=["static", "dynamic"])  # fmt: skip
@pytest.mark.parametrize("act", OF_LAYERS)
@pytest.mark.parametrize("image", [False, True])
def test_activations_are_part_of_the_layer_before(
    image: bool, act: str, config: Callable[[], QConfig], checked: dict[str, int]
) -> None:
    torch.manual_seed(0)
    make_act, known = OF_LAYERS[act]
    model = converted(Mlp(image, make_act()), config(), torch.randn(2, 5, 4, 6))
    for shape in ((2, 5, 4, 6), (1, 3, 7, 6), (3, 1, 1, 6)):
        x = torch.randn(shape)
        assert nearly(fused(model, x), unfused(model, x))
    assert activations_left(model) == (not known)
    assert checked["linear"] + checked["conv2d"] == 6


@pytest.mark.parametrize("image", [False, True])
def test_an_activation_that_is_watched_or_another_one_is_called(image: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6)
    model = converted(Mlp(image, nn.GELU()), QConfig.recommended(8, 8, keep_first_last=False), x)
    before = fused(model, x)
    seen = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append((args[0].shape, out.shape))
        return out * torch.arange(out.shape[1]).view(-1, *[1] * (out.dim() - 2))

    handle = model.act.register_forward_hook(hook)
    a, b = fused(model, x), unfused(model, x)
    handle.remove()
    assert nearly(a, b)
    assert not nearly(a, before)
    assert seen[0] == seen[1]
    assert torch.equal(fused(model, x), before)
    model.act.approximate = "tanh"
    assert nearly(fused(model, x), unfused(model, x))
    assert not torch.equal(fused(model, x), before)
    model.act.forward = torch.tanh
    assert nearly(fused(model, x), unfused(model, x))
    model.act = nn.Softplus()
    assert nearly(fused(model, x), unfused(model, x))


def test_a_hook_of_the_layer_comes_before_the_activation() -> None:
    torch.manual_seed(0)
    x, mlp = torch.randn(2, 5, 4, 6), Mlp(False, nn.GELU())
    mlp.fc1.register_forward_hook(lambda module, args, out: out * 3)
    model = converted(mlp, QConfig.recommended(8, 8, keep_first_last=False), x)
    assert activations_left(model) == 1
    assert nearly(fused(model, x), unfused(model, x))


class Around(nn.Module):
    """Activations of layers whose results others read, too, or that are added to something."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.act = form, nn.SiLU()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.form == "read twice":
            return self.b(self.act(y)) + y
        if self.form == "added before":
            return self.b(self.act(y + x))
        if self.form == "added behind":
            return self.act(y) + x
        return self.b(F.silu(y) * self.c(x))  # a gate


@pytest.mark.parametrize(
    ("form", "left", "smooth", "found"),
    [
        ("read twice", 1, 0.5, {"linear_call": 2}),
        ("added before", 1, 0.5, {"linear_call": 2}),
        ("added behind", 0, 0.5, {"linear_call": 1}),
        ("gate", 0, 0.0, {"linear_call": 2, "gated_linear_call": 1}),
        ("gate", 0, 0.5, {"linear_call": 3}),  # factors of channels are between
    ],
)
def test_activations_and_what_is_around_them(
    form: str, left: int, smooth: float, found: dict[str, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6) * torch.arange(1, 7)
    model = converted(Around(form), QConfig.lsq(8, 8, smooth=smooth, keep_first_last=False), x)
    assert nearly(fused(model, x), unfused(model, x))
    assert activations_left(model) == left
    assert {
        name: names(model).count(name) for name in {*names(model)} - {"times"}
    } == found  # sums are in there
    handle = model.act.register_forward_hook(lambda module, args, out: out * 2)
    assert nearly(fused(model, x), unfused(model, x))
    handle.remove()


def test_what_changes_between_calls_is_noticed() -> None:
    model, x = make("mambair", QConfig.recommended(4, 4))
    before = fused(model, x)
    runtime = runtime_of(model)
    name = next(k for k in runtime.activations if k.endswith("in_proj:input"))
    quantizer: Any = runtime.activations[name].quantizer
    other = copy.deepcopy(quantizer)
    changes: list[Callable[[], object]] = [
        lambda: quantizer.alpha.mul_(1.5),
        lambda: setattr(quantizer.alpha, "data", quantizer.alpha.data / 3),
        lambda: setattr(runtime.activations[name], "quantizer", other),
        lambda: next(w for w in runtime.weights.values()).scale.mul_(2),
        lambda: model.layers[0].residual_group.blocks[0].ln_1.weight.mul_(2),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        after = fused(model, x)
        assert not torch.equal(after, before)
        assert float((after - unfused(model, x)).norm() / after.norm()) < 0.1
        before = after
    twin = copy.deepcopy(model)
    assert torch.equal(fused(twin, x), before)


def test_hooks_are_called() -> None:
    model, x = make("mambair", dynamic(4))
    fused(model, x)
    for store in (runtime_of(model).activations, runtime_of(model).weights):
        seen = []
        child = next(iter(store.values()))
        handle = child.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            y = model(x)
        handle.remove()
        assert seen
        assert torch.equal(y, unfused(model, x))
    norm = model.layers[0].residual_group.blocks[0].ln_1
    handle = norm.register_forward_hook(lambda module, args, out: out * 0)
    a, b = fused(model, x), unfused(model, x)
    handle.remove()
    assert float((a - b).norm() / b.norm()) < 0.1
    assert not torch.allclose(a, fused(model, x))


def test_copies_and_files() -> None:
    model, x = make("mambair", dynamic(4))
    y = fused(model, x)
    assert torch.equal(fused(copy.deepcopy(model), x), y)
    assert torch.equal(fused(pickle.loads(pickle.dumps(model)), x), y)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other, _ = make("mambair", dynamic(4))
    with torch.no_grad():
        for b in runtime_of(other).weights.buffers():
            if b.is_floating_point():
                b.mul_(1.1)
    assert not torch.equal(fused(other, x), y)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(fused(other, x), y)  # what kernels keep of weights is that of the new ones


def test_prepared_models_do_not_change() -> None:
    build, shape = MODELS["mambair"]
    x = torch.rand(shape)
    prepared = ssmquant.prepare(build().eval(), dynamic(4))
    ssmquant.calibrate(prepared, [x], progress=False)
    with torch.no_grad():
        prepared(x)
    assert not record(prepared).fused


def test_what_does_not_fit_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("mambair", dynamic(4))

    def unfit(*args: Any, **kwargs: Any) -> Tensor:
        raise Unfit

    monkeypatch.setattr(deployed, "scan_core", unfit)
    with torch.no_grad():
        assert torch.equal(model(x), unfused(model, x))
    assert record(model).fused["cpu"] is record(model).run


def test_nothing_to_fuse() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(1)  # type: ignore[no-any-return]

    x = torch.rand(2, 4, 9, 9)
    config = dynamic(4, keep_first_last=False)
    prepared = ssmquant.prepare(Plain().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    assert deploy(record(model).graph, model, cpu) is record(model).graph
    with torch.no_grad():
        assert torch.equal(model(x), unfused(model, x))


def test_layers_of_other_shapes() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Linear(5, 70)
            self.deep = nn.Linear(70, 6, bias=False)
            self.one = nn.Conv2d(1, 4, 3, padding=1)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.even = nn.Conv2d(4, 3, 2, stride=(2, 1), padding=1)
            self.wide = nn.Conv2d(3, 5, (3, 5), padding=(2, 4), dilation=2)

        def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            y = self.deep(torch.relu(self.flat(x)))
            return y, self.wide(self.even(self.grouped(self.one(image)))).reshape(-1)

    torch.manual_seed(0)
    x, image = torch.randn(7, 5), torch.randn(2, 1, 8, 9)
    config = dynamic(8, keep_first_last=False)
    prepared = ssmquant.prepare(Layers().eval(), config, example_inputs=(x, image))
    ssmquant.calibrate(prepared, [(x, image)], forward=lambda m, b: m(*b), progress=False)
    model = ssmquant.convert(prepared)
    with torch.no_grad():
        got = model(x, image)
    assert names(model).count("linear_call") == 2
    assert names(model).count("conv2d_call") == 2
    with use_backend("chunked", op="fuse"), torch.no_grad():
        want = model(x, image)
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous()
        assert float((a - b).norm() / b.norm()) < 0.02


def test_factors_of_channels_take_any_layout() -> None:
    """A convolution whose result has factors, which the next one takes, need not copy it to another layout."""
    model, _ = make("mambair", QConfig.recommended(4, 4))
    graph = deploy(record(model).graph, model, cpu)
    convs = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "conv2d_call"]
    assert any(n.args[7] is not None for n in convs)  # factors
    assert all(n.args[6] for n in convs)  # may be channels last


def test_a_result_that_needs_its_layout_is_contiguous() -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x)).view(x.shape[0], -1)

    x = torch.rand(2, 3, 5, 6)
    config = dynamic(4, keep_first_last=False)
    prepared = ssmquant.prepare(View().eval(), config, example_inputs=(x,))
    ssmquant.calibrate(prepared, [x], progress=False)
    model = ssmquant.convert(prepared)
    a, b = fused(model, x), unfused(model, x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
