from __future__ import annotations

import json
import pickle
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, files, zoo
from ssmquant.adapter import find_adapter, get_adapter
from ssmquant.errors import ConfigError, FormatError
from ssmquant.graph.runtime import runtime_of
from ssmquant.ops import use_backend
from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.zoo import vmamba_blocks
from ssmquant.zoo.vmamba_blocks import ForwardType, LayerNorm2d, Linear2d, PatchMerging2D

SMALL: dict[str, Any] = {"depths": (1, 1), "dims": 16, "num_classes": 5, "ssm_d_state": 3}
PUBLISHED: dict[str, Any] = {
    "forward_type": "v05_noz", "norm_layer": "ln2d", "ssm_conv_bias": False, "downsample_version": "v3",
    "patchembed_version": "v2",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "first version": {"forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1"},
    "einsum": {"forward_type": "v04"},
    "gated": {"forward_type": "v03", "gmlp": True, "norm_layer": "ln2d", "downsample_version": "v1"},
    "batch norm": {"forward_type": "v05_nozact", "norm_layer": "bn", "ssm_conv": 0},
    "plain stem": {
        "patch_norm": False,
        "patchembed_version": "v2",
        "ssm_act_layer": "gelu",
        "ssm_init": "v1",
    },
    "convolved": {"forward_type": "v05_ondwconv3_noz_oact", "ssm_dt_rank": 2, "ssm_init": "v2"},
}


def small(kind: str = "published", **args: Any) -> zoo.VSSM:
    """With weights far from their start, so that every part of the model shows in the output."""
    torch.manual_seed(0)
    model = zoo.VSSM(**{**SMALL, **KINDS[kind], **args})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("vmamba_tiny", 30_249_064, 276),
        ("vmamba_small", 50_147_752, 402),
        ("vmamba_base", 88_557_800, 402),
        ("vmamba_tiny_v0", 22_893_448, 212),
        ("vmamba_nano", 73_450, 70),
    ],
)
def test_size_of_published_models(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = zoo.build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_keys_of_the_tiny_model_are_upstreams() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in zoo.vmamba_tiny().state_dict().items()}
    want: dict[str, tuple[int, ...]] = {}
    for stage, (depth, dim) in enumerate(zip((2, 2, 8, 2), (96, 192, 384, 768), strict=True)):
        rank = dim // 16
        for i in range(depth):
            block = {
                "norm.weight": (dim,), "norm.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
                "op.x_proj_weight": (4, rank + 2, dim), "op.A_logs": (4 * dim, 1), "op.Ds": (4 * dim,),
                "op.dt_projs_weight": (4, dim, rank), "op.dt_projs_bias": (4, dim),
                "op.out_norm.weight": (dim,), "op.out_norm.bias": (dim,), "op.in_proj.weight": (dim, dim),
                "op.conv2d.weight": (dim, 1, 3, 3), "op.out_proj.weight": (dim, dim),
                "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
                "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
            }  # fmt: skip
            want |= {f"layers.{stage}.blocks.{i}.{k}": v for k, v in block.items()}
        if stage < 3:
            down = {
                "1.weight": (2 * dim, dim, 3, 3),
                "1.bias": (2 * dim,),
                "3.weight": (2 * dim,),
                "3.bias": (2 * dim,),
            }
            want |= {f"layers.{stage}.downsample.{k}": v for k, v in down.items()}
    want |= {"patch_embed.0.weight": (48, 3, 3, 3), "patch_embed.5.weight": (96, 48, 3, 3)}
    want |= {f"patch_embed.{i}.bias": (48,) for i in (0, 2)} | {
        f"patch_embed.{i}.bias": (96,) for i in (5, 7)
    }
    want |= {"patch_embed.2.weight": (48,), "patch_embed.7.weight": (96,)}
    want |= {"classifier.norm.weight": (768,), "classifier.norm.bias": (768,)}
    want |= {"classifier.head.weight": (1000, 768), "classifier.head.bias": (1000,)}
    assert shapes == want


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_free(kind: str) -> None:
    model = small(kind).eval()
    for size in ((1, 3, 32, 32), (2, 3, 24, 40), (1, 3, 29, 18)):
        out = model(torch.rand(size))
        assert out.shape == (size[0], 5)
        assert out.isfinite().all()


