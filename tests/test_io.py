"""Files: what is written comes back; whatever else a file holds is refused with an error of ours."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ssmquant
import ssmquant.io as files
from ssmquant import ConfigError, FormatError, QConfig, SsmquantError, zoo
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor
from tests.small import Scanner, images, light, prepared_and_calibrated, scanner, tiny_mambair

X = images(2, 3, 6, 5)


class Small(nn.Module):
    """Loads in some milliseconds: a projection between two that stay in float."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(4, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.first(x))))


POINTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@functools.cache
def small_file() -> bytes:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(Small(), QConfig(w_bits=3, a_bits=3, activation="dls"), POINTS)
    return written(ssmquant.convert(prepared))


@functools.cache
def mambair_file() -> bytes:
    torch.manual_seed(0)
    return written(
        ssmquant.convert(prepared_and_calibrated(tiny_mambair(), QConfig.qmambair(2), images(2, 3, 6, 8)))
    )


def written(deployed: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        ssmquant.save(deployed, path)
        return path.read_bytes()


def loaded(content: bytes, model: nn.Module | None = None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(content)
        return ssmquant.load(path, model)


def read(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(content)
        with safe_open(str(path), framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())


def assert_same_content(a: bytes, b: bytes) -> None:
    """Not byte by byte: safetensors writes the header's entries in any order."""
    (tensors, metadata), (tensors0, metadata0) = read(a), read(b)
    assert metadata == metadata0
    assert tensors.keys() == tensors0.keys()
    for k, t in tensors0.items():
        assert torch.equal(tensors[k], t), k


def rewritten(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_file(tensors, path, metadata=metadata)
        return path.read_bytes()


def meta_of(content: bytes) -> dict[str, Any]:
    return json.loads(zlib.decompress(read(content)[0]["meta"].numpy().tobytes()))


def operands_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what is packed: weights and values made of parameters."""
    return [e for e in meta["points"] if "shape" in e]


def activations_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in meta["points"] if "values" in e]


def with_meta(content: bytes, meta: Any) -> bytes:
    tensors, metadata = read(content)
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    tensors["meta"] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    return rewritten(tensors, metadata)


def with_tensor(content: bytes, key: str, change: Callable[[Tensor], Tensor]) -> bytes:
    tensors, metadata = read(content)
    tensors[key] = change(tensors[key].clone())
    return rewritten(tensors, metadata)


# ---- round trips ---------------------------------------------------------------------------------------------------


def test_zoo_models_need_no_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(tiny_mambair(), QConfig.qmambair(2), images(2, 3, 6, 8))
    deployed = ssmquant.convert(prepared)
    path = tmp_path / "model.safetensors"
    ssmquant.save(deployed, path)
    assert files.peek(path) == "quantized"
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    again = ssmquant.load(str(path))
    assert isinstance(again, zoo.MambaIR)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    for shape in ((1, 3, 6, 8), (3, 3, 9, 7)):
        assert torch.equal(again(images(*shape)), deployed(images(*shape)))
    # A loaded model is as good as a converted one.
    assert ssmquant.verify(prepared, again, images(1, 3, 6, 8)).worst_abs == 0
    assert str(ssmquant.summary(again)) == str(ssmquant.summary(deployed))
    assert_same_content(written(again), path.read_bytes())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    assert torch.equal(copied(images(1, 3, 6, 8)), deployed(images(1, 3, 6, 8)))


@pytest.mark.parametrize(
    "config",
    [
        QConfig(w_bits=2, a_bits=2), QConfig.qmambair(3, granularity="channel"), QConfig.minmax(8, 8),
        QConfig.lsq(4, 4), QConfig(w_bits=5), QConfig(a_bits=4), QConfig.qmambair(4, official=True),
        QConfig.qmambair(4, statistics="tensor"), QConfig(w_bits=4, a_bits=6, keep_first_last=False), QConfig(),
    ],
    ids=["w2a2", "channel", "minmax", "lsq", "weights", "activations", "official", "tensor", "ends", "float"],
)  # fmt: skip
def test_round_trip(config: QConfig) -> None:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(Scanner(), config, X)
    for dls in ("dynamic", "frozen"):
        check_round_trip(ssmquant.convert(prepared, dls=dls), config)


def check_round_trip(deployed: Any, config: QConfig) -> None:
    other = Scanner().train()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    again = loaded(written(deployed), other)
    assert isinstance(again, Scanner)
    for x in (X, images(1, 3, 9, 4)):
        assert torch.equal(again(x), deployed(x))
    assert other.training
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert runtime_of(again).config == config
    assert ssmquant.summary(again).bytes == ssmquant.summary(deployed).bytes


@functools.cache
def recommended() -> Any:
    torch.manual_seed(0)
    prepared = prepared_and_calibrated(Scanner(16, 8), QConfig.recommended(2, 2), X)
    return ssmquant.convert(prepared)


def test_a_decay_of_one_value_a_state_has_no_codes_in_the_file() -> None:
    deployed = recommended()
    content = written(deployed)
    again = loaded(content, Scanner(16, 8))
    assert torch.equal(again(X), deployed(X))
    assert_same_content(written(again), content)
    operands = operands_of(meta_of(content))
    assert [(e["name"], e["shape"], e["alike"]) for e in operands if "alike" in e] == [
        ("scan.A", [16, 8], True)
    ]
    for wrong in (False, 1, None, "no"):
        meta = meta_of(content)
        next(e for e in operands_of(meta) if e["name"] == "scan.A")["alike"] = wrong
        with pytest.raises(FormatError):
            loaded(with_meta(content, meta), Scanner(16, 8))


def test_zoo_models_with_one_decay_a_state_need_no_model() -> None:
    torch.manual_seed(0)
    for config in (QConfig.recommended(2, 2), QConfig.recommended(2, 2, keep_first_last=False)):
        model = tiny_mambair(d_state=16)
        deployed = ssmquant.convert(prepared_and_calibrated(model, config, images(2, 3, 6, 8)))
        again = loaded(written(deployed))
        assert torch.equal(again(images(1, 3, 6, 8)), deployed(images(1, 3, 6, 8)))


@pytest.mark.parametrize("rule", ["none", "learned"])
def test_another_shift_than_the_configurations(rule: str) -> None:
    meta = meta_of(written(recommended()))
    entry = next(e for e in operands_of(meta) if e["shift"] == "half")
    entry["shift"] = rule
    with pytest.raises(FormatError, match=f"'{entry['name']}' has the shift '{rule}'.*'half'"):
        loaded(with_meta(written(recommended()), meta), Scanner(16, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_remainder(dtype: torch.dtype) -> None:
    full, half = (written(ssmquant.convert(scanner(), float_dtype=d)) for d in (None, dtype))
    assert len(half) < len(full) - 400
    again = loaded(half, Scanner())
    assert torch.equal(again(X), ssmquant.convert(scanner(), float_dtype=dtype)(X))
    assert again.stem.weight.dtype == torch.float32
    assert_same_content(written(again), half)


def test_the_method_and_plain_arguments_come_back() -> None:
    class Options(Small):
        def encode(self, x: Tensor, *more: Tensor, scale: float = 1.0, flags: Any = None, **rest: Any) -> Any:
            y = self.last(self.middle(self.first(x)))
            return {"y": y * scale, "n": len(more)} if flags["on"] else y

    torch.manual_seed(0)
    model = Options()
    kwargs = {"scale": 2.0, "flags": {"on": True, "list": [1, (2, None), "x"]}, "name": "n"}
    prepared = ssmquant.prepare(
        model,
        QConfig(w_bits=4, a_bits=4),
        example_inputs=(POINTS, POINTS),
        example_kwargs=kwargs,
        method="encode",
    )
    ssmquant.calibrate(prepared, [POINTS], forward=lambda m, b: m.encode(b, b, **kwargs))
    deployed = ssmquant.convert(prepared)
    again = loaded(written(deployed), Options())
    assert torch.equal(
        again.encode(POINTS, POINTS, **kwargs)["y"], deployed.encode(POINTS, POINTS, **kwargs)["y"]
    )
    assert again.encode(POINTS, POINTS, **kwargs)["n"] == 1


def test_tied_weights_and_buffers_come_back() -> None:
    class Tied(Small):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(5, 5)
            self.other.weight = self.middle.weight
            self.register_buffer("scratch", torch.zeros(3), persistent=False)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.last(self.other(self.middle(self.first(x)))))

    torch.manual_seed(0)
    model = Tied()
    model.steps.fill_(11)
    model.train()(POINTS)
    deployed = ssmquant.convert(prepared_and_calibrated(model.eval(), QConfig(w_bits=4, a_bits=4), POINTS))
    again = loaded(written(deployed), Tied())
    assert int(again.steps) == 11
    assert int(again.norm.num_batches_tracked) == 1
    assert torch.equal(again(POINTS), deployed(POINTS))
    assert [e["name"] for e in operands_of(meta_of(written(deployed)))] == ["middle:weight"]


def test_a_cast_model_keeps_its_values() -> None:
    deployed = ssmquant.convert(scanner())
    for dtype in (torch.float64, torch.bfloat16):
        cast = copy.deepcopy(deployed).to(dtype)
        again = loaded(written(cast), Scanner())
        assert torch.equal(again(X), cast.float()(X))
        assert torch.equal(again(X), deployed(X)) is (dtype == torch.float64)


@pytest.mark.parametrize(("half", "limit"), [(False, 550_000), (True, 400_000)], ids=["float32", "float16"])
def test_file_size_of_the_light_model(half: bool, limit: int, tmp_path: Path) -> None:
    ssmquant.save(ssmquant.convert(light(), float_dtype=torch.float16 if half else None), tmp_path / "light")
    assert (tmp_path / "light").stat().st_size <= limit


@pytest.mark.parametrize(("bits", "whole", "half"), [(2, 600_000, 450_000), (4, 820_000, 650_000)])
def test_file_sizes_of_what_enlarges_four_times(bits: int, whole: int, half: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = images(1, 3, 8, 8)
    prepared = prepared_and_calibrated(
        zoo.build("mambair_light", upscale=4).eval(), QConfig.recommended(bits, bits), x
    )
    for dtype, limit in ((torch.float32, whole), (torch.float16, half)):
        path = tmp_path / "model.safetensors"
        ssmquant.save(ssmquant.convert(prepared, float_dtype=dtype), path)
        assert path.stat().st_size <= limit


# ---- saving --------------------------------------------------------------------------------------------------------


def test_only_deployed_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deployed"):
        ssmquant.save(scanner(), tmp_path / "m")
    with pytest.raises(ConfigError, match=r"ssmquant\.prepare"):
        ssmquant.save(Scanner(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_saving_is_all_or_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    path.write_bytes(small_file())

    def fails(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half a fi")
        raise error

    monkeypatch.setattr("ssmquant.files.save_file", fails)
    with pytest.raises(type(error)):
        ssmquant.save(ssmquant.convert(scanner()), path)
    assert path.read_bytes() == small_file()
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    class Odd(Small):
        def forward(self, x: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
            return super().forward(x.to(kind))

    deployed = ssmquant.convert(prepared_and_calibrated(Odd(), QConfig(w_bits=4, a_bits=4), POINTS))
    with pytest.raises(ConfigError, match="dtype"):
        ssmquant.save(deployed, tmp_path / "m")
    model = Small()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    deployed = ssmquant.convert(prepared_and_calibrated(model, QConfig(w_bits=4, a_bits=4), POINTS))
    with pytest.raises(ConfigError, match="complex64"):
        ssmquant.save(deployed, tmp_path / "m")
    double = prepared_and_calibrated(Small().double(), QConfig(w_bits=4, a_bits=4), POINTS.double())
    with pytest.raises(ConfigError, match="float64"):
        ssmquant.save(ssmquant.convert(double), tmp_path / "m")
    assert not list(tmp_path.iterdir())


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
    assert torch.equal(loaded(small_file(), Small())(POINTS), loaded(small_file(), Small())(POINTS))


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


ZOO_NUMBERS = st.sampled_from(
    [
        0, 1, -3, 2, 7, 64, 5000, 65536, 10**9, 10**18, 10**30, 0.0, 1e-9, 1e300, -1.5, float("nan"), float("inf"),
        None, "8", [], [10**9], [1] * 300, [1, 10**7], [60000] * 200, {},
    ]
)  # fmt: skip


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


# ---- float models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_float_round_trip(half: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_mambair().train()
    files.save_float(model, tmp_path / "m", half=half)
    again = files.load_float(tmp_path / "m")
    assert not again.training
    x = images(1, 3, 6, 6)
    if half:
        torch.testing.assert_close(again(x), model.eval()(x), rtol=2e-2, atol=2e-2)
        assert again.conv_first.weight.dtype == torch.float32
    else:
        assert torch.equal(again(x), model.eval()(x))
    with pytest.raises(ConfigError, match="not a zoo model"):
        files.save_float(Small(), tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("name", ["mambair_tiny", "vmamba_nano", "vim_nano"])
def test_parameters_that_a_file_has_are_not_initialised(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.build(name)
    files.save_float(model, tmp_path / "m")
    torch.use_deterministic_algorithms(True)  # memory that nothing has written to is NaN then
    try:
        fresh = files.build_zoo(zoo.describe(model), 10**9)
        again = files.load_float(tmp_path / "m")
    finally:
        torch.use_deterministic_algorithms(False)
    weights = [p for p in fresh.parameters() if p.dim() > 1 and p.numel() > 1000]
    assert sum(bool(p.isnan().all()) for p in weights) > 0.8 * len(weights)
    for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for (key, a), (_, b) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), key


@given(st.data())
@settings(max_examples=20)
def test_damaged_float_files(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        torch.manual_seed(0)
        model = tiny_mambair(depths=(1,))
        description = zoo.describe(model)
        key = data.draw(
            st.sampled_from([k for k in description["args"] if k not in ("img_size", "mlp_ratio")])
        )
        description["args"][key] = data.draw(ZOO_NUMBERS)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        save_file(
            state,
            path,
            metadata={"format": "ssmquant-float", "format_version": "1", "zoo": json.dumps(description)},
        )
        try:
            assert isinstance(files.load_float(path), zoo.MambaIR)
        except FormatError as e:
            assert "does not fit" in str(e)  # noqa: PT017
        for bad in (
            "",
            "{",
            "[]",
            "3",
            '"mambair_tiny"',
            '{"name": "MambaIR"}',
            '{"name": "os"}',
            '{"name": 3}',
        ):
            save_file(state, path, metadata={"format": "ssmquant-float", "format_version": "1", "zoo": bad})
            with pytest.raises(FormatError, match="does not fit"):
                files.load_float(path)


def checkpoints(model: nn.Module) -> dict[str, Any]:
    state = model.state_dict()
    return {
        "plain": state, "params": {"params": state}, "params_ema": {"params_ema": state, "params": {}},
        "state_dict": {"state_dict": state, "epoch": 3}, "module": {f"module.{k}": v for k, v in state.items()},
        "params, module": {"params": {f"module.{k}": v for k, v in state.items()}},
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(checkpoints(nn.Linear(1, 1))))
@pytest.mark.parametrize("stored", ["mapping", "c.pth", "c.safetensors"])
@pytest.mark.parametrize("target", ["float", "prepared"])
def test_checkpoints(kind: str, stored: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Small()
    source: Any = checkpoints(model)[kind]
    if stored == "c.pth":
        torch.save(source, tmp_path / stored)
        source = str(tmp_path / stored)
    elif stored == "c.safetensors" and kind in ("plain", "module"):  # such a file is flat
        save_file(source, tmp_path / stored)
        source = tmp_path / stored
    torch.manual_seed(4)
    other = Small()
    if target == "prepared":
        other = ssmquant.prepare(other, QConfig(w_bits=4, a_bits=4), example_inputs=(POINTS,))
    assert files.load_checkpoint(other, source) is other
    for k, v in model.state_dict().items():
        assert torch.equal(other.state_dict()[k], v)
    if target == "prepared":  # the quantizers start from the new weights
        fresh = ssmquant.prepare(model, QConfig(w_bits=4, a_bits=4), example_inputs=(POINTS,))
        for k, v in fresh.state_dict().items():
            assert torch.equal(other.state_dict()[k].nan_to_num(7), v.nan_to_num(7)), k


def test_a_prepared_checkpoint_loads_whole() -> None:
    torch.manual_seed(3)
    source = prepared_and_calibrated(Small(), QConfig(w_bits=4, a_bits=4), POINTS)
    torch.manual_seed(4)
    other = ssmquant.prepare(Small(), QConfig(w_bits=4, a_bits=4), example_inputs=(POINTS,)).eval()
    files.load_checkpoint(other, source.state_dict())
    assert torch.equal(other(POINTS), source(POINTS))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("last.bias"), r"missing \['last.bias'\]"),
        (lambda s: s.update(more=torch.zeros(1)), r"unexpected \['more'\]"),
        (
            lambda s: s.update({"first.weight": torch.zeros(4, 5)}),
            r"first.weight: \[4, 5\] instead of \[5, 4\]",
        ),
        (lambda s: s.update(step=3), "not a mapping of names to tensors"),
        (lambda s: s.update({3: torch.zeros(1)}), "not a mapping of names to tensors"),
        (lambda s: s.clear(), "missing"),
    ],
    ids=["missing", "unexpected", "misshapen", "number", "number as key", "empty"],
)
def test_checkpoints_that_do_not_fit(change: Any, text: str) -> None:
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = dict(Small().state_dict())
    change(state)
    with pytest.raises(FormatError, match=text):
        files.load_checkpoint(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"params": x}, lambda x: {"a": torch.zeros(1), "b": x}]
)
def test_a_checkpoint_never_runs_code(wrap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Malicious()), "c.pth")
    with pytest.raises(FormatError, match="can be read safely"):
        files.load_checkpoint(Small(), "c.pth")
    Path("d.pth").write_bytes(pickle.dumps(wrap(Malicious())))
    with pytest.raises(FormatError):
        files.load_checkpoint(Small(), "d.pth")
    assert not Path("owned").exists()


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    torch.save(Small().state_dict(), tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    for damaged in (b"", content[:100], content[:-30], content[: len(content) // 2]):
        (tmp_path / "d.pth").write_bytes(damaged)
        with pytest.raises(FormatError):
            files.load_checkpoint(Small(), tmp_path / "d.pth")
    with pytest.raises(FormatError):
        files.load_checkpoint(Small(), tmp_path)


def test_packed_buffers_are_what_the_file_holds() -> None:
    again = loaded(small_file(), Small())
    weight = runtime_of(again).weights["middle:weight"]
    assert isinstance(weight, PackedTensor)
    assert torch.equal(weight.codes, read(small_file())[0]["codes"])
