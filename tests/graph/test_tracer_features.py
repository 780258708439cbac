"""The tracer as a user sees it: prepared without quantization, a model computes bit for bit what it did before.

``QConfig()`` quantizes nothing, so whatever differs was lost or invented by the tracer. See ``models`` for the cases.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, TraceError
from tests.graph import models
from tests.graph.models import CASES, UNTRACEABLE, Call, Case

BYPASS = QConfig(w_bits=None, a_bits=None)
# Of reentrant checkpoints under no_grad, from the original as well.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(call: Call, seed: int) -> models.Args:
    """The call's arguments, the same for the same seed; floating-point tensors want gradients."""
    torch.manual_seed(seed)
    args, kwargs = call.make()
    for x in tensors((args, kwargs)):
        x.requires_grad_(x.is_floating_point())
    return args, kwargs


def prepared_of(case: Case, model: nn.Module) -> Any:
    args, kwargs = case.calls[0].make()
    return ssmquant.prepare(model, BYPASS, example_inputs=args, example_kwargs=kwargs)


def children(value: Any) -> dict[Any, Any]:
    """What a container holds, by key; {} for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for child in children(value).values():
        yield from tensors(child)


def assert_same(actual: Any, expected: Any, where: str) -> None:
    """Same types, same structure, the same bits."""
    assert type(actual) is type(expected), f"{where}: {type(actual)} instead of {type(expected)}"
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape, where
        assert actual.dtype == expected.dtype, where
        assert actual.requires_grad == expected.requires_grad, (
            f"{where}: requires_grad={actual.requires_grad}"
        )
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}"
        )
    elif children(expected) or isinstance(expected, (dict, list, tuple)):
        assert children(actual).keys() == children(expected).keys(), where
        for key, child in children(expected).items():
            assert_same(children(actual)[key], child, f"{where}[{key!r}]")
    else:
        assert actual == expected, where


def gradients(model: nn.Module, inputs: models.Args, output: Any) -> dict[str, Tensor | None]:
    """Gradients of a loss that weighs every output element differently, for inputs and the model's own parameters."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    losses = [
        (o * torch.rand(o.shape, generator=generator, dtype=o.dtype)).sum()
        for o in tensors(output)
        if o.requires_grad
    ]
    torch.stack([loss.double() for loss in losses]).sum().backward()
    named = {name: p for name, p in model.named_parameters() if not name.startswith("_ssmquant")}
    found = {name: p.grad for name, p in named.items()}
    return found | {f"input {i}": x.grad for i, x in enumerate(tensors(inputs))}


def assert_same_run(prepared: nn.Module, model: nn.Module, call: Call, seed: int, *, backward: bool) -> None:
    """Outputs, gradients, buffers, and what was drawn from the random generator."""
    results = []
    for module in (prepared, model):
        inputs = draw(call, seed)
        torch.manual_seed(seed)
        output = module(*inputs[0], **inputs[1])
        state = torch.get_rng_state()
        found = gradients(module, inputs, output) if backward else {}
        buffers = {n: b.clone() for n, b in module.named_buffers() if not n.startswith("_ssmquant")}
        results.append((output, state, found, buffers))
    (output, state, found, buffers), (output0, state0, found0, buffers0) = results
    assert_same(output, output0, f"{call.name}: output")
    assert torch.equal(state, state0), f"{call.name}: another number of random values was drawn"
    assert_same(found, found0, f"{call.name}: gradient")
    assert_same(buffers, buffers0, f"{call.name}: buffer")


@cases
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_computes_the_same(case: Case, mode: str) -> None:
    """At the example's size and at all others; in eval without gradients, in train with them."""
    model = case.build()
    prepared = prepared_of(case, model)
    model.train(mode == "train")
    prepared.train(mode == "train")
    with torch.set_grad_enabled(mode == "train"):
        for seed, call in enumerate(case.calls):
            assert_same_run(prepared, model, call, seed, backward=mode == "train")
        # Back to the first size: a later graph must not have taken its place.
        assert_same_run(prepared, model, case.calls[0], 99, backward=mode == "train")


@cases
def test_computes_the_same_after_a_change_of_mode(case: Case) -> None:
    """Prepared in train mode, run in eval, back in train."""
    model = case.build().train()
    prepared = prepared_of(case, model)
    assert prepared.training
    for seed, mode in enumerate((False, True, False)):
        model.train(mode)
        prepared.train(mode)
        assert_same_run(prepared, model, case.calls[0], seed, backward=True)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every submodule, containers copied, tensors by identity and version."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            items = (
                dict(value)
                if isinstance(value, dict)
                else list(value)
                if isinstance(value, (list, set))
                else value
            )
            found[f"{name}.{key}"] = items
            for t in tensors(value):
                found[f"{name}.{key} {id(t)}"] = t._version
    return found


