"""The recorder's lower half: the graph under construction, and which node stands for which tensor or size.

It knows the model's own tensors, writes nodes with the place in the user's code that they come from, and turns
arguments of the user's calls into nodes or into the fakes that stand for them. ``tracer`` decides which calls to write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from ssmquant.adapter import FunctionRole, ScanRole
from ssmquant.errors import TraceError
from ssmquant.graph.calls import user_frame
from ssmquant.graph.functions import FunctionModule
from ssmquant.graph.provenance import OPS, Guard, IntShim, SFloat, SInt, SSize, strip

__all__ = ["ADOPTED", "Rules", "Writer"]

ADOPTED = "_adopted"
"""The child of a prepared model for modules that the user's code makes in ``forward`` or keeps in plain lists."""


@dataclass
class Rules:
    """What the trace of a model goes by.

    Args:
        leaf: Says whether a module becomes one ``call_module`` node.
        scans: The user's selective scans.
        functions: The user's other Functions of native code.
        adopted: Modules that earlier runs adopted, in the order in which the code meets them; runs add to it.
        platform: ``"cuda"`` or ``"rocm"``, where kernels of the two compute something else.
    """

    leaf: Callable[[nn.Module], bool]
    scans: tuple[ScanRole, ...] = ()
    functions: tuple[FunctionRole, ...] = ()
    adopted: list[nn.Module] = field(default_factory=list)
    platform: str = "cuda"


