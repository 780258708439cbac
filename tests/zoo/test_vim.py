from __future__ import annotations

import json
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, files, zoo
from ssmquant.adapter import find_adapter, get_adapter
from ssmquant.errors import ConfigError, InputError, SsmquantError
from ssmquant.graph.runtime import runtime_of
from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.zoo import vim

SMALL: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "stride": 4, "depth": 3, "embed_dim": 32, "d_state": 3, "num_classes": 5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "published": {"final_pool_type": "mean"},
    "one way": {"bimamba_type": "none"},
    "summed": {"if_divide_out": False, "init_layer_scale": 0.5},
    "layer norm": {"rms_norm": False, "residual_in_fp32": False},
    "class token first": {"use_middle_cls_token": False},
    "two class tokens": {"use_double_cls_token": True},
    "mean": {"if_cls_token": False, "final_pool_type": "mean"},
    "last": {"if_cls_token": False, "final_pool_type": "none", "if_abs_pos_embed": False},
    "largest": {"if_cls_token": False, "final_pool_type": "max"},
    "overlapping": {"stride": 2, "img_size": (12, 20), "channels": 1},
}


def small(kind: str = "published", **args: Any) -> zoo.VisionMamba:
    """With weights far from their start, so that every part of the model shows in the output."""
    torch.manual_seed(0)
    model = zoo.VisionMamba(**{**SMALL, **KINDS[kind], **args})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def images(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.rand(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "parameters", "tensors"),
    [
        ("vim_tiny", {}, 7_148_008, 415),
        ("vim_tiny", {"stride": 8}, 7_250_344, 415),
        ("vim_small", {}, 25_796_584, 415),
        ("vim_base", {}, 97_598_440, 415),
        ("vim_nano", {}, 25_354, 41),
    ],
)
def test_size_of_published_models(name: str, args: dict[str, Any], parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = zoo.build(name, **args)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_keys_of_the_tiny_model_are_upstreams() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in zoo.vim_tiny().state_dict().items()}
    mixer: dict[str, tuple[int, ...]] = {"in_proj.weight": (768, 192), "out_proj.weight": (192, 384)}
    for end in ("", "_b"):
        mixer |= {
            f"conv1d{end}.weight": (384, 1, 4), f"conv1d{end}.bias": (384,), f"x_proj{end}.weight": (44, 384),
            f"dt_proj{end}.weight": (384, 12), f"dt_proj{end}.bias": (384,), f"A{end}_log": (384, 16),
            f"D{end}": (384,),
        }  # fmt: skip
    want = {f"layers.{i}.mixer.{k}": v for i in range(24) for k, v in mixer.items()}
    want |= {f"layers.{i}.norm.weight": (192,) for i in range(24)}
    want |= {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "norm_f.weight": (192,)}
    want |= {"patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,)}
    want |= {"head.weight": (1000, 192), "head.bias": (1000,)}
    assert shapes == want


def direction(mixer: nn.Module, tokens: Tensor, end: str) -> Tensor:
    """One direction of the mixer written plainly: (B, L, d_model) -> (B, d_inner, L)."""
    weights = {k: v for k, v in mixer.named_parameters() if end == "_b" or "_b" not in k}
    taken = {
        k.replace("_b", ""): v for k, v in weights.items() if ("_b" in k) == (end == "_b") or "in_proj" in k
    }
    x, z = (taken["in_proj.weight"] @ tokens.transpose(1, 2)).chunk(2, dim=1)
    kernel = taken["conv1d.weight"]
    x = F.silu(F.conv1d(F.pad(x, (kernel.shape[-1] - 1, 0)), kernel, taken["conv1d.bias"], groups=x.shape[1]))
    rank, n = mixer.dt_rank, mixer.d_state
    projected = taken["x_proj.weight"] @ x
    dt = taken["dt_proj.weight"] @ projected[:, :rank]
    b, c = projected[:, rank : rank + n], projected[:, rank + n :]
    a = -taken["A_log"].exp()
    return selective_scan_reference(x, dt, a, b, c, taken["D"], z, taken["dt_proj.bias"], True)


@pytest.mark.parametrize("kind", ["published", "one way", "summed"])
def test_mixer(kind: str) -> None:
    mixer = small(kind).layers[0].mixer
    x = torch.randn(2, 11, 32)
    want = direction(mixer, x, "")
    if kind != "one way":
        want = want + direction(mixer, x.flip(1), "_b").flip(-1)
    if kind == "published":
        want = want / 2
    want = want.transpose(1, 2) @ mixer.out_proj.weight.t()
    if kind == "summed":
        want = want * mixer.gamma
    torch.testing.assert_close(mixer(x), want, rtol=1e-4, atol=1e-5)


def test_one_way_is_causal_and_two_ways_are_not() -> None:
    x = torch.randn(1, 9, 32)
    changed = x.clone()
    changed[:, 6:] += 1
    for kind, causal in (("one way", True), ("published", False)):
        mixer = small(kind).layers[0].mixer
        same = torch.allclose(mixer(x)[:, :6], mixer(changed)[:, :6], atol=1e-6)
        assert same == causal


@pytest.mark.parametrize("kind", KINDS)
def test_results(kind: str) -> None:
    model = small(kind).eval()
    for batch in (1, 3):
        out = model(images(model, batch))
        assert out.shape == (batch, 5)
        assert out.isfinite().all()


def test_tokens_and_features() -> None:
    every = small("mean", final_pool_type="all").eval()
    assert every(images(every)).shape == (2, 16, 5)
    bare = small(num_classes=0).eval()
    assert bare(images(bare)).shape == (2, 32)
    headed = small().eval()
    x = images(headed)
    torch.testing.assert_close(headed.head(headed.forward_features(x)), headed(x))


def test_the_class_token_stands_in_the_middle() -> None:
    """With mixers that give nothing, the class token's features are its own."""
    model = small(drop_path_rate=0.0).eval()
    for layer in model.layers:
        nn.init.zeros_(layer.mixer.out_proj.weight)
    want = model.norm_f(model.cls_token[:, 0] + model.pos_embed[:, 8])
    torch.testing.assert_close(model.forward_features(images(model)), want.expand(2, -1))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"images of 16 x 16 pixels, got 8 x 32"):
        small()(torch.rand(1, 3, 8, 32))