def four_directions(op: nn.Module, x: Tensor) -> Tensor:
    """SS2D's scans written plainly: walk the pixels in each of four orders, one at a time."""
    batch, channels, height, width = x.shape
    pixels = torch.arange(height * width).view(height, width)
    total = torch.zeros(batch, channels, height * width)
    rank, n = op.dt_rank, op.d_state
    for k, order in enumerate((pixels.flatten(), pixels.t().flatten())):
        for reverse in (False, True):
            path, index = order.flip(0) if reverse else order, k + 2 * reverse
            walked = x.flatten(2)[:, :, path]
            projected = op.x_proj_weight[index] @ walked
            dt = op.dt_projs_weight[index] @ projected[:, :rank]
            a = -op.A_logs.view(4, channels, n)[index].exp()
            b, c = projected[:, rank : rank + n], projected[:, rank + n :]
            skip, bias = op.Ds.view(4, channels)[index], op.dt_projs_bias[index]
            total[:, :, path] += selective_scan_reference(walked, dt, a, b, c, skip, None, bias, True)
    return total.view(x.shape)


@pytest.mark.parametrize("kind", ["published", "first version", "einsum", "gated"])
def test_scan_of_a_plane_goes_in_four_directions(kind: str) -> None:
    op = small(kind).layers[0].blocks[0].op
    x = torch.randn(2, op.d_inner, 4, 6)
    torch.testing.assert_close(op.forward_core(x), four_directions(op, x), rtol=1e-4, atol=1e-4)


def test_all_versions_are_one_function() -> None:
    """In float32; they differ in how they compute it."""
    x, want = torch.rand(1, 3, 24, 32), None
    for version in ("v01", "v02_no32", "v03", "v04", "v05"):
        got = small("einsum", forward_type=version).eval()(x)
        want = got if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_channel_first_and_last_are_one_function() -> None:
    last, first = small("einsum", norm_layer="ln").eval(), small("einsum", norm_layer="ln2d").eval()
    first.load_state_dict(last.state_dict())
    x = torch.rand(2, 3, 20, 28)
    torch.testing.assert_close(first(x), last(x), rtol=1e-5, atol=1e-5)


def test_merging_pads_odd_sides() -> None:
    for channel_first, norm in ((False, nn.LayerNorm), (True, LayerNorm2d)):
        merge = PatchMerging2D(3, 7, norm, channel_first)
        x = torch.rand(1, 5, 4, 3)
        padded = torch.zeros(1, 6, 4, 3)
        padded[:, :5] = x
        move = (lambda t: t.permute(0, 3, 1, 2)) if channel_first else (lambda t: t)
        torch.testing.assert_close(merge(move(x)), merge(move(padded)))
        assert merge(move(x)).shape == ((1, 7, 3, 2) if channel_first else (1, 3, 2, 7))


def test_linear_over_channels() -> None:
    layer, x = Linear2d(3, 5), torch.rand(2, 3, 4, 6)
    want = nn.functional.linear(x.permute(0, 2, 3, 1), layer.weight, layer.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), want)


