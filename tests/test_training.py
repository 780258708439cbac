"""The training data and the training loop of the examples."""

from __future__ import annotations

import io
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ssmquant.errors import ConfigError, FormatError, InputError, SsmquantError
from ssmquant.restore import Task, open_image, to_tensor

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "examples" / "photos"
sys.path.insert(0, str(ROOT / "examples"))

from classify import Pictures  # noqa: E402
from patches import PatchData, read_images  # noqa: E402
from training import Recipe, Step, fit, learning_rate  # noqa: E402


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def undo(patch: Tensor, turn: int) -> Tensor:
    if turn & 1:
        patch = patch.transpose(-1, -2)
    return patch.flip([axis for axis, bit in ((-2, 2), (-1, 4)) if turn & bit])


def test_pictures_of_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 6, 5), dtype=np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y)
    data = Pictures.load(tmp_path / "data.npz")
    assert (len(data.x), len(data.test_x), data.classes) == (24, 6, 3)
    assert data.test_y.bincount().tolist() == [2, 2, 2]
    wanted = torch.from_numpy(x[:3, None].repeat(3, 1)).float() / 127.5 - 1
    torch.testing.assert_close(data.test_x[:3], wanted)
    assert torch.cat(data.calibration(9, 4)).shape == (9, 3, 6, 5)
    first = data.sample(5)
    data.seed(0)
    again = data.sample(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (5, 3, 6, 5)
    assert -1 <= float(first[0].min()) <= float(first[0].max()) <= 1


@pytest.mark.gpu
def test_pictures_on_a_gpu() -> None:
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (30, 6, 5), dtype=np.uint8), np.arange(30) % 3
    data, other = Pictures(*arrays, device="cuda"), Pictures(*arrays)
    for got, wanted in zip(data.sample(5), other.sample(5), strict=True):
        assert got.is_cuda
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(data.calibration(9, 4), other.calibration(9, 4), strict=True):
        assert got.is_cuda
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((0, 4, 4), np.uint8), np.zeros(0, int)),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, -1])),
        (np.zeros((2, 4, 4), np.uint8), np.array([0.0, 1.0])),
        (np.zeros((2, 4, 4)), np.array([0, 1])),
        (np.zeros((2, 4, 4), np.uint8), np.array([0])),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, 1])),
    ],
    ids=["empty", "negative", "no integers", "no bytes", "another length", "nothing to train with"],
)
def test_what_is_no_data_of_classes(x: Any, y: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=x, y=y)
    with pytest.raises(FormatError):
        Pictures.load(tmp_path / "data.npz")


def test_pairs_of_patches_are_aligned() -> None:
    images = [
        ("a", noise(40, 52)),
        ("b", open_image(PHOTOS / "coffee.png").crop((0, 0, 71, 49))),
        ("small", noise(9, 60)),
    ]
    task = Task("sr", 2)
    data = PatchData(images, task, patch=8, seed=1)
    assert (len(data), data.skipped) == (2, ["small"])
    x, y = data.sample(32)
    assert x.shape == (32, 3, 8, 8)
    assert y.shape == (32, 3, 16, 16)
    data.seed(1)
    drawn = torch.rand(32, 4, generator=data._positions, dtype=torch.float64)
    turns = set()
    for k, (a, b, c, d) in enumerate(drawn.tolist()):
        _, image = images[int(a * 2)]
        low, high = to_tensor(task.degrade_image(image))[0], to_tensor(task.target(image))[0]
        top, left = int(b * (low.shape[1] - 7)), int(c * (low.shape[2] - 7))
        turns.add(turn := int(d * 8))
        assert torch.equal(undo(x[k], turn), low[:, top : top + 8, left : left + 8])
        assert torch.equal(undo(y[k], turn), high[:, 2 * top : 2 * top + 16, 2 * left : 2 * left + 16])
    assert len(turns) == 8


