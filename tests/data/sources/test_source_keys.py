"""Every key of every kind of source has an effect; a new key without an entry here fails."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from pydantic import TypeAdapter

from moma.data.documents import Document, ImageRef
from moma.data.sources.registry import AnySource, source_kinds
from moma.errors import UserError
from tests.factories import (
    image_bytes,
    write_captions,
    write_icons,
    write_pages,
    write_parquet,
    write_tar,
)

# Keys of all sources, with the test of each.
COMMON = {
    "kind": "data/sources/test_registry.py::test_the_kinds_of_this_package_are_registered",
    "name": "data/batches/test_iterator.py::test_recipes_that_cannot_work_are_refused",
    "weight": "data/batches/test_iterator.py::test_weights_hold_within_a_percent_over_1000_batches",
    "held_out": "data/encode/test_corpus.py::test_a_source_may_have_its_own_held_out_share",
    "max_images": "data/sources/test_source_keys.py::test_documents_are_split_at_max_images",
    "clean": "data/cleaning/test_keys.py::test_every_key_has_a_test",
}
# A source of each kind in the folder `write_files` fills, and other values of its keys.
SOURCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "captions": (
        {"path": "images"},
        {"path": "other", "max_pixels": 1, "caption_first": 0},
    ),
    "dataset": (
        {"path": "rows.jsonl", "image_column": "image"},
        {
            "path": "more.jsonl",
            "max_pixels": 1,
            "caption_first": 1,
            "split": "train[:1]",
            "text_column": "other",
            "image_column": None,
            "segments_column": "segments",
        },
    ),
    "dictionary": ({}, {}),
    "folder": (
        {"path": "images"},
        {
            "path": "other",
            "max_pixels": 1,
            "caption_first": 0,
            "caption": "whole",
            "without_text": "leave_out",
        },
    ),
    "html": (
        {"path": "pages"},
        {
            "path": "more_pages",
            "max_pixels": 1,
            "min_side": 8,
            "max_page_share": 1.0,
            "drop_classes": ["note"],
        },
    ),
    "icons": (
        {"path": "icons"},
        {"path": "more_icons", "sets": ["lines"], "image_size": 8, "caption_first": 0},
    ),
    "interleaved": ({"path": "segments.jsonl"}, {"path": "more.jsonl", "max_pixels": 1}),
    "sketches": (
        {"content": "singles", "objects": 12, "repeats": 2, "image_size": 16},
        {
            "content": "placed",
            "objects": 11,
            "repeats": 1,
            "image_size": 8,
            "caption_first": 0,
        },
    ),
    "text": ({"path": "rows.jsonl"}, {"path": "more.jsonl", "text_key": "other"}),
    "webdataset": (
        {"path": "samples.tar"},
        {
            "path": "more.tar",
            "max_pixels": 1,
            "caption_first": 0,
            "caption_key": "other",
            "max_member_bytes": 10,
        },
    ),
}
# Keys that have no effect on the sources above, with the test of each.
ELSEWHERE = {
    ("dataset", "subset"): "data/sources/test_source_keys.py::test_a_subset_of_a_data_set_is_read",
    (
        "dataset",
        "revision",
    ): "data/sources/test_source_keys.py::test_a_revision_on_the_hub_is_requested",
    (
        "dataset",
        "segments_column",
    ): "data/sources/test_source_keys.py::test_segments_of_a_data_set_are_read",
    (
        "dataset",
        "streaming",
    ): "data/sources/test_source_keys.py::test_a_streamed_data_set_is_not_copied",
    ("dictionary", "entries"): (
        "demo/test_dictionary.py::test_a_smaller_sample_is_the_start_of_a_larger_one"
    ),
    (
        "sketches",
        "count",
    ): "data/sources/test_source_keys.py::test_compositions_depend_on_count_and_seed",
    (
        "sketches",
        "seed",
    ): "data/sources/test_source_keys.py::test_compositions_depend_on_count_and_seed",
}


def image_segments(*names: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": "a"}, *({"type": "image", "image": name} for name in names)]


def row_of(image: str) -> dict[str, Any]:
    images = image_segments(image, image)
    return {"text": f"text of {image}", "other": "o", "image": image, "segments": images}


def write_files(folder: Path) -> None:
    images = {name: Image.new("RGB", (4, 4)) for name in ("a.png", "b.png", "single.png")}
    write_captions(folder / "images", {"a.png": "a", "b.png": "b"}, images)
    write_captions(folder / "other", {"a.png": "c"}, images)
    for name in ("images", "other"):
        for image in ("a", "b"):
            (folder / name / f"{image}.txt").write_text(f"{name} {image}\nsecond line")
    for name, image in (("rows", "images/a.png"), ("more", "images/b.png")):
        rows = [row_of(image), row_of("other/a.png")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    segments = {"segments": image_segments("images/a.png", "images/b.png")}
    (folder / "segments.jsonl").write_text(json.dumps(segments))
    body = "<p>a<p class=note>note</p><img src=a.png><img src=small.png>"
    pages = {f"{number}.html": body for number in range(3)} | {
        "once.html": "<img src=c.png><img src=tiny.png>"
    }
    write_pages(folder / "pages", pages, ["a.png", "c.png"])
    for name in ("small.png", "tiny.png"):
        Image.new("RGB", (9, 9)).save(folder / "pages" / name)
    write_pages(folder / "more_pages", {"1.html": body})
    square = '<rect width="8" height="8"/>'
    write_icons(folder / "icons", {"fruit": {"apple": square}, "lines": {"a": square}}, ["lines"])
    write_icons(folder / "more_icons", {"fruit": {"pear": square}})
    for name in ("samples", "more"):
        caption = json.dumps({"caption": name, "other": "other"}).encode()
        write_tar(folder / f"{name}.tar", [("1.png", image_bytes()), ("1.json", caption)])


def source_of(kind: str, values: dict[str, Any], folder: Path) -> Any:
    if "path" in values:
        values = values | {"path": str(folder / values["path"])}
    return TypeAdapter(AnySource).validate_python({"kind": kind, **values})


def segment_as_data(segment: str | ImageRef) -> Any:
    if isinstance(segment, str):
        return segment
    try:
        return segment.read().tobytes()
    except UserError as error:
        return str(error)


def observe(kind: str, values: dict[str, Any], folder: Path) -> list[Any]:
    """Names, texts and pixels of the documents, and the reasons of rejected rows."""
    return [
        (row.name, *map(segment_as_data, row.segments)) if isinstance(row, Document) else row.reason
        for row in source_of(kind, values, folder).documents()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_files(folder)
    return folder


def test_every_key_has_an_entry():
    assert SOURCES.keys() <= source_kinds().keys()
    for kind, config in source_kinds().items():
        if config.__module__.startswith("moma."):
            elsewhere = {key for each, key in ELSEWHERE if each == kind}
            assert COMMON.keys() | SOURCES[kind][1].keys() | elsewhere == set(config.model_fields)
    for test in (*COMMON.values(), *ELSEWHERE.values()):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text(), test


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (kind, key)
        for kind, (_, changes) in SOURCES.items()
        for key in changes
        if (kind, key) not in ELSEWHERE
    ],
)
def test_a_key_changes_the_documents(folder, kind, key):
    values, changes = SOURCES[kind]
    before = observe(kind, values, folder)
    assert before == observe(kind, values, folder)
    assert before != observe(kind, values | {key: changes[key]}, folder)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("interleaved", {"path": "segments.jsonl"}),
        ("html", {"path": "pages", "max_page_share": 1.0, "min_side": 8}),
        ("dataset", {"path": "rows.jsonl", "segments_column": "segments"}),
    ],
)
def test_documents_are_split_at_max_images(folder, kind, values):
    for limit, most in ((None, 2), (1, 1)):
        documents = list(source_of(kind, values | {"max_images": limit}, folder).documents())
        counts = [sum(isinstance(s, ImageRef) for s in each.segments) for each in documents]
        assert max(counts) == most


def test_segments_of_a_data_set_are_read(folder):
    segments = {"path": "rows.jsonl", "segments_column": "segments"}
    assert [len(row) for row in observe("dataset", segments, folder)] == [4, 4]
    assert [len(row) for row in observe("dataset", {"path": "rows.jsonl"}, folder)] == [2, 2]


def test_a_subset_of_a_data_set_is_read(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    for name in ("one", "two"):
        ((_, text),) = observe("dataset", {"path": ".", "subset": name}, tmp_path)
        assert text == name


def test_a_revision_on_the_hub_is_requested(monkeypatch):
    requests = []

    def load_dataset_builder(path, **options):
        requests.append((path, options["revision"]))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    values = {"kind": "dataset", "path": "owner/name", "revision": "abc"}
    with pytest.raises(UserError, match="offline"):
        list(TypeAdapter(AnySource).validate_python(values).documents())
    assert requests == [("owner/name", "abc")]


def test_a_streamed_data_set_is_not_copied(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    rows = [{"text": "a", "image": {"bytes": content.getvalue(), "path": None}}]
    write_parquet(tmp_path / "rows.parquet", rows)
    for streaming in (True, False):
        values = {"path": "rows.parquet", "image_column": "image", "streaming": streaming}
        assert len(observe("dataset", values, tmp_path)) == 1
        copies = list((tmp_path / "cache").rglob("*.arrow"))
        assert bool(copies) is not streaming


def test_compositions_depend_on_count_and_seed():
    values = {"content": "compositions", "objects": 12, "count": 30, "image_size": 16}
    before, fewer, other = (
        [row.name for row in source_of("sketches", values | changes, Path()).documents()]
        for changes in ({}, {"count": 20}, {"seed": 1})
    )
    assert len(before) > len(fewer) and before != other
