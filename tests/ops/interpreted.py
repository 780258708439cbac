"""Runs functions in a process with Triton's interpreter, since Triton reads TRITON_INTERPRET once, when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

ROOT = __file__.rsplit("/tests/", 1)[0]


def make_interpreter_work() -> None:
    """NumPy 2.4 no longer converts an array of one element to an int, which Triton 3.6 relies on."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def in_process(module: str, call: str, **environment: str) -> None:
    """``tests.ops.<module>.<call>`` in a process of its own, which has to succeed."""
    code = f"import torch; torch.manual_seed(0); from tests.ops import {module} as t; t.{call}"
    path = os.pathsep.join([ROOT, *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
