"""All transforms of a model that apply, and of those that do not the reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ssmquant.graph.transforms.candidates import Candidate, Skipped, View
from ssmquant.graph.transforms.residual import residuals
from ssmquant.graph.transforms.scales import conv_inputs, gates, scan_inputs, states
from ssmquant.graph.transforms.turns import low_ranks, out_rotations

__all__ = ["find_transforms"]

_FINDERS: dict[str, Callable[[View], tuple[Sequence[Candidate], list[Skipped]]]] = {
    "conv_input": conv_inputs,
    "scan_input": scan_inputs,
    "gate": gates,
    "state": states,
    "dt": low_ranks,
    "out_rotation": out_rotations,
    "residual_rotation": residuals,
}


def find_transforms(
    view: View, kinds: Collection[str] | None = None
) -> tuple[list[Candidate], list[Skipped]]:
    """Where transforms of these kinds (None: all) apply in a traced model, in the graph's order of each kind.

    Args:
        view: The model and its graph.
        kinds: Among ``conv_input``, ``scan_input``, ``gate``, ``state``, ``dt``, ``out_rotation`` and
            ``residual_rotation``.

    Returns:
        What applies, and for what does not a :class:`Skipped` with the reason.
    """
    found: list[Candidate] = []
    skipped: list[Skipped] = []
    for kind, finder in _FINDERS.items():
        if kinds is None or kind in kinds:
            candidates, reasons = finder(view)
            found += candidates
            skipped += reasons
    return found, skipped
