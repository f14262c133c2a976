"""Folders of tokenizers: made part by part, complete after any kill, ready for `prepare`."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moma.data.encode.prepare import prepare
from moma.data.outputs import exclude_outputs
from moma.errors import UserError
from moma.files import UNFINISHED
from moma.hub.chameleon_codec import load_chameleon_codec, original_layout
from moma.runs import Tokenizers
from moma.runtime.world import World
from moma.tokenizers.folder import (
    import_tokenizers,
    is_made,
    make_codec,
    make_text_tokenizer,
    read_metrics,
)
from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.image.metrics import measure_codec
from moma.tokenizers.image.train import CodecTrainingConfig
from moma.tokenizers.text import TextTokenizerConfig, load_text_tokenizer
from moma.vocabulary import Vocabulary
from tests.factories import codec_config, random_images
from tests.factories import make_codec as random_codec
from tests.hub.foreign import chameleon_code, chameleon_file

SHAPE = codec_config(patch=8, codebook_size=8)
TRAINING = CodecTrainingConfig(
    steps=4, batch_size=4, warmup_steps=1, quantizer_start_step=1, save_every=2
)
TEXT = TextTokenizerConfig(vocabulary_size=300)
TEXTS = ["a red square on paper"] * 5
IMAGES = list(random_images(12))
CPU = torch.device("cpu")


def codec_in(folder, **changes):
    config = SHAPE.model_copy(update=changes)
    make_codec(config, TRAINING, IMAGES[2:], IMAGES[:2], folder, 0, World(CPU), quiet=True)


def text_in(folder, **changes):
    make_text_tokenizer(TEXT, SHAPE.model_copy(update=changes), TEXTS, folder)


def codes_of(folder):
    vocabulary = Vocabulary.load(folder.vocabulary)
    return len(vocabulary.image_codes), vocabulary.codes_per_image


def unfinished_files(folder):
    return [path for path in folder.path.rglob("*") if path.name.endswith(UNFINISHED)]


def test_the_vocabulary_comes_with_the_text_tokenizer_and_follows_the_codec(tmp_path):
    folder = Tokenizers(tmp_path / "made")
    text_in(folder, image_size=32)
    assert codes_of(folder) == (8, 16)
    codec_in(folder)
    assert codes_of(folder) == (8, 4)
    assert not unfinished_files(folder)


def test_without_a_text_tokenizer_there_is_no_vocabulary(tmp_path):
    folder = Tokenizers(tmp_path / "made")
    codec_in(folder)
    assert not folder.vocabulary.exists()
    text_in(folder, image_size=32)
    assert codes_of(folder) == (8, 4)


def test_a_trained_codec_leaves_its_log_and_metrics_and_no_checkpoints(tmp_path):
    folder = Tokenizers(tmp_path)
    codec_in(folder)
    codec = ImageCodec.load(folder.codec)
    assert codec.config == SHAPE
    metrics = read_metrics(folder)
    assert metrics == measure_codec(codec, IMAGES[2:], IMAGES[:2])
    assert metrics.images == 2
    left = sorted(path.name for path in (tmp_path / "codec_training").iterdir())
    assert left == ["metrics.jsonl", "samples"]
    last = json.loads((tmp_path / "codec_training/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics.model_dump().items() <= last.items()


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json: cannot read"):
        read_metrics(Tokenizers(tmp_path))


def test_nothing_is_replaced_and_parts_must_fit(tmp_path):
    folder = Tokenizers(tmp_path)
    text_in(folder)
    with pytest.raises(UserError, match=r"tokenizer\.json: exists already"):
        text_in(folder)
    with pytest.raises(UserError, match="has 8 image codes and the codec has 16"):
        codec_in(folder, codebook_size=16)
    codec_in(folder)
    with pytest.raises(UserError, match="codec: exists already"):
        codec_in(folder)
    folder.text.unlink()
    with pytest.raises(UserError, match="has 7 image codes and the codec has 8"):
        text_in(folder, codebook_size=7)
    assert not folder.text.exists()


class KilledError(Exception):
    """Represents a kill: nothing in the program catches it."""


def killed_when(monkeypatch, name, run):
    """Run until a file or folder of that name would be renamed to its final path."""

    def replace(source, target):
        if Path(target).name == name:
            raise KilledError
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("moma.files.os.replace", replace)
        with pytest.raises(KilledError):
            run()


@pytest.mark.parametrize("first", ["text", "codec"])
def test_a_folder_is_completed_after_a_kill_before_the_vocabulary(tmp_path, monkeypatch, first):
    folder = Tokenizers(tmp_path)
    text, codec = partial(text_in, folder, image_size=32), partial(codec_in, folder)
    before, after, part = (
        (text, codec, folder.codec) if first == "text" else (codec, text, folder.text)
    )
    before()
    killed_when(monkeypatch, "vocabulary.json", after)
    assert part.exists()
    assert is_made(part, folder, SHAPE)
    assert codes_of(folder) == (8, 4)
    with pytest.raises(UserError, match="exists already"):
        is_made(part, folder, SHAPE)


def test_a_kill_before_the_text_tokenizer_leaves_everything_to_do(tmp_path, monkeypatch):
    folder = Tokenizers(tmp_path)
    killed_when(monkeypatch, "tokenizer.json", lambda: text_in(folder))
    assert not is_made(folder.text, folder, SHAPE)
    text_in(folder)
    assert codes_of(folder) == (8, 4) and not unfinished_files(folder)


def test_a_kill_while_the_codec_is_moved_into_place_repeats_no_step(tmp_path, monkeypatch):
    whole, folder = Tokenizers(tmp_path / "whole"), Tokenizers(tmp_path / "killed")
    codec_in(whole)
    killed_when(monkeypatch, "codec", lambda: codec_in(folder))
    state = folder.path / "codec_training" / "checkpoints"
    assert state.exists() and not folder.codec.exists()
    assert not is_made(folder.codec, folder, SHAPE)
    with monkeypatch.context() as patch:

        def step(*_):
            raise AssertionError("a step is repeated")

        patch.setattr("moma.tokenizers.image.train.CodecTrainer.take_step", step)
        # The next kill comes when the codec is in place and the checkpoints still exist.
        patch.setattr("moma.tokenizers.folder.complete", lambda *_: None)
        codec_in(folder)
    assert state.exists() and folder.codec.exists()
    assert is_made(folder.codec, folder, SHAPE)
    assert not state.exists()
    assert contents(folder.path) == contents(whole.path)


def contents(path):
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


@pytest.fixture(name="files", scope="module")
def chameleon_files(tmp_path_factory):
    """A tokenizer file and image weights with Chameleon's names, and 205 codes."""
    codec = random_codec(
        patch=1,
        block_channels=[32] * 4,
        codebook_size=205,
        norm_groups=32,
        encoder_middle=True,
        middle_attention=True,
    )
    layout = {name: value.contiguous() for name, value in original_layout(codec).items()}
    folder = tmp_path_factory.mktemp("chameleon")
    text, weights = folder / "text_tokenizer.json", folder / "vqgan.safetensors"
    save_file(layout, weights)
    text.write_text(chameleon_file(as_words=False, special=False))
    return text, weights


