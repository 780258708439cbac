"""The pictures of a comparison: sets to score on by name, and fingerprints by which they are known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import common
from PIL import Image

from ssmquant.errors import ConfigError
from ssmquant.restore import find_images

__all__ = ["EvalSet", "distinct", "eval_sets", "fingerprint", "set_names"]


@dataclass(frozen=True)
class EvalSet:
    """Clean pictures of a folder. ``sha256`` is that of their names and bytes."""

    name: str
    folder: Path
    sha256: str

    @cached_property
    def images(self) -> list[tuple[str, Image.Image]]:
        return common.read_folder(self.folder)


def fingerprint(source: str | os.PathLike[str], names: bool = False) -> str:
    """SHA-256 of the pictures (or the pack) in their order, with or without names, wherever they are."""
    total = hashlib.sha256()
    for path in find_images(source):
        total.update(f"{path.name if names else ''}\n{common.sha256(path)}\n".encode())
    return total.hexdigest()


def set_names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The shortest end of each path that no other one has: ``HR``, or ``Set5/HR`` beside ``Set14/HR``.

    Raises:
        ConfigError: a folder is given twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    names = []
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is given twice, the same pictures under one name")
        ends = (path.parts[-n:] for n in range(1, len(path.parts) + 1))
        own = next(end for end in ends if sum(p.parts[-len(end) :] == end for p in paths) == 1)
        names.append(Path(*own).as_posix())
    return names


def eval_sets(folders: Sequence[str | os.PathLike[str]]) -> list[EvalSet]:
    """The sets of these folders, with distinct names.

    Raises:
        ConfigError: two folders hold the same pictures.
    """
    return distinct(
        EvalSet(name, Path(folder), fingerprint(folder, names=True))
        for name, folder in zip(set_names(folders), folders, strict=True)
    )


def distinct(sets: Iterable[EvalSet]) -> list[EvalSet]:
    """``sets`` themselves.

    Raises:
        ConfigError: two of them are the same.
    """
    sets = list(sets)
    known: dict[str, EvalSet] = {}
    for one in sets:
        if known.setdefault(one.sha256, one) is not one:
            raise ConfigError(f"{known[one.sha256].folder} and {one.folder} hold the same pictures")
    return sets
