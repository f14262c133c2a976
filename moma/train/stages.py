"""Construction of a stage: what it trains, where it starts, and its loss function."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moma.errors import UserError, error_reason, shell_command
from moma.model.dispatch import dispatch_for
from moma.model.float8_experts import use_float8_experts
from moma.model.flops import ModelCounts
from moma.model.routing import ROUTINGS, ExpertChoice, Threshold, uniform_routing
from moma.model.transformer import Transformer
from moma.runs import Run
from moma.runtime.allocator import keep_freed_memory
from moma.runtime.checkpoint import (
    is_weights_only,
    load_model,
    matching_weights,
    read_rank_states,
    read_state,
)
from moma.runtime.float8 import use_float8
from moma.runtime.optimizer import make_optimizers
from moma.runtime.recompute import recompute
from moma.runtime.sharding import fill, local_rows, shard
from moma.runtime.world import World, can_compile, raise_on_all_ranks
from moma.train.changes import differences
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe
from moma.train.restore import newest_checkpoint, read_run_recipe, require_vocabulary
from moma.train.step import LossFunction, Step, next_token_loss, router_loss
from moma.vocabulary import Vocabulary

_MAX_COMPILED_VARIANTS = 64


class InitialState(NamedTuple):
    """Tokens, FLOPs and data state of each rank of the source run; by default those of none."""

    tokens: int = 0
    flops: float = 0.0
    data: tuple[dict[str, Any], ...] = ()


class SourceRun(NamedTuple):
    """The run `from`, with its newest intact checkpoint and that checkpoint's shared state."""

    recipe: Recipe
    checkpoint: Path
    state: dict[str, Any]


def find_source_run(recipe: Recipe, world: World) -> SourceRun | None:
    """Find and check the run `from`, if the recipe names one; all ranks together.

    Raises:
        UserError: it has another architecture, is not finished, or has nothing to train.
    """
    if recipe.from_ is None:
        return None
    with raise_on_all_ranks(world):
        source = read_run_recipe(Run(recipe.from_))
        _check_source(recipe, source)
    checkpoint = newest_checkpoint(Run(recipe.from_), world)
    with raise_on_all_ranks(world):
        state = read_state(checkpoint)
        # The last checkpoint may be damaged, and the newest intact one not the last.
        if recipe.stage != "pretrain" and state["step"] < source.stage_config.steps:
            command = shell_command("train", Run(recipe.from_).recipe)
            raise UserError(
                f"{recipe.from_}: is not trained to its end ({checkpoint.name} is its newest "
                f"intact checkpoint); go on with `{command}` first"
            )
    return SourceRun(source, checkpoint, state)


def prepare_model(
    recipe: Recipe,
    vocabulary: Vocabulary,
    world: World,
    source: SourceRun | None = None,
    resumes: bool = False,
) -> Transformer:
    """Build a model on the meta device, freeze, compile and shard it, and initialize its weights.

    Weights are initialized last, so that a rank holds its own shards and, besides these, at most
    one full parameter or one layer of a seed.

    Args:
        vocabulary: the vocabulary of the data, which has to be that of the source run.
        source: the run to take weights from; None: random weights.
        resumes: leave the weights uninitialized, to be loaded from a checkpoint.

    Raises:
        UserError: the source run has another vocabulary, or the model does not fit into memory.
    """
    if source is not None:
        require_vocabulary(source.checkpoint, vocabulary, recipe.data.path)
    with torch.device("meta"):
        kernel = recipe.attention_kernel(world.device, trains=True)
        dispatch = dispatch_for(world.device)
        model = Transformer(recipe.training_model, vocabulary, recipe.shares, kernel, dispatch)
    use_float8(model, recipe.engine, world.device)
    use_float8_experts(model, recipe.engine.float8, world.device)
    model.has_auxiliary = recipe.trains_auxiliary_routers
    if recipe.stage == "aux_router":
        model.causal_routing = ROUTINGS["auxiliary"]
    freeze_for_stage(model, recipe.trains_auxiliary_routers, recipe.stage != "aux_router")
    units = list(fsdp_units(model))
    # Selective checkpointing records operations, among which there must be none of FSDP's.
    for part in _parts(model, whole_layers=recipe.engine.recompute != "selective"):
        recompute(part, recipe.engine.recompute)
    if recipe.stage_config.compile and can_compile(world.device):
        # FSDP may gather weights inside a layer, which cannot be compiled.
        _compile(model, whole_layers=world.mesh is None or len(units) == len(model.layers))
    exact: list[nn.Module] = [*model.routers(), *model.token_routers()]
    if recipe.trains_auxiliary_routers:
        exact += model.auxiliary_routers()
    shard(model, units, world, recipe.engine, exact)
    try:
        model.to_empty(device=world.device)
    except RuntimeError as error:  # of the allocator of any device
        if not _is_lack_of_memory(error):
            raise
        count = sum(parameter.numel() for parameter in model.parameters())
        shards = "the shards of each rank of " if world.size > 1 else ""
        raise UserError(
            f"model: {shards}{count:,} parameters do not fit into the memory of {world.device} "
            f"({error_reason(error)}); make it smaller, or use more GPUs; `moma plan` estimates "
            "what a recipe needs"
        ) from error
    if not resumes:
        _initialize(recipe, model, source)
    return model


