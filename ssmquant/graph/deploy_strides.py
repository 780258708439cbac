"""What in a deployed graph takes tensors in any layout, so that kernels may leave channels last in memory."""

from __future__ import annotations

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
# What does not care for strides: all, or all but those of its own readers.
_MOVERS = {
    "contiguous", "permute", "transpose", "flatten", "reshape", "movedim", "moveaxis", "swapaxes", "size", "mean",
    "sum", "getitem", "conv2d", "linear", "adaptive_avg_pool2d", "pixel_shuffle", "layer_norm", "rms_norm",
}  # fmt: skip
# Their results lie in memory as what they read does.
_VIEWS = {"permute", "transpose", "flatten", "movedim", "moveaxis", "swapaxes", "getitem"}
_SAME_LAYOUT = {"conv2d", "pixel_shuffle"}
_SAME_LAYOUT_LAYERS = (nn.Conv2d, nn.PixelShuffle)
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "truediv", "iadd", "imul", "silu", "gelu", "relu", "sigmoid", "leaky_relu", "float",
    "to", "neg", "clamp", "tanh", "softplus",
}  # fmt: skip
_LAYERS = (nn.Conv2d, nn.Linear, *deployed.NORMS, nn.AdaptiveAvgPool2d, nn.PixelShuffle)
_ACTIVATION_LAYERS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.LeakyReLU, nn.ReLU6, nn.Identity, nn.Dropout)


def is_core(node: fx.Node) -> bool:
    """Whether a node is a scan with all around it, see ``deploy_scans``."""
    return getattr(node.target, "__name__", "") == "scan_core"


def called(model: nn.Module, node: object, prefix: str) -> nn.Module | None:
    """The quantizer or packed tensor that a node calls; ``prefix``: which of them."""
    if isinstance(node, fx.Node) and node.op == "call_module" and str(node.target).startswith(f"{prefix}."):
        return model.get_submodule(str(node.target))
    return None


def any_strides(node: fx.Node, model: nn.Module) -> bool:
    """Whether all that reads ``node`` takes it in any layout."""
    return all(_takes_any_strides(user, model) for user in node.users)


def _takes_any_strides(user: fx.Node, model: nn.Module) -> bool:
    if user.target in OURS or is_core(user) or getattr(user.target, "__name__", "") == "paths_of":
        return True
    if user.op == "call_module":
        if called(model, user, ACTIVATIONS) is not None:
            return any_strides(user, model)
        kind = type(model.get_submodule(str(user.target)))
        if kind in _LAYERS:
            return kind not in _SAME_LAYOUT_LAYERS or not _viewed(user)
        return kind in _ACTIVATION_LAYERS and any_strides(user, model)
    if user.op not in ("call_function", "call_method"):
        return False
    name = op_name(user)
    if name in _MOVERS:
        return name not in (_VIEWS | _SAME_LAYOUT) or not _viewed(user)
    return (name in _ELEMENTWISE or user.target is times) and any_strides(user, model)


def _viewed(node: fx.Node) -> bool:
    """Whether the code asks for ``node`` in another shape by ``view``, which some layouts do not allow."""
    return any(op_name(user) == "view" or (op_name(user) in _VIEWS and _viewed(user)) for user in node.users)
