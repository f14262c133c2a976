"""Files that moma writes are not read as a source, those of the user are."""

import json

import pytest

from moma.data.outputs import exclude_outputs, mark_output


def entries_read(folder):
    return sorted(exclude_outputs(folder, [path.name for path in folder.iterdir()]))


def test_a_new_folder_is_excluded_as_a_whole_but_can_be_read_itself(tmp_path):
    mark_output(tmp_path / "made", "image_1.png")
    (tmp_path / "made/image_1.png").touch()
    (tmp_path / "mine.png").touch()
    assert entries_read(tmp_path) == ["mine.png"]
    assert "image_1.png" in entries_read(tmp_path / "made")


def test_in_a_folder_with_other_files_the_names_are_excluded(tmp_path):
    (tmp_path / "mine.png").touch()
    for name in ("image_1.png", "report.html", "codec"):
        mark_output(tmp_path, name)
        (tmp_path / name).touch()
    (tmp_path / "report.html.writing").touch()
    assert [name for name in entries_read(tmp_path) if name[0] != "."] == ["mine.png"]


def test_prepared_data_needs_no_marker(tmp_path):
    (tmp_path / "provenance.json").write_text('{"kind": "moma data"}')
    mark_output(tmp_path, "tokenizer.json", "codec")
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]
    mark_output(tmp_path, "lengths.png")
    assert "lengths.png" in exclude_outputs(tmp_path.parent, ["lengths.png"])
    assert exclude_outputs(tmp_path, ["lengths.png", "codec", "mine.png"]) == ["mine.png"]


@pytest.mark.parametrize("name", ["run.json", "provenance.json", ".moma-output.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"kind": "mine"}', "[" * 100_000, "\udc80"])
def test_files_of_the_user_with_these_names_exclude_nothing(tmp_path, name, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert exclude_outputs(tmp_path, ["mine"]) == ["mine"]
    assert exclude_outputs(tmp_path / "mine", ["shards"]) == ["shards"]


def test_the_marker_explains_itself(tmp_path):
    mark_output(tmp_path / "made")
    marker = json.loads((tmp_path / "made/.moma-output.json").read_text())
    assert "delete this file" in marker["about"]
