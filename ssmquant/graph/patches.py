"""What is patched, saved and silenced while the user's code is traced, and put back afterwards.

Two things are patched, ``nn.Module.__call__`` and ``autograd.Function.apply``, besides the seams of checkpoint,
autocast and ``int``. The snapshot undoes what the code does to its modules and notes what a graph will not do.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ssmquant.errors import TraceError
from ssmquant.graph.provenance import IntShim
from ssmquant.graph.tracer import APPLY_HOOK, LOCAL, Recorder, active_recorder

__all__ = ["PATCH_LOCK", "patched", "quiet", "snapshot", "uncached_autocast"]

PATCH_LOCK = threading.RLock()
"""Held while a model is traced: patches are global, and the model is not whole."""


def _swap_apply(hook: Callable[..., Any]) -> Callable[[], None]:
    """Leads ``autograd.Function.apply`` to ``hook(cls, args, kwargs, original)`` until the returned function is called.

    The code of the function is exchanged, not the attribute: ``pscan = PScan.apply`` at the top of a module is an
    alias that a new attribute would not reach.
    """
    function = torch.autograd.Function.__dict__["apply"].__func__
    code = function.__code__
    original = types.FunctionType(
        code, function.__globals__, "apply", function.__defaults__, function.__closure__
    )

    def make(__class__: Any) -> Any:  # the exchanged code must close over the same names: (__class__,)
        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            __class__  # noqa: B018
            from ssmquant.graph.tracer import APPLY_HOOK

            return APPLY_HOOK[-1](cls, args, kwargs)

        return apply

    APPLY_HOOK.append(lambda cls, args, kwargs: hook(cls, args, kwargs, original))
    function.__code__ = make(None).__code__

    def restore() -> None:
        function.__code__ = code
        APPLY_HOOK.pop()

    return restore


def _hold_triton(rec: Recorder, thread: int) -> list[tuple[Any, Any]]:
    """Triton kernels are not launched on fakes: what a Function allocates for them has the right shape already.

    Returns the classes whose ``run`` was exchanged, with the old one. Nothing is imported that is not there.
    """
    found = []
    for module, name in (
        ("triton.runtime.jit", "JITFunction"),
        ("triton.runtime.autotuner", "Autotuner"),
        ("triton.runtime.autotuner", "Heuristics"),
        ("triton.runtime.interpreter", "InterpretedFunction"),
    ):
        owner = getattr(sys.modules.get(module), name, None)
        if owner is None or "run" not in vars(owner):
            continue
        found.append((owner, owner.run))

        def run(self: Any, *args: Any, _original: Any = owner.run, **kwargs: Any) -> Any:
            fake = any(isinstance(a, FakeTensor) for a in (*args, *kwargs.values()))
            if threading.get_ident() != thread or not fake:
                return _original(self, *args, **kwargs)
            if not rec.busy:
                raise rec.fail(
                    "A Triton kernel is launched outside of an autograd.Function or custom operator, where no graph "
                    "shows what it writes.",
                    "Wrap it in an autograd.Function (or torch.library.triton_op), or make the module a leaf: "
                    "prepare(..., adapter=Adapter('name', leaf=('ClassName',))).",
                )
            return None

        owner.run = run
    return found


@contextlib.contextmanager
def patched(rec: Recorder, model: nn.Module) -> Iterator[None]:
    """The two patches (and the seams of checkpoint, autocast and ``int``), thread-local in effect, always undone."""
    module_call = nn.Module.__call__
    autocast = torch.amp.autocast_mode.autocast
    enter, leave = autocast.__enter__, autocast.__exit__
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    mine = threading.get_ident()
    asked = {
        (space, name): getattr(space, name)
        for space, name in (
            (torch, "is_grad_enabled"),
            (torch, "is_autocast_enabled"),
            (torch, "get_autocast_dtype"),
            (torch, "get_autocast_gpu_dtype"),
        )
        if hasattr(space, name)
    }

    def active() -> bool:
        return threading.get_ident() == mine and not rec.busy

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return rec.module(self, args, kwargs, module_call) if active() else module_call(self, *args, **kwargs)

    def apply(cls: Any, args: Any, kwargs: Any, original: Callable[..., Any]) -> Any:
        call_original = functools.partial(original, cls)
        return (
            rec.function(cls, args, call_original)
            if active() and not kwargs
            else call_original(*args, **kwargs)
        )

    def autocast_enter(self: Any) -> Any:
        if active():
            rec.reads_grad = rec.sets_modes = True
            args = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
            node = rec.add_node("call_function", torch.amp.autocast_mode._enter_autocast, args, {})
            node.meta["impure"] = True
            self._ssmquant_node = node
        rec.busy += 1
        try:
            return enter(self)
        finally:
            rec.busy -= 1

    def autocast_exit(self: Any, *exc: Any) -> Any:
        if active():
            node = rec.add_node(
                "call_function", torch.amp.autocast_mode._exit_autocast, (self._ssmquant_node,), {}
            )
            node.meta["impure"] = True
        rec.busy += 1
        try:
            return leave(self, *exc)
        finally:
            rec.busy -= 1

    def region(fn: Any, *args: Any, **kwargs: Any) -> Any:
        if not active():
            yield from generator(fn, *args, **kwargs)
            return
        with rec.checkpointed():
            yield

    def asking(original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if active():
                rec.reads_grad = True
            return original(*args, **kwargs)

        return ask

    class Training:
        """``self.training`` as the user's code reads it: what is read is a guard, what is not read does not matter."""

        def __get__(self, mod: Any, owner: Any = None) -> Any:
            if mod is None:
                return self
            if active():
                rec.read_training(mod)
            return vars(mod)["training"]

        def __set__(self, mod: Any, value: bool) -> None:
            vars(mod)["training"] = value

    shimmed: list[dict[str, Any]] = []
    launches: list[tuple[Any, Any]] = []
    restore_apply: Callable[[], None] = lambda: None  # noqa: E731
    with PATCH_LOCK:
        if active_recorder() is not None:
            raise TraceError(
                "a model was prepared or traced inside the forward of another one that is being traced"
            )
        try:
            nn.Module.training = Training()  # type: ignore[assignment]
            for (space, name), original in asked.items():
                setattr(space, name, asking(original))
            nn.Module.__call__ = call  # type: ignore[method-assign]
            restore_apply = _swap_apply(apply)
            autocast.__enter__, autocast.__exit__ = autocast_enter, autocast_exit  # type: ignore[method-assign]
            torch.utils.checkpoint._checkpoint_without_reentrant_generator = region
            launches.extend(_hold_triton(rec, mine))
            for cls in {c for m in model.modules() for c in type(m).__mro__}:
                name = cls.__module__
                if name.split(".")[0] not in ("torch", "builtins", "ssmquant") or name.startswith(
                    "ssmquant.zoo"
                ):
                    globals_ = vars(sys.modules[name]) if name in sys.modules else dict[str, Any](int=int)
                    if "int" not in globals_:
                        globals_["int"] = IntShim
                        shimmed.append(globals_)
            LOCAL.recorder = rec
            yield
        finally:
            LOCAL.recorder = None
            del nn.Module.training
            nn.Module.__call__ = module_call  # type: ignore[method-assign]
            restore_apply()
            autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]
            torch.utils.checkpoint._checkpoint_without_reentrant_generator = generator
            for owner, run in launches:
                owner.run = run
            for shim in shimmed:
                del shim["int"]
            for (space, name), original in asked.items():
                setattr(space, name, original)


