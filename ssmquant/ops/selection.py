"""Which back end the user has chosen, for every operator that has several, and saying once what became of it."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from types import TracebackType

from ssmquant.errors import InputError

__all__ = ["NAMES", "OPERATORS", "VARIABLE", "choices", "note", "passed_over", "selected", "use_backend"]

NAMES = ("auto", "cuda", "triton", "cpu", "chunked", "mamba_ssm")
OPERATORS = ("selective_scan", "causal_conv1d", "quantize", "fuse")
VARIABLE = "SSMQUANT_BACKEND"


class _State:
    """Of the process: what ``use_backend`` has set for an operator (None: for all), and the messages already given."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.names: dict[str | None, str | None] = {}
        self.said: set[str] = set()

    def first_time(self, message: str) -> bool:
        with self.lock:
            new = message not in self.said
            self.said.add(message)
        return new


_STATE = _State()


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise InputError(f"{source}: there is no back end {name!r}; choose one of {', '.join(NAMES)}")
    return name


class use_backend:
    """Choose what computes the operators: from now on, or inside a ``with`` block.

        ssmquant.ops.use_backend("triton")
        with ssmquant.ops.use_backend("mamba_ssm"):
            y = model(x)
        ssmquant.ops.use_backend("chunked", op="quantize")

    The choice is of the process, all threads included, and goes before the environment variable ``SSMQUANT_BACKEND``.
    Where the chosen back end cannot serve a call (other device, dtype or state size, not installed), that call goes to
    the automatic choice, and a warning says so once. Gradients come from the back end that computed the output.
    Code that ``torch.compile`` has compiled keeps the back end of that time.

    Args:
        name: "auto": the fastest one that can serve the call; "cuda": our CUDA kernels; "triton"; "cpu": our C++;
            "chunked": plain PyTorch; "mamba_ssm": the CUDA extensions of the packages mamba-ssm (the selective scan)
            and causal-conv1d (``ops.causal_conv1d``), where they are installed.
        op: for this operator only, before what is chosen for all: "selective_scan", "causal_conv1d", "quantize", the
            fake quantization of training, which has "triton", "cpu" and "chunked" (any other name means "auto"), or
            "fuse", the rewritten graphs of training on a GPU and of deployed models on a CPU, which "chunked" turns
            off.

    Raises:
        InputError: no such name or operator.
    """

    def __init__(self, name: str, op: str | None = None) -> None:
        name = _checked(name, "use_backend")
        if op is not None and op not in OPERATORS:
            raise InputError(f"use_backend: there is no choice for {op!r}, only for {', '.join(OPERATORS)}")
        self.op = op
        with _STATE.lock:
            self.previous = _STATE.names.get(op)
            _STATE.names[op] = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _STATE.lock:
            _STATE.names[self.op] = self.previous


def choices() -> tuple[str, ...]:
    """What ``selected`` says of all operators, "auto" for None and without a check of the variable."""
    names, every = _STATE.names, _STATE.names.get(None) or os.environ.get(VARIABLE, "").strip() or "auto"
    return tuple([names.get(op) or every for op in OPERATORS])


def selected(op: str) -> str | None:
    """The back end that ``use_backend`` or ``SSMQUANT_BACKEND`` names for ``op``; None for the automatic choice.

    Raises:
        InputError: the variable names none that there is.
    """
    names = _STATE.names
    name = names.get(op) or names.get(None)
    if name is None:
        name = os.environ.get(VARIABLE)
        if not name:  # at every call of an operator: not a step more than it takes
            return None
        name = _checked(name.strip() or "auto", VARIABLE)
    return None if name == "auto" else name


def passed_over(op: str, name: str, reason: str) -> None:
    """Warn, once for each message, that the chosen back end does not serve a call of ``op``."""
    message = (
        f"{op}: the chosen back end {name!r} cannot serve this call ({reason}); the automatic choice does"
    )
    if _STATE.first_time(message):
        warnings.warn(message, stacklevel=3)


def note(message: str) -> None:
    """One line on stderr, once for each message."""
    if _STATE.first_time(message):
        print(f"ssmquant: {message}", file=sys.stderr, flush=True)
