"""Files that do not fit, damaged and hostile ones: an error of ours, or a model that runs."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
import ssmquant.io as files
from ssmquant import ConfigError, FormatError, QConfig, SsmquantError, zoo
from tests.model_files import (
    POINTS,
    ZOO_NUMBERS,
    Small,
    activations_of,
    loaded,
    mambair_file,
    meta_of,
    operands_of,
    read,
    rewritten,
    small_file,
    with_meta,
    with_tensor,
    written,
)
from tests.small import Scanner, images, prepared_and_calibrated, scanner, tiny_mambair

# ---- files that do not fit -----------------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path) -> None:
    for read_it in (lambda p: ssmquant.load(p, Small()), files.load_float, files.peek):
        with pytest.raises(FileNotFoundError):
            read_it(tmp_path / "nowhere")
        with pytest.raises((FileNotFoundError, FormatError)):
            read_it(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.load_checkpoint(Small(), tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        files.load_checkpoint(Small(), tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 8, b"\0" * 4096, b"\xff" * 64, b"hello, world" * 9, pickle.dumps({"a": 1}),
        (2**63).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
        (100).to_bytes(8, "little") + b'{"a":' * 20,
    ],
    ids=["empty", "zeros", "many zeros", "ones", "text", "pickle", "huge header", "no tensors", "a list", "nested"],
)  # fmt: skip
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(content)
    for read_it in (lambda p: ssmquant.load(p, Small()), files.load_float, files.peek):
        with pytest.raises(FormatError, match="m "):
            read_it(path)
    with pytest.raises(FormatError):
        files.load_checkpoint(Small(), path)


def test_a_foreign_safetensors_file() -> None:
    content = rewritten({"weight": torch.zeros(3)}, {"format": "pt"})
    with pytest.raises(FormatError, match=r"not written by ssmquant\.save"):
        loaded(content, Small())


def test_float_and_quantized_files_are_told_apart(tmp_path: Path) -> None:
    model = tiny_mambair()
    files.save_float(model, tmp_path / "float")
    (tmp_path / "quantized").write_bytes(mambair_file())
    assert [files.peek(tmp_path / n) for n in ("float", "quantized")] == ["float", "quantized"]
    with pytest.raises(FormatError, match="load_float"):
        ssmquant.load(tmp_path / "float")
    with pytest.raises(FormatError, match="not a float model"):
        files.load_float(tmp_path / "quantized")


def test_other_versions() -> None:
    tensors, metadata = read(small_file())
    with pytest.raises(FormatError, match="version '1'"):
        loaded(rewritten(tensors, {**metadata, "format_version": "1"}), Small())
    del metadata["format_version"]
    with pytest.raises(FormatError, match="version None"):
        loaded(rewritten(tensors, metadata), Small())


def test_a_user_model_must_be_passed_and_must_fit() -> None:
    with pytest.raises(FormatError, match=r"Small.*pass an instance"):
        loaded(small_file())
    for wrong in (Small(6), Scanner(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))):
        with pytest.raises(FormatError):
            loaded(small_file(), wrong)
    with pytest.raises(FormatError):
        loaded(mambair_file(), tiny_mambair(embed_dim=10))
    with pytest.raises(FormatError):
        loaded(mambair_file(), tiny_mambair(depths=(2,)))
    for never in (scanner(), ssmquant.convert(scanner()), Small, "model"):
        with pytest.raises(ConfigError, match="load"):
            loaded(small_file(), never)  # type: ignore[arg-type]
    torch.manual_seed(7)  # whatever the weights are of what is passed
    one, other = (loaded(small_file(), Small())(POINTS) for _ in range(2))
    assert torch.equal(one, other)


# ---- damaged files -------------------------------------------------------------------------------------------------


def try_load(content: bytes, model: nn.Module | None = None) -> None:
    """Either an error of ours or a model that runs."""
    try:
        again = loaded(content, model)
    except SsmquantError as e:
        assert str(e)  # noqa: PT017
    else:
        assert again(POINTS if model is not None else images(1, 3, 6, 8)) is not None


@given(st.data())
@settings(max_examples=40)
def test_truncated_files(data: st.DataObject) -> None:
    content = small_file()
    end = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(FormatError):
        loaded(content[:end], Small())


@given(st.data())
@settings(max_examples=100)
def test_flipped_bytes(data: st.DataObject) -> None:
    content = bytearray(small_file())
    header = int.from_bytes(content[:8], "little") + 8
    areas = st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(header, len(content) - 1))
    for at in data.draw(st.lists(areas, min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    try_load(bytes(content), Small())


@given(st.data())
@settings(max_examples=40)
def test_inserted_and_removed_bytes(data: st.DataObject) -> None:
    content = small_file()
    at, n = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 9))
    with pytest.raises(FormatError):
        loaded(content[:at] + data.draw(st.binary(min_size=n + 1, max_size=n + 1)) + content[at:], Small())


def places(x: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested JSON."""
    out = [path] if path else []
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for k, v in items:
        out += places(v, (*path, k))
    return out


