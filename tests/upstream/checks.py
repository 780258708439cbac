"""What is asked of every family. Each check returns plain data; ``test_upstream`` says what is good enough."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssmquant
from ssmquant import Adapter, ConfigError, QConfig, zoo
from ssmquant.adapter import find_adapter
from ssmquant.graph.runtime import runtime_of
from ssmquant.graph.sites import ancestors
from tests.upstream.memory import Peak
from tests.upstream.state import Data, State, attempt, difference, sqnr

__all__ = ["CHEAP", "CHECKS", "refusal"]

ROOT = Path(__file__).resolve().parents[2]
PRESETS: dict[str, Callable[[int], QConfig]] = {
    "default": lambda bits: QConfig(w_bits=bits, a_bits=bits),
    "minmax": lambda bits: QConfig.minmax(bits, bits),
    "lsq": lambda bits: QConfig.lsq(bits, bits),
}


def build(state: State) -> Data:
    """Does the code import, build and run, and is it repeatable?"""
    with torch.no_grad():
        model = state.kept["model"] = state.build()
        first, second = state.call(model, state.batch()), state.call(model, state.batch())
    finite = all(t.isfinite().all().item() for t in first if t.is_floating_point())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "outputs": [list(t.shape) for t in first],
        "finite": finite,
        "repeatable": difference(second, first) == 0,
    }


def trace(state: State) -> Data:
    """Tracing: time, memory beyond the model's own copy, size of the graph; and the user's model after it."""
    model = state.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        wanted = state.call(model, state.batch())
    with Peak() as peak:
        state.kept["float"] = state.prepare(QConfig())
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20
    after = model.state_dict()
    with torch.no_grad():
        again = state.call(model, state.batch())
    same = before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    prepared = state.kept["float"]
    copied = {k for k in prepared.state_dict() if not k.startswith(("_ssmquant.", "_adopted."))}
    loads = attempt(lambda: (prepared.load_state_dict(model.state_dict()), {})[1])[1]
    return {
        "seconds": round(peak.seconds, 2),
        "peak_mib": round(peak.mib, 1),
        "weights_mib": round(weights, 1),
        "nodes": len(prepared.graph.nodes),
        "graphs": len(runtime_of(prepared).records),
        "free": sorted(map(list, runtime_of(prepared).records[0].trace.free)),
        "original_unchanged": same
        and names == {name: set(vars(m)) for name, m in model.named_modules()}
        and difference(again, wanted) == 0,
        "same_keys": copied == set(before),
        "adopted": sum(k.startswith("_adopted.") for k in prepared.state_dict()),
        "checkpoint": loads or "loads",
        "notes": runtime_of(prepared).notes,
    }


def exact(state: State) -> Data:
    """The traced forward against the original one, nothing quantized: relative difference by input."""
    prepared, model = state.kept["float"].eval(), state.model
    out: Data = {}
    shapes = state.family.shapes[state.size]
    cases = [(n, 0) for n in state.family.batches] + [
        (state.family.batches[0], i) for i in range(1, len(shapes))
    ]
    for n, i in cases:
        x = state.batch(n, i, seed=3)
        with torch.no_grad():
            out["x".join(map(str, x.shape))] = difference(state.call(prepared, x), state.call(model, x))
    out["graphs"] = len(runtime_of(prepared).records)
    return out


def exact_training(state: State) -> Data:
    """The same in training mode, under the same seed, gradients included."""
    prepared, model = copy.deepcopy(state.kept["float"]).train(), copy.deepcopy(state.model).train()
    x = state.batch(seed=4)
    outs, wanted = state.call(prepared, x), state.call(model, x)
    result = {"outputs": difference(outs, wanted)}
    for o in (outs, wanted):
        sum(t.square().mean() for t in o if t.requires_grad).backward()  # type: ignore[union-attr]
    pairs = dict(prepared.named_parameters())
    grads = [(pairs[n].grad, p.grad) for n, p in model.named_parameters()]
    result["gradients_missing"] = sum((a is None) != (b is None) for a, b in grads)
    both = [(a, b) for a, b in grads if a is not None and b is not None]
    top = max((b.abs().max().item() for _, b in both), default=1.0)
    result["gradients"] = max(((a - b).abs().max().item() / top for a, b in both), default=0.0)
    return result


def coverage(state: State) -> Data:
    """Which parameters reach a product, and which of them are quantized where nothing is asked to stay in float.

    No adapter: it could ask that.
    """
    keep = tuple(state.family.exceptions)
    config = QConfig.minmax(8, 8, keep_first_last=False, keep_gates=False, keep_float=keep)
    prepared = state.prepare(config, Adapter(name="none"))
    records = runtime_of(prepared).records
    plan = records[0].plan
    sizes = {n: p.numel() for n, p in state.model.named_parameters()}
    weights = {s.parameter for s in plan.sites if s.parameter}
    quantized = {p.parameter for p in plan.points if p.what == "weight" and p.parameter}
    static = {
        str(n.target)
        for p in plan.points
        if p.what == "static"
        for n in ancestors(p.node)
        if n.op == "get_attr"
    }
    listed = {p.name: p.reason for p in plan.parameters}
    must = {p.name for p in plan.parameters if p.must_cover}
    used = with_gradient(state)
    matrices = {n for n in used if state.model.get_parameter(n).dim() >= 2}
    reach = (weights | must) & sizes.keys()
    covered = sum(sizes[n] for n in reach & quantized)
    return {
        "sites": dict(Counter(s.kind for s in plan.sites)),
        "float_sites": plan.floats,
        "float_parameters": dict(Counter(listed.values())),
        "uncovered": sorted(must),
        "percent": round(100 * covered / max(1, sum(sizes[n] for n in reach)), 2),
        "percent_of_all": round(100 * covered / sum(sizes.values()), 2),
        "mixer_weights": sum(_is_mixer(n) for n in matrices),
        "mixer_missed": sorted(n for n in matrices if _is_mixer(n) and n not in quantized),
        "unaccounted": sorted(matrices - weights - static - listed.keys()),
        "unused": len(sizes) - len(used),
    }


def _is_mixer(name: str) -> bool:
    words = ("in_proj", "out_proj", "x_proj", "dt_proj", "ssproj", "conv1d")
    return any(w in name for w in words) and not name.endswith("bias")


def with_gradient(state: State) -> set[str]:
    """Parameters that the output depends on, found by autograd and not by us."""
    model = copy.deepcopy(state.model)
    outs = state.call(model, state.batch())
    sum(t.square().mean() for t in outs if t.requires_grad).backward()  # type: ignore[union-attr]
    return {n for n, p in model.named_parameters() if p.grad is not None}


def calibrated(state: State, config: QConfig) -> Any:
    prepared = state.prepare(config)

    def forward(model: nn.Module, x: Tensor) -> None:
        state.call(model, x)

    batches = [state.batch(seed=10 + i) for i in range(3)]
    return ssmquant.calibrate(prepared, batches, forward=forward, progress=False).eval()


def w8a8(state: State) -> Data:
    """Eight bits after calibration, on batches that it has not seen: the first output's SQNR.

    ``noisy``: the same of the float model with noise on its weights, 40 dB below them, as eight bits leave. Models
    that normalize near-empty tokens amplify any noise: there this is the measure.
    """
    batches = [state.batch(seed=20 + i) for i in range(4)]
    noisy = copy.deepcopy(state.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.is_floating_point() and p.dim() >= 2:
                p.add_(0.01 * p.square().mean().sqrt() * torch.randn_like(p))
        wanted = [state.call(state.model, x)[0] for x in batches]
        out: Data = {"noisy": sqnr([state.call(noisy, x)[0] for x in batches], wanted)}
        for preset, config in PRESETS.items():
            model = calibrated(state, config(8))
            out[preset] = sqnr([state.call(model, x)[0] for x in batches], wanted)
    return out


def mambaquant(state: State) -> Data:
    """MambaQuant's preset: what it rewrites and what not, whether that keeps the float function, deployed sites.

    ``function``: relative difference between the rewritten float model and the original one. ``silent``: transforms of
    which the model says neither that they apply nor why not.
    """
    names = QConfig.mambaquant().transforms
    changed = calibrated(state, QConfig(transforms=names))
    prepared = calibrated(state, QConfig.mambaquant(8, 8))
    done = runtime_of(prepared).transforms
    batches = [state.batch(seed=20 + i) for i in range(4)]
    with torch.no_grad():
        wanted = [state.call(state.model, x) for x in batches]
        function = max(difference(state.call(changed, x), y) for x, y in zip(batches, wanted, strict=True))
    report = ssmquant.verify(prepared, ssmquant.convert(prepared), (batches[0],), **state.family.kwargs)
    kinds = {*(kind for kind, _, _ in done.applied), *(s.kind for s in done.skipped)}
    return {
        "function": function,
        "applied": dict(Counter(kind for kind, _, _ in done.applied)),
        "skipped": dict(Counter(f"{s.kind}: {s.reason}" for s in done.skipped)),
        "silent": sorted(n for n in names if ("dt" if n.startswith("dt_") else n) not in kinds),
        "worst": report.worst_rel,
    }


def w4a4(state: State) -> Data:
    """One training step at four bits: gradients of every quantizer's scalars."""
    prepared = state.kept["w4a4"] = calibrated(state, PRESETS["default"](4)).train()
    optimizer = torch.optim.AdamW(ssmquant.param_groups(prepared, 1e-4))
    before = {n: p.detach().clone() for n, p in prepared.named_parameters()}
    outs = [t for t in state.call(prepared, state.batch(seed=30)) if t.requires_grad]
    g = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=g)).mean() + t.square().mean() for t in outs)
    loss.backward()  # type: ignore[union-attr]
    scalars = [(n, p.grad) for n, p in prepared.named_parameters() if n.startswith("_ssmquant.")]
    own = [(n, p.grad) for n, p in prepared.named_parameters() if not n.startswith("_ssmquant.")]
    optimizer.step()
    return {
        "loss": float(loss),
        "scalars": len(scalars),
        "none": [n for n, g in scalars if g is None],
        "not_finite": [n for n, g in (*scalars, *own) if g is not None and not g.isfinite().all()],
        "zero": dict(Counter(n.rpartition(".")[2] for n, g in scalars if g is not None and not g.any())),
        "moved": sum(not torch.equal(before[n], p) for n, p in prepared.named_parameters()),
        "finite_after": all(p.isfinite().all().item() for p in prepared.parameters()),
    }


