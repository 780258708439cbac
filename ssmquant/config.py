"""What to quantize, and how: plain frozen data with a JSON round trip.

A :class:`QConfig` gives the defaults for a whole model, a :class:`Rule` overrides them for the sites that it matches.
Nothing here knows a model or a tensor.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from ssmquant.errors import ConfigError

__all__ = ["QConfig", "Rule", "Scheme"]

Bits = int | None
Inherit = Literal["inherit"]
Options = tuple[tuple[str, Any], ...]
_VERSION = 1
_KINDS = ("linear", "conv", "matmul", "scan")
_GRANULARITIES = ("tensor", "direction", "channel")
TRANSFORMS = (
    "conv_input", "scan_input", "gate", "state", "dt_scale", "dt_rotation", "dt_mean", "out_rotation",
    "residual_rotation",
)  # fmt: skip
"""What ``QConfig.transforms`` may hold."""
DECAYS = ("ladder", "shared")
"""Quantizers of a scan's A alone."""
_OWN_OPTIONS = ("bits", "official", "axis", "num_groups", "is_weight")  # follow from the site


def _check_bits(name: str, bits: object, *, inherit: bool = False) -> None:
    if bits is None or (inherit and bits == "inherit"):
        return
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(
            f"{name}={bits!r}: bit widths are whole numbers from 2 to 8, or None to stay in float"
        )


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected True or False")


def _check_method(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}={value!r}: expected the name of a quantizer, for example 'lsq'")


def _check_elements(name: str, value: str) -> None:
    if value in DECAYS:
        raise ConfigError(f"{name}={value!r}: {decay_only(value)}")


def decay_only(method: str) -> str:
    """What to do with a quantizer of a whole decay instead of giving it to something else."""
    return (
        f"this quantizer looks at the whole decay A of a scan and serves nothing else; use decay={method!r}, or a Rule "
        f"that names an A of (channels, states), such as Rule('*.scan.A', activation={method!r})"
    )


