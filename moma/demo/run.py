"""The whole way on real images: documents → tokenizers → two models → routers → report.

Every stage leaves its result on disk and is not done twice, so that the demo goes on where it was
interrupted.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moma.data.encode.prepare import prepare
from moma.data.outputs import mark_output
from moma.demo.scoring import (
    Captioned,
    Drawn,
    Sketch,
    caption_sketches,
    draw_sketches,
    held_out_compositions,
    held_out_singles,
    seen_singles,
)
from moma.demo.sketches import SketchesConfig
from moma.errors import UserError
from moma.generate.decode import Sampling
from moma.progress import show_progress
from moma.recipe import read_recipe, shipped_recipe
from moma.runs import Run
from moma.runtime.world import World, local_device
from moma.study import figures
from moma.study.compare import Measured, add_comparison, comparison_tables, measure, summary
from moma.study.page import Page, captioned, grid, paragraph, table, tile
from moma.study.tables import Table, percent
from moma.train.changes import refuse_other_recipe
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import ROUTER_RUN

ARCHITECTURES = ("dense", "moe_4t4i")
SINGLES, COMPOSITIONS, CAPTIONS = 64, 48, 8
SHOWN = 24
SAMPLING = Sampling(temperature=0)
_FILES = ("minutes.json", "report.html", "result.json", "sheet.png")
DECIDED = ("data.path", "model.groups", "run", "stage", "from")


def demo_recipe() -> Path:
    """The demo's recipe."""
    return shipped_recipe("demo.toml")


def run_demo(out: Path, overrides: Sequence[str], quiet: bool = False) -> dict[str, Any]:
    """Run the demo, or go on with it.

    Args:
        out: folder for everything it makes; the page is `report.html` there.
        overrides: changes to the demo's recipe.

    Returns:
        The figures of the report; keys are listed in `docs/demo.md`.

    Raises:
        UserError: a data package is missing, or `out` holds another demo.
    """
    recipe = _decided(out, overrides)
    recipes = [_of(recipe, name, out / name) for name in ARCHITECTURES]
    for one in recipes:
        refuse_other_recipe(Run(one.run), one)
    mark_output(out, "data", *ARCHITECTURES, *_FILES)
    clock = Clock(out / "minutes.json")
    _prepare_and_train(recipe, recipes, clock, quiet)
    with clock("evaluate", anew=True):
        measured = [measure(Run(out / name), quiet) for name in ARCHITECTURES]
    with clock("generate", anew=True):
        sketches = {each.name: _sketch(each, recipe.seed, quiet) for each in measured}
    result = summary(measured) | {
        "codec": json.loads((out / "data" / "codec" / "metrics.json").read_text()),
        "sketches": {name: scores(*made) for name, made in sketches.items()},
        "seed": recipe.seed,
        "minutes": clock.minutes,
    }
    _write_report(out, measured, sketches, result)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _decided(out: Path, overrides: Sequence[str]) -> Recipe:
    """The demo's recipe with changes, its data below `out`."""
    for text in overrides:
        if text.partition("=")[0].strip() in DECIDED:
            raise UserError(f"override '{text}': the demo decides that itself; use --out")
    return read_recipe(Recipe, demo_recipe(), [f"data.path={out / 'data'}", *overrides])


def _prepare_and_train(
    recipe: Recipe, recipes: Sequence[Recipe], clock: "Clock", quiet: bool
) -> None:
    """Make the data, then all models on it, and the auxiliary routers of those that choose."""
    world = World(local_device())
    with clock("prepare"):
        prepare(recipe, world.device, quiet)
    with clock("train"):
        if world.device.type == "cpu":
            train_side_by_side(recipes, quiet)
        else:
            for one in recipes:
                train(one, world, quiet)
    with clock("routers"):
        for one in recipes:
            if one.model.has_routers:
                routers = {"stage": "aux_router", "from_": one.run, "run": one.run / ROUTER_RUN}
                train(one.model_copy(update=routers), world, quiet)


