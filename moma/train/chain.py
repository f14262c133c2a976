"""A chain of stages in one file, each of which continues the one before: seed → experts → routers.

    extends = "demo.toml"        # or a list of files
    run = "runs/chain"           # contains a folder for each stage, by its name

    [[chain]]
    name = "seed"
    model = { groups = "moe_1t1i" }

    [[chain]]
    stage = "upcycle"            # from = the run before
    model = { groups = "moe_4t4i" }

Values of a stage also apply to the stages after it. Finished stages are not repeated.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from moma.errors import UserError, shell_command
from moma.files import atomic_write, fingerprint, read_json
from moma.model.routing import RoutingName
from moma.model.transformer import Transformer
from moma.recipe import Config, RequiredPath, check, merge_tables, override, read_values
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.manifest import MANIFEST
from moma.runtime.world import World
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import (
    ROUTER_RUN,
    load_run,
    require_routing,
    require_training_data,
)

# Evaluates a model on the held-out documents: see `moma.evaluate.perplexity.evaluate`.
Evaluate = Callable[[Transformer, Recipe, RoutingName, bool], Mapping[str, float | None]]


class Evaluation(NamedTuple):
    """A stage that evaluates the run before it; the result is `RUN/evaluation-ROUTING.json`."""

    run: Path
    routing: RoutingName

    @property
    def file(self) -> Path:
        """The file of the result."""
        return self.run / f"evaluation-{self.routing}.json"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the evaluated checkpoints: of the run and of its routers."""
        return fingerprint(read_manifests([self.run, self.run / ROUTER_RUN]))

    @property
    def is_done(self) -> bool:
        """Whether the file is the result for the run's newest checkpoints.

        Raises:
            UserError: the file was not written by a chain.
        """
        result = read_json(self.file) if self.file.exists() else {"fingerprint": None}
        if not isinstance(result, dict) or "fingerprint" not in result:
            raise UserError(f"{self.file}: not written by moma, and is not replaced; rename it")
        return bool(result["fingerprint"] == self.fingerprint)


def read_manifests(runs: Iterable[Path]) -> bytes:
    """The manifests of the newest checkpoints of run folders, as far as there are any."""
    newest = [path for run in runs for path in checkpoints_in(Run(run).checkpoints)[-1:]]
    return b"".join((path / MANIFEST).read_bytes() for path in newest)


class _Folder(Config):
    """The folder of a chain's runs."""

    run: RequiredPath


class _Stage(Config):
    """The name of a stage, which is also that of its folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class _EvaluationStage(Config):
    """The keys of a stage that evaluates."""

    routing: RoutingName = "causal"


def read_chain(path: Path, overrides: Sequence[str] = ()) -> list[Recipe | Evaluation]:
    """Read a chain, or a recipe, which is a chain of one stage.

    Overrides apply to every stage, `chain.0.model.groups=…` only to the first.

    Raises:
        UserError: a key or value is wrong; the message names it and its stage.
    """
    values = read_values(path, overrides, Recipe)
    links = values.pop("chain", None)
    if links is None:
        return [check(Recipe, values, str(path))]
    # Overrides take precedence over the values of stages.
    last = [text for text in overrides if not text.lstrip().startswith("chain.")]
    return chain_of(values, links, str(path), last)


def chain_of(
    values: dict[str, Any], links: object, file: str, overrides: Sequence[str] = ()
) -> list[Recipe | Evaluation]:
    """The stages of a chain.

    Args:
        values: of the recipe without its chain.
        links: the tables of the chain.
        file: where they are written, for messages.
        overrides: apply to every stage.

    Raises:
        UserError: as for `read_chain`.
    """
    if not isinstance(links, list) or not links or not all(isinstance(n, dict) for n in links):
        raise UserError(f"{file}: 'chain': write one [[chain]] table for each stage")
    base = check(_Folder, {"run": values.get("run", "runs/run")}, file).run
    stages: list[Recipe | Evaluation] = []
    before: Path | None = None
    for number, link in enumerate(links, 1):
        kind, origin = link.pop("stage", "pretrain"), f"{file}, stage {number} of the chain"
        if kind == "evaluate":
            if before is None:
                raise UserError(f"{origin}: there is no stage before it to evaluate")
            stages.append(Evaluation(before, check(_EvaluationStage, link, origin).routing))
            continue
        name = check(_Stage, {"name": link.pop("name", kind)}, origin).name
        if "run" in link:
            raise UserError(
                f"{origin}: write 'run' above the chain; a stage's folder in it is its 'name'"
            )
        values = override(deepcopy(merge_tables(values, link)), overrides, Recipe)
        source = link.get("from", None if kind == "pretrain" else before)
        run = Path(source) / ROUTER_RUN if kind == "aux_router" and source else base / name
        own = values | {"stage": kind, "run": str(run), "from": str(source)}
        if not source:
            del own["from"]
        stages.append(check(Recipe, own, origin))
        before = before if kind == "aux_router" else run
    runs = [stage.run for stage in stages if isinstance(stage, Recipe)]
    if twice := sorted({str(run) for run in runs if runs.count(run) > 1}):
        raise UserError(f"{file}: two stages write {twice[0]}; give each a 'name'")
    return stages


def run_chain(
    stages: Iterable[Recipe | Evaluation], world: World, evaluate: Evaluate, quiet: bool = False
) -> Path:
    """Run the stages of `read_chain` that are not finished; all ranks call it together.

    Args:
        evaluate: evaluates a run on rank 0; see `Evaluate`.
        quiet: whether to hide progress bars.

    Returns:
        The folder of the last run.

    Raises:
        UserError: as for `train`; or a run cannot be evaluated, or not under the stage's routing.
    """
    last = Path()
    for stage in stages:
        if isinstance(stage, Recipe):
            last = train(stage, world, quiet).path
        elif world.rank == 0 and not stage.is_done:
            run = Run(stage.run)
            model, recipe = load_run(run)
            require_routing(run, model, stage.routing)
            require_training_data(run, recipe)
            result = evaluate(model, recipe, stage.routing, quiet)
            values = {**result, "fingerprint": stage.fingerprint}
            atomic_write(stage.file, json.dumps(values, indent=2) + "\n")
    return last


def next_command(done: Recipe | Evaluation) -> str:
    """A command to run after the last stage of a chain."""
    if isinstance(done, Evaluation):
        return shell_command("generate", done.run, "--prompt", "a prompt")
    if done.stage == "aux_router":
        return shell_command("evaluate", done.from_, "--routing", "auxiliary")
    return shell_command("evaluate", done.run, "--routing", "causal")