@cases
def test_the_original_is_untouched(case: Case) -> None:
    model = case.build()
    inputs = case.calls[0].make()
    before, values = attributes(model), copy.deepcopy(model.state_dict())
    random_states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    prepared = ssmquant.prepare(model, BYPASS, example_inputs=inputs[0], example_kwargs=inputs[1])
    assert (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ) == random_states
    after = attributes(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        # Tensors are compared by identity and version, since == would compare values.
        assert after[key] is value or repr(after[key]) == repr(value), key
    assert_same(dict(model.state_dict()), dict(values), "state_dict")
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in prepared.parameters()}
    assert not shared, "prepared shares parameters with the model"


@cases
def test_is_still_that_module(case: Case) -> None:
    model = case.build()
    prepared = prepared_of(case, model)
    assert isinstance(prepared, type(model))
    assert type(prepared).__name__ == type(model).__name__
    own_signature, signature = (inspect.signature(m.forward).parameters for m in (model, prepared))
    facts = operator.attrgetter("name", "kind", "default")
    assert [*map(facts, signature.values())] == [*map(facts, own_signature.values())]
    names = dict(model.named_modules()).keys()
    assert names <= dict(prepared.named_modules()).keys()
    own = dict(model.named_parameters(remove_duplicate=False))
    ours = dict(prepared.named_parameters(remove_duplicate=False))
    assert own.keys() <= ours.keys()
    tied = {a: [b for b in own if own[b] is own[a]] for a in own}
    assert tied == {a: [b for b in own if ours[b] is ours[a]] for a in own}
    assert model.state_dict().keys() <= prepared.state_dict().keys()


@cases
def test_loads_a_float_checkpoint(case: Case) -> None:
    """Strictly, by name; what is baked from a parameter's value would be stale and must not be."""
    prepared = prepared_of(case, case.build()).eval()
    torch.manual_seed(7)
    other = case.build().eval()
    prepared.load_state_dict(copy.deepcopy(other.state_dict()), strict=True)
    with torch.no_grad():
        assert_same_run(prepared, other, case.calls[0], 0, backward=False)
    with pytest.raises(RuntimeError, match="no_such_key"):
        prepared.load_state_dict({**other.state_dict(), "no_such_key": torch.zeros(1)}, strict=True)


@cases
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(case: Case, how: str) -> None:
    """Before and after it has run; a copy shares no state with what it was copied from."""
    if how == "pickle" and not case.pickles:
        pytest.skip("the original cannot be pickled either")
    model = case.build()
    prepared = prepared_of(case, model)
    for _ in range(2):
        new = copy.deepcopy(prepared) if how == "deepcopy" else pickle.loads(pickle.dumps(prepared))
        assert isinstance(new, type(model))
        before = copy.deepcopy(prepared.state_dict())
        for seed, call in enumerate(case.calls[:3]):
            assert_same_run(new, copy.deepcopy(model) if seed == 0 else model_after(model, case, seed), call, seed,
                            backward=True)  # fmt: skip
        assert_same(dict(prepared.state_dict()), dict(before), "the copy changed what it was copied from")
        args, kwargs = draw(case.calls[0], 0)
        model(*args, **kwargs)
        args, kwargs = draw(case.calls[0], 0)
        prepared(*args, **kwargs)


def model_after(model: nn.Module, case: Case, runs: int) -> nn.Module:
    """A copy of ``model`` that has seen the first ``runs`` calls."""
    new = copy.deepcopy(model)
    for seed, call in enumerate(case.calls[:runs]):
        args, kwargs = draw(call, seed)
        torch.manual_seed(seed)
        new(*args, **kwargs)
    return new