def test_noise_and_jpeg_patches() -> None:
    images = [("a", open_image(PHOTOS / "camera.png"))]
    x, y = PatchData(images, Task("denoise", sigma=30), patch=32).sample(16)
    assert (x - y).std().item() == pytest.approx(30 / 255, rel=0.02)
    x, y = PatchData(images, Task("jpeg", quality=10), patch=32).sample(16)
    assert 0.005 < (x - y).abs().mean().item() < 0.1


def test_packs_of_encoded_files(tmp_path: Path) -> None:
    files = [encoded(noise(20, 18, seed=i)) for i in range(3)]
    blob, offset = np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "pack.npz", blob=blob, offset=offset)
    images = read_images(tmp_path / "pack.npz")
    assert [name for name, _ in images] == ["pack[0]", "pack[1]", "pack[2]"]
    assert np.array_equal(np.asarray(images[2][1]), np.asarray(noise(20, 18, seed=2)))
    np.savez(tmp_path / "bad.npz", blob=blob, offset=offset[::-1])
    np.savez(tmp_path / "other.npz", x=blob)
    np.savez(tmp_path / "object.npz", blob=np.array([{}], dtype=object), offset=offset)
    for name in ("bad", "other", "object"):
        with pytest.raises(FormatError, match="no image pack"):
            read_images(tmp_path / f"{name}.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        read_images(tmp_path / "empty")
    with pytest.raises(InputError, match="smaller patches"):
        PatchData(images, Task("sr", 2), patch=48)


# ------------------------------------------------------------------------------------------------ training


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.interpolate(x, scale_factor=2)


@pytest.mark.parametrize("kind", ["sr", "denoise"])
def test_resuming_is_exact(tmp_path: Path, kind: str) -> None:
    task = Task(kind, 2)
    images = [("a", noise(40, 40)), ("b", noise(60, 44, seed=1))]
    torch.manual_seed(0)
    start = Small() if kind == "sr" else nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.1))

    def run(steps: int, path: Path, resume: bool, seed: int) -> nn.Module:
        model = (
            type(start)() if kind == "sr" else nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.1))
        )
        model.load_state_dict(start.state_dict())
        data = PatchData(images, task, patch=12, seed=seed)
        torch.manual_seed(seed)
        recipe = Recipe(
            steps=steps, batch=2, warmup=10, ema=0.9, loss="charbonnier", log_every=2, checkpoint=path
        )
        result = fit(model, data, recipe, resume=resume)
        assert result.step == steps
        assert result.finished
        return model

    whole = run(6, tmp_path / "whole.pt", False, 5)
    run(3, tmp_path / "half.pt", False, 5)
    resumed = run(6, tmp_path / "half.pt", True, 77)  # another seed: all state comes from the file
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(whole.parameters()), next(start.parameters()))


def test_resuming_keeps_losses_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    now = 0.0
    call = Step.__call__

    def count(step: Step, x: Tensor, y: Tensor) -> None:
        nonlocal now
        now += 8
        call(step, x, y)

    monkeypatch.setattr(Step, "__call__", count)
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    data = PatchData([("a", noise(40, 40))], Task("sr", 2), patch=8)

    def run(**options: Any) -> Any:
        data.seed(0)
        own = Recipe(steps=7, batch=2, log_every=4, checkpoint=tmp_path / "c.pt", **options)
        return fit(plain(), data, own, resume=True)

    first = run(time_limit=20)  # three steps of 8 seconds
    assert [step for step, _ in first.losses] == [3]
    second = run(time_limit=15)
    assert (second.begun, second.step, second.earlier, second.seconds) == (3, 5, 24, 16)
    last = run()
    assert (last.earlier, last.seconds) == (40, 16)
    (tmp_path / "c.pt").unlink()
    whole = run()
    assert whole.losses == last.losses
    assert [step for step, _ in whole.losses] == [4, 7]
    assert (whole.earlier, whole.seconds) == (0, 56)
    again = run()  # nothing is left to do
    assert (again.losses, again.earlier, again.seconds) == (whole.losses, 56, 0)