class Clock:
    """Minutes spent in each stage, over interruptions."""

    def __init__(self, path: Path):
        self.path = path
        self.minutes: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def __call__(self, stage: str, anew: bool = False) -> Iterator[None]:
        """Add the time of a stage; `anew` forgets what an earlier try took."""
        start = time.monotonic()
        before = 0.0 if anew else self.minutes.get(stage, 0.0)
        try:
            yield
        finally:
            spent = before + (time.monotonic() - start) / 60
            self.minutes[stage] = round(spent, 2)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.minutes) + "\n")


def train_side_by_side(recipes: Sequence[Recipe], quiet: bool) -> None:
    """Train each recipe in a process of its own, the cores shared out between them.

    Small models gain little from a second thread: two runs on one core each take less time than
    one after the other on both.
    """
    threads = max(1, torch.get_num_threads() // len(recipes))
    with ProcessPoolExecutor(len(recipes), multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_train_alone, recipe, threads) for recipe in recipes]
        try:
            _watch(jobs, recipes, quiet)
        except BaseException as error:
            # What the others have done stays, up to their last checkpoint.
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a training process was killed, perhaps for want of memory; "
                    "the same command goes on from its last checkpoint"
                ) from error
            raise


def _watch(jobs: Sequence[Future[None]], recipes: Sequence[Recipe], quiet: bool) -> None:
    """Show how far the slowest run is until all are done; raises what one of them raises."""
    steps = recipes[0].stage_config.steps
    with show_progress(f"train {' and '.join(ARCHITECTURES)}", steps, quiet) as report:
        while not all(job.done() for job in jobs):
            for job in wait(jobs, timeout=1.0, return_when=FIRST_EXCEPTION).done:
                job.result()
            rows = [Run(recipe.run).last_metric() for recipe in recipes]
            losses = [f"{row['loss']:.3f}" for row in rows if row]
            report(min(row["step"] if row else 0 for row in rows), f"loss {' '.join(losses)}")
    for job in jobs:
        job.result()


