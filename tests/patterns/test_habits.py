"""What a single pattern promises beyond the tests that all twins share."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from ssmquant.graph.plan import Point
from ssmquant.graph.runtime import runtime_of
from tests.patterns.models_hf import Cache, CausalLMOutput
from tests.patterns.models_lbmamba import LBVim
from tests.patterns.models_local import LocalVim, LocalVMamba
from tests.patterns.models_mhsvm import HEADS, MHSVM
from tests.patterns.models_resvmamba import ResVMamba
from tests.patterns.models_ss2d import VMamba
from tests.patterns.models_vim import Mamba, Vim
from tests.patterns.steps import FLOAT, W4, W8, calibrated, close, floated, tensors
from tests.patterns.twin import settled


def seeded(build: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return settled(build(*args, **kwargs).eval())


def prepared_of(model: nn.Module, config: QConfig, x: Tensor) -> Any:
    prepared = ssmquant.prepare(model, config, example_inputs=(x,))
    return prepared if config == FLOAT else ssmquant.calibrate(prepared, [x]).eval()


def apart(name: str) -> tuple[nn.Module, Any]:
    """A twin and its traced model, as if no other test had called it."""
    model, prepared, _ = floated(name)
    prepared = copy.deepcopy(prepared).eval()
    del runtime_of(prepared).records[1:]
    return model, prepared


def points(model: nn.Module) -> dict[str, Point]:
    return {p.name: p for r in runtime_of(model).records for p in r.plan.points}


# ---- raw parameters, instance attributes, ties ---------------------------------------------------------------------


@torch.no_grad()
def test_load_hooks_of_layers_are_kept() -> None:
    """Weights of older checkpoints are those of 1x1 convolutions."""
    _, prepared, _ = floated("ss2d, grouped conv1d")
    other = seeded(VMamba, seed=1)
    old = {
        k: v[:, :, None, None] if "mlp.fc" in k and v.dim() == 2 else v for k, v in other.state_dict().items()
    }
    assert any(v.dim() == 4 and "mlp.fc" in k for k, v in old.items())
    prepared = copy.deepcopy(prepared)
    prepared.load_state_dict(old, strict=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(prepared(x), other(x), rtol=0, atol=0)


def ties(model: nn.Module) -> list[tuple[str, str]]:
    """Further names of parameters, and their first ones."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return [(n, first[id(p)]) for n, p in named if first.setdefault(id(p), n) != n]


def value(model: nn.Module, name: str) -> Any:
    owner, _, attr = name.rpartition(".")
    return getattr(model.get_submodule(owner), attr)


@torch.no_grad()
def test_parameters_tied_under_two_names(tmp_path: Path) -> None:
    assert len(ties(MHSVM(blocks=4))) == 64
    model, prepared = floated("tied names and scan heads")[0], calibrated("tied names and scan heads", "w4")
    assert len(ties(model)) == 1 + HEADS * 5
    assert [t for t in ties(prepared) if not t[0].startswith("_ssmquant.")] == ties(model)
    weights = [p.parameter for p in points(prepared).values() if p.what == "weight"]
    assert len(set(weights)) == len(weights)
    assert len({n for n, _ in ties(model)} & set(weights)) == 0
    deployed = ssmquant.convert(prepared)
    ssmquant.save(deployed, tmp_path / "tied.safetensors")
    loaded = ssmquant.load(tmp_path / "tied.safetensors", seeded(MHSVM, seed=1))
    for m in (deployed, loaded):
        assert all(value(m, name) is value(m, first) for name, first in ties(model))
        assert m.blocks[0].mhs.x_ssproj_W is m.blocks[0].mhs.x_ssproj.weight is None


def test_route_tables_in_attributes_stay_attributes() -> None:
    model, prepared, _ = floated("tied names and scan heads")
    route = prepared.blocks[0].mhs.scanhead_0.scanning.scan_tind_0
    assert isinstance(route, Tensor)
    assert not [n for n, _ in prepared.named_buffers() if "tind" in n]
    assert torch.equal(route, model.get_submodule("blocks.0.mhs.scanhead_0.scanning").scan_tind_0)


# ---- fused mixers --------------------------------------------------------------------------------------------------