def test_checkpoints_without_a_log_are_gone_on_from(tmp_path: Path) -> None:
    data = PatchData([("a", noise(40, 40))], Task("sr", 2), patch=8)
    fit(plain(), data, Recipe(steps=2, batch=2, checkpoint=tmp_path / "c.pt"))
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    del state["log"]
    torch.save(state, tmp_path / "c.pt")
    result = fit(plain(), data, Recipe(steps=3, batch=2, checkpoint=tmp_path / "c.pt"), resume=True)
    assert ([step for step, _ in result.losses], result.earlier) == ([3], 0)


def test_resuming_keeps_the_kind_of_adam_of_this_device(tmp_path: Path) -> None:
    data = PatchData([("a", noise(40, 40))], Task("sr", 2), patch=8)
    recipe = Recipe(steps=2, batch=2, checkpoint=tmp_path / "c.pt")
    model = Small()
    fit(model, data, recipe)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:  # as of another device
        group.update(lr=torch.tensor(1.0), fused=None, foreach=True, capturable=True)
    torch.save(state, tmp_path / "c.pt")
    assert fit(model, data, Recipe(steps=4, batch=2, checkpoint=tmp_path / "c.pt"), resume=True).step == 4
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["fused"], group["foreach"], group["capturable"]) == (True, None, False)
    assert isinstance(group["lr"], float)


def plain(seed: int = 0) -> nn.Module:
    """Without anything random in its forward."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)
    )


def losses(device: str, **options: Any) -> list[float]:
    """Of 9 steps, and the weights' sum of squares after them."""
    data = PatchData([("a", open_image(PHOTOS / "coffee.png"))], Task("sr", 2), device=device, patch=12)
    model = plain().to(device)
    result = fit(model, data, Recipe(steps=9, batch=2, warmup=3, lr=3e-3, ema=0.9, log_every=1, **options))
    return [loss for _, loss in result.losses] + [
        sum((p.detach() ** 2).sum().item() for p in model.parameters())
    ]


def test_compiled_steps_are_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.compile, []

    def compile_quickly(model: nn.Module) -> Any:
        calls.append(model)
        return real(model, backend="aot_eager")

    eager = losses("cpu")
    monkeypatch.setattr(torch, "compile", compile_quickly)
    assert losses("cpu", compile=True) == pytest.approx(eager, rel=1e-4)
    assert len(calls) == 1


def test_cross_entropy_is_over_the_classes_axis() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    step = Step(
        model, [{"params": list(model.parameters())}], Recipe(loss="cross_entropy"), torch.device("cpu")
    )
    for shape in ((5, 4), (2, 4, 6, 7)):
        out, teacher = torch.randn(shape), torch.randn(shape)
        log = out.double().movedim(1, -1).flatten(0, -2)
        log = log - log.logsumexp(-1, keepdim=True)
        share = teacher.double().movedim(1, -1).flatten(0, -2).exp()
        share = share / share.sum(-1, keepdim=True)
        assert float(step._loss(out, teacher)) == pytest.approx(
            float(-(share * log).sum(-1).mean()), rel=1e-5
        )
        labels = teacher.argmax(1)
        own = log.gather(1, labels.flatten()[:, None])
        assert float(step._loss(out, labels)) == pytest.approx(float(-own.mean()), rel=1e-5)


