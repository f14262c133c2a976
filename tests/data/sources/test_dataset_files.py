"""Files of a dataset: splits, shards, patterns, metadata, and what the library guesses."""

import json
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from moma.data.documents import Document, Rejected, SourcePart
from moma.errors import UserError
from tests.data.sources.rows import png, segments, shape, source_of
from tests.factories import write_parquet


@pytest.mark.parametrize(
    ("split", "texts"), [("train[1:3]", ["t1", "t2"]), ("train[-1:]+train[:20%]", ["t4", "t0"])]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.arrow", "a.parquet"])
def test_a_part_of_a_split(tmp_path, name, split, texts):
    data = datasets.Dataset.from_list([{"text": f"t{n}"} for n in range(5)])
    if name == "a.jsonl":
        data.to_json(tmp_path / name)
    elif name == "a.csv":
        data.to_csv(tmp_path / name)
    elif name == "a.parquet":
        data.to_parquet(tmp_path / name)
    else:
        write_shards(tmp_path, "arrow", [data.data.table])
        (tmp_path / "0.arrow").rename(tmp_path / name)
    assert segments(source_of(path=str(tmp_path / name), split=split).documents()) == texts
    with pytest.raises(UserError, match="cannot open it"):
        list(source_of(path=str(tmp_path / name), split="test").documents())


def write_shards(folder, name, tables):
    for number, table in enumerate(tables):
        path = folder / f"{number}.{name}"
        if name == "parquet":
            pa.parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table)
    return str(folder / f"*.{name}")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_shards_need_to_agree_only_in_the_columns_that_are_used(tmp_path, name, streaming):
    tables = [
        pa.table({"text": pa.array([], pa.null())}),
        pa.table({"text": ["a"], "x": pa.array([1], pa.int8()), "y": [{"k": [1]}]}),
        pa.table({"text": pa.array([], pa.string())}),
        pa.table({"x": ["b"], "text": pa.array(["b"], pa.large_string())}),
        pa.table({"text": pa.array(["c"]).dictionary_encode(), "only": [None]}),
        pa.table({"z": pa.array([1], pa.duration("s")), "text": pa.array([None], pa.null())}),
        pa.table({"text": pa.array([], pa.string())}),
    ]
    path = write_shards(tmp_path, name, tables)
    *texts, rejected = segments(source_of(path=str(path), streaming=streaming).documents())
    assert texts == ["a", "b", "c"]
    assert isinstance(rejected, Rejected) and "needs a text" in rejected.reason


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_rejected_rows_name_their_file(tmp_path, name, in_parts, streaming):
    texts = [["a", None], [], [*map(str, range(20)), None, None], [None]]
    tables = [pa.table({"text": pa.array(column, pa.string())}) for column in texts]
    path = write_shards(tmp_path, name, tables)
    if name == "parquet":  # of several row groups
        pa.parquet.write_table(tables[2], tmp_path / "2.parquet", row_group_size=1)
    source = source_of(path=path, streaming=streaming)
    parts = source.parts(1) if in_parts else [SourcePart()]
    assert len(parts) > 1 or not in_parts or (name, streaming) == ("arrow", True)
    rows = [row for part in parts for row in source.read_part(part)]
    assert [row.row for row in rows if isinstance(row, Rejected)] == [
        f"{tmp_path}/{number}.{name}, row {row}"
        for number, row in ((0, 2), (2, 21), (2, 22), (3, 1))
    ]


def test_shards_that_disagree_are_named(tmp_path):
    path = write_shards(tmp_path, "parquet", [pa.table({"text": ["a"]}), pa.table({"id": [1]})])
    with pytest.raises(UserError, match=r"1\.parquet: has no column 'text'; the columns are: id"):
        list(source_of(path=str(path)).documents())
    path = write_shards(
        tmp_path, "parquet", [pa.table({"text": ["a"]}), pa.table({"text": [{"a": 1}]})]
    )
    with pytest.raises(UserError, match=r"1\.parquet: a column has another type"):
        list(source_of(path=str(path)).documents())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.csv", "*.parquet"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name, streaming):
    for folder, text in (("run[12]", "wanted"), ("run1", "other")):
        (tmp_path / folder).mkdir()
        data = datasets.Dataset.from_list([{"text": text}])
        data.to_parquet(tmp_path / folder / "a.parquet")
        data.to_json(tmp_path / folder / "a.jsonl")
        data.to_csv(tmp_path / folder / "a.csv", index=False)
        write_shards(tmp_path / folder, "arrow", [data.data.table])
        (tmp_path / folder / "0.arrow").rename(tmp_path / folder / "a.arrow")
    path = str(tmp_path / "run[12]" / name)
    assert segments(source_of(path=str(path), streaming=streaming).documents()) == ["wanted"]


def test_a_folder_whose_name_is_a_pattern_of_another_is_refused(tmp_path):
    for folder in ("run[12]", "run1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text(f"text\n{folder}\n")
    with pytest.raises(UserError, match=r"rename the folder, or name its files: .*/\*"):
        list(source_of(path=str(tmp_path / "run[12]")).documents())


METADATA = {
    "metadata.jsonl": '{{"file_name": "{}", "text": "007", "taken": {}}}\n',
    "metadata.csv": "{},007,{}\n",
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("folder", ["", "train"])
@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_an_image_folder_may_hold_anything(tmp_path, name, folder, streaming):
    inside = tmp_path / "images" / folder
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(9))
    for number, image in enumerate(("a.png", "sub/b.png"), 3):
        (inside / image).write_bytes(png(number))
    # A date, which `datasets` would convert in one row and not in the other; and a list.
    taken = ('"2024-01-05"', "[3]") if name.endswith("l") else ("2024-01-05", "NA")
    rows = [("a.png", taken[0]), ("sub/b.png", taken[1]), ("../../secret.png", taken[0])]
    head = "file_name,text,taken\n" if name.endswith("csv") else ""
    (inside / name).write_text(head + "".join(METADATA[name].format(*row) for row in rows))
    options = {"image_column": "image", "streaming": streaming, "caption_first": 1}
    *documents, rejected = source_of(path=str(tmp_path / "images"), **options).documents()
    assert isinstance(rejected, Rejected) and "is outside" in rejected.message
    assert [shape(document) for document in documents] == [["007", 3], ["007", 4]]
    moved = tmp_path / "elsewhere"
    (tmp_path / "images").rename(moved)
    again = source_of(path=str(moved), **options).documents()
    assert [one.name for one in again if isinstance(one, Document)] == [d.name for d in documents]


def test_csv_files_that_the_library_would_read_by_guesses_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as file:
        file.writestr("a.csv", "text\n007\n")
    with pytest.raises(UserError, match=r"CSV files such as NA and 007.* unpack them on this"):
        list(source_of(path=str(tmp_path), image_column="image").documents())


def write_rows(folder, *names):
    """Files of one row, the file's own name without its ending."""
    folder.mkdir(exist_ok=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        text = path.name.partition(".")[0]
        if name.endswith("parquet"):
            write_parquet(path, [{"text": text}])
        elif name.endswith("csv"):
            path.write_text(f"text\n{text}\n")
        elif name.endswith("txt"):
            path.write_text(f"{text}\n")
        else:
            path.write_text(json.dumps({"text": text}) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["x.jsonl", "y.csv", "z.csv"], "x.jsonl"),
        (["x.jsonl", "a.parquet", "b.parquet", "n.txt"], "n.txt, x.jsonl"),
        (["train.jsonl", "more.jsonl"], "more.jsonl"),
        (
            ["train-1.jsonl", "latest.jsonl", "developer.jsonl", "strain.jsonl"],
            "developer.jsonl, latest.jsonl, strain.jsonl",
        ),
        (["train/a.jsonl", "more/b.jsonl"], "more/b.jsonl"),
        (["a.jsonl", "deep.csv.gz"], "deep.csv.gz"),
        (["train.jsonl", "citation-1.jsonl"], "citation-1.jsonl"),
    ],
)
def test_a_folder_of_which_files_would_be_left_out_is_refused(tmp_path, names, left_out):
    path = write_rows(tmp_path / "rows", *names)
    with pytest.raises(UserError, match=f"`datasets` would leave out {left_out} of this folder"):
        list(source_of(path=path).documents())


