"""Files that are there whole or not at all."""

import errno
import os

import pytest

from moma.files import UNFINISHED, add_path_to_errors, atomic_replace, atomic_write


def fill_folder(path):
    (path / "deep").mkdir(parents=True)
    (path / "one").write_text("1")
    (path / "deep" / "two").write_text("2")


def test_files_and_folders_get_their_name_when_they_are_filled(tmp_path):
    atomic_replace(tmp_path / "file", lambda path: path.write_text("new"))
    atomic_replace(tmp_path / "folder", fill_folder)
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "folder/deep/two").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_not_filled_does_not_take_the_place_of_what_was_there(tmp_path):
    def fail(path):
        path.write_text("torn")
        raise KeyError

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        atomic_replace(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    atomic_replace(tmp_path / "file", lambda path: path.write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_kill_left_of_a_folder_does_not_get_into_the_next(tmp_path):
    unfinished = tmp_path / ("folder" + UNFINISHED)
    unfinished.mkdir()
    (unfinished / "stale").write_text("")
    atomic_replace(tmp_path / "folder", fill_folder)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["deep", "one"]


@pytest.mark.parametrize("kind", ["text", "file", "folder"])
def test_everything_is_on_the_disk_before_the_name_and_the_name_at_last(
    tmp_path, monkeypatch, kind
):
    events = []
    sync, replace = os.fsync, os.replace

    def note_sync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def note_replace(source, target):
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    whole = tmp_path / "whole"
    if kind == "text":
        atomic_write(whole, "text")
    else:
        atomic_replace(whole, fill_folder if kind == "folder" else lambda path: path.write_text(""))
    parts = {"whole" + UNFINISHED} | ({"one", "two", "deep"} if kind == "folder" else set())
    assert set(events[: len(parts)]) == parts
    assert events[len(parts) :] == ["renamed", tmp_path.name]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "a.json", "a")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert caught.value.errno == errno.ENOSPC
    with (
        pytest.raises(FileNotFoundError, match=r"b\.json"),
        add_path_to_errors(tmp_path / "a.json"),
    ):
        (tmp_path / "b.json").read_text()
