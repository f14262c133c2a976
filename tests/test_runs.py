"""Run folders: where things lie, and what is said when they do not."""

import json

import pytest

from moma.errors import UserError
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


def test_the_folder_is_laid_out_as_promised(tmp_path):
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


def test_copying_again_brings_the_newer_state(tmp_path):
    source, target = make_tokenizers(tmp_path / "a"), Tokenizers(tmp_path / "b")
    source.copy_to(target)
    (source.codec / "config.json").write_text("newer")
    source.copy_to(target)
    assert contents(tmp_path / "b")["codec/config.json"] == "newer"


def test_a_folder_is_a_run_if_it_has_a_recipe(tmp_path):
    run = Run(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=r"not a run folder.*run `moma train`"):
            run.require()
        # An unfinished recipe does not make a run.
        run.recipe.with_suffix(".partial").write_text("")
    run.recipe.write_text("")
    assert run.require() is run


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", r"nowhere: there is no such folder; name one that `moma train` wrote"),
        ("mine.toml", r"mine\.toml: is a file, not a run folder; this recipe's is runs/mine"),
        ("bare.toml", r"bare\.toml: is a file, not a run folder; name one that `moma train`"),
        ("weights", r"weights: is a file, not a run folder; name one that `moma train`"),
        ("notes.txt", r"notes\.txt: is a file, not a run folder; name one that `moma train`"),
        ("many", r"many: not a run folder .*; \S+/many/a is one"),
    ],
)
def test_what_is_no_run_is_told_apart(tmp_path, name, told):
    (tmp_path / "mine.toml").write_text('run = "runs/mine"\n')
    (tmp_path / "bare.toml").write_text("seed = 1\n")
    (tmp_path / "weights").write_text('run = "a file of weights is not read for a hint"')
    (tmp_path / "notes.txt").write_text("no recipe")
    (tmp_path / "many/a").mkdir(parents=True)
    (tmp_path / "many/a/recipe.toml").touch()
    with pytest.raises(UserError, match=told):
        Run(tmp_path / name).require()


def test_metrics_are_read_in_order(tmp_path):
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1e-9}]
    Run(tmp_path).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Run(tmp_path).read_metrics() == rows


def test_metrics_without_rows_are_empty(tmp_path):
    Run(tmp_path).metrics.write_text("")
    assert Run(tmp_path).read_metrics() == []


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read"):
        Run(tmp_path).read_metrics()


@pytest.mark.parametrize("broken", ["{", '{"step": 2', "step 2"])
def test_a_broken_row_is_named(tmp_path, broken):
    Run(tmp_path).metrics.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(
        UserError, match=r"metrics\.jsonl, row 2: not JSON \([^:]+: character \d+\)$"
    ):
        Run(tmp_path).read_metrics()
