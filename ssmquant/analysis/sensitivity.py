"""What a bit width costs at every site: the site's own error, and what becomes of the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ssmquant.analysis.decibels import bounded
from ssmquant.analysis.verify import rng_states, set_rng
from ssmquant.analysis.widths import Unit, Widths
from ssmquant.errors import CalibrationError, ConfigError
from ssmquant.graph.runtime import Runtime, runtime_of
from ssmquant.modules import ActivationQuantizer
from ssmquant.progress import limited
from ssmquant.workflow import call_model, ensure_traced

__all__ = ["BITS", "Loss", "Sensitivity", "SensitivityRow", "check_bits", "sensitivity"]

BITS = (2, 3, 4, 8)
"""Widths that are measured by default: those whose codes are packed without gaps."""
Loss = str | Callable[[Any, Any], Any]
_KINDS = ("linear", "conv", "matmul", "scan", "model")


@dataclass(frozen=True)
class SensitivityRow:
    """One site, several that read the same weight and so share a width, or the whole model.

    Args:
        sites: Their names, as a :class:`ssmquant.Rule` takes them.
        kind: ``"linear"``, ``"conv"``, ``"matmul"``, ``"scan"`` or ``"model"``.
        sqnr_db: For each width, signal to quantization noise in dB of the site's output, of the weakest of several
            sites, with inputs as they are in the float model. From -300 to 300 (exact, or reached by no batch).
        loss: For each width, the loss of the model's output.
    """

    sites: tuple[str, ...]
    kind: str
    sqnr_db: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` measured: plain data, ``print`` it for a table, worst site first.

    Args:
        loss: ``"kl"``, ``"mse"`` or the name of the function that was given.
        bits: The widths, ascending.
        rows: In the order of the model. Sites that ``prepare`` left in float are in none.
        overall: All sites quantized at once.
        peak: Of ``"mse"``, the span of the values of the float output; PSNR is ``10 log10(peak**2 / loss)`` dB.
    """

    loss: str
    bits: tuple[int, ...]
    rows: tuple[SensitivityRow, ...]
    overall: SensitivityRow
    peak: float | None = None

    def __str__(self) -> str:
        worst = sorted(self.rows, key=lambda r: -r.loss[0])
        names = [r.sites[0] + f" +{len(r.sites) - 1}" * (len(r.sites) > 1) for r in (*worst, self.overall)]
        width = max(4, *(len(n) for n in names))
        measure = "PSNR" if self.peak is not None else self.loss
        columns = [f"{f'{measure} {b}':>10}" for b in self.bits] + [f"{f'SQNR {b}':>7}" for b in self.bits]
        head = f"{'site':<{width}}  {'kind':<6}  {'  '.join(columns)}"
        lines = [head, "-" * len(head)]
        for name, r in zip(names, (*worst, self.overall), strict=True):
            if r is self.overall:
                lines.append(lines[1])
            cells = [f"{self._shown(v):>10}" for v in r.loss] + [f"{_db(v):>7}" for v in r.sqnr_db]
            lines.append(f"{name:<{width}}  {r.kind:<6}  {'  '.join(cells)}")
        return "\n".join(lines)

    def _shown(self, loss: float) -> str:
        if self.peak is None:
            return f"{loss:.3g}"
        return _db(300.0 if self.peak == 0 else bounded(loss / self.peak**2))

    def to_dict(self) -> dict[str, Any]:
        """Plain data (numbers, strings, lists), fit for JSON, that :meth:`from_dict` reads back."""
        return {
            "loss": self.loss,
            "bits": list(self.bits),
            "rows": [_row_to_dict(r) for r in self.rows],
            "overall": _row_to_dict(self.overall),
            "peak": self.peak,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: it is not what ``to_dict`` makes.
        """
        try:
            bits = check_bits(data["bits"])
            made = cls(
                str(data["loss"]),
                bits,
                tuple(_row_from_dict(r, len(bits)) for r in data["rows"]),
                _row_from_dict(data["overall"], len(bits)),
                None if data["peak"] is None else _finite(data["peak"]),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"Sensitivity.from_dict: not what to_dict makes ({e!r})") from None
        if set(data) != {f.name for f in fields(cls)} or list(bits) != list(data["bits"]):
            raise ConfigError(f"Sensitivity.from_dict: keys {sorted(data)}, bits {data['bits']}")
        return made


def _row_to_dict(row: SensitivityRow) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(row).items()}


def _row_from_dict(data: Mapping[str, Any], widths: int) -> SensitivityRow:
    sites, kind = tuple(data["sites"]), data["kind"]
    sqnr, loss = (tuple(_finite(v) for v in data[name]) for name in ("sqnr_db", "loss"))
    if not sites or not all(isinstance(s, str) for s in sites) or isinstance(data["sites"], str):
        raise ValueError(f"sites {data['sites']!r}")
    if kind not in _KINDS or len(sqnr) != widths or len(loss) != widths or set(data) != {*_ROW}:
        raise ValueError(f"row of {sites[0]!r}")
    return SensitivityRow(sites, kind, sqnr, loss)


_ROW = tuple(f.name for f in fields(SensitivityRow))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _db(value: float) -> str:
    return "exact" if value >= 300 else f"{value:.1f}"


def check_bits(bits: Iterable[int]) -> tuple[int, ...]:
    """Bit widths, ascending.

    Raises:
        ConfigError: none, one twice, or one that is not a whole number from 2 to 8.
    """
    if isinstance(bits, (str, int)) or not isinstance(bits, Iterable):
        raise ConfigError(f"bits={bits!r}: expected a list of bit widths, such as {BITS}")
    given = tuple(bits)
    wrong = [b for b in given if isinstance(b, bool) or not isinstance(b, int) or not 2 <= b <= 8]
    if wrong or not given or len(set(given)) < len(given):
        raise ConfigError(f"bits={given}: expected different whole numbers from 2 to 8, such as {BITS}")
    return tuple(sorted(given))


# ---- losses --------------------------------------------------------------------------------------------------------


def _kl(output: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the classes' distributions, mean over samples, in nats."""
    p, q = (t.double().log_softmax(1) for t in (reference, output))
    return (p.exp() * (p - q)).sum(1).mean().clamp(min=0)  # below it by rounding only


def _mse(output: Tensor, reference: Tensor) -> Tensor:
    return (output.double() - reference.double()).square().mean()


def _is_picture(t: Tensor) -> bool:
    return t.dim() == 4 and t.shape[1] <= 4


def _pick(loss: Loss, reference: Any) -> tuple[str, Callable[[Any, Any], Any]]:
    """Name and function of a loss, for outputs such as ``reference``."""
    if callable(loss):
        return getattr(loss, "__name__", type(loss).__name__), loss
    if loss not in ("auto", "kl", "mse"):
        raise ConfigError(f"loss={loss!r}: expected 'auto', 'kl', 'mse' or a function of (output, reference)")
    if not isinstance(reference, Tensor) or not reference.is_floating_point():
        raise ConfigError(
            f"loss={loss!r} is for models that return one float tensor, not {type(reference).__name__}: pass "
            "loss=lambda output, reference: ..., or a forward that returns the tensor"
        )
    classes = reference.dim() >= 2 and reference.shape[1] > 1
    if loss == "auto":
        loss = "kl" if reference.dim() == 2 and classes else "mse" if _is_picture(reference) else loss
    if loss == "auto":
        raise ConfigError(
            f"an output of shape {tuple(reference.shape)} is neither (samples, classes) nor (samples, up to 4 "
            "channels, height, width): pass loss='kl', loss='mse' or loss=lambda output, reference: ..."
        )
    if loss == "kl" and not classes:
        raise ConfigError(f"loss='kl' needs two or more classes in axis 1, not {tuple(reference.shape)}")
    return loss, _kl if loss == "kl" else _mse


def _samples(output: Any) -> int:
    first = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
    return first.shape[0] if first is not None and first.dim() else 1


class Meter:
    """Measures a model of settable widths against its own float outputs.

    Raises:
        CalibrationError: an output is not finite.
        ConfigError: the loss does not fit the outputs.
    """

    def __init__(self, widths: Widths, loss: Loss) -> None:
        self.widths = widths
        widths.set_all(None)
        self.references = widths.outputs()
        values = [
            t.double()
            for t in tree_leaves(self.references)
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        if not all(bool(t.isfinite().all()) for t in values):
            raise CalibrationError("the float model returns NaN or inf for these batches")
        self.name, self.function = _pick(loss, self.references[0])
        self.peak: float | None = None
        if self.name == "mse" and not callable(loss):
            self.peak = max(t.max().item() for t in values) - min(t.min().item() for t in values)

    def __call__(self) -> tuple[float, float]:
        """The loss, and SQNR of the output in dB, at the widths that are set."""
        outputs = self.widths.outputs()
        total, samples, noise, signal = 0.0, 0, 0.0, 0.0
        for output, reference in zip(outputs, self.references, strict=True):
            value = self.function(output, reference)
            if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
                raise ConfigError(f"loss {self.name!r} must return one number, not {type(value).__name__}")
            n = _samples(reference)
            total, samples = total + float(value) * n, samples + n
            for a, b in zip(tree_leaves(output), tree_leaves(reference), strict=True):
                if isinstance(b, Tensor) and b.is_floating_point():
                    noise += (a.double() - b.double()).square().sum().item()
                    signal += b.double().square().sum().item()
        if not math.isfinite(total):
            raise CalibrationError(f"the loss of the quantized model is {total}")
        return total / max(samples, 1), bounded(noise / signal if signal else math.inf if noise else 0.0)


def require_calibrated(runtime: Runtime) -> None:
    """Raises NotCalibratedError unless all ranges are known that an evaluation needs."""
    used = {p.key for r in runtime.records if not any(r.mode.values()) for p in r.plan.points}
    for key, q in runtime.activations.items():
        if key in used and isinstance(q, ActivationQuantizer):
            q.require_range("before measuring")


# ---- measuring -----------------------------------------------------------------------------------------------------


def sensitivity(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = BITS,
    loss: Loss = "auto",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measures what each site costs at each bit width, when all others are in float.

    A site's weight and input, or all operands of a scan, are quantized; what the configuration keeps in float stays so.
    The reference is the same model with nothing quantized. For each width a copy of ``prepared`` is calibrated on the
    batches (what training did to quantizers is not in it), and then the model runs once for each site, width and batch.
    ``prepared`` itself is neither run nor changed. Batches are kept in memory, and so are the outputs of all sites for
    one batch.

    Args:
        prepared: A prepared, calibrated model.
        batches: What the prepared method takes, see :func:`ssmquant.calibrate`. Some images do.
        bits: Widths, 2..8.
        loss: ``"kl"``, divergence of the classes in axis 1 of the output, in nats, mean over samples; ``"mse"``, mean
            squared error of the output; or ``loss(output, reference)``, a number (mean over the batch), less is better.
            ``"auto"``: ``"kl"`` for (samples, classes), ``"mse"`` for pictures (samples, up to 4 channels, height,
            width). Batches count by their samples.
        forward: ``forward(model, batch)`` overrides how a batch is passed; it returns what the loss gets.
        max_batches: Stop after so many.
        progress: Show a progress bar; by default where stderr is a terminal and rich is installed.

    Raises:
        NotCalibratedError: ``prepared`` was never calibrated or trained.
        ConfigError: not a prepared model, bad widths, a loss that does not fit the output, nothing is quantized, or
            weights are rounded for their own widths (``rounding="gptq"``).
        CalibrationError: there is no batch, or values or outputs are not finite.
    """
    runtime = runtime_of(prepared, "prepared")
    given = check_bits(bits)
    if not callable(loss) and loss not in ("auto", "kl", "mse"):
        _pick(loss, None)  # raises
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"sensitivity: max_batches={max_batches}")
    if runtime.config.rounding == "gptq":
        raise ConfigError(
            "sensitivity: with rounding='gptq' calibrate has put the weights on the levels of their own bit widths, "
            "and what other widths cost is lost. Measure a model prepared with rounding='nearest'; search(prepared, "
            "measured) takes the result for this one"
        )
    ensure_traced(prepared)
    require_calibrated(runtime)
    kept = list(limited(batches, max_batches, False))
    if not kept:
        raise CalibrationError("sensitivity: there was no batch; check the loader (or pass a list)")
    states = rng_states([*prepared.parameters(), *prepared.buffers()])
    try:
        # Not in inference mode: copies of the model's tensors would be such that cannot be traced.
        with torch.inference_mode(False), torch.no_grad():
            widths = Widths(prepared, kept, given, forward or call_model, progress)
            if not widths.units:
                raise ConfigError("sensitivity: the configuration leaves every site of this model in float")
            meter = Meter(widths, loss)
            sqnr = widths.site_sqnr()
            tasks = [(u, b) for u in widths.units for b in given]
            measured = {
                (u, b): _alone(widths, meter, u, b) for u, b in limited(tasks, None, progress, "measuring")
            }
            rows = tuple(
                SensitivityRow(
                    u.sites,
                    u.kind,
                    tuple(min(sqnr[b].get(s, 300.0) for s in u.sites) for b in given),
                    tuple(measured[u, b] for b in given),
                )
                for u in widths.units
            )
            together = [_together(widths, meter, b) for b in given]
    finally:
        set_rng(states)
    overall = SensitivityRow(
        ("all sites",), "model", tuple(db for _, db in together), tuple(v for v, _ in together)
    )
    return Sensitivity(meter.name, given, rows, overall, meter.peak)


def _alone(widths: Widths, meter: Meter, unit: Unit, bits: int) -> float:
    widths.set(unit, bits)
    try:
        return meter()[0]
    except CalibrationError as e:
        raise CalibrationError(f"'{unit.sites[0]}' at {bits} bits: {e}") from None
    finally:
        widths.set(unit, None)


def _together(widths: Widths, meter: Meter, bits: int) -> tuple[float, float]:
    widths.set_all(bits)
    return meter()
