"""Builds the light model of an official Q-MambaIR checkout (github.com/Areache/Q-MambaIR, tried at 35eabfd).

Nothing of it is copied or changed. Its last commit imports modules that were deleted; nothing of them is used on the
way to this model, so empty ones stand in while it is imported. It needs einops.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from pathlib import Path

from torch import nn

import ssmquant
from ssmquant import zoo
from ssmquant.errors import ConfigError

ARCH = "BL_L_U_mambair_arch"


class DropPath(nn.Identity):
    """Stochastic depth of rate 0."""


def architecture_file(root: Path) -> Path:
    """Where a checkout has the model.

    Raises:
        ConfigError: ``root`` is none.
    """
    path = root / "basicsr" / "archs" / f"{ARCH}.py"
    if not path.is_file():
        raise ConfigError(f"{root} is no checkout of Q-MambaIR: there is no basicsr/archs/{ARCH}.py")
    return path


def _module(path: Path | None = None, **content: object) -> types.ModuleType:
    """A package with ``content``, or of the files in the folder ``path``, whose ``__init__`` is not run."""
    module = types.ModuleType("stand_in")
    module.__path__ = [str(path)] if path else []
    vars(module).update(content)
    return module


@functools.cache
def _architecture(root: Path) -> types.ModuleType:
    archs = architecture_file(root).parent
    modules = {
        "basicsr": _module(archs.parent),
        "basicsr.archs": _module(archs),
        "basicsr.utils": _module(archs.parent / "utils"),
        # Three helpers of timm, which would bring torchvision with it.
        "timm": _module(),
        "timm.models": _module(),
        "timm.models.layers": _module(
            DropPath=DropPath, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_
        ),
        "scipy": _module(),
        "scipy.linalg": _module(hadamard=None),
        "analysis": _module(),
        "analysis.plt": _module(plot_tensor_histogram=None, plot_tensor_3d=None, plot_tensor_HW=None),
    }
    if not (archs / "QuantSR_operator.py").exists():
        modules["basicsr.archs.QuantSR_operator"] = _module(Hadamard=None)
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        with ssmquant.standins():  # of mamba_ssm, where it is missing
            return importlib.import_module(f"basicsr.archs.{ARCH}")
    finally:
        for name in [n for n in sys.modules if n in modules or n.startswith("basicsr.")]:
            del sys.modules[name]
        sys.modules.update(before)


def official(root: Path, start: nn.Module, bits: int) -> nn.Module:
    """The official model of ``bits`` with the arguments and the weights of ``start``, a zoo MambaIR of the light kind.

    Raises:
        ConfigError: no checkout, another model, or weights that do not fit.
    """
    config = zoo.describe(start)
    if config["name"] != "MambaIR" or config["args"]["upsampler"] != "pixelshuffledirect":
        raise ConfigError("the official code is for MambaIR of the light kind")
    cls = _architecture(root).QuantBL_L_MambaIR
    known = inspect.signature(cls).parameters
    model: nn.Module = cls(**{k: v for k, v in config["args"].items() if k in known}, k_bits=bits)
    mismatch = model.load_state_dict(start.state_dict(), strict=False)
    if mismatch.unexpected_keys:
        raise ConfigError(f"the official model has no {', '.join(mismatch.unexpected_keys[:3])}")
    return model
