"""The base class of all quantizers: arguments, groups, initialisation, calibration, encoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmquant.errors import CalibrationError, ConfigError, InputError, NotCalibratedError
from ssmquant.quantizers.affine import Affine, QTensor, affine_decode, affine_index, compute_dtype
from ssmquant.quantizers.observers import GroupStats, collect, group_rows

__all__ = ["Affine", "QTensor", "Quantizer", "affine_decode", "affine_index"]


class Quantizer(nn.Module):
    """Base class of the quantizers: life cycle, groups, encoding. Subclasses supply the arithmetic.

    Args:
        bits: 2..8, or None (or 32) for a bypass: the identity, without parameters or buffers.
        official: reproduce the published code, quirks included (notes/quantizers.md 4); False mends them.
        axis: with ``num_groups`` > 1: one group for every index along this axis. With one group the state covers the
            whole tensor (DLS, which has no state a group, reads ``axis`` differently: see there).
        num_groups: number of entries along ``axis``, which fixes the shape of the state.
        is_weight: the tensor is a parameter: the same on all ranks, so that initialisation never communicates.

    Raises:
        ConfigError: an argument is out of range.

    Life cycle: state shapes never depend on data. The first training batch (or :meth:`initialize`, :meth:`fit`)
    initialises the ranges; evaluating before raises :class:`NotCalibratedError`. A batch of nothing but zeros says
    nothing about a range: it passes through and the quantizer stays uninitialised; an uninitialised *weight* that is
    all zero may also be evaluated. Empty tensors always pass through. After initialisation no call synchronises with
    the host; ``initialized`` is a buffer (it travels with checkpoints) with a Python mirror.

    NaN elements stay NaN in :meth:`forward`; inf saturates where the range does not depend on the batch.
    """

    flags: ClassVar[tuple[str, ...]] = ("initialized",)
    """Boolean buffers, each mirrored in ``_flags``."""
    dynamic: ClassVar[bool] = False
    """Whether ranges come from the data of each call."""
    eps: float = 1e-12
    """Smallest scale ever divided by (the published DLS has 1e-6, which is coarse for 8-bit channels)."""

    initialized: Tensor
    _flags: dict[str, bool]

    def __init__(
        self,
        bits: int | None,
        *,
        official: bool = False,
        axis: int | None = None,
        num_groups: int = 1,
        is_weight: bool = False,
    ) -> None:
        super().__init__()
        if bits is not None and (
            isinstance(bits, bool) or not isinstance(bits, int) or bits not in {*range(2, 9), 32}
        ):
            raise ConfigError(
                f"bits must be an integer from 2 to 8, or None for no quantization, got {bits!r}"
            )
        if num_groups < 1 or (num_groups > 1 and axis is None):
            raise ConfigError(
                f"num_groups must be positive, and 1 without an axis; got {num_groups=}, {axis=}"
            )
        self.bits = None if bits == 32 else bits
        self.official = official
        self.axis = axis
        self.num_groups = num_groups
        self.leading = 1
        """So many axes in front count as one: with ``axis=0`` and 2, every output channel of every direction of a stack
        of weights (directions, channels, inputs) is a group."""
        self.is_weight = is_weight
        self.scale_gradient = True
        """LSQ's gradient scale ``1 / sqrt(N * Qp)`` on the step size (N: elements of a group)."""
        self._flags = {}
        if self.bits is not None:
            for name in self.flags:
                self._flags[name] = name == "signed" or not self.needs_data
                self.register_buffer(name, torch.tensor(self._flags[name]))

    @property
    def needs_data(self) -> bool:
        """Whether ranges have to be initialised from data before an evaluation."""
        return True

    @property
    def elementwise(self) -> bool:
        """Whether an element's place in the tensor does not matter, but for its group."""
        return True

    @property
    def kept_axis(self) -> int | None:
        """The axis of which calibration has to see all elements side by side."""
        return self.axis

    @property
    def is_signed(self) -> bool:
        """Whether codes run from ``-2**(bits-1)``; where data decide it, they do so once, at initialisation."""
        return self._flags.get("signed", True)

    def _width(self) -> int:
        assert self.bits is not None, "a bypass has no codes"
        return self.bits

    @property
    def qmin(self) -> int:
        """Smallest integer code."""
        return -(2 ** (self._width() - 1)) if self.is_signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer code."""
        return self.qmin + 2 ** self._width() - 1

    @property
    def code_min(self) -> int:
        """The integer that code index 0 stands for (not ``qmin`` in one quirk of the official RFA)."""
        return self.qmin

    def static_affine(self) -> Affine | None:
        """The map of all calls, of one element; None where it depends on the data or there is more than one.

        Codes are then ``affine_index`` of the values, and values ``affine_decode`` of the codes.
        """
        return None

    def stored(self, shape: Sequence[int]) -> tuple[int, int]:
        """Codes and numbers of their map that are kept of a weight or static operand of that shape."""
        return math.prod(shape), 2 * (self.num_groups if self.ready else 1)

    def constants(self) -> tuple[Any, ...]:
        """What decides the arithmetic and is no tensor: graphs that were captured with other values do not fit."""
        return self.bits, self.official, self.eps, self.scale_gradient, *self._flags.values()

    @property
    def ready(self) -> bool:
        """Whether an evaluation may run: initialised, or a bypass."""
        return self.bits is None or self._flags["initialized"] or bool(self.initialized)

    @torch.no_grad()
    def _set_flag(self, name: str, value: bool) -> None:
        self._flags[name] = value
        getattr(self, name).fill_(value)

    def _sync_flags(self) -> None:
        for name in self._flags:
            if not (buffer := getattr(self, name)).is_meta:
                self._flags[name] = bool(buffer) or (name == "initialized" and not self.needs_data)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sync_flags()

    def reset(self) -> None:
        """Forget the calibration and what was learnt: back to the state after construction."""
        if self.bits is not None:
            for name in self.flags:
                self._set_flag(name, name == "signed" or not self.needs_data)
            self._reset_state()

    @torch.no_grad()
    def initialize(self, x: Tensor, *, reduce: bool = False) -> None:
        """Initialise from the data ``x`` (any float tensor that ``forward`` takes), again if it was done before.

        A tensor that is empty or all zero changes nothing. ``reduce`` pools the statistics of all ranks, which must
        then all call; the first training forward does so by itself for activations.

        Raises:
            CalibrationError: ``x`` holds inf or NaN.
            InputError: ``axis`` does not fit ``x``.
        """
        if self.bits is None or not self.needs_data:
            return
        stats = collect(self._merged(x), self._state_axis, self.num_groups, reduce=reduce)
        if stats.count == 0:
            return
        stats.require_finite(type(self).__name__)
        if not bool((stats.abs_mean > 0).any()):
            return
        self._init_state(stats)
        self._set_flag("initialized", True)

    @torch.no_grad()
    def fit(self, batches: Sequence[Tensor], *, search: bool = True) -> None:
        """Calibrate by squared error on sample tensors, from a fresh initialisation.

        Args:
            batches: float tensors.
            search: False takes the initialisation as published, from all batches pooled, and leaves it at that.

        Raises:
            CalibrationError: no batch, only empty ones, or inf or NaN in them.
        """
        if self.bits is None:
            return
        filled = [self._merged(b.detach()) for b in batches if b.numel()]
        if not filled:
            raise CalibrationError(f"{type(self).__name__}.fit needs at least one batch that is not empty")
        groups = self.num_groups
        axis = self._state_axis
        per_batch = [collect(b, axis, groups, reduce=False) for b in filled]
        for stats in per_batch:
            stats.require_finite(type(self).__name__)
        total = sum(s.count for s in per_batch)
        pooled = GroupStats(
            torch.stack([s.abs_mean * (s.count / total) for s in per_batch]).sum(0),
            torch.stack([s.min for s in per_batch]).amin(0),
            torch.stack([s.max for s in per_batch]).amax(0),
            total,
        )
        if bool((pooled.abs_mean > 0).any()):
            if self.needs_data:
                self._init_state(pooled)
                self._set_flag("initialized", True)
            if search:
                self._fit(filled, pooled)

    def forward(self, x: Tensor, copies: int = 1) -> Tensor:
        """Return fake-quantized ``x``: same shape and dtype (fp16 and bf16 are computed in float32).

        Args:
            x: float tensor.
            copies: ``x`` stands for a tensor that holds each of its elements so often, as the four orders of an image
                in a cross-scan do: statistics and gradient scales are those of that tensor. The gradient that arrives
                for an element is the sum over its copies.

        Raises:
            NotCalibratedError: evaluation of an uninitialised quantizer.
            CalibrationError: the first training batch holds inf or NaN.
        """
        if self.bits is None:
            return x
        if not self._flags["initialized"] and not self._become_ready(x, self.training):
            return x
        if x.numel() == 0:
            return x
        if self.leading > 1:
            return self._quantize(self._merged(x)).reshape(x.shape)
        return self._quantize(x) if copies == 1 else self._quantize_copies(x, copies)

    def _merged(self, x: Tensor) -> Tensor:
        """``x`` with its leading axes as one."""
        if self.leading == 1:
            return x
        if x.dim() < self.leading:
            raise InputError(f"a tensor of shape {tuple(x.shape)} has fewer than {self.leading} axes")
        return x.flatten(0, self.leading - 1)

    def _become_ready(self, x: Tensor, may_initialize: bool) -> bool:
        """Initialise if allowed. False: ``x`` is empty or all zero and passes through as it is."""
        self._sync_flags()  # an EMA or a broadcast may have written the buffers
        if self._flags["initialized"]:
            return True
        if may_initialize:
            self.initialize(x, reduce=not self.is_weight)
            return self._flags["initialized"]
        if x.numel() == 0 or (self.is_weight and not bool(x.any())):
            return False
        raise NotCalibratedError(
            f"{type(self).__name__} has seen no data yet: run ssmquant.calibrate(model, batches) or one training step "
            "before an evaluation, or load a checkpoint that holds quantizer state"
        )

    @torch.no_grad()
    def encode(self, x: Tensor, *, check: bool = True) -> QTensor:
        """Return ``x`` as codes; ``encode(x).decode()`` equals the evaluation forward bit for bit in eager float32.

        Args:
            x: float tensor, any shape.
            check: raise for NaN (one host synchronisation); without it a NaN becomes code 0.

        Raises:
            ConfigError: a bypass has no codes.
            InputError: NaN in ``x`` (no code stands for it), or, for ranges taken from ``x`` itself, inf.
            NotCalibratedError: not initialised.
        """
        if self.bits is None:
            raise ConfigError("a bypass quantizer (bits=None) has no codes; use its forward")
        cd = compute_dtype(x, *self.parameters(recurse=False))
        ready = self._flags["initialized"] or self._become_ready(x, False)
        if not ready or x.numel() == 0:
            zero = torch.zeros((), dtype=cd, device=x.device)  # of a step of 0 every shift that follows is 0
            codes = torch.full(x.shape, -self.code_min, dtype=torch.uint8, device=x.device)
            return QTensor(codes, self.bits, self.code_min, zero, zero, None, None, x.dtype)
        shape, x = x.shape, self._merged(x)
        affine = self._affine(x)
        index = self._index(x.to(cd), affine)
        if check and bool(index.isnan().any()):
            raise InputError(
                f"{type(self).__name__}.encode: NaN (or inf that spoils the range) in a {tuple(x.shape)} tensor"
            )
        codes = index.nan_to_num(0.0).to(torch.uint8)
        if self.leading > 1:
            codes = codes.reshape(shape)
            wide = *shape[: self.leading], *(1 for _ in shape[self.leading :])
            parts = affine.scale, affine.shift, affine.lo, affine.hi
            affine = Affine(*(t if t is None or t.numel() == 1 else t.reshape(wide) for t in parts))  # type: ignore[arg-type]
        parts = affine.scale, affine.shift, affine.lo, affine.hi
        return QTensor(codes, self.bits, self.code_min, *parts, x.dtype)

    def extra_repr(self) -> str:
        if self.bits is None:
            return "bypass"
        groups = "" if self.axis is None else f", axis={self.axis}, num_groups={self.num_groups}"
        return f"bits={self.bits}{groups}" + ", official=True" * self.official

    def _own_affine(self) -> Affine | None:
        """``static_affine`` of a quantizer whose ``_affine`` does not look at the data."""
        if self.bits is None or self.num_groups > 1 or self.leading > 1:
            return None
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        with torch.no_grad():
            return self._affine(torch.zeros((), device=device))

    def _group_view(self, state: Tensor, x: Tensor) -> Tensor:
        """A ``(num_groups,)`` state tensor as one that broadcasts to ``x`` (``()`` for one group a tensor)."""
        if self.num_groups == 1 or self.axis is None:
            return state.reshape(())
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != self.num_groups:
            group_rows(x, self.axis, self.num_groups)  # raises the error
        shape = [1] * x.dim()
        shape[self.axis] = self.num_groups
        return state.reshape(shape)

    @property
    def _state_axis(self) -> int | None:
        return self.axis if self.num_groups > 1 else None

    def _reset_state(self) -> None:
        raise NotImplementedError

    def _init_state(self, stats: GroupStats) -> None:
        raise NotImplementedError

    def _fit(self, batches: list[Tensor], stats: GroupStats) -> None:
        raise NotImplementedError

    def _affine(self, x: Tensor) -> Affine:
        raise NotImplementedError

    def _index(self, x: Tensor, affine: Affine) -> Tensor:
        return affine_index(x, affine.scale, affine.shift, self.qmin, self.qmax)

    def _quantize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _quantize_copies(self, x: Tensor, copies: int) -> Tensor:
        """Where their number matters to neither values nor gradients, that of ``x`` itself."""
        return self._quantize(x)
