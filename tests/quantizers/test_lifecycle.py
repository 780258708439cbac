from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from ssmquant.errors import CalibrationError, ConfigError, NotCalibratedError
from ssmquant.modules import PackedTensor
from ssmquant.quantizers import DLS, LSQ, QUANTIZERS, Quantizer, get_quantizer
from tests.strategies import learnt, make

NAMES = sorted(QUANTIZERS)
NEED_DATA = ["lsq", "rfa", "minmax"]
BOTH = pytest.mark.parametrize("official", [False, True])


@pytest.mark.parametrize("bad", [0, 1, 9, 16, -4, True, 4.0, "4"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_bits(name: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match="2 to 8"):
        QUANTIZERS[name](bad)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="num_groups"):
        LSQ(4, num_groups=3)
    with pytest.raises(ConfigError, match="num_groups"):
        LSQ(4, axis=0, num_groups=0)
    with pytest.raises(ConfigError, match="dead_scale"):
        DLS(4, dead_scale="soft")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dls, .*lsq, .*rfa, .*shared"):
        get_quantizer("lsqq")
    assert get_quantizer("lsq") is LSQ


@pytest.mark.parametrize("n_bits", [None, 32])
@pytest.mark.parametrize("name", NAMES)
def test_bypass(name: str, n_bits: int | None) -> None:
    q = QUANTIZERS[name](n_bits).eval()
    x = torch.randn(3)
    assert q(x) is x
    assert q.ready
    assert not q.state_dict()
    q.initialize(x)
    q.fit([x])
    q.reset()
    with pytest.raises(ConfigError, match="bypass"):
        q.encode(x)
    assert "bypass" in repr(q)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_before_data(name: str, official: bool) -> None:
    q = QUANTIZERS[name](4, official=official).eval()
    if q.needs_data:
        assert not q.ready
        for call in (q, q.encode):
            with pytest.raises(NotCalibratedError, match="calibrate"):
                call(torch.randn(3))
    else:
        assert q.dynamic
        assert not official or name == "token"
        assert q.ready
        q(torch.randn(3))


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_first_training_batch_initialises_once(name: str, official: bool) -> None:
    q = QUANTIZERS[name](4, official=official).train()
    q(torch.randn(20))
    assert q.ready
    state = copy.deepcopy(q.state_dict())
    q(100 * torch.rand(20))
    q.eval()(torch.rand(30))
    q.encode(torch.rand(30))
    for key, value in q.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic(name: str) -> None:
    x = torch.randn(50)
    q = make(name, 3, x)
    assert torch.equal(q(x), q(x))


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_zero_then_empty_then_real_batch(name: str, official: bool) -> None:
    zeros, x = torch.zeros(4, 5), torch.randn(4, 5)
    q = QUANTIZERS[name](4, official=official).train()
    ready = not q.needs_data
    assert torch.equal(q(zeros), zeros)
    assert q.ready == ready
    assert q(torch.empty(0, 5)).shape == (0, 5)
    assert q.ready == ready
    wanted = QUANTIZERS[name](4, official=official).train()(x)
    assert torch.equal(q(x), wanted)
    assert q.ready


@pytest.mark.parametrize("name", NAMES)
def test_zero_weight_may_be_evaluated(name: str) -> None:
    q = QUANTIZERS[name](4, is_weight=True).eval()
    zeros = torch.zeros(3, 4)
    q.initialize(zeros)
    assert torch.equal(q(zeros), zeros)
    assert torch.equal(q.encode(zeros).decode(), zeros)
    if q.needs_data:
        with pytest.raises(NotCalibratedError):
            q(zeros + 1)


@pytest.mark.parametrize("name", ["lsq", "rfa"])
def test_zero_group_gets_a_usable_step(name: str) -> None:
    w = torch.randn(3, 50)
    w[1] = 0
    q = make(name, 4, w, axis=0, num_groups=3, is_weight=True)
    alpha = q.get_parameter("alpha").detach()
    assert alpha[1] == pytest.approx(float(alpha[::2].mean()))
    assert q(w)[1].eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NEED_DATA)
