from __future__ import annotations

import json
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ssmquant
from ssmquant import QConfig, files, zoo
from ssmquant.errors import ConfigError, InputError
from ssmquant.ops import use_backend
from ssmquant.ops.selective_scan import selective_scan_reference
from ssmquant.zoo.vmunet import PatchExpand2D

SMALL: dict[str, Any] = {
    "depths": (1, 1),
    "depths_decoder": (1, 1),
    "dims": 8,
    "num_classes": 3,
    "d_state": 2,
}


def small(**args: Any) -> zoo.VMUNet:
    """With weights far from their start, so that every part of the model shows in the output."""
    torch.manual_seed(0)
    model = zoo.VMUNet(**{**SMALL, **args})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("vmunet_base", 27_427_561, 222), ("VMUNet", 44_273_833, 417), ("vmunet_nano", 36_770, 67)],
)
def test_size_of_published_models(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = zoo.build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_keys_of_the_published_model_are_upstreams() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in zoo.vmunet_base(num_classes=9).state_dict().items()}
    dims = (96, 192, 384, 768)
    want: dict[str, tuple[int, ...]] = {}
    stages = [("layers", 2, dim) for dim in dims]
    stages += [("layers_up", depth, dim) for depth, dim in zip((2, 2, 2, 1), dims[::-1], strict=True)]
    for i, (part, depth, dim) in enumerate(stages):
        inner, rank = 2 * dim, dim // 16
        block = {
            "ln_1.weight": (dim,), "ln_1.bias": (dim,), "self_attention.x_proj_weight": (4, rank + 32, inner),
            "self_attention.dt_projs_weight": (4, inner, rank), "self_attention.dt_projs_bias": (4, inner),
            "self_attention.A_logs": (4 * inner, 16), "self_attention.Ds": (4 * inner,),
            "self_attention.in_proj.weight": (2 * inner, dim), "self_attention.conv2d.weight": (inner, 1, 3, 3),
            "self_attention.conv2d.bias": (inner,), "self_attention.out_norm.weight": (inner,),
            "self_attention.out_norm.bias": (inner,), "self_attention.out_proj.weight": (dim, inner),
        }  # fmt: skip
        stage = f"vmunet.{part}.{i % 4}"
        want |= {f"{stage}.blocks.{j}.{k}": v for j in range(depth) for k, v in block.items()}
        if part == "layers" and i < 3:
            want |= {f"{stage}.downsample.reduction.weight": (2 * dim, 4 * dim)}
            want |= {f"{stage}.downsample.norm.{k}": (4 * dim,) for k in ("weight", "bias")}
        if part == "layers_up" and i > 4:
            want |= {f"{stage}.upsample.expand.weight": (4 * dim, 2 * dim)}
            want |= {f"{stage}.upsample.norm.{k}": (dim,) for k in ("weight", "bias")}
    want |= {"vmunet.patch_embed.proj.weight": (96, 3, 4, 4), "vmunet.patch_embed.proj.bias": (96,)}
    want |= {f"vmunet.patch_embed.norm.{k}": (96,) for k in ("weight", "bias")}
    want |= {f"vmunet.final_up.norm.{k}": (24,) for k in ("weight", "bias")}
    want |= {"vmunet.final_up.expand.weight": (384, 96)}
    want |= {"vmunet.final_conv.weight": (9, 24, 1, 1), "vmunet.final_conv.bias": (9,)}
    assert shapes == want


@given(st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_sizes_are_multiples(patch: int, stages: int, batch: int, rows: int, columns: int) -> None:
    ones = [1] * stages
    model = small(depths=ones, depths_decoder=ones, patch_size=patch)
    side = patch * 2 ** (stages - 1)
    assert model.multiple == side
    out = model(torch.rand(batch, 3, rows * side, columns * side))
    assert out.shape == (batch, 3, rows * side, columns * side)
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [(16, 20), (20, 16), (17, 16), (4, 4), (1, 8)])
def test_other_sizes_are_refused(size: tuple[int, int]) -> None:
    model = small()
    x = torch.rand(1, 3, *size)
    with pytest.raises(InputError, match=rf"multiples of 8, got {size[0]} x {size[1]}: pad them"):
        model(x)
    prepared = ssmquant.prepare(model, QConfig(), example_inputs=(torch.rand(1, 3, 16, 16),))
    with pytest.raises(InputError, match="multiples of 8"):
        prepared(x)