def test_the_fast_path_is_never_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the model is another one."""
    model, x = seeded(Vim, "v2", True, False), torch.randn(2, 3, 16, 16)
    written = []

    def setattribute(self: nn.Module, name: str, value: Any) -> None:
        written.append(name)
        nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(Mamba, "__setattr__", setattribute)
    prepared = ssmquant.prepare(model, W4, example_inputs=(x,))
    prepared.train()(torch.randn(3, 3, 16, 16))
    deployed = ssmquant.convert(prepared)
    assert "use_fast_path" not in written
    for m in (model, prepared, deployed):
        assert m.layers[0].mixer.use_fast_path is True
    slow = copy.deepcopy(model)
    for layer in slow.layers:
        layer.mixer.use_fast_path = False
    assert not torch.allclose(slow(x), model(x), atol=1e-3)
    assert [r.name for r in ssmquant.summary(prepared).rows if r.kind == "scan"] == [
        "layers.0.mixer.scan", "layers.0.mixer.scan#2",
    ]  # fmt: skip


# ---- modules made in forward ---------------------------------------------------------------------------------------


def test_modules_made_in_forward_are_adopted(tmp_path: Path) -> None:
    model, x = seeded(ResVMamba), torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    with pytest.warns(UserWarning, match=r"makes a Conv2d\(.*_adopted\.[01]") as caught:
        prepared = ssmquant.prepare(model, W4, example_inputs=(x,))
    assert len(caught) == 2
    ssmquant.calibrate(prepared, [x]).eval()
    assert torch.equal(prepared(x), prepared(x))
    own = {k: tuple(v.shape) for k, v in prepared.state_dict().items() if k.startswith("_adopted.")}
    assert own == {
        "_adopted.0.weight": (12, 8, 1, 1), "_adopted.0.bias": (12,), "_adopted.1.weight": (12, 12, 1, 1),
    }  # fmt: skip
    prepared.load_state_dict(model.state_dict(), strict=True)

    groups = ssmquant.param_groups(prepared, lr=0.05)
    ids = {id(p) for g in groups for p in g["params"]}
    assert all(id(p) in ids for n, p in prepared.named_parameters() if n.startswith("_adopted."))
    before = prepared._adopted[1].weight.detach().clone()
    optimizer = torch.optim.SGD(groups)
    prepared.train()(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(prepared.eval()._adopted[1].weight, before)

    deployed = ssmquant.convert(prepared)
    ssmquant.save(deployed, tmp_path / "adopted.safetensors")
    loaded = ssmquant.load(tmp_path / "adopted.safetensors", seeded(ResVMamba, seed=1))
    other = torch.randn(3, 3, 24, 16)
    torch.testing.assert_close(loaded(other), deployed(other), rtol=0, atol=0)


# ---- storage that parameters share ---------------------------------------------------------------------------------


class Expanded(LocalVim):
    """One number stands for a whole parameter, and one row for all."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(2):
            setattr(self, f"A_log_{i}", nn.Parameter(torch.log(torch.arange(1.0, 3)).expand(8, 2)))
            setattr(self, f"D_{i}", nn.Parameter(torch.ones(1).expand(8)))


