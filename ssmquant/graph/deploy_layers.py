"""Projections and convolutions of a deployed graph on a CPU: one call on codes each, for quantizer, weight and layer.

Results of convolutions are channels last, where nothing reads them that needs another layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.orders import Unfit, shape_of
from ssmquant.graph.rewrite import ACTIVATIONS, WEIGHTS
from ssmquant.graph.sites import op_name
from ssmquant.modules import PackedTensor, deployed
from ssmquant.ops.deployed import cpu

__all__ = ["deploy_layers"]

# What does not care for strides: all, or all but those of its own readers.
_MOVERS = {
    "contiguous", "permute", "transpose", "flatten", "reshape", "movedim", "moveaxis", "swapaxes", "size", "mean",
    "sum", "getitem", "conv2d", "linear", "adaptive_avg_pool2d", "pixel_shuffle",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "truediv", "iadd", "imul", "silu", "gelu", "relu", "sigmoid", "leaky_relu", "float",
    "to", "neg", "clamp", "tanh", "softplus",
}  # fmt: skip
_LAYERS = (nn.Conv2d, nn.AdaptiveAvgPool2d, nn.PixelShuffle)
_ACTIVATION_LAYERS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.LeakyReLU, nn.ReLU6, nn.Identity, nn.Dropout)


def _linear(x: Tensor, of_x: nn.Module, weight: PackedTensor, bias: Tensor | None) -> Tensor:
    _check(x)
    return deployed.linear(x, of_x, weight, bias)


def _conv2d(
    x: Tensor,
    of_x: nn.Module,
    weight: PackedTensor,
    bias: Tensor | None,
    dilation: tuple[int, int],
    act: Any,
    last: bool,
) -> Tensor:
    _check(x)
    y = deployed.conv2d(x, of_x, weight, bias, dilation, act)
    return y if last else y.contiguous()


def _check(x: Tensor) -> None:
    """The kernels are for float32, and for something."""
    if x.dtype != torch.float32 or not x.numel():
        raise Unfit


class _Layers:
    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model

    def called(self, node: Any, prefix: str) -> nn.Module | None:
        """The quantizer or packed tensor that a node calls."""
        if (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and str(node.target).startswith(f"{prefix}.")
        ):
            return self.model.get_submodule(str(node.target))
        return None

    def layer(self, node: fx.Node) -> bool:
        """Replaces a layer, if kernels know it."""
        arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        x, weight, bias = (arguments.get(k) for k in ("input", "weight", "bias"))
        of_x, packed = self.called(x, ACTIVATIONS), self.called(weight, WEIGHTS)
        if of_x is None or not isinstance(packed, PackedTensor) or not deployed.takes_weight(packed):
            return False
        assert isinstance(x, fx.Node)
        if node.target is F.linear:
            takes = len(packed.shape) == 2 and len(shape_of(node) or ()) >= 2
            takes = takes and (
                deployed.static(of_x) or (deployed.dynamic(of_x) and packed.shape[1] <= cpu.MOST_INPUTS)
            )
            rest: tuple[Any, ...] = ()
        else:
            options = node.args[3:] if len(node.args) == 7 else None
            takes = options is not None and not node.kwargs and self._takes_conv(of_x, packed, *options)
            rest = (options[2], None, self._any_strides(node)) if options else ()  # dilation
        if not takes:
            return False
        value: Any = x.args[0]
        between: list[fx.Node] = []
        while op_name(value) == "contiguous" and len(value.args) == 1:  # any strides do
            between.append(value)
            value = value.args[0]
        like, act = node, None
        if rest and packed.shape[1] == 1 and (act := self._silu(node)) is not None:
            like = act
            rest = (rest[0], None, self._any_strides(act))
        with self.graph.inserting_before(node):
            owners = [self.graph.get_attr(str(n.target)) for n in (x, weight)]  # type: ignore[union-attr]
            if act is not None and act.op == "call_module":
                rest = (rest[0], self.graph.get_attr(str(act.target)), rest[2])
            elif act is not None:
                rest = (rest[0], _SILU, rest[2])
            target: Any = _linear if node.target is F.linear else _conv2d
            new = self.graph.call_function(target, (value, *owners, bias, *rest))
        new.meta.update(like.meta)
        like.replace_all_uses_with(new)
        for n in dict.fromkeys((like, node, weight, x, *between)):
            if not n.users:  # type: ignore[union-attr]
                self.graph.erase_node(n)  # type: ignore[arg-type]
        return True

    def _takes_conv(
        self, of_x: nn.Module, weight: PackedTensor, stride: Any, padding: Any, dilation: Any, groups: Any
    ) -> bool:
        kernel = weight.shape[2:]
        if len(kernel) != 2 or stride != (1, 1) or not isinstance(padding, tuple):
            return False
        if any(
            k % 2 == 0 or p != (k - 1) * d // 2 for k, p, d in zip(kernel, padding, dilation, strict=True)
        ):
            return False
        if groups > 1:
            span = max((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
            return weight.shape[:2] == (groups, 1) and span <= cpu.MOST_SPAN and deployed.coded(of_x)
        if weight.shape[1] == 1:
            return False  # it would pass for a depthwise one
        if kernel == (1, 1):
            return deployed.static(of_x) or (deployed.dynamic(of_x) and weight.shape[1] <= cpu.MOST_INPUTS)
        return deployed.static(of_x)

    def _silu(self, node: fx.Node) -> fx.Node | None:
        """SiLU of a layer's result, if nothing else reads that."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.args[:1] != (node,):
            return None
        if user.op == "call_module" and type(self.model.get_submodule(str(user.target))) is nn.SiLU:
            return user
        return user if user.target is F.silu else None

    def _any_strides(self, node: fx.Node) -> bool:
        """Whether all that reads ``node`` takes it in any layout."""
        return all(self._takes_any_strides(user) for user in node.users)

    def _takes_any_strides(self, user: fx.Node) -> bool:
        if user.target in (_linear, _conv2d) or getattr(user.target, "__name__", "") in (
            "scan_core",
            "paths_of",
        ):
            return True
        if user.op == "call_module":
            if self.called(user, ACTIVATIONS) is not None:
                return self._any_strides(user)
            module = self.model.get_submodule(str(user.target))
            return type(module) in _LAYERS or (type(module) in _ACTIVATION_LAYERS and self._any_strides(user))
        if user.op not in ("call_function", "call_method"):
            return False
        name = op_name(user)
        return name in _MOVERS or (name in _ELEMENTWISE and self._any_strides(user))


_SILU = nn.SiLU()


def deploy_layers(graph: fx.Graph, model: nn.Module) -> bool:
    """Replaces the layers of ``graph``, in place; whether there was one."""
    layers = _Layers(graph, model)
    changed = False
    for node in list(graph.nodes):
        if node.target in (F.linear, F.conv2d):
            changed |= layers.layer(node)
    return changed
