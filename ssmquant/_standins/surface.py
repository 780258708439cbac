"""What is served: every module by its foreign name, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmquant._standins import convs, fused, modules, norms, scans, unused

__all__ = ["CPU_ROUTES", "EXTENSIONS", "MODULES", "SPARE", "TWINS"]

_INTERFACE = {
    "BiMambaInnerFn": fused.BiMambaInnerFn,
    "MambaInnerFn": fused.MambaInnerFn,
    "MambaInnerFnNoOutProj": fused.MambaInnerFnNoOutProj,
    "SelectiveScanFn": scans.SelectiveScanFn,
    "bimamba_inner_fn": fused.bimamba_inner_fn,
    "bimamba_inner_ref": fused.bimamba_inner_fn,
    "mamba_inner_fn": fused.mamba_inner_fn,
    "mamba_inner_fn_no_out_proj": fused.mamba_inner_fn_no_out_proj,
    "mamba_inner_ref": fused.mamba_inner_fn,
    "selective_scan_fn": scans.selective_scan_fn,
    "selective_scan_ref": scans.selective_scan_fn,
}
_NORMS_1 = {  # mamba-ssm 1
    "RMSNorm": norms.RMSNorm,
    "layer_norm_fn": norms.layer_norm_fn_1,
    "layer_norm_linear_fn": norms.layer_norm_linear_fn,
    "layer_norm_ref": norms.layer_norm_fn_1,
    "rms_norm_fn": norms.rms_norm_fn_1,
    "rms_norm_ref": norms.rms_norm_fn_1,
}
_NORMS_2 = {  # mamba-ssm 2
    **_NORMS_1,
    "LayerNormFn": norms.LayerNormFn,
    "layer_norm_fn": norms.layer_norm_fn,
    "rms_norm_fn": norms.rms_norm_fn,
}
_GATED = {
    "LayerNorm": norms.GatedLayerNorm,
    "LayerNormFn": norms.GatedLayerNormFn,
    "RMSNorm": norms.GatedRMSNorm,
    "layernorm_fn": norms.gated_layer_norm_fn,
    "rms_norm_ref": norms.gated_rms_norm_fn,
    "rmsnorm_fn": norms.gated_rms_norm_fn,
}
_SSD = {
    "MambaChunkScanCombinedFn": fused.MambaChunkScanCombinedFn,
    "MambaSplitConv1dScanCombinedFn": fused.MambaSplitConv1dScanCombinedFn,
    "mamba_chunk_scan_combined": fused.mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": fused.mamba_split_conv1d_scan_combined,
    "mamba_split_conv1d_scan_ref": fused.mamba_split_conv1d_scan_combined,
    "ssd_selective_scan": fused.ssd_selective_scan,
}
_UPDATE = {
    "selective_state_update": fused.selective_state_update,
    "selective_state_update_ref": fused.selective_state_update,
}
_CONV = {
    "CausalConv1dFn": convs.CausalConv1dFn,
    "causal_conv1d_fn": convs.causal_conv1d_fn,
    "causal_conv1d_ref": convs.causal_conv1d_fn,
    "causal_conv1d_update": convs.causal_conv1d_update,
    "causal_conv1d_update_ref": convs.causal_conv1d_update,
}
_NO_GATE = {
    "SelectiveScanFn": scans.SelectiveScanNoGateFn,
    "selective_scan_fn": scans.selective_scan_no_gate_fn,
    "selective_scan_ref": scans.selective_scan_no_gate_fn,
}
_GENERATION = {"GenerationMixin": unused.GenerationMixin}
_HUB = {"load_config_hf": unused.unavailable, "load_state_dict_hf": unused.unavailable}
_CORE = {"fwd": scans.core_fwd, "bwd": scans.core_bwd}
_NROW = {"fwd": scans.nrow_fwd, "bwd": scans.nrow_bwd}
_LB = {"fwd": scans.lb_fwd, "bwd": scans.lb_bwd}

EXTENSIONS: Mapping[str, Mapping[str, Any]] = {
    "causal_conv1d_cuda": {
        "causal_conv1d_fwd": convs.fwd,
        "causal_conv1d_bwd": convs.bwd,
        "causal_conv1d_update": convs.update,
    },
    "selective_scan_cuda": {"fwd": scans.mamba_fwd, "bwd": scans.mamba_bwd},
    "selective_scan_cuda_core": _CORE,
    "selective_scan_cuda_oflex": _CORE,
    "selective_scan_cuda_ndstate": {"fwd": scans.ndstate_fwd, "bwd": scans.ndstate_bwd},
    "selective_scan_cuda_nrow": _NROW,
    "selective_scan_cuda_test": _NROW,
}
"""Compiled modules: these are also replaced where they are there and do not load (another torch, another CUDA)."""

MODULES: Mapping[str, Mapping[str, Any]] = {
    **EXTENSIONS,
    "causal_conv1d": {"__version__": "1.5.0+ssmquant", **_CONV},
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": convs.fwd,
        "causal_conv1d_bwd_function": convs.bwd,
        "causal_conv1d_update_function": convs.update,
    },
    "lbm": {},
    "lbm.pscan_cuda": {},
    "lbm.pscan_cuda.pscan": _LB,
    "lbm.pscan_cuda_seg": {},
    "lbm.pscan_cuda_seg.pscan": _LB,
    "mamba_ssm": {
        "__version__": "2.2.4+ssmquant",
        "Mamba": modules.Mamba,
        "Mamba2": modules.Mamba2,
        "mamba_inner_fn": fused.mamba_inner_fn,
        "selective_scan_fn": scans.selective_scan_fn,
    },
    "mamba_ssm.distributed": {},
    "mamba_ssm.distributed.distributed_utils": {
        "all_reduce": unused.unavailable,
        "reduce_scatter": unused.unavailable,
    },
    "mamba_ssm.distributed.tensor_parallel": {
        "ColumnParallelLinear": unused.ParallelLinear,
        "RowParallelLinear": unused.ParallelLinear,
    },
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": unused.MambaConfig},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": {"Block": modules.Block},
    "mamba_ssm.modules.mamba2": {"Mamba2": modules.Mamba2},
    "mamba_ssm.modules.mamba_simple": {"Block": modules.SimpleBlock, "Mamba": modules.Mamba},
    "mamba_ssm.modules.mlp": {"GatedMLP": modules.GatedMLP},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _INTERFACE,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORMS_2,
    "mamba_ssm.ops.triton.layernorm": _NORMS_1,
    "mamba_ssm.ops.triton.layernorm_gated": _GATED,
    "mamba_ssm.ops.triton.selective_state_update": _UPDATE,
    "mamba_ssm.ops.triton.ssd_combined": _SSD,
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _GENERATION,
    "mamba_ssm.utils.hf": _HUB,
    "selective_scan": _NO_GATE,
    "selective_scan.selective_scan_interface": _NO_GATE,
}

TWINS = {
    "mamba_ssm.ops.triton.layer_norm": "mamba_ssm.ops.triton.layernorm",
    "mamba_ssm.ops.triton.layernorm": "mamba_ssm.ops.triton.layer_norm",
}
"""Renamed between versions: an install that has one of them really serves the other too."""

_SUM = {k: _NORMS_2[k] for k in ("layer_norm_fn", "layer_norm_linear_fn", "rms_norm_fn")}
_OVER_TRITON: Mapping[str, Mapping[str, Any]] = {
    "layer_norm": _SUM,
    "layernorm": _SUM,
    "layernorm_gated": {k: _GATED[k] for k in ("layernorm_fn", "rmsnorm_fn")},
    "selective_state_update": {k: _UPDATE[k] for k in ("selective_state_update",)},
    "ssd_combined": {k: _SSD[k] for k in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")},
}
CPU_ROUTES = {  # mamba_ssm.ops.triton, wherever it was copied to; and VMamba's own folder
    f"{folder}.{name}": functions
    for folder in ("triton", "mamba2")
    for name, functions in _OVER_TRITON.items()
}
"""Functions over Triton kernels, by the last two parts of their module's name: where such a module is really there,
tensors on a CPU, which it cannot take, go to ours.
"""

SPARE: Mapping[str, Mapping[str, Any]] = {"utils.generation": _GENERATION, "utils.hf": _HUB}
"""Modules below an installed ``mamba_ssm`` that vision models import without need, and that fail without the
transformers of their time: then they are filled with ours.
"""
