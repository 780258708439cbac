"""What every test gets: the same seeds, one thread a worker, an unchanged default dtype, a clean Dynamo cache."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from ssmquant import QConfig
from ssmquant.ops import use_backend
from tests.small import images, prepared_and_calibrated, tiny_mambair

ROOT = Path(__file__).resolve().parent.parent

# Inductor keeps the fake kernel of an op that has since been mended (notes: kernels), so no cache between runs.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

# Failing examples are remembered where pytest keeps its own cache, not in a folder of their own.
hypothesis.configuration.set_hypothesis_home_dir(ROOT / ".pytest_cache" / "hypothesis")
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=30)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed all generators before a test; afterwards restore what torch keeps globally."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if "torch._dynamo" in sys.modules:  # else tests share one recompilation limit
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def photos_dir() -> Path:
    """The photographs that come with the examples."""
    return ROOT / "examples" / "photos"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Benchmark and training images beside the repository, which may not be redistributed with it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture
def plain_graphs() -> Iterator[None]:
    """Deployed graphs as they were traced, whose results equal the prepared ones' bit for bit."""
    with use_backend("chunked", op="fuse"):
        yield


@pytest.fixture(scope="module")
def mambair() -> Any:
    """A calibrated W4A4 MambaIR; tests copy it."""
    torch.manual_seed(0)
    model = tiny_mambair()
    return prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), images(2, 3, 8, 10))
