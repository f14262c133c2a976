"""The training loop of every stage: batches in; steps, log rows and checkpoints out; resumable."""

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch

from moma.data.batches.iterator import Batches, prefetch, reshard
from moma.errors import SharedError, StoppedError, StorageError
from moma.files import lock_folder
from moma.model.transformer import Transformer
from moma.progress import Report, show_progress
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import (
    holds_weights_alone,
    load_checkpoint,
    newest_whole,
    read_rank_states,
    read_state,
    restore_random_state,
    set_aside,
)
from moma.runtime.interrupt import Interruption, interruption
from moma.runtime.optimizer import learning_rate
from moma.runtime.trace import Trace
from moma.runtime.tracking import Row, Tracker, make_trackers
from moma.runtime.world import World, gather, raise_on_all_ranks, reporting_lost_ranks
from moma.runtime.writer import CheckpointWriter
from moma.train.changes import check_resumed_recipe
from moma.train.fault import Recent, raise_fault
from moma.train.metrics import HostCopy, Window
from moma.train.recipe import Recipe
from moma.train.stages import (
    Origin,
    find_source,
    flops_per_token,
    make_step,
    origin,
    prepare_model,
)
from moma.train.statistics import Statistics
from moma.train.watch import LossMonitor
from moma.vocabulary import Vocabulary

# Seconds after which a lost node's hold on a run folder should have ended.
_PATIENCE = 120.0


def train(recipe: Recipe, world: World, quiet: bool = False) -> Run:
    """Run the stage that the recipe names, or go on where it was interrupted.

    Returns:
        The run folder, finished.

    Raises:
        UserError: the run folder belongs to another recipe, something the recipe needs is missing,
            or the loss went wrong.
        StoppedError: a signal ended it; what was done is saved.
        LostRankError: another rank is gone.
    """
    run, data = Run(recipe.run), Tokenizers(recipe.data.path)
    with ExitStack() as stack:
        stack.enter_context(reporting_lost_ranks(world))
        asked = stack.enter_context(interruption(world))
        held = _hold(run, recipe, world, stack)
        newest, damaged = newest_whole(run.checkpoints, world)
        if newest is not None and _is_last(newest, recipe):
            check_resumed_recipe(run, recipe, data, world)
            return run
        # A run that has begun needs the one that it began from no more.
        source = find_source(recipe, world) if newest is None else None
        with raise_on_all_ranks(world):
            vocabulary = Vocabulary.load(data.vocabulary)
            model = prepare_model(recipe, vocabulary, world, source, newest is not None)
            begin = origin(recipe, source)
            trainer = stack.enter_context(closing(Trainer(recipe, run, model, vocabulary, world)))
            if newest is None:
                trainer.take_data(begin.data)
        # Last: a recipe that cannot be trained leaves no run behind.
        check_resumed_recipe(run, recipe, data, world)
        if not held:
            _hold(run, recipe, world, stack)
        if newest is None:
            trainer.begin(begin)
        else:
            trainer.resume(newest, damaged)
        title, steps = f"{recipe.stage} {recipe.run.name}", recipe.stage_config.steps
        asked.listen()
        report = stack.enter_context(show_progress(title, steps, quiet or world.rank > 0))
        trainer.run_to_end(report, asked)
    return run


def _hold(run: Run, recipe: Recipe, world: World, stack: ExitStack) -> bool:
    """Keep other processes out of the run folder, if it is there; the same on all ranks."""
    there = gather(run.path.is_dir(), world.writers)[0]
    if there:
        with raise_on_all_ranks(world):
            if world.rank == 0:
                patience = min(_PATIENCE, recipe.engine.timeout / 2)
                stack.enter_context(lock_folder(run.path, patience))
    return there


def _is_last(checkpoint: Path, recipe: Recipe) -> bool:
    """Whether a run that has this checkpoint is finished, by training."""
    finished = read_state(checkpoint)["step"] >= recipe.stage_config.steps
    return finished and not holds_weights_alone(checkpoint)


