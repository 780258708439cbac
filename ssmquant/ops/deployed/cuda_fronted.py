"""A depthwise convolution and the projection of its codes in one kernel: calls of ``csrc/deployed_cuda/fronted.cu``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmquant.ops import nvrtc
from ssmquant.ops.deployed import cuda_depthwise, cuda_thin
from ssmquant.ops.deployed.cuda_scan import Steps
from ssmquant.ops.deployed.forms import UNITS, Depthwise, Grid, Layer, Weights

__all__ = ["codes_of_core", "project", "takes"]

_FILES = " ".join(f"deployed_cuda/{name}" for name in ("steps", "thin_layer", "depthwise", "fronted"))
_FEW_BLOCKS = 2 * UNITS  # that make step sizes too
_FEW_CHANNELS, _MOST_CHANNELS = 8, 96  # of which a block has all, and at least a warp for them


class _Steps(ctypes.Structure):
    """``Steps`` of the source."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("words", "affine", "sizes")),
        *((n, ctypes.c_int) for n in ("qmin", "qmax")),
    )


class _Both(ctypes.Structure):
    """``Both`` of the source."""

    _fields_ = (("image", cuda_depthwise.Params), ("layer", cuda_thin.Params), ("steps", _Steps))


def takes(d: Depthwise, weights: Weights) -> bool:
    """Whether there is a kernel for a convolution and a projection of its codes, by a weight."""
    _, height, _, channels = d.x.shape
    known = weights.tiles is not None and d.codes is not None and d.dilation == (1, 1)
    if not known or height == 1 or not _FEW_CHANNELS <= channels <= _MOST_CHANNELS or len(d.x) >= 2**16:
        return False
    return cuda_depthwise.blocks_of(d, _row(channels)) is not None


def _row(channels: int) -> int:
    """Bytes of a pixel's codes: those of rows next to each other are in banks of their own."""
    return 32 * -(-channels // 32) + 16


def project(d: Depthwise, layer: Layer, y: Tensor | None, codes: Tensor | None) -> None:
    """Writes values or codes of a layer, (batch, pixels, outputs), and nothing of the convolution."""
    cuda_thin.project(
        d.x[:, 0], 0, 1, _samples(d), layer, None, None, None, (y, codes), None, None, None, (None, None),
        launch=_Launch(d, None, None),
    )  # fmt: skip


def codes_of_core(
    d: Depthwise,
    of_x: Grid,
    weights: Weights,
    made: list[Tensor],
    u: Tensor,
    codes: Tensor,
    width: int,
    bad: Tensor,
    steps: Steps | None,
) -> Tensor | None:
    """``cuda_thin.codes_of_core``; ``u``: room for codes of the image, by ``d.also`` if that is another quantizer.

    Returns:
        Codes of step sizes, of ``steps``, as ``cuda_scan.Scan`` takes them; None of none, or of too many for a block.
    """
    launch = _Launch(d, u, None, steps) if d.also is None else _Launch(d, None, u, steps)
    cuda_thin.codes_of_core(
        d.x[:, 0], _samples(d), of_x, of_x, weights, made, u, 0, codes, width, bad, launch=launch
    )
    return launch.sizes


def _samples(d: Depthwise) -> tuple[int, int]:
    batch, height, width, _ = d.x.shape
    return batch, height * width


class _Launch:
    """What launches the kernel in the place of ``thin``.

    ``y``, ``z``: room for codes of the convolution; ``steps``: weights of step sizes, whose codes are ``sizes`` then.
    """

    def __init__(self, d: Depthwise, y: Tensor | None, z: Tensor | None, steps: Steps | None = None) -> None:
        self.d, self.written, self.steps = d, (y, z), steps
        self.sizes: Tensor | None = None

    def __call__(
        self, x: Tensor, samples: tuple[int, int], params: cuda_thin.Params, **definitions: int
    ) -> None:
        channels = self.d.x.shape[3]
        front, s = self._front(_row(channels))
        warps = front.threads // 32
        tasks = front.definitions["TILE_HIGH"] * front.definitions["TILE_WIDE"] // 16
        split = 1
        while 2 * split * tasks <= warps and split < -(-definitions["OUTPUTS"] // 16):
            split *= 2
        definitions |= {
            **front.definitions,
            "CODED": 1,
            "VEC": next(n for n in (4, 2, 1) if channels % n == 0),
            "FRONTED": 1,
            "WARPS": warps,
            "SPLIT": split,
            "QUANT": 1,
            "STEPS": int(s is not None),
            "RANK": 1 if s is None else s.rank,
        }
        both = _Both(front.params, params)
        if s is not None:
            definitions |= {
                "DIRECTIONS": s.directions,
                "EACH": s.words + -(-s.states // 2),
                "SIZE_ROW": s.row,
            }
            size = samples[0] * samples[1], s.directions, s.row
            self.sizes = torch.empty(size, dtype=torch.uint8, device=x.device)
            both.steps = _Steps(*(t.data_ptr() for t in (s.weights, s.affine, self.sizes)), s.qmin, s.qmax)
        source = nvrtc.specialised(_FILES, *definitions.items())
        with torch.cuda.device_of(x):
            kernels = nvrtc.load(source, x.device)
            kernels.launch("fronted", front.grid, front.threads, front.shared, both, x.device, early=True)

    def _front(self, row: int) -> tuple[cuda_depthwise.Launch, Steps | None]:
        """The convolution's part, and of small images the step sizes that are made behind it, where a block has room.

        Measured on an H200: the kernel of their own that this spares is worth 2 us, and of large images it is faster.
        """
        s = self.steps
        if s is not None:
            low = s.directions * s.words
            blocks, threads = cuda_depthwise.blocks_of(self.d, row + 4 * low) or (0, 0)
            if blocks <= _FEW_BLOCKS and s.directions * s.row // 8 <= threads:
                return cuda_depthwise.launch_of(self.d, *self.written, row=row, low=low), s
        return cuda_depthwise.launch_of(self.d, *self.written, row=row), None
