"""Import and export of Chameleon, compared with `transformers`' port with random weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moma.errors import UserError
from moma.hub.chameleon import export_chameleon, import_chameleon
from moma.recipe import check, override
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import checkpoints_in, stored_weights
from moma.train.recipe import Recipe
from moma.train.restore import load_run
from tests.hub.chameleon_port import (
    CODES,
    CODES_PER_IMAGE,
    SIDE,
    VOCABULARY,
    VQ,
    assert_same_weights,
    chameleon_tokenizer,
    edit,
    mixed_sequences,
    our_logits,
    port_logits,
    random_port,
    random_settings,
    save,
)

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("imported") / "run")
    import_chameleon(saved, run)
    return run


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("swin", [False, True])
def test_imported_weights_give_the_ports_logits_and_are_exported_unchanged(
    swin, grouped, seed, tmp_path
):
    from transformers import ChameleonForConditionalGeneration

    port = random_port(seed, **random_settings(4 * seed + 2 * swin + grouped, swin, grouped))
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
def test_every_key_affects_the_logits(imported, change):
    """The same weights under another configuration are another model."""
    difference_BSV = port_logits(random_port(**change), mixed_sequences()) - our_logits(
        imported, mixed_sequences()
    )
    assert (difference_BSV.abs().max() > 1e-2) == bool(change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_files_of_a_smaller_dtype_are_exported_unchanged(dtype, tmp_path):
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
    assert {meta_tensor.dtype for meta_tensor in stored.meta_tensors.values()} == {dtype}
    model, _ = load_run(run)
    value = stored.read(["norm.weight"])["norm.weight"]
    assert torch.equal(model.norm.weight.cpu(), value.float())


def test_weights_are_read_a_file_at_a_time(saved, tmp_path, monkeypatch):
    """No more than a file's worth of weights is read at once."""
    read: list[int] = []
    whole = safe_open

    class Watched:
        def __init__(self, file, *arguments):
            self.opened, self.is_source = whole(file, *arguments), file.parent == saved

        def __enter__(self):
            read.append(0)
            return self

        def __exit__(self, *_):
            pass

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            tensor = self.opened.get_tensor(name)
            read[-1] += tensor.nbytes * self.is_source
            return tensor

    monkeypatch.setattr("moma.runtime.weights.safe_open", Watched)
    import_chameleon(saved, Run(tmp_path / "run"), file_bytes=100_000)
    parts = [size for size in read if size][3:]  # before: shapes, twice; codec
    assert len(parts) > 3 and max(parts) <= 100_000


def test_the_run_has_the_folders_configuration(imported):
    model, recipe = load_run(imported)
    assert recipe.model.norm == "pre" and recipe.model.rope_theta == 5000
    assert recipe.model.hidden_width == 256 and recipe.model.groups == "dense"
    assert recipe.data.sequence_length == 128 and recipe.codec.codebook_size == CODES
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


def test_a_dense_run_is_exported_and_imported_unchanged(tiny, tmp_path):
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration

    run = our_run(tmp_path / "run", tiny, "model.groups=dense", "model.kv_heads=1")
    notes = export_chameleon(run, tmp_path / "port")
    assert any("no image weights" in note for note in notes)  # its codec folds pixels
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
    assert recipe.data.sequence_length == load_run(back)[1].data.sequence_length


def test_a_codec_of_chameleons_shape_is_exported_without_its_decoder(imported, tmp_path):
    from transformers import ChameleonForConditionalGeneration

    from moma.tokenizers.image.codec import ImageCodec

    run = Run(tmp_path / "run")
    shutil.copytree(imported.path, run.path)
    before = ImageCodec.load(run.tokenizers.codec)
    torch.manual_seed(3)
    codec = ImageCodec(before.config.model_copy(update={"decoder": True}))
    codec.save(run.tokenizers.codec)
    notes = export_chameleon(run, tmp_path / "port")
    assert notes == ["this format has no image decoder; it stays in the run"]
    port = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "port").eval()
    image_B3HW = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        ids_BL = port.get_image_tokens(image_B3HW)
    codes_BL = codec.eval().encode(image_B3HW)
    ids = torch.tensor(load_run(run)[0].vocabulary.image_codes)
    assert torch.equal(ids_BL.long(), ids[codes_BL])


