"""Launches of Triton kernels that cost the host little.

Triton binds, specialises and looks up the arguments of every launch anew, which takes longer than a small kernel. What
it compiled for the same arguments is kept here and called directly.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from ssmquant.ops.nvrtc import CompileError

__all__ = ["Kernel", "power"]

_MOST = 4096  # compiled forms of a kernel, which exact sizes are part of


@functools.cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


@functools.cache
def _begins_early(index: int | None) -> bool:
    if index is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(index) >= (9, 0)


def power(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


class Kernel:
    """A kernel of pointers, numbers and constants, in that order. Calls raise CompileError if it cannot be compiled.

    Args:
        kernel: what ``triton.jit`` made.
        exact: products and sums are not contracted to fused multiply-adds.
        early: its last constant says whether its blocks may be made while the kernel before it ends, for which it then
            waits first of all: on GPUs since sm_90.
    """

    def __init__(self, kernel: Any, exact: bool = True, early: bool = False) -> None:
        self.kernel, self.exact, self.early = kernel, exact, early
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[int, ...],
        warps: int,
        dtypes: Any = None,
    ) -> None:
        """Launch it on the device of its tensors, whichever is the current one.

        ``dtypes``: of what pointers, where these do not follow from the first one's and the constants.
        """
        index = tensors[0].device.index
        if index is not None and not _one_gpu() and torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                self(grid, tensors, numbers, constants, warps, dtypes)
            return
        early = self.early and _begins_early(index)
        if self.early:
            constants = (*constants, int(early))
        # Triton specialises on which addresses are multiples of 16, and which integers are so or 1.
        aligned = 1
        for t in tensors:
            aligned += aligned + (t.data_ptr() & 15 == 0)
        key = index, tensors[0].dtype, aligned, numbers, constants, warps, dtypes
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants, stream=driver.active.get_current_stream(index))
            return
        options = {"num_warps": warps, "enable_fp_fusion": not self.exact}
        if early:
            options["launch_pdl"] = True
        try:
            compiled = self.kernel[grid](*tensors, *numbers, *constants, **options)
        except (CompilationError, OutOfResources, PTXASError) as error:
            raise CompileError(f"Triton: cannot compile {self.kernel.__name__}: {error}") from error
        # The interpreter compiles nothing. For AMD Triton also specialises on the sizes of storages.
        if compiled is not None and torch.version.hip is None:
            if len(self.compiled) >= _MOST:
                self.compiled.clear()
            self.compiled[key] = compiled
