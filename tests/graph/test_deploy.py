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
from ssmquant import QConfig, Rule
from ssmquant.graph.deploy import deploy
from ssmquant.graph.orders import Unfit
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import deployed
from ssmquant.ops import use_backend
from ssmquant.ops.deployed import cpu
from tests.graph.deployed import CONFIGS, MODELS, MambaBlock, dynamic, fused, make, names, record, unfused
from tests.graph.test_fuse import Scan2d

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "form",
    ["linear", "matmul", "columns", "both", "both columns", "both, sized", "behind", "turned", "other gate"],
)
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
        assert checked["sequence_core"] == (8 if form.startswith("both") else 4)
        assert checked["gated_linear"] == (0 if form in ("behind", "both, sized") else 4)


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