def _options(name: str, value: object) -> Options:
    """A mapping of plain values, or what this function made of one, as sorted pairs."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise ConfigError(f"{name}={value!r}: expected a dict of a quantizer's arguments")
    if len({key for key, _ in pairs}) < len(pairs):
        raise ConfigError(f"{name}={value!r}: an argument is there twice")
    for key, v in pairs:
        if key in _OWN_OPTIONS or not (v is None or isinstance(v, (bool, int, float, str))):
            raise ConfigError(f"{name}: {key}={v!r} cannot be set here")
    return tuple(sorted((k, v) for k, v in pairs))


@dataclass(frozen=True)
class Scheme:
    """How one operand is quantized: the outcome of a :class:`QConfig` for one site."""

    bits: Bits
    method: str
    granularity: str = "tensor"
    options: Options = ()
    """Further arguments of the quantizer, by name."""


@dataclass(frozen=True)
class Rule:
    """Overrides for every site that ``match`` names; fields left at ``"inherit"`` keep the :class:`QConfig`'s value.

    ``match`` is tried, in this order of precedence, as an exact site name, a regular expression (``"re:..."``, must
    match the whole name), a glob (contains ``*``, ``?`` or ``[``), a module type (``"Linear"``, ``"SS2D"``) and an
    operator kind (``"linear"``, ``"conv"``, ``"matmul"``, ``"scan"``). Of rules with equal precedence the first wins.
    One operand of a scan is named ``<site>.<operand>``, for instance ``"*.scan.A"``. The module type is that of the
    module that owns the parameter. Rules that name sites also override the default placement (first and last layers,
    gates, the adapter's); those for a type or a kind leave it.

    Args:
        match: The pattern.
        w_bits, a_bits: Bit widths 2..8, or None for float.
        weight, activation: Names of quantizers (see ``ssmquant.quantizers``), with their default options. Those of a
            whole decay (see ``QConfig.decay``) only as the ``activation`` of a rule that names an A.
        granularity: Of weights, see :class:`QConfig`.
        keep_float: Leave the matching sites wholly in float.

    Raises:
        ConfigError: bit width or pattern out of range.
    """

    match: str
    w_bits: Bits | Inherit = "inherit"
    a_bits: Bits | Inherit = "inherit"
    weight: str = "inherit"
    activation: str = "inherit"
    granularity: str = "inherit"
    keep_float: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise ConfigError(f"Rule.match={self.match!r}: expected a non-empty pattern")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as e:
                raise ConfigError(f"Rule.match={self.match!r} is not a regular expression: {e}") from None
        _check_bits("Rule.w_bits", self.w_bits, inherit=True)
        _check_bits("Rule.a_bits", self.a_bits, inherit=True)
        _check_method("Rule.weight", self.weight)
        _check_method("Rule.activation", self.activation)
        _check_elements("Rule.weight", self.weight)
        _check_choice("Rule.granularity", self.granularity, ("inherit", *_GRANULARITIES))
        _check_flag("Rule.keep_float", self.keep_float)

    def precedence(self, names: Iterable[str], types: Iterable[str], kinds: Iterable[str]) -> int | None:
        """0 (exact) to 4 (operator kind), or None where the rule does not match a site of these names."""
        names = tuple(names)
        if self.match.startswith("re:"):
            return 1 if any(re.fullmatch(self.match[3:], n) for n in names) else None
        if self.match in names:
            return 0
        if any(c in self.match for c in "*?["):
            return 2 if any(fnmatch.fnmatchcase(n, self.match) for n in names) else None
        if self.match in types:
            return 3
        return 4 if self.match in kinds else None

    def __str__(self) -> str:
        """As Python, without what is inherited."""
        return f"Rule({', '.join([repr(self.match), *_changed(self)[1:]])})"


def _changed(data: Any) -> list[str]:
    """``name=value`` of the fields of a dataclass that differ from their defaults."""
    values = ((f, getattr(data, f.name)) for f in dataclasses.fields(data))
    return [f"{f.name}={v!r}" for f, v in values if v != f.default]


@dataclass(frozen=True)
class QConfig:
    """Quantization of a whole model. The defaults are Q-MambaIR's published placement (arXiv 2503.21970).

    Args:
        w_bits: Bits of the weights of projections and convolutions, 2..8, or None (float).
        a_bits: Bits of their inputs, 2..8, or None (float).
        scan_bits: Bits of the selective scan's operands; defaults to ``a_bits``.
        weight: Weight quantizer.
        activation: Quantizer of the inputs of projections and convolutions.
        scan: Quantizer of the scan's operands.
        scan_output: Quantizer of the input of the projection that reads the scan's output; defaults to ``scan``.
            ``"token"`` gives every position a range of its own in each call, ``"pts"`` a static one.
        decay: Quantizer of the scan's A; defaults to ``scan``. ``"shared"`` keeps one value for each state, shared over
            channels, ``"ladder"`` evenly spaced ones (where A has more than one state; else ``scan`` it is).
        granularity: Scales of a weight: ``"tensor"`` (one, as published), ``"direction"`` (one for each direction of a
            stack of weights, as of x_proj and dt_proj) or ``"channel"`` (one an output channel, of each direction;
            channels whose codes take fewer than 16 bits share theirs with the direction or the tensor).
        weight_options, activation_options, scan_options: Further arguments of these quantizers, such as
            ``{"shift": "half"}``, or ``{"observer": "mse"}`` of ``"minmax"``.
        initialization: ``"mse"`` (weights, static operands and, by ``calibrate``, activations start from the least
            squared error) or ``"published"`` (from the formulas of the papers, as always with ``official``).
        smooth: Strength, 0 (off) to 1, with which ``calibrate`` evens out the channels of inputs: their largest values
            to this power become factors, powers of two, of the input's quantizer and, inversely, of the weight's
            (SmoothQuant's migration, arXiv 2211.10438). Where a norm comes before, ``convert`` leaves them to it.
        smooth_weights: Factors by the whole formula of that paper: divided by the largest values of the weights' input
            channels to the power ``1 - smooth``; of all that comes from a norm. Without, inputs alone decide, and
            projections whose gate a scan takes (Vim's in_proj) have none.
        transforms: Rewrites that keep the float model's function and make it easier to quantize, chosen by
            ``calibrate`` (MambaQuant, arXiv 2501.13484). Factors of channels: of what convolutions read
            (``"conv_input"``), of scans' inputs (``"scan_input"``), of norms behind scans (``"gate"``), of scans' B and
            C (``"state"``), of the low rank of step sizes (``"dt_scale"``). Rotations: of that low rank
            (``"dt_rotation"``), of out_proj's input
            (``"out_rotation"``, at run time), of residual streams between norms (``"residual_rotation"``).
            ``"dt_mean"`` takes the mean from the low rank. Where one does not apply, ``summary`` says why. Later a call
            whose graph cannot have what was done to the weights raises TraceError.
        rotation: ``"klt"`` turns rotations to the principal axes of calibration data first, ``"hadamard"`` does not,
            ``"klt_only"`` does nothing else (for ablations: it gathers the variance in few channels). That of
            out_proj's input, which is computed at run time, is always a Hadamard transform.
        rounding: ``"nearest"``, or ``"gptq"``: ``calibrate`` rounds weights so that the outputs of their layers change
            little (GPTQ, arXiv 2210.17323), and writes the result into the model's weights. What stays at nearest, and
            why, is in ``summary``.
        statistics: Dynamic statistics (DLS) per ``"sample"``, so that outputs do not depend on the rest of the
            batch, or per ``"tensor"`` (as published).
        rules: Overrides, see :class:`Rule`.
        keep_float: Patterns of sites that stay in float (short for rules with ``keep_float=True``).
        keep_first_last: Leave the first and last parametrised layers in float.
        keep_gates: Leave channel attention (projections of globally pooled values) in float.
        official: Reproduce the published code, quirks included, instead of mending them.

    Raises:
        ConfigError: a value is out of range.
    """

    w_bits: Bits = None
    a_bits: Bits = None
    scan_bits: Bits | Inherit = "inherit"
    weight: str = "rfa"
    activation: str = "lsq"
    scan: str = "dls"
    scan_output: str = "inherit"
    decay: str = "inherit"
    granularity: str = "tensor"
    weight_options: Mapping[str, Any] | Options = ()
    activation_options: Mapping[str, Any] | Options = ()
    scan_options: Mapping[str, Any] | Options = ()
    initialization: str = "mse"
    smooth: float = 0.0
    smooth_weights: bool = False
    transforms: tuple[str, ...] = ()
    rotation: str = "klt"
    rounding: str = "nearest"
    statistics: str = "sample"
    rules: tuple[Rule, ...] = ()
    keep_float: tuple[str, ...] = ()
    keep_first_last: bool = True
    keep_gates: bool = True
    official: bool = False
    version: int = field(default=_VERSION, repr=False)

    def __post_init__(self) -> None:
        _check_bits("w_bits", self.w_bits)
        _check_bits("a_bits", self.a_bits)
        _check_bits("scan_bits", self.scan_bits, inherit=True)
        for name in ("weight", "activation", "scan", "scan_output", "decay"):
            _check_method(name, getattr(self, name))
        for name in ("weight", "activation", "scan", "scan_output"):
            _check_elements(name, getattr(self, name))
        for name in ("weight_options", "activation_options", "scan_options"):
            object.__setattr__(self, name, _options(name, getattr(self, name)))
        _check_choice("granularity", self.granularity, _GRANULARITIES)
        _check_choice("initialization", self.initialization, ("mse", "published"))
        _check_choice("statistics", self.statistics, ("sample", "tensor"))
        smooth = self.smooth
        if isinstance(smooth, bool) or not isinstance(smooth, (int, float)) or not 0 <= smooth <= 1:
            raise ConfigError(f"smooth={smooth!r}: a strength is a number from 0 to 1")
        given: object = self.transforms
        if not isinstance(given, (list, tuple)):
            raise ConfigError(f"transforms={self.transforms!r}: expected a list of names")
        for name in self.transforms:
            _check_choice("transforms", name, TRANSFORMS)
        object.__setattr__(self, "transforms", tuple(self.transforms))
        _check_choice("rotation", self.rotation, ("klt", "hadamard", "klt_only"))
        _check_choice("rounding", self.rounding, ("nearest", "gptq"))
        for name in ("smooth_weights", "keep_first_last", "keep_gates", "official"):
            _check_flag(name, getattr(self, name))
        patterns: object = self.keep_float
        if not isinstance(patterns, (str, list, tuple)) or not isinstance(self.rules, (list, tuple)):
            raise ConfigError(f"keep_float={patterns!r}, rules={self.rules!r}: expected lists")
        if isinstance(patterns, str):
            raise ConfigError(f"keep_float={patterns!r}: expected a list of patterns, such as [{patterns!r}]")
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        for r in self.rules:
            if not isinstance(r, Rule):
                raise ConfigError(f"rules: expected ssmquant.Rule objects, got {type(r).__name__}")
        for p in self.keep_float:
            Rule(p, keep_float=True)
        if self.version != _VERSION:
            raise ConfigError(f"QConfig version {self.version}: this ssmquant reads version {_VERSION}")

    # ---- presets -------------------------------------------------------------------------------------------------
    @classmethod
    def qmambair(cls, bits: int, **changes: Any) -> QConfig:
        """Q-MambaIR's placement at one bit width: RFA weights, LSQ inputs, DLS on the scan's operands and out_proj."""
        return cls(**{"w_bits": bits, "a_bits": bits, **changes})

    @classmethod
    def recommended(cls, w_bits: Bits, a_bits: Bits, **changes: Any) -> QConfig:
        """What did best in docs/accuracy.md: RFA for weights, LSQ for all else, from a least-squares start.

        Against Q-MambaIR's placement (:meth:`qmambair`): a scale for each output channel of a weight, with levels that
        are symmetric about 0; ranges initialised by squared error; static ranges in the scan too, which fine-tune as
        well as DLS's dynamic ones and cost nothing when deployed; channels of inputs evened out by powers of two, which
        norms and weights take (``smooth=1.0``); and, for speed, the decay A shared over channels and evenly spaced.
        """
        base: dict[str, Any] = {
            "w_bits": w_bits,
            "a_bits": a_bits,
            "scan": "lsq",
            "decay": "ladder",
            "granularity": "channel",
            "weight_options": {"shift": "half"},
            "smooth": 1.0,
        }
        return cls(**{**base, **changes})

    @classmethod
    def lsq(cls, w_bits: Bits, a_bits: Bits, **changes: Any) -> QConfig:
        """The plain baseline: LSQ everywhere (arXiv 1902.08153)."""
        return cls(**{"w_bits": w_bits, "a_bits": a_bits, "weight": "lsq", "scan": "lsq", **changes})

    @classmethod
    def minmax(cls, w_bits: Bits, a_bits: Bits, **changes: Any) -> QConfig:
        """Min-max quantization everywhere, weights by output channel: needs calibration only, for 8 bits."""
        base = {
            "w_bits": w_bits,
            "a_bits": a_bits,
            "weight": "minmax",
            "activation": "minmax",
            "scan": "minmax",
            "granularity": "channel",
        }
        return cls(**{**base, **changes})

    @classmethod
    def mambaquant(cls, w_bits: Bits = 8, a_bits: Bits = 8, **changes: Any) -> QConfig:
        """Without training: MambaQuant's transforms (arXiv 2501.13484), static ranges from ``calibrate``.

        Weights have a range for each output channel: min-max at 8 bits, as published, of least squared error below;
        activations one that leaves out 1 in 1,000,000 elements at either end (its percentile observer). Use
        ``prepare``, ``calibrate`` on a few images (32 or more for the rotations), ``convert``; below 8 bits
        ``rounding="gptq"`` keeps more. The published shift of the low rank's mean (``"dt_mean"``) is left out: these
        ranges have a zero point of their own, and a subtraction in front of the step sizes keeps the scan from running
        as one kernel. So are factors of the scan's input (``"scan_input"``): the kernels of codes around a scan know
        the plain SiLU only, and without them a deployed Vim takes about three times as long.
        ``transforms=TRANSFORMS`` (of ``ssmquant.config``) has all of them.
        """
        base: dict[str, Any] = {
            "w_bits": w_bits,
            "a_bits": a_bits,
            "weight": "minmax" if w_bits == 8 else "lsq",
            "activation": "minmax",
            "scan": "minmax",
            "granularity": "channel",
            "activation_options": {"observer": "percentile", "percentile": 0.999999},
            "scan_options": {"observer": "percentile", "percentile": 0.999999},
            "smooth": 0.5,
            "transforms": tuple(name for name in TRANSFORMS if name not in ("dt_mean", "scan_input")),
        }
        return cls(**{**base, **changes})

    @classmethod
    def smoothquant(cls, w_bits: Bits = 8, a_bits: Bits = 8, alpha: float = 0.5, **changes: Any) -> QConfig:
        """Without training: SmoothQuant (arXiv 2211.10438), min-max ranges of inputs whose channels are evened out.

        ``alpha`` is the published migration strength. Factors are the paper's, rounded to powers of two. As published
        (its static setting) activations have one range a tensor; weights one for each output channel, where the paper
        has one a tensor. As there, inputs behind norms have factors; so have some convolutions', but none near a scan.
        """
        return cls.minmax(w_bits, a_bits, **{"smooth": alpha, "smooth_weights": True, **changes})

    @classmethod
    def quarot(cls, w_bits: Bits = 4, a_bits: Bits = 8, **changes: Any) -> QConfig:
        """Without training: QuaRot (arXiv 2404.00456), min-max ranges of values that Hadamard matrices rotate.

        Of the residual stream between RMS norms, of the low rank of step sizes, of out_proj's input at run time; no
        factors, no principal axes. The paper's are a transformer's (it rotates attention and the feed-forward layer)
        with ranges of each token and weights by GPTQ or rounding to nearest: here static ranges and rounding.
        """
        base: dict[str, Any] = {
            "transforms": ("dt_rotation", "out_rotation", "residual_rotation"),
            "rotation": "hadamard",
        }
        return cls.minmax(w_bits, a_bits, **{**base, **changes})

    @classmethod
    def ptq4vm(cls, w_bits: Bits = 8, a_bits: Bits = 8, **changes: Any) -> QConfig:
        """Without labels: PTQ4VM (arXiv 2412.20386), a static range for each position of a token.

        Inputs of projections have ranges by position (``"pts"``), weights a step for each output channel without a
        shift, and both SmoothQuant's factors; scans stay in float, all as published. ``calibrate``, then
        ``learn_ranges`` for its joint learning, of the steps only: factors stay what calibration made them, powers of
        two. Convolutions are quantized too, as in the other presets; ``rules=(Rule("conv", keep_float=True),)`` leaves
        them in float, as published where no projection is written as one. ``activation_options`` and ``scan_options``
        (of out_proj's input) take ``{"positions": n}``. A scan in codes, too, wants another quantizer:
        ``scan_bits=8, scan="minmax", scan_output="pts"``.
        """
        base: dict[str, Any] = {
            "w_bits": w_bits,
            "a_bits": a_bits,
            "scan_bits": None,
            "weight": "lsq",
            "activation": "pts",
            "scan": "pts",
            "granularity": "channel",
            "weight_options": {"shift": "none"},
            "smooth": 0.5,
            "smooth_weights": True,
        }
        return cls(**{**base, **changes})

    @property
    def searches(self) -> bool:
        """Whether quantizers start from the least squared error."""
        return self.initialization == "mse" and not self.official

    # ---- resolution ----------------------------------------------------------------------------------------------
    def all_rules(self) -> tuple[Rule, ...]:
        """``rules``, then the ``keep_float`` patterns as rules."""
        return self.rules + tuple(Rule(p, keep_float=True) for p in self.keep_float)

    def rule_for(self, names: Iterable[str], types: Iterable[str], kinds: Iterable[str]) -> Rule | None:
        """The rule that decides a site known by ``names``, in modules of ``types``, of operator ``kinds``."""
        names, types, kinds = tuple(names), tuple(types), tuple(kinds)
        best: tuple[int, int] | None = None
        for i, rule in enumerate(self.all_rules()):
            p = rule.precedence(names, types, kinds)
            if p is not None and (best is None or p < best[0]):
                best = (p, i)
        return None if best is None else self.all_rules()[best[1]]

    def weight_scheme(self, rule: Rule | None) -> Scheme:
        """How the weight of a site under ``rule`` is quantized."""
        bits, method, granularity = self.w_bits, self.weight, self.granularity
        if rule is not None:
            bits = bits if rule.w_bits == "inherit" else rule.w_bits
            method = method if rule.weight == "inherit" else rule.weight
            granularity = granularity if rule.granularity == "inherit" else rule.granularity
            bits = None if rule.keep_float else bits
        return Scheme(
            bits, method, granularity, cast(Options, self.weight_options) if method == self.weight else ()
        )

    def activation_scheme(
        self, rule: Rule | None, *, scan: bool = False, reads_scan: bool = False, decay: bool = False
    ) -> Scheme:
        """How an input is quantized. ``scan``: a scan's operand. ``reads_scan``: made of a scan's output. ``decay``: a
        scan's A, of several states.
        """
        bits = self.a_bits
        if scan and self.scan_bits != "inherit":
            bits = self.scan_bits
        method = self.scan if scan or reads_scan else self.activation
        usual = method
        if reads_scan and self.scan_output != "inherit":
            method = self.scan_output
        if decay and self.decay != "inherit":
            method = self.decay
        options = cast(Options, self.scan_options if scan or reads_scan else self.activation_options)
        if rule is not None:
            bits = bits if rule.a_bits == "inherit" else rule.a_bits
            method = method if rule.activation == "inherit" else rule.activation
            bits = None if rule.keep_float else bits
        return Scheme(bits, method, self.statistics, options if method == usual else ())

    # ---- text ----------------------------------------------------------------------------------------------------
    def __str__(self) -> str:
        """As Python, without what has its default, a rule a line."""
        lines = [f"    {line}," for line in _changed(replace(self, rules=()))]
        if self.rules:
            lines += ["    rules=(", *(f"        {rule}," for rule in self.rules), "    ),"]
        return "\n".join(["QConfig(", *lines, ")"]) if lines else "QConfig()"

    # ---- JSON ----------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain data (numbers, strings, lists) that :meth:`from_dict` reads back."""
        d = dataclasses.asdict(self)
        d["rules"] = [dataclasses.asdict(r) for r in self.rules]
        d["keep_float"] = list(self.keep_float)
        d["transforms"] = list(self.transforms)
        if not self.transforms and self.rotation == "klt":  # as files of before have it
            del d["transforms"], d["rotation"]
        if self.rounding == "nearest":
            del d["rounding"]
        if not self.smooth_weights:
            del d["smooth_weights"]
        for name in ("weight_options", "activation_options", "scan_options"):
            d[name] = dict(getattr(self, name))
        return d

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: unknown keys, another version, or values out of range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"QConfig.from_dict: expected a mapping, got {type(data).__name__}")
        d = dict(data)
        unknown = sorted(set(d) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"QConfig.from_dict: unknown keys {unknown}")
        try:
            d["rules"] = tuple(Rule(**r) for r in d.get("rules", ()))
        except TypeError as e:
            raise ConfigError(f"QConfig.from_dict: bad rule ({e})") from None
        return cls(**d)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> QConfig:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"QConfig.from_json: not JSON ({e})") from None
        return cls.from_dict(data)
