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

from ssmquant.graph.transforms.candidates import Applied, Candidate, Scale, Skipped
from ssmquant.graph.transforms.residual import Residual
from ssmquant.graph.transforms.statistics import Moments, Statistics
from ssmquant.graph.transforms.turns import LowRank, OutRotation
from ssmquant.modules.activation import gains
from ssmquant.ops.hadamard import hadamard_matrix, is_hadamard

__all__ = ["Planned", "even_factors", "fold_transforms", "plan_transforms", "rotation"]

_UNSEEN = "no batch of calibrate has reached it"
_SHRINK = 1e-3
_LARGEST_OFFSET = 2.0
"""Of a norm's bias over its weight, root mean square: in a rotated norm that stands beside values of 1."""


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


def rotation(
    n: int,
    moments: Tensor | None = None,
    *,
    signs: bool = True,
    hadamard: bool = True,
    keep_ones: bool = False,
) -> Tensor:
    """An orthogonal matrix (n, n), float64: ``H S`` or, with a covariance (n, n), ``H K^T``, or K^T alone.

    Args:
        n: size.
        moments: A covariance, or second moments about 0; only its eigenvectors matter. Without one, or of one that is
            not finite, K is the identity.
        signs: whether H's columns get signs, the same in every call, so that equal inputs do not add up in one output.
        hadamard: with H; else it is the identity.
        keep_ones: Whether the vector of ones stays where it is. All entries of H's first column are the same then.
            With moments the ones count as the first eigenvector, and all variances still come out the same; without,
            a reflection behind ``H S`` changes entries by O(1 / n) but for those of that column. Without H a reflection
            behind K^T spreads the ones, and so a little of each eigenvector, over all channels.
    """
    h = hadamard_matrix(n) if hadamard else torch.eye(n, dtype=torch.float64)
    if hadamard and keep_ones:
        # A Hadamard matrix stays one with other signs of rows; a cosine transform has a row of ones.
        h = h * h[:, :1].sign() if is_hadamard(n) else h.T
    if hadamard and signs and not (keep_ones and moments is not None):
        generator = torch.Generator().manual_seed(n)
        h = h * (torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0).double()
    if moments is None:
        return _with_ones_kept(h) if keep_ones else h
    c = (moments.double() + moments.double().T) / 2
    level = c.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    c = (1 - _SHRINK) * c + _SHRINK * level * torch.eye(n, dtype=torch.float64)
    if not bool(c.isfinite().all()):
        return rotation(n, signs=signs, hadamard=hadamard, keep_ones=keep_ones)
    if not keep_ones:
        return h @ torch.linalg.eigh(c / level).eigenvectors.T
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    c = centre @ (c / level) @ centre
    rest = torch.linalg.eigh(c + 2 * c.diagonal().sum() / n).eigenvectors[:, :-1]  # the last one is the ones
    vectors = torch.cat([torch.full((n, 1), n**-0.5, dtype=torch.float64), rest], 1)
    return _with_ones_kept(h @ vectors.T)


def _with_ones_kept(q: Tensor) -> Tensor:
    """``q``, and behind it the reflection that takes ``q @ 1`` back to 1; ``q`` where that is nothing."""
    one = torch.full_like(q[0], len(q) ** -0.5)
    way = q @ one - one
    length = way @ way
    return q if length < 1e-24 else q - torch.outer(way, (2 / length) * (way @ q))


def plan_transforms(
    model: nn.Module, found: Sequence[Candidate], statistics: Statistics, names: Collection[str], *, kind: str
) -> tuple[list[Planned], list[Skipped]]:
    """Decides on all factors and rotations; changes nothing.

    Args:
        model: the traced model, its weights as they were measured.
        found: candidates of a trace of this model.
        statistics: what was measured of them.
        names: ``QConfig.transforms``.
        kind: ``QConfig.rotation``.

    Returns:
        Those that have an effect, in the order in which they are folded: rotations of inputs and of the stream after
        the factors of the same columns. And why the others have none.
    """
    klt, hadamard = kind != "hadamard", kind != "klt_only"
    plan: list[Planned] = []
    without: list[Skipped] = []
    for c in found:
        if isinstance(c, Scale):
            if (largest := _pooled(statistics.largest.get(c.key), c)) is None:
                without.append(Skipped(c.kind, c.site, _UNSEEN))
                continue
            factor = (
                even_factors(*largest)
                if c.kind == "state"
                else even_factors(largest[0], c.weight_range(model))
            )
            if bool((factor == 1).all()):
                without.append(Skipped(c.kind, c.site, "its channels are alike: all factors would be 1"))
                continue
            low, high = (int(f.log2()) for f in (factor.min(), factor.max()))
            plan.append(Planned(c.key, (factor,), f"factors 2^{low} to 2^{high}, {_cost(c)}"))
        elif isinstance(c, LowRank):
            low_rank = _low_rank(model, c, statistics, names, kind)
            if isinstance(low_rank, Planned):
                plan.append(low_rank)
            else:
                without.append(low_rank)
    for c in found:
        if isinstance(c, OutRotation):
            n = c.sink.groups[2]
            plan.append(Planned(c.key, (hadamard_matrix(n),), f"Hadamard of {n}, at run time"))
        elif isinstance(c, Residual):
            if (why := _spread_biases(model, c)) is not None:
                without.append(why)
                continue
            moments = _second_moments(statistics.moments.get(c.key), c, model) if klt else None
            if moments is None and not hadamard:
                without.append(Skipped(c.kind, c.site, _UNSEEN))
                continue
            how = " and ".join(["KLT"] * (moments is not None) + ["Hadamard"] * hadamard)
            matrix = rotation(c.channels, moments, hadamard=hadamard, keep_ones=c.centred)
            plan.append(Planned(c.key, (matrix,), f"{how} of {c.channels}, free"))
    return plan, without


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
) -> Planned | Skipped:
    moments = statistics.moments.get(c.key)
    if not moments:
        return Skipped(c.kind, c.site, _UNSEEN)
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
    no_mean = "no bias behind it can take the mean"
    if not how:
        return Skipped(c.kind, c.site, no_mean if "dt_mean" in names else "its rank is 1")
    if "dt_mean" in names and c.bias is None:
        how.append(no_mean)
    return Planned(c.key, (matrix,) if mean is None else (matrix, mean), "; ".join(how))


def _spread_biases(model: nn.Module, c: Residual) -> Skipped | None:
    """Why norms' biases, which are small beside their weights as a rule, forbid a rotation, if they do."""
    for norm in c.norms:
        offset = c.offset(model, norm)
        if not float(offset.square().mean()) <= _LARGEST_OFFSET**2:  # NaN, too
            reason = (
                f"'{norm.name}' has biases that are large beside its weights: all channels would get of them"
            )
            return Skipped(c.kind, c.site, reason)
    return None


def _second_moments(moments: dict[int, Moments] | None, c: Residual, model: nn.Module) -> Tensor | None:
    """Those of the norms' outputs before their weights, each norm counting the same."""
    if not moments:
        return None
    norms = {n.node: n for n in c.norms}
    total = torch.zeros(c.channels, c.channels, dtype=torch.float64)
    for k, (node, _) in enumerate(c.moments):
        weight = model.get_parameter(norms[node].weight).detach().double().cpu()
        safe = torch.where(weight == 0, 1.0, weight)
        own = moments[k].covariance(centred=False) / torch.outer(safe, safe)
        for i in range(0, len(own), c.channels):  # of pieces side by side
            total += own[i : i + c.channels, i : i + c.channels]
    return total
