"""The quantization methods that ``compare.py`` compares, each a configuration and a way of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ssmquant import QConfig
from ssmquant.errors import ConfigError

__all__ = ["ABLATIONS", "METHODS", "Method", "find"]


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    ``config`` makes the configuration for a bit width (None: the float model, trained as long). ``distill``: share of
    the loss that compares with the float model's output. ``quantizer_lr``: learning rate of the quantizers' scalars
    over that of the weights. ``ema``: decay of averaged weights. ``weights_first``: share of the steps in which
    activations stay in float. ``rate``: factor of the learning rate. ``anneal``: power of its cosine. Without
    ``trained`` the model is calibrated alone. ``searched``: ``ssmquant.search`` gives every site a width of its own;
    the bit width, which may be a fraction, is that of the uniform model that costs as much.
    """

    name: str
    label: str
    config: Callable[[int], QConfig] | None
    distill: float = 0.0
    quantizer_lr: float = 1.0
    ema: float | None = None
    weights_first: float = 0.0
    rate: float = 1.0
    anneal: float = 1.0
    trained: bool = True
    searched: bool = False


def _plain(**changes: Any) -> Callable[[int], QConfig]:
    return lambda bits: QConfig(w_bits=bits, a_bits=bits, **changes)


def _official(**changes: Any) -> Callable[[int], QConfig]:
    return _plain(official=True, statistics="tensor", **changes)


_NO_SHIFT = {"shift": "none"}

_OURS = Method("ours", "ours", lambda bits: QConfig.recommended(bits, bits), distill=0.9, rate=4.0)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        m.name: m
        for m in (
            Method("float", "float, as many steps more", None),
            Method("minmax", "MinMax", lambda bits: QConfig.minmax(bits, bits)),
            Method(
                "lsq",
                "LSQ",
                lambda bits: QConfig.lsq(
                    bits,
                    bits,
                    initialization="published",
                    weight_options=_NO_SHIFT,
                    activation_options=_NO_SHIFT,
                    scan_options=_NO_SHIFT,
                ),
            ),
            Method("lsq+", "LSQ+", lambda bits: QConfig.lsq(bits, bits, weight_options=_NO_SHIFT)),
            Method("pact", "PACT", _plain(weight="dorefa", activation="pact", scan="pact")),
            Method("dorefa", "DoReFa", _plain(weight="dorefa", activation="minmax", scan="minmax")),
            Method(
                "n2uq", "N2UQ", _plain(weight="n2uq", activation="n2uq", scan="n2uq", granularity="channel")
            ),
            Method("quantsr", "QuantSR (RLQ)", _plain(weight="rlq", activation="rlq", scan="rlq")),
            Method("official", "Q-MambaIR (DLS + RFA)", _official()),
            Method("dls", "DLS only", _official(weight="lsq")),
            Method("rfa", "RFA only", _official(scan="lsq")),
            Method(
                "mambaquant",
                "MambaQuant, not trained",
                lambda bits: QConfig.mambaquant(bits, bits),
                trained=False,
            ),
            _OURS,
            replace(_OURS, name="searched", label="ours, widths searched", searched=True),
        )
    }
)
"""The methods by name. "lsq" is the original (arXiv 1902.08153): no shift, its published start; "lsq+" (2004.09576) has
learnt shifts of activations and a least-squares start, which "n2uq", "quantsr" and "ours" have too; "pact"
(1805.06085) and "dorefa" (1606.06160) share DoReFa's weights; "official" is Q-MambaIR (2503.21970) as its
code has it, its published start included, "dls" and "rfa" its two halves with LSQ elsewhere; "mambaquant"
(2501.13484) is calibrated alone; "searched" is "ours" with mixed widths."""


def _ours(name: str, label: str, **training: Any) -> Method:
    changes = training.pop("changes", {})
    made = replace(_OURS, name=f"ours-{name}", label=label, **training)
    return replace(made, config=lambda bits: QConfig.recommended(bits, bits, **changes))


ABLATIONS: Mapping[str, Method] = MappingProxyType(
    {
        m.name: m
        for m in (
            _ours("published-start", "published start of ranges", changes={"initialization": "published"}),
            _ours("tensor", "one scale a weight", changes={"granularity": "tensor"}),
            _ours("direction", "one scale a direction", changes={"granularity": "direction"}),
            _ours("learned-shift", "learnt shifts of weights", changes={"weight_options": {}}),
            _ours("lsq-weights", "LSQ weights for RFA", changes={"weight": "lsq"}),
            _ours("dls-scan", "DLS for LSQ in the scan", changes={"scan": "dls"}),
            _ours(
                "dls-batch",
                "DLS in the scan, statistics of a batch",
                changes={"scan": "dls", "statistics": "tensor"},
            ),
            _ours("token", "ranges of each token for out_proj", changes={"scan_output": "token"}),
            _ours("uneven", "channels not evened out", changes={"smooth": 0.0}),
            _ours("own-decay", "A by LSQ, not shared", changes={"decay": "inherit"}),
            _ours("shared-decay", "A shared, but not evenly spaced", changes={"decay": "shared"}),
            _ours("no-distill", "no distillation", distill=0.0),
            _ours("distill-5", "distillation 0.5", distill=0.5),
            _ours("distill-only", "the float model's output alone", distill=1.0),
            _ours("slow-scalars", "quantizers at 0.1 of the rate", quantizer_lr=0.1),
            _ours("fast-scalars", "quantizers at 4 times the rate", quantizer_lr=4.0),
            _ours("ema", "EMA 0.99", ema=0.99),
            _ours("rate-1", "the others' learning rate", rate=1.0),
            _ours("rate-2", "twice the others' learning rate", rate=2.0),
            _ours("anneal-2", "the rate falls early (a squared cosine)", anneal=2.0),
            _ours("anneal-half", "the rate falls late (a cosine's root)", anneal=0.5),
            _ours(
                "transforms",
                "from MambaQuant's transforms",
                changes={"transforms": QConfig.mambaquant().transforms},
            ),
            _ours("weights-first", "weights first, 30 % of the steps", weights_first=0.3),
            replace(
                METHODS["official"],
                name="official-training",
                label="Q-MambaIR, trained as ours",
                distill=0.9,
                rate=4.0,
            ),
        )
    }
)
"""What "ours" is made of: one thing changed in each."""


def find(name: str) -> Method:
    """The method or ablation of that name.

    Raises:
        ConfigError: there is none.
    """
    both = {**METHODS, **ABLATIONS}
    if name not in both:
        raise ConfigError(f"no method {name!r}; there are {', '.join(both)}")
    return both[name]
