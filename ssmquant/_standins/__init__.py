"""Stand-ins for packages of CUDA kernels that model code imports: ``mamba_ssm``, ``causal_conv1d`` and their kin.

With them, MambaIR, VMamba, Vim and many others run unmodified where those packages cannot be installed, on a CPU too.
All values come from ``ssmquant.ops``. What is served: ``surface``; how Python gets at it: ``importing``, ``triton`` and
``devices``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch

from ssmquant._standins.devices import cpu_device_context, cuda_means_cpu
from ssmquant._standins.importing import Mender, Server, found
from ssmquant._standins.surface import MODULES
from ssmquant._standins.triton import fake_triton, is_missing

__all__ = ["install_standins", "remove_standins", "standins", "standins_report"]


class _Standins:
    """What is in force in this process, and for whom: ``install_standins()``, and so many ``with standins():``."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holders: list[bool] = []  # whether each wants CUDA to mean CPU
        self.installed: bool | None = None
        self.server = Server()
        self.mender = Mender(self.server)
        self.packages: contextlib.ExitStack | None = None
        self.devices: contextlib.ExitStack | None = None

    def update(self) -> None:
        """Switches things on and off, as the holders want."""
        wishes = [*self.holders, *([] if self.installed is None else [self.installed])]
        if wishes and self.packages is None:
            self.packages = self._packages()
        if not wishes and self.packages is not None:
            self.packages.close()
            self.packages = None
        if any(wishes) and self.devices is None and not torch.cuda.is_available():
            self.devices = contextlib.ExitStack()
            self.devices.enter_context(cuda_means_cpu())
        if not any(wishes) and self.devices is not None:
            self.devices.close()
            self.devices = None

    def _packages(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        self.mender.probe()
        sys.meta_path.insert(0, self.mender)
        sys.meta_path.append(self.server)
        stack.callback(self._withdraw)
        stack.enter_context(cpu_device_context())
        if is_missing():
            stack.enter_context(fake_triton())
        return stack

    def _withdraw(self) -> None:
        for finder in (self.mender, self.server):
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
        self.server.forget()
        self.mender.broken.clear()


_STANDINS = _Standins()


@contextlib.contextmanager
def standins(*, cuda_to_cpu: bool = False) -> Iterator[None]:
    """Inside, ``mamba_ssm``, ``causal_conv1d``, ``selective_scan_cuda`` and their kin can be imported without them.

        with ssmquant.standins():
            from mambair_arch import MambaIR  # imports mamba_ssm

    Only what is missing is served: an installed package stays what is imported, and gets the modules that it lacks
    (say, mamba_ssm built without its CUDA kernels) or that do not load. Values come from ``ssmquant.ops``: exact up to
    rounding, differentiable, on any device. Two more things hold inside: ``torch.cuda.device(x.device)`` of a tensor on
    the CPU does nothing; where Triton is missing, modules that define kernels can be imported (launching one raises).

    Afterwards all of this is undone, and the modules are gone from ``sys.modules``. Models that were built inside keep
    working, and can be copied and pickled: what they have got hold of lives in ssmquant. Code that imports a stand-in
    *later*, or whose forward enters ``torch.cuda.device`` (VMamba), needs ``install_standins()`` instead, for good.
    Functions of an installed mamba_ssm over Triton kernels have a path for CPU tensors from then on, which they lack.

    Contexts nest, also with ``install_standins()``; they are of the process, not of a thread.

    Args:
        cuda_to_cpu: where there is no CUDA device, ``x.cuda()`` and ``x.to("cuda")`` stay on the CPU, for constructors
            that move tensors.
    """
    with _STANDINS.lock:
        _STANDINS.holders.append(cuda_to_cpu)
        try:
            _STANDINS.update()
        except BaseException:
            _STANDINS.holders.remove(cuda_to_cpu)
            raise
    try:
        yield
    finally:
        with _STANDINS.lock:
            _STANDINS.holders.remove(cuda_to_cpu)
            _STANDINS.update()


def install_standins(*, cuda_to_cpu: bool = False) -> None:
    """As :func:`standins`, for good or until ``remove_standins()``. Calling it again changes ``cuda_to_cpu`` only."""
    with _STANDINS.lock:
        _STANDINS.installed = cuda_to_cpu
        _STANDINS.update()


def remove_standins() -> None:
    """Undoes ``install_standins()``; a ``with standins():`` that is still open keeps them."""
    with _STANDINS.lock:
        _STANDINS.installed = None
        _STANDINS.update()


def standins_report() -> list[tuple[str, str, str]]:
    """Rows of (package, "installed", "stand-in" or "missing", why), for every package that can be served."""
    rows = []
    active = _STANDINS.packages is not None
    for name in [*(n for n in MODULES if "." not in n), "triton"]:
        broken = _STANDINS.mender.broken.get(name)
        spec = None if broken or (name == "triton" and is_missing()) else found(name)
        if spec is not None:
            rows.append((name, "installed", spec.origin or "a namespace package"))
        elif active:
            why = "missing; kernels can be defined, not launched" if name == "triton" else "missing"
            rows.append((name, "stand-in", broken or why))
        else:
            rows.append((name, "missing", "ssmquant.standins() can serve it"))
    return rows
