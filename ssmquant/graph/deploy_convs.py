"""Float convolutions of a deployed graph, which ``deploy_layers`` has left: one call each, on engines that have one.

A sum with a value of the result's shape is part of it, where nothing else reads the convolution.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.deploy_calls import FLOAT_CONV, float_conv2d_call
from ssmquant.graph.deploy_layers import conv_options
from ssmquant.graph.deploy_strides import any_strides
from ssmquant.graph.moves import written_in
from ssmquant.graph.orders import shape_of
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed
from ssmquant.modules.deployed_convs import is_plain_conv
from ssmquant.ops.deployed.cuda_conv import is_small_window

__all__ = ["deploy_convs"]


def _is_tensor(node: Any, model: nn.Module) -> bool:
    """Whether a node is a float32 tensor of the model."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    found = attrgetter(str(node.target))(model)
    return isinstance(found, Tensor) and found.dtype == torch.float32


def _of_module(node: fx.Node, model: nn.Module) -> tuple[Any, Any] | None:
    """What ``float_conv2d_call`` takes for a call of a module: x and the layer."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = model.get_submodule(str(node.target))
    if type(module) is not nn.Conv2d or not is_plain_conv(module):
        return None
    if any(p.dtype != torch.float32 for p in module.parameters()):
        return None
    return node.args[0], node.graph.get_attr(str(node.target))


def _of_function(node: fx.Node, model: nn.Module) -> tuple[Any, Any] | None:
    """As ``_of_module``, for the function of a weight and bias of the model."""
    if node.target is not F.conv2d:
        return None
    given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(
        node.kwargs
    )
    x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    *window, groups = conv_options(node)
    known = _is_tensor(weight, model) and (bias is None or _is_tensor(bias, model))
    if not known or weight is None or groups != 1 or None in window:
        return None
    small = is_small_window(attrgetter(str(weight.target))(model).shape)
    return (x, (weight, bias, *window)) if small else None


def _replace(node: fx.Node, model: nn.Module, written: set[Any]) -> None:
    """A convolution, if kernels know it."""
    with node.graph.inserting_before(node):
        found = _of_module(node, model) or _of_function(node, model)
        if found is None:
            return
        new = node.graph.call_function(float_conv2d_call, (*found, any_strides(node, model, written)))
    new.meta.update(node.meta)
    if "site" in node.meta:
        new.meta["kernels"] = {node.meta["site"]: FLOAT_CONV}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _sum(node: fx.Node, model: nn.Module, written: set[Any]) -> None:
    """Makes a sum part of the convolution that makes one of its terms."""
    if op_name(node) != "add" or len(node.args) != 2 or node.kwargs or node.meta.get("mutates"):
        return
    for value, other in (node.args, node.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(other, fx.Node) or value is other:
            return
        if value.target is not float_conv2d_call or len(value.args) != 3 or list(value.users) != [node]:
            continue
        shapes = {shape_of(n) for n in (node, value, other)}
        if None in shapes or len(shapes) > 1:
            continue
        # The convolution is computed where the sum is: not of what has been written to since.
        if any(n.meta.get("storage") in written for n in (*value.all_input_nodes, other)):
            continue
        with node.graph.inserting_before(node):
            args = *value.args[:2], any_strides(node, model, written), other
            new = node.graph.call_function(float_conv2d_call, args)
        new.meta.update(node.meta)
        new.meta["kernels"] = value.meta.get("kernels", {})
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        node.graph.erase_node(value)
        return


def deploy_convs(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
    """Replaces the convolutions of ``graph``, which ``deploy_norms`` has been through, in place."""
    if not hasattr(engine, "convolve_floats"):
        return
    written = written_in(graph)
    for node in list(graph.nodes):
        _replace(node, model, written)
    for node in list(graph.nodes):
        _sum(node, model, written)
