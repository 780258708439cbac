from __future__ import annotations

import json
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmquant import load_checkpoint, zoo
from ssmquant.errors import ConfigError
from ssmquant.ops import selective_scan
from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.zoo.mambair_blocks import DropPath

SMALL: dict[str, Any] = {"embed_dim": 30, "depths": (1, 2), "d_state": 3, "mlp_ratio": 1.2}
HEADS = {
    "light": {"upsampler": "pixelshuffledirect", "upscale": 3},
    "classic": {"upsampler": "pixelshuffle", "upscale": 4},
    "denoise": {"upsampler": "", "upscale": 1},
    "jpeg": {"upsampler": "", "upscale": 1, "in_chans": 1, "img_range": 255.0},
    "3conv": {"upsampler": "pixelshuffledirect", "upscale": 2, "resi_connection": "3conv"},
}


def small(head: str = "light", **args: Any) -> zoo.MambaIR:
    torch.manual_seed(0)
    return zoo.MambaIR(**{**SMALL, **HEADS[head], **args})


@pytest.mark.parametrize(
    ("name", "upscale", "parameters"),
    [
        ("mambair_light", 2, 905_016),
        ("mambair_light", 3, 913_131),
        ("mambair_light", 4, 924_492),
        ("mambair_classic", 2, 20_421_863),
        ("mambair_classic", 4, 20_569_575),
        ("mambair_tiny", 2, 140_154),
    ],
)
def test_size_of_published_models(name: str, upscale: int, parameters: int) -> None:
    with torch.device("meta"):
        model = zoo.build(name, upscale=upscale)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())


BLOCK = [
    ("skip_scale", (60,)),
    ("skip_scale2", (60,)),
    ("ln_1.weight", (60,)),
    ("ln_1.bias", (60,)),
    ("self_attention.x_proj_weight", (4, 24, 72)),
    ("self_attention.dt_projs_weight", (4, 72, 4)),
    ("self_attention.dt_projs_bias", (4, 72)),
    ("self_attention.A_logs", (288, 10)),
    ("self_attention.Ds", (288,)),
    ("self_attention.in_proj.weight", (144, 60)),
    ("self_attention.conv2d.weight", (72, 1, 3, 3)),
    ("self_attention.conv2d.bias", (72,)),
    ("self_attention.out_norm.weight", (72,)),
    ("self_attention.out_norm.bias", (72,)),
    ("self_attention.out_proj.weight", (60, 72)),
    ("conv_blk.cab.0.weight", (30, 60, 1, 1)),
    ("conv_blk.cab.0.bias", (30,)),
    ("conv_blk.cab.1.weight", (30, 1, 3, 3)),
    ("conv_blk.cab.1.bias", (30,)),
    ("conv_blk.cab.3.weight", (60, 30, 1, 1)),
    ("conv_blk.cab.3.bias", (60,)),
    ("conv_blk.cab.4.weight", (60, 1, 3, 3)),
    ("conv_blk.cab.4.bias", (60,)),
    ("conv_blk.cab.5.attention.1.weight", (2, 60, 1, 1)),
    ("conv_blk.cab.5.attention.1.bias", (2,)),
    ("conv_blk.cab.5.attention.3.weight", (60, 2, 1, 1)),
    ("conv_blk.cab.5.attention.3.bias", (60,)),
    ("ln_2.weight", (60,)),
    ("ln_2.bias", (60,)),
]


def test_keys_of_the_light_model_are_upstreams() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in zoo.mambair_light(4).state_dict().items()}
    want: dict[str, tuple[int, ...]] = {}
    for i in range(4):
        for j in range(6):
            want |= {f"layers.{i}.residual_group.blocks.{j}.{k}": shape for k, shape in BLOCK}
    convs = [f"layers.{i}.conv" for i in range(4)] + ["conv_after_body"]
    want |= {f"{c}.weight": (60, 60, 3, 3) for c in convs} | {f"{c}.bias": (60,) for c in convs}
    want |= {"conv_first.weight": (60, 3, 3, 3), "conv_first.bias": (60,)}
    want |= {f"{n}.{k}": (60,) for n in ("patch_embed.norm", "norm") for k in ("weight", "bias")}
    want |= {"upsample.0.weight": (48, 60, 3, 3), "upsample.0.bias": (48,)}
    assert shapes == want


def test_keys_of_the_classic_head_are_upstreams() -> None:
    keys = set(small("classic").state_dict())
    assert {k for k in keys if "upsample" in k or "last" in k} == {
        f"{n}.{k}"
        for n in ("conv_before_upsample.0", "upsample.0", "upsample.2", "conv_last")
        for k in ("weight", "bias")
    }
    cab = "layers.0.residual_group.blocks.0.conv_blk.cab."
    assert {k.removeprefix(cab)[0] for k in keys if k.startswith(cab)} == {"0", "2", "3"}


@pytest.mark.parametrize("head", HEADS)
def test_sizes_are_free(head: str) -> None:
    model = small(head).eval()
    channels, scale = HEADS[head].get("in_chans", 3), HEADS[head]["upscale"]
    for batch, height, width in ((1, 5, 8), (2, 8, 3), (1, 1, 1)):
        out = model(torch.rand(batch, channels, height, width))
        assert out.shape == (batch, channels, scale * height, scale * width)
        assert out.isfinite().all()


def test_restoration_without_weights_in_the_last_convolution_is_the_identity() -> None:
    model = small("denoise").eval()
    nn.init.zeros_(model.conv_last.weight)
    nn.init.zeros_(model.conv_last.bias)
    x = torch.rand(1, 3, 6, 7)
    torch.testing.assert_close(model(x), x)


