"""What every file of ssmquant rests on, quantized or float: whole writes, safe reads, checked shapes and dtypes.

Nothing is ever unpickled, and a file that is cut short or was tampered with raises ``FormatError``. Files of float zoo
models (``save_float``, ``load_float``) and float checkpoints from elsewhere (``load_checkpoint``) are here too;
quantized models are in ``io``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ssmquant import zoo
from ssmquant.errors import ConfigError, FormatError, SsmquantError

__all__ = [
    "DTYPES", "ENTRIES", "FLOAT_FORMAT", "FORMAT", "MALFORMED", "NAMES", "VERSION", "Reader", "build_zoo",
    "check_new", "decode",
    "dtype_name", "encode", "load_checkpoint", "load_float", "peek", "read", "read_dtype", "read_shape", "replacing",
    "save_float", "write",
]  # fmt: skip

FORMAT, VERSION = "ssmquant", "2"
FLOAT_FORMAT, FLOAT_VERSION = "ssmquant-float", "1"
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
NAMES = {v: k for k, v in DTYPES.items()}
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What reading metadata of the wrong types or sizes can raise."""


# ---- plain data ----------------------------------------------------------------------------------------------------


def encode(x: Any) -> Any:
    """Arguments of the example call as JSON: tensors by shape and dtype."""
    if isinstance(x, Tensor):
        return {"tensor": list(x.shape), "dtype": dtype_name(x)}
    if isinstance(x, (tuple, list)):
        return {"tuple" if isinstance(x, tuple) else "list": [encode(i) for i in x]}
    if isinstance(x, Mapping):
        return {"dict": [[k, encode(v)] for k, v in x.items()]}
    if x is None or isinstance(x, (bool, int, float, str)):
        return {"value": x}
    raise ConfigError(f"save: an example argument of type {type(x).__name__} cannot be written to a file")


def dtype_name(t: Tensor, what: str = "an example argument") -> str:
    """The name under which a file keeps the tensor's dtype."""
    if t.dtype not in NAMES:
        raise ConfigError(f"save: {what} of dtype {t.dtype} cannot be written to a file")
    return NAMES[t.dtype]


def decode(x: Any, device: torch.device) -> Any:
    """What :func:`encode` described, with tensors of zeros that take no memory."""
    if not isinstance(x, dict) or not x:
        raise FormatError("the description of the example input is malformed")
    if "tensor" in x:
        shape, dtype = read_shape(x["tensor"]), read_dtype(x.get("dtype"))
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
    if "tuple" in x:
        return tuple(decode(i, device) for i in x["tuple"])
    if "list" in x:
        return [decode(i, device) for i in x["list"]]
    if "dict" in x:
        return {k: decode(v, device) for k, v in x["dict"]}
    return x.get("value")


def read_shape(x: Any) -> tuple[int, ...]:
    """A shape from a file, checked."""
    if not isinstance(x, list) or len(x) > 16 or not all(isinstance(i, int) and 0 <= i < 2**31 for i in x):
        raise FormatError(f"not a tensor shape: {str(x)[:80]}")
    return tuple(x)


def read_dtype(x: Any) -> torch.dtype:
    """A dtype from a file, by name."""
    if x not in DTYPES:
        raise FormatError(f"unknown dtype {str(x)[:40]!r}")
    return DTYPES[x]


# ---- reading and writing -------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes beside the target and renames: a file is there whole or not at all."""
    with replacing(path) as name:
        save_file(tensors, name, metadata=metadata)


def check_new(path: str | os.PathLike[str], *, force: bool) -> Path:
    """The path, where a new file can be written there; ConfigError where not. ``force``: an old one may be there."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(
            f"cannot write {target}: {'it is a folder' if target.is_dir() else 'no such folder'}"
        )
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; give force=True (--force) to replace it")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file beside ``path``, which takes its place at the end, and is gone after an error."""
    target = Path(path)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(fd)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header entries and tensors of a safetensors file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as f:
            return dict(f.metadata() or {}), {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, RuntimeError, TypeError) as e:
        raise FormatError(f"{path} is not a whole safetensors file: {e}") from None


