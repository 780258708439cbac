"""A deployed model as one safetensors file. Nothing is ever unpickled, and everything read is checked.

Layout (format version 2). So that the header stays small, tensors of a kind are one flat tensor:

- ``meta``: zlib-compressed JSON (uint8): configuration, example input, a table of all quantized operands with the flags
  of their quantizers and exponents of two of the factors of their channels, one of the float tensors; in both, what is
  usual is left out;
- ``codes``: the packed codes (``ssmquant.pack``) of all weights and static operands, one after the other (uint8); of
  an operand whose entry says ``alike`` a single one, which all its elements have;
- ``scales``: for each of them ``scale`` (of those ``alike`` it is 1 and left out), ``shift`` unless it follows from the
  scale, and, if clamped, ``lo``, ``hi`` (float32);
- ``quantizers``: the state of the activation quantizers (float32);
- ``float32``, ``float16`` ...: the parameters and buffers that stay in float, by stored dtype.

``load`` traces the model again on fake tensors and compares its quantized operands with the file's.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ssmquant.adapter import find_adapter, get_adapter
from ssmquant.config import QConfig
from ssmquant.errors import ConfigError, FormatError, SsmquantError
from ssmquant.files import (
    DTYPES,
    FLOAT_FORMAT,
    FORMAT,
    MALFORMED,
    NAMES,
    VERSION,
    Reader,
    build_zoo,
    decode,
    dtype_name,
    encode,
    load_checkpoint,
    load_float,
    peek,
    read,
    read_dtype,
    read_shape,
    save_float,
    write,
)
from ssmquant.graph.plan import Point
from ssmquant.graph.prepared import attach, copied, forget_baked, refuse_elsewhere
from ssmquant.graph.runtime import Runtime, is_prepared, runtime_of
from ssmquant.graph.transforms.edits import read_entries
from ssmquant.modules import ActivationQuantizer, FrozenRange, PackedTensor
from ssmquant.modules.activation import MOST_GAIN
from ssmquant.ops.checks import outside_inference_mode
from ssmquant.quantizers.affine_fit import Shift
from ssmquant.quantizers.lsq import LearnedScale
from ssmquant.workflow import drop_parameters, ensure_traced, make_quantizer, trace_example

__all__ = ["load", "load_checkpoint", "load_float", "peek", "save", "save_float"]

_META_LIMIT = 16 * 2**20


# ---- save ----------------------------------------------------------------------------------------------------------


def _identity(p: Point) -> dict[str, Any]:
    """What a point of the file and of the model must have in common."""
    return {"name": p.name, "what": p.what, "bits": p.scheme.bits, "method": p.scheme.method}


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
    table = []
    for p in points:
        if p.what == "activation":
            wrapper = runtime.activations[p.key]
            assert isinstance(wrapper, ActivationQuantizer)
            own = wrapper.quantizer.state_dict()
            values = {k: v for k, v in own.items() if v.is_floating_point()}
            flags = {k: bool(v) for k, v in own.items() if k not in values}
            state += [v.detach().float().reshape(-1).cpu() for v in values.values()]
            given: dict[str, Any] = {"frozen": True} if isinstance(wrapper.quantizer, FrozenRange) else {}
            if wrapper.gain is not None:
                given["gain"] = wrapper.gain.log2().int().tolist()
            table.append({**_identity(p), "values": list(values), "flags": flags, **given})
            continue
        packed = runtime.weights[p.key]
        assert isinstance(packed, PackedTensor)
        if packed.scale.dtype != torch.float32:
            raise ConfigError(
                "save: scales are stored in float32, and this model computes in float64; prepare it in float32"
            )
        codes.append(packed.codes.cpu())
        parts = [None if packed.alike else packed.scale, packed.shift, packed.lo, packed.hi]
        scales += [t.float().reshape(-1).cpu() for t in parts if t is not None]
        options = {"clamped": packed.lo is not None, "alike": packed.alike}
        table.append({
            **_identity(p), "shape": list(packed.shape), "groups": list(packed.scale.shape),
            "code_min": packed.code_min, "dtype": NAMES[packed.dtype], "shift": packed.rule,
            **{k: True for k, given in options.items() if given},
        })  # fmt: skip
    floats: dict[str, list[Tensor]] = {}
    float_table = []
    for name, t in _float_tensors(deployed):
        dtype_name(t, f"'{name}'")
        stored = runtime.float_dtype if runtime.float_dtype is not None and t.is_floating_point() else t.dtype
        floats.setdefault(NAMES[stored], []).append(t.detach().to(stored).reshape(-1).cpu())
        float_table.append(
            [name, list(t.shape), NAMES[t.dtype], *([NAMES[stored]] if stored != t.dtype else [])]
        )
    meta = {
        "config": runtime.config.to_dict(), "method": runtime.method,
        "adapter": runtime.adapter.name if runtime.adapter else None, "platform": runtime.platform,
        "class": f"{type(deployed).__module__}.{type(deployed).__qualname__}",
        "zoo": getattr(deployed, "zoo_config", None), "example": encode(runtime.example), "points": table,
        "float": float_table,
    }  # fmt: skip
    transforms = runtime.transforms
    if runtime.config.transforms or transforms.folded:  # a checkpoint may have brought them
        places = [[name, list(t.shape)] for name, t in transforms.places.items()]
        state += [t.detach().float().reshape(-1).cpu() for t in transforms.places.values()]
        meta["transforms"] = {"places": places, **transforms.entries()}
    if runtime.rounded:
        meta["rounded"] = runtime.rounded
    blob = zlib.compress(json.dumps(meta, separators=(",", ":")).encode(), 9)
    tensors = {
        "meta": torch.frombuffer(bytearray(blob), dtype=torch.uint8), "codes": _cat(codes, torch.uint8),
        "scales": _cat(scales, torch.float32), "quantizers": _cat(state, torch.float32),
        **{k: _cat(v, DTYPES[k]) for k, v in floats.items()},
    }  # fmt: skip
    write(path, tensors, {"format": FORMAT, "format_version": VERSION})


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).contiguous() if parts else torch.zeros(0, dtype=dtype)


# ---- load ----------------------------------------------------------------------------------------------------------


def _meta(path: Any, metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if metadata.get("format") == FLOAT_FORMAT:
        raise FormatError(f"{path} holds a float model: use ssmquant.io.load_float")
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path} was not written by ssmquant.save (no format entry in its header)")
    if metadata.get("format_version") != VERSION:
        raise FormatError(
            f"{path} has format version {metadata.get('format_version')!r}; this ssmquant reads {VERSION}"
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
        "config": dict, "method": str, "points": list, "float": list, "example": dict, "class": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise FormatError(f"{path}: entry {key!r} of the metadata is missing or malformed")
    return meta


@outside_inference_mode
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
    metadata, tensors = read(path)
    meta = _meta(path, metadata, tensors)
    own = None if model is None else copied(model)
    try:
        return _load(path, meta, Reader(path, tensors), own)
    except SsmquantError as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(f"{path} does not fit: {e}") from e
    except MALFORMED as e:
        raise FormatError(f"{path}: malformed metadata ({type(e).__name__}: {e})") from e


def _load(path: Any, meta: dict[str, Any], reader: Reader, model: nn.Module | None) -> Any:
    if model is None:
        if not isinstance(meta.get("zoo"), dict):
            raise FormatError(
                f"{path} holds a {meta['class']}, which is no zoo model: pass an instance, load(path, model)"
            )
        codes = reader.tensors["codes"].numel()
        # Up to 4 codes a byte, and a scan's A that has none is less than half of its projections.
        model = build_zoo(meta["zoo"], 8 * codes + sum(t.numel() for t in reader.tensors.values()))
    config = QConfig.from_dict(meta["config"])
    adapter = get_adapter(meta["adapter"]) if isinstance(meta.get("adapter"), str) else find_adapter(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    new = model.eval()
    if not callable(getattr(new, meta["method"], None)):
        raise reader.fail(f"made for a method {meta['method']!r} that {type(model).__name__} does not have")
    runtime = Runtime(config, adapter, meta["method"])
    if meta.get("platform", "cuda") not in ("cuda", "rocm"):
        raise reader.fail(f"entry 'platform' is {meta['platform']!r}, expected 'cuda' or 'rocm'")
    runtime.platform = meta.get("platform", "cuda")
    attach(new, runtime)
    runtime.eval()
    places = _take_transforms(runtime, meta, reader)
    runtime.rounded = meta.get("rounded", {})
    if not isinstance(runtime.rounded, dict) or not all(isinstance(v, str) for v in runtime.rounded.values()):
        raise reader.fail("entry 'rounded' of the metadata is malformed")
    try:
        # The saved model may have been cast; the one given computes in its own precision.
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        example = tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, decode(meta["example"], device)
        )
        trace_example(new, example, training=False)
    except SsmquantError:
        raise
    except Exception as e:
        raise reader.fail(
            f"the model does not run on the file's example input ({type(e).__name__}: {e})"
        ) from e
    points = _all_points(runtime)
    theirs, ours = meta["points"], [_identity(p) for p in points]
    if [{k: e.get(k) for k in ("name", "what", "bits", "method")} for e in theirs] != ours:
        odd = sorted({e["name"] for e in theirs} ^ {e["name"] for e in ours})[:3] or ["the schemes"]
        raise reader.fail(
            f"made for another model or configuration: its {len(theirs)} quantized operands and the model's "
            f"differ ({', '.join(odd)} ...)"
        )
    _fill_points(new, points, meta, reader)
    tensors = {}
    for name, size in places:
        value = reader.take("quantizers", math.prod(size), torch.float32, name)
        if not bool(value.isfinite().all()):
            raise reader.fail(f"the transform '{name}' is not finite")
        tensors[name] = value.reshape(size).to(dtype)
    runtime.transforms.put(tensors)
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


def _take_transforms(
    runtime: Runtime, meta: dict[str, Any], reader: Reader
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and sizes of the tensors that transforms left in the graph, which is traced with them.

    The trace compares them, and the digest of each transform, with what the model's own graph has.
    """
    given = meta.get("transforms")
    if given is None:
        if runtime.config.transforms:
            raise reader.fail("entry 'transforms' of the metadata is missing")
        return []
    settled, folded, skipped = read_entries(given)
    places = [(name, read_shape(size)) for name, size in given["places"]]
    if len({name for name, _ in places}) != len(places) or not all(isinstance(n, str) for n, _ in places):
        raise reader.fail("the names of transforms are malformed")
    if any("." in name or ":" not in name for name, _ in places):
        raise reader.fail("a transform is malformed")
    # No more memory than the file itself takes.
    if sum(math.prod(size) for _, size in places) > reader.tensors["quantizers"].numel():
        raise reader.fail("tensor 'quantizers' is too short for the transforms")
    runtime.transforms.settle(
        {name: torch.ones(size) for name, size in places}, folded, skipped, None, settled=settled
    )
    return places


def _fill_points(model: nn.Module, points: list[Point], meta: dict[str, Any], reader: Reader) -> None:
    runtime = runtime_of(model)
    for p, e in zip(points, meta["points"], strict=True):
        if p.what == "activation":
            _fill_activation(runtime, p, e, reader)
            continue
        assert p.scheme.bits is not None
        shape, groups = read_shape(e["shape"]), read_shape(e["groups"])
        expected, dtype = _operand(model, p)
        if shape != expected:
            raise reader.fail(f"'{p.name}' has shape {list(shape)}, the model's is {list(expected)}")
        fits = len(groups) in (0, len(shape)) and all(
            g in (1, s) for g, s in zip(groups, shape, strict=False)
        )
        if type(e["code_min"]) is not int or abs(e["code_min"]) > 128 or not fits:
            raise reader.fail(f"'{p.name}' is malformed")
        if not read_dtype(e["dtype"]).is_floating_point:
            raise reader.fail(f"'{p.name}' has dtype {e['dtype']}")
        quantizer = make_quantizer(p, runtime.config)
        rule: Shift = quantizer.shift if isinstance(quantizer, LearnedScale) else "learned"
        if e["shift"] != rule:
            raise reader.fail(f"'{p.name}' has the shift {e['shift']!r}, its quantizer {rule!r}")
        out = PackedTensor(
            shape, p.scheme.bits, e["code_min"], dtype,
            groups=groups, clamped=_given(e, "clamped", reader), rule=rule, alike=_given(e, "alike", reader),
        )  # fmt: skip
        out.codes = reader.take("codes", out.codes.numel(), torch.uint8, p.name)
        if out.alike:
            out.scale = torch.ones(groups)
        for name in ("shift", "lo", "hi") if out.alike else ("scale", "shift", "lo", "hi"):
            if getattr(out, name) is None:
                continue
            value = reader.take("scales", math.prod(groups), torch.float32, p.name)
            if not bool(value.isfinite().all()):
                raise reader.fail(f"'{p.name}' has a scale that is not finite")
            setattr(out, name, value.reshape(groups))
        out.qtensor(check=True)
        runtime.weights[p.key] = out


