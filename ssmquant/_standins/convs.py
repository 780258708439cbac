"""The package ``causal_conv1d`` and its extension module, computed by ``ssmquant.ops``.

The C++ entry points grew arguments from version to version; they are told apart by how many there are:
``fwd`` 4 (1.0), 5 (1.1), 7 (1.2 to 1.4) or 8 (1.5); ``bwd`` 6, 7, 10 or 12; ``update`` 5 to 7, or 8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmquant._standins.scans import gradients
from ssmquant.errors import InputError
from ssmquant.ops import mixers

__all__ = ["CausalConv1dFn", "bwd", "causal_conv1d_fn", "causal_conv1d_update", "fwd", "update"]


def _refuse(**values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            raise InputError(
                f"causal_conv1d: {name} is not supported by the ssmquant stand-in; leave it at None"
            )


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, activation: str | None
) -> Tensor:
    """``x`` (B, D, L) continues ``before`` (B, D, at least W - 1), or zeros."""
    weight = weight.flatten(1)  # (D, 1, W) is taken too
    if before is None:
        return mixers.causal_conv1d(x, weight, bias, activation)
    before = before[..., before.shape[-1] - (weight.shape[1] - 1) :]
    whole = torch.cat([before.to(x.dtype), x], dim=-1)
    return mixers.causal_conv1d(whole, weight, bias, activation)[..., before.shape[-1] :]


def _tail(x: Tensor, before: Tensor | None, size: int) -> Tensor:
    """The last ``size`` columns of before and x."""
    if before is not None:
        x = torch.cat([before.to(x.dtype), x], dim=-1)
    return F.pad(x, (size - x.shape[-1], 0))  # a negative pad cuts


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Any = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Depthwise causal convolution of x (B, D, L) with weight (D, W). Up to 1.1, activation came fourth or fifth."""
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    if activation not in (None, "silu", "swish"):
        raise InputError(f"causal_conv1d: activation={activation!r}: expected None, 'silu' or 'swish'")
    _refuse(seq_idx=seq_idx)
    out = _convolve(x, weight, bias, initial_states, activation)
    if not return_final_states:
        return out
    final = _tail(x, initial_states, weight.shape[-1] - 1)
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Any = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One step (x (B, D)) or some (B, D, L) from ``conv_state``, which is updated in place."""
    _refuse(cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    activation = "silu" if activation is True else activation or None
    step = x.unsqueeze(-1) if x.dim() == 2 else x
    out = _convolve(step, weight, bias, conv_state, activation)
    conv_state.copy_(_tail(step, conv_state, conv_state.shape[-1]))
    return out.squeeze(-1) if x.dim() == 2 else out


class CausalConv1dFn:
    """The name of the ``autograd.Function`` behind the function; only ``apply`` is there."""

    apply = staticmethod(causal_conv1d_fn)


# ---- the extension module ------------------------------------------------------------------------------------------


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """``causal_conv1d_fwd(x, weight, bias, [seq_idx, [initial_states, [out], final_states_out]], silu)``."""
    *options, silu = rest
    seq_idx, initial, *more = (*options, None, None)[: max(2, len(options))]
    _refuse(seq_idx=seq_idx)
    result = _convolve(x, weight, bias, initial, "silu" if silu else None)
    if more and more[-1] is not None:
        more[-1].copy_(_tail(x, initial, weight.shape[-1] - 1))
    if len(more) == 2:
        result = more[0].copy_(result)
    return result


def bwd(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest: Any) -> Any:
    """``causal_conv1d_bwd(x, weight, bias, dout, [seq_idx, [initial_states, dfinal_states]], dx, ..., silu)``."""
    seq_idx = initial = dfinal = None
    outputs: list[Tensor | None] = [None]
    *options, silu = rest
    if len(rest) == 2:
        outputs = options
    elif len(rest) == 3:
        seq_idx, *outputs = options
    elif len(rest) == 6:
        seq_idx, initial, dfinal, outputs[0], _ = options
    else:
        seq_idx, initial, dfinal, *outputs = options
    _refuse(seq_idx=seq_idx)

    def function(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> Tensor:
        out = _convolve(x, weight, bias, initial, "silu" if silu else None)
        return out if dfinal is None else torch.cat([_tail(x, initial, weight.shape[-1] - 1), out], dim=-1)

    grad = dout if dfinal is None else torch.cat([dfinal.to(dout.dtype), dout], dim=-1)
    found = gradients(function, (x, weight, bias, initial), grad)
    for i, out in enumerate(outputs):
        value = found[i]
        if out is not None and value is not None:
            found[i] = out.copy_(value)
    return found if len(rest) >= 6 else found[:3]


def update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """``causal_conv1d_update(x, conv_state, weight, bias, [out], silu, [cache_seqlens, [conv_state_indices]])``."""
    out, *rest_ = rest if len(rest) == 4 else (None, *rest)
    result = causal_conv1d_update(x, conv_state, weight, bias, *rest_)
    return result if out is None else out.copy_(result)
