"""What tests of kernels get."""

from __future__ import annotations

import pytest

from ssmquant.ops import nvrtc
from tests.ops import emulator
from tests.ops.deployed_cuda import emulated, poison


@pytest.fixture(params=[False, True], ids=["", "late"])
def by_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA kernels run on the CPU, in memory that is NaN where nothing has been written."""
    if emulator.COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    monkeypatch.setattr(nvrtc, "load", lambda source, _: emulated(source, request.param))
    poison(monkeypatch.setattr)