def test_initial_steps_and_decays_are_mambas() -> None:
    mixer = zoo.VisionMamba(**SMALL).layers[0].mixer
    for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
        steps = F.softplus(bias)
        assert 9e-4 < steps.min() < steps.max() < 0.11
    for decay in (mixer.A_log, mixer.A_b_log):
        torch.testing.assert_close(decay.exp(), torch.arange(1.0, 4.0).expand_as(decay))
    assert all(p._no_weight_decay for p in (mixer.A_log, mixer.A_b_log, mixer.D, mixer.D_b))


def test_trains() -> None:
    torch.manual_seed(0)
    model = zoo.VisionMamba(**SMALL)
    x, target = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["published", "layer norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(kind: str, dtype: torch.dtype) -> None:
    model = small(kind).eval()
    x = images(model)
    want = model(x)
    got = deepcopy(model).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.2 if dtype == torch.bfloat16 else 1e-4)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(model(x).float(), want, rtol=0.05, atol=0.2)


@pytest.mark.parametrize(("kind", "scans"), [("published", 6), ("one way", 3)])
def test_a_window_is_passed_to_the_scans(kind: str, scans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def scan(u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return u

    monkeypatch.setattr(vim, "selective_scan", scan)
    model = small(kind, scan_window=4)
    model(images(model))
    assert [s["window"] for s in seen] == [4] * scans
    seen.clear()
    small(kind)(images(model))
    assert all("window" not in s for s in seen)


def test_a_windowed_model_sees_ahead() -> None:
    plain, windowed = small("one way").eval(), small("one way", scan_window=4).eval()
    x = images(plain)
    assert (plain(x) - windowed(x)).abs().max() > 1e-4


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["published", "class token first", "two class tokens", "mean"])
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (12, 20)])
def test_position_embeddings_are_fitted_to_the_grid(kind: str, size: tuple[int, int]) -> None:
    source, target = small(kind), small(kind, img_size=size).eval()
    places = {"published": 8, "class token first": 0, "two class tokens": [0, 17]}.get(kind, [])
    source.pos_embed.data.fill_(0.25)
    source.pos_embed.data[:, places] = 3.0  # of the class token
    target.load_state_dict(source.state_dict())
    rows, columns = target.patch_embed.grid_size
    tokens = rows * columns
    new = {"published": tokens // 2, "class token first": 0, "two class tokens": [0, tokens + 1]}.get(
        kind, []
    )
    want = torch.full_like(target.pos_embed, 0.25)
    want[:, new] = 3.0
    torch.testing.assert_close(target.pos_embed.data, want)
    assert target(images(target)).isfinite().all()


def test_position_embeddings_keep_their_places() -> None:
    source, target = small(), small(img_size=32)
    ramp = torch.arange(4.0).view(1, 4, 1).expand(4, 4, 32).reshape(1, 16, 32)  # left to right
    source.pos_embed.data = torch.cat([ramp[:, :8], torch.zeros(1, 1, 32), ramp[:, 8:]], dim=1)
    target.load_state_dict(source.state_dict())
    grid = torch.cat([target.pos_embed[:, :32], target.pos_embed[:, 33:]], dim=1).view(8, 8, 32)
    assert (grid.diff(dim=1) > 0.1).all()
    torch.testing.assert_close(grid, grid[:1].expand_as(grid))


@pytest.mark.parametrize("shape", [(1, 16, 32), (1, 17, 30), (1, 0, 32), (17, 32), (1, 1, 32)])
def test_position_embeddings_that_do_not_fit(shape: tuple[int, ...]) -> None:
    state = {**small().state_dict(), "pos_embed": torch.zeros(shape)}
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        small().load_state_dict(state)


