"""Pictures, metrics, degradations and tiling."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssmquant.errors import ConfigError, InputError, SsmquantError
from ssmquant.restore import (
    Task,
    evaluate,
    find_images,
    luma,
    open_image,
    psnr,
    restore_image,
    restore_tensor,
    save_image,
    ssim,
    to_image,
    to_tensor,
)

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "examples" / "photos"
BENCH = ROOT.parent / "shared" / "data" / "bench"


class Nearest(nn.Module):
    """Enlarges by repetition: the simplest model that keeps every pixel in its place."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Local(nn.Module):
    """A convolutional model that sees 4 pixels around."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, 3 * scale**2, 5, padding=2)
        )
        self.up = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.body(x))


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values if bands > 1 else values[..., 0])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("folder", "count", "x2", "x4"),
    [
        (PHOTOS, 13, 30.29, 26.87),
        (BENCH / "Set5", 5, 33.67, 28.43),
        (BENCH / "Set14", 14, 30.32, 26.09),
        (BENCH / "Kodak24", 24, 30.61, 26.87),
    ],
    ids=["photos", "Set5", "Set14", "Kodak24"],
)
def test_bicubic_reaches_the_published_numbers(folder: Path, count: int, x2: float, x4: float) -> None:
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    images = [(path.name, open_image(path)) for path in find_images(folder)]
    assert len(images) == count
    for scale, wanted in ((2, x2), (4, x4)):
        rows = evaluate(None, images, Task("sr", scale))
        assert sum(row["psnr"] for row in rows) / count == pytest.approx(wanted, abs=0.02)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM by its definition, window by window, with a plain two-dimensional Gaussian."""
    t = np.arange(11) - 5
    window = np.exp(-(t[:, None] ** 2 + t[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = 0.01**2 * 255**2, 0.03**2 * 255**2, []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("border", [0, 2])
def test_ssim_agrees_with_its_definition(border: int) -> None:
    clean = open_image(PHOTOS / "chelsea.png").crop((100, 60, 131, 85))
    x, y = to_tensor(clean), to_tensor(noise(31, 25)) * 0.2 + to_tensor(clean) * 0.8
    a, b = ((t[0].double() * 255).round().numpy() for t in (x, y))
    inside = slice(border, -border or None)
    a, b = (16 + (65.481 * t[0] + 128.553 * t[1] + 24.966 * t[2]) / 255 for t in (a, b))
    assert ssim(x, y, border) == pytest.approx(slow_ssim(a[inside, inside], b[inside, inside]), abs=1e-10)


def test_equal_pictures_score_highest() -> None:
    x = to_tensor(noise(20, 16))
    assert ssim(x, x) == pytest.approx(1, abs=1e-12)
    assert ssim(x, x, channel="rgb") == pytest.approx(1, abs=1e-12)
    assert psnr(x, x) == math.inf
    assert psnr(x, x + 1e-4) == math.inf  # equal after rounding to 8 bit


def test_psnr_of_a_known_difference() -> None:
    x = torch.full((1, 3, 8, 8), 100 / 255)
    y = x.clone()
    y[..., 0, 0] = 0.9  # outside the border
    assert psnr(x, y, border=1) == math.inf
    assert psnr(x, x + 10 / 255, channel="rgb") == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(x, x + 10 / 255) == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)))


def test_luma_spans_16_to_235() -> None:
    ends = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert luma(ends).flatten().tolist() == pytest.approx([16, 235])


def test_metrics_refuse_what_they_cannot_compare() -> None:
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(InputError, match="one shape"):
        psnr(x, x[..., 1:])
    with pytest.raises(InputError, match="border"):
        psnr(x, x, border=8)
    with pytest.raises(InputError, match="11 pixels"):
        ssim(x, x, border=3)
    with pytest.raises(ConfigError, match="channel"):
        psnr(x, x, channel="luma")


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (15, 16), (33, 17)])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_every_size_and_mode(size: tuple[int, int], mode: str) -> None:
    image = noise(*size, mode)
    result = restore_image(Nearest(), image, 2)
    assert result.size == (2 * size[0], 2 * size[1])
    assert result.mode == mode
    opaque = {"LA": "L", "RGBA": "RGB"}.get(mode, mode)
    wanted = image.convert(opaque).resize(result.size, Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(result.convert(opaque)), np.asarray(wanted))
    if mode != opaque:
        alpha = image.getchannel("A").resize(result.size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(result.getchannel("A")), np.asarray(alpha))


def test_16_bit_grey_keeps_its_depth(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 13)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "I;16"
    result = restore_image(Nearest(), image, 2)
    save_image(result, tmp_path / "out.png")
    back = np.asarray(open_image(tmp_path / "out.png"))
    assert back.dtype == np.uint16
    assert (
        np.abs(back[::2, ::2].astype(int) - values).max() <= 1
    )  # the three weights of grey sum to 1 in float32


