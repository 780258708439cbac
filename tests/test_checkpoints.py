"""``load_checkpoint`` on what training code in the wild writes; plain and damaged files are in test_float_files."""

from __future__ import annotations

import argparse
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, files
from ssmquant.errors import FormatError


class Renames(nn.Module):
    """Knows an older name of a child, and takes its weight in another shape, as models do that have a history."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).relu())

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [k for k in state if k.startswith(f"{prefix}middle.")]:
            shape = (-1, 5) if key.endswith("weight") else (-1,)
            state[key.replace("middle.", "second.")] = state.pop(key).reshape(shape)
        super()._load_from_state_dict(state, prefix, *args)


def renames(seed: int = 0) -> Renames:
    torch.manual_seed(seed)
    return Renames()


def old(model: nn.Module) -> dict[str, Tensor]:
    state = {k.replace("second.", "middle."): v for k, v in model.state_dict().items()}
    state["middle.weight"] = state["middle.weight"][:, :, None, None]
    return state


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items() if k in theirs)


def prepared(model: nn.Module) -> nn.Module:
    return ssmquant.prepare(model, QConfig(w_bits=4, a_bits=4), example_inputs=(torch.rand(2, 4),))


@pytest.mark.parametrize("target", [lambda m: m, prepared], ids=["float", "prepared"])
@pytest.mark.parametrize("stored", ["mapping", "c.pth", "c.safetensors"])
def test_the_models_own_renames_are_honoured(target: Any, stored: str, tmp_path: Path) -> None:
    source, model = renames(0), target(renames(1))
    state: Any = old(source)
    if stored == "c.pth":
        torch.save({"net": state}, tmp_path / stored)
    elif stored == "c.safetensors":
        save_file(state, tmp_path / stored)
    assert files.load_checkpoint(model, state if stored == "mapping" else tmp_path / stored) is model
    assert same(source, model)
    assert set(old(source)) == set(state)  # not changed


@pytest.mark.parametrize("target", [lambda m: m, prepared], ids=["float", "prepared"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("middle.weight"), r"missing \['second.weight'\]$"),
        (lambda s: s.update(more=torch.zeros(1)), r"unexpected \['more'\]$"),
        (
            lambda s: s.update({"middle.weight": torch.zeros(2, 5)}),
            r"second.weight: \[2, 5\] instead of \[5, 5\]$",
        ),
        (lambda s: s.update({"middle.weight": torch.zeros(3)}), r"RuntimeError: shape"),
        (
            lambda s: [s.pop("first.weight"), s.update({"last.bias": torch.zeros(9), "x.y": torch.zeros(1)})],
            r"last.bias: \[9\] instead of \[3\]; missing \['first.weight'\]; unexpected \['x.y'\]$",
        ),
        (
            lambda s: s.update({f"k{i}": torch.zeros(1) for i in range(9)}),
            r"unexpected \['k0', 'k1', 'k2'\] and 6 more$",
        ),
        (lambda s: s.update(step=3), "not a mapping of names to tensors"),
        (lambda s: s.update({3: torch.zeros(1)}), "not a mapping of names to tensors"),
        (lambda s: s.clear(), "missing"),
    ],
    ids=[
        "missing",
        "unexpected",
        "misshapen",
        "the rename fails",
        "all",
        "many",
        "number",
        "number as key",
        "empty",
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(target: Any, change: Any, message: str) -> None:
    model = target(renames(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = old(renames(0))
    change(state)
    with pytest.raises(FormatError, match=message):
        files.load_checkpoint(model, state)
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())
    assert not model._load_state_dict_post_hooks


def test_a_half_loaded_prepared_checkpoint_is_taken_back() -> None:
    model, source = prepared(renames(1)), prepared(renames(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = source.state_dict()
    state["last.bias"] = torch.zeros(9)
    with pytest.raises(FormatError, match=r"last\.bias"):
        files.load_checkpoint(model, state)
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())


def test_strict_is_a_choice() -> None:
    source, model = renames(0), renames(1)
    state = {k: v for k, v in source.state_dict().items() if k != "last.bias"} | {"more": torch.zeros(1)}
    bias = model.last.bias.clone()
    files.load_checkpoint(model, state, strict=False)
    assert torch.equal(model.last.bias, bias)
    assert torch.equal(model.first.weight, source.first.weight)
    with pytest.raises(FormatError, match=r"first\.weight"):
        files.load_checkpoint(model, {**state, "first.weight": torch.zeros(1)}, strict=False)


# ---- entries and wrappers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", files.ENTRIES)
def test_entries_come_in_the_documented_order(entry: str) -> None:
    at = files.ENTRIES.index(entry)
    source = renames(0)
    content: dict[str, Any] = {e: renames(9).state_dict() for e in files.ENTRIES[at + 1 :]}
    content |= {entry: source.state_dict(), "epoch": 3, "optimizer": {"state": {}}}
    assert same(source, files.load_checkpoint(renames(1), content))
    assert files.load_checkpoint.__doc__
    assert f"``{entry}``" in files.load_checkpoint.__doc__


def test_an_entry_by_name(tmp_path: Path) -> None:
    source = renames(0)
    content = {"params": renames(9).state_dict(), "teacher": source.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "c.pth")
    assert same(source, files.load_checkpoint(renames(1), tmp_path / "c.pth", key="teacher"))
    for key in ("student", "epoch"):
        with pytest.raises(FormatError, match=f"no entry '{key}' that holds weights; it has params, teacher"):
            files.load_checkpoint(renames(1), content, key=key)
    with pytest.raises(FormatError, match="no entry 'params' that holds weights; it is a plain state dict"):
        files.load_checkpoint(renames(1), source.state_dict(), key="params")
    with pytest.raises(FormatError, match=r"not a mapping of names to tensors; it has the entries \['epoch'"):
        files.load_checkpoint(renames(1), {"epoch": 3, "teacher": source.state_dict()})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module."])
@pytest.mark.parametrize("rename", [old, lambda m: m.state_dict()], ids=["old names", "names"])
def test_wrappers_are_taken_off(prefix: str, rename: Any) -> None:
    source = renames(0)
    state = {prefix + k: v for k, v in rename(source).items()}
    assert same(source, files.load_checkpoint(renames(1), {"state_dict": state}))
    assert same(source, files.load_checkpoint(prepared(renames(1)), state))


def test_a_prefix_of_some_names_is_no_wrapper() -> None:
    state = dict(renames(0).state_dict())
    state["module.first.weight"] = state.pop("first.weight")
    with pytest.raises(
        FormatError, match=r"missing \['first.weight'\]; unexpected \['module.first.weight'\]"
    ):
        files.load_checkpoint(renames(1), state)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_child_may_be_called_module(wrapped: bool) -> None:
    class Holder(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.module = renames(seed)

    source, target = Holder(0), Holder(1)
    state = {("module." * wrapped) + k: v for k, v in source.state_dict().items()}
    assert same(source, files.load_checkpoint(target, state))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_settings_beside_the_weights_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VMamba's training code keeps a yacs node in its checkpoints, Vim's an argparse namespace."""

    class CfgNode(dict):  # type: ignore[type-arg]
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    config = CfgNode(MODEL=CfgNode(DEPTHS=[2, 2]), SEED=0)
    config.__dict__["__immutable__"] = True
    source = renames(0)
    args = argparse.Namespace(lr=1e-3, model="vim")
    torch.save({"model": source.state_dict(), "config": config, "args": args}, tmp_path / "c.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    allowed = set(torch.serialization.get_safe_globals())
    assert same(source, files.load_checkpoint(renames(1), tmp_path / "c.pth"))
    assert set(torch.serialization.get_safe_globals()) == allowed


class Evil(argparse.Namespace):
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    "content",
    [
        lambda s: {"model": s, "args": Evil()},
        lambda s: {"model": s, "args": argparse.Namespace(inner=Evil())},
        lambda s: {"model": {**s, "more": Evil()}},
        lambda s: Evil(),
    ],
)
def test_no_code_of_a_checkpoint_runs(content: Any, tmp_path: Path) -> None:
    torch.save(content(renames(0).state_dict()), tmp_path / "c.pth")
    model = renames(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FormatError, match="can be read safely"):
        files.load_checkpoint(model, tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(pickle.dumps(content(renames(0).state_dict())))
    with pytest.raises(FormatError):
        files.load_checkpoint(model, tmp_path / "d.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_ema": s, "args": argparse.Namespace(a=1)}])
def test_cut_files(wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(renames(0).state_dict()), tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    model = renames(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for length in (0, 1, 4, 64, len(whole) // 3, len(whole) - 22, len(whole) - 1):
        (tmp_path / "d.pth").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"d\.pth is not a checkpoint that can be read safely"):
            files.load_checkpoint(model, tmp_path / "d.pth")
    with pytest.raises(FormatError):
        files.load_checkpoint(model, tmp_path)  # a folder
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
