"""Quantizers in the data path: one a quantized value, with what calibration has seen of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmquant.errors import CalibrationError, ConfigError, NotCalibratedError
from ssmquant.modules.packed import FixedPrecision
from ssmquant.quantizers import DLS, PTS, MinMax, PositionSample, Quantizer
from ssmquant.quantizers.base import Affine, QTensor, affine_decode
from ssmquant.quantizers.dls import dls_range, dls_statistics

__all__ = ["ActivationQuantizer", "FrozenRange", "over_gain"]

_KEEP = 2**14
"""Elements kept of one batch for calibration: enough for a squared error, small for a model with 400 of these."""


MOST_GAIN = 8
"""Exponents of factors of channels, at most: a norm's weights keep their digits in float16 with them."""


def over_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """A weight (outputs, inputs, ...) for inputs that were multiplied by ``gain`` (inputs,)."""
    return weight / gain.reshape(-1, *[1] * (weight.dim() - 2)).to(weight.dtype)


def gains(largest: Tensor, strength: float, weights: Tensor | None = None) -> Tensor:
    """Powers of two, whose products need no rounding, of geometric mean 1 but for that; 1 for what is zero.

    Args:
        largest: (channels,) magnitudes of inputs.
        strength: a of the formula.
        weights: (channels,) magnitudes of the weights that they meet.

    Returns:
        Near ``1 / largest ** a`` or, with weights, ``weights ** (1 - a) / largest ** a`` (1 / s_j of SmoothQuant,
        arXiv 2211.10438, equation 4), but for one factor that all channels share.
    """
    tiny = torch.finfo(torch.float64).tiny
    used = largest > 0
    log = largest.double().clamp(min=tiny).log2() * strength
    if weights is not None:
        used = used & (weights > 0)
        log = log - weights.double().clamp(min=tiny).log2() * (1 - strength)
    if not bool(used.any()):
        return torch.ones_like(largest)
    steps = (log[used].mean() - log).round()
    return torch.where(used, steps.clamp(-MOST_GAIN, MOST_GAIN).exp2(), 1.0).to(largest.dtype)


