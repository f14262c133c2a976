"""moma's own format: what is exported, and that it is imported unchanged."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moma.errors import UserError
from moma.hub.moma_format import export_moma, import_moma
from moma.model.transformer import Transformer
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in, is_weights_only, stored_weights
from moma.train.restore import load_run
from moma.train.thresholds import write_thresholds
from tests.factories import replace_weights


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory) -> Path:
    """A folder in moma's format; not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export_moma(tiny_run, folder) == []
    return folder


@pytest.fixture
def broken(exported, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    shutil.copytree(exported, tmp_path / "broken")
    return tmp_path / "broken"


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    stored = stored_weights(checkpoints_in(run.checkpoints)[-1])
    return stored.read(stored.meta_tensors)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def test_a_run_is_imported_unchanged(tiny_run, exported, tmp_path):
    back = Run(tmp_path / "back")
    assert import_moma(exported, back, file_bytes=10_000) == []
    assert_equal(tensors_of(back), tensors_of(tiny_run))
    assert is_weights_only(checkpoints_in(back.checkpoints)[-1])
    names = tiny_run.tokenizers.file_names()
    assert back.tokenizers.file_names() == names
    for name in names:
        assert (back.path / name).read_bytes() == (tiny_run.path / name).read_bytes(), name
    (model, recipe), (before, own) = load_run(back), load_run(tiny_run)
    assert model.vocabulary == before.vocabulary and recipe.model == own.model
    assert recipe.data == own.data and recipe.from_ is None
    assert model.routing_fingerprint() == before.routing_fingerprint()


def test_large_weights_are_several_files(tiny_run, exported, tmp_path):
    export_moma(tiny_run, tmp_path / "many", file_bytes=20_000)
    files = [load_file(file) for file in (tmp_path / "many").glob("*.safetensors")]
    assert len(files) > 2
    together = {name: value for each in files for name, value in each.items()}
    assert_equal(together, load_file(exported / "model.safetensors"))


def test_thresholds_of_calibration_are_exported(tiny_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(tiny_run.path, run.path)
    model: Transformer = load_run(run)[0]
    router = next(model.routers())
    router.cutoff_means_3E.fill_(0.25)
    write_thresholds(run, checkpoints_in(run.checkpoints)[-1], model)
    export_moma(run, tmp_path / "out")
    import_moma(tmp_path / "out", Run(tmp_path / "back"))
    assert torch.equal(
        next(load_run(Run(tmp_path / "back"))[0].routers()).cutoff_means_3E, router.cutoff_means_3E
    )


def use_former_thresholds(weights: dict[str, torch.Tensor]) -> None:
    """As versions stored them whose thresholds were averaged otherwise."""
    for name in [name for name in weights if name.endswith("cutoff_means_3E")]:
        weights[name.replace("cutoff_means_3E", "cutoffs_3E")] = weights.pop(name)


def test_a_run_of_an_earlier_version_is_exported_once_it_is_calibrated(tiny_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(tiny_run.path, run.path)
    checkpoint = replace_weights(run, use_former_thresholds)
    with pytest.raises(UserError, match=r"thresholds .* are not known.*moma calibrate"):
        export_moma(run, tmp_path / "out")
    write_thresholds(run, checkpoint, load_run(tiny_run)[0])
    export_moma(run, tmp_path / "out")
    import_moma(tmp_path / "out", Run(tmp_path / "back"))
    assert_equal(tensors_of(Run(tmp_path / "back")), tensors_of(tiny_run))


def test_a_folder_of_an_earlier_version_is_refused(broken, tmp_path):
    file = broken / "model.safetensors"
    weights = load_file(file)
    use_former_thresholds(weights)
    save_file(weights, file)
    with pytest.raises(UserError, match=r"missing: .*cutoff_means_3E.*export the run again"):
        import_moma(broken, Run(tmp_path / "run"))


def test_trained_auxiliary_routers_stay_trained(trained, tmp_path):
    run = Run(trained / "run")
    export_moma(run, tmp_path / "out")
    import_moma(tmp_path / "out", Run(tmp_path / "back"))
    models = [load_run(each)[0] for each in (run, Run(tmp_path / "back"))]
    assert models[0].has_auxiliary and models[1].has_auxiliary
    assert_equal(models[0].state_dict(), models[1].state_dict())


def test_the_card_has_the_figures_and_the_recipe(tiny_run, exported):
    card = (exported / "README.md").read_text()
    last = tiny_run.read_metrics()[-1]
    assert f"| training: loss_image | {last['loss_image']:,.4g} |" in card
    assert f"| step | {last['step']} |" in card
    written = tomllib.loads(card.split("```toml\n")[1].split("```")[0])
    assert written == tomllib.loads(tiny_run.recipe.read_text())


def test_held_out_losses_are_in_the_card(tiny_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(tiny_run.path, run.path)
    with run.metrics.open("a") as file:
        losses = {"causal": {"loss": 2.5, "loss_text": None}}
        file.write(json.dumps({"step": 90, "loss": 3.0, "validation": losses}) + "\n")
    export_moma(run, tmp_path / "out")
    assert "held-out, causal routing: loss | 2.5 |" in (tmp_path / "out/README.md").read_text()


def test_without_thresholds_a_run_is_not_exported(tiny_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(tiny_run.path, run.path)
    model = load_run(run)[0]
    for router in model.routers():
        router.cutoff_means_3E.zero_()
    write_thresholds(run, checkpoints_in(run.checkpoints)[-1], model)
    with pytest.raises(UserError, match="moma calibrate"):
        export_moma(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(folder: Path, *path: str, value) -> None:
    """Change a value of a folder's `config.json`."""
    file = folder / "config.json"
    config = values = json.loads(file.read_text())
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "llama", "model_type"),
        (("recipe",), 3, "recipe"),
        (("recipe", "model", "layers"), 2**40, "layers .* at most"),
        (("recipe", "model", "hidden"), 2**40, "hidden .* at most"),
        (("recipe", "model", "dim"), 64, "has shape"),
        (("recipe", "model", "layers"), 1, "unknown"),
        (("recipe", "extends"), "/etc/other.toml", "extends"),
        (("vocabulary", "size"), 2**40, "not a vocabulary"),
        (("vocabulary", "image_codes"), None, "not a vocabulary"),
        (("vocabulary", "surprise"), 1, "not a vocabulary"),
        (("vocabulary", "codes_per_image"), 1, "16 in an image, but"),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(broken, tmp_path, path, value, message):
    edit(broken, *path, value=value)
    with pytest.raises(UserError, match=message):
        import_moma(broken, Run(tmp_path / "run"))
    assert not list(tmp_path.glob("run*"))


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(16)}, folder / "pytorch_model.bin")


def rename_pickle(folder: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(16)}, folder / "model.safetensors")


def write_huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def change_a_type(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, file)


def name_a_file_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def exchange_the_codec(folder: Path) -> None:
    torch.save({}, folder / "codec" / "model.safetensors")


def break_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_by_pickle, "model.safetensors is missing"),
        (rename_pickle, "model.safetensors: cannot read the weights"),
        (write_huge_header, "model.safetensors: cannot read the weights"),
        (cut_off, "model.safetensors: cannot read the weights"),
        (change_a_type, "model.norm.weight is torch.int8"),
        (name_a_file_outside, "outside of the folder"),
        (exchange_the_codec, "codec/model.safetensors: cannot read the weights"),
        (break_the_tokenizer, "tokenizer.json"),
    ],
)
def test_hostile_files_are_refused(broken, tmp_path, change, message):
    change(broken)
    with pytest.raises(UserError, match=message):
        import_moma(broken, Run(tmp_path / "run"))
    assert not list(tmp_path.glob("run*"))


