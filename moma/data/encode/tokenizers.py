"""The tokenizers of a data folder: trained on its sources, or taken from another folder.

    sources → texts → BPE ─┐                     data.tokenizers → a copy ─┐
            → images → codec ─┴→ vocabulary                              ┴→ vocabulary

A folder keeps the tokenizers that it has: a note says what they were made with, and settings that
would have made others are refused.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moma.data.encode.corpus import ReadableImages
from moma.data.encode.training_documents import TrainingDocuments
from moma.data.shards import Encoders
from moma.errors import UserError
from moma.files import atomic_write
from moma.runs import Tokenizers
from moma.tokenizers.folder import complete, make_codec, make_text_tokenizer
from moma.tokenizers.image.codec import CODEC_FILES, CodecConfig
from moma.tokenizers.image.train import CodecTrainingConfig
from moma.tokenizers.text import TextTokenizerConfig
from moma.vocabulary import Vocabulary

_NOTE_FILE = "prepared_with.json"
_TAKEN = "data.tokenizers"
_MOST_NAMED = 5


def provide_tokenizers(
    reading: TrainingDocuments,
    text: TextTokenizerConfig,
    codec: CodecConfig,
    training: CodecTrainingConfig,
    seed: int,
    device: torch.device,
    quiet: bool,
) -> Vocabulary:
    """Make or take the tokenizers of `data.path`, as far as they are not there.

    Args:
        reading: the recipe's data, and its documents.
        text, codec, training, seed: of the recipe.
        device: where the codec is trained.
        quiet: whether to show no progress.

    Raises:
        UserError: the folder has tokenizers that were made otherwise, `data.tokenizers` names none
            that will do, or they cannot be made.
    """
    data, folder = reading.data, Tokenizers(reading.data.path)
    if data.tokenizers is not None:
        _take(Tokenizers(data.tokenizers), folder, data.image_share)
    else:
        settings = {
            "seed": seed,
            **_named("text_tokenizer", text.model_dump(mode="json")),
            **_named("codec", codec.model_dump(mode="json")),
            **_named("codec_training", training.of_effect),
        }
        if folder.text.exists():
            _bind(folder, settings)
        else:
            make_text_tokenizer(text, codec, _texts(reading, text, settings), folder, quiet)
            reading.save()
        if not folder.codec.exists():
            _make_codec(reading, codec, training, seed, device, folder, quiet)
            reading.save()
    complete(folder, codec)
    return Vocabulary.load(folder.vocabulary)


def _texts(
    reading: TrainingDocuments, text: TextTokenizerConfig, settings: dict[str, Any]
) -> Iterator[str]:
    """What the text tokenizer learns from; settings bind when all of it could be read."""
    yield from reading.texts(text.max_documents)
    _bind(Tokenizers(reading.data.path), settings)


def encoders_of(folder: Tokenizers) -> Encoders:
    """Digests of a folder's tokenizer and codec."""
    weights = [folder.codec / name for name in CODEC_FILES]
    return Encoders(
        tokenizer=_digest([folder.text]),
        codec=_digest(weights) if folder.codec.exists() else "",
    )


def _take(source: Tokenizers, folder: Tokenizers, image_share: float) -> None:
    """Copy tokenizers, unless that was done already."""
    taken = folder.vocabulary.exists() and any(key.startswith(_TAKEN) for key in _note_of(folder))
    if taken and not source.path.exists():
        return  # the folder needs them no longer
    for needed in (source.text, source.vocabulary):
        if not needed.exists():
            raise UserError(
                f"{needed}: is missing; data.tokenizers names no whole folder of tokenizers: "
                "finish it with the command that makes it"
            )
    if image_share and not source.codec.exists():
        raise UserError(
            f"{source.path}: has no image codec, and image_share is {image_share:g}; make one "
            f"with `moma tokenizer train-image --out {source.path}`, or set image_share to 0"
        )
    _bind(folder, _named(_TAKEN, encoders_of(source).model_dump()))
    if not folder.vocabulary.exists():
        source.copy_to(folder)


def _make_codec(
    reading: TrainingDocuments,
    config: CodecConfig,
    training: CodecTrainingConfig,
    seed: int,
    device: torch.device,
    folder: Tokenizers,
    quiet: bool,
) -> None:
    """Train the codec; where there is no image and none is asked for, there is none."""
    found = reading.images(training.max_documents, held_out=False)
    share = reading.data.image_share
    if not found and not share:
        return
    if not found:
        raise UserError(
            f"image_share is {share:g}, but no source holds an image, so there is nothing to "
            "train a codec on; add a source of images or set image_share to 0"
        )
    # Encoding judges the share of what cannot be read, of every source by itself.
    seen, unseen = (
        ReadableImages(images, config.image_size, most_unreadable=1)
        for images in (found, reading.images(training.max_documents, held_out=True))
    )
    measured = unseen if unseen.has_readable else ()
    make_codec(config, training, seen, measured, folder, seed, device, quiet)


def _bind(folder: Tokenizers, settings: dict[str, Any]) -> None:
    """Note what the tokenizers of a folder are made with, or refuse other settings.

    As long as there is no tokenizer, nothing is bound: settings may turn out to be impossible.
    """
    before = _note_of(folder) if folder.text.exists() else {}
    keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if before and keys:
        named = ", ".join(keys[:_MOST_NAMED]) + (", …" if len(keys) > _MOST_NAMED else "")
        raise UserError(
            f"{folder.path}: was prepared with other settings of tokenizer and codec ({named}); "
            "choose another folder with data.path=…, or delete this one"
        )
    if keys:
        atomic_write(folder.path / _NOTE_FILE, json.dumps(settings, indent=2) + "\n")


def _note_of(folder: Tokenizers) -> dict[str, Any]:
    """What `_bind` noted; empty if it did not yet."""
    note = folder.path / _NOTE_FILE
    if not note.exists():
        return {}
    try:
        return dict(json.loads(note.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{note}: damaged ({error}); delete {folder.path} to prepare anew"
        ) from error


def _named(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    return {f"{section}.{key}": value for key, value in values.items()}


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
