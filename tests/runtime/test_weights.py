"""Weights without a model: renamed, joined, written in parts and read when needed."""

import pytest
import torch

from moma.errors import UserError
from moma.runtime.weights import Weights, open_weights, write_weights


def tensors(*names: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(4, 8, generator=draw) for name in names}


def assert_equal(weights: Weights, expected: dict[str, torch.Tensor]) -> None:
    assert weights.outlines.keys() == expected.keys()
    found = weights.read(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert weights.outlines[name].shape == value.shape
        assert weights.outlines[name].dtype == value.dtype


def test_renamed_weights_leave_others_out():
    values = tensors("a", "b", "c")
    weights = Weights.of(values).renamed({"a": "b", "b": "x"})
    assert_equal(weights, {"b": values["a"], "x": values["b"]})


def test_joined_weights_come_from_either_side():
    one, other = tensors("a", "b"), tensors("c")
    joined = Weights.of(one).renamed({"a": "x", "b": "y"}) | Weights.of(other)
    assert_equal(joined, {"x": one["a"], "y": one["b"], "c": other["c"]})


@pytest.mark.parametrize(("file_bytes", "files"), [(1000, 1), (256, 2), (128, 3), (1, 3)])
def test_what_is_written_is_read_again(tmp_path, file_bytes, files):
    values = tensors("a", "b", "c")
    values["a"] = values["a"].bfloat16().t()  # neither its order nor its type is the usual
    write_weights(Weights.of(values), tmp_path, file_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").is_file() == (files > 1)
    assert_equal(open_weights(tmp_path), values)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        open_weights(tmp_path)