def test_non_finite_first_batch(name: str, bad: float) -> None:
    x = torch.randn(20)
    x[3] = bad
    q = QUANTIZERS[name](4).train()
    for call in (q, q.initialize, lambda t: q.fit([t])):
        with pytest.raises(CalibrationError, match="inf or NaN"):
            call(x)
        assert not q.ready


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_copies_after_a_training_step(name: str, official: bool) -> None:
    x = torch.randn(30, requires_grad=True)
    q = QUANTIZERS[name](4, official=official).train()
    y = q(x)
    y.sum().backward()
    learnt(q)
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(buffer, weights_only=False)]
    # No tensor of a forward may stay behind: it would hold the graph (and upstream's deepcopy raises).
    assert not [k for k, v in vars(q).items() if isinstance(v, torch.Tensor)]
    q.eval()
    for other in copies:
        assert torch.equal(other.eval()(x), q(x))
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(2)
        assert torch.equal(copies[0](x), copies[1](x))


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_keeps_codes(name: str, official: bool) -> None:
    x = torch.randn(60).abs() if official else torch.randn(60)  # official: the sign flag has to travel, too
    q = learnt(make(name, 4, x, official=official))
    other = QUANTIZERS[name](4, official=official).eval()
    shapes = {k: v.shape for k, v in other.state_dict().items()}
    assert shapes == {k: v.shape for k, v in q.state_dict().items()}
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.encode(x).codes, q.encode(x).codes)
    assert torch.equal(other(x), q(x))
    # ... and back to uninitialised by loading such a state
    if q.needs_data:
        other.load_state_dict(QUANTIZERS[name](4, official=official).state_dict())
        with pytest.raises(NotCalibratedError):
            other(x)


def test_flags_written_into_the_buffers_are_seen() -> None:
    """An EMA or a DDP broadcast copies buffers without load_state_dict."""
    x = torch.rand(60)
    source, target = make("lsq", 4, x), LSQ(4).eval()
    assert not source.is_signed
    with torch.no_grad():
        for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            mine.copy_(theirs)
    assert target.ready
    assert torch.equal(target(x), source(x))


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_reset(name: str, official: bool) -> None:
    x = torch.rand(60)
    q = learnt(make(name, 4, x, official=official))
    fresh = QUANTIZERS[name](4, official=official)
    q.reset()
    for key, value in fresh.state_dict().items():
        assert torch.equal(q.state_dict()[key], value), key
    assert q.ready == fresh.ready


@pytest.mark.parametrize("name", NAMES)
def test_no_host_synchronisation_once_initialised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(30, requires_grad=True)
    q = QUANTIZERS[name](4).train()
    q(x)

    def refuse(self: torch.Tensor) -> Any:
        raise AssertionError("host synchronisation")

    for method in ("item", "__bool__", "__int__", "__float__", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    q(x).sum().backward()
    q.eval()(x)
    q.encode(x, check=False)


def test_repr_names_what_matters() -> None:
    model = nn.ModuleList(
        [LSQ(4, axis=0, num_groups=8), DLS(3, official=True), DLS(2, axis=0, dead_scale="pass")]
    )
    text = repr(model)
    assert "LSQ(bits=4, axis=0, num_groups=8)" in text
    assert "DLS(bits=3, official=True)" in text
    assert "dead_scale=pass" in text


def test_parameters_follow_module_moves() -> None:
    for name in NAMES:
        q: Quantizer = make(name, 4, torch.randn(20)).double()
        assert all(t.dtype in (torch.float64, torch.bool) for t in q.state_dict().values())
        assert q(torch.randn(5)).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("official", [False, True])
def test_a_weight_of_zeros_is_encoded_as_zeros(name: str, official: bool) -> None:
    kinds = [{"shift": s} for s in ("learned", "half", "none")] if name in ("lsq", "rfa") else [{}]
    for options in kinds:
        q = QUANTIZERS[name](3, is_weight=True, official=official, **options).eval()
        q.initialize(torch.zeros(4, 5))
        encoded = q.encode(torch.zeros(4, 5))
        rule = getattr(q, "shift", "learned")
        for y in (encoded.decode(), PackedTensor.from_qtensor(encoded, rule)(), q(torch.zeros(4, 5))):
            assert torch.equal(y, torch.zeros(4, 5))
