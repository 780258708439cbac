"""Fixtures of the tests of graphs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from ssmquant.modules import deployed
from tests.graph.deployed import PLAIN


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Compares every call of a kernel, on the values that it gets, with what it stands for."""
    calls = dict.fromkeys(PLAIN, 0)
    inside = False

    def watch(name: str) -> None:
        real, plain = getattr(deployed, name), PLAIN[name]

        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            if inside:
                return real(*args, **kwargs)  # type: ignore[no-any-return]
            inside = True
            got, want = real(*args, **kwargs), plain(*args, **kwargs)
            inside = False
            calls[name] += 1
            assert got.shape == want.shape
            # Codes may differ where a value is on a tie: few of them do, by one step, which a scan carries on.
            error = (got - want).abs()
            assert float(error.norm() / want.norm().clamp(min=1e-6)) < 0.05, name
            if not name.endswith("_core"):
                assert float((error > 1e-5 * want.abs().amax()).float().mean()) < 0.02, name
            return got  # type: ignore[no-any-return]

        monkeypatch.setattr(deployed, name, call)

    for name in PLAIN:
        watch(name)
    return calls
