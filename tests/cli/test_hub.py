"""`moma import` and `moma export`: weights of `transformers`, imported, used and exported."""

import pytest
from PIL import Image

from tests.command_line import moma, refuses, succeeds
from tests.hub.chameleon_port import assert_same_weights, random_port, save

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(random_port(), tmp_path_factory.mktemp("cli_hub") / "chameleon")


@pytest.fixture(scope="module")
def run(folder):
    out = folder.parent / "run"
    outcome = moma("import", folder, out)
    assert outcome.code == 0 and outcome.out == f"imported {out}\n"
    assert "no decoder" in outcome.err
    return out


def test_an_imported_run_reads_an_image_and_writes_text(run, tmp_path):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "red.png")
    arguments = ("--image", tmp_path / "red.png", "--prompt", "what", "--mode", "text")
    assert succeeds("generate", run, *arguments, "--seed", 1)
    assert "no decoder" in refuses("generate", run, "--prompt", "red", "--mode", "image")


def test_an_imported_run_can_be_exported(folder, run, tmp_path):
    out = tmp_path / "again"
    assert succeeds("export", run, out, "--format", "chameleon") == f"exported {out}\n"
    assert_same_weights(folder, out)


def test_an_imported_run_has_no_data_for_evaluation(run):
    assert "moma prepare" in refuses("evaluate", run)


def test_wrong_folders_are_refused_with_one_message(run, folder, tmp_path):
    new = tmp_path / "new"
    assert "config.json" in refuses("import", tmp_path, new)
    assert "not a run" in refuses("export", tmp_path, new)
    assert "exists already" in refuses("export", run, tmp_path)
    assert "model_type" in refuses("import", folder, new, "--format", "moma")
    assert "--tokenizers: no effect" in refuses(
        "import", folder, new, "--format", "moma", "--tokenizers", run
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is 'llama'" in refuses("import", tmp_path, new)
    assert not new.exists()


def test_a_run_is_exported_and_imported_in_momas_format(trained, tmp_path):
    run, out, back = trained / "run", tmp_path / "out", tmp_path / "back"
    assert succeeds("export", run, out) == f"exported {out}\n"
    assert succeeds("import", out, back, "--recipe", trained / "recipe.toml")
    prompt = ("--prompt", "box", "--mode", "text", "--temperature", 0)
    assert succeeds("generate", back, *prompt) == succeeds("generate", run, *prompt)
