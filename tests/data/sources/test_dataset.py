"""Rows of Parquet, Arrow and text files, and of repositories, as the hub holds them."""

import errno
import io
import json
import logging
import pickle

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import ValidationError

from moma.data.documents import ImageRef, Rejected
from moma.errors import StorageError, UserError
from tests.data.sources.rows import accepted, png, shape, source_of
from tests.factories import write_parquet

CAPTIONED = [{"image": png(n), "text": f"t{n}", "more": n} for n in (1, 2, 3)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stored", ["bytes", "struct", "feature"])
def test_captioned_images(tmp_path, streaming, stored):
    path = tmp_path / "a.parquet"
    rows = [{"image": {"bytes": r["image"], "path": "x.png"}, "text": r["text"]} for r in CAPTIONED]
    if stored == "bytes":
        write_parquet(path, CAPTIONED)
    elif stored == "struct":
        write_parquet(path, rows)
    else:
        features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    source = source_of(path=str(path), image_column="image", streaming=streaming, caption_first=1)
    documents = list(accepted(source.documents()))
    assert [shape(document) for document in documents] == [["t1", 1], ["t2", 2], ["t3", 3]]
    assert documents[1].row == f"{path}, row 2"
    assert [shape(d) for d in pickle.loads(pickle.dumps(documents))][2] == ["t3", 3]
    held = [CAPTIONED[n]["image"] in pickle.dumps(d) for n, d in enumerate(documents)]
    assert held == [streaming] * 3


def test_names_are_those_of_the_content_in_every_form_and_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", CAPTIONED)
    write_parquet(tmp_path / "b.parquet", CAPTIONED[::-1])
    names = [
        [row.name for row in source_of(path=str(path), image_column="image").documents()]
        for path in (tmp_path / "a.parquet", tmp_path / "b.parquet")
    ]
    assert names[0] == names[1][::-1] and len(set(names[0])) == 3


def test_captions_of_one_image_are_held_out_together(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [{"image": png(4), "text": f"t{n}"} for n in range(3)]
    )
    documents = list(source_of(path=str(path), image_column="image").documents())
    assert len({document.name for document in documents}) == 3
    assert len({document.held_out_with for document in documents}) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_aligned_lists_and_segments(tmp_path, streaming):
    lists = {"texts": ["a", None, "b"], "images": [None, {"bytes": png(5), "path": None}, None]}
    segments = [
        {"type": "text", "text": "a", "image": None},
        {"type": "image", "text": None, "image": {"bytes": png(5), "path": None}},
        {"type": "text", "text": "b", "image": None},
    ]
    path = write_parquet(tmp_path / "a.parquet", [{**lists, "segments": segments}])
    (aligned,) = source_of(
        path=str(path), text_column="texts", image_column="images", streaming=streaming
    ).documents()
    (listed,) = source_of(
        path=str(path), segments_column="segments", streaming=streaming
    ).documents()
    assert shape(aligned) == shape(listed) == ["a", 5, "b"]
    assert aligned.name == listed.name


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.csv", "repository"])
@pytest.mark.parametrize("streaming", [False, True])
def test_kinds_of_files_and_a_repository(tmp_path, name, streaming):
    rows = [{"text": f"t{n}", "id": n} for n in range(5)]
    data = datasets.Dataset.from_list(rows)
    path = tmp_path / name
    if name == "repository":
        (path / "data").mkdir(parents=True)
        data.to_parquet(path / "data" / "train-00000-of-00001.parquet")
        data.select([0]).to_parquet(path / "data" / "validation-00000-of-00001.parquet")
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "a.csv":
        data.to_csv(path)
    elif name == "a.parquet":
        data.to_parquet(path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.data.schema) as out:
            out.write_table(data.data.table)
    source = source_of(path=str(path), streaming=streaming)
    assert [d.segments for d in accepted(source.documents())] == [(f"t{n}",) for n in range(5)]
    if name == "repository":
        (only,) = source_of(path=str(path), split="validation", streaming=streaming).documents()
        assert only.segments == ("t0",)


def test_paths_of_images_stay_inside_the_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in (tmp_path / "secret.png", folder / "a.png"):
        Image.new("RGB", (7, 2)).save(file)
    values = ["a.png", "../secret.png", str(tmp_path / "secret.png"), "https://a.example/a.png"]
    rows = [{"image": {"path": value, "bytes": None}, "text": "t"} for value in values]
    path = write_parquet(folder / "a.parquet", rows)
    first, *rejected = source_of(path=str(path), image_column="image", caption_first=1).documents()
    assert shape(first) == ["t", 7]
    assert all(isinstance(row, Rejected) for row in rejected)
    assert ["outside" in row.reason for row in rejected] == [True, True, False]


def test_rows_that_cannot_be_used_are_rejected(tmp_path):
    rows = [
        {"image": png(1), "text": None},
        {"image": None, "text": "t"},
        {"image": png(1), "text": " "},
        {"image": b"", "text": "t"},
        {"image": b"no image", "text": "t"},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows)
    *rejected, last = source_of(path=str(path), image_column="image", caption_first=0).documents()
    assert [type(row) for row in rejected] == [Rejected] * 4
    assert rejected[1].row == f"{path}, row 2"
    assert isinstance(last.segments[0], ImageRef)
    with pytest.raises(UserError, match=r"a\.parquet, row 5, image 1: cannot read"):
        last.segments[0].read()


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        (("text", "image"), {"text": "a", "image": ["a.png"]}, "'text' must be a list"),
        (("text", "image"), {"text": ["a"], "image": []}, "'text' has 1 entries and 'image' 0"),
        (("text", "image"), {"text": [1], "image": [None]}, "entry 1 of 'text' is not a text"),
        (("content",), {"content": "a"}, "'content' must be a list"),
        (("content",), {"content": None, "segments": []}, "'content' must be a list"),
    ],
)
def test_rows_are_rejected_by_the_names_of_their_columns(tmp_path, columns, row, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    keys = ("segments_column",) if len(columns) == 1 else ("text_column", "image_column")
    source = source_of(path=str(tmp_path / "a.jsonl"), **dict(zip(keys, columns, strict=True)))
    (rejected,) = source.documents()
    assert reason in rejected.reason


def test_changed_files_are_opened_again(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "old"}])
    source = source_of(path=str(path))
    (old,) = source.documents()
    fingerprint = source.fingerprint()
    write_parquet(tmp_path / "a.parquet", [{"text": "another"}])
    (new,) = source.documents()
    assert (old.segments, new.segments) == (("old",), ("another",))
    assert source.fingerprint() != fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "{folder}/nowhere.parquet"}, "nowhere.parquet: cannot read it"),
        ({"path": "{folder}/no*.parquet"}, "no file matches"),
        ({"path": "{folder}/nowhere"}, "is no file that ends in jsonl, .* no folder, and no name"),
        ({"path": "{folder}/broken.parquet"}, "broken.parquet: cannot read it"),
        ({"path": "{folder}/a.parquet", "split": "test"}, "a.parquet: `datasets` cannot open it"),
        ({"path": "{folder}/a.parquet", "text_column": "x"}, "has no column 'x'; .* are: text"),
    ],
)
def test_what_cannot_be_opened_is_an_error(tmp_path, settings, message):
    write_parquet(tmp_path / "a.parquet", [{"text": "t"}])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 broken PAR1")
    settings = {**settings, "path": settings["path"].format(folder=tmp_path)}
    with pytest.raises(UserError, match=message):
        list(source_of(**settings).documents())


