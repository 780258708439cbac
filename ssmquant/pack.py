"""Dense packing of small unsigned codes into bytes (this is a file format; it never changes within version 1).

Codes are indices ``0 .. 2**bits - 1`` (offset binary, as in :class:`ssmquant.quantizers.QTensor`), read in C order.

========  ===============  ============================================================================
bits      codes per bytes  layout
========  ===============  ============================================================================
2         4 in 1           code ``i`` in bits ``2*(i%4) .. 2*(i%4)+1`` of byte ``i//4``
3         8 in 3           code ``i`` in bits ``3*(i%8) .. 3*(i%8)+2`` of the 24-bit little-endian word
                           made of bytes ``3*(i//8) .. 3*(i//8)+2``
4         2 in 1           even codes in the low half of the byte, odd codes in the high half
5 .. 8    1 in 1           the code itself
========  ===============  ============================================================================

So the first code is always in the lowest bits of the first byte. Bits left over in the last byte (for 3 bits: in the
last word, whose unused whole bytes are cut off) are zero, and :func:`unpack` checks that on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmquant.errors import ConfigError, FormatError

__all__ = ["pack", "packed_size", "unpack"]

_DENSE = (2, 3, 4)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"bits must be an integer from 2 to 8, got {bits!r}")


def packed_size(numel: int, bits: int) -> int:
    """Return how many bytes :func:`pack` uses for ``numel`` codes of ``bits`` bits.

    Raises:
        ConfigError: ``bits`` is not 2..8 or ``numel`` is negative.
    """
    _check_bits(bits)
    if numel < 0:
        raise ConfigError(f"numel must not be negative, got {numel}")
    return (numel * bits + 7) // 8 if bits in _DENSE else numel


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` densely.

    Args:
        codes: uint8, any shape, values below ``2**bits``.
        bits: 2..8; see the module's docstring for the layout.

    Returns:
        uint8, shape ``(packed_size(codes.numel(), bits),)``, on the same device; never an alias of ``codes``.

    Raises:
        ConfigError: wrong dtype, wrong ``bits``, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ConfigError(f"codes must be uint8 (offset binary, 0..2**bits-1), got {codes.dtype}")
    flat = codes.reshape(-1)
    size = packed_size(flat.numel(), bits)
    if bits < 8 and flat.numel() and int(flat.max()) >= 2**bits:
        raise ConfigError(f"code {int(flat.max())} does not fit into {bits} bits (largest is {2**bits - 1})")
    if bits not in _DENSE:
        return flat.clone()
    per_word = 8 if bits == 3 else 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_word))
    lanes = flat.view(-1, per_word).unbind(1)
    if bits != 3:
        # Distinct bit fields: no carry, so shifts of uint8 never lose a bit that belongs to the byte.
        out = lanes[0].clone()
        for i, lane in enumerate(lanes[1:], 1):
            out |= lane << (bits * i)
        return out
    # 3 bits: codes 2 and 5 straddle bytes; a uint8 shift to the left drops exactly the bits of the next byte.
    c = lanes
    low = c[0] | (c[1] << 3) | (c[2] << 6)
    mid = (c[2] >> 2) | (c[3] << 1) | (c[4] << 4) | (c[5] << 7)
    high = (c[5] >> 1) | (c[6] << 2) | (c[7] << 5)
    return torch.stack((low, mid, high), 1).view(-1)[:size].clone()


def unpack(packed: Tensor, bits: int, shape: Sequence[int], *, check: bool = True) -> Tensor:
    """Undo :func:`pack`: ``unpack(pack(c, bits), bits, c.shape)`` equals ``c``.

    Args:
        packed: uint8, shape ``(packed_size(prod(shape), bits),)``.
        bits: 2..8.
        shape: shape of the codes.
        check: look for bits that no code can have set (on a CPU only, as it would make a GPU wait).

    Returns:
        uint8 codes of shape ``shape``, never an alias of ``packed``.

    Raises:
        ConfigError: ``bits`` is not 2..8 or ``shape`` has a negative entry.
        FormatError: wrong dtype, rank or length, or bits that no code can have set.
    """
    _check_bits(bits)
    if any(s < 0 for s in shape):
        raise ConfigError(f"shape must not have negative entries, got {tuple(shape)}")
    numel = math.prod(shape)
    size = packed_size(numel, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FormatError(
            f"packed codes must be 1-D uint8, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    if packed.numel() != size:
        raise FormatError(
            f"{tuple(shape)} codes of {bits} bits take {size} bytes, got {packed.numel()}: truncated, or another shape"
        )
    check = check and packed.device.type == "cpu"
    if bits not in _DENSE:
        if bits < 8 and check and numel and int(packed.max()) >= 2**bits:
            raise FormatError(
                f"byte {int(packed.max())} is not a code of {bits} bits: damaged, or other bits"
            )
        return packed.clone().view(tuple(shape))
    if check and (used := numel * bits % 8) and int(packed[-1]) >> used:
        raise FormatError(f"the unused bits of the last byte are not zero: damaged, or not {bits}-bit codes")
    mask = 2**bits - 1
    if bits != 3:
        lanes = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
    else:
        low, mid, high = torch.nn.functional.pad(packed, (0, -size % 3)).view(-1, 3).unbind(1)
        lanes = [
            low,
            low >> 3,
            (low >> 6) | (mid << 2),
            mid >> 1,
            mid >> 4,
            (mid >> 7) | (high << 1),
            high >> 2,
            high >> 5,
        ]
        lanes = [lane & mask for lane in lanes]
    return torch.stack(lanes, 1).view(-1)[:numel].clone().view(tuple(shape))
