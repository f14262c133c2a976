"""The training loop of every stage: batches in, steps, log rows and checkpoints out; resumable."""

import json
import math
import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moma.data.batches import Batches, prepared_ahead
from moma.errors import UserError
from moma.model.flops import router_stage_flops_per_token, training_flops_per_token
from moma.model.transformer import Transformer
from moma.progress import Report, show_progress
from moma.recipe import write_recipe
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import checkpoints_in, load_checkpoint, read_state, save_checkpoint
from moma.runtime.optimizer import learning_rate, make_optimizer
from moma.runtime.sharding import shard
from moma.runtime.world import World, can_compile
from moma.train.recipe import Recipe
from moma.train.restore import is_finished, load_weights, newest_checkpoint, read_run_recipe
from moma.train.step import Objective, Step, next_token_objective, router_objective
from moma.vocabulary import IMAGE, TEXT, Vocabulary


def train(recipe: Recipe, world: World, quiet: bool = False) -> Run:
    """Run the stage that the recipe names, or go on where it was interrupted.

    Returns:
        The run folder, finished.

    Raises:
        UserError: the run folder belongs to another recipe, or something the recipe needs is
            missing.
    """
    run = Run(recipe.run)
    data = Tokenizers(recipe.data.path)
    vocabulary = Vocabulary.load(data.vocabulary)
    _check_source(recipe)
    model = _prepare_model(recipe, vocabulary, world)
    trainer = Trainer(recipe, run, model, vocabulary, world)
    # Last: a recipe that cannot be trained leaves no run behind.
    if world.rank == 0:
        _claim(run, recipe, data)
    world.barrier()
    trainer.resume()
    title, steps = f"{recipe.stage} {recipe.run.name}", recipe.stage_config.steps
    with (
        closing(trainer.batches),
        show_progress(title, steps, quiet or world.rank > 0) as report,
    ):
        trainer.run_to_end(report)
    return run


class Trainer:
    """State of a run while it trains: model, optimizer, data position, counters, log."""

    def __init__(
        self, recipe: Recipe, run: Run, model: Transformer, vocabulary: Vocabulary, world: World
    ):
        self.recipe, self.config, self.run = recipe, recipe.stage_config, run
        self.model, self.world = model, world
        self.optimizer = make_optimizer(model, self.config.optimizer)
        self.step = Step(
            model,
            self.optimizer,
            _objective(recipe, world.device),
            self.config.optimizer.clip,
            world,
        )
        batches = Batches(
            recipe.data, vocabulary, seed=recipe.seed, rank=world.rank, world_size=world.size
        )
        self.batches = prepared_ahead(batches, recipe.data)
        self.fingerprint = vocabulary.fingerprint
        self.done = 0
        data = recipe.data
        self.tokens_per_step = data.rows * data.row_length * self.config.micro_batches * world.size
        routers = recipe.stage == "aux_router"
        count = router_stage_flops_per_token if routers else training_flops_per_token
        self.flops_per_token = count(
            recipe.model, vocabulary.size, recipe.shares, data.rows, data.row_length
        )

    def resume(self) -> None:
        """Restore the newest checkpoint, if there is one, and drop log rows that came after it."""
        torch.manual_seed(self.recipe.seed + self.world.rank)  # dropout's; a checkpoint has its own
        found = checkpoints_in(self.run.checkpoints)
        if found:
            state, rank_state = load_checkpoint(found[-1], self.model, self.optimizer, self.world)
            if rank_state is None:
                raise UserError(
                    f"{found[-1]}: was written by {state['world_size']} ranks; "
                    f"go on with as many, not {self.world.size}"
                )
            if state["vocabulary"] != self.fingerprint:
                raise UserError(f"{found[-1]}: was trained with another vocabulary than the data's")
            self.done = state["step"]
            self.batches.set_state(rank_state["data"])
        if self.world.rank == 0:
            rows = self.run.read_metrics() if self.run.metrics.is_file() else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.done]
            partial = self.run.metrics.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(self.run.metrics)

    def run_to_end(self, report: Report) -> None:
        """Train to the last step, logging and saving on the way."""
        modalities = len(self.model.vocabulary.modalities)
        sums, since = torch.zeros(3, modalities, device=self.world.device), time.monotonic()
        report(self.done)
        while self.done < self.config.steps:
            rate = learning_rate(self.config.optimizer, self.done, self.config.steps)
            batches = [next(self.batches) for _ in range(self.config.micro_batches)]
            step_sums, norm = self.step(batches, rate)
            sums += step_sums
            self.done += 1
            last = self.done == self.config.steps
            if self.done % self.config.log_every == 0 or last:
                row = self._row(sums, norm, rate, time.monotonic() - since)
                sums, since = torch.zeros_like(sums), time.monotonic()
                self._log(row)
                report(
                    self.done, f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
                )
            if self.done % self.config.checkpoint_every == 0 or last:
                self._save()
                since = time.monotonic()

    def _row(self, sums: Tensor, norm: Tensor, rate: float, seconds: float) -> dict[str, Any]:
        """A row of the log: means since the last row; reading the sums waits for the device."""
        self.step.require_sound(f"{self.run.path}: until step {self.done}, ")
        loss_M, correct_M, targets_M = sums.double().cpu()
        total = targets_M.sum()
        since = (self.done - 1) % self.config.log_every + 1
        tokens = self.done * self.tokens_per_step
        gradient_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        row = {
            "step": self.done,
            "tokens": tokens,
            "flops": tokens * self.flops_per_token,
            "loss": float(loss_M.sum() / total),
            "loss_text": float(loss_M[TEXT] / targets_M[TEXT]) if targets_M[TEXT] else None,
            "loss_image": float(loss_M[IMAGE] / targets_M[IMAGE]) if targets_M[IMAGE] else None,
            "accuracy": float(correct_M.sum() / total),
            "learning_rate": rate,
            "gradient_norm": gradient_norm,
            "tokens_per_second": since * self.tokens_per_step / seconds,
        }
        if not (torch.isfinite(loss_M).all() and math.isfinite(gradient_norm)):
            raise UserError(
                f"{self.run.path}: the loss or its gradient is not finite at step {self.done}; "
                "lower the learning rate or look at the data of the last steps"
            )
        return row

    def _log(self, row: dict[str, Any]) -> None:
        if self.world.rank == 0:
            with self.run.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _save(self) -> None:
        state = {"step": self.done, "vocabulary": self.fingerprint}
        save_checkpoint(
            self.run.checkpoints,
            self.done,
            self.model,
            self.optimizer,
            state,
            {"data": self.batches.get_state()},
            self.world,
            self.config.keep_checkpoints,
        )


