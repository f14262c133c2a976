"""What a stage trains, from where, and by which objective."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moma.errors import UserError
from moma.model.decoder_layer import Layer
from moma.model.flops import router_stage_flops_per_token, training_flops_per_token
from moma.model.transformer import Transformer
from moma.runs import Run
from moma.runtime.allocator import keep_freed_memory
from moma.runtime.checkpoint import (
    holds_weights_alone,
    load_model,
    read_rank_states,
    read_state,
    stored_weights,
)
from moma.runtime.optimizer import make_optimizer
from moma.runtime.recompute import recompute
from moma.runtime.sharding import fill, shard
from moma.runtime.world import World, can_compile, raise_on_all_ranks
from moma.train.changes import differences
from moma.train.recipe import Recipe
from moma.train.restore import newest_checkpoint, read_run_recipe
from moma.train.step import Objective, Step, next_token_objective, router_objective
from moma.train.watch import LossMonitor
from moma.vocabulary import Vocabulary


class Origin(NamedTuple):
    """Where a run begins.

    Attributes:
        tokens: seen by the run that it goes on from.
        flops: spent by that run.
        data: state of the data of each of that run's ranks; empty: from the beginning.
    """

    tokens: int = 0
    flops: float = 0.0
    data: tuple[dict[str, Any], ...] = ()


class Source(NamedTuple):
    """The run `from`.

    Attributes:
        recipe: its recipe.
        checkpoint: its newest whole checkpoint.
        state: what that holds for all ranks.
    """

    recipe: Recipe
    checkpoint: Path
    state: dict[str, Any]


def find_source(recipe: Recipe, world: World) -> Source | None:
    """The run that the recipe's run begins from, if it has one; all ranks together.

    Raises:
        UserError: it does not suit the stage: it has another architecture, is not finished, or has
            nothing to train.
    """
    if recipe.from_ is None:
        return None
    with raise_on_all_ranks(world):
        before = read_run_recipe(Run(recipe.from_))
        _refuse_other_model(recipe, before)
    checkpoint = newest_checkpoint(Run(recipe.from_), world)
    with raise_on_all_ranks(world):
        state = read_state(checkpoint)
        # What is newest may be damaged, and what is whole not the end.
        if recipe.stage != "pretrain" and state["step"] < before.stage_config.steps:
            raise UserError(
                f"{recipe.from_}: is not trained to its end ({checkpoint.name} is its newest whole "
                "checkpoint); go on with `moma train` first"
            )
    return Source(before, checkpoint, state)


def _refuse_other_model(recipe: Recipe, before: Recipe) -> None:
    if recipe.stage != "upcycle" and before.model != recipe.model:
        raise UserError(
            f"{recipe.from_}: was trained with another [model] "
            f"({'; '.join(differences(before.model, recipe.model).values())}); use its recipe"
        )
    if recipe.stage == "aux_router" and not recipe.model.has_routers:
        raise UserError(f"{recipe.from_}: '{recipe.model.groups}' has no routers to train")


def prepare_model(
    recipe: Recipe,
    vocabulary: Vocabulary,
    world: World,
    source: Source | None = None,
    resumes: bool = False,
) -> Transformer:
    """Outline, freeze what the stage does not train, compile, shard, and only then fill.

    So a rank holds its own shards, and besides one whole parameter, or a layer of a seed.

    Args:
        recipe: the recipe.
        vocabulary: the data's.
        world: the ranks.
        source: the run to begin from; left out, the weights are new ones.
        resumes: whether the weights are left to be loaded from a checkpoint.

    Raises:
        UserError: the source does not fit.
    """
    if source is not None and source.state["vocabulary"] != vocabulary.fingerprint:
        raise UserError(f"{recipe.from_}: was trained with another vocabulary than the data's")
    with torch.device("meta"):
        model = Transformer(recipe.model, vocabulary, recipe.shares)
    train_only(model, routers=recipe.stage == "aux_router")
    units = list(units_of(model))
    for layer in model.units():
        # Operations are remembered one by one: no sharding may happen among them.
        parts = _parts(layer) if recipe.engine.recompute == "selective" else [layer]
        for part in parts:
            recompute(part, recipe.engine.recompute)
    if recipe.stage_config.compile and can_compile(world.device):
        _compile(model, whole_layers=world.mesh is None or len(units) == len(model.layers))
    shard(model, units, world, recipe.engine)
    model.to_empty(device=world.device)
    if not resumes:
        _fill(recipe, model, source)
    return model


def train_only(model: Transformer, routers: bool) -> None:
    """Freeze all but the auxiliary routers, which then see the model as it is, or only these."""
    own = {p for router in model.auxiliary_routers() for p in router.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_((parameter in own) == routers)
    if routers:
        model.eval()


def origin(recipe: Recipe, source: Source | None) -> Origin:
    """Where the run of a recipe begins: a grown model goes on where its seed stopped (§2.5)."""
    if recipe.stage != "upcycle" or source is None or holds_weights_alone(source.checkpoint):
        return Origin()
    data = tuple(each["data"] for each in read_rank_states(source.checkpoint))
    return Origin(source.state["tokens"], source.state["flops"], data)


def objective_of(recipe: Recipe, device: torch.device) -> Objective:
    """What the stage minimises."""
    if recipe.stage == "aux_router":
        return router_objective
    compiled = recipe.stage_config.compile and can_compile(device)
    return next_token_objective(recipe.stage_config.z_loss, compiled)


def make_step(recipe: Recipe, model: Transformer, world: World, watch: LossMonitor) -> Step:
    """The step of the recipe's stage, with an optimizer of its own."""
    keep_freed_memory(world.device)
    settings = recipe.stage_config.optimizer
    return Step(
        model,
        make_optimizer(model, settings),
        objective_of(recipe, world.device),
        settings.clip,
        world,
        watch,
        recipe.engine.compute_dtype(world.device),
    )


def flops_per_token(recipe: Recipe, vocabulary: Vocabulary) -> float:
    """Operations that the stage spends on a token."""
    routers = recipe.stage == "aux_router"
    count = router_stage_flops_per_token if routers else training_flops_per_token
    data = recipe.data
    return count(
        recipe.model, vocabulary.size, recipe.shares, data.micro_batch_size, data.sequence_length
    )


def _fill(recipe: Recipe, model: Transformer, source: Source | None) -> None:
    """New weights, or those of the run `from`, grown if the stage says so."""
    if source is None or recipe.stage == "upcycle":
        model.initialise(recipe.seed, fill)
    if source is None:
        return
    if recipe.stage != "upcycle":
        alone = World(torch.device("cpu"))  # every rank reads its own shards, and tells by itself
        load_model(source.checkpoint, model, alone)
        return
    from moma.model.upcycling import upcycle_from

    upcycle_from(stored_weights(source.checkpoint), source.recipe.model, model, fill)


def units_of(model: Transformer) -> Iterator[nn.Module]:
    """What is sharded one by one: layers, and before each its groups of experts if these run apart.

    Then the next group's weights are gathered while one computes (§3).
    """
    for layer in model.units():
        assert isinstance(layer, Layer)
        yield from layer.experts.units()
        yield layer


def _compile(model: Transformer, whole_layers: bool) -> None:
    """Compile layers, or their parts where sharding gathers weights inside of a layer."""
    for layer in model.units():
        for part in [layer] if whole_layers else _parts(layer):
            part.compile(fullgraph=True)


def _parts(layer: nn.Module) -> list[nn.Module]:
    """Attention and experts, group by group if they run so: nearly all that a layer computes."""
    assert isinstance(layer, Layer)
    return [layer.attention, *(layer.experts.units() or [layer.experts])]
