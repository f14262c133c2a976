"""Recipe changes allowed on resume; the recipe of a run survives a power cut."""

from pathlib import Path

import pytest
import torch

from moma import files
from moma.errors import UserError
from moma.recipe import read_recipe
from moma.runs import Run
from moma.runtime.world import World
from moma.train.changes import refuse_other_recipe, write_run_folder
from moma.train.loop import train
from moma.train.recipe import Recipe

WORLD = World(torch.device("cpu"))


def test_the_recipe_is_synced_before_a_run_starts(tiny, tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    run = Run(tmp_path / "run")
    recipe = tiny.model_copy(update={"run": run.path})
    write_run_folder(run, recipe, {})
    assert synced[0] == run.path  # after the manifest was renamed
    assert run.read_recipe(Recipe) == read_recipe(Recipe, run.recipe) == recipe
    assert {path.suffix for path in run.path.glob("*.*")} == {".toml", ".json"}


@pytest.mark.parametrize(
    ("section", "change", "is_allowed"),
    [
        ("engine", {"global_batch_size": "grows"}, True),
        ("engine", {"reduce": "bf16"}, False),
        ("data", {"remote": "s3://bucket/folder"}, True),
        ("data", {"cache_bytes": 1}, True),
        ("data", {"held_out": 0.3}, False),
        ("pretrain", {"gradient_accumulation_steps": 3}, True),
        ("pretrain", {"z_loss": 0.5}, False),
        ("upcycle", {"z_loss": 0.5}, True),
    ],
)
def test_changes_allowed_on_resume(tiny, tmp_path, section, change, is_allowed):
    run = Run(tmp_path / "run")
    write_run_folder(run, tiny, {})
    changed = tiny.model_copy(update={section: getattr(tiny, section).model_copy(update=change)})
    (key,) = change
    if is_allowed:
        (message,) = refuse_other_recipe(run, changed)
        assert message.startswith(f"{section}.{key}: ")
    else:
        with pytest.raises(UserError, match=rf"another recipe \({section}\.{key}: "):
            refuse_other_recipe(run, changed)


def test_a_run_reached_through_a_link_keeps_its_path(tiny, tmp_path):
    """A study may link to the run of another one; in a moved folder it has the new path."""
    own, link, moved = (tiny.model_copy(update={"run": tmp_path / name}) for name in "abc")
    write_run_folder(Run(own.run), own, {})
    link.run.symlink_to("a")
    before = [path.read_bytes() for path in sorted(own.run.glob("*.*"))]
    write_run_folder(Run(link.run), link, {})
    assert [path.read_bytes() for path in sorted(own.run.glob("*.*"))] == before
    own.run.rename(moved.run)
    write_run_folder(Run(moved.run), moved, {})
    assert Run(moved.run).read_recipe(Recipe) == moved


def test_other_sources_need_another_run(tiny, tmp_path):
    run = Run(tmp_path / "run")
    write_run_folder(run, tiny, {})
    data = tiny.data.model_copy(update={"sources": tiny.data.sources[:1]})
    with pytest.raises(UserError, match=r"keeps the sources that it began with: .* with run=…"):
        refuse_other_recipe(run, tiny.model_copy(update={"data": data}))


def test_routers_in_the_folder_of_their_run_are_refused(tiny, tmp_path):
    run = Run(tmp_path / "my run")
    write_run_folder(run, tiny, {})
    routers = tiny.model_copy(update={"stage": "aux_router", "from_": run.path})
    with pytest.raises(UserError, match=rf"stage: .*own: 'run={run.path}/aux_router'$") as caught:
        refuse_other_recipe(run, routers)
    assert "delete" not in str(caught.value)


def test_allowed_changes_are_reported_and_others_refused(tiny, tmp_path, capsys):
    recipe = tiny.model_copy(update={"run": tmp_path / "run"})
    train(recipe, WORLD, quiet=True)
    stage = tiny.pretrain.model_copy(update={"keep_checkpoints": 1, "log_every": 4})
    changed = recipe.model_copy(update={"pretrain": stage})
    train(changed, WORLD, quiet=True)
    errors = capsys.readouterr().err
    assert "pretrain.keep_checkpoints: 2 → 1" in errors and "pretrain.log_every: 2 → 4" in errors
    assert read_recipe(Recipe, tmp_path / "run" / "recipe.toml") == changed
    stage = tiny.pretrain.model_copy(update={"steps": 9, "z_loss": 0.5})
    with pytest.raises(UserError, match=r"steps: 8 → 9; pretrain\.z_loss: 1e-05 → 0\.5"):
        train(recipe.model_copy(update={"pretrain": stage}), WORLD, quiet=True)