class Writer(TorchFunctionMode):
    """The state of one run, and the graph that it writes.

    Args:
        root: The model; its parameters and buffers are read, never written.
        rules: How modules and Functions are treated.
        hashable: Let sizes be hashed (at the price of a guard on their value).
    """

    def __init__(self, root: nn.Module, rules: Rules, *, hashable: bool = False) -> None:
        super().__init__()
        self.root, self.rules, self.hashable = root, rules, hashable
        self.adopted: list[nn.Module] = []  # modules of no one that this run met, in order
        self.asked_hash = False
        self.again: Callable[[tuple[Any, ...]], Any] | None = (
            None  # what self(...) means inside the traced method
        )
        self.busy = 0
        self.graph = fx.Graph()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # id -> (object, node, fake). The object is held so that no id is ever reused while tracing.
        self.values: dict[int, tuple[Any, fx.Node, Tensor]] = {}
        self.keep: list[Any] = []
        self.owned: dict[int, str] = {}
        self.stand_ins: dict[int, nn.Module] = {}  # id of a module made in forward -> the adopted one
        self.module_names: dict[int, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.functions: dict[str, FunctionModule] = {}
        self.guards: list[Guard] = []
        self.baked: dict[str, str] = {}
        self.rebound: dict[str, str] = {}
        self.size_nodes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.expr_nodes: dict[Any, fx.Node] = {}
        self.stack: list[str] = []
        self.training_read: dict[str, bool] = {}
        self.region: int | None = None
        self.regions = 0
        self.reads_dtype = self.uses_device = self.reads_layout = self.reads_grad = self.sets_modes = False
        self.reads_parameter_dtype = False
        self._collect_owned()

    # ---- what belongs to the model -------------------------------------------------------------------------------
    def _collect_owned(self) -> None:
        for name, mod in self.root.named_modules():
            self.module_names[id(mod)] = name
            prefix = f"{name}." if name else ""
            self._own(mod, prefix)

    def _own(self, mod: nn.Module, prefix: str) -> None:
        for store in (mod._parameters, mod._buffers, vars(mod)):
            for k, v in list(store.items()):
                if isinstance(v, Tensor):
                    self.owned.setdefault(id(v), prefix + k)
                    self.keep.append(v)

    def adopt(self, mod: nn.Module) -> nn.Module:
        """The module that stands for ``mod``, which is no registered submodule: the same one in every run.

        Code that makes a convolution in ``forward`` makes another one in each run; the first is kept.
        """
        index = len(self.adopted)
        kept = self.rules.adopted
        if index < len(kept):
            if _outline(kept[index]) != _outline(mod):
                raise self.fail(
                    f"The code makes a {type(mod).__name__} in forward, and another kind of it at other input sizes.",
                    "Make it in __init__ and assign it to an attribute.",
                )
            mod_, kept_ = mod, kept[index]
        else:
            kept.append(mod)
            mod_, kept_ = mod, mod
        self.adopted.append(kept_)
        for name, sub in kept_.named_modules():
            full = f"{ADOPTED}.{index}" + (f".{name}" if name else "")
            self.module_names[id(sub)] = full
            self._own(sub, f"{full}.")
        self.keep += [mod_, kept_]
        self.stand_ins[id(mod_)] = kept_
        return kept_

    def add_input(self, name: str, example: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A placeholder of ``shape`` with the dtype and device of ``example``."""
        self.busy += 1
        # In the example's memory layout (channels last, say): code may ask whether it is contiguous.
        strides = example.stride()
        order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
        with self.fake:
            t = torch.empty([shape[d] for d in order], dtype=example.dtype, device=example.device)
            t = t.permute([order.index(d) for d in range(len(shape))])
        self.busy -= 1
        node = self.graph.placeholder(name)
        self._bind(t, node, t)
        return t

    def _bind(self, obj: Tensor, node: fx.Node, fake: Tensor) -> None:
        self.values[id(obj)] = (obj, node, fake)
        node.meta["val"] = fake
        if "storage" not in node.meta:
            self.busy += 1
            try:
                node.meta["storage"] = fake.untyped_storage()._cdata
            except (NotImplementedError, RuntimeError):
                node.meta["storage"] = None
            finally:
                self.busy -= 1

    # ---- errors, guards ------------------------------------------------------------------------------------------
    def where(self) -> str:
        return user_frame()[0]

    def fail(self, what: str, remedy: str) -> TraceError:
        place, text = user_frame()
        module = f" in module '{self.stack[-1]}'" if self.stack and self.stack[-1] else ""
        return TraceError(f"{what}\n  at {place}{module}: {text}\n{remedy}")

    def read_training(self, mod: nn.Module) -> None:
        """The user's code asked for ``mod.training``."""
        name = self.module_names.get(id(mod))
        if name is not None:
            self.training_read[name] = vars(mod)["training"]

    def guard(self, expr: Any, value: Any) -> None:
        self.guards.append(Guard(expr, value, self.where()))

    # ---- writing nodes -------------------------------------------------------------------------------------------
    def _size_node(self, node: fx.Node, dim: int) -> fx.Node:
        key = (node, dim)
        if key not in self.size_nodes:
            after = node
            if node.op == "placeholder":
                after = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(after):
                new = self.graph.call_method("size", (node, dim))
            new.meta.update(module=node.meta.get("module", ""), where=node.meta.get("where", ""))
            if node.meta.get("region") is not None:
                new.meta["region"] = node.meta["region"]
            self.size_nodes[key] = new
        return self.size_nodes[key]

    def emit(self, expr: Any) -> Any:
        """The node (or number) that computes a size expression, written once, where it is first needed."""
        if not isinstance(expr, tuple):
            return expr
        if expr[0] == "size":
            return self._size_node(expr[1], expr[2])
        args = tuple(self.emit(e) for e in expr[1:])
        if not any(isinstance(a, fx.Node) for a in args):
            return OPS[expr[0]](*args)
        key = (expr[0], tuple((type(a), a) for a in args))  # 2 and 2.0 are equal, their results are not
        if key not in self.expr_nodes:
            self.expr_nodes[key] = self.add_node("call_function", OPS[expr[0]], args, {})
        return self.expr_nodes[key]

    def add_node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["module"] = self.stack[-1] if self.stack else ""
        node.meta["where"] = self.where()
        if self.region is not None:
            node.meta["region"] = self.region
        return node

    def constant(self, t: Tensor) -> tuple[fx.Node, Tensor]:
        """A tensor that is neither an input nor the model's own: kept beside the graph."""
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise self.fail(
                "The code computes under a transform of torch.func (vmap, grad, jvp), which graphs cannot hold.",
                "Write that part without it, or make the module that holds it a leaf: prepare(..., "
                "adapter=Adapter('name', leaf=('ClassName',))), and keep its parameters in float (QConfig.keep_float).",
            )
        name = f"const_{len(self.constants)}"
        self.busy += 1
        self.constants[name] = t.detach()
        pointer = t.untyped_storage().data_ptr() if t.numel() else None
        self.busy -= 1
        node, fake = self._get_attr(t, f"_ssmquant.constants.{name}")
        node.meta["pointer"] = pointer
        return node, fake

    def fake_of(self, t: Tensor) -> Tensor:
        """A fake in the place of a real tensor; of one that inference mode made as well, which counts no writes."""
        t = t.clone() if t.is_inference() else t.detach()
        return self.fake.from_tensor(t, static_shapes=True)

    def _get_attr(self, t: Tensor, name: str) -> tuple[fx.Node, Tensor]:
        self.busy += 1
        try:
            with torch.no_grad(), self.fake:
                fake = self.fake_of(t)
        finally:
            self.busy -= 1
        node = self.graph.get_attr(name)
        node.meta["module"], node.meta["where"] = "", ""
        self._bind(t, node, fake)
        return node, fake

    def lookup(self, t: Tensor) -> tuple[fx.Node, Tensor]:
        """The node and the fake that stand for a tensor of the user's code."""
        entry = self.values.get(id(t))
        if entry is not None:
            return entry[1], entry[2]
        if id(t) in self.owned:
            name = self.owned[id(t)]
            # get_attr nodes must not lie inside a region or after a later use: put them where they are met, which
            # dominates every later use because nodes are only appended.
            return self._get_attr(t, name)
        if isinstance(t, FakeTensor):
            raise self.fail(
                "A tensor appeared that no recorded operator made (a Tensor subclass, a cache across traces, or code "
                "that computes outside torch's API).",
                "Make the module that holds this code a leaf: "
                "prepare(..., adapter=Adapter('name', leaf=('ClassName',))).",
            )
        if isinstance(t, nn.Parameter) or t.requires_grad:
            raise self.fail(
                "A parameter was used that does not belong to this model: a closure or a list holds it, so the "
                "prepared copy would compute with the original's weights.",
                "Reach it through self, or use a bound method instead of a closure.",
            )
        self.keep.append(t)
        return self.constant(t)

    def lower(self, x: Any, fakes: bool) -> Any:
        """Arguments as the graph (``fakes=False``) or as the fake run (``fakes=True``) wants them."""
        if isinstance(x, Tensor):
            node, fake = self.lookup(x)
            return fake if fakes else node
        if isinstance(x, (SInt, SFloat)):
            return strip(x) if fakes else self.emit(x.expr)
        if x is IntShim:
            return int
        if isinstance(x, torch.device):
            self.uses_device = True
            return x
        if type(x) in (tuple, list) and all(type(i) is int for i in x):
            return x if type(x) is tuple else list(x)
        if isinstance(x, tuple):
            items = [self.lower(i, fakes) for i in x]
            if type(x) in (tuple, SSize, torch.Size):
                return tuple(items)
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, list):
            return [self.lower(i, fakes) for i in x]
        if isinstance(x, dict):
            return {k: self.lower(v, fakes) for k, v in x.items()}
        if isinstance(x, slice):
            return slice(self.lower(x.start, fakes), self.lower(x.stop, fakes), self.lower(x.step, fakes))
        if isinstance(x, torch.Generator):
            raise self.fail(
                "A random generator is an argument of an operator; a graph cannot hold one.",
                "Leave the generator out (the global one is seeded by torch.manual_seed), or draw outside the model.",
            )
        return x


def _outline(mod: nn.Module) -> tuple[Any, ...]:
    return repr(mod), [(k, tuple(p.shape), p.dtype) for k, p in mod.state_dict().items()]
