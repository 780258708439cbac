"""mamba-ssm's modules: same constructors, parameter names, shapes and initialisation, so that checkpoints fit.

They compute as a whole only: decoding step by step, tensor parallelism and packed sequences raise ``InputError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmquant._standins.fused import mamba_inner_fn, mamba_split_conv1d_scan_combined
from ssmquant._standins.norms import GatedRMSNorm, RMSNorm, layer_norm_fn
from ssmquant.errors import InputError

__all__ = ["Block", "GatedMLP", "Mamba", "Mamba2", "SimpleBlock"]


def _refuse(owner: object, **values: Any) -> None:
    given = [name for name, value in values.items() if value is not None]
    if given:
        raise InputError(
            f"{type(owner).__name__}: {', '.join(given)} is not supported by the ssmquant stand-in for mamba-ssm; "
            "leave it at None, or install mamba-ssm"
        )


def _step_bias(size: int, low: float, high: float, floor: float, **where: Any) -> Tensor:
    """A bias whose softplus is log-uniform in [low, high]."""
    dt = torch.exp(torch.rand(size, **where) * (math.log(high) - math.log(low)) + math.log(low)).clamp(
        min=floor
    )
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def _depthwise(channels: int, width: int, bias: bool, **where: Any) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, **where)


class Mamba(nn.Module):
    """The mixer of Mamba (Gu & Dao 2023): (B, L, D) -> (B, L, D)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx, self.activation = use_fast_path, layer_idx, "silu"
        if dt_init not in ("constant", "random"):
            raise InputError(f"Mamba: dt_init={dt_init!r}: expected 'constant' or 'random'")

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        self.conv1d = _depthwise(self.d_inner, d_conv, conv_bias, **where)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **where)
        scale = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, **where))
        decay = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log()
        self.A_log = nn.Parameter(decay.repeat(self.d_inner, 1))  # float32 whatever the dtype, as D
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        # Marks that training recipes look for.
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """The same by either value of ``use_fast_path``."""
        _refuse(self, inference_params=inference_params)
        return mamba_inner_fn(
            self.in_proj(hidden_states).transpose(1, 2),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log.float()),
            D=self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )


class Mamba2(nn.Module):
    """The mixer of Mamba-2 (Dao & Gu 2024): (B, L, D) -> (B, L, D)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _refuse(self, process_group=process_group)
        where = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.headdim, self.ngroups, self.D_has_hdim = expand, headdim, ngroups, D_has_hdim
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim:
            raise InputError(f"Mamba2: headdim={headdim} does not divide {self.d_ssm} channels")
        self.nheads = self.d_ssm // headdim
        self.rmsnorm, self.norm_before_gate, self.dt_limit = rmsnorm, norm_before_gate, dt_limit
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.process_group, self.sequence_parallel, self.activation = None, sequence_parallel, "silu"

        states = 2 * ngroups * d_state
        self.in_proj = nn.Linear(
            d_model, 2 * self.d_inner + states + self.nheads, bias=bias, **where
        )  # z, x, B, C, dt
        self.conv1d = _depthwise(self.d_ssm + states, d_conv, conv_bias, **where)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(_step_bias(self.nheads, dt_min, dt_max, dt_init_floor, **where))
        decay = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(decay.log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            size = self.d_ssm // ngroups
            self.norm = GatedRMSNorm(self.d_ssm, 1e-5, size, norm_before_gate, **where)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """With ``seqlen``, u is (B * seqlen, D), and so is the result."""
        _refuse(self, seq_idx=seq_idx, cu_seqlens=cu_seqlens, inference_params=inference_params)
        zxbcdt = self.in_proj(u)
        out: Tensor = mamba_split_conv1d_scan_combined(
            zxbcdt if seqlen is None else zxbcdt.unflatten(0, (-1, seqlen)),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            self.chunk_size,
            dt_limit=self.dt_limit,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        return out if seqlen is None else out.flatten(0, 1)


class GatedMLP(nn.Module):
    """``fc2(y * act(gate))`` with ``y, gate = fc1(x)``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * self.activation(gate))
        return out


class Block(nn.Module):
    """Add, norm, mixer, and the same with an MLP unless that is ``nn.Identity``: mamba-ssm 2's ``modules.block``."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def _add_norm(self, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            pair: tuple[Tensor, Tensor] = layer_norm_fn(
                hidden, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True,
                residual_in_fp32=self.residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
            )  # fmt: skip
            return pair
        total = hidden if residual is None else hidden + residual
        normed = norm(total.to(norm.weight.dtype))
        return normed, total.float() if self.residual_in_fp32 else total

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(hidden, residual) -> (hidden, residual); their sum is the stream."""
        hidden, residual = self._add_norm(self.norm, hidden_states, residual)
        if inference_params is not None:
            mixer_kwargs["inference_params"] = inference_params
        hidden = self.mixer(hidden, **mixer_kwargs)
        if self.mlp is not None:
            hidden, residual = self._add_norm(self.norm2, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual


class SimpleBlock(Block):
    """``Block`` of mamba-ssm 1, in ``modules.mamba_simple``: no MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