@pytest.fixture(scope="module")
def imported(files, tmp_path_factory):
    """These files as a folder of tokenizers."""
    folder = Tokenizers(tmp_path_factory.mktemp("imported") / "chameleon")
    text, weights = files
    import_files(text, weights, folder)
    return folder


def import_files(text, weights, folder):
    return import_tokenizers(text, load_chameleon_codec(weights, image_size=16), folder)


def test_prepare_uses_a_folder_of_chameleons_files(imported, tiny, tmp_path):
    vocabulary = Vocabulary.load(imported.vocabulary)
    assert vocabulary.size == 803 and vocabulary.codes_per_image == 4
    assert not exclude_outputs(imported.path.parent, ["chameleon"])  # so that no source reads it
    data = tiny.data.model_copy(
        update={"path": tmp_path / "data", "tokenizers": imported.path, "image_share": 0.125}
    )
    prepare(tiny.model_copy(update={"data": data}), CPU, quiet=True)
    assert Vocabulary.load(Tokenizers(data.path).vocabulary) == vocabulary
    tokenizer = load_text_tokenizer(Tokenizers(data.path).text)
    ids = vocabulary.wrap_image(np.array([0, 12, 204, 3]))
    assert [tokenizer.id_to_token(id_) for id_ in ids] == [
        "<racm3:break>",
        *map(chameleon_code, (0, 12, 204, 3)),
        "<eoss>",
    ]


def test_chameleons_files_must_fit(files, imported, tmp_path):
    text, weights = files
    folder = Tokenizers(tmp_path / "chameleon")
    with pytest.raises(UserError, match="no such tokenizer file"):
        import_files(tmp_path / "missing.json", weights, folder)
    text_in(Tokenizers(tmp_path / "ours"))
    with pytest.raises(UserError, match="has 8 image codes and the codec has 205"):
        import_files(tmp_path / "ours", weights, folder)
    assert not folder.path.exists()
    with pytest.raises(UserError, match="exists already"):
        import_files(text, weights, imported)


@pytest.mark.parametrize("name", ["tokenizer.json", "codec", "vocabulary.json"])
def test_a_killed_import_is_completed(files, imported, tmp_path, monkeypatch, name):
    text, weights = files
    folder = Tokenizers(tmp_path / "killed")
    killed_when(monkeypatch, name, lambda: import_files(text, weights, folder))
    import_files(text, weights, folder)
    assert contents(folder.path) == contents(imported.path)