COMPILED = {name: case for name, case in CASES.items() if case.compiles}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of Functions
def test_compiles_without_a_break(case: Case) -> None:
    """At the example's size at once; at another one after an eager call, as Dynamo cannot run the tracer."""
    model = case.build().eval()
    prepared = prepared_of(case, model).eval()
    compiled = torch.compile(prepared, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed, call in enumerate(case.calls[:3]):
            args, kwargs = draw(call, seed)
            if seed:
                prepared(*args, **kwargs)
            # Dynamo decomposes attention, which moves the last bit.
            torch.testing.assert_close(
                compiled(*args, **kwargs), model(*args, **kwargs), rtol=1e-5, atol=1e-6
            )


# ---- single promises -----------------------------------------------------------------------------------------------


def test_batch_norm_counts_each_batch_once() -> None:
    prepared = prepared_of(CASES["batch norm"], models.BatchNorm())
    assert prepared.norm.num_batches_tracked == 0
    prepared.train()
    for n in range(1, 4):
        prepared(torch.randn(2, 4, 5 + n, 5))
        assert prepared.norm.num_batches_tracked == n
    prepared.eval()
    prepared(torch.randn(2, 4, 5, 5))
    assert prepared.norm.num_batches_tracked == 3


def test_a_submodule_frozen_by_hand() -> None:
    """``.eval()`` on a part of a model in training, after prepare."""
    model = models.BatchNorm()
    prepared = prepared_of(CASES["batch norm"], model)
    for seed in range(2):
        for module in (model, prepared):
            module.train()
            module.norm.eval()
        assert_same_run(prepared, model, CASES["batch norm"].calls[0], seed, backward=True)
    assert prepared.norm.num_batches_tracked == 0


def test_a_mode_dependent_module_frozen_by_hand() -> None:
    model = models.StochasticDepth()
    prepared = prepared_of(CASES["stochastic depth"], model)
    for seed, part in enumerate(("drop_path", "skip_path")):
        for module in (model, prepared):
            module.train()
            module.get_submodule(part).eval()
        assert_same_run(prepared, model, CASES["stochastic depth"].calls[0], seed, backward=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_kept(reentrant: bool) -> None:
    """The blocks run once in the forward and once more in the backward, and their activations are not kept."""
    counts, kept = [], []
    model = models.Checkpointed(reentrant)
    for module in (model, prepared_of(CASES["checkpoint, reentrant"], model)):
        module.train()
        ran: list[int] = []
        saved: list[int] = []

        def save(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel())
            return t

        for i, block in enumerate(module.blocks):
            block.proj.register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i))
        x = torch.randn(2, 4, 16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            y = module(x)
        forward = list(ran)
        y.sum().backward()
        counts.append((forward, ran))
        kept.append(sum(saved))
    assert counts[0] == counts[1]
    assert counts[1] == ([0, 1], [0, 1, 1, 0])
    assert kept[1] <= kept[0], "the prepared model keeps more activations than the original"


def test_a_parameter_baked_as_a_number_is_reported() -> None:
    notes = " ".join(
        ssmquant.summary(prepared_of(CASES["parameter as a number"], models.ParameterAsNumber())).notes
    )
    assert "k" in notes.split() or "'k'" in notes, f"summary has no note on the parameter k: {notes!r}"


@pytest.mark.parametrize("cls", UNTRACEABLE)
def test_data_dependent_python_is_refused(cls: type[nn.Module]) -> None:
    """The error names the file and the line of the user's code, and leaves the model as it was."""
    lines, start = inspect.getsourcelines(cls)
    line = start + next(i for i, text in enumerate(lines) if text.rstrip().endswith("# the line"))
    model = cls()
    before = attributes(model)
    with pytest.raises(TraceError) as caught:
        ssmquant.prepare(model, BYPASS, example_inputs=(torch.randn(2, 4, 6, 5),))
    assert f"{models.__file__}:{line}" in str(caught.value)
    assert attributes(model).keys() == before.keys()
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module", "a patch was left behind"
    with torch.no_grad():
        model(torch.randn(2, 4, 6, 5))  # still runs


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    """A wrong example is the user's own exception, and the patches are undone."""
    with pytest.raises(Exception, match="channels"):
        ssmquant.prepare(models.FormatsSizes(), BYPASS, example_inputs=(torch.randn(2, 3, 6, 5),))
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"
    assert models.FormatsSizes()(torch.randn(2, 4, 6, 5)).shape == (2, 4, 6, 5)


class Features(models.Image):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((2, 3))


def test_another_method() -> None:
    model = Features()
    prepared = ssmquant.prepare(
        model, BYPASS, example_inputs=(torch.randn(2, 4, 6, 5),), method="forward_features"
    )
    x = torch.randn(3, 4, 9, 5)
    assert torch.equal(prepared.forward_features(x), model.forward_features(x))
    assert torch.equal(prepared(x), model(x))


def test_a_forward_set_on_the_instance() -> None:
    model = Features()
    model.forward = model.forward_features  # type: ignore[method-assign]
    prepared = ssmquant.prepare(model, BYPASS, example_inputs=(torch.randn(2, 4, 6, 5),))
    x = torch.randn(3, 4, 9, 5)
    assert torch.equal(prepared(x), model(x))


def test_wrong_calls_fail_like_the_original() -> None:
    prepared = prepared_of(CASES["flags"], models.Flags())
    with pytest.raises(TypeError, match="no_such"):
        prepared(torch.randn(2, 4, 6, 5), no_such=1)
    with pytest.raises(TypeError, match="missing"):
        prepared()
