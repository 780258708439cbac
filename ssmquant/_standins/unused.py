"""Names of mamba-ssm that modules import and no vision model uses: language models, several processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ssmquant.errors import InputError

__all__ = ["GenerationMixin", "MambaConfig", "ParallelLinear", "unavailable"]


def unavailable(*args: Any, **kwargs: Any) -> Any:
    """A function that there is no stand-in for."""
    raise InputError(
        "text generation, pretrained language models and tensor parallelism are not a part of the ssmquant stand-in: "
        "install mamba-ssm"
    )


class GenerationMixin:
    """Base class of language models."""

    generate = unavailable


class ParallelLinear(nn.Linear):
    """``ColumnParallelLinear`` and ``RowParallelLinear``: layers of several processes."""

    __init__ = unavailable


@dataclass
class MambaConfig:
    """Plain data of a language model."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
