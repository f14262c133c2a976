"""The studies of `configs/study`: valid, comparable, and able to run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from moma.evaluate.perplexity import evaluate
from moma.plan.counts import plan
from moma.study.grid import StudyRun, read_study, run_unfinished
from moma.study.report import write_report
from moma.study.results import summarize
from moma.train.changes import differences
from tests.command_line import refuses, succeeds
from tests.factories import write_icons
from tests.train.test_loop import WORLD

READY = Path(__file__).parents[2] / "configs" / "study"
FOLDERS = (READY, READY / "gpu", READY / "paper")
FILES = [file for folder in FOLDERS for file in sorted(folder.glob("*.toml"))]
# A model and steps so small that a run takes seconds; many runs are the same then. Micro-batches
# are small as well: the tiny recipe has 21 images.
SMALL = (
    *("model.dim=32", "model.heads=2", "pretrain.compile=false", "pretrain.steps=2"),
    *("upcycle.compile=false", "upcycle.steps=2", "aux_router.compile=false", "aux_router.steps=2"),
    *("pretrain.optimizer.learning_rate=1e-3", "upcycle.optimizer.learning_rate=1e-3"),
    *("pretrain.log_every=1", "data.micro_batch_size=4", "study.seeds=[0]"),
)


def test_ready_studies_are_valid_and_have_names():
    assert (READY / "routing.toml").is_file()
    studies = {file: read_study(file) for file in FILES}
    assert all(len(study.runs) >= 3 for study in studies.values())
    assert len({study.path for study in studies.values()}) == len(studies)
    on_cores, on_gpu = ({file.name for file in folder.glob("*.toml")} for folder in FOLDERS[:2])
    assert on_cores == on_gpu
    message = refuses("study", "nothing")
    assert message.startswith("nothing: there is no such file or study; there are ")
    assert all(Path(name).stem in message for name in on_cores)


def test_a_folder_may_have_the_name_of_a_study(tmp_path, monkeypatch):
    """As that of the icons, which the study `icons` reads from `icons`."""
    monkeypatch.chdir(tmp_path)
    Path("icons").mkdir()
    assert "collections.json" in refuses("study", "icons", *SMALL)


@pytest.mark.parametrize(
    "name", ["architectures", "depth", "experts", "modalities", "routing", "shared"]
)
def test_variants_of_a_ready_study_have_equal_flops(name):
    for folder in (READY, READY / "gpu"):
        recipes = [run.recipes[0] for run in read_study(folder / f"{name}.toml").runs]
        flops = {plan(recipe)["flops_per_token"] for recipe in recipes}
        assert max(flops) / min(flops) < 1.01, folder


def test_the_runs_of_the_paper_s_scaling_study_are_those_of_its_sizes():
    """So that they are trained once."""
    for run in read_study(READY / "paper/scaling.toml").runs:
        variant, _, size = run.variant.rpartition("_")
        sized = read_study(READY / f"paper/{size}.toml").runs
        (same,) = [each for each in sized if each.variant == variant and each.seed == run.seed]
        changed = differences(same.recipes[0], run.recipes[0])
        assert changed.keys() == {"run"}, changed


def content_of(run: StudyRun) -> str:
    """What is trained and measured, without the folders."""
    folders = {"run", "from_"}
    recipes = [recipe.model_dump(mode="json", exclude=folders) for recipe in run.recipes]
    return json.dumps([*recipes, run.config.measures])


@pytest.fixture(scope="module")
def trained_before() -> set[str]:
    """The content of runs of the files so far."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(READY)))
def test_a_ready_study_runs(file, tiny, tmp_path, trained_before, undrawn):
    """With a small model, on the tiny recipe's data; each different run is trained once."""
    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    sections = {key: values[key] for key in ("text_tokenizer", "codec", "data")}
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(sections))
    own = tmp_path / "study.toml"
    own.write_text(f"extends = {json.dumps([str(file), 'tiny.toml'])}\nrun = '{tmp_path}/study'\n")
    layers = ["model.layers=4"] if file.parent.name == "paper" else []
    study = read_study(own, [*SMALL, *layers])
    new = {text: run for run in study.runs if (text := content_of(run)) not in trained_before}
    study = replace(study, runs=tuple(new.values()))
    assert run_unfinished(study.runs, evaluate, WORLD) == {}
    assert study.finished() == study
    if study.runs:
        assert write_report(study, summarize(study)).is_file()
    trained_before.update(new)


@pytest.mark.slow
def test_the_study_of_icons_prepares_its_data(tmp_path, monkeypatch, undrawn):
    """With a small package in the folder that the study names, few definitions, and its codec."""
    digits = "02468ace"
    icons = {
        f"square-{red}{green}": f'<rect width="9" height="9" fill="#{red}{green}0"/>'
        for red in digits
        for green in digits
    }
    write_icons(tmp_path / "icons", {"one": icons, "two": icons})
    monkeypatch.chdir(tmp_path)
    few = ("data.sources.1.entries=600", "data.held_out=0.3", "codec_training.steps=2")
    start = "codec_training.quantizer_start_step=1"
    variant = 'study.variants=[{name = "dense", model = {groups = "dense"}}]'
    succeeds("study", READY / "icons.toml", *SMALL, *few, start, variant, "--processes=1")
    data = json.loads(succeeds("data", "inspect", "runs/study/icons_data", "--json"))
    assert data["sources"]["icons"]["documents"] == len(icons)  # each once
