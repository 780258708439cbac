"""Triton kernels of foreign code: traced without a launch, run by Triton's interpreter in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssmquant
from ssmquant import QConfig, TraceError

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def lines(text: str) -> list[int]:
    source = (Path(__file__).parent / "models_triton.py").read_text().splitlines()
    return [i for i, line in enumerate(source, 1) if line.rstrip().endswith(text)]


def test_a_function_is_traced_without_a_launch() -> None:
    """No GPU and no interpreter: a launch would fail."""
    from tests.patterns.models_triton import Gated, SwishFn, swish_kernel

    launch = type(swish_kernel).run
    model, x = Gated(), torch.randn(2, 5, 4)
    if not torch.cuda.is_available():
        with pytest.raises(Exception, match=r".") as caught:
            SwishFn.apply(x)
        assert not isinstance(caught.value, TraceError)
    prepared = ssmquant.prepare(
        model, QConfig(w_bits=8, a_bits=8, keep_first_last=False), example_inputs=(x,)
    )
    assert [r.name for r in ssmquant.summary(prepared).rows] == ["f", "g"]
    assert [n.op for n in prepared.graph.nodes if "SwishFn" in str(n.target)] == ["call_module"]
    assert type(swish_kernel).run is launch


def test_a_launch_in_the_open_is_refused() -> None:
    from tests.patterns.models_triton import Open, swish_kernel

    launch = type(swish_kernel).run
    with pytest.raises(TraceError, match="Triton") as caught:
        ssmquant.prepare(Open(), QConfig(), example_inputs=(torch.randn(2, 5, 4),))
    (line,) = lines("# the launch")
    assert f"models_triton.py:{line}" in str(caught.value)
    assert "autograd.Function" in str(caught.value)
    assert type(swish_kernel).run is launch


def interpret() -> None:
    """The whole way of a model with a kernel. Runs in the process with the interpreter."""
    import tempfile

    from tests.patterns.models_triton import Gated, Open

    torch.manual_seed(0)
    model = Gated().eval()
    x = torch.randn(2, 5, 4)
    bare = ssmquant.prepare(model, QConfig(), example_inputs=(x,)).eval()
    for shape in ((2, 5, 4), (1, 5, 4), (5, 30, 4)):
        each = torch.randn(shape)
        torch.testing.assert_close(bare(each), model(each), rtol=0, atol=0)
    config = QConfig(w_bits=4, a_bits=4, keep_first_last=False)
    prepared = ssmquant.calibrate(ssmquant.prepare(model, config, example_inputs=(x,)), [x]).eval()
    deployed = ssmquant.convert(prepared)
    assert ssmquant.verify(prepared, deployed, (x,)).worst_rel <= 1e-6
    with tempfile.TemporaryDirectory() as folder:
        ssmquant.save(deployed, Path(folder) / "triton.safetensors")
        loaded = ssmquant.load(Path(folder) / "triton.safetensors", Gated())
    torch.testing.assert_close(loaded(x), deployed(x), rtol=0, atol=0)
    prepared.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prepared.parameters())
    with pytest.raises(TraceError, match="Triton"):
        ssmquant.prepare(Open(), QConfig(), example_inputs=(x,))


def test_interpreted_kernels() -> None:
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
    }  # fmt: skip
    code = "from tests.patterns import test_triton as t; t.interpret()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
