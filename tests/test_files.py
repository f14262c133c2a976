"""Atomic writes: complete or not at all."""

import errno
import os

import pytest

from moma.files import UNFINISHED, add_path_to_errors, atomic_replace, atomic_write


def fill_folder(path):
    (path / "deep").mkdir(parents=True)
    (path / "one").write_text("1")
    (path / "deep" / "two").write_text("2")


def test_files_and_folders_are_created_by_a_rename(tmp_path):
    atomic_replace(tmp_path / "file", lambda path: path.write_text("new"))
    atomic_replace(tmp_path / "folder", fill_folder)
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "folder/deep/two").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    def fail(path):
        path.write_text("partial")
        raise KeyError

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        atomic_replace(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    atomic_replace(tmp_path / "file", lambda path: path.write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unfinished_folder_is_removed_first(tmp_path):
    unfinished = tmp_path / ("folder" + UNFINISHED)
    unfinished.mkdir()
    (unfinished / "stale").write_text("")
    atomic_replace(tmp_path / "folder", fill_folder)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["deep", "one"]


@pytest.mark.parametrize("kind", ["text", "file", "folder"])
def test_content_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch, kind):
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
