"""What in a deployed graph takes tensors in any layout, so that kernels may leave channels last in memory."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ssmquant.graph.deploy_calls import (
    blend_call,
    conv2d_call,
    float_conv2d_call,
    gated_linear_call,
    linear_call,
)
from ssmquant.graph.gains import times
from ssmquant.graph.rewrite import ACTIVATIONS
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed

__all__ = ["OURS", "any_strides", "called", "is_core"]

OURS = (linear_call, gated_linear_call, blend_call, conv2d_call, float_conv2d_call, deployed.normalize)
# What takes any strides, and gives its result in an order of its own.
_ENDS = {"size", "linear", "layer_norm", "contiguous"}
# What takes any strides; its result may lie as what it reads does, so that only a view of that cares.
_HANDS_ON = {
    "permute", "transpose", "flatten", "reshape", "movedim", "moveaxis", "swapaxes", "mean", "sum",
    "getitem", "conv2d", "adaptive_avg_pool2d", "pixel_shuffle", "rms_norm",
}  # fmt: skip
_MAY_COPY = {"contiguous", "flatten", "reshape"}
# What computes each element on its own: all that reads it has to take any strides.
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "truediv", "iadd", "imul", "silu", "gelu", "relu", "sigmoid", "leaky_relu", "float",
    "to", "neg", "clamp", "tanh", "softplus",
}  # fmt: skip
_END_LAYERS = (nn.Linear, nn.LayerNorm)
_HANDING_LAYERS = (nn.RMSNorm, nn.Conv2d, nn.AdaptiveAvgPool2d, nn.PixelShuffle)
_ACTIVATION_LAYERS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.LeakyReLU, nn.ReLU6, nn.Identity, nn.Dropout)


def is_core(node: fx.Node) -> bool:
    """Whether a node is a scan with all around it, see ``deploy_scans``."""
    return getattr(node.target, "__name__", "") == "scan_core"


def called(model: nn.Module, node: object, prefix: str) -> nn.Module | None:
    """The quantizer or packed tensor that a node calls; ``prefix``: which of them."""
    if isinstance(node, fx.Node) and node.op == "call_module" and str(node.target).startswith(f"{prefix}."):
        return model.get_submodule(str(node.target))
    return None


def any_strides(node: fx.Node, model: nn.Module, written: set[Any]) -> bool:
    """Whether all that reads ``node`` takes it in any layout.

    ``written``: storages that something writes to: an alias of one that would be a copy there changes what is computed.
    """
    seen: set[fx.Node] = set()
    elementwise: list[fx.Node] = [node]
    handed: list[fx.Node] = []
    while elementwise:  # of these all readers have to be known
        for user in elementwise.pop().users:
            kind = _kind(user, model)
            if kind is None or _loses_an_alias(user, written):
                return False
            if user not in seen and kind != "end" and not _is_of_rows(user):
                seen.add(user)
                (elementwise if kind == "elementwise" else handed).append(user)
    while handed:  # of these only views matter
        for user in handed.pop().users:
            if op_name(user) == "view" or _loses_an_alias(user, written):
                return False
            if user not in seen and _kind(user, model) in ("elementwise", "hands on"):
                seen.add(user)
                handed.append(user)
    return True


def _is_of_rows(node: fx.Node) -> bool:
    """Whether what reads an image as rows of its pixels is all that comes of a node: with channels last they lie so."""
    axes = node.args[1:] if len(node.args) != 2 else node.args[1]
    if op_name(node) == "permute":
        return axes in ((0, 2, 3, 1), [0, 2, 3, 1])
    if op_name(node) != "flatten" or node.args[1:] not in ((2,), (2, -1), (2, 3)):
        return False
    return all(op_name(n) in ("transpose", "swapaxes") and n.args[1:] in ((1, 2), (2, 1)) for n in node.users)


def _loses_an_alias(user: fx.Node, written: set[Any]) -> bool:
    return op_name(user) in _MAY_COPY and user.meta.get("storage") in written


def _kind(user: fx.Node, model: nn.Module) -> str | None:
    """What a node does with the layout of its input: "end", "elementwise" or "hands on"; None if that is not known."""
    if user.target is deployed.normalize and _is_rms(user, model):
        return "hands on"  # where PyTorch does it
    if user.target in OURS or is_core(user) or getattr(user.target, "__name__", "") == "paths_of":
        return "end"
    name = op_name(user)
    if user.op == "call_module":
        if called(model, user, ACTIVATIONS) is not None:
            return "elementwise"
        module = type(model.get_submodule(str(user.target)))
        kinds = (_END_LAYERS, "end"), (_HANDING_LAYERS, "hands on"), (_ACTIVATION_LAYERS, "elementwise")
        return next((kind for types, kind in kinds if module in types), None)
    if user.op not in ("call_function", "call_method"):
        return None
    if name in ("mean", "sum") and _keeps_images(user):
        return "end"
    names = (_ENDS, "end"), (_HANDS_ON, "hands on"), (_ELEMENTWISE, "elementwise")
    return "elementwise" if user.target is times else next((kind for of, kind in names if name in of), None)


def _is_rms(node: fx.Node, model: nn.Module) -> bool:
    norm: Any = node.args[1]
    if len(norm) > 1:
        return bool(norm[0])
    return type(model.get_submodule(str(norm[0].target))) is nn.RMSNorm


def _keeps_images(node: fx.Node) -> bool:
    """Whether a sum or mean leaves one value of each channel, which lie in any layout alike."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(axes, (list, tuple)) and set(axes) in ({2, 3}, {-1, -2})
