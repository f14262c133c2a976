"""Folders that are not Chameleon's, incomplete or contradictory; runs that it cannot express."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moma.errors import UserError
from moma.hub.chameleon import export_chameleon, import_chameleon
from moma.hub.chameleon_codec import load_chameleon_codec
from moma.recipe import check, override
from moma.runs import Run, Tokenizers
from moma.train.recipe import Recipe
from tests.hub.chameleon_port import VQ, chameleon_tokenizer, edit, random_port, save

pytest.importorskip("transformers")


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
    run.create(check(Recipe, override(values, changes), "changed"), Tokenizers(tiny.data.path))
    with pytest.raises(UserError, match=f"Chameleon has no .*{named}"):
        export_chameleon(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MAP = chameleon_tokenizer().get_vocab(with_added_tokens=True)


def rewrite(folder: Path, change) -> None:
    """Change the weights in a folder's single file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


LAST = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.vqmodel.quant_conv.bias"
WEIGHT_FAULTS = {
    "missing": (lambda w: w.pop(LAST), rf"1 missing: {LAST}; 0 unknown: none"),
    "unknown": (
        lambda w: w.update({"model.layers.2.bias": torch.zeros(1)}),
        r"0 missing: none; 1 unknown: model\.layers\.2\.bias",
    ),
    "shape": (lambda w: w.update({LAST: torch.zeros(2, 3)}), rf"{LAST} has shape \(2, 3\)"),
    "type": (lambda w: w.update({LAST: w[LAST].to(torch.int8)}), f"{LAST} is torch.int8"),
    "double": (
        lambda w: w.update({LAST: w[LAST].double()}),
        rf"{LAST} is torch.float64\); convert",
    ),
    "unknown image weight": (
        lambda w: w.update({"model.vqmodel.color": torch.zeros(1)}),
        r"1 unknown: color",
    ),
    "image weight of integers": (
        lambda w: w.update({BIAS: w[BIAS].to(torch.int32)}),
        r"quant_conv\.bias is torch.int32",
    ),
    "image weight that is not finite": (lambda w: w[BIAS].fill_(torch.nan), "NaN or infinite"),
    "image weight twice": (
        lambda w: w.update({BIAS.removeprefix("model.vqmodel."): w[BIAS].clone()}),
        r"unknown: quant_conv\.bias",
    ),
    "image weights": (
        lambda w: w.pop("model.vqmodel.quant_conv.weight"),
        r"1 missing: quant_conv\.weight",
    ),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_do_not_match_are_refused_and_leave_nothing(broken, tmp_path, fault):
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
        ({"vocabulary_map": MAP | {"<eoss>": -1}}, "vocabulary_map: .*at least 0"),
        ({"vocabulary_map": MAP | {"<eoss>": 0}}, "vocabulary_map: .*an id has two meanings"),
        ({"vocabulary_map": MAP | {"<eoss>": 2**40}}, "vocabulary_map: .*size"),
        ({"num_hidden_layers": 3}, r"13 missing: model\.layers\.2"),
        # Built on the meta device, so that these take neither memory nor much time.
        ({"num_hidden_layers": 102}, "1300 missing"),
        ({"hidden_size": 2**20}, "has shape"),
        ({"vocab_size": 2**24}, "has shape"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers': Input should be less"),
        ({"hidden_size": 2**40}, "'hidden_size': Input should be less"),
        ({"intermediate_size": 2**40}, "'intermediate_size': Input should be less"),
        ({"vocab_size": 2**40}, "'vocab_size': Input should be less"),
        ({"max_position_embeddings": 0}, "'max_position_embeddings': Input should be greater"),
        ({"rms_norm_eps": -1}, "'rms_norm_eps': Input should be greater"),
        ({"vq_config": VQ | {"resolution": 2**40}}, "'vq_config.resolution': Input should be less"),
    ],
)
def test_an_unsupported_configuration_is_refused(broken, tmp_path, changes, message):
    edit(broken, **changes)
    with pytest.raises(UserError, match=message):
        import_chameleon(broken, Run(tmp_path / "run"))


