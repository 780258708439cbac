"""What every file of ssmquant rests on, quantized or float: whole writes, safe reads, checked shapes and dtypes.

Nothing is ever unpickled, and a file that is cut short or was tampered with raises ``FormatError``. Files of float zoo
models (``save_float``, ``load_float``) and float checkpoints from elsewhere (``load_checkpoint``) are here too;
quantized models are in ``io``.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ssmquant import zoo
from ssmquant.errors import ConfigError, FormatError, SsmquantError

__all__ = [
    "DTYPES", "FLOAT_FORMAT", "FORMAT", "MALFORMED", "NAMES", "VERSION", "Reader", "build_zoo", "decode",
    "dtype_name", "encode", "load_checkpoint", "load_float", "peek", "read", "read_dtype", "read_shape", "save_float",
    "write",
]  # fmt: skip

FORMAT, FLOAT_FORMAT, VERSION = "ssmquant", "ssmquant-float", "1"
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


def dtype_name(t: Tensor) -> str:
    """The name under which a file keeps the tensor's dtype."""
    if t.dtype not in NAMES:
        raise ConfigError(f"save: a tensor of dtype {t.dtype} cannot be written to a file")
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
    target = Path(path)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(fd)
    try:
        save_file(tensors, name, metadata=metadata)
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
    """A zoo model of at most ``room`` values: a file cannot ask for more than it fills."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zoo.build(description)


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
    write(path, state, {"format": FLOAT_FORMAT, "format_version": VERSION, "zoo": json.dumps(description)})


def load_float(path: str | os.PathLike[str]) -> Any:
    """Reads a float zoo model written by :func:`save_float`, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        FormatError: the file is not one of these, or does not fit the model that it describes.
    """
    metadata, state = read(path)
    if metadata.get("format") != FLOAT_FORMAT or metadata.get("format_version") != VERSION:
        raise FormatError(f"{path} is not a float model of ssmquant (format version {VERSION})")
    try:
        model = build_zoo(json.loads(metadata.get("zoo", "")), sum(t.numel() for t in state.values()))
        load_checkpoint(model, state)
    except (*MALFORMED, SsmquantError) as e:
        raise FormatError(f"{path} does not fit the model that it describes: {e}") from e
    return model.eval()


def load_checkpoint(model: nn.Module, source: Mapping[str, Any] | str | os.PathLike[str]) -> nn.Module:
    """Loads a float checkpoint strictly into a float or prepared model.

    Args:
        source: A state dict, or a ``.safetensors`` or PyTorch file (read with ``weights_only=True``); BasicSR's
            ``{"params": ...}`` and ``{"params_ema": ...}`` are unwrapped.

    Raises:
        FormatError: names missing, unexpected and misshapen keys; the model is left as it was.
    """
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.suffix == ".safetensors":
            source = read(path)[1]
        else:
            try:
                source = torch.load(path, map_location="cpu", weights_only=True)
            except FileNotFoundError:
                raise
            except Exception as e:
                raise FormatError(f"{path} is not a checkpoint that can be read safely: {e}") from None
    for key in ("params_ema", "params", "state_dict", "model"):
        if isinstance(source, Mapping) and isinstance(source.get(key), Mapping):
            source = source[key]
            break
    if not isinstance(source, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in source.items()
    ):
        raise FormatError("the checkpoint is not a mapping of names to tensors")
    own = model.state_dict()
    ours = {k: v for k, v in own.items() if not k.startswith("_ssmquant.")}
    state = {k.removeprefix("module."): v for k, v in source.items()}
    expected = own if any(k.startswith("_ssmquant.") for k in state) else ours
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    wrong = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    if missing or extra or wrong:
        parts = [f"missing {missing[:3]}" * bool(missing), f"unexpected {extra[:3]}" * bool(extra)]
        parts += [f"{k}: {list(state[k].shape)} instead of {list(expected[k].shape)}" for k in wrong[:3]]
        raise FormatError(
            f"the checkpoint does not fit {type(model).__name__}: " + "; ".join(p for p in parts if p)
        )
    model.load_state_dict(state)
    return model
