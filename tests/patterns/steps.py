"""The table of twins, and the steps that their tests share: each is made once for a twin and a configuration."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ssmquant
from ssmquant import QConfig
from ssmquant.graph import runtime
from tests.patterns import (
    models_adventurer,
    models_hf,
    models_irv2,
    models_lbmamba,
    models_local,
    models_mhsvm,
    models_mil,
    models_plain,
    models_resvmamba,
    models_ss2d,
    models_unet,
    models_vim,
)
from tests.patterns.twin import Args, Twin

__all__ = ["FLOAT", "TWINS", "W4", "W8", "calibrated", "call", "close", "floated", "named", "sqnr", "tensors"]

MODULES = (
    models_adventurer, models_hf, models_irv2, models_lbmamba, models_local, models_mhsvm,
    models_mil, models_plain, models_resvmamba, models_ss2d, models_unet, models_vim,
)  # fmt: skip
TWINS: dict[str, Twin] = {t.name: t for module in MODULES for t in module.TWINS}
FLOAT = QConfig()
W4 = QConfig(w_bits=4, a_bits=4)
# LSQ's starting step is meant for training: weights of 8 bits start better from min and max.
W8 = QConfig(
    w_bits=8,
    a_bits=8,
    weight="minmax",
    activation="lsq",
    scan="minmax",
    keep_first_last=False,
    keep_gates=False,
)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def call(model: nn.Module, args: Args) -> list[Any]:
    """The leaves of what a call returns. Arguments are copied, and draws in forward are the same every time."""
    positional, keywords = copy.deepcopy(args)
    torch.manual_seed(0)
    return pytree.tree_leaves(model(*positional, **keywords))


def close(outs: list[Any], wanted: list[Any], tolerance: float) -> None:
    """Equal, or, where there is a tolerance, within it relative to the largest value."""
    assert len(outs) == len(wanted)
    for a, b in zip(outs, wanted, strict=True):
        assert type(a) is type(b)
        if not isinstance(b, Tensor):
            assert a == b
        elif tolerance and b.is_floating_point():
            assert a.shape == b.shape
            assert (a - b).abs().max() <= tolerance * b.abs().max()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def sqnr(outs: list[Any], wanted: list[Any]) -> float:
    """Of the first tensor, in dB."""
    a, b = (next(t for t in o if isinstance(t, Tensor)).double() for o in (outs, wanted))
    noise = float((a - b).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(b.square().sum()) / noise)


@contextlib.contextmanager
def adopting(twin: Twin) -> Iterator[None]:
    """Where modules are made in forward, exactly so many warnings say so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len([w for w in caught if "_adopted" in str(w.message)]) == twin.adopted
    assert len(caught) == twin.adopted, [str(w.message) for w in caught]


TRACES: dict[str, list[Any]] = {}


@contextlib.contextmanager
def traced_once(twin: Twin) -> Iterator[None]:
    """How a model is traced does not depend on how it is quantized, and takes longest: traces serve all configurations.

    Copies of a prepared model share their traces as well. Loading, and calls of other sizes, trace for themselves.
    """
    known = TRACES.setdefault(twin.name, [])
    first, later, original = not known or twin.adopted > 0, iter(list(known)), runtime.trace

    def trace(run: Any, shapes: Any) -> Any:
        if not first:
            return next(later)
        known.append(original(run, shapes))
        return known[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "trace", trace)
        yield
    assert first or next(later, None) is None


def prepare(twin: Twin, config: QConfig, model: nn.Module | None = None) -> Any:
    args, kwargs = twin.args()
    with adopting(twin), traced_once(twin), torch.enable_grad():
        prepared = ssmquant.prepare(
            twin.model() if model is None else model, config, example_inputs=args, example_kwargs=kwargs
        )
    return prepared


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@functools.cache
def floated(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The original, prepared without quantization, and what the original was before."""
    twin = TWINS[name]
    model = twin.model()
    before = {
        "state": copy.deepcopy(model.state_dict()),
        "attributes": {n: dict(vars(m)) for n, m in model.named_modules()},
        "versions": {n: p._version for n, p in named(model).items()},
    }
    return model, prepare(twin, FLOAT, model), before


@functools.cache
def calibrated(name: str, config: str) -> Any:
    """Prepared for "w8" or "w4" and calibrated. Shared: copy it before changing it."""
    twin = TWINS[name]
    prepared = prepare(twin, W4 if config == "w4" else dataclasses.replace(W8, keep_float=twin.keep))

    def forward(model: nn.Module, seed: int) -> Any:
        args, kwargs = twin.args(seed=seed)
        torch.manual_seed(0)
        return model(*args, **kwargs)

    # Values pooled over an image or a bag are few: what no draw has shown is clipped, at a greater loss than 8 bits.
    return ssmquant.calibrate(prepared, range(16 if config == "w8" else 2), forward=forward).eval()
