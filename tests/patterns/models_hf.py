"""Language models in the style of Hugging Face: keywords, outputs that are dicts and dataclasses, tied embeddings."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.patterns.models_ss2d import selective_scan_fn
from tests.patterns.models_vim import mamba_parameters
from tests.patterns.twin import Twin, draw_ids, under

__all__ = ["TWINS", "Cache", "CausalLMOutput", "MambaForCausalLM"]


class ModelOutput(OrderedDict):
    """A dict of those fields that are not None, in their order."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:
                self[f.name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


@dataclass
class MambaOutput(ModelOutput):
    last_hidden_state: Tensor | None = None
    cache_params: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class Cache:
    """The last tokens that a convolution sees, and the last state, by layer."""

    conv_states: dict[int, Tensor]
    ssm_states: dict[int, Tensor]


pytree.register_pytree_node(
    CausalLMOutput,
    lambda out: (list(out.values()), list(out)),
    lambda values, keys: CausalLMOutput(**dict(zip(keys, values, strict=True))),
)
pytree.register_pytree_node(Cache, lambda c: ([c.conv_states, c.ssm_states], None), lambda v, _: Cache(*v))


class MambaMixer(nn.Module):
    """``slow``: the recurrence in Python, step by step, without a scan."""

    def __init__(self, width: int, index: int, slow: bool) -> None:
        super().__init__()
        self.layer_idx, self.slow, self.states, self.rank = index, slow, 3, 2
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        mamba_parameters(self, width, width, self.states, self.rank)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, cache_params: Cache | None = None) -> Tensor:
        length = hidden_states.shape[1]
        x, gate = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        taps = self.conv1d.weight.view(self.conv1d.weight.size(0), self.conv1d.weight.size(2))
        if cache_params is not None:
            cache_params.conv_states[self.layer_idx] = F.pad(x, (4 - length, 0))
        x = F.conv1d(x, taps.unsqueeze(1), self.conv1d.bias, padding=3, groups=self.conv1d.groups)
        x = F.silu(x[..., :length])
        ssm = self.x_proj(x.transpose(1, 2))
        step, B, C = torch.split(ssm, [self.rank, self.states, self.states], dim=-1)
        A = -torch.exp(self.A_log.float())
        if self.slow:
            y, state = self.recurrence(x, F.softplus(self.dt_proj(step)).transpose(1, 2), A, B, C)
            y = (y + x * self.D[None, :, None]) * F.silu(gate)
        else:
            step = self.dt_proj.weight @ step.transpose(1, 2)
            y, state = selective_scan_fn(
                x, step, A, B.transpose(1, 2), C.transpose(1, 2), self.D.float(), gate, self.dt_proj.bias.float(), True,
                True,
            )  # fmt: skip
        if cache_params is not None:
            cache_params.ssm_states[self.layer_idx] = state
        return self.out_proj(y.transpose(1, 2))

    def recurrence(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
        drive = dt[:, :, :, None] * B[:, None].float() * x[:, :, :, None].float()
        state = torch.zeros((x.shape[0], x.shape[1], self.states), device=x.device, dtype=x.dtype)
        outputs = []
        for i in range(x.shape[-1]):
            state = decay[:, :, i] * state + drive[:, :, i]
            outputs.append(torch.matmul(state, C[:, i].unsqueeze(-1))[:, :, 0])
        return torch.stack(outputs, dim=-1), state


class MambaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


class MambaModel(nn.Module):
    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"norm": MambaRMSNorm(8), "mixer": MambaMixer(8, 0, slow)})]
        )
        self.norm_f = MambaRMSNorm(8)

    def forward(
        self, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> MambaOutput:  # fmt: skip
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = Cache({}, {}) if use_cache else None
        seen = () if output_hidden_states else None
        for layer in self.layers:
            hidden_states = hidden_states + layer["mixer"](layer["norm"](hidden_states), cache_params=cache)
            seen = (*seen, hidden_states) if seen is not None else None
        return MambaOutput(
            last_hidden_state=self.norm_f(hidden_states), cache_params=cache, hidden_states=seen
        )


class MambaForCausalLM(nn.Module):
    def __init__(self, slow: bool = False) -> None:
        super().__init__()
        self.backbone, self.lm_head = MambaModel(slow), nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.backbone.embeddings.weight
        self.config = {"use_cache": False}

    def forward(
        self, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool = False, return_dict: bool = True, **kwargs: Any,
    ) -> Any:  # fmt: skip
        use_cache = use_cache if use_cache is not None else (self.config["use_cache"] and not self.training)
        outputs = self.backbone(
            input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        logits = self.lm_head(outputs["last_hidden_state"].to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))
        if not return_dict:
            return (logits, *outputs.to_tuple()[1:])
        return CausalLMOutput(loss, logits, outputs.cache_params, outputs.hidden_states)


def _sites(names: str) -> tuple[str, ...]:
    return (*under("backbone.layers.0.mixer", names), "lm_head")


TWINS = (
    Twin(
        "language model", MambaForCausalLM, ((9,), (14,)), _sites("in_proj conv1d x_proj dt_proj scan out_proj"), 1,
        draw=draw_ids,
    ),
    Twin(
        "language model, scan in Python", functools.partial(MambaForCausalLM, slow=True), ((4,), (6,)),
        _sites("in_proj conv1d x_proj dt_proj out_proj"), 0, draw=draw_ids, elsewhere=True,
    ),
)  # fmt: skip