@contextlib.contextmanager
def snapshot(model: nn.Module, rec: Recorder) -> Iterator[None]:
    """Whatever the code does to the modules' attributes (and to the RNGs) is undone; rebindings are noted."""
    saved = []
    for name, mod in model.named_modules():
        attrs = dict(vars(mod))
        inner = {k: v.copy() for k, v in attrs.items() if isinstance(v, (dict, list, set))}
        saved.append((name, mod, attrs, inner))
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
        _note_rebinding(rec, saved)
        drawn = random.getstate() != states[0]
        drawn |= any(not np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
        if drawn:
            raise TraceError(
                f"the forward of {type(model).__name__} draws from Python's or numpy's random generator; a graph would "
                "repeat one draw for ever. Use torch's random functions"
            )
    finally:
        for _, mod, attrs, inner in saved:
            space = vars(mod)
            space.clear()
            space.update(attrs)
            for k, old in inner.items():
                now = space[k]
                now.clear()
                now.extend(old) if isinstance(now, list) else now.update(old)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@contextlib.contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast keeps casts of parameters: fakes must not stay in that cache, nor real casts enter the trace."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and no tracebacks that torch logs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = logging.getLogger(
            "torch._subclasses.fake_tensor"
        )  # prints tracebacks for sizes that do not fit
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _reads_input(node: fx.Node) -> bool:
    """Whether a value depends on the values of an input (``type_as(x)`` and the like read its kind only)."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder":
            return True
        kind_only = n.op == "call_method" and n.target in ("type_as", "to", "expand_as", "view_as", "size")
        todo.extend(list(n.all_input_nodes)[:1] if kind_only else n.all_input_nodes)
    return False


def _note_rebinding(rec: Recorder, saved: list[Any]) -> None:
    for name, mod, attrs, inner in saved:
        for k, v in vars(mod).items():
            if isinstance(v, (int, float, str)) and k in attrs and v != attrs[k]:
                full = f"{name}.{k}" if name else k
                rec.rebound[full] = "is changed by the code, and no more by the prepared model"
        for store, before in ((vars(mod), attrs), (mod._buffers, inner.get("_buffers", {}))):
            for k, v in store.items():
                if isinstance(v, Tensor) and v is not before.get(k) and id(v) in rec.values:
                    full = f"{name}.{k}" if name else k
                    old = before.get(k)
                    carried = store is not mod._buffers and isinstance(old, Tensor) and id(old) in rec.values
                    if carried and _reads_input(rec.values[id(v)][1]):
                        raise TraceError(
                            f"attribute '{full}' is read and then set to a computed value: it carries state from one "
                            "call to the next, which a graph does only for registered buffers. Use register_buffer"
                        )
                    if not carried and store is not mod._buffers:
                        rec.rebound[full] = "is set by the code, and no more by the prepared model"
                    if store is mod._buffers and isinstance(before.get(k), Tensor):
                        # A registered buffer is state: the rebinding is replayed as a copy into it.
                        target, _ = rec.lookup(before[k])
                        node = rec.add_node("call_method", "copy_", (target, rec.lookup(v)[0]), {})
                        node.meta["mutates"] = [target.meta.get("storage")]