def deploy(state: State) -> Data:
    """Convert, compare, save, load: the trained four-bit model."""
    if "w4a4" not in state.kept:
        raise ConfigError("there is no trained model: w4a4 failed")
    prepared = state.kept["w4a4"].eval()
    deployed = ssmquant.convert(prepared)
    x = state.batch(seed=40)
    torch.manual_seed(5)
    report = ssmquant.verify(prepared, deployed, (x,), **state.family.kwargs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model.safetensors"
        ssmquant.save(deployed, file)
        again = ssmquant.load(file, state.build(seed=1))
        wanted = state.call(deployed, x)
        size = file.stat().st_size
        other = state.batch(seed=41, shape=-1)
        return {
            "sites": len(report.rows),
            "worst": report.worst_rel,
            "whole": difference(wanted, state.call(prepared, x)),
            "reloaded_equal": difference(state.call(again, x), wanted) == 0
            and difference(state.call(again, other), state.call(deployed, other)) == 0,
            "bytes": size,
            "float_bytes": sum(t.numel() * t.element_size() for t in state.model.state_dict().values()),
        }


def zoo_model(state: State) -> Data:
    """Our own model of this family, if there is one, takes the original's weights and computes the same."""
    config = state.family.zoo.get(state.size)
    if config is None:
        return {}
    ours = zoo.build(config).eval()
    error = attempt(lambda: (ours.load_state_dict(state.model.state_dict()), {})[1])[1]
    worst = 0.0
    for i in range(len(state.family.shapes[state.size])):
        x = state.batch(shape=i, seed=6)
        with torch.no_grad():
            worst = max(worst, difference(state.call(ours, x), state.call(state.model, x)))
    return {"checkpoint": error or "loads", "worst": worst}


def adapter(state: State) -> Data:
    """Lines of the adapter that knows the family's class. ``coverage`` did without it."""
    found = find_adapter(state.model)
    if found is None:
        return {"name": None, "lines": 0}
    text = (ROOT / "adapters" / f"{found.name}.py").read_text().splitlines()
    return {"name": found.name, "lines": sum(bool(line.strip()) for line in text)}


def refusal(state: State) -> Data:
    """What says that a family does not work: the stage, and the text of the error."""
    for stage, job in (("build", build), ("prepare", trace)):
        _, error = attempt(lambda job=job: job(state))  # type: ignore[misc]
        if error is not None:
            return {"stage": stage, "error": error}
    return {"stage": None, "error": ""}


CHECKS: dict[str, Callable[[State], Data]] = {
    "build": build, "trace": trace, "exact": exact, "exact_training": exact_training, "coverage": coverage,
    "w8a8": w8a8, "mambaquant": mambaquant, "w4a4": w4a4, "deploy": deploy, "zoo": zoo_model,
    "adapter": adapter,
}  # fmt: skip
CHEAP = ("build", "trace", "exact", "coverage", "zoo", "adapter")
