"""Sharded initialization: no rank holds a full model; all weights are those of one process."""

import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moma.data.encode.prepare import prepare
from moma.errors import UserError
from moma.model.transformer import Transformer
from moma.model.upcycling import upcycle
from moma.plan.memory import held_bytes, meta_model
from moma.runs import Run, Tokenizers
from moma.runtime import writer as writing
from moma.runtime.checkpoint import load_model, save_weights, training_tensors
from moma.runtime.optimizer import make_optimizers
from moma.runtime.peak import allocated_peak
from moma.runtime.sharding import EngineConfig
from moma.runtime.weights import Weights
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import provide_training_data
from moma.train.stages import find_source_run, prepare_model
from moma.vocabulary import Vocabulary
from tests.distributed.jobs import HYBRID, ONE_PROCESS, recipe_of
from tests.processes import on_ranks

NEW = ("dense", "mod_moe_4t4i", "tied", "uneven", "hybrid", "compiled")
CASES = (*NEW, "upcycle", "upcycle from dense", "pretrain", "aux_router")


def case_of(tiny: Recipe, name: str, seeds: Path) -> Recipe:
    groups = {"dense": "dense", "uneven": "mod_moe_3t1i"}.get(name, "mod_moe_4t4i")
    recipe = recipe_of(tiny, groups, HYBRID if name == "hybrid" else EngineConfig())
    changes: dict[str, Any] = {"model": {"tied_embeddings": name == "tied"}}
    if name == "compiled":
        changes["pretrain"] = {"compile": True}
    values = {key: getattr(recipe, key).model_copy(update=new) for key, new in changes.items()}
    recipe = recipe.model_copy(update=values)
    if name in NEW:
        return recipe
    run = {"upcycle": "mod_moe_1t1i", "upcycle from dense": "dense"}.get(name, "mod_moe_4t4i")
    stage = "upcycle" if name.startswith("upcycle") else name
    return recipe.model_copy(update={"stage": stage, "from_": seeds / run, "seed": 5})


def vocabulary_of(recipe: Recipe) -> Vocabulary:
    return Vocabulary.load(recipe.data.path / "vocabulary.json")


def start(recipe: Recipe, world: World) -> Transformer:
    return prepare_model(recipe, vocabulary_of(recipe), world, find_source_run(recipe, world))


def full_start(recipe: Recipe) -> Transformer:
    """The full model on one device."""
    vocabulary = vocabulary_of(recipe)
    model = recipe.build_model(vocabulary)
    source = find_source_run(recipe, ONE_PROCESS)
    if source is not None and recipe.stage != "upcycle":
        load_model(source.checkpoint, model, ONE_PROCESS)
    elif source is not None:
        seed = Transformer(source.recipe.model, vocabulary, source.recipe.shares)
        load_model(source.checkpoint, seed, ONE_PROCESS)
        upcycle(Weights.from_tensors(seed.state_dict()), source.recipe.model, model)
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    names = [name for name, _ in expected.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    for name in names:
        own = model.get_parameter(name)
        value = own.full_tensor() if hasattr(own, "full_tensor") else own
        assert torch.equal(value, expected.get_parameter(name)), name
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def job_of_two(world: World, tiny: Recipe, seeds: Path) -> None:
    for name in CASES:
        recipe = case_of(tiny, name, seeds)
        model = start(recipe, world)
        assert_same(model, full_start(recipe))
        tied = model.get_submodule("head").weight is model.get_submodule("embedding").weight
        assert tied == (name == "tied")
    for groups in ("moe_4t4i", "mod_moe_1t1i"):
        assert_starts_small(deep(tiny, groups), world)
    grown = deep(tiny, "moe_4t4i", stage="upcycle", from_=seeds / "deep")
    # A layer of the seed run: attention and two experts.
    assert_starts_small(grown, world, spare=4 * (4 * 64**2 + 6 * 64 * 192))


def deep(tiny: Recipe, groups: str, **changes) -> Recipe:
    """A recipe of many small parameters."""
    model = {"groups": groups, "dim": 64, "layers": 8, "heads": 2, "hidden": 192}
    recipe = recipe_of(tiny, groups, EngineConfig())
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model), **changes})


def assert_starts_small(recipe: Recipe, world: World, spare: int = 0) -> None:
    model = meta_model(recipe)
    own = held_bytes(model, world.size, recipe.pretrain.optimizer)[world.rank]["parameters"]
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    peak = allocated_peak(lambda: start(recipe, world), world.device)
    most = own + largest + spare + (64 << 10)  # small objects, such as file headers
    assert own < peak < most < 0.75 * whole, (own, peak, most, whole)


