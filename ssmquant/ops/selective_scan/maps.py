"""``torch.ops.ssmquant.selective_scan_map``: scans over an image in several orders at once, without copies of it.

VMamba, MambaIR and their kin scan a map along its rows and columns, both ways. As sequences these are four permuted
copies of the map, and four of the result to be permuted back and added. Here operands stay maps, channels innermost,
and a scan reads pixels by index. Our CUDA kernels do that; elsewhere the same is composed of the plain scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ssmquant.errors import InputError
from ssmquant.ops.checks import check_operands, differentiable_once, fail, state_dtype, unfilled
from ssmquant.ops.selective_scan.backends import choose

__all__ = ["scan_paths", "selective_scan_map"]

_NAME = "selective_scan_map"
_LIBRARY = torch.library.Library("ssmquant", "FRAGMENT")
_OPERANDS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor path"
_LIBRARY.define(f"selective_scan_map({_OPERANDS}, bool delta_softplus=False) -> Tensor")
_LIBRARY.define(f"_selective_scan_map_fwd({_OPERANDS}, bool delta_softplus, bool save) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"_selective_scan_map_bwd(Tensor g, Tensor saved, {_OPERANDS}, bool delta_softplus)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def scan_paths(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The four orders of VMamba's cross-scan: along rows, along columns, and both from the end.

    Returns:
        (4, height * width) int32, indices of pixels counted along rows.

    Raises:
        InputError: a size below 1.
    """
    if height < 1 or width < 1:
        raise InputError(f"scan_paths: the map is {height} x {width}, expected at least 1 x 1")
    rows = torch.arange(height * width, dtype=torch.int32, device=device)
    both = torch.stack([rows, rows.view(height, width).t().flatten()])
    return torch.cat([both, both.flip(1)])


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
) -> None:
    check_operands(_NAME, {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": bias}, "x")
    if x.dim() != 3:
        fail(_NAME, "x", x, "(B, P, D)")
    batch, pixels, channels = x.shape
    if path.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{_NAME}: path has dtype {path.dtype}, expected int32 or int64")
    if path.device != x.device:
        raise InputError(f"{_NAME}: path is on {path.device}, x on {x.device}; move them together")
    if path.dim() != 2 or path.shape[0] < 1 or path.shape[1] != pixels:
        fail(_NAME, "path", path, f"(K, {pixels}), an order of all pixels for each of K directions")
    directions = path.shape[0]
    if A.dim() != 2 or A.shape[0] != directions * channels:
        fail(_NAME, "A", A, f"({directions * channels}, N)")
    for name, tensor, last in (("delta", delta, channels), ("B", B, A.shape[1]), ("C", C, A.shape[1])):
        if tuple(tensor.shape) != (batch, pixels, directions, last):
            fail(_NAME, name, tensor, f"({batch}, {pixels}, {directions}, {last})")
    for name, vector in (("D", D), ("delta_bias", bias)):
        if vector is not None and tuple(vector.shape) != (directions * channels,):
            fail(_NAME, name, vector, f"({directions * channels},)")


def _along(x: Tensor, order: Tensor) -> Tensor:
    """(B, K, P, C), each direction's pixels in its order (K, P)."""
    return torch.take_along_dim(x, order[None, :, :, None], 2)


def _compose(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    path: Tensor,
    delta_softplus: bool = False,
) -> Tensor:
    _check(x, delta, A, B, C, D, delta_bias, path)
    dtype = state_dtype(x, delta, A, B, C, D, delta_bias)
    if x.numel() and A.numel() and choose(x.device, dtype, int(A.shape[1])).NAME == "cuda":
        operands = (x, delta, A, B, C, D, delta_bias)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
        y, _ = torch.ops.ssmquant._selective_scan_map_fwd(*operands, path, delta_softplus, save)
        return y
    order = path.long()
    rows = [_along(m.transpose(1, 2), order).transpose(2, 3) for m in (delta, B, C)]
    u = x[:, order].transpose(2, 3).flatten(1, 2)
    y, _ = torch.ops.ssmquant.selective_scan(
        u, rows[0].flatten(1, 2), A, rows[1], rows[2], D, None, delta_bias, delta_softplus
    )
    y = y.unflatten(1, (len(path), x.shape[2])).transpose(2, 3)
    return _along(y, order.argsort(1)).sum(1, dtype=x.dtype)  # which autocast would make float32


def _kernels(x: Tensor, A: Tensor) -> Any:
    kernels = choose(x.device, torch.float32, A.shape[1], "cuda")
    if kernels.NAME != "cuda":
        raise InputError(
            f"{_NAME}: this graph was compiled for our CUDA kernels, which cannot serve {x.device}"
        )
    return kernels


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    path = path.int().contiguous()
    y, saved = _kernels(x, A).map_forward(x, delta, A, B, C, D, bias, path, softplus, save)
    return y.sum(1, dtype=x.dtype), saved


def _fake_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    (channels, states), (batch, pixels, _) = A.shape, x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pieces, *rest = _kernels(x, A).saved_shape(batch, channels, states, pixels)
    return y, A.new_empty((pieces if save else 0, *rest), dtype=torch.float32)


def _backward(
    g: Tensor,
    saved: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
    softplus: bool,
) -> tuple[Tensor, ...]:
    path = path.int().contiguous()
    gx, *others = _kernels(x, A).map_backward(g, saved, x, delta, A, B, C, D, bias, path, softplus)
    return (gx.sum(1, dtype=x.dtype), *others)


def _fake_backward(
    g: Tensor,
    saved: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    path: Tensor,
    softplus: bool,
) -> tuple[Tensor, ...]:
    return unfilled(x, delta, A, B, C, D, bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, softplus, save = inputs
    if not save:
        raise InputError(f"{_NAME}: _selective_scan_map_fwd needs save=True where gradients are wanted")
    ctx.softplus = softplus
    ctx.set_materialize_grads(False)  # what is saved would get zeros of its size
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    saved, x, delta, A, B, C, D, bias, path = ctx.saved_tensors
    operands = (x, delta, A, B, C, D, bias, path)
    g = torch.zeros_like(x) if g is None else g
    grads = torch.ops.ssmquant._selective_scan_map_bwd(g, saved, *operands, ctx.softplus)
    *main, g_D, g_bias = grads
    return (*main, None if D is None else g_D, None if bias is None else g_bias, None, None, None)


_LIBRARY.impl("selective_scan_map", _compose, "CompositeImplicitAutograd")
_LIBRARY.impl("_selective_scan_map_fwd", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("_selective_scan_map_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ssmquant::_selective_scan_map_fwd", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ssmquant::_selective_scan_map_bwd", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "ssmquant::_selective_scan_map_fwd", _autograd, setup_context=_setup, lib=_LIBRARY
)
differentiable_once(_NAME, "_selective_scan_map_bwd", _LIBRARY)

_checked: Any = WeakIdKeyDictionary()  # a path -> its version when it was checked


def _check_path(path: Tensor) -> None:
    """Raises InputError unless each row is a permutation. Reads it once, for that waits for the GPU."""
    version = 0 if path.is_inference() else path._version  # inference tensors count none
    if _checked.get(path) == version or (path.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    wanted = torch.arange(path.shape[1], device=path.device, dtype=path.dtype)
    if not torch.equal(path.sort(1).values, wanted.expand_as(path)):
        raise InputError(f"{_NAME}: path has to hold every pixel, 0 to {path.shape[1] - 1}, once in each row")
    if not path.is_inference():
        _checked[path] = version


def selective_scan_map(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    path: Tensor,
) -> Tensor:
    """Selective scans over a map of pixels, in K orders, and the sum of what they give.

    The same as ``selective_scan`` of K permuted copies of ``x``, permuted back and added (with ``scan_paths`` VMamba's
    cross-scan and merge, Liu et al. 2024, arXiv 2401.10166); differentiable once in every operand but ``path``. It is
    one call of ``torch.ops.ssmquant.selective_scan_map``.

    Args:
        x: (B, P, D), the map, pixels along rows; sets the dtype of the result.
        delta: (B, P, K, D), step sizes of each direction before bias and softplus, at their pixels.
        A: (K * D, N), real.
        B: (B, P, K, N).
        C: (B, P, K, N).
        D: (K * D,), skip weight.
        delta_bias: (K * D,).
        delta_softplus: apply softplus to the step sizes.
        path: (K, P) int32 or int64: the pixels in the order of each direction, each once.

    Returns:
        (B, P, D) in x's dtype. The state is kept in float32 (float64 if an operand is float64).

    Raises:
        InputError: a shape or dtype does not fit, operands are on several devices, or a row of ``path`` is no
            permutation (looked at once for each tensor, not while compiling or capturing: what a wrong one gives
            there is undefined).
    """
    if type(path) is Tensor and not (torch.compiler.is_compiling() or path.is_meta) and path.dim() == 2:
        if path.dtype in (torch.int32, torch.int64):
            _check_path(path)
    result: Tensor = torch.ops.ssmquant.selective_scan_map(
        x, delta, A, B, C, D, delta_bias, path, delta_softplus
    )
    return result
