"""Functions of the usual names that compute something else, known by the name of this module (LBMamba)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.patterns.native import Compiled, inner, scan

__all__ = ["MambaInnerFn", "MambaInnerFnNoOutProj", "SelectiveScanFn", "steps"]


def steps(length: int) -> int:
    """The window: steps that a thread of the kernel takes."""
    return 4 if length <= 128 else 8 if length <= 256 else 16


class SelectiveScanFn(Compiled):
    @staticmethod
    def forward(
        ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
        delta_softplus: bool = False, return_last_state: bool = False,
    ) -> Any:  # fmt: skip
        def kernel(*o: Any) -> Any:
            return scan(*o, window=steps(o[0].shape[-1]))

        return Compiled.launch(
            ctx, kernel, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )


class MambaInnerFn(Compiled):
    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv1d_weight: Any, conv1d_bias: Any, x_proj_weight: Any, delta_proj_weight: Any,
        out_proj_weight: Any, out_proj_bias: Any, A: Any, B: Any = None, C: Any = None, D: Any = None,
        delta_bias: Any = None, B_proj_bias: Any = None, C_proj_bias: Any = None, delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
    ) -> Any:  # fmt: skip
        def kernel(*o: Any) -> Tensor:
            return inner(*o[:8], None, *o[8:], window=steps(o[0].shape[-1]))

        return Compiled.launch(
            ctx, kernel, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
            out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


class MambaInnerFnNoOutProj(Compiled):
    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv1d_weight: Any, conv1d_bias: Any, x_proj_weight: Any, delta_proj_weight: Any, A: Any,
        B: Any = None, C: Any = None, D: Any = None, delta_bias: Any = None, B_proj_bias: Any = None,
        C_proj_bias: Any = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
    ) -> Any:  # fmt: skip
        def kernel(*o: Any) -> Tensor:
            return inner(*o[:5], None, None, o[5], None, *o[6:], window=steps(o[0].shape[-1]))

        return Compiled.launch(
            ctx, kernel, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
            B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip
