"""What the verbs write into a user's folder is not read as a source afterwards."""

import pytest

from moma.data.outputs import exclude_outputs
from moma.demo.run import run_demo
from moma.study.page import Page
from tests.command_line import succeeds

VERBS = {
    "inspect": ["data", "inspect", "{trained}/data", "--out", "{out}"],
    "inspect document": [
        *["data", "inspect", "{trained}/data", "--source", "captions"],
        *["--document", "0", "--out", "{out}"],
    ],
    "train-text": [
        *["tokenizer", "train-text", "{trained}/words.txt", "--out", "{out}"],
        *["text_tokenizer.vocabulary_size=300", "codec.codebook_size=16"],
    ],
    "train-image": ["tokenizer", "train-image", "{trained}/recipe.toml", "--out", "{out}"],
    "show": [
        *["tokenizer", "show", "{trained}/data", "--image", "{trained}/images/0.png"],
        *["--out", "{out}/shown.png"],
    ],
    "generate": [
        "generate",
        "{trained}/run",
        "--prompt",
        "red",
        "--mode",
        "image",
        "--out",
        "{out}",
    ],
}


def files_read(folder):
    names = exclude_outputs(folder, [path.name for path in folder.iterdir()])
    return [name for name in names if not name.startswith(".")]


@pytest.mark.parametrize("verb", VERBS)
def test_written_files_are_marked(trained, tmp_path, verb):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.txt").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "new"):
        succeeds(*[word.format(trained=trained, out=out) for word in VERBS[verb]])
        assert len(list(out.iterdir())) > 1
    assert files_read(tmp_path) == ["mine"]
    assert files_read(tmp_path / "mine") == ["mine.txt"]


def test_a_report_is_marked(tmp_path):
    (tmp_path / "mine.html").touch()
    Page("title", "introduction").write(tmp_path / "report.html")
    assert files_read(tmp_path) == ["mine.html"]


def test_the_demo_marks_its_folder_before_it_writes(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moma.demo.run.prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", [], quiet=True)
    assert (tmp_path / "demo/minutes.json").exists()
    assert files_read(tmp_path) == []
