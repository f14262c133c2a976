"""Weights without a model: renamed, joined, written in several files and read on demand."""

import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moma.errors import UserError
from moma.runtime.weights import (
    Weights,
    open_weights,
    read_tensors,
    save_tensors,
    unused_weight_files,
    write_weights,
)

INDEX = "model.safetensors.index.json"


def tensors(*names: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(4, 8, generator=draw) for name in names}


def assert_equal(weights: Weights, expected: dict[str, torch.Tensor]) -> None:
    assert weights.meta_tensors.keys() == expected.keys()
    found = weights.read(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert weights.meta_tensors[name].shape == value.shape
        assert weights.meta_tensors[name].dtype == value.dtype


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_others_can_read_weights_as_other_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_weights(Weights.from_tensors(tensors("a")), tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


def test_a_file_that_cannot_be_written_is_not_left_empty(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise SafetensorError("no space left on device")

    monkeypatch.setattr("moma.runtime.weights.save_file", fail)
    for content in (None, b"earlier"):
        file = tmp_path / "weights.safetensors"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(OSError, match=r"cannot write .*no space left.*weights\.safetensors"):
            save_tensors(tensors("a"), file)
        assert (file.read_bytes() if file.exists() else None) == content


def test_renamed_weights_omit_others():
    values = tensors("a", "b", "c")
    weights = Weights.from_tensors(values).renamed({"a": "b", "b": "x"})
    assert_equal(weights, {"b": values["a"], "x": values["b"]})


def test_a_union_of_weights_reads_from_both():
    one, other = tensors("a", "b"), tensors("c")
    joined = Weights.from_tensors(one).renamed({"a": "x", "b": "y"}) | Weights.from_tensors(other)
    assert_equal(joined, {"x": one["a"], "y": one["b"], "c": other["c"]})


@pytest.mark.parametrize(("file_bytes", "files"), [(1000, 1), (256, 2), (128, 3), (1, 3)])
def test_written_weights_can_be_read(tmp_path, file_bytes, files):
    values = tensors("a", "b", "c")
    values["a"] = values["a"].bfloat16().t()  # transposed and of another dtype
    write_weights(Weights.from_tensors(values), tmp_path, file_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").is_file() == (files > 1)
    assert_equal(open_weights(tmp_path), values)


@pytest.fixture
def sharded(tmp_path):
    """Tensors a, b, c in three files with an index."""
    write_weights(Weights.from_tensors(tensors("a", "b", "c")), tmp_path, 128)
    return tmp_path


def number(file: int, of: int = 3) -> str:
    return f"model-{file:05d}-of-{of:05d}.safetensors"


def test_files_that_the_index_does_not_name_are_ignored(sharded):
    save_file({"a": torch.ones(4, 8), "z": torch.ones(1)}, sharded / "a_stray.safetensors")
    save_file({"a": torch.ones(4, 8)}, sharded / number(1, of=7))
    assert_equal(open_weights(sharded), tensors("a", "b", "c"))
    assert unused_weight_files(sharded) == ["a_stray.safetensors", number(1, of=7)]


def test_other_files_beside_a_single_file_are_ignored(tmp_path):
    write_weights(Weights.from_tensors(tensors("a")), tmp_path)
    save_file({"a": torch.ones(4, 8)}, tmp_path / "old.safetensors")
    assert_equal(open_weights(tmp_path), tensors("a"))
    assert unused_weight_files(tmp_path) == ["old.safetensors"]


def test_a_complete_set_of_files_needs_no_index(sharded):
    (sharded / INDEX).unlink()
    assert_equal(open_weights(sharded), tensors("a", "b", "c"))
    (sharded / number(2)).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing"):
        open_weights(sharded)


def test_buffers_that_follow_from_the_configuration_are_ignored(sharded):
    values = load_file(sharded / number(1))
    buffers = ("layers.0.rotary_emb.inv_freq", "rotary_emb.cos_cached", "position_ids")
    save_file(values | {name: torch.ones(2) for name in buffers}, sharded / number(1))
    assert_equal(open_weights(sharded), tensors("a", "b", "c"))


def edit_index(folder, **entries):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= entries
    (folder / INDEX).write_text(json.dumps(index))


def repeat_key(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"b":', '"a":'))


FAULTS = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], r"model\.safetensors is missing"),
    "truncated": (
        lambda f: (f / number(1)).write_bytes((f / number(1)).read_bytes()[:-1]),
        r"model-00001-of-00003\.safetensors: cannot read",
    ),
    "empty file": (lambda f: (f / number(1)).write_bytes(b""), "cannot read the weights"),
    "huge header": (
        lambda f: (f / number(1)).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
        "cannot read the weights",
    ),
    "pickle": (lambda f: torch.save({"a": 1}, f / number(1)), "cannot read the weights"),
    "file missing": (lambda f: (f / number(3)).unlink(), "model-00003-of-00003"),
    "index lists a tensor that is not there": (
        lambda f: edit_index(f, d=number(1)),
        "model-00001-of-00003.safetensors: does not match .*: d, which is not in it",
    ),
    "index lists the wrong file": (lambda f: edit_index(f, a=number(2)), "does not match"),
    "index lacks a tensor": (
        lambda f: save_file({"a": torch.ones(1), "d": torch.ones(1)}, f / number(1)),
        "d, which the index does not list",
    ),
    "outside": (lambda f: edit_index(f, a="../x.safetensors"), "outside of the folder"),
    "absolute": (lambda f: edit_index(f, a="/x.safetensors"), "outside of the folder"),
    "no name": (lambda f: edit_index(f, a=3), "outside of the folder"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "not an index"),
    "list": (lambda f: (f / INDEX).write_text("[]"), "not a JSON object"),
    "torn index": (lambda f: (f / INDEX).write_text('{"weight_map'), "not valid JSON"),
    "nested index": (lambda f: (f / INDEX).write_text("[" * 100_000), "not valid JSON"),
    "duplicate key": (repeat_key, "'a' occurs twice"),
    "single file and index": (
        lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"),
        "both model.safetensors and",
    ),
    "tensor in two files": (
        lambda f: (
            (f / INDEX).unlink(),
            save_file({"a": torch.ones(1), "b": torch.ones(1)}, f / number(2)),
        ),
        "a is both in model-00001",
    ),
    "two sets without index": (
        lambda f: ((f / INDEX).unlink(), save_file({"a": torch.ones(1)}, f / number(1, of=2))),
        "several models",
    ),
    "huge count": (
        lambda f: (
            [(f / INDEX).unlink()]
            + [(f / number(n)).rename(f / number(n, of=99_999)) for n in (1, 2, 3)]
        ),
        "is missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders_are_refused_in_one_line(sharded, fault):
    break_folder, message = FAULTS[fault]
    break_folder(sharded)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(sharded)
    assert "\n" not in str(caught.value) and str(sharded) in str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [None, b"", b"torn", b"\xff" * 100])
def test_a_single_file_that_cannot_be_read_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: cannot read the weights") as caught:
        read_tensors(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[1], 5, {"state_dict": [1]}, {"state_dict": {"a": 1}}])
def test_a_file_of_torch_without_tensors_is_empty(tmp_path, values):
    torch.save(values, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt") == {}
