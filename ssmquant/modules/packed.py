"""A tensor stored as packed integer codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.errors import FormatError
from ssmquant.pack import pack, packed_size, unpack
from ssmquant.quantizers.affine_fit import Shift, shift_of
from ssmquant.quantizers.base import QTensor

__all__ = ["FixedPrecision", "PackedTensor"]


class FixedPrecision(nn.Module):
    """A module whose buffers follow ``.to(device)`` but no cast: codes on rounded scales would be other values."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class PackedTensor(FixedPrecision):
    """A weight or a static operand after ``convert``: packed codes and the map that decodes them.

    Calling it returns the decoded values, of the shape and dtype of the tensor that was encoded; they equal the
    prepared model's fake-quantized values bit for bit. A cast (``.half()``) changes the dtype that comes out, not the
    map.

    Buffers: ``codes`` (uint8, 1-D, layout of ``ssmquant.pack``; of elements that are ``alike``, which have one code and
    the scale 1, a single one), ``scale`` and ``shift`` (float32, one element a group), and ``lo``/``hi``, the end clamp
    of DLS. Where the quantizer's ``rule`` for the shift is not ``"learned"``, ``shift`` is None and follows from the
    scale.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    lo: Tensor | None
    hi: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        bits: int,
        code_min: int,
        dtype: torch.dtype,
        *,
        groups: Sequence[int] = (),
        clamped: bool = False,
        rule: Shift = "learned",
        alike: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.code_min, self.dtype = tuple(shape), bits, code_min, dtype
        self.rule, self.alike = rule, alike
        size = packed_size(math.prod(self._stored), bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8, device=device))
        for name in ("scale", "shift", "lo", "hi"):
            empty = rule != "learned" if name == "shift" else name in ("lo", "hi") and not clamped
            self.register_buffer(name, None if empty else torch.zeros(tuple(groups), device=device))

    @property
    def _stored(self) -> tuple[int, ...]:
        """The shape of the codes that there are."""
        return (1,) * len(self.shape) if self.alike else self.shape

    @classmethod
    def from_qtensor(cls, q: QTensor, rule: Shift = "learned") -> PackedTensor:
        """Packs an encoded tensor, one element of expanded codes; ``rule``: how its shift follows from its scale."""
        alike = q.codes.numel() > 1 and not any(q.codes.stride()) and bool((q.scale == 1).all())
        out = cls(
            q.codes.shape, q.bits, q.code_min, q.dtype,
            groups=q.scale.shape, clamped=q.lo is not None, rule=rule, alike=alike,
            device=q.codes.device,
        )  # fmt: skip
        out.codes = pack(q.codes.reshape(-1)[:1] if alike else q.codes, q.bits)
        for name in ("scale", "shift", "lo", "hi"):
            value = getattr(q, name)
            if value is not None and getattr(out, name) is not None:
                setattr(out, name, value.detach().clone().expand(q.scale.shape).contiguous())
        return out

    def qtensor(self, *, check: bool = False) -> QTensor:
        """The codes, unpacked, with their map; ``check`` as of ``unpack``, whose look at values no graph can hold."""
        codes = unpack(self.codes, self.bits, self._stored, check=check)
        codes = codes.expand(self.shape) if self.alike else codes
        shift = self.shift if self.shift is not None else shift_of(self.scale, self.rule)
        return QTensor(codes, self.bits, self.code_min, self.scale, shift, self.lo, self.hi, self.dtype)

    def forward(self) -> Tensor:
        return self.qtensor().decode()

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        codes = state.get(prefix + "codes")
        if isinstance(codes, Tensor) and codes.shape == self.codes.shape:
            try:
                unpack(codes, self.bits, self._stored)
            except FormatError as e:
                errors.append(f"{prefix}codes: {e}")
                return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"shape={self.shape}, bits={self.bits}, {self.codes.numel()} bytes"
