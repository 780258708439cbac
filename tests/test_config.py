"""Configurations: what is refused, which rule decides, and that JSON brings back the same."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmquant import ConfigError, QConfig, Rule, SsmquantError
from ssmquant.config import DECAYS, Scheme
from ssmquant.quantizers import OPERANDS

METHODS = st.sampled_from(["rfa", "lsq", "dls", "minmax"])
BITS = st.one_of(st.none(), st.integers(2, 8))
RULES = st.builds(
    Rule,
    match=st.one_of(
        st.text(min_size=1).filter(lambda s: not s.startswith("re:")), st.just("re:a.*"), st.just("*.x")
    ),
    w_bits=st.one_of(st.just("inherit"), BITS),
    a_bits=st.one_of(st.just("inherit"), BITS),
    weight=st.one_of(st.just("inherit"), METHODS),
    activation=st.one_of(st.just("inherit"), METHODS),
    granularity=st.sampled_from(["inherit", "tensor", "direction", "channel"]),
    keep_float=st.booleans(),
)
OPTIONS = st.dictionaries(
    st.sampled_from(["shift", "dead_scale", "other"]),
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
)
CONFIGS = st.builds(
    QConfig,
    w_bits=BITS,
    a_bits=BITS,
    scan_bits=st.one_of(st.just("inherit"), BITS),
    weight=METHODS,
    activation=METHODS,
    scan=METHODS,
    decay=st.one_of(st.just("inherit"), METHODS),
    granularity=st.sampled_from(["tensor", "direction", "channel"]),
    weight_options=OPTIONS,
    activation_options=OPTIONS,
    scan_options=OPTIONS,
    initialization=st.sampled_from(["mse", "published"]),
    rounding=st.sampled_from(["nearest", "gptq"]),
    statistics=st.sampled_from(["sample", "tensor"]),
    rules=st.lists(RULES, max_size=3).map(tuple),
    keep_float=st.lists(st.text(min_size=1).filter(lambda s: not s.startswith("re:")), max_size=3).map(tuple),
    keep_first_last=st.booleans(),
    keep_gates=st.booleans(),
    official=st.booleans(),
)


@pytest.mark.parametrize("value", [0, 1, 9, 32, -2, True, False, "4", 4.0, float("nan"), [4]])
@pytest.mark.parametrize("name", ["w_bits", "a_bits", "scan_bits"])
def test_bits_are_whole_numbers_from_2_to_8(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*from 2 to 8, or None"):
        QConfig(**{name: value})
    if name != "scan_bits":
        with pytest.raises(ConfigError, match=rf"Rule\.{name}="):
            Rule("x", **{name: value})


def test_inherit_is_for_rules_and_the_scan() -> None:
    assert QConfig(scan_bits="inherit").scan_bits == "inherit"
    assert Rule("x").w_bits == "inherit"
    for name in ("w_bits", "a_bits"):
        with pytest.raises(ConfigError):
            QConfig(**{name: "inherit"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": ""}, {"activation": None}, {"scan": 3}, {"granularity": "group"}, {"statistics": "batch"},
        {"rounding": "up"}, {"rounding": None},
        {"granularity": None}, {"keep_float": "head"}, {"keep_float": [""]}, {"keep_float": ["re:("]},
        {"keep_float": [3]},
        {"initialization": "random"}, {"weight_options": {"bits": 3}}, {"scan_options": {"axis": 0}}, {"decay": ""},
        {"weight_options": "shift"}, {"weight_options": {"shift": ["half"]}}, {"weight_options": {3: 1}},
        {"weight_options": [["shift", "half"], ["shift", 3]]}, {"scan_options": [["a", 1], ["a", 1]]},
        {"rules": ["head"]}, {"rules": [{"match": "head"}]}, {"version": 2}, {"version": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_values(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QConfig(**bad)
    with pytest.raises(ValueError, match=r".+"):
        QConfig(**bad)
    assert issubclass(ConfigError, SsmquantError)


@pytest.mark.parametrize("method", ["shared", "ladder"])
def test_quantizers_of_a_whole_operand_are_for_the_decay(method: str) -> None:
    assert set(OPERANDS) == set(DECAYS)
    assert QConfig(decay=method).decay == method
    assert Rule("*.scan.A", activation=method).activation == method
    for name in ("weight", "activation", "scan"):
        with pytest.raises(ConfigError, match=rf"{name}='{method}'.*decay='{method}'.*'\*\.scan\.A'"):
            QConfig(**{name: method})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"Rule.weight='{method}'.*decay='{method}'"):
        Rule("x", weight=method)


@pytest.mark.parametrize("match", ["", None, 3, "re:(", "re:[", "re:*"])
def test_bad_patterns(match: Any) -> None:
    with pytest.raises(ConfigError, match=r"Rule\.match="):
        Rule(match)


def test_frozen_and_hashable() -> None:
    config = QConfig(w_bits=2, rules=[Rule("x")], keep_float=["y"])  # type: ignore[arg-type]
    assert config.rules == (Rule("x"),)
    assert config.keep_float == ("y",)
    assert hash(config) == hash(QConfig(w_bits=2, rules=(Rule("x"),), keep_float=("y",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.w_bits = 3  # type: ignore[misc]


# ---- rules ---------------------------------------------------------------------------------------------------------

NAMES, TYPES, KINDS = ("layers.0.attn.in_proj",), ("Linear",), ("linear",)
BY_PRECEDENCE = [
    "layers.0.attn.in_proj", r"re:layers\.\d+\..*", "layers.*", "Linear", "linear",
]  # fmt: skip


@pytest.mark.parametrize("winner", range(5))
@pytest.mark.parametrize("backwards", [False, True])
def test_precedence(winner: int, backwards: bool) -> None:
    """Exact name, regular expression, glob, type, kind: whatever the order they are written in."""
    rules = [Rule(m, w_bits=2 + i) for i, m in enumerate(BY_PRECEDENCE)][winner:]
    config = QConfig(w_bits=8, rules=tuple(reversed(rules) if backwards else rules))
    rule = config.rule_for(NAMES, TYPES, KINDS)
    assert rule is not None
    assert rule.match == BY_PRECEDENCE[winner]
    assert config.weight_scheme(rule) == Scheme(2 + winner, "rfa", "tensor")


@pytest.mark.parametrize("match", BY_PRECEDENCE)
def test_of_equal_rules_the_first_wins(match: str) -> None:
    config = QConfig(rules=(Rule(match, w_bits=3), Rule(match, w_bits=4)), keep_float=(match,))
    assert config.rule_for(NAMES, TYPES, KINDS) is config.rules[0]
    # keep_float comes after the rules, at its own precedence.
    outdone = QConfig(rules=(Rule("linear", w_bits=3),), keep_float=("layers.*",))
    assert outdone.rule_for(NAMES, TYPES, KINDS) == Rule("layers.*", keep_float=True)


def test_what_does_not_match() -> None:
    for match in (
        "layers.0.attn",
        "in_proj",
        "re:layers",
        "re:in_proj",
        "?",
        "Conv2d",
        "conv",
        "LINEAR",
        "Layers.*",
    ):
        assert Rule(match).precedence(NAMES, TYPES, KINDS) is None, match
    assert QConfig(rules=(Rule("conv"),)).rule_for(NAMES, TYPES, KINDS) is None
    assert QConfig().rule_for(NAMES, TYPES, KINDS) is None


def test_the_last_name_counts_too() -> None:
    names = ("block.scan.A", "block.scan")
    for match, precedence in (("block.scan.A", 0), ("block.scan", 0), ("*.scan.A", 2), ("scan", 4)):
        assert Rule(match).precedence(names, (), ("scan",)) == precedence


def test_inheritance() -> None:
    config = QConfig(w_bits=3, a_bits=5, scan_bits=6, granularity="channel", statistics="tensor")
    assert config.weight_scheme(None) == Scheme(3, "rfa", "channel")
    assert config.activation_scheme(None) == Scheme(5, "lsq", "tensor")
    assert config.activation_scheme(None, scan=True) == Scheme(6, "dls", "tensor")
    assert config.activation_scheme(None, reads_scan=True) == Scheme(5, "dls", "tensor")
    assert QConfig(a_bits=5).activation_scheme(None, scan=True).bits == 5
    assert QConfig(a_bits=5, scan_bits=None).activation_scheme(None, scan=True).bits is None
    rule = Rule("x", w_bits=8, activation="minmax")
    assert config.weight_scheme(rule) == Scheme(8, "rfa", "channel")
    assert config.activation_scheme(rule, scan=True) == Scheme(6, "minmax", "tensor")
    rule = Rule("x", a_bits=None, weight="lsq")
    assert config.weight_scheme(rule) == Scheme(3, "lsq", "channel")
    assert config.activation_scheme(rule, scan=True).bits is None
    kept = Rule("x", w_bits=2, a_bits=2, keep_float=True)
    assert config.weight_scheme(kept).bits is None
    assert config.activation_scheme(kept).bits is None


def test_presets() -> None:
    assert QConfig.qmambair(2) == QConfig(w_bits=2, a_bits=2)
    assert QConfig.qmambair(4, official=True).official
    assert QConfig.qmambair(4, a_bits=8).a_bits == 8
    lsq = QConfig.lsq(2, 4)
    assert (lsq.w_bits, lsq.a_bits, lsq.weight, lsq.activation, lsq.scan) == (2, 4, "lsq", "lsq", "lsq")
    minmax = QConfig.minmax(8, None, scan_bits=8)
    assert (minmax.weight, minmax.activation, minmax.scan, minmax.a_bits) == (
        "minmax",
        "minmax",
        "minmax",
        None,
    )
    for preset in (QConfig.qmambair, QConfig.lsq, QConfig.minmax):
        with pytest.raises(ConfigError):
            preset(*(1,) * (1 if preset == QConfig.qmambair else 2))


# ---- JSON ----------------------------------------------------------------------------------------------------------


@given(CONFIGS)
def test_json_round_trip(config: QConfig) -> None:
    assert QConfig.from_json(config.to_json()) == config
    assert QConfig.from_dict(config.to_dict()) == config
    assert QConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(config.to_json())["version"] == 1


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, False), ({"transforms": ("gate",)}, True), ({"rotation": "hadamard"}, True)]
)
def test_what_a_configuration_does_not_use_takes_no_place(changes: dict[str, Any], kept: bool) -> None:
    config = QConfig(**changes)
    assert ("transforms" in config.to_dict()) == ("rotation" in config.to_dict()) == kept
    assert QConfig.from_dict(config.to_dict()) == config


def test_rounding_takes_place_where_it_is_not_to_nearest() -> None:
    assert "rounding" not in QConfig(transforms=("gate",)).to_dict()
    assert QConfig(rounding="gptq").to_dict()["rounding"] == "gptq"


def test_a_missing_key_is_the_default() -> None:
    assert QConfig.from_json("{}") == QConfig()
    assert QConfig.from_dict({"w_bits": 2, "rules": [{"match": "x"}]}) == QConfig(
        w_bits=2, rules=(Rule("x"),)
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nonsense", "[]", "3", "null", '"x"', '{"bits": 4}', '{"w_bits": 4, "more": 1}', '{"version": 2}',
        '{"version": null}', '{"w_bits": 1}', '{"w_bits": "4"}', '{"w_bits": true}', '{"w_bits": 4.0}', '{"rules": 3}',
        '{"rules": null}', '{"rules": [3]}', '{"rules": ["x"]}', '{"rules": [{}]}',
        '{"rules": [{"match": "x", "bits": 3}]}',
        '{"rules": {"match": "x"}}', '{"keep_float": "x"}', '{"keep_float": 3}', '{"keep_float": null}',
        '{"keep_float": [3]}', '{"official": "no"}', '{"keep_gates": 1}',
        '{"rules": [{"match": "x", "keep_float": "no"}]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError):
        QConfig.from_json(text)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
KEYS = st.sampled_from(["rules", "w_bits", "keep_float", "match", "granularity", "version"])


@given(st.recursive(VALUES, lambda x: st.one_of(st.lists(x), st.dictionaries(KEYS, x))))
def test_any_json_is_read_or_refused(data: Any) -> None:
    try:
        assert isinstance(QConfig.from_dict(data), QConfig)
    except ConfigError as e:
        assert str(e)  # noqa: PT017
