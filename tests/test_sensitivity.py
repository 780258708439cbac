"""What one site costs, against models in which only that site is quantized; and that looking changes nothing."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import CalibrationError, ConfigError, NotCalibratedError, QConfig, Rule, Sensitivity
from ssmquant.analysis.widths import at_width
from ssmquant.graph.runtime import runtime_of
from tests.small import Chain, Scanner, images, points, prepared_and_calibrated

X = images(2, 3, 6, 5)
CONFIGS = {
    "published": QConfig.qmambair(3),
    "recommended": QConfig.recommended(3, 3),  # x_proj and the scan share a quantizer; inputs have factors
    "inputs only": QConfig.minmax(None, 4),  # type: ignore[arg-type]
    "weights only": QConfig.lsq(4, None),
}


def float_scanner() -> nn.Module:
    torch.manual_seed(0)
    return Scanner().eval()


@functools.cache
def measured(name: str) -> tuple[nn.Module, Any, Sensitivity]:
    model = float_scanner()
    prepared = prepared_and_calibrated(model, CONFIGS[name], X)
    return model, prepared, ssmquant.sensitivity(prepared, [X], bits=(2, 4), progress=False)


@functools.cache
def uniform(name: str, bits: int) -> Any:
    return prepared_and_calibrated(measured(name)[0], at_width(CONFIGS[name], bits), X)


@torch.no_grad()
def alone(name: str, bits: int, site: str) -> Tensor:
    """The output of a model prepared with all other sites in float, with the ranges of one that has none in float."""
    model, config, whole = measured(name)[0], at_width(CONFIGS[name], bits), uniform(name, bits)
    others = tuple(
        Rule(s.name, keep_float=True) for s in runtime_of(whole).records[0].plan.sites if s.name != site
    )
    own = replaced(config, others)
    single = ssmquant.prepare(model, own, example_inputs=(X,)).eval()
    for p in points(single).values():
        operand = p.uses[0][1].name
        same = [
            q for q in points(whole).values() if any(s.name == site and o.name == operand for s, o in q.uses)
        ]
        (q,) = [q for q in same if (q.what == "weight") == (p.what == "weight")]
        store = "activations" if p.what == "activation" else "weights"
        getattr(runtime_of(single), store)[p.key].load_state_dict(
            getattr(runtime_of(whole), store)[q.key].state_dict()
        )
    out: Tensor = single(X)
    return out


def replaced(config: QConfig, rules: tuple[Rule, ...]) -> QConfig:
    return QConfig.from_dict({**config.to_dict(), "rules": [vars(r) for r in rules]})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_a_model_with_one_site_quantized(name: str) -> None:
    model, _, result = measured(name)
    assert result.loss == "mse"
    assert result.bits == (2, 4)
    expected = {"in_proj", "x_proj", "scan", "out_proj"} - ({"scan"} if name == "weights only" else set())
    assert {r.sites[0] for r in result.rows} == expected
    with torch.no_grad():
        reference = model(X)
    for row in result.rows:
        for bits, loss in zip(result.bits, row.loss, strict=True):
            out = alone(name, bits, row.sites[0])
            wanted = (out.double() - reference.double()).square().mean().item()
            assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-16)
            assert wanted > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_overall_is_the_uniform_model(name: str) -> None:
    model, _, result = measured(name)
    with torch.no_grad():
        reference = model(X).double()
        for k, bits in enumerate(result.bits):
            out = uniform(name, bits)(X).double()
            noise = (out - reference).square()
            assert result.overall.loss[k] == pytest.approx(noise.mean().item(), rel=1e-4)
            wanted = 10 * torch.log10(reference.square().sum() / noise.sum())
            assert result.overall.sqnr_db[k] == pytest.approx(float(wanted), abs=1e-3)
    assert result.peak == pytest.approx(float(reference.max() - reference.min()))


@torch.no_grad()
def test_sqnr_of_a_projection_by_hand() -> None:
    model, _, result = measured("published")
    row = next(r for r in result.rows if r.sites == ("in_proj",))
    assert isinstance(model, Scanner)
    x = model.stem(X).flatten(2).transpose(1, 2)
    exact = F.linear(x.double(), model.in_proj.weight.double())
    for bits, db in zip(result.bits, row.sqnr_db, strict=True):
        rt = runtime_of(uniform("published", bits))
        weight: Any = rt.weights["in_proj:weight"]
        act: Any = rt.activations["in_proj:input"]
        out = F.linear(act(x).double(), weight(model.in_proj.weight).double())
        wanted = 10 * torch.log10(exact.square().sum() / (out - exact).square().sum())
        assert db == pytest.approx(float(wanted), abs=1e-2)


def test_several_batches_count_by_their_samples() -> None:
    _, prepared, _ = measured("published")
    a, b = images(3, 3, 4, 6, seed=3), images(1, 3, 7, 5, seed=4)
    losses: list[tuple[int, float]] = []

    def loss(output: Tensor, reference: Tensor) -> Tensor:
        value = F.l1_loss(output, reference)
        losses.append((len(output), float(value)))
        return value

    result = ssmquant.sensitivity(prepared, [a, b], bits=[4], loss=loss, progress=False)
    (n, first), (m, second) = losses[:2]
    assert (n, m) == (3, 1)
    assert result.loss == "loss"
    assert result.peak is None
    assert result.rows[0].loss[0] == pytest.approx((3 * first + second) / 4, rel=1e-9)
    few = ssmquant.sensitivity(prepared, iter([a, b]), bits=[4], loss=loss, max_batches=1, progress=False)
    assert few == ssmquant.sensitivity(prepared, [a], bits=[4], loss=loss, progress=False)


def test_copies_pickles_and_inference_mode() -> None:
    _, prepared, result = measured("recommended")
    with torch.inference_mode():
        assert ssmquant.sensitivity(prepared, [X], bits=(2, 4), progress=False) == result
    again = pickle.loads(pickle.dumps(prepared))
    assert ssmquant.sensitivity(again, [X], bits=(4, 2), progress=False) == result


class Tied(nn.Module):
    """Two layers of one weight, with different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.silu(self.b(F.silu(self.a(x)))))
        return out