@pytest.mark.parametrize("prepared", [False, True], ids=["float", "prepared"])
def test_a_checkpoint_of_another_size_loads(prepared: bool, tmp_path: Path) -> None:
    source = small().eval()
    torch.save({"model": source.state_dict(), "model_ema": source.state_dict()}, tmp_path / "c.pth")
    target: nn.Module = small(img_size=24)
    if prepared:
        target = ssmquant.prepare(target, QConfig())
    files.load_checkpoint(target, tmp_path / "c.pth")
    for k, v in source.state_dict().items():
        assert k == "pos_embed" or torch.equal(target.state_dict()[k], v)
    assert target.eval()(images(target)).shape == (2, 5)


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_description_makes_the_same_model_again(kind: str) -> None:
    model = small(kind).eval()
    config = json.loads(json.dumps(zoo.describe(model)))
    again = zoo.build(config).eval()
    assert zoo.describe(again) == config
    again.load_state_dict(model.state_dict())
    x = images(model)
    for same in (again, deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"if_rope": True}, "if_rope=True, expected False: rotary position embeddings are not served"),
        ({"bimamba_type": "v1"}, "bimamba_type='v1', expected 'v2' or 'none'"),
        ({"bimamba_type": "v3"}, "bimamba_type='v3'"),
        ({"final_pool_type": "min"}, "final_pool_type='min'"),
        ({"img_size": 3}, "img_size"),
        ({"img_size": (16, 16, 16)}, "expected a size, or height and width"),
        ({"patch_size": 0}, "patch_size"),
        ({"stride": 0}, "stride=0"),
        ({"depth": 0}, "depth=0"),
        ({"embed_dim": True}, "embed_dim=True"),
        ({"num_classes": -1}, "num_classes"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"scan_window": -1}, "scan_window"),
        ({"if_bimamba": True}, "no argument if_bimamba"),
        ({"d_state": "16"}, "d_state"),
    ],
)
def test_wrong_configurations(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.build("VisionMamba", **{**SMALL, **args})


# ---- quantized -----------------------------------------------------------------------------------------------------


def test_adapter_finds_an_example_by_structure() -> None:
    def example(model: nn.Module) -> Tensor:
        adapter = find_adapter(model)
        assert adapter is get_adapter("vim")
        return adapter.example(model)[0]

    assert example(small()).shape == (1, 3, 16, 16)
    assert example(small("overlapping").double()).shape == (1, 1, 12, 20)
    assert example(small().double()).dtype == torch.float64

    class VisionMamba(nn.Module):  # another one of that name
        def __init__(self, size: Any) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(2, 8, 4, 4)
            self.patch_embed.img_size = size

    assert example(VisionMamba(48)).shape == (1, 2, 48, 48)
    assert example(VisionMamba([48, 64])).shape == (1, 2, 48, 64)
    assert example(VisionMamba(None)).shape == (1, 2, 224, 224)


MIXER = ["conv1d", "dt_proj", "in_proj", "out_proj", "scan", "x_proj"]
BACKWARD = ["conv1d_b", "dt_proj_b", "scan#2", "x_proj_b"]


@pytest.mark.parametrize("kind", ["published", "one way", "layer norm", "two class tokens"])
def test_every_projection_and_scan_is_a_site(kind: str) -> None:
    model = small(kind).eval()
    prepared = ssmquant.prepare(model, QConfig(w_bits=4, a_bits=4))
    rows = {r.name: r for r in ssmquant.summary(prepared).rows}
    names = MIXER if kind == "one way" else MIXER + BACKWARD
    assert sum(r.kind == "scan" for r in rows.values()) == 3 * (1 if kind == "one way" else 2)
    for name in [f"layers.{i}.mixer.{n}" for i in range(3) for n in names]:
        assert rows.pop(name).scheme == ("A4" if "scan" in name else "W4A4")
    assert {n: r.note for n, r in rows.items()} == {
        "patch_embed.proj": "published placement",
        "head": "published placement",
    }
    floating = ssmquant.prepare(model, QConfig())
    for batch in (1, 2, 5):
        x = images(model, batch)
        torch.testing.assert_close(floating(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(runtime_of(floating).records) == 1
    with pytest.raises(SsmquantError, match="images of 16 x 16 pixels, got 8 x 32"):
        floating(torch.rand(1, 3, 8, 32))


def test_whole_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = ssmquant.prepare(zoo.vim_nano(), QConfig(w_bits=4, a_bits=4))
    x = torch.rand(2, 3, 32, 32)
    ssmquant.calibrate(prepared, [x])
    optimizer = torch.optim.SGD(ssmquant.param_groups(prepared, 1e-3, 0.0, 1e-3))
    prepared.train()
    F.cross_entropy(prepared(x), torch.tensor([1, 7])).backward()
    assert all(p.grad is not None for p in prepared.parameters())
    optimizer.step()
    prepared.eval()
    deployed = ssmquant.convert(prepared)
    ssmquant.verify(prepared, deployed, (x,))
    ssmquant.save(deployed, tmp_path / "m")
    again = ssmquant.load(tmp_path / "m")
    assert type(again).__name__ == "VisionMamba"
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 32, 32)
        torch.testing.assert_close(deployed(x), prepared(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(again(x), deployed(x))