def test_channels() -> None:
    model, x = small(), torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(model(x), model(x.expand(-1, 3, -1, -1)))
    with pytest.raises(InputError, match="3 channels or 1, got 2"):
        model(torch.rand(1, 2, 16, 16))
    assert small(input_channels=1)(x).shape == (2, 3, 16, 16)
    with pytest.raises(InputError, match="1 channels or 1, got 3"):
        small(input_channels=1)(torch.rand(1, 3, 16, 16))


def test_one_class_ends_with_a_probability() -> None:
    model, x = small(num_classes=1), torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(model(x), model.vmunet(x).sigmoid())
    out = small()(x)
    torch.testing.assert_close(out, small().vmunet(x))  # logits of several
    assert out.min() < 0


# ---- against a plain computation -----------------------------------------------------------------------------------


def scans(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, C, H, W), float64: the pixels walked in each of four orders, one at a time, and summed."""
    batch, channels, height, width = x.shape
    n = state["A_logs"].shape[1]
    rank = state["dt_projs_weight"].shape[2]
    pixels = torch.arange(height * width).view(height, width)
    total = torch.zeros(batch, channels, height * width, dtype=x.dtype)
    for k, order in enumerate((pixels.flatten(), pixels.t().flatten())):
        for reverse in (False, True):
            path, index = order.flip(0) if reverse else order, k + 2 * reverse
            walked = x.flatten(2)[:, :, path]
            projected = state["x_proj_weight"][index] @ walked
            dt = state["dt_projs_weight"][index] @ projected[:, :rank]
            a = -state["A_logs"].view(4, channels, n)[index].exp()
            b, c = projected[:, rank : rank + n], projected[:, rank + n :]
            skip, bias = state["Ds"].view(4, channels)[index], state["dt_projs_bias"][index]
            total[:, :, path] += selective_scan_reference(walked, dt, a, b, c, skip, None, bias, True)
    return total.view(x.shape)


class Plain:
    """VM-UNet in float64 from a state dict alone, tokens (B, H, W, C)."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {k.removeprefix("vmunet."): v.double() for k, v in state.items()}

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def block(self, name: str, x: Tensor) -> Tensor:
        own = self.part(f"{name}.self_attention.")
        u, z = (self.norm(f"{name}.ln_1", x) @ own["in_proj.weight"].t()).chunk(2, -1)
        u = F.conv2d(
            u.permute(0, 3, 1, 2), own["conv2d.weight"], own["conv2d.bias"], padding=1, groups=u.shape[-1]
        )
        y = scans(own, F.silu(u)).permute(0, 2, 3, 1)
        y = self.norm(f"{name}.self_attention.out_norm", y) * F.silu(z)
        return x + y @ own["out_proj.weight"].t()

    def merge(self, name: str, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows = [
            [
                torch.cat([x[:, 2 * i + di, 2 * j + dj] for dj in (0, 1) for di in (0, 1)], -1)
                for j in range(width // 2)
            ]
            for i in range(height // 2)
        ]
        merged = torch.stack([torch.stack(row, 1) for row in rows], 1)
        return self.norm(f"{name}.norm", merged) @ self.state[f"{name}.reduction.weight"].t()

    def expand(self, name: str, x: Tensor, scale: int) -> Tensor:
        x = x @ self.state[f"{name}.expand.weight"].t()
        batch, height, width, channels = x.shape
        out = x.new_empty(batch, scale * height, scale * width, channels // scale**2)
        for i in range(scale):
            for j in range(scale):
                out[:, i::scale, j::scale] = x.chunk(scale**2, -1)[i * scale + j]
        return self.norm(f"{name}.norm", out)

    def __call__(self, image: Tensor) -> Tensor:
        conv = self.state["patch_embed.proj.weight"]
        patch = conv.shape[-1]
        x = F.conv2d(image.double(), conv, self.state["patch_embed.proj.bias"], stride=patch)
        x = self.norm("patch_embed.norm", x.permute(0, 2, 3, 1))
        fine = x
        x = self.merge("layers.0.downsample", self.block("layers.0.blocks.0", x))
        x = self.block("layers.1.blocks.0", x)
        x = self.block("layers_up.0.blocks.0", x)  # the deepest skip is not used
        x = x + self.merge("layers.0.downsample", self.block("layers.0.blocks.0", fine))
        x = self.block("layers_up.1.blocks.0", self.expand("layers_up.1.upsample", x, 2))
        x = self.expand("final_up", x, patch).permute(0, 3, 1, 2)
        return F.conv2d(x, self.state["final_conv.weight"], self.state["final_conv.bias"])


@pytest.mark.parametrize("patch_size", [2, 4])
def test_equals_a_plain_computation(patch_size: int) -> None:
    model = small(patch_size=patch_size)
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), Plain(model.state_dict())(x), rtol=1e-4, atol=1e-4)


def test_expansion_makes_channels_pixels() -> None:
    layer, x = PatchExpand2D(6, 3), torch.randn(2, 2, 4, 6)
    plain = Plain(
        {
            "e.expand.weight": layer.expand.weight,
            "e.norm.weight": layer.norm.weight,
            "e.norm.bias": layer.norm.bias,
        }
    )
    torch.testing.assert_close(layer(x).double(), plain.expand("e", x.double(), 3), rtol=1e-5, atol=1e-5)
    assert layer(x).shape == (2, 6, 12, 2)


def test_stochastic_depth_rises_and_falls() -> None:
    model = zoo.VMUNet(**{**SMALL, "depths": (1, 2), "depths_decoder": (2, 1)}, drop_path_rate=0.2)

    def rates(layers: Any) -> list[float]:
        return [block.drop_path.drop_prob for layer in layers for block in layer.blocks]

    assert rates(model.vmunet.layers) == [0, 0.1, 0.2]
    assert rates(model.vmunet.layers_up) == [0.2, 0.1, 0]


def test_trains() -> None:
    torch.manual_seed(0)
    model = zoo.VMUNet(**SMALL, drop_path_rate=0.1)
    x = torch.rand(4, 3, 16, 16)
    target = (x.sum(1) * 0.99).long()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = small(), torch.rand(1, 3, 16, 24)
    want = model(x)
    outs = [deepcopy(model).to(dtype)(x.to(dtype))]
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            outs.append(model(x))
    for out in outs:
        assert out.dtype == dtype
        error = float((out.float() - want).norm() / want.norm())
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


# ---- checkpoints and configuration ---------------------------------------------------------------------------------


def test_a_checkpoint_file_loads(tmp_path: Path) -> None:
    source = small()
    torch.save({"model_state_dict": source.state_dict(), "epoch": 3}, tmp_path / "latest.pth")
    torch.save(source.state_dict(), tmp_path / "best.pth")  # the two ways in which upstream saves
    x = torch.rand(1, 3, 16, 24)
    for name, key in (("latest", "model_state_dict"), ("best", None)):
        target = zoo.VMUNet(**SMALL).eval()
        files.load_checkpoint(target, tmp_path / f"{name}.pth", key=key)
        assert torch.equal(source(x), target(x))


def test_description_makes_the_same_model_again() -> None:
    model = small(patch_size=2, drop_path_rate=0.1)
    config = json.loads(json.dumps(zoo.describe(model)))
    assert config["args"]["dims"] == [8, 16]
    again = zoo.build(config).eval()
    assert zoo.describe(again) == config
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 16, 20)
    for same in (again, deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))
    assert zoo.describe(zoo.build("vmunet_nano", num_classes=4))["name"] == "VMUNet"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depths": ()}, "depths"),
        ({"depths": (1, 0)}, "depths"),
        ({"depths_decoder": (1,)}, "depths_decoder=.*as many"),
        ({"depths_decoder": (1, 0)}, "depths_decoder"),
        ({"dims": (8,)}, "dims"),
        ({"dims": (8, 24)}, "dims=.*twice the one before"),
        ({"dims": 0}, "dims"),
        ({"dims": (8.0, 16.0)}, "dims"),
        ({"dims": 6}, "dims=.*multiple of patch_size"),
        ({"d_state": 0}, "d_state=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"input_channels": True}, "input_channels=True"),
        ({"num_classes": 0}, "num_classes"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"depths": 2}, "wrong type"),
        ({"load_ckpt_path": None}, "no argument load_ckpt_path"),
    ],
)
def test_wrong_configurations(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.build("VMUNet", **{**SMALL, **args})


# ---- quantized -----------------------------------------------------------------------------------------------------

MIXER = ("in_proj", "conv2d", "x_proj_weight", "dt_projs_weight", "scan", "out_proj")


def test_every_projection_and_scan_is_a_site() -> None:
    model = small()
    prepared = ssmquant.prepare(
        model, QConfig(w_bits=4, a_bits=4), example_inputs=(torch.rand(2, 3, 16, 24),)
    )
    rows = {r.name: r for r in ssmquant.summary(prepared).rows}
    for layer in ("layers.0", "layers.1", "layers_up.0", "layers_up.1"):
        for name in MIXER:
            row = rows.pop(f"vmunet.{layer}.blocks.0.self_attention.{name}")
            assert row.scheme == ("A4" if name == "scan" else "W4A4")
    for name in ("layers.0.downsample.reduction", "layers_up.1.upsample.expand", "final_up.expand"):
        assert rows.pop(f"vmunet.{name}").scheme == "W4A4"
    assert {n: r.note for n, r in rows.items()} == {
        "vmunet.patch_embed.proj": "first layer",
        "vmunet.final_conv": "last layer",
    }


def test_traced_model_is_the_same_at_other_sizes() -> None:
    model = small()
    prepared = ssmquant.prepare(model, QConfig(), example_inputs=(torch.rand(2, 3, 16, 24),))
    for size in ((2, 3, 16, 24), (1, 3, 8, 8), (5, 3, 32, 16), (1, 1, 16, 24), (3, 1, 24, 8)):
        x = torch.rand(size)
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_whole_way(patch_size: int, tmp_path: Path) -> None:
    model = small(patch_size=patch_size)
    x = torch.rand(2, 1, 16, 24)
    prepared = ssmquant.prepare(model, QConfig.recommended(4, 4), example_inputs=(x,))
    ssmquant.calibrate(prepared, [x])
    optimizer = torch.optim.SGD(ssmquant.param_groups(prepared, 1e-3, 0.0, 1e-3))
    prepared.train()
    F.cross_entropy(prepared(x), torch.randint(3, (2, 16, 24))).backward()
    assert all(p.grad is not None for p in prepared.parameters())
    optimizer.step()
    prepared.eval()
    deployed = ssmquant.convert(prepared)
    assert ssmquant.verify(prepared, deployed, (x,)).worst_rel < 1e-5
    ssmquant.save(deployed, tmp_path / "m.safetensors")
    again = ssmquant.load(tmp_path / "m.safetensors")
    assert type(again).__name__ == "VMUNet"
    for size in ((2, 1, 16, 24), (1, 3, 32, 16)):
        x = torch.rand(size)
        want = prepared(x)
        with use_backend("chunked", op="fuse"):
            torch.testing.assert_close(deployed(x), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(x), deployed(x))