def test_sites_of_one_weight_are_one_row() -> None:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(Chain(Tied()).eval(), QConfig.recommended(4, 4), X)
    result = ssmquant.sensitivity(prepared, [X], bits=(2, 3), progress=False)
    assert [r.sites for r in result.rows] == [("middle.a", "middle.b"), ("middle.c",)]
    assert "middle.a +1" in str(result)


class Classifier(nn.Module):
    def __init__(self, form: str = "logits", classes: int = 5) -> None:
        super().__init__()
        self.form = form
        self.stem, self.mid, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Any:
        y = self.head(F.silu(self.mid(F.silu(self.stem(x)))))
        return {"logits": y, "pair": (y, y), "sequence": y[:, None], "nan": y / 0 * 0}[self.form]


def classifier(form: str = "logits", classes: int = 5) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Classifier(form, classes).eval(), torch.randn(6, 4)
    return model, prepared_and_calibrated(model, QConfig.minmax(4, 4), x), x


@torch.no_grad()
def test_divergence_of_classes() -> None:
    model, prepared, x = classifier()
    result = ssmquant.sensitivity(prepared, [x], bits=(3,), progress=False)
    assert result.loss == "kl"
    out = prepared_and_calibrated(model, QConfig.minmax(3, 3), x)(x)
    p, q = model(x).double().softmax(1), out.double().softmax(1)
    wanted = (p * (p / q).log()).sum(1).mean()
    assert result.overall.loss[0] == pytest.approx(float(wanted), rel=1e-4)
    assert "PSNR" not in str(result)
    assert "kl 3" in str(result)


@pytest.mark.parametrize(
    ("form", "classes", "loss", "error", "message"),
    [
        ("pair", 5, "auto", ConfigError, "one float tensor, not tuple: pass loss=lambda"),
        ("sequence", 5, "auto", ConfigError, "neither"),
        ("logits", 1, "auto", ConfigError, "neither"),
        ("logits", 1, "kl", ConfigError, "two or more classes"),
        ("logits", 5, "psnr", ConfigError, "expected 'auto', 'kl', 'mse' or a function"),
        ("logits", 5, lambda a, b: a - b, ConfigError, "must return one number"),
        ("logits", 5, lambda a, b: torch.tensor(float("nan")), CalibrationError, "'mid' at 2 bits: the loss"),
        ("nan", 5, "mse", CalibrationError, "NaN or inf"),
    ],
)
def test_losses_that_do_not_fit(
    form: str, classes: int, loss: Any, error: type[Exception], message: str
) -> None:
    _, prepared, x = classifier(form, classes)
    with pytest.raises(error, match=message):
        ssmquant.sensitivity(prepared, [x], bits=(2,), loss=loss, progress=False)


