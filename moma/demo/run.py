"""The demo: documents → tokenizers → two models → images and captions → report.

Every stage stores its result and is not repeated, so that the demo resumes after an interruption.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moma.data.encode.prepare import prepare
from moma.data.outputs import mark_output, require_replaceable, write_output
from moma.demo.scoring import (
    Captioned,
    Drawn,
    NearestObject,
    caption_sketches,
    draw_sketches,
    held_out_compositions,
    single_sketches,
)
from moma.demo.sketches import SketchesConfig, object_names
from moma.errors import UserError
from moma.images import png_bytes
from moma.progress import show_progress
from moma.recipe import read_recipe, shipped_recipe
from moma.runs import Run
from moma.runtime.world import World, local_device
from moma.study import figures
from moma.study.compare import Measured, add_comparison, comparison_tables, measure, summary
from moma.study.page import Page, captioned, grid, paragraph, tile
from moma.study.processes import run_in_processes
from moma.study.routing_drawing import STYLE
from moma.study.tables import Table, percent
from moma.train.changes import refuse_other_recipe
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import ROUTER_RUN

ARCHITECTURES = ("dense", "moe_4t4i")
SINGLES, COMPOSITIONS, CAPTIONS = 64, 48, 32
SHOWN = 24
_FILES = ("minutes.json", "report.html", "result.json", "sheet.png")
_OWN_KEYS = ("data.path", "model.groups", "run", "stage", "from")


class Sketches(NamedTuple):
    """Images for captions and captions for images, by one model."""

    drawn: list[Drawn]
    captioned: list[Captioned]

    @property
    def scores(self) -> dict[str, float]:
        """Shares that are correct: single objects, halves of compositions, captions."""
        singles = [ok for d in self.drawn if d.sketch.relation is None for ok in d.correct]
        halves = [ok for d in self.drawn if d.sketch.relation for ok in d.correct]
        return {
            "singles_right": sum(singles) / len(singles),
            "composition_halves_right": sum(halves) / len(halves),
            "captions_right": sum(c.correct for c in self.captioned) / len(self.captioned),
        }

    def sample(self, count: int) -> list[Drawn]:
        """As many single objects as compositions, `count` together."""
        singles = [each for each in self.drawn if each.sketch.relation is None]
        pairs = [each for each in self.drawn if each.sketch.relation is not None]
        return singles[: count // 2] + pairs[: count // 2]


def run_demo(
    out: Path, overrides: Sequence[str], routers: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run or resume the demo.

    Args:
        out: folder of all files; the page is `report.html`.
        routers: whether to train auxiliary routers too, for the report to compare.

    Returns:
        The figures of the report; `docs/demo.md` lists the keys.

    Raises:
        UserError: a data package is missing, or `out` contains another demo.
    """
    recipe = _read_recipe(out, overrides)
    objects = [s.objects for s in recipe.data.sources if isinstance(s, SketchesConfig)]
    if not objects:
        raise UserError("the demo's recipe has no source of kind 'sketches'; it scores sketches")
    recipes = [
        recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"groups": name}), "run": out / name}
        )
        for name in ARCHITECTURES
    ]
    for each in recipes:
        refuse_other_recipe(Run(each.run), each)
    for name in _FILES:
        require_replaceable(out / name)
    mark_output(out, "data", *ARCHITECTURES, *_FILES)
    clock = Clock(out / "minutes.json")
    _prepare_and_train(recipe, recipes, routers, clock, quiet)
    with clock("evaluate", repeated=True):
        measured = [measure(Run(out / name), quiet) for name in ARCHITECTURES]
    with clock("generate", repeated=True):
        codec = measured[0].mixed.codec  # that of all models
        nearest = NearestObject(codec, object_names(min(objects)), codec.config.image_size)
        sketches = {m.name: _sketch(m, nearest, recipe.seed, quiet) for m in measured}
    result = summary(measured) | {
        "codec": json.loads((out / "data" / "codec" / "metrics.json").read_text()),
        "sketches": {name: made.scores for name, made in sketches.items()},
        "seed": recipe.seed,
        "minutes": clock.minutes,
    }
    _write_report(out, measured, sketches, result)
    write_output(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def _read_recipe(out: Path, overrides: Sequence[str]) -> Recipe:
    """The demo's recipe with changes; raises `UserError` for keys that the demo sets."""
    for text in overrides:
        if text.partition("=")[0].strip() in _OWN_KEYS:
            raise UserError(f"override '{text}': the demo sets this key itself; use --out")
    changes = [f"data.path={out / 'data'}", *overrides]
    return read_recipe(Recipe, shipped_recipe("demo.toml"), changes)


def _prepare_and_train(
    recipe: Recipe, recipes: Sequence[Recipe], routers: bool, clock: "Clock", quiet: bool
) -> None:
    world = World(local_device())
    with clock("prepare"):
        prepare(recipe, world.device, quiet)
    with clock("train"):
        if world.device.type == "cpu":
            train_side_by_side(recipes, quiet)
        else:
            for each in recipes:
                train(each, world, quiet)
    if routers:
        with clock("routers"):
            for each in recipes:
                if each.model.has_expert_choice:
                    stage = {"stage": "aux_router", "from_": each.run, "run": each.run / ROUTER_RUN}
                    train(each.model_copy(update=stage), world, quiet)


class Clock:
    """Minutes of each stage, stored in a file and summed over interruptions."""

    def __init__(self, path: Path):
        self.path = path
        self.minutes: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def __call__(self, stage: str, repeated: bool = False) -> Iterator[None]:
        """Add the time of a stage, or replace its time if the whole stage is repeated."""
        start = time.monotonic()
        before = 0.0 if repeated else self.minutes.get(stage, 0.0)
        try:
            yield
        finally:
            self.minutes[stage] = round(before + (time.monotonic() - start) / 60, 2)
            write_output(self.path, (json.dumps(self.minutes) + "\n").encode())


def train_side_by_side(recipes: Sequence[Recipe], quiet: bool) -> None:
    """Train each recipe in a process of its own, with an equal share of the cores.

    Small models gain little from a second thread: two runs with one core each take less time than
    one after the other with both.
    """
    threads = max(1, torch.get_num_threads() // len(recipes))
    jobs = [partial(train, recipe, World(local_device()), quiet=True) for recipe in recipes]
    title = f"train {' and '.join(ARCHITECTURES)}"
    with show_progress(title, recipes[0].stage_config.steps, quiet) as report:

        def show() -> None:
            """Show the progress of the slowest run."""
            records = [Run(recipe.run).last_metric() for recipe in recipes]
            losses = [f"{record['loss']:.3f}" for record in records if record]
            step = min(record["step"] if record else 0 for record in records)
            report(step, f"loss {' '.join(losses)}" if losses else "compiling")

        run_in_processes(jobs, threads, show)


def _sketch(measured: Measured, nearest: NearestObject, seed: int, quiet: bool) -> Sketches:
    """Generate images for captions and captions for images, causally and greedily."""
    objects = len(nearest.names)
    wanted = single_sketches(objects, SINGLES, seed)
    wanted += held_out_compositions(objects, COMPOSITIONS, seed)
    shown = held_out_compositions(objects, CAPTIONS, seed + 1)
    with show_progress(f"draw with {measured.name}", len(wanted), quiet) as report:
        drawn = draw_sketches(measured.mixed, wanted, nearest, report)
    return Sketches(drawn, caption_sketches(measured.mixed, shown))


def demo_tables(result: dict[str, Any]) -> list[Table]:
    """Tables of the figures of `run_demo`."""
    keys = ("singles_right", "composition_halves_right", "captions_right")
    codec = result["codec"]
    scores = Table(
        "Images and captions that are right",
        "An image is right if its nearest object of all, by pixel distance to the codec's "
        "reconstructions, is the one that the caption names: single objects seen in training, and "
        "halves of compositions of pairs never seen in training. A caption of such a composition "
        "is right if it names both objects and their relation. "
        f"The codec: {codec['psnr']:.1f} dB on held-out images, "
        f"{percent(codec['codes_used'])} of its codes in use.",
        ("run", "single objects", "halves of compositions", "captions of compositions"),
        [(name, *(percent(row[key]) for key in keys)) for name, row in result["sketches"].items()],
    )
    minutes = Table("Minutes", "", ("stage", "minutes"), list(result["minutes"].items()))
    return [scores, *comparison_tables(result), minutes]


def _write_report(
    out: Path,
    measured: Sequence[Measured],
    sketches: Mapping[str, Sketches],
    result: dict[str, Any],
) -> None:
    page = Page(
        "MoMa demo",
        "Two early-fusion models with equal FLOPs per token, trained on the same batches of emoji "
        "drawings, their names and dictionary definitions: dense, and mixture of modality-aware "
        "experts (4 text and 4 image experts).",
        STYLE,
    )
    scores, *_, minutes = demo_tables(result)
    page.add_table(scores)
    explanation = (
        f"Left the true drawing, then {' and '.join(sketches)}; a green frame if every object is "
        "right, yellow if one of two is, red if none is. Hover to see which objects were found."
    )
    size = measured[0].mixed.codec.config.image_size
    page.section("Images from captions", paragraph(explanation), _image_grid(sketches, size))
    page.section("Captions of held-out images", _caption_grid(sketches))
    add_comparison(page, measured)
    page.add_table(minutes)
    page.write(out / "report.html")
    drawn = sketches[measured[-1].name].sample(16)
    shown = [(each.image, each.sketch.caption, _mark(each.correct)) for each in drawn]
    write_output(out / "sheet.png", png_bytes(figures.sheet(shown), dpi=100))


def _image_grid(sketches: Mapping[str, Sketches], size: int) -> str:
    cells = []
    for drawn in zip(*(each.sample(2 * SHOWN) for each in sketches.values()), strict=True):
        sketch = drawn[0].sketch
        tiles = [
            tile(each.image, f"{name}: {', '.join(each.shows)}", _mark(each.correct))
            for name, each in zip(sketches, drawn, strict=True)
        ]
        cells.append(captioned([tile(sketch.draw(size), "true"), *tiles], sketch.caption))
    return grid(cells)


def _caption_grid(sketches: Mapping[str, Sketches]) -> str:
    cells = []
    for written in zip(*(each.captioned for each in sketches.values()), strict=True):
        lines = [f"{name}: {each.caption}" for name, each in zip(sketches, written, strict=True)]
        true = tile(written[0].image, written[0].sketch.caption)
        cells.append(captioned([true], " · ".join(lines)))
    return grid(cells)


def _mark(correct: Sequence[bool]) -> str:
    return "ok" if all(correct) else "half" if any(correct) else "no"
