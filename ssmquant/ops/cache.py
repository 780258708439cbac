"""Where compiled kernels are kept: beside PyTorch's own extensions, in files named after a hash of what made them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

__all__ = ["compiling_is_forbidden", "folder", "key", "publish"]


def compiling_is_forbidden() -> bool:
    """Whether ``SSMQUANT_NO_COMPILE`` is set, to anything but "" or 0."""
    return os.environ.get("SSMQUANT_NO_COMPILE", "0") not in ("", "0")


def folder() -> Path:
    """The user's cache of compiled kernels, ``ssmquant`` inside ``TORCH_EXTENSIONS_DIR`` or PyTorch's default for it.

    It is not created here. Other users must not be able to write to it, for what lies in it is executed.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        root = os.path.join(
            os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "torch_extensions"
        )
    return Path(root) / "ssmquant"


def key(*parts: str | bytes) -> str:
    """A name for what is compiled from ``parts``: source, options, version of the compiler."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:32]


def publish(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also where several processes write the same one at once.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o700)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
