"""Files: a deployed model as one safetensors file. Nothing is ever unpickled, and everything read is checked.

Layout (format version 1). So that the header stays small, tensors of a kind are one flat tensor:

- ``meta``: zlib-compressed JSON (uint8): configuration, example input, tables of what follows, a hash of the site list;
- ``codes``: the packed codes (``ssmquant.pack``) of all weights and static operands, one after the other (uint8);
- ``scales``: for each of them ``scale``, ``shift`` and, if clamped, ``lo``, ``hi`` (float32);
- ``quantizers``: the state of the activation quantizers (float32; flags as 0 or 1);
- ``float32``, ``float16`` ...: the parameters and buffers that stay in float, by stored dtype.

``load`` traces the model again on fake tensors and compares its sites with the file's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map_only

from ssmquant import zoo
from ssmquant.adapter import find_adapter, get_adapter
from ssmquant.config import QConfig
from ssmquant.errors import ConfigError, FormatError, SsmquantError
from ssmquant.graph.plan import Point
from ssmquant.graph.runtime import Runtime, attach, forget_baked, is_prepared, refuse_elsewhere, runtime_of
from ssmquant.modules import ActivationQuantizer, FrozenRange, PackedTensor
from ssmquant.pack import packed_size
from ssmquant.workflow import drop_parameters, ensure_traced, make_quantizer, trace_example

__all__ = ["load", "load_checkpoint", "load_float", "peek", "save", "save_float"]

_FORMAT, _FLOAT_FORMAT, _VERSION = "ssmquant", "ssmquant-float", "1"
_META_LIMIT = 16 * 2**20
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
_NAMES = {v: k for k, v in _DTYPES.items()}


# ---- plain data ----------------------------------------------------------------------------------------------------


def _encode(x: Any) -> Any:
    """Arguments of the example call as JSON: tensors by shape and dtype."""
    if isinstance(x, Tensor):
        return {"tensor": list(x.shape), "dtype": _name(x)}
    if isinstance(x, (tuple, list)):
        return {"tuple" if isinstance(x, tuple) else "list": [_encode(i) for i in x]}
    if isinstance(x, Mapping):
        return {"dict": [[k, _encode(v)] for k, v in x.items()]}
    if x is None or isinstance(x, (bool, int, float, str)):
        return {"value": x}
    raise ConfigError(f"save: an example argument of type {type(x).__name__} cannot be written to a file")


def _name(t: Tensor) -> str:
    if t.dtype not in _NAMES:
        raise ConfigError(f"save: a tensor of dtype {t.dtype} cannot be written to a file")
    return _NAMES[t.dtype]


def _decode(x: Any, device: torch.device) -> Any:
    if not isinstance(x, dict) or not x:
        raise FormatError("the description of the example input is malformed")
    if "tensor" in x:
        shape, dtype = _shape(x["tensor"]), _dtype(x.get("dtype"))
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
    if "tuple" in x:
        return tuple(_decode(i, device) for i in x["tuple"])
    if "list" in x:
        return [_decode(i, device) for i in x["list"]]
    if "dict" in x:
        return {k: _decode(v, device) for k, v in x["dict"]}
    return x.get("value")


def _shape(x: Any) -> tuple[int, ...]:
    if not isinstance(x, list) or len(x) > 16 or not all(isinstance(i, int) and 0 <= i < 2**31 for i in x):
        raise FormatError(f"not a tensor shape: {str(x)[:80]}")
    return tuple(x)


def _dtype(x: Any) -> torch.dtype:
    if x not in _DTYPES:
        raise FormatError(f"unknown dtype {str(x)[:40]!r}")
    return _DTYPES[x]


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
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


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as f:
            return dict(f.metadata() or {}), {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, RuntimeError, TypeError) as e:
        raise FormatError(f"{path} is not a whole safetensors file: {e}") from None


def peek(path: str | os.PathLike[str]) -> str:
    """``"quantized"`` or ``"float"``: which kind of ssmquant file this is.

    Raises:
        FormatError: neither.
    """
    kind = _read(path)[0].get("format")
    if kind not in (_FORMAT, _FLOAT_FORMAT):
        raise FormatError(f"{path} was not written by ssmquant (no format entry in its header)")
    return "quantized" if kind == _FORMAT else "float"


# ---- save ----------------------------------------------------------------------------------------------------------


def _site_hash(points: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()


def _point_table(points: list[Point]) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "what": p.what, "bits": p.scheme.bits, "method": p.scheme.method} for p in points
    ]


def _all_points(runtime: Runtime) -> list[Point]:
    seen: dict[str, Point] = {}
    for r in runtime.records:
        for p in r.plan.points:
            seen.setdefault(p.name, p)
    return list(seen.values())


def _float_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters (tied ones once) and persistent buffers outside the runtime, in the model's order."""
    hidden = {
        f"{m}.{b}" if m else b for m, mod in model.named_modules() for b in mod._non_persistent_buffers_set
    }
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n not in hidden)]
    return [(n, t) for n, t in tensors if not n.startswith("_ssmquant.")]


