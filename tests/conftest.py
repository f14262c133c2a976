"""Session fixtures: a prepared folder and trained runs; the order of modules."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

# Set before libraries read them: test processes share the cores, and ask no server for anything.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Without an NVIDIA driver, Triton's kernels are interpreted. Set before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/proc/driver/nvidia").exists() else "1")

import pytest

# Only what is light: the process that distributes the tests also imports this file.
pytest.register_assert_rewrite("tests.command_line", "tests.factories")
from moma.progress import show_log_messages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Generator

    from xdist.scheduler import LoadScopeScheduling

    from moma.runs import Run
    from moma.train.recipe import Recipe

show_log_messages()
# No test survives a power failure, so none waits for the disk.
os.fsync = lambda fd: None
# Modules that take long, from long to short. They start first, so that no process waits at the end.
LONG = (
    "tests/distributed/test_two_ranks.py",
    "tests/model/test_compile.py",
    "tests/demo/test_run.py",
    "tests/distributed/test_compiled_steps.py",
    "tests/distributed/test_start.py",
    "tests/tokenizers/image/test_train.py",
    "tests/train/test_kills.py",
    "tests/data/remote/test_training.py",
    "tests/generate/test_decode.py",
    "tests/data/encode/test_prepare.py",
    "tests/train/test_loop.py",
    "tests/study/test_grid.py",
    "tests/cli/test_bad_input.py",
    "tests/model/test_caches.py",
    "tests/tokenizers/image/test_train_keys.py",
    "tests/data/batches/test_full_count.py",
    "tests/data/sources/test_registry.py",
    "tests/data/encode/test_shares.py",
    "tests/plan/test_memory.py",
    "tests/distributed/test_faults.py",
    "tests/distributed/test_codec.py",
    "tests/data/batches/test_mixing.py",
    "tests/serve/test_chat.py",
    "tests/model/test_gradients.py",
    "tests/train/test_validation.py",
    "tests/test_launch.py",
    "tests/test_gpu_check.py",
    "tests/data/encode/test_prepare_kills.py",
    "tests/data/encode/test_prepare_files.py",
    "tests/model/test_implementations.py",
    "tests/model/test_flops.py",
    "tests/train/test_stages.py",
    "tests/cli/test_root.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What the modules import is never garbage: searching it would take a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {module: rank for rank, module in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(LONG)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadScopeScheduling:
    """A process runs whole modules: it makes the fixtures of each once."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    return LoadScopeScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def _freeze_what_a_module_leaves() -> Generator[None]:
    """Later collections of garbage need not search it: they took a third of the time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _register_storage_in_memory() -> None:
    """Recipes of tests, which are one process, may keep data at `ram://…`."""
    from fsspec import register_implementation

    register_implementation("ram", "tests.storage_in_memory.StorageInMemory")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of figures are empty: to draw one takes as long as to train a toy model."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny recipe, its data prepared once for the whole session."""
    import torch

    from moma.data.encode.prepare import prepare
    from tests.factories import tiny_recipe, write_sources

    folder = tmp_path_factory.mktemp("tiny")
    write_sources(folder / "sources")
    recipe = tiny_recipe(folder / "sources", folder / "data")
    prepare(recipe, torch.device("cpu"), quiet=True)
    return recipe


@pytest.fixture(scope="session")
def tiny_run(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the tiny recipe; do not modify it, but a copy."""
    import torch

    from moma.runtime.world import World
    from moma.train.loop import train

    folder = tmp_path_factory.mktemp("tiny_run") / "run"
    return train(tiny.model_copy(update={"run": folder}), World(torch.device("cpu")), quiet=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data, a run and its routers; do not modify it."""
    from tests import command_line

    return command_line.train(tmp_path_factory.mktemp("trained"))