def test_no_folder_is_overwritten(tiny_run, exported, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export_moma(tiny_run, tmp_path)
    with pytest.raises(UserError, match="exists already"):
        import_moma(exported, Run(tmp_path))
    assert not list(tmp_path.iterdir())


def test_results_of_evaluations_are_in_the_card(tiny_run, tmp_path):
    losses, suite = tmp_path / "held out.json", tmp_path / "captions.json"
    losses.write_text(json.dumps({"loss": 2.25, "loss_text": None, "tokens": 1200}))
    row = {"documents": 7, "accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}}
    sources = {"all": row, "text": {"documents": 7, "accuracy": None}}
    values = {"suite": "captions", "routing": "causal", "sources": sources}
    suite.write_text(json.dumps(values))
    export_moma(tiny_run, tmp_path / "out", results=[losses, suite])
    card = (tmp_path / "out/README.md").read_text()
    assert "| held out: loss | 2.25 |" in card and "| held out: tokens | 1,200 |" in card
    assert "| captions: captions, causal routing, all: accuracy | 0.5 (0.25 – 0.75) |" in card
    assert "text: accuracy" not in card
    suite.write_text(json.dumps({"suite": "captions"}))
    with pytest.raises(UserError, match=r"captions\.json: has no results"):
        export_moma(tiny_run, tmp_path / "other", results=[suite])
    assert not (tmp_path / "other").exists()