def _train_alone(recipe: Recipe, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    train(recipe, World(local_device()), quiet=True)


def _end_with_parent() -> None:
    """A training that nobody waits for must not go on writing into a run that is begun again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def scores(drawn: Sequence[Drawn], written: Sequence[Captioned]) -> dict[str, float]:
    """Shares that are right: single objects, halves of compositions, captions."""
    singles = [right for each in drawn if each.sketch.relation is None for right in each.right]
    halves = [right for each in drawn if each.sketch.relation for right in each.right]
    return {
        "singles_right": sum(singles) / len(singles),
        "composition_halves_right": sum(halves) / len(halves),
        "captions_right": sum(each.right for each in written) / len(written),
    }


def _of(recipe: Recipe, architecture: str, run: Path) -> Recipe:
    model = recipe.model.model_copy(update={"groups": architecture})
    return recipe.model_copy(update={"model": model, "run": run})


def _objects(recipe: Recipe) -> int:
    """How many objects the recipe's sketches name."""
    counts = [s.objects for s in recipe.data.sources if isinstance(s, SketchesConfig)]
    if not counts:
        raise UserError("the demo's recipe has no source of kind 'sketches'; it scores sketches")
    return min(counts)


def _sketch(measured: Measured, seed: int, quiet: bool) -> tuple[list[Drawn], list[Captioned]]:
    """Images for captions and captions for images, by causal decoding."""
    objects = _objects(measured.recipe)
    model = measured.mixed
    wanted = seen_singles(objects, SINGLES, seed) + held_out_compositions(
        objects, COMPOSITIONS, seed
    )
    shown: list[Sketch] = held_out_singles(objects, CAPTIONS // 2, seed)
    shown += held_out_compositions(objects, CAPTIONS - len(shown), seed + 1)
    with show_progress(f"draw with {measured.name}", len(wanted), quiet) as report:
        drawn = draw_sketches(model, wanted, objects, SAMPLING, report)
    return drawn, caption_sketches(model, shown, SAMPLING)


def _write_report(
    out: Path,
    measured: Sequence[Measured],
    sketches: dict[str, tuple[list[Drawn], list[Captioned]]],
    result: dict[str, Any],
) -> None:
    page = Page(
        "MoMa demo",
        "Two early-fusion models with equal FLOPs a token, trained on the same batches of emoji "
        "drawings, their names and dictionary definitions: dense, and mixture of modality-aware "
        "experts (4 text and 4 image experts).",
    )
    scored = _score_table(result)
    page.section(scored.title, paragraph(scored.explanation), table(scored))
    page.section("Images from captions", *_image_parts(sketches, measured))
    page.section("Captions of held-out images", *_caption_parts(sketches))
    add_comparison(page, measured)
    minutes = _minutes_table(result)
    page.section(minutes.title, table(minutes))
    page.write(out / "report.html")
    drawn, _ = sketches[measured[-1].name]
    shown = [(each.image, each.sketch.caption, _mark(each.right)) for each in _mixture(drawn, 16)]
    figures.sheet(shown).savefig(out / "sheet.png", dpi=100)


def demo_tables(result: dict[str, Any]) -> list[Table]:
    """What `run_demo` found, as tables for people."""
    return [_score_table(result), *comparison_tables(result), _minutes_table(result)]


def _score_table(result: dict[str, Any]) -> Table:
    keys = ("singles_right", "composition_halves_right", "captions_right")
    codec = result["codec"]
    return Table(
        "Images and captions that are right",
        "Right is an image whose nearest object of all, by pixel distance to the codec's "
        "reconstructions, is the one asked for: single objects that training shows, and halves of "
        "compositions of pairs that it never shows. Captions: every object is named. The codec: "
        f"{codec['psnr']:.1f} dB on held-out images, {percent(codec['codes_used'])} of its codes "
        "in use.",
        ("run", "single objects", "halves of compositions", "captions of held-out images"),
        [(name, *(percent(row[key]) for key in keys)) for name, row in result["sketches"].items()],
    )


def _minutes_table(result: dict[str, Any]) -> Table:
    rows = list(result["minutes"].items())
    return Table("Minutes", "", ("stage", "minutes"), rows)


def _image_parts(
    sketches: dict[str, tuple[list[Drawn], list[Captioned]]], measured: Sequence[Measured]
) -> list[str]:
    size = measured[0].mixed.codec.config.image_size
    columns = [_mixture(drawn, 2 * SHOWN) for drawn, _ in sketches.values()]
    cells = []
    for together in zip(*columns, strict=True):
        truth = together[0].sketch.draw(size)
        tiles = [tile(truth, "true")] + [
            tile(each.image, f"{name}: {', '.join(each.shows)}", _mark(each.right))
            for name, each in zip(sketches, together, strict=True)
        ]
        cells.append(captioned(tiles, together[0].sketch.caption))
    return [
        paragraph(
            f"Left the true drawing, then {' and '.join(sketches)}; a green frame where every "
            "object is right, yellow where one of two is, red where none is. Hover to see what a "
            "image was taken to show."
        ),
        grid(cells),
    ]


def _caption_parts(sketches: dict[str, tuple[list[Drawn], list[Captioned]]]) -> list[str]:
    cells = []
    for together in zip(*(written for _, written in sketches.values()), strict=True):
        first = together[0]
        lines = [f"{name}: {each.caption}" for name, each in zip(sketches, together, strict=True)]
        image: Image.Image = first.image
        cells.append(captioned([tile(image, first.sketch.caption)], " · ".join(lines)))
    return [grid(cells)]


def _mixture(drawn: Sequence[Drawn], count: int) -> list[Drawn]:
    """As many single objects as compositions."""
    singles = [each for each in drawn if each.sketch.relation is None]
    pairs = [each for each in drawn if each.sketch.relation is not None]
    return singles[: count // 2] + pairs[: count // 2]


def _mark(right: Sequence[bool]) -> str:
    return "ok" if all(right) else "half" if any(right) else "no"
