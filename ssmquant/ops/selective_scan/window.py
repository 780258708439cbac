"""A scan that also looks ahead within windows (LBMamba), out of a plain one.

What the future of its window adds to the state at step t is

    r[t] = a[t] * E[t + 1],    E[t] = a[t] * E[t + 1] + b[t]     with a = exp(dt * A), b = dt * B * u,

and E = 0 beyond the end of the window. Walked from its end, a window is a plain scan with states E that begins at zero:
windows become samples of a batch. E = r + b holds the step's own term, which the forward state h has already, hence

    y[t] = <C, h> + (<C, E> - <C, b>).

The difference costs no digits that y would have had: h holds b too, so any way to y rounds at the scale of <C, b>. This
takes all three in the dtype of the state; y is rounded to a narrower one at the very end.

Zhang et al., LBMamba, TMLR 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant.errors import InputError

__all__ = ["ahead", "lb_window"]

# Steps of a thread of LBMamba's kernel, which are its windows: (up to this length, that many), then 16.
_STEPS = {"cuda": ((128, 4), (256, 8)), "rocm": ((256, 4), (512, 8))}


def lb_window(length: int, platform: str = "cuda") -> int:
    """The window of LBMamba's own kernel for sequences of ``length``, which is what its weights were trained with.

    ``length`` is compared and no more, so that a traced size records what depends on it.

    Raises:
        InputError: a platform other than "cuda" and "rocm".
    """
    if platform not in _STEPS:
        raise InputError(f"lb_window: platform is {platform!r}, expected 'cuda' or 'rocm'")
    for limit, steps in _STEPS[platform]:
        if length <= limit:
            return steps
    return 16


def _backwards(x: Tensor, window: int) -> Tensor:
    """(B, ..., L) -> (B * windows, ..., window), last step first; zeros where a window is short."""
    count = -(-x.shape[-1] // window)
    x = F.pad(x, (0, count * window - x.shape[-1])).unflatten(-1, (count, window)).flip(-1)
    return x.movedim(-2, 1).flatten(0, 1)


def _restore(x: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of ``_backwards``."""
    count = -(-length // x.shape[-1])
    x = x.unflatten(0, (batch, count)).movedim(1, -2).flip(-1)
    return x.flatten(-2)[..., :length]


def _own(drive: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """<C, b> of every step, (B, D, L), with b = ``drive`` * B and ``drive`` = dt * u (B, D, L).

    B and C come in any form of theirs, and in drive's dtype.
    """
    channels = drive.shape[1]
    if B.dim() == 2 and C.dim() == 2:
        return drive * (B * C).sum(1)[:, None]
    if B.dim() == 2:
        B, C = C, B
    B = B if B.dim() == 4 else B[:, None]  # (B, G, N, L)
    groups = B.shape[1]
    if C.dim() == 2:
        dot = C.unflatten(0, (groups, channels // groups)) @ B  # (B, G, D / G, L)
    else:
        dot = (B * (C if C.dim() == 4 else C[:, None])).sum(2, keepdim=True)  # (B, G, 1, L)
    return (drive.unflatten(1, (groups, channels // groups)) * dot).flatten(1, 2)


def ahead(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    bias: Tensor | None,
    softplus: bool,
    window: int,
    save: bool,
    backend: str,
) -> Tensor:
    """What the future of each step's window adds to the output, (B, D, L); u and delta in the dtype of the state."""
    batch, _, length = u.shape
    if isinstance(length, int):  # what is symbolic is not compared, lest it become a constant
        window = max(1, min(window, length))
    dt = delta if bias is None else delta + bias.to(delta.dtype)[:, None]
    if softplus:
        dt = F.softplus(dt)
    folded = [x if x.dim() == 2 else _backwards(x, window) for x in (u, dt, B, C)]
    x, step, b, c = folded
    y, _, _ = torch.ops.ssmquant._selective_scan_fwd(x, step, A, b, c, None, None, False, save, backend)
    return _restore(y, batch, length) - _own(dt * u, B.to(u.dtype), C.to(u.dtype))
