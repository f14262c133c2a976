"""What is no Chameleon, comes in no whole folder, or is more than Chameleon can express."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moma.errors import UserError
from moma.hub.chameleon import export_chameleon, import_chameleon
from moma.recipe import check, override, write_recipe
from moma.runs import Run
from moma.train.recipe import Recipe
from tests.hub.chameleon_port import chameleon_tokenizer, edit, random_port, save

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of the port, to be read only."""
    return save(random_port(), tmp_path_factory.mktemp("port") / "chameleon")


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy of the folder, to be broken."""
    shutil.copytree(saved, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["model.groups=moe_2t2i"], "experts"),
        (["model.groups=moe_1t1i"], "experts"),
        (["model.groups=mod"], "mixture-of-depths"),
        (["model.groups=dense", "model.query_key_norm=false"], "query_key_norm"),
        (["model.groups=dense", "model.tied_embeddings=true"], "tied_embeddings"),
    ],
)
def test_what_chameleon_cannot_express_is_refused(tiny, tmp_path, changes, named):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    write_recipe(check(Recipe, override(values, changes), "changed"), run.recipe)
    with pytest.raises(UserError, match=f"Chameleon has no .*{named}"):
        export_chameleon(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(folder: Path, change) -> None:
    """Change the weights in a folder's single file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


LAST = "model.layers.1.mlp.up_proj.weight"
WEIGHT_FAULTS = {
    "missing": (lambda w: w.pop(LAST), rf"1 missing: {LAST}; 0 unknown: none"),
    "unknown": (
        lambda w: w.update({"model.layers.2.bias": torch.zeros(1)}),
        r"0 missing: none; 1 unknown: model\.layers\.2\.bias",
    ),
    "shape": (lambda w: w.update({LAST: torch.zeros(2, 3)}), rf"{LAST} has shape \(2, 3\)"),
    "type": (lambda w: w.update({LAST: w[LAST].to(torch.int8)}), f"{LAST} is torch.int8"),
    "image weights": (
        lambda w: w.pop("model.vqmodel.quant_conv.weight"),
        r"1 missing: quant_conv\.weight",
    ),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_do_not_fit_are_refused_and_leave_nothing(broken, tmp_path, fault):
    change, message = WEIGHT_FAULTS[fault]
    rewrite(broken, change)
    with pytest.raises(UserError, match=message):
        import_chameleon(broken, Run(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"'model_type': Input should be 'chameleon'"),
        ({"attention_bias": True}, "'attention_bias'"),
        ({"tie_word_embeddings": True}, "'tie_word_embeddings'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'rope_parameters.rope_type'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "'rope_scaling.type'"),
        ({"num_attention_heads": 3}, "multiple of 2 × heads"),
        ({"vocab_size": 20}, "vocabulary_map has the id"),
        ({"vocabulary_map": {}}, "'vocabulary_map'"),
        ({"vocabulary_map": {"IMGIMGAZ": 4}}, "vocabulary_map: the tokenizer has no id for"),
        ({"num_hidden_layers": 3}, r"13 missing: model\.layers\.2"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(broken, tmp_path, changes, message):
    edit(broken, **changes)
    with pytest.raises(UserError, match=message):
        import_chameleon(broken, Run(tmp_path / "run"))


def test_a_tokenizer_of_another_vocabulary_is_refused(broken, tmp_path):
    ids = chameleon_tokenizer().get_vocab(with_added_tokens=True)
    swapped = ids | {"<eoss>": ids["<racm3:break>"], "<racm3:break>": ids["<eoss>"]}
    edit(broken, vocabulary_map=swapped)
    with pytest.raises(UserError, match=r"another vocabulary .*begin_image"):
        import_chameleon(broken, Run(tmp_path / "run"))


def break_file(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "name a folder that `transformers` wrote"),
        ("config.json", b"{", "not JSON"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"torn", "cannot read the weights"),
        ("model.safetensors.index.json", b"{}", "not an index"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}', "outside"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "b.safetens"),
        ("tokenizer.json", b"{", "cannot read the tokenizer"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(broken, tmp_path, name, content, message):
    break_file(broken, name, content)
    with pytest.raises(UserError, match=message):
        import_chameleon(broken, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_over(saved, tmp_path):
    run = Run(tmp_path / "run")
    import_chameleon(saved, run)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        import_chameleon(saved, Run(tmp_path / "there"))
    with pytest.raises(UserError, match="is there already"):
        export_chameleon(run, tmp_path / "there")