def save(deployed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a deployed model to one safetensors file.

    Raises:
        ConfigError: the model is not deployed, or holds something that cannot be written.
    """
    runtime = runtime_of(deployed, "deployed")
    ensure_traced(deployed)
    points = _all_points(runtime)
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    state: list[Tensor] = []
    operands: list[dict[str, Any]] = []
    activations: list[dict[str, Any]] = []
    for p in points:
        if p.what == "activation":
            wrapper = runtime.activations[p.key]
            assert isinstance(wrapper, ActivationQuantizer)
            table = []
            for k, v in wrapper.quantizer.state_dict().items():
                table.append([k, list(v.shape), _NAMES[v.dtype]])
                state.append(v.detach().float().reshape(-1).cpu())
            frozen = isinstance(wrapper.quantizer, FrozenRange)
            activations.append(
                {"name": p.name, "frozen": frozen, "axis": wrapper.quantizer.axis, "state": table}
            )
            continue
        packed = runtime.weights[p.key]
        assert isinstance(packed, PackedTensor)
        if packed.scale.dtype != torch.float32:
            raise ConfigError(
                "save: scales are stored in float32, and this model computes in float64; prepare it in float32"
            )
        codes.append(packed.codes.cpu())
        parts = [packed.scale, packed.shift, packed.lo, packed.hi]
        scales += [t.float().reshape(-1).cpu() for t in parts if t is not None]
        operands.append({
            "name": p.name, "shape": list(packed.shape), "bits": packed.bits, "code_min": packed.code_min,
            "dtype": _NAMES[packed.dtype], "groups": list(packed.scale.shape), "clamped": packed.lo is not None,
        })  # fmt: skip
    floats: dict[str, list[Tensor]] = {}
    float_table = []
    for name, t in _float_tensors(deployed):
        _name(t)
        stored = runtime.float_dtype if runtime.float_dtype is not None and t.is_floating_point() else t.dtype
        floats.setdefault(_NAMES[stored], []).append(t.detach().to(stored).reshape(-1).cpu())
        float_table.append([name, list(t.shape), _NAMES[t.dtype], _NAMES[stored]])
    sites = _point_table(points)
    meta = {
        "config": runtime.config.to_dict(), "method": runtime.method,
        "adapter": runtime.adapter.name if runtime.adapter else None,
        "class": f"{type(deployed).__module__}.{type(deployed).__qualname__}",
        "zoo": getattr(deployed, "zoo_config", None), "example": _encode(runtime.example), "sites": sites,
        "sites_sha256": _site_hash(sites), "operands": operands, "activations": activations, "float": float_table,
    }  # fmt: skip
    blob = zlib.compress(json.dumps(meta, separators=(",", ":")).encode(), 9)
    tensors = {
        "meta": torch.frombuffer(bytearray(blob), dtype=torch.uint8), "codes": _cat(codes, torch.uint8),
        "scales": _cat(scales, torch.float32), "quantizers": _cat(state, torch.float32),
        **{k: _cat(v, _DTYPES[k]) for k, v in floats.items()},
    }  # fmt: skip
    _write(path, tensors, {"format": _FORMAT, "format_version": _VERSION})


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).contiguous() if parts else torch.zeros(0, dtype=dtype)


# ---- load ----------------------------------------------------------------------------------------------------------


class _Reader:
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


def _meta(path: Any, metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if metadata.get("format") == _FLOAT_FORMAT:
        raise FormatError(f"{path} holds a float model: use ssmquant.io.load_float")
    if metadata.get("format") != _FORMAT:
        raise FormatError(f"{path} was not written by ssmquant.save (no format entry in its header)")
    if metadata.get("format_version") != _VERSION:
        raise FormatError(
            f"{path} has format version {metadata.get('format_version')!r}; this ssmquant reads {_VERSION}"
        )
    blob = tensors.get("meta")
    if blob is None or blob.dtype != torch.uint8 or blob.dim() != 1:
        raise FormatError(f"{path}: tensor 'meta' is missing or no flat uint8 tensor")
    try:
        unzip = zlib.decompressobj()
        text = unzip.decompress(blob.numpy().tobytes(), _META_LIMIT)
        if unzip.unconsumed_tail or unzip.unused_data or not unzip.eof:
            raise FormatError(f"{path}: the metadata are cut short or too long")
        meta = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as e:
        raise FormatError(f"{path}: the metadata cannot be read ({type(e).__name__})") from None
    kinds: dict[str, Any] = {
        "config": dict, "method": str, "sites": list, "sites_sha256": str, "operands": list, "activations": list,
        "float": list, "example": dict, "class": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise FormatError(f"{path}: entry {key!r} of the metadata is missing or malformed")
    return meta


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """Reads a deployed model.

    Args:
        path: File written by :func:`save`.
        model: An instance of the model's class, with any weights, left as it is; None builds a zoo model.

    Raises:
        FileNotFoundError: no such file.
        FormatError: the file is cut short, tampered with, of another version, or made for another model.
        ConfigError: ``model`` is no float model.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"load: expected an instance of the model's class, got {type(model).__name__}")
    if model is not None and is_prepared(model):
        raise ConfigError("load: pass the plain float model, not a prepared one")
    metadata, tensors = _read(path)
    meta = _meta(path, metadata, tensors)
    try:
        return _load(path, meta, _Reader(path, tensors), model)
    except SsmquantError as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(f"{path} does not fit: {e}") from e
    except _MALFORMED as e:
        raise FormatError(f"{path}: malformed metadata ({type(e).__name__}: {e})") from e


_MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What reading metadata of the wrong types or sizes can raise."""


def _build(description: Any, room: int) -> nn.Module:
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
        with torch.device("meta"):  # no memory
            zoo.build(description)
    finally:
        handle.remove()
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


def _load(path: Any, meta: dict[str, Any], reader: _Reader, model: nn.Module | None) -> Any:
    if model is None:
        if not isinstance(meta.get("zoo"), dict):
            raise FormatError(
                f"{path} holds a {meta['class']}, which is no zoo model: pass an instance, load(path, model)"
            )
        codes = reader.tensors["codes"].numel()
        model = _build(meta["zoo"], 4 * codes + sum(t.numel() for t in reader.tensors.values()))
    config = QConfig.from_dict(meta["config"])
    adapter = get_adapter(meta["adapter"]) if isinstance(meta.get("adapter"), str) else find_adapter(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    new = copy.deepcopy(model).eval()
    if not callable(getattr(new, meta["method"], None)):
        raise reader.fail(f"made for a method {meta['method']!r} that {type(model).__name__} does not have")
    runtime = Runtime(config, adapter, meta["method"])
    attach(new, runtime)
    runtime.eval()
    try:
        # The saved model may have been cast; the one given computes in its own precision.
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        example = tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, _decode(meta["example"], device)
        )
        trace_example(new, example, training=False)
    except SsmquantError:
        raise
    except Exception as e:
        raise reader.fail(
            f"the model does not run on the file's example input ({type(e).__name__}: {e})"
        ) from e
    points = _all_points(runtime)
    sites = _point_table(points)
    if sites != meta["sites"] or _site_hash(sites) != meta["sites_sha256"]:
        theirs, ours = {s["name"] for s in meta["sites"]}, {s["name"] for s in sites}
        odd = sorted(theirs ^ ours)[:3] or ["the schemes"]
        raise reader.fail(
            f"made for another model or configuration: its {len(theirs)} quantized operands and the model's "
            f"differ ({', '.join(odd)} ...)"
        )
    _fill_points(new, points, meta, reader)
    runtime.stage = "deployed"
    runtime.rebuild(new)
    drop_parameters(new)
    _fill_floats(new, meta, reader)
    if any(r.trace.traced.baked for r in runtime.records):
        forget_baked(new)
    reader.done()
    for p in new.parameters():
        p.requires_grad_(False)
    refuse_elsewhere(new, runtime)
    return new.to(device).eval()


def _fill_points(model: nn.Module, points: list[Point], meta: dict[str, Any], reader: _Reader) -> None:
    runtime = runtime_of(model)
    operands = {e["name"]: e for e in meta["operands"]}
    activations = {e["name"]: e for e in meta["activations"]}
    for p in points:
        if p.what == "activation":
            _fill_activation(runtime, p, activations[p.name], reader)
            continue
        e = operands[p.name]
        shape, groups, bits = _shape(e["shape"]), _shape(e["groups"]), e["bits"]
        expected, dtype = _operand(model, p)
        if shape != expected or bits != p.scheme.bits:
            raise reader.fail(
                f"'{p.name}' has shape {list(shape)} at {bits} bits, the model's is {list(expected)}"
            )
        fits = len(groups) in (0, len(shape)) and all(
            g in (1, s) for g, s in zip(groups, shape, strict=False)
        )
        if type(e["code_min"]) is not int or abs(e["code_min"]) > 128 or not fits:
            raise reader.fail(f"'{p.name}' is malformed")
        if not _dtype(e["dtype"]).is_floating_point:
            raise reader.fail(f"'{p.name}' has dtype {e['dtype']}")
        out = PackedTensor(shape, bits, e["code_min"], dtype, groups=groups, clamped=bool(e["clamped"]))
        out.codes = reader.take("codes", packed_size(math.prod(shape), bits), torch.uint8, p.name)
        for name in ("scale", "shift", "lo", "hi") if e["clamped"] else ("scale", "shift"):
            value = reader.take("scales", math.prod(groups), torch.float32, p.name)
            if not bool(value.isfinite().all()):
                raise reader.fail(f"'{p.name}' has a scale that is not finite")
            setattr(out, name, value.reshape(groups))
        out.qtensor()  # codes out of range show here
        runtime.weights[p.key] = out


def _operand(model: nn.Module, p: Point) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype that an operand has in this model: the file's may come from a model that was cast."""
    called = p.what == "weight" and p.node.op == "call_module"
    value = model.get_parameter(str(p.parameter)) if called else p.node.meta["val"]
    return tuple(value.shape), value.dtype