def _given(e: dict[str, Any], option: str, reader: Reader) -> bool:
    """An option of an entry, which is there where it is true."""
    if option in e and e[option] is not True:
        raise reader.fail(f"'{e['name']}' is malformed")
    return option in e


def _operand(model: nn.Module, p: Point) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype that an operand has in this model: the file's may come from a model that was cast."""
    called = p.what == "weight" and p.node.op == "call_module"
    value = model.get_parameter(str(p.parameter)) if called else p.node.meta["val"]
    return tuple(value.shape), value.dtype


def _fill_activation(runtime: Runtime, p: Point, e: dict[str, Any], reader: Reader) -> None:
    assert p.scheme.bits is not None
    quantizer = (
        FrozenRange(p.scheme.bits) if _given(e, "frozen", reader) else make_quantizer(p, runtime.config)
    )
    own = quantizer.state_dict()
    values = [name for name, t in own.items() if t.is_floating_point()]
    flags = e["flags"]
    if e["values"] != values or sorted(flags) != sorted(own.keys() - set(values)):
        raise reader.fail(f"'{p.name}' has other quantizer state than a {p.scheme.method} quantizer")
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise reader.fail(f"'{p.name}' is malformed")
    state = {name: torch.tensor(flag) for name, flag in flags.items()}
    for name in values:
        value = reader.take("quantizers", own[name].numel(), torch.float32, p.name)
        if not bool(value.isfinite().all()):
            raise reader.fail(f"'{p.name}': {name} is not finite")
        state[name] = value.reshape(own[name].shape).to(own[name].dtype)
    try:
        quantizer.load_state_dict(state)
    except RuntimeError as error:
        raise reader.fail(f"'{p.name}': {error}") from error
    if not quantizer.ready:  # a deployed model would not run
        raise reader.fail(f"'{p.name}' has no range")
    if p.gain is None and "gain" in e:
        raise reader.fail(f"'{p.name}' has factors of channels, which the configuration has none of")
    channels = p.channels if "gain" in e else None
    wrapper = ActivationQuantizer(p.name, quantizer, channels)
    if wrapper.gain is not None:
        wrapper.gain = _gain(e["gain"], wrapper.gain.numel(), p, reader)
    runtime.activations[p.key] = wrapper