class ActivationQuantizer(nn.Module):
    """A quantizer with a name, and its calibration.

    ``channels``: axis and number of channels that have factors, buffer ``gain`` (channels,), powers of two; what comes
    out are quantized products of values and factors.

    Buffer ``seen`` (4,): mean, standard deviation, minimum and maximum of calibration data (NaN before), those of a
    sample averaged over samples where the quantizer works by sample. ``convert(dls="frozen")`` derives static ranges
    from them: averages, as the extremes of many pictures would make every step too coarse for most of them.
    """

    seen: Tensor
    gain: Tensor | None

    def __init__(self, name: str, quantizer: Quantizer, channels: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.name = name
        self.quantizer = quantizer
        self.samples: list[Any] | None = None
        self.passes = True
        self.stats: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.channel_axis = 0 if channels is None else channels[0]
        self.register_buffer("gain", None if channels is None else torch.ones(channels[1]))
        self.register_buffer("seen", torch.full((4,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        if self.samples is not None:
            return self._collect(x)
        if not self.training and not self.quantizer.ready:
            self.require_range("before evaluating")
        return self.quantizer(self.scaled(x))

    def scaled(self, x: Tensor) -> Tensor:
        """What the quantizer gets of ``x``."""
        if self.gain is None:
            return x
        return x * self.gain.reshape(-1, *[1] * (x.dim() - 1 - self.channel_axis)).to(x.dtype)

    def require_range(self, when: str) -> None:
        """Raises NotCalibratedError while the range is not known."""
        if self.quantizer.ready:
            return
        if bool(self.seen.isfinite().all()):
            raise NotCalibratedError(
                f"the range of '{self.name}' is not known: it was zero throughout the calibration; calibrate with "
                "other data, or keep it in float (QConfig.keep_float, or a Rule with a_bits=None)"
            )
        raise NotCalibratedError(
            f"the range of '{self.name}' is not known yet: call ssmquant.calibrate(prepared, batches), or run one "
            f"training step, {when}"
        )

    def encode(self, x: Tensor) -> QTensor:
        return self.quantizer.encode(self.scaled(x))

    # ---- calibration ---------------------------------------------------------------------------------------------
    def start(self, *, passes: bool = True) -> None:
        """Collect from now on; values pass in float, or are quantized as ever."""
        self.samples, self.stats, self.largest, self.passes = [], [], [], passes

    @torch.no_grad()
    def _collect(self, x: Tensor) -> Tensor:
        assert self.samples is not None
        if x.numel():
            f = x.detach().float()
            if not bool(f.isfinite().all()):
                raise CalibrationError(
                    f"calibration met NaN or inf at '{self.name}': check the batch and the float model's own output"
                )
            axis = self.quantizer.stats_axis if isinstance(self.quantizer, DLS) else None
            self.stats.append(dls_statistics(f, axis).reshape(4, -1).T)
            if self.passes:
                self.samples.append(self._sample(f))
                if self.gain is not None:
                    rows = f.abs().movedim(self.channel_axis, 0).reshape(f.shape[self.channel_axis], -1)
                    self.largest.append(rows.amax(1))
        x = self.scaled(x)  # as the weight expects
        return x if self.passes else self.quantizer(x)

    def _sample(self, x: Tensor) -> Any:
        """What the quantizer's calibration keeps of a batch; channels apart where they may get factors."""
        channels = None if self.gain is None else self.channel_axis
        if isinstance(self.quantizer, MinMax):
            return self.quantizer.keep(x, channels)
        if isinstance(self.quantizer, PTS):  # which has to see where an element was
            return self.quantizer.sample(x, channels)
        return _thin(x, self.quantizer.kept_axis if channels is None else channels)

    def finish(
        self, *, search: bool = True, smooth: float | None = 0.0, weights: Tensor | None = None
    ) -> None:
        """Fit the quantizer to what was collected (where values passed in float), and note the ranges.

        ``smooth``, ``weights``: what new factors of channels are made from besides, see :func:`gains`; None for
        ``smooth`` keeps those that are there.
        """
        samples, self.samples = self.samples or [], None
        if samples:
            if self.gain is not None:
                if smooth is not None:
                    self.gain.copy_(gains(torch.stack(self.largest).amax(0), smooth, weights))
            if isinstance(self.quantizer, MinMax):
                self.quantizer.fit_kept(samples, self.gain)
            else:
                if self.gain is not None:
                    samples = [
                        s.scaled(self.gain) if isinstance(s, PositionSample) else self.scaled(s)
                        for s in samples
                    ]
                if any(bool(s.any()) for s in samples):
                    self.quantizer.reset()  # the result depends on these data only, not on a calibration before
                self.quantizer.fit(samples, search=search)
        if self.stats:
            self.seen.copy_(torch.cat(self.stats).mean(0))
        self.stats, self.largest = [], []

    def abandon(self) -> None:
        """Forget what was collected, after an error."""
        self.samples, self.stats, self.largest = None, [], []

    def extra_repr(self) -> str:
        return self.name


def _thin(x: Tensor, axis: int | None) -> Tensor:
    """At most ``_KEEP`` elements, evenly strided along the flattened rest, ``axis`` (if any) kept."""
    if x.numel() <= _KEEP:
        return x.clone()
    if x.dim() == 1:
        axis = None
    rows = x.movedim(axis, 0).reshape(x.shape[axis], -1) if axis is not None else x.reshape(1, -1)
    step = max(1, -(-x.numel() // _KEEP)) | 1  # odd: coprime to power-of-two layouts
    thin = rows[:, ::step].contiguous()
    if axis is None:
        return thin[0]
    shape = [1] * x.dim()
    shape[axis], shape[axis - 1 if axis else x.dim() - 1] = thin.shape
    return thin.reshape(shape) if axis == 0 else thin.t().contiguous().reshape(shape)


class FrozenRange(FixedPrecision, Quantizer):
    """A DLS quantizer with the range that it had on calibration data: static, so tiles and batches do not matter.

    Raises:
        ConfigError: the quantizer never saw calibration data.
    """

    flags: ClassVar[tuple[str, ...]] = ("initialized", "signed")
    alpha: Tensor
    beta: Tensor
    lo: Tensor
    hi: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        for name in ("alpha", "beta", "lo", "hi"):
            self.register_buffer(name, torch.zeros(()))
        self._set_flag("initialized", True)

    @property
    def needs_data(self) -> bool:
        return False

    @classmethod
    def from_dls(cls, wrapper: ActivationQuantizer) -> FrozenRange:
        q, seen = wrapper.quantizer, wrapper.seen
        if not isinstance(q, DLS) or q.bits is None:
            raise ConfigError("only a DLS quantizer can be frozen")
        if not bool(seen.isfinite().all()):
            raise ConfigError(
                f"convert(dls=\"frozen\") needs calibrated ranges; '{wrapper.name}' has none: run ssmquant.calibrate"
            )
        out = cls(q.bits)
        out._set_flag("signed", q.is_signed)
        alpha, beta = dls_range(seen, q.w, q.v, q.bits, q.eps, floor_first=q.official)
        out.alpha, out.beta = alpha.detach().clone(), beta.detach().clone()
        # The ends are snapped to levels, which makes the frozen map a proper (idempotent) quantizer.
        ends = seen[2:]
        codes = ((ends + out.beta) / out.alpha).round().clamp(out.qmin, out.qmax)
        out.lo, out.hi = (codes * out.alpha - out.beta).detach().unbind()
        return out

    def static_affine(self) -> Affine:
        return self._affine(self.alpha)

    def _affine(self, x: Tensor) -> Affine:
        return Affine(self.alpha, self.beta, self.lo, self.hi)

    def _quantize(self, x: Tensor) -> Tensor:
        affine = self._affine(x)
        return affine_decode(self._index(x.to(self.alpha.dtype), affine), affine, self.code_min).to(x.dtype)
