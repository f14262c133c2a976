"""What the verbs write into a user's folder is not read as a source afterwards."""

import pytest

from moma.data.outputs import exclude_outputs
from moma.demo.run import run_demo
from moma.study.page import Page
from tests.command_line import moma, refuses, succeeds

VERBS = {
    "inspect": ["data", "inspect", "{trained}/data", "--out", "{out}"],
    "inspect document": [
        *["data", "inspect", "{trained}/data", "--source", "captions"],
        *["--document", "1", "--out", "{out}"],
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


FILES = {
    "report": (["report", "{trained}/run", "--out", "{out}/page.html"], "page.html"),
    "show": ([*VERBS["show"][:-1], "{out}/page.html"], "page.html"),
    "inspect": (VERBS["inspect"], "lengths.png"),
    "inspect document": (VERBS["inspect document"], "captions-train-1-1.png"),
    "codec training": (VERBS["train-image"], "codec_training"),
}


@pytest.mark.parametrize("verb", FILES)
def test_files_of_the_user_are_not_overwritten(trained, tmp_path, verb):
    call, name = FILES[verb]
    file = tmp_path / name
    file.write_text("mine")
    call = [word.format(trained=trained, out=tmp_path) for word in call]
    code, _, message = moma(*call)
    assert code == 2 and str(file) in message and "exists" in message and "--out" in message
    assert file.read_text() == "mine"


@pytest.mark.parametrize("verb", ["show", "inspect", "inspect document"])
def test_own_files_are_replaced_unless_they_were_changed(trained, tmp_path, verb):
    call, name = FILES[verb]
    call = [word.format(trained=trained, out=tmp_path) for word in call]
    succeeds(*call)
    succeeds(*call)
    (tmp_path / name).write_bytes(b"edited")
    assert "was changed since" in refuses(*call)
    assert (tmp_path / name).read_bytes() == b"edited"


@pytest.mark.parametrize("name", ["result.json", "report.html", "minutes.json", "sheet.png"])
def test_the_demo_overwrites_no_files_of_the_user(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert str(tmp_path / name) in refuses("demo", "--out", tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_device_is_not_replaced(trained):
    assert "/dev/null: exists" in refuses("report", trained / "run", "--out", "/dev/null")


def test_the_demo_marks_its_folder_before_it_writes(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moma.demo.run.prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", [], quiet=True)
    assert (tmp_path / "demo/minutes.json").exists()
    assert files_read(tmp_path) == []
