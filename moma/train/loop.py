"""The training loop of the stages `pretrain`, `upcycle` and `aux_router`.

It takes steps, writes log records (`metrics.jsonl`) and checkpoints, and resumes runs.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.data.batches.iterator import Batches, prefetch, reshard
from moma.data.batches.packing import Batch
from moma.errors import SharedError, StoppedError
from moma.model.transformer import Transformer
from moma.progress import ProgressCallback, show_progress
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import (
    is_weights_only,
    load_checkpoint,
    newest_intact,
    read_rank_states,
    read_state,
    restore_random_state,
    set_aside,
    training_tensors,
)
from moma.runtime.interrupt import Interruption, interruption
from moma.runtime.optimizer import learning_rate
from moma.runtime.trace import start_profiler
from moma.runtime.tracking import Trackers, make_trackers
from moma.runtime.world import (
    World,
    can_compile,
    on_rank_0,
    raise_on_all_ranks,
    reporting_lost_ranks,
)
from moma.runtime.writer import CheckpointWriter
from moma.train.changes import (
    check_run_folder,
    create_run_folder,
    lock_run_folder,
    write_run_folder,
)
from moma.train.fault import raise_fault
from moma.train.metrics import MetricsWindow
from moma.train.monitor import LossMonitor
from moma.train.pools import warn_of_small_pools
from moma.train.recipe import Recipe
from moma.train.restore import provide_training_data, require_vocabulary
from moma.train.stages import (
    InitialState,
    find_source_run,
    flops_per_token,
    initial_state,
    make_step,
    prepare_model,
)
from moma.train.statistics import Statistics
from moma.train.validation import Validation
from moma.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def train(recipe: Recipe, world: World, quiet: bool = False) -> Run:
    """Run the recipe's stage, or resume it where it was interrupted; all ranks call it together.

    Args:
        quiet: whether to hide the progress bar.

    Returns:
        The finished run.

    Raises:
        UserError: the run folder belongs to another recipe, something the recipe needs is missing,
            a loss or gradient is not finite, or the loss spikes (`StageConfig.explosion`).
        StorageError: a checkpoint or the log cannot be written.
        StoppedError: a signal stopped it; progress is saved.
        LostRankError: another rank ended or does not respond.
    """
    run = Run(recipe.run)
    with ExitStack() as stack:
        stack.enter_context(reporting_lost_ranks(world))
        stop_request = stack.enter_context(interruption(world))
        is_locked = lock_run_folder(run, recipe, world, stack)
        on_rank_0(world, check_run_folder, run, recipe)
        shards = provide_training_data(run, recipe, world)
        checkpoint, damaged = newest_intact(run.checkpoints, world)
        if checkpoint is not None and _is_finished(checkpoint, recipe):
            # Copies tokenizers that the run folder has lost.
            on_rank_0(world, write_run_folder, run, recipe, shards)
            return run
        # A run that has started no longer needs its source run.
        source = find_source_run(recipe, world) if checkpoint is None else None
        with raise_on_all_ranks(world):
            vocabulary = Vocabulary.load(Tokenizers(recipe.data.path).vocabulary)
            model = prepare_model(recipe, vocabulary, world, source, checkpoint is not None)
            initial = initial_state(recipe, source)
            trainer = stack.enter_context(closing(Trainer(recipe, run, model, vocabulary, world)))
            if checkpoint is None:
                trainer.start(initial)
        # Created only now, so that a recipe that cannot be trained leaves no run folder.
        if not is_locked:
            create_run_folder(run, recipe, world, stack)
        on_rank_0(world, write_run_folder, run, recipe, shards)
        if checkpoint is None:
            trainer.open_outputs()
            if not world.rank:
                warn_of_small_pools(recipe)
        else:
            trainer.resume(checkpoint, damaged)
        title = f"{recipe.stage} {recipe.run.name}"
        hide = quiet or world.rank > 0
        progress = stack.enter_context(show_progress(title, recipe.stage_config.steps, hide))
        stop_request.install_handlers()
        trainer.train(progress, stop_request)
    return run


class Trainer:
    """A run in training: model, optimizer, data, counters, log and checkpoints.

    All ranks call every method together.
    """

    def __init__(
        self, recipe: Recipe, run: Run, model: Transformer, vocabulary: Vocabulary, world: World
    ):
        self.recipe, self.config, self.run = recipe, recipe.stage_config, run
        self.model, self.vocabulary, self.world = model, vocabulary, world
        self.monitor = LossMonitor(self.config, world.device)
        self.optimizer_step = make_step(recipe, model, world, self.monitor)
        self.gradient_accumulation_steps = self.config.gradient_accumulation_steps
        batches = Batches(recipe.data, vocabulary, recipe.seed, world.rank, world.size)
        self.batches = prefetch(batches, recipe.data)
        # Micro-batches of the steps not yet checked for faults (monitor.py): `moma replay` needs
        # those of a faulty step.
        self.unchecked_batches: dict[int, Sequence[Batch]] = {}
        self.initial, self.steps_done, self.tokens = InitialState(), 0, 0
        self.flops_per_token = flops_per_token(recipe, vocabulary)
        self.metrics = MetricsWindow(recipe, model, self.flops_per_token, world)
        self.trackers = Trackers()
        self.validation = Validation(recipe, model, world, run.path / "validation")
        self.writer = CheckpointWriter(
            run.checkpoints, world, self.config.keep_checkpoints, self.config.keep_every
        )
        traced = recipe.engine.trace if world.rank == 0 else 0
        self.profiler = start_profiler(run.path / "trace", traced, lambda: self.steps_done)

    def start(self, initial: InitialState) -> None:
        """Prepare a new run; `upcycle` continues counters and data of the run `from` (§2.5).

        Raises:
            UserError: the data is not that of the run `from`.
        """
        self.initial = initial
        self._restore_data(initial.data)
        # Used by dropout and router noise.
        torch.manual_seed(self.recipe.seed + self.world.rank)

    def resume(self, path: Path, damaged: Mapping[Path, str]) -> None:
        """Restore a checkpoint, and drop log records beyond it.

        Args:
            path: the newest intact checkpoint.
            damaged: newer checkpoints, each with a message.

        Raises:
            UserError: the vocabulary, the data or the model's weights are not those of the
                checkpoint, or the ranks cannot share the micro-batches of a step.
            StorageError: the log cannot be written.
        """
        on_rank_0(self.world, _set_aside, path, damaged)
        with raise_on_all_ranks(self.world):
            require_vocabulary(path, self.vocabulary, self.recipe.data.path)
        load_checkpoint(path, self.model, self.optimizer_step.optimizers, self.world)
        with raise_on_all_ranks(self.world):
            self._restore_counters(read_state(path))
            rank_states = read_rank_states(path)
            self._restore_data([state["data"] for state in rank_states])
        self.open_outputs()
        # No random number may be drawn between here and the first step.
        if len(rank_states) == self.world.size:
            restore_random_state(rank_states[self.world.rank])
        else:
            torch.manual_seed(resume_seed(self.recipe.seed, self.steps_done, self.world.rank))

    def open_outputs(self) -> None:
        """Remove unfinished checkpoints of earlier processes; continue the log at `steps_done`."""

        def open_them() -> None:
            self.writer.remove_partial()
            self.trackers = make_trackers(self.recipe.tracking, self.run, self.steps_done)

        on_rank_0(self.world, open_them)

    def train(self, progress: ProgressCallback, stop_request: Interruption) -> None:
        """Train to the last step, with log records and checkpoints.

        Raises:
            UserError: a loss or gradient is not finite, or the loss spikes; see `LossMonitor`.
            StorageError: a checkpoint or the log cannot be written.
            StoppedError: a signal arrived; progress is saved.
        """
        progress(self.steps_done)
        self._announce_compilation()
        self.metrics.restart_clock()
        while self.steps_done < self.config.steps:
            self._train_step(progress)
            is_last = self.steps_done == self.config.steps
            # A write error of one rank stops all ranks, as a signal does.
            signal = stop_request.poll(self.trackers.error)
            if self.steps_done % self.config.checkpoint_every == 0 or is_last or signal:
                self._write_record(progress)
                self._save_checkpoint()
                self.metrics.restart_clock()
            if signal and not is_last:
                self.writer.wait()
                raise StoppedError(
                    f"{self.run.path}: stopped by {signal} after step {self.steps_done}, which is "
                    "saved; run the same command to resume"
                )
        self.writer.wait()

    def close(self) -> None:
        """End threads and close files."""
        if self.profiler is not None:
            self.profiler.stop()
        self.writer.close()
        self.batches.close()
        self.trackers.close()

    def _announce_compilation(self) -> None:
        if not self.config.compile or self.world.rank or self.steps_done == self.config.steps:
            return
        if can_compile(self.world.device):
            logger.info("%s: compiling; the first step takes minutes", self.run.path)
        else:
            logger.warning(
                "%s: torch.compile is not available, so training is slower; `moma doctor` says why",
                self.run.path,
            )

    def _train_step(self, progress: ProgressCallback) -> None:
        start = time.monotonic()
        micro_batches = [next(self.batches) for _ in range(self.gradient_accumulation_steps)]
        data_wait = time.monotonic() - start
        lr = learning_rate(self.config.optimizer, self.steps_done, self.config.steps)
        step = self.steps_done + 1
        is_logged = step % self.config.log_every == 0 or step == self.config.steps
        statistics = Statistics(self.model, self.recipe.engine.replicate) if is_logged else None
        self.unchecked_batches[step] = micro_batches
        self.monitor.begin_step(step)
        by_threshold = self.config.routes_by_threshold(step)
        sums, norm = self.optimizer_step(micro_batches, lr, statistics, by_threshold)
        # The record of an earlier step: it was copied to the host while this step was launched.
        self._write_record(progress)
        self.steps_done = step
        if self.profiler is not None:
            self.profiler.step()
        # Padding included, which costs the same.
        tokens = sum(batch.tokens_BS.size for batch in micro_batches) * self.world.size
        self.tokens += tokens
        self.metrics.add(sums, tokens, data_wait)
        if statistics is not None:
            values = {"learning_rate": lr, "skipped_steps": self.monitor.skipped_steps}
            shared = {"norm": norm, **self.monitor.first_fault}
            self.metrics.start_record(self._counters() | values, shared, statistics.sums)
        is_synchronous = self.world.device.type != "cuda" or self.monitor.skips
        if is_synchronous or self.validation.is_due(step):
            # The host has waited for the step: written later, the record's throughput would include
            # the next step. Validation needs the weights of this step.
            self._write_record(progress)

    def _write_record(self, progress: ProgressCallback) -> None:
        """Check the pending log record for a fault, add due validation losses, and write it."""
        finished = self.metrics.finish_record()
        if finished is None:
            return
        record, tensors = finished
        self._raise_if_fault(record["step"], tensors)
        if self.validation.is_due(record["step"]):
            # Its thread and on_rank_0 use one process group: collectives must not interleave.
            self.writer.wait()
            with self.optimizer_step.autocast():
                record["validation"] = self.validation.measure(record["step"])
            self.metrics.restart_clock()
        self.trackers.write(record)
        loss = "none" if record["loss"] is None else f"{record['loss']:.3f}"
        progress(
            record["step"],
            f"loss {loss}  {record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.0%}  "
            f"{record['peak_memory'] / 2**30:.1f} GiB",
        )

    def _raise_if_fault(self, step: int, first_fault: Mapping[str, Tensor]) -> None:
        """Stop if a step up to this one had a fault, unless such steps are skipped.

        Otherwise the micro-batches up to this step are dropped.
        """
        if first_fault["fault_step"] and not self.monitor.skips:
            with suppress(SharedError):  # a failed checkpoint must not hide the fault
                self.writer.wait()  # a replay starts from the newest checkpoint
            raise_fault(self.recipe, self.world, self.unchecked_batches, first_fault)
        for checked in [each for each in self.unchecked_batches if each <= step]:
            del self.unchecked_batches[checked]

    def _save_checkpoint(self) -> None:
        if self.unchecked_batches:  # steps that no log record has checked
            self._raise_if_fault(self.steps_done, self.monitor.first_fault)
        self.writer.wait()  # its thread and on_rank_0 use one process group
        # No checkpoint may be newer than the log.
        on_rank_0(self.world, self.trackers.sync)
        best = self.validation.best_step(self.steps_done)
        state = self._counters() | {
            "source_tokens": self.initial.tokens,
            "source_flops": self.initial.flops,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "vocabulary": self.vocabulary.fingerprint,
            "window": self.metrics.get_state(),
            "monitor": self.monitor.get_state(),
            "validation": self.validation.get_state(),
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
        }
        tensors = training_tensors(self.model, self.optimizer_step.optimizers)
        data = {"data": self.batches.get_state()}
        self.writer.save(self.steps_done, tensors, state, data, best)

    def _counters(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "tokens": self.initial.tokens + self.tokens,
            "flops": self.initial.flops + self.tokens * self.flops_per_token,
        }

    def _restore_counters(self, state: Mapping[str, Any]) -> None:
        self.steps_done = state["step"]
        self.tokens = state["tokens"] - state["source_tokens"]
        self.initial = InitialState(state["source_tokens"], state["source_flops"])
        self.metrics.set_state(state["window"])
        self.monitor.set_state(state["monitor"])
        self.validation.set_state(state["validation"])
        self._keep_global_batch_size(state)

    def _keep_global_batch_size(self, state: Mapping[str, Any]) -> None:
        """Keep the global batch size: divide a step's micro-batches among another number of ranks.

        Raises:
            UserError: the ranks cannot share them equally.
        """
        configured = self.config.gradient_accumulation_steps
        saved = state["recipe"][self.recipe.stage]["gradient_accumulation_steps"]
        if configured != saved or self.recipe.engine.global_batch_size != "kept":
            return
        ranks, total = self.world.size, state["gradient_accumulation_steps"] * state["world_size"]
        if total % ranks:
            tokens = self.recipe.data.micro_batch_size * self.recipe.data.sequence_length
            raise SharedError(
                f"{self.run.path}: {ranks} ranks cannot share the {total} micro-batches of a step; "
                f"use a divisor of {total} as the number of ranks to keep {total * tokens:,} "
                "tokens per step, or set engine.global_batch_size=grows, for steps of "
                f"{ranks} times {configured} micro-batches, {ranks * configured * tokens:,} tokens"
            )
        self.gradient_accumulation_steps = total // ranks

    def _restore_data(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue with the data where the ranks of an earlier job stopped, if there is one."""
        if states:
            self.batches.set_state(reshard(states, self.world.size)[self.world.rank])


def resume_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the steps after a resume, such that no rank repeats earlier random numbers."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:4])


def _set_aside(path: Path, damaged: Mapping[Path, str]) -> None:
    """Rename damaged checkpoints that are newer than the one to resume from."""
    for checkpoint, message in damaged.items():
        logger.warning("%s; resuming from %s", message, path.name)
        set_aside(checkpoint)


def _is_finished(checkpoint: Path, recipe: Recipe) -> bool:
    """Whether a checkpoint is the last one of the run, and was written by training."""
    is_last = read_state(checkpoint)["step"] >= recipe.stage_config.steps
    return is_last and not is_weights_only(checkpoint)