def four_directions(layer: nn.Module, x: Tensor) -> Tensor:
    """SS2D's scans written plainly: walk the pixels in each of four orders, one at a time."""
    batch, channels, height, width = x.shape
    pixels = torch.arange(height * width).view(height, width)
    total = torch.zeros(batch, channels, height * width)
    rank, n = layer.dt_rank, layer.d_state
    for k, order in enumerate((pixels.flatten(), pixels.t().flatten())):
        for reverse in (False, True):
            path = order.flip(0) if reverse else order
            index = k + 2 * reverse
            walked = x.flatten(2)[:, :, path]
            projected = layer.x_proj_weight[index] @ walked
            dt = layer.dt_projs_weight[index] @ projected[:, :rank]
            a = -layer.A_logs.view(4, channels, n)[index].exp()
            b, c = projected[:, rank : rank + n], projected[:, rank + n :]
            skip, bias = layer.Ds.view(4, channels)[index], layer.dt_projs_bias[index]
            total[:, :, path] += selective_scan_reference(walked, dt, a, b, c, skip, None, bias, True)
    return total


def test_scan_of_a_plane_goes_in_four_directions() -> None:
    layer = small().layers[0].residual_group.blocks[0].self_attention
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, layer.d_inner, 4, 6)
    torch.testing.assert_close(sum(layer.forward_core(x)), four_directions(layer, x), rtol=1e-4, atol=1e-4)


def test_habits_of_upstream() -> None:
    model = small().eval()
    for module in model.modules():
        if type(module).__name__ == "SS2D":
            assert module.__dict__["selective_scan"] is selective_scan
    assert "mean" in model.__dict__
    model(torch.rand(1, 3, 4, 4, dtype=torch.float32))
    assert "mean" not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = small().eval()
    x = torch.rand(1, 3, 6, 7)
    want = model(x)
    got = deepcopy(model).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_under_autocast_the_scan_stays_in_float() -> None:
    model = small().eval()
    x = torch.rand(1, 3, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    torch.testing.assert_close(got.float(), model(x), rtol=0.05, atol=0.05)


def test_trains() -> None:
    model = small(drop_path_rate=0.2)
    x = torch.rand(2, 3, 6, 6)
    target = torch.rand(2, 3, 18, 18)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = (model(x) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


def test_initial_steps_and_decays_are_mambas() -> None:
    layer = small().layers[0].residual_group.blocks[0].self_attention
    steps = nn.functional.softplus(layer.dt_projs_bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
    torch.testing.assert_close(layer.A_logs.exp(), torch.arange(1.0, 4.0).expand_as(layer.A_logs))
    assert layer.A_logs._no_weight_decay
    assert layer.Ds._no_weight_decay


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert (out.flatten(1).std(1) == 0).all()
    assert abs(out.mean() - 1.0) < 0.05
    assert drop.eval()(x) is x


@pytest.mark.parametrize("wrap", [lambda sd: sd, lambda sd: {"params": sd}, lambda sd: {"params_ema": sd}])
def test_upstream_checkpoints_load_strictly(wrap: Any) -> None:
    source, target = small().eval(), small(drop_path_rate=0.0).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    load_checkpoint(target, wrap(source.state_dict()))
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("head", HEADS)
def test_description_makes_the_same_model_again(head: str) -> None:
    model = small(head).eval()
    config = json.loads(json.dumps(zoo.describe(model)))
    again = zoo.build(config).eval()
    assert zoo.describe(again) == config
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, HEADS[head].get("in_chans", 3), 5, 6)
    for same in (again, deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))


def test_named_builders_describe_themselves_in_full() -> None:
    model = zoo.build("mambair_tiny", upscale=3)
    assert zoo.describe(model)["name"] == "MambaIR"
    assert zoo.describe(model)["args"]["upscale"] == 3


@pytest.mark.parametrize(
    ("what", "args", "message"),
    [
        ("mambair_huge", {}, "no zoo model 'mambair_huge'; there are MambaIR"),
        ("mambair_tiny", {"scale": 2}, "no argument scale; it has upscale"),
        ({"args": {}}, {}, "expected a name"),
        ({"name": "MambaIR", "args": {}, "weights": 0}, {}, "expected a name"),
        ({"name": "MambaIR", "args": [1]}, {}, "args must be a dict"),
        ({"name": ["MambaIR"]}, {}, "no zoo model"),
        ("MambaIR", {"depths": 6}, "wrong type"),
        ("MambaIR", {"depths": []}, "depths"),
        ("MambaIR", {"embed_dim": 0}, "embed_dim=0"),
        ("MambaIR", {"embed_dim": True}, "embed_dim=True"),
        ("MambaIR", {"drop_rate": 1.0}, "drop_rate"),
        ("MambaIR", {"img_range": 0.0}, "img_range"),
        ("MambaIR", {"mlp_ratio": 0.001}, "mlp_ratio"),
        ("MambaIR", {"patch_size": 2}, "patch_size"),
        ("MambaIR", {"resi_connection": "2conv"}, "resi_connection"),
        ("MambaIR", {"upsampler": "nearest+conv"}, "upsampler"),
        ("MambaIR", {"upsampler": "pixelshuffle", "upscale": 5}, "upscale=5"),
    ],
)
def test_wrong_configurations(what: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.build(what, **args)


def test_only_zoo_models_are_described() -> None:
    with pytest.raises(ConfigError, match="Linear is not a zoo model"):
        zoo.describe(nn.Linear(1, 1))


@pytest.mark.slow
def test_compiles_whole() -> None:
    model = small().eval()
    x = torch.rand(1, 3, 6, 7)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
