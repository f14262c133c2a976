"""Processes that encode parts: the same bytes as one process, whatever dies."""

import gc
import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from multiprocessing import forkserver

import pytest
import torch

import tests.processes  # noqa: F401  (what the processes import)
from moma.data.cleaning.passes import provide_cleaning
from moma.data.encode import executors
from moma.data.encode.executors import InProcess, LocalPool
from moma.data.encode.prepare import make_job
from moma.data.encode.worker import Task
from moma.data.provenance import DataFolder
from moma.errors import UserError
from moma.vocabulary import Vocabulary
from tests.data.encode.preparing import contents, make_recipe, run

CPU = torch.device("cpu")
# 15 captioned images; the text is one part.
PART_BYTES = 15 * 2**17


@pytest.fixture(scope="module", autouse=True)
def processes_start_as_those_of_other_tests():
    forkserver.ensure_running()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A recipe of several parts, and its data as one process prepares it."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = make_recipe(folder, 60, part_bytes=PART_BYTES, shard_tokens=150)
    run(recipe, processes=1)
    return recipe


def unfinished(recipe, folder):
    """The same tokenizers in another folder, and the tasks of a job that encodes all parts."""
    shutil.copytree(recipe.data.path, folder)
    shutil.rmtree(folder / "shards")
    data = recipe.data.model_copy(update={"path": folder})
    cleaning = provide_cleaning(data.sources, folder / "cleaning", PART_BYTES)
    job = make_job(DataFolder(data), cleaning, Vocabulary.load(folder / "vocabulary.json"))
    shards = {name: encoding.begin() for name, encoding in job.sources.items()}
    tasks = [
        Task(name, number, part)
        for name, partial in shards.items()
        for number, part in enumerate(partial.plan)
    ]
    return job, shards, tasks


def finish(job, shards, encoded):
    for task, records in encoded.items():
        job.sources[task.source].add(shards[task.source], task.number, records)
    for name, partial in shards.items():
        job.sources[name].finish(partial)


def assert_same_shards(folder, expected):
    assert contents(folder / "shards") == contents(expected / "shards")


def run_all(executor, tasks, on_report=lambda encoded: None):
    encoded = {}

    def report(message):
        on_report(message)
        if message.records is not None:
            assert message.task not in encoded
            encoded[message.task] = message.records

    executor.run(tasks, report)
    assert encoded.keys() == set(tasks)
    return encoded


def test_parts_in_any_order_have_the_same_bytes(prepared, tmp_path):
    job, shards, tasks = unfinished(prepared, tmp_path / "data")
    assert [task.source for task in tasks] == ["captions"] * 4 + ["text"]
    finish(job, shards, run_all(InProcess(job, CPU, 1), tasks[::-1]))
    assert_same_shards(tmp_path / "data", prepared.data.path)


@pytest.mark.parametrize("shares_codec", [False, True])
def test_a_process_that_dies_is_replaced(prepared, tmp_path, shares_codec):
    job, shards, tasks = unfinished(prepared, tmp_path / "data")
    killed: list[multiprocessing.process.BaseProcess] = []

    def kill(message):
        if not killed and message.so_far.rejected and message.records is None:
            killed.extend(multiprocessing.active_children())
            for process in killed:
                process.kill()

    pool = LocalPool(job, 2, [CPU], shares_codec)
    finish(job, shards, run_all(pool, tasks, kill))
    assert killed and not multiprocessing.active_children()
    assert_same_shards(tmp_path / "data", prepared.data.path)


@pytest.mark.slow
def test_a_part_whose_process_always_dies_is_given_up(prepared, tmp_path):
    job, _, tasks = unfinished(prepared, tmp_path / "data")

    def kill(message):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(UserError, match=r"part \d: .* died 3 times.*fewer --processes"):
        run_all(LocalPool(job, 2, [CPU], False), tasks, kill)
    assert executors.ATTEMPTS == 3 and not multiprocessing.active_children()


def test_what_a_codec_imports_is_imported_before_processes_are_forked(
    prepared, tmp_path, monkeypatch
):
    job, _, _ = unfinished(prepared, tmp_path / "data")
    preloaded: list[set[str]] = []
    context = type(multiprocessing.get_context("forkserver"))
    note = lambda self, names: preloaded.append({*names})  # noqa: E731
    monkeypatch.setattr(context, "set_forkserver_preload", note)
    job.load_codec(CPU)
    for shares_codec in (False, True):
        LocalPool(job, 2, [CPU], shares_codec)
    own, shared = preloaded
    assert (
        own - shared
        == {"moma.tokenizers.image.vae", "vector_quantize_pytorch"}
        < sys.modules.keys()
    )


def test_an_error_in_a_process_stops_all(prepared, tmp_path):
    job, _, tasks = unfinished(prepared, tmp_path / "data")
    broken = tasks[1]._replace(
        part=tasks[1].part.model_copy(update={"file": "other", "names": "of others"})
    )
    with pytest.raises(UserError, match="other: files of its source were added or removed"):
        run_all(LocalPool(job, 2, [CPU], False), [tasks[0], broken])
    assert not multiprocessing.active_children()


class Reports:
    """Stands in for how a source is encoded: an error reports what its process is like."""

    def __reduce__(self):
        return thawed, ()

    def encode_part(self, *arguments):
        variables = [os.environ.get(name) for name in ("CREDENTIALS", "HOME")]
        raise UserError(f"variables {variables}, frozen {gc.get_freeze_count() > 0}")


def thawed():
    """What another process receives: that which it was forked from may have frozen objects."""
    gc.unfreeze()
    return Reports()


def test_processes_have_the_variables_of_the_moment_they_start(prepared, tmp_path, monkeypatch):
    """Although what they are forked from is older."""
    job, _, tasks = unfinished(prepared, tmp_path / "data")
    job = replace(job, sources={"captions": Reports()})
    monkeypatch.setenv("CREDENTIALS", "new")
    monkeypatch.delenv("HOME")
    with pytest.raises(UserError, match=r"variables \['new', None\]"):
        run_all(LocalPool(job, 2, [CPU], False), tasks[:2])


@pytest.mark.parametrize("is_pool", [False, True])
def test_collections_skip_what_was_imported(prepared, tmp_path, is_pool):
    job, _, tasks = unfinished(prepared, tmp_path / "data")
    job = replace(job, sources={"captions": Reports()})
    gc.unfreeze()
    executor = LocalPool(job, 2, [CPU], False) if is_pool else InProcess(job, CPU, 1)
    try:
        with pytest.raises(UserError, match="frozen True"):
            run_all(executor, tasks[:2])
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()  # as `conftest.py` left it


def test_what_a_program_has_frozen_stays_frozen(prepared, tmp_path):
    job, _, tasks = unfinished(prepared, tmp_path / "data")
    gc.freeze()
    run_all(InProcess(job, CPU, 1), tasks[:2])
    assert gc.get_freeze_count() > 0
