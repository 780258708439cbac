"""Pictures in and out: whatever Pillow opens, as tensors in 0..1 and back."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmquant.errors import ConfigError, InputError, SsmquantError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def pillow() -> ModuleType:
    """The module PIL.Image, or an error that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise SsmquantError(
            "opening pictures needs Pillow: pip install 'ssmquant[cli]' (or pillow)"
        ) from error
    return Image


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Open a picture from a path or from encoded bytes, fully decoded and turned as its EXIF orientation
    says.

    The result has mode L, LA, RGB, RGBA or, for 16-bit grey, ``I;16``; palettes and CMYK become RGB(A).
    Raises :class:`InputError` for anything that is not a whole, readable picture, and OSError where no file
    can be opened.
    """
    image_module = pillow()
    from PIL import ImageOps

    name = f"{len(source)} bytes" if isinstance(source, bytes) else f"{os.fspath(source)!r}"
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        image: Image.Image = image_module.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        return normal_mode(image)
    except SsmquantError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        reason = str(error).replace(repr(error), "").strip() or type(error).__name__
        if "cannot identify" in reason:
            reason = "not a picture in a format that Pillow knows"
        raise InputError(f"cannot read {name} as a picture: {reason}") from error


def normal_mode(image: Image.Image) -> Image.Image:
    """The picture in mode L, LA, RGB, RGBA or I;16."""
    mode = image.mode
    if mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        transparent = "transparency" in image.info and mode in ("L", "RGB")
        return image.convert("LA" if mode == "L" else "RGBA") if transparent else image
    if mode.startswith("I"):
        import numpy as np

        values = np.asarray(image.convert("I"))
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise InputError(
                "integer grey values outside 0..65535 have no known white; rescale the picture first"
            )
        return pillow().fromarray(values.astype(np.uint16))
    if mode == "F":
        raise InputError("a floating-point picture has no known white; convert it to 8 or 16 bit first")
    if mode == "1":
        return image.convert("L")
    if mode in ("La", "RGBa", "PA") or "transparency" in image.info:
        return image.convert("LA" if mode == "La" else "RGBA")
    return image.convert("RGB")


def check_target(path: str | os.PathLike[str], mode: str) -> str:
    """Pillow's name of the format that the path's suffix means; ConfigError if it cannot hold such a picture."""
    target = Path(path)
    kind: str | None = pillow().registered_extensions().get(target.suffix.lower())
    if kind is None or kind not in pillow().SAVE:
        raise ConfigError(
            f"cannot write pictures of suffix {target.suffix!r} ({target}): use for example .png"
        )
    if kind == "JPEG" and mode not in ("L", "RGB"):
        raise ConfigError(f"JPEG cannot hold a picture of mode {mode}; write {target.with_suffix('.png')}")
    return kind


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture in the format of the path's suffix; the file appears whole or not at all."""
    target = Path(path)
    kind = check_target(target, image.mode)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            image.save(stream, format=kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp made it private
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def find_images(source: str | os.PathLike[str]) -> list[Path]:
    """All pictures (by suffix) of a folder, sorted by name, or the one file itself; InputError if there are none."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"no such file or folder: {path}")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"no pictures ({', '.join(IMAGE_SUFFIXES)}) in {path}")
    return found


def to_tensor(image: Image.Image) -> Tensor:
    """``(1, 3, H, W)`` float32 in 0..1; grey is repeated, 16-bit grey keeps its depth, alpha is left out."""
    import numpy as np

    image = normal_mode(image)
    if not image.width or not image.height:
        raise InputError("the picture has no pixels")
    if image.mode == "I;16":
        grey = torch.from_numpy(np.array(image, dtype=np.float32) / 65535)
        return grey.expand(1, 3, *grey.shape).contiguous()
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return pixels.permute(2, 0, 1)[None].contiguous().float() / 255


def to_image(x: Tensor) -> Image.Image:
    """An 8-bit RGB picture of a ``(1, 3, H, W)`` or ``(3, H, W)`` tensor, clipped to 0..1 and rounded."""
    if x.dim() == 4 and x.shape[0] == 1:
        x = x[0]
    if x.dim() != 3 or x.shape[0] != 3:
        raise InputError(f"expected a tensor of shape (3, H, W) or (1, 3, H, W), got {tuple(x.shape)}")
    pixels = eight_bit(x).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pillow().fromarray(pixels)


def downscale(image: Image.Image, scale: int) -> Image.Image:
    """Pillow's BICUBIC reduction by a whole factor; the picture is first cropped to a multiple of it."""
    width, height = image.width // scale, image.height // scale
    if not width or not height:
        raise InputError(f"a picture of {image.width}x{image.height} is too small to reduce {scale} times")
    image = image.crop((0, 0, width * scale, height * scale))
    return image.resize((width, height), pillow().Resampling.BICUBIC)


def eight_bit(x: Tensor) -> Tensor:
    """Whole float64 values 0..255 of a tensor in 0..1, clipped."""
    return (x.detach().double().clamp(0, 1) * 255).round()