def test_a_refused_folder_comes_with_a_pattern_of_the_files_that_are_used(tmp_path):
    path = write_rows(tmp_path / "rows", "x.jsonl", "a.parquet", "b.parquet")
    advice = r"rows/\*\.parquet, or declare `data_files` in its README\.md"
    with pytest.raises(UserError, match=advice):
        list(source_of(path=path).documents())


@pytest.mark.parametrize(
    ("names", "split", "texts"),
    [
        (["train.jsonl", "dev.jsonl", "test-0.jsonl"], "train", ["train"]),
        (["train.jsonl", "dev.jsonl", "test-0.jsonl"], "validation", ["dev"]),
        (["a.csv", "LICENSE.txt", "dataset_info.json"], "train", ["a"]),
        (["a.csv", ".hidden.csv"], "train", ["a"]),
        (["a.csv", "license_en.txt"], "train", ["a"]),
    ],
)
def test_files_of_other_splits_and_those_beside_the_data_are_not_missed(
    tmp_path, names, split, texts
):
    path = write_rows(tmp_path / "rows", *names)
    assert segments(source_of(path=path, split=split).documents()) == texts


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_that_the_library_saved_is_read(tmp_path, splits):
    data = datasets.Dataset.from_list([{"text": "a"}])
    saved = datasets.DatasetDict({"train": data, "test": data}) if splits else data
    saved.save_to_disk(tmp_path / "saved")
    assert segments(source_of(path=str(tmp_path / "saved")).documents()) == ["a"]


def test_a_readme_may_choose_the_files_of_a_folder(tmp_path):
    path = write_rows(tmp_path / "rows", "a.csv", "b.csv", "c.jsonl")
    write_readme(path, "data_files: b.csv")
    assert segments(source_of(path=path).documents()) == ["b"]


def write_readme(path, *options):
    lines = "".join(f"  {option}\n" for option in options)
    card = f"---\nconfigs:\n- config_name: default\n{lines}---\n"
    Path(path, "README.md").write_text(card)


@pytest.mark.parametrize(
    ("name", "options", "ignored"),
    [
        ("a.csv", ['quotechar: "|"'], "quotechar"),
        ("a.csv", ["skiprows: 1", 'sep: ";"'], "skiprows"),
        ("a.csv", ["encoding: latin-1"], "encoding"),
        ("a.csv", ["column_names: [text]"], "names, column_names"),
        ("a.txt", ["sample_by: paragraph"], "sample_by"),
        ("a.jsonl", ["encoding: utf-16"], "encoding"),
        ("a.parquet", ["filters: [[text, ==, b]]"], "filters"),
        ("a.csv", ['sep: ","', "encoding: utf-8", "chunksize: 9"], None),
        ("a.csv", ['delimiter: ","', "quotechar: '\"'"], None),
        ("a.csv", ["encoding: utf_8_sig", "keep_default_na: false", "na_values: [a]"], None),
        ("a.csv", ["engine: python", "thousands: ' '", "decimal: ','", "true_values: [a]"], None),
        ("a.jsonl", ["encoding: UTF-8", "use_threads: false", "block_size: 9"], None),
    ],
)
def test_options_of_a_readme_that_are_not_heeded_are_refused(tmp_path, name, options, ignored):
    path = write_rows(tmp_path / "rows", name)
    write_readme(path, f"data_files: {name}", *options)
    if ignored is None:
        assert segments(source_of(path=path).documents()) == ["a"]
        return
    reason = f"rows: its README .* not heeded: {ignored}; convert the files, .*rows/README.md"
    with pytest.raises(UserError, match=reason):
        list(source_of(path=path).documents())
