"""Data, Dice and training of examples/segment.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmquant.errors import ConfigError, FormatError, InputError
from ssmquant.io import load_float

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import segment  # noqa: E402
from segment import MODELS, Slices, dice, logits, padded  # noqa: E402


def volume(count: int = 48, height: int = 40, width: int = 36) -> dict[str, np.ndarray[Any, Any]]:
    """Discs in front of black: the inner one brighter than the outer one, as their labels say."""
    rows, columns = np.mgrid[:height, :width]
    x, y = (np.zeros((count, height, width), np.uint8) for _ in range(2))
    for i in range(count):
        distance = np.hypot(rows - height / 2 + i % 5, columns - width / 2 - i % 3)
        y[i] = (distance < 15).astype(np.uint8) + (distance < 8)
        x[i] = np.array([0, 90, 200])[y[i]] + (y[i] > 0) * (i % 7)
    return {"x": x, "y": y}


def test_every_fifth_block_of_eight_is_for_testing() -> None:
    arrays = volume(90)
    arrays["x"][:, 0, 0] = np.arange(90)
    data = Slices(**arrays, side=16)
    test = [i for i in range(90) if i // 8 in (4, 9)]
    for x, wanted in ((data.test_x, test), (data.x, [i for i in range(90) if i not in test])):
        assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == wanted
    assert (data.classes, len(data.y), len(data.test_y)) == (3, 74, 16)
    assert (data.x.dtype, data.y.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(data.test_x[3, 0], torch.from_numpy(arrays["x"][35]).float() / 127.5 - 1)
    assert torch.equal(data.test_y[3], torch.from_numpy(arrays["y"][35]).long())


def test_crops_are_cut_from_slices() -> None:
    data = Slices(**volume(), side=16)
    x, y = data.sample(64)
    assert (x.shape, y.shape) == ((64, 1, 16, 16), (64, 16, 16))
    data.seed(0)
    drawn = torch.rand(64, 5, generator=data._generator, dtype=torch.float64).tolist()
    mirrored = set()
    for k, (a, b, c, d, e) in enumerate(drawn):
        i, top, left = int(a * len(data.x)), int(b * 25), int(c * 21)
        wanted, labels = (part[i, ..., top : top + 16, left : left + 16] for part in (data.x, data.y))
        if d >= 0.5:
            wanted, labels = wanted.flip(-1), labels.flip(-1)
        mirrored.add(d >= 0.5)
        assert torch.equal(y[k], labels)
        torch.testing.assert_close(x[k], (wanted + 1) * (0.9 + 0.2 * e) - 1, rtol=1e-5, atol=1e-6)
    assert mirrored == {False, True}


def test_crops_are_the_same_again() -> None:
    def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))

    data, other = Slices(**volume(), side=16, seed=3), Slices(**volume(), side=16)
    first = data.sample(4)
    assert not equal(other.sample(4), first)
    state = data.state()
    second = data.sample(4)
    other.load_state(state)
    assert equal(other.sample(4), second)
    data.seed(3)
    assert equal(data.sample(4), first)
    whole = Slices(**volume(), side=36)
    x, _ = whole.sample(9)  # as wide as the slices
    assert x.shape == (9, 1, 36, 36)


def test_calibration_slices() -> None:
    data = Slices(**volume(), side=16)
    parts = data.calibration(7, 3)
    assert [len(p) for p in parts] == [3, 3, 1]
    got = torch.cat(parts)
    assert got.shape == (7, 1, 64, 64)
    assert torch.equal(got[0, :, :40, :36], data.x[0])
    assert torch.equal(got[-1, :, :40, :36], data.x[-1])
    assert len(torch.cat(data.calibration(1000))) == len(data.x)


@pytest.mark.gpu
def test_crops_on_a_gpu() -> None:
    data, other = Slices(**volume(), side=16, device="cuda"), Slices(**volume(), side=16)
    for got, wanted in zip(data.sample(8), other.sample(8), strict=True):
        assert got.is_cuda
        torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((48, 40, 36))}, "uint8"),
        ({"y": np.zeros((48, 40, 36), np.int64)}, "uint8"),
        ({"y": np.zeros((48, 40, 35), np.uint8)}, "uint8"),
        ({"y": np.zeros((48, 40, 36), np.uint8)}, "no pixel of a class"),
        (volume(32), "not 33 slices"),
        ({k: v[:, :0] for k, v in volume().items()}, "not 33 slices"),
        ({k: v[..., None] for k, v in volume().items()}, "uint8"),
        ({"y": None}, "no .npz file"),
    ],
    ids=["no bytes", "no byte labels", "another size", "background", "few", "empty", "colour", "no labels"],
)
def test_bad_arrays(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = {k: v for k, v in {**volume(), **change}.items() if v is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(FormatError, match=message):
        Slices.load(tmp_path / "data.npz", side=16)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("nothing")
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object), y=np.zeros(1, np.uint8))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "object.npz", "one.npy"):
        with pytest.raises(FormatError, match=r"no \.npz file of x and y"):
            Slices.load(tmp_path / name)


def test_broken_files(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", **volume())
    content = (tmp_path / "whole.npz").read_bytes()
    refused = 0
    for start in range(0, len(content), 37):
        (tmp_path / "broken.npz").write_bytes(content[:start] + bytes(20) + content[start + 20 :])
        try:
            Slices.load(tmp_path / "broken.npz", side=16)
        except FormatError:
            refused += 1
    assert refused > 0.9 * len(content) / 37


@pytest.mark.parametrize("side", [0, 37, 16.0, True])
def test_bad_sides(side: Any) -> None:
    with pytest.raises(ConfigError, match="between 1 and 36 pixels"):
        Slices(**volume(), side=side)


# ---- Dice ----------------------------------------------------------------------------------------------------------


def plain_dice(out: np.ndarray[Any, Any], y: np.ndarray[Any, Any], classes: int) -> list[float]:
    """From sets of pixels."""
    scores = []
    for prediction, truth in zip(out, y, strict=True):
        own = []
        for label in range(1, classes):
            p, t = ({tuple(i) for i in np.argwhere(a == label)} for a in (prediction, truth))
            if p or t:
                own.append(2 * len(p & t) / (len(p) + len(t)))
        scores.append(float(np.mean(own)) if own else 1.0)
    return scores


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))
def test_dice_is_that_of_sets(seed: int, classes: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    out, y = rng.integers(0, classes, (2, 3, height, width))
    got = dice(torch.from_numpy(out), torch.from_numpy(y), classes)
    np.testing.assert_allclose(got.numpy(), plain_dice(out, y, classes), rtol=1e-12)
    ones = nn.functional.one_hot(torch.from_numpy(out), classes).permute(0, 3, 1, 2).float()
    assert torch.equal(dice(ones, torch.from_numpy(y)), got)
    assert torch.equal(dice(torch.from_numpy(y), torch.from_numpy(y), classes), torch.ones(3).double())


def test_dice_of_classes_that_are_missing() -> None:
    y = torch.tensor([[[0, 1], [1, 2]], [[0, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]])
    out = torch.tensor([[[0, 1], [1, 1]], [[0, 1], [1, 3]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]])
    assert dice(out, y, 4).tolist() == pytest.approx([(0.8 + 0) / 2, (0.8 + 0) / 2, 1.0, 0.0])
    assert dice(out[:0], y[:0], 4).shape == (0,)


@pytest.mark.parametrize(
    ("out", "y", "classes"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5).long(), None),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4).long(), 4),
        (torch.zeros(2, 4, 4), torch.zeros(2, 4, 4).long(), 3),
        (torch.zeros(2, 4, 4).long(), torch.zeros(2, 4, 4).long(), None),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), None),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3), None),
        (torch.full((2, 4, 4), -1), torch.zeros(2, 4, 4).long(), 3),
    ],
)
def test_dice_of_what_does_not_fit(out: Tensor, y: Tensor, classes: int | None) -> None:
    with pytest.raises(InputError):
        dice(out, y, classes)


# ---- evaluation and training ---------------------------------------------------------------------------------------


def test_slices_are_padded_for_the_model_only() -> None:
    seen = []

    class Copy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.expand(-1, 3, -1, -1)

    x = torch.rand(5, 1, 33, 64)
    out = logits(Copy(), x, batch=2)
    assert torch.equal(out, x.expand(-1, 3, -1, -1))
    assert [s.shape for s in seen] == [(2, 1, 64, 64), (2, 1, 64, 64), (1, 1, 64, 64)]
    assert (seen[0][:, :, 33:] == -1).all()
    assert padded(torch.rand(1, 1, 64, 32)).shape == (1, 1, 64, 32)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_small_and_take_slices_of_224_x_192(name: str) -> None:
    model = segment.build(name, Slices(**volume(), side=16)).eval()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert padded(torch.zeros(1, 1, 224, 192)).shape == (1, 1, 224, 192)
    assert logits(model, torch.rand(1, 1, 224, 192)).shape == (1, 3, 224, 192)


def test_the_script_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **volume())
    out = tmp_path / "model.safetensors"
    command = ["--data", str(tmp_path / "data.npz"), "--steps", "40", "--side", "32", "--out", str(out)]
    assert segment.main(command) == 0
    said = capsys.readouterr().out
    assert "of 8 test slices" in said
    data = Slices.load(tmp_path / "data.npz", side=32)
    score = float(dice(logits(load_float(out).eval(), data.test_x), data.test_y).mean())
    assert f"mean Dice {score:.4f}" in said
    assert score > 0.7
    assert segment.main([*command[:1], str(tmp_path / "none.npz"), *command[2:]]) == 2
    assert "error:" in capsys.readouterr().err