class Reader:
    """Takes slices off the flat tensors, and insists that everything fits and nothing is left over."""

    def __init__(self, path: Any, tensors: dict[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors
        self.at: dict[str, int] = {}

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def take(self, key: str, count: int, dtype: torch.dtype, what: str) -> Tensor:
        flat = self.tensors.get(key)
        if flat is None or flat.dim() != 1 or flat.dtype != dtype:
            raise self.fail(f"tensor '{key}' is missing or not a flat {dtype} tensor")
        start = self.at.get(key, 0)
        if start + count > flat.numel():
            raise self.fail(f"tensor '{key}' is too short for {what}")
        self.at[key] = start + count
        return flat[start : start + count].clone()

    def done(self) -> None:
        for k, t in self.tensors.items():
            if k != "meta" and self.at.get(k, 0) != t.numel():
                raise self.fail(
                    f"tensor '{k}' holds {t.numel() - self.at.get(k, 0)} values that nothing refers to"
                )


def peek(path: str | os.PathLike[str]) -> str:
    """``"quantized"`` or ``"float"``: which kind of ssmquant file this is.

    Raises:
        FormatError: neither.
    """
    kind = read(path)[0].get("format")
    if kind not in (FORMAT, FLOAT_FORMAT):
        raise FormatError(f"{path} was not written by ssmquant (no format entry in its header)")
    return "quantized" if kind == FORMAT else "float"


# ---- float models --------------------------------------------------------------------------------------------------


def build_zoo(description: Any, room: int) -> nn.Module:
    """A zoo model of at most ``room`` values: a file cannot ask for more than it fills.

    Its parameters are not initialised: memory that nothing has written to is not there yet.
    """
    _check_numbers(description)
    mine, total = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if parameter is not None and threading.get_ident() == mine:
            total += parameter.numel()
            if total > room:
                raise FormatError("the file describes a model that is larger than the file can fill")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), warnings.catch_warnings():  # no memory
            warnings.simplefilter("ignore")  # a size of 0, say: the shapes are compared next
            zoo.build(description)
    finally:
        handle.remove()
    with _Uninitialised(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zoo.build(description)


class _Uninitialised(TorchFunctionMode):
    """Leaves out what would write to parameters."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        written = args[0] if args else kwargs.get("tensor")  # functions of nn.init name it
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return written if in_place and isinstance(written, nn.Parameter) else func(*args, **kwargs)


def _check_numbers(x: Any) -> None:
    """Builders loop over numbers and lists: none of a size that no model has."""
    if isinstance(x, (dict, list)):
        if len(x) > 256:
            raise FormatError("the description of the model is malformed")
        for i in x.values() if isinstance(x, dict) else x:
            _check_numbers(i)
    elif isinstance(x, (int, float)) and not -65536 <= x <= 65536:
        raise FormatError(f"the description of the model holds the number {x}")


def save_float(model: nn.Module, path: str | os.PathLike[str], *, half: bool = False) -> None:
    """Writes a float zoo model (its parameters and how to build it); ``half`` stores float32 as float16."""
    description = zoo.describe(model)
    state = {}
    for name, t in model.state_dict().items():
        t = t.detach().cpu()
        state[name] = (t.half() if half and t.dtype == torch.float32 else t).contiguous().clone()
    write(
        path, state, {"format": FLOAT_FORMAT, "format_version": FLOAT_VERSION, "zoo": json.dumps(description)}
    )


def load_float(path: str | os.PathLike[str]) -> Any:
    """Reads a float zoo model written by :func:`save_float`, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        FormatError: the file is not one of these, or does not fit the model that it describes.
    """
    metadata, state = read(path)
    if metadata.get("format") != FLOAT_FORMAT or metadata.get("format_version") != FLOAT_VERSION:
        raise FormatError(f"{path} is not a float model of ssmquant (format version {FLOAT_VERSION})")
    try:
        model = build_zoo(json.loads(metadata.get("zoo", "")), sum(t.numel() for t in state.values()))
        load_checkpoint(model, state)
    except (*MALFORMED, SsmquantError) as e:
        raise FormatError(f"{path} does not fit the model that it describes: {e}") from e
    return model.eval()


# ---- checkpoints from elsewhere ------------------------------------------------------------------------------------

ENTRIES = (
    "params_ema", "params", "model_ema", "model", "state_dict_ema", "state_dict", "net", "network_weights",
)  # fmt: skip
"""Where training code keeps the weights in its checkpoints: the first entry that is there is taken."""

# What VMamba's and Vim's training code keeps beside the weights: settings, which are read as plain mappings.
_SETTINGS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (OrderedDict, "yacs.config.CfgNode"), (OrderedDict, "argparse.Namespace"),
]  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


def load_checkpoint(
    model: nn.Module,
    source: Mapping[str, Any] | str | os.PathLike[str],
    *,
    key: str | None = None,
    strict: bool = True,
) -> nn.Module:
    """Loads a float checkpoint into a float or prepared model, as far as names go as the model itself loads one.

    Args:
        model: Loaded in place. Where it renames old keys or fits shapes when loading, it does so here too.
        source: A state dict, or a ``.safetensors`` or PyTorch file (read with ``weights_only=True``). What training
            code wraps around it is taken off: one of the entries ``params_ema``, ``params``, ``model_ema``, ``model``,
            ``state_dict_ema``, ``state_dict``, ``net`` and ``network_weights``, the first that is there; then
            ``module.`` and ``_orig_mod.`` in front of all names.
        key: The entry to take instead.
        strict: Refuse missing and unexpected keys; tensors of another shape are always refused.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        FormatError: what does not fit, with names; the model is left as it was.
    """
    if not isinstance(source, Mapping):
        source = _read_checkpoint(Path(source))
    own = model.state_dict()
    state = _unwrapped(_entry(source, key), set(own))
    before = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in own.items()}
    keys: list[Any] = []
    handle = model.register_load_state_dict_post_hook(lambda _, found: keys.append(found))
    try:
        model.load_state_dict(state, strict=strict)
    except (SsmquantError, *MALFORMED) as e:
        handle.remove()
        model.load_state_dict(before)
        if isinstance(e, SsmquantError):
            raise
        problems = [f"{k}: {there} instead of {here}" for k, there, here in _MISMATCH.findall(str(e))]
        for what in ("missing", "unexpected") if strict and keys else ():
            names = getattr(keys[-1], f"{what}_keys")
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems += [f"{what} {sorted(names)[:3]}{more}"] * bool(names)
        raise FormatError(
            f"the checkpoint does not fit {type(model).__name__}: "
            + ("; ".join(problems[:6]) or f"{type(e).__name__}: {e}")
        ) from None
    finally:
        handle.remove()
    return model


def _read_checkpoint(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read(path)[1]
    try:
        with torch.serialization.safe_globals(_SETTINGS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as e:
        raise FormatError(f"{path} is not a checkpoint that can be read safely: {e}") from None


def _entry(source: Any, key: str | None) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content."""
    found = source
    if isinstance(source, Mapping):
        held = [k for k in source if isinstance(source[k], Mapping)]
        if key is not None and key not in held:
            there = f"it has {', '.join(map(str, held[:8]))}" if held else "it is a plain state dict"
            raise FormatError(f"the checkpoint has no entry {key!r} that holds weights; {there}")
        found = next((source[k] for k in ((key,) if key is not None else ENTRIES) if k in held), source)
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise FormatError(
            "the checkpoint is not a mapping of names to tensors"
            + (f"; it has the entries {sorted(map(str, source))[:8]}" if isinstance(source, Mapping) else "")
        )
    return dict(found)


def _unwrapped(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Without the names of wrappers that stand in front of all names."""
    while state:
        prefix = next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        shorter = {k[len(prefix) :]: v for k, v in state.items()}
        if len(own & state.keys()) > len(own & shorter.keys()):  # the model has a child of that name
            break
        state = shorter
    return state
