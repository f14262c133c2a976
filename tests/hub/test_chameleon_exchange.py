"""Chameleon's weights in and out, held against `transformers`' port with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moma.errors import UserError
from moma.hub.chameleon import export_chameleon, import_chameleon
from moma.model.routing import Routing
from moma.recipe import check, override, write_recipe
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import checkpoints_in, stored_weights
from moma.train.recipe import Recipe
from moma.train.restore import load_run

pytest.importorskip("transformers")

CODES, SIDE = 16, 32
CODES_PER_IMAGE = (SIDE // 2) ** 2
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
VOCABULARY = 256 + len(SPECIAL) + CODES + 37
VQ = {
    "resolution": SIDE,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 16,
    "num_embeddings": CODES,
}
# Norm, heads of keys and values, layers, width, hidden width: hidden is int(2 · 4d / 3) rounded up.
CONFIGS = {
    "pre": {"swin_norm": False, "num_key_value_heads": 4},
    "pre_grouped": {"swin_norm": False, "num_key_value_heads": 2},
    "swin": {"swin_norm": True, "num_key_value_heads": 4},
    "swin_grouped": {"swin_norm": True, "num_key_value_heads": 1, "hidden_size": 96},
}


def chameleon_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with Chameleon's names, special ids and codes first as in its file."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = [f"IMGIMG{str(code).translate(letters)}Z" for code in range(CODES)]
    # Names stand in the order of their letters, not of their numbers.
    reserved = [f"<reserved{number:05}>" for number in range(8706, 8740)]
    special = [*SPECIAL, *sorted(codes), "<eoss>", "<racm3:break>", "<image>", *reserved]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: id_ for id_, name in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


def random_port(seed=0, **changes):
    """The port with random weights; norms and biases too."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 400,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "vocabulary_map": chameleon_tokenizer().get_vocab(with_added_tokens=True),
        "vq_config": VQ,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    } | changes
    torch.manual_seed(seed)
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


