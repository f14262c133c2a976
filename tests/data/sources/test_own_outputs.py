"""No kind of source reads the files that moma writes."""

import json
import shutil

import datasets
import pytest
from pydantic import TypeAdapter

from moma.data.outputs import DATA_KIND, DATA_MANIFEST, mark_output
from moma.data.sources.registry import AnySource
from tests.data.sources.rows import accepted
from tests.factories import image_bytes, write_pages, write_parquet, write_tar

SOURCES = {
    "captions": {"kind": "captions"},
    "folder": {"kind": "folder"},
    "html": {"kind": "html"},
    "text": {"kind": "text", "path": "**/*.txt"},
    "interleaved": {"kind": "interleaved", "path": "**/segments*.jsonl"},
    "webdataset": {"kind": "webdataset", "path": "**/*.tar"},
    "parquet": {"kind": "dataset", "path": "**/*.parquet"},
    "csv folder": {"kind": "dataset"},
    "parquet folder": {"kind": "dataset"},
    "split folder": {"kind": "dataset", "split": "test"},
    "image folder": {"kind": "dataset", "image_column": "image"},
}


def write_files(folder, kind):
    """Files that a kind of source reads from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"read from {folder.name}"
    if kind in ("captions", "folder", "image folder"):
        (folder / "a.png").write_bytes(image_bytes())
        row = {"file_name": "a.png", "text": text}
        if kind != "folder":
            (folder / "metadata.jsonl").write_text(json.dumps(row))
    if kind in ("folder", "text"):
        (folder / "a.txt").write_text(text)
    elif kind == "html":
        write_pages(folder, {"a.html": text})
    elif kind == "interleaved":
        segment = {"type": "text", "text": text}
        (folder / "segments.jsonl").write_text(json.dumps({"segments": [segment]}))
    elif kind == "webdataset":
        write_tar(folder / "a.tar", [("a.png", image_bytes()), ("a.txt", text.encode())])
    elif kind in ("parquet", "parquet folder"):
        write_parquet(folder / "rows.parquet", [{"text": text}])
    elif kind == "csv folder":
        (folder / "rows.csv").write_text(f"text\n{text}\n")
    elif kind == "split folder":
        (folder / "train.csv").write_text(f"text\n{text}\n")
        (folder / "test.csv").write_text(f"text\n{text}\n")


@pytest.mark.parametrize("kind", SOURCES)
def test_outputs_in_a_source_folder_are_not_read(tmp_path, kind):
    folder = tmp_path / "source"
    write_files(folder, kind)
    options = {**SOURCES[kind], "path": str(folder / SOURCES[kind].get("path", ""))}
    source = TypeAdapter(AnySource).validate_python(options)
    before, names = source.fingerprint(), [one.name for one in accepted(source.documents())]
    assert len(names) == 1
    data, run, sheet = folder / "prepared", folder / "run", folder / "deep" / "sheet"
    for output in (data / "shards" / "x", data / "codec", run, run / "tokenizer"):
        write_files(output, kind)
    (data / DATA_MANIFEST).write_text(json.dumps({"kind": DATA_KIND}))
    (data / "rejected.jsonl").write_text('{"row": "", "reason": ""}\n')
    (data / "tokenizer.json").write_text("{}")
    arrow = datasets.Dataset.from_list([{"text": "encoded"}])
    arrow.save_to_disk(data / "shards" / "y")
    shutil.copy(next((data / "shards" / "y").glob("*.arrow")), data / "shards" / "train-0.arrow")
    (run / "run.json").write_text('{"kind": "moma run"}')
    mark_output(sheet)
    write_files(sheet, kind)
    assert source.fingerprint() == before
    assert [one.name for one in accepted(source.documents())] == names
    # A user's own files beside them are read.
    write_files(folder / "prepared" / "mine", kind)
    assert source.fingerprint() != before
