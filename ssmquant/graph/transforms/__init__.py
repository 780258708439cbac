"""Rewrites of a traced model that keep its function and make it easier to quantize.

``flow`` follows channels through the graph, ``projections`` gives every site's weight one form, ``candidates`` says
what a transform is; ``scales``, ``turns`` and ``residual`` (for which ``stream`` follows residual streams) find where
each applies, by structure alone; ``statistics`` measures, ``choose`` decides the factors and rotations, ``edits``
writes what is left into the graph.
"""

from ssmquant.graph.transforms.candidates import Candidate, Scale, Skipped, View
from ssmquant.graph.transforms.find import find_transforms
from ssmquant.graph.transforms.residual import Residual
from ssmquant.graph.transforms.turns import LowRank, OutRotation

__all__ = [
    "Candidate",
    "LowRank",
    "OutRotation",
    "Residual",
    "Scale",
    "Skipped",
    "View",
    "find_transforms",
]