def save(model, folder: Path, shard_size: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    chameleon_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit, types too."""
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys() and len(first) > 30
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


def mixed_sequences(seed: int = 1) -> torch.Tensor:
    """Two rows of text around a picture."""
    draw = torch.Generator().manual_seed(seed)
    ids = chameleon_tokenizer().get_vocab(with_added_tokens=True)
    codes = torch.tensor(sorted(id_ for name, id_ in ids.items() if name.startswith("IMGIMG")))
    text_BS = torch.randint(24, len(ids), (2, 20), generator=draw)
    picture_BL = codes[torch.randint(CODES, (2, CODES_PER_IMAGE), generator=draw)]
    ends = [torch.full((2, 1), ids[name]) for name in ("<racm3:break>", "<eoss>")]
    parts = [text_BS[:, :12], ends[0], picture_BL, ends[1], text_BS[:, 12:]]
    return torch.cat([torch.zeros(2, 1, dtype=torch.long), *parts], dim=1)


@torch.no_grad()
def port_logits(model, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Its own forward masks the image codes."""
    return model.lm_head(model.model(tokens_BS).last_hidden_state)


@torch.no_grad()
def our_logits(run: Run, tokens_BS: torch.Tensor) -> torch.Tensor:
    model, _ = load_run(run)
    return model.cpu()(tokens_BS, routing=Routing(by="causal")).logits_BSV


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of the port, to be read only."""
    return save(random_port(), tmp_path_factory.mktemp("port") / "chameleon")


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy of the folder, to be broken."""
    shutil.copytree(saved, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("imported") / "run")
    import_chameleon(saved, run)
    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_the_ports_weights_give_the_ports_logits_and_come_back_bit_for_bit(name, tmp_path):
    from transformers import ChameleonForConditionalGeneration

    port = random_port(seed=len(name), **CONFIGS[name])
    run = Run(tmp_path / "run")
    import_chameleon(save(port, tmp_path / "port"), run)
    tokens_BS = mixed_sequences()
    expected_BSV = port_logits(port, tokens_BS)
    assert expected_BSV.std() > 0.1
    torch.testing.assert_close(our_logits(run, tokens_BS), expected_BSV, atol=1e-4, rtol=0)
    export_chameleon(run, tmp_path / "again")
    assert_same_weights(tmp_path / "port", tmp_path / "again")
    again = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(port_logits(again, tokens_BS), expected_BSV)
    config, before = again.config.to_dict(), port.config.to_dict()
    assert VQ.items() <= config.pop("vq_config").items()
    assert config | {"_name_or_path": "", "vq_config": before["vq_config"]} == before


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"swin_norm": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rms_norm_eps": 1e-2},
    ],
)
def test_every_setting_matters_to_the_logits_that_are_compared(imported, change):
    """The same weights under another configuration are another model."""
    difference_BSV = port_logits(random_port(**change), mixed_sequences()) - our_logits(
        imported, mixed_sequences()
    )
    assert (difference_BSV.abs().max() > 1e-2) == bool(change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_files_of_a_smaller_type_come_back_in_several_files(dtype, tmp_path):
    port = save(random_port().to(dtype), tmp_path / "port", shard_size="200KB")
    assert len(list(port.glob("*.safetensors"))) > 2
    run = Run(tmp_path / "run")
    import_chameleon(port, run, file_bytes=100_000)
    (checkpoint,) = checkpoints_in(run.checkpoints)
    assert len(list((checkpoint / "tensors").glob("*.safetensors"))) > 2
    export_chameleon(run, tmp_path / "again", file_bytes=150_000)
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    assert_same_weights(port, tmp_path / "again")
    stored = stored_weights(checkpoint)
    assert {outline.dtype for outline in stored.outlines.values()} == {dtype}
    model, _ = load_run(run)
    value = stored.read(["norm.weight"])["norm.weight"]
    assert torch.equal(model.norm.weight.cpu(), value.float())


def test_files_are_written_a_part_at_a_time(saved, tmp_path, monkeypatch):
    """No more than a file's worth of weights is asked for at once."""
    asked = []
    whole = safe_open

    class Watched:
        def __init__(self, *arguments):
            self.opened = whole(*arguments)

        def __enter__(self):
            asked.append(0)
            return self

        def __exit__(self, *_):
            pass

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            tensor = self.opened.get_tensor(name)
            asked[-1] += tensor.nbytes
            return tensor

    monkeypatch.setattr("moma.runtime.weights.safe_open", Watched)
    import_chameleon(saved, Run(tmp_path / "run"), file_bytes=100_000)
    assert len(asked) > 3 and max(asked[1:]) <= 100_000  # the first looks at outlines alone


def test_the_run_keeps_what_the_folder_tells(imported):
    model, recipe = load_run(imported)
    assert recipe.model.norm == "pre" and recipe.model.rope_theta == 5000
    assert recipe.model.hidden_width == 256 and recipe.model.groups == "dense"
    assert recipe.data.row_length == 400 and recipe.codec.codebook_size == CODES
    vocabulary = model.vocabulary
    assert vocabulary.size == VOCABULARY and vocabulary.codes_per_image == CODES_PER_IMAGE
    ids = chameleon_tokenizer().get_vocab(with_added_tokens=True)
    assert vocabulary.image_codes[10] == ids["IMGIMGBAZ"]
    assert vocabulary.begin_image == ids["<racm3:break>"] and vocabulary.padding == ids["<pad>"]


def our_run(folder: Path, tiny: Recipe, *changes: str) -> Run:
    """A trained run of ours with its own tokenizers."""
    from moma.runtime.world import World
    from moma.train.loop import train

    values = override(tiny.model_dump(mode="json", by_alias=True), [f"run={folder}", *changes])
    values = {key: value for key, value in values.items() if value is not None}
    return train(check(Recipe, values, "ours"), World(torch.device("cpu")), quiet=True)


def test_a_run_of_ours_goes_out_and_comes_back(tiny, tmp_path):
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration

    run = our_run(tmp_path / "run", tiny, "model.groups=dense", "model.kv_heads=1")
    notes = export_chameleon(run, tmp_path / "port")
    assert any("no picture weights" in note for note in notes)  # its codec folds pixels
    port = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "port").eval()
    model, recipe = load_run(run)
    vocabulary = model.vocabulary
    draw = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(vocabulary.size, (2, 40), generator=draw)
    torch.testing.assert_close(
        our_logits(run, tokens_BS), port_logits(port, tokens_BS), atol=1e-4, rtol=0
    )
    # The port masks exactly the image codes, and its tokenizer gives our ids.
    masked = port(tokens_BS).logits[0, 0] == torch.finfo(torch.float32).min
    assert masked.nonzero().flatten().tolist() == sorted(vocabulary.image_codes)
    mapping = port.model.vocabulary_mapping
    codes = torch.arange(len(vocabulary.image_codes))
    assert mapping.convert_img2bpe(codes).tolist() == list(vocabulary.image_codes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "port")
    assert tokenizer("<racm3:break>IMGIMGBCZ<eoss> red")["input_ids"] == [
        vocabulary.begin_image,
        vocabulary.image_codes[12],
        vocabulary.end_image,
        *tokenizer(" red")["input_ids"],
    ]
    back = Run(tmp_path / "back")
    import_chameleon(tmp_path / "port", back, tokenizers=run.tokenizers)
    assert torch.equal(our_logits(back, tokens_BS), our_logits(run, tokens_BS))
    assert load_run(back)[0].vocabulary == vocabulary
    assert recipe.data.row_length == load_run(back)[1].data.row_length


