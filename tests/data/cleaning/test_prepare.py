"""`moma prepare` of sources that are cleaned."""

import json

import pytest
import torch
from PIL import Image

from moma.data.cleaning import passes, signatures
from moma.data.cleaning.passes import provide_cleaning
from moma.data.config import PrepareConfig
from moma.data.documents import DroppedImageError, Rejected
from moma.data.encode.prepare import prepare
from moma.data.inspect import inspect
from moma.data.shards import open_sources
from moma.errors import UserError
from moma.recipe import check
from moma.vocabulary import Vocabulary
from tests.command_line import succeeds
from tests.data.encode.preparing import contents
from tests.factories import make_tokenizers, tiny_recipe, write_captions, write_paragraphs

TEXTS = ["the red apple", "a green apple", "the red apple", "the blue apple", "one two three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources: `captions` of 8 images, `pages` of two images each, and `text`; tokenizers."""
    folder = tmp_path_factory.mktemp("sources")
    colors = [(30 * number, 99, 200 - 20 * number) for number in range(8)]
    images = {f"{n}.png": Image.new("RGB", (16, 16), color) for n, color in enumerate(colors)}
    images["1.png"] = Image.new("RGB", (16, 16), colors[0])  # twice
    images["2.png"] = Image.new("RGB", (40, 8), colors[2])
    write_captions(folder / "images", {name: f"number {name[0]}" for name in images}, images)
    pages = [("one", "0.png", "two", "3.png"), ("three", "2.png", "four", "4.png")]
    rows = [
        [{"type": "image", "image": x} if "." in x else {"type": "text", "text": x} for x in page]
        for page in pages
    ]
    lines = [json.dumps({"segments": row}) + "\n" for row in rows]
    (folder / "images/pages.jsonl").write_text("".join(lines))
    write_paragraphs(folder / "text.txt", TEXTS)
    write_paragraphs(folder / "more.txt", [*TEXTS[:2], "four five six"])
    make_tokenizers(folder / "tokenizers")
    return folder


def recipe_of(folder, path, **clean):
    """A recipe of all sources, with the keys of `clean` for each by its name."""
    tiny = tiny_recipe(folder / "images", path)
    values = tiny.model_dump(mode="json", include={*PrepareConfig.model_fields})
    values["data"]["tokenizers"] = str(folder / "tokenizers")
    values["data"] |= {"held_out": 0, "max_padding": 1, "max_rejected": 0}
    values["data"]["sources"] = [
        {"kind": "captions", "path": str(folder / "images")},
        {"kind": "interleaved", "name": "pages", "path": str(folder / "images/pages.jsonl")},
        {"kind": "text", "path": str(folder / "text.txt")},
        {"kind": "text", "name": "more", "path": str(folder / "more.txt")},
    ]
    for source in values["data"]["sources"]:
        source["clean"] = clean.get(source.get("name", source["kind"]), {})
    return check(PrepareConfig, values, "test")


def run(recipe):
    return prepare(recipe, torch.device("cpu"), quiet=True, processes=1)


ALL = {
    "captions": {"duplicate_images": True, "max_aspect_ratio": 2},
    "pages": {"duplicate_images": True, "max_aspect_ratio": 2},
    "text": {"duplicate_texts": True},
    "more": {"near_duplicate_texts": 0.9, "duplicate_texts": True},
}


def test_dropped_documents_and_images_are_counted_and_listed(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "data", **ALL)
    summary = run(recipe).summary()
    dropped = {name: found["dropped"] for name, found in summary["sources"].items()}
    assert dropped == {
        "captions": {"duplicate_images": 1, "max_aspect_ratio": 1},
        "pages": {},
        "text": {"duplicate_texts": 1},
        "more": {"duplicate_texts": 2},
    }
    assert summary["dropped"] == {
        "max_aspect_ratio": 1,
        "duplicate_images": 1,
        "duplicate_texts": 3,
    }
    images = {name: found["dropped_images"] for name, found in summary["sources"].items()}
    # Of the pages, 0, 3 and 4 are among the captions' images, and 2 is too long.
    assert images["pages"] == {"max_aspect_ratio": 1, "duplicate_images": 3}
    assert images["captions"] == {} and summary["rejected"] == 0
    counts = [
        summary["sources"][name]["documents"] for name in ("captions", "pages", "text", "more")
    ]
    assert counts == [6, 2, 4, 1]
    assert [summary["sources"][name]["images"] for name in ("captions", "pages")] == [6, 0]
    lines = (tmp_path / "data/rejected.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {"row", "reason", "source", "dropped_by"} == {*rows[0]}
    found = {(row["source"], row["dropped_by"], row["row"].partition(", ")[2][:14]) for row in rows}
    assert ("text", "duplicate_texts", "row 5") in found
    assert ("pages", "max_aspect_ratio", "row 2, image 1") in found
    assert len(rows) == 2 + 4 + 1 + 2
    inspected = inspect(tmp_path / "data", None, tmp_path / "out")
    for key in ("dropped", "dropped_images"):
        assert {name: each[key] for name, each in inspected["sources"].items()} == {
            name: each[key] for name, each in summary["sources"].items()
        }
    shown = succeeds("data", "inspect", tmp_path / "data")
    assert "pages: clean.duplicate_images dropped 3 images" in shown


def test_the_text_of_a_page_stays_without_its_images(folder, tmp_path):
    run(recipe_of(folder, tmp_path / "data", **ALL))
    vocabulary = Vocabulary.load(tmp_path / "data/vocabulary.json")
    pages = open_sources(tmp_path / "data", ["pages"], vocabulary)["pages"].splits["train"]
    for row in range(2):
        ids = pages.ids(row)
        assert vocabulary.begin_image not in ids and len(ids) > 2
        assert pages.images[row] == 0


def test_a_changed_key_encodes_only_what_it_affects(folder, tmp_path):
    data = tmp_path / "data"

    def times():
        return {name: (data / f"shards/{name}/shard.json").stat().st_mtime_ns for name in ALL}

    run(recipe_of(folder, data, **ALL))
    before = times()
    run(recipe_of(folder, data, **ALL))
    assert times() == before
    # Nothing of `more` is equal to what is left of `text`.
    keys = ALL | {"text": {"duplicate_texts": True, "languages": []}, "more": {}}
    run(recipe_of(folder, data, **keys))
    assert [name for name, time in times().items() if time != before[name]] == ["more"]
    before = times()
    run(recipe_of(folder, data, **(keys | {"captions": {"max_aspect_ratio": 2}})))
    assert [name for name in ALL if times()[name] != before[name]] == ["captions", "pages"]


def test_a_source_of_which_nothing_is_left_is_refused(folder, tmp_path):
    keys = {"captions": {"min_image_side": 100}}
    message = "source 'captions': no documents are left; dropped: 8 by clean.min_image_side"
    with pytest.raises(UserError, match=message):
        run(recipe_of(folder, tmp_path / "data", **keys))


def test_an_interruption_at_any_step_changes_no_byte(folder, tmp_path, monkeypatch):
    undisturbed = run(recipe_of(folder, tmp_path / "undisturbed", **ALL)).summary()
    recipe = recipe_of(folder, tmp_path / "data", **ALL)
    steps = [
        (signatures, "text_of"),
        (signatures, "atomic_write"),
        (passes, "find_duplicates"),
        (passes, "atomic_write"),
        (passes, "Cleaning"),
    ]
    for module, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(recipe)
    assert run(recipe).summary() == undisturbed
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def interrupted(*arguments, **keys):
    raise KeyboardInterrupt


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_neither_parts_nor_processes_change_what_is_dropped(folder, tmp_path, processes):
    sources = recipe_of(folder, tmp_path, **ALL).data.sources
    found = {}
    for name, part_bytes in (("one", 2**28), ("many", 1)):
        cleaning = provide_cleaning(sources, tmp_path / name, part_bytes, True, processes)
        found[name] = {
            source.name: [
                drops(row)
                for number, part in enumerate(source.parts(part_bytes))
                for row in cleaning[source.name].rows(source.read_part(part), number)
            ]
            for source in sources
        }
    assert found["many"] == found["one"]
    assert len([*(tmp_path / "many").rglob("images.bin")]) > len(ALL) + 8


def test_a_source_is_cut_once_for_its_signatures(folder, tmp_path, monkeypatch):
    sources = recipe_of(folder, tmp_path, **ALL).data.sources
    first = provide_cleaning(sources, tmp_path / "cleaning", 50)
    for source in sources:
        monkeypatch.setattr(type(source), "parts", interrupted)
    again = provide_cleaning(sources, tmp_path / "cleaning", 50)
    assert again == first
    with pytest.raises(KeyboardInterrupt):
        provide_cleaning(sources, tmp_path / "cleaning", 60)


def drops(row):
    """What drops a document, or each of its images."""
    if isinstance(row, Rejected):
        return row
    found = []
    for image in row.segments:
        try:
            found.append(None if isinstance(image, str) else image.read().size)
        except DroppedImageError as error:
            found.append(str(error))
    return found