HOSTILE = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 4, 127, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("inf"),
        float("nan"),
        "", "float16", "int64", "complex64", "no", "__class__", "forward", "train", "\0", "x" * 10_000, [], {},
        [[]], [0],
        [-1], [2**31 - 1] * 16, [10**9] * 3, {"tensor": [2**31 - 1] * 4, "dtype": "float64"}, {"tuple": []},
        {"name": "mambair_classic"},
    ]
)  # fmt: skip


@given(st.data())
@settings(max_examples=40)
def test_edited_metadata(data: st.DataObject) -> None:
    meta = meta_of(small_file())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(meta)))
        target = meta
        for k in path[:-1]:
            target = target[k]
        action = data.draw(st.sampled_from(["set", "remove", "add", "double"]))
        if action == "set":
            target[path[-1]] = data.draw(HOSTILE)
        elif action == "remove":
            del target[path[-1]]
        elif isinstance(target, dict):
            target["extra"] = data.draw(HOSTILE)
        else:
            target.append(data.draw(HOSTILE) if action == "add" else target[path[-1]])
    try_load(with_meta(small_file(), meta), Small())


@given(st.data())
@settings(max_examples=30)
def test_edited_zoo_descriptions(data: st.DataObject) -> None:
    """No description makes load hang or allocate more than the file holds."""
    meta = meta_of(mambair_file())
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(
            st.sampled_from([k for k in meta["zoo"]["args"] if k not in ("img_size", "mlp_ratio")])
        )
        meta["zoo"]["args"][key] = data.draw(ZOO_NUMBERS)
    built: list[int] = []
    original = zoo.build

    def watch(*args: Any) -> nn.Module:
        model = original(*args)
        built.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "build", watch)
        try_load(with_meta(mambair_file(), meta))
    assert sum(built) < 10 * len(mambair_file())


@pytest.mark.parametrize("kind", ["list", "object", "string"])
def test_nested_metadata(kind: str) -> None:
    n = 200_000
    text = {
        "list": b"[" * n + b"]" * n,
        "object": b'{"config":' * n + b"1" + b"}" * n,
        "string": b'"' + b"x" * n,
    }[kind]
    with pytest.raises(FormatError, match="metadata"):
        loaded(with_meta(small_file(), text), Small())
    meta = json.dumps(meta_of(small_file()))
    example = json.dumps(meta_of(small_file())["example"])
    assert meta.count(example) == 1
    deep = '{"tuple":[' * 900 + example + "]}" * 900
    with pytest.raises(FormatError):
        loaded(with_meta(small_file(), meta.replace(example, deep).encode()), Small())


def test_a_zip_bomb() -> None:
    squeeze = zlib.compressobj(9)
    blob = b"".join([*(squeeze.compress(b" " * 2**20) for _ in range(100)), squeeze.flush()])
    assert len(blob) < 400_000
    tensors, metadata = read(small_file())
    tensors["meta"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    content = rewritten(tensors, metadata)
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="too long"):
            loaded(content, Small())
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_trailing_data_after_the_metadata() -> None:
    tensors, metadata = read(small_file())
    tensors["meta"] = torch.cat((tensors["meta"], torch.zeros(9, dtype=torch.uint8)))
    with pytest.raises(FormatError, match="metadata"):
        loaded(rewritten(tensors, metadata), Small())


@pytest.mark.parametrize("key", ["meta", "codes", "scales", "quantizers", "float32", "int64"])
def test_missing_misshapen_and_left_over_tensors(key: str) -> None:
    tensors, metadata = read(small_file())
    assert set(tensors) == {"meta", "codes", "scales", "quantizers", "float32", "int64"}
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "longer": lambda t: torch.cat((t, t)), "shorter": lambda t: t[:-1].clone(), "2-d": lambda t: t.reshape(1, -1),
        "cast": lambda t: t.double(), "empty": lambda t: t[:0].clone(), "0-d": lambda t: t[0].clone(),
    }  # fmt: skip
    for change in changes.values():
        with pytest.raises(FormatError):
            loaded(with_tensor(small_file(), key, change), Small())
    with pytest.raises(FormatError, match=key):
        loaded(rewritten({k: v for k, v in tensors.items() if k != key}, metadata), Small())
    with pytest.raises(FormatError, match="more"):
        loaded(rewritten({**tensors, "more": torch.zeros(2)}, metadata), Small())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["scales", "quantizers"])
def test_scales_are_finite(key: str, value: float) -> None:
    def spoil(t: Tensor) -> Tensor:
        t[1] = value
        return t

    with pytest.raises(FormatError, match="finite"):
        loaded(with_tensor(small_file(), key, spoil), Small())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_codes_out_of_range(bits: int) -> None:
    """25 codes of 3 bits leave unused bits, and in one byte each, 5 to 7 bits do."""
    torch.manual_seed(0)
    deployed = ssmquant.convert(prepared_and_calibrated(Small(), QConfig(w_bits=bits), POINTS))

    def spoil(t: Tensor) -> Tensor:
        t[-1] = 255
        return t

    with pytest.raises(FormatError):
        loaded(with_tensor(written(deployed), "codes", spoil), Small())


