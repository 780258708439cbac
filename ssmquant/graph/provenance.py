"""Integers that remember which tensor size they came from.

While a model is traced, ``x.shape`` and ``x.size()`` hand out :class:`SInt`: a real ``int`` (so that factories, einops,
``isinstance`` and C code work) that carries an expression over ``size(node, dim)`` leaves. Arithmetic extends the
expression; a comparison or a conversion to a plain number records a :class:`Guard`, because from then on the trace
holds only for sizes that give the same answer.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["OPS", "Guard", "IntShim", "SFloat", "SInt", "SSize", "evaluate", "leaves", "strip", "wrap"]


def _trunc(x: Any) -> int:
    return int(x)


OPS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "truediv": operator.truediv, "pow": operator.pow, "neg": operator.neg, "abs": operator.abs,
    "and_": operator.and_, "or_": operator.or_, "xor": operator.xor,
    "lshift": operator.lshift, "rshift": operator.rshift,
    "ceil": math.ceil, "floor": math.floor, "trunc": _trunc, "round": round,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "value": lambda x: x,
}  # fmt: skip

Expr = Any
"""``("size", node, dim)`` | ``(op name, *Expr)`` | a number."""


def leaves(expr: Expr) -> Iterator[tuple[Any, int]]:
    """The ``(node, dim)`` pairs that an expression reads."""
    if isinstance(expr, tuple):
        if expr[0] == "size":
            yield expr[1], expr[2]
        else:
            for e in expr[1:]:
                yield from leaves(e)


def evaluate(expr: Expr, size: Callable[[Any, int], int]) -> Any:
    """The value of ``expr`` where ``size(node, dim)`` gives the sizes."""
    if not isinstance(expr, tuple):
        return expr
    if expr[0] == "size":
        return size(expr[1], expr[2])
    return OPS[expr[0]](*(evaluate(e, size) for e in expr[1:]))


@dataclass(frozen=True)
class Guard:
    """``expr`` must evaluate to ``value`` for the trace to hold; ``where`` is the line of user code that asked."""

    expr: Expr
    value: Any
    where: str

    def holds(self, size: Callable[[Any, int], int]) -> bool:
        try:
            return bool(evaluate(self.expr, size) == self.value)
        except (ArithmeticError, ValueError):
            return False


def strip(x: Any) -> Any:
    """The plain number of ``x``, without asking it (which would record a guard)."""
    if isinstance(x, SInt):
        return int.__int__(x)
    if isinstance(x, SFloat):
        return float.__float__(x)
    return x


def _expr(x: Any) -> Expr:
    return x.expr if isinstance(x, (SInt, SFloat)) else x


def wrap(rec: Any, expr: Expr, value: Any) -> Any:
    """A number that remembers ``expr``; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    out: Any = SInt(value) if isinstance(value, int) else SFloat(value)
    out.expr, out.rec = expr, rec
    return out


def _arith(name: str, *, swap: bool = False) -> Callable[..., Any]:
    fn = OPS[name]

    def method(self: Any, *others: Any) -> Any:
        if any(not isinstance(o, (int, float)) for o in others):
            return NotImplemented
        args = (*others, self) if swap else (self, *others)
        return wrap(self.rec, (name, *map(_expr, args)), fn(*map(strip, args)))

    return method


def _ask(name: str, convert: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    fn = OPS[name]

    def method(self: Any, *others: Any) -> Any:
        if any(not isinstance(o, (int, float)) for o in others):
            return NotImplemented
        args = (self, *others)
        value = fn(*map(strip, args))
        self.rec.guard((name, *map(_expr, args)), value)
        return convert(value) if convert else value

    return method


def _hash(self: Any) -> int:
    # Unhashable at first, so that size-keyed caches (einops' recipes) are skipped: a cached recipe would carry the
    # sizes of another trace. Where the user's code cannot do without, the trace is repeated with hash = pin.
    if not self.rec.hashable:
        self.rec.asked_hash = True
        raise TypeError("a traced size is unhashable at first")
    plain = strip(self)
    self.rec.guard(("value", self.expr), plain)
    return hash(plain)


_COMMON: dict[str, Any] = {"__hash__": _hash}
for _n in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
    _COMMON[f"__{_n}__"] = _arith(_n)
    _COMMON[f"__r{_n}__"] = _arith(_n, swap=True)
for _n in ("neg", "abs", "ceil", "floor", "trunc"):
    _COMMON[f"__{_n}__"] = _arith(_n)
for _n in ("eq", "ne", "lt", "le", "gt", "ge"):
    _COMMON[f"__{_n}__"] = _ask(_n)
_COMMON["__bool__"] = _ask("value", bool)
_COMMON["__float__"] = _ask("value", float)
_COMMON["__int__"] = _ask("value", int)
_COMMON["__str__"] = _COMMON["__repr__"] = _ask("value", repr)  # text may become a key of a cache
_COMMON["__format__"] = lambda self, spec: format(_ask("value")(self), spec)
_COMMON["__divmod__"] = lambda self, other: (self // other, self % other)
_COMMON["__rdivmod__"] = lambda self, other: (other // self, other % self)
_COMMON["__round__"] = _arith("round")
_COMMON["__pos__"] = lambda self: self
_COMMON["__reduce__"] = lambda self: (type(strip(self)), (strip(self),))
_COMMON["__deepcopy__"] = lambda self, memo: self
_INT = {
    f"__{n}__": _arith(f"{n}_" if n in ("and", "or") else n) for n in ("and", "or", "xor", "lshift", "rshift")
}
_INT |= {
    f"__r{n}__": _arith(f"{n}_" if n in ("and", "or") else n, swap=True)
    for n in ("and", "or", "xor", "lshift", "rshift")
}


class SInt(int):
    """A size. Attributes: ``expr`` and ``rec``, the recorder that collects guards."""

    expr: Expr
    rec: Any


class SFloat(float):
    """The float result of arithmetic on sizes."""

    expr: Expr
    rec: Any


for _k, _v in _COMMON.items():
    setattr(SInt, _k, _v)
    setattr(SFloat, _k, _v)
for _k, _v in _INT.items():
    setattr(SInt, _k, _v)


class SSize(tuple[Any, ...]):
    """What ``x.shape`` gives while tracing: a tuple of :class:`SInt` with ``torch.Size``'s ``numel``.

    (``torch.Size`` itself cannot be subclassed, and holds plain integers only.)
    """

    __slots__ = ()

    def numel(self) -> int:
        out: Any = 1
        for s in self:
            out = s * out
        return out

    def __getitem__(self, i: Any) -> Any:
        out = tuple.__getitem__(self, i)
        return SSize(out) if isinstance(i, slice) else out

    def __add__(self, other: Any) -> Any:
        return SSize(tuple(self) + tuple(other))

    def __radd__(self, other: Any) -> Any:
        return SSize(tuple(other) + tuple(self))


class _IntMeta(type):
    def __instancecheck__(cls, obj: object) -> bool:
        return isinstance(obj, int)

    def __subclasscheck__(cls, sub: type) -> bool:
        return issubclass(sub, int)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is int

    def __hash__(cls) -> int:
        return hash(int)


class IntShim(metaclass=_IntMeta):
    """Stands in for ``int`` in the model's modules while it is traced: CPython turns ``__int__`` into a plain int."""

    def __new__(cls, x: Any = 0, *args: Any) -> Any:
        if isinstance(x, SInt):
            return x
        if isinstance(x, SFloat):
            return wrap(x.rec, ("trunc", x.expr), builtins.int(strip(x)))
        return builtins.int(x, *args)
