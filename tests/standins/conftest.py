"""Fixtures of the tests of stand-ins: nothing is left behind, and modules as if they had been installed."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmquant._standins import remove_standins
from ssmquant._standins.surface import MODULES

PACKAGES = sorted(name for name in MODULES if "." not in name)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    here = [n for n in PACKAGES if importlib.util.find_spec(n) is not None]
    if here:
        pytest.skip(f"really installed: {here}")
    before = [*sys.meta_path], builtins.__import__, torch.cuda.device.__init__, Tensor.to, nn.Module.to
    yield
    remove_standins()
    assert (
        [*sys.meta_path],
        builtins.__import__,
        torch.cuda.device.__init__,
        Tensor.to,
        nn.Module.to,
    ) == before
    left = {n for n in sys.modules if n.partition(".")[0] in PACKAGES}
    for name in left:
        del sys.modules[name]
    assert not left


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``installed(name, code)`` makes a module importable as if it had been installed."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def install(name: str, code: str, package: bool = False) -> None:
        *folders, last = name.split(".")
        for i in range(len(folders)):
            folder = tmp_path.joinpath(*folders[: i + 1])
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        file = (
            tmp_path.joinpath(*folders, last, "__init__.py")
            if package
            else tmp_path.joinpath(*folders, f"{last}.py")
        )
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
        names.append(name.partition(".")[0])

    yield install
    for name in [n for n in sys.modules if n.partition(".")[0] in names]:
        del sys.modules[name]
