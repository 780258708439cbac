"""What the recorder knows about torch calls: tables of names, and pure helpers that look at arguments and frames."""

from __future__ import annotations

import linecache
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmquant.graph.provenance import IntShim, SFloat, SInt, strip

__all__ = [
    "HOOKS", "MODE_DEPENDENT", "OPERATORS", "RANDOM", "READS_DATA", "collect_tensors", "has_state", "has_tensor",
    "is_method", "plain_ints", "swapped", "user_frame",
]  # fmt: skip

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TRITON = f"{os.sep}site-packages{os.sep}triton{os.sep}"
_ZOO = os.path.join(_OURS, "zoo")  # a user's code like any other
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))

OPERATORS: dict[str, tuple[Callable[..., Any], bool]] = {
    "__getitem__": (operator.getitem, False), "__setitem__": (operator.setitem, False),
    "__delitem__": (operator.delitem, False), "__matmul__": (operator.matmul, False),
    "__rmatmul__": (operator.matmul, True), "__rsub__": (operator.sub, True), "__radd__": (operator.add, True),
    "__rmul__": (operator.mul, True), "__rdiv__": (operator.truediv, True), "__rtruediv__": (operator.truediv, True),
    "__rpow__": (operator.pow, True), "__rfloordiv__": (operator.floordiv, True), "__rmod__": (operator.mod, True),
    "__eq__": (operator.eq, False), "__ne__": (operator.ne, False), "__lt__": (operator.lt, False),
    "__le__": (operator.le, False), "__gt__": (operator.gt, False), "__ge__": (operator.ge, False),
    "__add__": (operator.add, False), "__sub__": (operator.sub, False), "__mul__": (operator.mul, False),
    "__truediv__": (operator.truediv, False), "__floordiv__": (operator.floordiv, False),
    "__mod__": (operator.mod, False), "__pow__": (operator.pow, False), "__neg__": (operator.neg, False),
    "__and__": (operator.and_, False), "__or__": (operator.or_, False), "__xor__": (operator.xor, False),
    "__invert__": (operator.invert, False), "__iadd__": (operator.iadd, False), "__isub__": (operator.isub, False),
    "__imul__": (operator.imul, False), "__itruediv__": (operator.itruediv, False), "__abs__": (operator.abs, False),
}  # fmt: skip
READS_DATA = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy", "__array__",
    "__contains__", "__format__", "__dlpack__", "data_ptr",
}  # fmt: skip
RANDOM = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like",
    "randint_like", "dropout", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_",
    "log_normal_", "gumbel_softmax", "feature_dropout", "alpha_dropout", "rrelu",
}  # fmt: skip
HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward"}
MODE_DEPENDENT = {"DropPath", "StochasticDepth"}


def user_frame() -> tuple[str, str]:
    """``file:line`` and the source text of the innermost frame of the user's code."""
    f: types.FrameType | None = sys._getframe(1)
    while f is not None:
        name = f.f_code.co_filename
        ours = name.startswith(_OURS) and not name.startswith(_ZOO)
        if not ours and not name.startswith((_TORCH, "<")) and _TRITON not in name:
            return f"{name}:{f.f_lineno}", linecache.getline(name, f.f_lineno).strip()
        f = f.f_back
    return "<unknown>", ""


def swapped(swap: dict[fx.Node, fx.Node], n: fx.Node) -> fx.Node:
    """What stands for ``n``: as a function of two arguments, for ``functools.partial``."""
    return swap.get(n, n)


def is_method(func: Any, name: str) -> bool:
    """Whether ``func`` is the method of that name of ``torch.Tensor``."""
    return getattr(torch.Tensor, name, None) == func


def collect_tensors(x: Any, out: list[Tensor]) -> bool:
    """Appends the tensors in ``x`` to ``out``; True if a traced size is in there too."""
    if isinstance(x, Tensor):
        out.append(x)
        return False
    if isinstance(x, (SInt, SFloat)):
        return True
    if isinstance(x, (tuple, list)):
        if all(type(i) is int for i in x):  # an index table may have thousands
            return False
        return any([collect_tensors(i, out) for i in x])
    if isinstance(x, dict):
        return any([collect_tensors(i, out) for i in x.values()])
    if isinstance(x, slice):
        return any([collect_tensors(i, out) for i in (x.start, x.stop, x.step)])
    return False


def has_tensor(x: Any) -> bool:
    """Whether a tensor is in ``x``, or in tuples, lists and dicts in it."""
    if isinstance(x, (tuple, list)):
        return any(has_tensor(i) for i in x)
    return any(has_tensor(i) for i in x.values()) if isinstance(x, dict) else isinstance(x, Tensor)


def has_state(mod: nn.Module) -> bool:
    """Whether a module owns a parameter or a buffer."""
    return next(mod.parameters(), None) is not None or next(mod.buffers(), None) is not None


def plain_ints(x: Any) -> Any:
    """``x`` with plain numbers in the place of traced ones."""
    if x is IntShim:
        return int
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(plain_ints(i) for i in x)
    if isinstance(x, list):
        return [plain_ints(i) for i in x]
    if isinstance(x, dict):
        return {k: plain_ints(v) for k, v in x.items()}
    return strip(x)