def test_outputs_of_any_form_with_a_function() -> None:
    _, prepared, x = classifier("pair")
    _, plain, _ = classifier()

    def mse(output: Any, reference: Any) -> Tensor:
        return F.mse_loss(output[0].double(), reference[0].double())

    ours = ssmquant.sensitivity(prepared, [x], bits=(2, 3), loss=mse, progress=False)
    wanted = ssmquant.sensitivity(plain, [x], bits=(2, 3), loss="mse", progress=False)
    assert [r.loss for r in ours.rows] == [r.loss for r in wanted.rows]
    first = ssmquant.sensitivity(
        prepared, [x], bits=(2, 3), loss="mse", forward=lambda model, batch: model(batch)[0], progress=False
    )
    assert first == wanted


def test_weights_that_were_rounded_say_nothing() -> None:
    """They are on the levels of one width, so the others would look as good as float."""
    config = replace(CONFIGS["recommended"], rounding="gptq")
    prepared = prepared_and_calibrated(float_scanner(), config, X)
    with pytest.raises(ConfigError, match="rounding"):
        ssmquant.sensitivity(prepared, [X], bits=(2, 4), progress=False)


def test_looking_at_widths_rounds_no_weights() -> None:
    """A model that is to be rounded, of ranges from training."""
    results = []
    for rounding in ("gptq", "nearest"):
        prepared = ssmquant.prepare(
            float_scanner(), replace(CONFIGS["recommended"], rounding=rounding), example_inputs=(X,)
        )
        prepared.train()(X)
        results.append(ssmquant.sensitivity(prepared, [X], bits=(2, 4), progress=False))
    assert results[0] == results[1]


def test_bad_arguments() -> None:
    _, prepared, x = classifier()
    for bits in ((), (1,), (9,), (2, 2), (2.0,), (True,), 3, "23"):
        with pytest.raises(ConfigError, match="bits"):
            ssmquant.sensitivity(prepared, [x], bits=bits)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no batch"):
        ssmquant.sensitivity(prepared, [])
    with pytest.raises(ConfigError, match="max_batches"):
        ssmquant.sensitivity(prepared, [x], max_batches=0)
    with pytest.raises(CalibrationError, match="reached no quantizer"):
        ssmquant.sensitivity(prepared, [x], bits=(2,), forward=lambda model, batch: prepared(batch))
    weights = prepared_and_calibrated(Classifier().eval(), QConfig.minmax(4, None), x)
    with pytest.raises(ConfigError, match="does not call the model"):
        ssmquant.sensitivity(weights, [x], bits=(2,), forward=lambda model, batch: weights(batch))
    with pytest.raises(ConfigError, match="was not made by"):
        ssmquant.sensitivity(Classifier(), [x])
    with pytest.raises(ConfigError, match="expected a prepared"):
        ssmquant.sensitivity(ssmquant.convert(prepared), [x])
    fresh = ssmquant.prepare(Classifier().eval(), QConfig.minmax(4, 4), example_inputs=(x,))
    with pytest.raises(NotCalibratedError, match=r"ssmquant\.calibrate"):
        ssmquant.sensitivity(fresh, [x])
    nothing = QConfig(w_bits=None, a_bits=None)
    with pytest.raises(ConfigError, match="leaves every site"):
        ssmquant.sensitivity(ssmquant.prepare(Classifier().eval(), nothing, example_inputs=(x,)), [x])


