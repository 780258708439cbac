"""From statistics to factors and rotations.

Factors are powers of two, so that they round nothing away. Rotations are ``H K^T``: K the eigenvectors of a covariance,
which makes channels independent, and H a Hadamard matrix, which gives all of them the same variance (MambaQuant's
KLT-enhanced rotation, arXiv 2501.13484, section 4.2). The covariance is shrunk towards a multiple of the identity:
where calibration says nothing of a direction, its eigenvectors are arbitrary but stay orthogonal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmquant.graph.transforms.candidates import Applied, Candidate, Scale
from ssmquant.graph.transforms.residual import Residual
from ssmquant.graph.transforms.statistics import Moments, Statistics
from ssmquant.graph.transforms.turns import LowRank, OutRotation
from ssmquant.modules.activation import gains
from ssmquant.ops.hadamard import hadamard_matrix

__all__ = ["Planned", "even_factors", "fold_transforms", "plan_transforms", "rotation"]

_SHRINK = 1e-3


@dataclass(frozen=True)
class Planned:
    """What will be done: to the candidate of this key, the arguments of its ``fold``, and how ``summary`` puts it."""

    key: str
    values: tuple[Tensor, ...]
    how: str


def even_factors(values: Tensor, weights: Tensor, strength: float = 0.5) -> Tensor:
    """Powers of two near ``values ** strength / weights ** (1 - strength)``, of geometric mean 1; 1 where either is 0.

    Args:
        values: (n,) largest magnitudes of what factors divide.
        weights: (n,) those of what they multiply.
        strength: between 0 (weights alone decide) and 1 (values alone).
    """
    known = values.isfinite() & weights.isfinite()
    return 1 / gains(
        torch.where(known, values.double(), 0.0), strength, torch.where(known, weights.double(), 0.0)
    )


def rotation(n: int, moments: Tensor | None = None, *, signs: bool = True, hadamard: bool = True) -> Tensor:
    """An orthogonal matrix (n, n), float64: ``H S`` or, with a covariance (n, n), ``H K^T``, or K^T alone.

    Args:
        n: size.
        moments: A covariance, or second moments about 0; only its eigenvectors matter. Without one, or of one that is
            not finite, K is the identity.
        signs: whether H's columns get signs, the same in every call, so that equal inputs do not add up in one output.
        hadamard: with H; else it is the identity.
    """
    h = torch.eye(n, dtype=torch.float64)
    if hadamard:
        h = hadamard_matrix(n)
    if hadamard and signs:
        generator = torch.Generator().manual_seed(n)
        h = h * (torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0).double()
    if moments is None:
        return h
    c = (moments.double() + moments.double().T) / 2
    level = c.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    c = (1 - _SHRINK) * c + _SHRINK * level * torch.eye(n, dtype=torch.float64)
    if not bool(c.isfinite().all()):
        return h
    return h @ torch.linalg.eigh(c / level).eigenvectors.T


def plan_transforms(
    model: nn.Module, found: Sequence[Candidate], statistics: Statistics, names: Collection[str], *, kind: str
) -> list[Planned]:
    """Decides on all factors and rotations; changes nothing.

    Args:
        model: the traced model, its weights as they were measured.
        found: candidates of a trace of this model.
        statistics: what was measured of them.
        names: ``QConfig.transforms``.
        kind: ``QConfig.rotation``.

    Returns:
        Those that have an effect, in the order in which they are folded: rotations of inputs and of the stream after
        the factors of the same columns.
    """
    klt, hadamard = kind != "hadamard", kind != "klt_only"
    plan: list[Planned] = []
    for c in found:
        if isinstance(c, Scale):
            if (largest := _pooled(statistics.largest.get(c.key), c)) is None:
                continue
            factor = (
                even_factors(*largest)
                if c.kind == "state"
                else even_factors(largest[0], c.weight_range(model))
            )
            if bool((factor == 1).all()):
                continue
            low, high = (int(f.log2()) for f in (factor.min(), factor.max()))
            plan.append(Planned(c.key, (factor,), f"factors 2^{low} to 2^{high}, {_cost(c)}"))
        elif (
            isinstance(c, LowRank) and (low_rank := _low_rank(model, c, statistics, names, kind)) is not None
        ):
            plan.append(low_rank)
    for c in found:
        if isinstance(c, OutRotation):
            n = c.sink.groups[2]
            plan.append(Planned(c.key, (hadamard_matrix(n),), f"Hadamard of {n}, at run time"))
        elif isinstance(c, Residual):
            moments = _second_moments(statistics.moments.get(c.key), c, model) if klt else None
            if moments is None and not hadamard:
                continue
            how = " and ".join(["KLT"] * (moments is not None) + ["Hadamard"] * hadamard)
            turn = rotation(c.channels, moments, hadamard=hadamard)
            plan.append(Planned(c.key, (turn,), f"{how} of {c.channels}, free"))
    return plan


def fold_transforms(
    model: nn.Module, found: Sequence[Candidate], plan: Sequence[Planned]
) -> tuple[dict[str, Tensor], list[Applied]]:
    """Folds what was decided into the model's weights, in place.

    Args:
        model: changed; what fails in the middle leaves it half changed.
        found: candidates of a trace of this model, by whose keys ``plan`` goes.
        plan: see :func:`plan_transforms`.

    Returns:
        Tensors for the graph by name (float64 on the CPU), and what was done.
    """
    by_key: dict[str, Any] = {c.key: c for c in found}
    tensors: dict[str, Tensor] = {}
    applied: list[Applied] = []
    for p in plan:
        c = by_key[p.key]
        made = c.fold(model, *p.values)
        tensors |= made
        mark = c.mark(placed=bool(made))
        applied.append(Applied(c.kind, c.site, p.how, mark, tuple(sorted(c.touched))))
    return tensors, applied


def _cost(c: Candidate) -> str:
    products = sum(p.function == "times" for p in c.places)
    parts = ["in SiLU"] * any(p.function == "smooth_silu" for p in c.places)
    parts += ["a product at run time"] * bool(products)
    return " and ".join(parts) or "free"


def _pooled(largest: dict[int, Tensor] | None, c: Scale) -> tuple[Tensor, Tensor] | None:
    """The largest magnitudes of B and of C for a state, else (twice) those of all values together.

    What reads a value may see a part of its channels: the others are 0 there.
    """
    if largest is None or sorted(largest) != list(range(len(c.watch))):
        return None
    if any(t.numel() > c.size for t in largest.values()):
        return None
    largest = {k: torch.nn.functional.pad(t, (0, c.size - t.numel())) for k, t in largest.items()}
    if c.kind == "state":
        return largest[0], largest[1]
    pooled = torch.stack(list(largest.values())).amax(0)
    return pooled, pooled


def _low_rank(
    model: nn.Module, c: LowRank, statistics: Statistics, names: Collection[str], kind: str
) -> Planned | None:
    moments = statistics.moments.get(c.key)
    if not moments:
        return None
    g, r = c.groups, c.rank
    m: Moments = moments[0]
    how = []
    mean = None
    if "dt_mean" in names and c.bias is not None:
        mean = m.mean.reshape(g, r)
        how.append("less the mean at run time")
    covariance = torch.stack([m.covariance()[k * r : k * r + r, k * r : k * r + r] for k in range(g)])
    matrix = torch.eye(r, dtype=torch.float64).expand(g, r, r).clone()
    if "dt_scale" in names and r > 1:
        spread = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        weight = c.sink.read(model).abs().amax(dim=(1, 3))
        factor = torch.stack([even_factors(s, w) for s, w in zip(spread, weight, strict=True)])
        matrix = torch.diag_embed(1 / factor)
        covariance = covariance / (factor[:, :, None] * factor[:, None, :])
        how.append("factors, free")
    if "dt_rotation" in names and r > 1:
        klt, hadamard = kind != "hadamard", kind != "klt_only"
        turns = torch.stack([rotation(r, k if klt else None, hadamard=hadamard) for k in covariance])
        matrix = turns @ matrix
        how.append(f"{' and '.join(['KLT'] * klt + ['Hadamard'] * hadamard)} of {r}, free")
    if not how:
        return None
    return Planned(c.key, (matrix,) if mean is None else (matrix, mean), "; ".join(how))


def _second_moments(moments: dict[int, Moments] | None, c: Residual, model: nn.Module) -> Tensor | None:
    """Those of the norms' outputs before their weights, each norm counting the same."""
    if not moments:
        return None
    norms = {n.node: n for _, n in c.readers if n is not None}
    total = torch.zeros(c.channels, c.channels, dtype=torch.float64)
    for k, (node, _) in enumerate(c.moments):
        weight = model.get_parameter(norms[node].weight).detach().double().cpu()
        safe = torch.where(weight == 0, 1.0, weight)
        total += moments[k].covariance(centred=False) / torch.outer(safe, safe)
    return total
