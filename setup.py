"""The list of packages, which pyproject.toml cannot say: all of ssmquant/, and adapters/ as ssmquant.adapters."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ssmquant", "ssmquant.*"]), "ssmquant.adapters"],
    package_dir={"ssmquant.adapters": "adapters"},
)