def edit(change: Callable[[dict[str, Any]], Any]) -> bytes:
    meta = meta_of(small_file())
    change(meta)
    return with_meta(small_file(), meta)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["points"].clear(),
        lambda m: m["points"].pop(),
        lambda m: m["points"].append(m["points"][0]),
        lambda m: m["points"].reverse(),
        lambda m: m["points"].__setitem__(0, 3),
        lambda m: m["points"][0].clear(),
        lambda m: m["points"][0].update(bits=4),
        lambda m: m["points"][0].update(what="static"),
        lambda m: m["points"][0].update(method="lsq"),
        lambda m: m["config"].update(w_bits=4),
        lambda m: m["config"].update(w_bits=9),
        lambda m: m["config"].update(version=2),
        lambda m: m["config"].update(more=1),
        lambda m: m["config"].update(activation="lsq"),
        lambda m: m["config"].update(keep_float=["middle"]),
        lambda m: m["config"].update(rules=[{"match": "re:("}]),
        lambda m: m.update(method="encode"),
        lambda m: m.update(method="__class__"),
        lambda m: m.update(method="to"),
        lambda m: m.update(adapter="nonesuch"),
        lambda m: operands_of(m)[0].update(shape=[5, 6]),
        lambda m: operands_of(m)[0].update(shape=[25]),
        lambda m: operands_of(m)[0].update(shape=[-5, -5]),
        lambda m: operands_of(m)[0].update(shape=[2**40]),
        lambda m: operands_of(m)[0].update(bits=2),
        lambda m: operands_of(m)[0].update(bits="3"),
        lambda m: operands_of(m)[0].update(groups=[2]),
        lambda m: operands_of(m)[0].update(groups=[3, 1]),
        lambda m: operands_of(m)[0].update(groups=[1, 1, 1]),
        lambda m: operands_of(m)[0].update(code_min=10**6),
        lambda m: operands_of(m)[0].update(code_min=-3.5),
        lambda m: operands_of(m)[0].update(dtype="int64"),
        lambda m: operands_of(m)[0].update(dtype="complex64"),
        lambda m: operands_of(m)[0].update(clamped=True),
        lambda m: operands_of(m)[0].update(clamped=False),
        lambda m: activations_of(m)[0]["values"].pop(),
        lambda m: activations_of(m)[0]["values"].append("z"),
        lambda m: activations_of(m)[0]["values"].reverse(),
        lambda m: activations_of(m)[0].update(values=None),
        lambda m: activations_of(m)[0]["flags"].clear(),
        lambda m: activations_of(m)[0]["flags"].update(initialized=1.0),
        lambda m: activations_of(m)[0]["flags"].update(more=True),
        lambda m: activations_of(m)[0].update(flags=[]),
        lambda m: activations_of(m)[0].update(frozen=True),
        lambda m: activations_of(m)[0].update(frozen=0),
        lambda m: m["float"].pop(),
        lambda m: m["float"].reverse(),
        lambda m: m["float"][0].__setitem__(1, [99, 99]),
        lambda m: m["float"][0].__setitem__(2, "int32"),
        lambda m: m["float"][0].append("float16"),
        lambda m: m["float"][0].append("int64"),
        lambda m: m["float"][0].append("meta"),
        lambda m: m["float"][0].__setitem__(0, "nowhere"),
        lambda m: m.update(example={"tuple": []}),
        lambda m: m.update(example={"tuple": [{"tensor": [6, 5], "dtype": "float32"}]}),
        lambda m: m.update(example={"tuple": [{"tensor": [0, 4], "dtype": "float32"}]}),
        lambda m: m.update(example={"tuple": [{"value": 3}]}),
        lambda m: m.update(example={"tensor": [6, 4], "dtype": "float32"}),
    ],
)  # fmt: skip
def test_metadata_that_contradict_the_model(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(FormatError):
        loaded(edit(change), Small())


def test_the_untouched_file_loads() -> None:
    """What the tests above change is a file that loads."""
    assert loaded(edit(lambda m: m.update(unknown="entries are for later versions")), Small())(
        POINTS
    ).shape == (6, 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_damaged_codes_of_a_state_dict(bits: int) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))  # codes of neither fill their last byte
    x = torch.randn(4, 5)
    config = QConfig(w_bits=bits, a_bits=8, keep_first_last=False)
    prepared = ssmquant.calibrate(ssmquant.prepare(model, config, example_inputs=(x,)), [x], progress=False)
    deployed = ssmquant.convert(prepared)
    state, before = deployed.state_dict(), deployed(x)
    name = next(k for k in state if k.endswith("codes"))
    damaged = {**state, name: state[name].clone()}
    damaged[name][-1] = 255
    with pytest.raises(RuntimeError, match=r"codes: .*damaged"):
        deployed.load_state_dict(damaged)
    assert torch.equal(deployed(x), before)
    deployed.load_state_dict(state)