@pytest.mark.parametrize("build", [LocalVim, Expanded])
@torch.no_grad()
def test_parameters_of_one_storage_take_values_of_their_own(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    assert model.A_log_0 is not model.A_log_1
    assert (
        model.A_log_0.untyped_storage().data_ptr() == model.A_log_1.untyped_storage().data_ptr()
        or build is Expanded
    )
    torch.manual_seed(1)
    whole = LocalVim()
    for n, p in list(whole.named_parameters()):
        owner, _, attr = n.rpartition(".")
        setattr(whole.get_submodule(owner), attr, nn.Parameter(p + 0.3 * torch.randn(p.shape)))
    x = torch.randn(2, 3, 8, 8)
    prepared = ssmquant.prepare(model, FLOAT, example_inputs=(x,))
    prepared.load_state_dict(whole.state_dict(), strict=True)
    assert not torch.equal(prepared.A_log_0, prepared.A_log_1)
    for n, p in whole.named_parameters():
        assert torch.equal(prepared.get_parameter(n), p), n
    close([prepared(x)], [whole(x)], 2e-6)

    if build is LocalVim:
        quantized = copy.deepcopy(calibrated("parameters of one storage", "w4"))
        quantized.load_state_dict(whole.state_dict(), strict=True)
        deployed = ssmquant.convert(quantized)
        ssmquant.save(deployed, tmp_path / "alias.safetensors")
        loaded = ssmquant.load(tmp_path / "alias.safetensors", model)
        torch.testing.assert_close(loaded(x), deployed(x), rtol=0, atol=0)


def test_attributes_set_in_forward_stay_as_they_were() -> None:
    model = seeded(LocalVMamba)
    prepared = ssmquant.prepare(model, FLOAT, example_inputs=(torch.randn(2, 3, 12, 12),))
    assert model.layers[0].multi_scan.token_size is None
    assert prepared.layers[0].multi_scan.token_size is None


# ---- what depends on sizes -----------------------------------------------------------------------------------------


def test_scans_share_the_quantizers_of_shared_operands() -> None:
    prepared = calibrated("orders as tuples", "w4")
    found = points(prepared)
    for operand, calls in (("delta", 4), ("C", 4), ("A", 4), ("u", 1), ("B", 1)):
        uses = [site.name for site, _ in found[f"layers.0.mamba.scan.{operand}"].uses]
        assert len(uses) == calls, operand
    deployed = ssmquant.convert(prepared)
    assert deployed.layers[0]["mamba"].dt_proj.bias is not None


@torch.no_grad()
def test_orders_of_another_resolution_are_made_anew() -> None:
    model, prepared = apart("orders as tuples")
    graphs = []
    for shape in ((1, 3, 12, 12), (1, 3, 16, 8), (4, 3, 12, 12), (3, 3, 16, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(prepared(x), model(x), rtol=0, atol=0)
        graphs.append(len(runtime_of(prepared).records))
    assert graphs == [1, 2, 2, 2]


@torch.no_grad()
def test_bags_of_any_length_need_few_graphs() -> None:
    model, prepared = apart("bags")
    for n in (20, 24, 22, 7, 40, 33):
        x = torch.randn(1, n, 6)
        out, expected = prepared(x), model(x)
        assert [type(v) for v in out] == [type(v) for v in expected]
        assert out[3:] == (3, None)
        close(list(out), list(expected), 2e-6)
    assert len(runtime_of(prepared).records) <= 2  # with padding and without
    close(list(prepared(torch.ones(9, 6))), list(model(torch.ones(9, 6))), 2e-6)  # a bag without its batch


# ---- windows -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_window_by_length_is_a_guard() -> None:
    """The kernel's window is 4, 8 or 16 steps: up to 128, up to 256, and above."""
    model, prepared = apart("window by length, scan")
    windows = {}
    for length in (100, 128, 129, 257, 60):
        x = torch.randn(1, length, 6)
        close([prepared(x)], [model(x)], 2e-6)
        windows[length] = scan_window(prepared, x)
    assert windows == {100: 4, 128: 4, 129: 8, 257: 16, 60: 4}
    assert len(runtime_of(prepared).records) == 3


@torch.no_grad()
def test_a_window_by_length_after_convert(tmp_path: Path) -> None:
    prepared = calibrated("window by length, scan", "w4")
    deployed = ssmquant.convert(prepared)
    ssmquant.save(deployed, tmp_path / "lb.safetensors")
    loaded = ssmquant.load(tmp_path / "lb.safetensors", seeded(LBVim, "scan", seed=1))
    x = torch.randn(1, 140, 6)
    torch.testing.assert_close(loaded(x), prepared(x), rtol=0, atol=1e-5)
    assert scan_window(loaded, x) == 8


def scan_window(model: nn.Module, x: Tensor) -> Any:
    """The window of the graph that serves ``x``."""
    from ssmquant.graph.prepared import bind
    from ssmquant.graph.trace import describe_call

    runtime = runtime_of(model)
    record = runtime.select(model, describe_call(bind(runtime.signature(model), (x,), {})))
    (site,) = [s for s in record.plan.sites if s.kind == "scan"]
    return site.scan["window"]


# ---- language models -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keywords_and_outputs_of_a_language_model() -> None:
    model, prepared = apart("language model")
    assert prepared.lm_head.weight is prepared.backbone.embeddings.weight
    ids = torch.randint(0, 12, (3, 6))
    for more in (
        {},
        {"use_cache": True},
        {"labels": ids},
        {"output_hidden_states": True, "use_cache": False},
    ):
        out, expected = prepared(input_ids=ids, **more), model(input_ids=ids, **more)
        assert type(out) is type(expected) is CausalLMOutput
        assert list(out) == list(expected)
        assert isinstance(out.cache_params, Cache) == bool(more.get("use_cache"))
        torch.testing.assert_close(tensors(out), tensors(expected), rtol=0, atol=0)
    out, expected = (m(input_ids=ids, return_dict=False) for m in (prepared, model))
    assert type(out) is type(expected) is tuple
    embeds = torch.randn(2, 7, 8)
    torch.testing.assert_close(
        prepared(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        prepared(input_ids=ids, inputs_embeds=embeds)


def test_a_tied_embedding_is_looked_up_in_float() -> None:
    deployed = ssmquant.convert(calibrated("language model", "w8"))
    assert deployed.backbone.embeddings.weight is not None
    assert deployed.lm_head.weight is deployed.backbone.embeddings.weight or deployed.lm_head.weight is None


# ---- draws in evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_draws_in_evaluation_are_drawn_at_every_call() -> None:
    (model, prepared, _), x = floated("windows, mask, routing"), torch.randn(2, 3, 8, 8)

    def run(m: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return m(x)

    assert torch.equal(run(prepared, 1), run(model, 1))
    assert torch.equal(run(prepared, 2), run(model, 2))
    assert not torch.equal(run(prepared, 1), run(prepared, 2))


def test_nothing_warns_but_what_is_adopted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssmquant.prepare(seeded(VMamba), W8, example_inputs=(torch.randn(2, 3, 16, 16),))