def _gain(exponents: Any, channels: int, p: Point, reader: Reader) -> Tensor:
    if not isinstance(exponents, list) or len(exponents) != channels:
        raise reader.fail(f"'{p.name}' has not one factor for each of {channels} channels")
    if not all(type(e) is int and abs(e) <= MOST_GAIN for e in exponents):
        raise reader.fail(f"'{p.name}' has a factor out of range")
    return torch.tensor(exponents, dtype=torch.float32).exp2()


def _fill_floats(model: nn.Module, meta: dict[str, Any], reader: Reader) -> None:
    own = dict(_float_tensors(model))
    runtime = runtime_of(model)
    names = [e[0] for e in meta["float"]]
    if names != list(own):
        odd = sorted(set(names) ^ set(own))[:3]
        raise reader.fail(f"float parameters differ from the model's: {', '.join(odd) or 'their order'}")
    with torch.no_grad():
        for name, shape, dtype, *rest in meta["float"]:
            stored = rest[0] if rest else dtype
            t = own[name]
            if read_shape(shape) != tuple(t.shape):
                raise reader.fail(f"parameter '{name}' has shape {shape}, the model's is {list(t.shape)}")
            kinds = {
                read_dtype(dtype).is_floating_point,
                read_dtype(stored).is_floating_point,
                t.is_floating_point(),
            }
            if len(kinds) > 1:
                raise reader.fail(f"parameter '{name}' has dtype {dtype}, the model's is {t.dtype}")
            if stored != dtype:
                runtime.float_dtype = read_dtype(stored)
            t.copy_(reader.take(stored, t.numel(), read_dtype(stored), name).reshape(t.shape))