def forward_raising(error: type[BaseException], at: int) -> Callable[[nn.Module, Any], Any]:
    count = [0]

    def forward(model: nn.Module, batch: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            raise error
        return model(batch)

    return forward


@pytest.mark.parametrize(
    ("error", "at"), [(None, 0), (KeyboardInterrupt, 1), (RuntimeError, 3), (KeyboardInterrupt, 7)]
)
def test_nothing_is_changed(error: type[BaseException] | None, at: int) -> None:
    prepared = copy.deepcopy(measured("recommended")[1]).train()
    prepared.stem.eval()
    ssmquant.cuda_graph(prepared)
    prepared.stem.register_forward_hook(lambda *_: None)
    rt = runtime_of(prepared)
    graphs, records = rt.graphs, list(rt.records)
    state = copy.deepcopy(prepared.state_dict())
    modes = [m.training for m in prepared.modules()]
    modules = [id(m) for m in prepared.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in prepared.modules()]
    gradients = [p.grad for p in prepared.parameters()]
    x = images(1, 3, 8, 8, seed=2)
    kept, rng = x.clone(), torch.random.get_rng_state()
    if error is None:
        ssmquant.sensitivity(prepared, [x], bits=(2,), progress=False)
    else:
        with pytest.raises(error):
            ssmquant.sensitivity(prepared, [x], bits=(2,), forward=forward_raising(error, at), progress=False)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(x, kept)
    after = prepared.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) or (v != v).any() for k, v in state.items())
    assert [m.training for m in prepared.modules()] == modes
    assert [id(m) for m in prepared.modules()] == modules
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in prepared.modules()] == hooks
    assert [p.grad for p in prepared.parameters()] == gradients
    assert rt.graphs is graphs
    assert all(a is b for a, b in zip(rt.records, records, strict=True))
    assert rt.instead is None


def test_code_that_writes_into_its_input() -> None:
    class Writing(Classifier):
        def forward(self, x: Tensor) -> Any:
            x.mul_(0.5)
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Writing().eval(), torch.randn(6, 4)
    prepared = prepared_and_calibrated(model, QConfig.minmax(4, 4), x.clone())
    kept = x.clone()
    result = ssmquant.sensitivity(prepared, [x], bits=(3,), progress=False)
    assert torch.equal(x, kept)
    uniform = prepared_and_calibrated(model, QConfig.minmax(3, 3), x.clone())
    with torch.no_grad():
        p, q = model(x.clone()).double().log_softmax(1), uniform(x.clone()).double().log_softmax(1)
    assert result.overall.loss[0] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


def test_the_same_each_time_whatever_was_drawn() -> None:
    class Noisy(Classifier):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + 0.1 * torch.randn_like(x))

    torch.manual_seed(0)
    x = torch.randn(6, 4)
    prepared = prepared_and_calibrated(Noisy().eval(), QConfig.minmax(8, 8), x)
    results = []
    for seed in (1, 1):
        torch.manual_seed(seed)
        results.append(ssmquant.sensitivity(prepared, [x], bits=(8,), progress=False))
    assert results[0] == results[1]
    assert results[0].overall.loss[0] < 1e-3  # 8 bits, and not the noise


def test_plain_data() -> None:
    _, _, result = measured("recommended")
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert Sensitivity.from_dict(json.loads(text)) == result
    lines = str(result).splitlines()
    assert lines[0].split() == ["site", "kind", "PSNR", "2", "PSNR", "4", "SQNR", "2", "SQNR", "4"]
    assert lines[-1].startswith("all sites")
    worst = [next(r for r in result.rows if r.sites[0] == line.split()[0]).loss[0] for line in lines[2:-2]]
    assert worst == sorted(worst, reverse=True)
    assert len(worst) == len(result.rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("rows"),
        lambda d: d.update(more=1),
        lambda d: d.update(bits=[4, 2]),
        lambda d: d.update(bits=[2]),
        lambda d: d.update(rows=3),
        lambda d: d.update(peak="high"),
        lambda d: d["rows"][0].update(loss=[float("nan"), 1.0]),
        lambda d: d["rows"][0].update(loss=["1", 1.0]),
        lambda d: d["rows"][0].update(sites="in_proj"),
        lambda d: d["rows"][0].update(sites=[]),
        lambda d: d["rows"][0].update(sites=[3]),
        lambda d: d["rows"][0].update(kind="table"),
        lambda d: d["rows"][0].update(kind=[]),
        lambda d: d["overall"].update(note=""),
    ],
)
def test_what_to_dict_never_makes(change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(json.dumps(measured("recommended")[2].to_dict()))
    change(data)
    with pytest.raises(ConfigError):
        Sensitivity.from_dict(data)


@pytest.mark.parametrize("data", [None, 3, [], "x"])
def test_what_is_no_mapping(data: Any) -> None:
    with pytest.raises(ConfigError):
        Sensitivity.from_dict(data)
