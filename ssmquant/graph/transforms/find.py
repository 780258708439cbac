"""All transforms of a model that apply, and of those that do not the reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ssmquant.graph.transforms.candidates import Candidate, Skipped, View
from ssmquant.graph.transforms.residual import residuals
from ssmquant.graph.transforms.scales import conv_inputs, gates, scan_inputs, states
from ssmquant.graph.transforms.turns import low_ranks, out_rotations

__all__ = ["WHOLE", "find_transforms"]

_FINDERS: dict[str, Callable[[View], tuple[Sequence[Candidate], list[Skipped]]]] = {
    "conv_input": conv_inputs,
    "scan_input": scan_inputs,
    "gate": gates,
    "state": states,
    "dt": low_ranks,
    "out_rotation": out_rotations,
    "residual_rotation": residuals,
}
_NOTHING = {
    "conv_input": "no convolution reads the outputs of a projection by moves alone",
    "scan_input": "there is no scan",
    "gate": "no norm behind a scan leads to projections of the scan's output",
    "state": "there is no scan",
    "dt": "there is no scan",
    "out_rotation": "no projection reads a scan's output",
    "residual_rotation": "there is no layer or RMS norm with weights of its own; one that the code computes from other "
    "operators is not recognised",
}
"""Why a whole model has nothing of a kind, neither where it applies nor where it nearly does."""
WHOLE = "(model)"
"""Stands for the site where a reason is the whole model's."""


def find_transforms(
    view: View, kinds: Collection[str] | None = None
) -> tuple[list[Candidate], list[Skipped]]:
    """Where transforms of these kinds (None: all) apply in a traced model, in the graph's order of each kind.

    Args:
        view: The model and its graph.
        kinds: Among ``conv_input``, ``scan_input``, ``gate``, ``state``, ``dt``, ``out_rotation`` and
            ``residual_rotation``.

    Returns:
        What applies, and for what does not a :class:`Skipped` with the reason; at least one of them for each kind.
    """
    found: list[Candidate] = []
    skipped: list[Skipped] = []
    for kind, finder in _FINDERS.items():
        if kinds is None or kind in kinds:
            candidates, reasons = finder(view)
            found += candidates
            skipped += reasons if candidates or reasons else [Skipped(kind, WHOLE, _NOTHING[kind])]
    return found, skipped