def test_no_graph_on_a_cpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert losses("cpu", cuda_graph=True) == losses("cpu")
    assert "no CUDA graph on a cpu device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"cuda_graph": True}, {"compile": True}, {"compile": True, "cuda_graph": True}]
)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_ways_of_a_step_agree_on_a_gpu(
    options: dict[str, bool], bf16: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = losses("cuda", bf16=bf16)
    assert losses("cuda", bf16=bf16, **options) == pytest.approx(eager, rel=2e-2 if bf16 else 1e-3)
    assert "no CUDA graph" not in capsys.readouterr().err


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    device = torch.device("cuda")
    model = plain().to(device)
    step = Step(model, [{"params": list(model.parameters())}], Recipe(ema=0.9), device)
    x, y = torch.rand(2, 3, 8, 8, device=device), torch.rand(2, 3, 16, 16, device=device)
    step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step.set_rate(0.5)
        step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(step.loss_sum.item())


def test_training_learns_and_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = PatchData([("a", open_image(PHOTOS / "coffee.png"))], Task("sr", 2), patch=12)
    model = Small()
    result = fit(model, data, Recipe(steps=40, batch=4, lr=3e-3, warmup=5, log_every=10))
    assert [step for step, _ in result.losses] == [10, 20, 30, 40]
    assert result.losses[-1][1] < result.losses[0][1]
    assert not model.training
    stopped = fit(model, data, Recipe(steps=10**6, time_limit=0.3, batch=2, checkpoint=tmp_path / "c.pt"))
    assert not stopped.finished
    assert 0 < stopped.step < 10**6
    assert fit(model, data, Recipe(steps=None, time_limit=0.3, batch=2)).finished


def test_training_fails_clearly(tmp_path: Path) -> None:
    data = PatchData([("a", noise(40, 40))], Task("sr", 2), patch=12)
    model = Small()
    nn.init.constant_(model.body[0].weight, math.nan)
    with pytest.raises(SsmquantError, match="not finite"):
        fit(model, data, Recipe(steps=3, batch=2, log_every=1))
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    with pytest.raises(SsmquantError, match="cannot resume"):
        fit(Small(), data, Recipe(steps=3, checkpoint=tmp_path / "bad.pt"), resume=True)
    with pytest.raises(ConfigError, match="steps"):
        Recipe(steps=None)


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(recipe, step, 0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    timed = Recipe(steps=None, warmup=0, lr=1.0, min_lr=0, time_limit=10)
    assert learning_rate(timed, 10**6, 5) == pytest.approx(0.5)
    late, early = (Recipe(steps=100, warmup=0, lr=1.0, min_lr=0, anneal=power) for power in (0.5, 2.0))
    assert learning_rate(late, 50, 0) == pytest.approx(0.5**0.5)
    assert learning_rate(early, 50, 0) == pytest.approx(0.25)
    assert learning_rate(late, 100, 0) == learning_rate(early, 100, 0) == 0
    with pytest.raises(ConfigError, match="anneal"):
        Recipe(anneal=0)


# ------------------------------------------------------------------------------------------------ the script


def test_the_script_trains_from_another_scales_body(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_restore

    from ssmquant.io import load_float, save_float
    from ssmquant.zoo import mambair

    torch.manual_seed(0)
    body = mambair.mambair_tiny(2)
    save_float(body, tmp_path / "x2.safetensors")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    open_image(PHOTOS / "coffee.png").crop((0, 0, 48, 40)).save(pictures / "a.png")
    common = ["--scale", "4", "--data", str(pictures), "--eval", str(pictures), "--device", "cpu"]
    common += ["--steps", "1", "--batch", "1", "--patch", "8", "--lr", "1e-9", "--out", str(tmp_path / "out")]
    assert train_restore.main([*common, "--body", str(tmp_path / "x2.safetensors")]) == 0
    made = load_float(tmp_path / "out" / "model.safetensors").state_dict()
    for name, value in body.state_dict().items():
        if made[name].shape == value.shape:
            torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-4)  # stored as float16
    assert [k for k, v in body.state_dict().items() if made[k].shape != v.shape] == [
        "upsample.0.weight",
        "upsample.0.bias",
    ]

    for more, message in (
        (
            ["--body", str(tmp_path / "x2.safetensors"), "--init", str(tmp_path / "x2.safetensors")],
            "not both",
        ),
        (["--body", str(tmp_path / "x2.safetensors"), "--model", "light"], "another one"),
        (["--init", str(tmp_path / "x2.safetensors")], "give --scale"),
    ):
        assert train_restore.main([*common, *more]) == 2
        assert message in capsys.readouterr().err