def test_palette_transparency_and_bilevel() -> None:
    palette = noise(12, 10).quantize(16)
    assert open_image(encoded(palette)).mode == "RGB"
    assert open_image(encoded(palette, transparency=0)).mode == "RGBA"
    assert open_image(encoded(noise(8, 8).convert("1"))).mode == "L"
    assert open_image(encoded(noise(8, 8, "CMYK").convert("CMYK"), "JPEG")).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    assert open_image(encoded(noise(20, 10), "JPEG", exif=exif)).size == (10, 20)


def test_tensor_and_back() -> None:
    image = noise(9, 7)
    x = to_tensor(image)
    assert x.shape == (1, 3, 7, 9)
    assert x.dtype == torch.float32
    assert np.array_equal(np.asarray(to_image(x)), np.asarray(image))
    assert to_image(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(InputError, match="shape"):
        to_image(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        encoded(noise(64, 64))[:2000],
        encoded(noise(64, 64), "JPEG")[:500],
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 64,
        encoded(noise(8, 8))[:16] + b"\xff" * 8 + encoded(noise(8, 8))[24:],
        b"II*\x00" + b"\xff" * 40,
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "zeros", "huge header", "tiff"],
)
def test_hostile_files_say_so(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cannot read .*bad\.png"):
        open_image(path)


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(4, 4, "RGBA")
    with pytest.raises(ConfigError, match="JPEG cannot hold"):
        save_image(image, tmp_path / "out.jpg")
    with pytest.raises(ConfigError, match="suffix"):
        save_image(image, tmp_path / "out.doc")

    def fail(self: Image.Image, stream: Any, **options: Any) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(image, tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_the_module_imports_without_pillow() -> None:
    code = "import sys; sys.modules['PIL'] = None; import ssmquant.restore as r; r.psnr"
    code += "\ntry: r.open_image('x.png')\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("SsmquantError")
    assert "pip install" in done.stdout


# ------------------------------------------------------------------------------------------------ tiling


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"), [(70, 53, 32, 16), (40, 100, 40, 20), (37, 37, 36, 17)]
)
def test_tiles_equal_the_whole_for_a_local_model(height: int, width: int, tile: int, overlap: int) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    whole = restore_tensor(Local(), x, 2)
    tiled = restore_tensor(Local(), x, 2, tile=tile, overlap=overlap)
    torch.testing.assert_close(tiled, whole, atol=2e-6, rtol=0)


def test_tiles_without_overlap_cover_everything() -> None:
    x = torch.rand(1, 3, 50, 41)
    torch.testing.assert_close(restore_tensor(Nearest(), x, 2, tile=16, overlap=0), Nearest()(x))


def test_restoring_refuses_clearly() -> None:
    x = torch.rand(1, 3, 20, 20)
    with pytest.raises(ConfigError, match="scale=3 does not fit"):
        restore_tensor(Nearest(2), x, 3)
    with pytest.raises(ConfigError, match="twice the overlap"):
        restore_tensor(Nearest(2), x, 2, tile=16, overlap=9)
    with pytest.raises(InputError, match="non-empty"):
        restore_tensor(Nearest(2), x[..., :0], 2)
    with pytest.raises(InputError, match="not finite"):
        restore_tensor(Nearest(2), x / 0, 2)
    broken = Local()
    nn.init.constant_(broken.body[2].bias, math.nan)
    with pytest.raises(SsmquantError, match="not finite"):
        restore_tensor(broken, x, 2)


def test_the_model_keeps_its_mode() -> None:
    model = Local().train()
    restore_tensor(model, torch.rand(1, 3, 16, 16), 2)
    assert model.training


# ------------------------------------------------------------------------------------------------ tasks


def test_degradations() -> None:
    image = open_image(PHOTOS / "chelsea.png").crop((0, 0, 65, 51))
    assert Task("sr", 4).degrade(image).shape == (1, 3, 12, 16)
    assert Task("sr", 4).target(image).size == (64, 48)
    noisy = Task("denoise", sigma=25).degrade(image, seed=3)
    torch.testing.assert_close(noisy, Task("denoise", sigma=25).degrade(image, seed=3))
    assert (noisy - to_tensor(image)).std().item() == pytest.approx(25 / 255, rel=0.05)
    scores = [evaluate(None, [("a", image)], Task("jpeg", quality=q))[0]["psnr"] for q in (10, 40, 90)]
    assert scores == sorted(scores)
    for wrong in ({"kind": "blur"}, {"scale": 0}, {"quality": 0}, {"sigma": -1}):
        with pytest.raises(ConfigError):
            Task(**wrong)
    with pytest.raises(InputError, match="too small"):
        Task("sr", 4).degrade(noise(3, 9))
