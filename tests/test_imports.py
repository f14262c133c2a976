"""Imports that the import-linter contract in `pyproject.toml` cannot check."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moma"
PACKAGES = ("data", "model")
# Modules of a distribution with another name, and what a user chooses by a key of a recipe.
DISTRIBUTIONS = {"PIL": "pillow", "pydantic-core": "pydantic"}
OPTIONAL = {"wandb"}


def uses_distributed(source):
    """Whether a module imports or names `torch.distributed`, also inside of functions."""
    tree = ast.parse(source)
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return any(f"{name}.".startswith("torch.distributed.") for name in names)


def test_data_and_model_do_not_use_process_groups():
    files = [path for package in PACKAGES for path in (PACKAGE / package).rglob("*.py")]
    assert len(files) > len(PACKAGES)
    assert not [path for path in files if uses_distributed(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
        "import torch\ntorch.distributed.barrier()",
        "def f():\n    from torch.distributed import barrier",
    ],
)
def test_process_groups_are_found(source):
    assert uses_distributed(source)
    assert not uses_distributed("import torch\ntorch.distribution")


def test_no_folder_of_tests_shadows_a_library():
    """A script may have `tests` on its path, to import the helpers of one folder."""
    tests = Path(__file__).parent
    found = PathFinder.find_spec("tokenizers", [str(tests), *sys.path])
    assert found is not None and found.origin and not Path(found.origin).is_relative_to(tests)


def imported_packages(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_imported_packages_are_dependencies():
    """They may be installed here because of another package only."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = [each for group in (project["dependencies"], *extras) for each in group]
    declared = {re.split(r"[^\w-]", each)[0].lower() for each in required}
    files = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    names = {name.split(".")[0] for tree in files for name in imported_packages(tree)}
    others = {name.replace("_", "-") for name in names - {"moma", *sys.stdlib_module_names}}
    assert {DISTRIBUTIONS.get(name, name) for name in others} - OPTIONAL <= declared


def test_the_package_is_imported_without_heavy_libraries():
    code = "import sys, moma; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    found = {name.split(".")[0] for name in done.stdout.split()}
    assert "moma" in found
    assert not found & {"torch", "numpy", "transformers", "datasets", "pydantic", "PIL"}