def test_two_layouts_at_once_are_refused():
    with pytest.raises(ValidationError, match="not both"):
        source_of(path="a.parquet", image_column="a", segments_column="b")


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_rows_of_json_lines_are_rejected(tmp_path, streaming, capfd):
    Image.new("RGB", (7, 2)).save(tmp_path / "a.png")
    lines = [
        json.dumps({"text": "ä\u2028 \x85 one", "image": "a.png"}, ensure_ascii=False).encode(),
        b'{"text": "cut',
        b"",
        b'{"text": "\xff", "image": "a.png"}',
        b'{"image": "a.png"}',
        b'{"text": 7, "image": "a.png"}',
        b'{"text": "2020-01-01", "image": "a.png", "more": {"a": 1}}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = source_of(path=str(path), image_column="image", streaming=streaming, caption_first=1)
    first, *rejected, last = source.documents()
    assert shape(first) == ["ä\u2028 \x85 one", 7] and shape(last) == ["2020-01-01", 7]
    assert [row.row for row in rejected] == [f"{path}, row {n}" for n in (2, 4, 5, 6)]
    for row, reason in zip(
        rejected, ("not valid JSON", "not UTF-8", "has no 'text'", "not a number"), strict=True
    ):
        assert reason in row.reason
    assert capfd.readouterr().err == ""  # no progress bars of `datasets`


def test_names_do_not_depend_on_the_kind_of_file(tmp_path):
    rows = [{"segments": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    paths = [tmp_path / "a.jsonl", write_parquet(tmp_path / "a.parquet", rows)]
    ours, theirs = (
        [d.name for d in accepted(source_of(path=str(p), segments_column="segments").documents())]
        for p in paths
    )
    assert ours == theirs


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["id", "ids"])
def test_a_column_of_numbers_is_refused_once(tmp_path, streaming, column):
    rows = [{"id": 1, "ids": [1, 2], "caption": "a", "image": [None, png(1)]}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    source = source_of(
        path=str(path), text_column=column, image_column="image", streaming=streaming
    )
    with pytest.raises(UserError, match=rf"'{column}' holds int64 values, not text"):
        list(source.documents())


def test_a_name_on_the_hub_that_cannot_be_reached_is_reported(monkeypatch):
    source = source_of(path="nobody/nothing")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it"):
        list(source.documents())

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(UserError, match=r"no route.*needs a network"):
        list(source.documents())


def test_a_file_that_cannot_be_read_is_reported_once(tmp_path):
    """Only by the error: the library's log would repeat it twice."""
    logged = io.StringIO()
    handler, logger = logging.StreamHandler(logged), logging.getLogger("datasets")
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot read it"):
        list(source_of(path=str(tmp_path / "bad.parquet")).documents())
    logger.removeHandler(handler)
    assert logged.getvalue() == ""


@pytest.mark.parametrize(
    "cause",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("Not enough disk space. Needed: 9")],
)
def test_a_full_disk_of_the_cache_is_an_error_of_storage(tmp_path, monkeypatch, cause):
    def fail(**arguments):
        try:
            raise cause
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("while generating") from error

    path = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(StorageError, match=r"cache: .*cache of `datasets`: free space"):
        list(source_of(path=str(path)).documents())


def test_messages_are_bounded(tmp_path):
    keys = ["x" * 100_000 + str(n) for n in range(50)]
    rows = [dict.fromkeys(keys, "1"), {"text": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rejected, _ = source_of(path=str(tmp_path / "a.jsonl")).documents()
    assert len(rejected.reason) <= 1000
    (tmp_path / "a.csv").write_text(",".join(keys) + "\n1\n")
    with pytest.raises(UserError) as error:
        list(source_of(path=str(tmp_path / "a.csv")).documents())
    assert len(str(error.value)) < 2500