def test_a_codec_of_chameleons_shape_goes_out_without_its_decoder(imported, tmp_path):
    from transformers import ChameleonForConditionalGeneration

    from moma.tokenizers.image import ImageCodec

    run = Run(tmp_path / "run")
    shutil.copytree(imported.path, run.path)
    before = ImageCodec.load(run.tokenizers.codec)
    torch.manual_seed(3)
    codec = ImageCodec(before.config.model_copy(update={"decoder": True}))
    codec.save(run.tokenizers.codec)
    notes = export_chameleon(run, tmp_path / "port")
    assert notes == ["this format has no picture decoder; it stays in the run"]
    port = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "port").eval()
    picture_B3HW = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        ids_BL = port.get_image_tokens(picture_B3HW)
    codes_BL = codec.eval().encode(picture_B3HW)
    ids = torch.tensor(load_run(run)[0].vocabulary.image_codes)
    assert torch.equal(ids_BL.long(), ids[codes_BL])


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


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LAST = "model.layers.1.mlp.up_proj.weight"
WEIGHT_FAULTS = {
    "missing": (lambda w: w.pop(LAST), rf"1 missing: {LAST}; 0 unknown: none"),
    "unknown": (
        lambda w: w.update({"model.layers.2.bias": torch.zeros(1)}),
        r"0 missing: none; 1 unknown: model\.layers\.2\.bias",
    ),
    "shape": (lambda w: w.update({LAST: torch.zeros(2, 3)}), rf"{LAST} has shape \(2, 3\)"),
    "type": (lambda w: w.update({LAST: w[LAST].to(torch.int8)}), f"{LAST} is torch.int8"),
    "picture weights": (
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


def test_nothing_is_written_over(saved, imported, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        import_chameleon(saved, Run(tmp_path / "there"))
    with pytest.raises(UserError, match="is there already"):
        export_chameleon(imported, tmp_path / "there")


def test_without_a_tokenizer_the_run_takes_ids_alone(broken, tmp_path):
    (broken / "tokenizer.json").unlink()
    run = Run(tmp_path / "run")
    (note,) = import_chameleon(broken, run)
    assert "no tokenizer.json" in note
    assert our_logits(run, mixed_sequences()).shape[-1] == VOCABULARY
    notes = export_chameleon(run, tmp_path / "out")
    assert len(notes) == 2 and not (tmp_path / "out" / "tokenizer.json").exists()


def test_embeddings_may_have_more_rows_than_names(tmp_path):
    port = random_port(vocab_size=VOCABULARY + 7)
    run = Run(tmp_path / "run")
    notes = import_chameleon(save(port, tmp_path / "port"), run)
    assert any("7 ids without a name" in note for note in notes)
    logits_BSV = our_logits(run, mixed_sequences())
    expected_BSV = port_logits(port, mixed_sequences())
    torch.testing.assert_close(logits_BSV, expected_BSV, atol=1e-4, rtol=0)
    export_chameleon(run, tmp_path / "again")
    assert_same_weights(tmp_path / "port", tmp_path / "again")


def test_dropout_inside_of_attention_is_told(broken, tmp_path):
    edit(broken, attention_dropout=0.1)
    notes = import_chameleon(broken, Run(tmp_path / "run"))
    assert any("attention_dropout is not kept" in note for note in notes)


def test_an_imported_run_trains_on_in_another_run_only(imported, tiny, tmp_path):
    from moma.data.prepare import prepare

    model = load_run(imported)[1].model
    changes = [f"data.path={tmp_path / 'data'}", f"data.tokenizers={imported.path}"]
    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    values = override(values, [*changes, "data.row_length=512", "data.picture_share=0.25"])
    values |= {"model": model.model_dump(mode="json"), "run": str(tmp_path / "run")}
    recipe = check(Recipe, values | {"from": str(imported.path)}, "on")
    sections = (recipe.data, recipe.text_tokenizer, recipe.codec, recipe.codec_training)
    prepare(*sections, recipe.seed, torch.device("cpu"), quiet=True)
    trained = our_run(tmp_path / "run", recipe, "pretrain.steps=1")
    assert trained.read_metrics()[-1]["step"] == 1
    with pytest.raises(UserError, match="holds weights alone"):
        measured = recipe.model_copy(update={"run": imported.path, "from_": None})
        shutil.copytree(imported.path, tmp_path / "same")
        write_recipe(
            measured.model_copy(update={"run": tmp_path / "same"}),
            tmp_path / "same" / "recipe.toml",
        )
        our_run(tmp_path / "same", measured)


def test_the_run_is_measured_on_the_data_of_a_recipe(saved, imported, tiny, tmp_path):
    from moma.data.prepare import prepare
    from moma.evaluate.perplexity import evaluate

    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    changes = [f"data.path={tmp_path / 'data'}", f"data.tokenizers={imported.path}"]
    values = override(values, [*changes, "data.row_length=512", "data.picture_share=0.25"])
    recipe = check(Recipe, values, "measured")
    run = Run(tmp_path / "run")
    import_chameleon(saved, run, recipe=recipe)
    sections = (recipe.data, recipe.text_tokenizer, recipe.codec, recipe.codec_training)
    prepare(*sections, recipe.seed, torch.device("cpu"), quiet=True)
    model, kept = load_run(run)
    assert kept.data == recipe.data and kept.model == load_run(imported)[1].model
    result = evaluate(model, kept, "causal", quiet=True)
    assert result["loss_text"] and result["loss_image"]


def test_tokenizers_of_a_folder_serve_as_given(saved, imported, tmp_path):
    run = Run(tmp_path / "run")
    import_chameleon(saved, run, tokenizers=Tokenizers(imported.path))
    assert load_run(run)[0].vocabulary == load_run(imported)[0].vocabulary