def _fill_activation(runtime: Runtime, p: Point, e: dict[str, Any], reader: _Reader) -> None:
    assert p.scheme.bits is not None
    quantizer = FrozenRange(p.scheme.bits) if e["frozen"] else make_quantizer(p, runtime.config)
    own = quantizer.state_dict()
    table = e["state"]
    if [t[0] for t in table] != list(own):
        raise reader.fail(f"'{p.name}' has other quantizer state than a {p.scheme.method} quantizer")
    state = {}
    for name, shape, dtype in table:
        kinds = {_dtype(dtype).is_floating_point, own[name].is_floating_point()}
        if _shape(shape) != tuple(own[name].shape) or len(kinds) > 1:
            raise reader.fail(f"'{p.name}': {name} has another shape or dtype")
        value = reader.take("quantizers", own[name].numel(), torch.float32, p.name)
        if not bool(value.isfinite().all()):
            raise reader.fail(f"'{p.name}': {name} is not finite")
        state[name] = value.reshape(own[name].shape).to(own[name].dtype)
    quantizer.load_state_dict(state)
    runtime.activations[p.key] = ActivationQuantizer(p.name, quantizer)


def _fill_floats(model: nn.Module, meta: dict[str, Any], reader: _Reader) -> None:
    own = dict(_float_tensors(model))
    runtime = runtime_of(model)
    names = [e[0] for e in meta["float"]]
    if names != list(own):
        odd = sorted(set(names) ^ set(own))[:3]
        raise reader.fail(f"float parameters differ from the model's: {', '.join(odd) or 'their order'}")
    with torch.no_grad():
        for name, shape, dtype, stored in meta["float"]:
            t = own[name]
            if _shape(shape) != tuple(t.shape):
                raise reader.fail(f"parameter '{name}' has shape {shape}, the model's is {list(t.shape)}")
            kinds = {_dtype(dtype).is_floating_point, _dtype(stored).is_floating_point, t.is_floating_point()}
            if len(kinds) > 1:
                raise reader.fail(f"parameter '{name}' has dtype {dtype}, the model's is {t.dtype}")
            if stored != dtype:
                runtime.float_dtype = _dtype(stored)
            t.copy_(reader.take(stored, t.numel(), _dtype(stored), name).reshape(t.shape))


# ---- float models --------------------------------------------------------------------------------------------------


def save_float(model: nn.Module, path: str | os.PathLike[str], *, half: bool = False) -> None:
    """Writes a float zoo model (its parameters and how to build it); ``half`` stores float32 as float16."""
    description = zoo.describe(model)
    state = {}
    for name, t in model.state_dict().items():
        t = t.detach().cpu()
        state[name] = (t.half() if half and t.dtype == torch.float32 else t).contiguous().clone()
    _write(path, state, {"format": _FLOAT_FORMAT, "format_version": _VERSION, "zoo": json.dumps(description)})


def load_float(path: str | os.PathLike[str]) -> Any:
    """Reads a float zoo model written by :func:`save_float`, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        FormatError: the file is not one of these, or does not fit the model that it describes.
    """
    metadata, state = _read(path)
    if metadata.get("format") != _FLOAT_FORMAT or metadata.get("format_version") != _VERSION:
        raise FormatError(f"{path} is not a float model of ssmquant (format version {_VERSION})")
    try:
        model = _build(json.loads(metadata.get("zoo", "")), sum(t.numel() for t in state.values()))
        load_checkpoint(model, state)
    except (*_MALFORMED, SsmquantError) as e:
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
            source = _read(path)[1]
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