def _objective(recipe: Recipe, device: torch.device) -> Objective:
    if recipe.stage == "aux_router":
        return router_objective
    compiled = recipe.pretrain.compile and can_compile(device)
    return next_token_objective(recipe.pretrain.z_loss, compiled)


def _prepare_model(recipe: Recipe, vocabulary: Vocabulary, world: World) -> Transformer:
    """Build, load, freeze what the stage does not train, compile, shard: in this order."""
    model = recipe.build_model(vocabulary).to(world.device)
    routers = {p for router in model.auxiliary_routers() for p in router.parameters()}
    trains_routers = recipe.stage == "aux_router"
    if recipe.from_ is not None:
        state = read_state(newest_checkpoint(Run(recipe.from_)))
        if state["vocabulary"] != vocabulary.fingerprint:
            raise UserError(f"{recipe.from_}: was trained with another vocabulary than the data's")
        load_weights(Run(recipe.from_), model)
    for parameter in model.parameters():
        parameter.requires_grad_((parameter in routers) == trains_routers)
    if trains_routers:
        model.eval()
    if recipe.stage_config.compile and can_compile(world.device):
        for unit in model.units():
            unit.compile(fullgraph=True)
    shard(model, model.units(), world)
    return model


def refuse_other_recipe(run: Run, recipe: Recipe) -> None:
    """Raise a `UserError` if the folder already holds a run of another recipe."""
    before = read_run_recipe(run) if run.recipe.is_file() else recipe
    if before != recipe:
        raise UserError(
            f"{run.path}: holds a run of another recipe ({_differences(before, recipe)}); "
            "choose another folder with run=…, or delete this one"
        )


def _claim(run: Run, recipe: Recipe, data: Tokenizers) -> None:
    """Make the run folder, or check that it was made by this recipe."""
    if run.recipe.is_file():
        refuse_other_recipe(run, recipe)
        return
    if run.path.resolve() == data.path.resolve():
        raise UserError(f"{run.path}: holds the prepared data; choose another folder with run=…")
    run.path.mkdir(parents=True, exist_ok=True)
    data.copy_to(run.tokenizers)
    partial = run.recipe.with_suffix(".partial")
    write_recipe(recipe, partial)
    partial.rename(run.recipe)


def _check_source(recipe: Recipe) -> None:
    """Refuse to train routers where there is nothing to choose, or on another architecture."""
    if recipe.from_ is None:
        return
    before = read_run_recipe(Run(recipe.from_))
    if before.model != recipe.model:
        raise UserError(
            f"{recipe.from_}: was trained with another [model] "
            f"({_differences(before.model, recipe.model)}); use its recipe"
        )
    if recipe.stage == "aux_router" and not recipe.model.has_routers:
        raise UserError(f"{recipe.from_}: '{recipe.model.groups}' has no routers to train")
    if recipe.stage == "aux_router" and not is_finished(Run(recipe.from_)):
        newest_checkpoint(Run(recipe.from_))  # says so if there is none
        raise UserError(f"{recipe.from_}: is not trained to its end; go on with `moma train` first")


def _differences(before: Any, after: Any) -> str:
    """Top-level keys whose values differ, for a message."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return ", ".join(f"'{key}' differs" for key in old if old[key] != new[key])
