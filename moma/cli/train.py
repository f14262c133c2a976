"""`moma train` and `moma replay`."""

from moma.cli.arguments import App, AsJson, Overrides, RecipeFile, RunFolder
from moma.cli.output import key_values, print_result

app = App()


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train the stage of a recipe, or its chain of stages. An interrupted run resumes."""
    from moma.evaluate.perplexity import evaluate
    from moma.runtime.world import join_world
    from moma.train.chain import Evaluation, next_command, read_chain, run_chain

    stages = read_chain(recipe, overrides or ())
    timeout = max(stage.engine.timeout for stage in stages if not isinstance(stage, Evaluation))
    with join_world(timeout) as world:
        folder = run_chain(stages, world, evaluate)
        if world.rank == 0:
            print(f"trained {folder}")
            print(f"next: {next_command(stages[-1])}")


@app.command()
def replay(run: RunFolder, as_json: AsJson = False) -> None:
    """Repeat the steps that led to a loss fault. Examine the last one."""
    from moma.runs import Run
    from moma.runtime.world import join_world
    from moma.train.replay import replay as repeat_steps

    with join_world() as world:
        result = repeat_steps(Run(run), world, quiet=as_json)
    if world.rank == 0:
        print_result(result, as_json, [key_values(f"{run}, its fault", result)])
