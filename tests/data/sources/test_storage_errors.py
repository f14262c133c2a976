"""A disk that fails while a source is read is a storage error (exit code 74), in every reader."""

import builtins
import errno
import io
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from moma.data.documents import ImageRef
from moma.data.sources.registry import AnySource
from moma.errors import StorageError
from tests.data.sources.rows import accepted
from tests.factories import image_bytes, write_captions, write_pages, write_parquet, write_tar

SOURCES = {
    "captions.jsonl": {"kind": "captions", "path": "."},
    "a.png": {"kind": "captions", "path": "."},
    "metadata.csv": {"kind": "captions", "path": "metadata"},
    "b.txt": {"kind": "folder", "path": "pairs"},
    "c.html": {"kind": "html", "path": "pages"},
    "d.txt": {"kind": "text", "path": "d.txt"},
    "e.jsonl": {"kind": "interleaved", "path": "e.jsonl"},
    "f.tar": {"kind": "webdataset", "path": "f.tar"},
    "g.csv": {"kind": "dataset", "path": "g.csv"},
    "h.jsonl": {"kind": "dataset", "path": "h.jsonl"},
    "i.parquet": {"kind": "dataset", "path": "i.parquet"},
}


class FailingFile(io.BytesIO):
    """A file that can be opened and not read."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def read(self, size=-1):
        raise OSError(self.code, os.strerror(self.code))

    readline = readinto = peek = read


@pytest.fixture
def folder(tmp_path):
    write_captions(tmp_path, {"a.png": "a"}, {"a.png": image_bytes()})
    for name in ("metadata", "pairs", "pages"):
        (tmp_path / name).mkdir()
    (tmp_path / "metadata/metadata.csv").write_text("file_name,text\na.png,a\n")
    (tmp_path / "pairs/b.png").write_bytes(image_bytes())
    (tmp_path / "pairs/b.txt").write_text("b")
    write_pages(tmp_path / "pages", {"c.html": "c"}, ())
    (tmp_path / "d.txt").write_text("d")
    (tmp_path / "e.jsonl").write_text('{"segments": [{"type": "text", "text": "e"}]}')
    write_tar(tmp_path / "f.tar", [("f.png", image_bytes()), ("f.txt", b"f")])
    (tmp_path / "g.csv").write_text("text\ng\n")
    (tmp_path / "h.jsonl").write_text('{"text": "h"}\n')
    write_parquet(tmp_path / "i.parquet", [{"text": "i"}])
    return tmp_path


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("broken", SOURCES)
def test_a_disk_that_fails_is_not_an_error_of_the_data(folder, monkeypatch, broken, code):
    options = SOURCES[broken]
    source = TypeAdapter(AnySource).validate_python(
        {**options, "path": str(folder / options["path"])}
    )

    def failing(function):
        def call(path, *arguments, **more):
            if Path(str(path)).name != broken:
                return function(path, *arguments, **more)
            return FailingFile(code)

        return call

    def fail(path, *arguments, **more):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(builtins, "open", failing(builtins.open))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    monkeypatch.setattr(pa.parquet, "ParquetFile", fail)
    with pytest.raises(StorageError, match=rf"{broken}.*check the disk"):
        for document in accepted(source.documents()):
            for part in document.segments:
                if isinstance(part, ImageRef):
                    part.read()