def test_initial_steps_and_decays_are_mambas() -> None:
    op = zoo.VSSM(**SMALL).layers[0].blocks[0].op
    steps = nn.functional.softplus(op.dt_projs_bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
    torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 4.0).expand_as(op.A_logs))
    assert op.A_logs._no_weight_decay
    assert op.Ds._no_weight_decay


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains(checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = zoo.VSSM(**SMALL, **PUBLISHED, drop_path_rate=0.1, use_checkpoint=checkpointing)
    x, target = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["published", "first version", "gated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(kind: str, dtype: torch.dtype) -> None:
    model = small(kind).eval()
    x = torch.rand(1, 3, 16, 24)
    want = model(x)
    got = deepcopy(model).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.2 if dtype == torch.bfloat16 else 1e-4)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(model(x).float(), want, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_passed_to_the_scan(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def scan(u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return u

    monkeypatch.setattr(vmamba_blocks, "selective_scan", scan)
    small(kind, scan_window=8)(torch.rand(1, 3, 16, 16))
    assert [s["window"] for s in seen] == [8, 8]
    seen.clear()
    small(kind)(torch.rand(1, 3, 16, 16))
    assert all("window" not in s for s in seen)


def test_a_windowed_model_sees_ahead() -> None:
    plain, windowed = small().eval(), small(scan_window=4).eval()
    x = torch.rand(1, 3, 16, 16)
    assert (plain(x) - windowed(x)).abs().max() > 1e-4


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def legacy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of January 2024."""
    out = {}
    for k, v in state.items():
        for new, old in (
            (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."), (r"\.op\.", ".self_attention."), (r"^classifier\.", ""),
            (r"^patch_embed\.0\.", "patch_embed.proj."), (r"^patch_embed\.2\.", "patch_embed.norm."),
        ):  # fmt: skip
            k = re.sub(new, old, k)
        out[k] = v
    return out


@pytest.mark.parametrize("kind", ["first version", "einsum"])
def test_old_names_load_strictly(kind: str) -> None:
    source, target = small(kind).eval(), zoo.VSSM(**{**SMALL, **KINDS[kind]}).eval()
    old = legacy(dict(source.state_dict()))
    assert len(set(old) & set(source.state_dict())) < len(old) / 2
    before = dict(old)
    target.load_state_dict(old)
    assert old == before  # not changed
    x = torch.rand(1, 3, 16, 20)
    assert torch.equal(source(x), target(x))


def test_weights_of_pointwise_convolutions_load_strictly() -> None:
    source, target = small().eval(), zoo.VSSM(**SMALL, **PUBLISHED).eval()
    linear = {f"{n}.weight" for n, m in source.named_modules() if isinstance(m, Linear2d)}
    state = {k: v[:, :, None, None] if k in linear else v for k, v in source.state_dict().items()}
    target.load_state_dict(state)
    x = torch.rand(1, 3, 16, 20)
    assert torch.equal(source(x), target(x))
    wide = {k: v.expand(-1, -1, 1, 3) if k in linear else v for k, v in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict(wide)


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_position_embeddings_are_fitted_to_the_size(norm_layer: str) -> None:
    args = {"posembed": True, "norm_layer": norm_layer}
    source, target = small("einsum", imgsize=16, **args), small("einsum", imgsize=32, **args).eval()
    source.pos_embed.data.fill_(0.25)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.pos_embed, torch.full((1, 16, 8, 8), 0.25))
    assert target(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("prepared", [False, True], ids=["float", "prepared"])
def test_a_legacy_checkpoint_file_loads(prepared: bool, tmp_path: Path) -> None:
    source, target = small("first version").eval(), zoo.VSSM(**{**SMALL, **KINDS["first version"]}).eval()
    state = {f"module.{k}": v for k, v in legacy(dict(source.state_dict())).items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "c.pth")
    if prepared:
        target = ssmquant.prepare(target, QConfig(), example_inputs=(torch.rand(1, 3, 16, 16),))
    files.load_checkpoint(target, tmp_path / "c.pth")
    x = torch.rand(1, 3, 16, 20)
    assert torch.equal(source(x), target.eval()(x))
    state.pop("module.layers.0.blocks.0.ln_1.weight")
    with pytest.raises(FormatError, match=r"missing \['layers.0.blocks.0.norm.weight'\]$"):
        files.load_checkpoint(target, {"model": state})


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_description_makes_the_same_model_again(kind: str) -> None:
    model = small(kind).eval()
    config = json.loads(json.dumps(zoo.describe(model)))
    again = zoo.build(config).eval()
    assert zoo.describe(again) == config
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 16, 20)
    for same in (again, deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))


def test_forward_types() -> None:
    assert ForwardType.parse("v05_noz") == ForwardType("v05", "norm", False, True, False, False)
    assert ForwardType.parse("v0").float32
    assert ForwardType.parse("v01").float32
    assert not ForwardType.parse("v01_no32").float32
    full = ForwardType.parse("v02_onsoftmax_nozact_oact_no32")
    assert full == ForwardType("v02", "softmax", True, False, True, False)


@pytest.mark.parametrize(
    "text",
    [
        "v2",
        "v3",
        "v06",
        "v0seq",
        "v0_noz",
        "xv1a",
        "m0",
        "m0_noz",
        "v051d",
        "v052dc",
        "v05_oact_noz",
        "v05 ",
        "",
        None,
        5,
    ],
)
def test_other_forward_types_are_refused_by_name(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"forward_type=.*expected 'v0', or 'v01', .*'v05'"):
        zoo.VSSM(**SMALL, forward_type=text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depths": ()}, "depths"),
        ({"depths": (1, 0)}, "depths"),
        ({"dims": (16,)}, "dims"),
        ({"dims": 0}, "dims"),
        ({"ssm_d_state": 0}, "ssm_d_state=0"),
        ({"ssm_ratio": 0}, "ssm_ratio"),
        ({"mlp_ratio": -1}, "mlp_ratio"),
        ({"mlp_ratio": 0.001}, "mlp_ratio"),
        ({"ssm_dt_rank": "full"}, "ssm_dt_rank"),
        ({"ssm_act_layer": "tanh"}, "ssm_act_layer='tanh', expected one of silu, gelu"),
        ({"mlp_act_layer": 3}, "mlp_act_layer"),
        ({"norm_layer": "gn"}, "norm_layer"),
        ({"norm_layer": "ln2d", "forward_type": "v0"}, "norm_layer='ln2d', expected 'ln'"),
        ({"ssm_init": "v3"}, "ssm_init"),
        ({"downsample_version": "none"}, "downsample_version"),
        ({"patchembed_version": "v3"}, "patchembed_version"),
        ({"patchembed_version": "v2", "patch_size": 1}, "patch_size"),
        ({"patchembed_version": "v2", "dims": 1}, "dims"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"scan_window": -1}, "scan_window"),
        ({"ssm_conv": None}, "ssm_conv"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_wrong_configurations(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.build("VSSM", **{**SMALL, **args})


# ---- quantized -----------------------------------------------------------------------------------------------------


def test_adapter_finds_an_example_by_structure() -> None:
    def example(model: nn.Module) -> Tensor:
        adapter = find_adapter(model)
        assert adapter is get_adapter("vmamba")
        return adapter.example(model)[0]

    assert example(small()).shape == (1, 3, 224, 224)
    assert example(small(in_chans=1).double()).dtype == torch.float64
    assert example(small(in_chans=1)).shape == (1, 1, 224, 224)
    assert example(small(posembed=True, imgsize=64)).shape == (1, 3, 64, 64)

    class VSSM(nn.Module):  # another one of that name
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(2, 8, 4, 4)

    assert example(VSSM()).shape == (1, 2, 224, 224)


BLOCK = ["conv2d", "dt_projs_weight", "in_proj", "out_proj", "x_proj_weight"]


@pytest.mark.parametrize("kind", ["published", "first version", "einsum", "gated"])
def test_every_projection_and_scan_is_a_site(kind: str) -> None:
    model = small(kind).eval()
    x = torch.rand(2, 3, 24, 32)
    prepared = ssmquant.prepare(model, QConfig(w_bits=4, a_bits=4), example_inputs=(x,))
    rows = {r.name: r for r in ssmquant.summary(prepared).rows}
    assert sum(r.kind == "scan" for r in rows.values()) == 2
    for i in (0, 1):
        for name in [*BLOCK, "scan"]:
            row = rows.pop(f"layers.{i}.blocks.0.op.{name}")
            assert row.scheme == ("A4" if name == "scan" else "W4A4")
        for name in ("fc1", "fc2") if kind != "first version" else ():
            assert rows.pop(f"layers.{i}.blocks.0.mlp.{name}").scheme == "W4A4"
    down = "layers.0.downsample." + {"published": "1", "einsum": "1"}.get(kind, "reduction")
    assert rows.pop(down).scheme == "W4A4"
    assert {n: r.note for n, r in rows.items()} == dict.fromkeys(rows, "published placement")
    assert {n for n in rows if not n.startswith("patch_embed")} == {"classifier.head"}

    floating = ssmquant.prepare(model, QConfig(), example_inputs=(x,))
    for size in ((1, 3, 24, 32), (2, 3, 24, 32), (5, 3, 16, 16), (1, 3, 29, 18), (2, 3, 16, 40)):
        x = torch.rand(size)
        torch.testing.assert_close(floating(x), model(x), rtol=1e-5, atol=1e-5)
    assert (
        len(runtime_of(floating).records) <= 2 if kind in ("first version", "gated") else 1
    )  # odd sides are padded


def test_whole_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = ssmquant.prepare(zoo.vmamba_nano(), QConfig(w_bits=4, a_bits=4))
    x = torch.rand(2, 3, 32, 32)
    ssmquant.calibrate(prepared, [x])
    optimizer = torch.optim.SGD(ssmquant.param_groups(prepared, 1e-3, 0.0, 1e-3))
    prepared.train()
    nn.functional.cross_entropy(prepared(x), torch.tensor([1, 7])).backward()
    assert all(p.grad is not None for p in prepared.parameters())
    optimizer.step()
    prepared.eval()
    deployed = ssmquant.convert(prepared)
    ssmquant.verify(prepared, deployed, (x,))
    ssmquant.save(deployed, tmp_path / "m")
    again = ssmquant.load(tmp_path / "m")
    assert type(again).__name__ == "VSSM"
    for size in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 40, 24)):
        x = torch.rand(size)
        want = prepared(x)
        with use_backend("chunked", op="fuse"):
            torch.testing.assert_close(deployed(x), want, rtol=1e-4, atol=1e-4)
        # Kernels sum in another order: a value on a tie may have gone the other way.
        assert float((deployed(x) - want).detach().norm() / want.detach().norm()) < 0.02
        assert torch.equal(again(x), deployed(x))
