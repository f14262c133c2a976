"""The floors of the house: a module imports only from its own floor or from below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moma"
FLOORS = (
    {"errors", "files", "hashes", "vocabulary", "recipe", "runs", "progress"},
    {"runtime"},
    {"tokenizers", "data", "model"},
    {"train", "generate"},
    {"evaluate", "hub"},
    {"study"},
    {"cli", "cli_arguments", "cli_bench", "cli_hub", "cli_plan", "cli_tokenizer", "web"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source, module):
    """Full names of what a module imports, also inside of functions: `a.b` and `a.b.name`."""
    package = module if module.endswith("__init__") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.removesuffix(".__init__").split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def room_of(module):
    """The room of a module of the package; empty for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "moma" and len(parts) > 1 else ""


def violations(source, module):
    own = FLOOR_OF[room_of(module)]
    rooms = {room_of(name) for name in imported(source, module)}
    return sorted(room for room in rooms if FLOOR_OF.get(room, 0) > own)


def uses_distributed(source, module):
    names = {name for name in imported(source, module) if name.startswith("torch.distributed")}
    attributes = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    }
    return sorted(names | attributes)


def test_every_file_has_a_room():
    rooms = {room_of(module_of(path)) for path in FILES} - {"__init__"}
    assert rooms <= FLOOR_OF.keys(), "a new room needs a floor here and in the design"
    assert {"cli", "data", "model", "train", "vocabulary"} <= rooms


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent != PACKAGE or p.stem != "__init__"], ids=module_of
)
def test_imports_lead_downward(path):
    assert violations(path.read_text(encoding="utf-8"), module_of(path)) == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(module_of(p)) in ("data", "model")], ids=module_of
)
def test_data_and_model_know_no_process_groups(path):
    assert uses_distributed(path.read_text(encoding="utf-8"), module_of(path)) == []


def test_the_package_itself_imports_its_rooms_only_when_asked():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    eager = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    source = "\n".join(map(ast.unparse, eager))
    assert not [name for name in imported(source, "moma.__init__") if room_of(name)]


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("moma.model.layers", "from moma.train.loop import train", ["train"]),
        ("moma.model.layers", "from moma import train", ["train"]),
        ("moma.model.layers", "import moma.study.page as page", ["study"]),
        ("moma.model.layers", "def f():\n    from ..cli import app", ["cli"]),
        ("moma.model.__init__", "from ..web import page", ["web"]),
        ("moma.runs", "from .runtime import world", ["runtime"]),
        ("moma.model.layers", "from .routing import Routing\nimport moma.data.batches", []),
        ("moma.cli", "import moma\nfrom moma.study import page\nimport torch", []),
    ],
)
def test_imports_that_lead_upward_are_found(module, source, expected):
    assert violations(source, module) == expected


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_process_groups_are_found(source):
    assert uses_distributed(source, "moma.model.layers")
    assert not uses_distributed("import torch\nfrom torch import nn", "moma.model.layers")