class Trainer:
    """State of a run while it trains: model, optimizer, data position, counters, log."""

    def __init__(
        self, recipe: Recipe, run: Run, model: Transformer, vocabulary: Vocabulary, world: World
    ):
        self.recipe, self.config, self.run = recipe, recipe.stage_config, run
        self.model, self.world = model, world
        self.fingerprint = vocabulary.fingerprint
        self.watch = LossMonitor(self.config, world.device)
        self.step = make_step(recipe, model, world, self.watch)
        self.optimizer = self.step.optimizer
        batches = Batches(
            recipe.data, vocabulary, seed=recipe.seed, rank=world.rank, world_size=world.size
        )
        self.batches = prefetch(batches, recipe.data)
        self.recent = Recent()
        self.done, self.tokens, self.origin = 0, 0, Origin()
        self.flops_per_token = flops_per_token(recipe, vocabulary)
        self.window = Window(recipe, model, self.flops_per_token, world)
        self.gradient_accumulation_steps = self.config.gradient_accumulation_steps
        self.writer = CheckpointWriter(
            run.checkpoints, world, self.config.keep_checkpoints, self.config.keep_every
        )
        self.trackers: list[Tracker] = []
        self.problem: StorageError | None = None  # with the log
        traced = recipe.engine.trace if world.rank == 0 else 0
        self.trace = Trace(run.path / "trace", traced)

    def begin(self, origin: Origin) -> None:
        """Begin with step 1, where the counters of another run stood, perhaps."""
        self.origin = origin
        self._open_log()
        # Dropout's and the noise's.
        torch.manual_seed(self.recipe.seed + self.world.rank)

    def resume(self, path: Path, damaged: Mapping[Path, str]) -> None:
        """Restore a checkpoint, and drop log rows beyond it.

        Args:
            path: the newest whole one.
            damaged: newer ones, each with what is wrong with it.
        """
        if self.world.rank == 0:
            for broken, message in damaged.items():
                print(f"{message}; goes on from {path.name}", file=sys.stderr)
                set_aside(broken)
        state = read_state(path)
        if state["vocabulary"] != self.fingerprint:
            raise SharedError(f"{path}: was trained with another vocabulary than the data's")
        load_checkpoint(path, self.model, self.optimizer, self.world)
        rank_states = read_rank_states(path)
        self._set_counters(state)
        self.take_data([each["data"] for each in rank_states])
        self._open_log()
        # Nothing may draw a random number between here and the first step.
        if len(rank_states) == self.world.size:
            restore_random_state(rank_states[self.world.rank])
        else:
            torch.manual_seed(_seed_after(self.recipe.seed, self.done, self.world.rank))

    def take_data(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on with the data where ranks stood, now perhaps as many others.

        Args:
            states: of each of those ranks; empty: from the beginning.

        Raises:
            UserError: they belong to other data.
        """
        if states and len(states) != self.world.size:
            states = reshard(states, self.world.size)
        if states:
            self.batches.set_state(states[self.world.rank])

    def run_to_end(self, report: Report, asked: Interruption) -> None:
        """Train to the last step, logging and saving on the way.

        Raises:
            UserError: a loss was not finite or exploded.
            StorageError: a checkpoint or the log cannot be written.
            StoppedError: a signal came; the work is saved.
        """
        report(self.done)
        self.window.restart_clock()
        while self.done < self.config.steps:
            self._take_step(report)
            last = self.done == self.config.steps
            asked.problem = self.problem
            signal = asked.agreed()
            if self.done % self.config.checkpoint_every == 0 or last or signal:
                self._write_row(report)
                self._save()
                self.window.restart_clock()
            if signal and not last:
                self.writer.wait()
                raise StoppedError(
                    f"{self.run.path}: stopped by {signal} after step {self.done}, which is saved; "
                    "the same command goes on from here"
                )
        self.writer.wait()

    def close(self) -> None:
        """End threads and close files."""
        self.trace.close()
        self.writer.close()
        self.batches.close()
        for tracker in self.trackers:
            tracker.close()

    def _take_step(self, report: Report) -> None:
        rate = learning_rate(self.config.optimizer, self.done, self.config.steps)
        begun = time.monotonic()
        batches = [next(self.batches) for _ in range(self.gradient_accumulation_steps)]
        waiting = time.monotonic() - begun
        step = self.done + 1
        logs = step % self.config.log_every == 0 or step == self.config.steps
        statistics = Statistics(self.model, self.recipe.engine.replicate) if logs else None
        self.watch.begin(step)
        self.recent.add(step, batches)
        sums, norm = self.step(batches, rate, statistics)
        self.trace.end_step(step)
        # The row of the step before: its copy has arrived while this step was launched.
        self._write_row(report)
        self.done = step
        tokens = sum(batch.tokens_BS.size for batch in batches) * self.world.size
        self.tokens += tokens
        self.window.add(sums, tokens, waiting)
        if statistics is not None:
            self.window.close_row(
                {
                    "step": self.done,
                    "tokens": self.origin.tokens + self.tokens,
                    "flops": self.origin.flops + self.tokens * self.flops_per_token,
                    "learning_rate": rate,
                    "skipped": self.watch.skipped,
                },
                {"norm": norm, **self.watch.evidence},
                statistics.sums,
            )

    def _write_row(self, report: Report) -> None:
        """Write the row that is on its way, if there is one."""
        found = self.window.finish_row()
        if found is None:
            return
        row, tensors = found
        self._refuse_fault(row["step"], tensors)
        self._track(row)
        loss = "none" if row["loss"] is None else f"{row['loss']:.3f}"
        report(
            row["step"],
            f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s  MFU {row['mfu']:.0%}  "
            f"{row['peak_memory'] / 2**30:.1f} GiB",
        )

    def _track(self, row: Row) -> None:
        """Hand a row to the trackers; what this rank alone cannot write is told to all later."""
        try:
            for tracker in self.trackers if self.problem is None else ():
                tracker.write(row)
        except StorageError as problem:
            self.problem = problem

    def _sync_log(self) -> None:
        """Bring the log to the disk, on which no checkpoint may be ahead of it."""
        self.writer.wait()  # its thread talks between ranks by the same group
        with raise_on_all_ranks(self.world):
            if self.problem is not None:
                raise self.problem
            for tracker in self.trackers:
                tracker.sync()

    def _save(self) -> None:
        if self.done % self.config.log_every:  # in the middle of a row
            self._refuse_fault(self.done, HostCopy(self.watch.evidence).read())
        self._sync_log()
        state = {
            "step": self.done,
            "tokens": self.origin.tokens + self.tokens,
            "flops": self.origin.flops + self.tokens * self.flops_per_token,
            "tokens_before": self.origin.tokens,
            "flops_before": self.origin.flops,
            "learning_rate": learning_rate(self.config.optimizer, self.done, self.config.steps),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "vocabulary": self.fingerprint,
            "window": self.window.get_state(),
            "watch": self.watch.get_state(),
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
        }
        own = {"data": self.batches.get_state()}
        self.writer.save(self.done, self.model, self.optimizer, state, own)

    def _refuse_fault(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Stop if there was a fault until a step that is done."""
        if tensors["first"] and not self.watch.skips:
            with suppress(SharedError):  # the newest checkpoint is to be the one to replay from
                self.writer.wait()
            raise_fault(self.recipe, self.world, self.recent, tensors)
        self.recent.forget(step)

    def _set_counters(self, state: dict[str, Any]) -> None:
        self.done = state["step"]
        self.tokens = state["tokens"] - state["tokens_before"]
        self.origin = Origin(state["tokens_before"], state["flops_before"])
        self.window.set_state(state["window"])
        self.watch.set_state(state["watch"])
        before = state["recipe"][self.recipe.stage]["gradient_accumulation_steps"]
        if (
            before == self.config.gradient_accumulation_steps
            and self.recipe.engine.step_size == "kept"
        ):
            self.gradient_accumulation_steps = self._share_step(
                state["gradient_accumulation_steps"] * state["world_size"]
            )

    def _share_step(self, together: int) -> int:
        """Micro-batches of each rank, in a step that keeps its size whatever the ranks' number."""
        ranks, own = self.world.size, self.config.gradient_accumulation_steps
        if together % ranks:
            tokens = self.recipe.data.micro_batch_size * self.recipe.data.sequence_length
            raise SharedError(
                f"{self.run.path}: {ranks} ranks cannot share the {together} micro-batches of a "
                f"step; use a divisor of {together} as number of ranks, and a step keeps its "
                f"{together * tokens:,} tokens; or let it grow with engine.step_size=grows to "
                f"{ranks} times {own} micro-batches, {ranks * own * tokens:,} tokens"
            )
        return together // ranks

    def _open_log(self) -> None:
        with raise_on_all_ranks(self.world):
            if self.world.rank == 0:
                self.writer.sweep()
                self.trackers = make_trackers(self.recipe.tracking, self.run, self.done)


def _seed_after(seed: int, step: int, rank: int) -> int:
    """A seed for what comes after a step, so that no rank draws what one has drawn before."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:4])
