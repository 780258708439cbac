"""Stand-ins: what is served and what never is, beside what is installed, and that nothing is left behind."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssmquant._standins import install_standins, remove_standins, standins, standins_report
from ssmquant._standins import modules as ours
from ssmquant._standins.surface import MODULES
from ssmquant.errors import InputError
from tests.standins.conftest import PACKAGES


def test_every_module_is_served_and_gone_afterwards() -> None:
    with standins():
        for name, contents in MODULES.items():
            module = importlib.import_module(name)
            assert importlib.util.find_spec(name) is not None
            for key in contents:
                assert getattr(module, key) is contents[key]
    for name in PACKAGES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_submodules_are_attributes_without_an_import_of_their_own() -> None:
    with standins():
        mamba_ssm = importlib.import_module("mamba_ssm")
        assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is mamba_ssm.selective_scan_fn


def test_unknown_names_are_import_errors() -> None:
    with standins():
        with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
            exec("from mamba_ssm import nonsense")
        with pytest.raises(AttributeError, match=r"stand-in of ssmquant, which has no 'nonsense'"):
            _ = importlib.import_module("mamba_ssm").nonsense
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.modules.mamba3")


def test_contexts_nest_and_an_installation_outlives_them() -> None:
    with standins():
        module = importlib.import_module("causal_conv1d")
        with standins():
            install_standins()
            install_standins()
    assert importlib.import_module("causal_conv1d") is module
    with standins():
        remove_standins()
        assert importlib.import_module("causal_conv1d") is module
    remove_standins()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d")


def test_an_exception_inside_undoes_everything() -> None:
    with pytest.raises(KeyError), standins(cuda_to_cpu=True):
        raise KeyError  # the fixture looks


def test_threads() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with standins():
                    importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with standins():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_an_installed_package_is_never_shadowed(installed: Any) -> None:
    installed("mamba_ssm", "Mamba = 'the real one'", package=True)
    installed("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn = 'real'")
    with standins():
        mamba_ssm = importlib.import_module("mamba_ssm")
        assert mamba_ssm.Mamba == "the real one"
        assert importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn == "real"
        missing = importlib.import_module("mamba_ssm.modules.mamba2")  # but gets what it lacks
        assert missing.Mamba2 is ours.Mamba2
        assert ("mamba_ssm", "installed") in [row[:2] for row in standins_report()]
    assert sys.modules["mamba_ssm"] is mamba_ssm
    assert "mamba_ssm.modules" not in sys.modules
    assert not hasattr(mamba_ssm, "modules")


def test_an_installed_package_gets_the_extension_that_it_lacks(installed: Any) -> None:
    installed(
        "causal_conv1d", "import causal_conv1d_cuda\nfwd = causal_conv1d_cuda.causal_conv1d_fwd", package=True
    )
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d")
    with standins():
        assert (
            importlib.import_module("causal_conv1d").fwd is MODULES["causal_conv1d_cuda"]["causal_conv1d_fwd"]
        )


def test_an_extension_that_does_not_load_is_served(installed: Any) -> None:
    installed("selective_scan_cuda", "raise ImportError('undefined symbol: _ZN3c10')")
    with standins():
        assert importlib.import_module("selective_scan_cuda").fwd is MODULES["selective_scan_cuda"]["fwd"]
        assert ("selective_scan_cuda", "stand-in", "undefined symbol: _ZN3c10") in standins_report()
    with pytest.raises(ImportError, match="undefined symbol"):
        importlib.import_module("selective_scan_cuda")


def test_a_module_that_was_renamed_is_the_installed_one(installed: Any) -> None:
    installed("mamba_ssm.ops.triton.layer_norm", "RMSNorm = 'real'\ndef rms_norm_fn(x): return 'real'")
    with standins():
        module = importlib.import_module("mamba_ssm.ops.triton.layernorm")
        assert module.RMSNorm == "real"


@pytest.mark.parametrize(
    "where", ["mamba_ssm.ops.triton", "vendored_models.mamba2", "vendored_fork.mamba_ssm.ops.triton"]
)
@pytest.mark.parametrize("early", [False, True])
def test_functions_over_triton_kernels_get_a_path_for_the_cpu(
    installed: Any, where: str, early: bool
) -> None:
    name = f"{where}.layernorm"
    code = "def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, eps=1e-6): raise RuntimeError('0 drivers')"
    installed(name, code)
    if early:
        importlib.import_module(name)
    with standins():
        function = importlib.import_module(name).rms_norm_fn
    x, weight = torch.randn(2, 3, 8), torch.rand(8)
    out, total = function(x, weight, None, x, True)  # outside: models keep working
    torch.testing.assert_close(out, F.rms_norm(2 * x, (8,), weight, 1e-6))
    torch.testing.assert_close(total, 2 * x)
    with pytest.raises(RuntimeError, match="0 drivers"):
        function(x.to("meta"), weight, None)


def test_language_models_that_need_an_old_transformers_do_not_stand_in_the_way(installed: Any) -> None:
    installed("mamba_ssm", "from mamba_ssm.utils.generation import GenerationMixin", package=True)
    installed("mamba_ssm.utils.generation", "import no_longer_there")
    with standins():
        mixin = importlib.import_module("mamba_ssm").GenerationMixin()
    with pytest.raises(InputError, match="text generation"):
        mixin.generate()


def test_report() -> None:
    rows = {name: (state, why) for name, state, why in standins_report()}
    assert rows["mamba_ssm"][0] == "missing"
    assert set(rows) == {*PACKAGES, "triton"}
    with standins():
        assert {state for name, state, _ in standins_report() if name != "triton"} == {"stand-in"}
