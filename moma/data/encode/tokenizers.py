"""The tokenizers of a data folder: trained on its sources, or copied from `data.tokenizers`.

A folder keeps its tokenizers: its manifest records what they were made with, and a configuration
that would make others is refused.
"""

from collections.abc import Iterator
from typing import Any

import torch

from moma.data.config import PrepareConfig
from moma.data.documents import Rejected
from moma.data.encode.corpus import Corpus, ReadableImages, require_training_images
from moma.data.encode.parts import copy_rejected
from moma.data.encode.rejected import rejected_line
from moma.data.provenance import DataFolder, Encoders
from moma.data.shards import REJECTED_FILE
from moma.errors import UserError, shell_command
from moma.files import atomic_open
from moma.runs import Tokenizers
from moma.runtime.world import World
from moma.tokenizers.folder import complete, make_codec, make_text_tokenizer
from moma.vocabulary import Vocabulary


def provide_tokenizers(
    config: PrepareConfig, folder: DataFolder, device: torch.device, quiet: bool
) -> Vocabulary:
    """Train or copy the tokenizers that a data folder lacks.

    Raises:
        UserError: the folder's tokenizers were made with another configuration, `data.tokenizers`
            names none that can be used, or they cannot be trained.
    """
    if config.data.tokenizers is not None:
        _copy(Tokenizers(config.data.tokenizers), folder, config.data.image_share)
    else:
        _train(config, folder, device, quiet)
    complete(folder.tokenizers, config.codec)
    return Vocabulary.load(folder.tokenizers.vocabulary)


def _train(config: PrepareConfig, folder: DataFolder, device: torch.device, quiet: bool) -> None:
    tokenizers = folder.tokenizers
    keys = {
        "seed": config.seed,
        **_prefixed("text_tokenizer", config.text_tokenizer.model_dump(mode="json")),
        **_prefixed("codec", config.codec.model_dump(mode="json")),
        **_prefixed("codec_training", config.codec_training.relevant_values),
    }
    if tokenizers.text.exists():
        folder.bind(keys)
    else:
        texts = _texts(config, folder, keys)
        make_text_tokenizer(config.text_tokenizer, config.codec, texts, tokenizers, quiet)
    if not tokenizers.codec.exists():
        _train_codec(config, folder, device, quiet)


def _texts(config: PrepareConfig, folder: DataFolder, keys: dict[str, Any]) -> Iterator[str]:
    """Yield the texts to train on; at their end, before the tokenizer exists, bind `keys`."""
    corpus = _corpus(folder, config.seed, config.text_tokenizer.max_documents)
    yield from corpus.texts()
    corpus.require_documents()
    folder.bind(keys)
    folder.record_sources(corpus.totals)


def _train_codec(
    config: PrepareConfig, folder: DataFolder, device: torch.device, quiet: bool
) -> None:
    """Train the codec; without images there is none, unless the recipe asks for images."""
    corpus = _corpus(folder, config.seed, config.codec_training.max_documents)
    images, share = corpus.images(held_out=False), config.data.image_share
    if not images and not share:
        return
    held_out = corpus.images(held_out=True)
    remedy = f"add a source of images, or set image_share, which is {share:g}, to 0"
    require_training_images(images, held_out, remedy)
    folder.record_sources(corpus.totals)
    # Encoding limits the fraction that cannot be read, for each source separately.
    training = ReadableImages(images, config.codec.image_size, max_unreadable=1)
    measured = ReadableImages(held_out, config.codec.image_size, max_unreadable=1)
    make_codec(
        config.codec,
        config.codec_training,
        training,
        measured if measured.has_readable else (),
        folder.tokenizers,
        config.seed,
        World(device),
        quiet,
    )


def _corpus(folder: DataFolder, seed: int, max_documents: int) -> Corpus:
    """Documents to train on; rejected ones that are too many are listed in the data folder."""
    data = folder.data

    def list_rejected(source: str, rows: list[Rejected]) -> str:
        with atomic_open(data.path / REJECTED_FILE) as file:
            for other in data.sources:
                if other.name != source:
                    copy_rejected(data.folder(other.name), file)
            file.writelines(rejected_line(source, row) for row in rows)
        return f"{REJECTED_FILE} in the data folder"

    return Corpus(
        data.sources,
        data.held_out,
        max_documents,
        data.max_rejected,
        check_images=True,
        list_rejected=list_rejected,
        seed=seed,
        part_bytes=data.part_bytes,
    )


def _copy(source: Tokenizers, folder: DataFolder, image_share: float) -> None:
    """Copy tokenizers into a data folder, unless that was done already."""
    if folder.has_copied_tokenizers and not source.path.exists():
        return  # the folder does not need them any longer
    source.require()
    for needed in (source.text, source.vocabulary):
        if not needed.exists():
            raise UserError(
                f"{needed}: missing, so data.tokenizers names an incomplete folder of tokenizers; "
                "complete it with the command that makes it"
            )
    if image_share and not source.codec.exists():
        command = shell_command("tokenizer", "train-image", "my.toml", "--out", source.path)
        raise UserError(
            f"{source.path}: has no image codec, and image_share is {image_share:g}; make one "
            f"with `{command}`, or set image_share to 0"
        )
    folder.bind(_prefixed("data.tokenizers", Encoders.from_folder(source).model_dump()))
    if not folder.tokenizers.vocabulary.exists():
        source.copy_to(folder.tokenizers)


def _prefixed(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}