def _is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether an error is of the allocator of a device; some have no type for it."""
    reasons = "out of memory", "allocate memory", "not enough memory"
    return isinstance(error, torch.OutOfMemoryError) or any(r in str(error) for r in reasons)


def freeze_for_stage(model: Transformer, trains_routers: bool, trains_model: bool = True) -> None:
    """Freeze the auxiliary routers, or all other parameters, if they are not trained.

    A frozen model is in evaluation mode: without dropout and router noise.

    Args:
        trains_routers: whether the auxiliary routers are trained.
        trains_model: whether all other parameters are.
    """
    auxiliary = {p for router in model.auxiliary_routers() for p in router.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(trains_routers if parameter in auxiliary else trains_model)
    if not trains_model:
        model.eval()


def initial_state(recipe: Recipe, source: SourceRun | None) -> InitialState:
    """Counters and data position: an upcycled run continues those of its seed run (§2.5)."""
    if recipe.stage != "upcycle" or source is None or is_weights_only(source.checkpoint):
        return InitialState()
    data = tuple(state["data"] for state in read_rank_states(source.checkpoint))
    return InitialState(source.state["tokens"], source.state["flops"], data)


def loss_function_of(
    recipe: Recipe, device: torch.device, by_threshold: bool = False
) -> LossFunction:
    """What the steps of the stage minimize.

    Args:
        device: on which the loss is compiled, if the recipe says so and that is possible.
        by_threshold: for steps that route by thresholds; see `StageConfig.routes_by_threshold`.
    """
    if recipe.stage == "aux_router":
        return router_loss
    compiled = recipe.stage_config.compile and can_compile(device)
    policy = Threshold("static") if by_threshold else ExpertChoice()
    has_auxiliary = recipe.trains_auxiliary_routers
    routing = uniform_routing(policy, record_selection=True, record_auxiliary=has_auxiliary)
    return next_token_loss(recipe.stage_config.z_loss, compiled, routing)


def make_step(
    recipe: Recipe, model: Transformer, world: World, monitor: LossMonitor | None = None
) -> Step:
    """The optimizer step of the recipe's stage, with new optimizers."""
    keep_freed_memory(world.device)
    config, engine = recipe.stage_config.optimizer, recipe.engine
    return Step(
        model,
        make_optimizers(model, config, model.stacked_matrices()),
        loss_function_of(recipe, world.device),
        config.clip,
        world,
        monitor,
        engine.compute_dtype(world.device),
        engine.reduce_once,
        loss_function_of(recipe, world.device, by_threshold=True),
    )


def model_counts(recipe: Recipe, vocabulary_size: int) -> ModelCounts:
    """Counts of a recipe's model, for its micro-batches."""
    data = recipe.data
    return ModelCounts(
        recipe.model, vocabulary_size, recipe.shares, data.micro_batch_size, data.sequence_length
    )


def flops_per_token(recipe: Recipe, vocabulary: Vocabulary) -> float:
    """Training FLOPs per token in the recipe's stage."""
    counts = model_counts(recipe, vocabulary.size)
    if recipe.stage == "aux_router":
        return counts.router_stage_flops_per_token()
    auxiliary = counts.auxiliary_flops_per_token() if recipe.trains_auxiliary_routers else 0
    return counts.training_flops_per_token() + auxiliary


def fsdp_units(model: Transformer) -> Iterator[nn.Module]:
    """The modules to shard one by one: layers, and before each its sequential expert groups.

    The weights of the next group are then gathered while one group computes (§3.2).
    """
    for layer in model.units():
        yield from layer.experts.units()
        yield layer


def _check_source(recipe: Recipe, source: Recipe) -> None:
    if recipe.stage != "upcycle" and source.model != recipe.model:
        changes = "; ".join(differences(source.model, recipe.model).values())
        raise UserError(
            f"{recipe.from_}: was trained with another [model] ({changes}); use its recipe"
        )
    if recipe.stage == "aux_router" and not recipe.model.has_expert_choice:
        raise UserError(
            f"{recipe.from_}: '{recipe.model.groups}' has no auxiliary routers to train"
        )


def _initialize(recipe: Recipe, model: Transformer, source: SourceRun | None) -> None:
    """Random weights, or those of the run `from`, upcycled if that is the stage."""
    if source is None or recipe.stage == "upcycle":
        model.initialize(recipe.seed, local_rows)
    if source is None:
        return
    if recipe.stage != "upcycle":
        # Every rank reads its own shards, independently of the others.
        load_model(source.checkpoint, model, World(torch.device("cpu")))
        return
    from moma.model.upcycling import upcycle

    with torch.device("meta"):
        seed = Transformer(source.recipe.model, model.vocabulary, source.recipe.shares)
    upcycle(matching_weights(source.checkpoint, seed), source.recipe.model, model, fill)


def _compile(model: Transformer, whole_layers: bool) -> None:
    """Compile layers, or their groups of experts and what runs before and after these."""
    # For several architectures in one process, as in benchmarks; Dynamo's default is 8.
    torch._dynamo.config.recompile_limit = _MAX_COMPILED_VARIANTS
    # Groups differ in sizes and constants, which dynamic shapes cannot express.
    options = {"fullgraph": True, "dynamic": False}
    for layer in model.units():
        for module in [layer] if whole_layers else layer.experts.units() or [layer.experts]:
            module.compile(**options)
        if not whole_layers:
            layer.compile_around_experts(**options)


def _parts(model: Transformer, whole_layers: bool) -> Iterator[nn.Module]:
    """Layers, or their attention and experts, the latter by group if groups run sequentially."""
    for layer in model.units():
        inner = [layer.attention, *(layer.experts.units() or [layer.experts])]
        yield from [layer] if whole_layers else inner
