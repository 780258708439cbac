from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from ssmquant.ops import cache


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_folder_is_where_pytorch_keeps_its_own(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "torch_extensions" / "ssmquant"
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "torch_extensions" / "ssmquant"
    environment.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "torch"))
    assert cache.folder() == tmp_path / "torch" / "ssmquant"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


def test_key_depends_on_every_part_and_on_where_parts_end() -> None:
    keys = [cache.key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("c", "ab"), ())]
    assert len(set(keys)) == len(keys)
    assert cache.key("ab", b"c") == keys[0]
    assert all(key.isalnum() for key in keys)


def test_publish_writes_a_file_that_others_cannot_change(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    cache.publish(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]
    cache.publish(path, b"second")
    assert path.read_bytes() == b"second"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert not stat.S_IMODE(path.parent.stat().st_mode) & 0o022


@pytest.mark.parametrize("broken", ["fdopen", "chmod", "replace"])
def test_publish_leaves_nothing_behind_when_it_fails(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    cache.publish(path, b"old")
    real = getattr(os, broken)

    def full(*args: object, **options: object) -> None:
        if broken == "fdopen":  # the handle is open, as where the disk is full
            real(*args, **options).close()
        raise OSError("no space left")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="no space left"):
        cache.publish(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_publish_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        cache.publish(tmp_path / "file" / "below", b"")


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([i]) * (1 << 18) for i in range(2)]
    cache.publish(path, contents[0])
    writers = [
        threading.Thread(target=lambda c=c: [cache.publish(path, c) for _ in range(50)]) for c in contents
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes())
    assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [path]
