"""Studies: which runs a file describes, who runs them, what is measured and reported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL, Batch
from moma.data.encode.prepare import prepare
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.files import lock_folder
from moma.model.transformer import no_head
from moma.runtime.world import World
from moma.study.grid import Study, StudyRun, read_study, run_unfinished
from moma.study.measures import measure_held_out, measure_routing
from moma.study.processes import run_study, visible_gpus
from moma.study.report import score_maps, write_report
from moma.study.results import estimate, study_tables, summarize
from moma.study.scaling import PowerLaw
from moma.study.speedup import speedup, training_seconds
from moma.train.recipe import Recipe
from moma.train.restore import load_run
from moma.train.step import run_model, to_device
from moma.vocabulary import IMAGE, TEXT
from tests import factories
from tests.command_line import moma, refuses

WORLD = World(torch.device("cpu"))
VARIANTS = [
    {"name": "plain", "model": {"groups": "dense"}},
    {
        "name": "deep",
        "chain": [
            {"name": "model", "model": {"groups": "mod_moe_2t2i"}},
            {"stage": "aux_router"},
        ],
    },
]


ROUTERS = {"stage": "aux_router", "from": "elsewhere"}


def write_study(tiny, folder: Path, **changes) -> Path:
    study = {"seeds": [0, 1], "measures": ["held_out", "routing"], "variants": VARIANTS}
    return factories.write_study(tiny, folder, study | changes)


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory) -> Study:
    """A finished study of two variants and two seeds; do not modify it."""
    study = read_study(write_study(tiny, tmp_path_factory.mktemp("study")))
    run_unfinished(study.runs, evaluate, WORLD)
    return study


def test_every_variant_has_a_run_for_each_seed(tiny, tmp_path):
    study = read_study(write_study(tiny, tmp_path), ["pretrain.steps=2", "study.batches=1"])
    assert [run.name for run in study.runs] == ["plain-0", "deep-0", "plain-1", "deep-1"]
    assert study.config.batches == 1
    for run in study.runs:
        first = run.stages[0]
        assert isinstance(first, Recipe)
        assert (first.seed, first.pretrain.steps) == (run.seed, 2)
        folder = tmp_path / "study" / run.name
        assert run.run.path == (folder if run.variant == "plain" else folder / "model")
    recipes = [stage for stage in study.runs[1].stages if isinstance(stage, Recipe)]
    assert [each.stage for each in recipes] == ["pretrain", "aux_router"]
    assert recipes[1].model.groups == "mod_moe_2t2i"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": []}, "write one [[study.variants]] for each"),
        ({"variants": [{"model": {}}]}, "variant 1: 'name'"),
        ({"variants": [{"name": "a", "modle": {}}]}, "variant 1: unknown key 'modle'"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants have runs named a-0"),
        ({"variants": [{"name": "a/b"}]}, "variant 1: 'name'"),
        ({"seeds": []}, "study.seeds"),
        ({"seeds": [1, 1]}, "1 is given twice"),
        ({"measures": ["speed"]}, "there is no measure 'speed'; use held_out, routing"),
        ({"batches": -1}, "batches"),
        ({"steps": 3}, "unknown key 'steps'"),
        ({"variants": [{"name": "a", "seed": 7}]}, "'seed' is set by the study"),
        ({"variants": [{"name": "a", "run": "b"}]}, "'run' is set by the study"),
        ({"variants": [{"name": "a", "chain": [{"seed": 7}]}]}, "'seed' is set by the study"),
        ({"variants": [{"name": "a", "chain": [ROUTERS]}]}, "trains no model"),
        ({"variants": [{"name": "a", "chain": [{}, ROUTERS]}]}, "the folder of several runs"),
        ({"variants": [{"name": "a"}, {"name": "b", "data": {"workers": 2}}]}, "another [data]"),
        (
            {
                "variants": [{"name": "a"}, {"name": "b", "data": {"micro_batch_size": 9}}],
                "batches": 1,
            },
            "may differ with study.batches=0",
        ),
        ({"measures": ["routing"], "variants": [{"name": "a", "curve": "c"}]}, "needs 'held_out'"),
    ],
)
def test_wrong_studies_are_refused(tiny, tmp_path, changes, message):
    with pytest.raises(UserError) as refused:
        read_study(write_study(tiny, tmp_path, **changes))
    assert "study.toml" in str(refused.value)
    key = message.removeprefix("study.")
    assert key in str(refused.value)


@pytest.mark.parametrize("key", ["seed=5", "chain.0.pretrain.steps=2"])
def test_overrides_that_a_study_cannot_apply_are_refused(tiny, tmp_path, key):
    with pytest.raises(UserError, match=r"a study has study\.seeds, and chains of variants"):
        read_study(write_study(tiny, tmp_path), [key])


def test_other_seeds_need_no_other_data(tiny, tmp_path):
    study = read_study(write_study(tiny, tmp_path, seeds=[1, 2]))
    assert {run.seed for run in study.runs} == {1, 2}
    before = (tiny.data.path / "provenance.json").read_bytes()
    prepare(study.recipe, WORLD.device, quiet=True)
    assert (tiny.data.path / "provenance.json").read_bytes() == before


def test_a_recipe_is_no_study(tiny, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        tomli_w.dumps(tiny.model_dump(mode="json", by_alias=True, exclude_none=True))
    )
    assert "is no study; write a [study] table" in refuses("study", tmp_path / "recipe.toml")


def test_a_run_that_another_process_holds_is_left_to_it(tiny, tmp_path):
    study = read_study(
        write_study(tiny, tmp_path), ["pretrain.steps=2", "pretrain.checkpoint_every=2"]
    )
    held, other = study.runs[0], study.runs[2]
    held.result.parent.mkdir(parents=True)
    begun: list[StudyRun] = []
    with lock_folder(held.result.parent, 0):
        run_unfinished([held, other], evaluate, WORLD, begun.append)
    assert begun == [other] and held.read_result() is None and other.read_result() is not None


def test_finished_runs_are_not_repeated_and_others_are_measured_again(study, tmp_path):
    begun: list[StudyRun] = []
    run_unfinished(study.runs, evaluate, WORLD, begun.append)
    assert not begun
    folder = tmp_path / "study"
    shutil.copytree(study.path, folder)
    copied = [
        run for run in study.runs if (folder / "results" / run.name / "result.json").is_file()
    ]
    assert len(copied) == 4
    for change in ("study.batches=1", "pretrain.steps=10"):
        more = read_study(study.path.parent / "study.toml", [change])
        assert [run.read_result() for run in more.runs] == [None] * 4


def test_a_run_of_another_recipe_is_refused_before_anything_is_trained(study):
    other = read_study(study.path.parent / "study.toml", ["model.dim=32"])
    with pytest.raises(UserError, match="plain-0: holds a run of another recipe"):
        run_study(other, 1, quiet=True)


def test_a_foreign_result_is_refused(study, tmp_path):
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(UserError, match="not written by moma"):
        replace(study.runs[0], result=tmp_path / "result.json").read_result()


def test_a_run_that_cannot_be_trained_does_not_stop_the_others(tiny, tmp_path, undrawn):
    variants = [
        {"name": "missing", "stage": "upcycle", "from": str(tmp_path / "nothing")},
        {"name": "plain", "model": {"groups": "dense"}},
    ]
    file = write_study(tiny, tmp_path, variants=variants, measures=["held_out"], seeds=[0])
    outcome = moma("study", file, "pretrain.steps=4", "--processes", "1", "--json")
    assert outcome.code == 2 and "1 of 2 runs failed; missing-0: " in outcome.err
    assert json.loads(outcome.out)["variants"].keys() == {"plain"}


def test_processes_take_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5,7")
    assert visible_gpus() == ["GPU-5", "7"]


def test_held_out_losses_are_those_of_evaluate_on_the_same_micro_batches(study):
    for run in study.runs[:2]:
        model, recipe = load_run(run.run)
        found = measure_held_out(run.run)
        assert found == run.read_result()["measures"]["held_out"]
        routings = ["choice", "threshold", "auxiliary"]
        assert [*found] == (["all"] if run.variant == "plain" else routings)
        for name in found:
            routing = "choice" if name == "all" else name
            expected = evaluate(model, recipe.model_copy(update={"seed": 0}), routing, True)  # type: ignore[arg-type]
            assert found[name] == pytest.approx({key: expected[key] for key in found[name]})
    assert measure_held_out(study.runs[0].run, 1) != measure_held_out(study.runs[0].run)


def held_out(model, recipe) -> list[Batch]:
    return list(Batches(recipe.data, model.vocabulary, 0, split="held_out"))


def parts_of(model, batch: Batch) -> dict[str, Batch]:
    """The micro-batch with padding instead of documents with images, and of text, by a loop."""
    vocabulary = model.vocabulary
    names = ("tokens_BS", "labels_BS", "document_ids_BS")
    padding = (vocabulary.padding, NO_LABEL, -1)
    parts = {}
    for part in ("text", "image"):
        arrays = [getattr(batch, name).copy() for name in names]
        for row, column in np.ndindex(*batch.tokens_BS.shape):
            own = batch.document_ids_BS[row] == batch.document_ids_BS[row, column]
            is_pure_text = vocabulary.begin_image not in batch.tokens_BS[row][own]
            is_code = vocabulary.code_of_id[batch.tokens_BS[row, column]] >= 0
            if not (is_pure_text if part == "text" else is_code):
                for array, value in zip(arrays, padding, strict=True):
                    array[row, column] = value
        parts[part] = replace(batch, **dict(zip(names, arrays, strict=True)))
    return parts


def test_agreement_and_experts_per_token_equal_slow_counts(study):
    run = study.runs[1].run
    model, recipe = load_run(run)
    found = measure_routing(run)
    assert found.keys() == {"losses", "agreement", "taken"}
    rates = {"flips 0.25%", "flips 0.50%", "flips 1.00%", "flips 5.00%"}
    assert found["losses"].keys() == {"choice depth", "choice experts", *rates}
    agreed: dict[tuple[int, int], list[bool]] = {}
    taken: dict[str, list[float]] = {}
    with torch.no_grad():
        for batch in held_out(model, recipe):
            on_device = to_device(batch, torch.device("cpu"))
            modality = model.modality_of_id[on_device.tokens_BS].flatten().tolist()
            choice = model.named_routing("choice", record_auxiliary=True)
            records = run_model(model, on_device, choice, no_head).routers
            for index, (record, router) in enumerate(zip(records, model.routers(), strict=True)):
                for n, is_eligible in enumerate(record.eligible_N.tolist()):
                    for e in range(record.logits_NE.shape[1] if is_eligible else 0):
                        above = record.logits_NE[n, e] > router.threshold_E[e]
                        same = bool(above) == bool(record.selected_NE[n, e])
                        agreed.setdefault((index, modality[n]), []).append(same)
            causal = model.named_routing("threshold", record_selection=True)
            for part, kept in (("mixed", batch), *parts_of(model, batch).items()):
                kept_on_device = to_device(kept, torch.device("cpu"))
                for record in run_model(model, kept_on_device, causal, no_head).routers:
                    if record.kind == "depth":
                        taken.setdefault(part, []).extend(
                            record.selected_NE[record.eligible_N].flatten().tolist()
                        )
    shares = {key: sum(same) / len(same) for key, same in agreed.items()}
    names = {0: "0.text text", 1: "0.image image"}
    for number, name in names.items():
        modality_of = TEXT if number == 0 else IMAGE
        assert found["agreement"][name]["threshold"] == pytest.approx(shares[number, modality_of])
    depth = [index for index, r in enumerate(model.routers()) if r.out_features == 1]
    for modality_of, name in ((TEXT, "0.depth text"), (IMAGE, "0.depth image")):
        expected = shares[depth[0], modality_of]
        assert found["agreement"][name]["threshold"] == pytest.approx(expected)
    assert taken.keys() == found["taken"].keys() == {"mixed", "text", "image"}
    for part, values in taken.items():
        assert found["taken"][part]["depth"] == pytest.approx(sum(values) / len(values))
    assert len({*map(len, taken.values())}) == 3
    assert "image" not in found["taken"]["text"] and "text" not in found["taken"]["image"]


def test_without_routers_there_is_no_causal_routing_to_measure(study):
    assert measure_routing(study.runs[0].run) == {}


def test_the_summary_has_means_intervals_and_speedups_of_the_same_seed(study):
    summary = summarize(study)
    found = summary["variants"]
    assert summary["scaling"] == {}
    results = {run.name: run.read_result() for run in study.runs}
    for variant in ("plain", "deep"):
        by = "all" if variant == "plain" else "threshold"
        figure = found[variant]["measures"][f"held_out/{by}/loss"]
        values = [
            results[f"{variant}-{seed}"]["measures"]["held_out"][by]["loss"] for seed in (0, 1)
        ]
        assert figure["values"] == values and figure["mean"] == pytest.approx(sum(values) / 2)
        # With two seeds the quantile of Student's t is 12.706.
        assert figure["half_width"] == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, 1e-4)
    assert "speedup" not in found["plain"]
    metrics = {run.name: run.read_metrics() for run in study.runs}
    for run in study.runs:
        seconds, before = 0.0, 0
        for record in metrics[run.name]:
            seconds += (record["tokens"] - before) / record["tokens_per_second"]
            before = record["tokens"]
        assert found[run.variant]["seconds"][run.seed] == pytest.approx(seconds)
    expected = [
        speedup(metrics[f"plain-{seed}"], metrics[f"deep-{seed}"], "loss") for seed in (0, 1)
    ]
    assert found["deep"]["speedup"]["flops"]["all"]["values"] == expected


def test_sizes_of_a_curve_are_fitted_and_the_largest_is_predicted(study, tmp_path, tiny, undrawn):
    """With results as a law would give them."""
    law = PowerLaw(offset=2.0, scale=1.0, exponent=0.3, unit=1e6)
    variants = [
        {"name": f"{curve}-{size}", "curve": curve, "pretrain": {"steps": 4}}
        for curve in ("a", "b")
        for size in (1, 2, 3, 4)
    ]
    changes = {"variants": variants, "measures": ["held_out"], "seeds": [0, 1, 2]}
    scaled = read_study(write_study(tiny, tmp_path, **changes))
    measured, metrics = study.runs[0].read_result(), study.runs[0].read_metrics()
    assert measured is not None
    for run in scaled.runs:
        size, lower = float(run.variant[-1]), 0.2 * (run.variant[0] == "b")
        loss = float(law(1e6 * 4**size)) - lower
        losses = dict.fromkeys(("loss", "loss_text", "loss_image"), loss)
        result = measured | {"flops": 1e6 * 4**size, "fingerprint": run.fingerprint}
        result |= {"documents": run.variant[0]}
        run.result.parent.mkdir(parents=True)
        run.result.write_text(json.dumps(result | {"measures": {"held_out": {"all": losses}}}))
        run.run.path.mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in metrics]
        (run.run.path / "metrics.jsonl").write_text("".join(lines))
    summary = summarize(scaled)
    fit = summary["scaling"]["a"]["loss_text"]
    assert fit["exponent"] == pytest.approx([0.3] * 3, rel=1e-2)
    assert fit["prediction"]["measured"] == pytest.approx(float(law(1e6 * 4**4)))
    assert summary["crossings"]["loss"]["a and b"]["share"] == 0
    titles = [table.title for table in study_tables(summary)]
    assert {"Scaling of the held-out loss", "Where scaling curves cross"} <= set(titles)
    assert fit["points"]["flops"] == [1e6 * 4**size for _ in range(3) for size in (1, 2, 3, 4)]
    drawn = fit["law"]
    for name in ("loss", "low", "high"):
        assert drawn[name] == pytest.approx(law(np.array(drawn["flops"])), rel=1e-3)
    page = write_report(scaled, summary).read_text()
    assert "Held-out loss over training FLOPs" in page and page.count("data:image/png") == 9
    assert "b-4-2: measured on other documents than a-1-0" in summary["warning"]
    assert f"<p>{summary['warning']}.</p>" in page
    assert f"\n\n{summary['warning']}.\n\n" in (scaled.path / "report.md").read_text()


def test_suites_have_a_table_and_scores_a_map():
    def figure(value):
        return estimate([value])._asdict()

    measures = {
        "perplexity/all/perplexity": figure(9.0),
        "perplexity/words/perplexity": figure(None),
        "scores/0.text text/0": figure(0.25),
    }
    variants = {
        "plain": {"runs": ["r/plain-0"], "seeds": [0], "seconds": [1234.56], "measures": measures}
    }
    tables = study_tables({"variants": variants, "scaling": {}, "crossings": {}})
    assert [table.title for table in tables] == ["Suite: perplexity", "Runs"]
    assert tables[0].head == ("variant", "source", "perplexity")
    assert tables[0].rows == [("plain", "all", "9"), ("plain", "words", "–")]
    assert tables[1].rows == [("plain", "r/plain-0", "1,234.6")]
    (plot,) = score_maps(variants)
    assert plot.axes[0].get_title() == "plain, seed 0"


def test_the_mean_has_the_digits_of_its_interval():
    found = estimate([4.73700, 4.73712, 4.73724])
    assert str(found) == "4.73712 ± 0.00030"
    assert str(estimate([2.0])) == "2" and str(estimate([1.0, None])) == "– (1 of 2)"


def test_the_report_names_every_run(study, tmp_path):
    page = write_report(study, summarize(study)).read_text()
    text = (study.path / "report.md").read_text()
    assert "plain is the baseline. Figures and tables are of the runs listed last.</p>" in page
    for run in study.runs:
        assert str(run.run.path) in page
        seconds = training_seconds(run.read_metrics())
        assert f"| {run.variant} | {run.run.path} | {seconds:,.1f} |" in text
    assert page.count("data:image/png") == 6  # three losses over FLOPs, and over time
    assert json.loads((study.path / "result.json").read_text())["variants"].keys() == {
        "plain",
        "deep",
    }


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_runs_a_study_in_processes(tiny, tmp_path, processes):
    variants = [{"name": "plain", "model": {"groups": "dense"}}]
    file = write_study(tiny, tmp_path, variants=variants, measures=["held_out"])
    outcome = moma("study", file, "pretrain.steps=4", "--processes", processes, "--json")
    assert outcome.code == 0, outcome.err
    figure = json.loads(outcome.out)["variants"]["plain"]["measures"]["held_out/all/loss"]
    assert len(figure["values"]) == 2
    assert (tmp_path / "study" / "report.html").is_file()
