"""What is saved comes back: models of the zoo and others, all settings; saving is all or nothing."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ssmquant
import ssmquant.io as files
from ssmquant import ConfigError, FormatError, QConfig, zoo
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor
from tests.model_files import (
    POINTS,
    Small,
    assert_same_content,
    loaded,
    meta_of,
    operands_of,
    read,
    small_file,
    with_meta,
    written,
)
from tests.small import Scanner, X, images, light, prepared_and_calibrated, scanner, tiny_mambair

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


def test_in_inference_mode(tmp_path: Path) -> None:
    """Tensors made there count no writes to them, which tracing and kept forms of weights look at."""
    x = images(2, 3, 6, 8)
    files_of = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    with torch.inference_mode():
        for path in files_of:  # the model's buffer is assigned to in forward
            prepared = prepared_and_calibrated(tiny_mambair().eval(), QConfig.qmambair(2), x)
            deployed = ssmquant.convert(prepared)
            ssmquant.save(deployed, path)
    other = deployed(x)
    assert not other.requires_grad
    model = ssmquant.load(files_of[0])
    with torch.inference_mode():
        again = ssmquant.load(files_of[0])
        first = again(x.clone())
        assert torch.equal(first, model(x))
        assert not torch.equal(first, other)
        assert torch.equal(model(x[:1, :, :5]), again(x[:1, :, :5]))
        again.load_state_dict(deployed.state_dict())
        assert torch.equal(again(x), other)
    model.load_state_dict(deployed.state_dict())
    assert torch.equal(model(x), other)


class Made(nn.Module):
    """A layer behind what is made in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * torch.from_numpy(np.arange(8, dtype=np.float32))
        return y if x.shape[1] < 6 else y + 1


def test_a_call_in_inference_mode_does_not_keep_a_model_from_training() -> None:
    x = torch.randn(2, 4, 8)
    config = QConfig(w_bits=4, a_bits=4)
    prepared = prepared_and_calibrated(Made(), config, x)
    with torch.inference_mode():
        prepared.eval()(torch.randn(2, 7, 8))
        inside = prepared_and_calibrated(Made(), config, x)
    for model in (prepared, inside):
        model.train()(torch.randn(2, 7, 8)).sum().backward()
        assert model.layer.weight.grad is not None


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


def test_packed_buffers_are_what_the_file_holds() -> None:
    again = loaded(small_file(), Small())
    weight = runtime_of(again).weights["middle:weight"]
    assert isinstance(weight, PackedTensor)
    assert torch.equal(weight.codes, read(small_file())[0]["codes"])


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
