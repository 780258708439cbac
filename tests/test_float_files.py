"""Files of float models, and checkpoints: plain, wrapped, damaged and malicious."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import ssmquant
import ssmquant.io as files
from ssmquant import ConfigError, FormatError, QConfig, zoo
from tests.model_files import POINTS, ZOO_NUMBERS, Small
from tests.small import images, prepared_and_calibrated, tiny_mambair

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


# ---- checkpoints ---------------------------------------------------------------------------------------------------


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