def written_by_four(world: World, tiny: Recipe, out: Path) -> None:
    """Two replicas on two ranks each, after an attempt on a full disk."""
    recipe = recipe_of(tiny, "moe_2t2i", HYBRID)
    model = prepare_model(recipe, vocabulary_of(recipe), world)
    (optimizer,) = make_optimizers(model, recipe.pretrain.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    usage = shutil.disk_usage(out)._replace(free=0)
    with closing(CheckpointWriter(out, world)) as writer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing.shutil, "disk_usage", lambda path: usage)
            with pytest.raises(UserError, match="needs") as caught:
                writer.save(1, training_tensors(model, optimizer), {"step": 1}, {})
        writer.save(1, training_tensors(model, optimizer), {"step": 1}, {})
        writer.wait()
    if world.rank == 0:
        (out / "message.txt").write_text(str(caught.value))


@pytest.fixture(scope="module")
def seeds(tiny, tmp_path_factory) -> Path:
    """Finished source runs."""
    folder = tmp_path_factory.mktemp("seeds")
    for groups in ("dense", "mod_moe_1t1i", "mod_moe_4t4i"):
        recipe = recipe_of(tiny, groups, EngineConfig())
        stage = recipe.pretrain.model_copy(update={"steps": 2, "checkpoint_every": 2})
        train(
            recipe.model_copy(update={"run": folder / groups, "pretrain": stage}), ONE_PROCESS, True
        )
    recipe, run = deep(tiny, "moe_1t1i", pretrain=stage), Run(folder / "deep")
    run.path.mkdir()
    run.create(recipe, Tokenizers(recipe.data.path))
    vocabulary = vocabulary_of(recipe)
    weights = Weights.from_tensors(recipe.build_model(vocabulary).state_dict())
    state = {"step": 2, "vocabulary": vocabulary.fingerprint}
    # One file per tensor: a memory-mapped file counts as memory.
    save_weights(run.checkpoints, 2, weights, state, file_bytes=1)
    return folder


def test_required_disk_space_is_that_of_one_replica(tiny, tmp_path):
    on_ranks(4, written_by_four, tiny, tmp_path)
    (needed,) = re.findall(r"needs ([\d,]+) bytes", (tmp_path / "message.txt").read_text())
    tensors = 0
    for file in (tmp_path / "step-00000001" / "tensors").iterdir():
        tensors += sum(value.nbytes for value in load_file(file).values())
    above = int(needed.replace(",", "")) - (1 << 20) - tensors
    # Each rank counts the optimizer's step counters, four bytes per parameter.
    assert 0 <= above < 4 * 4 * 100


def test_two_ranks_start_with_the_weights_of_one_process(tiny, seeds):
    on_ranks(2, job_of_two, tiny, seeds)


def provide_on_rank(world: World, recipe: Recipe, folder: Path) -> None:
    data = {"path": folder / f"{world.rank}", "remote": f"file://{folder}/at-{world.rank}"}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    provide_training_data(Run(folder / "run"), recipe, world)


def test_machines_train_on_the_same_shards_also_if_others_are_published(tiny, tmp_path):
    """As if they were published after rank 0 has fetched its own."""
    own = {"path": tmp_path / "own", "remote": f"file://{tmp_path}/at-0"}
    data = tiny.data.model_copy(update={**own, "tokenizers": tiny.data.path})
    prepare(tiny.model_copy(update={"data": data}), ONE_PROCESS.device, quiet=True)
    shutil.copytree(tmp_path / "at-0", tmp_path / "at-1")
    changed = data.model_copy(update={"remote": f"file://{tmp_path}/at-1", "path": tmp_path / "b"})
    changed = changed.model_copy(update={"held_out": 0.5})
    prepare(tiny.model_copy(update={"data": changed}), ONE_PROCESS.device, quiet=True)
    on_ranks(2, provide_on_rank, tiny, tmp_path)
    first, second = (tmp_path / f"{rank}/shards/text/shard.json" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_one_process_starts_with_the_full_model(tiny, seeds, name):
    if name != "hybrid":
        recipe = case_of(tiny, name, seeds)
        assert_same(start(recipe, ONE_PROCESS), full_start(recipe))
