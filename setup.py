"""The list of packages, which pyproject.toml cannot say, and wheels with compiled kernels.

Packages are all of ssmquant/, adapters/ as ssmquant.adapters, and the quantized models of examples/weights/ as data in
ssmquant.weights. Wheels are pure Python, unless the environment variable SSMQUANT_BUILD names what to compile into
ssmquant/lib, "cpu", "cuda" or "cpu,cuda" (torch has to be there):

    SSMQUANT_BUILD=cpu,cuda pip wheel --no-build-isolation --no-deps .

What is compiled depends on the platform, and on no version of Python or torch.
"""

import importlib
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

# Modules with build(folder).
BUILDERS = {"cpu": "ssmquant.ops.native", "cuda": "ssmquant.ops.selective_scan.cuda_build"}
WANTED = [name for name in os.environ.get("SSMQUANT_BUILD", "").replace(" ", "").split(",") if name]


def compile_into(folder):
    unknown = [name for name in WANTED if name not in BUILDERS]
    if unknown:
        raise SetupError(
            f"SSMQUANT_BUILD={','.join(WANTED)}: {unknown[0]!r} is none of {', '.join(BUILDERS)}"
        )
    sys.path.insert(0, str(Path(__file__).parent))
    for name in WANTED:
        try:
            module = importlib.import_module(BUILDERS[name])
        except ImportError as error:
            raise SetupError(
                f"SSMQUANT_BUILD={name}: {error}. Install torch first, and build with --no-build-isolation"
            ) from error
        module.build(folder)


class BuildPy(build_py):
    def run(self):
        super().run()
        if WANTED and not self.editable_mode:  # from a checkout, kernels are compiled at first use
            folder = Path(self.build_lib, "ssmquant", "lib")
            folder.mkdir(parents=True, exist_ok=True)
            compile_into(folder)


class WithLibraries(Distribution):
    def has_ext_modules(self):
        return bool(WANTED)


class Wheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if WANTED else tag


setup(
    packages=[*find_packages(include=["ssmquant", "ssmquant.*"]), "ssmquant.adapters", "ssmquant.weights"],
    package_dir={"ssmquant.adapters": "adapters", "ssmquant.weights": "examples/weights"},
    distclass=WithLibraries,
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
)
