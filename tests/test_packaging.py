"""What an installed copy promises: light imports, documented names, entry points, types, no path of a machine."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ssmquant
from tests.conftest import ROOT

OPTIONAL = {"mamba_ssm", "causal_conv1d", "timm", "torchvision"}
HEAVY = OPTIONAL | {"triton", "einops", "matplotlib", "rich", "PIL"}


def declared(table: str, key: str) -> str:
    """A string of pyproject.toml (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    body = re.search(rf"^\[{re.escape(table)}\]\n(.*?)(?=^\[|\Z)", text, re.M | re.S)
    assert body, f"pyproject.toml has no table [{table}]"
    value = re.search(rf'^{re.escape(key)} = "(.*)"$', body[1], re.M)
    assert value, f"pyproject.toml: [{table}] has no {key}"
    return value[1]


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("ssmquant")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("ssmquant is not installed here: pip install -e .")


def test_import_is_light() -> None:
    """Compared with what torch, numpy and safetensors load by themselves."""
    code = (
        "import sys, torch, numpy, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import ssmquant\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "ssmquant" in loaded
    assert not loaded & HEAVY, f"import ssmquant also imports {sorted(loaded & HEAVY)}"


def module_level_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of the imports that run with the module: those inside functions do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from module_level_imports(node)


def test_optional_packages_are_never_imported_with_a_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {package}"
        for folder in ("ssmquant", "adapters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, package in module_level_imports(ast.parse(path.read_text(encoding="utf-8")))
        if package in OPTIONAL
    ]
    assert not found, "import it inside the function that needs it:\n" + "\n".join(found)


def has_own_docstring(value: object) -> bool:
    """Own, not inherited; a dataclass without one gets its signature as ``__doc__``, which does not count."""
    doc = vars(value).get("__doc__") if isinstance(value, type) else inspect.getdoc(value)
    return bool(doc and doc.strip()) and not (
        isinstance(value, type) and doc.startswith(f"{value.__name__}(")
    )


def test_public_names_exist_and_are_documented() -> None:
    names = list(ssmquant.__all__)
    assert len(names) == len(set(names)), "a name stands twice in ssmquant.__all__"
    missing = [name for name in names if not hasattr(ssmquant, name)]
    assert not missing, f"in ssmquant.__all__, but not in ssmquant: {missing}"
    documented = {n: getattr(ssmquant, n) for n in names if not isinstance(getattr(ssmquant, n), str)}
    silent = sorted(name for name, value in documented.items() if not has_own_docstring(value))
    assert not silent, f"public names without a docstring of their own: {silent}"


def test_the_contract_is_public() -> None:
    """The names that the README uses."""
    contract = {
        "QConfig", "Rule", "SsmquantError", "calibrate", "convert", "load", "param_groups", "prepare", "save",
        "summary", "verify",
    }  # fmt: skip
    assert contract <= set(ssmquant.__all__), f"missing: {sorted(contract - set(ssmquant.__all__))}"


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(examples) == 2  # the workflow, and the rules
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    ssmquant.prepare(names["model"], names["config"])  # no rule matches in vain
    assert (tmp_path / "restorer.safetensors").stat().st_size > 0


def test_errors_are_ours() -> None:
    errors = [v for v in vars(ssmquant.errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(errors) > 1
    assert all(issubclass(error, ssmquant.SsmquantError) for error in errors)


def test_version_is_the_same_everywhere(distribution: importlib.metadata.Distribution) -> None:
    assert ssmquant.__version__ == declared("project", "version") == distribution.version


def test_typed() -> None:
    assert (Path(ssmquant.__file__).parent / "py.typed").is_file()


def test_every_folder_of_code_is_a_package() -> None:
    """setuptools leaves out a folder without __init__.py, which works from the checkout and not from a wheel."""
    folders = {path.parent for path in (ROOT / "ssmquant").rglob("*.py")}
    bare = [
        str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()
    ]
    assert not bare, f"add __init__.py to {bare}"


def test_entry_points_resolve(distribution: importlib.metadata.Distribution) -> None:
    ours = {point.name: point for point in distribution.entry_points if point.group == "ssmquant.adapters"}
    files = {path.stem for path in (ROOT / "adapters").glob("*.py") if path.stem != "__init__"}
    assert set(ours) == files, 'adapters/*.py and [project.entry-points."ssmquant.adapters"] disagree'
    for name, point in ours.items():
        assert point.load().__name__ == f"ssmquant.adapters.{name}"


def test_console_script_resolves(distribution: importlib.metadata.Distribution) -> None:
    (script,) = [point for point in distribution.entry_points if point.group == "console_scripts"]
    assert script.name == "ssmquant"
    assert callable(script.load())


def repository_files() -> list[Path]:
    """What is or would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Spelled in pieces, so that this file does not match itself.
FORBIDDEN = {
    "an absolute path of a machine": r"(?<![\w./~-])/(?:ro" r"ot|ho" r"me|wo" r"rk|Us" r"ers)/",
    "a package index": r"--(?:extra-)?index" r"-url|--find" r"-links|py" r"pi\.org|python" r"hosted\.org",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_trace_of_a_machine(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture or weights
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    assert not found, f"{what} in:\n" + "\n".join(found)
