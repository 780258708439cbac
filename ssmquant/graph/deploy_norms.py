"""Norms of a deployed graph that no layer has taken in: one kernel each, where there is one for them.

PyTorch's own is slow where rows are next to each other in memory and columns are not, as behind a convolution. The bias
of a float convolution in front, which PyTorch adds in a pass of its own, and an activation behind are part of it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ssmquant.graph.deploy_calls import FLOAT_CONV
from ssmquant.graph.moves import written_in
from ssmquant.graph.sites import op_name
from ssmquant.modules import deployed
from ssmquant.modules.deployed_convs import is_plain_conv

__all__ = ["activation_of", "deploy_norms", "is_norm", "norm_of"]


def is_norm(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a layer or RMS norm over the last axis."""
    if node.target in deployed.NORM_FUNCTIONS:
        known = len(node.args) == 2 and not set(node.kwargs) - {"weight", "bias", "eps"}
        shape: Any = node.args[1] if known else ()
        return known and isinstance(shape, (tuple, list)) and len(shape) == 1
    if node.op != "call_module" or len(node.args) != 1:
        return False
    module: Any = model.get_submodule(str(node.target))
    return type(module) in deployed.NORMS and len(module.normalized_shape) == 1


def norm_of(node: fx.Node) -> tuple[Any, ...]:
    """What ``modules.deployed`` takes for it, made where its graph inserts nodes."""
    if node.op == "call_module":
        return (node.graph.get_attr(str(node.target)),)
    rms = node.target is not F.layer_norm
    usual = None if rms else 1e-5
    return rms, node.kwargs.get("weight"), node.kwargs.get("bias"), node.kwargs.get("eps", usual)


def deploy_norms(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
    """Replaces the norms that ``deploy_layers`` has left in ``graph``, in place."""
    if not hasattr(engine, "normalize"):
        return
    # A convolution is computed where its norm is: not of what has been written to since.
    written = written_in(graph)
    for node in list(graph.nodes):
        if not is_norm(node, model):
            continue
        convolution, (last, act) = _convolution(node, model, written), _behind(node, model)
        with graph.inserting_before(node):
            args: tuple[Any, ...] = node.args[0], norm_of(node)
            if convolution is not None:
                args = convolution.args[0], args[1], graph.get_attr(str(convolution.target))
            if isinstance(act, fx.Node):
                act = graph.get_attr(str(act.target))
            more = {} if act is None else {"act": act, "axis": -1 if last.args[0] is node else 1}
            new = graph.call_function(deployed.normalize, args, more)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        if act is not None:
            above: Any = last.args[0]
            last.replace_all_uses_with(above)
            graph.erase_node(last)
        graph.erase_node(node)
        if convolution is not None:
            module: Any = model.get_submodule(str(convolution.target))
            if "site" in convolution.meta and is_plain_conv(module):
                new.meta["kernels"] = {convolution.meta["site"]: FLOAT_CONV}
            (turned,) = convolution.users
            graph.erase_node(turned)
            graph.erase_node(convolution)


def activation_of(node: fx.Node, model: nn.Module) -> fx.Node | str | None:
    """What ``modules.deployed`` takes for a SiLU or GELU, with the node itself for one that is a module; else None."""
    silu = node.target is F.silu
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        silu = type(module) is nn.SiLU
        known = silu or (type(module) is nn.GELU and module.approximate == "none")
    else:
        usual = {"inplace": False} if silu else {"approximate": "none"}
        known = (silu or node.target is F.gelu) and node.kwargs in ({}, usual)
    if not known or len(node.args) != 1:
        return None
    return node if node.op == "call_module" else "silu" if silu else "gelu"


def _reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads a value."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _permutes(node: Any, *axes: int) -> bool:
    """Whether a node permutes an image so."""
    return (
        isinstance(node, fx.Node)
        and op_name(node) == "permute"
        and node.args[1:] in (axes, (axes,), (list(axes),))
    )


def _convolution(norm: fx.Node, model: nn.Module, written: set[Any]) -> fx.Node | None:
    """The float convolution, of what is in no ``written`` storage, whose result alone, channels last, a norm reads."""
    turned: Any = norm.args[0]
    if not _permutes(turned, 0, 2, 3, 1) or _reader(turned) is not norm:
        return None
    above = turned.args[0]
    if above.op != "call_module" or len(above.args) != 1 or above.kwargs or _reader(above) is not turned:
        return None
    if above.args[0].meta.get("storage") in written:
        return None
    module = model.get_submodule(str(above.target))
    plain = type(module) is nn.Conv2d and module.bias is not None and module.padding_mode == "zeros"
    return above if plain else None


def _behind(norm: fx.Node, model: nn.Module) -> tuple[fx.Node, Any]:
    """The activation that alone reads a norm, channels first again or not, and what kernels take for it."""
    reader = _reader(norm)
    if reader is not None and _permutes(reader, 0, 3, 1, 2):
        reader = _reader(reader)
    return (norm, None) if reader is None else (reader, activation_of(reader, model))