def test_a_tokenizer_of_another_vocabulary_is_refused(broken, tmp_path):
    ids = chameleon_tokenizer().get_vocab(with_added_tokens=True)
    swapped = ids | {"<eoss>": ids["<racm3:break>"], "<racm3:break>": ids["<eoss>"]}
    edit(broken, vocabulary_map=swapped)
    with pytest.raises(UserError, match=r"another vocabulary .*begin_image"):
        import_chameleon(broken, Run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_embeddings", 8),
        ("embed_dim", 4),
        ("base_channels", 64),
        ("num_res_blocks", 3),
        ("latent_channels", 64),
        ("attn_type", "none"),
    ],
)
def test_a_vq_config_that_contradicts_the_weights_is_refused(broken, tmp_path, key, value):
    edit(broken, vq_config=VQ | {key: value})
    with pytest.raises(UserError, match=f"config.json: {key} = {value}, but the weights have"):
        import_chameleon(broken, Run(tmp_path / "run"))


def test_a_tokenizer_with_other_text_ids_is_refused(broken, tmp_path):
    ids = chameleon_tokenizer().get_vocab(with_added_tokens=True)
    edit(broken, vocabulary_map=ids | {"a": ids["b"], "b": ids["a"]})
    with pytest.raises(UserError, match=r"another vocabulary .*'a' is"):
        import_chameleon(broken, Run(tmp_path / "run"))


def test_duplicate_keys_of_the_configuration_are_refused(broken, tmp_path):
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text.replace("{", '{"hidden_size": 32,', 1))
    with pytest.raises(UserError, match="'hidden_size' occurs twice"):
        import_chameleon(broken, Run(tmp_path / "run"))


def test_stray_weights_are_not_read_and_are_named(saved, broken, tmp_path):
    weights = {n: torch.zeros_like(w) for n, w in load_file(broken / "model.safetensors").items()}
    save_file(weights, broken / "vq_old.safetensors")
    clean, stray = Run(tmp_path / "clean"), Run(tmp_path / "stray")
    import_chameleon(saved, clean)
    assert any("vq_old.safetensors" in note for note in import_chameleon(broken, stray))
    codecs = [(run.tokenizers.codec / "model.safetensors").read_bytes() for run in (clean, stray)]
    assert codecs[0] == codecs[1]
    assert load_chameleon_codec(broken).codebook.abs().sum() > 0


def test_old_buffers_and_a_missing_index_are_accepted(tmp_path):
    port = save(random_port(), tmp_path / "port", "100KB")
    (port / "model.safetensors.index.json").unlink()
    first = min(port.glob("model-*.safetensors"))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(first) | buffer, first)
    import_chameleon(port, Run(tmp_path / "run"))
    assert Run(tmp_path / "run").recipe.is_file()


def break_file(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "choose another folder"),
        ("config.json", b"{", "not valid JSON"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"torn", "cannot read the weights"),
        ("model.safetensors.index.json", b"{}", "not an index"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}', "outside"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "b.safetens"),
        ("tokenizer.json", b"{", "cannot read the tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused(broken, tmp_path, name, content, message):
    break_file(broken, name, content)
    with pytest.raises(UserError, match=message):
        import_chameleon(broken, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(saved, tmp_path):
    run = Run(tmp_path / "run")
    import_chameleon(saved, run)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        import_chameleon(saved, Run(tmp_path / "there"))
    with pytest.raises(UserError, match="exists already"):
        export_chameleon(run, tmp_path / "there")
    (tmp_path / "new.writing").mkdir()
    (tmp_path / "new.writing" / "mine.txt").write_text("mine")
    for write in (
        lambda: import_chameleon(saved, Run(tmp_path / "new")),
        lambda: export_chameleon(run, tmp_path / "new"),
    ):
        with pytest.raises(UserError, match=r"new\.writing: exists already"):
            write()
    assert (tmp_path / "new.writing" / "mine.txt").read_text() == "mine"
