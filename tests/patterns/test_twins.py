"""What every pattern of the field's codebases must survive: tracing, coverage, 8 and 4 bits, training, deployment.

The twins stand in the ``models_*`` modules.
"""

from __future__ import annotations

import copy
import fnmatch
from pathlib import Path

import pytest
import torch

import ssmquant
from ssmquant.graph.runtime import runtime_of
from tests.patterns.steps import TWINS, calibrated, call, close, floated, named, sqnr, tensors

twins = pytest.mark.parametrize("name", TWINS)


# ---- with nothing quantized ----------------------------------------------------------------------------------------


@torch.no_grad()
def computes_the_same(name: str) -> None:
    twin = TWINS[name]
    model, prepared, _ = floated(name)
    assert isinstance(prepared, type(model))
    for args in twin.calls():
        close(call(prepared, args), call(model, args), twin.tolerance)
    args = twin.args(seed=9)  # back to the first size
    close(call(prepared, args), call(model, args), twin.tolerance)


def has_the_same_gradients(name: str) -> None:
    """In training mode, with nothing quantized."""
    twin = TWINS[name]
    found = []
    for model in map(copy.deepcopy, floated(name)[:2]):
        outs = [t for t in tensors(call(model.train(), twin.args(seed=4))) if t.requires_grad]
        torch.stack([(t * t.detach().cos()).sum() for t in outs]).sum().backward()
        found.append(
            {n: p.grad for n, p in model.named_parameters() if not n.startswith(("_ssmquant", "_adopted"))}
        )
    theirs, ours = found
    assert [n for n, g in ours.items() if g is None] == [n for n, g in theirs.items() if g is None]
    largest = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    for n, grad in theirs.items():
        if grad is not None:  # some are zero but for rounding, as that of a bias in front of a norm
            bound = max(20 * twin.tolerance, 1e-6) * float(grad.abs().max()) + 1e-6 * largest
            assert (ours[n] - grad).abs().max() <= bound, n


def has_the_same_keys(name: str) -> None:
    twin = TWINS[name]
    model, prepared, _ = floated(name)
    added = [k for k in prepared.state_dict() if k not in model.state_dict()]
    assert [k for k in prepared.state_dict() if k in model.state_dict()] == list(model.state_dict())
    assert all(k.startswith(("_ssmquant.", "_adopted.")) for k in added)
    assert any(k.startswith("_adopted.") for k in added) == (twin.adopted > 0)
    other = twin.model(seed=3)
    loaded = copy.deepcopy(prepared)
    loaded.load_state_dict(copy.deepcopy(other.state_dict()), strict=True)
    args = twin.args(seed=4)
    with torch.no_grad():
        close(call(loaded, args), call(other, args), twin.tolerance)


def leaves_the_original_alone(name: str) -> None:
    model, prepared, before = floated(name)
    state = model.state_dict()
    assert state.keys() == before["state"].keys()
    for key, value in before["state"].items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)
    for n, mod in model.named_modules():
        assert vars(mod).keys() == before["attributes"][n].keys(), n
    assert {n: p._version for n, p in named(model).items()} == before["versions"]
    assert all(p.grad is None for p in model.parameters())
    ours = {p.untyped_storage().data_ptr() for p in prepared.parameters()}
    assert not ours & {p.untyped_storage().data_ptr() for p in model.parameters()}


def finds_every_site(name: str) -> None:
    twin = TWINS[name]
    summary = ssmquant.summary(floated(name)[1])
    assert [r.name for r in summary.rows] == list(twin.sites)
    assert len([r for r in summary.rows if r.kind == "scan"]) == twin.scans
    assert summary.uncovered == ()
    # Fused Functions are unfolded; one that is a scan, or only moves data, stays.
    kept = [k.rpartition(".")[2] for k in runtime_of(floated(name)[1]).functions]
    assert {k.rpartition("/")[2] for k in kept} <= {
        "SelectiveScanFn",
        "SelectiveScanOflex",
        "CrossScan",
        "CrossMerge",
    }


@twins
def test_traced(name: str) -> None:
    """One test, so that several workers do not each trace the same twin."""
    computes_the_same(name)
    has_the_same_gradients(name)
    has_the_same_keys(name)
    leaves_the_original_alone(name)
    finds_every_site(name)


# ---- quantized -----------------------------------------------------------------------------------------------------


@twins
@torch.no_grad()
def test_eight_bits(name: str) -> None:
    """Everything is quantized, and close to the original on what the calibration has not seen."""
    twin = TWINS[name]
    model, prepared = twin.model(), calibrated(name, "w8")
    rows = ssmquant.summary(prepared).rows
    floats = [r.name for r in rows if r.scheme == "float"]
    assert floats == [n for n in twin.sites if any(fnmatch.fnmatch(n, p) for p in twin.keep)]
    assert [r.note for r in rows if r.kind == "scan"] == [twin.note] * twin.scans
    for seed in (20, 21, 22):
        args = twin.args(seed=seed)
        found = sqnr(call(prepared, args), call(model, args))
        assert 20 <= found < 80, f"{found:.1f} dB"


def trains(name: str) -> None:
    twin = TWINS[name]
    prepared = copy.deepcopy(calibrated(name, "w4")).train()
    groups = ssmquant.param_groups(prepared, lr=1e-3)
    optimizer = torch.optim.SGD(groups)
    args, kwargs = twin.args(seed=5)
    outs = [t for t in tensors(prepared(*args, **kwargs)) if t.requires_grad]
    torch.stack([t.float().square().mean() for t in outs]).sum().backward()
    scalars = dict(runtime_of(prepared).named_parameters())
    assert scalars
    assert [k for k, p in scalars.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert any(bool(p.grad.abs().sum() > 0) for p in scalars.values())
    own = [p for n, p in prepared.named_parameters() if not n.startswith("_ssmquant.") and p.grad is not None]
    assert own
    assert all(bool(p.grad.isfinite().all()) for p in own)
    optimizer.step()
    with torch.no_grad():
        assert all(
            bool(t.isfinite().all()) for t in tensors(prepared(*args, **kwargs)) if t.is_floating_point()
        )


@torch.no_grad()
def deploys(name: str, folder: Path) -> None:
    twin = TWINS[name]
    prepared = calibrated(name, "w4")
    deployed = ssmquant.convert(prepared)
    args, kwargs = twin.args(seed=6)
    torch.manual_seed(0)
    report = ssmquant.verify(prepared, deployed, args, **kwargs)
    assert [r.name for r in report.rows if r.max_rel > 1e-6] == []
    ssmquant.save(deployed, folder / "twin.safetensors")
    loaded = ssmquant.load(folder / "twin.safetensors", twin.model(seed=8))
    args = twin.args(seed=7)
    out = call(deployed, args)
    close(call(loaded, args), out, 0.0)
    close(out, call(prepared, args), 1e-4)
    if twin.elsewhere:  # where that is traced anew, then without the parameters
        args = twin.args(shape=len(twin.shapes) - 1, seed=8)
        close(call(loaded, args), call(prepared, args), 1e-4)


@twins
def test_four_bits(name: str, tmp_path: Path) -> None:
    """The default placement: a step of training, and what is left of it after convert, save and load."""
    trains(name)
    deploys(name, tmp_path)
