"""transformers: Mamba and Mamba-2 language models, whose scans are plain torch where no kernel is installed."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.upstream.loaders import enter, load


def build(name: str, size: str) -> nn.Module:
    enter(kernels=False)
    transformers = load("transformers")
    if name.startswith("Mamba2"):
        config: dict[str, Any] = {
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "expand": 2,
        }
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16}
        if size == "default":
            config = {"num_heads": 24, "head_dim": 64, "n_groups": 1, "chunk_size": 64}
            sizes = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 128}
        made = transformers.Mamba2Config(vocab_size=128, use_cache=False, **config, **sizes)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        if size == "default":
            sizes = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
        made = transformers.MambaConfig(vocab_size=128, use_cache=False, **sizes)
    return getattr(transformers, name)(made)