def test_without_a_tokenizer_the_run_takes_only_ids(broken, tmp_path):
    (broken / "tokenizer.json").unlink()
    run = Run(tmp_path / "run")
    (note,) = import_chameleon(broken, run)
    assert "no tokenizer.json" in note
    assert our_logits(run, mixed_sequences()).shape[-1] == VOCABULARY
    notes = export_chameleon(run, tmp_path / "out")
    assert len(notes) == 2 and not (tmp_path / "out" / "tokenizer.json").exists()


def test_there_may_be_more_embeddings_than_names(tmp_path):
    port = random_port(vocab_size=VOCABULARY + 7)
    run = Run(tmp_path / "run")
    notes = import_chameleon(save(port, tmp_path / "port"), run)
    assert any("7 ids without a name" in note for note in notes)
    logits_BSV = our_logits(run, mixed_sequences())
    expected_BSV = port_logits(port, mixed_sequences())
    torch.testing.assert_close(logits_BSV, expected_BSV, atol=1e-4, rtol=0)
    export_chameleon(run, tmp_path / "again")
    assert_same_weights(tmp_path / "port", tmp_path / "again")


def test_dropout_inside_attention_is_reported(broken, tmp_path):
    edit(broken, attention_dropout=0.1)
    notes = import_chameleon(broken, Run(tmp_path / "run"))
    assert any("attention_dropout is not imported" in note for note in notes)


def test_an_imported_run_is_trained_further_only_in_another_run(imported, tiny, tmp_path):
    from moma.data.encode.prepare import prepare

    model = load_run(imported)[1].model
    changes = [f"data.path={tmp_path / 'data'}", f"data.tokenizers={imported.path}"]
    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    values = override(values, [*changes, "data.sequence_length=128", "data.image_share=0.25"])
    values |= {"model": model.model_dump(mode="json"), "run": str(tmp_path / "run")}
    recipe = check(Recipe, values | {"from": str(imported.path)}, "on")
    prepare(recipe, torch.device("cpu"), quiet=True)
    trained = our_run(tmp_path / "run", recipe, "pretrain.steps=1")
    assert trained.read_metrics()[-1]["step"] == 1
    with pytest.raises(UserError, match="has only weights"):
        measured = recipe.model_copy(update={"run": imported.path, "from_": None})
        shutil.copytree(imported.path, tmp_path / "same")
        same = Run(tmp_path / "same")
        same.update_recipe(measured.model_copy(update={"run": same.path}))
        our_run(tmp_path / "same", measured)


def test_an_imported_run_is_evaluated_on_the_data_of_a_recipe(saved, imported, tiny, tmp_path):
    from moma.data.encode.prepare import prepare
    from moma.evaluate.perplexity import evaluate

    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    changes = [f"data.path={tmp_path / 'data'}", f"data.tokenizers={imported.path}"]
    values = override(values, [*changes, "data.sequence_length=128", "data.image_share=0.25"])
    recipe = check(Recipe, values, "measured")
    run = Run(tmp_path / "run")
    import_chameleon(saved, run, recipe=recipe)
    prepare(recipe, torch.device("cpu"), quiet=True)
    model, kept = load_run(run)
    assert kept.data == recipe.data and kept.model == load_run(imported)[1].model
    result = evaluate(model, kept, "causal", quiet=True)
    assert result["loss_text"] and result["loss_image"]


def test_given_tokenizers_are_used(saved, imported, tmp_path):
    run = Run(tmp_path / "run")
    import_chameleon(saved, run, tokenizers=Tokenizers(imported.path))
    assert load_run(run)[0].vocabulary == load_run(imported)[0].vocabulary
