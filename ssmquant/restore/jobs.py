"""Which picture goes where, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ssmquant.errors import ConfigError
from ssmquant.files import check_new
from ssmquant.restore.pictures import find_images

__all__ = ["jobs"]


def jobs(
    sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, force: bool = False
) -> list[tuple[Path, Path]]:
    """Pairs of a picture to read and one to write.

    Args:
        sources: Pictures and folders of them (not of folders in these).
        output: The picture to write for a single picture, else a folder, which is made if its own folder is there:
            pictures get the names of those that they are made from, with the suffix ``.png``.
        force: Existing pictures may be replaced.

    Raises:
        ConfigError: the output cannot be written, is an input or exists, or two inputs would be written to one file.
        InputError: no such file or folder, or a folder without pictures.
    """
    target = Path(output)
    if len(sources) == 1 and not Path(sources[0]).is_dir() and not target.is_dir():
        pairs = [(Path(sources[0]), check_new(target, force=force))]
    else:
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target} is no folder, and there are several pictures to write")
        if not target.parent.is_dir():
            raise ConfigError(f"cannot write to {target}: no such folder as {target.parent}")
        images = [image for source in sources for image in find_images(source)]
        pairs = [(image, target / f"{image.stem}.png") for image in dict.fromkeys(images)]
    taken: dict[Path, Path] = {}
    inputs = {source.resolve() for source, _ in pairs}
    for source, to in pairs:
        if to.resolve() in inputs:
            raise ConfigError(f"{to} is the input; name another output")
        if taken.setdefault(to, source) != source:
            raise ConfigError(f"{taken[to]} and {source} would both be written to {to}")
        if target.is_dir():
            check_new(to, force=force)
    return pairs
