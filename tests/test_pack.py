from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmquant.errors import ConfigError, FormatError
from ssmquant.pack import pack, packed_size, unpack
from tests.strategies import BITS, bits


def slow_pack(codes: list[int], n_bits: int) -> list[int]:
    """The format as its docstring states it: one little-endian bit stream, or a byte a code."""
    if n_bits not in (2, 3, 4):
        return codes
    stream = sum(c << (n_bits * i) for i, c in enumerate(codes))
    return list(stream.to_bytes((len(codes) * n_bits + 7) // 8, "little"))


@given(bits, st.data())
def test_round_trip_and_layout(n_bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**n_bits - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), n_bits)
    assert packed.tolist() == slow_pack(codes, n_bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(len(codes), n_bits)
    assert unpack(packed, n_bits, (len(codes),)).tolist() == codes


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 11, 13), (1001,)])
def test_shapes_and_strides(n_bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**n_bits, shape, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, n_bits), n_bits, shape), codes)
    turned = codes.permute(tuple(reversed(range(codes.dim()))))
    assert torch.equal(unpack(pack(turned, n_bits), n_bits, turned.shape), turned)


@pytest.mark.parametrize("n_bits", BITS)
def test_results_are_copies(n_bits: int) -> None:
    codes = torch.ones(24, dtype=torch.uint8)
    packed = pack(codes, n_bits)
    again = unpack(packed, n_bits, (24,))
    codes.fill_(0)
    packed_before = packed.clone()
    again.fill_(0)
    assert torch.equal(packed, packed_before)
    assert unpack(packed, n_bits, (24,)).eq(1).all()


def test_known_bytes() -> None:
    assert pack(torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01, 0b11]
    assert pack(torch.tensor([1, 15, 7], dtype=torch.uint8), 4).tolist() == [0xF1, 0x07]
    three = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3)
    assert int.from_bytes(bytes(three.tolist()), "little") == 0o07654321


@pytest.mark.parametrize("n_bits", [2, 3, 4, 5, 6, 7])
def test_code_out_of_range(n_bits: int) -> None:
    with pytest.raises(ConfigError, match=f"{2**n_bits} does not fit into {n_bits} bits"):
        pack(torch.tensor([0, 2**n_bits], dtype=torch.uint8), n_bits)


@pytest.mark.parametrize("n_bits", [0, 1, 9, 32, True, 4.0, None])
def test_bad_bits(n_bits: Any) -> None:
    codes = torch.zeros(3, dtype=torch.uint8)
    for call in (
        lambda: pack(codes, n_bits),
        lambda: unpack(codes, n_bits, (3,)),
        lambda: packed_size(3, n_bits),
    ):
        with pytest.raises(ConfigError, match="2 to 8"):
            call()


def test_wrong_dtype() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        pack(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(FormatError, match="uint8"):
        unpack(torch.zeros(2, dtype=torch.int32), 4, (3,))


@pytest.mark.parametrize("n_bits", BITS)
def test_wrong_length(n_bits: int) -> None:
    packed = pack(torch.zeros(33, dtype=torch.uint8), n_bits)
    for damaged in (packed[:-1], torch.cat((packed, packed[:1])), packed[None]):
        with pytest.raises(FormatError):
            unpack(damaged, n_bits, (33,))
    with pytest.raises(ConfigError, match="negative"):
        unpack(packed, n_bits, (-33,))


@pytest.mark.parametrize(("n_bits", "byte"), [(2, 0b1000000), (3, 0b1000), (4, 0x10), (5, 32), (7, 128)])
def test_damaged_bits_are_noticed(n_bits: int, byte: int) -> None:
    with pytest.raises(FormatError, match="damaged"):
        unpack(torch.tensor([byte], dtype=torch.uint8), n_bits, (1,))


@pytest.mark.gpu
@pytest.mark.parametrize("n_bits", BITS)
def test_cuda_equals_cpu(n_bits: int) -> None:
    codes = torch.randint(0, 2**n_bits, (5, 77), dtype=torch.uint8)
    packed = pack(codes.cuda(), n_bits)
    assert torch.equal(packed.cpu(), pack(codes, n_bits))
    assert torch.equal(unpack(packed, n_bits, codes.shape).cpu(), codes)
