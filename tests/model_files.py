"""Files of small models, for tests that read them back, look into them and damage them."""

from __future__ import annotations

import functools
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig
from tests.small import images, prepared_and_calibrated, tiny_mambair


class Small(nn.Module):
    """Loads in some milliseconds: a projection between two that stay in float."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(4, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.first(x))))


POINTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@functools.cache
def small_file() -> bytes:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(Small(), QConfig(w_bits=3, a_bits=3, activation="dls"), POINTS)
    return written(ssmquant.convert(prepared))


@functools.cache
def mambair_file() -> bytes:
    torch.manual_seed(0)
    return written(
        ssmquant.convert(prepared_and_calibrated(tiny_mambair(), QConfig.qmambair(2), images(2, 3, 6, 8)))
    )


def written(deployed: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        ssmquant.save(deployed, path)
        return path.read_bytes()


def loaded(content: bytes, model: nn.Module | None = None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(content)
        return ssmquant.load(path, model)


def read(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(content)
        with safe_open(str(path), framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())


def assert_same_content(a: bytes, b: bytes) -> None:
    """Not byte by byte: safetensors writes the header's entries in any order."""
    (tensors, metadata), (tensors0, metadata0) = read(a), read(b)
    assert metadata == metadata0
    assert tensors.keys() == tensors0.keys()
    for k, t in tensors0.items():
        assert torch.equal(tensors[k], t), k


def rewritten(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_file(tensors, path, metadata=metadata)
        return path.read_bytes()


def meta_of(content: bytes) -> dict[str, Any]:
    return json.loads(zlib.decompress(read(content)[0]["meta"].numpy().tobytes()))


def operands_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what is packed: weights and values made of parameters."""
    return [e for e in meta["points"] if "shape" in e]


def activations_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in meta["points"] if "values" in e]


def with_meta(content: bytes, meta: Any) -> bytes:
    tensors, metadata = read(content)
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    tensors["meta"] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    return rewritten(tensors, metadata)


def with_tensor(content: bytes, key: str, change: Callable[[Tensor], Tensor]) -> bytes:
    tensors, metadata = read(content)
    tensors[key] = change(tensors[key].clone())
    return rewritten(tensors, metadata)


ZOO_NUMBERS = st.sampled_from(
    [
        0, 1, -3, 2, 7, 64, 5000, 65536, 10**9, 10**18, 10**30, 0.0, 1e-9, 1e300, -1.5, float("nan"), float("inf"),
        None, "8", [], [10**9], [1] * 300, [1, 10**7], [60000] * 200, {},
    ]
)  # fmt: skip
