"""Run folders: paths, manifests, tokenizers and logs."""

import json

import pytest

from moma.errors import UserError
from moma.recipe import Config
from moma.runs import Run, Tokenizers


def make_tokenizers(folder):
    tokenizers = Tokenizers(folder)
    tokenizers.codec.mkdir(parents=True)
    tokenizers.text.write_text("text")
    tokenizers.vocabulary.write_text("vocabulary")
    (tokenizers.codec / "config.json").write_text("codec")
    return tokenizers


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_paths_in_a_run_folder(tmp_path):
    run = Run(tmp_path)
    assert run.recipe == tmp_path / "recipe.toml"
    assert run.metrics == tmp_path / "metrics.jsonl"
    assert run.checkpoints == tmp_path / "checkpoints"
    assert run.tokenizers.text == tmp_path / "tokenizer.json"
    assert run.tokenizers.vocabulary == tmp_path / "vocabulary.json"
    assert run.tokenizers.codec == tmp_path / "codec"


def test_copied_tokenizers_are_complete(tmp_path):
    source = make_tokenizers(tmp_path / "a")
    (tmp_path / "a" / "other.txt").write_text("stays")
    source.copy_to(Tokenizers(tmp_path / "new" / "b"))
    assert contents(tmp_path / "new" / "b") == {
        "tokenizer.json": "text",
        "vocabulary.json": "vocabulary",
        "codec/config.json": "codec",
    }


def test_copying_again_replaces_older_files(tmp_path):
    source, target = make_tokenizers(tmp_path / "a"), Tokenizers(tmp_path / "b")
    source.copy_to(target)
    (source.codec / "config.json").write_text("newer")
    source.copy_to(target)
    assert contents(tmp_path / "b")["codec/config.json"] == "newer"


def make_run(folder, data):
    class Recipe(Config):
        data: dict[str, str]
        seed: int = 0

    run = Run(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(data={"path": str(data.path)})
    run.create(recipe, data)
    run.copy_tokenizers(data)
    return run, recipe


def test_only_a_manifest_makes_a_folder_a_run(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text("# mine")
    run.manifest.with_name("run.json.writing").write_text("{}")
    with pytest.raises(UserError, match=r"not a run folder.*; name one that `moma train` wrote"):
        run.require()
    run, recipe = make_run(run.path, make_tokenizers(tmp_path / "data"))
    assert run.require() is run
    assert run.read_recipe(type(recipe)) == recipe


def test_a_recipe_of_the_user_is_not_replaced(tmp_path):
    data = make_tokenizers(tmp_path / "data")
    (tmp_path / "run").mkdir()
    mine = tmp_path / "run" / "recipe.toml"
    mine.write_text("# my notes\n")
    run, recipe = make_run(tmp_path / "run", data)
    assert mine.read_text() == "# my notes\n" and run.recipe.name == "resolved.toml"
    changed = recipe.model_copy(update={"seed": 7})
    run.update_recipe(changed)
    assert "seed = 7" in run.recipe.read_text() and mine.read_text() == "# my notes\n"
    assert run.read_recipe(type(recipe)) == changed
    # An edited file is the user's, too.
    run.recipe.write_text(run.recipe.read_text() + "# edited\n")
    run.update_recipe(recipe)
    assert "# edited" in (run.path / "resolved.toml").read_text()
    assert run.read_recipe(type(recipe)) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"kind": "moma run", "format": 2}', "has format 2"),
        ('{"kind": "moma run", "format": 1, "recipe": []}', "damaged"),
        ('{"mine": 1}', "not a run folder"),
        ("[]", "not a run folder"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_reported(tmp_path, content, message):
    Run(tmp_path).manifest.write_text(content)
    with pytest.raises(UserError, match=message):
        Run(tmp_path).require()


@pytest.mark.parametrize("name", ["photo.png", "run.json", "checkpoints/step-1", "tokenizer.json"])
def test_a_folder_with_other_files_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"holds other files \({name.split('/')[0]}\)"):
        Run(tmp_path).require_free()


def test_recipes_and_notes_may_be_in_a_new_run_folder(tmp_path):
    for name in ("recipe.toml", "notes.md", "slurm-1.out", ".hidden"):
        (tmp_path / name).write_text("")
    Run(tmp_path).require_free()
    Run(tmp_path / "new").require_free()
    (tmp_path / "resolved.toml").write_text("")
    with pytest.raises(UserError, match="rename one"):
        Run(tmp_path).require_free()
    with pytest.raises(UserError, match="is a file"):
        Run(tmp_path / "notes.md").require_free()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocabulary.json", "codec/config.json"])
def test_missing_tokenizers_are_copied_again(tmp_path, name):
    data = make_tokenizers(tmp_path / "data")
    run, _ = make_run(tmp_path / "run", data)
    (run.path / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; `moma train .*recipe.toml` copies"):
        run.require_tokenizers()
    run.copy_tokenizers(data)
    assert run.require_tokenizers().path == run.path
    assert (run.path / name).read_text() == (data.path / name).read_text()
    (run.path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: has changed since the run began"):
        run.copy_tokenizers(data)
    (run.path / name).unlink()
    (data.path / name).write_text("other")
    with pytest.raises(UserError, match=f"{name}: is missing, and .*not the file"):
        run.copy_tokenizers(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"nowhere: there is no such folder; name one that `moma train` wrote"),
        (
            "mine.toml",
            r"mine\.toml: is a file, not a run folder; this recipe's run folder is runs/mine",
        ),
        ("bare.toml", r"bare\.toml: is a file, not a run folder; name one that `moma train`"),
        ("weights", r"weights: is a file, not a run folder; name one that `moma train`"),
        ("notes.txt", r"notes\.txt: is a file, not a run folder; name one that `moma train`"),
        ("many", r"many: not a run folder .*; \S+/many/a is one"),
    ],
)
def test_paths_that_are_not_runs_have_different_messages(tmp_path, name, message):
    (tmp_path / "mine.toml").write_text('run = "runs/mine"\n')
    (tmp_path / "bare.toml").write_text("seed = 1\n")
    (tmp_path / "weights").write_text('run = "a file of weights is not read for a hint"')
    (tmp_path / "notes.txt").write_text("no recipe")
    (tmp_path / "many/a").mkdir(parents=True)
    (tmp_path / "many/a/run.json").touch()
    with pytest.raises(UserError, match=message):
        Run(tmp_path / name).require()


def test_metrics_are_read_in_order(tmp_path):
    records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1e-9}]
    Run(tmp_path).metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert Run(tmp_path).read_metrics() == records


def test_an_empty_log_has_no_records(tmp_path):
    Run(tmp_path).metrics.write_text("")
    assert Run(tmp_path).read_metrics() == []


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read"):
        Run(tmp_path).read_metrics()


@pytest.mark.parametrize("broken", ["{", '{"step": 2', "step 2"])
def test_a_damaged_record_is_named(tmp_path, broken):
    Run(tmp_path).metrics.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(
        UserError, match=r"metrics\.jsonl, record 2: not valid JSON \([^:]+: character \d+\); re"
    ):
        Run(tmp_path).read_metrics()


@pytest.mark.parametrize("record", ["[]", "{}", '{"step": "2"}'])
def test_a_record_without_a_step_is_named(tmp_path, record):
    run = Run(tmp_path)
    run.metrics.write_text(f'{{"step": 1}}\n{record}\n')
    with pytest.raises(UserError, match=r"record 2: not an object with a step"):
        run.read_metrics()
    with pytest.raises(UserError, match=r"record 2: not an object with a step"):
        run.last_metric()
