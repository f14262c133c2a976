"""Folders of tokenizers: whole only when both parts are there, and then ready for `prepare`."""

import json

import numpy as np
import pytest
import torch
from foreign import chameleon_file, spelled
from safetensors.torch import save_file

from moma.data.prepare import prepare
from moma.errors import UserError
from moma.runs import Tokenizers
from moma.tokenizers.chameleon import original_layout
from moma.tokenizers.folder import import_chameleon, make_codec, make_text_tokenizer
from moma.tokenizers.image import CodecConfig, ImageCodec
from moma.tokenizers.image_training import CodecTrainingConfig
from moma.tokenizers.text import TextTokenizerConfig, load_text_tokenizer
from moma.vocabulary import Vocabulary

SHAPE = CodecConfig(
    picture_size=16,
    patch=8,
    block_channels=(8,),
    layers_per_block=1,
    latent_channels=8,
    code_channels=8,
    codebook_size=8,
    norm_groups=4,
    middle_attention=False,
    encoder_middle=False,
)
TRAINING = CodecTrainingConfig(steps=4, batch_size=4, warmup_steps=1, free_steps=1, save_every=2)
TEXT = TextTokenizerConfig(vocabulary_size=300)
TEXTS = ["a red square on paper"] * 5
PICTURES = list(torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
CPU = torch.device("cpu")


def codec_in(folder, **changes):
    config = SHAPE.model_copy(update=changes)
    return make_codec(config, TRAINING, PICTURES[2:], PICTURES[:2], folder, 0, CPU, quiet=True)


@pytest.mark.parametrize("text_first", [True, False])
def test_the_vocabulary_follows_when_both_parts_are_there(tmp_path, text_first):
    folder = Tokenizers(tmp_path / "made")
    parts = [lambda: make_text_tokenizer(TEXT, 8, TEXTS, folder), lambda: codec_in(folder)]
    first, second = parts if text_first else reversed(parts)
    first()
    assert not folder.vocabulary.exists()
    second()
    vocabulary = Vocabulary.load(folder.vocabulary)
    assert (len(vocabulary.image_codes), vocabulary.codes_per_image) == (8, 4)
    assert not list(folder.path.rglob("*.partial")) and not list(folder.path.rglob("*.whole"))


def test_a_made_codec_leaves_its_log_and_measures_and_no_state(tmp_path):
    folder = Tokenizers(tmp_path)
    metrics = codec_in(folder)
    assert metrics["pictures"] == 2
    assert json.loads((folder.codec / "metrics.json").read_text()) == metrics
    left = sorted(path.name for path in (tmp_path / "codec_training").iterdir())
    assert left == ["metrics.jsonl", "samples"]
    assert ImageCodec.load(folder.codec).config == SHAPE


def test_nothing_is_replaced_and_parts_have_to_fit(tmp_path):
    folder = Tokenizers(tmp_path)
    make_text_tokenizer(TEXT, 8, TEXTS, folder)
    with pytest.raises(UserError, match=r"tokenizer\.json: is there already"):
        make_text_tokenizer(TEXT, 8, TEXTS, folder)
    with pytest.raises(UserError, match="names 8 image codes and the codec has 16"):
        codec_in(folder, codebook_size=16)
    codec_in(folder)
    with pytest.raises(UserError, match="codec: is there already"):
        codec_in(folder)
    folder.text.unlink()
    with pytest.raises(UserError, match="names 7 image codes and the codec has 8"):
        make_text_tokenizer(TEXT, 7, TEXTS, folder)
    assert not folder.text.exists()


@pytest.fixture(name="files")
def chameleon_files(tmp_path):
    """A tokenizer file and picture weights spelled as Chameleon's, with 205 codes."""
    torch.manual_seed(0)
    shape = {"block_channels": (32, 32, 32, 32), "layers_per_block": 1, "codebook_size": 205}
    sizes = {"picture_size": 16, "latent_channels": 8, "code_channels": 8}
    codec = ImageCodec(CodecConfig.model_validate(shape | sizes))
    layout = {name: value.contiguous() for name, value in original_layout(codec).items()}
    save_file(layout, tmp_path / "vqgan.safetensors")
    (tmp_path / "text_tokenizer.json").write_text(chameleon_file(as_words=False, special=False))
    return tmp_path / "text_tokenizer.json", tmp_path / "vqgan.safetensors"


def test_chameleons_files_become_a_folder_that_prepare_takes(files, tiny, tmp_path):
    folder = Tokenizers(tmp_path / "chameleon")
    text, weights = files
    vocabulary = import_chameleon(text, weights, folder, picture_size=16)
    assert vocabulary.size == 803 and vocabulary.codes_per_image == 4
    assert Vocabulary.load(folder.vocabulary) == vocabulary
    data = tiny.data.model_copy(
        update={"path": tmp_path / "data", "tokenizers": folder.path, "sources": tiny.data.sources}
    )
    prepare(data, tiny.text_tokenizer, tiny.codec, tiny.codec_training, 0, CPU, quiet=True)
    assert Vocabulary.load(Tokenizers(data.path).vocabulary) == vocabulary
    tokenizer = load_text_tokenizer(Tokenizers(data.path).text)
    ids = vocabulary.wrap_image(np.array([0, 12, 204, 3]))
    assert [tokenizer.id_to_token(id_) for id_ in ids] == [
        "<racm3:break>",
        *map(spelled, (0, 12, 204, 3)),
        "<eoss>",
    ]


def test_chameleons_files_have_to_fit(files, tmp_path):
    text, weights = files
    folder = Tokenizers(tmp_path / "chameleon")
    with pytest.raises(UserError, match="no such tokenizer file"):
        import_chameleon(tmp_path / "missing.json", weights, folder, 16)
    make_text_tokenizer(TEXT, 8, TEXTS, Tokenizers(tmp_path / "ours"))
    with pytest.raises(UserError, match="names 8 image codes and the codec has 205"):
        import_chameleon(tmp_path / "ours", weights, folder, 16)
    assert not folder.path.exists()
    import_chameleon(text, weights, folder, 16)
    with pytest.raises(UserError, match="is there already"):
        import_chameleon(text, weights, folder, 16)
