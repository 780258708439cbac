"""Projections and convolutions of a deployed graph: one call on codes each, for quantizer, weight and layer.

Results of convolutions are channels last, where nothing reads them that needs another layout.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ssmquant.graph.calls import MODE_DEPENDENT
from ssmquant.graph.deploy_calls import (
    blend_call,
    conv2d_call,
    excite_call,
    gated_linear_call,
    image_of,
    linear_call,
)
from ssmquant.graph.deploy_norms import activation_of, is_norm, norm_of
from ssmquant.graph.deploy_strides import OURS, any_strides, called, is_core
from ssmquant.graph.gains import times
from ssmquant.graph.moves import is_cast, is_move, is_number, written_in
from ssmquant.graph.orders import shape_of
from ssmquant.graph.rewrite import ACTIVATIONS, WEIGHTS
from ssmquant.graph.sites import op_name
from ssmquant.modules import PackedTensor, deployed
from ssmquant.quantizers.bank import hooks_of

__all__ = ["conv_options", "deploy_layers"]

_MOST_OF_ATTENTION = 2**14  # elements of a weight that one block holds
_LENGTHS = {linear_call: 7, gated_linear_call: 6, conv2d_call: 8}
"""Of the arguments of layers that no residual has been added to yet."""


class _Layers:
    def __init__(self, graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> None:
        self.graph, self.model, self.engine = graph, model, engine
        self.gone: set[fx.Node] = set()
        # What is written to in place may be another value where a kernel would read it.
        self.written = written_in(graph)

    def is_fixed(self, *nodes: Any) -> bool:
        return not any(isinstance(n, fx.Node) and n.meta.get("storage") in self.written for n in nodes)

    def called(self, node: Any, prefix: str) -> nn.Module | None:
        return called(self.model, node, prefix)

    def layer(self, node: fx.Node) -> bool:
        """Replaces a layer, if kernels know it."""
        arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        x, weight, bias = (arguments.get(k) for k in ("input", "weight", "bias"))
        if isinstance(weight, fx.Node):
            weight = _without_ones(weight)
        of_x, packed = self.called(x, ACTIVATIONS), self.called(weight, WEIGHTS)
        if of_x is None or not isinstance(packed, PackedTensor) or not deployed.takes_weight(packed):
            return False
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        if node.target is F.linear:
            new = self._linear(node, x, of_x, weight, packed, bias)
        else:
            options = conv_options(node)
            if not self._takes_conv(of_x, packed, *options):
                return False
            stride, padding, dilation, _ = options
            new = self._conv(node, x, of_x, weight, packed, bias, (stride, padding, dilation))
        if new is None:
            return False
        exact = not deployed.dynamic(of_x, self.engine) and not (
            node.target is F.conv2d and packed.shape[1] == 1
        )
        if "site" in node.meta:
            new.meta["kernels"] = {node.meta["site"]: "products of codes" if exact else "products of levels"}
        self._erase(node, x, weight)
        return True

    def product(self, node: fx.Node) -> bool:
        """Replaces ``weight @ x``, where x has a column for each row of a linear layer's input."""
        if op_name(node) not in ("matmul", "mm") or len(node.args) != 2 or node.kwargs:
            return False
        weight, x = node.args
        of_x, packed = self.called(x, ACTIVATIONS), self.called(weight, WEIGHTS)
        shape = shape_of(node)
        if of_x is None or not isinstance(packed, PackedTensor) or not deployed.takes_weight(packed):
            return False
        if shape is None or len(shape) != 2 or len(packed.shape) != 2 or not deployed.static(of_x):
            return False  # a dynamic range would be of one row of many samples
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        with self.graph.inserting_before(node):
            turned = self.graph.call_method("t", (x.args[0],))
            args = (turned, self._owner(x), self._owner(weight), None, None, None, -1)
            rows = self.graph.call_function(linear_call, args)
            new = self.graph.call_method("t", (rows,))
        rows.meta["shape"] = shape[::-1]
        if "site" in node.meta:
            rows.meta["kernels"] = {node.meta["site"]: "products of codes"}
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        self._erase(node, x, weight)
        return True

    def _linear(
        self, node: fx.Node, x: fx.Node, of_x: nn.Module, weight: fx.Node, packed: PackedTensor, bias: Any
    ) -> fx.Node | None:
        axes = len(shape_of(node) or ())
        by_row = deployed.by_row(of_x, axes - 1, self.engine)
        if len(packed.shape) != 2 or axes < 2 or not (by_row or self._takes_input(of_x, packed)):
            return None
        value = self._any_layout(x.args[0])
        gate = self._gate(value, x)
        last, act = node, None
        with self.graph.inserting_before(node):
            owners = self._owner(x), self._owner(weight)
            if gate is not None:
                y, z = gate
                norm = self._norm(y)
                args: tuple[Any, ...] = (self._before(norm, y), z, self._norm_of(norm), *owners, bias)
                new = self.graph.call_function(gated_linear_call, args)
            else:
                norm = self._norm(value) if by_row or deployed.static(of_x) else None
                last, act = self._activation(node)
                args = (self._before(norm, value), *owners, bias, self._norm_of(norm), act, -1)
                new = self.graph.call_function(linear_call, args)
        self._replace(node, last, new)
        return new

    def _replace(self, node: fx.Node, last: fx.Node, new: fx.Node) -> None:
        """Puts ``new`` in the place of a layer's result, or, if that is ``last``, of its activation."""
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        if last is not node:
            new.meta.pop("mutates", None)  # what an activation in place wrote to is no value any more
            self.graph.erase_node(last)
            self.gone.add(last)

    def _conv(
        self,
        node: fx.Node,
        x: fx.Node,
        of_x: nn.Module,
        weight: fx.Node,
        packed: PackedTensor,
        bias: Any,
        window: deployed.Window,
    ) -> fx.Node:
        value = self._any_layout(x.args[0])
        gain: Any = None
        if value.target is times and list(value.users) == [x]:
            gain, value = value.args[1], self._any_layout(value.args[0])
        last, act = node, None
        with self.graph.inserting_before(node):
            owners = self._owner(x), self._owner(weight)
            norm = None
            depthwise = deployed.is_depthwise(packed)
            pointwise = not depthwise and deployed.is_pointwise(packed.shape[2:] or (1, 1), window)
            if pointwise and gain is None and deployed.static(of_x) and _is_channels_first(value):
                norm = self._norm(self._any_layout(value.args[0]))
            if pointwise or depthwise:
                last, act = self._activation(node)
            if norm is not None:  # a product of rows, which then are channels first
                before, fused = self._before(norm, value), self._norm_of(norm)
                args: tuple[Any, ...] = (before, *owners, bias, fused, act, 1)
                rows = self.graph.call_function(linear_call, args)
                new = self.graph.call_method("permute", (rows, 0, 3, 1, 2))
                if not any_strides(last, self.model, self.written):
                    new = self.graph.call_method("contiguous", (new,))
            else:
                args = (value, *owners, bias, window, act, any_strides(last, self.model, self.written), gain)
                new = self.graph.call_function(conv2d_call, args)
        self._replace(node, last, new)
        return new

    def _any_layout(self, value: Any) -> Any:
        """What a value was before it was made contiguous, or cast to float32, as all is that kernels take."""
        while isinstance(value, fx.Node) and self.is_fixed(value, *value.args[:1]):
            if not is_cast(value) and (op_name(value) != "contiguous" or len(value.args) != 1):
                break
            value = value.args[0]
        return value

    def _owner(self, node: fx.Node) -> fx.Node:
        """The module that a node calls."""
        return self.graph.get_attr(str(node.target))

    def _erase(self, *nodes: fx.Node) -> None:
        """Nodes that nothing reads any more, and what led to them alone."""
        for node in nodes:
            if (
                node in self.gone
                or node.users
                or node.op in ("placeholder", "get_attr")
                or node.meta.get("mutates")
            ):
                continue
            before = node.all_input_nodes
            self.graph.erase_node(node)
            self.gone.add(node)
            self._erase(*(n for n in before if is_move(n) or self._is_plain(n)))

    def _is_plain(self, node: fx.Node) -> bool:
        """A module or function that kernels stand for."""
        if node.target is times:
            return True
        if node.op == "call_module":
            return type(self.model.get_submodule(str(node.target))) in (*deployed.NORMS, nn.SiLU)
        return node.op != "placeholder" and op_name(node) in ("silu", "mul", "layer_norm", "rms_norm")

    def _norm(self, node: Any) -> fx.Node | None:
        """``node`` if it is a layer or RMS norm over the last axis that one node alone reads."""
        if not isinstance(node, fx.Node) or len(node.users) != 1 or not self.is_fixed(node, *node.args[:1]):
            return None
        known = node.args[2] == 0 if node.target is times else is_norm(node, self.model)
        return node if known else None

    def _norm_of(self, node: fx.Node | None) -> tuple[Any, ...] | None:
        """What ``modules.deployed`` takes for it."""
        if node is None:
            return None
        if node.target is times:
            norm = self._with_factors(node)
            return (node.args[1],) if norm is None else self._times(norm, node.args[1])
        return norm_of(node)

    def _with_factors(self, node: fx.Node) -> fx.Node | None:
        """The norm whose result has factors, if these are in no module's weights since it is a function."""
        norm = self._norm(node.args[0]) if node.target is times else None
        return norm if norm is not None and norm.target in deployed.NORM_FUNCTIONS else None

    def _times(self, norm: fx.Node, gain: Any) -> tuple[Any, ...]:
        rms, weight, bias, eps = self._norm_of(norm) or ()
        weight = gain if weight is None else self.graph.call_function(operator.mul, (weight, gain))
        return (
            rms,
            weight,
            None if bias is None else self.graph.call_function(operator.mul, (bias, gain)),
            eps,
        )

    def _before(self, norm: fx.Node | None, value: fx.Node) -> Any:
        """What a norm is of, or the value where there is none."""
        return value if norm is None else (self._with_factors(norm) or norm).args[0]

    def _gate(self, value: Any, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(y, z) if ``value``, which only ``x`` reads, is y * silu(z)."""
        if not isinstance(value, fx.Node) or op_name(value) != "mul" or list(value.users) != [x]:
            return None
        if len(value.args) != 2 or value.kwargs or not all(isinstance(a, fx.Node) for a in value.args):
            return None
        for y, gate in (value.args, value.args[::-1]):
            assert isinstance(gate, fx.Node)
            if not self._is_silu(gate) or len(gate.users) != 1:
                continue
            z = gate.args[0]
            if (
                not isinstance(z, fx.Node)
                or not isinstance(y, fx.Node)
                or not self.is_fixed(value, y, gate, z)
            ):
                continue
            if shape_of(y) == shape_of(z) and shape_of(z) is not None:
                return y, z
        return None

    def _gates(self, silu: fx.Node) -> bool:
        """Whether a SiLU is part of the linear layer that its product with another value goes to."""
        product = next(iter(silu.users), silu)
        reader = next(iter(product.users), None)
        if reader is None or self.called(reader, ACTIVATIONS) is None or self._gate(product, reader) is None:
            return False
        return any(user.target is F.linear for user in reader.users)

    def _takes_conv(
        self, of_x: nn.Module, weight: PackedTensor, stride: Any, padding: Any, dilation: Any, groups: Any
    ) -> bool:
        kernel = weight.shape[2:] or (1, 1)
        if len(kernel) != 2 or None in (stride, padding, dilation):
            return False
        if groups > 1:
            keeps = all(
                k % 2 and p == (k - 1) * d // 2 for k, p, d in zip(kernel, padding, dilation, strict=True)
            )
            if not keeps or stride != (1, 1) or weight.shape[:2] != (groups, 1):
                return False
            span = max((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
            return span <= self.engine.MOST_SPAN and deployed.coded(of_x, self.engine)
        if weight.shape[1] == 1:
            return False  # it would pass for a depthwise one
        if deployed.is_pointwise(kernel, (stride, padding, dilation)):
            return self._takes_input(of_x, weight) or deployed.by_row(of_x, 1, self.engine)
        return deployed.static(of_x)

    def _takes_input(self, of_x: nn.Module, weight: PackedTensor) -> bool:
        return deployed.static(of_x) or (
            deployed.dynamic(of_x, self.engine) and weight.shape[1] <= self.engine.MOST_INPUTS
        )

    def _is_silu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return type(module) is nn.SiLU and not hooks_of(module)
        return node.target is F.silu

    def _activation(self, node: fx.Node) -> tuple[fx.Node, Any]:
        """A SiLU or GELU of a layer's result, if nothing else reads that, and what kernels take for it.

        Else ``node`` itself, and None.
        """
        none = node, None
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.args != (node,):
            return none
        act = activation_of(user, self.model)
        if act is None:
            return none
        silu = isinstance(act, fx.Node) and type(self.model.get_submodule(str(act.target))) is nn.SiLU
        if (silu or act == "silu") and node.target is F.linear and self._gates(user):
            return none
        return user, self._owner(act) if isinstance(act, fx.Node) else act

    def sum(self, node: fx.Node) -> bool:
        """Makes a sum part of the kernel that makes one of its terms, or one kernel of a sum and its factors."""
        if op_name(node) != "add" or len(node.args) != 2 or node.kwargs or node.meta.get("mutates"):
            return False
        for value, other in (node.args, node.args[::-1]):
            if not isinstance(value, fx.Node) or not isinstance(other, fx.Node):
                return False
            if (
                shape_of(value) != shape_of(node)
                or shape_of(other) != shape_of(node)
                or not self.is_fixed(node)
            ):
                continue
            if self._residual(node, value, other) or self._blend(node, value, other):
                return True
        return False

    def _residual(self, node: fx.Node, value: fx.Node, other: fx.Node) -> bool:
        turned = _is_channels_first(value) and len(value.users) == 1  # rows of an image
        image = _image_of_rows(value)
        layer: Any = image if image is not None else value.args[0] if turned else value
        if layer.target not in _LENGTHS or len(layer.args) != _LENGTHS[layer.target] or layer.kwargs:
            return False
        if len(layer.users) != 1 or layer is other or not self.is_fixed(value, *layer.args[:2], other):
            return False
        args = list(layer.args)
        if layer.target is conv2d_call:
            weight: Any = self.model.get_submodule(str(args[2].target))
            kernel = weight.shape[2:] or (1, 1)
            if turned or deployed.is_depthwise(weight):
                return False
            if not deployed.is_pointwise(kernel, args[4]) and not self.engine.ADDS:
                return False
            if image is not None and not _keeps_size(kernel, args[4]):
                return False
            if image is None:
                args[6] = any_strides(node, self.model, self.written)
        elif image is not None:
            return False
        x, gain = (other, None) if turned or layer.target is conv2d_call else self._scaled(other, node)
        with self.graph.inserting_before(node):
            if turned:
                x = self.graph.call_method("permute", (x, 0, 2, 3, 1))
            if image is not None:
                pixels = (self.graph.call_method("size", (args[0], i)) for i in (2, 3))
                x = self.graph.call_function(image_of, (x, *pixels))
            made = new = self.graph.call_function(layer.target, (*args, (x, gain)))
            if image is not None:
                flat: Any = value.args[0]
                new = self.graph.call_method("flatten", (made, 2))
                new.meta.update(flat.meta)
                new = self.graph.call_method("transpose", (new, 1, 2))
            if turned:
                new = self.graph.call_method("permute", (made, 0, 3, 1, 2))
                new = (
                    new
                    if any_strides(node, self.model, self.written)
                    else self.graph.call_method("contiguous", (new,))
                )
        shape = shape_of(layer)
        new.meta.update(node.meta)
        made.meta.update(layer.meta)
        made.meta["shape"] = shape if turned or image is not None else shape_of(node)
        node.replace_all_uses_with(new)
        self._erase(node, value, layer, other)
        return True

    def drop_identity(self, node: fx.Node) -> str | None:
        """Leaves out a module that gives back what it gets in eval mode; its name."""
        if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        module = self.model.get_submodule(str(node.target))
        if type(module) not in (nn.Identity, nn.Dropout) and not _drops_paths(module, shape_of(node)):
            return None
        node.replace_all_uses_with(node.args[0])
        self.graph.erase_node(node)
        return str(node.target)

    def _scaled(self, node: fx.Node, user: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """(x, gain) where ``node``, which only ``user`` reads, is x by a vector of its last axis."""
        if op_name(node) == "mul" and list(node.users) == [user] and len(node.args) == 2 and not node.kwargs:
            for x, gain in (node.args, node.args[::-1]):
                shape = shape_of(x) if isinstance(x, fx.Node) else None
                if shape is None or not isinstance(gain, fx.Node) or gain.op != "get_attr":
                    continue
                found = operator.attrgetter(str(gain.target))(self.model)
                fits = (
                    isinstance(found, Tensor) and found.shape == shape[-1:] and found.dtype == torch.float32
                )
                if fits and shape == shape_of(node) and self.is_fixed(x, gain):
                    assert isinstance(x, fx.Node)
                    return x, gain
        return node, None

    def _blend(self, node: fx.Node, value: fx.Node, other: fx.Node) -> bool:
        """The sum of x and v * scale: v an image with channels last, scale one of each channel and sample."""
        v = self._any_layout(value)
        if len(v.users) != 1 or op_name(v) != "permute" or tuple(v.args[1:]) != (0, 2, 3, 1):
            return False
        product = v.args[0]
        if op_name(product) != "mul" or len(product.users) != 1 or len(product.args) != 2 or product.kwargs:
            return False
        for image, scale in (product.args, product.args[::-1]):
            shape, whole = (shape_of(n) if isinstance(n, fx.Node) else None for n in (scale, image))
            if (
                shape is None
                or whole is None
                or whole != shape_of(product)
                or not self.is_fixed(image, scale, other)
            ):
                continue
            if len(whole) != 4 or shape != (*whole[:2], 1, 1) or whole[2:] == (1, 1):
                continue
            x, gain = self._scaled(other, node)
            with self.graph.inserting_before(node):
                last = self.graph.call_method("permute", (image, 0, 2, 3, 1))
                new = self.graph.call_function(blend_call, (x, gain, last, scale))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            self._erase(node, value, v, product, other)
            return True
        return False

    def attention(self, node: fx.Node) -> None:
        """Makes channel attention, five modules of small kernels, one call where there is a kernel for it."""
        if not hasattr(self.engine, "excite"):
            return
        modules: list[Any] = []
        first: Any = node
        for kind in (nn.Sigmoid, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.AdaptiveAvgPool2d):
            if not isinstance(first, fx.Node) or first.op != "call_module" or len(first.args) != 1:
                return
            module = self.model.get_submodule(str(first.target))
            if type(module) is not kind or (first is not node and len(first.users) != 1):
                return
            modules.append((first, module))
            first = first.args[0]
        pooled, *convs = (modules[i][1] for i in (4, 3, 1))
        if pooled.output_size not in (1, (1, 1)) or not all(map(_is_plain_pointwise, convs)):
            return
        if not self.is_fixed(first):
            return
        with self.graph.inserting_before(node):
            owners = (self._owner(n) for n, _ in reversed(modules))
            new = self.graph.call_function(excite_call, (first, *owners))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        for n, _ in modules:
            self.graph.erase_node(n)

    def drop_copy(self, node: fx.Node) -> None:
        """Leaves out what makes a result of kernels contiguous for readers that take any strides."""
        if node.op != "call_method" or node.target != "contiguous" or len(node.args) != 1:
            return
        source: Any = node.args[0]
        while isinstance(source, fx.Node) and (
            is_cast(source) or op_name(source) in ("permute", "transpose")
        ):
            source = source.args[0]
        ours = isinstance(source, fx.Node) and (source.target in OURS or is_core(source))
        before = node.args[0]
        if (
            ours
            and isinstance(before, fx.Node)
            and self.is_fixed(node, before)
            and any_strides(node, self.model, self.written)
        ):
            node.replace_all_uses_with(before)
            self.graph.erase_node(node)


def conv_options(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """Stride, padding and dilation, a pair each or None for what is none, and groups."""
    names = ("stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, (1, 0, 1, 1), strict=True))
    given |= {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
    stride, padding, dilation = (_pair(given[k]) for k in names[:3])
    return stride, padding, dilation, given["groups"]


def _is_plain_pointwise(conv: nn.Conv2d) -> bool:
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return plain and conv.bias is not None and conv.in_channels * conv.out_channels <= _MOST_OF_ATTENTION


def _pair(value: Any) -> tuple[int, int] | None:
    both = (
        (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    )
    if len(both) == 1:
        both *= 2
    return both if len(both) == 2 and all(isinstance(v, int) for v in both) else None


def _without_ones(weight: fx.Node) -> fx.Node:
    """A matrix that was given axes of size 1 behind it, to be the weight of a convolution."""
    shape = shape_of(weight)
    node: Any = weight
    while (
        shape is not None
        and node.op != "call_module"
        and op_name(node) in ("view", "reshape", "unsqueeze", "getitem")
    ):
        if len([i for i in node.all_input_nodes if not is_number(i)]) != 1:
            return weight
        node = node.args[0]
    same = (
        node.op == "call_module"
        and len(shape_of(node) or ()) == 2
        and shape == (*(shape_of(node) or ()), 1, 1)
    )
    return node if same else weight


def _drops_paths(module: nn.Module, shape: Any) -> bool:
    """Whether a module, by the name of its class, drops paths in training, and does nothing in eval mode."""
    if type(module).__name__ not in MODE_DEPENDENT or shape is None or module.training or hooks_of(module):
        return False
    probe = torch.ones([1] * len(shape))
    try:
        with torch.no_grad():
            return torch.equal(module(probe), probe)
    except Exception:  # of a user's class, that wants something else
        return False


def _keeps_size(kernel: Any, window: deployed.Window) -> bool:
    """Whether a convolution's result has as many lines and columns as its input, whatever these are."""
    stride, padding, dilation = window
    spans = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
    return stride == (1, 1) and all(2 * p == span for p, span in zip(padding, spans, strict=True))


def _image_of_rows(value: Any) -> Any:
    """The image (B, C, H, W) whose pixels are the rows of ``value``, if nothing else reads what is between."""
    for name, args in (("transpose", (1, 2)), ("flatten", (2,))):
        if not isinstance(value, fx.Node) or op_name(value) != name or tuple(value.args[1:]) != args:
            return None
        if len(value.users) != 1 or value.kwargs:
            return None
        value = value.args[0]
    shape = shape_of(value) if isinstance(value, fx.Node) else None
    return value if shape is not None and len(shape) == 4 else None


def _is_channels_first(value: Any) -> bool:
    return (
        isinstance(value, fx.Node) and op_name(value) == "permute" and tuple(value.args[1:]) == (0, 3, 1, 2)
    )


def deploy_layers(graph: fx.Graph, model: nn.Module, engine: deployed.Engine) -> bool:
    """Replaces the layers of ``graph``, in place; whether there was one."""
    layers = _Layers(graph, model, engine)
    changed = False
    dropped = {layers.drop_identity(node) for node in list(graph.nodes)} - {None}
    graph.output_node().meta["left_out"] = sorted(map(str, dropped))
    for node in list(graph.nodes):
        changed |= layers.layer(node) if node.target in (F.linear, F.conv2d) else layers.product(node)
    for node in list(graph.nodes):
        if node not in layers.gone:
            layers.sum(node)
    for node in list(graph.nodes):
        layers.drop_copy(node)
    for node in list(graph.nodes):
        layers.attention(node)
    return changed
